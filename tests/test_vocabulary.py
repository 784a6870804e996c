"""Concepts come from captions or a table, in a stable order and with stable ids; drops are counted."""

from pathlib import Path

import pytest
from pictures import make_folder, tiny_recipe
from small_run import opened

from builders import corpus, vocabulary
from builders.stages import Work, done
from builders.vocabulary import (
    COLUMNS,
    caption_name,
    concept_row,
    edited,
    from_captions,
    from_table,
    from_wordnet,
    slug,
    words,
)
from daco.errors import CorpusError, FormatError
from daco.tables import CONCEPTS, read_table, table_of, write_table


def test_words_are_lower_case_long_enough_and_no_stop_words() -> None:
    assert words("A T-shirt on the BEACH, isn't it? 12 cats") == ["t-shirt", "beach", "isn't", "cats"]


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("pistol, gun, violence, weapon", "pistol"),
        ("Gun, weapon", "gun"),
        ("kitchen knife, knife, blade", ""),  # a name of two words is no single-word concept
        ("A man, a dog and a cat on the grass", ""),
        ("Pistol", ""),
        ("the, of", ""),
        ("", ""),
    ],
)
def test_the_name_of_a_keyword_list_is_its_first_part(caption: str, name: str) -> None:
    assert caption_name(caption) == name


