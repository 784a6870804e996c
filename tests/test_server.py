"""Proves that the local Hub serves unmodified clients as the real one does, and is never kinder than that."""

import base64
import hashlib
import io
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_fixture import READER, WRITER, LocalHub, local_hub, running  # noqa: F401
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from daco.manifest import write_atomic
from hub.local.card_rules import check_card
from hub.local.store import File, Store, commit_id, git_id, tree_ids

REPO = "org/name"
DATA: Any = {"repo_id": REPO, "repo_type": "dataset"}
CARD = """---
license: mit
configs:
- config_name: words
  default: true
  data_files:
  - split: train
    path: data/words/*.parquet
- config_name: vectors
  data_files:
  - split: layer_1
    path: data/vectors/layer_1*.parquet
  - split: layer_2
    path: data/vectors/layer_2*.parquet
---
# A card
"""
WORDS = pa.table({"word": ["knife", "pärt", "θ"], "n": pa.array([1, 2, 3], pa.int32())})
VECTORS = pa.table({"vector": pa.array([[0.5, -1.0, 2.0], [3.0, 4.0, 5.5]], pa.list_(pa.float32(), 3))})


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def publish(api: HfApi, **files: bytes) -> str:
    operations = [add(path, content) for path, content in files.items()]
    return str(api.create_commit(operations=operations, commit_message="files", **DATA).oid)


@pytest.fixture
def api(local_hub: LocalHub) -> HfApi:  # noqa: F811
    """A client with write access; the dataset repo exists."""
    api = local_hub.api()
    api.create_repo(**DATA)
    return api


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HfApi]:
    """A client of one Hub for all tests that must not change it."""
    with running(tmp_path_factory.mktemp("steady"), strict=False) as hub:
        hub.api().create_repo(**DATA)
        yield hub.api()


def ask(url: str, method: str, path: str, token: str | None = WRITER, **request: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    headers |= request.pop("headers", {})
    return httpx2.request(method, f"{url}{path}", headers=headers, trust_env=False, **request)


def commit_body(*operations: tuple[str, dict[str, Any]], **header: str) -> bytes:
    lines = [("header", {"summary": "by hand", **header}), *operations]
    return b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in lines)


def post_commit(api: HfApi, body: bytes, rev: str = "main") -> httpx2.Response:
    headers = {"content-type": "application/x-ndjson"}
    return ask(api.endpoint, "POST", f"/api/datasets/{REPO}/commit/{rev}", content=body, headers=headers)


# --- the main road


def test_a_release_loads_row_by_row_map_style_and_streaming_at_its_tag(local_hub: LocalHub) -> None:  # noqa: F811
    api = local_hub.api()
    api.create_repo(**DATA)
    files = {"README.md": CARD.encode(), "manifest.json": b"{}", "data/words/w-0.parquet": parquet(WORDS)}
    files |= {f"data/vectors/layer_{n}-0.parquet": parquet(VECTORS) for n in (1, 2)}
    publish(api, **files)
    api.create_tag(tag="v1.0.0", **DATA)
    publish(api, **{"data/words/w-0.parquet": parquet(WORDS.slice(0, 1))})  # main moves on, the tag does not
    code = """
import json
from datasets import load_dataset
rows = {}
for config, split in (("words", "train"), ("vectors", "layer_1"), ("vectors", "layer_2")):
    for streaming in (False, True):
        given = load_dataset("org/name", config, revision="v1.0.0", split=split, streaming=streaming)
        rows[f"{config} {split} {streaming}"] = list(given)
rows["default at main"] = list(load_dataset("org/name", split="train"))
print(json.dumps(rows))
"""
    rows = json.loads(local_hub.run(code, token=None))
    words, vectors = WORDS.to_pylist(), VECTORS.to_pylist()
    assert rows.pop("default at main") == words[:1]
    expected = {"words train": words, "vectors layer_1": vectors, "vectors layer_2": vectors}
    assert rows == {f"{name} {way}": table for name, table in expected.items() for way in (False, True)}


def test_files_come_back_byte_by_byte_at_every_revision(api: HfApi, tmp_path: Path) -> None:
    old = publish(api, **{"small.json": b'{"a": 1}', "big.bin": bytes(range(256)) * 37, "empty.parquet": b""})
    api.create_tag(tag="v1", **DATA)
    publish(api, **{"small.json": b'{"a": 2}', "folder/ü b.txt": "θ".encode()})
    for revision in ("v1", old, old[:9]):
        folder = Path(snapshot_download(**DATA, revision=revision, endpoint=api.endpoint, cache_dir=tmp_path))
        assert (folder / "small.json").read_bytes() == b'{"a": 1}'
        assert (folder / "big.bin").read_bytes() == bytes(range(256)) * 37
        assert (folder / "empty.parquet").read_bytes() == b""
        assert folder.name == old
    got = hf_hub_download(**DATA, filename="folder/ü b.txt", endpoint=api.endpoint, cache_dir=tmp_path)
    assert Path(got).read_bytes() == "θ".encode()


