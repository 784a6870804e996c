"""Scores of concept-stimulus pairs by Eq. 4 of arXiv 2604.08846, all in float64, and what is scored.

Reads embeddings (arrays, memory-mapped or not, in any number of parts). Each score depends on its pair alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from daco.errors import FormatError

FLOOR = 1e-6
"""Cosines are clamped here before their logarithm is taken."""

PAIRS = 128
"""Concept-stimulus pairs scored in float64 at once: few, so that they stay in the cache."""

Ints = NDArray[np.int64]

Floats = NDArray[Any]


class Scores(NamedTuple):
    """Cosines of concept-stimulus pairs, and what they are ranked by; arrays of one shape."""

    image: Floats
    """Cosine of concept text and image, float64."""
    text: Floats
    """Cosine of concept text and caption, float64."""

    @property
    def closeness(self) -> Floats:
        """Product of the clamped cosines, computed in float64 and rounded to float32.

        The rounding swallows the last bits, in which machines differ: equal pairs tie everywhere.
        """
        product = np.maximum(self.image, FLOOR) * np.maximum(self.text, FLOOR)
        return product.astype(np.float32)

    @property
    def dist(self) -> Floats:
        """Eq. 4: sqrt(-(ln s_image + ln s_text)), float64; its last bits may differ between devices."""
        logs = np.log(np.maximum(self.image, FLOOR)) + np.log(np.maximum(self.text, FLOOR))
        return np.sqrt(np.maximum(-logs, 0.0))

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Where both cosines are above zero; nothing else may be a positive."""
        return (self.image > 0) & (self.text > 0)

    def at(self, index: Any) -> "Scores":
        """The scores at an index."""
        return Scores(self.image[index], self.text[index])


