"""What held-out tokens say of an SAE: variance explained, active and dead atoms, drift, its JumpReLU form.

Reads held-out tokens; writes nothing. All weights here are exported ones, for raw activations. What the model
itself loses is in `builders.splice`.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from builders.recipe import SaeConfig
from builders.sae_start import Tokens
from builders.sae_step import Code, Encoder, batch_top_k_code, code_above, decoded, top_k_code
from builders.statistics import ratio
from builders.tokens import MODALITIES, TokenShards
from daco.errors import ActivationError

DENSE = 0.1
"""An atom that fires at more than this share of the tokens is dense."""


class Measured(NamedTuple):
    """What held-out tokens say of an SAE."""

    fve: float
    """Fraction of variance explained, relative to the held-out tokens' own mean."""
    l0: float
    """Mean number of active atoms a token."""
    dead: int
    """Atoms that never fired."""
    tokens: int
    """Held-out tokens measured."""
    dense: int
    """Atoms that fired at more than a tenth of the tokens."""
    fve_image: float | None
    """FVE of image tokens alone, relative to their mean; None: no such tokens, or it was not kept which."""
    fve_prompt: float | None
    """Likewise of prompt text."""
    fve_caption: float | None
    """Likewise of the caption."""
    fve_generated: float | None
    """Likewise of generated text."""


class _Sums:
    """Running sums over tokens from which an FVE follows."""

    def __init__(self, d_model: int, device: torch.device) -> None:
        self.total, self.squares, self.residual = 0, 0.0, 0.0
        self.sums = torch.zeros(d_model, dtype=torch.float64, device=device)

    def add(self, z: Tensor, left: Tensor) -> None:
        self.total += len(z)
        self.sums += z.double().sum(0)
        self.squares += float(z.double().square().sum())
        self.residual += float(left.double().square().sum())

    @property
    def spread(self) -> float:
        return self.squares - float(self.sums.square().sum()) / max(1, self.total)

    @property
    def fve(self) -> float | None:
        return 1 - self.residual / self.spread if self.total and self.spread > 0 else None


def encode(
    z: Tensor, weights: Mapping[str, Tensor], config: SaeConfig, encoder: Encoder | None = None
) -> Code:
    """The code of raw activations [batch, d_model]; for BatchTopK that of this batch.

    Args:
        z: Raw activations.
        weights: Exported ones.
        config: Activation and k.
        encoder: Of these weights, where there are many batches; made here otherwise.
    """
    encoder = encoder or exact_encoder(weights)
    centred = z - weights["b_dec"]
    if config.activation == "topk":
        return top_k_code(centred, encoder, config.k)
    if config.activation == "batchtopk":
        return batch_top_k_code(centred, encoder, config.k, 0.5 * float(weights["threshold"].min()))
    return code_above(centred, encoder, weights["threshold"] if config.activation == "jumprelu" else 0.0)


def exact_encoder(weights: Mapping[str, Tensor]) -> Encoder:
    """The float32 encoder of exported weights."""
    return Encoder(weights["W_enc"].T.contiguous(), weights["b_enc"])


@torch.no_grad()
def measure(
    tokens: Tokens, weights: Mapping[str, Tensor], config: SaeConfig, limit: int = 0, block: int = 4_096
) -> Measured:
    """FVE, L0, dead and dense atoms of exported weights on (the first `limit`) held-out tokens.

    Args:
        tokens: Held-out rows; where they have a `modality` [n], FVE is told apart by it.
        weights: For raw activations.
        config: Activation and k.
        limit: Read at most this many tokens; 0 = all.
        block: Tokens at a time; part of what fixes the last digits.

    Raises:
        ActivationError: there are no tokens, or all are the same.
    """
    device, encoder = weights["W_dec"].device, exact_encoder(weights)
    overall, parts = _Sums(tokens.d_model, device), [_Sums(tokens.d_model, device) for _ in MODALITIES]
    fired = torch.zeros(len(weights["W_dec"]), dtype=torch.int64, device=device)
    modality, first = getattr(tokens, "modality", None), 0
    for z in first_blocks(tokens, limit, block):
        z = z.to(device)
        code = encode(z, weights, config, encoder)
        left = z - decoded(code, weights["W_dec"]) - weights["b_dec"]
        overall.add(z, left)
        fired += torch.bincount(code.atoms[code.values > 0], minlength=len(fired))
        if modality is not None:
            kind = modality[first : first + len(z)].to(device)
            for number, part in enumerate(parts):
                part.add(z[kind == number], left[kind == number])
        first += len(z)
    return _measured(overall, parts, fired)


def _measured(overall: _Sums, parts: list[_Sums], fired: Tensor) -> Measured:
    if not overall.total:
        raise ActivationError("expected held-out tokens, got none; raise sae.holdout or add stimuli")
    if overall.fve is None:
        raise ActivationError(f"expected held-out activations that differ, got a spread of {overall.spread}")
    total, by_modality = overall.total, {f"fve_{n}": p.fve for n, p in zip(MODALITIES, parts, strict=True)}
    return Measured(
        fve=overall.fve,
        l0=float(fired.sum()) / total,
        dead=int((fired == 0).sum()),
        tokens=total,
        dense=int((fired > DENSE * total).sum()),
        **by_modality,
    )