def test_frequent_words_and_names_become_concepts_in_a_stable_order() -> None:
    captions = [
        "pistol, gun, weapon",
        "a gun, lying there on a table",
        "red gun",
        "red red red table",
        "rare one",
    ]
    rows, skipped = from_captions(captions, min_count=2, max_concepts=99)
    assert [row["concept"] for row in rows] == ["gun", "red", "table", "pistol"]  # by count, ties by word
    assert [row["rank"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["concept_id"] == "user:pistol"
    assert skipped == {"rare": 3}  # weapon, lying, rare
    assert from_captions(captions, 2, max_concepts=3) == (rows[:3], {"rare": 3, "over_max": 1})


def test_slugs_keep_letters_and_digits_of_any_script() -> None:
    assert slug("  Hate speech! ") == "hate-speech"
    assert slug("Größe_2") == "größe-2"
    assert slug("../..") == ""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_table_gives_ids_passes_on_labels_and_counts_duplicates(tmp_path: Path) -> None:
    table = write(
        tmp_path / "c.tsv",
        "concept\tconcept_id\tsynset\tpos\tdefinition\tgroup\tpolarity\n"
        "gun\twn30:03467984-n:gun\tgun.n.01\tn\ta weapon\tartifact\tundesirable\n"
        "hate speech\t\t\t\t\t\t\n"
        "Hate  Speech\t\t\t\t\t\t\n"
        "gun\twn30:03467984-n:gun\t\t\t\t\tneutral\n"
        " \t\t\t\t\t\t\n"
        "last\t\t\t\t\t\t\n",
    )
    rows, skipped = from_table(table, max_concepts=2)
    assert [row["concept_id"] for row in rows] == ["wn30:03467984-n:gun", "user:hate-speech"]
    assert (rows[0]["polarity"], rows[0]["polarity_source"]) == ("undesirable", "concepts table")
    assert (rows[1]["polarity"], rows[1]["polarity_source"]) == ("neutral", "")
    assert (rows[0]["group"], rows[0]["definition"]) == ("artifact", "a weapon")
    assert skipped == {"duplicate": 2, "empty_concept": 1, "over_max": 1}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("word\tpos\nx\tn\n", CorpusError, r"expected column 'concept', got \['word', 'pos'\]"),
        ("concept\tpolarity\nx\tbad\n", FormatError, "row 1: expected a polarity of .* got 'bad'"),
        ("concept\tconcept_id\nx\tgun\n", FormatError, "row 1: expected a concept_id like .* got 'gun'"),
    ],
)
def test_a_broken_table_is_an_error_that_names_the_row(
    tmp_path: Path, text: str, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        from_table(write(tmp_path / "c.tsv", text), 9)


def rows_of(*names: str) -> list[dict]:
    return [concept_row(rank, name) for rank, name in enumerate(names)]


def test_a_users_list_adds_drops_and_relabels(tmp_path: Path) -> None:
    edits = write(
        tmp_path / "mine.tsv",
        "action\tconcept\tpolarity\tdefinition\trationale\n"
        "drop\tball\t\t\t\n"
        "relabel\tuser:knife\tundesirable\t\tit cuts\n"
        "relabel\tHate  Speech\tundesirable\t\t\n"
        "add\tvape pen\tundesirable\tan electronic cigarette\t\n"
        "add\tknife\tdesirable\t\t\n"
        "add\t!\t\t\t\n",
    )
    rows, counts = edited(rows_of("ball", "knife", "hate speech"), edits)
    assert [(row["concept"], row["rank"]) for row in rows] == [
        ("knife", 0),
        ("hate speech", 1),
        ("vape pen", 2),
    ]
    assert [row["polarity"] for row in rows] == ["undesirable"] * 3
    assert {row["polarity_source"] for row in rows} == {"mine.tsv"}
    assert (rows[0]["rationale"], rows[2]["definition"]) == ("it cuts", "an electronic cigarette")
    assert counts == {"dropped_by_edit": 1, "edit_already_there": 1, "empty_concept": 1}


def test_an_edit_without_its_concept_warns_with_the_nearest(tmp_path: Path) -> None:
    edits = write(tmp_path / "mine.tsv", "action\tconcept\ndrop\tknive\n")
    with pytest.warns(
        UserWarning, match=r"row 1: expected a concept to drop, got 'knive'; nearest: \['knife'\]"
    ):
        rows, counts = edited(rows_of("ball", "knife"), edits)
    assert (len(rows), counts) == (2, {"edit_without_concept": 1})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("action\tname\n", CorpusError, "expected column 'concept'"),
        ("action\tconcept\nremove\tball\n", FormatError, "row 1: expected an action of .* got 'remove'"),
        (
            "action\tconcept\nrelabel\tball\n",
            FormatError,
            "row 1: expected a polarity of .* to relabel 'ball'",
        ),
        (
            "action\tconcept\tpolarity\nadd\tx\tbad\n",
            FormatError,
            "row 1: expected a polarity of .* got 'bad'",
        ),
    ],
)
def test_a_broken_list_of_edits_is_an_error_that_names_the_row(
    tmp_path: Path, text: str, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        edited(rows_of("ball"), write(tmp_path / "mine.tsv", text))


def test_of_a_wordnet_vocabulary_the_labelled_stay_first(tmp_path: Path) -> None:
    labelled = {"polarity": "undesirable"}
    rows = [
        concept_row(i, name, labelled if name == "gun" else {})
        for i, name in enumerate(("dog", "cat", "gun"))
    ]
    write_table(tmp_path / "v.parquet", table_of(rows, COLUMNS))
    assert from_wordnet(tmp_path / "v.parquet", 9)[1] == {}
    kept, skipped = from_wordnet(tmp_path / "v.parquet", 2)
    assert [(row["concept"], row["rank"]) for row in kept] == [("dog", 0), ("gun", 1)]
    assert skipped == {"over_max": 1}


def test_the_stage_takes_wordnets_concepts_and_edits(tmp_path: Path) -> None:
    edits = write(
        tmp_path / "mine.tsv", "action\tconcept\tpolarity\ndrop\tperson\t\nadd\tzorblax\tdesirable\n"
    )
    recipe = tiny_recipe(
        make_folder(tmp_path / "pics", 8),
        concepts={"source": "wordnet", "max_concepts": 2_000, "edits": str(edits)},
    )
    corpus.run(opened(recipe, tmp_path / "run", "corpus"))
    vocabulary.run(opened(recipe, tmp_path / "run", "concepts"))
    rows = read_table(tmp_path / "run" / "concepts" / "concepts.parquet", COLUMNS).to_pylist()
    assert (len(rows), rows[0]["concept"], rows[-1]["concept"]) == (2_000, "say", "zorblax")
    assert sum(row["polarity"] == "undesirable" for row in rows) > 900
    counts = done(tmp_path / "run", "concepts")["counts"]
    assert counts == {"in": 15_001, "out": 2_000, "skipped": {"dropped_by_edit": 1, "over_max": 13_000}}


def test_the_stage_writes_concepts_and_none_is_an_error(tmp_path: Path) -> None:
    recipe = tiny_recipe(make_folder(tmp_path / "pics", 24))
    corpus.run(opened(recipe, tmp_path / "run", "corpus"))
    vocabulary.run(opened(recipe, tmp_path / "run", "concepts"))
    table = read_table(tmp_path / "run" / "concepts" / "concepts.parquet", CONCEPTS)
    found = table["concept"].to_pylist()
    assert found[:4] == ["thing", "ball", "heart", "knife"]
    assert {"red", "blue"} <= set(found)
    assert done(tmp_path / "run", "concepts")["counts"]["out"] == len(found)
    empty = write(tmp_path / "none.tsv", "concept\n")
    strict = tiny_recipe(tmp_path / "pics", concepts={"source": "table", "path": str(empty)})
    again = Work(strict, tmp_path / "run", "concepts")
    assert again.open("another fingerprint")
    with pytest.raises(CorpusError, match="expected at least one concept from 'table'"):
        vocabulary.run(again)
