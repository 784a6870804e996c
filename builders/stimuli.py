"""Stage `stimuli`: the positives and negatives of every concept (Eq. 4 of arXiv 2604.08846).

Reads `concepts/concepts.parquet`, `embeddings/` and the run's CLIP; writes `links.parquet`. Shards hold the
candidates of some concepts; which of them become links is chosen over all concepts at the end, because a
stimulus may serve only so many of them.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from builders.clip import Clip, clip_of
from builders.embeddings import Embeddings, load_embeddings
from builders.knn_service import Service, propose, recall, search_candidates, search_negatives
from builders.proposals import Engine
from builders.recipe import StimuliConfig
from builders.retrieval import draw_places, draw_pool, search
from builders.scores import Corpus, Floats, Found, Ints
from builders.stages import Work, summed_counts
from daco.errors import CorpusError, FormatError
from daco.manifest import canonical_json, write_atomic
from daco.tables import LINKS, read_table, write_table

CANDIDATES = LINKS.set(LINKS.get_field_index("dist"), pa.field("dist", pa.float64()))
"""Columns of a shard: positives by rank, negatives in the order of drawing."""

CHECKED = 8
"""Concepts whose stimuli from a service are compared with the exact ones, in one pass over the corpus."""

FEW = 20
"""A corpus of fewer than this many stimuli a positive is small: the last positives have little to do with
their concept."""


def embed_concepts(clip: Clip, concepts: Sequence[str], template: str, batch: int = 64) -> Floats:
    """Unit text embeddings [n, d], float32, of `template` with each concept in place of `{concept}`."""
    texts = [template.replace("{concept}", concept) for concept in concepts]
    return np.concatenate(
        [clip.embed_texts(texts[i : i + batch]).numpy() for i in range(0, len(texts), batch)]
    )


def engine_of(config: StimuliConfig) -> Engine:
    """How the recipe wants proposals computed."""
    return Engine(config.dtype, config.device, config.memory)


# Candidates.


def n_candidates(config: StimuliConfig) -> int:
    """Stimuli retrieved for each concept: more than are wanted where some may be dropped."""
    drops = config.max_uses or config.duplicate_image or config.duplicate_caption
    return config.n_positive + (config.spare if drops else 0)


def find_candidates(
    concepts: Sequence[dict[str, Any]],
    queries: Floats,
    corpus: Corpus,
    ids: Sequence[str],
    pool: Ints,
    config: StimuliConfig,
    seed: int,
    engine: Engine | None = None,
    source_rows: Ints | None = None,
    checked: int = 0,
) -> tuple[pa.Table, Counter[str]]:
    """Candidates of some concepts, near-duplicates dropped.

    Args:
        concepts: Rows with concept_id and concept.
        queries: Their unit text embeddings [n, d].
        corpus: What is searched.
        ids: stimulus_id of every corpus row.
        pool: Corpus rows that negatives are drawn from.
        config: How many, and what counts as a duplicate.
        seed: The run's seed.
        engine: How to compute; by default as `config` says.
        source_rows: Of every corpus row the row of the index, where a service proposes.
        checked: Concepts whose stimuli from a service are compared with the exact ones.

    Returns:
        A table of CANDIDATES, and counts: near_duplicate_image, near_duplicate_caption, `by_<dtype>`, the
        concepts that a pass in that dtype settled, and of a service that was checked `recall_percent`.
    """
    draws = [draw_places(row["concept_id"], len(pool), config.n_positive, seed) for row in concepts]
    engine = engine or engine_of(config)
    k, n = n_candidates(config), config.n_positive
    counts: Counter[str] = Counter()
    if config.service:
        nearest = _by_service(queries, corpus, k, config, source_rows)
        negatives = search_negatives(queries, corpus, nearest.rows, pool, draws, n, engine)
        counts["by_service"] = len(concepts)
        if checked:
            counts["recall_percent"] = _recall_percent(nearest, queries, corpus, k, checked, engine)
    else:
        found = search(queries, corpus, k, pool=pool, draws=draws, n_negative=n, engine=engine)
        nearest, negatives = found.nearest, found.negatives
        counts.update({f"by_{name}": n for name, n in found.answered.items()})
    near = _without_duplicates(nearest, corpus, config, counts)
    sides = [_rows(concepts, near, "positive", ids), _rows(concepts, negatives, "negative", ids)]
    return pa.concat_tables(sides), counts


def _by_service(
    queries: Floats, corpus: Corpus, k: int, config: StimuliConfig, source_rows: Ints | None
) -> Found:
    if source_rows is None:
        raise FormatError(
            "stimuli.service: expected embeddings of a clip-retrieval folder, got the pipeline's own; "
            "set embeddings.path"
        )
    rows = np.full(int(source_rows.max()) + 1, -1, dtype=np.int64)
    rows[source_rows] = np.arange(len(source_rows))
    service = Service(config.service, config.index, config.proposals)
    return search_candidates(queries, corpus, k, propose(service, queries, rows))


def _recall_percent(
    found: Found, queries: Floats, corpus: Corpus, k: int, checked: int, engine: Engine
) -> int:
    """Of the exact k nearest of some concepts, evenly chosen, the share that was found, rounded down."""
    chosen = np.unique(np.linspace(0, len(queries) - 1, checked).astype(np.int64))
    exact = search(queries[chosen], corpus, k, engine=engine).nearest
    some = Found([found.rows[i] for i in chosen], [found.scores[i] for i in chosen])
    return int(100 * recall(some, exact))


def _rows(concepts: Sequence[dict[str, Any]], found: Found, role: str, ids: Sequence[str]) -> pa.Table:
    """Rows of CANDIDATES of one role, in the order of concepts and ranks."""
    lengths = [len(rows) for rows in found.rows]
    if not sum(lengths):
        return CANDIDATES.empty_table()
    who = np.repeat(np.arange(len(concepts)), lengths)
    columns = {
        "concept_id": pa.array([row["concept_id"] for row in concepts]).take(who),
        "concept": pa.array([row["concept"] for row in concepts]).take(who),
        "stimulus_id": [ids[row] for row in np.concatenate(found.rows).tolist()],
        "role": [role] * len(who),
        "rank": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "dist": np.concatenate([scores.dist for scores in found.scores]),
        "sim_image": np.concatenate([scores.image for scores in found.scores]).astype(np.float32),
        "sim_text": np.concatenate([scores.text for scores in found.scores]).astype(np.float32),
    }
    return pa.table(columns, schema=CANDIDATES)


def _without_duplicates(found: Found, corpus: Corpus, config: StimuliConfig, counts: Counter[str]) -> Found:
    """Each concept's stimuli without those too like a closer one of them, by image or by caption."""
    limits = (
        ("image", corpus.images, config.duplicate_image),
        ("caption", corpus.texts, config.duplicate_caption),
    )
    if not any(limit for _, _, limit in limits):
        return found
    kept_rows, kept_scores = [], []
    for rows, scores in zip(found.rows, found.scores, strict=True):
        same = {name: _alike(side.take(rows), limit) for name, side, limit in limits if limit}
        kept: list[int] = []
        for place in range(len(rows)):
            reason = next((name for name, alike in same.items() if alike[place, kept].any()), None)
            if reason is None:
                kept.append(place)
            else:
                counts[f"near_duplicate_{reason}"] += 1
        kept_rows.append(rows[kept])
        kept_scores.append(scores.at(kept))
    return Found(kept_rows, kept_scores)


