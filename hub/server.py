"""A local Hub over HTTP for unmodified huggingface_hub and datasets clients; keeps everything in a `Store`.

It is never kinder than the real one: what it does not know (a path, a query parameter, a header, a field of a
body) it refuses with 400 instead of ignoring it. Large files come by git-LFS `basic` or by xet.
Tokens are never printed: there is no access log, and messages never repeat a header's value.
"""

import base64
import binascii
import hashlib
import hmac
import json
import os
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from hub.card_rules import card_data, check_card
from hub.store import (
    AUTHOR,
    DATE,
    KINDS,
    MAIN,
    ApiError,
    Change,
    Commit,
    File,
    Repo,
    Store,
    check_path,
    check_ref,
    stored_as_lfs,
    tree_ids,
)
from hub.xet import EXPIRY, forget_finished, session_url, take_over

TOKENS = {"hf_local": "write", "hf_local_reader": "read"}
"""The tokens of a local Hub and what each may do; not secrets: the Hub answers this machine only."""

USER = "local"
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

LFS_JSON = "application/vnd.git-lfs+json"


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
        raise ApiError(400, f"{where}: unknown field {unknown[0]!r}; known are {sorted(known)}")
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


Handler = Callable[["Hub", Call], Response]
ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>{'|'.join(KINDS)})/{ID}"
REV = r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, re.Pattern[str], tuple[str, ...], Handler]] = []


def route(method: str, pattern: str, *query: str) -> Callable[[Handler], Handler]:
    """Answer `method` on paths that match `pattern`, and let it have these query parameters only."""

    def keep(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), query, handler))
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

    async def _dispatch(self, request: Request) -> Response:
        handler, names, allowed = find_route(request)
        check_headers(request, ranges=handler is resolve)
        call = Call(request, names, query_of(request, allowed))
        if handler is upload_object:
            return await receive_object(self, call)
        body = await read_body(request)
        return await run_in_threadpool(handler, self, Call(request, names, call.query, body))

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

    def signature(self, *parts: object) -> str:
        """What makes an upload link valid without a token."""
        text = "\n".join(str(part) for part in parts)
        return hmac.new(self.store.key, text.encode(), hashlib.sha256).hexdigest()


def find_route(request: Request) -> tuple[Handler, dict[str, str], tuple[str, ...]]:
    """The handler for a request, the variable parts of its path, and the query parameters it may have."""
    path = request.scope["raw_path"].decode("latin-1")  # still quoted: a revision may hold a slash
    other = False
    for method, pattern, query, handler in ROUTES:
        if found := pattern.fullmatch(path):
            if method == request.method or (
                method == "GET" and request.method == "HEAD" and handler is resolve
            ):
                names = {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
                return handler, names, query
            other = True
    what = "method for this path" if other else "path"
    raise ApiError(400, f"unknown {what}: {request.method} {path}; this local Hub does not have it")


def check_headers(request: Request, ranges: bool) -> None:
    """Refuse a request header nobody would act on."""
    for name in request.headers:
        if name not in HEADERS or (name == "range" and not ranges):
            raise ApiError(400, f"unknown header {name!r}: this local Hub would ignore it; do not send it")


def query_of(request: Request, allowed: Sequence[str]) -> dict[str, str | list[str]]:
    """The query, refused when it has a parameter the route does not know or, lists apart, one twice."""
    query: dict[str, str | list[str]] = {}
    for name, value in parse_qsl(request.url.query, keep_blank_values=True):
        if name in allowed and name not in query:
            query[name] = value
        elif f"{name}*" in allowed:
            query[name] = [*query.get(name, []), value]
        else:
            raise ApiError(400, f"unknown or repeated query parameter {name!r}; known are {list(allowed)}")
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


# --- account and repos


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, call: Call) -> Response:
    """Who the token belongs to; the organisations are those that have a repo here."""
    role = hub.role(call)
    if role is None:
        raise ApiError(401, "Invalid username or password.")
    orgs = sorted({repo.id.partition("/")[0] for kind in KINDS for repo in hub.store.repos(kind)} - {USER})
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": role}}
    rows = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "admin"} for org in orgs]
    return JSONResponse(
        {"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": rows, "auth": token}
    )


