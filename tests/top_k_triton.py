"""Runs where Triton can be imported: chosen columns of a TopK, by the kernel interpreted, or it compiled.

Usage: python top_k_triton.py columns (with TRITON_INTERPRET=1) | compile. No GPU is needed for either.
"""

import sys

import torch
import triton

from daco import top_k, top_k_kernels


def columns() -> None:
    """They are those of torch: with ties, none that is positive, infinities, NaN, all or one that stays."""
    draw = torch.Generator().manual_seed(3)
    for m, k in ((5, 5), (37, 1), (37, 9), (200, 8), (1_531, 64), (2_048, 7)):
        at = torch.randperm(m, generator=draw)[: max(1, m // 3)]
        x = torch.randn(4, m, generator=draw)
        holes, few = x.where(x < 0.5, torch.nan), x.index_fill(1, at[:1], torch.nan)
        for pre in (
            x,
            x.round(),
            torch.zeros(4, m),
            x.abs().neg(),
            torch.ones(4, m),
            x / 0.0,
            x - 2,
            holes,
            few,
        ):
            for dtype in top_k_kernels.DTYPES:
                given = pre.to(dtype)
                expected = top_k.top_k(given, k)[:, at]
                assert torch.equal(top_k_kernels.top_k_at(given, k, at), expected)
                apart = at.repeat_interleave(2)[::2]
                assert torch.equal(top_k_kernels.top_k_at(given.T.contiguous().T, k, apart), expected)
        print(m, k, "equal")


def compiled() -> None:
    """The kernel becomes machine code for an H100, at all widths that SAEs have, also where one is kept."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, widest = top_k_kernels._top_k_at, top_k_kernels.WIDEST
    alone = {"k": 1, "n_at": 1}  # Triton compiles what is 1 as a constant
    for width, held, ones in ((1_024, "*bf16", alone), (16_384, "*fp16", {}), (widest, "*fp32", {})):
        fixed = {"WIDTH": width, "BITS": width.bit_length() - 1, "BLOCK": top_k_kernels.BLOCK} | ones
        kinds = {"pre": held, "at": "*i64", "out": held, "m": "i32", "n_at": "i32", "k": "i32"}
        kinds |= dict.fromkeys(fixed, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
        made = triton.compile(
            ASTSource(kernel, kinds, places),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": top_k_kernels.WARPS},
        )
        print(width, len(made.asm["cubin"]), "bytes")


if __name__ == "__main__":
    {"columns": columns, "compile": compiled}[sys.argv[1]]()
