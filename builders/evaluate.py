"""Measure what was built: how well the SAEs reconstruct, how links were retrieved, what steering does.

Reads `sae/`, `atoms/`, `activations/`, `directions/`, `polarity/`, `stimuli/`, `corpus/`, `tune/` and the
model; writes `evaluate/evaluation.json`, where every figure comes with the number of things measured.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from builders.activations import Stimulus, linked_stimuli, open_mllm
from builders.attention import without_plans
from builders.corpus import open_image
from builders.directions import load_dictionary, with_readings
from builders.mllm import chat_inputs
from builders.names import names_figures
from builders.splice import Spliced, answered, recovered, splice
from builders.stages import Work
from builders.statistics import by_cluster, ratio, share
from builders.steering import load_steering, release_setting
from builders.tokens import check_activations, held_ids
from builders.train_sae import load_sae
from daco.capture import capture
from daco.dictionary import ConceptDictionary
from daco.errors import ActivationError
from daco.manifest import canonical_json, write_atomic
from daco.methods import MOP, ActAdd, Method, SAESteering
from daco.report import Report
from daco.sae_files import layer_folder
from daco.steering import steer
from daco.steering_sae import SteeringSAE
from daco.tables import LINKS, read_table

N_TOP = 5
"""Atoms named as those that fired most."""


class Forward(NamedTuple):
    """What one forward of a batch leaves."""

    z: Tensor
    """[positions, n_layers, d_model]: the stream after each steered layer, without padding."""
    logits: Tensor
    """[batch, vocabulary]: of the token that follows the prompt."""


@torch.no_grad()
@without_plans()
def forward(model: Any, inputs: Any, layers: Sequence[int]) -> Forward:
    """Forward a batch as it stands, steered or not.

    Args:
        model: The MLLM.
        inputs: Of `builders.mllm.chat_inputs`.
        layers: Layers whose output is kept.
    """
    with capture(model, layers) as captured:
        logits = captured.run(**inputs, logits_to_keep=1).logits[:, -1]
    z = torch.stack([captured.activations[layer] for layer in layers], dim=2)
    return Forward(z[inputs["attention_mask"].bool()].float(), logits)


def effect(plain: Forward, steered: Forward) -> dict[str, float]:
    """Sums over a batch of how far a steered forward is from the plain one.

    Args:
        plain: Without steering.
        steered: The same batch with it.

    Returns:
        `stimuli`, `positions`; `changed`, positions whose stream differs at any layer; `relative_change`, the
        sum of ||z' - z|| / ||z|| after the last layer; `kl`, the sum of KL(plain || steered) of the next
        token in nats; `next_token_changed`, stimuli whose likeliest next token is another.
    """
    moved = (steered.z[:, -1] - plain.z[:, -1]).double().norm(dim=-1) / plain.z[:, -1].double().norm(dim=-1)
    p, q = (f.logits.double().log_softmax(-1) for f in (plain, steered))
    return {
        "stimuli": len(plain.logits),
        "positions": len(plain.z),
        "changed": int((steered.z != plain.z).flatten(1).any(1).sum()),
        "relative_change": float(moved.sum()),
        "kl": float((p.exp() * (p - q)).sum()),
        "next_token_changed": int((p.argmax(-1) != q.argmax(-1)).sum()),
    }


def each(plain: Forward, steered: Forward) -> dict[str, list[float]]:
    """Those figures of a steered forward that are one a stimulus: `kl` and `next_token_changed`."""
    p, q = (f.logits.double().log_softmax(-1) for f in (plain, steered))
    changed = p.argmax(-1) != q.argmax(-1)
    return {"kl": (p.exp() * (p - q)).sum(-1).tolist(), "next_token_changed": changed.double().tolist()}


def intervals(batches: Sequence[Mapping[str, Sequence[float]]], pictures: Sequence[str]) -> dict[str, Any]:
    """95 % intervals of the means of `each` over pictures, whose captions stay together.

    Args:
        batches: `each` of all batches.
        pictures: Picture of every stimulus, in their order.

    Returns:
        `n_pictures`, and by figure, `_interval` behind its name, low and high.
    """
    columns = [[x for batch in batches for x in batch[name]] for name in ("kl", "next_token_changed")]
    kl, changed, n = by_cluster(np.stack([*columns, np.ones(len(columns[0]))], 1), pictures).T
    found = {"kl": ratio(kl, n), "next_token_changed": share(changed, n)}
    return {"n_pictures": len(n)} | {f"{name}_interval": [x.low, x.high] for name, x in found.items()}


def averaged(sums: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Figures from the sums of batches: a mean a position or a stimulus, and how many there were of each."""
    total: Counter[str] = Counter()
    for batch in sums:
        total.update(batch)
    positions, stimuli = total["positions"], total["stimuli"]
    return {
        "n_stimuli": stimuli,
        "n_positions": positions,
        "changed": total["changed"] / positions,
        "relative_change": total["relative_change"] / positions,
        "kl": total["kl"] / stimuli,
        "next_token_changed": total["next_token_changed"] / stimuli,
    }


