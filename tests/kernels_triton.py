"""Runs where Triton can be imported: its kernels in a training step, interpreted, or compiled for a GPU.

Usage: python kernels_triton.py step (with TRITON_INTERPRET=1) | compile. No GPU is needed for either.
"""

import sys

import torch
import triton
from sae_rows import ACTIVATIONS, draw, random_weights
from test_sae_step import close, config_of, stepped

from builders import sae_kernels, sae_step
from builders.sae_kernels import BLOCK


def step() -> None:
    """Loss and gradients of a step are the same with either products, whatever the activation and width."""
    for activation in ACTIVATIONS:
        for d in (32, BLOCK + 7):
            x, config = draw(17, d, seed=9).float(), config_of(activation, aux_k=2)
            weights = {n: w.float() / d**0.5 for n, w in random_weights(37, d, activation).items()}
            dead = torch.tensor([3, 8])
            plain = stepped(x, weights, config, 0.3, dead=dead)
            expected = {name: g.clone() for name, g in plain.by_name.items()}
            kernels_for, sae_step.kernels_for = sae_step.kernels_for, lambda x: sae_kernels
            found = stepped(x, weights, config, 0.3, dead=dead)
            sae_step.kernels_for = kernels_for
            close(found.loss, plain.loss)
            for name, gradient in expected.items():
                close(found.by_name[name], gradient)
        print(activation, "equal")


def compiled() -> None:
    """Both kernels become machine code for an H100 at the widths of real models."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"values": "*fp32", "x": "*fp32", "rows": "*fp32", "out": "*fp32"}
    kinds |= {"index": "*i64", "starts": "*i64", "d": "constexpr", "BLOCK": "constexpr"}
    for kernel in (sae_kernels._sums, sae_kernels._products):
        for d in (3_584, 4_096, 1_030):
            signature = {name: kinds[name] for name in kernel.arg_names}
            fixed = {(kernel.arg_names.index(n),): v for n, v in (("d", d), ("BLOCK", BLOCK))}
            made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
            print(kernel.__name__, d, len(made.asm["cubin"]), "bytes")


if __name__ == "__main__":
    {"step": step, "compile": compiled}[sys.argv[1]]()
