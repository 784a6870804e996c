"""Some columns of a TopK code as one Triton kernel, for a GPU; `daco.top_k` has it in torch.

Reads and writes nothing. Triton comes with torch's CUDA builds; without it this module cannot be imported and
torch does the work. One program holds a row, finds bit by bit what the k-th largest of it is, and looks up
the columns that are wanted: torch sorts and compares in some ten launches.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 65_536
"""Columns that a program can hold."""

BLOCK = 1_024
"""Columns that are looked up at once."""

WARPS = 8
"""Of a program: on an H200 16 and 32 took 2 to 17 % longer, at every width up to WIDEST."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of pre-activations: what float32 holds exactly."""


@triton.jit
def _key(x):
    """Integers in the order of float32, where what is negative is zero; NaN is the largest, as in torch."""
    return tl.where(x == x, tl.maximum(x, 0.0).to(tl.int32, bitcast=True), 0x7FFFFFFF)


@triton.jit
def _top_k_at(pre, at, out, m, n_at, k, WIDTH: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    key = _key(tl.load(pre + row * m + column, mask=column < m, other=0.0).to(tl.float32))
    bar = 0  # the largest key that at least k are not below; zero where fewer are positive
    for i in range(31):
        higher = bar + (1 << (30 - i))
        bar = tl.where(tl.sum((key >= higher).to(tl.int32)) >= k, higher, bar)
    equal = (key == bar).to(tl.int32)
    room = k - tl.sum((key > bar).to(tl.int32))
    last = WIDTH  # of what is equal to it, the last column that has room
    if (bar > 0) & (tl.sum(equal) > room):
        last = 0
        for i in range(BITS):
            higher = last + (1 << (BITS - 1 - i))
            last = tl.where(tl.sum(tl.where(column < higher, equal, 0)) < room, higher, last)
    for first in range(0, n_at, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < n_at
        wanted = tl.load(at + place, mask=inside, other=0)
        found = tl.load(pre + row * m + wanted, mask=inside, other=0.0).to(tl.float32)
        own = _key(found)
        kept = (own > bar) | ((own == bar) & (wanted <= last))
        tl.store(out + row * n_at + place, tl.where(kept & (found > 0.0), found, 0.0), mask=inside)


def tried() -> None:
    """Run the kernel, where there is a GPU; raises whatever Triton does where it cannot compile for it."""
    if torch.cuda.is_available():
        top_k_at(torch.ones(1, 3, device="cuda"), 2, torch.zeros(1, dtype=torch.int64, device="cuda"))


def top_k_at(pre: Tensor, k: int, at: Tensor) -> Tensor:
    """The columns `at` of `daco.top_k.top_k(pre, k)`; nothing waits for the GPU.

    Args:
        pre: `[n, m]` of DTYPES, m <= WIDEST.
        k: How many stay of each row, at most m.
        at: `[w]` int64: columns.

    Returns:
        `[n, w]`, in the dtype of pre.
    """
    n, m = pre.shape
    pre, at = pre.contiguous(), at.contiguous()
    out = pre.new_empty(n, len(at))
    width = triton.next_power_of_2(m)
    with torch.cuda.device_of(pre):  # Triton starts kernels on the current device, which need not be pre's
        _top_k_at[(n,)](
            pre, at, out, m, len(at), k, WIDTH=width, BITS=width.bit_length() - 1, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return out
