"""Train one sparse autoencoder a layer on the token activations, started from the dictionary of concepts.

Reads `activations/shards/*/tokens.safetensors` and `directions/directions.safetensors`; writes
`sae/layers.<L>/sae_weights.safetensors`, `training.parquet` and `facts.json`.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders.recipe import SaeConfig, check_k
from builders.stages import Work
from builders.tokens import TokenShards, read_facts
from daco.errors import ActivationError, ModelMismatchError, RecipeError
from daco.manifest import canonical_json, write_atomic
from daco.sae import SAE
from daco.tables import table_of, write_table

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises linearly."""

TRAINING = pa.schema(
    [
        ("step", pa.int32()),
        ("tokens_seen", pa.int64()),
        ("loss", pa.float64()),
        ("fve", pa.float64()),
        ("l0", pa.float64()),
        ("dead", pa.int32()),
        ("tokens", pa.int64()),
    ]
)
"""One row per measurement: loss of the step's batch; FVE, L0 and dead atoms on `tokens` held-out tokens."""

Weights = dict[str, Tensor]
"""W_enc [d, m], b_enc [m], W_dec [m, d], b_dec [d]."""


class Tokens(Protocol):
    """Rows of activations; `builders.activations.TokenShards` is one."""

    d_model: int

    def __len__(self) -> int: ...

    def rows(self, index: np.ndarray) -> Tensor:
        """The rows of these numbers, [n, d_model] float32."""

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All rows in order, [<= size, d_model] float32 at a time."""


class Code(NamedTuple):
    """Active atoms of a batch."""

    values: Tensor
    """[batch, k] (TopK) or [batch, m] (ReLU), float32."""
    atoms: Tensor | None
    """[batch, k] atom of each value; None: value i is atom i's."""


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


def encode(x: Tensor, weights: Mapping[str, Tensor], activation: str, k: int) -> Code:
    """Code of activations: ReLU, and for `topk` the k largest.

    Args:
        x: [batch, d_model].
        weights: See `Weights`.
        activation: `relu` or `topk`.
        k: Active atoms of `topk`.
    """
    active = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    return Code(active, None) if activation == "relu" else Code(*active.topk(k, dim=-1))


def decode(code: Code, weights: Mapping[str, Tensor]) -> Tensor:
    """Reconstruction of a code, [batch, d_model]; TopK reads only the k rows that are active."""
    if code.atoms is None:
        return code.values @ weights["W_dec"] + weights["b_dec"]
    summed = F.embedding_bag(code.atoms, weights["W_dec"], per_sample_weights=code.values, mode="sum")
    return summed + weights["b_dec"]


def loss_of(x: Tensor, weights: Mapping[str, Tensor], activation: str, k: int, l1: float) -> Tensor:
    """`mean ||x - x^||^2`, for ReLU plus `l1 * mean sum_i c_i ||W_dec[i]||`.

    Args:
        x: [batch, d_model], centred and scaled as the weights expect.
        weights: See `Weights`.
        activation: `relu` or `topk`.
        k: Active atoms of `topk`.
        l1: lambda of `relu`; `topk` has no penalty.

    Returns:
        A scalar.
    """
    code = encode(x, weights, activation, k)
    squared = (x - decode(code, weights)).square().sum(-1)
    if code.atoms is not None:
        return squared.mean()
    return (squared + l1 * code.values @ weights["W_dec"].norm(dim=1)).mean()


def start_weights(mean: Tensor, n_atoms: int, directions: Tensor | None, rng: np.random.Generator) -> Weights:
    """Decoder rows = unit directions, then random unit rows; the encoder is its transpose.

    Args:
        mean: [d_model], the mean activation, in the units that are trained on.
        n_atoms: m.
        directions: [n_concepts, d_model] raw, or None for a random start.
        rng: Draws the random rows.

    Raises:
        RecipeError: fewer atoms than concepts.
        ModelMismatchError: directions of another width.
        ActivationError: a direction is zero or not finite.
    """
    d_model = len(mean)
    rows = torch.empty(0, d_model) if directions is None else unit_rows(directions, d_model)
    if len(rows) > n_atoms:
        raise RecipeError(
            f"sae.n_atoms: expected at least one atom a concept ({len(rows)}), got {n_atoms}; "
            "raise n_atoms or use start = 'random'"
        )
    random = torch.from_numpy(rng.standard_normal((n_atoms - len(rows), d_model), dtype=np.float32))
    W_dec = torch.cat([rows, F.normalize(random, dim=1)])
    W_enc = W_dec.T.contiguous()
    return {"W_enc": W_enc, "b_enc": torch.zeros(n_atoms), "W_dec": W_dec, "b_dec": mean.float().clone()}


