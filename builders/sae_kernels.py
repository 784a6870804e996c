"""What torch is slow at on a GPU, as Triton kernels: sparse products, the k largest, the decoder's update.

Reads and writes nothing; `builders.sae_step` and `builders.sae_training` have the same in torch. Triton comes
with torch's CUDA builds; without it this module cannot be imported and the plain way is taken. Every program
owns what it writes: without atomics the same inputs give the same sums, and nothing waits for the GPU.
Kernels start on the current device, where all tensors must lie.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1_024
"""Columns a program works on at once."""
TILE = 4
"""Entries of a row that a program reads at once, so that it waits for memory once for all of them; half as
many where it sums them up, since few atoms are active at many tokens of a batch."""
WIDEST = 4_096
"""Columns that a program can hold of a row of which it takes the k largest."""


@triton.jit
def _sums(values, index, starts, rows, out, d: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    i, end = tl.load(starts + row), tl.load(starts + row + 1)
    while i < end:
        entry = i + tl.arange(0, TILE)
        there = entry < end
        source = tl.load(index + entry, mask=there, other=0)[:, None] * d + column[None, :]
        weight = tl.load(values + entry, mask=there, other=0.0)
        found = tl.load(rows + source, mask=there[:, None] & inside[None, :], other=0.0)
        total += weight[:, None] * found.to(tl.float32)
        i += TILE
    tl.store(out + row * d + column, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _products(index, starts, x, rows, out, d: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i, end = tl.load(starts + row), tl.load(starts + row + 1)
    while i < end:
        entry = i + tl.arange(0, TILE)
        there = entry < end
        source = tl.load(index + entry, mask=there, other=0)[:, None] * d
        total = tl.zeros([TILE, BLOCK], dtype=tl.float32)
        for first in range(0, d, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < d
            own = tl.load(x + row * d + column, mask=inside, other=0.0)
            both = there[:, None] & inside[None, :]
            found = tl.load(rows + source + column[None, :], mask=both, other=0.0)
            total += own[None, :] * found.to(tl.float32)
        tl.store(out + entry, tl.sum(total, axis=1), mask=there)
        i += TILE


@triton.jit
def _largest(x, values, places, m, k, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < m
    found = tl.load(x + row * m + column, mask=inside, other=float("-inf")).to(tl.float32)
    bits = found.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    # bit by bit the largest key that at least k are not below
    bar = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, -0x80000000).to(tl.int32)
    for i in range(31):
        higher = bar + (1 << (30 - i))
        bar = tl.where(tl.sum((key >= higher).to(tl.int32)) >= k, higher, bar)
    above = (key > bar).to(tl.int32)
    equal = ((key == bar) & inside).to(tl.int32)
    taken = (above > 0) | ((equal > 0) & (tl.cumsum(equal) <= k - tl.sum(above)))
    place = row * k + tl.cumsum(taken.to(tl.int32)) - 1
    tl.store(values + place, found, mask=taken)
    tl.store(places + place, column.to(tl.int64), mask=taken)


@triton.jit
def _unit_adam(w, g, mean, square, d, rate, new1, new2, root, epsilon, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    inside = column < d
    at = tl.program_id(0).to(tl.int64) * d + column
    weight = tl.load(w + at, mask=inside, other=0.0)
    slope = tl.load(g + at, mask=inside, other=0.0)
    slope -= weight * tl.sum(slope * weight)
    first = tl.load(mean + at, mask=inside, other=0.0)
    second = tl.load(square + at, mask=inside, other=0.0)
    first += new1 * (slope - first)
    second += new2 * (slope * slope - second)
    weight -= rate * first / (tl.sqrt(second) / root + epsilon)
    weight /= tl.sqrt(tl.sum(tl.where(inside, weight * weight, 0.0)))
    tl.store(w + at, weight, mask=inside)
    tl.store(mean + at, first, mask=inside)
    tl.store(square + at, second, mask=inside)


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
        rows: [_, d] float32 or bfloat16, contiguous, as is `out`.
        out: [r, d] float32, overwritten.
    """
    d = out.shape[1]
    grid = (len(out), triton.cdiv(d, BLOCK))
    _sums[grid](values, index, starts, rows, out, d=d, BLOCK=BLOCK, TILE=TILE // 2)
    return out


def row_products(index: Tensor, starts: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """`x[r] . rows[index[i]]` for every i from `starts[r]` to `starts[r + 1]`, [n].

    Args:
        index: [n] int64, rows of `rows`.
        starts: [r + 1] int64.
        x: [r, d] float32, contiguous, as is `rows`.
        rows: [_, d] float32 or bfloat16.
    """
    out = torch.empty(len(index), device=x.device)
    _products[(len(x),)](index, starts, x, rows, out, d=x.shape[1], BLOCK=BLOCK, TILE=TILE)
    return out


def k_largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row and where they are, by column; of equals the first. Exact.

    Args:
        x: [n, m] float32 or bfloat16, contiguous, k <= m <= `WIDEST`.
        k: How many.

    Returns:
        Values [n, k] float32 and places [n, k] int64.
    """
    n, m = x.shape
    values = torch.empty(n, k, device=x.device)
    places = torch.empty(n, k, dtype=torch.int64, device=x.device)
    width = triton.next_power_of_2(m)
    _largest[(n,)](x, values, places, m, k, WIDTH=width, num_warps=8 if width > 2_048 else 4)
    return values, places


def unit_adam(
    w: Tensor, g: Tensor, mean: Tensor, square: Tensor, step: int, rate: float,
    betas: tuple[float, float], epsilon: float,
) -> None:  # fmt: skip
    """A step of Adam on unit rows, in place: the gradient's part along them is dropped, they end at norm 1.

    Args:
        w: [m, d] float32, contiguous, as are all.
        g: Its gradient, left as it was.
        mean: Adam's first moment.
        square: Adam's second moment.
        step: How many steps it is with this one.
        rate: Learning rate.
        betas: Adam's.
        epsilon: Adam's.
    """
    m, d = w.shape
    unbiased = [1 - beta**step for beta in betas]
    fixed = [rate / unbiased[0], 1 - betas[0], 1 - betas[1], unbiased[1] ** 0.5, epsilon]
    _unit_adam[(m,)](w, g, mean, square, d, *fixed, WIDTH=triton.next_power_of_2(d), num_warps=8)