def test_a_restart_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with running(tmp_path) as hub:
        hub.api().create_repo(private=True, **DATA)
        head = publish(hub.api(), **{"a.txt": b"a", "b.bin": b"\0b"})
        hub.api().create_tag(tag="v1", **DATA)
        with pytest.raises(BlockingIOError, match="served by another process"):
            Store(hub.root)
    (hub.root / "uploads" / "left by a crash").write_bytes(b"half")
    with running(tmp_path) as hub:
        assert hub.api().dataset_info(REPO, revision="v1").sha == head
        assert hub.api().dataset_info(REPO).private
        for name, content in (("a.txt", b"a"), ("b.bin", b"\0b")):
            got = hub.api().hf_hub_download(
                **DATA, filename=name, revision="v1", cache_dir=tmp_path / "cache"
            )
            assert Path(got).read_bytes() == content
        assert not list((hub.root / "uploads").iterdir())


def test_a_crash_before_the_last_rename_leaves_the_old_state(
    local_hub: LocalHub,  # noqa: F811
    api: HfApi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = publish(api, **{"a.txt": b"1"})

    def crash(path: Path, content: bytes | str) -> None:
        if path.name == "refs.json":
            raise RuntimeError("the machine stops here")
        write_atomic(path, content)

    with monkeypatch.context() as broken:
        broken.setattr("hub.local.store.write_atomic", crash)
        with pytest.raises(HfHubHTTPError) as error:
            publish(api, **{"a.txt": b"2"})
        assert error.value.response.status_code == 500
    assert api.dataset_info(REPO).sha == head
    assert ask(api.endpoint, "GET", f"/datasets/{REPO}/resolve/main/a.txt").content == b"1"
    assert publish(api, **{"a.txt": b"2"}) != head


def test_a_killed_server_starts_again_and_never_prints_a_token(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hub.local.server import serve; serve(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "root")]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for existed in (False, True):
        with subprocess.Popen(command, cwd=Path(__file__).parents[1], **streams) as server:
            assert server.stdout is not None
            line = server.stdout.readline()
            url = line.split()[3]
            assert line.startswith("Hub ready at http://127.0.0.1:")
            assert HfApi(endpoint=url, token=WRITER).repo_exists(**DATA) is existed
            HfApi(endpoint=url, token=WRITER).create_repo(exist_ok=True, **DATA)
            ask(url, "GET", "/api/whoami-v2", token="hf_wrong")
            ask(url, "GET", f"/api/datasets/{REPO}", headers={"x-unknown": "1"})
            server.kill()
            assert "hf_" not in line + server.stdout.read()


def test_same_content_same_commit_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    heads = []
    for name in ("one", "two"):
        with running(tmp_path / name) as hub:
            hub.api().create_repo(**DATA)
            heads.append(publish(hub.api(), **{"a.txt": b"a", "b.bin": b"\0b"}))
    assert heads[0] == heads[1]


def test_ids_are_gits_own() -> None:
    content = {"a/b.txt": b"1", "a.b": b"2", "a/c/d": b"3", "a-b/x": b"q", "z": b""}
    files = {path: File(git_id("blob", text), len(text)) for path, text in content.items()}
    assert tree_ids(files)["a"] == "0309755d52eebbebda3cd6dfc9b4bf7d9b97c360"  # what git itself says
    assert commit_id(None, "title", "body é", files) == "e1ef50d1d6a12536e55ab5712efcc08a628610c5"


# --- each endpoint with the real client


def test_account_and_repos(local_hub: LocalHub, api: HfApi) -> None:  # noqa: F811
    assert api.whoami()["name"] == "local"
    assert [org["name"] for org in api.whoami()["orgs"]] == ["org"]
    url = api.create_repo(exist_ok=True, **DATA)
    assert (url.repo_id, url.repo_type) == (REPO, "dataset")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(**DATA)
    assert error.value.response.status_code == 409
    assert api.create_repo(REPO).repo_type == "model"
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    assert api.repo_exists(**DATA)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


def test_info_and_paths(api: HfApi) -> None:
    head = publish(api, **{"README.md": CARD.encode(), "data/x.parquet": parquet(WORDS), "a.txt": b"a"})
    info = api.dataset_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.gated, info.tags) == (head, False, False, ["license:mit"])
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    sizes = {one.rfilename: (one.size, one.lfs is not None) for one in info.siblings or ()}
    assert sizes["data/x.parquet"] == (len(parquet(WORDS)), True)
    assert sizes["a.txt"] == (1, False)
    assert api.dataset_info(REPO, expand=["sha"]).siblings is None
    found = {one.path: one for one in api.get_paths_info(REPO, ["a.txt", "data", "no"], repo_type="dataset")}
    assert sorted(found) == ["a.txt", "data"]
    large = next(iter(api.list_repo_tree(**DATA, path_in_repo="data", expand=True)))
    assert isinstance(large, RepoFile)
    assert large.lfs is not None
    assert large.lfs.sha256 == hashlib.sha256(parquet(WORDS)).hexdigest()
    assert large.last_commit is not None
    assert large.last_commit.oid == head


