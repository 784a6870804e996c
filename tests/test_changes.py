"""What changed between two releases is found and told as text; versions rise by as much, or are refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile import TEXTS
from hub_fixture import LocalHub, local_hub  # noqa: F401
from release_fixture import MODEL_NAME, WORDS, write_dataset_release, write_model_release
from test_publish import DATASET, target

from daco import ConceptDictionary
from daco.errors import RecipeError, RefusedError
from daco.manifest import canonical_json, file_entry, read_manifest, write_manifest
from daco.recognition import MEASURED, Recogniser, measured
from daco.tables import write_table
from hub.changes import CHANGELOG, changes, next_version, too_low, write_changelog, yank
from hub.publish import plan, publish
from hub.stage import stage

CONCEPTS_FILE = "data/concepts/train-00000-of-00001.parquet"


def directions(layer: int) -> str:
    return f"data/directions_{MODEL_NAME}/layer_{layer}-00000-of-00001.parquet"


def edited(folder: Path, name: str, change: Callable[[pa.Table], pa.Table], version: str = "1.1.0") -> Path:
    """Change one table of a release, and its version."""
    table = change(pq.read_table(folder / name))
    write_table(folder / name, table)
    manifest = read_manifest(folder) | {"version": version}
    manifest["files"][name] = file_entry(folder / name, table.num_rows)
    for config in manifest.get("configs", {}).values():
        for part in config["splits"].values():
            part["rows"] = sum(manifest["files"][one]["rows"] for one in part["files"])
    write_manifest(folder, manifest)
    return folder


def with_column(name: str, values: Callable[[list], list]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        new = pa.array(values(table[name].to_pylist()), table.schema.field(at).type)
        return table.set_column(at, table.schema.field(at), new)

    return change


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return write_dataset_release(tmp_path / "older")


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    return write_dataset_release(tmp_path / "newer", version="1.1.0")


def test_the_same_content_is_a_patch(older: Path, newer: Path) -> None:
    found = changes(older, newer)
    assert (found.since, found.level, found.least, list(found.found)) == ("1.0.0", "patch", "1.0.1", [])


def test_what_recognises_concepts_is_minor_where_it_comes_or_changes(older: Path, tmp_path: Path) -> None:
    dictionary = ConceptDictionary.from_pretrained(older)
    table = measured(pd.DataFrame(1.5, index=range(len(WORDS)), columns=list(MEASURED)))
    one = Recogniser(torch.zeros(32), torch.eye(32), torch.ones(len(WORDS), 32), table, usual=2.0)
    other = dataclasses.replace(one, concepts=table.assign(threshold=1.25))
    for name, known in (("none", {}), ("one", {1: one}), ("same", {1: one}), ("other", {1: other})):
        dataclasses.replace(dictionary, recognisers=known).save_pretrained(tmp_path / name)

    def told(before: str, after: str) -> tuple[str, list[str]]:
        found = changes(tmp_path / before, tmp_path / after)
        return found.level, [str(change) for change in found.found]

    added = "2 configs added: recognition_model, statistics_model"
    assert told("none", "one") == ("minor", [added])
    assert told("one", "same") == ("patch", [])
    assert told("one", "other") == ("minor", ["model: concepts are recognised otherwise"])
    assert told("one", "none") == ("major", [added.replace("added", "dropped")])


def test_relabelled_and_renamed_concepts_are_minor(older: Path, newer: Path) -> None:
    edited(newer, CONCEPTS_FILE, with_column("polarity", lambda p: ["neutral", *p[1:]]))
    edited(newer, CONCEPTS_FILE, with_column("definition", lambda d: [*d[:3], "anew", *d[4:]]))
    found = changes(older, newer)
    assert [str(change) for change in found.found] == [
        f"1 concept relabelled: {WORDS[0]} (undesirable to neutral)",
        f"1 concept defined anew: {WORDS[3]}",
    ]
    assert (found.level, found.least) == ("minor", "1.1.0")


def test_dropped_concepts_are_major_and_added_ones_minor(tmp_path: Path, older: Path, newer: Path) -> None:
    more = write_dataset_release(tmp_path / "more", words=[*WORDS, "axe"])
    assert [str(one) for one in changes(older, more).found if "concept" in one.text] == [
        "1 concept added: axe"
    ]
    found = changes(more, newer)
    assert str(found.found[0]) == "1 concept dropped: axe"
    assert (found.level, found.least) == ("major", "2.0.0")


def test_a_moved_direction_is_minor_and_a_turned_one_major(older: Path, newer: Path) -> None:
    def moved(vectors: list) -> list:
        rows = np.array(vectors, np.float32)
        rows[2] += 0.1 * np.linalg.norm(rows[2]) * np.eye(rows.shape[1], dtype=np.float32)[0]
        return rows.tolist()

    found = changes(older, edited(newer, directions(2), with_column("vector", moved)))
    assert found.level == "minor"
    (change,) = found.found
    assert change.text == f"{MODEL_NAME}: 1 direction moved (cosine 0.9 to 0.9999)"
    assert change.names[0].startswith(f"{WORDS[2]} (0.99")
    turned = with_column("vector", lambda v: [(-np.array(v[0])).tolist(), *v[1:]])
    found = changes(older, edited(newer, directions(1), turned))
    assert found.level == "major"
    assert found.found[0].names == [f"{WORDS[0]} (-1.000 at layer 1)"]


def test_removed_stimuli_are_counted(older: Path, newer: Path) -> None:
    edited(newer, "data/stimuli/train-00000-of-00001.parquet", lambda table: table.slice(2))
    assert [str(one) for one in changes(older, newer).found] == ["2 stimuli dropped"]


def test_a_model_release_tells_of_weights_labels_and_defaults(tmp_path: Path) -> None:
    older = write_model_release(tmp_path / "older")
    newer = write_model_release(tmp_path / "newer", version="1.1.0")
    assert changes(older, newer).level == "patch"
    edited(newer, "layers.1/atoms.parquet", with_column("polarity", lambda p: ["neutral"] * len(p)))
    (newer / "config.json").write_text(
        (newer / "config.json").read_text().replace('"eta": 0.3', '"eta": 0.4')
    )
    weights = newer / "layers.2/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    manifest = read_manifest(newer)
    for path in (newer / "config.json", weights):
        manifest["files"][path.relative_to(newer).as_posix()] = file_entry(path)
    write_manifest(newer, manifest)
    found = changes(older, newer)
    assert [str(change) for change in found.found] == [
        "steering default eta: 0.3 before, 0.4 now",
        "layer 1: 31 atoms relabelled",
        "layer 2: other weights",
    ]
    assert found.level == "minor"


def test_another_activation_is_major(tmp_path: Path) -> None:
    older = write_model_release(tmp_path / "older")
    newer = write_model_release(tmp_path / "newer", activation="relu")
    assert changes(older, newer).level == "major"


def test_the_changelog_grows_and_names_stay_text(tmp_path: Path, older: Path, newer: Path) -> None:
    write_changelog(newer, older)
    third = write_dataset_release(tmp_path / "third", words=[*WORDS, *TEXTS], version="1.2.0")
    found = write_changelog(third, newer)
    text = (third / CHANGELOG).read_text()
    assert [line for line in text.split("\n") if line.startswith("#")] == [
        "# Changelog",
        "## v1.2.0",
        "## v1.1.0",
        "## v1.0.0",
    ]
    assert "<" not in text.replace("below", "")
    assert read_manifest(third)["facts"]["changes"] == {"since": "1.1.0", "level": found.level}
    before = text
    write_changelog(third, newer)
    assert (third / CHANGELOG).read_text() == before


def test_a_version_too_low_is_refused_and_nothing_written(tmp_path: Path, older: Path) -> None:
    fewer = write_dataset_release(tmp_path / "fewer", words=WORDS[:-1], version="1.1.0")
    manifest = (fewer / "manifest.json").read_bytes()
    with pytest.raises(RecipeError, match=r"expected at least v2\.0\.0 after a major change .* got v1\.1\.0"):
        write_changelog(fewer, older)
    assert not (fewer / CHANGELOG).exists()
    assert (fewer / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("version", "level", "least"),
    [("1.2.3", "patch", "1.2.4"), ("1.2.3", "minor", "1.3.0"), ("1.2.3", "major", "2.0.0")],
)
def test_versions_rise_by_the_size_of_the_change(version: str, level: str, least: str) -> None:
    assert next_version(version, level) == least
    assert not too_low(least, version, level)
    assert "expected at least v" + least in too_low(version, version, level)


def test_publishing_asks_for_the_changelog_and_checks_the_version(
    tmp_path: Path,
    local_hub: LocalHub,  # noqa: F811
    older: Path,
    newer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", local_hub.url)
    publish(older, target(local_hub, DATASET))
    stage(newer)
    (refusal,) = plan(newer, target(local_hub, DATASET)).refusals
    assert "expected a changelog since v1.0.0, the newest tag, got none" in str(refusal)
    assert f"--since {DATASET}@v1.0.0" in str(refusal)
    with pytest.raises(RefusedError, match="expected a changelog"):
        publish(newer, target(local_hub, DATASET))
    write_changelog(newer, older)
    assert "[CHANGELOG.md](CHANGELOG.md)" not in (newer / "README.md").read_text()
    publish(newer, target(local_hub, DATASET))
    assert "[CHANGELOG.md](CHANGELOG.md)" in (newer / "README.md").read_text()
    lowered = write_dataset_release(tmp_path / "lowered", version="1.1.1")
    manifest = read_manifest(lowered)
    manifest["facts"] = {"changes": {"since": "1.1.0", "level": "minor"}}
    (lowered / "manifest.json").write_text(canonical_json(manifest))
    refusals = plan(lowered, target(local_hub, DATASET)).refusals
    assert any("expected at least v1.2.0" in str(one) for one in refusals)


def test_a_withdrawn_version_gets_a_second_tag_and_a_warning(
    tmp_path: Path,
    local_hub: LocalHub,  # noqa: F811
    older: Path,
    newer: Path,
) -> None:
    bad = publish(older, target(local_hub, DATASET)).commit
    write_changelog(newer, older)
    yank(newer, "1.0.0", "labels of <b>two</b> concepts were swapped")
    planned = plan(newer, target(local_hub, DATASET))
    assert planned.to_json()["withdraw"] == ["yanked-v1.0.0"]
    good = publish(newer, target(local_hub, DATASET)).commit
    refs = local_hub.api().list_repo_refs(DATASET, repo_type="dataset")
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    assert tags == {"v1.0.0": bad, "v1.1.0": good, "yanked-v1.0.0": bad}
    card = (newer / "README.md").read_text()
    assert "**Do not use `v1.0.0`, it is withdrawn: labels of &#60;b&#62;two" in card
    assert publish(newer, target(local_hub, DATASET)).committed is False
    third = write_dataset_release(tmp_path / "third", version="1.1.1")
    write_changelog(third, newer)
    assert "1.0.0" in read_manifest(third)["facts"]["yanked"]


def test_only_older_versions_can_be_withdrawn_and_with_a_reason(newer: Path) -> None:
    for version in ("1.1.0", "2.0.0", "one"):
        with pytest.raises(RecipeError, match=r"expected a version MAJOR\.MINOR\.PATCH below 1\.1\.0"):
            yank(newer, version, "bad")
    with pytest.raises(RecipeError, match="expected a reason to withdraw"):
        yank(newer, "1.0.0", " ")
