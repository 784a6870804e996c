"""Stage `stimuli`: the positives and negatives of every concept (Eq. 4 of arXiv 2604.08846).

Reads `concepts/concepts.parquet`, `embeddings/` and the run's CLIP; writes `links.parquet`. The corpus is
passed over in blocks, and only the best of each concept are kept: no [concepts, corpus] matrix ever exists.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from builders.clip import Clip, clip_of
from builders.embeddings import Embeddings, Half, load_embeddings
from builders.stages import Work, summed_counts
from daco.errors import CorpusError, FormatError
from daco.manifest import canonical_json, write_atomic
from daco.tables import LINKS, read_table, table_of, write_table

FLOOR = 1e-6
"""Cosines are clamped here before their logarithm is taken."""

CORPUS_BLOCK = 8_192
"""Stimuli scored at once."""

POOL_BLOCK = 32
"""Concepts whose distances to the whole pool are held at once."""

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

        The rounding swallows the last bits, in which machines and blocks differ: equal pairs tie everywhere.
        """
        product = np.maximum(self.image, FLOOR) * np.maximum(self.text, FLOOR)
        return product.astype(np.float32)

    @property
    def dist(self) -> Floats:
        """Eq. 4: sqrt(-(ln s_image + ln s_text)), float64."""
        logs = np.log(np.maximum(self.image, FLOOR)) + np.log(np.maximum(self.text, FLOOR))
        return np.sqrt(np.maximum(-logs, 0.0))

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Where both cosines are above zero; nothing else may be a positive."""
        return (self.image > 0) & (self.text > 0)

    def at(self, index: Any) -> "Scores":
        """The scores at an index."""
        return Scores(self.image[index], self.text[index])


@dataclass(frozen=True)
class Corpus:
    """What is searched: embeddings, and every row's place in the order of stimulus ids, which breaks ties."""

    images: Half
    texts: Half
    place: Ints

    @classmethod
    def of(cls, embeddings: Embeddings) -> "Corpus":
        """The corpus of an embeddings folder."""
        place = np.empty(len(embeddings.ids), dtype=np.int64)
        place[np.argsort(np.array(embeddings.ids), kind="stable")] = np.arange(len(place))
        return cls(embeddings.images, embeddings.texts, place)


def embed_concepts(clip: Clip, concepts: Sequence[str], template: str, batch: int = 64) -> Floats:
    """Unit text embeddings [n, d], float32, of `template` with each concept in place of `{concept}`."""
    texts = [template.replace("{concept}", concept) for concept in concepts]
    return np.concatenate(
        [clip.embed_texts(texts[i : i + batch]).numpy() for i in range(0, len(texts), batch)]
    )


def exact_scores(queries: Floats, corpus: Corpus, rows: Ints, columns: Ints) -> Scores:
    """Float64 cosines of pairs (queries[rows[i]], stimulus columns[i])."""
    asked = queries[rows].astype(np.float64)
    image, text = (
        np.einsum("nd,nd->n", asked, side[columns].astype(np.float64))
        for side in (corpus.images, corpus.texts)
    )
    return Scores(image, text)


def nearest(
    queries: Floats, corpus: Corpus, k: int, block: int = CORPUS_BLOCK
) -> tuple[list[Ints], list[Scores]]:
    """The k closest stimuli of every query: exact, ties by stimulus id.

    A float32 product picks candidates, generously by the bound on its rounding error; float64 ranks them.

    Args:
        queries: Unit rows [n, d].
        corpus: What is searched.
        k: Stimuli kept for each query, at most; those with a cosine <= 0 never count.
        block: Stimuli scored at once; does not change the result.

    Returns:
        For every query the corpus rows, closest first, and their scores.
    """
    best = [np.empty(0, np.int64) for _ in queries]
    scores = [Scores(np.empty(0), np.empty(0)) for _ in queries]
    asked = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
    margin = 4 * asked.shape[1] * 2.0**-24
    floor = torch.full((len(queries), 1), -1.0)  # closeness below which nothing can enter a query's k best
    for start in range(0, len(corpus.place), block):
        product = _rough(asked, corpus, slice(start, start + block), margin)
        bar = floor if bool((floor > 0).all()) else torch.maximum(floor, _kth(product, k))
        rows, columns = torch.nonzero(product >= (bar - margin).clamp_(min=0), as_tuple=True)
        _merge(queries, corpus, rows.numpy(), start + columns.numpy(), k, best, scores)
        full = [s.closeness[-1] if len(s.image) == k else -1.0 for s in scores]
        floor = torch.tensor(full, dtype=torch.float32)[:, None]
    return best, scores