def test_tree_comes_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with running(tmp_path, page=3) as hub:
        hub.api().create_repo(**DATA)
        names = sorted(f"f {n % 3}/ü&{n}.txt" for n in range(11))
        publish(hub.api(), **{name: name.encode() for name in names})
        listed = list(hub.api().list_repo_tree(**DATA, recursive=True))
        assert [one.path for one in listed if isinstance(one, RepoFile)] == [".gitattributes", *names]
        assert len(listed) == 15
        assert len(hub.faults.answered("GET", "/tree/")) == 5
        assert len(list(hub.api().list_repo_tree(**DATA, path_in_repo="f 1", expand=True))) == 4
        assert [one.path for one in hub.api().list_repo_tree(**DATA)] == [
            ".gitattributes",
            "f 0",
            "f 1",
            "f 2",
        ]
        for path in ("missing", names[0]):
            with pytest.raises(RemoteEntryNotFoundError):
                list(hub.api().list_repo_tree(**DATA, path_in_repo=path))


def test_history_goes_on_over_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with running(tmp_path, page=40) as hub:
        hub.api().create_repo(**DATA)
        heads = [publish(hub.api(), **{"n.txt": str(n).encode()}) for n in range(4)]
        listed = hub.api().list_repo_commits(**DATA, formatted=True)
        assert [one.commit_id for one in listed][:-1] == heads[::-1]
        assert listed[-1].title == "initial commit"
        assert len(hub.faults.answered("GET", "/commits/")) == 3


def test_tags_and_branches(api: HfApi) -> None:
    first = publish(api, **{"a.txt": b"1"})
    api.create_tag(tag="v1", tag_message="one", **DATA)
    second = publish(api, **{"a.txt": b"2"})
    api.create_tag(tag="v2/rc", revision=first[:7], **DATA)
    api.create_branch(branch="side/one", revision="v1", **DATA)
    api.create_commit(operations=[add("b.txt", b"b")], commit_message="s", revision="side/one", **DATA)
    refs = api.list_repo_refs(**DATA, include_pull_requests=True)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": first, "v2/rc": first}
    branches = {branch.name: branch.target_commit for branch in refs.branches}
    assert branches["main"] == second
    assert api.list_repo_commits(revision="side/one", **DATA)[1].commit_id == first
    assert api.dataset_info(REPO, revision="side/one").sha == branches["side/one"]
    for again in (lambda: api.create_tag(tag="v1", **DATA), lambda: api.create_branch(branch="main", **DATA)):
        with pytest.raises(HfHubHTTPError) as error:
            again()
        assert error.value.response.status_code == 409
    assert api.list_repo_refs(**DATA).tags == refs.tags  # a tag never moves
    api.delete_tag(tag="v2/rc", **DATA)
    api.delete_branch(branch="side/one", **DATA)
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(tag="v2/rc", **DATA)
    with pytest.raises(HfHubHTTPError) as error:
        api.delete_branch(branch="main", **DATA)
    assert error.value.response.status_code == 403


def test_copy_and_delete(api: HfApi) -> None:
    publish(api, **{"a.txt": b"a", "d/b.txt": b"b", "d/c.bin": b"\0", "keep.bin": b"\0k"})
    copies = [CommitOperationCopy("a.txt", "e/a.txt"), CommitOperationCopy("d/c.bin", "e/c.bin")]
    gone = [CommitOperationDelete("d/"), CommitOperationDelete("a.txt")]
    api.create_commit(operations=copies + gone, commit_message="moved", **DATA)
    assert api.list_repo_files(**DATA) == [".gitattributes", "e/a.txt", "e/c.bin", "keep.bin"]
    assert ask(api.endpoint, "GET", f"/datasets/{REPO}/resolve/main/e/c.bin").content == b"\0"
    for path in ("a.txt", "d/"):
        with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
            api.create_commit(operations=[CommitOperationDelete(path)], commit_message="again", **DATA)


def test_a_folder_replaces_a_file_in_one_commit(api: HfApi) -> None:
    publish(api, a=b"file")
    with pytest.raises(BadRequestError, match="a file and a folder"):
        publish(api, **{"a/b": b"inside"})
    both = [CommitOperationDelete("a"), add("a/b", b"inside")]
    api.create_commit(operations=both, commit_message="swap", **DATA)
    assert "a/b" in api.list_repo_files(**DATA)


