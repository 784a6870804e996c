"""Runs where Triton can be imported: retrieval's kernel in a search, interpreted, or compiled for a GPU.

Usage: python retrieval_triton.py search (with TRITON_INTERPRET=1) | compile. No GPU is needed for either.
"""

import sys

import torch
import triton
from test_retrieval import KINDS, looked_up, made, rows_of

from builders import proposals, retrieval_kernels


def search() -> None:
    """Searches with the kernel are the naive twin's, whatever the data, dtype and room in the lists."""
    retrieval_kernels.tried("cpu")
    called, take_above = [0, 0], retrieval_kernels.take_above

    def counted(*given: torch.Tensor) -> None:
        take_above(*given)
        called[0] += 1
        called[1] += int(given[-1].max()) > given[-2].shape[1]

    retrieval_kernels.take_above = counted
    proposals.on_gpu = lambda engine: True
    proposals.onednn_product = lambda: None
    proposals.kernels_for = lambda device: retrieval_kernels
    for margin in ({"float32": 16, "bfloat16": 80}, {"float32": 0, "bfloat16": 0}):
        proposals.MARGIN = margin
        for kind in KINDS:
            for dtype in ("float32", "bfloat16"):
                found, expected = looked_up(*made(kind), dtype=dtype, block=96, tile=3)
                assert rows_of(found) == expected, (kind, dtype)
                print(kind.__name__, dtype, "equal")
    assert called[0] > called[1] > 0, called
    print("calls", *called)


def compiled() -> None:
    """The kernel becomes machine code for an H100 with cosines of either dtype."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = retrieval_kernels._take_above
    kinds = dict.fromkeys(("bar", "values"), "*fp32")
    kinds |= dict.fromkeys(("rows", "columns", "count"), "*i64") | dict.fromkeys(
        ("n", "stride", "room"), "i32"
    )
    fixed = {(kernel.arg_names.index("BLOCK"),): retrieval_kernels.BLOCK}
    for dtype in ("*fp32", "*bf16"):
        every = kinds | {"image": dtype, "text": dtype, "BLOCK": "constexpr"}
        signature = {name: every[name] for name in kernel.arg_names}
        made_code = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
        print(dtype, len(made_code.asm["cubin"]), "bytes")


if __name__ == "__main__":
    {"search": search, "compile": compiled}[sys.argv[1]]()
