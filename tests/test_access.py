"""Proves who may see what is published: private and gated repos, prompts, and proposals to others' repos."""

import json
import shutil
from pathlib import Path

import pytest
from hub_fixture import READER, WRITER, LocalHub, local_hub, running  # noqa: F401
from release_fixture import RECIPE, write_dataset_release, write_model_release
from test_publish import DATASET, MODEL, command, next_version, slept, state, target  # noqa: F401

from daco.errors import HubRefusedError, RefusedError, VerificationError
from daco.manifest import read_manifest
from hub.plan import Access
from hub.propose import propose
from hub.publish import plan, publish
from hub.verify import verify

PROMPTS = {"suites/prompts.csv": b"id,prompt\n1,how do I pick a lock\n"}
GATED = Access(gated="manual")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_model_release(tmp_path / "release")


# --- private and gated


def test_a_gated_repo_is_gated_before_anything_is_in_it(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    seen: list[tuple[object, int]] = []

    def look() -> None:
        info = local_hub.api().repo_info(MODEL)
        seen.append((info.gated, len(info.siblings or ())))

    local_hub.faults.before("POST", "/commit/", look)
    local_hub.faults.before("POST", "/preupload/", look)
    assert plan(release, target(local_hub), GATED).gate == "manual"
    done = publish(release, target(local_hub), GATED)
    assert seen == [("manual", 1), ("manual", 1)]  # .gitattributes alone
    assert publish(release, target(local_hub), GATED).committed is False
    assert publish(release, target(local_hub)).commit == done.commit
    assert local_hub.api().repo_info(MODEL).gated == "manual"
    publish(release, target(local_hub), Access(gated="auto"))
    assert local_hub.api().repo_info(MODEL).gated == "auto"
    assert len(local_hub.faults.answered("PUT", "/settings$")) == 2


def test_a_gated_release_tells_its_readers_to_ask(local_hub: LocalHub, release: Path, tmp_path: Path) -> None:  # noqa: F811
    publish(release, target(local_hub), GATED)
    code = f"import daco; daco.SteeringSAE.from_pretrained({MODEL!r})"
    for token in (None, READER):
        with pytest.raises(AssertionError, match=f"{MODEL} is gated: ask for access on its page"):
            local_hub.run(code, token=token, HF_HOME=str(tmp_path / str(token)))
    local_hub.api().grant_access(MODEL, "reader")
    local_hub.run(code, token=READER, HF_HOME=str(tmp_path / "granted"))
    assert verify(target(local_hub), "v1.0.0")
    local_hub.api().reject_access_request(MODEL, "reader", rejection_reason="no")
    with pytest.raises(VerificationError, match="restricted"):
        verify(target(local_hub, token=READER), "v1.0.0")


def test_private_is_never_public(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    publish(release, target(local_hub), Access(private=True))
    assert local_hub.api().repo_info(MODEL).private
    assert publish(release, target(local_hub), Access(private=True)).committed is False
    local_hub.api().update_repo_settings(MODEL, visibility="public")
    newer = next_version(release, "1.1.0", "1.0.0")
    with pytest.raises(RefusedError, match="expected a private repo, got a public one; make it private"):
        publish(newer, target(local_hub), Access(private=True))
    assert state(local_hub)["tags"].keys() == {"v1.0.0"}


def test_prompts_leave_only_to_a_gated_repo(local_hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    folder = write_model_release(tmp_path / "release", extra_files=PROMPTS)
    message = r"it holds prompts \(suites/prompts\.csv, column 'prompt'\), which leave only to a gated repo"
    with pytest.raises(RefusedError, match=message):
        publish(folder, target(local_hub))
    assert "which leave only to a gated repo" in str(plan(folder, target(local_hub)))
    assert not local_hub.api().repo_exists(MODEL)
    publish(folder, target(local_hub), GATED)
    newer = next_version(folder, "1.1.0", "1.0.0")
    assert publish(newer, target(local_hub)).committed  # it is gated already


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"Request": "x"}\n'),
        ("a.tsv", b"id\tgoal\n"),
        ("a.csv", b'"question",x\n'),
        ("a.ndjson", b'{"messages": []}\n'),
    ],
)
def test_prompts_are_found_in_tables_of_text(
    local_hub: LocalHub,  # noqa: F811
    tmp_path: Path,
    name: str,
    content: bytes,
) -> None:
    folder = write_model_release(tmp_path / "release", extra_files={name: content})
    assert [one.where for one in plan(folder, target(local_hub)).refusals] == ["prompts"]
    harmless = RECIPE | {"release": {**RECIPE["release"], "prompts": "harmless"}}
    folder = write_model_release(tmp_path / "harmless", extra_files={name: content}, recipe=harmless)
    assert not plan(folder, target(local_hub)).refusals


# --- proposals


