"""Makes the vocabulary of 15,000 concepts, with their polarity, from a WordNet 3.0 folder; reads it back.

Reads a WordNet folder and the lists of `data/` (roots of both polarities, and what WordNet lacks); writes one
parquet (`python -m builders vocabulary --wordnet DIR --out FILE`). `data/wordnet-15k.parquet` was made so.
"""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from builders.corpus import read_rows
from builders.lexicon import Lexicon, Sense, Synset, read_lexicon
from builders.vocabulary import COLUMNS, concept_row
from daco.errors import FormatError
from daco.tables import table_of, write_table

DATA = Path(__file__).parent / "data"
SIZE = 15_000
"""Concepts of that vocabulary."""

SIGNS = ("+", "-", "+1", "-1")
"""Last column of a list of roots. `+`, `-`: the sense and all kinds of it are in or out, and the nearest root
above a sense decides. `+1`: this word counts in this sense, whatever it mostly means. `-1`: this is out."""

_WORD = re.compile(r"[a-z]{3,}(?:-[a-z]+)*")
_ROMAN = re.compile(r"(?=[mdclxvi]{2})m*(?:cm|cd|d?c{0,3})(?:xc|xl|l?x{0,3})(?:ix|iv|v?i{0,3})")
_POS = {"n": 0, "v": 1, "a": 2, "s": 2}
"""Parts of speech of concepts, in the order that decides between equal tag counts."""

_FUNCTIONS = """
again all and any anything both could did does done each either enough even ever every everything few first
get got had has have having here just last least less let like many may might more most much must neither
never next non nor not nothing now off one ones only other others otherwise own per quite rather same
several should some something somebody someone still such than that the them then there these they this
those too used very was well were what which who whole whose why will with would yet you
"""
_FUNCTION_WORDS = frozenset(_FUNCTIONS.split())
_NUMBERS = ("integer%1:23:00", "cardinal%3:00:00", "ordinal%3:00:00")
"""Senses whose kinds are numbers, which are no concepts."""


class Root(NamedTuple):
    """A row of a list of roots."""

    group: str
    """What the list calls such concepts, such as `weapons`."""
    lemma: str
    """The word of the sense key."""
    synset: str
    """Id of the sense's synset."""
    sign: str
    """One of SIGNS."""


class Label(NamedTuple):
    """A word's polarity, and why."""

    polarity: str
    """`undesirable` or `desirable`."""
    sense: Sense
    """The sense that the word counts in."""
    root: Root
    """The root above that sense."""


def read_roots(path: Path, lexicon: Lexicon) -> tuple[list[Root], list[str]]:
    """Roots of a TSV (columns group, sense_key_prefix, sign), and the sense keys that this WordNet lacks.

    Raises:
        CorpusError: there is no table at `path`.
        FormatError: a column or sign is not as expected; names the row.
    """
    columns, rows = read_rows(path)
    if missing := [name for name in ("group", "sense_key_prefix", "sign") if name not in columns]:
        raise FormatError(f"{path.name}: expected columns {missing}, got {columns}")
    by_key = _by_key(lexicon)
    roots, lacking = [], []
    for number, row in enumerate(rows, start=1):
        if row["sign"] not in SIGNS:
            raise FormatError(f"{path.name}: row {number}: expected a sign of {SIGNS}, got {row['sign']!r}")
        found = by_key.get(row["sense_key_prefix"], [])
        lacking += [] if found else [row["sense_key_prefix"]]
        roots += [Root(row["group"], lemma, sense.synset, row["sign"]) for lemma, sense in found]
    return roots, lacking


def _by_key(lexicon: Lexicon) -> dict[str, list[tuple[str, Sense]]]:
    """Lemma and sense by sense key, whole or without its last two fields, an adjective's head."""
    found: dict[str, list[tuple[str, Sense]]] = {}
    for lemma, senses in lexicon.senses.items():
        for sense in senses:
            for key in (sense.key, sense.key.rsplit(":", 2)[0]):
                found.setdefault(key, []).append((lemma, sense))
    return found


