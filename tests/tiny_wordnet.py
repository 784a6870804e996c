"""A WordNet of a few synsets in the format of wndb(5WN): reader and rules can be tested anywhere."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

FILES = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
NUMBERS = {"n": 1, "v": 2, "a": 3, "r": 4, "s": 5}


class Tiny(NamedTuple):
    """A synset: its words with their tag counts, and pointers as (symbol, other synset's name)."""

    name: str
    pos: str
    group: int
    words: tuple[tuple[str, int], ...]
    gloss: str
    pointers: tuple[tuple[str, str], ...] = ()


SYNSETS = (
    Tiny("entity", "n", 3, (("entity", 1),), 'what is; "the entity"', (("~", "weapon"), ("~", "tool"))),
    Tiny(
        "weapon",
        "n",
        6,
        (("weapon", 9), ("arm", 2)),
        "for fighting; - J. Doe",
        (("~", "gun"), ("~", "toy_gun")),
    ),
    Tiny("gun", "n", 6, (("gun", 30), ("shooter", 0)), "a weapon that discharges a missile"),
    Tiny("toy_gun", "n", 6, (("popgun", 0), ("toy_gun", 0)), "a plaything; guns for children"),
    Tiny("tool", "n", 6, (("tool", 12), ("implement", 5)), "helps to work", (("~", "knife"),)),
    Tiny("knife", "n", 6, (("knife", 8),), "cuts"),
    Tiny("arm", "n", 8, (("arm", 40),), "a limb"),
    Tiny("help", "n", 4, (("help", 20), ("aid", 3)), "the act of helping; guns guns", (("~", "rescue"),)),
    Tiny("rescue", "n", 4, (("rescue", 6),), "saving"),
    Tiny("teach", "v", 32, (("teach", 25),), "make learn", (("+", "teacher"),)),
    Tiny("teacher", "n", 18, (("teacher", 15),), "one who teaches", (("+", "teach"),)),
    Tiny("paris", "n", 15, (("Paris", 5), ("paname", 0)), "a city", (("@i", "entity"),)),
    Tiny("good", "a", 0, (("good", 33), ("goods", 0)), "as it should be", (("&", "kind"),)),
    Tiny("kind", "s", 0, (("kind(p)", 7),), "gentle", (("&", "good"),)),
    Tiny("seven", "s", 0, (("seven", 50), ("vii", 0)), "being one more than six", (("&", "cardinal"),)),
    Tiny("cardinal", "a", 0, (("cardinal", 1),), "being a number", (("&", "seven"),)),
    Tiny("mile", "n", 23, (("mile", 50),), "a length"),
    Tiny("with", "n", 9, (("have", 99), ("go", 98)), "words that are none"),
    Tiny("slowly", "r", 2, (("slowly", 10),), "not fast"),
)
HEADER = "  1 WordNet 3.0 Copyright 2006 by nobody, a made-up one for tests.\n"


def write_wordnet(folder: Path, synsets: tuple[Tiny, ...] = SYNSETS) -> Path:
    """Write the files of a WordNet folder, without lexnames, as Debian has it."""
    folder.mkdir(parents=True, exist_ok=True)
    places = _places(synsets)
    data, senses = defaultdict(lambda: HEADER), []
    index: dict[str, dict[str, list[tuple[int, str]]]] = {pos: defaultdict(list) for pos in "nvar"}
    for synset in synsets:
        data[FILES[synset.pos]] += _line(synset, places)
        for place, (word, tags) in enumerate(synset.words):
            lemma = word.partition("(")[0].lower()
            index[synset.pos.replace("s", "a")][lemma].append((-tags, places[synset.name]))
            head = f"{_head(synset, synsets)}:00" if synset.pos == "s" else ":"
            key = f"{lemma}%{NUMBERS[synset.pos]}:{synset.group:02d}:{place:02d}:{head}"
            senses.append((lemma, synset, key, tags))
    for pos, file in (("n", "noun"), ("v", "verb"), ("a", "adj"), ("r", "adv")):
        (folder / f"data.{file}").write_text(data[file])
        lines = []
        for lemma, found in sorted(index[pos].items()):
            offsets = " ".join(offset for _, offset in sorted(found))
            lines.append(f"{lemma} {pos} {len(found)} 0 {len(found)} 0 {offsets}  \n")
        (folder / f"index.{file}").write_text(HEADER + "".join(lines))
        (folder / f"{file}.exc").write_text("")
    lines = []
    for lemma, synset, key, tags in sorted(senses, key=lambda s: s[2]):
        found = sorted(index[synset.pos.replace("s", "a")][lemma])
        number = [offset for _, offset in found].index(places[synset.name]) + 1
        lines.append(f"{key} {places[synset.name]} {number} {tags}\n")
    (folder / "index.sense").write_text("".join(lines))
    (folder / "cntlist.rev").write_text("")
    return folder


def _places(synsets: tuple[Tiny, ...]) -> dict[str, str]:
    """Byte offset of every synset's line in its file, eight digits."""
    none = {synset.name: "0" * 8 for synset in synsets}
    ends: dict[str, int] = defaultdict(lambda: len(HEADER))
    places = {}
    for synset in synsets:
        file = FILES[synset.pos]
        places[synset.name] = f"{ends[file]:08d}"
        ends[file] += len(_line(synset, none))
    return places


def _line(synset: Tiny, places: dict[str, str]) -> str:
    kinds = {s.name: s.pos for s in SYNSETS}
    words = " ".join(f"{word} {place:x}" for place, (word, _) in enumerate(synset.words))
    pointers = "".join(
        f" {symbol} {places[other]} {kinds[other].replace('s', 'a')} {'0101' if symbol == '+' else '0000'}"
        for symbol, other in synset.pointers
    )
    frames = " 01 + 01 00" if synset.pos == "v" else ""
    counts = f"{len(synset.words):02x} {words} {len(synset.pointers):03d}{pointers}{frames}"
    return f"{places[synset.name]} {synset.group:02d} {synset.pos} {counts} | {synset.gloss}  \n"


def _head(synset: Tiny, synsets: tuple[Tiny, ...]) -> str:
    other = next(other for symbol, other in synset.pointers if symbol == "&")
    return next(s for s in synsets if s.name == other).words[0][0]


def write_lists(folder: Path) -> Path:
    """Lists of roots and a hand list for this WordNet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "undesirable_roots.tsv").write_text(
        "group\tsense_key_prefix\tsign\n"
        "weapons\tweapon%1:06:00\t+\nweapons\tpopgun%1:06:00\t-\nweapons\tknife%1:06:00::\t+1\n"
        "weapons\tlaser%1:06:00\t+\n"
    )
    (folder / "desirable_roots.tsv").write_text(
        "group\tsense_key_prefix\tsign\nhelp\thelp%1:04:00\t+\nkindness\tgood%3:00:00\t+\nkindness\tgood%3:00:00\t-1\n"
    )
    (folder / "hand_list.tsv").write_text(
        "concept\tpolarity\tgroup\tdefinition\ndeepfake\tundesirable\tfraud\ta made-up picture\n"
    )
    return folder