def _alike(rows: Floats, limit: float) -> Floats:
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return np.asarray(unit @ unit.T >= limit)


# Links.


def choose_links(candidates: pa.Table, config: StimuliConfig) -> tuple[pd.DataFrame, Counter[str]]:
    """The links of all concepts.

    Positives: the closest pairs of concept and stimulus first, over all concepts, as long as the concept has
    room and the stimulus serves fewer than `max_uses`. Negatives: as many as positives, in drawing order.

    Args:
        candidates: A table of CANDIDATES.
        config: How many positives at most and at least, and of how many concepts.

    Returns:
        Columns of LINKS in the order of concepts (positives, then negatives, closest first), and counts of
        concepts (too_few_positives, no_negatives) and of candidates (over_max_uses).
    """
    frame = candidates.to_pandas()
    order = frame["concept_id"].drop_duplicates()
    frame["number"] = frame["concept_id"].map(pd.Series(np.arange(len(order)), index=order))
    positives, negatives = (frame[frame["role"] == role] for role in ("positive", "negative"))
    positives, counts = _capped(positives, config)
    wanted = positives.groupby("number").size()
    negatives = negatives[negatives["rank"] < negatives["number"].map(wanted).fillna(0)]
    enough, drawn = wanted.index[wanted >= config.min_positive], set(negatives["number"])
    counts["too_few_positives"] = len(order) - len(enough)
    linked = {number for number in enough if number in drawn}
    counts["no_negatives"] = len(enough) - len(linked)
    frame = pd.concat([positives, negatives])
    frame = frame[frame["number"].isin(linked)]
    frame["far"] = frame["role"] == "negative"
    frame = frame.sort_values(["number", "far", "dist", "stimulus_id"], kind="stable")
    frame["rank"] = frame.groupby(["number", "far"]).cumcount().astype(np.int32)
    return frame[LINKS.names], counts