def closure(lexicon: Lexicon, roots: Iterable[Root]) -> dict[str, Root]:
    """Every synset at or below a `+` or `-` root, with the nearest root above it; of two as near, a `-`.

    Breadth first from all roots at once, so that the first to arrive is the nearest.
    """
    ordered = sorted((r for r in roots if len(r.sign) == 1), key=lambda r: (r.sign != "-", r.synset))
    reached: dict[str, Root] = {}
    front = [(root.synset, root) for root in ordered]
    while front:
        below = []
        for synset, root in front:
            if synset not in reached:
                reached[synset] = root
                below += [(kind, root) for kind in lexicon.synsets[synset].kinds]
        front = sorted(below, key=lambda pair: (pair[1].sign != "-", pair[1].synset, pair[0]))
    return reached


def words(lexicon: Lexicon) -> dict[str, Sense]:
    """Lower-case one-token nouns, verbs and adjectives with their dominant sense; no names, no numbers."""
    numbers = _number_synsets(lexicon)
    found = {}
    for lemma, senses in lexicon.senses.items():
        kept = [s for s in senses if s.synset[-1] in _POS and not lexicon.synsets[s.synset].instance]
        if kept and is_word(lemma):
            sense = dominant(kept)
            if sense.synset not in numbers and lexicon.synsets[sense.synset].group != "noun.quantity":
                found[lemma] = sense
    return found


def is_word(lemma: str) -> bool:
    """Whether a lemma is one lower-case token of three letters and more, no function word or numeral."""
    return bool(_WORD.fullmatch(lemma)) and lemma not in _FUNCTION_WORDS and not _ROMAN.fullmatch(lemma)


def _number_synsets(lexicon: Lexicon) -> set[str]:
    by_key = _by_key(lexicon)
    roots = [Root("", "", s.synset, "+") for key in _NUMBERS for _, s in by_key.get(key, [])]
    return set(closure(lexicon, roots))


def dominant(senses: Iterable[Sense]) -> Sense:
    """The sense with most tags within the part of speech with most tags."""
    by_pos: dict[int, list[Sense]] = {}
    for sense in senses:
        by_pos.setdefault(_POS[sense.synset[-1]], []).append(sense)
    pos = min(by_pos, key=lambda p: (-sum(s.tags for s in by_pos[p]), p))
    return min(by_pos[pos], key=lambda s: (-s.tags, s.number, s.synset))


def ranked(lexicon: Lexicon, senses: Mapping[str, Sense]) -> list[str]:
    """Lemmas by tag count, count in glosses and number of senses, falling, then as WordNet lists synonyms."""

    def key(lemma: str) -> tuple[int, int, int, int, str]:
        all_ = lexicon.senses[lemma]
        glosses = lexicon.in_glosses[lemma]
        return -sum(s.tags for s in all_), -glosses, -len(all_), senses[lemma].place, lemma

    return sorted(senses, key=key)


def labels_of(
    lexicon: Lexicon, dominants: Mapping[str, Sense], polarity: str, roots: list[Root]
) -> dict[str, Label]:
    """The words that a list of roots labels: by their dominant sense, but for `+1` and `-1`."""
    below = closure(lexicon, roots)
    barred = {root.synset for root in roots if root.sign == "-1"}
    labels = {
        lemma: Label(polarity, sense, below[sense.synset])
        for lemma, sense in dominants.items()
        if sense.synset in below and below[sense.synset].sign == "+" and sense.synset not in barred
    }
    for root in roots:
        if root.sign == "+1":
            sense = next(s for s in lexicon.senses[root.lemma] if s.synset == root.synset)
            labels[root.lemma] = Label(polarity, sense, root)
    return labels


