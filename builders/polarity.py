"""Stage `polarity`: labels every linked concept desirable, undesirable or neutral, and keeps who says why.

Reads `concepts/concepts.parquet`, `stimuli/links.parquet`, a TSV of labels and what the annotator reads;
writes `concepts.parquet` (complete), `labels.parquet` (every opinion on every concept) and `facts.json` (how
many of each, where opinions differ). Answers of models are kept in `cache/polarity/` of the run folder.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from builders.annotate import BY_WORDNET, Label, annotate
from builders.corpus import clean_caption, read_rows
from builders.recipe import Recipe
from builders.stages import Work
from builders.vocabulary import slug
from daco.errors import CorpusError, FormatError
from daco.manifest import canonical_json, write_atomic
from daco.tables import CONCEPTS, POLARITIES, read_table, table_of, write_table

WORDS = Path(__file__).resolve().parent.parent / "recipes" / "polarity_words.tsv"
"""The list that labels concepts when the recipe names none."""

LABELS = pa.schema(
    [
        ("concept_id", pa.string()),
        ("concept", pa.string()),
        ("polarity", pa.string()),
        ("source", pa.string()),
        ("rationale", pa.string()),
        ("used", pa.bool_()),
    ]
)
"""One row per opinion on a concept, the one that counts first."""

DEFAULT = Label("neutral", "default", "")
"""The label of a concept on which there is no opinion."""


def read_labels(path: Path) -> tuple[dict[str, Label], int]:
    """Labels of a TSV (columns concept, polarity, optional rationale) by concept_id or slug.

    Returns:
        The labels, their source the file's name, and how many rows contradict others.

    Raises:
        CorpusError: no table at `path`, or it lacks one of the columns.
        FormatError: a label is not one of `POLARITIES`; names the row.
    """
    columns, rows = read_rows(path)
    for column in ("concept", "polarity"):
        if column not in columns:
            raise CorpusError(f"{path.name}: expected column {column!r}, got {columns}; check polarity.path")
    labels: dict[str, Label] = {}
    contradictions = 0
    for number, row in enumerate(rows, start=1):
        name, polarity = clean_caption(row["concept"]), clean_caption(row["polarity"])
        if polarity not in POLARITIES:
            raise FormatError(
                f"{path.name}: row {number} ({name!r}): expected a polarity of {POLARITIES}, got {polarity!r}"
            )
        label = Label(polarity, path.name, clean_caption(row.get("rationale")))
        contradictions += labels.setdefault(_key(name), label).polarity != polarity
    return labels, contradictions


def _key(name: str) -> str:
    return name if name.startswith(("wn30:", "user:")) else slug(name)


def by_list(concepts: Iterable[Mapping[str, Any]], labels: Mapping[str, Label]) -> dict[str, Label]:
    """The labels that a list has for concepts, by concept_id; found by id or by name."""
    found = {c["concept_id"]: labels.get(c["concept_id"]) or labels.get(slug(c["concept"])) for c in concepts}
    return {id_: label for id_, label in found.items() if label}


def by_owner(concepts: Iterable[Mapping[str, Any]]) -> dict[str, Label]:
    """The labels that the concepts' own table or a list of edits gave them, by concept_id."""
    return {
        c["concept_id"]: Label(c["polarity"], c["polarity_source"], c.get("rationale") or "")
        for c in concepts
        if c["polarity_source"] and c["polarity_source"] not in BY_WORDNET
    }