def _rough(asked: Tensor, corpus: Corpus, block: slice, margin: float) -> Tensor:
    """Float32 product of clamped cosines [n, block]; -1 where a cosine is surely not positive."""
    image, text = (
        asked @ torch.from_numpy(side[block].astype(np.float32)).T for side in (corpus.images, corpus.texts)
    )
    hopeless = (image <= -margin) | (text <= -margin)
    return (image.clamp_(min=FLOOR) * text.clamp_(min=FLOOR)).masked_fill_(hopeless, -1.0)


def _kth(product: Tensor, k: int) -> Tensor:
    """The k-th largest of each row [n, 1]; -1 where the row is shorter."""
    if product.shape[1] < k:
        return torch.full((len(product), 1), -1.0)
    return product.topk(k, dim=1).values[:, -1:]


def _merge(
    queries: Floats, corpus: Corpus, rows: Ints, columns: Ints, k: int, best: list[Ints], scores: list[Scores]
) -> None:
    """Score a block's candidates exactly and merge them into the running k best."""
    exact = exact_scores(queries, corpus, rows, columns)
    positive = exact.positive
    rows, columns, exact = rows[positive], columns[positive], exact.at(positive)
    ends = np.searchsorted(rows, np.arange(len(queries) + 1))
    for query, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        if start == end:
            continue
        found = np.concatenate([best[query], columns[start:end]])
        both = Scores(
            *(np.concatenate(pair) for pair in zip(scores[query], exact.at(slice(start, end)), strict=True))
        )
        order = np.lexsort((corpus.place[found], -both.closeness))[:k]
        best[query], scores[query] = found[order], both.at(order)


def draw_pool(n: int, size: int, seed: int) -> Ints:
    """Rows of the pool of negatives, one for all concepts: `size` of `n`, rising."""
    rows: Ints = np.random.default_rng([seed, 4]).permutation(n)[:size]
    return np.sort(rows)


