"""Proves that SAELens and sparsify, in an environment of their own, and daco read each other's SAEs alike."""

import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from hub_fixture import READER, LocalHub, local_hub  # noqa: F401
from safetensors.torch import load_file, save_file

from daco.sae import SAE, LayerSAE
from daco.sae_files import layer_folder, write_layer
from daco.sae_import import read_sae
from daco.sites import ModelFacts
from hub.local.server import client_env

SCRIPT = Path(__file__).with_name("interop_saelens.py")
MODEL = ModelFacts("org/model", "a" * 40, "llava", 32, 4)


def small_sae(activation: str) -> SAE:
    draw = torch.Generator().manual_seed(7)
    W_enc, W_dec = (torch.randn(*shape, generator=draw) for shape in ((32, 37), (37, 32)))
    b_enc, b_dec = (torch.randn(n, generator=draw) for n in (37, 32))
    threshold = torch.rand(37, generator=draw) * 4 if activation == "jumprelu" else None
    if activation == "batchtopk":  # trained as such, released with one threshold for all atoms
        activation, threshold = "jumprelu", torch.full((37,), 2.5)
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


def other_python(who: str) -> str:
    python = os.environ.get(f"{who.upper()}_PYTHON")
    if not python:
        pytest.skip(f"{who.upper()}_PYTHON is not set: it names the python of an environment with {who}")
    return python


def ran(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("who", "n"), [("saelens", 6), ("sparsify", 2)])
def test_folders_of_others_compute_the_same_here(who, n, tmp_path):
    ran(other_python(who), str(SCRIPT.with_name("interop_write.py")), who, str(tmp_path))
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == n
    for folder in folders:
        sae, expected = read_sae(folder), load_file(tmp_path / f"{folder.name}.safetensors")
        codes = sae.encode(expected["z"])
        if folder.name == "topk-rescaled":  # theirs are in units of the decoder's norms already
            torch.testing.assert_close(codes, expected["codes"], rtol=1e-4, atol=1e-3)
        assert torch.equal(codes > 0, expected["codes"] > 0), folder.name
        assert (codes > 0).any()
        torch.testing.assert_close(sae.decode(codes), expected["z_hat"], rtol=1e-4, atol=1e-3)


def test_saelens_computes_the_same_codes_and_reconstructions(tmp_path):
    python = other_python("saelens")
    for activation in ("relu", "topk", "batchtopk", "jumprelu"):
        export(tmp_path, activation)
    assert "4 folders equal" in ran(python, str(SCRIPT), str(tmp_path))


def test_saelens_loads_the_same_from_a_hub(tmp_path, local_hub: LocalHub):  # noqa: F811
    python = other_python("saelens")
    for activation in ("relu", "topk", "batchtopk", "jumprelu"):
        export(tmp_path / "made", activation)
    local_hub.api().create_repo("org/saes")
    local_hub.api().upload_folder(repo_id="org/saes", folder_path=tmp_path / "made")
    env = client_env(local_hub.url, local_hub.home, READER)
    assert "4 folders equal" in ran(python, str(SCRIPT), str(tmp_path / "made"), "org/saes", env=env)