@route("POST", "/api/repos/create")
def create_repo(hub: Hub, call: Call) -> Response:
    """Create a repo; 409 with the same URL when it exists."""
    hub.writer(call)
    optional = {"organization": str, "type": str, "visibility": str, "private": bool}
    given = fields(call.json(), "create", {"name": str}, optional)
    kind = f"{one_of(given['type'] or 'model', ('model', 'dataset'), 'type')}s"
    one_of(given["visibility"], (None, "public", "private"), "visibility")
    private = bool(given["private"]) or given["visibility"] == "private"
    repo_id = f"{given['organization'] or USER}/{given['name']}"
    url = f"{call.base}/{prefix(kind)}{repo_id}"
    if hub.store.create(kind, repo_id, private) is None:
        return JSONResponse(
            {"error": f"You already created this {kind[:-1]} repo: {repo_id}", "url": url}, 409
        )
    return JSONResponse({"url": url, "name": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: Hub, call: Call) -> Response:
    """Delete a repo for good."""
    given = fields(call.json(), "delete", {"name": str}, {"organization": str, "type": str})
    kind = f"{one_of(given['type'] or 'model', ('model', 'dataset'), 'type')}s"
    names = {"kind": kind, "id": f"{given['organization'] or USER}/{given['name']}"}
    hub.store.delete(hub.repo(Call(call.request, names, {}), write=True))
    return Response("OK")


@route("PUT", f"{API}/settings")
def settings(hub: Hub, call: Call) -> Response:
    """Change who may see a repo."""
    repo = hub.repo(call, write=True)
    given = fields(call.json(), "settings", {}, {"gated": object, "visibility": str, "private": bool})
    changes: dict[str, Any] = {}
    if given["gated"] is not None:
        changes["gated"] = one_of(given["gated"], ("auto", "manual", False), "gated")
    if given["visibility"] is not None:
        changes["private"] = one_of(given["visibility"], ("public", "private"), "visibility") == "private"
    if given["private"] is not None:
        changes["private"] = given["private"]
    repo.change_settings(**changes)
    return JSONResponse(repo.settings)


@route("GET", f"{API}/auth-check")
def auth_check(hub: Hub, call: Call) -> Response:
    """Whether the caller may read the files."""
    check_gate(hub, call, hub.repo(call))
    return Response("OK")


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, call: Call) -> Response:
    """Check the metadata of a card."""
    given = fields(call.json(), "validate-yaml", {"content": str, "repoType": str})
    one_of(given["repoType"], ("model", "dataset"), "repoType")
    errors, warnings = check_card(given["content"], f"{given['repoType']}s")
    answer = {
        "errors": [{"message": one} for one in errors],
        "warnings": [{"message": one} for one in warnings],
    }
    return JSONResponse(answer, 400 if errors else 200)


def prefix(kind: str) -> str:
    """What stands before a repo id outside `/api`."""
    return "datasets/" if kind == "datasets" else ""


# --- read


@route("GET", API, "blobs", "securityStatus", "expand*")
@route("GET", f"{API}/revision/{REV}", "blobs", "securityStatus", "expand*")
def info(hub: Hub, call: Call) -> Response:
    """Facts about a repo at a revision, with the names of its files."""
    repo = hub.repo(call)
    commit = repo.commit(call.names.get("rev", MAIN))
    facts = repo_facts(repo, commit, blobs=call.flag("blobs"), security=call.flag("securityStatus"))
    if wanted := call.query.get("expand"):
        if unknown := sorted(set(wanted) - facts.keys()):
            raise ApiError(400, f"query 'expand': unknown {unknown[0]!r}; known are {sorted(facts)}")
        facts = {key: value for key, value in facts.items() if key in ("_id", "id", *wanted)}
    return JSONResponse(facts)


