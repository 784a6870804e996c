"""How often names are right on held-out stimuli: concepts that a dictionary recognises, and atoms that fire.

Reads `activations/` (readings), `recognition/`, `sae/`, `atoms/` and `corpus/` (captions); writes nothing.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builders.directions import with_readings
from builders.recognition import (
    HELD,
    Readings,
    Said,
    Shown,
    corpus_columns,
    load_recogniser,
    reading_ids,
)
from builders.stages import Work
from builders.statistics import Interval, share
from builders.tokens import held_out, read_facts
from builders.train_sae import load_sae
from daco.dictionary import ConceptDictionary
from daco.recognition import Recogniser
from daco.sae import SAE
from daco.sae_files import layer_folder
from daco.tables import ATOMS, read_table


def recognised(one: Recogniser, z: Tensor) -> Tensor:
    """Which concepts `ConceptDictionary.recognise` names of readings [n, d], [n, n_concepts] bool."""
    return one.over(one.scores(z), one.distance(z)) >= 0


@torch.no_grad()
def fired(sae: SAE, names: Tensor, n_concepts: int, z: Tensor) -> Tensor:
    """Which concepts the atoms that fire at readings [n, d] are named after, [n, n_concepts] bool.

    Args:
        sae: For raw activations.
        names: [n_atoms], number of each atom's nearest concept.
        n_concepts: How many there are.
        z: [n, d], readings.
    """
    on = (sae.encode(z) > 0).float()
    return torch.zeros(len(z), n_concepts).index_add_(1, names, on) > 0


def precision_recall(counts: np.ndarray) -> dict[str, Any]:
    """Of names right, given and true of each stimulus [n, 3]: both figures with 95 % intervals."""
    right, given, true = counts.T
    return _with_intervals({"precision": share(right, given), "recall": share(right, true)})


def _with_intervals(figures: Mapping[str, Interval]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in figures.items():
        if np.isfinite(one.mean):  # nothing was named, or nothing was there to be: no figure
            found |= {name: one.mean, f"{name}_interval": [one.low, one.high]}
    return found


def names_figures(work: Work, dictionary: ConceptDictionary) -> dict[str, dict[str, Any]]:
    """Precision and recall of names at the reading token of held-out stimuli, held against their captions.

    Args:
        work: A stage that reads those above.
        dictionary: The run's.

    Returns:
        By layer: `n_stimuli`; `chance`, the share of all concepts that a caption names;
        `recognised_precision` and `recognised_recall` of what the dictionary recognises, where it does;
        `atoms_precision` and `atoms_recall` of the concepts nearest to the atoms that fire; each with its
        `_interval`. Empty without held-out stimuli.
    """
    source, folder = work.upstream("activations"), work.upstream("recognition")
    shards = with_readings(sorted((source / "shards").iterdir()))
    ids = reading_ids(shards)
    part = np.array([HELD if held_out(i, work.recipe.sae.holdout) else 0 for i in ids])
    said = Said(dictionary.concepts["concept"].tolist())
    (captions,) = corpus_columns(work.upstream("corpus"), ids, "caption")
    shown = Shown.of([said.of(caption) for caption in captions])
    if not (part == HELD).any():
        return {}
    known, found = json.loads((folder / "facts.json").read_text("utf-8"))["layers"], {}
    for position, layer in enumerate(read_facts(source)["layers"]):
        readings = Readings(shards, position, part)
        one = load_recogniser(folder, layer) if layer in known else None
        sae, names = _atoms(work, dictionary, layer)
        counted = list(_counts(readings, shown, one, sae, names, len(dictionary)))
        read, of_atoms = (np.concatenate(parts) for parts in zip(*counted, strict=True))
        figures = {"n_stimuli": len(read), "chance": float(read[:, 2].sum() / len(read) / len(dictionary))}
        for way, counts in {"atoms": of_atoms, **({"recognised": read} if one else {})}.items():
            figures |= {f"{way}_{name}": value for name, value in precision_recall(counts).items()}
        found[str(layer)] = figures
    return found


def _atoms(work: Work, dictionary: ConceptDictionary, layer: int) -> tuple[SAE, Tensor]:
    """The SAE of a layer, and the number of the concept that each of its atoms is named after."""
    table = read_table(work.upstream("atoms") / layer_folder(layer) / "atoms.parquet", ATOMS)
    number = {concept_id: i for i, concept_id in enumerate(dictionary.concepts["concept_id"])}
    names = [number[nearest[0]] for nearest in table.column("nearest_concept_ids").to_pylist()]
    return load_sae(work.upstream("sae") / layer_folder(layer)), torch.tensor(names)


def _counts(
    readings: Readings,
    shown: Shown,
    one: Recogniser | None,
    sae: SAE,
    names: Tensor,
    n_concepts: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Names right, given and true of held-out stimuli, [n, 3] both ways, a block at a time."""
    for rows, z in readings.of(HELD):
        true = shown.matrix(rows, n_concepts)
        given = recognised(one, z) if one else torch.zeros_like(true)
        both = (given, fired(sae, names, n_concepts, z.float()))
        yield tuple(torch.stack([(x & true).sum(1), x.sum(1), true.sum(1)], 1).numpy() for x in both)
