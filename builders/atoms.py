"""Label and name the atoms of the SAEs: cosines to the two centroids, nearest concepts, firing rate.

Reads `sae/`, `directions/`, `polarity/` and held-out tokens of `activations/`; writes
`atoms/layers.<L>/atoms.parquet` and `facts.json`.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from builders.directions import load_dictionary
from builders.stages import Work
from builders.tokens import TokenShards
from builders.train_sae import load_sae, token_split
from daco.dictionary import ConceptDictionary
from daco.errors import ActivationError, RecipeError
from daco.manifest import canonical_json, write_atomic
from daco.sae import SAE, labels_of
from daco.tables import ATOMS, read_table, write_table

BLOCK = 1_024
"""Atoms or tokens at a time; part of what fixes the last digits."""


def atoms_table(
    W_dec: Tensor,
    dictionary: ConceptDictionary,
    layer: int,
    firing_rate: Tensor,
    *,
    eta: float = 0.3,
    n_nearest: int = 5,
) -> pa.Table:
    """What is known of each atom of a layer.

    Args:
        W_dec: [n_atoms, d_model]; rows need not be unit.
        dictionary: The concepts that name the atoms.
        layer: The layer of the dictionary to compare with.
        firing_rate: [n_atoms], share of held-out tokens at which the atom is active.
        eta: Cosine threshold of labels.
        n_nearest: Nearest concepts kept, by cosine.

    Returns:
        A table of `daco.tables.ATOMS`. The cosine to the centroid of a polarity that no concept has is 0.

    Raises:
        RecipeError: eta is not in (0, 1].
        UnknownLayerError: the dictionary does not have that layer.

    Source: arXiv 2604.08846, Eq. 9.
    """
    if not 0 < eta <= 1:
        raise RecipeError(f"atoms.eta: expected a cosine in (0, 1], got {eta}")
    rows = F.normalize(W_dec, dim=1)
    undesirable, desirable = (
        (rows @ dictionary.centroid(layer, polarity)).numpy() for polarity in ("undesirable", "desirable")
    )
    cosines, index = nearest(rows, dictionary.unit(layer), n_nearest)
    concepts = dictionary.concepts[["concept_id", "concept"]].to_numpy(dtype=object)[index.numpy()]
    columns = {
        "atom": list(range(len(rows))),
        "polarity": labels_of(undesirable, desirable, eta).tolist(),
        "cos_undesirable": undesirable,
        "cos_desirable": desirable,
        "nearest_concept_ids": concepts[..., 0].tolist(),
        "nearest_concepts": concepts[..., 1].tolist(),
        "nearest_cosines": cosines.tolist(),
        "firing_rate": firing_rate.float().numpy(),
    }
    return pa.table(columns, schema=ATOMS)


def nearest(rows: Tensor, concepts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Largest cosines first, and whose they are; ties to the earlier concept.

    Args:
        rows: [n_atoms, d_model], unit.
        concepts: [n_concepts, d_model], unit.
        n: How many; at most n_concepts come back.

    Returns:
        Cosines [n_atoms, n] and concept numbers [n_atoms, n].
    """
    found = []
    for block in rows.split(BLOCK):
        values, index = (block @ concepts.T).topk(min(n, len(concepts)), dim=1)
        index, order = index.sort(dim=1)
        values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        found.append((values, index.gather(1, order)))
    values, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, index


@torch.no_grad()
def firing_rates(sae: SAE, blocks: Iterable[Tensor]) -> Tensor:
    """Share of tokens at which each atom is active, [n_atoms] float64.

    Args:
        sae: For raw activations.
        blocks: Tokens, [n, d_model] at a time.

    Raises:
        ActivationError: there are no tokens.
    """
    fired, tokens = torch.zeros(sae.n_atoms, dtype=torch.int64), 0
    for z in blocks:
        fired += (sae.encode(z) > 0).sum(0)
        tokens += len(z)
    if not tokens:
        raise ActivationError("expected held-out tokens, got none; raise sae.holdout or add stimuli")
    return fired.double() / tokens


def run(work: Work) -> None:
    """The stage: a table a layer; a layer whose table is there is not made again."""
    dictionary = load_dictionary(work.upstream("polarity"), work.upstream("directions"))
    shards = sorted((work.upstream("activations") / "shards").iterdir())
    present = set(dictionary.concepts["polarity"])
    missing = [polarity for polarity in ("undesirable", "desirable") if polarity not in present]
    for polarity in missing:
        work.log("warning", text=f"no concept is {polarity}: no atom can be, and its cosines are 0")
    labels = {}
    for position, layer in enumerate(work.progress(dictionary.layers, unit="layer")):
        _, held_out = token_split(shards, position, work.recipe.sae.holdout)
        labels[str(layer)] = Counter(_layer(work, dictionary, layer, held_out).column("polarity").to_pylist())
    write_atomic(
        work.folder / "facts.json", canonical_json({"labels": labels, "missing_polarities": missing})
    )
    total = sum(labels.values(), Counter[str]())
    neutral = total.pop("neutral", 0)
    work.drop_shards()
    work.finish(_counts(total, neutral))


def _counts(labelled: Counter[str], neutral: int) -> dict[str, Any]:
    return {"in": labelled.total() + neutral, "out": labelled.total(), "skipped": {"neutral": neutral}}


def _layer(work: Work, dictionary: ConceptDictionary, layer: int, held_out: TokenShards) -> pa.Table:
    """The layer's table, read or made and written."""
    path = work.folder / f"layers.{layer}" / "atoms.parquet"
    if path.is_file():
        return read_table(path, ATOMS)
    config = work.recipe.atoms
    sae = load_sae(work.upstream("sae") / f"layers.{layer}")
    rates = firing_rates(sae, held_out.blocks(BLOCK))
    table = atoms_table(sae.W_dec, dictionary, layer, rates, eta=config.eta, n_nearest=config.n_nearest)
    path.parent.mkdir(exist_ok=True)
    write_table(path, table)
    return table
