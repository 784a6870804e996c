"""Runs where Triton can be imported: its kernels in a training step, interpreted, or compiled for a GPU.

Usage: python kernels_triton.py step | largest | training (with TRITON_INTERPRET=1) | compile. No GPU needed.
"""

import sys
from contextlib import contextmanager

import torch
import triton
from sae_rows import ACTIVATIONS, draw, random_weights
from test_sae_step import close, config_of, stepped

from builders import sae_kernels, sae_step
from builders.sae_kernels import BLOCK
from builders.sae_training import Training


def step() -> None:
    """Loss and gradients of a step are the same with either products, whatever the activation and width."""
    for activation in ACTIVATIONS:
        for d in (32, BLOCK + 7):
            x, config = draw(17, d, seed=9).float(), config_of(activation, aux_k=2)
            weights = {n: w.float() / d**0.5 for n, w in random_weights(37, d, activation).items()}
            dead = torch.tensor([3, 8])
            plain = stepped(x, weights, config, 0.3, dead=dead)
            expected = {name: g.clone() for name, g in plain.by_name.items()}
            with by_kernels():
                found = stepped(x, weights, config, 0.3, dead=dead)
            close(found.loss, plain.loss)
            for name, gradient in expected.items():
                close(found.by_name[name], gradient)
        print(activation, "equal")


@contextmanager
def by_kernels():
    """Kernels wherever a step asks for them."""
    kernels_for, sae_step.kernels_for = sae_step.kernels_for, lambda x: sae_kernels
    try:
        yield
    finally:
        sae_step.kernels_for = kernels_for


def largest() -> None:
    """The k largest of a row are those of torch, in one part or several, with ties, signs and infinities."""
    draws = torch.Generator().manual_seed(3)
    for m, k in ((5, 5), (37, 1), (37, 9), (200, 8), (8_192, 16), (9_999, 4)):
        x = torch.randn(3, m, generator=draws)
        for pre in (x, x.bfloat16().float(), x.round(), torch.zeros(3, m), x.abs().neg(), x.log()):
            pre = pre.nan_to_num(nan=-torch.inf)
            with by_kernels():
                values, places = sae_step.k_largest(pre, k)
            assert torch.equal(pre.gather(1, places), values)
            assert torch.equal(values.sort(1, descending=True).values, pre.topk(k, 1).values)
            assert all(len(set(row)) == k for row in places.tolist())
        print(m, k, "equal")


def training() -> None:
    """Weights and moments after some steps are those of torch's Adam between the projections."""
    for d in (32, 45):
        z, config = draw(17, d, seed=9).float(), config_of("topk", learning_rate=1e-2)
        start = {n: w.float() for n, w in random_weights(37, d).items()}
        start["W_dec"] = torch.nn.functional.normalize(start["W_dec"], dim=1)
        plain, ours = (Training(start, 1.0, config) for _ in range(2))
        for _ in range(3):
            plain.step(z)
            with by_kernels():
                ours.step(z)
        for name, weight in plain.parameters.items():
            close(ours.parameters[name].detach(), weight.detach())
            for moment in ("exp_avg", "exp_avg_sq"):
                close(ours.adam.state[ours.parameters[name]][moment], plain.adam.state[weight][moment])
        assert float((ours.parameters["W_dec"].detach().norm(dim=1) - 1).abs().max()) < 1e-6
        print(d, "equal")


def compiled() -> None:
    """All kernels become machine code for an H100 at the widths of real models."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict.fromkeys(("values", "x", "rows", "out", "w", "g", "mean", "square"), "*fp32")
    kinds |= dict.fromkeys(("index", "starts", "places"), "*i64") | dict.fromkeys(("m", "k"), "i32")
    kinds |= dict.fromkeys(("rate", "new1", "new2", "root", "epsilon"), "fp32")
    for d in (3_584, 4_096, 1_030):
        sizes = {"d": d, "BLOCK": sae_kernels.BLOCK, "TILE": sae_kernels.TILE}
        sizes["WIDTH"] = triton.next_power_of_2(d)
        for kernel in (
            sae_kernels._sums,
            sae_kernels._products,
            sae_kernels._largest,
            sae_kernels._unit_adam,
        ):
            fixed = {
                (i,): sizes[name]
                for i, name in enumerate(kernel.arg_names)
                if name not in kinds and name in sizes
            }
            signature = {n: kinds.get(n, "constexpr") for n in kernel.arg_names}
            made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
            print(kernel.__name__, d, len(made.asm["cubin"]), "bytes")


if __name__ == "__main__":
    {"step": step, "largest": largest, "training": training, "compile": compiled}[sys.argv[1]]()