def test_ranges_and_etags(api: HfApi) -> None:
    content = bytes(range(251)) * 3
    head = publish(api, **{"x.bin": content, "t.txt": b"text"})
    path = f"/datasets/{REPO}/resolve/main/"
    heads = {name: ask(api.endpoint, "HEAD", path + name).headers for name in ("x.bin", "t.txt")}
    sha = f'"{hashlib.sha256(content).hexdigest()}"'
    assert heads["x.bin"]["etag"] == heads["x.bin"]["x-linked-etag"] == sha
    assert heads["x.bin"]["x-linked-size"] == heads["x.bin"]["content-length"] == "753"
    assert heads["t.txt"]["etag"] == f'"{git_id("blob", b"text")}"'
    assert heads["t.txt"]["x-repo-commit"] == head
    for asked, expected in (
        ("0-0", content[:1]),
        ("700-", content[700:]),
        ("-5", content[-5:]),
        ("9-9999", content[9:]),
    ):
        got = ask(api.endpoint, "GET", path + "x.bin", headers={"range": f"bytes={asked}"})
        assert (got.status_code, got.content) == (206, expected)
        assert got.headers["content-range"].endswith("/753")
    got = ask(api.endpoint, "GET", path + "x.bin", headers={"range": "bytes=753-"})
    assert (got.status_code, got.headers["content-range"]) == (416, "bytes */753")
    for asked in ("bytes=5-1", "bytes=0-1,3-4", "lines=0-1", "bytes=-"):
        assert ask(api.endpoint, "GET", path + "x.bin", headers={"range": asked}).status_code == 400


def test_what_is_missing_is_missing_by_name(api: HfApi, tmp_path: Path) -> None:
    where: Any = {"endpoint": api.endpoint, "cache_dir": tmp_path, "token": WRITER}
    head = api.dataset_info(REPO).sha
    with pytest.raises(RemoteEntryNotFoundError) as error:
        hf_hub_download(**DATA, filename="no.txt", **where)
    assert error.value.response.headers["x-repo-commit"] == head
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(**DATA, filename="README.md", revision="v9", **where)
    for repo_id in ("org/other", "single", "org/name"):  # the last is a dataset, not a model
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo_id, "README.md", **where)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo_id)


