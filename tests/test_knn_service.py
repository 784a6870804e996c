"""What a kNN service proposes is ranked by Eq. 4: with all proposed exactly; odd answers are named."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from test_retrieval import N_NEGATIVE, SEED, clip_like, draws_of, made, rows_of

from builders.knn_service import Service, propose, recall, search_candidates, search_negatives
from builders.proposals import Engine
from builders.recipe import StimuliConfig
from builders.retrieval import draw_pool, search
from builders.scores import Corpus
from builders.stimuli import find_candidates
from daco.errors import CorpusError, FormatError


class Knn(http.server.BaseHTTPRequestHandler):
    """`/knn-service` over a corpus whose index has every third row more; fails as `failing` says."""

    corpus: ClassVar[Corpus]
    failing: ClassVar[list[str]] = []
    asked: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(question)
        what = self.failing.pop() if self.failing else ""
        if what == "500":
            return self.send_error(500)
        if what == "refuse":
            return self.send_error(400)
        side = self.corpus.images if question["modality"] == "image" else self.corpus.texts
        rows = side.slice(0, len(side)).astype(np.float64) @ np.array(question["embedding_input"])
        nearest = np.argsort(-rows)[: question["num_result_ids"]]
        found: Any = [{"id": int(row) * 3 // 2, "similarity": float(rows[row])} for row in nearest]
        body = json.dumps({"message": "no"} if what == "odd" else found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    Knn.failing, Knn.asked = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Knn) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()


def index_rows(n: int) -> np.ndarray:
    """Corpus row of every index row: the index has rows that the corpus lost."""
    rows = np.full(n * 3 // 2 + 5, -1)
    rows[np.arange(n) * 3 // 2] = np.arange(n)
    return rows


def test_with_all_proposed_the_answer_is_exact(service: str) -> None:
    corpus, queries = made(clip_like)
    Knn.corpus = corpus
    candidates = propose(Service(service, "x", proposals=203), queries, index_rows(203))
    found = search_candidates(queries, corpus, 6, candidates)
    pool, draws = draw_pool(203, 41, SEED), draws_of(len(queries), 41)
    exact = search(queries, corpus, 6, pool=pool, draws=draws, n_negative=N_NEGATIVE)
    assert [r.tolist() for r in found.rows] == [r.tolist() for r in exact.nearest.rows]
    negatives = search_negatives(queries, corpus, found.rows, pool, draws, N_NEGATIVE, Engine())
    assert [r.tolist() for r in negatives.rows] == [far for _, far in rows_of(exact)]
    assert recall(found, exact.nearest) == 1.0
    assert Knn.asked[0] | {"embedding_input": 0} == {
        "embedding_input": 0, "modality": Knn.asked[0]["modality"], "num_images": 203, "num_result_ids": 203,
        "indice_name": "x", "deduplicate": False, "use_safety_model": False, "use_violence_detector": False,
    }  # fmt: skip


def test_with_few_proposed_some_are_missed_and_the_rest_is_in_order(service: str) -> None:
    corpus, queries = made(clip_like)
    Knn.corpus = corpus
    found = search_candidates(queries, corpus, 6, propose(Service(service, "x", 7), queries, index_rows(203)))
    exact = search(queries, corpus, 6).nearest
    assert 0.1 < recall(found, exact) < 1.0
    for scores in found.scores:
        assert (np.diff(scores.dist) >= 0).all()


def test_candidates_from_a_service_tell_how_many_exact_answers_they_hold(service: str) -> None:
    corpus, queries = made(clip_like)
    Knn.corpus = corpus
    concepts = [{"concept_id": f"user:c{i}", "concept": f"c{i}"} for i in range(len(queries))]
    ids = [f"{i:016x}" for i in range(len(corpus))]
    source = np.arange(len(corpus)) * 3 // 2
    told = []
    for proposals in (7, 203):
        config = StimuliConfig(n_positive=6, service=service, index="x", proposals=proposals)
        table, counts = find_candidates(
            concepts, queries, corpus, ids, np.arange(41), config, SEED, source_rows=source, checked=5
        )
        assert table.num_rows
        told.append(counts["recall_percent"])
    assert 10 < told[0] < 100
    assert told[1] == 100
    _, unchecked = find_candidates(
        concepts, queries, corpus, ids, np.arange(41), config, SEED, source_rows=source
    )
    assert "recall_percent" not in unchecked


def test_a_service_that_fails_is_asked_again_and_then_named(service: str) -> None:
    corpus, queries = made(clip_like)
    Knn.corpus = corpus
    Knn.failing = ["500", "500"]
    assert len(propose(Service(service, "x", 7, workers=1), queries[:1], index_rows(203))) == 1
    Knn.failing = ["500"] * 9
    with pytest.raises(CorpusError, match="expected clip-retrieval's kNN service at"):
        propose(Service(service, "x", workers=1), queries[:1], index_rows(203))
    Knn.failing, Knn.asked = ["refuse"], []
    with pytest.raises(CorpusError, match="400"):
        propose(Service(service, "x", workers=1), queries[:1], index_rows(203))
    assert len(Knn.asked) == 1
    Knn.failing = ["odd"]
    with pytest.raises(FormatError, match="expected a list of rows with an id"):
        propose(Service(service, "x", workers=1), queries[:1], index_rows(203))
    with pytest.raises(CorpusError, match="start `clip-retrieval back`"):
        propose(Service("http://127.0.0.1:9", "x"), queries[:1], index_rows(203))