@torch.no_grad()
def fve_interval(
    tokens: TokenShards, weights: Mapping[str, Tensor], config: SaeConfig, block: int = 4_096
) -> tuple[float, float]:
    """95 % interval of the FVE of exported weights over pictures, whose tokens are alike and stay together.

    Args:
        tokens: Held-out rows, about whose mean variance is counted.
        weights: For raw activations.
        config: Activation and k.
        block: Tokens at a time.
    """
    device, encoder = weights["W_dec"].device, exact_encoder(weights)
    mean = torch.zeros(tokens.d_model, dtype=torch.float64, device=device)
    for z in tokens.blocks(block):
        mean += z.to(device).double().sum(0) / len(tokens)
    n_pictures, first = int(tokens.pictures.max()) + 1, 0
    left, spread = np.zeros(n_pictures), np.zeros(n_pictures)
    for z in tokens.blocks(block):
        z = z.to(device)
        code = encode(z, weights, config, encoder)
        missed = (z - decoded(code, weights["W_dec"]) - weights["b_dec"]).double().square().sum(1)
        about = (z.double() - mean).square().sum(1)
        stimulus = np.searchsorted(tokens.ends, first + np.arange(len(z)), side="right")
        np.add.at(left, tokens.pictures[stimulus], missed.cpu().numpy())
        np.add.at(spread, tokens.pictures[stimulus], about.cpu().numpy())
        first += len(z)
    found = ratio(left, spread)
    return 1 - found.high, 1 - found.low


def first_blocks(tokens: Tokens, limit: int, block: int) -> Iterator[Tensor]:
    """The first `limit` tokens (0 = all), some at a time."""
    left = limit or len(tokens)
    for z in tokens.blocks(block):
        if left <= 0:
            return
        yield z[:left]
        left -= len(z)


class Drift(NamedTuple):
    """How far atoms went from the concepts they started as."""

    own: int
    """Atoms whose nearest concept is the one they started as."""
    drift_cos: float
    """Mean cosine to it."""


@torch.no_grad()
def drift(W_dec: Tensor, concepts: Tensor, block: int = 1_024) -> Drift:
    """Compare atoms with the concepts they started as.

    Args:
        W_dec: [m, d_model].
        concepts: [n <= m, d_model], unit; atom i started as concept i.
        block: Atoms at a time.
    """
    own, total = 0, 0.0
    for start, rows in zip(range(0, len(concepts), block), W_dec[: len(concepts)].split(block), strict=True):
        cosines = F.normalize(rows, dim=1) @ concepts.T
        number = torch.arange(start, start + len(rows), device=rows.device)
        own += int((cosines.argmax(1) == number).sum())
        total += float(cosines.gather(1, number[:, None]).double().sum())
    return Drift(own, total / len(concepts))


@torch.no_grad()
def calibrated_threshold(
    tokens: Tokens, weights: Mapping[str, Tensor], k: int, limit: int = 16_384, block: int = 1_024
) -> float:
    """The threshold above which k atoms a token fire on average: that of a TopK's JumpReLU form.

    Args:
        tokens: Training tokens.
        weights: For raw activations.
        k: Active atoms of the TopK.
        limit: Tokens read, at most, evenly spread.
        block: Tokens at a time.
    """
    encoder, kept = exact_encoder(weights), []
    step = max(1, len(tokens) // limit)
    for z in tokens.blocks(block * step):
        code = top_k_code(
            z[::step].to(encoder.W_enc.device) - weights["b_dec"], encoder, min(4 * k, len(weights["b_enc"]))
        )
        kept.append(code.values)
    values = torch.cat(kept)
    tokens_read = len(values) // min(4 * k, len(weights["b_enc"]))
    return float(values.topk(k * tokens_read).values[-1].clamp_min(1e-12))


class Agreement(NamedTuple):
    """How the JumpReLU form of an SAE compares with its exact form, on held-out tokens."""

    threshold: float
    """Of all atoms."""
    agreement: float
    """Jaccard index of the active (token, atom) pairs of both forms."""
    threshold_l0: float
    """Active atoms a token of the JumpReLU form."""
    threshold_fve: float
    """Its FVE."""


@torch.no_grad()
def agreement(
    tokens: Tokens,
    weights: Mapping[str, Tensor],
    config: SaeConfig,
    threshold: float,
    limit: int = 16_384,
    block: int = 1_024,
) -> Agreement:
    """Compare a TopK or BatchTopK with its JumpReLU form of one threshold; arguments as `measure`'s."""
    both = either = 0
    sums = _Sums(tokens.d_model, weights["W_dec"].device)
    encoder, m, active = exact_encoder(weights), len(weights["b_enc"]), 0
    for z in first_blocks(tokens, limit, block):
        z = z.to(weights["W_dec"].device)
        exact = pairs(encode(z, weights, config, encoder), m)
        jump = code_above(z - weights["b_dec"], encoder, threshold)
        sums.add(z, z - decoded(jump, weights["W_dec"]) - weights["b_dec"])
        shared = int(torch.isin(pairs(jump, m), exact).sum())
        both, either = both + shared, either + len(exact) + len(jump.values) - shared
        active += len(jump.values)
    return Agreement(threshold, both / max(1, either), active / max(1, sums.total), sums.fve or 0.0)


def pairs(code: Code, m: int) -> Tensor:
    """`token * m + atom` of every atom that fires."""
    token = torch.repeat_interleave(code.starts.diff(), output_size=len(code.atoms))
    return (token * m + code.atoms)[code.values > 0]
