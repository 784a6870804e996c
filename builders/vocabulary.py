"""Stage `concepts`: the vocabulary of the dictionary, from the captions, from a table or from WordNet.

Reads `corpus/stimuli.parquet` (captions), a table, or the vocabulary that `builders/wordnet.py` made, and a
list of edits; writes `concepts.parquet`, whose polarity a later stage fills (labels it has are passed on).
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa

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

COLUMNS = CONCEPTS.append(pa.field("rationale", pa.string()))
"""Columns of a vocabulary: those of CONCEPTS, and why a concept has the polarity that it has already."""

WORDNET = Path(__file__).parent / "data" / "wordnet-15k.parquet"
"""15,000 concepts of WordNet 3.0 with their polarity; see `data/README.md` and `data/WORDNET-LICENSE`."""

ACTIONS = ("add", "drop", "relabel")
"""What a list of edits can do."""

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
        Rows of COLUMNS, the most frequent first and ties by word, and counts of what was skipped.
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
    """A row of COLUMNS; what `row` does not say is empty, and the polarity neutral until it is labelled."""
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
        "rationale": row.get("rationale", ""),
    }


def from_table(path: Path, max_concepts: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Concepts of a TSV, CSV or parquet table in its own order.

    Args:
        path: Columns: concept; optional concept_id, synset, pos, definition, group, polarity,
            rationale.
        max_concepts: Rows kept, at most.

    Returns:
        Rows of COLUMNS and counts of what was skipped (duplicate, empty_concept, long_concept, over_max).

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
        if reason := _unusable(row):
            skipped[reason] += 1
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


def from_wordnet(path: Path, max_concepts: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Concepts of a vocabulary that `python -m builders vocabulary` made, by rank.

    Of more than `max_concepts`, those labelled desirable or undesirable stay first, then the highest ranks.

    Returns:
        Rows of COLUMNS and counts of what was skipped (over_max).

    Raises:
        IntegrityError: the file is no parquet.
        FormatError: it lacks a column.
    """
    rows = read_table(path, COLUMNS).to_pylist()
    by_need = sorted(rows, key=lambda row: (row["polarity"] == "neutral", row["rank"]))
    kept = sorted(by_need[:max_concepts], key=lambda row: row["rank"])
    return ranked(kept), {"over_max": len(rows) - len(kept)} if len(rows) > len(kept) else {}


def ranked(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, their ranks counted anew."""
    return [dict(row) | {"rank": rank} for rank, row in enumerate(rows)]


def edited(rows: Iterable[Mapping[str, Any]], path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Apply a user's list of edits.

    Args:
        rows: Rows of COLUMNS.
        path: TSV, CSV or parquet. Columns: action (add, drop or relabel) and concept (name or concept_id);
            for `relabel` polarity, for `add` what a table of concepts may have. Added concepts come last.

    Returns:
        Rows of COLUMNS and counts (dropped_by_edit, edit_without_concept, edit_already_there).

    Raises:
        CorpusError: no table at `path`, or it lacks a column.
        FormatError: an action, a polarity or a concept_id is not as expected; names the row.
    """
    columns, edits = read_rows(path)
    for column in ("action", "concept"):
        if column not in columns:
            raise CorpusError(f"{path.name}: expected column {column!r}, got {columns}; check concepts.edits")
    kept = {row["concept_id"]: dict(row) for row in rows}
    counts: Counter[str] = Counter()
    for number, edit in enumerate(edits, start=1):
        counts.update(_apply(kept, edit, path.name, f"{path.name}: row {number}"))
    return ranked(kept.values()), dict(counts)


def _apply(kept: dict[str, dict[str, Any]], edit: Mapping[str, Any], source: str, where: str) -> list[str]:
    """Apply one edit to the concepts by id; returns what is to be counted."""
    action, name = clean_caption(edit["action"]), clean_caption(edit["concept"])
    new = concept_row(0, name, edit)
    new["polarity_source"] = source if new["polarity_source"] else ""
    if action not in ACTIONS:
        raise FormatError(f"{where}: expected an action of {ACTIONS}, got {action!r}")
    if action == "relabel" and not new["polarity_source"]:
        raise FormatError(f"{where}: expected a polarity of {POLARITIES} to relabel {name!r}, got none")
    if reason := _unusable(new):
        return [reason]
    _check_row(new, where)
    if action == "add" and new["concept_id"] in kept:
        return ["edit_already_there"]
    if action == "add":
        kept[new["concept_id"]] = new
        return []
    found = [id_ for id_, row in kept.items() if name == id_ or slug(name) == slug(row["concept"])]
    if not found:
        near = get_close_matches(name, [row["concept"] for row in kept.values()])
        warnings.warn(f"{where}: expected a concept to {action}, got {name!r}; nearest: {near}", stacklevel=3)
        return ["edit_without_concept"]
    for id_ in found:
        if action == "drop":
            del kept[id_]
        else:
            kept[id_] |= {key: new[key] for key in ("polarity", "polarity_source", "rationale")}
    return ["dropped_by_edit"] * len(found) if action == "drop" else []


def _unusable(row: Mapping[str, Any]) -> str:
    """Why a name cannot be a concept's, or ""."""
    if not slug(row["concept"]):
        return "empty_concept"
    return "long_concept" if len(row["concept"]) > MAX_NAME else ""


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
    elif config.source == "wordnet":
        rows, skipped = from_wordnet(Path(config.path) if config.path else WORDNET, config.max_concepts)
    else:
        captions = work.progress(captions_of(corpus), unit="caption")
        rows, skipped = from_captions(captions, config.min_count, config.max_concepts)
    if config.edits:
        rows, counts_of_edits = edited(rows, Path(config.edits))
        skipped = skipped | counts_of_edits
    if not rows:
        raise CorpusError(
            f"expected at least one concept from {config.source!r}, got none (skipped: {skipped}); "
            "lower concepts.min_count, or give a table"
        )
    write_table(work.folder / "concepts.parquet", table_of(rows, COLUMNS))
    work.drop_shards()
    counts = {"in": len(rows) + sum(skipped.values()), "out": len(rows), "skipped": skipped}
    work.finish(counts, rows={"concepts.parquet": len(rows)})