class Rows:
    """Rows that lie in one or several arrays, addressed as one; arrays stay where they are (memory-mapped).

    Args:
        parts: Arrays [n_i, d] of one width, float16, float32 or float64.

    Raises:
        FormatError: a part is no matrix of floats, or of another width than the first.
    """

    def __init__(self, *parts: Floats) -> None:
        self.parts = parts
        for number, part in enumerate(parts):
            if part.ndim != 2 or part.dtype.kind != "f" or part.shape[1] != parts[0].shape[1]:
                raise FormatError(
                    f"embeddings, part {number}: expected floats [n, {parts[0].shape[-1]}], "
                    f"got {part.dtype} {list(part.shape)}; embed with one model"
                )
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return int(self.parts[0].shape[1])

    def slice(self, start: int, stop: int) -> Floats:
        """Rows start to stop; a view where they lie in one part."""
        begins = self.ends - [len(part) for part in self.parts]
        found = [
            part[max(start - begin, 0) : stop - begin]
            for part, begin, end in zip(self.parts, begins.tolist(), self.ends.tolist(), strict=True)
            if begin < stop and start < end
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows taken: the widest of the parts'."""
        return np.result_type(*(part.dtype for part in self.parts))

    def take(self, rows: Ints, out: Floats | None = None) -> Floats:
        """Chosen rows, copied; to `out` [n, d] where it is given."""
        chosen = np.empty((len(rows), self.width), self.dtype) if out is None else out
        if len(self.parts) == 1:  # "clip": "raise" would copy them twice
            return np.take(self.parts[0], rows, axis=0, out=chosen, mode="clip")
        where = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(where).tolist():
            mine, part = where == number, self.parts[number]
            chosen[mine] = part[rows[mine] - (self.ends[number] - len(part))]
        return chosen


@dataclass(frozen=True)
class Corpus:
    """What is searched: unit embeddings of both sides, and the order of stimulus ids, which breaks ties."""

    images: Rows
    """[n, d]."""
    texts: Rows
    """[n, d]."""
    place: Ints
    """[n]: of each row, how many stimulus ids come before its own."""

    @classmethod
    def of(cls, images: Floats | Rows, texts: Floats | Rows, ids: Sequence[str]) -> "Corpus":
        """A corpus of embeddings and the stimulus id of each row.

        Raises:
            FormatError: the three do not belong together.
        """
        sides = [side if isinstance(side, Rows) else Rows(side) for side in (images, texts)]
        if not len(sides[0]) == len(sides[1]) == len(ids) or sides[0].width != sides[1].width:
            raise FormatError(
                f"expected image rows, text rows and ids of one number and width, got {len(sides[0])} x "
                f"{sides[0].width}, {len(sides[1])} x {sides[1].width} and {len(ids)}; embed again"
            )
        place = np.empty(len(ids), dtype=np.int64)
        place[np.argsort(np.array(ids), kind="stable")] = np.arange(len(ids))
        return cls(sides[0], sides[1], place)

    def __len__(self) -> int:
        return len(self.place)


class Found(NamedTuple):
    """What a search found: of every query its stimuli and their scores."""

    rows: list[Ints]
    """Corpus rows."""
    scores: list[Scores]
    """Their cosines."""


def exact_scores(queries: Floats, corpus: Corpus, rows: Ints, columns: Ints) -> Scores:
    """Float64 cosines of pairs (queries[rows[i]], stimulus columns[i]); each depends on its pair alone."""
    scores = Scores(np.empty(len(rows)), np.empty(len(rows)))
    for start in range(0, len(rows), PAIRS):
        part = slice(start, start + PAIRS)
        asked = queries[rows[part]].astype(np.float64)
        for side, out in ((corpus.images, scores.image), (corpus.texts, scores.text)):
            np.einsum("nd,nd->n", asked, _doubles(side.take(columns[part])), out=out[part])
    return scores


def _doubles(rows: Floats) -> Floats:
    if rows.dtype == np.float16:  # torch is faster at the first step than numpy
        rows = torch.from_numpy(rows).float().numpy()
    return rows.astype(np.float64)


def ranked(rows: Ints, scores: Scores, place: Ints, k: int) -> tuple[Ints, Scores]:
    """The k closest positives among candidates, closest first, ties by stimulus id."""
    order = np.lexsort((place[rows], -scores.closeness))
    order = order[scores.positive[order]][:k]
    return rows[order], scores.at(order)


def exhaustive(queries: Floats, corpus: Corpus, k: int, block: int = 4_096, tile: int = 64) -> Found:
    """The k nearest by a float64 pass over the whole corpus: slow, for queries that rounding left open."""
    found = Found([], [])
    for first in range(0, len(queries), tile):
        asked = queries[first : first + tile]
        best = [(np.empty(0, np.int64), Scores(np.empty(0), np.empty(0))) for _ in asked]
        for start in range(0, len(corpus), block):
            _merge_exactly(asked, corpus, start, min(start + block, len(corpus)), k, best)
        found.rows.extend(rows for rows, _ in best)
        found.scores.extend(scores for _, scores in best)
    return found


def _merge_exactly(
    asked: Floats, corpus: Corpus, start: int, stop: int, k: int, best: list[tuple[Ints, Scores]]
) -> None:
    doubles, rows = torch.from_numpy(asked.astype(np.float64)), np.arange(start, stop)
    rough = Scores(
        *(
            (doubles @ torch.from_numpy(_doubles(side.take(rows))).T).numpy()
            for side in (corpus.images, corpus.texts)
        )
    )
    product, tiny = rough.closeness, 1e-10  # far above what float64 sums in another order can differ by
    possible = (rough.image > -tiny) & (rough.text > -tiny)
    for query, (rows, scores) in enumerate(best):
        bar = scores.closeness[-1] * (1 - 1e-6) - tiny if len(rows) == k else -1.0
        fresh = start + np.flatnonzero(possible[query] & (product[query] >= bar))
        exact = exact_scores(asked, corpus, np.full(len(fresh), query), fresh)
        both = Scores(*(np.concatenate(pair) for pair in zip(scores, exact, strict=True)))
        best[query] = ranked(np.concatenate([rows, fresh]), both, corpus.place, k)


def cosines(queries: Floats, images: Floats, texts: Floats) -> Scores:
    """Float64 cosines [n, m] of queries [n, d] with m stimuli [m, d]; for a handful, not for a corpus."""
    asked, *sides = (np.asarray(rows, dtype=np.float64) for rows in (queries, images, texts))
    return Scores(*(asked @ side.T for side in sides))
