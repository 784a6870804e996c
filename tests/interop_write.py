"""Runs in an environment with SAELens or sparsify, not with daco: writes SAE folders, and what they compute.

Usage: python interop_write.py saelens|sparsify FOLDER. Beside each folder FOLDER/<name> comes
<name>.safetensors with z, codes, z_hat.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def activations() -> torch.Tensor:
    return 3 * torch.randn(12, 32, generator=torch.Generator().manual_seed(8)) + 1


def scramble(module: torch.nn.Module) -> None:
    """Weights of every kind, norms other than 1, thresholds above 0."""
    draw = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=draw)
        parameter.data.copy_(4 * value.abs() if name == "threshold" else value)


def write(folder: Path, name: str, codes: torch.Tensor, z_hat: torch.Tensor) -> None:
    facts = {"z": activations(), "codes": codes, "z_hat": z_hat}
    save_file(
        {key: value.detach().contiguous() for key, value in facts.items()}, folder / f"{name}.safetensors"
    )


def saelens(folder: Path) -> None:
    from sae_lens import (
        SAE,
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )

    sizes: dict[str, Any] = {"d_in": 32, "d_sae": 37}
    made = {
        "standard": StandardSAE(StandardSAEConfig(**sizes)),
        "standard-without-b_dec": StandardSAE(StandardSAEConfig(**sizes, apply_b_dec_to_input=False)),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**sizes)),
        "topk": TopKSAE(TopKSAEConfig(**sizes, k=5)),
        "topk-rescaled": TopKSAE(TopKSAEConfig(**sizes, k=5, rescale_acts_by_decoder_norm=True)),
    }
    for name, sae in made.items():
        scramble(sae)
        sae.save_model(folder / name)
        codes = sae.encode(activations())
        write(folder, name, codes, sae.decode(codes))
    trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=5))
    scramble(trained)
    trained.topk_threshold.fill_(2.5)
    trained.save_inference_model(folder / "batchtopk")  # as a JumpReLU
    sae = SAE.load_from_disk(folder / "batchtopk", device="cpu")
    codes = sae.encode(activations())
    write(folder, "batchtopk", codes, sae.decode(codes))


def sparsify(folder: Path) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    configs = {"topk": {"num_latents": 37, "k": 5}, "topk-by-factor": {"expansion_factor": 2, "k": 3}}
    for name, config in configs.items():
        coder = SparseCoder(32, SparseCoderConfig(**config))
        scramble(coder)
        coder.save_to_disk(folder / name)
        values, atoms, pre = coder.encode(activations())
        write(folder, name, torch.zeros_like(pre).scatter(1, atoms, values), coder.decode(values, atoms))


if __name__ == "__main__":
    {"saelens": saelens, "sparsify": sparsify}[sys.argv[1]](Path(sys.argv[2]))
