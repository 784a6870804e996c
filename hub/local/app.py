"""How the local Hub takes requests apart, refuses what it would have to ignore, and checks who asks.

What it does not know (a path, a query parameter, a header, a field of a body) it refuses with 400.
Tokens are never printed: messages never repeat a header's value.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub.local.store import KINDS, ApiError, Commit, Repo, Store
from hub.local.xet import forget_finished

Handler = TypeVar("Handler", bound=Callable[..., Any])

TOKENS = {"hf_local": "write", "hf_local_reader": "read"}
"""The tokens of a local Hub and what each may do; not secrets: the Hub answers this machine only."""

USERS = {"write": "local", "read": "reader"}
"""Who holds a token, by what it may do."""

STRANGE = "NotOfThisHub"
"""Code of the error of a request with something that this Hub does not know; tests fail on any."""

BODY_LIMIT = 512 * 1024 * 1024
"""Largest body of one request in bytes; LFS uploads are streamed and have no limit."""

_STANDARD = (
    "accept",
    "accept-encoding",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "host",
)
_TRANSFER = ("range", "transfer-encoding", "user-agent")
_EXTRA = ("x-amzn-trace-id", "x-hf-download-counter", "x-request-id", "x-xet-session-id")
HEADERS = frozenset({*_STANDARD, *_TRANSFER, *_EXTRA})
"""The request headers a client may send; those that trace or count are read by nobody, as on the real Hub."""


@dataclass(frozen=True)
class Call:
    """One request, taken apart and checked as far as its route says."""

    request: Request
    names: Mapping[str, str]
    """The variable parts of the path, unquoted."""
    query: Mapping[str, str | list[str]]
    body: bytes = b""

    @property
    def base(self) -> str:
        """The URL of this Hub as the client knows it, without a slash at the end."""
        return str(self.request.base_url).rstrip("/")

    def flag(self, name: str) -> bool:
        """A query parameter that is true or false."""
        value = self.query.get(name, "false")
        if value not in ("true", "false", "True", "False", "1", "0"):
            raise ApiError(400, f"query {name!r}: expected true or false, got {value!r}")
        return value in ("true", "True", "1")

    def content_type(self, expected: str) -> None:
        """Refuse a body of another type."""
        got = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if got != expected:
            raise ApiError(400, f"expected content-type {expected}, got {got or 'none'}")

    def json(self, content_type: str = "application/json") -> Any:
        """The body as JSON."""
        self.content_type(content_type)
        return parse_json(self.body)


def strange(what: str) -> ApiError:
    """The refusal of what this Hub would have to ignore."""
    return ApiError(400, what, STRANGE)


def parse_json(content: bytes) -> Any:
    """Parse JSON that came from a client."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise ApiError(400, f"expected JSON, got {error}") from error


def fields(
    value: Any, where: str, required: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> Any:
    """Refuse an object unless it has all required fields, no unknown one, and each of its type.

    Returns:
        `value` with None for the optional fields it lacks.
    """
    if not isinstance(value, dict):
        raise ApiError(400, f"{where}: expected an object, got {type(value).__name__}")
    known = {**required, **(optional or {})}
    if unknown := sorted(value.keys() - known.keys()):
        raise strange(f"{where}: unknown field {unknown[0]!r}; known are {sorted(known)}")
    for name, kind in known.items():
        got = value.get(name)
        if got is None and name not in required:
            continue
        if not isinstance(got, kind) or (kind is int and isinstance(got, bool)):
            raise ApiError(
                400, f"{where}: expected {name!r} of type {kind.__name__}, got {type(got).__name__}"
            )
    return dict.fromkeys(known) | value


def one_of(value: Any, allowed: Sequence[Any], where: str) -> Any:
    """Refuse a value that is not among the allowed ones."""
    if not any(value == one and type(value) is type(one) for one in allowed):  # False is not 0
        raise ApiError(400, f"{where}: expected one of {list(allowed)}, got {value!r}")
    return value


def sha256_hex(value: str, where: str) -> str:
    """Refuse what is not a sha256 in hex."""
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ApiError(400, f"{where}: expected a sha256 of 64 hex digits")
    return value


ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>{'|'.join(KINDS)})/{ID}"
REV = r"(?P<rev>[^/]+)"


class Endpoint(NamedTuple):
    """What answers a request, and what that may have."""

    method: str
    pattern: re.Pattern[str]
    query: tuple[str, ...]
    """Parameters; one that ends in `*` may come more than once."""
    handler: Callable[..., Any]
    ranges: bool
    """It answers HEAD and the header Range too."""
    streams: bool
    """It reads the body itself, as it comes, and is a coroutine."""


ENDPOINTS: list[Endpoint] = []
"""Filled by `route`, when `hub.local.repos` and `hub.local.files` are imported."""


def route(
    method: str, pattern: str, *query: str, ranges: bool = False, streams: bool = False
) -> Callable[[Handler], Handler]:
    """Answer `method` on paths that match `pattern`, and let it have these query parameters only."""

    def keep(handler: Handler) -> Handler:
        ENDPOINTS.append(Endpoint(method, re.compile(pattern), query, handler, ranges, streams))
        return handler

    return keep


