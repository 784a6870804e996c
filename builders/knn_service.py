"""Retrieval through clip-retrieval's kNN service, for corpora too large to scan: it proposes, Eq. 4 re-ranks.

Asks `clip-retrieval back` over HTTP for the nearest images and the nearest captions of every concept, and
ranks their union by float64 cosines of the embeddings that the service's index was built from.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from builders.proposals import Engine
from builders.retrieval import search
from builders.scores import Corpus, Floats, Found, Ints, Rows, exact_scores, ranked
from daco.errors import CorpusError, FormatError

TRIES = 3


@dataclass(frozen=True)
class Service:
    """A running `clip-retrieval back`."""

    url: str
    """Where it listens, as `http://localhost:1234`."""
    index: str
    """Name of the index in its `indices_paths.json`."""
    proposals: int = 1_000
    """Images, and captions, asked for each concept."""
    workers: int = 4
    """Questions at once."""
    timeout: float = 120.0
    """Seconds for an answer."""


def ask(service: Service, query: Floats, modality: str) -> Ints:
    """Rows of the index nearest to a query, nearest first.

    Args:
        service: Whom to ask.
        query: Unit embedding [d].
        modality: `image` or `text`.

    Raises:
        CorpusError: the service does not answer.
        FormatError: what it answers is no list of rows.
    """
    question = {
        "embedding_input": np.asarray(query, dtype=np.float64).tolist(),
        "modality": modality,
        "num_images": service.proposals,
        "num_result_ids": service.proposals,
        "indice_name": service.index,
        "deduplicate": False,
        "use_safety_model": False,
        "use_violence_detector": False,
    }
    answer = _post(f"{service.url.rstrip('/')}/knn-service", question, service.timeout)
    try:
        return np.array([int(found["id"]) for found in answer], dtype=np.int64)
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError(
            f"{service.url}: expected a list of rows with an id, got {str(answer)[:80]!r}; start another"
        ) from error


def _post(url: str, question: dict[str, Any], timeout: float) -> Any:
    request = urllib.request.Request(
        url, json.dumps(question).encode(), headers={"Content-Type": "application/json"}
    )
    for left in reversed(range(TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if left and not (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                continue
            raise CorpusError(
                f"expected clip-retrieval's kNN service at {url}, got {error}; start "
                "`clip-retrieval back` or set stimuli.service"
            ) from error
    raise AssertionError("unreachable")


def propose(service: Service, queries: Floats, rows: Ints) -> list[Ints]:
    """Candidates of every query: corpus rows among its nearest images or its nearest captions.

    Args:
        service: Whom to ask.
        queries: Unit embeddings [n, d].
        rows: Corpus row of every row of the service's index; -1 where the corpus has none.

    Raises:
        CorpusError: the service does not answer.
        FormatError: it answers what is no list of rows.
    """

    def both(query: Floats) -> Ints:
        found = np.concatenate([ask(service, query, modality) for modality in ("image", "text")])
        found = np.unique(found)
        if len(found) and found[0] < 0:
            raise FormatError(f"{service.url}: expected rows from 0, got {found[0]}; build its index again")
        found = found[found < len(rows)]  # the last rows of the index may be none of the corpus
        known = rows[found]
        return known[known >= 0]

    with ThreadPoolExecutor(service.workers) as workers:
        return list(workers.map(both, queries))


def search_candidates(queries: Floats, corpus: Corpus, k: int, candidates: Sequence[Ints]) -> Found:
    """The k nearest by Eq. 4 among the candidates of every query."""
    found = Found([], [])
    for number, rows in enumerate(candidates):
        scores = exact_scores(queries, corpus, np.full(len(rows), number), rows)
        best, best_scores = ranked(rows, scores, corpus.place, k)
        found.rows.append(best)
        found.scores.append(best_scores)
    return found


def search_negatives(
    queries: Floats,
    corpus: Corpus,
    near: Sequence[Ints],
    pool: Ints,
    draws: Sequence[Ints],
    n: int,
    engine: Engine,
) -> Found:
    """Negatives as `retrieval.search` draws them, by scoring the pool alone."""
    sides = [Rows(side.take(pool)) for side in (corpus.images, corpus.texts)]
    alone = Corpus(sides[0], sides[1], corpus.place[pool])
    most = n + max(map(len, near), default=0)
    everything = np.arange(len(pool))
    found = search(queries, alone, 1, pool=everything, draws=draws, n_negative=most, engine=engine).negatives
    kept = [
        np.flatnonzero(~np.isin(pool[rows], mine))[:n] for rows, mine in zip(found.rows, near, strict=True)
    ]
    return Found(
        [pool[rows[keep]] for rows, keep in zip(found.rows, kept, strict=True)],
        [scores.at(keep) for scores, keep in zip(found.scores, kept, strict=True)],
    )


def recall(found: Found, exact: Found) -> float:
    """Share of the exact answers' stimuli that were found."""
    hits = sum(len(np.intersect1d(one, other)) for one, other in zip(found.rows, exact.rows, strict=True))
    return hits / max(1, sum(map(len, exact.rows)))
