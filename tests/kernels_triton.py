"""Runs where Triton can be imported: its kernels in a training step, interpreted, or compiled for a GPU.

Usage: python kernels_triton.py step | largest | halves | training (with TRITON_INTERPRET=1) | compile.
No GPU is needed.
"""

import sys
from contextlib import contextmanager

import torch
import triton
from sae_rows import ACTIVATIONS, dense, draw, random_weights
from test_sae_step import close, config_of, stepped

from builders import sae_kernels, sae_step
from builders.sae_kernels import BLOCK
from builders.sae_step import Step
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
            for given in (pre, pre.bfloat16()):
                with by_kernels():
                    values, places = sae_step.k_largest(given, k)
                assert torch.equal(given.gather(1, places), values)
                assert torch.equal(values.sort(1, descending=True).values, given.topk(k, 1).values)
                assert all(len(set(row)) == k for row in places.tolist())
        print(m, k, "equal")


def halves() -> None:
    """A step that reads bfloat16 copies: nearly the exact code, and its gradients but for their rounding."""
    d = sae_kernels.BLOCK + 8
    x, config = draw(17, d, seed=9).float(), config_of("topk")
    rows = {n: w.float() / d**0.5 for n, w in random_weights(37, d).items()}
    rows["W_enc"] = rows["W_enc"].T.contiguous()
    with by_kernels():
        found = Step(rows, config, "bfloat16")(x, 0.0)
    plain = Step(rows, config, "float32")
    exact = plain(x, 0.0).code
    shared = (dense(found.code) > 0) & (dense(exact) > 0)
    assert shared.sum() > 0.95 * len(exact.values)
    close(dense(found.code)[shared], dense(exact)[shared])
    plain.code = lambda centred, guess=0.0: found.code  # a tie of bfloat16 is no matter of the gradients
    expected = plain(x, 0.0)
    close(found.loss, expected.loss, 1e-3)
    for name, gradient in expected.by_name.items():
        close(found.by_name[name], gradient, 1e-2)
        print(name, "rounded" if not torch.equal(found.by_name[name], gradient) else "the same")


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
    products = [sae_kernels._sums, sae_kernels._products]
    for d, rows in ((3_584, "*fp32"), (4_096, "*bf16"), (1_030, "*bf16")):
        sizes = {"d": d, "BLOCK": sae_kernels.BLOCK, "TILE": sae_kernels.TILE}
        sizes["WIDTH"] = triton.next_power_of_2(d)
        for kernel in (*products, sae_kernels._largest, sae_kernels._unit_adam):
            signature = {n: kinds.get(n, "constexpr") for n in kernel.arg_names}
            signature |= {"rows": rows} if kernel in products else {"x": rows} if "x" in signature else {}
            if kernel is sae_kernels._unit_adam:
                signature["d"] = "i32"
            fixed = {(i,): sizes[n] for i, n in enumerate(kernel.arg_names) if signature[n] == "constexpr"}
            made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
            print(kernel.__name__, d, len(made.asm["cubin"]), "bytes")


if __name__ == "__main__":
    {"step": step, "largest": largest, "halves": halves, "training": training, "compile": compiled}[
        sys.argv[1]
    ]()