class Hub:
    """The Hub's answers; `app` is its ASGI application.

    Args:
        store: where everything is kept.
        tokens: bearer tokens and what each may do, "read" or "write".
        page: entries of one page of a tree listing (a twentieth with `expand`); 1000 on the real Hub.
    """

    def __init__(self, store: Store, tokens: Mapping[str, str] = TOKENS, page: int = 1000) -> None:
        self.store, self.tokens, self.page = store, dict(tokens), page
        for repo in (one for kind in KINDS for one in store.repos(kind)):
            forget_finished(repo)
        methods = ["DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"]
        self.app = Starlette(routes=[Route("/{path:path}", self._answer, methods=methods)])

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._dispatch(request)
        except ApiError as error:
            return error_response(error)
        except ClientDisconnect:  # it has given up waiting, and reads no answer
            return error_response(ApiError(400, "expected the whole body, the client left"))

    async def _dispatch(self, request: Request) -> Response:
        endpoint, names = find_endpoint(request)
        check_headers(request, endpoint.ranges)
        query = query_of(request, endpoint.query)
        if endpoint.streams:
            return await endpoint.handler(self, Call(request, names, query))
        call = Call(request, names, query, await read_body(request))
        return await run_in_threadpool(endpoint.handler, self, call)

    def role(self, call: Call) -> str | None:
        """What the caller may do: "read", "write", or None for nobody in particular.

        Raises:
            ApiError: 401 a token that this Hub does not know.
        """
        header = call.request.headers.get("authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        for known, role in self.tokens.items():
            if scheme.lower() == "bearer" and hmac.compare_digest(known.encode(), token.encode()):
                return role
        raise ApiError(401, "Invalid credentials in Authorization header")

    def writer(self, call: Call) -> None:
        """Refuse a caller who may not write."""
        if (role := self.role(call)) is None:
            raise ApiError(401, "Invalid username or password.")
        if role != "write":
            raise ApiError(403, "Forbidden: the token has no write access; use one with the role 'write'")

    def member(self, call: Call) -> str:
        """The user who calls; refuse a caller without a token."""
        if (role := self.role(call)) is None:
            raise ApiError(401, "Invalid username or password.")
        return USERS[role]

    def repo(self, call: Call, write: bool = False) -> Repo:
        """The repo a call names, if the caller may see (or change) it; else a private one does not exist."""
        role = self.role(call)
        kind = call.names.get("kind") or "models"
        repo = self.store.repo(kind, call.names["id"])
        if repo is None or (repo.settings["private"] and role is None):
            raise ApiError(404, "Repository not found", "RepoNotFound")
        if write:
            self.writer(call)
        return repo

    def check_gate(self, call: Call, repo: Repo) -> None:
        """Refuse the files of a gated repo to callers who may not write to it and were not let in."""
        if not repo.settings["gated"]:
            return
        where = f"Access to {repo.kind[:-1]} {repo.id} is restricted"
        if (role := self.role(call)) is None:
            raise ApiError(401, f"{where}. You must be authenticated to access it.", "GatedRepo")
        if role != "write" and USERS[role] not in repo.access:
            raise ApiError(403, f"{where} and you are not in the authorized list.", "GatedRepo")

    def signature(self, *parts: object) -> str:
        """What makes an upload link valid without a token."""
        text = "\n".join(str(part) for part in parts)
        return hmac.new(self.store.key, text.encode(), hashlib.sha256).hexdigest()


def find_endpoint(request: Request) -> tuple[Endpoint, dict[str, str]]:
    """What answers a request, and the variable parts of its path."""
    path = request.scope["raw_path"].decode("latin-1")  # still quoted: a revision may hold a slash
    other = False
    for endpoint in ENDPOINTS:
        if found := endpoint.pattern.fullmatch(path):
            if request.method == endpoint.method or (request.method == "HEAD" and endpoint.ranges):
                names = {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
                return endpoint, names
            other = True
    what = "method for this path" if other else "path"
    raise strange(f"unknown {what}: {request.method} {path}; this local Hub does not have it")


def check_headers(request: Request, ranges: bool) -> None:
    """Refuse a request header nobody would act on."""
    for name in request.headers:
        if name not in HEADERS or (name == "range" and not ranges):
            raise strange(f"unknown header {name!r}: this local Hub would ignore it; do not send it")


def query_of(request: Request, allowed: Sequence[str]) -> dict[str, str | list[str]]:
    """The query, refused when it has a parameter the route does not know or, lists apart, one twice."""
    query: dict[str, str | list[str]] = {}
    for name, value in parse_qsl(request.url.query, keep_blank_values=True):
        if name in allowed and name not in query:
            query[name] = value
        elif f"{name}*" in allowed:
            query[name] = [*query.get(name, []), value]
        else:
            raise strange(f"unknown or repeated query parameter {name!r}; known are {list(allowed)}")
    return query


async def read_body(request: Request) -> bytes:
    """The whole body, refused when it is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise ApiError(413, f"expected a body of at most {BODY_LIMIT} bytes; upload large files as LFS")
    return bytes(body)


def error_response(error: ApiError) -> Response:
    """An error the way the Hub says it: JSON body and X-Error headers."""
    message = re.sub(r"[^ -~]+", " ", error.message)
    headers = {"X-Error-Message": message[:500], **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message}, error.status, headers)


def prefix(kind: str) -> str:
    """What stands before a repo id outside `/api`."""
    return "datasets/" if kind == "datasets" else ""


def whole_number(text: Any, where: str) -> int:
    """A query parameter that counts something."""
    if not re.fullmatch(r"\d{1,9}", str(text)):
        raise ApiError(400, f"query {where!r}: expected a whole number, got {text!r}")
    return int(text)


def next_link(call: Call, **query: str) -> dict[str, str]:
    """The header that leads to the next page."""
    url = f"{call.base}{call.request.scope['raw_path'].decode('latin-1')}"
    return {"Link": f'<{url}?{urlencode({**call.query, **query}, doseq=True)}>; rel="next"'}


def page_size(hub: Hub, short: bool) -> int:
    """Entries of one page: where each costs the Hub more, a twentieth."""
    return max(1, hub.page // 20) if short else hub.page


def commit_header(commit: Commit) -> dict[str, str]:
    """The header that says which commit an answer is about."""
    return {"X-Repo-Commit": commit.id}