def check_finite(figures: Mapping[str, float], method: str) -> None:
    """Raise ActivationError where a figure is NaN or infinite."""
    bad = [name for name, value in figures.items() if not np.isfinite(value)]
    if bad:
        raise ActivationError(
            f"{method}: expected finite figures, got {bad[0]} = {figures[bad[0]]}; lower its strength"
        )


def retrieval(links: Path) -> dict[str, dict[str, float]]:
    """Median similarities and distance of positives and of negatives, with their numbers."""
    frame = read_table(links, LINKS).to_pandas()
    columns = ["sim_image", "sim_text", "dist"]
    found = {}
    for role, rows in frame.groupby("role"):
        medians = {f"median_{name}": float(rows[name].median()) for name in columns}
        found[str(role)] = {"n_links": len(rows), "n_concepts": int(rows["concept_id"].nunique()), **medians}
    return found


def evaluate_batch(
    model: Any, inputs: Any, layers: Sequence[int], methods: Mapping[str, Method], scope: str = "all"
) -> dict[str, dict[str, Any]]:
    """What every method, and no steering at all, does to one batch.

    Args:
        model: The MLLM.
        inputs: Of `builders.mllm.chat_inputs`.
        layers: The steered layers.
        methods: By name, what `daco.steer` takes.
        scope: Positions that are steered.

    Returns:
        By name: `sums` (see `effect`), `each`, `method` (its settings) and `fired` (see `fired`).

    Raises:
        ActivationError: after all methods the model without steering is not, bit for bit, what it was before.
    """
    plain = forward(model, inputs, layers)
    found = {}
    for name, method in methods.items():
        with steer(model, method, scope=scope, on_empty="pass", base_model_ok=True) as run:
            steered = forward(model, inputs, layers)
            found[name] = {"sums": effect(plain, steered), "each": each(plain, steered)}
            found[name] |= {"method": str(method), "fired": fired(run.report())}
    again = forward(model, inputs, layers)
    if not all(torch.equal(before, after) for before, after in zip(plain, again, strict=True)):
        raise ActivationError("expected no trace of steering, got other logits than before; is a hook left?")
    same = {"sums": effect(plain, again), "each": each(plain, again)}
    return {"none": same | {"method": "no steering", "fired": {}}} | found


def steering_methods(steering: SteeringSAE, dictionary: ConceptDictionary) -> dict[str, Method]:
    """The methods that are compared, by their defaults; one that has nothing to steer is an exact no-op."""
    return {
        "actadd": ActAdd(dictionary, on_empty="pass"),
        "mop": MOP(dictionary, on_empty="pass"),
        "daco": SAESteering(steering, on_empty="pass"),
    }


def fired(report: Report) -> dict[str, int]:
    """Positions at which each undesirable atom (or concept) was removed, by "layer/atom nearest concept"."""
    return {
        f"{layer.layer}/{atom.atom} {atom.names[0] if atom.names else ''}".strip(): atom.positions
        for layer in report.layers
        for atom in layer.atoms
    }


def by_turns(stimuli: Sequence[Stimulus]) -> list[Stimulus]:
    """Every picture once before any comes again, else as they stand: few of them are as many pictures."""
    seen: Counter[str] = Counter()
    turns = []
    for stimulus in stimuli:
        turns.append((seen[stimulus.picture], stimulus))
        seen[stimulus.picture] += 1
    return [stimulus for _, stimulus in sorted(turns, key=lambda turn: turn[0])]


check_upstream = check_activations