def repo_facts(repo: Repo, commit: Commit, blobs: bool, security: bool) -> dict[str, Any]:
    """All there is to say about a repo at a commit."""
    card = readme_data(repo, commit)
    facts: dict[str, Any] = {
        "_id": hashlib.sha256(f"{repo.kind}/{repo.id}".encode()).hexdigest()[:24],
        "id": repo.id,
    }
    facts |= {"author": repo.id.partition("/")[0], "sha": commit.id, "lastModified": DATE, "createdAt": DATE}
    facts |= repo.settings | {"disabled": False, "downloads": 0, "likes": 0, "tags": card_tags(card)}
    facts |= {"cardData": card, "usedStorage": sum(file.size for file in commit.files.values())}
    facts["siblings"] = [sibling(path, file, blobs) for path, file in sorted(commit.files.items())]
    if repo.kind == "models":
        facts |= {
            "modelId": repo.id,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
        }
    return facts | ({"securityRepoStatus": {"scansDone": True, "filesWithIssues": []}} if security else {})


def readme_data(repo: Repo, commit: Commit) -> dict[str, Any]:
    """The metadata of the card, as JSON can say it."""
    if (readme := commit.files.get("README.md")) is None:
        return {}
    text = repo.path_of(readme).read_text("utf-8", errors="replace")
    return dict(json.loads(json.dumps(card_data(text), default=str)))


def card_tags(card: Mapping[str, Any]) -> list[str]:
    """The tags the Hub makes of a card's metadata."""
    tags = list(card.get("tags") or [])
    for key, word in (("license", "license"), ("language", "language"), ("base_model", "base_model")):
        given = card.get(key) or []
        tags += [f"{word}:{one}" for one in (given if isinstance(given, list) else [given])]
    return [*([card["library_name"]] if card.get("library_name") else []), *tags]


def sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    """A file as `siblings` lists it."""
    if not blobs:
        return {"rfilename": path}
    row: dict[str, Any] = {"rfilename": path, "size": file.size, "blobId": file.oid}
    lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return row | ({"lfs": lfs} if file.sha256 else {})


@route("GET", f"{API}/refs", "include_prs")
def refs(hub: Hub, call: Call) -> Response:
    """Branches and tags."""
    found = hub.repo(call).refs

    def rows(group: str, folder: str) -> list[dict[str, str]]:
        named = sorted(found[group].items())
        return [
            {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit} for name, commit in named
        ]

    answer = {"branches": rows("branches", "heads"), "converts": [], "tags": rows("tags", "tags")}
    return JSONResponse(answer | ({"pullRequests": []} if call.flag("include_prs") else {}))


@route("GET", f"{API}/commits/{REV}", "expand[]", "p")
def commits(hub: Hub, call: Call) -> Response:
    """The history of a revision, newest first; a page has a twentieth of a tree's entries."""
    one_of(call.query.get("expand[]"), (None, "formatted"), "expand[]")
    page, size = whole_number(call.query.get("p", "0"), "p"), page_size(hub, short=True)
    history = list(hub.repo(call).history(call.names["rev"]))
    rows = [commit_row(one, "expand[]" in call.query) for one in history[page * size : (page + 1) * size]]
    more = len(history) > (page + 1) * size
    return JSONResponse(rows, headers=next_link(call, p=str(page + 1)) if more else None)


def commit_row(commit: Commit, formatted: bool) -> dict[str, Any]:
    """A commit as the history lists it."""
    row: dict[str, Any] = {"id": commit.id, "title": commit.title, "message": commit.message, "date": DATE}
    row["authors"] = [{"user": AUTHOR}]
    return row | ({"formatted": {"title": commit.title, "message": commit.message}} if formatted else {})


