"""New dictionaries from old ones: a part of one, two in one, one concept more; and what tells two apart.

Pure functions behind the methods of `daco.dictionary.ConceptDictionary`; reads and writes nothing.
"""

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from daco.errors import (
    ActivationError,
    FormatError,
    ModelMismatchError,
    UnknownConceptError,
    UnknownLayerError,
)
from daco.recognition import Recogniser
from daco.tables import CONCEPTS, POLARITIES

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary

ON_CONFLICT = ("raise", "ours", "theirs")
"""What `merge` may do with a concept that both dictionaries have and do not agree on."""

TEXTS = tuple(field.name for field in CONCEPTS if field.name not in ("rank", "n_positive"))
"""What two dictionaries may say differently of one concept."""

R_TOLERANCE = 0.05
"""Share by which the R of two dictionaries may differ before `merge` warns."""


class Merged(NamedTuple):
    """Two dictionaries in one."""

    dictionary: "ConceptDictionary"
    """The first one's concepts in order, then those that only the second one has."""
    conflicts: pd.DataFrame
    """One row a concept that both have and do not agree on: concept_id, concept, differs, cosine, kept."""


class Diff(NamedTuple):
    """What tells a dictionary from an older one; `print` it."""

    added: pd.DataFrame
    """Rows of concepts that only the newer one has."""
    dropped: pd.DataFrame
    """Rows of concepts that only the older one has."""
    relabelled: pd.DataFrame
    """Concepts of another polarity: concept_id, concept, before, after."""
    moved: pd.DataFrame
    """Concepts with another direction: concept_id, concept, and layer and cosine where it turned most."""
    same: int
    """Concepts that are in both, with one label and nearly one direction."""

    def __str__(self) -> str:
        parts = ("added", "dropped", "relabelled", "moved")
        counts = ", ".join(f"{len(getattr(self, name))} {name}" for name in parts)
        return f"{counts}, {self.same} the same"


def rows_of(dictionary: "ConceptDictionary", rows: Any, layers: Collection[int]) -> "ConceptDictionary":
    """The dictionary of these rows, in this order, and these layers."""
    index = torch.as_tensor(np.asarray(rows), dtype=torch.int64)
    return dataclasses.replace(
        dictionary,
        concepts=dictionary.concepts.iloc[index.numpy()].reset_index(drop=True),
        vectors={layer: dictionary.vectors[layer][index] for layer in sorted(layers)},
        R={layer: dictionary.R[layer] for layer in sorted(layers)},
        baseline={layer: row for layer, row in dictionary.baseline.items() if layer in layers},
        recognisers={
            layer: one.rows(index.numpy()) for layer, one in dictionary.recognisers.items() if layer in layers
        },
    )


def subset(
    dictionary: "ConceptDictionary",
    concepts: Sequence[str] | None,
    polarity: str | None,
    group: str | None,
    layers: Sequence[int] | None,
) -> "ConceptDictionary":
    """See `ConceptDictionary.subset`."""
    table = dictionary.concepts
    keep = np.ones(len(table), dtype=bool)
    if concepts is not None:
        wanted = [concepts] if isinstance(concepts, str) else list(concepts)
        for concept in wanted:
            dictionary.index(concept)  # names the nearest where there is none
        keep &= (table["concept"].isin(wanted) | table["concept_id"].isin(wanted)).to_numpy()
    for column, value in (("polarity", polarity), ("group", group)):
        if value is not None:
            _check_known(column, value, table)
            keep &= (table[column] == value).to_numpy()
    if not keep.any():
        raise UnknownConceptError("expected at least one concept that fits all filters, got none; loosen one")
    for layer in layers or ():
        dictionary.raw(layer)
    return rows_of(dictionary, np.flatnonzero(keep), dictionary.layers if layers is None else set(layers))


def _check_known(column: str, value: str, table: pd.DataFrame) -> None:
    known = sorted(set(table[column]))
    if value not in known:
        shown = ", ".join(map(repr, known[:20])) + (", ..." if len(known) > 20 else "")
        raise UnknownConceptError(f"{column}: expected one of {shown}, got {value!r}")


# One concept more.