def run(work: Work) -> None:
    """The stage: a shard a batch of held-out stimuli, all methods on each."""
    dictionary = load_dictionary(work.upstream("polarity"), work.upstream("directions"))
    apart = held_ids(
        with_readings(sorted((work.upstream("activations") / "shards").iterdir())), work.recipe.sae.holdout
    )
    linked = linked_stimuli(work.upstream("corpus"), work.upstream("stimuli") / "links.parquet")
    held = [stimulus for stimulus in linked if stimulus.stimulus_id in apart]
    stimuli = by_turns(held)[: work.recipe.evaluate.items]
    if not stimuli:
        raise ActivationError("expected held-out stimuli, got none; raise sae.holdout or evaluate.items")
    _measure_batches(work, dictionary, stimuli)
    evaluation = {
        "suites": {},
        "sae": _sae_figures(work.upstream("sae"), dictionary.layers, work.shards()),
        "names": names_figures(work, dictionary),
        "retrieval": retrieval(work.upstream("stimuli") / "links.parquet"),
        "steering": _steering_figures(work.shards(), [stimulus.picture for stimulus in stimuli]),
    }
    write_atomic(work.folder / "evaluation.json", canonical_json(evaluation))
    work.drop_shards()
    skipped = {"over_limit": len(held) - len(stimuli)}
    work.finish({"in": len(held), "out": len(stimuli), "skipped": skipped})


def _measure_batches(work: Work, dictionary: ConceptDictionary, stimuli: Sequence[Stimulus]) -> None:
    setting = release_setting(work.out, work.recipe, dictionary.layers)
    steering = load_steering(setting, work.upstream("sae"), work.upstream("atoms"), dictionary)
    methods = steering_methods(steering, dictionary)
    model, processor = open_mllm(work.recipe.model, work.upstream("activations"))
    saes = {
        layer: load_sae(work.upstream("sae") / layer_folder(layer)).to(model.device)
        for layer in dictionary.layers
        if work.recipe.evaluate.splice_items
    }
    size = work.recipe.evaluate.batch
    for start in work.progress(range(0, len(stimuli), size), unit="batch"):
        name = f"{start // size:05d}"
        if work.has(name):
            continue
        with work.shard(name) as folder:
            batch = stimuli[start : start + size]
            images = [open_image(s.file) for s in batch]
            inputs = chat_inputs(processor, [s.caption for s in batch], images).to(model.device)
            figures = evaluate_batch(model, inputs, dictionary.layers, methods, setting.scope)
            write_atomic(folder / "figures.json", canonical_json(figures))
            if start < work.recipe.evaluate.splice_items:
                spliced = splice(model, *answered(model, processor, inputs), saes)
                write_atomic(folder / "spliced.json", canonical_json(spliced))


def _sae_figures(folder: Path, layers: Sequence[int], shards: Sequence[Path]) -> dict[str, Any]:
    """What the training measured at its end, on all held-out tokens, and what splicing the SAEs in costs."""
    parts = [json.loads(p.read_text("utf-8")) for s in shards if (p := s / "spliced.json").is_file()]
    found = {}
    for layer in layers:
        facts = json.loads((folder / layer_folder(layer) / "facts.json").read_text("utf-8"))
        figures = {key: facts[key] for key in ("fve", "fve_interval", "fve_at_start", "l0", "dead")}
        found[str(layer)] = {"n_tokens": facts["tokens"], **figures}
        if parts:
            found[str(layer)] |= recovered(Spliced(*part[str(layer)]) for part in parts)
    return found


def _steering_figures(shards: Sequence[Path], pictures: Sequence[str]) -> dict[str, Any]:
    """Figures of every method over all batches, whose stimuli have these pictures."""
    batches = [json.loads((shard / "figures.json").read_text("utf-8")) for shard in shards]
    found = {}
    for name in batches[0]:
        figures = averaged(batch[name]["sums"] for batch in batches)
        check_finite(figures, name)
        figures |= intervals([batch[name]["each"] for batch in batches], pictures)
        counts = sum((Counter(batch[name]["fired"]) for batch in batches), Counter[str]())
        most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:N_TOP]
        found[name] = {"method": batches[0][name]["method"], **figures, "n_fired": len(counts)}
        found[name]["fired_most"] = [f"{atom}: {count}" for atom, count in most]
    return found
