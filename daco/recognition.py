"""Which concepts a reading shows: directions over the covariance of readings, each with a threshold.

Behind `ConceptDictionary.recognise`; reads and writes nothing. A direction alone, or an atom that starts as
one, tells on which side of a contrast a reading lies, with all that concepts share. Over the covariance of
readings it is Fisher's linear discriminant, which leaves out what varies whatever is shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from daco.errors import ActivationError, FormatError, ModelMismatchError, UnknownLayerError
from daco.tables import RECOGNITION

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary

COLUMNS = ("reading", "layer", "concept_id", "concept", "polarity", "score", "threshold", "precision")
"""Columns of `ConceptDictionary.recognise`."""

MEASURED = tuple(name for name in RECOGNITION.names if name not in ("concept_id", "concept"))
"""What is known of each concept of a layer, beside its name."""

BLOCK = 1_024
"""Concepts at a time, which bounds the room that float64 takes."""


@dataclass(frozen=True)
class Recogniser:
    """How the readings of one layer vary, and from which score on each concept counts as shown.

    Raises:
        FormatError: the parts do not go together, or hold what is not finite.
    """

    mean: Tensor = field(repr=False)
    """[d_model], mean reading."""
    inverse: Tensor = field(repr=False)
    """[d_model, d_model], inverse of the covariance of readings (shrunk, see `builders.recognition`)."""
    concepts: pd.DataFrame = field(repr=False)
    """One row a concept in the dictionary's order, columns MEASURED; a concept whose `threshold` is missing
    is never named."""
    usual: float
    """Distance that 99 % of readings do not exceed (see `distance`): of others nothing is known."""

    def __post_init__(self) -> None:
        d = len(self.mean)
        if self.mean.ndim != 1 or tuple(self.inverse.shape) != (d, d):
            shapes = [list(self.mean.shape), list(self.inverse.shape)]
            raise FormatError(f"expected statistics of shapes [d] and [d, d], got {shapes}")
        if not bool(self.mean.isfinite().all() and self.inverse.isfinite().all()) or not self.usual > 0:
            raise FormatError("expected statistics of readings that are finite, got others; build them again")

    def distance(self, z: Tensor) -> Tensor:
        """How far readings `[n, d_model]` are from the mean one, `[n]` float64; 1 is what is usual.

        `(z - mean) Sigma^-1 (z - mean) / d_model`, the squared Mahalanobis distance a dimension.
        """
        apart = z.double() - self.mean.double()
        return (apart @ self.inverse.double() * apart).sum(1) / apart.shape[1]

    def scores(self, directions: Tensor, z: Tensor) -> Tensor:
        """How much of each concept readings show, in standard deviations above what readings have on average.

        `d Sigma^-1 (z - mean) / sqrt(d Sigma^-1 d)`: Fisher's linear discriminant. Sigma is the covariance of
        all readings: that within the classes gives the same line, as the two differ by a multiple of `d d^T`.

        Args:
            directions: [n_concepts, d_model], raw, those of the dictionary.
            z: [n, d_model], readings.

        Returns:
            [n, n_concepts] float64.

        Source: Fisher, Annals of Eugenics 7 (1936).
        """
        apart = (z.double() - self.mean.double()) @ self.inverse.double()
        spread = torch.from_numpy(self.concepts["spread"].to_numpy(np.float64))
        parts = [apart @ rows.double().T for rows in torch.split(directions, BLOCK)]
        return torch.cat(parts, 1) / spread

    def over(self, scores: Tensor, distance: Tensor | None) -> Tensor:
        """By how much scores [n, n_concepts] exceed their thresholds: what is at least 0 is shown.

        Args:
            scores: Of `scores`.
            distance: Of `distance`: of readings that are not usual nothing is; None: take all for usual.
        """
        threshold = torch.from_numpy(self.concepts["threshold"].to_numpy(np.float64))
        found = torch.nan_to_num(scores - threshold, nan=-torch.inf)
        return found if distance is None else found.masked_fill((distance > self.usual)[:, None], -torch.inf)

    def rows(self, index: Any) -> "Recogniser":
        """The recogniser of these concepts, in this order."""
        return replace(self, concepts=self.concepts.iloc[index].reset_index(drop=True))

    def grown(self, directions: Tensor) -> "Recogniser":
        """The recogniser with further concepts behind the others, which have scores and no threshold."""
        new = pd.DataFrame({"spread": spreads(directions, self.inverse).numpy()}, columns=list(MEASURED))
        return replace(self, concepts=measured(pd.concat([self.concepts, measured(new)], ignore_index=True)))

    def same_scale(self, other: "Recogniser") -> bool:
        """Whether thresholds of the other one hold here."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.inverse, other.inverse)