def _capped(positives: pd.DataFrame, config: StimuliConfig) -> tuple[pd.DataFrame, Counter[str]]:
    """Positives within the caps on concepts and stimuli."""
    if not config.max_uses:
        return positives[positives["rank"] < config.n_positive], Counter()
    ordered = positives.sort_values(["dist", "number", "stimulus_id"], kind="stable")
    served: Counter[int] = Counter()
    uses: Counter[str] = Counter()
    kept, refused = [], 0
    for concept, stimulus in zip(ordered["number"].tolist(), ordered["stimulus_id"].tolist(), strict=True):
        free = served[concept] < config.n_positive
        kept.append(free and uses[stimulus] < config.max_uses)
        refused += free and not kept[-1]
        if kept[-1]:
            served[concept] += 1
            uses[stimulus] += 1
    return ordered[kept], Counter({"over_max_uses": refused})


# The stage.


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
    _warn_if_few(work, len(embeddings.ids))
    corpus, clip = Corpus.of(embeddings.images, embeddings.texts, embeddings.ids), clip_of(work)
    pool = draw_pool(len(embeddings.ids), config.pool, work.seed)
    for start in work.progress(range(0, len(concepts), config.block), unit="block"):
        if work.has(name := f"{start // config.block:06d}"):
            continue
        chunk = concepts[start : start + config.block]
        with work.shard(name) as folder:
            queries = embed_concepts(clip, [row["concept"] for row in chunk], config.template)
            _check_width(queries, embeddings)
            table, counts = find_candidates(
                chunk,
                queries,
                corpus,
                embeddings.ids,
                pool,
                config,
                work.seed,
                source_rows=embeddings.source_rows,
                checked=0 if start else CHECKED,
            )
            write_table(folder / "candidates.parquet", table)
            write_atomic(folder / "counts.json", canonical_json(counts))
    _join(work, len(concepts), len(embeddings.ids))


def _warn_if_few(work: Work, n_stimuli: int) -> None:
    n = work.recipe.stimuli.n_positive
    if n_stimuli < FEW * n:
        text = (
            f"{n} positives a concept out of {n_stimuli} stimuli: the last ones will hardly show it; "
            f"lower stimuli.n_positive to {max(1, n_stimuli // FEW)} or give a larger corpus"
        )
        work.log("warning", text=text)
        print(f"warning: {text}", file=sys.stderr)


def _check_width(queries: Floats, embeddings: Embeddings) -> None:
    if queries.shape[1] != embeddings.images.shape[1]:
        raise FormatError(
            f"expected embeddings of width {queries.shape[1]}, as clip.model has it, "
            f"got {embeddings.images.shape[1]}; set clip.model to the CLIP that made embeddings.path"
        )


def _join(work: Work, n_concepts: int, n_stimuli: int) -> None:
    shards = work.shards()
    candidates = pa.concat_tables([read_table(shard / "candidates.parquet", CANDIDATES) for shard in shards])
    links, counts = choose_links(candidates, work.recipe.stimuli)
    if not len(links):
        raise CorpusError(
            f"expected a concept with at least {work.recipe.stimuli.min_positive} positives and one negative "
            f"among {n_stimuli} stimuli, got none of {n_concepts}; "
            "give a larger corpus or lower stimuli.min_positive"
        )
    write_table(work.folder / "links.parquet", pa.Table.from_pandas(links, LINKS, preserve_index=False))
    summed = summed_counts(shards)
    recall = summed.pop("recall_percent", None)  # none found at all is worth saying, too
    dropped = +(summed + Counter({"over_max_uses": counts.pop("over_max_uses", 0)}))
    settled = {name: dropped.pop(name) for name in list(dropped) if name.startswith("by_")}
    work.log("settled", **settled, **({} if recall is None else {"recall_percent": recall}))
    if recall is not None:
        hint = "; raise stimuli.proposals for more" if recall < 100 else ""
        n = min(CHECKED, n_concepts, work.recipe.stimuli.block)
        print(f"stimuli.service found {recall} % of the exact answers of {n} concepts{hint}", file=sys.stderr)
    work.drop_shards()
    n_out = links["concept_id"].nunique()
    found = len(set(candidates["concept_id"].to_pylist()))
    counts["too_few_positives"] += n_concepts - found
    facts: dict[str, Any] = {"in": n_concepts, "out": n_out, "skipped": dict(+counts)}
    if dropped:
        facts["candidates_dropped"] = dict(dropped)
    work.finish(facts, rows={"links.parquet": len(links)})
