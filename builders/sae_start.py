"""How an SAE starts: scale and centre of activations, decoder rows from the dictionary, the encoder's scale.

Reads the training tokens; writes nothing.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from builders.recipe import SaeConfig
from builders.sae_losses import Weights, code_of, geometric_median
from daco.errors import ActivationError, ModelMismatchError, RecipeError

SAMPLE = 16_384
"""Tokens, at most, from which a geometric median and principal components are taken."""
FIT_TOKENS = 2_048
"""Tokens, at most, on which the encoder's scale is fitted."""


class Tokens(Protocol):
    """Rows of activations; `builders.tokens.TokenShards` is one."""

    d_model: int

    def __len__(self) -> int: ...

    def rows(self, index: np.ndarray) -> Tensor:
        """The rows of these numbers, [n, d_model] float32."""

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All rows in order, [<= size, d_model] float32 at a time."""


def sample(tokens: Tokens, size: int, rng: np.random.Generator) -> Tensor:
    """At most `size` different tokens, drawn by rng, [n, d_model]."""
    n = min(size, len(tokens))
    return tokens.rows(np.sort(rng.choice(len(tokens), n, replace=False)))


def mean_and_scale(tokens: Tokens, block: int = 16_384) -> tuple[Tensor, float]:
    """Mean activation [d_model] and `sqrt(mean ||z - mean||^2 / d)`, in float64.

    Raises:
        ActivationError: there are no tokens, they are not finite, or all are the same.
    """
    if not len(tokens):
        raise ActivationError("expected training tokens, got none; lower sae.holdout or add stimuli")
    total = torch.zeros(tokens.d_model, dtype=torch.float64)
    for z in tokens.blocks(block):
        total += z.double().sum(0)
    mean = total / len(tokens)
    spread = sum(float((z.double() - mean).square().sum()) for z in tokens.blocks(block))
    scale = math.sqrt(spread / len(tokens) / tokens.d_model)
    if not math.isfinite(scale) or scale == 0:
        raise ActivationError(f"expected activations that differ and are finite, got a spread of {scale}")
    return mean, scale


def check_width(directions: Tensor, d_model: int) -> None:
    """Raise ModelMismatchError unless directions [n_concepts, d] are as wide as the activations."""
    if directions.shape[1] != d_model:
        raise ModelMismatchError(
            f"expected directions of width {d_model}, got {directions.shape[1]}; build them with this model"
        )


def check_atoms(n_atoms: int, n_concepts: int) -> None:
    """Raise RecipeError where the decoder has no row for every concept that it is to start as."""
    if n_concepts > n_atoms:
        raise RecipeError(
            f"sae.n_atoms: expected at least one atom a concept ({n_concepts}), got {n_atoms}; "
            "raise n_atoms or use start = 'random'"
        )


def unit_rows(directions: Tensor, d_model: int) -> Tensor:
    """Directions divided by their norms, [n_concepts, d_model] float32.

    Raises:
        ModelMismatchError: directions of another width.
        ActivationError: a direction is zero or not finite.
    """
    check_width(directions, d_model)
    norms = directions.double().norm(dim=1, keepdim=True)
    bad = (~torch.isfinite(norms) | (norms == 0)).flatten().nonzero().flatten().tolist()
    if bad:
        raise ActivationError(
            f"expected directions that are finite and not zero, got rows {bad[:5]} otherwise"
        )
    return (directions.double() / norms).float()


def start_weights(mean: Tensor, n_atoms: int, directions: Tensor | None, rng: np.random.Generator) -> Weights:
    """Decoder rows = unit directions, then random unit rows; the encoder is its transpose.

    Args:
        mean: [d_model], the centre of the activations, in the units that are trained on.
        n_atoms: m.
        directions: [n_concepts, d_model] raw, or None for a random start.
        rng: Draws the random rows.

    Raises:
        RecipeError: fewer atoms than concepts.
        ModelMismatchError, ActivationError: see `unit_rows`.

    Source: arXiv 2604.08846, section 3.2.
    """
    d_model = len(mean)
    rows = torch.empty(0, d_model) if directions is None else unit_rows(directions, d_model)
    check_atoms(n_atoms, len(rows))
    random = torch.from_numpy(rng.standard_normal((n_atoms - len(rows), d_model), dtype=np.float32))
    W_dec = torch.cat([rows, F.normalize(random, dim=1)])
    W_enc = W_dec.T.contiguous()
    return {"W_enc": W_enc, "b_enc": torch.zeros(n_atoms), "W_dec": W_dec, "b_dec": mean.float().clone()}


def started(
    train: Tokens, config: SaeConfig, directions: Tensor | None, rng: np.random.Generator
) -> tuple[Weights, float]:
    """The weights a training starts with, in scaled units, and the scale.

    Args:
        train: The training tokens.
        config: The recipe's section, its `n_atoms` filled in.
        directions: See `start_weights`.
        rng: Draws random rows and samples.

    Raises:
        RecipeError, ModelMismatchError, ActivationError: see `start_weights` and `mean_and_scale`.
    """
    centre, scale = mean_and_scale(train)
    if config.b_dec == "median":
        centre = geometric_median(sample(train, SAMPLE, np.random.default_rng(rng.integers(2**63))))
    weights = start_weights(centre / scale, config.n_atoms, directions, rng)
    if config.activation == "jumprelu":
        weights["log_threshold"] = torch.full((config.n_atoms,), math.log(config.threshold))
    if config.rest == "pca":
        add_components(
            weights, 0 if directions is None else len(directions), sample(train, SAMPLE, rng) / scale, config
        )
    if config.encoder_scale == "fit":
        weights["W_enc"] *= encoder_scale(sample(train, FIT_TOKENS, rng) / scale, weights, config)
    return weights, scale


def encoder_scale(x: Tensor, weights: Weights, config: SaeConfig) -> float:
    """The multiple of the encoder that makes the first reconstruction of `x` best, by least squares.

    Where directions share a part, each of the active atoms reads that part whole and writes it back, so that
    the first reconstruction is too long along it by up to the number of active atoms. With `b_enc = 0`, a
    scale of the encoder scales the reconstruction and changes no atom's firing under ReLU, TopK and
    BatchTopK; the best one is `<x - b_dec, r> / <r, r>` with `r = c W_dec`, and FVE is then never below zero.
    JumpReLU's thresholds are left alone, so for it this is a first guess.

    Args:
        x: [n, d_model], scaled.
        weights: A start, `b_enc` zero.
        config: Activation and k.

    Returns:
        A number above 0; 1 where nothing fires.
    """
    dot = square = 0.0
    for part in x.split(256):
        r = code_of(part, weights, config) @ weights["W_dec"]
        dot += float(((part - weights["b_dec"]) * r).sum())
        square += float(r.square().sum())
    return dot / square if dot > 0 and square > 0 else 1.0


def add_components(weights: Weights, n_concepts: int, x: Tensor, config: SaeConfig) -> None:
    """Replace random rows by the principal components of what the dictionary leaves over, both directions.

    What is left over is `x - b_dec - s c W_dec`, c the TopK code of the concepts alone and s their fitted
    scale; after a random start, all of `x - b_dec`.

    Args:
        weights: A start; its rows from `n_concepts` on are replaced, as many as there are components.
        n_concepts: Rows that stay.
        x: [n, d_model], scaled.
        config: Activation and k.
    """
    free = len(weights["W_dec"]) - n_concepts
    if not free:
        return
    left = x - weights["b_dec"]
    if n_concepts:
        left = left - _written(weights, n_concepts, x, config.k)
    left = (left - left.mean(0)).double()
    _, vectors = torch.linalg.eigh(left.T @ left)
    components = vectors.flip(1).T.float()  # largest first
    signed = torch.stack([components, -components], 1).flatten(0, 1)[:free]
    weights["W_dec"][n_concepts : n_concepts + len(signed)] = signed
    weights["W_enc"] = weights["W_dec"].T.contiguous()


def _written(weights: Weights, n_concepts: int, x: Tensor, k: int) -> Tensor:
    """What the first `n_concepts` rows alone write of `x`, with their fitted scale."""
    alone = {name: w[:n_concepts] for name, w in weights.items() if name in ("W_dec", "b_enc")}
    alone |= {"W_enc": weights["W_enc"][:, :n_concepts], "b_dec": weights["b_dec"]}
    topk = SaeConfig(k=min(k, n_concepts))
    scale = encoder_scale(x, alone, topk)
    return scale * torch.cat([code_of(part, alone, topk) @ alone["W_dec"] for part in x.split(256)])
