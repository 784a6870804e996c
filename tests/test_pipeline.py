"""A change starts anew what depends on it and nothing else, and the release is as of a run from nothing."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import Killed, digests

from builders import evaluate, recognition
from builders.pipeline import STAGES, Stage, run
from builders.recipe import Recipe, recipe_of
from builders.stages import DONE, STAGE, Work
from daco.errors import FormatError, IntegrityError

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": "changes", "seed": 5, "threads": 1},
    "corpus": {"kind": "toyworld", "rows": 200, "name": "toyworld", "licence": "cc0-1.0"},
    "concepts": {"source": "captions", "min_count": 3, "max_concepts": 30},
    "clip": {"steps": 4, "batch": 16, "hidden": 32, "n_layers": 1, "vocabulary": 300, "image_size": 32},
    "stimuli": {"n_positive": 5, "min_positive": 1, "pool": 64, "block": 15},
    "model": {"tiny": "llava"},
    "activations": {"layers": [1, 2], "batch": 8},
    "recognition": {"min_precision": 0.1, "folds": 3},
    "sae": {"k": 4, "holdout": 0.4, "steps": 4, "batch": 32},
    "evaluate": {"items": 12, "batch": 3},
    "release": {"org": "local", "dataset": "DACO-changes", "licence": "cc0-1.0"},
}

AFTER_LABELS = ["polarity", "atoms", "tune", "evaluate", "release"]
"""Stages that read what concepts are labelled."""


def recipe(**changes: dict[str, Any]) -> Recipe:
    return recipe_of(SECTIONS | {name: SECTIONS.get(name, {}) | change for name, change in changes.items()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, every stage real."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(recipe(), out) == [stage.name for stage in STAGES]
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def from_nothing(changed: Recipe, place: Path) -> dict[str, str]:
    run(changed, place)
    return released(place)


def released(out: Path) -> dict[str, str]:
    return {name: sha for name, sha in digests(out / "release").items() if name not in (STAGE, DONE)}


def on_disk(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file each is, and when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def names_of(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "release/model/evaluation.json").read_text())["names"]


def polarities(out: Path) -> dict[str, str]:
    table = pd.read_parquet(out / "release/dataset/data/concepts")
    return dict(zip(table["concept"], table["polarity"], strict=True))


def relabelled(out: Path, by: str, folder: Path) -> tuple[dict[str, Any], str]:
    """A change of the recipe that gives the first neutral concept another label, and its name."""
    concept = next(name for name, polarity in polarities(out).items() if polarity == "neutral")
    edit = {"labels": "concept\tpolarity\n{}\tdesirable\n",
            "edits": "action\tconcept\tpolarity\nrelabel\t{}\tdesirable\n"}[by]  # fmt: skip
    path = folder / "list.tsv"
    path.write_text(edit.format(concept))
    section = {"labels": {"polarity": {"path": str(path)}}, "edits": {"concepts": {"edits": str(path)}}}[by]
    return section, concept


@pytest.mark.parametrize(("by", "before"), [("labels", []), ("edits", ["concepts"])])
def test_another_label_starts_only_what_reads_labels(
    out: Path, tmp_path: Path, by: str, before: list
) -> None:
    change, concept = relabelled(out, by, tmp_path)
    kept = {name: on_disk(out / name) for name in ("stimuli", "directions", "recognition", "sae")}
    assert run(recipe(**change), out) == before + AFTER_LABELS
    assert {name: on_disk(out / name) for name in kept} == kept
    assert polarities(out)[concept] == "desirable"
    assert released(out) == from_nothing(recipe(**change), tmp_path / "anew")


def test_the_same_labels_from_elsewhere_start_nothing_anew_but_the_release(out: Path, tmp_path: Path) -> None:
    path, (concept, polarity) = tmp_path / "labels.tsv", next(iter(polarities(out).items()))
    path.write_text(f"concept\tpolarity\trationale\n{concept}\t{polarity}\tso says a list\n")
    for other, label in polarities(out).items():
        if label != "neutral":
            path.open("a").write(f"{other}\t{label}\t\n")
    assert run(recipe(polarity={"path": str(path)}), out) == ["polarity", "release"]


def test_another_setting_of_recognition_starts_no_steering_anew(out: Path, tmp_path: Path) -> None:
    changed, before = recipe(recognition={"min_precision": 0.3}), names_of(out)
    kept = {name: on_disk(out / name) for name in ("atoms", "evaluate")}
    assert run(changed, out) == ["recognition", "release"]
    assert {name: on_disk(out / name) for name in kept} == kept
    for layer, row in names_of(out).items():
        assert row["recognised_recall"] < before[layer]["recognised_recall"]
        assert row["atoms_precision"] == before[layer]["atoms_precision"]
    assert released(out) == from_nothing(changed, tmp_path / "anew")


def run_and_die(changed: Recipe, out: Path, module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies when it calls this function of a module for the second time."""
    real, calls = getattr(module, name), []

    def dies(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        with pytest.raises(Killed):
            run(changed, out)


def begun(out: Path, stage: str) -> list[str]:
    """Shards that a stage has begun in this folder, over all runs."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return [line["shard"] for line in lines if (line["stage"], line["event"]) == (stage, "begin")]


def test_steering_that_was_killed_goes_on_under_another_setting_of_recognition(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gamma, whole = {"evaluate": {"gamma": 0.7}}, begun(out, "evaluate")
    run_and_die(recipe(**gamma), out, evaluate, "evaluate_batch", monkeypatch)
    changed = recipe(**gamma, recognition={"min_precision": 0.3})
    assert run(changed, out) == ["recognition", "evaluate", "release"]
    assert begun(out, "evaluate") == [*whole, "00000", "00001", "00001", "00002", "00003"]
    assert released(out) == from_nothing(changed, tmp_path / "anew")


def test_recognition_that_was_killed_goes_on_under_another_label(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, shard = {"recognition": {"min_precision": 0.3}}, out / "recognition" / "shards" / "layers.1"
    run_and_die(recipe(**setting), out, recognition, "calibrate", monkeypatch)
    assert (kept := on_disk(shard))
    changed = recipe(**setting, **relabelled(out, "labels", tmp_path)[0])
    assert run(changed, out) == ["polarity", "recognition", *AFTER_LABELS[1:]]
    assert on_disk(shard) == kept
    assert released(out) == from_nothing(changed, tmp_path / "anew")


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({"sae": {"k": 3}}, ["sae", "atoms", "tune", "evaluate", "release"]),
        ({"sae": {"holdout": 0.5}}, ["directions", "recognition", "sae", *AFTER_LABELS[1:]]),
        ({"atoms": {"eta": 0.2}}, AFTER_LABELS[1:]),
        ({"atoms": {"n_top": 3}}, AFTER_LABELS[1:]),
        ({"evaluate": {"items": 8}}, ["evaluate", "release"]),
        ({"evaluate": {"gamma": 0.5}}, ["tune", "evaluate", "release"]),
        ({"evaluate": {"scope": "image"}}, ["tune", "evaluate", "release"]),
    ],
)
def test_another_setting_starts_only_what_reads_it(out: Path, change: dict, anew: list) -> None:
    assert run(recipe(**change), out) == anew


@pytest.mark.parametrize(
    ("stage", "of", "file", "error"),
    [
        ("directions", "activations", "sides.json", FormatError),
        ("recognition", "activations", "sides.json", FormatError),
        ("sae", "activations", "sides.json", FormatError),
        ("atoms", "activations", "sides.json", FormatError),
        ("evaluate", "activations", "sides.json", FormatError),
        ("release", "recognition", "figures.json", IntegrityError),
    ],
)
def test_what_an_earlier_version_left_is_refused_before_anything_is_discarded(
    out: Path, stage: str, of: str, file: str, error: type
) -> None:
    """With `--only`; without it, it is made anew."""
    seal = json.loads((out / of / DONE).read_text())
    for name in [name for name in seal["files"] if name.endswith(file)]:
        del seal["files"][name]
        (out / of / name).unlink()
    (out / of / DONE).write_text(json.dumps(seal))
    kept = on_disk(out / stage)
    with pytest.raises(error, match="an earlier version"):
        run(recipe(), out, only=stage)
    assert on_disk(out / stage) == kept


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_reads_what_it_says_and_no_more(out: Path, stage: Stage) -> None:
    made, work = digests(out / stage.name), Work(recipe(), out, stage.name)
    shutil.rmtree(out / stage.name)
    keep_only(out, stage)
    assert work.open("another")
    importlib.import_module(f"builders.{stage.module}").run(work)
    assert digests(out / stage.name) | {STAGE: ""} == made | {STAGE: ""}


def keep_only(out: Path, stage: Stage) -> None:
    """Leave in a run folder what a stage says it reads, and of columns that it does not name other values.

    A release also has counts of all stages, and of the corpus and the activations their texts.
    """
    texts = ("corpus/stimuli.parquet", "activations/facts.json") if stage.name == "release" else ()
    for path in out.glob("*/**/*"):
        name = path.relative_to(out)
        counted = stage.name == "release" and name.name == DONE
        if path.is_file() and not (name.parts[0] in stage.needed or counted or str(name) in texts):
            path.unlink()
    read = {one.partition(".")[::2] for one in stage.upstream}
    for other in {name for name, column in read if column}:
        path = out / other / "concepts.parquet"
        schema, table = pq.read_schema(path), pd.read_parquet(path)
        for column in table.columns.difference([column for name, column in read if name == other]):
            table[column] = table[column].iloc[0] if column == "polarity" else table[column].to_numpy()[::-1]
        pq.write_table(pa.Table.from_pandas(table, schema, preserve_index=False), path)
