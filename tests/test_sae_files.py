"""Proves that further facts of a layer survive writing and reading: JumpReLU form, more columns of atoms."""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from release_fixture import write_model_release

import daco
from daco.errors import FormatError
from daco.manifest import canonical_json, file_entry
from daco.sae import SAE, LayerSAE
from daco.sae_files import write_layer


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rewritten(folder: Path, layer: LayerSAE) -> LayerSAE:
    """The layer as it is read from a release that it was written into."""
    sae = daco.SteeringSAE.from_pretrained(folder)
    shutil.rmtree(folder / f"layers.{layer.layer}")
    write_layer(folder, layer, sae.base_model)
    reseal(folder, layer.layer)
    return daco.SteeringSAE.from_pretrained(folder).layers[layer.layer]


def reseal(folder: Path, layer: int) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in (folder / f"layers.{layer}").iterdir():
        name = f"layers.{layer}/{file.name}"
        manifest["files"][name] = manifest["files"].get(name, {}) | file_entry(file)
    (folder / "manifest.json").write_text(canonical_json(manifest))


def test_the_jumprelu_form_lets_through_what_is_above_its_threshold():
    sae = SAE(draw(32, 37), draw(37, seed=1), draw(37, 32, seed=2), draw(32, seed=3), "topk", 5)
    jump, z = sae.as_jumprelu(4.0), draw(12, 32, seed=4)
    pre = sae.pre_activations(z)
    assert torch.equal(jump.encode(z), torch.where(pre > 4.0, pre, 0))
    assert (jump.encode(z) > 0).any()
    assert jump.W_dec.data_ptr() == sae.W_dec.data_ptr()


def test_a_calibrated_threshold_and_more_columns_are_read_back(tmp_path):
    folder = write_model_release(tmp_path / "model")
    layer = daco.SteeringSAE.from_pretrained(folder).layers[1]
    assert (layer.jumprelu_threshold, layer.jumprelu_agreement) == (None, None)
    n = len(layer.atoms)
    more = layer.atoms.assign(
        group="noun.act",
        undesirable_group="noun.act",
        cos_undesirable_group=0.25,
        top_stimuli=[["a", "b"]] * n,
        mine=1,
    )
    calibrated = dataclasses.replace(layer, atoms=more, jumprelu_threshold=2.5, jumprelu_agreement=0.75)
    again = rewritten(folder, calibrated)
    assert (again.jumprelu_threshold, again.jumprelu_agreement) == (2.5, 0.75)
    assert [list(ids) for ids in again.atoms["top_stimuli"]] == [["a", "b"]] * n
    assert set(again.atoms["undesirable_group"]) == {"noun.act"}
    assert "mine" not in again.atoms  # a release has known columns alone
    pd.testing.assert_frame_equal(again.atoms[layer.atoms.columns], layer.atoms)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("jumprelu_threshold", value, "a number above 0") for value in (0.0, -1.0, "2", True)),
        *(("jumprelu_agreement", value, "a share from 0 to 1") for value in (1.5, -0.5, "1", True)),
    ],
)
def test_a_threshold_or_agreement_that_is_none_is_refused(tmp_path, name, value, expected):
    folder = write_model_release(tmp_path / "model")
    path = folder / "layers.1" / "cfg.json"
    cfg = json.loads(path.read_text())
    cfg["metadata"][name] = value
    path.write_text(canonical_json(cfg))
    reseal(folder, 1)
    with pytest.raises(FormatError, match=f"{name}: expected {expected}"):
        daco.SteeringSAE.from_pretrained(folder)
