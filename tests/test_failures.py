"""Bad input ends in the error CONTRIBUTING names, or is skipped and counted; nothing is half-written."""

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from hub_fixture import READER, WRITER, LocalHub, local_hub  # noqa: F401
from pictures import make_folder, save_picture, tiny_recipe
from PIL import Image
from release_fixture import D_MODEL, N_ATOMS, N_STIMULI, write_dataset_release, write_model_release
from safetensors.torch import load_file, save_file
from small_run import (
    N_CONCEPTS,
    opened,
    small_recipe,
    write_activations,
    write_corpus,
    write_directions,
    write_links,
    write_sae,
)

import daco
from builders import __main__ as command
from builders import activations, sae_training
from builders.mllm import load_mllm
from builders.pipeline import run
from builders.recipe import Recipe
from builders.stages import DONE, done
from daco.errors import (
    ActivationError,
    ArtefactNotFoundError,
    CorpusError,
    DacoError,
    FormatError,
    IntegrityError,
    ModelMismatchError,
    RecipeError,
    RefusedError,
)
from daco.manifest import canonical_json, file_entry, read_manifest
from hub.publish import publish
from hub.remote import Target
from hub.stage import stage


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but locks and logs."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "log.jsonl"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# The corpus.


def bad_pictures(folder: Path) -> Path:
    """24 good pairs, and one of every bad kind."""
    make_folder(folder, 32)
    (folder / "000.png").write_bytes(b"no image")
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:60])
    (folder / "002.txt").write_text(" \n\x00")
    (folder / "003.txt").unlink()
    (folder / "004.png").unlink()
    (folder / "005.txt").write_text("a" * 10_001)
    Image.new("RGB", (3, 301)).save(folder / "006.png")
    (folder / "007.png").unlink()
    (folder / "007.png").symlink_to(save_picture(folder.parent / "secret.png", "red"))
    for suffix in ("png", "txt"):
        (folder / f"copy.{suffix}").write_bytes((folder / f"008.{suffix}").read_bytes())
    return folder


SKIPPED = {
    "unreadable_image": 2,
    "empty_caption": 1,
    "missing_caption": 1,
    "missing_image": 1,
    "long_caption": 1,
    "extreme_shape": 1,
    "outside_folder": 1,
    "duplicate_pair": 1,
}


def test_bad_pairs_are_skipped_and_counted_in_both_manifests(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        bad_pictures(tmp_path / "pics"),
        concepts={"max_concepts": 9},
        activations={"layers": [1]},
        sae={"k": 3, "steps": 2, "batch": 16, "holdout": 0.4},
        evaluate={"items": 2},
        stimuli={"min_positive": 1},
    )
    run(recipe, tmp_path / "run")
    for kind in ("dataset", "model"):
        counts = read_manifest(tmp_path / "run" / "release" / kind)["counts"]
        assert counts["corpus"] == {"in": 33, "out": 24, "skipped": SKIPPED}
        assert counts["concepts"]["skipped"].keys() <= {"rare", "over_max"}
        for stage_counts in counts.values():
            assert stage_counts["out"] <= stage_counts["in"]


def refused_run(recipe: Recipe, out: Path, stage_name: str, error: type[DacoError], message: str) -> None:
    """The pipeline must stop inside a stage, leaving all before it as it was and that stage unsealed."""
    before = {name: data for name, data in contents(out).items() if not name.startswith(stage_name)}
    with pytest.raises(error, match=message):
        run(recipe, out, only=stage_name)
    assert not (out / stage_name / DONE).exists()
    assert before == {name: data for name, data in contents(out).items() if not name.startswith(stage_name)}
    assert not list((out / stage_name).rglob(".*"))


