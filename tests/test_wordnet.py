"""A vocabulary from WordNet: read by nltk, deduplicated, ranked, labelled, always the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_wordnet import write_lists, write_wordnet

from builders.lexicon import Lexicon, lexnames, open_wordnet, read_lexicon
from builders.vocabulary import COLUMNS, WORDNET
from builders.wordnet import DATA, SIZE, build, closure, read_roots, words, write_vocabulary
from daco.errors import ArtefactNotFoundError, FormatError
from daco.tables import POLARITIES, read_table

pytest.importorskip("nltk", reason="needs nltk: pip install --group wordnet")
INSTALLED = Path("/usr/share/wordnet")


@pytest.fixture(scope="module")
def lexicon(tmp_path_factory: pytest.TempPathFactory) -> Lexicon:
    return read_lexicon(write_wordnet(tmp_path_factory.mktemp("wordnet")))


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lists(tmp_path_factory.mktemp("lists"))


def test_the_lexicon_has_senses_kinds_counts_and_clean_definitions(lexicon: Lexicon) -> None:
    by_name = {synset.name: synset for synset in lexicon.synsets.values()}
    weapon, gun = by_name["weapon.n.01"], by_name["gun.n.01"]
    assert (weapon.definition, weapon.group, weapon.id[-2:]) == ("for fighting", "noun.artifact", "-n")
    assert set(weapon.kinds) == {gun.id, by_name["popgun.n.01"].id}
    assert by_name["good.a.01"].kinds == (by_name["kind.s.01"].id,)  # adjectives like it, and not back again
    assert by_name["kind.s.01"].kinds == ()
    assert [(s.number, s.tags, s.place) for s in lexicon.senses["arm"]] == [(2, 2, 1), (1, 40, 0)]
    assert "kind" in lexicon.senses  # without the marker of WordNet's adjectives
    assert lexicon.in_glosses["gun"] == 3  # "guns", counted with it
    assert lexicon.derived[lexicon.senses["teacher"][0].key] == {"teach"}
    assert lexicon.bases["goods"] == frozenset()  # a lemma of its own


def test_words_are_no_names_numbers_quantities_or_function_words(lexicon: Lexicon) -> None:
    found = words(lexicon)
    assert not {"paname", "seven", "vii", "mile", "have", "go", "slowly", "toy_gun", "cardinal"} & set(found)
    assert {"gun", "teach", "good", "kind", "arm"} <= set(found)
    assert lexicon.synsets[found["arm"].synset].definition == "a limb"  # its dominant sense


def test_labelled_words_come_first_and_nothing_is_said_twice(lexicon: Lexicon, lists: Path) -> None:
    with pytest.warns(UserWarning, match=r"this WordNet lacks: \['laser%1:06:00'\]"):
        rows, counts = build(lexicon, 99, lists)
    labels = {row["concept"]: (row["polarity"], row["rationale"]) for row in rows}
    assert labels["gun"] == ("undesirable", "weapons: a kind of weapon.n.01")
    assert labels["weapon"] == ("undesirable", "weapons")
    assert labels["arm"] == ("neutral", "")  # also a weapon, but mostly a limb
    assert labels["knife"] == ("undesirable", "weapons")  # by name
    assert labels["popgun"] == ("neutral", "")  # the nearer root takes it out
    assert labels["rescue"] == ("desirable", "help: a kind of help.n.01")
    assert labels["kind"] == ("desirable", "kindness: a kind of good.a.01")
    assert labels["good"] == ("neutral", "")
    assert labels["deepfake"] == ("undesirable", "fraud")
    assert not {"shooter", "implement", "aid", "teacher"} & set(labels)
    assert (counts["synonym"], counts["derivation"], counts["lacking_roots"]) == (4, 1, 1)
    assert [row["rank"] for row in rows] == list(range(len(rows)))
    assert [row["concept"] for row in rows[:5]] == ["arm", "good", "gun", "teach", "help"]  # by tags
    assert (rows[-1]["concept_id"], rows[-1]["polarity_source"]) == ("user:deepfake", "hand list")
    gun = rows[2]
    assert (gun["concept_id"][:5], gun["concept_id"][-6:], gun["group"]) == (
        "wn30:",
        "-n:gun",
        "noun.artifact",
    )
    assert (gun["synset"], gun["pos"], gun["polarity_source"]) == ("gun.n.01", "n", "wordnet")
    with pytest.warns(UserWarning, match="lacks"):
        few, _ = build(lexicon, 8, lists)
    chosen = {row["concept"] for row in few}
    assert chosen == {"gun", "weapon", "knife", "help", "rescue", "kind", "deepfake", "arm"}


def test_of_two_roots_as_near_a_minus_decides(lexicon: Lexicon, tmp_path: Path) -> None:
    roots = tmp_path / "roots.tsv"
    roots.write_text("group\tsense_key_prefix\tsign\na\tweapon%1:06:00\t+\nb\tweapon%1:06:00\t-\n")
    found = closure(lexicon, read_roots(roots, lexicon)[0])
    assert {root.sign for root in found.values()} == {"-"}


def test_a_broken_list_of_roots_names_its_row(lexicon: Lexicon, tmp_path: Path) -> None:
    roots = tmp_path / "roots.tsv"
    roots.write_text("group\tsense_key_prefix\tsign\na\tgun%1:06:00\t*\n")
    with pytest.raises(FormatError, match=r"row 1: expected a sign of .* got '\*'"):
        read_roots(roots, lexicon)
    roots.write_text("group\tkey\na\tgun%1:06:00\n")
    with pytest.raises(FormatError, match=r"expected columns \['sense_key_prefix', 'sign'\]"):
        read_roots(roots, lexicon)


def test_what_is_no_wordnet_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtefactNotFoundError, match=r"expected a WordNet 3\.0 folder"),
        open_wordnet(tmp_path / "none"),
    ):
        pass


def test_the_lexnames_that_debian_leaves_out_are_made() -> None:
    lines = lexnames().splitlines()
    assert len(lines) == 45
    assert (lines[6], lines[44]) == ("06\tnoun.artifact\t1", "44\tadj.ppl\t3")


def test_bytes_do_not_depend_on_the_order_of_hashes(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path / "wordnet")
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "builders", "vocabulary", "--wordnet", str(folder), "--size", "20"]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run(
            [*command, "--out", str(tmp_path / seed)], check=True, env=environment, capture_output=True
        )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_the_vocabulary_that_is_shipped_is_whole() -> None:
    rows = read_table(WORDNET, COLUMNS).to_pylist()
    assert (
        len(rows) == SIZE == len({row["concept_id"] for row in rows}) == len({row["concept"] for row in rows})
    )
    assert [row["rank"] for row in rows] == list(range(SIZE))
    assert {row["polarity"] for row in rows} == set(POLARITIES)
    sides = {side: sum(row["polarity"] == side for row in rows) for side in POLARITIES}
    assert sides["undesirable"] > 900
    assert sides["desirable"] > 350
    by_name = {row["concept"]: row for row in rows}
    for word in ("gun", "heroin", "torture", "phishing", "human trafficking", "child pornography"):
        assert by_name[word]["polarity"] == "undesirable", word
    assert all(
        by_name[word]["polarity"] == "desirable" for word in ("rescue", "hospital", "sympathy", "peace")
    )
    assert all(by_name[word]["polarity"] == "neutral" for word in ("dog", "arm", "table", "person"))
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (DATA / "WORDNET-LICENSE").read_text()


@pytest.mark.slow
def test_the_vocabulary_that_is_shipped_is_what_wordnet_gives(tmp_path: Path) -> None:
    """Takes a minute: all of WordNet is read."""
    if not (INSTALLED / "index.sense").is_file():
        pytest.skip("needs WordNet: apt install wordnet-base wordnet-sense-index")
    with pytest.warns(UserWarning, match="malware"):
        write_vocabulary(INSTALLED, tmp_path / "again.parquet")
    assert read_table(tmp_path / "again.parquet", COLUMNS).equals(read_table(WORDNET, COLUMNS))
    made_by = [pq.ParquetFile(path).metadata.created_by for path in (WORDNET, tmp_path / "again.parquet")]
    if made_by[0] == made_by[1]:  # another pyarrow writes other bytes
        assert (tmp_path / "again.parquet").read_bytes() == WORDNET.read_bytes()
