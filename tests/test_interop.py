"""Proves that SAELens, in an environment of its own, reads exported layers and computes the same numbers."""

import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from daco.sae import SAE, LayerSAE
from daco.sae_files import layer_folder, write_layer
from daco.sites import ModelFacts

SCRIPT = Path(__file__).with_name("interop_saelens.py")
MODEL = ModelFacts("org/model", "a" * 40, "llava", 32, 4)


def small_sae(activation: str) -> SAE:
    draw = torch.Generator().manual_seed(7)
    W_enc, W_dec = (torch.randn(*shape, generator=draw) for shape in ((32, 37), (37, 32)))
    b_enc, b_dec = (torch.randn(n, generator=draw) for n in (37, 32))
    threshold = torch.rand(37, generator=draw) * 4 if activation == "jumprelu" else None
    k = 5 if activation == "topk" else None
    return SAE(W_enc, b_enc, W_dec, b_dec, activation, k, threshold).requires_grad_(False)


def export(folder: Path, activation: str) -> None:
    """A layer folder as in a release, and beside it what daco computes with it."""
    sae = small_sae(activation)
    atoms = pd.DataFrame(
        {"atom": range(37), "polarity": "neutral", "cos_undesirable": 0.0, "cos_desirable": 0.0}
        | {name: [[]] * 37 for name in ("nearest_concept_ids", "nearest_concepts", "nearest_cosines")}
        | {"firing_rate": 0.5}
    )
    write_layer(folder / "whole", LayerSAE(1, sae, atoms, 3.0), MODEL)
    (folder / "whole" / layer_folder(1)).rename(folder / activation)
    (folder / "whole").rmdir()
    z = 3 * torch.randn(12, 32, generator=torch.Generator().manual_seed(8))
    codes = sae.encode(z)
    save_file({"z": z, "codes": codes, "z_hat": sae.decode(codes)}, folder / f"{activation}.safetensors")


def test_saelens_computes_the_same_codes_and_reconstructions(tmp_path):
    python = os.environ.get("SAELENS_PYTHON")
    if not python:
        pytest.skip("SAELENS_PYTHON is not set: it names the python of an environment with sae-lens >= 6")
    for activation in ("relu", "topk", "jumprelu"):
        export(tmp_path, activation)
    ran = subprocess.run([python, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "3 folders equal" in ran.stdout
