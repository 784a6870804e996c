"""The sparse products of a training step as Triton kernels, for a GPU; `builders.sae_step` has them in torch.

Reads and writes nothing. Triton comes with torch's CUDA builds; without it this module cannot be imported and
the plain products are taken. Every program owns what it writes: there are no atomics, so the same inputs give
the same sums, and nothing here waits for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
"""Columns a program works on at once."""


@triton.jit
def _sums(values, index, starts, rows, out, d: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros([BLOCK], dtype=tl.float32)
    i, end = tl.load(starts + row), tl.load(starts + row + 1)
    while i < end:
        source = rows + tl.load(index + i) * d + column
        total += tl.load(values + i) * tl.load(source, mask=inside, other=0.0)
        i += 1
    tl.store(out + row * d + column, total, mask=inside)


@triton.jit
def _products(index, starts, x, rows, out, d: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i, end = tl.load(starts + row), tl.load(starts + row + 1)
    while i < end:
        other = tl.load(index + i) * d
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, d, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < d
            own = tl.load(x + row * d + column, mask=inside, other=0.0)
            total += own * tl.load(rows + other + column, mask=inside, other=0.0)
        tl.store(out + i, tl.sum(total, axis=0))
        i += 1


def tried() -> None:
    """Run a kernel once, where there is a GPU; raises whatever Triton does where it cannot compile for it."""
    if torch.cuda.is_available():
        one = torch.ones(1, 1, device="cuda")
        weighted_sums(one[0], torch.zeros(1, dtype=torch.int64, device="cuda"),
                      torch.tensor([0, 1], device="cuda"), one, torch.empty_like(one))  # fmt: skip


def weighted_sums(values: Tensor, index: Tensor, starts: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Row r of out becomes the sum of `values[i] rows[index[i]]` over i from `starts[r]` to `starts[r + 1]`.

    A code's reconstruction, or, by the code turned round, the gradient of an encoder or decoder.

    Args:
        values: [n] float32.
        index: [n] int64, rows of `rows`.
        starts: [r + 1] int64.
        rows: [_, d] float32, contiguous, as is `out`.
        out: [r, d] float32, overwritten.
    """
    d = out.shape[1]
    _sums[(len(out), triton.cdiv(d, BLOCK))](values, index, starts, rows, out, d=d, BLOCK=BLOCK)
    return out


def row_products(index: Tensor, starts: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """`x[r] . rows[index[i]]` for every i from `starts[r]` to `starts[r + 1]`, [n].

    Args:
        index: [n] int64, rows of `rows`.
        starts: [r + 1] int64.
        x: [r, d] float32, contiguous, as is `rows`.
        rows: [_, d] float32.
    """
    out = torch.empty(len(index), device=x.device)
    _products[(len(x),)](index, starts, x, rows, out, d=x.shape[1], BLOCK=BLOCK)
    return out