def extend(
    dictionary: "ConceptDictionary",
    concept: str,
    positives: Mapping[int, Tensor],
    negatives: Mapping[int, Tensor] | None,
    facts: Mapping[str, str],
) -> "ConceptDictionary":
    """See `ConceptDictionary.extend`; `facts` are columns of the new concept's row."""
    row = _new_row(dictionary, concept, facts)
    vectors, counts = {}, []
    for layer in dictionary.layers:
        ours = _readings(dictionary, positives, layer, "positives")
        counts.append(len(ours))
        theirs = _negative(dictionary, negatives, layer)
        direction = (ours.double().mean(0) - theirs).float()
        if not float(direction.norm()):
            raise ActivationError(
                f"layer {layer}: expected a direction that is not zero for {concept!r}, got zero: "
                "are positives and negatives the same stimuli?"
            )
        vectors[layer] = torch.cat([dictionary.vectors[layer], direction[None]])
    row |= {"rank": len(dictionary), "n_positive": min(counts)}
    table = pd.concat([dictionary.concepts, pd.DataFrame([row])], ignore_index=True)
    recognisers = {layer: one.grown(vectors[layer][-1:]) for layer, one in dictionary.recognisers.items()}
    return dataclasses.replace(dictionary, concepts=_typed(table), vectors=vectors, recognisers=recognisers)


def slug(text: str) -> str:
    """A name as the end of an id: lower case, everything but letters and digits as `-`."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


def _new_row(dictionary: "ConceptDictionary", concept: str, facts: Mapping[str, str]) -> dict[str, Any]:
    name = " ".join(concept.split())
    found = facts.get("concept_id") or f"user:{slug(name)}"
    if not name or found == "user:":
        raise ValueError(
            f"concept: expected a name with letters or digits, got {concept!r}; or give concept_id"
        )
    if (dictionary.concepts["concept_id"] == found).any():
        raise FormatError(
            f"expected a concept_id that the dictionary does not have, got {found!r}; "
            "give another concept_id, or drop the old one by `subset` first"
        )
    if facts["polarity"] not in POLARITIES:
        raise ValueError(f"polarity: expected one of {POLARITIES}, got {facts['polarity']!r}")
    row: dict[str, Any] = dict.fromkeys(TEXTS, "")
    return row | dict(facts) | {"concept": name, "concept_id": found}


def _readings(dictionary: "ConceptDictionary", given: Mapping[int, Tensor], layer: int, what: str) -> Tensor:
    """Checked readings of a layer, `[n, d_model]`."""
    if (rows := given.get(layer)) is None:
        raise UnknownLayerError(
            f"{what}: expected readings at layers {dictionary.layers}, got {sorted(given)}; "
            "read them with `dictionary.read(...)`, or take a `subset` with those layers first"
        )
    width = dictionary.model.hidden_size
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
        raise ActivationError(
            f"{what}, layer {layer}: expected readings [n, {width}], n at least 1, got {list(rows.shape)}"
        )
    if not bool(rows.isfinite().all()):
        raise ActivationError(f"{what}, layer {layer}: expected finite readings, got NaN or infinity")
    return rows.detach().cpu()


def _negative(dictionary: "ConceptDictionary", negatives: Mapping[int, Tensor] | None, layer: int) -> Tensor:
    """Mean reading of what the concept is told apart from, `[d_model]` float64."""
    if negatives is not None:
        return _readings(dictionary, negatives, layer, "negatives").double().mean(0)
    if layer not in dictionary.baseline:
        raise ActivationError(
            f"layer {layer}: expected negatives, or a release that holds its mean of negatives, got neither; "
            "pass negatives=, readings of stimuli without the concept"
        )
    return dictionary.baseline[layer].double()


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers as int32, where none is missing."""
    whole = {name: "int32" for name in ("rank", "n_positive") if table[name].notna().all()}
    return table.astype(whole)


# Two in one.


