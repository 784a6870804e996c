"""What the local Hub answers about files: listing, reading, committing, and large files by LFS or xet."""

import base64
import binascii
import hmac
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from hub.local.app import (
    API,
    ID,
    REV,
    Call,
    Hub,
    commit_header,
    fields,
    next_link,
    one_of,
    page_size,
    parse_json,
    prefix,
    route,
    sha256_hex,
    strange,
    whole_number,
)
from hub.local.card_rules import check_card
from hub.local.store import (
    DATE,
    KINDS,
    MAIN,
    ApiError,
    Change,
    Commit,
    File,
    Repo,
    check_path,
    stored_as_lfs,
    tree_ids,
)
from hub.local.xet import EXPIRY, session_url, take_over

# --- read


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
        raise strange(f"paths-info: unknown field {unknown[0]!r}; known are 'paths' and 'expand'")
    expand = one_of(form.get("expand", ["false"])[-1].lower(), ("true", "false"), "expand") == "true"
    there = [path for path in form.get("paths", []) if path in commit.files or entries(commit, path, False)]
    return JSONResponse(
        describe(repo, commit, [path for path in there if path], expand), headers=commit_header(commit)
    )


@route("GET", rf"/(?P<kind>datasets)/{ID}/resolve/{REV}/(?P<path>.+)", "download", ranges=True)
@route("GET", rf"/{ID}/resolve/{REV}/(?P<path>.+)", "download", ranges=True)
def resolve(hub: Hub, call: Call) -> Response:
    """The bytes of a file, or a range of them; HEAD gives the headers alone."""
    repo = hub.repo(call)
    hub.check_gate(call, repo)
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


@route("POST", f"{API}/preupload/{REV}", "create_pr")
def preupload(hub: Hub, call: Call) -> Response:
    """How each file has to be uploaded, and what is at its path now."""
    repo = writable(hub, call)
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


def writable(hub: Hub, call: Call) -> Repo:
    """The repo a call is about to change; whoever has a token may open a pull request."""
    if not call.flag("create_pr"):
        return hub.repo(call, write=True)
    if call.names["rev"] != MAIN:
        raise ApiError(400, f"a pull request is made on {MAIN!r}, got {call.names['rev']!r}")
    hub.member(call)
    return hub.repo(call)


@route("POST", f"{API}/commit/{REV}", "create_pr")
def commit(hub: Hub, call: Call) -> Response:
    """All operations of a commit, or none."""
    repo = writable(hub, call)
    call.content_type("application/x-ndjson")
    change = parse_change(call.body.splitlines())
    for verb, path, payload in change.operations:
        if verb == "add" and path == "README.md":
            refuse_bad_card(payload, repo.kind)
    take_over(hub.store, repo, [payload[0] for verb, _, payload in change.operations if verb == "lfs"])
    page, answer = f"{call.base}/{prefix(repo.kind)}{repo.id}", {}
    if call.flag("create_pr"):
        new, pull = repo.propose(change, hub.member(call))
        answer["pullRequestUrl"] = f"{page}/discussions/{pull.number}"
    else:
        new = repo.apply(call.names["rev"], change)
    answer |= {"commitOid": new.id, "commitUrl": f"{page}/commit/{new.id}"}
    return JSONResponse(answer | {"success": True, "hookOutput": ""})


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
    raise strange(f"{where}: unknown operation {key!r}")


def refuse_bad_card(content: bytes, kind: str) -> None:
    """Refuse a commit whose README.md has metadata the Hub does not take."""
    try:
        errors, _ = check_card(content.decode(), kind)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"README.md: expected UTF-8, got {error}") from error
    if errors:
        raise ApiError(400, "Invalid metadata in README.md: " + "; ".join(errors))


# --- large files (LFS)

LFS_JSON = "application/vnd.git-lfs+json"
GIT = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+?)\.git/info/lfs"


@route("POST", f"{GIT}/objects/batch")
def lfs_batch(hub: Hub, call: Call) -> Response:
    """Where to upload which objects; an object without `actions` is stored already.

    Whoever has a token may: objects are seen by nobody until a commit or a pull request names them.
    """
    repo = hub.repo(call)
    hub.member(call)
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


@route(
    "PUT",
    rf"/lfs/(?P<kind>{'|'.join(KINDS)})/{ID}/(?P<oid>[0-9a-f]{{64}})",
    "size",
    "signature",
    streams=True,
)
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
    repo = hub.repo(call)
    hub.member(call)
    given = fields(call.json(), "verify", {"oid": str, "size": int})
    if (stored := repo.lfs_size(sha256_hex(given["oid"], "verify"))) != given["size"]:
        raise ApiError(404, f"LFS object {given['oid']}: expected {given['size']} bytes, stored {stored}")
    return Response("OK")


@route("GET", f"{API}/xet-write-token/{REV}", "create_pr")
def xet_write_token(hub: Hub, call: Call) -> Response:
    """A folder of this machine where the client's hf_xet may store large files before it commits them."""
    repo = writable(hub, call)
    repo.commit(call.names["rev"])
    url = session_url(repo, call.request.headers.get("x-xet-session-id", ""))
    return JSONResponse({"casUrl": url, "accessToken": "local", "exp": EXPIRY})