def unit_rows(directions: Tensor, d_model: int) -> Tensor:
    """Directions divided by their norms; see `start_weights` for what it raises."""
    if directions.shape[1] != d_model:
        raise ModelMismatchError(
            f"expected directions of width {d_model}, got {directions.shape[1]}; build them with this model"
        )
    norms = directions.double().norm(dim=1, keepdim=True)
    bad = (~torch.isfinite(norms) | (norms == 0)).flatten().nonzero().flatten().tolist()
    if bad:
        raise ActivationError(
            f"expected directions that are finite and not zero, got rows {bad[:5]} otherwise"
        )
    return (directions.double() / norms).float()


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


def exported(weights: Mapping[str, Tensor], scale: float) -> Weights:
    """Weights for raw activations: the input scale is folded into the biases, the other two stay."""
    folded = {"b_enc": weights["b_enc"] * scale, "b_dec": weights["b_dec"] * scale}
    return {name: (folded.get(name, w)).detach().cpu().contiguous() for name, w in weights.items()}


@torch.no_grad()
def measure(
    tokens: Tokens, weights: Mapping[str, Tensor], activation: str, k: int, limit: int = 0, block: int = 4_096
) -> Measured:
    """FVE, L0 and dead atoms of exported weights on (the first `limit`) held-out tokens.

    Args:
        tokens: Held-out rows.
        weights: For raw activations; see `exported`.
        activation: `relu` or `topk`.
        k: Active atoms of `topk`.
        limit: Read at most this many tokens; 0 = all.
        block: Tokens at a time; part of what fixes the last digits.

    Raises:
        ActivationError: there are no tokens, or all are the same.
    """
    device = weights["W_dec"].device
    total = squares = residual = active = 0.0
    sums = torch.zeros(tokens.d_model, dtype=torch.float64, device=device)
    fired = torch.zeros(len(weights["W_dec"]), dtype=torch.bool, device=device)
    for z in _first(tokens, limit, block):
        z = z.to(device)
        code = encode(z, weights, activation, k)
        residual += float((z - decode(code, weights)).double().square().sum())
        sums, squares = sums + z.double().sum(0), squares + float(z.double().square().sum())
        on = code.values > 0
        active, total = active + float(on.sum()), total + len(z)
        fired |= (
            on.any(0) if code.atoms is None else torch.zeros_like(fired).index_fill(0, code.atoms[on], True)
        )
    return Measured(_fve(residual, squares, sums, total), active / total, int((~fired).sum()), int(total))


def _first(tokens: Tokens, limit: int, block: int) -> Iterator[Tensor]:
    left = limit or len(tokens)
    for z in tokens.blocks(block):
        if left <= 0:
            return
        yield z[:left]
        left -= len(z)


def _fve(residual: float, squares: float, sums: Tensor, total: float) -> float:
    if not total:
        raise ActivationError("expected held-out tokens, got none; raise sae.holdout or add stimuli")
    spread = squares - float(sums.square().sum()) / total
    if not spread > 0:
        raise ActivationError(f"expected held-out activations that differ, got a spread of {spread}")
    return 1 - residual / spread


