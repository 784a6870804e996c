"""Proves that publishing ends in one commit and one tag whatever breaks, and that what is served loads."""

import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_fixture import READER, WRITER, LocalHub, local_hub, running  # noqa: F401
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile
from release_fixture import write_dataset_release, write_model_release

from daco.errors import (
    DacoError,
    HubRefusedError,
    HubUnavailableError,
    IntegrityError,
    PublishConflictError,
    RefusedError,
    TagMovedError,
    VerificationError,
)
from daco.manifest import file_entry, read_manifest, write_manifest
from hub import retry
from hub.__main__ import main
from hub.plan import File, Remote, RemoteFile, make_plan
from hub.publish import Published, plan, publish
from hub.remote import Target
from hub.stage import stage
from hub.verify import verify

DATASET, MODEL = "org/DACO-tiny", "org/daco-sae-tiny"
SECRET = "hf_" + "s3cr3t" * 6
HTML = f"<html>Bearer {WRITER} is tired</html>"
LARGE = 5
"""Large files of `release` with content of their own: the atoms of both layers are the same."""


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A model release with one file that later versions do not have."""
    return write_model_release(tmp_path / "release", extra_files={"notes/old.txt": b"old\n"})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a Hub holds after `release` was published in peace."""
    folder = tmp_path_factory.mktemp("undisturbed")
    release = write_model_release(folder / "release", extra_files={"notes/old.txt": b"old\n"})
    with running(folder) as hub:
        publish(release, target(hub))
        return state(hub)


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited for, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(retry, "sleep", waits.append)
    return waits


def target(hub: LocalHub, repo: str = MODEL, token: str = WRITER) -> Target:
    return Target(repo, "dataset" if repo == DATASET else "model", hub.url, token)


def state(hub: LocalHub, repo: str = MODEL) -> dict[str, Any]:
    """Everything a repo shows: history, refs, and its files at main."""
    api, kind = hub.api(), target(hub, repo).repo_type
    refs = api.list_repo_refs(repo, repo_type=kind)
    files = api.list_repo_tree(repo, repo_type=kind, recursive=True)
    return {
        "commits": [(c.commit_id, c.title) for c in api.list_repo_commits(repo, repo_type=kind)],
        "tags": {tag.name: tag.target_commit for tag in refs.tags},
        "files": {f.path: f.blob_id for f in files if isinstance(f, RepoFile)},
    }


def next_version(release: Path, version: str, since: str = "", **changes: bytes | None) -> Path:
    """A copy of a release under another version; a file is changed, or deleted where its content is None.

    `since` is the version that its changelog says it was compared with.
    """
    folder = release.with_name(f"release-{version}")
    shutil.copytree(release, folder)
    manifest = read_manifest(folder) | {"version": version}
    for name, content in changes.items():
        if content is None:
            (folder / name).unlink()
            del manifest["files"][name]
        else:
            (folder / name).write_bytes(content)
            manifest["files"][name] = file_entry(folder / name)
    if since:
        manifest["facts"] |= {"changes": {"since": since, "level": "minor"}}
    write_manifest(folder, manifest)
    return folder


def somebody_else(hub: LocalHub, repo: str = MODEL) -> Callable[[], object]:
    """A commit of somebody else's, as a function."""
    return lambda: hub.api().create_commit(
        repo, [CommitOperationAdd("foreign.txt", b"here")], commit_message="foreign"
    )


# --- the main road