def draw_negatives(
    concept_id: str, scores: Scores, pool: Ints, place: Ints, positives: Ints, seed: int
) -> tuple[Ints, Scores]:
    """As many negatives as positives, drawn by (seed, concept_id) from the farther half of the pool.

    Args:
        concept_id: Whose negatives.
        scores: Of every pool member, [pool].
        pool: Corpus rows of the pool.
        place: Order of the corpus's stimulus ids, which breaks ties.
        positives: Corpus rows that are positives, never drawn.
        seed: The run's seed.

    Returns:
        Corpus rows, closest first, and their scores; fewer than positives only when the half has no more.
    """
    order = np.lexsort((place[pool], -scores.closeness))
    farther = order[len(pool) // 2 :]
    farther = farther[~np.isin(pool[farther], positives)]
    digest = hashlib.sha256(f"{seed}\0{concept_id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    chosen = farther[np.sort(rng.permutation(len(farther))[: len(positives)])]
    return pool[chosen], scores.at(chosen)


def cosines(queries: Floats, images: Floats, texts: Floats) -> Scores:
    """Float64 cosines [n, m] of queries [n, d] with m stimuli [m, d]; for a pool, not for a corpus."""
    asked, *sides = (np.asarray(rows, dtype=np.float64) for rows in (queries, images, texts))
    return Scores(*(asked @ side.T for side in sides))


def link_rows(
    concept: dict[str, Any], role: str, stimulus_ids: Sequence[str], scores: Scores
) -> list[dict[str, Any]]:
    """Rows of LINKS for one concept and role, in rank order."""
    values = zip(stimulus_ids, scores.dist.tolist(), scores.image.tolist(), scores.text.tolist(), strict=True)
    return [
        {
            "concept_id": concept["concept_id"],
            "concept": concept["concept"],
            "stimulus_id": stimulus,
            "role": role,
            "rank": rank,
            "dist": dist,
            "sim_image": image,
            "sim_text": text,
        }
        for rank, (stimulus, dist, image, text) in enumerate(values)
    ]


def link_concepts(
    concepts: Sequence[dict[str, Any]],
    queries: Floats,
    corpus: Corpus,
    ids: Sequence[str],
    *,
    n_positive: int,
    min_positive: int,
    pool: Ints,
    seed: int,
    block: int = CORPUS_BLOCK,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Positives and negatives of some concepts.

    Args:
        concepts: Rows with concept_id and concept.
        queries: Their unit text embeddings [n, d].
        corpus: What is searched.
        ids: stimulus_id of every corpus row.
        n_positive: Positives of each, at most.
        min_positive: A concept with fewer is dropped.
        pool: Corpus rows that negatives are drawn from.
        seed: The run's seed.
        block: Stimuli scored at once.

    Returns:
        Rows of LINKS in the order of concepts, and counts: in, too_few_positives, no_negatives.

    Source:
        arXiv 2604.08846, Eq. 4; the clamp, the ties and the negatives are ours.
    """
    best, scores = nearest(queries, corpus, n_positive, block)
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter({"in": len(concepts)})
    images, texts = (side[pool].astype(np.float64) for side in (corpus.images, corpus.texts))
    for start in range(0, len(concepts), POOL_BLOCK):
        far = cosines(queries[start : start + POOL_BLOCK], images, texts)
        for i, concept in enumerate(concepts[start : start + POOL_BLOCK], start):
            if len(best[i]) < min_positive:
                counts["too_few_positives"] += 1
                continue
            away, away_scores = draw_negatives(
                concept["concept_id"], far.at(i - start), pool, corpus.place, best[i], seed
            )
            if not len(away):
                counts["no_negatives"] += 1
                continue
            rows += link_rows(concept, "positive", [ids[row] for row in best[i]], scores[i])
            rows += link_rows(concept, "negative", [ids[row] for row in away], away_scores)
    return rows, counts


def run(work: Work) -> None:
    """Link every concept to its stimuli.

    Raises:
        FormatError: the embeddings were made with another CLIP.
        CorpusError: no concept has enough stimuli.
    """
    torch.set_num_threads(work.recipe.run.threads)
    config = work.recipe.stimuli
    concepts = read_table(work.upstream("concepts") / "concepts.parquet").to_pylist()
    embeddings = load_embeddings(work.upstream("embeddings"))
    corpus, clip = Corpus.of(embeddings), clip_of(work)
    pool = draw_pool(len(embeddings.ids), config.pool, work.seed)
    for start in work.progress(range(0, len(concepts), config.block), unit="block"):
        if work.has(name := f"{start // config.block:06d}"):
            continue
        chunk = concepts[start : start + config.block]
        with work.shard(name) as folder:
            queries = embed_concepts(clip, [row["concept"] for row in chunk], config.template)
            _check_width(queries, embeddings)
            rows, counts = link_concepts(
                chunk,
                queries,
                corpus,
                embeddings.ids,
                n_positive=config.n_positive,
                min_positive=config.min_positive,
                pool=pool,
                seed=work.seed,
            )
            write_table(folder / "links.parquet", table_of(rows, LINKS))
            write_atomic(folder / "counts.json", canonical_json(counts))
    _join(work, len(embeddings.ids))


def _check_width(queries: Floats, embeddings: Embeddings) -> None:
    if queries.shape[1] != embeddings.images.shape[1]:
        raise FormatError(
            f"expected embeddings of width {queries.shape[1]}, as clip.model has it, "
            f"got {embeddings.images.shape[1]}; set clip.model to the CLIP that made embeddings.path"
        )


def _join(work: Work, n_stimuli: int) -> None:
    skipped = summed_counts(work.shards())
    n_in = skipped.pop("in", 0)
    links = pa.concat_tables([read_table(shard / "links.parquet", LINKS) for shard in work.shards()])
    if not links.num_rows:
        raise CorpusError(
            f"expected a concept with at least {work.recipe.stimuli.min_positive} positives and one negative "
            f"among {n_stimuli} stimuli, got none of {n_in}; "
            "give a larger corpus or lower stimuli.min_positive"
        )
    write_table(work.folder / "links.parquet", links)
    work.drop_shards()
    counts = {"in": n_in, "out": n_in - sum(skipped.values()), "skipped": dict(skipped)}
    work.finish(counts, rows={"links.parquet": links.num_rows})
