"""What the search does with the cosines of a block as a Triton kernel; `builders.proposals` has it in torch.

Reads and writes nothing. Triton comes with torch's CUDA builds; without it this module cannot be imported and
torch's operations are taken, which go through the cosines several times instead of once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Products of a query that a program looks at."""


@triton.jit(do_not_specialize=["n"])  # the last block's would be compiled again
def _take_above(image, text, bar, rows, values, columns, count, n, stride, room, BLOCK: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    caption = tl.load(text + query * stride + column, mask=inside, other=0.0).to(tl.float32)
    product = tl.load(image + query * stride + column, mask=inside, other=0.0).to(tl.float32) * caption
    hit = inside & (caption > 0) & (product > tl.load(bar + query))
    if tl.max(hit.to(tl.int32), axis=0) > 0:
        own = count + query + tl.zeros([BLOCK], dtype=tl.int64)
        slot = tl.atomic_add(own, tl.full([BLOCK], 1, dtype=tl.int64), mask=hit, sem="relaxed")
        kept = hit & (slot < room)
        tl.store(values + query * room + slot, product, mask=kept)
        tl.store(columns + query * room + slot, tl.load(rows + column, mask=kept, other=0), mask=kept)


def tried(device: str = "cuda") -> None:
    """Run the kernel once; raises whatever Triton does where it cannot compile for the device."""
    for dtype in (torch.float32, torch.bfloat16):
        cosines, lists = torch.ones(1, 32, dtype=dtype, device=device), torch.full((1, 64), -1.0).to(device)
        columns, count = torch.zeros_like(lists).long(), torch.zeros_like(lists[0, :1]).long()
        take_above(cosines, cosines, lists[0, :1] + 1, columns[0, :32], lists, columns, count)
        if int(count) != 32 or float(lists.sum()) != 0:
            raise RuntimeError("the kernel's first results are wrong")


def take_above(
    image: Tensor, text: Tensor, bar: Tensor, rows: Tensor, values: Tensor, columns: Tensor, count: Tensor
) -> None:
    """Append to every query's list what is above its bar: products of cosines where the caption's is above 0.

    What finds no room is counted, but not written. The order within a list is that in which threads come.

    Args:
        image: [q, _] float32 or bfloat16, contiguous, as is `text`.
        text: [q, _].
        bar: [q] float32.
        rows: [n] int64, what the first n columns are called.
        values: [q, room] float32, contiguous, as is `columns`.
        columns: [q, room] int64.
        count: [q] int64, how many places of a list are taken.
    """
    grid = (len(image), triton.cdiv(len(rows), BLOCK))
    size = (len(rows), image.shape[1], values.shape[1])
    with torch.cuda.device_of(image):  # Triton starts kernels on the current device, which need not be this
        _take_above[grid](image, text, bar, rows, values, columns, count, *size, BLOCK=BLOCK)