def whole_number(text: Any, where: str) -> int:
    """A query parameter that counts something."""
    if not re.fullmatch(r"\d{1,9}", str(text)):
        raise ApiError(400, f"query {where!r}: expected a whole number, got {text!r}")
    return int(text)


def next_link(call: Call, **query: str) -> dict[str, str]:
    """The header that leads to the next page."""
    url = f"{call.base}{call.request.scope['raw_path'].decode('latin-1')}"
    return {"Link": f'<{url}?{urlencode({**call.query, **query}, doseq=True)}>; rel="next"'}


@route("GET", f"{API}/tree/{REV}(?:/(?P<path>.+))?", "recursive", "expand", "cursor")
def tree(hub: Hub, call: Call) -> Response:
    """Files and folders below a path, a page at a time."""
    repo = hub.repo(call)
    commit = repo.commit(call.names["rev"])
    folder = call.names.get("path", "")
    below = entries(commit, folder, call.flag("recursive"))
    if folder and not below:
        raise ApiError(
            404, f"{folder} does not exist on {call.names['rev']}", "EntryNotFound", commit_header(commit)
        )
    left = [path for path in below if path > str(call.query.get("cursor", ""))]
    size = page_size(hub, short=call.flag("expand"))
    rows = describe(repo, commit, left[:size], call.flag("expand"))
    more = next_link(call, cursor=left[size - 1]) if len(left) > size else {}
    return JSONResponse(rows, headers=commit_header(commit) | more)


