"""Reads a WordNet 3.0 folder through nltk into plain tables: synsets, senses with tag counts, relations.

Reads the files of Debian's `wordnet-base` and `wordnet-sense-index`, or nltk's `corpora/wordnet`; writes
nothing. nltk (dependency group `wordnet`) is needed here alone: the vocabulary is shipped ready made.
"""

import re
import shutil
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from daco.errors import ArtefactNotFoundError

FILES = (
    "cntlist.rev",
    "index.sense",
    *(f"{kind}.{pos}" for kind in ("index", "data") for pos in ("adj", "adv", "noun", "verb")),
    *(f"{pos}.exc" for pos in ("adj", "adv", "noun", "verb")),
)
"""Files of a WordNet folder that nltk's reader needs, besides `lexnames`, which Debian leaves out."""

_LEXNAMES = """
adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive
noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation
noun.shape noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication
verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception
verb.possession verb.social verb.stative verb.weather adj.ppl
"""
"""Lexicographer files in their order (lexnames(5WN)): the supersenses."""

_MARKER = re.compile(r"\((?:a|p|ip)\)$")
_ATTRIBUTION = re.compile(r"\s*[;:,](?:\s*[;:,])*\s*(?:-.*)?$")
_TOKEN = re.compile(r"[a-z]+(?:-[a-z]+)*")


class Synset(NamedTuple):
    """A set of synonyms: one meaning."""

    id: str
    """`<offset>-<pos>`, as in a concept_id."""
    name: str
    """nltk's name, such as `gun.n.01`."""
    group: str
    """Its supersense, such as `noun.artifact`."""
    definition: str
    """Its gloss without the examples."""
    instance: bool
    """Whether it is a single thing with a proper name, such as a city."""
    kinds: tuple[str, ...]
    """Ids of its hyponyms (kinds of a thing, ways to do), of the adjectives like it, and of the words that
    are used so (of `ethnic slur`: the slurs)."""


class Sense(NamedTuple):
    """A lemma in one of its meanings."""

    key: str
    """Sense key, stable across versions of WordNet."""
    synset: str
    """Id of its synset."""
    number: int
    """Place among the lemma's senses of that part of speech, from 1."""
    tags: int
    """How often SemCor's texts have it."""
    place: int
    """Place of the lemma in its synset, from 0: the commonest name of a meaning comes first."""


@dataclass(frozen=True)
class Lexicon:
    """What the vocabulary is made from."""

    synsets: dict[str, Synset]
    """By id."""
    senses: dict[str, list[Sense]]
    """Of every lemma as WordNet spells it, `_` for a blank."""
    derived: dict[str, frozenset[str]]
    """By sense key, the lemmas that derive from that sense, or it from them."""
    bases: dict[str, frozenset[str]]
    """Lemmas that a lemma may be an inflected form of."""
    in_glosses: Counter[str]
    """How often all definitions and examples have a lemma, inflected forms counted with it."""


@contextmanager
def open_wordnet(folder: Path) -> Iterator[Any]:
    """nltk's reader of a WordNet folder; its files are copied for as long as the block lasts.

    nltk reads nothing outside its data path and wants a `lexnames`, which is made where it is missing.

    Raises:
        ArtefactNotFoundError: nltk is not installed, or the folder lacks a file.
    """
    try:
        import nltk.data
        from nltk.corpus.reader.wordnet import WordNetCorpusReader
    except ImportError as error:
        raise ArtefactNotFoundError(
            f"expected nltk, got {error}; install it with `pip install --group wordnet`"
        ) from error
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ArtefactNotFoundError(
            f"expected a WordNet 3.0 folder at {folder}, got none of {missing}; give the folder of data.noun "
            "and index.sense (Debian: wordnet-base and wordnet-sense-index make /usr/share/wordnet)"
        )
    with tempfile.TemporaryDirectory() as root:
        copy = Path(root, "corpora", "wordnet")
        copy.mkdir(parents=True)
        for name in FILES:
            shutil.copyfile(folder / name, copy / name)
        (copy / "lexnames").write_text(lexnames(), "utf-8")
        nltk.data.path.insert(0, root)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it has no other languages
                yield WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)
        finally:
            nltk.data.path.remove(root)


