"""Which tokens of a shard the SAEs see: the wanted kinds, no norm outliers, a few of each stimulus.

Reads and writes nothing. What is an outlier depends on all shards so far: each keeps how often its norms
occur, and these counts add up to a running median, however the run was interrupted.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from builders.tokens import MODALITIES

_STEPS = 16
"""Bins of norms to a factor of two: a median read from them is off by 2.2 % at most."""
_LOWEST, _HIGHEST = -16, 32
"""Powers of two between which norms are told apart."""


def norms_of(z: Tensor) -> Tensor:
    """Lengths of activations [..., d_model], float32 at least: short floats are widened as they are read."""
    return torch.linalg.vector_norm(z, dim=-1, dtype=torch.promote_types(z.dtype, torch.float32))


def norm_counts(norms: Tensor) -> Tensor:
    """How often norms [t, n_layers] occur, [n_layers, bins] int32; counts of shards may be added up."""
    bins = (_HIGHEST - _LOWEST) * _STEPS
    place = ((norms.double().log2() - _LOWEST) * _STEPS).floor().clamp(0, bins - 1).long()
    return torch.stack([torch.bincount(column, minlength=bins) for column in place.T]).int()


def median_of(counts: Tensor) -> Tensor:
    """The median norm of each layer, [n_layers], from counts [n_layers, bins]; of no norms, zero."""
    total = counts.long().cumsum(1)
    half = (total[:, -1:] + 1) // 2
    place = (total < half).sum(1)
    middle = 2.0 ** ((place + 0.5) / _STEPS + _LOWEST)
    return torch.where(total[:, -1] > 0, middle, 0.0).float()


def keep_tokens(
    ids: Sequence[str],
    tokens: Sequence[Tensor],
    max_norm: float,
    at_most: int = 0,
    seed: int = 0,
    modality: Sequence[Tensor] | None = None,
    *,
    wanted: Sequence[str] = MODALITIES,
    before: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Choose the tokens that a shard keeps.

    Args:
        ids: One a stimulus.
        tokens: One a stimulus, [tokens, n_layers, d_model].
        max_norm: A token goes where, at any layer, its norm is over this multiple of the running median.
        at_most: Tokens kept a stimulus; 0 = all.
        seed: With the stimulus's id, draws them.
        modality: One a stimulus: [tokens] uint8, numbers in `MODALITIES`.
        wanted: Kinds of tokens that are kept, where `modality` tells them apart.
        before: Sum of `norm_counts` of the shards before this one; None: the median is this shard's own.
        norms: Of the tokens, one a stimulus, [tokens, n_layers] float32; None: they are found here.

    Returns:
        `tokens` [t, n_layers, d_model] in the order of stimuli, `norms` [t, n_layers] float32, `n_tokens`
        [stimuli], `norm_counts` of the wanted tokens and, where given, `modality` [t]; and how many were left
        out, by reason.
    """
    chosen = _of_kind(tokens, modality, wanted)
    norms = norms or [norms_of(z) for z in tokens]
    counts = norm_counts(torch.cat([n[rows] for n, rows in zip(norms, chosen, strict=True)]))
    limit = max_norm * median_of(counts if before is None else counts + before)
    inside = [rows[(n[rows] <= limit).all(-1)] for n, rows in zip(norms, chosen, strict=True)]
    kept = [_draw(rows, at_most, seed, i) for i, rows in zip(ids, inside, strict=True)]
    of_all, of_kind, of_inside, of_kept = (sum(map(len, rows)) for rows in (tokens, chosen, inside, kept))
    left_out = Counter(norm_outlier=of_kind - of_inside, not_drawn=of_inside - of_kept)
    if of_all > of_kind:
        left_out["not_wanted"] = of_all - of_kind
    tensors = {
        "tokens": torch.cat([z[rows] for z, rows in zip(tokens, kept, strict=True)]),
        "norms": torch.cat([n[rows] for n, rows in zip(norms, kept, strict=True)]),
        "n_tokens": torch.tensor([len(rows) for rows in kept]),
        "norm_counts": counts,
    }
    if modality is not None:
        tensors["modality"] = torch.cat([kind[rows] for kind, rows in zip(modality, kept, strict=True)])
    return tensors, left_out


def _of_kind(
    tokens: Sequence[Tensor], modality: Sequence[Tensor] | None, wanted: Sequence[str]
) -> list[Tensor]:
    """Rows of the wanted kinds, a tensor a stimulus."""
    if modality is None:
        return [torch.arange(len(z)) for z in tokens]
    numbers = torch.tensor([MODALITIES.index(name) for name in wanted], dtype=torch.uint8)
    return [torch.isin(kind, numbers).nonzero().flatten() for kind in modality]


def _draw(rows: Tensor, at_most: int, seed: int, stimulus_id: str) -> Tensor:
    if not at_most or len(rows) <= at_most:
        return rows
    digest = hashlib.sha256(f"tokens\0{seed}\0{stimulus_id}".encode()).digest()
    chosen = np.random.default_rng(int.from_bytes(digest, "big")).choice(len(rows), at_most, replace=False)
    return rows[torch.from_numpy(np.sort(chosen))]
