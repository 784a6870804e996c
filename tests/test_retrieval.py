"""Retrieval equals Eq. 4 written out naively in float64, whatever block, parts, dtype and memory are."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from builders.embeddings import unit_half
from builders.proposals import Engine, Proposer, device_of
from builders.retrieval import Searched, draw_places, draw_pool, search
from builders.scores import Corpus, Rows, exact_scores, exhaustive
from daco.errors import FormatError, RecipeError

SEED, K, N_NEGATIVE = 11, 6, 5


def random_sides(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    return unit_half(rng.normal(size=(n, d))), unit_half(rng.normal(size=(n, d)))


def clip_like(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """All within a cone, as real embeddings are: cosines positive and close together."""
    centre = rng.normal(size=d)
    return tuple(unit_half(centre + 0.7 * rng.normal(size=(n, d))) for _ in range(2))  # type: ignore[return-value]


def repeated(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Three different pairs only: nearly everything ties."""
    which = rng.integers(0, 3, n)
    images, texts = clip_like(rng, 3, d)
    return images[which], texts[which]


def nearly_tied(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows one last place of float16 apart: float32 sums cannot order them, bfloat16 cannot see them."""
    images, texts = (np.repeat(side, n, axis=0) for side in clip_like(rng, 1, d))
    for side in (images, texts):
        place = rng.integers(0, d, n)
        side[np.arange(n), place] = np.nextafter(side[np.arange(n), place], np.float16(2))
    return images, texts


def signs(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Axes and their opposites: cosines of exactly 0, 1 and -1 for queries that are axes."""
    axes = np.concatenate([np.eye(d), -np.eye(d)])
    return unit_half(axes[rng.integers(0, 2 * d, n)]), unit_half(axes[rng.integers(0, 2 * d, n)])


def barely(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines about zero, on both sides of it and of the clamp."""
    sides = []
    for _ in range(2):
        rows = np.zeros((n, d), np.float16)
        rows[:, 1] = 1
        rows[:, 0] = rng.choice([0, 6e-8, -6e-8, 1e-6, 2e-6, -2e-6, 1e-3], n)
        sides.append(rows)
    return sides[0], sides[1]


def rising(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row closer to the first axis than the one before: every block beats all before it."""
    angle = np.linspace(1.5, 0.1, n)
    rows = np.zeros((n, d))
    rows[:, 0], rows[:, 1] = np.cos(angle), np.sin(angle)
    return unit_half(rows), unit_half(rows)


KINDS = (random_sides, clip_like, repeated, nearly_tied, signs, barely, rising)


def made(kind: Any, n: int = 203, d: int = 9, n_queries: int = 7) -> tuple[Corpus, np.ndarray]:
    rng = np.random.default_rng(5)
    images, texts = kind(rng, n, d)
    queries = np.concatenate([np.eye(d)[:2], rng.normal(size=(n_queries - 4, d)), images[:2].astype(float)])
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    ids = [f"{i:016x}" for i in rng.permutation(n)]
    return Corpus.of(images, texts, ids), queries


def scored(corpus: Corpus, query: np.ndarray, row: int) -> tuple[float, int, int, float, float]:
    """(-closeness, place, row, image, text) of one pair, summed without error."""
    image, text = (
        math.fsum(np.float64(query) * np.float64(side.take(np.array([row]))[0]))
        for side in (corpus.images, corpus.texts)
    )
    closeness = np.float32(max(image, 1e-6) * max(text, 1e-6))
    return -float(closeness), int(corpus.place[row]), row, image, text


def naive(corpus: Corpus, queries: np.ndarray, k: int, pool: np.ndarray, draws: list) -> list[tuple]:
    """(nearest rows, negative rows) of every query, pair by pair as DESIGN says it."""
    answers = []
    for query, places in zip(queries, draws, strict=True):
        everything = sorted(scored(corpus, query, row) for row in range(len(corpus)))
        near = [row for _, _, row, image, text in everything if image > 0 and text > 0][:k]
        members = set(pool.tolist())
        farther = [found[2] for found in everything if found[2] in members][len(members) // 2 :]
        drawn = [row for row in pool[places].tolist() if row in farther and row not in near]
        answers.append((near, drawn[:N_NEGATIVE]))
    return answers


def draws_of(n_queries: int, n_pool: int) -> list[np.ndarray]:
    return [draw_places(f"user:c{i}", n_pool, N_NEGATIVE, SEED) for i in range(n_queries)]


def looked_up(
    corpus: Corpus, queries: np.ndarray, n_pool: int = 41, k: int = K, **engine: Any
) -> tuple[Searched, list[tuple]]:
    pool = draw_pool(len(corpus), n_pool, SEED)
    draws = draws_of(len(queries), len(pool))
    found = search(queries, corpus, k, pool=pool, draws=draws, n_negative=N_NEGATIVE, engine=Engine(**engine))
    return found, naive(corpus, queries, k, pool, draws)


def rows_of(found: Searched) -> list[tuple]:
    pairs = zip(found.nearest.rows, found.negatives.rows, strict=True)
    return [(near.tolist(), far.tolist()) for near, far in pairs]


def assert_float64(found: Searched, corpus: Corpus, queries: np.ndarray) -> None:
    """Scores are those of the host but for the last bits, in which sums in another order may differ."""
    for one in found.nearest, found.negatives:
        for query, rows, scores in zip(queries, one.rows, one.scores, strict=True):
            exact = exact_scores(query[None], corpus, np.zeros(len(rows), np.int64), rows)
            np.testing.assert_allclose(scores, exact, rtol=0, atol=4e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_that_of_the_naive_twin(kind: Any, dtype: str) -> None:
    found, expected = looked_up(*made(kind), dtype=dtype)
    assert rows_of(found) == expected
    assert any(near for near, _ in expected)
    assert sum(found.answered.values()) == 7


@pytest.mark.parametrize("kind", [clip_like, nearly_tied, rising])
@pytest.mark.parametrize(("block", "tile"), [(1, 1), (8, 3), (61, 2), (500, 500)])
def test_block_and_tile_change_nothing(kind: Any, block: int, tile: int) -> None:
    found, expected = looked_up(*made(kind), block=block, tile=tile)
    assert rows_of(found) == expected


@pytest.mark.parametrize("cuts", [(), (1,), (7, 7, 150), (100, 202)])
def test_parts_change_nothing(cuts: tuple[int, ...]) -> None:
    corpus, queries = made(clip_like)
    sides = [
        Rows(*np.split(np.asarray(side.slice(0, len(side))), cuts)) for side in (corpus.images, corpus.texts)
    ]
    split = Corpus(sides[0], sides[1], corpus.place)
    assert rows_of(looked_up(split, queries, block=24)[0]) == looked_up(corpus, queries)[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_larger_corpus_is_settled_without_the_slow_pass(dtype: str) -> None:
    rng = np.random.default_rng(3)
    images, texts = clip_like(rng, 3001, 33)
    queries = unit_half(images[:40] + 0.3 * rng.normal(size=(40, 33))).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    corpus = Corpus.of(images, texts, [f"{i:016x}" for i in rng.permutation(3001)])
    found = search(queries, corpus, K, engine=Engine(dtype=dtype, block=256, tile=16))
    slow = exhaustive(queries, corpus, K, block=100)
    assert [rows.tolist() for rows in found.nearest.rows] == [rows.tolist() for rows in slow.rows]
    assert found.answered["float64"] == 0
    for one, other in zip(found.nearest.scores, slow.scores, strict=True):
        np.testing.assert_array_equal(one.dist, other.dist)
        assert (np.diff(one.dist) >= 0).all()


def test_ties_go_to_the_lower_stimulus_id_through_the_slow_pass() -> None:
    corpus, queries = made(repeated)
    found, expected = looked_up(corpus, queries)
    assert rows_of(found) == expected
    assert found.answered["float64"] > 0
    near = found.nearest.rows[-1]
    assert corpus.place[near].tolist() == sorted(corpus.place[near])


def test_queries_are_split_to_fit_the_memory_allowed() -> None:
    corpus, queries = made(clip_like)
    many = np.repeat(queries, 90, axis=0)
    found = search(many, corpus, K, engine=Engine(memory=1))
    once = search(queries, corpus, K)
    assert [r.tolist() for r in found.nearest.rows[::90]] == [r.tolist() for r in once.nearest.rows]
    assert len(found.nearest.rows) == 630
    wide = Corpus.of(np.zeros((9, 4096), np.float16), np.zeros((9, 4096), np.float16), list("abcdefghi"))
    with pytest.raises(
        RecipeError, match=r"stimuli.memory: expected more than 1 MiB for a pool of 99 x 4096"
    ):
        search(
            np.zeros((1, 4096), np.float32), wide, K, pool=np.arange(99), draws=[], engine=Engine(memory=1)
        )


def test_negatives_are_never_among_the_nearest_even_in_a_tiny_pool() -> None:
    corpus, queries = made(clip_like, n=13)
    found, expected = looked_up(corpus, queries, n_pool=13, k=9)
    assert rows_of(found) == expected
    for near, far in rows_of(found):
        assert not set(near) & set(far)
    assert any(len(near) == 9 and far for near, far in expected)


def test_a_pair_s_score_does_not_depend_on_what_it_is_scored_with() -> None:
    corpus, queries = made(random_sides, d=33)
    rng = np.random.default_rng(1)
    who, columns = rng.integers(0, 7, 500), rng.integers(0, 203, 500)
    together = exact_scores(queries, corpus, who, columns)
    for i in range(0, 500, 7):
        alone = exact_scores(queries, corpus, who[i : i + 3], columns[i : i + 3])
        np.testing.assert_array_equal(alone.image, together.image[i : i + 3])
        np.testing.assert_array_equal(alone.text, together.text[i : i + 3])


def test_draws_are_a_concept_s_own_and_reach_the_whole_of_a_small_pool() -> None:
    assert sorted(draw_places("user:a", 41, N_NEGATIVE, 1).tolist()) == list(range(41))
    assert len(set(draw_places("user:a", 10_007, N_NEGATIVE, 1).tolist())) == 80
    first = draw_places("user:a", 10_007, N_NEGATIVE, 1).tolist()
    assert first == draw_places("user:a", 10_007, N_NEGATIVE, 1).tolist()
    assert first != draw_places("user:b", 10_007, N_NEGATIVE, 1).tolist()
    assert first != draw_places("user:a", 10_007, N_NEGATIVE, 2).tolist()


def test_what_does_not_belong_together_is_refused() -> None:
    images = np.zeros((3, 5), np.float16)
    with pytest.raises(FormatError, match=r"of one number and width, got 3 x 5, 2 x 5 and 3"):
        Corpus.of(images, images[:2], list("abc"))
    with pytest.raises(FormatError, match=r"part 1: expected floats \[n, 5\], got float16 \[3, 4\]"):
        Rows(images, images[:, :4])
    with pytest.raises(FormatError, match="expected embeddings of width 4, got 5"):
        search(np.zeros((1, 4), np.float32), Corpus.of(images, images, list("abc")), 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_the_same(monkeypatch: pytest.MonkeyPatch, kind: Any, dtype: str, triton: bool) -> None:
    if not triton:
        monkeypatch.setattr("builders.proposals.kernels_for", lambda device: None)
    corpus, queries = made(kind)
    found, expected = looked_up(corpus, queries, dtype=dtype, device="cuda", block=96, tile=3)
    assert rows_of(found) == expected
    assert_float64(found, corpus, queries)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_s_way_of_working_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, kind: Any, dtype: str, threads: int
) -> None:
    """Blocks read ahead by threads, one thread that computes: here with a processor as the device."""
    monkeypatch.setattr("builders.proposals.on_gpu", lambda engine: True)
    monkeypatch.setattr("builders.proposals.onednn_product", lambda: None)  # as on a GPU
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        corpus, queries = made(kind)
        sides = [Rows(*np.split(side.slice(0, 203), (7, 150))) for side in (corpus.images, corpus.texts)]
        found, expected = looked_up(Corpus(*sides, corpus.place), queries, dtype=dtype, block=32, tile=3)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert rows_of(found) == expected
    assert_float64(found, corpus, queries)


@pytest.mark.parametrize("kind", [nearly_tied, clip_like])
def test_a_gpu_settles_doubtful_halves_of_the_pool_in_several_goes(
    monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr("builders.proposals.on_gpu", lambda engine: True)
    asked, far_exactly = [], Proposer._far_exactly

    def counted(self: Any, queries: np.ndarray, *rest: Any) -> list[np.ndarray]:
        asked.append(len(queries))
        return far_exactly(self, queries, *rest)

    monkeypatch.setattr(Proposer, "_far_exactly", counted)
    corpus, queries = made(kind, n=1203)
    pool = draw_pool(1203, 1100, SEED)
    draws = draws_of(7, 1100)
    expected = naive(corpus, queries, K, pool, draws)
    found = search(
        np.repeat(queries, 60, axis=0),
        corpus,
        K,
        pool=pool,
        draws=[draws[i // 60] for i in range(420)],
        n_negative=N_NEGATIVE,
        engine=Engine(memory=4, block=96, tile=210),
    )
    assert rows_of(found)[::60] == expected
    assert rows_of(found)[59::60] == expected
    if kind is nearly_tied:
        assert len(asked) > 2
        assert max(asked) == 4 * 2**14 // 1100


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("kind", [barely, nearly_tied])
def test_halves_of_the_pool_that_tie_are_settled_within_the_memory(
    monkeypatch: pytest.MonkeyPatch, kind: Any, gpu: bool
) -> None:
    """Where most cosines are below zero, most of the pool is at the clamp: every query asks for all of it."""
    monkeypatch.setattr("builders.proposals.on_gpu", lambda engine: gpu)
    settling, queries_and_pairs = [0], []
    far_exactly, exact = Proposer._far_exactly, Proposer.exact

    def settled(self: Any, queries: np.ndarray, *rest: Any) -> list[np.ndarray]:
        settling[0] = len(queries)
        found = far_exactly(self, queries, *rest)
        settling[0] = 0
        return found

    def counted(self: Any, who: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        if settling[0]:
            queries_and_pairs.append((settling[0], len(who)))
        return exact(self, who, columns)

    monkeypatch.setattr(Proposer, "_far_exactly", settled)
    monkeypatch.setattr(Proposer, "exact", counted)
    corpus, queries = made(kind, n=1203)
    pool, draws = draw_pool(1203, 1100, SEED), draws_of(7, 1100)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = Engine(memory=2, block=96)
        found = search(queries, corpus, K, pool=pool, draws=draws, n_negative=N_NEGATIVE, engine=engine)
    finally:
        torch.set_num_threads(before)
    assert rows_of(found) == naive(corpus, queries, K, pool, draws)
    assert sum(pairs for _, pairs in queries_and_pairs) > 2 * 2048
    assert all(pairs <= 2048 for n, pairs in queries_and_pairs if n > 1)


def test_the_gpu_is_the_caller_s_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    told = [device_of(Engine(device=name)) for name in ("cuda", "cuda:1", "cpu")]
    assert [str(device) for device in told] == ["cuda:3", "cuda:1", "cpu"]


def test_what_cannot_be_read_ends_a_search_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(self: Rows, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        raise OSError("Input/output error")

    monkeypatch.setattr("builders.proposals.on_gpu", lambda engine: True)
    corpus, queries = made(clip_like)
    monkeypatch.setattr(Rows, "take", torn)
    with pytest.raises(OSError, match="Input/output error"):
        search(queries, corpus, K, engine=Engine(block=32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_onednn_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr("builders.proposals.onednn_product", lambda: None)
    found, expected = looked_up(*made(clip_like), dtype=dtype)
    assert rows_of(found) == expected


def test_products_of_rounded_factors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.bfloat16() @ b.bfloat16().T).float()

    monkeypatch.setattr("builders.proposals.onednn_product", lambda: rounded)
    with pytest.raises(RecipeError, match="expected float32 products in float32"):
        looked_up(*made(clip_like))


def test_rows_that_rounding_moves_far_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound grows with the rows that are met; what was dropped before by a smaller one is found again."""
    monkeypatch.setattr("builders.proposals.MOVED", 0.0)
    monkeypatch.setattr("builders.proposals.MARGIN", {"float32": 0, "bfloat16": 0})
    for kind in (clip_like, nearly_tied, rising):
        found, expected = looked_up(*made(kind), dtype="bfloat16", block=32)
        assert rows_of(found) == expected
        assert found.answered["bfloat16"] < 7
