"""Directions of concepts: mean reading over positives minus mean reading over negatives, layer by layer.

Reads `stimuli/links.parquet`, `polarity/concepts.parquet` and `activations/`; writes
`directions/directions.safetensors` (raw, float32), `baseline.safetensors` (mean reading of negatives) and
`facts.json` (model, layers, R, numbers of links).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders.stages import Work
from builders.tokens import check_activations, median_norms, read_facts, read_ids
from daco.dictionary import ConceptDictionary
from daco.errors import ActivationError
from daco.manifest import canonical_json, write_atomic
from daco.sites import ModelFacts
from daco.tables import CONCEPTS, LINKS, read_table

CHUNK = 4_096
"""Links added up at a time."""


class Contrast(NamedTuple):
    """Directions and what they rest on."""

    directions: Tensor
    """[n_layers, n_concepts, d_model] float32, raw."""
    n_positive: list[int]
    """Positives read, a concept."""
    n_negative: list[int]
    """Negatives read, a concept."""
    baseline: Tensor
    """[n_layers, d_model] float32: mean reading of the negatives of all concepts, each link counting once."""


def contrast(
    concept_ids: Sequence[str], links: pd.DataFrame, ids: Sequence[str], blocks: Iterable[tuple[int, Tensor]]
) -> Contrast:
    """`d[l,c] = mean over positives of z_l - mean over negatives of z_l`, summed in float64.

    Args:
        concept_ids: The dictionary's concepts, in order.
        links: Columns concept_id, stimulus_id, role; stimuli without a reading are left out.
        ids: Stimulus of each reading.
        blocks: (number of the first reading, readings [n, n_layers, d_model]) until all are given, in order.

    Raises:
        ActivationError: a concept has no positive or no negative that was read, or its direction is zero or
            not finite.

    Source: arXiv 2604.08846, contrastive reading (DESIGN section 4.2).
    """
    concept, reading, weight, counts = _weights(concept_ids, links, ids)
    uses = torch.bincount(reading[weight < 0], minlength=len(ids)).double()
    total = negatives = torch.empty(0)
    for start, z in blocks:
        if not len(total):
            total = torch.zeros(len(concept_ids), *z.shape[1:], dtype=torch.float64)
            negatives = torch.zeros(z.shape[1:], dtype=torch.float64)
        negatives += torch.einsum("n,nld->ld", uses[start : start + len(z)], z.double())
        here = ((reading >= start) & (reading < start + len(z))).nonzero().flatten()
        for part in here.split(CHUNK):
            rows = z[reading[part] - start].double() * weight[part, None, None]
            total.index_add_(0, concept[part], rows)
    directions = total.float().transpose(0, 1).contiguous()
    _check_directions(directions, concept_ids)
    return Contrast(directions, *counts, (negatives / uses.sum()).float())


def _weights(
    concept_ids: Sequence[str], links: pd.DataFrame, ids: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, tuple[list[int], list[int]]]:
    """Concept, reading and weight (+1/n of a positive, -1/n of a negative) of usable links; n by concept."""
    concept = links["concept_id"].map({c: i for i, c in enumerate(concept_ids)})
    reading = links["stimulus_id"].map({s: i for i, s in enumerate(ids)})
    usable = (concept.notna() & reading.notna()).to_numpy()
    c = torch.tensor(concept[usable].to_numpy(dtype="int64"))
    r = torch.tensor(reading[usable].to_numpy(dtype="int64"))
    positive = torch.tensor((links["role"][usable] == "positive").to_numpy(dtype=bool))
    n_positive = torch.bincount(c[positive], minlength=len(concept_ids))
    n_negative = torch.bincount(c[~positive], minlength=len(concept_ids))
    empty = ((n_positive == 0) | (n_negative == 0)).nonzero().flatten().tolist()
    if empty or not len(concept_ids):
        raise ActivationError(
            f"expected positives and negatives that were read for every concept, got none for {len(empty)} "
            f"of {len(concept_ids)}: {[concept_ids[i] for i in empty[:5]]}; check the images or drop these"
        )
    weight = torch.where(positive, 1 / n_positive[c].double(), -1 / n_negative[c].double())
    return c, r, weight, (n_positive.tolist(), n_negative.tolist())


def _check_directions(directions: Tensor, concept_ids: Sequence[str]) -> None:
    norms = directions.norm(dim=-1)
    bad = (~torch.isfinite(norms) | (norms == 0)).any(0).nonzero().flatten().tolist()
    if bad:
        raise ActivationError(
            f"expected directions that are finite and not zero, got otherwise for {len(bad)} concepts: "
            f"{[concept_ids[i] for i in bad[:5]]}; are their positives and negatives the same stimuli?"
        )


def readings(shards: Sequence[Path]) -> Iterator[tuple[int, Tensor]]:
    """Readings of the activations stage, a shard at a time, as `contrast` takes them."""
    start = 0
    for shard in shards:
        z = load_file(shard / "readings.safetensors")["readings"]
        yield start, z
        start += len(z)


def with_readings(shards: Sequence[Path]) -> list[Path]:
    """The shards of stimuli; those of prompts with answers hold tokens alone."""
    return [shard for shard in shards if (shard / "readings.safetensors").is_file()]


def load_dictionary(polarity: Path, directions: Path) -> ConceptDictionary:
    """The dictionary of a run, from the folders of two finished stages."""
    facts = json.loads((directions / "facts.json").read_text("utf-8"))
    tensors, baseline = (load_file(directions / f"{name}.safetensors") for name in ("directions", "baseline"))
    return ConceptDictionary(
        concepts=read_table(polarity / "concepts.parquet", CONCEPTS).to_pandas(),
        vectors={layer: tensors[f"layer_{layer}"] for layer in facts["layers"]},
        model=ModelFacts(**facts["model"]),
        R={int(layer): R for layer, R in facts["R"].items()},
        baseline={layer: baseline[f"layer_{layer}"] for layer in facts["layers"]},
    )


check_upstream = check_activations


def run(work: Work) -> None:
    """The stage: one pass over the shards of readings."""
    source = work.upstream("activations")
    facts = read_facts(source)
    shards = sorted((source / "shards").iterdir())
    table = read_table(work.upstream("polarity") / "concepts.parquet", CONCEPTS)
    concepts = table.column("concept_id").to_pylist()
    links = read_table(work.upstream("stimuli") / "links.parquet", LINKS)
    frame = links.select(["concept_id", "stimulus_id", "role"]).to_pandas()
    read = with_readings(shards)
    found = contrast(
        concepts, frame, read_ids(read), work.progress(readings(read), total=len(read), unit="shard")
    )
    layers = facts["layers"]
    tensors = {f"layer_{layer}": found.directions[i].clone() for i, layer in enumerate(layers)}
    baseline = {f"layer_{layer}": found.baseline[i].clone() for i, layer in enumerate(layers)}
    for name, saved in (("directions", tensors), ("baseline", baseline)):
        partial = work.folder / f".{name}.partial"
        save_file(saved, partial)
        partial.replace(work.folder / f"{name}.safetensors")
    R = median_norms(shards, len(layers), work.recipe.sae.holdout)
    written = {
        "model": facts["model"],
        "layers": layers,
        "R": {str(layer): value for layer, value in zip(layers, R, strict=True)},
        "n_positive": found.n_positive,
        "n_negative": found.n_negative,
    }
    write_atomic(work.folder / "facts.json", canonical_json(written))
    used = sum(found.n_positive) + sum(found.n_negative)
    work.finish({"in": len(frame), "out": used, "skipped": {"not_read": len(frame) - used}})