def test_private_and_gated(local_hub: LocalHub, api: HfApi, tmp_path: Path) -> None:  # noqa: F811
    publish(api, **{"a.txt": b"a"})
    nobody, reader = local_hub.api(None), local_hub.api(READER)
    api.update_repo_settings(**DATA, gated="manual")
    assert nobody.dataset_info(REPO).gated == "manual"
    with pytest.raises(GatedRepoError):
        nobody.hf_hub_download(**DATA, filename="a.txt", cache_dir=tmp_path)
    with pytest.raises(GatedRepoError):
        nobody.auth_check(**DATA)
    with pytest.raises(GatedRepoError) as refused:
        reader.hf_hub_download(**DATA, filename="a.txt", cache_dir=tmp_path / "reader")
    assert refused.value.response.status_code == 403
    api.grant_access(REPO, "reader", repo_type="dataset")
    assert [one.username for one in api.list_accepted_access_requests(REPO, repo_type="dataset")] == [
        "reader"
    ]
    assert reader.hf_hub_download(**DATA, filename="a.txt", cache_dir=tmp_path / "reader")
    api.reject_access_request(REPO, "reader", repo_type="dataset", rejection_reason="no")
    with pytest.raises(GatedRepoError):
        reader.auth_check(**DATA)
    with pytest.raises(HfHubHTTPError, match="not found"):
        api.grant_access(REPO, "nobody", repo_type="dataset")
    api.update_repo_settings(**DATA, visibility="private", gated=False)
    with pytest.raises(RepositoryNotFoundError) as missing:
        nobody.dataset_info(REPO)
    assert missing.value.response.status_code == 404
    assert reader.dataset_info(REPO).private
    for write in (
        lambda: reader.create_tag(tag="v1", **DATA),
        lambda: reader.create_repo("org/second"),
        lambda: publish(reader, **{"b.txt": b"b"}),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            write()
        assert error.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as error:
        local_hub.api("hf_wrong").dataset_info(REPO)
    assert error.value.response.status_code == 401
    assert "hf_wrong" not in error.value.response.text


# --- pull requests


def propose(api: HfApi, files: dict[str, bytes], parent: str | None = None) -> Any:
    operations = [add(path, content) for path, content in files.items()]
    return api.create_commit(
        operations=operations, commit_message="files", create_pr=True, parent_commit=parent, **DATA
    )


def test_a_pull_request_of_a_reader_waits_until_it_is_merged(local_hub: LocalHub, api: HfApi) -> None:  # noqa: F811
    head = publish(api, **{"a.txt": b"a", "old.txt": b"old"})
    reader = local_hub.api(READER)
    proposed = propose(reader, {"b.txt": b"b", "b.parquet": b"PAR1"})
    assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
    assert api.dataset_info(REPO).sha == head
    names = {".gitattributes", "a.txt", "b.parquet", "b.txt", "old.txt"}
    assert set(api.list_repo_files(**DATA, revision="refs/pr/1")) == names
    refs = api.list_repo_refs(**DATA, include_pull_requests=True)
    assert [(one.ref, one.target_commit) for one in refs.pull_requests] == [("refs/pr/1", proposed.oid)]
    (listed,) = api.get_repo_discussions(**DATA, discussion_type="pull_request", discussion_status="open")
    assert (listed.num, listed.author, listed.title) == (1, "reader", "files")
    with pytest.raises(HfHubHTTPError):
        reader.merge_pull_request(REPO, 1, repo_type="dataset")
    publish(api, **{"c.txt": b"c"})
    api.merge_pull_request(REPO, 1, repo_type="dataset")
    assert set(api.list_repo_files(**DATA)) == names | {"c.txt"}
    assert not list(api.get_repo_discussions(**DATA, discussion_status="open"))
    with pytest.raises(HfHubHTTPError, match="expected an open pull request, got 1, which is merged"):
        api.merge_pull_request(REPO, 1, repo_type="dataset")


def test_a_pull_request_on_what_changed_since_is_not_merged(api: HfApi) -> None:
    parent = publish(api, **{"a.txt": b"a"})
    publish(api, **{"a.txt": b"b"})
    assert propose(api, {"a.txt": b"c"}, parent).pr_num == 1
    with pytest.raises(HfHubHTTPError, match=r"'a\.txt' was changed on main since"):
        api.merge_pull_request(REPO, 1, repo_type="dataset")
    assert api.change_discussion_status(REPO, 1, "closed", repo_type="dataset").new_status == "closed"
    assert not list(api.get_repo_discussions(**DATA, discussion_status="open"))


# --- commits


def test_a_stale_parent_is_refused(api: HfApi) -> None:
    first = publish(api, **{"a.txt": b"1"})
    second = publish(api, **{"a.txt": b"2"})
    given: Any = {"commit_message": "late", **DATA}
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(operations=[add("b.txt", b"b")], parent_commit=first, **given)
    assert error.value.response.status_code == 412
    assert api.dataset_info(REPO).sha == second
    assert api.create_commit(operations=[add("b.txt", b"b")], parent_commit=second[:8], **given).oid != second


def test_of_two_commits_on_one_parent_exactly_one_wins(api: HfApi) -> None:
    parent = str(api.dataset_info(REPO).sha)
    results: list[int] = []
    start = threading.Barrier(4)

    def write(n: int) -> None:
        value = {"path": f"{n}.txt", "encoding": "base64", "content": base64.b64encode(b"%d" % n).decode()}
        start.wait()
        results.append(post_commit(api, commit_body(("file", value), parentCommit=parent)).status_code)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [200, 412, 412, 412]
    assert len(api.list_repo_commits(**DATA)) == 2
    assert len(api.list_repo_files(**DATA)) == 2


def test_without_a_parent_no_commit_is_lost(api: HfApi) -> None:
    threads = [threading.Thread(target=publish, args=(api,), kwargs={f"{n}.txt": b"x"}) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(api.list_repo_files(**DATA)) == len(api.list_repo_commits(**DATA)) == 6


def test_nothing_changed_means_no_commit(local_hub: LocalHub, api: HfApi) -> None:  # noqa: F811
    files = {"a.txt": b"a", "b.bin": b"\0b"}
    head = publish(api, **files)
    assert publish(api, **files) == head  # the client sees by the oids that it need not ask
    assert len(local_hub.faults.answered("POST", "/commit/")) == 1
    same = {"path": "a.txt", "encoding": "base64", "content": "YQ=="}
    assert post_commit(api, commit_body(("file", same))).json()["commitOid"] == head
    assert len(api.list_repo_commits(**DATA)) == 2


def test_a_refused_commit_changes_nothing(api: HfApi) -> None:
    head = publish(api, **{"a.txt": b"a"})
    good = {"path": "good.txt", "encoding": "base64", "content": "YQ=="}
    lfs = {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}
    for last in (("lfsFile", lfs), ("deletedFile", {"path": "no.txt"}), ("file", good)):
        assert post_commit(api, commit_body(("file", good), last)).status_code in (400, 404)
    assert api.dataset_info(REPO).sha == head
    assert "good.txt" not in api.list_repo_files(**DATA)


def test_bad_metadata_is_refused_before_and_at_the_commit(api: HfApi) -> None:
    bad = b"---\nlicense: my-own\n---\n"
    with pytest.raises(ValueError, match="not a known licence"):
        publish(api, **{"README.md": bad})
    value = {"path": "README.md", "encoding": "base64", "content": base64.b64encode(bad).decode()}
    assert "licence" in post_commit(api, commit_body(("file", value))).json()["error"]
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        publish(api, **{"README.md": b"# no metadata"})


@pytest.mark.parametrize(
    ("block", "kind", "message"),
    [
        ("a: [", "datasets", "invalid YAML"),
        ("- a", "datasets", "expected a mapping"),
        ("license: mit\ntags: x", "models", '"tags" must be an array'),
        ("language: klingonese", "models", "not an ISO code"),
        ("size_categories: big", "datasets", "unknown"),
        ("configs: {}", "datasets", "array of objects"),
        ("configs:\n- data_files: x", "datasets", "config_name"),
        ("configs:\n- config_name: a\n- config_name: a", "datasets", "occurs twice"),
        (
            "configs:\n- {config_name: a, default: true}\n- {config_name: b, default: true}",
            "datasets",
            "only one",
        ),
        (
            "configs:\n- config_name: a\n  data_files:\n  - {split: layer-1, path: x}",
            "datasets",
            "must match",
        ),
        ("configs:\n- config_name: a\n  data_files:\n  - {split: train}", "datasets", '"path"'),
        ("base_model_relation: cousin", "models", "must be one of"),
        ("model-index:\n- name: x\n  results:\n  - task: {type: t}", "models", "dataset is required"),
    ],
)
def test_card_rules(block: str, kind: str, message: str) -> None:
    errors, _ = check_card(f"---\n{block}\n---\n", kind)
    assert message in " ".join(errors)


def test_a_good_card_has_no_errors() -> None:
    assert check_card(CARD, "datasets") == ([], [])


# --- large files


def batch(api: HfApi, content: bytes, size: int | None = None) -> dict[str, Any]:
    one = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content) if size is None else size}
    body = {"operation": "upload", "transfers": ["basic", "multipart", "xet"], "objects": [one]}
    body |= {"hash_algo": "sha256", "ref": {"name": "main"}}
    headers = {"content-type": "application/vnd.git-lfs+json", "accept": "application/vnd.git-lfs+json"}
    path = f"/datasets/{REPO}.git/info/lfs/objects/batch"
    answer = ask(api.endpoint, "POST", path, content=json.dumps(body), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["transfer"] == "basic"
    return dict(answer.json()["objects"][0])


def test_a_truncated_or_altered_upload_is_refused(local_hub: LocalHub, api: HfApi) -> None:  # noqa: F811
    content = b"weights" * 99
    href = batch(api, content)["actions"]["upload"]["href"].removeprefix(api.endpoint)
    for bad in (content[:-1], content + b"x", b"W" + content[1:], b""):
        assert ask(api.endpoint, "PUT", href, token=None, content=bad).status_code == 400
    assert batch(api, content)["actions"]  # still not stored
    value = {
        "path": "x.bin",
        "algo": "sha256",
        "oid": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
    assert "upload it before" in post_commit(api, commit_body(("lfsFile", value))).json()["error"]
    for forged in (
        href[:-1] + "x",
        href.replace(f"size={len(content)}", "size=1"),
        href.replace(REPO, "org/no"),
    ):
        assert ask(api.endpoint, "PUT", forged, token=None, content=content).status_code in (400, 403)
    longer = batch(api, content, len(content) + 1)["actions"]["upload"]["href"].removeprefix(api.endpoint)
    assert "bytes, got" in ask(api.endpoint, "PUT", longer, token=None, content=content).json()["error"]
    assert ask(api.endpoint, "PUT", href, token=None, content=content).status_code == 200
    assert "actions" not in batch(api, content)
    wrong = post_commit(api, commit_body(("lfsFile", value | {"size": 1})))
    assert (wrong.status_code, "got size 1" in wrong.text) == (400, True)
    assert post_commit(api, commit_body(("lfsFile", value))).status_code == 200
    assert not list((local_hub.root / "uploads").iterdir())


def test_an_upload_that_breaks_off_leaves_nothing(local_hub: LocalHub, api: HfApi) -> None:  # noqa: F811
    content = b"weights" * 9999
    href = batch(api, content)["actions"]["upload"]["href"]

    def half() -> Any:
        yield content[:500]
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        httpx2.put(href, content=half(), headers={"content-length": str(len(content))}, trust_env=False)
    assert batch(api, content)["actions"]
    assert httpx2.put(href, content=content, trust_env=False).status_code == 200
    assert not list((local_hub.root / "uploads").iterdir())


def test_verify_says_what_is_stored(api: HfApi) -> None:
    content = b"\0verify"
    actions = batch(api, content)["actions"]
    path = actions["verify"]["href"].removeprefix(api.endpoint)
    body = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert ask(api.endpoint, "POST", path, json=body).status_code == 404
    httpx2.put(actions["upload"]["href"], content=content, trust_env=False)
    assert ask(api.endpoint, "POST", path, json=body).status_code == 200
    assert ask(api.endpoint, "POST", path, json=body | {"size": 1}).status_code == 404


def test_binary_content_cannot_be_committed_as_text(api: HfApi) -> None:
    for path, content in (("x.parquet", b"text"), ("x.txt", b"a\0b")):
        value = {"path": path, "encoding": "base64", "content": base64.b64encode(content).decode()}
        assert "expected an LFS upload" in post_commit(api, commit_body(("file", value))).json()["error"]


PUBLISH_BY_XET = """
import random
from huggingface_hub import CommitOperationAdd, HfApi
api, content = HfApi(), random.Random(0).randbytes(300_000)
api.create_repo("org/name", repo_type="dataset", exist_ok=True)
files = {"a.bin": content, "b.bin": content[7:] + b"tail", "c.txt": b"text", "empty.bin": b""}
operations = [CommitOperationAdd(path, one) for path, one in files.items()]
api.preupload_lfs_files("org/name", operations[:1], repo_type="dataset", free_memory=True)
print(api.create_commit("org/name", operations, commit_message="by xet", repo_type="dataset").oid)
"""


def test_what_a_client_stores_by_xet_is_served_as_any_other_file(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(300_000)
    with running(tmp_path) as hub:
        head = hub.run(PUBLISH_BY_XET).strip()
        assert hub.faults.answered("GET", "/xet-write-token/")
        assert not hub.faults.answered("POST", "/objects/batch")
    with running(tmp_path) as hub:  # the client is gone: what it left is tidied up
        assert not list((hub.root / "datasets" / REPO / "xet").glob("*"))
        for name, expected in (("a.bin", content), ("b.bin", content[7:] + b"tail"), ("empty.bin", b"")):
            got = hub.api().hf_hub_download(
                **DATA, filename=name, revision=head, cache_dir=tmp_path / "cache"
            )
            assert Path(got).read_bytes() == expected


def test_what_was_lost_from_the_xet_store_is_refused(tmp_path: Path) -> None:
    lose = """
import pathlib, sys
send = HfApi.preupload_lfs_files
def and_lose(self, *arguments, **named):
    send(self, *arguments, **named)
    for xorb in pathlib.Path(sys.argv[1]).glob("xet/*/xet/xorbs/xorbs/default.*"):
        xorb.unlink()
HfApi.preupload_lfs_files = and_lose
"""
    code = PUBLISH_BY_XET.replace("api, content =", lose + "api, content =")
    with running(tmp_path) as hub, pytest.raises(AssertionError, match="upload again"):
        hub.run(code, str(hub.root / "datasets" / REPO))
    with running(tmp_path) as hub:
        assert hub.api().list_repo_files(**DATA) == [".gitattributes"]


# --- never kinder than the real one

FILE = {"path": "a.txt", "encoding": "base64", "content": "YQ=="}
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/repos/create", {"name": "x", "organization": "org", "type": "dataset", "colour": "red"}),
    ("POST", "/api/repos/create", {"name": "x", "organization": "org", "type": "space"}),
    ("POST", "/api/repos/create", {"name": 7}),
    ("POST", "/api/repos/create", {"name": "a--b", "organization": "org"}),
    ("POST", "/api/repos/create", {"name": "x", "visibility": "protected"}),
    ("POST", "/api/validate-yaml", {"content": "", "repoType": "dataset", "strict": True}),
    ("POST", f"/api/datasets/{REPO}/tag/main", {"tag": "v1", "force": True}),
    ("POST", f"/api/datasets/{REPO}/tag/main", {"tag": "a b"}),
    ("POST", f"/api/datasets/{REPO}/tag/main", {"message": "no tag"}),
    ("POST", f"/api/datasets/{REPO}/branch/b", {"overwrite": True}),
    ("POST", f"/api/datasets/{REPO}/preupload/main", {"files": [], "gitIgnore": "*.txt"}),
    ("POST", f"/api/datasets/{REPO}/preupload/main", {"files": [{"path": "a", "size": 1}]}),
    ("POST", f"/api/datasets/{REPO}/preupload/main", {"files": [{"path": "../a", "size": 1, "sample": ""}]}),
    ("POST", f"/api/datasets/{REPO}/preupload/main", {"files": [{"path": "a", "size": True, "sample": ""}]}),
    ("PUT", f"/api/datasets/{REPO}/settings", {"discussionsDisabled": True}),
    ("PUT", f"/api/datasets/{REPO}/settings", {"gated": 0}),
]


@pytest.mark.parametrize(("method", "path", "body"), BODIES)
def test_unknown_or_wrong_fields_are_refused(
    steady: HfApi, method: str, path: str, body: dict[str, Any]
) -> None:
    answer = ask(steady.endpoint, method, path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "operation",
    [
        ("file", FILE | {"mode": "755"}),
        ("file", FILE | {"encoding": "utf-8"}),
        ("file", FILE | {"content": "no base64!"}),
        ("file", FILE | {"path": "a/../b"}),
        ("file", FILE | {"path": ".git/config"}),
        ("file", FILE | {"path": "/a"}),
        ("lfsFile", {"path": "x.bin", "algo": "md5", "oid": "0" * 64}),
        ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": "0"}),
        ("symlink", {"path": "x"}),
        ("deletedFile", {"path": "x", "force": True}),
    ],
)
def test_unknown_or_wrong_operations_are_refused(
    steady: HfApi, operation: tuple[str, dict[str, Any]]
) -> None:
    head = steady.dataset_info(REPO).sha
    assert post_commit(steady, commit_body(operation)).status_code == 400
    assert steady.dataset_info(REPO).sha == head


def test_unknown_header_fields_of_a_commit_are_refused(steady: HfApi) -> None:
    for header in ({"author": "me"}, {"parentCommit": "main"}, {"summary": " "}):
        assert post_commit(steady, commit_body(("file", FILE), **header)).status_code == 400
    assert post_commit(steady, b"").status_code == post_commit(steady, b"{\n").status_code == 400
    assert post_commit(steady, commit_body(("file", FILE)), rev="v9").status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/api/spaces/org/name"),
        ("GET", f"/api/datasets/{REPO}/discussions/1"),
        ("GET", f"/api/datasets/{REPO}/discussions?p=a"),
        ("GET", f"/api/datasets/{REPO}/xet-read-token/main"),
        ("PATCH", f"/api/datasets/{REPO}"),
        ("POST", f"/api/datasets/{REPO}/super-squash/main"),
        ("POST", f"/api/datasets/{REPO}/commit/v9?create_pr=1"),
        ("GET", f"/api/datasets/{REPO}?full=true"),
        ("GET", f"/api/datasets/{REPO}?expand=colour"),
        ("GET", f"/api/datasets/{REPO}?blobs=perhaps"),
        ("GET", f"/api/datasets/{REPO}/tree/main?recursive=true&recursive=false"),
        ("GET", f"/api/datasets/{REPO}/commits/main?p=-1"),
        ("HEAD", f"/api/datasets/{REPO}"),
    ],
)
def test_unknown_paths_and_queries_are_refused(steady: HfApi, method: str, path: str) -> None:
    assert ask(steady.endpoint, method, path).status_code == 400


