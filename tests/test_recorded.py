"""Proves that the local Hub takes from clients what the unmodified client sends, and nothing else.

Every call of huggingface_hub that changes something is made for real and its body recorded; then the Hub is
sent each body again with a field more, a field less, and a field of another type.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub.constants
import pytest
from hub_fixture import READER, WRITER, LocalHub, running
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from release_fixture import write_model_release
from test_server import BODIES

from hub.local.app import ENDPOINTS
from hub.plan import Access
from hub.publish import publish
from hub.remote import Target

REPO = "org/name"
FORM = ("/paths-info/",)
"""Bodies that are forms, not JSON."""

OPTIONAL = {
    "create": {"organization", "type", "visibility", "private"},
    "delete": {"organization", "type"},
    "settings": {"gated", "visibility", "private"},
    "tag": {"message"},
    "branch": {"startingPoint"},
    "handle": {"rejectionReason"},
    "status": {"comment"},
    "merge": {"comment"},
    "batch": {"ref"},
    "header": {"description", "parentCommit"},
    "lfsFile": {"size"},
}
"""What a body may lack, by the last word of its path or by the key of a commit's line."""

Body = tuple[str, str, bytes]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with (
        pytest.MonkeyPatch.context() as patch,
        running(tmp_path_factory.mktemp("recorded"), strict=False) as local,
    ):
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        local.faults.recording = True
        exercise(local, tmp_path_factory.mktemp("release"))
        local.faults.recording = False
        assert local.faults.strange == []
        yield local


def exercise(local: LocalHub, folder: Path) -> None:
    """Make every call that changes something, with every field that the client can send."""
    api, reader = local.api(), local.api(READER)
    api.create_repo(REPO, repo_type="dataset", private=True)
    api.update_repo_settings(REPO, repo_type="dataset", gated="manual", visibility="public")
    api.grant_access(REPO, "reader", repo_type="dataset")
    api.reject_access_request(REPO, "reader", repo_type="dataset", rejection_reason="no")
    given: Any = {"repo_id": REPO, "repo_type": "dataset", "commit_message": "files"}
    files = [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("b.bin", b"b\0")]
    files += [
        CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n"),
        CommitOperationAdd("d/e.txt", b"e"),
    ]
    head = api.create_commit(operations=files, commit_description="why", **given).oid
    gone = [CommitOperationDelete("a.txt"), CommitOperationDelete("d/", is_folder=True)]
    api.create_commit(operations=gone, parent_commit=head, **given)
    reader.create_commit(operations=[CommitOperationAdd("c.txt", b"c")], create_pr=True, **given)
    api.merge_pull_request(REPO, 1, repo_type="dataset", comment="thanks")
    reader.create_commit(operations=[CommitOperationAdd("c.txt", b"d")], create_pr=True, **given)
    api.change_discussion_status(REPO, 2, "closed", repo_type="dataset", comment="no")
    api.create_tag(REPO, repo_type="dataset", tag="v1", tag_message="one")
    api.create_branch(REPO, repo_type="dataset", branch="b", revision=head)
    api.get_paths_info(REPO, ["b.bin"], repo_type="dataset", expand=True)
    publish(
        write_model_release(folder / "r"), Target("org/m", "model", local.url, WRITER), Access(gated="auto")
    )
    api.create_repo("org/gone")
    api.delete_repo("org/gone")


def recorded(hub: LocalHub) -> list[Body]:
    return [body for body in hub.faults.bodies if body[2]]


def again(hub: LocalHub, body: Body, content: bytes) -> httpx2.Response:
    method, path, _ = body
    kind = "application/json"
    if "/commit/" in path:
        kind = "application/x-ndjson"
    elif path.endswith("/objects/batch"):
        kind = "application/vnd.git-lfs+json"
    headers = {"authorization": f"Bearer {WRITER}", "content-type": kind}
    return httpx2.request(method, hub.url + path, content=content, headers=headers, trust_env=False)