def page_size(hub: Hub, short: bool) -> int:
    """Entries of one page: where each costs the Hub more, a twentieth."""
    return max(1, hub.page // 20) if short else hub.page


def entries(commit: Commit, folder: str, recursive: bool) -> list[str]:
    """Paths of the files and folders below `folder`, sorted."""
    start = f"{folder}/" if folder else ""
    found = set()
    for path in commit.files:
        if path.startswith(start):
            parts = path[len(start) :].split("/")
            depths = range(1, len(parts) + 1) if recursive else [1]
            found |= {start + "/".join(parts[:depth]) for depth in depths}
    return sorted(found)


def describe(repo: Repo, commit: Commit, paths: Sequence[str], expand: bool) -> list[dict[str, Any]]:
    """Files and folders the way `tree` and `paths-info` list them."""
    folders = tree_ids(commit.files)
    rows = []
    for path in paths:
        if (file := commit.files.get(path)) is None:
            row: dict[str, Any] = {"type": "directory", "oid": folders[path], "size": 0, "path": path}
        else:
            row = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
            lfs = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            row |= {"lfs": lfs} if file.sha256 else {}
        rows.append(row | (last_change(repo, commit, path) if expand else {}))
    return rows


def last_change(repo: Repo, commit: Commit, path: str) -> dict[str, Any]:
    """The commit that last changed a path, and what a scan of it said (there is none here)."""

    def content(one: Commit) -> dict[str, File]:
        return {name: file for name, file in one.files.items() if name == path or name.startswith(f"{path}/")}

    last = commit
    for older in repo.history(commit.id):
        if content(older) != content(commit):
            break
        last = older
    scan = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return {"lastCommit": {"id": last.id, "title": last.title, "date": DATE}, "securityFileStatus": scan}


@route("POST", f"{API}/paths-info/{REV}")
def paths_info(hub: Hub, call: Call) -> Response:
    """Facts about some paths; those that do not exist are left out."""
    repo = hub.repo(call)
    commit = repo.commit(call.names["rev"])
    call.content_type("application/x-www-form-urlencoded")
    form = parse_qs(call.body.decode("latin-1"), keep_blank_values=True, strict_parsing=bool(call.body))
    if unknown := sorted(form.keys() - {"paths", "expand"}):
        raise ApiError(400, f"paths-info: unknown field {unknown[0]!r}; known are 'paths' and 'expand'")
    expand = one_of(form.get("expand", ["false"])[-1].lower(), ("true", "false"), "expand") == "true"
    there = [path for path in form.get("paths", []) if path in commit.files or entries(commit, path, False)]
    return JSONResponse(
        describe(repo, commit, [path for path in there if path], expand), headers=commit_header(commit)
    )


def commit_header(commit: Commit) -> dict[str, str]:
    """The header that says which commit an answer is about."""
    return {"X-Repo-Commit": commit.id}


@route("GET", rf"/(?P<kind>datasets)/{ID}/resolve/{REV}/(?P<path>.+)", "download")
@route("GET", rf"/{ID}/resolve/{REV}/(?P<path>.+)", "download")
def resolve(hub: Hub, call: Call) -> Response:
    """The bytes of a file, or a range of them; HEAD gives the headers alone."""
    repo = hub.repo(call)
    check_gate(hub, call, repo)
    call.flag("download")
    commit = repo.commit(call.names["rev"])
    path = call.names["path"]
    if (file := commit.files.get(path)) is None:
        raise ApiError(404, f"Entry not found: {path}", "EntryNotFound", commit_header(commit))
    headers = file_headers(commit, path, file)
    asked = call.request.headers.get("range")
    start, stop = (0, file.size) if asked is None else byte_range(asked, file.size)
    headers["Content-Length"] = str(stop - start)
    if asked is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    if call.request.method == "HEAD":
        return Response(None, 200 if asked is None else 206, headers)
    return StreamingResponse(
        read_range(repo.path_of(file), start, stop), 200 if asked is None else 206, headers
    )


def check_gate(hub: Hub, call: Call, repo: Repo) -> None:
    """Refuse the files of a gated repo to callers who did not ask for access: here, all without a token."""
    if repo.settings["gated"] and hub.role(call) is None:
        message = (
            f"Access to {repo.kind[:-1]} {repo.id} is restricted. You must be authenticated to access it."
        )
        raise ApiError(401, message, "GatedRepo")


def file_headers(commit: Commit, path: str, file: File) -> dict[str, str]:
    """What a client learns of a file from HEAD."""
    name = quote(path.rpartition("/")[2])
    headers = commit_header(commit) | {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Disposition"] = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
    headers["Content-Type"] = "application/octet-stream" if file.sha256 else "text/plain; charset=utf-8"
    if file.sha256:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    return headers


def byte_range(header: str, size: int) -> tuple[int, int]:
    """First byte and the one after the last that a Range header asks for.

    Raises:
        ApiError: 416 none of them exists, 400 more than one range or none that can be read.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if not found or found[1] + found[2] == "" or (found[1] and found[2] and int(found[1]) > int(found[2])):
        raise ApiError(400, "expected one range like bytes=0-99, bytes=100- or bytes=-100")
    if found[1]:
        start, stop = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
    else:
        start, stop = max(0, size - int(found[2])), size
    if start >= stop:
        raise ApiError(416, f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return start, stop


def read_range(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a file from `start` up to `stop`, in blocks."""
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (block := file.read(min(1 << 20, stop - start))):
            start += len(block)
            yield block


# --- write


@route("POST", f"{API}/tag/{REV}")
def create_tag(hub: Hub, call: Call) -> Response:
    """Tag a revision; 409 when the tag exists: tags never move."""
    repo = hub.repo(call, write=True)
    given = fields(call.json(), "tag", {"tag": str}, {"message": str})
    repo.add_tag(given["tag"], call.names["rev"])
    return Response("OK")


@route("DELETE", f"{API}/tag/{REV}")
def delete_tag(hub: Hub, call: Call) -> Response:
    """Delete a tag."""
    hub.repo(call, write=True).remove_tag(call.names["rev"])
    return Response("OK")


@route("POST", f"{API}/branch/{REV}")
def create_branch(hub: Hub, call: Call) -> Response:
    """Start a branch; 409 when it exists."""
    repo = hub.repo(call, write=True)
    given = fields(call.json(), "branch", {}, {"startingPoint": str})
    repo.add_branch(check_ref(call.names["rev"]), given["startingPoint"] or MAIN)
    return Response("OK")


@route("DELETE", f"{API}/branch/{REV}")
def delete_branch(hub: Hub, call: Call) -> Response:
    """Delete a branch."""
    hub.repo(call, write=True).remove_branch(call.names["rev"])
    return Response("OK")


@route("POST", f"{API}/preupload/{REV}")
def preupload(hub: Hub, call: Call) -> Response:
    """How each file has to be uploaded, and what is at its path now."""
    repo = hub.repo(call, write=True)
    commit = repo.commit(call.names["rev"])
    given = fields(call.json(), "preupload", {"files": list})
    rows = []
    for i, one in enumerate(given["files"]):
        file = fields(one, f"preupload.files[{i}]", {"path": str, "sample": str, "size": int})
        head = decode_base64(file["sample"], f"preupload.files[{i}].sample")
        mode = "lfs" if stored_as_lfs(check_path(file["path"]), file["size"], head) else "regular"
        row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        old = commit.files.get(file["path"])
        rows.append(row | ({"oid": old.etag} if old else {}))
    return JSONResponse({"files": rows}, headers=commit_header(commit))


def decode_base64(text: str, where: str) -> bytes:
    """Strict base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: expected base64, got {error}") from error


@route("POST", f"{API}/commit/{REV}")
def commit(hub: Hub, call: Call) -> Response:
    """All operations of a commit, or none."""
    repo = hub.repo(call, write=True)
    call.content_type("application/x-ndjson")
    change = parse_change(call.body.splitlines())
    for verb, path, payload in change.operations:
        if verb == "add" and path == "README.md":
            refuse_bad_card(payload, repo.kind)
    take_over(hub.store, repo, [payload[0] for verb, _, payload in change.operations if verb == "lfs"])
    new = repo.apply(call.names["rev"], change)
    url = f"{call.base}/{prefix(repo.kind)}{repo.id}/commit/{new.id}"
    return JSONResponse({"success": True, "commitOid": new.id, "commitUrl": url, "hookOutput": ""})


def parse_change(lines: Sequence[bytes]) -> Change:
    """The lines of a commit: a header, then one operation each."""
    items = [
        fields(parse_json(line), f"line {i}", {"key": str, "value": dict}) for i, line in enumerate(lines)
    ]
    if not items or items[0]["key"] != "header":
        raise ApiError(400, "commit: expected the header as the first line")
    optional = {"description": str, "parentCommit": str}
    header = fields(items[0]["value"], "header", {"summary": str}, optional)
    if not header["summary"].strip():
        raise ApiError(400, "header: expected a summary, got an empty one")
    parent = header["parentCommit"]
    if parent is not None and not re.fullmatch(r"[0-9a-fA-F]{7,40}", parent):
        raise ApiError(400, "header: expected parentCommit of 7 to 40 hex digits")
    operations = [
        parse_operation(item["key"], item["value"], f"line {i}") for i, item in enumerate(items[1:], 1)
    ]
    return Change(header["summary"], header["description"] or "", parent, operations)


def parse_operation(key: str, value: Any, where: str) -> tuple[str, str, Any]:
    """One operation of a commit as the store takes it."""
    if key == "file":
        given = fields(value, where, {"path": str, "content": str, "encoding": str})
        one_of(given["encoding"], ("base64",), f"{where}: encoding")
        return "add", check_path(given["path"]), decode_base64(given["content"], where)
    if key == "lfsFile":
        given = fields(value, where, {"path": str, "algo": str, "oid": str}, {"size": int})
        one_of(given["algo"], ("sha256",), f"{where}: algo")
        return "lfs", check_path(given["path"]), (sha256_hex(given["oid"], where), given["size"])
    if key in ("deletedFile", "deletedFolder"):
        path = fields(value, where, {"path": str})["path"]
        folder = key == "deletedFolder"
        return (
            ("delete_folder" if folder else "delete"),
            check_path(path.removesuffix("/") if folder else path),
            None,
        )
    raise ApiError(400, f"{where}: unknown operation {key!r}")


def refuse_bad_card(content: bytes, kind: str) -> None:
    """Refuse a commit whose README.md has metadata the Hub does not take."""
    try:
        errors, _ = check_card(content.decode(), kind)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"README.md: expected UTF-8, got {error}") from error
    if errors:
        raise ApiError(400, "Invalid metadata in README.md: " + "; ".join(errors))


# --- large files (LFS)

GIT = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+?)\.git/info/lfs"


@route("POST", f"{GIT}/objects/batch")
def lfs_batch(hub: Hub, call: Call) -> Response:
    """Where to upload which objects; an object without `actions` is stored already."""
    repo = hub.repo(call, write=True)
    required = {"operation": str, "transfers": list, "objects": list, "hash_algo": str}
    given = fields(call.json(LFS_JSON), "batch", required, {"ref": dict})
    one_of(given["operation"], ("upload",), "operation")
    one_of(given["hash_algo"], ("sha256",), "hash_algo")
    if "basic" not in given["transfers"]:
        raise ApiError(400, f"transfers: expected 'basic' among them, got {given['transfers']}")
    if given["ref"] is not None:
        repo.commit(fields(given["ref"], "ref", {"name": str})["name"])
    rows = [lfs_object(hub, call, repo, one, f"objects[{i}]") for i, one in enumerate(given["objects"])]
    return JSONResponse({"transfer": "basic", "objects": rows}, media_type=LFS_JSON)


def lfs_object(hub: Hub, call: Call, repo: Repo, one: Any, where: str) -> dict[str, Any]:
    """The answer for one object: nothing to do, or a signed link to put it to."""
    given = fields(one, where, {"oid": str, "size": int})
    oid, size = sha256_hex(given["oid"], where), given["size"]
    if repo.lfs_size(oid) == size:
        return {"oid": oid, "size": size}
    signed = urlencode({"size": size, "signature": hub.signature(repo.kind, repo.id, oid, size)})
    upload = {"href": f"{call.base}/lfs/{repo.kind}/{repo.id}/{oid}?{signed}"}
    verify = {"href": f"{call.base}/{prefix(repo.kind)}{repo.id}.git/info/lfs/verify"}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


@route("PUT", rf"/lfs/(?P<kind>{'|'.join(KINDS)})/{ID}/(?P<oid>[0-9a-f]{{64}})", "size", "signature")
def upload_object(hub: Hub, call: Call) -> Response:
    """Never called: `receive_object` reads the body as it comes."""
    raise NotImplementedError


async def receive_object(hub: Hub, call: Call) -> Response:
    """Store an LFS object if the link is one we gave out and the bytes are the announced ones."""
    kind, repo_id, oid = call.names["kind"], call.names["id"], call.names["oid"]
    size = whole_number(call.query.get("size", ""), "size")
    signature = hub.signature(kind, repo_id, oid, size)
    repo = hub.store.repo(kind, repo_id)
    if repo is None or not hmac.compare_digest(signature, str(call.query.get("signature", ""))):
        raise ApiError(403, "expected an upload link from the LFS batch endpoint; ask for a new one")
    try:
        await keep_object(hub, repo, oid, size, call.request.stream())
    except ClientDisconnect as error:
        raise ApiError(400, f"LFS object {oid}: the upload broke off; upload it again") from error
    return Response("OK", headers={"ETag": f'"{oid}"'})


async def keep_object(hub: Hub, repo: Repo, oid: str, size: int, chunks: AsyncIterator[bytes]) -> None:
    """Write the chunks to a temporary file that becomes the object when it is what was announced."""
    got = 0
    with hub.store.upload(repo, oid, size) as file:
        async for chunk in chunks:
            got += len(chunk)
            if got > size:
                raise ApiError(400, f"LFS object {oid}: expected {size} bytes, got more")
            file.write(chunk)


@route("POST", f"{GIT}/verify")
def lfs_verify(hub: Hub, call: Call) -> Response:
    """Whether an object is stored with the size the client thinks it has."""
    repo = hub.repo(call, write=True)
    given = fields(call.json(), "verify", {"oid": str, "size": int})
    if (stored := repo.lfs_size(sha256_hex(given["oid"], "verify"))) != given["size"]:
        raise ApiError(404, f"LFS object {given['oid']}: expected {given['size']} bytes, stored {stored}")
    return Response("OK")


@route("GET", f"{API}/xet-write-token/{REV}")
def xet_write_token(hub: Hub, call: Call) -> Response:
    """A folder of this machine where the client's hf_xet may store large files before it commits them."""
    repo = hub.repo(call, write=True)
    repo.commit(call.names["rev"])
    url = session_url(repo, call.request.headers.get("x-xet-session-id", ""))
    return JSONResponse({"casUrl": url, "accessToken": "local", "exp": EXPIRY})


# --- run


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket (port 0: any free one) and the URL it is reached by."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((host, port))
    found.listen(128)
    return found, f"http://{host}:{found.getsockname()[1]}"


def runner(app: ASGIApp) -> uvicorn.Server:
    """uvicorn without an access log: it would print the signatures of upload links."""
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", lifespan="off", timeout_graceful_shutdown=2
    )
    return uvicorn.Server(config)


def serve(
    root: Path, host: str = "127.0.0.1", port: int = 0, tokens: Mapping[str, str] = TOKENS, page: int = 1000
) -> None:
    """Serve the Hub kept in `root` until interrupted; prints its URL when it is ready.

    Args:
        root: folder of the store, made if missing.
        host: address to listen on; keep it on the loopback, the tokens are no secrets.
        port: 0 picks a free one.
        tokens: bearer tokens and what each may do, "read" or "write".
        page: entries of one page of a tree listing.

    Raises:
        BlockingIOError: another process serves this folder.
    """
    store = Store(root)
    try:
        where, url = listen(host, port)
        print(f"Hub ready at {url} (root {root})", flush=True)
        runner(Hub(store, tokens, page).app).run(sockets=[where])
    finally:
        store.close()


@contextmanager
def background(
    root: Path,
    tokens: Mapping[str, str] = TOKENS,
    page: int = 1000,
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> Iterator[str]:
    """The Hub kept in `root` on a free loopback port, in a thread, while the block runs.

    Args:
        root: folder of the store, made if missing.
        tokens: bearer tokens and what each may do, "read" or "write".
        page: entries of one page of a tree listing.
        wrap: puts something around the application, for instance one that fails now and then.

    Yields:
        Its URL.
    """
    store = Store(root)
    where, url = listen("127.0.0.1", 0)
    server = runner(wrap(Hub(store, tokens, page).app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [where]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join()
        where.close()
        store.close()


def client_env(url: str, home: Path, token: str | None = "hf_local") -> dict[str, str]:
    """The environment in which an unmodified client talks to the Hub at `url` and to nothing else.

    Args:
        url: of the Hub; huggingface_hub reads it once, when it is imported.
        home: an own folder for caches, so that nothing of the user's is read or written.
        token: what the client sends; None for nobody.
    """
    keep = {
        name: os.environ[name]
        for name in ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")
        if name in os.environ
    }
    off = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "DO_NOT_TRACK")
    bars = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    env = (
        keep | dict.fromkeys((*off, *bars), "1") | {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1"}
    )
    env |= {
        "HF_ENDPOINT": url,
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "OMP_NUM_THREADS": "1",
    }
    return env | ({"HF_TOKEN": token} if token is not None else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})