@pytest.mark.parametrize("name", ["x-anything", "if-none-match", "range", "cookie", "expect-ct"])
def test_unknown_headers_are_refused(steady: HfApi, name: str) -> None:
    answer = ask(steady.endpoint, "GET", f"/api/datasets/{REPO}", headers={name: "secret-value"})
    assert answer.status_code == 400
    assert name in answer.json()["error"]
    assert "secret-value" not in answer.text


def test_paths_info_refuses_unknown_fields_and_other_types(steady: HfApi) -> None:
    path = f"/api/datasets/{REPO}/paths-info/main"
    assert ask(steady.endpoint, "POST", path, data={"paths": ["x"], "limit": "3"}).status_code == 400
    assert ask(steady.endpoint, "POST", path, json={"paths": ["x"]}).status_code == 400
    assert ask(steady.endpoint, "POST", path, data={"paths": ["x"]}).json() == []


def test_writes_need_a_token(steady: HfApi) -> None:
    for method, path in (("POST", "/api/repos/create"), ("POST", f"/api/datasets/{REPO}/tag/main")):
        assert ask(steady.endpoint, method, path, token=None, json={}).status_code == 401
    assert ask(steady.endpoint, "GET", "/api/whoami-v2", token=None).status_code == 401


def test_faults_can_be_ordered(local_hub: LocalHub, api: HfApi) -> None:  # noqa: F811
    local_hub.faults.fail("POST", "/commit/", 503, landed=True)
    with pytest.raises(HfHubHTTPError) as error:
        publish(api, **{"a.txt": b"a"})
    assert error.value.response.status_code == 503
    assert "a.txt" in api.list_repo_files(**DATA)  # it landed all the same
    other = local_hub.api()
    local_hub.faults.before("POST", "/commit/", lambda: publish(other, **{"b.txt": b"b"}))
    head = api.dataset_info(REPO).sha
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(operations=[add("c.txt", b"c")], commit_message="c", parent_commit=head, **DATA)
    assert error.value.response.status_code == 412


