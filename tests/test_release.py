"""Proves that a run's releases load with datasets and daco as they were made, whole or not at all."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import (
    D_MODEL,
    LAYERS,
    N_CONCEPTS,
    Killed,
    dictionary,
    digests,
    model_facts,
    opened,
    small_recipe,
    write_activations,
    write_corpus,
    write_directions,
    write_links,
    write_polarity,
    write_sae,
)

from builders import atoms, recognition, release
from builders.recipe import model_name
from daco import ConceptDictionary, ModelFacts, SteeringSAE
from daco.errors import IntegrityError, RecipeError
from daco.manifest import check_files, read_manifest
from daco.tables import CONCEPTS, LINKS, STIMULI

EVALUATION = {
    "sae": {"1": {"fve": 0.5, "n": 12, "ce_recovered": 0.9}, "2": {"ce_recovered": 0.8}},
    "steering": {},
    "suites": {},
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    for write in (write_corpus, write_links, write_polarity, write_activations, write_directions, write_sae):
        write(out)
    recognition.run(opened(small_recipe(sae={"holdout": 0.3}), out, "recognition"))
    atoms.run(opened(small_recipe(sae={"holdout": 0.3}), out, "atoms"))
    work = opened(small_recipe(), out, "evaluate")
    (work.folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    work.finish({"in": 5, "out": 5, "skipped": {}})
    return out


@pytest.fixture
def upstream(stages, tmp_path):
    return shutil.copytree(stages, tmp_path / "run")


def recipe(removed="", **corpus):
    return small_recipe(
        corpus={"kind": "folder", "path": "/a/place/of/mine", "licence": "cc0-1.0"} | corpus,
        sae={"n_atoms": 37, "k": 3, "steps": 4, "batch": 17, "holdout": 0.3},
        release={"org": "org", "dataset": "DACO-small", "version": "1.2.3", "removed": str(removed)},
        evaluate={"gamma": 0.5},
    )


def run(out, killed_at=None, removed="", **corpus):
    (out / "release" / "stage.json").unlink(missing_ok=True)
    release.run(opened(recipe(removed, **corpus), out, "release", killed_at))
    return out / "release"


def load(folder, config, cache, **options):
    import datasets

    datasets.disable_progress_bars()
    split = options.pop("split", "train")
    files = read_manifest(folder)["configs"][config]["splits"][split]["files"]
    names = [str(folder / name) for name in files]
    return datasets.load_dataset(
        "parquet", data_files={split: names}, split=split, cache_dir=str(cache), **options
    )


def test_dataset_has_the_rows_of_its_stages(upstream):
    folder = run(upstream) / "dataset"
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    sizes = {c: {s: p["rows"] for s, p in f["splits"].items()} for c, f in manifest["configs"].items()}
    linked = set(pq.read_table(upstream / "stimuli" / "links.parquet")["stimulus_id"].to_pylist())
    assert sizes == {
        "stimuli": {"train": len(linked)},
        "links": {"train": 66},
        "concepts": {"train": 11},
        "directions_toy": {"layer_1": 11, "layer_2": 11},
        "baseline_toy": {"train": 2},
        "recognition_toy": {"layer_1": 11, "layer_2": 11},
        "statistics_toy": {"layer_1": 32, "layer_2": 32},
    }
    stimuli = pq.read_table(folder / "data" / "stimuli" / "train-00000-of-00001.parquet")
    corpus = pq.read_table(upstream / "corpus" / "stimuli.parquet").to_pylist()
    expected = [
        {k: v for k, v in row.items() if k != "file"} for row in corpus if row["stimulus_id"] in linked
    ]
    assert stimuli.to_pylist() == expected
    for name, schema, stage in (("links", LINKS, "stimuli"), ("concepts", CONCEPTS, "polarity")):
        table = pq.read_table(folder / "data" / name / "train-00000-of-00001.parquet")
        assert table.schema.equals(schema)
        assert table.equals(pq.read_table(upstream / stage / f"{name}.parquet"))
        assert manifest["configs"][name]["columns"] == schema.names


def test_manifest_tells_the_whole_story(upstream):
    folder = run(upstream) / "dataset"
    manifest = read_manifest(folder)
    assert (manifest["name"], manifest["version"], manifest["seeds"]) == ("DACO-small", "1.2.3", {"run": 0})
    assert [source["licence"] for source in manifest["sources"]] == ["cc0-1.0"]
    stages = {"corpus", "stimuli", "polarity", "activations", "directions", "recognition", "sae"}
    stages |= {"atoms", "evaluate"}
    assert set(manifest["counts"]) == stages | {"tokens", "release"}
    counts = manifest["counts"]["release"]
    assert counts["in"] == 29 == counts["out"] + counts["skipped"]["not_linked"]
    assert {"python", "torch", "transformers", "datasets", "pyarrow", "daco"} <= set(manifest["versions"])
    assert manifest["models"]["toy"]["layers"] == [1, 2]
    text = (folder / "manifest.json").read_text()
    assert "/a/place/of/mine" not in text
    assert str(upstream) not in text


def test_stimuli_that_somebody_asked_to_remove_are_not_released(upstream, tmp_path):
    linked = pq.read_table(upstream / "stimuli" / "links.parquet")["stimulus_id"].to_pylist()
    asked = tmp_path / "removed.txt"
    asked.write_text(f"{linked[0]}\n\n{linked[-1]}\n{'f' * 16}\n")  # the last one is none of this corpus
    folder = run(upstream, removed=asked) / "dataset"
    for config in ("stimuli", "links"):
        ids = pq.read_table(folder / "data" / config / "train-00000-of-00001.parquet")["stimulus_id"]
        assert not {linked[0], linked[-1]} & set(ids.to_pylist())
    text = (folder / "manifest.json").read_text()
    assert read_manifest(folder)["counts"]["release"]["skipped"]["removed"] == 2
    assert linked[0] not in text
    assert str(asked) not in text


def test_a_bad_list_of_removals_is_named(upstream, tmp_path):
    with pytest.raises(RecipeError, match=r"release\.removed: expected a text file"):
        run(upstream, removed=tmp_path / "absent.txt")
    (tmp_path / "bad.txt").write_text("0123456789abcdef\nhttps://example.org/a.png\n")
    with pytest.raises(RecipeError, match=r"bad\.txt, line 2: expected a stimulus id of 16 hex digits"):
        run(upstream, removed=tmp_path / "bad.txt")


def test_vectors_load_with_datasets_map_style_and_streaming(upstream, tmp_path):
    folder = run(upstream) / "dataset"
    for layer in LAYERS:
        rows = load(folder, "directions_toy", tmp_path / "cache", split=f"layer_{layer}")
        vectors = np.array(rows["vector"], dtype=np.float32)
        assert np.array_equal(vectors, dictionary()[f"layer_{layer}"].numpy())
        np.testing.assert_allclose(rows["norm"], np.linalg.norm(vectors, axis=1), rtol=1e-6)
        streamed = load(folder, "directions_toy", tmp_path / "cache", split=f"layer_{layer}", streaming=True)
        assert next(iter(streamed))["vector"] == rows[0]["vector"]
    kind = pq.read_schema(folder / "data/directions_toy/layer_1-00000-of-00001.parquet").field("vector").type
    assert (kind.list_size, kind.value_type) == (D_MODEL, pa.float32())


def test_dictionary_loads_with_daco(upstream):
    found = ConceptDictionary.from_pretrained(run(upstream) / "dataset")
    assert len(found) == N_CONCEPTS
    assert all(torch.equal(found.raw(layer), dictionary()[f"layer_{layer}"]) for layer in LAYERS)
    assert found.R == {1: 11.0, 2: 12.0}
    assert {layer: row.tolist() for layer, row in found.baseline.items()} == {
        layer: [4.0 + layer] * D_MODEL for layer in LAYERS
    }
    larger = found.extend("bow", {layer: torch.full((3, D_MODEL), 9.0) for layer in LAYERS})
    assert torch.equal(larger.raw(1)[-1], torch.full((D_MODEL,), 9.0 - 5.0))


def test_images_travel_only_where_the_licence_allows(upstream, tmp_path):
    folder = run(upstream) / "dataset"
    assert read_manifest(folder)["configs"]["stimuli"]["columns"] == STIMULI.names
    folder = run(upstream, redistribute_images=True) / "dataset"
    rows = load(folder, "stimuli", tmp_path / "cache")
    pixels = np.asarray(rows[3]["image"])
    original = upstream / "corpus" / "images" / f"{rows[3]['stimulus_id']}.png"
    assert np.array_equal(pixels, np.asarray(Image.open(original)))
    stored = pq.read_table(
        folder / read_manifest(folder)["configs"]["stimuli"]["splits"]["train"]["files"][0]
    )
    image = stored["image"][3].as_py()
    assert image["bytes"] == original.read_bytes()
    assert image["path"] == original.name
    assert Image.open(io.BytesIO(image["bytes"])).size == (33, 21)


def test_large_tables_become_several_files_with_small_groups(upstream, monkeypatch):
    monkeypatch.setattr(release, "SHARD_BYTES", 600)
    monkeypatch.setattr(release, "GROUP_BYTES", 300)
    folder = run(upstream) / "dataset"
    part = read_manifest(folder)["configs"]["directions_toy"]["splits"]["layer_2"]
    assert part["rows"] == 11
    assert [name.split("/")[-1] for name in part["files"]][:2] == [
        f"layer_2-0000{i}-of-{len(part['files']):05d}.parquet" for i in range(2)
    ]
    files = [pq.ParquetFile(folder / name) for name in part["files"]]
    assert max(f.metadata.row_group(g).num_rows for f in files for g in range(f.num_row_groups)) == 2
    whole = ConceptDictionary.from_pretrained(folder)
    assert torch.equal(whole.raw(2), dictionary()["layer_2"])


@pytest.mark.parametrize("sizes", [[5, 0, 7, 1], [13], [1] * 13, []])
@pytest.mark.parametrize("rows", [1, 4, 13, 20])
def test_regroup_keeps_rows_and_fills_groups(sizes, rows):
    values, tables = iter(range(100)), []
    for size in sizes:
        tables.append(pa.table({"v": pa.array([next(values) for _ in range(size)], pa.int64())}))
    groups = [table["v"].to_pylist() for table in release.regroup(tables, rows)]
    assert [v for group in groups for v in group] == list(range(sum(sizes)))
    assert all(len(group) == rows for group in groups[:-1])
    assert all(0 < len(group) <= rows for group in groups)


def test_model_loads_with_daco_and_holds_the_trained_weights(upstream):
    folder = run(upstream) / "model"
    check_files(folder, read_manifest(folder))
    found = SteeringSAE.from_pretrained(folder)
    assert sorted(found.layers) == list(LAYERS)
    for layer in LAYERS:
        weights = load_file(upstream / "sae" / f"layers.{layer}" / "sae_weights.safetensors")
        sae = found.layers[layer].sae
        assert all(torch.equal(getattr(sae, name), w) for name, w in weights.items())
        assert (sae.activation, sae.k, found.layers[layer].R) == ("topk", 3, 10.0 + layer)
        table = pq.read_table(upstream / "atoms" / f"layers.{layer}" / "atoms.parquet")
        assert list(found.layers[layer].labels()) == table["polarity"].to_pylist()
    assert found.defaults == {"eta": 0.3, "gamma": 0.5, "scope": "all"}
    assert found.base_model == ModelFacts(**model_facts())
    assert found.base_model.fingerprint == model_facts()["fingerprint"]
    assert found.config["training"]["start"] == "dictionary"
    assert found.config["training"]["fve"] == {"1": 0.5}
    assert found.config["training"]["ce_recovered"] == {"1": 0.9, "2": 0.8}
    assert json.loads((folder / "evaluation.json").read_text()) == EVALUATION


def test_model_names_the_dictionary_it_came_from(upstream):
    folder = run(upstream)
    said = SteeringSAE.from_pretrained(folder / "model").config["dictionary"]
    assert (said["dataset"], said["tag"]) == ("org/DACO-small", "v1.2.3")
    assert said["sha256"] == release.dictionary_sha256(read_manifest(folder / "dataset"), "toy")
    assert read_manifest(folder / "model")["name"] == "daco-sae-toy"


def test_tiny_models_say_so(upstream):
    limits = read_manifest(run(upstream) / "model")["facts"]["limits"]
    assert any("random weights" in text for text in limits)


def test_same_run_same_bytes(upstream):
    first = digests(run(upstream))
    assert digests(run(upstream)) == first
    assert len(first) > 14


@pytest.mark.parametrize("at", [0, 2, 4, 5, 6])
def test_killed_and_resumed_equals_undisturbed(upstream, at):
    expected = digests(run(upstream))
    with pytest.raises(Killed):
        run(upstream, killed_at=at)
    half = "dataset" if at < 5 else "model"  # five splits, then two layers
    assert not (upstream / "release" / half / "manifest.json").exists()
    release.run(opened(recipe(), upstream, "release"))
    assert digests(upstream / "release") == expected


def test_a_complete_release_is_left_alone_and_a_damaged_one_is_not(upstream):
    folder = run(upstream)
    marks = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    atoms_table = folder / "model" / "layers.1" / "atoms.parquet"
    atoms_table.write_bytes(atoms_table.read_bytes()[:-1])
    (folder / "done.json").unlink()
    release.run(opened(recipe(), upstream, "release"))
    changed = {path for path in marks if path.stat().st_mtime_ns != marks[path]}
    assert all("dataset" not in path.parts for path in changed)
    assert atoms_table in changed
    assert release.is_complete(folder / "model")


def test_an_image_that_changed_since_is_refused(upstream):
    image = next((upstream / "corpus" / "images").glob(f"{_linked(upstream)}.png"))
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match="expected the image that the corpus stage read, got another"):
        run(upstream, redistribute_images=True)
    assert not (upstream / "release" / "dataset" / "manifest.json").exists()


def _linked(out):
    return pq.read_table(out / "stimuli" / "links.parquet")["stimulus_id"][0].as_py()


def test_fewer_rows_than_promised_are_refused(tmp_path):
    table = pa.table({"v": [1, 2, 3]})
    part = release.Split("c", "train", table.schema, [table], 5, 100, 10)
    with pytest.raises(IntegrityError, match="expected 5 rows, got 3"):
        release.write_split(tmp_path, part)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"id": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": "", "name": ""}, "qwen2_5_vl_7b_instruct"),
        ({"name": "My.Model"}, "my_model"),
        ({"name": ""}, "tiny_llava"),
    ],
)
def test_model_names_are_words(model, name):
    assert model_name(small_recipe(model=model)) == name
