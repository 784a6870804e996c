"""A shard is whole or absent, a finished stage is skipped, a changed one starts anew."""

import json
from pathlib import Path

import pytest

from builders.pipeline import run
from builders.recipe import Recipe, load_recipe, recipe_of
from builders.stages import Work, check_sizes, done, fingerprint, seal_sha256, summed_counts
from daco.errors import DacoError, IntegrityError, RecipeError

RECIPE = recipe_of({"model": {"tiny": "llava"}})


def work(out: Path, recipe: Recipe = RECIPE) -> Work:
    out.mkdir(exist_ok=True)
    return Work(recipe, out, "corpus")


def half_written(stage: Work) -> None:
    with stage.shard("00001") as folder:
        (folder / "x").write_text("half")
        _ = 1 / 0


def test_a_failed_shard_leaves_nothing_and_a_finished_one_stays(tmp_path: Path) -> None:
    stage = work(tmp_path)
    assert stage.open("f1")
    with stage.shard("00000") as folder:
        (folder / "counts.json").write_text('{"bad": 2}')
    with pytest.raises(ZeroDivisionError):
        half_written(stage)
    assert stage.has("00000")
    assert not stage.has("00001")
    assert work(tmp_path).open("f1")  # not done yet: opens again, and clears what was half-written
    assert [path.name for path in (tmp_path / "corpus" / "shards").iterdir()] == ["00000"]
    assert summed_counts(stage.shards()) == {"bad": 2}


@pytest.mark.parametrize("name", [".done.json.partial", "layers.1/.facts.json.partial", ".model.partial/x"])
def test_what_a_kill_left_half_written_is_not_sealed(tmp_path: Path, name: str) -> None:
    stage = work(tmp_path)
    stage.open("f1")
    (tmp_path / "corpus" / "facts.json").write_text("{}")
    left_over = tmp_path / "corpus" / name
    left_over.parent.mkdir(exist_ok=True)
    left_over.write_text("half")
    assert stage.open("f1")
    stage.finish({"in": 0, "out": 0, "skipped": {}})
    assert set(done(tmp_path, "corpus")["files"]) == {"facts.json"}
    check_sizes(tmp_path, "corpus")


def test_a_finished_stage_is_skipped_until_its_fingerprint_changes(tmp_path: Path) -> None:
    stage = work(tmp_path)
    stage.open("f1")
    (stage.folder / "result.txt").write_text("r")
    stage.finish({"in": 1, "out": 1, "skipped": {}})
    assert not work(tmp_path).open("f1")
    assert set(done(tmp_path, "corpus")["files"]) == {"result.txt"}
    assert work(tmp_path).open("f2")
    assert not (stage.folder / "result.txt").exists()


def test_the_fingerprint_covers_sections_and_upstream() -> None:
    base = fingerprint("s", {"a": {"x": 1}}, {"u": "1"})
    assert base == fingerprint("s", {"a": {"x": 1}}, {"u": "1"})
    assert (
        len(
            {
                base,
                fingerprint("s", {"a": {"x": 2}}, {"u": "1"}),
                fingerprint("s", {"a": {"x": 1}}, {"u": "2"}),
            }
        )
        == 3
    )


def test_the_seal_changes_with_any_file(tmp_path: Path) -> None:
    stage = work(tmp_path)
    stage.open("f1")
    (stage.folder / "a").write_text("1")
    stage.finish({"in": 0, "out": 0, "skipped": {}})
    first = seal_sha256(tmp_path, "corpus")
    (stage.folder / "a").write_text("2")
    stage.finish({"in": 0, "out": 0, "skipped": {}})
    assert seal_sha256(tmp_path, "corpus") != first


def test_a_stage_needs_its_upstream(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="needs 'corpus', which is not finished"):
        Work(RECIPE, tmp_path, "concepts").upstream("corpus")
    with pytest.raises(IntegrityError, match="needs 'corpus'"):
        run(RECIPE, tmp_path, only="concepts")


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected a stage among"):
        run(RECIPE, tmp_path, only="corpse")


def test_the_log_has_one_line_a_shard(tmp_path: Path) -> None:
    stage = work(tmp_path)
    stage.open("f")
    for name in ("a", "b"):
        with stage.shard(name):
            pass
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    events = [(line["event"], line["shard"]) for line in lines]
    assert events == [("begin", "a"), ("shard", "a"), ("begin", "b"), ("shard", "b")]


def test_every_shipped_recipe_loads() -> None:
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).release.version


def test_our_errors_derive_from_a_builtin() -> None:
    classes = DacoError.__subclasses__()
    assert len(classes) > 10
    for cls in classes:
        builtin = [base for base in cls.__mro__ if base.__module__ == "builtins"]
        assert builtin[0] not in (Exception, BaseException), cls
