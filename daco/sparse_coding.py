"""Sparse codes on a dictionary, batched, each certified by its duality gap; tensors in, tensors out."""

from typing import NamedTuple

import torch
from torch import Tensor

CHECK_STEPS = 10
"""Steps between looks at the duality gap; rows that are certified leave the batch."""


class SparseCode(NamedTuple):
    """Codes, and how good they are."""

    code: Tensor
    """`[n, n_atoms]`."""
    gap: Tensor
    """`[n]`: no code has an objective smaller by more than this."""
    certified: Tensor
    """`[n]` bool: whether the gap is within the tolerance."""


@torch.no_grad()
def elastic_net(
    z: Tensor,
    D: Tensor,
    alpha: Tensor,
    tau: float,
    *,
    non_negative: bool = False,
    tol: float = 1e-4,
    max_steps: int = 2_000,
    lipschitz: Tensor | None = None,
) -> SparseCode:
    """Minimise `1/2 ||z - c D||^2 + alpha (tau ||c||_1 + (1 - tau)/2 ||c||^2)` for each row.

    Accelerated proximal gradient steps (FISTA) with restarts by the gradient's sign, row by row.

    Args:
        z: `[n, d_model]`.
        D: `[n_atoms, d_model]`, rows of norm 1.
        alpha: `[n]`, absolute penalty of each row.
        tau: Share of the L1 penalty, in (0, 1].
        non_negative: Only coefficients >= 0.
        tol: Gap that is accepted, as a fraction of `1/2 ||z||^2`.
        max_steps: Steps at most.
        lipschitz: Largest eigenvalue of `D^T D`; None computes it.

    Source: Beck and Teboulle 2009; O'Donoghue and Candes 2015 (restarts). scikit-learn's ElasticNet has
    `alpha / d_model` for alpha and `l1_ratio` for tau.
    """
    code = z.new_zeros(len(z), len(D))
    gap = z.new_full((len(z),), torch.inf)
    target = tol * 0.5 * z.square().sum(-1)
    top = largest_eigenvalue(D) if lipschitz is None else lipschitz
    rows = torch.arange(len(z), device=z.device)
    x = y = code
    t = z.new_ones(len(z), 1)
    l1, l2 = (alpha * tau)[:, None], (alpha * (1 - tau))[:, None]
    for step in range(1, max_steps + 1):
        new = _prox_step(z[rows], D, y, l1[rows], l2[rows], top, non_negative)
        x, y, t = _momentum(x, y, t, new)
        if step % CHECK_STEPS == 0 or step == max_steps:
            code[rows] = x
            gap[rows] = duality_gap(z[rows], D, x, alpha[rows], tau, non_negative)
            going = gap[rows] > target[rows]
            rows, x, y, t = rows[going], x[going], y[going], t[going]
            if not len(rows):
                break
    return SparseCode(code, gap, gap <= target)


def duality_gap(
    z: Tensor, D: Tensor, c: Tensor, alpha: Tensor, tau: float, non_negative: bool = False
) -> Tensor:
    """Objective of codes minus a lower bound of the optimum, `[n]`; zero at the solution.

    The elastic net is a lasso on `[D, sqrt(l2) I]`, whose dual point is the scaled residual.

    Args:
        z: `[n, d_model]`.
        D: `[n_atoms, d_model]`.
        c: Codes `[n, n_atoms]`.
        alpha: `[n]`.
        tau: Share of the L1 penalty.
        non_negative: Whether codes are bound to be >= 0.
    """
    l1, l2 = alpha * tau, alpha * (1 - tau)
    residual = z - c @ D
    pull = residual @ D.T - l2[:, None] * c
    steepest = (pull if non_negative else pull.abs()).amax(-1)
    scale = torch.where(steepest > l1, l1 / steepest.clamp_min(1e-30), 1.0)
    square = residual.square().sum(-1) + l2 * c.square().sum(-1)
    primal = 0.5 * square + l1 * c.abs().sum(-1)
    dual = scale * (z * residual).sum(-1) - 0.5 * scale.square() * square
    return (primal - dual).clamp_min(0)


def largest_eigenvalue(D: Tensor) -> Tensor:
    """Of `D^T D`: the Lipschitz constant of the squared error's gradient."""
    wide = D.to(torch.promote_types(D.dtype, torch.float32))
    gram = wide.T @ wide if len(D) > D.shape[1] else wide @ wide.T
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values[-1].to(D.dtype)


def _prox_step(
    z: Tensor, D: Tensor, y: Tensor, l1: Tensor, l2: Tensor, top: Tensor, non_negative: bool
) -> Tensor:
    """A gradient step on the smooth part, then shrink towards zero."""
    size = 1 / (top + l2)
    moved = y + size * ((z - y @ D) @ D.T - l2 * y)
    if non_negative:
        return (moved - size * l1).relu()
    return moved - moved.clamp(-size * l1, size * l1)


def _momentum(x: Tensor, y: Tensor, t: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next point, look-ahead point and momentum; a row that overshot starts afresh."""
    overshot = ((y - new) * (new - x)).sum(-1, keepdim=True) > 0
    t = torch.where(overshot, 1.0, t)
    grown = (1 + (1 + 4 * t.square()).sqrt()) / 2
    return new, new + (t - 1) / grown * (new - x), grown