@pytest.mark.parametrize("pairs", [0, 3])
def test_a_corpus_without_a_usable_row_says_what_was_tried(tmp_path: Path, pairs: int) -> None:
    pictures = make_folder(tmp_path / "pics", pairs)
    for image in pictures.glob("*.png"):
        image.write_bytes(b"")
    message = (
        f"expected at least one readable image with a caption, got none in {pairs} rows .*check corpus.path"
    )
    refused_run(tiny_recipe(pictures), tmp_path / "run", "corpus", CorpusError, message)
    make_folder(pictures, 3)
    run(tiny_recipe(pictures), tmp_path / "run", only="corpus")
    assert done(tmp_path / "run", "corpus")["counts"]["out"] == 3


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cut_parquet(path: Path) -> Path:
    """A parquet table whose pages are overwritten: its footer still reads well."""
    pq.write_table(pa.table({"image": ["x" * 99] * 5000, "caption": [str(i) for i in range(5000)]}), path)
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    return write(path, bytes(data))


@pytest.mark.parametrize(
    ("name", "make", "fields", "message"),
    [
        (
            "t.tsv",
            lambda p: write(p, b"image\ttext\na\tb\n"),
            {},
            r"column 'caption', got \['image', 'text'\]",
        ),
        ("t.csv", lambda p: write(p, b""), {}, r"expected column 'image', got \[\]; set corpus\."),
        (
            "t.csv",
            lambda p: write(p, b'image,caption\na,"' + b"x" * 200_000),
            {},
            "expected csv, got field larger",
        ),
        ("t.parquet", lambda p: write(p, b"PAR1 no"), {}, "expected parquet, got .*write it again"),
        ("t.parquet", cut_parquet, {}, "(?s)expected parquet, got .*write it again"),
        ("t.xlsx", lambda p: write(p, b"PK"), {}, r"expected a \.tsv, \.csv or \.parquet file, got '\.xlsx'"),
        ("none.tsv", lambda p: p, {}, "expected a table at .*got none; check corpus.path"),
        ("c.json", lambda p: write(p, b"{"), {"kind": "coco"}, "expected COCO captions .*check corpus.path"),
        ("c.json", lambda p: write(p, b'{"images": [], "annotations": ["x"]}'), {"kind": "coco"}, "COCO"),
        ("none", lambda p: p, {"kind": "folder"}, "expected a folder of images and captions, got"),
        ("none", lambda p: p, {"kind": "dataset"}, "expected a data set .*check corpus.path"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[Path], Path],
    fields: dict[str, str],
    message: str,
) -> None:
    path = make(tmp_path / name)
    recipe = tiny_recipe(path, corpus={"kind": "table"} | fields)
    refused_run(recipe, tmp_path / "run", "corpus", CorpusError, message)


# Recipes and runs.


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[corpse]\n", [], "unknown section 'corpse'; expected one of"),
        ("[corpus]\npth = 'x'\n", [], r"\[corpus\]: unknown field 'pth'; expected one of"),
        ("[corpus]\nrows = '7'\n", [], "corpus.rows: expected int, got '7'"),
        ("[model]\n", [], "model: expected an `id` .* or `tiny`, got neither"),
        ("[model\n", [], "expected TOML, got"),
        ("", ["sae.k"], "--set: expected section.field=value, got 'sae.k'"),
        ("", ["sae.batch=0"], "sae.batch: expected at least 1, got 0"),
        ("", ["sae.n_atoms=16", "sae.k=17"], "sae.k: expected 1 to n_atoms = 16, got 17; lower k"),
        ("", ["atoms.eta=1.5"], "atoms.eta: expected a number from 0 to 1, got 1.5"),
        ("", ["atoms.eta=nan"], "atoms.eta: expected a number from 0 to 1, got nan"),
        ("", ["release.version='1'"], "release.version: expected MAJOR.MINOR.PATCH like 1.0.0, got '1'"),
        ("", ["release.dataset='../x'"], "release.dataset: expected letters, digits"),
        ("", ["activations.layers=[-1]"], r"activations.layers: expected rising .* from 0, got \[-1\]"),
        ("", ["clip.image_size=33"], "clip.image_size: expected a multiple of clip.patch_size = 8, got 33"),
        ("", ["model.dtype='float8'"], "model.dtype: expected one of"),
    ],
)
def test_a_broken_recipe_is_refused_before_anything_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    overrides: list[str],
    message: str,
) -> None:
    path = write(tmp_path / "r.toml", (text or "[model]\ntiny = 'llava'\n").encode())
    options = [word for override in overrides for word in ("--set", override)]
    arguments = ["builders", "run", str(path), "--out", str(tmp_path / "run"), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    app = command.app
    monkeypatch.setattr(command, "app", lambda: app(standalone_mode=False))
    assert command.main() == 1
    printed = capsys.readouterr().err
    assert printed.startswith("RecipeError: ")
    assert len(printed.splitlines()) <= 3
    with pytest.raises(RecipeError, match=message):
        raise RecipeError(printed)
    assert not (tmp_path / "run").exists()


def test_an_unknown_stage_or_a_stage_out_of_order_makes_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(make_folder(tmp_path / "pics", 3))
    with pytest.raises(RecipeError, match=r"expected a stage among \['corpus', .*got 'corpse'"):
        run(recipe, tmp_path / "run", only="corpse")
    assert not (tmp_path / "run").exists()
    refused_run(recipe, tmp_path / "run", "sae", IntegrityError, "'sae' needs 'activations', .*run it first")
    assert contents(tmp_path / "run") == {}


def test_a_corpus_that_has_grown_is_read_again(tmp_path: Path) -> None:
    recipe, out = tiny_recipe(make_folder(tmp_path / "pics", 3)), tmp_path / "run"
    assert run(recipe, out, only="corpus") == ["corpus"]
    assert run(recipe, out, only="corpus") == []
    make_folder(tmp_path / "pics", 4)
    assert run(recipe, out, only="corpus") == ["corpus"]
    assert done(out, "corpus")["counts"]["out"] == 4


def test_a_second_run_in_one_folder_waits_for_nobody_and_breaks_nothing(tmp_path: Path) -> None:
    recipe, out = tiny_recipe(make_folder(tmp_path / "pics", 3)), tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"):
        with pytest.raises(RecipeError, match="another process is at work in this folder; wait for it"):
            run(recipe, out, only="corpus")
        assert contents(out) == {}
    assert run(recipe, out, only="corpus") == ["corpus"]


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    recipe = tiny_recipe(make_folder(tmp_path / "pics", 3))
    with pytest.raises(RecipeError, match=r"expected a run folder that can be made, got .*choose another"):
        run(recipe, write(tmp_path / "file", b"mine"))
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("change", ["truncated", "missing"])
def test_a_stage_does_not_start_on_files_that_were_cut_off(tmp_path: Path, change: str) -> None:
    recipe, out = tiny_recipe(make_folder(tmp_path / "pics", 9)), tmp_path / "run"
    run(recipe, out, only="corpus")
    path = out / "corpus" / "stimuli.parquet"
    whole = path.read_bytes()
    path.unlink() if change == "missing" else path.write_bytes(whole[:-1])
    got = "none" if change == "missing" else len(whole) - 1
    message = rf"stimuli\.parquet: expected {len(whole)} bytes, got {got}; delete .*corpus and run again"
    refused_run(recipe, out, "concepts", IntegrityError, message)
    path.write_bytes(whole)
    assert run(recipe, out, only="concepts") == ["concepts"]


def test_a_model_that_is_not_there_or_is_none_is_named(tmp_path: Path) -> None:
    for place in (tmp_path / "none", write(tmp_path / "file", b"x"), tmp_path):
        with pytest.raises(
            ArtefactNotFoundError, match=r"expected an image-text-to-text model at .*check model.id"
        ):
            load_mllm(str(place))


# Activations, directions and SAEs.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_end_the_stage_without_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    write_corpus(tmp_path)
    write_links(tmp_path)
    open_mllm = activations.open_mllm

    def broken(*arguments: Any) -> Any:
        model, processor = open_mllm(*arguments)
        with torch.no_grad():
            model.get_decoder().layers[2].mlp.down_proj.weight[0, 0] = value
        return model, processor

    monkeypatch.setattr(activations, "open_mllm", broken)
    message = r"expected finite activations, got NaN or infinity at layers \[2\]; try model.dtype"
    with pytest.raises(ActivationError, match=message):
        activations.run(opened(small_recipe(), tmp_path, "activations"))
    opened(small_recipe(), tmp_path, "activations")  # running again clears what was in flight
    assert list((tmp_path / "activations" / "shards").iterdir()) == []
    assert not (tmp_path / "activations" / DONE).exists()


@pytest.fixture
def before_sae(tmp_path: Path) -> Path:
    write_activations(tmp_path)
    write_directions(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_atoms": 0, "k": 17}, RecipeError, "sae.k: expected 1 to n_atoms = 16, got 17; lower k or raise"),
        (
            {"n_atoms": N_CONCEPTS - 1},
            RecipeError,
            r"at least one atom a concept \(11\), got 10; raise n_atoms",
        ),
        ({"holdout": 1.0}, ActivationError, "expected training tokens, got none; lower sae.holdout"),
        ({"holdout": 0.0}, ActivationError, "expected held-out tokens, got none; raise sae.holdout"),
        ({"learning_rate": 1.0, "steps": 3}, None, ""),
    ],
)
def test_an_sae_that_cannot_be_trained_leaves_no_layer(
    before_sae: Path, changes: dict[str, Any], error: type[DacoError] | None, message: str
) -> None:
    if error is None:  # the same stage does write layers when nothing is wrong
        write_sae(before_sae, **changes)
        assert (before_sae / "sae" / "layers.1" / "facts.json").is_file()
        return
    with pytest.raises(error, match=message):
        write_sae(before_sae, **changes)
    assert {path.name for path in (before_sae / "sae").iterdir()} <= {"shards", "stage.json"}


