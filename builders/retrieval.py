"""Exact retrieval by Eq. 4 of arXiv 2604.08846: the nearest stimuli of many concepts, and their negatives.

Reads a corpus and returns rows of it. A blocked matrix product in float32 or bfloat16, on CPU or CUDA,
proposes (`builders.proposals`); float64 decides (`builders.scores`). What a proposal's rounding could have
hidden is looked up again, so block, part, dtype and device never change an answer.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from builders.proposals import (
    Engine,
    Proposer,
    Workers,
    check_products,
    closeness_of,
    query_parts,
    split,
    where_true,
)
from builders.scores import Corpus, Floats, Found, Ints, Scores, exact_scores, exhaustive
from daco.errors import FormatError

WALK = 16
"""Members of the pool looked at for each negative wanted; half of them are far enough."""

HOST_TILE = 768
"""Most queries decided in float64 at once by a processor."""


class Searched(NamedTuple):
    """Result of `search`."""

    nearest: Found
    """The k nearest of every query, closest first."""
    negatives: Found
    """Draws from the farther half of the pool, in the order of drawing; empty without a pool."""
    answered: Counter[str]
    """Queries by the dtype of the pass that settled them; `float64`: no rounded pass could."""


def search(
    queries: Floats,
    corpus: Corpus,
    k: int,
    *,
    pool: Ints | None = None,
    draws: Sequence[Ints] = (),
    n_negative: int = 0,
    engine: Engine | None = None,
) -> Searched:
    """The k nearest stimuli of every query by Eq. 4, and negatives from the farther half of a pool.

    Args:
        queries: Unit rows [n, d], float32.
        corpus: What is searched.
        k: Stimuli of each query, at most; those with a cosine <= 0 never count.
        pool: Rising corpus rows that negatives are drawn from.
        draws: For every query places in `pool`, in the order in which they are tried.
        n_negative: Negatives of each query, at most: the first of its draws that lie in the farther half of
            the pool (ties by stimulus id) and are none of its k nearest.
        engine: How to compute.

    Raises:
        RecipeError: the memory allowed is too small for one query, or torch is set to round float32 products.
        FormatError: queries and corpus have different widths.

    Source:
        arXiv 2604.08846, Eq. 4; the clamp, the ties and the negatives are ours.
    """
    if queries.shape[1] != corpus.images.width:
        raise FormatError(
            f"expected embeddings of width {queries.shape[1]}, got {corpus.images.width}; use one CLIP"
        )
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    engine = engine or Engine()
    check_products(torch.device(engine.device))
    pool = np.empty(0, np.int64) if pool is None else pool
    with Workers(engine) as workers:
        parts = [
            _search_part(queries[part], corpus, k, pool, draws[part], n_negative, engine, workers)
            for part in query_parts(len(queries), k, len(pool), corpus.images.width, engine)
        ]
    answered: Counter[str] = Counter()
    for part in parts:
        answered.update(part.answered)
    return Searched(
        _joined([part.nearest for part in parts]), _joined([part.negatives for part in parts]), answered
    )


def _joined(parts: Sequence[Found]) -> Found:
    return Found([rows for part in parts for rows in part.rows], [s for part in parts for s in part.scores])


def _search_part(
    queries: Floats,
    corpus: Corpus,
    k: int,
    pool: Ints,
    draws: Sequence[Ints],
    n_negative: int,
    engine: Engine,
    workers: Workers,
) -> Searched:
    proposer = Proposer(queries, corpus, k, pool, engine, workers)
    far = proposer.scan_pool(draws, n_negative) if len(pool) else [np.empty(0, np.int64) for _ in queries]
    proposer.scan_rest()
    nearest, doubtful = _decide(k, proposer)
    answered = Counter({engine.dtype: len(queries) - len(doubtful)})
    if len(doubtful) and engine.dtype != "float32":
        again = Proposer(queries[doubtful], corpus, k, pool[:0], _single(engine), workers)
        again.scan_rest()
        found, left = _decide(k, again)
        _put(nearest, doubtful, found)
        answered["float32"] += len(doubtful) - len(left)
        doubtful = doubtful[left]
    if len(doubtful):
        _put(nearest, doubtful, exhaustive(queries[doubtful], corpus, k))
    answered["float64"] += len(doubtful)
    for query in _overlapping(far, nearest.rows, len(corpus)):  # only where the pool is hardly larger than k
        near = nearest.rows[query]
        far[query] = far_draws(queries[query], corpus, pool, draws[query], near)[:n_negative]
    shares = workers.shares(len(queries), HOST_TILE)
    scored = workers.map(lambda part: _scored(proposer, part.start, far[part]), shares)
    return Searched(nearest, _joined(scored), +answered)


def _overlapping(some: list[Ints], others: list[Ints], n: int) -> list[int]:
    """Places at which both lists have a row in common, of rows below n."""
    keys = [np.repeat(np.arange(len(lists)), [len(rows) for rows in lists]) * n for lists in (some, others)]
    for key, lists in zip(keys, (some, others), strict=True):
        key += np.concatenate([np.empty(0, np.int64), *lists])
    return sorted(set((np.intersect1d(*keys, assume_unique=True) // n).tolist()))


def _single(engine: Engine) -> Engine:
    return Engine("float32", engine.device, engine.memory, engine.block, engine.tile)


def _put(found: Found, at: Ints, other: Found) -> None:
    for place, rows, scores in zip(at.tolist(), other.rows, other.scores, strict=True):
        found.rows[place], found.scores[place] = rows, scores


def far_draws(query: Floats, corpus: Corpus, pool: Ints, tried: Ints, near: Ints) -> Ints:
    """Corpus rows of the draws that lie in the farther half of the pool and not in `near`, all in float64."""
    scores = exact_scores(query[None], corpus, np.zeros(len(pool), np.int64), pool)
    order = np.lexsort((corpus.place[pool], -scores.closeness))
    far = np.zeros(len(pool), dtype=bool)
    far[order[len(pool) // 2 :]] = True
    rows: Ints = pool[tried[far[tried]]]
    return rows[~np.isin(rows, near)]


def _scored(proposer: "Proposer", first: int, rows: list[Ints]) -> Found:
    """Float64 scores of some rows of each query from the first on."""
    lengths = np.array([len(found) for found in rows], dtype=np.int64)
    who = first + np.repeat(np.arange(len(rows)), lengths)
    columns = np.concatenate([np.empty(0, np.int64), *rows])
    exact = proposer.exact(*(torch.from_numpy(found).to(proposer.device) for found in (who, columns)))
    image, text = (split(found, lengths) for found in exact.cpu().numpy())
    return Found(rows, [Scores(*pair) for pair in zip(image, text, strict=True)])


def _decide(k: int, proposer: Proposer) -> tuple[Found, Ints]:
    """Order the proposals in float64; also which queries something that was dropped could belong to."""
    values, columns = proposer.candidates()
    worst = proposer.bar + proposer.error.at(proposer.bar)  # the highest float64 could put what was dropped

    def decide(tile: slice) -> tuple[Found, Ints]:
        scores = _scored_proposals(tile, k, values[tile], columns[tile], proposer)
        slots = columns[tile, : scores.shape[2]]
        closeness = torch.where((scores > 0).all(0), closeness_of(scores), -1.0)
        order = torch.from_numpy(proposer.corpus.place[slots.cpu().numpy()]).to(slots.device).argsort(1)
        order = order.gather(1, closeness.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
        kept = (found.gather(1, order[:, :k]) for found in (slots, *scores, closeness))
        rows, image, text, closest = (found.cpu().numpy() for found in kept)
        n = (closest > 0).sum(1).tolist()
        found = Found(
            [found[:most] for found, most in zip(rows, n, strict=True)],
            [Scores(i[:most], t[:most]) for i, t, most in zip(image, text, n, strict=True)],
        )
        return found, tile.start + np.flatnonzero(~(closest[:, -1] > worst[tile].cpu().numpy()))

    parts = proposer.workers.map(decide, proposer.workers.shares(len(values), HOST_TILE))
    return _joined([part for part, _ in parts]), np.concatenate([doubtful for _, doubtful in parts])


def _scored_proposals(tile: slice, k: int, values: Tensor, columns: Tensor, proposer: Proposer) -> Tensor:
    """Float64 scores [2, n, m] of a tile's k best proposals and of all that could be closer; 0 elsewhere.

    Proposals are sorted; those behind the m-th are none of these.
    """
    scores = torch.zeros((2, *values.shape), dtype=torch.float64, device=values.device)

    def score(chosen: Tensor) -> None:
        who, slot = where_true(chosen)
        scores[:, who, slot] = proposer.exact(tile.start + who, columns[who, slot])

    first = torch.arange(values.shape[1], device=values.device) < k
    score((values > 0) & first)
    best = scores[:, :, :k]
    floor = torch.where((best > 0).all(0), closeness_of(best), 0.0).amin(1)
    closer = (values > (floor - 1.05 * proposer.error.at(floor)).clamp_(min=0)[:, None]) & ~first
    score(closer)
    return scores[:, :, : k + int(closer.sum(1).max())]


def draw_pool(n: int, size: int, seed: int) -> Ints:
    """Rows of the pool of negatives, one for all concepts: `size` of `n`, rising."""
    rows: Ints = np.random.default_rng([seed, 4]).permutation(n)[:size]
    return np.sort(rows)


def draw_places(concept_id: str, n_pool: int, n_negative: int, seed: int) -> Ints:
    """Places in the pool in the order in which a concept's negatives are tried, from (seed, concept_id).

    Long enough that `n_negative` of them lie in the farther half (one in two does), short for a small pool.
    """
    digest = hashlib.sha256(f"{seed}\0{concept_id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    places: Ints = rng.choice(n_pool, size=min(n_pool, WALK * n_negative), replace=False)
    return places