def test_releases_are_published_once_and_load_back(local_hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    folders = write_dataset_release(tmp_path / "dataset"), write_model_release(tmp_path / "model")
    for folder, repo in zip(folders, (DATASET, MODEL), strict=True):
        first = publish(folder, target(local_hub, repo))
        shown = state(local_hub, repo)
        assert [title for _, title in shown["commits"]] == ["Release v1.0.0", "initial commit"]
        assert shown["tags"] == {"v1.0.0": first.commit} == {"v1.0.0": shown["commits"][0][0]}
        assert shown["files"].keys() == {
            ".gitattributes", "manifest.json", *read_manifest(folder)["files"]
        }  # fmt: skip
        assert first.committed
        assert first.bytes_sent == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        again = publish(folder, target(local_hub, repo))
        assert again == Published(repo, first.repo_type, "v1.0.0", first.commit, first.url, False, 0)
        assert state(local_hub, repo) == shown
    assert local_hub.faults.answered("POST", "/commit/main$") == [200, 200]
    assert local_hub.faults.answered("POST", "/tag/") == [200, 200]
    local_hub.run(CLIENT, str(folders[0]), str(folders[1]))


CLIENT = """
import pathlib, sys
from datasets import load_dataset
from huggingface_hub import constants
import daco
from daco.errors import ArtefactNotFoundError

DATASET, MODEL, TAG = "org/DACO-tiny", "org/daco-sae-tiny", "v1.0.0"
for config in ("stimuli", "links", "concepts", "directions_tiny_vl"):
    for split, rows in load_dataset(DATASET, config, revision=TAG).items():
        streamed = load_dataset(DATASET, config, split=split, revision=TAG, streaming=True)
        assert list(rows) == list(streamed) and len(rows) > 0
assert load_dataset(DATASET, revision=TAG)["train"].column_names[0] == "stimulus_id"  # stimuli is the default

def read():
    dictionary = daco.ConceptDictionary.from_pretrained(DATASET, revision=TAG)
    sae = daco.SteeringSAE.from_pretrained(MODEL, revision=TAG)
    return dictionary.raw(1), dictionary.raw(2), sae.layers[1].sae.W_dec, sae.layers[2].sae.W_enc

dictionary = daco.ConceptDictionary.from_pretrained(sys.argv[1])
sae = daco.SteeringSAE.from_pretrained(sys.argv[2])
expected = dictionary.raw(1), dictionary.raw(2), sae.layers[1].sae.W_dec, sae.layers[2].sae.W_enc
assert all((a == b).all() for a, b in zip(read(), expected, strict=True))

def refused(load, *arguments, **options):
    try:
        load(*arguments, **options)
    except ArtefactNotFoundError as error:
        return str(error)
    raise AssertionError("loaded")

assert "expected a folder or a model repo org/none@v1.0.0, got neither" in refused(
    daco.SteeringSAE.from_pretrained, "org/none", revision=TAG)
assert "org/DACO-tiny has no revision 'v9.9.9'" in refused(
    daco.ConceptDictionary.from_pretrained, DATASET, revision="v9.9.9")
assert "org/DACO-tiny has no revision '1.0.0'; did you mean 'v1.0.0'?" in refused(
    daco.ConceptDictionary.from_pretrained, DATASET, revision="1.0.0")
other = refused(daco.SteeringSAE.from_pretrained, DATASET)
assert other == "expected a model repo, got the dataset repo org/DACO-tiny; daco.ConceptDictionary loads it"

damaged = [p for p in pathlib.Path(constants.HF_HUB_CACHE).rglob("*")
           if p.is_file() and not p.is_symlink() and "blobs" in p.parts and p.stat().st_size > 3000]
assert len(damaged) >= 6
for i, path in enumerate(damaged):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if i % 2 and content[:1] != b"{" else content[:99])
assert all((a == b).all() for a, b in zip(read(), expected, strict=True))
"""


def test_a_new_version_is_one_more_commit_and_a_new_tag(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    old = publish(release, target(local_hub))
    before = state(local_hub)
    newer = next_version(
        release, "1.1.0", "1.0.0", **{"evaluation.json": b'{"a": {"b": 1}}\n', "notes/old.txt": None}
    )
    stage(newer)
    planned = plan(newer, target(local_hub)).to_json()
    assert {row["path"] for row in planned["add"]} == {"README.md", "evaluation.json", "manifest.json"}
    assert planned["delete"] == ["notes/old.txt"]
    assert not planned["refusals"]
    new = publish(newer, target(local_hub))
    assert new.bytes_sent == planned["bytes_to_send"] < old.bytes_sent
    after = state(local_hub)
    assert after["commits"] == [(new.commit, "Release v1.1.0"), *before["commits"]]
    assert after["tags"] == {"v1.0.0": old.commit, "v1.1.0": new.commit}
    assert before["files"].keys() - after["files"].keys() == {"notes/old.txt"}
    assert verify(target(local_hub), "v1.0.0", (release / "manifest.json").read_bytes()) == old.commit
    assert publish(release, target(local_hub)).committed is False  # the old one is still there, as it was
    assert state(local_hub) == after


def test_tags_never_move(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    publish(next_version(release, "1.1.0"), target(local_hub))
    publish(other := next_version(release, "1.2.0", "1.1.0"), target(local_hub))
    before = state(local_hub)
    shutil.rmtree(other)
    other = next_version(release, "1.2.0", **{"notes/old.txt": b"other\n"})
    with pytest.raises(
        TagMovedError, match=r"v1\.2\.0: expected no tag v1\.2\.0, or one on this very content"
    ):
        publish(other, target(local_hub))
    with pytest.raises(
        RefusedError, match=r"expected a version above v1\.2\.0, the newest tag, got v1\.0\.0"
    ):
        publish(release, target(local_hub))
    assert str(plan(other, target(local_hub)).refusals[0]).startswith("v1.2.0: expected no tag")
    assert state(local_hub) == before


def test_planning_changes_nothing(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    first = plan(release, target(local_hub))
    files = {path: path.read_bytes() for path in release.rglob("*") if path.is_file()}
    assert (first.head, first.tagged, len(first.changes)) == (None, False, len(files))
    publish(release, target(local_hub))
    before, asked = state(local_hub), len(local_hub.faults.log)
    plans = [plan(release, target(local_hub)) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].done
    assert "nothing to do" in str(plans[0])
    assert {method for method, _, _ in local_hub.faults.log[asked:]} == {"GET"}
    assert state(local_hub) == before
    assert {path: path.read_bytes() for path in release.rglob("*") if path.is_file()} == files


def test_a_plan_is_made_of_facts_alone() -> None:
    files = {"a": File(1, "1" * 64, "c" * 40), "b": File(2, "2" * 64)}
    there = {"a": RemoteFile(1, "c" * 40, None), "b": RemoteFile(2, "0" * 40, "3" * 64)}
    there |= {name: RemoteFile(3, "0" * 40, None) for name in ("old", ".gitattributes")}
    remote = Remote("e" * 40, there, {"v0.9.0": "d" * 40, "odd": "d" * 40, "v2": "d" * 40})
    made = make_plan("org/x", "model", "1.0.0", files, remote, since="0.9.0")
    again = make_plan("org/x", "model", "1.0.0", dict(reversed(files.items())), remote, since="0.9.0")
    assert made == again
    assert [type(op).__name__ + op.path for op in made.operations] == ["Unchangeda", "Addb", "Deleteold"]
    assert (made.bytes_to_send, made.refusals, made.done) == (2, (), False)
    assert "add      b  2 B" in str(made)


# --- troubles


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


STEPS = [("create_repo", 1), *(("preupload_lfs_files", n) for n in (1, 5, 11))]
STEPS += [("create_commit", 1), ("create_tag", 1)]


@pytest.mark.parametrize(("method", "nth"), STEPS)
def test_a_crash_after_any_step_is_resumed(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    undisturbed: dict[str, Any],
    method: str,
    nth: int,
) -> None:
    real, calls = getattr(HfApi, method), []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(method)
        answer = real(*arguments, **options)
        if len(calls) == nth:
            raise Killed
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, method, dying)
        with pytest.raises(Killed):
            publish(release, target(local_hub))
    assert publish(release, target(local_hub)).tag == "v1.0.0"
    assert state(local_hub) == undisturbed
    assert len(local_hub.faults.answered("PUT", "/lfs/")) == LARGE  # each went once, over both runs


TROUBLES: list[tuple[str, int, dict[str, Any], list[float]]] = [
    ("/commit/", 504, {"landed": True}, [1]),  # it landed, and the answer was lost
    ("/tag/", 504, {"landed": True}, [1]),
    ("/repos/create", 504, {"landed": True}, [1]),
    ("/commit/", 500, {"body": "{}"}, [1]),
    ("/commit/", 503, {"times": 3}, [1, 2, 4]),
    ("/commit/", 429, {"headers": {"retry-after": "7"}}, [7]),
    ("/tag/", 429, {"headers": {"ratelimit": '"api";r=0;t=9'}}, [9]),
    ("/commit/", 429, {"headers": {"retry-after": "99999"}}, [300]),
    ("/validate-yaml", 503, {}, [1]),  # huggingface_hub reads the HTML as JSON
]


@pytest.mark.parametrize(("path", "status", "how", "waits"), TROUBLES)
def test_troubles_pass(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    undisturbed: dict[str, Any],
    slept: list[float],
    path: str,
    status: int,
    how: dict[str, Any],
    waits: list[float],
) -> None:
    local_hub.faults.fail("POST", path, status, **({"body": HTML} | how))
    publish(release, target(local_hub))
    assert state(local_hub) == undisturbed
    assert slept == waits
    assert local_hub.faults.answered("POST", path)[0] == status


def test_somebody_else_s_commit_is_planned_again(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    local_hub.faults.before("POST", "/commit/", somebody_else(local_hub))
    done = publish(release, target(local_hub))
    shown = state(local_hub)
    titles = [title for _, title in shown["commits"]]
    assert titles == ["Release v1.0.0", "foreign", "initial commit"]
    assert shown["tags"] == {"v1.0.0": done.commit}
    assert "foreign.txt" not in shown["files"]
    assert local_hub.faults.answered("POST", "/commit/") == [200, 412, 200]


def test_two_publishers_of_one_release_make_one_commit(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    undisturbed: dict[str, Any],
) -> None:
    other = next_version(release, "1.0.0")
    local_hub.faults.before("POST", "/commit/", lambda: publish(other, target(local_hub)))
    assert publish(release, target(local_hub)).tag == "v1.0.0"
    assert local_hub.faults.answered("POST", "/commit/") == [200, 412]
    assert state(local_hub) == undisturbed


def test_two_publishers_of_two_versions_never_go_back(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    newer = next_version(release, "2.0.0", **{"notes/old.txt": b"new\n"})
    local_hub.faults.before("POST", "/commit/", lambda: publish(newer, target(local_hub)))
    with pytest.raises(RefusedError, match=r"expected a version above v2\.0\.0"):
        publish(release, target(local_hub))
    assert [title for _, title in state(local_hub)["commits"]] == ["Release v2.0.0", "initial commit"]
    assert state(local_hub)["tags"].keys() == {"v2.0.0"}


def test_a_lasting_trouble_ends_with_one_error(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    slept: list[float],
) -> None:
    local_hub.faults.fail("POST", "/commit/", 503, HTML, times=retry.ATTEMPTS)
    with pytest.raises(HubUnavailableError, match=r"gave up after 6 tries: .*; run it again"):
        publish(release, target(local_hub))
    assert slept == [1, 2, 4, 8, 16]
    local_hub.faults.fail("POST", "/commit/", 412, "{}", times=retry.ATTEMPTS)
    with pytest.raises(PublishConflictError, match="gave up after 6 tries"):
        publish(release, target(local_hub))
    local_hub.faults.fail("GET", "/refs$", 502, HTML, times=retry.ATTEMPTS)
    with pytest.raises(HubUnavailableError, match=f"reading model {MODEL}: gave up after 6 tries"):
        plan(release, target(local_hub))
    assert state(local_hub)["tags"] == {}


def test_a_hub_that_never_shows_the_tag_is_given_up(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HfApi, "create_tag", lambda *_, **__: None)
    with pytest.raises(HubUnavailableError, match="does not show what was written to it; run it again"):
        publish(release, target(local_hub))
    assert slept == [1, 2, 4, 8, 16]
    assert local_hub.faults.answered("POST", "/commit/") == [200]


@pytest.mark.parametrize("token", [READER, SECRET])
def test_a_refusal_is_no_trouble(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    slept: list[float],
    token: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(HubRefusedError, match=f"model {MODEL}: .*; check your login and rights") as caught:
        publish(release, target(local_hub, token=token))
    assert slept == []
    assert token not in "".join(traceback.format_exception(caught.value))
    assert token not in repr(target(local_hub, token=token))
    assert token not in "".join(capfd.readouterr())


@pytest.mark.parametrize("path", ["/commit/", "/tag/", "/repos/create", "/validate-yaml"])
def test_no_error_repeats_a_token(local_hub: LocalHub, release: Path, path: str) -> None:  # noqa: F811
    for status in (400, 403, 503):
        body = json.dumps({"error": f"{WRITER} {SECRET} Bearer {WRITER}"})
        headers = {"content-type": "application/json", "x-error-message": f"no, {WRITER} and {SECRET}"}
        local_hub.faults.fail("POST", path, status, body, retry.ATTEMPTS, headers)
        with pytest.raises(DacoError) as caught:
            publish(release, target(local_hub))
        told = "".join(traceback.format_exception(caught.value))
        assert WRITER not in told
        assert SECRET not in told
        local_hub.faults.rules.clear()


def test_a_release_that_must_not_leave_does_not(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    (release / "config.json").write_bytes(b"{}")
    for action in (publish, plan):
        with pytest.raises((RefusedError, DacoError)):
            action(release, target(local_hub))
    assert local_hub.faults.log == []


# --- verify


def test_verify_lists_what_differs(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    publish(release, target(local_hub))
    api = local_hub.api()
    assert verify(target(local_hub), "main") == verify(target(local_hub), "v1.0.0")
    api.upload_file(path_or_fileobj=b"altered", path_in_repo="evaluation.json", repo_id=MODEL)
    api.delete_file("layers.1/cfg.json", MODEL)
    somebody_else(local_hub)()
    with pytest.raises(VerificationError) as caught:
        verify(target(local_hub), "main")
    listed = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0] for line in listed] == [
        "- foreign.txt",
        "- evaluation.json",
        "- layers.1/cfg.json",
    ]
    with pytest.raises(VerificationError, match=r"manifest\.json: expected the bytes of the local one"):
        verify(target(local_hub), "v1.0.0", b"{}")
    with pytest.raises(HubRefusedError, match="Revision Not Found"):
        verify(target(local_hub), "v3.0.0")


def test_verify_reads_every_byte(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    publish(release, target(local_hub))
    entry = read_manifest(release)["files"]["layers.2/sae_weights.safetensors"]
    stored = local_hub.root / "models" / MODEL / "lfs" / entry["sha256"]
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(VerificationError, match=r"layers\.2/sae_weights\.safetensors: expected sha256"):
        verify(target(local_hub), "v1.0.0")


def test_a_hub_out_of_reach_is_no_difference(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(release, target(local_hub))

    def lost(*_: Any, **__: Any) -> str:
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr("hub.verify.hf_hub_download", lost)
    with pytest.raises(
        HubUnavailableError, match=r"manifest\.json: gave up after 6 tries: .*connection reset"
    ):
        verify(target(local_hub), "v1.0.0")
    assert slept == [1, 2, 4, 8, 16]


# --- command line


def command(*arguments: object) -> int:
    """Run `python -m hub` in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hub", *map(str, arguments)])
        try:
            return main()
        except SystemExit as end:
            return int(end.code or 0)


def test_the_command_line(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    where = ("--endpoint", local_hub.url)
    assert command("stage", release) == 0
    assert command("plan", release, *where, "--json") == 0
    assert command("publish", release, *where, "--json", "--private") == 0
    assert command("verify", MODEL, "--type", "model", "--tag", "v1.0.0", *where) == 0
    assert command("verify", release, *where, "--json") == 0
    out, err = capfd.readouterr()
    assert f'"commit": "{state(local_hub)["tags"]["v1.0.0"]}"' in out
    assert "every file is as its manifest says" in out
    assert local_hub.api().repo_info(MODEL).private
    assert command("publish", release, *where) == 0
    assert "nothing to do" in capfd.readouterr().out
    moved = next_version(release, "1.0.0", **{"notes/old.txt": b"other\n"})
    assert command("plan", moved, *where) == 1
    assert "refused  v1.0.0: expected no tag" in capfd.readouterr().out
    assert command("publish", moved, *where) == 1
    assert capfd.readouterr().err.startswith("TagMovedError: ")
    assert command("verify", "org/none", *where) == 1
    assert command("plan", release, "--repo", "none", *where) == 1
    assert command("verify", "org/none", "--type", "space", *where) == 2
    assert command("serve", "--root", local_hub.root) == 1
    more = capfd.readouterr()
    assert more.err.count("Traceback") == 0
    assert "is served by another process" in more.err
    assert WRITER not in out + err + more.out + more.err


def test_a_folder_without_a_manifest_is_no_release(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(IntegrityError, match=r"expected manifest\.json, got none"):
        stage(tmp_path)
    assert command("publish", tmp_path) == 1
    assert capfd.readouterr().err.startswith("IntegrityError: ")
    assert list(tmp_path.iterdir()) == []