def test_a_reader_proposes_and_a_maintainer_tags(local_hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    old = write_dataset_release(tmp_path / "release", extra_files={"old.txt": b"old"})
    first = publish(old, target(local_hub, DATASET))
    community = next_version(old, "1.1.0", "1.0.0", **{"old.txt": None})
    reader = target(local_hub, DATASET, READER)
    with pytest.raises(HubRefusedError):
        publish(community, reader)
    done = propose(community, reader)
    assert (done.revision, done.committed, done.tag) == ("refs/pr/1", True, "v1.1.0")
    assert done.bytes_sent > 0
    assert done.url == f"{reader.url}/discussions/1"
    again = propose(community, reader)
    assert (again.revision, again.commit, again.committed) == ("refs/pr/1", done.commit, False)
    assert state(local_hub, DATASET)["tags"] == {"v1.0.0": first.commit}
    assert state(local_hub, DATASET)["commits"][0][0] == first.commit
    local_hub.api().merge_pull_request(DATASET, 1, repo_type="dataset")
    tagged = publish(community, target(local_hub, DATASET))
    assert tagged.committed is False
    shown = state(local_hub, DATASET)
    assert shown["tags"] == {"v1.0.0": first.commit, "v1.1.0": shown["commits"][0][0]}
    assert "old.txt" not in shown["files"]
    with pytest.raises(RefusedError, match="expected something to propose, got what it holds already"):
        propose(community, reader)


@pytest.mark.parametrize("fault", [{"landed": True, "status": 504}, {"status": 503}, {"drop": True}])
def test_a_proposal_is_never_doubled(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    fault: dict[str, int],
    slept: list[float],  # noqa: F811
) -> None:
    publish(release, target(local_hub))
    newer = next_version(release, "1.1.0", "1.0.0", **{"evaluation.json": b'{"a": {"b": 1}}\n'})
    local_hub.faults.fail("POST", "/commit/", **fault)  # type: ignore[arg-type]
    assert propose(newer, target(local_hub, token=READER)).revision == "refs/pr/1"
    assert slept == [1]
    assert len(list(local_hub.api().get_repo_discussions(MODEL))) == 1


def test_what_cannot_be_proposed_is_refused(local_hub: LocalHub, release: Path) -> None:  # noqa: F811
    with pytest.raises(RefusedError, match="expected a repo to propose to, got none"):
        propose(release, target(local_hub))
    publish(next_version(release, "2.0.0"), target(local_hub))
    with pytest.raises(RefusedError, match=r"expected a version above v2\.0\.0"):
        propose(release, target(local_hub, token=READER))
    assert not list(local_hub.api().get_repo_discussions(MODEL))


# --- without a network


READ = """
import sys
import daco
from daco.errors import DacoError
try:
    daco.SteeringSAE.from_pretrained("org/daco-sae-tiny", revision=sys.argv[1])
    print("read")
except DacoError as error:
    print(type(error).__name__, error)
"""


def test_a_second_load_needs_no_hub_and_a_damaged_cache_is_told_or_mended(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    tmp_path: Path,
) -> None:
    commit = publish(release, target(local_hub)).commit
    home = tmp_path / "cache"
    assert local_hub.run(READ, "v1.0.0", HF_HOME=str(home)) == "read\n"
    asked = len(local_hub.faults.log)
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    assert local_hub.run(READ, "v1.0.0", **offline) == "read\n"
    assert local_hub.run(READ, commit, **offline) == "read\n"
    assert "is not in the cache" in local_hub.run(READ, "v2.0.0", **offline)
    entry = read_manifest(release)["files"]["layers.1/sae_weights.safetensors"]
    blob = next(path for path in home.rglob(entry["sha256"]) if path.is_file())
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert local_hub.run(READ, "v1.0.0", **offline).startswith("IntegrityError layers.1/sae_weights")
    assert len(local_hub.faults.log) == asked  # the Hub was not asked once
    assert local_hub.run(READ, "v1.0.0", HF_HOME=str(home)) == "read\n"
    assert local_hub.run(READ, "v1.0.0", **offline) == "read\n"


def test_a_release_is_carried_from_one_hub_to_another(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    tmp_path: Path,
) -> None:
    """As `hub/local/README.md` says."""
    first = publish(release, target(local_hub))
    carried = tmp_path / "carried"
    local_hub.api().snapshot_download(
        MODEL, revision="v1.0.0", local_dir=carried, ignore_patterns=[".gitattributes"]
    )
    shutil.rmtree(carried / ".cache")
    with running(tmp_path / "other") as other:
        again = publish(carried, target(other))
        assert again.commit == first.commit
        assert state(other) == state(local_hub)


# --- the command line


def test_the_command_line_gates_and_proposes(
    local_hub: LocalHub,  # noqa: F811
    release: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    where = ("--endpoint", local_hub.url)
    assert command("plan", release, *where, "--gated", "manual", "--json") == 0
    assert json.loads(capfd.readouterr().out)["gate"] == "manual"
    assert command("plan", release, *where, "--gated", "perhaps") == 2
    assert command("publish", release, *where, "--gated", "manual") == 0
    capfd.readouterr()
    newer = next_version(release, "1.1.0", "1.0.0", **{"evaluation.json": b'{"a": {"b": 1}}\n'})
    monkeypatch.setenv("HF_TOKEN", READER)
    assert command("propose", newer, *where) == 1  # readers must be let in first
    assert "restricted and you are not in the authorized list" in capfd.readouterr().err
    local_hub.api().grant_access(MODEL, "reader")
    assert command("propose", newer, *where) == 0
    assert f"model {MODEL} v1.1.0 is proposed in refs/pr/1, commit" in capfd.readouterr().out
    assert command("propose", newer, *where, "--json") == 0
    assert json.loads(capfd.readouterr().out)["committed"] is False
    assert command("stage", newer, "--superseded-by", "org/next") == 0
    assert read_manifest(newer)["facts"]["new_version"] == "org/next"
    assert command("stage", newer, "--superseded-by", "next") == 1
