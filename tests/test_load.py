"""Releases load bit for bit; damaged, newer, missing or wrong ones are refused with a telling message."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from release_fixture import D_MODEL, LAYERS, N_ATOMS, N_CONCEPTS, write_dataset_release, write_model_release

import daco
from daco.errors import (
    ArtefactNotFoundError,
    FormatError,
    FormatTooNewError,
    IntegrityError,
    UnknownConceptError,
    UnknownLayerError,
)
from daco.manifest import canonical_json, file_entry
from daco.sae import labels_of
from daco.sae_files import write_config, write_layer
from daco.top_k import top_k


@pytest.fixture
def model_release(tmp_path: Path) -> Path:
    return write_model_release(tmp_path / "model")


@pytest.fixture
def dataset_release(tmp_path: Path) -> Path:
    return write_dataset_release(tmp_path / "dataset")


def reseal(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that a test has changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].get(name, {}) | file_entry(folder / name)
    (folder / "manifest.json").write_text(canonical_json(manifest))


def edit_json(folder: Path, name: str, **changes: object) -> None:
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(canonical_json(value | changes))
    reseal(folder, name)


def test_a_model_release_loads(model_release: Path) -> None:
    sae = daco.SteeringSAE.from_pretrained(model_release)
    assert list(sae.layers) == list(LAYERS)
    layer = sae.layers[LAYERS[0]]
    assert (layer.sae.d_model, layer.sae.n_atoms) == (D_MODEL, N_ATOMS)
    assert layer.R > 0
    assert len(layer.labels()) == N_ATOMS
    assert sae.base_model.hidden_size == D_MODEL


def test_one_layer_and_another_dtype(model_release: Path) -> None:
    sae = daco.SteeringSAE.from_pretrained(model_release, layers=[LAYERS[1]], dtype=torch.float64)
    assert list(sae.layers) == [LAYERS[1]]
    assert sae.layers[LAYERS[1]].sae.W_dec.dtype == torch.float64
    with pytest.raises(UnknownLayerError, match=r"expected layers among \[1, 2\], got \[7\]"):
        daco.SteeringSAE.from_pretrained(model_release, layers=[7])


def test_written_layers_are_read_back_bit_for_bit(model_release: Path, tmp_path: Path) -> None:
    sae = daco.SteeringSAE.from_pretrained(model_release)
    copy = tmp_path / "copy"
    shutil.copytree(model_release, copy)
    for layer in sae.layers.values():
        shutil.rmtree(copy / f"layers.{layer.layer}")
        write_layer(copy, layer, sae.base_model)
        for file in (copy / f"layers.{layer.layer}").iterdir():
            reseal(copy, f"layers.{layer.layer}/{file.name}")
    write_config(copy, sae.config)
    again = daco.SteeringSAE.from_pretrained(copy)
    for number, layer in sae.layers.items():
        for name, tensor in layer.sae.named_parameters():
            assert torch.equal(tensor, dict(again.layers[number].sae.named_parameters())[name])
        assert again.layers[number].R == layer.R
        pd.testing.assert_frame_equal(again.layers[number].atoms, layer.atoms)


def test_writing_twice_gives_the_same_bytes(model_release: Path, tmp_path: Path) -> None:
    sae = daco.SteeringSAE.from_pretrained(model_release)
    for folder in ("a", "b"):
        write_layer(tmp_path / folder, sae.layers[1], sae.base_model)
    names = sorted(path.name for path in (tmp_path / "a" / "layers.1").iterdir())
    assert names == [
        "atoms.parquet",
        "cfg.json",
        "sae_weights.safetensors",
        "steering.safetensors",
        "steering_atoms.parquet",
    ]
    for name in names:
        assert (tmp_path / "a/layers.1" / name).read_bytes() == (tmp_path / "b/layers.1" / name).read_bytes()


def test_a_dictionary_loads_and_answers(dataset_release: Path) -> None:
    dictionary = daco.ConceptDictionary.from_pretrained(dataset_release)
    assert len(dictionary) == N_CONCEPTS
    assert dictionary.layers == list(LAYERS)
    unit = dictionary.unit(1)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(N_CONCEPTS))
    row = dictionary.index("gun")
    assert torch.equal(dictionary.direction("gun", 1), unit[row])
    nearest = dictionary.nearest(3.0 * unit[row], 1, n=3)
    assert nearest["concept"].iloc[0] == "gun"
    assert nearest["cosine"].iloc[0] == pytest.approx(1.0)
    mask = dictionary.mask("undesirable")
    naive = unit.numpy()[mask].mean(0)
    assert np.allclose(dictionary.centroid(1, "undesirable"), naive / np.linalg.norm(naive), atol=1e-6)


def test_an_unknown_concept_names_the_nearest(dataset_release: Path) -> None:
    dictionary = daco.ConceptDictionary.from_pretrained(dataset_release)
    with pytest.raises(UnknownConceptError, match="'knife'"):
        dictionary.index("knive")
    with pytest.raises(UnknownLayerError, match=r"expected a layer among \[1, 2\], got 9"):
        dictionary.raw(9)
    with pytest.raises(FormatError, match="expected model to be one of"):
        daco.ConceptDictionary.from_pretrained(dataset_release, "another")


@pytest.mark.parametrize("change", ["truncate", "alter", "remove"])
@pytest.mark.parametrize(
    "name", ["config.json", "layers.1/sae_weights.safetensors", "layers.2/atoms.parquet"]
)
def test_a_damaged_file_is_refused(model_release: Path, name: str, change: str) -> None:
    path = model_release / name
    whole = path.read_bytes()
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes(whole[:-3] if change == "truncate" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=re.escape(name)):
        daco.SteeringSAE.from_pretrained(model_release)


def test_a_newer_format_says_what_to_run(model_release: Path, dataset_release: Path) -> None:
    edit_json(model_release, "config.json", format_version="2.0.0")
    with pytest.raises(FormatTooNewError, match="pip install --upgrade daco"):
        daco.SteeringSAE.from_pretrained(model_release)
    manifest = json.loads((dataset_release / "manifest.json").read_text())
    (dataset_release / "manifest.json").write_text(canonical_json(manifest | {"format_version": "2.0.0"}))
    with pytest.raises(FormatTooNewError, match="pip install --upgrade daco"):
        daco.ConceptDictionary.from_pretrained(dataset_release)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "activation: expected one of"),
        ({"base_model": {"id": "x"}}, "base_model: expected keys"),
        ({"steering": {"eta": 0.3}}, "steering: expected"),
        ({"layers": 3}, "layers: expected a list"),
    ],
)
def test_a_broken_config_is_refused(model_release: Path, changes: dict, message: str) -> None:
    edit_json(model_release, "config.json", **changes)
    with pytest.raises(FormatError, match="breaks the format") as caught:
        daco.SteeringSAE.from_pretrained(model_release)
    assert message in str(caught.value)


def test_weights_of_another_width_are_refused(model_release: Path) -> None:
    base = json.loads((model_release / "config.json").read_text())["base_model"]
    edit_json(model_release, "config.json", base_model=base | {"hidden_size": 64})
    with pytest.raises(FormatError, match="expected SAE width 64"):
        daco.SteeringSAE.from_pretrained(model_release)


def test_a_compact_file_of_other_weights_is_refused(model_release: Path) -> None:
    target = model_release / "layers.1" / "steering.safetensors"
    target.write_bytes((model_release / "layers.2" / "steering.safetensors").read_bytes())
    reseal(model_release, "layers.1/steering.safetensors")
    with pytest.raises(FormatError, match="expected it made from weights"):
        daco.SteeringSAE.from_pretrained(model_release)


def test_what_is_not_there_or_of_another_kind_is_refused(dataset_release: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="expected a model release, got a dataset release"):
        daco.SteeringSAE.from_pretrained(dataset_release)
    with pytest.raises(ArtefactNotFoundError, match="has no revision"):
        daco.SteeringSAE.from_pretrained(dataset_release, revision="v9.9.9")
    with pytest.raises(ArtefactNotFoundError, match="expected an existing folder or a repo id"):
        daco.SteeringSAE.from_pretrained(tmp_path / "no" / "where" / "at all")
    with pytest.raises(ArtefactNotFoundError, match=r"got 'org/sae@v1.0.0'; the revision goes apart"):
        daco.SteeringSAE.from_pretrained("org/sae@v1.0.0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match="the release is incomplete"):
        daco.SteeringSAE.from_pretrained(tmp_path / "empty")


def test_top_k_keeps_the_lower_index_on_ties() -> None:
    pre = torch.tensor([[1.0, 3.0, 3.0, -1.0, 3.0], [-1.0, -2.0, 0.5, 0.0, -3.0]])
    assert top_k(pre, 2).tolist() == [[0.0, 3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0, 0.0]]


def test_labels_by_hand() -> None:
    undesirable = np.array([0.5, 0.3, 0.29, 0.4, 0.4])
    desirable = np.array([0.1, 0.2, 0.1, 0.4, 0.6])
    expected = ["undesirable", "undesirable", "neutral", "neutral", "desirable"]
    assert labels_of(undesirable, desirable, eta=0.3).tolist() == expected