def hand_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the list of what WordNet lacks (columns concept, polarity, group, definition).

    Raises:
        CorpusError: there is no table at `path`.
    """
    return [
        concept_row(0, row["concept"], {"definition": row["definition"], "polarity": row["polarity"]})
        | {"polarity_source": "hand list", "rationale": row["group"]}
        for row in read_rows(path)[1]
    ]


class Walk:
    """Concepts chosen so far; one more is refused when it says what a chosen one says."""

    def __init__(self, lexicon: Lexicon, taken: Collection[str] = ()) -> None:
        self.lexicon, self.taken = lexicon, taken
        self.chosen: dict[str, Sense] = {}
        self.synsets: set[str] = set()
        self.dropped: dict[str, str] = {}

    def take(self, lemma: str, sense: Sense) -> bool:
        """Choose a lemma in a sense, or keep why not."""
        if reason := self._refusal(lemma, sense):
            self.dropped[lemma] = reason
            return False
        self.chosen[lemma] = sense
        self.synsets.add(sense.synset)
        return True

    def _refusal(self, lemma: str, sense: Sense) -> str:
        if lemma in self.chosen or lemma in self.taken:
            return "duplicate"
        if any(base in self.chosen for base in self.lexicon.bases.get(lemma, ())):
            return "inflection"
        if sense.synset in self.synsets:
            return "synonym"
        related = self.lexicon.derived.get(sense.key, ())
        if any(other[:4] == lemma[:4] and other in self.chosen for other in related):
            return "derivation"
        return ""


def build(
    lexicon: Lexicon, size: int = SIZE, data: Path = DATA
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The vocabulary: labelled words first, then the walk down the ranked rest, `size` concepts in all.

    Undesirable words are taken before desirable ones and both before all others, so that what the dictionary
    is for is never dropped as a synonym or derivation of something neutral. Rows come out by rank, the
    commonest first; the hand list's, which no text was counted for, last.

    Args:
        lexicon: Of `read_lexicon`.
        size: Concepts, at most.
        data: Folder of the lists of roots and of the hand list.

    Returns:
        Rows of COLUMNS, and counts: of words, of what was dropped why, of sense keys that this WordNet lacks.
    """
    dominants = words(lexicon)
    by_hand = hand_rows(data / "hand_list.tsv")
    walk = Walk(lexicon, {row["concept"] for row in by_hand})
    labels: dict[str, Label] = {}
    lacking: list[str] = []
    for polarity in ("undesirable", "desirable"):
        roots, missing = read_roots(data / f"{polarity}_roots.tsv", lexicon)
        lacking += missing
        found = labels_of(lexicon, dominants, polarity, roots)
        taken = [lemma for lemma in ranked(lexicon, senses_of(found)) if walk.take(lemma, found[lemma].sense)]
        labels |= {lemma: found[lemma] for lemma in taken}
    for lemma in ranked(lexicon, dominants):
        if len(walk.chosen) + len(by_hand) >= size:
            break
        if lemma not in walk.chosen:
            walk.take(lemma, dominants[lemma])
    order = ranked(lexicon, walk.chosen)
    rows = [_row(lexicon, lemma, walk.chosen[lemma], labels.get(lemma)) for lemma in order]
    rows = [row | {"rank": rank} for rank, row in enumerate([*rows, *by_hand][:size])]
    if lacking:
        warnings.warn(
            f"expected senses that this WordNet lacks: {lacking}; their rows did nothing", stacklevel=2
        )
    return rows, {
        "words": len(dominants),
        "lacking_roots": len(lacking),
        **dict(sorted(Counter(walk.dropped.values()).items())),
    }


def senses_of(labels: Mapping[str, Label]) -> dict[str, Sense]:
    """The sense that each labelled word counts in."""
    return {lemma: label.sense for lemma, label in labels.items()}


def _row(lexicon: Lexicon, lemma: str, sense: Sense, label: Label | None) -> dict[str, Any]:
    synset = lexicon.synsets[sense.synset]
    facts = {
        "concept_id": f"wn30:{synset.id}:{lemma}",
        "synset": synset.name,
        "pos": synset.id[-1],
        "definition": synset.definition,
        "group": synset.group,
    }
    row = concept_row(0, lemma.replace("_", " "), facts)
    return row | {
        "polarity": label.polarity if label else "neutral",
        "polarity_source": "wordnet",
        "rationale": _rationale(lexicon, synset, label.root) if label else "",
    }


def _rationale(lexicon: Lexicon, synset: Synset, root: Root) -> str:
    """Such as `weapons: a kind of weapon.n.01`."""
    kind = "" if root.synset == synset.id else f": a kind of {lexicon.synsets[root.synset].name}"
    return f"{root.group}{kind}"


def write_vocabulary(wordnet: Path, out: Path, size: int = SIZE) -> dict[str, int]:
    """Build the vocabulary from a WordNet folder and write it; returns the counts of `build`.

    Raises:
        ArtefactNotFoundError: nltk is not installed, or the folder lacks a file.
    """
    rows, counts = build(read_lexicon(wordnet), size)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_table(out, table_of(rows, COLUMNS))
    return counts