def test_bodies_can_be_slow_and_answers_stale(local_hub: LocalHub, api: HfApi) -> None:  # noqa: F811
    first = publish(api, **{"a.txt": b"a" * 100})
    path = f"/api/datasets/{REPO}/refs"
    known = ask(api.endpoint, "GET", path).json()
    publish(api, **{"a.txt": b"b" * 100})
    local_hub.faults.stale("GET", "/refs$")
    assert ask(api.endpoint, "GET", path).json() == known
    assert ask(api.endpoint, "GET", path).json()["branches"][0]["targetCommit"] != first
    local_hub.faults.fail("GET", "/resolve/", slow=0.5)
    start = time.monotonic()
    url = f"/datasets/{REPO}/resolve/main/a.txt"
    with httpx2.stream(
        "GET", f"{api.endpoint}{url}", trust_env=False, headers={"accept-encoding": ""}
    ) as answer:
        parts = list(answer.iter_raw())
    assert (b"".join(parts), len(parts)) == (b"b" * 100, 10)
    assert time.monotonic() - start > 0.4
    assert ask(api.endpoint, "GET", url).content == b"b" * 100


def test_what_the_hub_does_not_know_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unknown header 'x-odd'"), running(tmp_path) as hub:
        assert ask(hub.url, "GET", "/api/whoami-v2", headers={"x-odd": "1"}).status_code == 400


def test_url_of_a_file_is_the_hubs(api: HfApi) -> None:
    publish(api, **{"a b.txt": b"a"})
    url = hf_hub_url(REPO, "a b.txt", repo_type="dataset", endpoint=api.endpoint)
    assert ask(api.endpoint, "GET", url.removeprefix(api.endpoint)).content == b"a"
