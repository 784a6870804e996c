"""Train one sparse autoencoder a layer on the token activations, started from the dictionary of concepts.

Reads `activations/shards/*/tokens.safetensors` and `directions/directions.safetensors`; writes
`sae/layers.<L>/sae_weights.safetensors`, `training.parquet` and `facts.json`. The losses are in
`builders.sae_losses`, the fast step in `builders.sae_step`, the start in `builders.sae_start`, the tokens of
each step in `builders.sae_batches`, an SAE with its optimiser and checkpoints in `builders.sae_training`.
"""

import argparse
import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders.recipe import SaeConfig, check_k, load_recipe
from builders.sae_batches import batch_index, batches, is_first
from builders.sae_metrics import (
    Agreement,
    Drift,
    Measured,
    agreement,
    calibrated_threshold,
    drift,
    fve_interval,
    measure,
)
from builders.sae_start import Tokens, check_atoms, check_width, started, unit_rows
from builders.sae_training import Training
from builders.stages import Work, writing
from builders.tokens import TokenShards, read_facts
from daco.errors import ActivationError, RecipeError
from daco.manifest import canonical_json, write_atomic
from daco.sae import SAE
from daco.tables import table_of, write_table

TRAINING = pa.schema(
    [
        ("step", pa.int32()),
        ("tokens_seen", pa.int64()),
        ("loss", pa.float64()),
        ("fve", pa.float64()),
        ("l0", pa.float64()),
        ("dead", pa.int32()),
        ("tokens", pa.int64()),
        ("dense", pa.int32()),
        ("fve_image", pa.float64()),
        ("fve_prompt", pa.float64()),
        ("fve_caption", pa.float64()),
        ("fve_generated", pa.float64()),
        ("own", pa.int32()),
        ("drift_cos", pa.float64()),
    ]
)
"""One row per measurement: loss of the step's batch; fields of `Measured` and `Drift` on `tokens` held-out
tokens, `own` and `drift_cos` null after a random start."""


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

    Under torchrun (with `torch.distributed` set up) every process takes its share of each batch.

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
        ModelMismatchError, ActivationError: see `builders.sae_start` and `Training.step`.
    """
    training = resume or _started(train, held_out, config, directions, seed, layer, device)
    steps = range(training.steps_done, config.steps)
    coming = batches(train, config, seed, layer, steps, device)
    for step in progress(steps):
        loss = training.step(next(coming))
        if (step + 1) % config.eval_steps == 0 or step + 1 == config.steps:
            training.check_finite()
            _record(training, held_out, float(loss))
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
    rng = np.random.default_rng([seed, layer, config.steps + 1])  # a stream that no batch uses
    weights, scale = started(train, dataclasses.replace(config, n_atoms=n_atoms), directions, rng)
    concepts = None if directions is None else unit_rows(directions, train.d_model).to(device)
    training = Training({name: w.to(device) for name, w in weights.items()}, scale, config, concepts)
    first = train.rows(batch_index(seed, layer, 0, config.batch, len(train))).to(device)
    _record(training, held_out, float(training.loss(first)))
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
    device = training.parameters["b_enc"].device
    weights = {name: w.to(device) for name, w in training.exported().items()}
    found: dict[str, Any] = measure(held_out, weights, config, limit)._asdict()
    found |= dict.fromkeys(Drift._fields)
    if training.concepts is not None:
        found |= drift(weights["W_dec"], training.concepts)._asdict()
    training.records.append({"step": step, "tokens_seen": step * config.batch, "loss": loss, **found})


def load_sae(folder: Path) -> SAE:
    """The SAE of a finished layer, `sae/layers.<L>`."""
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    weights = load_file(folder / "sae_weights.safetensors")
    return SAE(**weights, activation=facts["activation"], k=facts["k"]).requires_grad_(False)


def check_upstream(work: Work) -> None:
    """What would fail at once, before an earlier run's SAEs and checkpoints are discarded for it.

    Raises:
        RecipeError: k or the number of atoms is out of range.
        ModelMismatchError: the dictionary is of another width than the activations.
        ActivationError: there are no tokens to train on, or none to measure on.
    """
    config = work.recipe.sae
    shards = sorted((work.upstream("activations") / "shards").iterdir())
    train, held_out = token_split(shards, 0, config.holdout)
    for side, tokens, way in (("training", train, "lower"), ("held-out", held_out, "raise")):
        if not len(tokens):
            raise ActivationError(f"expected {side} tokens, got none; {way} sae.holdout or add stimuli")
    for raw in load_file(work.upstream("directions") / "directions.safetensors").values():
        check_width(raw, train.d_model)
        n_atoms = config.n_atoms or default_atoms(len(raw))
        check_k(config, n_atoms)
        check_atoms(n_atoms, len(raw) if config.start == "dictionary" else 0)


def run(work: Work) -> None:
    """The stage: one SAE for each layer of the recipe, resumed from its last checkpoint.

    Raises:
        DiskError: what is learnt cannot be written; running again goes on from the last checkpoint.
    """
    facts = read_facts(work.upstream("activations"))
    shards = sorted((work.upstream("activations") / "shards").iterdir())
    dictionary = load_file(work.upstream("directions") / "directions.safetensors")
    counts: dict[str, Any] = {"in": 0, "out": 0, "skipped": {}}
    for layer in facts["layers"]:
        train, held_out = token_split(shards, facts["layers"].index(layer), work.recipe.sae.holdout)
        if not (work.folder / f"layers.{layer}" / "facts.json").is_file():
            _train_layer(work, layer, train, held_out, dictionary[f"layer_{layer}"])
        for finished in _checkpoints(work, layer) if is_first() else []:
            shutil.rmtree(finished)
        counts["in"], counts["out"] = len(train) + len(held_out), len(train)
    counts["skipped"] = {"held_out": counts["in"] - counts["out"]}
    if is_first():
        work.drop_shards()
        work.finish(counts)


def token_split(shards: Sequence[Path], position: int, holdout: float) -> tuple[TokenShards, TokenShards]:
    """Training and held-out tokens of the layer at this position of the shards."""
    return TokenShards(shards, position, holdout, False), TokenShards(shards, position, holdout, True)


def _train_layer(work: Work, layer: int, train: TokenShards, held_out: TokenShards, raw: Tensor) -> None:
    n_atoms = work.recipe.sae.n_atoms or default_atoms(len(raw))
    config = dataclasses.replace(work.recipe.sae, n_atoms=n_atoms)
    # with its number: safetensors takes a bare "cuda" for the first GPU, whichever this process of many has
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    kept = _checkpoints(work, layer)
    directions = raw if config.start == "dictionary" else None
    concepts = None if directions is None else unit_rows(directions, train.d_model).to(device)

    def checkpoint(training: Training) -> None:
        if not is_first():
            return
        name = f"layer-{layer}-step-{training.steps_done:08d}"
        with writing(f"checkpoint {name}"), work.shard(name) as folder:
            training.save(folder)
            write_table(folder / "training.parquet", table_of(training.records, TRAINING))
        for old in _checkpoints(work, layer)[:-1]:
            shutil.rmtree(old)

    training = train_sae(
        train,
        held_out,
        config,
        directions=directions,
        seed=work.seed,
        layer=layer,
        resume=Training.load(kept[-1], config, device, concepts) if kept else None,
        checkpoint=checkpoint,
        progress=lambda steps: work.progress(steps, unit="step"),
        device=device,
    )
    if is_first():
        form = jump_form(training, train, held_out)
        weights = {name: w.to(device) for name, w in training.exported().items()}
        spread = fve_interval(held_out, weights, config)
        with writing(f"the weights of layer {layer}"):
            _write_layer(work.folder / f"layers.{layer}", training, layer, len(train), form, spread)


def _checkpoints(work: Work, layer: int) -> list[Path]:
    return [path for path in work.shards() if path.name.startswith(f"layer-{layer}-step-")]


def jump_form(training: Training, train: Tokens, held_out: Tokens) -> Agreement | None:
    """The threshold of a TopK's or BatchTopK's JumpReLU form, and how it compares; None for the other two.

    TopK's is calibrated on training tokens so that k atoms a token are active on average; BatchTopK's is the
    mean of the smallest kept value of the last batches.
    """
    config, weights = training.config, training.exported()
    if config.activation == "topk":
        threshold = calibrated_threshold(train, weights, config.k)
    elif config.activation == "batchtopk":
        threshold = float(weights["threshold"][0])
    else:
        return None
    return agreement(held_out, weights, config, threshold)


def threshold_form(facts: Mapping[str, Any]) -> dict[str, float]:
    """What a release says of the JumpReLU form, by `facts.json` of a layer; empty for ReLU and JumpReLU.

    Of a TopK its threshold and how both forms agree; a BatchTopK is released in that form, with its threshold
    for all atoms, so that the agreement is left to say.
    """
    if "agreement" not in facts:
        return {}
    threshold = {"jumprelu_threshold": facts["threshold"]} if facts["activation"] == "topk" else {}
    return threshold | {"jumprelu_agreement": facts["agreement"]}


RELEASED_AS = {"batchtopk": "jumprelu"}
"""Activations that are released as another."""


def _write_layer(
    folder: Path,
    training: Training,
    layer: int,
    n_tokens: int,
    form: Agreement | None,
    spread: tuple[float, float],
) -> None:
    """Weights, measurements, and last the facts, which mean that the layer is complete."""
    folder.mkdir(exist_ok=True)
    weights, config, last = training.exported(), training.config, training.records[-1]
    partial = folder / ".sae_weights.partial"
    save_file(weights, partial)
    partial.replace(folder / "sae_weights.safetensors")
    write_table(folder / "training.parquet", table_of(training.records, TRAINING))
    facts = {
        "layer": layer,
        "activation": RELEASED_AS.get(config.activation, config.activation),
        "trained_as": config.activation,
        "selected_in": training.compute.encoder.dtype,
        "k": config.k if config.activation == "topk" else None,
        "start": config.start,
        "d_model": weights["W_dec"].shape[1],
        "n_atoms": weights["W_dec"].shape[0],
        "scale": training.scale,
        "n_train_tokens": n_tokens,
        "fve_at_start": training.records[0]["fve"],
        "fve_interval": list(spread),
    }
    facts |= {key: last[key] for key in (*Measured._fields, *Drift._fields)}
    facts |= form._asdict() if form else {}
    write_atomic(folder / "facts.json", canonical_json(facts))


def main() -> None:
    """`torchrun --nproc-per-node N -m builders.train_sae RECIPE --out RUN`: the stage on N processes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="run folder, the stages before this done")
    parser.add_argument("--set", action="append", default=[], help="section.field=value")
    arguments = parser.parse_args()
    from builders.pipeline import STAGES, open_stage  # which knows this stage

    recipe = load_recipe(arguments.recipe, arguments.set)
    with in_a_group():
        torch.set_num_threads(recipe.run.threads)
        stage = next(stage for stage in STAGES if stage.name == "sae")
        with FileLock(arguments.out / ".lock", timeout=0) if is_first() else nullcontext():
            to_do = [is_first() and open_stage(stage, recipe, arguments.out) is not None]
            dist.broadcast_object_list(to_do)
            if to_do[0]:
                run(Work(recipe, arguments.out, "sae"))
            dist.barrier()


@contextmanager
def in_a_group() -> Iterator[None]:
    """The processes of a torchrun work together inside the block, each on a GPU of its own if there are any.

    Functions of `torch.distributed.nn` keep the group that there is when they are imported, as an optimiser
    does. The group's threads would then outlive it and, every so often, abort a process that ends; imported
    beforehand the functions keep none.
    """
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    yield
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
