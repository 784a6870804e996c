"""Stage `polarity`: labels every linked concept desirable, undesirable or neutral, and says why.

Reads `concepts/concepts.parquet`, `stimuli/links.parquet` and a TSV of labels; writes `concepts.parquet`
(complete) and `facts.json` (how many of each, and how many labels disagreed).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from builders.corpus import clean_caption, read_rows
from builders.stages import Work
from builders.vocabulary import slug
from daco.errors import CorpusError, FormatError
from daco.manifest import canonical_json, write_atomic
from daco.tables import CONCEPTS, POLARITIES, read_table, table_of, write_table

WORDS = Path(__file__).resolve().parent.parent / "recipes" / "polarity_words.tsv"
"""The list that labels concepts when the recipe names none."""


def read_labels(path: Path) -> tuple[dict[str, str], int]:
    """Labels of a TSV (columns concept, polarity) by concept_id or slug, and how many rows contradict others.

    Raises:
        CorpusError: no table at `path`, or it lacks one of the columns.
        FormatError: a label is not one of `POLARITIES`; names the row.
    """
    columns, rows = read_rows(path)
    for column in ("concept", "polarity"):
        if column not in columns:
            raise CorpusError(f"{path.name}: expected column {column!r}, got {columns}; check polarity.path")
    labels: dict[str, str] = {}
    disagreements = 0
    for number, row in enumerate(rows, start=1):
        name, label = clean_caption(row["concept"]), clean_caption(row["polarity"])
        if label not in POLARITIES:
            raise FormatError(
                f"{path.name}: row {number} ({name!r}): expected a polarity of {POLARITIES}, got {label!r}"
            )
        disagreements += labels.setdefault(_key(name), label) != label
    return labels, disagreements


def _key(name: str) -> str:
    return name if name.startswith(("wn30:", "user:")) else slug(name)


def label_concepts(
    concepts: Iterable[Mapping[str, Any]], labels: Mapping[str, str], source: str, overrides: bool
) -> tuple[list[dict[str, Any]], int]:
    """Give every concept its polarity.

    Args:
        concepts: Rows of CONCEPTS; a non-empty polarity_source means their own table labelled them.
        labels: Labels by concept_id or slug.
        source: What polarity_source says of those labels.
        overrides: Whether the labels win over the concepts' own table, or only fill its gaps.

    Returns:
        Rows, and in how many of them two labels disagreed.
    """
    rows, disagreements = [], 0
    for concept in concepts:
        label = labels.get(concept["concept_id"]) or labels.get(slug(concept["concept"]))
        own = concept["polarity"] if concept["polarity_source"] else None
        disagreements += bool(label and own and label != own)
        row = dict(concept)
        if label and (overrides or own is None):
            row |= {"polarity": label, "polarity_source": source}
        elif own is None:
            row |= {"polarity": "neutral", "polarity_source": "default"}
        rows.append(row)
    return rows, disagreements


def complete(concepts: Sequence[Mapping[str, Any]], positives: Mapping[str, int]) -> list[dict[str, Any]]:
    """The concepts that have stimuli, with n_positive, in their order."""
    return [
        dict(concept) | {"n_positive": positives[concept["concept_id"]]}
        for concept in concepts
        if positives.get(concept["concept_id"])
    ]


def run(work: Work) -> None:
    """Label the concepts that have stimuli."""
    config = work.recipe.polarity
    concepts = read_table(work.upstream("concepts") / "concepts.parquet", CONCEPTS).to_pylist()
    links = read_table(work.upstream("stimuli") / "links.parquet").select(["concept_id", "role"]).to_pandas()
    positives = links[links["role"] == "positive"]["concept_id"].value_counts().to_dict()
    path = Path(config.path) if config.path else WORDS
    labels, contradictions = read_labels(path)
    linked = complete(concepts, positives)
    rows, disagreements = label_concepts(linked, labels, path.name, overrides=bool(config.path))
    write_table(work.folder / "concepts.parquet", table_of(rows, CONCEPTS))
    found = Counter(row["polarity"] for row in rows)
    facts = {polarity: found[polarity] for polarity in POLARITIES}
    facts |= {"disagreements": disagreements, "contradictions_in_list": contradictions}
    write_atomic(work.folder / "facts.json", canonical_json(facts))
    work.drop_shards()
    dropped = len(concepts) - len(rows)
    counts = {"in": len(concepts), "out": len(rows), "skipped": {"no_stimuli": dropped} if dropped else {}}
    work.finish(counts, rows={"concepts.parquet": len(rows)})
