"""Label and name the atoms of the SAEs: cosines to centroids, nearest concepts, firing rates, top stimuli.

Reads `sae/`, `directions/`, `polarity/` and held-out tokens of `activations/`; writes
`atoms/layers.<L>/atoms.parquet` and `facts.json`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from builders.directions import load_dictionary
from builders.stages import Work
from builders.tokens import MODALITIES, TokenShards, check_activations
from builders.train_sae import load_sae, token_split
from daco.dictionary import ConceptDictionary
from daco.errors import ActivationError, RecipeError
from daco.manifest import canonical_json, write_atomic
from daco.sae import SAE, labels_of
from daco.tables import ATOMS, ATOMS_MORE, read_table, write_table

BLOCK = 1_024
"""Atoms or tokens at a time; part of what fixes the last digits."""
SCHEMA = pa.schema([*ATOMS, *ATOMS_MORE])


class Firing(NamedTuple):
    """When atoms fire, on held-out tokens."""

    rate: Tensor
    """[n_atoms] float64, share of tokens at which each atom is active."""
    by_modality: dict[str, Tensor | None]
    """The same of the tokens of each of `MODALITIES`; None: there are none, or it was not kept which."""
    stimuli: Tensor
    """[n_atoms, n_top] numbers of the stimuli that fire each atom most; -1: no further one fires it."""
    values: Tensor
    """[n_atoms, n_top] the largest value of the atom within that stimulus; 0 where there is none."""


def atoms_table(
    W_dec: Tensor,
    dictionary: ConceptDictionary,
    layer: int,
    firing_rate: Tensor,
    *,
    eta: float = 0.3,
    n_nearest: int = 5,
    centroids: str = "one",
    min_group: int = 5,
    firing: Firing | None = None,
    stimulus_ids: list[str] | None = None,
) -> pa.Table:
    """What is known of each atom of a layer.

    Args:
        W_dec: [n_atoms, d_model]; rows need not be unit.
        dictionary: The concepts that name the atoms.
        layer: The layer of the dictionary to compare with.
        firing_rate: [n_atoms], share of held-out tokens at which the atom is active.
        eta: Cosine threshold of labels.
        n_nearest: Nearest concepts kept, by cosine.
        centroids: `one` a polarity, or one for each `group` of concepts, the nearest of which counts.
        min_group: Groups with fewer concepts of a polarity are taken together.
        firing: When the atoms fire, for the columns that say more; None: those are empty.
        stimulus_ids: Of the stimuli that `firing` counts.

    Returns:
        A table of `daco.tables.ATOMS` and `ATOMS_MORE`. The cosine to the centroid of a polarity that no
        concept has is 0.

    Raises:
        RecipeError: eta is not in (0, 1].
        UnknownLayerError: the dictionary does not have that layer.

    Source: arXiv 2604.08846, Eq. 9.
    """
    if not 0 < eta <= 1:
        raise RecipeError(f"atoms.eta: expected a cosine in (0, 1], got {eta}")
    rows = F.normalize(W_dec, dim=1)
    by_group = {name: nearest_group(rows, dictionary, layer, name, min_group) for name in POLES}
    if centroids == "group":
        undesirable, desirable = (by_group[name][0].numpy() for name in POLES)
    else:
        undesirable, desirable = ((rows @ dictionary.centroid(layer, name)).numpy() for name in POLES)
    cosines, index = nearest(rows, dictionary.unit(layer), n_nearest)
    concepts = dictionary.concepts[["concept_id", "concept", "group"]].to_numpy(dtype=object)[index.numpy()]
    columns = {
        "atom": list(range(len(rows))),
        "polarity": labels_of(undesirable, desirable, eta).tolist(),
        "cos_undesirable": undesirable,
        "cos_desirable": desirable,
        "nearest_concept_ids": concepts[..., 0].tolist(),
        "nearest_concepts": concepts[..., 1].tolist(),
        "nearest_cosines": cosines.tolist(),
        "firing_rate": firing_rate.float().numpy(),
        "group": concepts[:, 0, 2].tolist(),
    }
    for name, (values, groups) in by_group.items():
        columns |= {f"cos_{name}_group": values.numpy(), f"{name}_group": groups}
    return pa.table(columns | _firing_columns(firing, stimulus_ids or [], len(rows)), schema=SCHEMA)


POLES = ("undesirable", "desirable")


def nearest_group(
    rows: Tensor, dictionary: ConceptDictionary, layer: int, polarity: str, min_group: int
) -> tuple[Tensor, list[str]]:
    """Largest cosine of every row to a centroid of the concepts of one polarity and group, and which group.

    Args:
        rows: [n_atoms, d_model], unit.
        dictionary: The concepts; `group` says which are alike (WordNet's supersenses, for instance).
        layer: The layer to compare with.
        polarity: `undesirable` or `desirable`.
        min_group: Groups of fewer concepts are taken together, under the empty name.

    Returns:
        Cosines [n_atoms] and names; 0 and empty where no concept has the polarity.

    Source: the paper (arXiv 2604.08846) names its single centroid as coarse; this is one answer.
    """
    members = np.flatnonzero(dictionary.concepts["polarity"] == polarity)
    if not len(members):
        return torch.zeros(len(rows)), [""] * len(rows)
    group = dictionary.concepts["group"].iloc[members]
    group = group.where(group.map(group.value_counts()) >= min_group, "").to_numpy()
    names, unit = sorted(set(group)), dictionary.unit(layer)
    numbers = [torch.from_numpy(members[group == name]) for name in names]
    centroids = F.normalize(torch.stack([unit[number].mean(0) for number in numbers]), dim=1)
    values, index = (rows @ centroids.T).max(1)
    return values, [names[i] for i in index.tolist()]


def _firing_columns(firing: Firing | None, stimulus_ids: list[str], n_atoms: int) -> dict[str, Any]:
    nothing: list[Any] = [None] * n_atoms
    if firing is None:
        return {name: nothing for name in ATOMS_MORE.names if name.startswith(("firing_", "top_"))}
    columns: dict[str, Any] = {
        f"firing_{name}": nothing if rate is None else rate.float().numpy()
        for name, rate in firing.by_modality.items()
    }
    top = [
        [(stimulus_ids[i], v) for i, v in zip(numbers, values, strict=True) if i >= 0]
        for numbers, values in zip(firing.stimuli.tolist(), firing.values.tolist(), strict=True)
    ]
    columns["top_stimuli"] = [[i for i, _ in row] for row in top]
    columns["top_values"] = [[v for _, v in row] for row in top]
    return columns


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


@torch.no_grad()
def firing_of(sae: SAE, tokens: TokenShards, n_top: int, block: int = BLOCK) -> Firing:
    """When each atom fires: rates overall and by modality, and the stimuli that fire it most; on the CPU.

    Args:
        sae: For raw activations; the work is done where it is.
        tokens: Held-out tokens, on the CPU.
        n_top: Stimuli kept for each atom; ties to the earlier one.
        block: Tokens at a time.

    Raises:
        ActivationError: there are no tokens.
    """
    device = sae.W_dec.device
    fired = torch.zeros(1 + len(MODALITIES), sae.n_atoms, dtype=torch.int64, device=device)
    values = torch.zeros(sae.n_atoms, n_top, device=device)
    stimuli = torch.full((sae.n_atoms, n_top), -1, device=device)
    modality, seen = tokens.modality, 0
    for codes, numbers in _whole_stimuli(sae, tokens, block):
        on = codes > 0
        kinds = [on]
        if modality is not None:
            here = modality[seen : seen + len(on)].to(device)
            kinds += [on[here == kind] for kind in range(len(MODALITIES))]
        fired[: len(kinds)] += torch.stack([kind.sum(0) for kind in kinds])
        values, stimuli = _top(values, stimuli, codes, numbers, n_top)
        seen += len(on)
    if not seen:
        raise ActivationError("expected held-out tokens, got none; raise sae.holdout or add stimuli")
    fired, values, stimuli = fired.cpu(), values.cpu(), stimuli.cpu()
    of = torch.zeros(len(MODALITIES)) if modality is None else torch.bincount(modality.long(), minlength=4)
    by_modality = {
        name: fired[1 + kind].double() / int(of[kind]) if of[kind] else None
        for kind, name in enumerate(MODALITIES)
    }
    return Firing(fired[0].double() / seen, by_modality, stimuli, values)


def _whole_stimuli(sae: SAE, tokens: TokenShards, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes [n, n_atoms] and stimulus numbers [n], about `block` tokens at a time, never half a stimulus."""
    ends = tokens.ends.tolist()
    first, start = 0, 0
    for number, end in enumerate(ends):
        if end - start >= block or end == ends[-1]:
            lengths = torch.tensor(ends[first : number + 1]).diff(prepend=torch.tensor([start]))
            rows = tokens.rows(torch.arange(start, end).numpy()).to(sae.W_dec.device)
            numbers = torch.arange(first, number + 1).repeat_interleave(lengths)
            yield sae.encode(rows), numbers.to(rows.device)
            first, start = number + 1, end


def _top(
    values: Tensor, stimuli: Tensor, codes: Tensor, numbers: Tensor, n_top: int
) -> tuple[Tensor, Tensor]:
    """The best so far [n_atoms, n_top], with whole new stimuli among them."""
    own, inverse = numbers.unique(return_inverse=True)
    largest = torch.zeros(len(own), codes.shape[1], device=codes.device)
    largest.scatter_reduce_(0, inverse[:, None].expand_as(codes), codes, "amax")
    both = torch.cat([values, largest.T], 1)
    which = torch.cat([stimuli, own.expand(len(values), -1)], 1)
    both, order = both.sort(dim=1, descending=True, stable=True)
    both, which = both[:, :n_top], which.gather(1, order)[:, :n_top]
    return both, which.masked_fill(both == 0, -1)


check_upstream = check_activations


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
        return read_table(path, SCHEMA)
    config = work.recipe.atoms
    sae = load_sae(work.upstream("sae") / f"layers.{layer}")
    firing = firing_of(sae.to("cuda" if torch.cuda.is_available() else "cpu"), held_out, config.n_top)
    sae = sae.cpu()
    table = atoms_table(
        sae.W_dec,
        dictionary,
        layer,
        firing.rate,
        eta=config.eta,
        n_nearest=config.n_nearest,
        centroids=config.centroids,
        min_group=config.min_group,
        firing=firing,
        stimulus_ids=held_out.stimulus_ids,
    )
    path.parent.mkdir(exist_ok=True)
    write_table(path, table)
    return table
