"""Finds concepts by what somebody types: exact names, parts, near misses, definitions; no files."""

import difflib
import unicodedata

import numpy as np
import pandas as pd

EXACT, WORDS, PREFIX, NEAR, DEFINITION = 1.0, 0.9, 0.8, 0.7, 0.5
"""Best score of a name or id that is the text, has all its words, starts with it, or is spelled nearly so;
and of a definition that has its words."""

MIN_RATIO = 0.6
"""How alike two spellings are at least, as difflib measures it."""


def simplified(text: str) -> str:
    """`text` as it is compared: compatible characters, no case or accents, spaces for `_` and `-`."""
    plain = unicodedata.normalize("NFKD", text).casefold().replace("_", " ").replace("-", " ")
    return " ".join("".join(c for c in plain if not unicodedata.combining(c)).split())


def scores(concepts: pd.DataFrame, text: str) -> np.ndarray:
    """How well each concept answers a text, `[n_concepts]` from 0 (not at all) to 1 (its name or id).

    Args:
        concepts: Columns concept_id, concept and definition.
        text: What is sought.

    Raises:
        ValueError: there is no word in it.
    """
    wanted = simplified(text)
    if not wanted:
        raise ValueError(f"text: expected words to search for, got {text!r}")
    matcher = difflib.SequenceMatcher(b=wanted, autojunk=False)
    rows = zip(concepts["concept_id"], concepts["concept"], concepts["definition"], strict=True)
    return np.array([_score(matcher, wanted, text, *map(str, row)) for row in rows])


def best(concepts: pd.DataFrame, text: str, n: int) -> pd.DataFrame:
    """Rows of the concepts that answer a text at all, at most `n`, best first, with a column `score`."""
    found = scores(concepts, text)
    order = np.argsort(-found, kind="stable")[:n]
    order = order[found[order] > 0]
    return concepts.iloc[order].assign(score=found[order])


def _score(
    matcher: "difflib.SequenceMatcher[str]",
    wanted: str,
    text: str,
    concept_id: str,
    name: str,
    definition: str,
) -> float:
    name = simplified(name)
    if name == wanted or concept_id == text.strip():
        return EXACT
    words, of_name = set(wanted.split()), set(name.split())
    best = 0.0
    if words <= of_name:  # the fewer other words, the better
        best = WORDS - 0.1 * (1 - len(words) / len(of_name))
    elif name.startswith(wanted):
        best = PREFIX - 0.1 * (1 - len(wanted) / len(name))
    return max(best, _near(matcher, name), DEFINITION * _share(words, definition))


def _near(matcher: "difflib.SequenceMatcher[str]", name: str) -> float:
    """Up to NEAR for a name that is spelled nearly so; cheap bounds come first."""
    matcher.set_seq1(name)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio)
    if any(bound() < MIN_RATIO for bound in bounds):
        return 0.0
    ratio = matcher.ratio()
    return NEAR * ratio if ratio >= MIN_RATIO else 0.0


def _share(words: set[str], definition: str) -> float:
    """Share of the words that a definition has."""
    there = {word.strip(".,;:()!?'\"") for word in simplified(definition).split()}
    return len(words & there) / len(words)
