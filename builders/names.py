"""How often the names of atoms that fire are right on held-out stimuli.

Reads `activations/` (readings), `sae/`, `atoms/` and `corpus/` (captions); writes nothing. The stage
`recognition` measures what is recognised, likewise; the release has both side by side.
"""

from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builders.directions import with_readings
from builders.recognition import HELD, Readings, Said, Shown, corpus_columns, tally
from builders.stages import Work
from builders.statistics import by_cluster, precision_recall
from builders.tokens import held_out, read_facts, read_ids, read_sides
from builders.train_sae import load_sae
from daco.dictionary import ConceptDictionary
from daco.sae import SAE
from daco.sae_files import layer_folder
from daco.tables import ATOMS, read_table


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


def names_figures(work: Work, dictionary: ConceptDictionary) -> dict[str, dict[str, Any]]:
    """Precision and recall of names at the reading token of held-out stimuli, held against their captions.

    Args:
        work: A stage that reads those above.
        dictionary: The run's.

    Returns:
        By layer: `n_stimuli` and `n_pictures`; `chance`, the share of all concepts that a caption names;
        `atoms_precision` and `atoms_recall` of the concepts nearest to the atoms that fire, each with its
        `_interval` over pictures. Empty without held-out stimuli.
    """
    source, n_concepts, found = work.upstream("activations"), len(dictionary), {}
    shards = with_readings(sorted((source / "shards").iterdir()))
    ids, holdout = read_ids(shards), work.recipe.sae.holdout
    sides = read_sides(shards)
    part = np.array([HELD if held_out(side, holdout) else 0 for side in sides])
    pictures = list(compress(sides, part == HELD))
    if not pictures:
        return {}
    said = Said(dictionary.concepts["concept"].tolist())
    (captions,) = corpus_columns(work.upstream("corpus"), ids, "caption")
    shown = Shown.of([said.of(caption) for caption in captions])
    for position, layer in enumerate(read_facts(source)["layers"]):
        readings = Readings(shards, position, part)
        sae, names = _atoms(work, dictionary, layer)
        counted = [
            tally(fired(sae, names, n_concepts, z.float()), shown.matrix(rows, n_concepts))
            for rows, z in readings.of(HELD)
        ]
        counts = np.concatenate(counted)
        chance, sums = float(counts[:, 2].sum() / len(counts) / n_concepts), by_cluster(counts, pictures)
        figures = {f"atoms_{name}": value for name, value in precision_recall(sums).items()}
        found[str(layer)] = {"n_stimuli": len(counts), "n_pictures": len(sums), "chance": chance} | figures
    return found


def _atoms(work: Work, dictionary: ConceptDictionary, layer: int) -> tuple[SAE, Tensor]:
    """The SAE of a layer, and the number of the concept that each of its atoms is named after."""
    table = read_table(work.upstream("atoms") / layer_folder(layer) / "atoms.parquet", ATOMS)
    number = {concept_id: i for i, concept_id in enumerate(dictionary.concepts["concept_id"])}
    names = [number[nearest[0]] for nearest in table.column("nearest_concept_ids").to_pylist()]
    return load_sae(work.upstream("sae") / layer_folder(layer)), torch.tensor(names)
