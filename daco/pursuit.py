"""Orthogonal matching pursuit, batched: the greedy codes of a few atoms; tensors in, tensors out."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK = 256
"""Rows coded at a time, which bounds the room their chosen atoms take."""


@torch.no_grad()
def matching_pursuit(z: Tensor, D: Tensor, k: int, *, gram: Tensor | None = None) -> Tensor:
    """Codes of at most k atoms: again and again the atom that fits the residual best, then least squares.

    A row that its atoms explain to within rounding takes no more.

    Args:
        z: `[n, d_model]`.
        D: `[n_atoms, d_model]`, rows of norm 1.
        k: Atoms at most, 1 to `n_atoms`.
        gram: `D D^T` where there is room for it: steps after the first then need not read the dictionary.

    Returns:
        `[n, n_atoms]`.

    Source: Pati et al. 1993; with a Gram matrix Rubinstein et al. 2008 (batch OMP).
    """
    dtype = torch.promote_types(D.dtype, torch.float32)
    wide, D, gram = z.to(dtype), D.to(dtype), None if gram is None else gram.to(dtype)
    code = z.new_zeros(len(z), len(D))
    for start in range(0, len(z), CHUNK):
        part = slice(start, start + CHUNK)
        code[part] = _pursue(wide[part], D, k, gram).to(z.dtype)
    return code


def _pursue(z: Tensor, D: Tensor, k: int, gram: Tensor | None) -> Tensor:
    start = pull = z @ D.T
    chosen = torch.empty(len(z), 0, dtype=torch.long, device=z.device)
    going = torch.empty(len(z), 0, dtype=torch.bool, device=z.device)
    c = z.new_empty(len(z), 0)
    least = 8 * torch.finfo(z.dtype).eps * z.norm(dim=-1)
    for _ in range(k):
        free = pull.abs().scatter(1, chosen, -1)
        best, atom = free.max(-1)
        chosen = torch.cat([chosen, atom[:, None]], 1)
        going = torch.cat([going, (best > least)[:, None]], 1)
        c = _least_squares(D, start, chosen, going, gram)
        if gram is None:
            pull = (z - embedding_bag(chosen, D, per_sample_weights=c, mode="sum")) @ D.T
        else:
            pull = start - embedding_bag(chosen, gram, per_sample_weights=c, mode="sum")
    return torch.zeros_like(start).scatter_(1, chosen, c)


def _least_squares(D: Tensor, start: Tensor, chosen: Tensor, going: Tensor, gram: Tensor | None) -> Tensor:
    """Coefficients `[n, j]` of chosen atoms; of those that came when all was explained already, 0."""
    if gram is None:
        rows = D[chosen]
        G = rows @ rows.mT
    else:
        G = gram[chosen[:, :, None], chosen[:, None, :]]
    pairs = going[:, :, None] & going[:, None, :]
    G = torch.where(pairs, G, torch.eye(G.shape[-1], dtype=G.dtype, device=G.device))
    right = torch.where(going, start.gather(1, chosen), 0)[:, :, None]
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(G).L).squeeze(-1)