def merge(ours: "ConceptDictionary", theirs: "ConceptDictionary", on_conflict: str) -> Merged:
    """See `ConceptDictionary.merge`."""
    if on_conflict not in ON_CONFLICT:
        raise ValueError(f"on_conflict: expected one of {ON_CONFLICT}, got {on_conflict!r}")
    layers = check_comparable(ours, theirs)
    _warn_of_R(ours, theirs, layers)
    mine, other = _shared_rows(ours, theirs)
    conflicts = _conflicts(ours, theirs, mine, other, layers)
    if len(conflicts) and on_conflict == "raise":
        names = conflicts["concept"].head(5).tolist()
        raise FormatError(
            f"expected dictionaries that agree on the concepts both have, got {len(conflicts)} they do not "
            f"agree on: {names}; pass on_conflict='ours' or 'theirs'"
        )
    a = rows_of(ours, np.arange(len(ours)), layers)
    table, vectors = a.concepts, a.vectors
    if on_conflict == "theirs" and len(mine):
        table, vectors = _replaced(table, vectors, mine, rows_of(theirs, other, layers))
    new = rows_of(theirs, np.setdiff1d(np.arange(len(theirs)), other), layers)
    table = pd.concat([table, new.concepts], ignore_index=True)
    vectors = {layer: torch.cat([vectors[layer], new.vectors[layer]]) for layer in layers}
    merged = dataclasses.replace(
        a,
        concepts=_typed(table.assign(rank=np.arange(len(table)))),
        vectors=vectors,
        recognisers=_recognisers(a, theirs, mine, other, vectors),
        baseline=a.baseline or {layer: row for layer, row in theirs.baseline.items() if layer in layers},
        sources=[*ours.sources, *(source for source in theirs.sources if source not in ours.sources)],
    )
    return Merged(merged, conflicts.assign(kept=on_conflict))


def check_comparable(ours: "ConceptDictionary", theirs: "ConceptDictionary") -> list[int]:
    """Layers that both have; refuses directions of another model, or read at another place of the prompt."""
    a, b = ours.model, theirs.model
    for name in ("model_type", "hidden_size", "n_layers", "id", "revision"):
        mine, other = getattr(a, name), getattr(b, name)
        if mine != other and mine != "" and other != "":  # an unknown id is no other id
            raise ModelMismatchError(
                f"expected two dictionaries of one model, got {name} {mine!r} and {other!r}; "
                "build one of them again with the other's model"
            )
    if ours.reading != theirs.reading:
        raise ModelMismatchError(
            f"expected two dictionaries read at one place, got {ours.reading!r} and {theirs.reading!r}"
        )
    if not (layers := sorted(set(ours.layers) & set(theirs.layers))):
        raise UnknownLayerError(f"expected a layer both have, got {ours.layers} and {theirs.layers}")
    return layers


def _warn_of_R(ours: "ConceptDictionary", theirs: "ConceptDictionary", layers: list[int]) -> None:
    apart = {layer: (ours.R[layer], theirs.R[layer]) for layer in layers}
    apart = {layer: (a, b) for layer, (a, b) in apart.items() if abs(a - b) > R_TOLERANCE * max(a, b)}
    if apart:
        warnings.warn(
            f"R of the two dictionaries differs by more than {R_TOLERANCE:.0%} at layers {sorted(apart)}; "
            "the first one's stays: were they read from like stimuli?",
            UserWarning,
            stacklevel=4,
        )


def _shared_rows(ours: "ConceptDictionary", theirs: "ConceptDictionary") -> tuple[np.ndarray, np.ndarray]:
    """Rows of the concepts that both have, in our order."""
    other = pd.Index(theirs.concepts["concept_id"]).get_indexer(pd.Index(ours.concepts["concept_id"]))
    mine = np.flatnonzero(other >= 0)
    return mine, other[mine]