def lexnames() -> str:
    """The file `lexnames`: number, name and part of speech of every lexicographer file."""
    numbers = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    rows = enumerate(_LEXNAMES.split())
    return "".join(f"{i:02d}\t{name}\t{numbers[name.partition('.')[0]]}\n" for i, name in rows)


def read_lexicon(folder: Path) -> Lexicon:
    """Read a WordNet folder whole; takes about a minute.

    Raises:
        ArtefactNotFoundError: see `open_wordnet`.
    """
    with open_wordnet(folder) as reader:
        counts = _sense_counts(reader)
        synsets: dict[str, Synset] = {}
        senses: dict[str, list[Sense]] = defaultdict(list)
        derived: dict[str, set[str]] = defaultdict(set)
        tokens: Counter[str] = Counter()
        for synset in reader.all_synsets():
            row = _synset(synset)
            synsets[row.id] = row
            tokens.update(_TOKEN.findall(" ".join([row.definition, *synset.examples()]).lower()))
            for place, lemma in enumerate(synset.lemmas()):
                number, tags = counts.get(lemma.key(), (0, 0))
                senses[spelling(lemma.name())].append(Sense(lemma.key(), row.id, number, tags, place))
                _add_derived(derived, lemma)
        bases = {lemma: _bases(reader, lemma) for lemma in senses if _TOKEN.fullmatch(lemma)}
        in_glosses = _count_lemmas(reader, tokens, senses.keys())
    return Lexicon(
        synsets, dict(senses), {key: frozenset(lemmas) for key, lemmas in derived.items()}, bases, in_glosses
    )


def spelling(lemma: str) -> str:
    """A lemma without the marker of where an adjective may stand."""
    return _MARKER.sub("", lemma)


def _synset_id(synset: Any) -> str:
    return f"{synset.offset():08d}-{synset.pos()}"


def _synset(synset: Any) -> Synset:
    kinds = synset.similar_tos() if synset.pos() == "a" else synset.hyponyms()
    kinds += [kind for kind in synset.in_usage_domains() if kind.pos() in "nvas"]
    return Synset(
        _synset_id(synset),
        synset.name(),
        synset.lexname(),
        _ATTRIBUTION.sub("", synset.definition()).strip(),
        bool(synset.instance_hypernyms()),
        tuple(sorted({_synset_id(kind) for kind in kinds})),
    )


def _sense_counts(reader: Any) -> dict[str, tuple[int, int]]:
    """Sense number and tag count by sense key, from `index.sense`: nltk looks each up in a file."""
    with reader.open("index.sense") as lines:
        rows = (line.split() for line in lines)
        return {key: (int(number), int(tags)) for key, _, number, tags in rows}


def _add_derived(derived: dict[str, set[str]], lemma: Any) -> None:
    for other in lemma.derivationally_related_forms() + lemma.pertainyms():
        derived[lemma.key()].add(spelling(other.name()))
        derived[other.key()].add(spelling(lemma.name()))


def _bases(reader: Any, word: str) -> frozenset[str]:
    """Lemmas that a word may be an inflected form of, other than itself."""
    return frozenset({reader.morphy(word)} - {None, word})


def _count_lemmas(reader: Any, tokens: Counter[str], lemmas: Any) -> Counter[str]:
    """Counts of tokens as counts of lemmas: a token that is no lemma counts for all it may be a form of."""
    counted: Counter[str] = Counter()
    for token, n in tokens.items():
        for lemma in [token] if token in lemmas else _bases(reader, token):
            counted[lemma] += n
    return counted
