"""An elastic net on small working sets as one Triton kernel, for a GPU; `daco.sparse_coding` has it in torch.

Reads and writes nothing. Triton comes with torch's CUDA builds; without it this module cannot be imported and
torch does the work. One program solves one row from beginning to end, and decides itself when it is done, so
that nothing has to wait for the GPU between steps.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTHS = (128, 256)
"""Atoms in a working set; their Gram matrix is held in a program's registers, or near it."""

STEPS, MOST_STEPS = 4, 512
"""Accelerated steps between two looks at the duality gap, and in all."""


@triton.jit
def _product(G, c):
    """`G c` of a symmetric G, laid out as c is."""
    W: tl.constexpr = c.shape[0]
    place = tl.arange(0, W)
    block = tl.load(G + place[:, None] * W + place[None, :])
    return tl.sum(block * c[:, None], axis=0)


@triton.jit
def _solve(
    G, q, start, l1, l2, half, out, tol,
    STEPS: tl.constexpr, MOST_STEPS: tl.constexpr, NON_NEGATIVE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, W)
    G += row * W * W
    q = tl.load(q + row * W + place)
    c = tl.load(start + row * W + place)
    l1, l2, half = tl.load(l1 + row), tl.load(l2 + row), tl.load(half + row)
    block = tl.load(G + place[:, None] * W + place[None, :])
    # the largest row sum bounds the largest eigenvalue
    step = 1 / (tl.max(tl.sum(tl.abs(block), axis=0), axis=0) + l2)
    ahead, momentum, done = c, 1.0, 0
    while done < MOST_STEPS:
        product = _product(G, c)
        along = tl.sum(c * q, axis=0)
        square = 2 * (half - along) + tl.sum(c * product, axis=0)
        pull = q - product - l2 * c
        steepest = tl.max(pull if NON_NEGATIVE else tl.abs(pull), axis=0)
        scale = tl.where(steepest > l1, l1 / tl.maximum(steepest, 1e-30), 1.0)
        square += l2 * tl.sum(c * c, axis=0)
        primal = 0.5 * square + l1 * tl.sum(tl.abs(c), axis=0)
        dual = scale * (2 * half - along) - 0.5 * scale * scale * square
        done += STEPS
        if primal - dual <= tol * half:
            done = MOST_STEPS
        else:
            for _ in range(STEPS):
                new = ahead + step * (q - _product(G, ahead) - l2 * ahead)
                if NON_NEGATIVE:
                    new = tl.maximum(new - step * l1, 0.0)
                else:
                    new = new - tl.minimum(tl.maximum(new, -step * l1), step * l1)
                # what overshot starts afresh
                overshot = tl.sum((ahead - new) * (new - c), axis=0) > 0
                momentum = tl.where(overshot, 1.0, momentum)
                grown = (1 + tl.sqrt(1 + 4 * momentum * momentum)) / 2
                ahead = new + (momentum - 1) / grown * (new - c)
                c, momentum = new, grown
    tl.store(out + row * W + place, c)


def tried() -> None:
    """Run the kernel at each width, where there is a GPU; raises whatever Triton does where it cannot."""
    for width in WIDTHS if torch.cuda.is_available() else ():
        G, one = torch.eye(width, device="cuda")[None], torch.ones(1, device="cuda")
        solve(G, G[:, 0], torch.zeros_like(G[:, 0]), 0.1 * one, one, one, 1e-5, False)


def solve(
    G: Tensor, q: Tensor, start: Tensor, l1: Tensor, l2: Tensor, half: Tensor, tol: float, non_negative: bool
) -> Tensor:
    """Minimise `1/2 c G c - q c + l1 |c|_1 + l2/2 |c|^2` for each row, `[n, w]`.

    Args:
        G: `[n, w, w]` float32, symmetric; w one of WIDTHS.
        q: `[n, w]`: the atoms' products with z.
        start: `[n, w]`: where to begin.
        l1: `[n]`.
        l2: `[n]`.
        half: `[n]`: `1/2 ||z||^2`.
        tol: Duality gap at which a row is done, as a fraction of half; after MOST_STEPS steps it is.
        non_negative: Only coefficients >= 0.
    """
    out, width = torch.empty_like(q, memory_format=torch.contiguous_format), q.shape[1]
    tensors = (t.contiguous() for t in (G, q, start, l1, l2, half))
    with torch.cuda.device_of(q):  # Triton starts kernels on the current device, which need not be q's
        _solve[(len(q),)](
            *tensors, out, tol, STEPS=STEPS, MOST_STEPS=MOST_STEPS, NON_NEGATIVE=non_negative, W=width,
            num_warps=width // 16,
        )  # fmt: skip
    return out
