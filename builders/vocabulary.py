"""Stage `concepts`: the vocabulary of the dictionary, from the captions themselves or from a table.

Reads `corpus/stimuli.parquet` (captions) or a table; writes `concepts.parquet`, whose polarity a later stage
fills (a table's own labels are passed on).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from builders.corpus import clean_caption, read_rows
from builders.stages import Work
from daco.errors import CorpusError, FormatError
from daco.tables import CONCEPTS, POLARITIES, read_table, table_of, write_table

_STOP = """
a about above across after all along also an and any are around as at away back be been before being below
beside between both but by can could did do does down during each few for from front full further get gets
go going had has have having he her here hers him his how i if in inside into is it its itself just like
lot made make making many may me more most much my near next no not of off on one onto only or other
others our out over own per several she side so some such than that the their them then there these they
this those through to together too top towards two under until up upon us use used using very via was we
were what when where which while who whose will with within without would you your three four five six
seven eight nine ten another behind against it's
"""
STOP_WORDS = frozenset(_STOP.split())
"""Words of captions that are no concepts of their own."""

MAX_NAME = 200
"""Characters of a concept's name, at most."""

_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
_NOT_SLUG = re.compile(r"[\W_]+")
_ID = re.compile(r"(wn30:\d{8}-[nvasr]:\S+|user:\S+)")


def slug(name: str) -> str:
    """A name as the end of an id: lower case, everything but letters and digits as `-`."""
    return _NOT_SLUG.sub("-", name.lower()).strip("-")


def words(text: str) -> list[str]:
    """Lower-case words of three letters and more, without stop words, in order."""
    return [w for w in _WORD.findall(text.lower()) if len(w) > 2 and w not in STOP_WORDS]


def caption_name(caption: str) -> str:
    """The name in a caption of the form `name, keyword, keyword`, when it is a single word, else "".

    A caption counts as such a list when at least half of its comma-joined parts are single words: a sentence
    with a comma in it is none.
    """
    parts = [part.strip().lower() for part in caption.split(",")]
    single = sum(" " not in part for part in parts)
    name = parts[0]
    is_name = _WORD.fullmatch(name) and len(name) > 1 and name not in STOP_WORDS
    return name if is_name and len(parts) > 1 and 2 * single >= len(parts) else ""


def from_captions(
    captions: Iterable[str], min_count: int, max_concepts: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Concepts of captions: words that at least `min_count` captions have, and names, however rare.

    Returns:
        Rows of CONCEPTS, the most frequent first and ties by word, and counts of what was skipped.
    """
    found: Counter[str] = Counter()
    names: set[str] = set()
    for caption in captions:
        name = caption_name(caption)
        found.update({*words(caption), name} - {""})
        names.add(name)
    chosen = [(word, n) for word, n in found.items() if n >= min_count or word in names]
    chosen.sort(key=lambda pair: (-pair[1], pair[0]))
    skipped = {"rare": len(found) - len(chosen), "over_max": max(0, len(chosen) - max_concepts)}
    rows = [concept_row(rank, word) for rank, (word, _) in enumerate(chosen[:max_concepts])]
    return rows, {reason: n for reason, n in skipped.items() if n}


def concept_row(rank: int, concept: str, row: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row of CONCEPTS; what `row` does not say is empty, and the polarity neutral until it is labelled."""
    row = {key: clean_caption(value) for key, value in (row or {}).items()}
    polarity = row.get("polarity", "")
    return {
        "concept_id": row.get("concept_id") or f"user:{slug(concept)}",
        "concept": concept,
        "synset": row.get("synset", ""),
        "pos": row.get("pos", ""),
        "definition": row.get("definition", ""),
        "group": row.get("group", ""),
        "rank": rank,
        "polarity": polarity or "neutral",
        "polarity_source": "concepts table" if polarity else "",
        "n_positive": 0,
    }


def from_table(path: Path, max_concepts: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Concepts of a TSV, CSV or parquet table in its own order.

    Args:
        path: Columns: concept; optional concept_id, synset, pos, definition, group, polarity.
        max_concepts: Rows kept, at most.

    Returns:
        Rows of CONCEPTS and counts of what was skipped (duplicate, empty_concept, long_concept, over_max).

    Raises:
        CorpusError: no table at `path`, or it has no column `concept`.
        FormatError: a concept_id or polarity breaks the format; names the row.
    """
    columns, table = read_rows(path)
    if "concept" not in columns:
        raise CorpusError(f"{path.name}: expected column 'concept', got {columns}; check concepts.path")
    rows: dict[str, dict[str, Any]] = {}
    skipped: Counter[str] = Counter()
    for number, cells in enumerate(table, start=1):
        concept = clean_caption(cells["concept"])
        row = concept_row(len(rows), concept, cells)
        if not slug(concept):
            skipped["empty_concept"] += 1
        elif len(concept) > MAX_NAME:
            skipped["long_concept"] += 1
        elif row["concept_id"] in rows:
            skipped["duplicate"] += 1
        elif len(rows) == max_concepts:
            skipped["over_max"] += 1
        else:
            _check_row(row, f"{path.name}: row {number}")
            rows[row["concept_id"]] = row
    return list(rows.values()), dict(skipped)


def _check_row(row: Mapping[str, Any], where: str) -> None:
    if not _ID.fullmatch(row["concept_id"]):
        raise FormatError(
            f"{where}: expected a concept_id like wn30:03467984-n:gun or user:gun, got {row['concept_id']!r}"
        )
    if row["polarity"] not in POLARITIES:
        raise FormatError(f"{where}: expected a polarity of {POLARITIES}, got {row['polarity']!r}")


def captions_of(corpus: Path) -> Iterator[str]:
    """Captions of the corpus stage, in order."""
    yield from read_table(corpus / "stimuli.parquet")["caption"].to_pylist()


def run(work: Work) -> None:
    """Choose the concepts and write them.

    Raises:
        CorpusError: there is not one concept.
    """
    config = work.recipe.concepts
    corpus = work.upstream("corpus")
    if config.source == "table":
        rows, skipped = from_table(Path(config.path), config.max_concepts)
    else:
        captions = work.progress(captions_of(corpus), unit="caption")
        rows, skipped = from_captions(captions, config.min_count, config.max_concepts)
    if not rows:
        raise CorpusError(
            f"expected at least one concept from {config.source!r}, got none (skipped: {skipped}); "
            "lower concepts.min_count, or give a table"
        )
    write_table(work.folder / "concepts.parquet", table_of(rows, CONCEPTS))
    work.drop_shards()
    counts = {"in": len(rows) + sum(skipped.values()), "out": len(rows), "skipped": skipped}
    work.finish(counts, rows={"concepts.parquet": len(rows)})