def label_concepts(
    concepts: Iterable[Mapping[str, Any]], annotators: Sequence[Mapping[str, Label]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Give every concept the label of the first annotator that has an opinion on it.

    Args:
        concepts: Rows of CONCEPTS.
        annotators: Labels by concept_id, the one that wins first.

    Returns:
        Rows of CONCEPTS, and of LABELS.
    """
    rows, opinions = [], []
    for concept in concepts:
        found = [labels[concept["concept_id"]] for labels in annotators if concept["concept_id"] in labels]
        found = list(dict.fromkeys(found)) or [DEFAULT]
        rows.append(dict(concept) | {"polarity": found[0].polarity, "polarity_source": found[0].source})
        named = {"concept_id": concept["concept_id"], "concept": concept["concept"]}
        opinions += [named | label._asdict() | {"used": label is found[0]} for label in found]
    return rows, opinions


def differences(opinions: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, int]]:
    """On how many concepts opinions differ, and how often which opinion stands against which.

    Args:
        opinions: Rows of LABELS, those of a concept together and the used one first.
    """
    pairs: Counter[str] = Counter()
    concepts, used = set(), None
    for row in opinions:
        used = row if row["used"] else used
        if used and row["polarity"] != used["polarity"]:
            concepts.add(row["concept_id"])
            pairs[f"{used['source']}: {used['polarity']}, {row['source']}: {row['polarity']}"] += 1
    return len(concepts), dict(sorted(pairs.items()))


def complete(concepts: Sequence[Mapping[str, Any]], positives: Mapping[str, int]) -> list[dict[str, Any]]:
    """The concepts that have stimuli, with n_positive, in their order."""
    return [
        dict(concept) | {"n_positive": positives[concept["concept_id"]]}
        for concept in concepts
        if positives.get(concept["concept_id"])
    ]


def annotator_of(recipe: Recipe) -> str:
    """The annotator of a recipe: what it names, or what fits its concepts."""
    return recipe.polarity.annotator or ("wordnet" if recipe.concepts.source == "wordnet" else "list")


def opinions_of(
    work: Work, concepts: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Label]], dict[str, int]]:
    """Labels of every annotator, by concept_id, the one that wins first, and facts about them.

    The recipe's list wins, then what the concepts' own table says, then the recipe's annotator, then
    WordNet's subtrees where the concepts are WordNet's or a model was asked.
    """
    config, annotator = work.recipe.polarity, annotator_of(work.recipe)
    cache = work.out / "cache" / "polarity"
    labels, contradictions = read_labels(Path(config.path)) if config.path else ({}, 0)
    warn_of_unknown(labels, concepts)
    opinions: list[Mapping[str, Label]] = [by_list(concepts, labels), by_owner(concepts)]
    facts = {"contradictions_in_list": contradictions}
    if annotator == "list" and not config.path:
        labels, facts["contradictions_in_list"] = read_labels(WORDS)
        opinions.append(by_list(concepts, labels))
    if annotator in ("endpoint", "mllm"):
        found = annotate(concepts, config, cache, lambda batches: work.progress(batches, unit="batch"))
        facts["unanswered"] = len(concepts) - len(found)
        opinions.append(found)
    if annotator != "list" or work.recipe.concepts.source == "wordnet":
        opinions.append(annotate(concepts, replace(config, annotator="wordnet"), cache))
    return opinions, facts


def warn_of_unknown(labels: Mapping[str, Label], concepts: Iterable[Mapping[str, Any]]) -> None:
    """Warn when labels of the recipe's list name no concept of the run: a slip would go unseen."""
    known = {name for c in concepts for name in (c["concept_id"], slug(c["concept"]))}
    if unknown := [name for name in labels if name not in known]:
        warnings.warn(
            f"polarity.path: {len(unknown)} of {len(labels)} labels name no concept that has stimuli here, "
            f"such as {', '.join(unknown[:5])}; they change nothing",
            stacklevel=2,
        )


def warn_of_empty_sides(sides: Mapping[str, int]) -> None:
    """Warn when no concept is undesirable, or none desirable: nothing to steer away from, or towards."""
    empty = [side for side in ("undesirable", "desirable") if not sides[side]]
    if empty:
        warnings.warn(
            f"expected desirable and undesirable concepts, got no {' and no '.join(empty)} one among "
            f"{sum(sides.values())}; list some in a TSV (columns concept, polarity) and set polarity.path",
            stacklevel=2,
        )


def run(work: Work) -> None:
    """Label the concepts that have stimuli."""
    concepts = read_table(work.upstream("concepts") / "concepts.parquet", CONCEPTS).to_pylist()
    links = read_table(work.upstream("stimuli") / "links.parquet").select(["concept_id", "role"]).to_pandas()
    positives = links[links["role"] == "positive"]["concept_id"].value_counts().to_dict()
    linked = complete(concepts, positives)
    annotators, facts = opinions_of(work, linked)
    rows, opinions = label_concepts(linked, annotators)
    write_table(work.folder / "concepts.parquet", table_of(rows, CONCEPTS))
    write_table(work.folder / "labels.parquet", table_of(opinions, LABELS))
    found = Counter(row["polarity"] for row in rows)
    sides = {polarity: found[polarity] for polarity in POLARITIES}
    n_differing, pairs = differences(opinions)
    facts = sides | facts | {"disagreements": n_differing, "opinions_against": pairs}
    write_atomic(work.folder / "facts.json", canonical_json(facts))
    warn_of_empty_sides(sides)
    work.drop_shards()
    dropped = len(concepts) - len(rows)
    counts = {"in": len(concepts), "out": len(rows), "skipped": {"no_stimuli": dropped} if dropped else {}}
    work.finish(counts, rows={"concepts.parquet": len(rows), "labels.parquet": len(opinions)})
