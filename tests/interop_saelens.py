"""Runs in an environment with SAELens, not with daco: loads exported layer folders, compares their numbers.

Usage: python interop_saelens.py FOLDER [REPO], where beside each layer folder FOLDER/<name> lies
<name>.safetensors with what daco computed: z, codes, z_hat. With REPO the layers are loaded from the Hub.
"""

import sys
from pathlib import Path

import torch
from sae_lens import SAE, __version__
from safetensors.torch import load_file


def compare(folder: Path, repo: str) -> str:
    """Load one layer folder with SAELens; returns a line on how far its numbers are from daco's."""
    if repo:
        sae = SAE.from_pretrained(repo, folder.name, device="cpu")
    else:
        sae = SAE.load_from_disk(folder, device="cpu")
    expected = load_file(folder.parent / f"{folder.name}.safetensors")
    with torch.no_grad():
        codes = sae.encode(expected["z"])
        codes = codes.to_dense() if codes.is_sparse else codes
        z_hat = sae.decode(codes)
    torch.testing.assert_close(codes, expected["codes"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(z_hat, expected["z_hat"], rtol=1e-5, atol=1e-4)
    assert (codes > 0).sum() == (expected["codes"] > 0).sum() > 0
    gap = float((z_hat - expected["z_hat"]).abs().max())
    return f"{sae.cfg.architecture()} {folder.name}: largest difference {gap:.1e}"


if __name__ == "__main__":
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    assert folders, "expected layer folders, got none"
    for found in folders:
        print(compare(found, sys.argv[2] if len(sys.argv) > 2 else ""))
    print(f"sae_lens {__version__}: {len(folders)} folders equal")