def _lowest_cosine(
    ours: "ConceptDictionary", theirs: "ConceptDictionary", mine: Any, other: Any, layers: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """For pairs of rows: the cosine at the layer where their directions differ most, and that layer."""
    if not len(mine):
        return np.empty(0), np.empty(0, dtype=np.int64)
    a, b = torch.as_tensor(mine), torch.as_tensor(other)
    by_layer = [cosine_similarity(ours.vectors[i][a], theirs.vectors[i][b], dim=-1) for i in layers]
    lowest, where = torch.stack(by_layer).min(0)
    return lowest.numpy(), np.asarray(layers)[where.numpy()]


def _conflicts(
    ours: "ConceptDictionary", theirs: "ConceptDictionary", mine: Any, other: Any, layers: list[int]
) -> pd.DataFrame:
    a, b = ours.concepts.iloc[mine], theirs.concepts.iloc[other]
    differs = {
        name: (a[name].fillna("").to_numpy() != b[name].fillna("").to_numpy())
        for name in TEXTS
        if name in a and name in b
    }
    moved = np.zeros(len(mine), dtype=bool)
    for layer in layers:
        x, y = ours.vectors[layer][torch.as_tensor(mine)], theirs.vectors[layer][torch.as_tensor(other)]
        moved |= (x != y).any(1).numpy()
    differs["direction"] = moved
    said = [[name for name, rows in differs.items() if rows[i]] for i in range(len(mine))]
    cosine, _ = _lowest_cosine(ours, theirs, mine, other, layers)
    found: pd.DataFrame = a[["concept_id", "concept"]].assign(differs=said, cosine=cosine)
    return found[[bool(names) for names in said]].reset_index(drop=True)


def _replaced(
    table: pd.DataFrame, vectors: Mapping[int, Tensor], mine: np.ndarray, theirs: "ConceptDictionary"
) -> tuple[pd.DataFrame, dict[int, Tensor]]:
    """Rows `mine` as another dictionary has them."""
    changed = {layer: rows.clone() for layer, rows in vectors.items()}
    for layer, rows in changed.items():
        rows[torch.as_tensor(mine)] = theirs.vectors[layer]
    keep = np.setdiff1d(np.arange(len(table)), mine)
    parts = [table.iloc[keep].set_axis(keep), theirs.concepts.set_axis(mine)]
    return pd.concat(parts).sort_index(), changed


def _recognisers(
    ours: "ConceptDictionary",
    theirs: "ConceptDictionary",
    mine: Any,
    other: Any,
    merged: Mapping[int, Tensor],
) -> dict[int, Recogniser]:
    """Ours, with shared rows where directions `merged` are the other dictionary's, and its new rows behind.

    Its thresholds hold where its readings vary as ours do; else what is taken has scores and no threshold.
    """
    own, found = len(ours), {}
    new = np.setdiff1d(np.arange(len(theirs)), other)
    for layer, one in ours.recognisers.items():
        turned = (merged[layer][mine] != ours.vectors[layer][mine]).any(1).numpy()
        its, at = (
            theirs.recognisers.get(layer),
            np.concatenate([mine[turned], np.arange(own, own + len(new))]),
        )
        if its is not None and one.same_scale(its):
            source = its.rows(np.concatenate([other[turned], new]))
        else:
            source = one.rows(at[:0]).grown(merged[layer][at])
        both = dataclasses.replace(
            one,
            vectors=torch.cat([one.vectors, source.vectors]),
            concepts=pd.concat([one.concepts, source.concepts], ignore_index=True),
        )
        order = np.arange(own + len(new))
        order[at] = own + np.arange(len(at))
        found[layer] = both.rows(order)
    return found


# What tells two apart.


def diff(older: "ConceptDictionary", newer: "ConceptDictionary", moved: float) -> Diff:
    """See `ConceptDictionary.diff`."""
    layers = check_comparable(older, newer)
    before, after = _shared_rows(older, newer)
    old, new = older.concepts.iloc[before], newer.concepts.iloc[after]
    names = new[["concept_id", "concept"]].reset_index(drop=True)
    labels = names.assign(before=old["polarity"].to_numpy(), after=new["polarity"].to_numpy())
    cosine, layer = _lowest_cosine(older, newer, before, after, layers)
    turned = names.assign(layer=layer, cosine=cosine)
    relabelled, turns = (labels["before"] != labels["after"]).to_numpy(), cosine < moved
    return Diff(
        added=newer.concepts.drop(index=newer.concepts.index[after]).reset_index(drop=True),
        dropped=older.concepts.drop(index=older.concepts.index[before]).reset_index(drop=True),
        relabelled=labels[relabelled].reset_index(drop=True),
        moved=turned[turns].sort_values("cosine", kind="stable").reset_index(drop=True),
        same=int((~relabelled & ~turns).sum()),
    )


def unit_rows(vectors: Tensor, width: int) -> Tensor:
    """Vectors `[n, width]` at norm 1; refuses others.

    Raises:
        ModelMismatchError: they are of another width.
        ActivationError: one of them is zero, NaN or infinite.
    """
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ModelMismatchError(f"expected vectors [{width}] or [n, {width}], got {list(vectors.shape)}")
    rows = vectors.detach().to("cpu", torch.float32)
    norms = rows.norm(dim=-1)
    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise ActivationError("expected vectors that are finite and not zero, got others")
    return normalize(rows, dim=-1)