def test_a_dictionary_of_another_width_leaves_no_layer(before_sae: Path) -> None:
    save_file({"layer_1": torch.ones(11, 31)}, before_sae / "directions" / "directions.safetensors")
    with pytest.raises(ModelMismatchError, match="expected directions of width 32, got 31; build them with"):
        write_sae(before_sae)
    assert {path.name for path in (before_sae / "sae").iterdir()} <= {"shards", "stage.json"}


def test_training_that_diverges_keeps_the_last_good_checkpoint(
    before_sae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = sae_training.Training.step

    def poisoned(self: Any, z: torch.Tensor) -> float:
        return step(self, z * float("nan") if self.steps_done == 3 else z)

    monkeypatch.setattr(sae_training.Training, "step", poisoned)
    with pytest.raises(ActivationError, match=r"after step 3; lower sae\.learning_rate"):
        write_sae(before_sae, checkpoint_steps=2)
    kept = [path.name for path in (before_sae / "sae" / "shards").iterdir()]
    assert kept == ["layer-1-step-00000002"]
    assert not (before_sae / "sae" / "layers.1").exists()


# Releases that are read.


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A staged release of each kind; tests work on copies."""
    folder = tmp_path_factory.mktemp("releases")
    made = {
        "dataset": write_dataset_release(folder / "dataset"),
        "model": write_model_release(folder / "model"),
    }
    for release in made.values():
        stage(release)
    return made


@pytest.fixture
def releases(originals: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {kind: Path(shutil.copytree(path, tmp_path / kind)) for kind, path in originals.items()}


def reseal(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] |= file_entry(folder / name)
    (folder / "manifest.json").write_text(canonical_json(manifest))


def read(folder: Path) -> Any:
    kind = json.loads((folder / "manifest.json").read_text() or "{}")
    known = isinstance(kind, dict) and kind.get("kind") == "dataset"
    return (daco.ConceptDictionary if known else daco.SteeringSAE).from_pretrained(folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with one place replaced; `...` removes it."""
    if not path:
        return None if new is ... else new
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if new is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dataset", "manifest.json"),
        ("model", "manifest.json"),
        ("model", "config.json"),
        ("model", "layers.1/cfg.json"),
    ],
)
def test_whatever_is_wrong_in_a_json_file_is_our_error(
    releases: dict[str, Path], kind: str, name: str
) -> None:
    """One place at a time removed or replaced: it loads and stages, or is refused; never a KeyError."""
    folder = releases[kind]
    value, kept = json.loads((folder / name).read_text()), contents(folder)
    wrong = [..., None, [], {}, "x", -1, 10**9, 0.5, [1], {"a": 1}, True]
    cases = [(path, new) for path in places(value) for new in wrong]
    refused = 0
    for path, new in cases[:: max(1, len(cases) // 24)]:
        (folder / name).write_text(json.dumps(changed(value, path, new)))
        if name != "manifest.json":
            reseal(folder, name)
        try:
            read(folder)
            stage(folder)
        except DacoError as error:
            refused += len(str(error)) > 20
        for file in (name, "manifest.json", "README.md"):
            (folder / file).write_bytes(kept[file])
    assert refused > 4
    assert contents(folder) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_dec": torch.full((N_ATOMS, D_MODEL), float("nan"))}, r"expected finite .*\['W_dec'\]"),
        ({"W_enc": torch.ones(D_MODEL - 1, N_ATOMS)}, r"W_enc: expected \[32, 41\] .*got \[31, 41\]"),
        ({"extra": torch.ones(1)}, r"expected tensors \['W_dec', .*got .*'extra'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    releases: dict[str, Path], change: dict[str, torch.Tensor], message: str
) -> None:
    path = releases["model"] / "layers.1" / "sae_weights.safetensors"
    save_file(load_file(path) | change, path)
    reseal(releases["model"], "layers.1/sae_weights.safetensors")
    with pytest.raises(FormatError, match=message):
        read(releases["model"])


@pytest.mark.parametrize("R", [torch.ones(2), torch.zeros(1), torch.full((1,), float("nan")), None])
def test_a_compact_file_without_a_good_R_is_refused(
    releases: dict[str, Path], R: torch.Tensor | None
) -> None:
    path = releases["model"] / "layers.1" / "steering.safetensors"
    bound = {"sae_weights_sha256": file_entry(path.with_name("sae_weights.safetensors"))["sha256"]}
    tensors = load_file(path)
    tensors.pop("R")
    save_file(tensors if R is None else tensors | {"R": R}, path, bound)
    reseal(releases["model"], "layers.1/steering.safetensors")
    with pytest.raises(FormatError, match=r"layers\.1/steering: expected R as one number above 0, got"):
        read(releases["model"])


@pytest.mark.parametrize(
    "name", ["sae_weights.safetensors", "steering.safetensors", "atoms.parquet", "cfg.json"]
)
def test_a_file_of_another_format_is_refused(releases: dict[str, Path], name: str) -> None:
    (releases["model"] / "layers.1" / name).write_bytes(b"\x80\x04not what it says")
    reseal(releases["model"], f"layers.1/{name}")
    with pytest.raises(IntegrityError, match=rf"{name}: expected .*got .*(download|build)"):
        read(releases["model"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.slice(1),
            rf"layer 1: expected atoms 0 to {N_ATOMS - 1} in order, got {N_ATOMS - 1} rows",
        ),
        (lambda t: t.drop_columns(["firing_rate"]), r"atoms.parquet: expected column 'firing_rate', got \["),
        (
            lambda t: t.set_column(0, "atom", t["atom"].cast("int64")),
            "column 'atom': expected int32, got int64",
        ),
        (
            lambda t: t.set_column(1, "polarity", pa.array(["evil"] * N_ATOMS)),
            r"layer 1: expected polarity among .*got \['evil'\]",
        ),
    ],
)
def test_an_atoms_table_that_does_not_fit_is_refused(
    releases: dict[str, Path], change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    path = releases["model"] / "layers.1" / "atoms.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    reseal(releases["model"], "layers.1/atoms.parquet")
    with pytest.raises(FormatError, match=message):
        read(releases["model"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v * np.float32("nan"), "layer 1: expected finite directions, got NaN or infinity"),
        (
            lambda v: v[:, :-1],
            r"column 'vector': expected fixed_size_list.*\[32\].*got fixed_size_list.*\[31\]",
        ),
    ],
)
def test_directions_that_do_not_fit_are_refused(
    releases: dict[str, Path], change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    name = "data/directions_tiny_vl/layer_1-00000-of-00001.parquet"
    table = pq.read_table(releases["dataset"] / name)
    vectors = change(np.stack(table["vector"].to_numpy()))
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    at = table.column_names.index("vector")
    pq.write_table(table.set_column(at, "vector", column), releases["dataset"] / name)
    reseal(releases["dataset"], name)
    with pytest.raises(FormatError, match=message):
        read(releases["dataset"])


# Releases that are published.


def target(hub: LocalHub) -> Target:
    return Target("local/DACO-tiny", "dataset", hub.url, WRITER)


IMAGE = pa.array([{"bytes": b"png", "path": "x.png"}] * N_STIMULI)
SOURCE = {"name": "s", "revision": "1", "url": "", "redistribute_images": False}
TOKEN = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("facts", "break_it", "message"),
    [
        (
            {"sources": [SOURCE | {"licence": ""}]},
            None,
            r"sources\[0\] 's': expected a licence, got none; set corpus",
        ),
        (
            {"sources": [SOURCE | {"licence": "Unknown"}]},
            None,
            "expected a licence, got Unknown; set corpus.licence",
        ),
        ({"sources": []}, None, "expected at least one source, got none"),
        ({"recipe": {"release": {"licence": "my-own"}}}, None, "'my-own' is not a known licence id"),
        ({"stimuli_columns": {"image": IMAGE}}, None, "which 'Drawn pairs' does not let us pass on"),
        (
            {"extra_files": {"weights.pkl": b"\x80"}},
            None,
            "weights.pkl: this format can run code when it is opened",
        ),
        (
            {"extra_files": {"notes.txt": TOKEN.encode()}},
            None,
            "notes.txt: it holds what looks like a Hugging",
        ),
        ({"captions": [f"my key {TOKEN}"]}, None, "'caption': it holds what looks like a Hugging"),
        ({}, lambda f: write(f / "stray.txt", b"x"), "stray.txt: the manifest does not list it; remove it"),
        ({}, lambda f: (f / "data/links/train-00000-of-00001.parquet").unlink(), "got none"),
        (
            {},
            lambda f: shift_byte(f / "data/links/train-00000-of-00001.parquet"),
            "expected sha256 .*altered",
        ),
    ],
)
def test_a_release_that_must_not_leave_stays_here(
    local_hub: LocalHub,  # noqa: F811
    tmp_path: Path,
    facts: dict[str, Any],
    break_it: Callable[[Path], Any] | None,
    message: str,
) -> None:
    folder = write_dataset_release(tmp_path / "release", **facts)
    if break_it:
        stage(folder)
        break_it(folder)
    with pytest.raises((RefusedError, IntegrityError), match=message) as caught:
        publish(folder, target(local_hub))
    assert TOKEN not in str(caught.value)
    assert local_hub.faults.log == []  # the Hub was not even asked


def shift_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


ASK = """
import sys
import daco
from daco.errors import DacoError
for repo, revision in (("local/none", None), ("local/DACO-tiny", "v9.9.9"), ("local/bare", None)):
    try:
        daco.ConceptDictionary.from_pretrained(repo, revision=revision)
    except DacoError as error:
        print(type(error).__name__, error)
print(len(daco.ConceptDictionary.from_pretrained("local/DACO-tiny", revision="v1.0.0")))
"""


def test_a_repo_or_revision_that_is_not_there_is_named(local_hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    publish(write_dataset_release(tmp_path / "release"), target(local_hub))
    local_hub.api().create_repo("local/bare", repo_type="dataset")
    none, revision, bare, found = local_hub.run(ASK).splitlines()
    start = "ArtefactNotFoundError "
    assert none.startswith(
        start + "expected a folder or a dataset repo local/none, got neither; check the name"
    )
    assert revision.startswith(start + "local/DACO-tiny has no revision 'v9.9.9'; list them with")
    assert bare.startswith(start + "local/bare has no manifest.json: it is no DACO dataset release")
    assert found == "13"