def parts(body: Body) -> list[tuple[str, list[str], dict[str, Any], Any]]:
    """(name, path of keys, object, whole) of each object in a body: what fields are looked for in."""
    _, path, content = body
    if "/commit/" in path:
        lines = [json.loads(line) for line in content.splitlines()]
        return [(line["key"], [str(i), "value"], line["value"], lines) for i, line in enumerate(lines)]
    whole = json.loads(content)
    name = path.rstrip("/").split("/")
    word = name[-1] if name[-1] in OPTIONAL or name[-1] in ("grant", "verify") else name[-2]
    found = [(word, [], whole, whole)]
    for key in ("files", "objects"):
        found += [(key, [key, str(i)], one, whole) for i, one in enumerate(whole.get(key, ()))]
    return found


def changed(whole: Any, where: list[str], fields: dict[str, Any]) -> bytes:
    """A body with the fields of one of its objects replaced."""
    copied = json.loads(json.dumps(whole))
    at, target = copied, where
    if not where:
        return json.dumps(fields).encode()
    for step in target[:-1]:
        at = at[int(step)] if isinstance(at, list) else at[step]
    last = target[-1]
    at[int(last) if isinstance(at, list) else last] = fields
    if isinstance(copied, list):
        return b"".join(json.dumps(line).encode() + b"\n" for line in copied)
    return json.dumps(copied).encode()


def json_bodies(hub: LocalHub) -> list[Body]:
    return [body for body in recorded(hub) if not any(part in body[1] for part in FORM)]


def test_every_endpoint_that_takes_a_body_was_met(hub: LocalHub) -> None:
    asked = {(method, path) for method, path, _ in hub.faults.log}
    for endpoint in ENDPOINTS:
        if endpoint.method in ("POST", "PUT", "DELETE") and "xet" not in endpoint.pattern.pattern:
            met = [path for method, path in asked if method == endpoint.method and _matches(endpoint, path)]
            ending = endpoint.pattern.pattern.rpartition("/")[2]
            if endpoint.method == "DELETE" and "delete" not in ending:
                continue  # of refs: they have no body
            assert met, endpoint.pattern.pattern


def _matches(endpoint: Any, path: str) -> bool:
    return endpoint.pattern.fullmatch(re.sub(r"refs/pr/(\d+)", r"refs%2Fpr%2F\1", path)) is not None


def test_a_field_more_than_the_client_sends_is_refused(hub: LocalHub) -> None:
    assert len(json_bodies(hub)) > 20
    for body in json_bodies(hub):
        for name, where, fields, whole in parts(body):
            answer = again(hub, body, changed(whole, where, fields | {"odd": 1}))
            assert answer.status_code == 400, (body[1], name)
            assert "unknown field 'odd'" in answer.json()["error"], (body[1], name, answer.text)


def test_every_field_that_the_client_always_sends_is_asked_for(hub: LocalHub) -> None:
    for body in json_bodies(hub):
        for name, where, fields, whole in parts(body):
            for field in sorted(fields.keys() - OPTIONAL.get(name, set())):
                left = {key: value for key, value in fields.items() if key != field}
                answer = again(hub, body, changed(whole, where, left))
                assert answer.status_code == 400, (body[1], name, field)


def test_no_field_may_be_of_another_type(hub: LocalHub) -> None:
    for body in json_bodies(hub):
        for name, where, fields, whole in parts(body):
            for field in sorted(fields):
                answer = again(
                    hub, body, changed(whole, where, fields | {field: {"of": ["another", "type"]}})
                )
                assert answer.status_code == 400, (body[1], name, field)


def test_bodies_made_by_hand_have_the_client_s_fields(hub: LocalHub) -> None:
    """The bodies that `test_server.py` sends differ from recorded ones in what they are meant to."""
    meant = {"colour", "strict", "force", "overwrite", "gitIgnore", "discussionsDisabled"}
    for method, path, body in BODIES:
        word = [
            part for part in path.split("/") if part in OPTIONAL or part in ("preupload", "validate-yaml")
        ][-1]
        seen = {
            field
            for one in json_bodies(hub)
            if one[0] == method and f"/{word}" in one[1]
            for _, where, fields, _ in parts(one)
            if not where
            for field in fields
        }
        assert set(body) - meant <= seen | OPTIONAL.get(word, set()), (path, body)
