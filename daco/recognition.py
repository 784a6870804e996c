"""Which concepts a reading shows: a discriminant for each concept, and from which score on to name it.

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

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary

COLUMNS = ("reading", "layer", "concept_id", "concept", "polarity", "score", "threshold", "precision")
"""Columns of `ConceptDictionary.recognise`."""

MEASURED = ("threshold", "n_shown", "precision", "recall")
"""What is known of each concept of a layer; see `daco.tables.recognition_schema`."""

BLOCK = 1_024
"""Readings, and concepts, at a time, which bounds the room that float64 takes."""


@dataclass(frozen=True)
class Recogniser:
    """How the readings of one layer vary, and what tells of each concept whether a reading shows it.

    Raises:
        FormatError: the parts do not go together, or hold what is not finite.
    """

    mean: Tensor = field(repr=False)
    """[d_model], mean reading."""
    inverse: Tensor = field(repr=False)
    """[d_model, d_model], inverse of the covariance of readings (shrunk, see `builders.recognition`)."""
    vectors: Tensor = field(repr=False)
    """[n_concepts, d_model], discriminants; see `discriminants`."""
    concepts: pd.DataFrame = field(repr=False)
    """One row a concept in the dictionary's order, columns MEASURED; a concept whose `threshold` is missing
    is never named."""
    usual: float
    """Distance that 99 % of readings do not exceed (see `distance`): of others nothing is known."""

    def __post_init__(self) -> None:
        d = self.mean.shape[-1]
        shapes = [list(x.shape) for x in (self.mean, self.inverse, self.vectors)]
        if shapes != [[d], [d, d], [len(self.concepts), d]]:
            raise FormatError(
                f"expected statistics of shapes [d], [d, d] and [{len(self.concepts)}, d], got {shapes}"
            )
        finite = all(bool(x.isfinite().all()) for x in (self.mean, self.inverse, self.vectors))
        if not finite or not self.usual > 0:
            raise FormatError("expected statistics of readings that are finite, got others; build them again")

    def distance(self, z: Tensor) -> Tensor:
        """How far readings `[n, d_model]` are from the mean one, `[n]` float64; 1 is what is usual.

        `(z - mean) S^-1 (z - mean) / d_model`, the squared Mahalanobis distance a dimension.
        """
        apart = z.double() - self.mean.double()
        return (apart @ self.inverse.double() * apart).sum(1) / apart.shape[1]

    def scores(self, z: Tensor) -> Tensor:
        """How much of each concept readings show, in standard deviations above what readings have on average.

        Args:
            z: [n, d_model], readings.

        Returns:
            [n, n_concepts] float64.
        """
        apart = z.double() - self.mean.double()
        return torch.cat([apart @ rows.double().T for rows in torch.split(self.vectors, BLOCK)], 1)

    def over(self, scores: Tensor, distance: Tensor | None) -> Tensor:
        """By how much scores [n, n_concepts] exceed their thresholds: what is at least 0 is shown.

        Args:
            scores: Of `scores`.
            distance: Of `distance`: of readings that are not usual nothing is; None: take all for usual.
        """
        threshold = torch.tensor(self.concepts["threshold"].to_numpy(np.float64))
        found = torch.nan_to_num(scores - threshold, nan=-torch.inf)
        return found if distance is None else found.masked_fill((distance > self.usual)[:, None], -torch.inf)

    def rows(self, index: Any) -> "Recogniser":
        """The recogniser of these concepts, in this order."""
        vectors = self.vectors[torch.as_tensor(np.asarray(index), dtype=torch.int64)]
        return replace(self, vectors=vectors, concepts=self.concepts.iloc[index].reset_index(drop=True))

    def grown(self, directions: Tensor) -> "Recogniser":
        """The recogniser with further concepts behind the others, which have scores and no threshold."""
        new = pd.DataFrame(np.nan, index=range(len(directions)), columns=list(MEASURED))
        return replace(
            self,
            vectors=torch.cat([self.vectors, discriminants(directions, self.inverse).float()]),
            concepts=measured(pd.concat([self.concepts, measured(new)], ignore_index=True)),
        )

    def same_scale(self, other: "Recogniser") -> bool:
        """Whether what the other one says of a concept holds here."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.inverse, other.inverse)


def discriminants(directions: Tensor, inverse: Tensor) -> Tensor:
    """`S^-1 d / sqrt(d S^-1 d)`: times a reading, what tells a concept best, of standard deviation 1.

    S is the covariance of all readings: that within classes gives the same line, as the two differ by a
    multiple of `d d^T`.

    Args:
        directions: [n_concepts, d_model], mean reading of what shows a concept minus that of others.
        inverse: [d_model, d_model], of S.

    Returns:
        [n_concepts, d_model] float64; zero where a direction is.

    Source: Fisher, Annals of Eugenics 7 (1936).
    """
    matrix, found = inverse.double(), []
    for rows in torch.split(directions, BLOCK):
        lines = rows.double() @ matrix
        spread = (lines * rows.double()).sum(1, keepdim=True).sqrt()
        found.append(torch.where(spread > 0, lines / spread, 0.0))
    return torch.cat(found)


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
            "expected a dictionary that tells what is shown, got another: load it with recognition=True; "
            "releases of formats before 1.3 do not hold it, nor do those of recognition.min_precision = 0"
        )
    if n is not None and n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if unknown := sorted(set(readings) - set(dictionary.recognisers)):
        raise UnknownLayerError(f"expected layers among {sorted(dictionary.recognisers)}, got {unknown}")
    parts, notes = [], []
    for layer in sorted(readings):
        z = _checked(readings[layer], dictionary.model.hidden_size, layer)
        for number, block in enumerate(torch.split(z, BLOCK)):
            named, far = _layer(dictionary, layer, block, number * BLOCK, n, unusual_ok)
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
    dictionary: "ConceptDictionary", layer: int, z: Tensor, first: int, n: int | None, unusual_ok: bool
) -> tuple[pd.DataFrame, list[str]]:
    """What readings of one layer, from number `first` on, show, the highest over its threshold first; which
    are not usual.
    """
    one = dictionary.recognisers[layer]
    scores, distance = one.scores(z), one.distance(z)
    far = (distance > one.usual).nonzero().flatten().tolist()
    over = one.over(scores, None if unusual_ok else distance)
    ordered = over.sort(dim=1, descending=True, stable=True)
    reading, place = (ordered.values[:, :n] >= 0).nonzero(as_tuple=True)
    concept = ordered.indices[reading, place].numpy()
    table = dictionary.concepts[["concept_id", "concept", "polarity"]].iloc[concept].reset_index(drop=True)
    measures = one.concepts[["threshold", "precision"]].iloc[concept].reset_index(drop=True)
    table = pd.concat([table, measures], axis=1).assign(
        reading=first + reading.numpy(), layer=layer, score=scores[reading, concept].numpy()
    )
    what = "names may be wrong" if unusual_ok else "nothing is named"
    notes = [
        f"reading {first + i}, layer {layer}: unlike the stimuli, {float(distance[i]):.1f} from their mean "
        f"where 99 % are within {one.usual:.1f}: {what}"
        for i in far
    ]
    return table[list(COLUMNS)], notes
