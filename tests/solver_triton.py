"""Runs where Triton can be imported: codes with the kernel, interpreted on the CPU, or the kernel compiled.

Usage: python solver_triton.py codes (with TRITON_INTERPRET=1) | compile. No GPU is needed for either.
"""

import sys

import torch
import triton
from torch import Tensor
from torch.nn.functional import normalize

from daco import solver_kernels, sparse_coding
from daco.sparse_coding import duality_gap, elastic_net

N, N_ATOMS, D_MODEL, TAU, TOL = 3, 1_531, 397, 0.95, 1e-4


def problem(share: float) -> tuple[Tensor, Tensor]:
    """Targets and unit rows, with a part that all have in common."""
    draw = torch.Generator().manual_seed(4)
    common = normalize(torch.randn(D_MODEL, generator=draw), dim=-1)
    own = (normalize(torch.randn(m, D_MODEL, generator=draw), dim=-1) for m in (N, N_ATOMS))
    z, D = (normalize(share**0.5 * common + (1 - share) ** 0.5 * one, dim=-1) for one in own)
    return 60 * z, D


def codes() -> None:
    """Codes are certified, and are those without the kernel; where sets are too small for a row as well."""
    plain, rests = sparse_coding._solve, []

    def counted(z: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        rests.append(len(z))
        return plain(z, *rest)  # type: ignore[arg-type]

    for share in (0.0, 0.3):
        z, D = problem(share)
        for fraction in (0.8, 0.5, 0.2):
            for non_negative in (False, True):
                for gram in (None, D @ D.T):
                    given = {"non_negative": non_negative, "gram": gram, "relative": True}
                    alpha = torch.full((N,), fraction)
                    wide = given | {"gram": None}
                    expected = elastic_net(z.double(), D.double(), alpha, TAU, tol=1e-8, **wide)
                    sparse_coding.kernels_for = lambda x: solver_kernels
                    sparse_coding._solve = counted
                    found = elastic_net(z, D, alpha, TAU, tol=TOL, **given)
                    sparse_coding.kernels_for, sparse_coding._solve = (lambda x: None), plain
                    largest = fraction * (z @ D.T).abs().amax(-1) / TAU
                    gap = duality_gap(z.double(), D.double(), found.code.double(), largest, TAU, non_negative)
                    assert torch.cat([found.certified, expected.certified]).all()
                    assert (gap <= TOL * 0.5 * z.square().sum(-1)).all()
                    # the objective is strongly convex: ||c - c*||^2 <= 2 gap / l2
                    away = (found.code - expected.code).square().sum(-1)
                    assert (away <= 4 * 2 * (found.gap + expected.gap) / (largest * (1 - TAU))).all()
        print(share, "equal")
    print(sum(rests), "rows were left to the plain solver")


def compiled() -> None:
    """The kernel becomes machine code for an H100, in registers where sets are small."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = solver_kernels._solve
    for width in solver_kernels.WIDTHS:
        for non_negative in (False, True):
            fixed = {name: getattr(solver_kernels, name) for name in ("STEPS", "MOST_STEPS")}
            fixed |= {"NON_NEGATIVE": non_negative, "W": width}
            kinds = dict.fromkeys(kernel.arg_names, "*fp32") | {"tol": "fp32"}
            kinds |= dict.fromkeys(fixed, "constexpr")
            places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
            made = triton.compile(
                ASTSource(kernel, kinds, places),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": width // 16},
            )
            print(width, non_negative, len(made.asm["cubin"]), "bytes")


if __name__ == "__main__":
    {"codes": codes, "compile": compiled}[sys.argv[1]]()