class Training:
    """One SAE in training: weights, Adam, and the step it is at.

    Args:
        weights: The start, in scaled units; see `start_weights`.
        scale: Activations are divided by it.
        config: The recipe's section.
    """

    def __init__(self, weights: Weights, scale: float, config: SaeConfig) -> None:
        self.weights = {name: torch.nn.Parameter(w.clone()) for name, w in sorted(weights.items())}
        self.scale, self.config, self.steps_done = scale, config, 0
        self.records: list[dict[str, Any]] = []
        self.adam = torch.optim.Adam(self.weights.values(), lr=config.learning_rate)

    def step(self, z: Tensor) -> float:
        """One step of Adam on raw activations [batch, d_model]; returns the loss.

        Raises:
            ActivationError: the loss is no longer finite; the weights are left as they were.
        """
        loss = self.loss(z)
        value = float(loss.detach())
        self.check_finite(math.isfinite(value))
        self.adam.zero_grad()
        loss.backward()
        W_dec = self.weights["W_dec"]
        assert W_dec.grad is not None
        with torch.no_grad():  # rows stay on the unit sphere: drop the radial part, then renormalise
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        self.adam.param_groups[0]["lr"] = learning_rate(self.steps_done, self.config)
        self.adam.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.steps_done += 1
        return value

    def check_finite(self, finite: bool | None = None) -> None:
        """Raise ActivationError unless all weights (or what was looked at) are finite."""
        if finite is None:
            finite = all(bool(w.isfinite().all()) for w in self.weights.values())
        if not finite:
            raise ActivationError(
                f"expected finite numbers, got NaN or infinity after step {self.steps_done}; lower "
                "sae.learning_rate or look for outliers in the activations; the last good checkpoint is kept"
            )

    def loss(self, z: Tensor) -> Tensor:
        """Loss of raw activations [batch, d_model], a scalar."""
        c = self.config
        return loss_of(z / self.scale, self.weights, c.activation, c.k, c.l1)

    def exported(self) -> Weights:
        """The weights as they stand, for raw activations."""
        return exported(self.weights, self.scale)

    def save(self, folder: Path) -> None:
        """Write weights, Adam's moments and the measurements so far; raises as `check_finite` does."""
        self.check_finite()
        tensors = {name: w.detach().contiguous() for name, w in self.weights.items()}
        for name, w in self.weights.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.adam.state[w][moment].contiguous()
        save_file(tensors, folder / "training.safetensors")
        facts = {"steps_done": self.steps_done, "scale": self.scale, "records": self.records}
        write_atomic(folder / "training.json", canonical_json(facts))

    @classmethod
    def load(cls, folder: Path, config: SaeConfig, device: str = "cpu") -> "Training":
        """Continue from what `save` wrote, bit for bit."""
        tensors = load_file(folder / "training.safetensors", device=device)
        facts = json.loads((folder / "training.json").read_text("utf-8"))
        names = ("W_dec", "W_enc", "b_dec", "b_enc")
        training = cls({name: tensors[name] for name in names}, facts["scale"], config)
        training.steps_done, training.records = facts["steps_done"], facts["records"]
        for name, w in training.weights.items():
            training.adam.state[w] = {
                "step": torch.tensor(float(training.steps_done)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
        return training


def learning_rate(step: int, config: SaeConfig) -> float:
    """Learning rate of a 0-based step: a linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, round(WARM_UP * config.steps)))


def batch_index(seed: int, layer: int, step: int, size: int, n_tokens: int) -> np.ndarray:
    """Numbers of a batch's tokens, with replacement; of (seed, layer, step) alone, hence resumable."""
    return np.random.default_rng([seed, layer, step]).integers(n_tokens, size=size)


def train_sae(
    train: Tokens,
    held_out: Tokens,
    config: SaeConfig,
    *,
    directions: Tensor | None = None,
    seed: int = 0,
    layer: int = 0,
    resume: Training | None = None,
    checkpoint: Callable[[Training], None] = lambda training: None,
    progress: Callable[[range], Any] = lambda steps: steps,
    device: str = "cpu",
) -> Training:
    """Train one SAE to the end of `config.steps`.

    Args:
        train: Tokens to train on.
        held_out: Tokens to measure on.
        config: The recipe's section.
        directions: [n_concepts, d_model] raw, for the dictionary start; None: random.
        seed: With `layer` and the step, draws every batch.
        layer: The layer these tokens are of.
        resume: Continue this training instead of starting.
        checkpoint: Called every `checkpoint_steps`.
        progress: Wraps the range of steps.
        device: Where to train.

    Returns:
        The finished training; `.exported()` are its weights, `.records` its measurements.

    Raises:
        RecipeError: k or the number of atoms is out of range.
        ModelMismatchError, ActivationError: see `start_weights`, `mean_and_scale` and `Training.step`.
    """
    training = resume or _started(train, held_out, config, directions, seed, layer, device)
    for step in progress(range(training.steps_done, config.steps)):
        loss = training.step(train.rows(batch_index(seed, layer, step, config.batch, len(train))).to(device))
        if (step + 1) % config.eval_steps == 0 or step + 1 == config.steps:
            _record(training, held_out, loss)
        if (step + 1) % config.checkpoint_steps == 0 and step + 1 < config.steps:
            checkpoint(training)
    training.check_finite()
    return training


def _started(
    train: Tokens,
    held_out: Tokens,
    config: SaeConfig,
    directions: Tensor | None,
    seed: int,
    layer: int,
    device: str,
) -> Training:
    n_atoms = config.n_atoms or default_atoms(0 if directions is None else len(directions))
    check_k(config, n_atoms)
    mean, scale = mean_and_scale(train)
    rng = np.random.default_rng([seed, layer, config.steps + 1])  # a stream that no batch uses
    weights = start_weights(mean / scale, n_atoms, directions, rng)
    training = Training({name: w.to(device) for name, w in weights.items()}, scale, config)
    first = train.rows(batch_index(seed, layer, 0, config.batch, len(train))).to(device)
    _record(training, held_out, float(training.loss(first).detach()))
    return training


def default_atoms(n_concepts: int) -> int:
    """As many atoms as concepts, rounded up to a multiple of 8.

    Raises:
        RecipeError: there is no dictionary to take the number from.
    """
    if not n_concepts:
        raise RecipeError("sae.n_atoms: expected a number of atoms for a random start, got 0")
    return -(-n_concepts // 8) * 8


def _record(training: Training, held_out: Tokens, loss: float) -> None:
    config, step = training.config, training.steps_done
    limit = 0 if step == config.steps else config.eval_tokens
    weights = exported(training.weights, training.scale)
    measured = measure(held_out, weights, config.activation, config.k, limit)
    training.records.append(
        {"step": step, "tokens_seen": step * config.batch, "loss": loss, **measured._asdict()}
    )


def load_sae(folder: Path) -> SAE:
    """The SAE of a finished layer, `sae/layers.<L>`."""
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    weights = load_file(folder / "sae_weights.safetensors")
    return SAE(**weights, activation=facts["activation"], k=facts["k"]).requires_grad_(False)


def run(work: Work) -> None:
    """The stage: one SAE for each layer of the recipe, resumed from its last checkpoint."""
    facts = read_facts(work.upstream("activations"))
    shards = sorted((work.upstream("activations") / "shards").iterdir())
    dictionary = load_file(work.upstream("directions") / "directions.safetensors")
    counts: dict[str, Any] = {"in": 0, "out": 0, "skipped": {}}
    for layer in facts["layers"]:
        train, held_out = token_split(shards, facts["layers"].index(layer), work.recipe.sae.holdout)
        if not (work.folder / f"layers.{layer}" / "facts.json").is_file():
            _train_layer(work, layer, train, held_out, dictionary[f"layer_{layer}"])
        for finished in _checkpoints(work, layer):
            shutil.rmtree(finished)
        counts["in"], counts["out"] = len(train) + len(held_out), len(train)
    counts["skipped"] = {"held_out": counts["in"] - counts["out"]}
    work.drop_shards()
    work.finish(counts)


def token_split(shards: Sequence[Path], position: int, holdout: float) -> tuple[TokenShards, TokenShards]:
    """Training and held-out tokens of the layer at this position of the shards."""
    return TokenShards(shards, position, holdout, False), TokenShards(shards, position, holdout, True)


def _train_layer(work: Work, layer: int, train: TokenShards, held_out: TokenShards, raw: Tensor) -> None:
    n_atoms = work.recipe.sae.n_atoms or default_atoms(len(raw))
    config = dataclasses.replace(work.recipe.sae, n_atoms=n_atoms)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept = _checkpoints(work, layer)

    def checkpoint(training: Training) -> None:
        with work.shard(f"layer-{layer}-step-{training.steps_done:08d}") as folder:
            training.save(folder)
        for old in _checkpoints(work, layer)[:-1]:
            shutil.rmtree(old)

    training = train_sae(
        train,
        held_out,
        config,
        directions=raw if config.start == "dictionary" else None,
        seed=work.seed,
        layer=layer,
        resume=Training.load(kept[-1], config, device) if kept else None,
        checkpoint=checkpoint,
        progress=lambda steps: work.progress(steps, unit="step"),
        device=device,
    )
    _write_layer(work.folder / f"layers.{layer}", training, layer, len(train))


def _checkpoints(work: Work, layer: int) -> list[Path]:
    return [path for path in work.shards() if path.name.startswith(f"layer-{layer}-step-")]


def _write_layer(folder: Path, training: Training, layer: int, n_tokens: int) -> None:
    """Weights, measurements, and last the facts, which mean that the layer is complete."""
    folder.mkdir(exist_ok=True)
    weights, config, last = training.exported(), training.config, training.records[-1]
    partial = folder / ".sae_weights.partial"
    save_file(weights, partial)
    partial.replace(folder / "sae_weights.safetensors")
    write_table(folder / "training.parquet", table_of(training.records, TRAINING))
    facts = {
        "layer": layer,
        "activation": config.activation,
        "k": config.k if config.activation == "topk" else None,
        "start": config.start,
        "d_model": weights["W_dec"].shape[1],
        "n_atoms": weights["W_dec"].shape[0],
        "scale": training.scale,
        "n_train_tokens": n_tokens,
        "fve_at_start": training.records[0]["fve"],
    }
    write_atomic(folder / "facts.json", canonical_json(facts | {key: last[key] for key in Measured._fields}))