def spreads(directions: Tensor, inverse: Tensor) -> Tensor:
    """Standard deviation of `d Sigma^-1 z` over readings, `sqrt(d Sigma^-1 d)`, [n_concepts] float64."""
    matrix = inverse.double()
    parts = [(rows.double() @ matrix * rows.double()).sum(1) for rows in torch.split(directions, BLOCK)]
    return torch.cat(parts).sqrt()


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The columns MEASURED with their types; numbers that are not known are NaN, counts are 0."""
    counts = table["n_shown"].fillna(0).astype("int32")
    found = table[list(MEASURED)].astype(dict.fromkeys(MEASURED, "float32"))
    return found.assign(n_shown=counts)


def recognise(
    dictionary: "ConceptDictionary", readings: Mapping[int, Tensor], n: int | None, unusual_ok: bool
) -> pd.DataFrame:
    """See `ConceptDictionary.recognise`."""
    if not dictionary.recognisers:
        raise FormatError(
            "expected a dictionary that holds how readings vary, got none: releases of formats before 1.3 do "
            "not, nor those built with recognition.min_precision = 0; build it again"
        )
    if n is not None and n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if unknown := sorted(set(readings) - set(dictionary.recognisers)):
        raise UnknownLayerError(f"expected layers among {sorted(dictionary.recognisers)}, got {unknown}")
    parts, notes = [], []
    for layer in sorted(readings):
        z = _checked(readings[layer], dictionary.model.hidden_size, layer)
        named, far = _layer(dictionary, layer, z, n, unusual_ok)
        parts.append(named)
        notes += far
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))
    found = found.sort_values(["reading", "layer"], kind="stable", ignore_index=True)
    found.attrs["notes"] = notes
    return found


def _checked(z: Tensor, width: int, layer: int) -> Tensor:
    if z.ndim != 2 or z.shape[1] != width:
        raise ModelMismatchError(f"layer {layer}: expected readings [n, {width}], got {list(z.shape)}")
    if not bool(z.isfinite().all()):
        raise ActivationError(f"layer {layer}: expected finite readings, got NaN or infinity")
    return z.detach().cpu()


def _layer(
    dictionary: "ConceptDictionary", layer: int, z: Tensor, n: int | None, unusual_ok: bool
) -> tuple[pd.DataFrame, list[str]]:
    """What the readings of one layer show, the highest over its threshold first; which are not usual."""
    one = dictionary.recognisers[layer]
    scores, distance = one.scores(dictionary.raw(layer), z), one.distance(z)
    far = (distance > one.usual).nonzero().flatten().tolist()
    over = one.over(scores, None if unusual_ok else distance)
    ordered = over.sort(dim=1, descending=True, stable=True)
    reading, place = (ordered.values[:, :n] >= 0).nonzero(as_tuple=True)
    concept = ordered.indices[reading, place].numpy()
    table = dictionary.concepts[["concept_id", "concept", "polarity"]].iloc[concept].reset_index(drop=True)
    measures = one.concepts[["threshold", "precision"]].iloc[concept].reset_index(drop=True)
    table = pd.concat([table, measures], axis=1).assign(
        reading=reading.numpy(), layer=layer, score=scores[reading, concept].numpy()
    )
    what = "names may be wrong" if unusual_ok else "nothing is named"
    notes = [
        f"reading {i}, layer {layer}: unlike the stimuli, {float(distance[i]):.1f} from their mean where "
        f"99 % are within {one.usual:.1f}: {what}"
        for i in far
    ]
    return table[list(COLUMNS)], notes
