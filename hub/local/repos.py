"""What the local Hub answers about accounts, repos, their history and refs."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from hub.local.app import (
    API,
    REV,
    USERS,
    Call,
    Hub,
    fields,
    next_link,
    one_of,
    page_size,
    prefix,
    route,
    whole_number,
)
from hub.local.card_rules import card_data, check_card
from hub.local.store import AUTHOR, DATE, KINDS, MAIN, ApiError, Commit, File, Pull, Repo, check_ref

ROLES = {"write": "admin", "read": "read"}
"""The role in every organisation, by what a token may do."""


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, call: Call) -> Response:
    """Who the token belongs to; the organisations are those that have a repo here."""
    role = hub.role(call)
    if role is None:
        raise ApiError(401, "Invalid username or password.")
    user = USERS[role]
    orgs = sorted({repo.id.partition("/")[0] for kind in KINDS for repo in hub.store.repos(kind)} - {user})
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": role}}
    rows = [{"type": "org", "name": org, "fullname": org, "roleInOrg": ROLES[role]} for org in orgs]
    return JSONResponse(
        {"type": "user", "id": user, "name": user, "fullname": user, "orgs": rows, "auth": token}
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
    repo_id = f"{given['organization'] or USERS['write']}/{given['name']}"
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
    names = {"kind": kind, "id": f"{given['organization'] or USERS['write']}/{given['name']}"}
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


@route("POST", f"{API}/user-access-request/grant")
def grant(hub: Hub, call: Call) -> Response:
    """Let a user into a gated repo."""
    repo = hub.repo(call, write=True)
    user = known_user(fields(call.json(), "grant", {"user": str})["user"])
    if user in repo.access:
        raise ApiError(400, f"{user} has access already")
    repo.set_access(user, granted=True)
    return JSONResponse({"user": user})


@route("POST", f"{API}/user-access-request/handle")
def handle_request(hub: Hub, call: Call) -> Response:
    """Let a user into a gated repo, or no longer."""
    repo = hub.repo(call, write=True)
    given = fields(call.json(), "handle", {"user": str, "status": str}, {"rejectionReason": str})
    status = one_of(given["status"], ("accepted", "rejected", "pending"), "status")
    repo.set_access(known_user(given["user"]), granted=status == "accepted")
    return Response("OK")


@route("GET", f"{API}/user-access-request/accepted")
def accepted(hub: Hub, call: Call) -> Response:
    """Who was let into a gated repo."""
    users = hub.repo(call, write=True).access
    return JSONResponse(
        [
            {
                "requestId": user,
                "user": {"user": user, "fullname": user},
                "status": "accepted",
                "timestamp": DATE,
            }
            for user in users
        ]
    )


def known_user(name: str) -> str:
    """Refuse a user that this Hub does not have."""
    if name not in USERS.values():
        raise ApiError(404, f"User {name!r} not found")
    return name


@route("GET", f"{API}/auth-check")
def auth_check(hub: Hub, call: Call) -> Response:
    """Whether the caller may read the files."""
    hub.check_gate(call, hub.repo(call))
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
    pulls = [
        {"name": f"pr/{number}", "ref": f"refs/pr/{number}", "targetCommit": pull["head"]}
        for number, pull in found["pulls"].items()
    ]
    return JSONResponse(answer | ({"pullRequests": pulls} if call.flag("include_prs") else {}))


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


DISCUSSION = rf"{API}/discussions/(?P<number>[1-9]\d*)"


@route("GET", f"{API}/discussions", "type", "status", "author", "p")
def discussions(hub: Hub, call: Call) -> Response:
    """The pull requests, newest first; there are no other discussions here."""
    repo = hub.repo(call)
    kind = one_of(call.query.get("type", "all"), ("all", "discussion", "pull_request"), "type")
    status = one_of(call.query.get("status", "all"), ("all", "open", "closed"), "status")
    author = call.query.get("author")
    found = [
        pull
        for pull in reversed(repo.pulls if kind != "discussion" else [])
        if (status == "all" or (pull.status == "open") == (status == "open"))
        and author in (None, pull.author)
    ]
    start = whole_number(call.query.get("p", "0"), "p") * hub.page
    rows = [pull_row(repo, pull) for pull in found[start : start + hub.page]]
    return JSONResponse({"discussions": rows, "count": len(found), "start": start})


def pull_row(repo: Repo, pull: Pull) -> dict[str, Any]:
    """A pull request as the list of discussions has it."""
    row = {"num": pull.number, "title": pull.title, "author": {"name": pull.author}, "status": pull.status}
    return row | {"createdAt": DATE, "isPullRequest": True, "repo": {"name": repo.id, "type": repo.kind[:-1]}}


@route("POST", f"{DISCUSSION}/merge")
def merge(hub: Hub, call: Call) -> Response:
    """Merge a pull request; 409 when `main` changed the same files since."""
    repo = hub.repo(call, write=True)
    if call.body:
        fields(call.json() or {}, "merge", {}, {"comment": str})
    repo.merge(int(call.names["number"]))
    return Response("OK")


@route("POST", f"{DISCUSSION}/status")
def change_status(hub: Hub, call: Call) -> Response:
    """Close a pull request."""
    repo = hub.repo(call, write=True)
    given = fields(call.json(), "status", {"status": str}, {"comment": str})
    one_of(given["status"], ("closed",), "status")
    number = int(call.names["number"])
    repo.close(number)
    event = {
        "id": str(number),
        "type": "status-change",
        "createdAt": DATE,
        "author": {"name": hub.member(call)},
    }
    return JSONResponse({"newStatus": event | {"data": {"status": "closed"}}})
