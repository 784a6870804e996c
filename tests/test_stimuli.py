"""Blocked retrieval gives the links of Eq. 4 written out naively in float64, ties included."""

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import make_folder, tiny_recipe
from small_run import Killed, digests, opened

from builders import clip, corpus, embeddings, stimuli, vocabulary
from builders.embeddings import Embeddings, unit_half
from builders.recipe import Recipe, StimuliConfig
from builders.retrieval import draw_pool, search
from builders.scores import Corpus, Scores
from builders.stages import done
from builders.stimuli import choose_links, embed_concepts, find_candidates
from daco.errors import CorpusError, FormatError
from daco.tables import LINKS, read_table

SEED = 11


def naive_links(
    concepts: list[dict], queries: np.ndarray, corpus: Embeddings, k: int, pool: list[int]
) -> list[tuple]:
    """Eq. 4 as DESIGN says it, one pair at a time."""
    links = []
    for concept, query in zip(concepts, np.float64(queries), strict=True):

        def scored(row: int, query: np.ndarray = query) -> tuple[float, str, int, float, float]:
            image = math.fsum(query * np.float64(corpus.images[row]))
            text = math.fsum(query * np.float64(corpus.texts[row]))
            product = np.float32(max(image, 1e-6) * max(text, 1e-6))
            return (-float(product), corpus.ids[row], row, image, text)

        everything = sorted(scored(row) for row in range(len(corpus.ids)))
        positives = [s for s in everything if s[3] > 0 and s[4] > 0][:k]
        taken = {s[2] for s in positives}
        farther = {s[2]: s for s in sorted(scored(row) for row in pool)[len(pool) // 2 :]}
        digest = hashlib.sha256(f"{SEED}\0{concept['concept_id']}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        tried = [pool[i] for i in rng.choice(len(pool), size=min(len(pool), 16 * k), replace=False)]
        negatives = [farther[row] for row in tried if row in farther and row not in taken]
        negatives = sorted(negatives[: len(positives)])
        for role, chosen in (("positive", positives), ("negative", negatives)):
            links += [(concept["concept_id"], role, rank, s[1]) for rank, s in enumerate(chosen)]
    return links


def made_up(n: int, d: int = 7, seed: int = 0, spread: float = 1.0) -> Embeddings:
    """Embeddings with repeated rows, so that ties are common, and shuffled ids."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=d)
    images, texts = (unit_half(centre + spread * rng.normal(size=(n, d))) for _ in range(2))
    images[n // 2 :] = images[: n - n // 2]
    texts[n // 2 :] = texts[: n - n // 2]
    ids = [f"{i:016x}" for i in rng.permutation(n)]
    return Embeddings(images, texts, ids)


def made_concepts(n: int, d: int = 7, seed: int = 1) -> tuple[list[dict], np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    concepts = [{"concept_id": f"user:c{i}", "concept": f"c{i}"} for i in range(n)]
    return concepts, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def linked(
    found: Embeddings, concepts: list[dict], queries: np.ndarray, **changes: Any
) -> tuple[list[dict], Counter[str]]:
    """Links of some concepts, and the counts of both steps."""
    config = StimuliConfig(**({"n_positive": 6, "min_positive": 1} | changes))
    corpus = Corpus.of(found.images, found.texts, found.ids)
    pool = draw_pool(len(found.ids), 31, SEED)
    table, counts = find_candidates(concepts, queries, corpus, found.ids, pool, config, SEED)
    links, more = choose_links(table, config)
    return links.to_dict("records"), counts + more


def keys(rows: list[dict]) -> list[tuple]:
    return [(row["concept_id"], row["role"], row["rank"], row["stimulus_id"]) for row in rows]


@pytest.mark.parametrize(("n", "spread"), [(101, 1.0), (101, 0.02), (64, 5.0)])
def test_links_are_those_of_the_naive_twin_ties_included(n: int, spread: float) -> None:
    found = made_up(n, spread=spread)
    concepts, queries = made_concepts(9)
    rows, _ = linked(found, concepts, queries)
    pool = draw_pool(n, 31, SEED).tolist()
    expected = naive_links(concepts, queries, found, 6, pool)
    assert [key for key in expected if key[0] in {row["concept_id"] for row in rows}] == keys(rows)
    assert len(rows) > 40


def test_concepts_on_their_own_give_the_links_they_have_among_others() -> None:
    found = made_up(101)
    concepts, queries = made_concepts(9)
    together, _ = linked(found, concepts, queries)
    alone, _ = linked(found, concepts[4:5], queries[4:5])
    assert alone == [row for row in together if row["concept_id"] == "user:c4"]


def test_rows_carry_eq_4_and_raw_cosines() -> None:
    found = made_up(64)
    concepts, queries = made_concepts(5)
    rows, _ = linked(found, concepts, queries)
    where = {name: i for i, name in enumerate(found.ids)}
    for row in rows:
        i, query = where[row["stimulus_id"]], np.float64(queries[int(row["concept_id"][6:])])
        image, text = float(query @ np.float64(found.images[i])), float(query @ np.float64(found.texts[i]))
        assert (row["sim_image"], row["sim_text"]) == (pytest.approx(image), pytest.approx(text))
        logs = math.log(max(image, 1e-6)) + math.log(max(text, 1e-6))
        assert row["dist"] == pytest.approx(math.sqrt(-logs))
        assert row["role"] == "negative" or (image > 0 and text > 0)


def test_both_sides_must_match_not_one_alone() -> None:
    near, far, off = np.eye(7)[0], np.eye(7)[1], np.eye(7)[2]
    images = unit_half([near, near + far, near, near, near, off])
    texts = unit_half([near + 9 * off, near + far, near, -near, off, near])
    found = Embeddings(images, texts, list("abcdef"))
    nearest = search(np.float32([near]), Corpus.of(found.images, found.texts, found.ids), 6).nearest
    # Of the others one side points away or has a cosine of 0: never positives.
    assert nearest.rows[0].tolist() == [2, 1, 0]
    assert nearest.scores[0].dist[0] == pytest.approx(0.0, abs=1e-3)


def test_negatives_come_from_the_farther_half_and_are_never_positives() -> None:
    found = made_up(101, spread=0.02)
    concepts, queries = made_concepts(9)
    pool = draw_pool(101, 31, SEED)
    rows, _ = linked(found, concepts, queries, n_positive=12)
    assert {row["role"] for row in rows} == {"positive", "negative"}
    where = {name: i for i, name in enumerate(found.ids)}
    for concept in {row["concept_id"] for row in rows}:
        sides = {
            role: [where[r["stimulus_id"]] for r in rows if (r["concept_id"], r["role"]) == (concept, role)]
            for role in ("positive", "negative")
        }
        assert not set(sides["positive"]) & set(sides["negative"])
        assert set(sides["negative"]) <= set(pool.tolist())
        assert len(sides["negative"]) == len(sides["positive"])
        query = np.float64(queries[int(concept[6:])])
        products = np.maximum(found.images[pool] @ query, 1e-6) * np.maximum(found.texts[pool] @ query, 1e-6)
        median = np.sort(products)[len(pool) - len(pool) // 2]
        drawn = Scores(found.images[sides["negative"]] @ query, found.texts[sides["negative"]] @ query)
        assert (drawn.closeness <= np.float32(median) + 1e-6).all()


def test_concepts_with_too_few_stimuli_are_dropped_and_counted() -> None:
    found = made_up(64, spread=0.02)
    concepts, queries = made_concepts(9)
    away = -np.float32(found.images[:1])  # nothing of the corpus is on this side
    rows, counts = linked(found, concepts[:2], np.concatenate([queries[:1], away / np.linalg.norm(away)]))
    assert counts["by_float32"] + counts["by_float64"] == 2
    assert "user:c1" not in {row["concept_id"] for row in rows}


def test_near_duplicates_of_a_closer_stimulus_are_dropped_and_counted() -> None:
    found = made_up(101, spread=0.5)
    concepts, queries = made_concepts(9)
    where = {name: i for i, name in enumerate(found.ids)}
    rows, counts = linked(found, concepts, queries, duplicate_image=0.999, spare=9)
    assert counts["near_duplicate_image"] > 9  # each stimulus of the first half is there twice
    for concept in {row["concept_id"] for row in rows}:
        chosen = [
            where[r["stimulus_id"]] for r in rows if (r["concept_id"], r["role"]) == (concept, "positive")
        ]
        alike = np.float64(found.images[chosen]) @ np.float64(found.images[chosen]).T
        assert (alike[~np.eye(len(chosen), dtype=bool)] < 1.0 - 1e-3).all()
    rows, counts = linked(found, concepts, queries, duplicate_caption=0.999, spare=9)
    assert counts["near_duplicate_caption"] > 9
    assert len({r["rank"] for r in rows if r["role"] == "positive"}) == 6


def test_a_stimulus_serves_its_closest_concepts_up_to_the_cap() -> None:
    found = made_up(101, spread=0.3)
    concepts, queries = made_concepts(9)
    queries = np.float32(np.mean(queries, axis=0) + 0.2 * queries)  # all want the same stimuli
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    if (queries @ np.float32(found.images.mean(0))).mean() < 0:
        queries = -queries
    free, _ = linked(found, concepts, queries, n_positive=4)
    capped, counts = linked(found, concepts, queries, n_positive=4, max_uses=2, spare=60)
    positives = [row for row in capped if row["role"] == "positive"]
    assert max(Counter(row["stimulus_id"] for row in positives).values()) == 2
    assert max(Counter(row["stimulus_id"] for row in free if row["role"] == "positive").values()) > 2
    assert counts["over_max_uses"] > 0
    assert len(positives) == 4 * len({row["concept_id"] for row in capped})
    closest = min(positives, key=lambda row: (row["dist"], row["stimulus_id"]))
    assert closest["dist"] == min(row["dist"] for row in free)
    shuffled, _ = linked(found, concepts[::-1], queries[::-1], n_positive=4, max_uses=2, spare=60)
    assert sorted(keys(shuffled)) == sorted(keys(capped))


def test_the_pool_is_drawn_once_by_the_seed() -> None:
    assert draw_pool(1000, 50, 1).tolist() == draw_pool(1000, 50, 1).tolist()
    assert draw_pool(1000, 50, 1).tolist() != draw_pool(1000, 50, 2).tolist()
    assert draw_pool(9, 50, 1).tolist() == list(range(9))


def until_embeddings(pictures: Path, out: Path, **sections: dict) -> Recipe:
    recipe = tiny_recipe(pictures, **{"clip": {"steps": 1}, **sections})
    for stage, module in (
        ("corpus", corpus),
        ("concepts", vocabulary),
        ("clip", clip),
        ("embeddings", embeddings),
    ):
        module.run(opened(recipe, out, stage))
    return recipe


def test_the_stage_links_counts_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 24)
    recipe = until_embeddings(pictures, tmp_path / "whole")
    until_embeddings(pictures, tmp_path / "killed")
    stimuli.run(opened(recipe, tmp_path / "whole", "stimuli"))
    links = read_table(tmp_path / "whole" / "stimuli" / "links.parquet", LINKS).to_pandas()
    assert len(links)
    assert links.groupby(["concept_id", "role"]).size().between(2, 5).all()
    counts = done(tmp_path / "whole", "stimuli")["counts"]
    assert counts["out"] == links["concept_id"].nunique()
    assert counts["in"] == counts["out"] + sum(counts["skipped"].values())
    with pytest.raises(Killed):
        stimuli.run(opened(recipe, tmp_path / "killed", "stimuli", killed_at=1))
    work = opened(recipe, tmp_path / "killed", "stimuli")
    assert len(work.shards()) == 1
    stimuli.run(work)
    assert digests(tmp_path / "killed" / "stimuli") == digests(tmp_path / "whole" / "stimuli")


def test_too_few_stimuli_for_any_concept_is_an_error(tmp_path: Path) -> None:
    recipe = until_embeddings(
        make_folder(tmp_path / "pics", 3),
        tmp_path / "run",
        stimuli={"min_positive": 4},
        concepts={"min_count": 1},
    )
    with pytest.raises(CorpusError, match=r"expected a concept with at least 4 positives .* among 3 stimuli"):
        stimuli.run(opened(recipe, tmp_path / "run", "stimuli"))


def test_embeddings_of_another_clip_are_refused(tmp_path: Path) -> None:
    recipe = until_embeddings(make_folder(tmp_path / "pics", 9), tmp_path / "run")
    folder = tmp_path / "run" / "embeddings"
    for kind in ("img_emb", "text_emb"):
        rows = np.load(folder / kind / f"{kind}_0.npy")
        np.save(folder / kind / f"{kind}_0.npy", rows[:, :31])
    with pytest.raises(FormatError, match=r"expected embeddings of width 32.*got 31"):
        stimuli.run(opened(recipe, tmp_path / "run", "stimuli"))


def test_the_template_is_filled_as_text(tmp_path: Path) -> None:
    class Recorder:
        def embed_texts(self, texts: list[str]) -> Any:
            import torch

            self.texts = texts
            return torch.ones(len(texts), 3)

    recorder = Recorder()
    embed_concepts(recorder, ["{0}", "a {concept}"], "a photo of {concept} {x}")  # type: ignore[arg-type]
    assert recorder.texts == ["a photo of {0} {x}", "a photo of a {concept} {x}"]


def test_a_small_corpus_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = until_embeddings(make_folder(tmp_path / "pics", 24), tmp_path / "run")
    stimuli.run(opened(recipe, tmp_path / "run", "stimuli"))
    assert "5 positives a concept out of 24 stimuli" in capsys.readouterr().err
    assert "lower stimuli.n_positive to 1" in (tmp_path / "run" / "log.jsonl").read_text()
