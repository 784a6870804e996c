"""Labels come from the concepts' table or a list, their source is recorded, and disagreements are counted."""

import json
from pathlib import Path

import pytest
from pictures import tiny_recipe
from small_run import opened

from builders import polarity
from builders.annotate import Label
from builders.polarity import WORDS, by_list, by_owner, differences, label_concepts, read_labels
from builders.stages import Work, done
from builders.vocabulary import concept_row
from daco.errors import CorpusError, FormatError
from daco.tables import CONCEPTS, LINKS, POLARITIES, read_table, table_of, write_table

LIST = "concept\tpolarity\nKnife\tundesirable\nshield\tdesirable\nuser:ball\tneutral\nknife\tdesirable\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_labels_are_found_by_id_or_name_and_contradictions_counted(tmp_path: Path) -> None:
    labels, contradictions = read_labels(write(tmp_path / "l.tsv", LIST))
    assert {name: label.polarity for name, label in labels.items()} == {
        "knife": "undesirable",
        "shield": "desirable",
        "user:ball": "neutral",
    }
    assert labels["knife"].source == "l.tsv"
    assert contradictions == 1  # the first label of knife stays


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("concept\tpolarity\nx\tevil\n", FormatError, r"row 1 \('x'\): expected a polarity of .* got 'evil'"),
        ("concept\tlabel\nx\tneutral\n", CorpusError, "expected column 'polarity'"),
    ],
)
def test_a_broken_list_is_an_error(tmp_path: Path, text: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        read_labels(write(tmp_path / "l.tsv", text))


def concepts() -> list[dict]:
    return [
        concept_row(0, "knife", {"polarity": "neutral"}),
        concept_row(1, "shield"),
        concept_row(2, "ball", {"polarity": "desirable"}),
        concept_row(3, "stone"),
    ]


def test_the_first_opinion_counts_and_differing_ones_are_counted() -> None:
    sides = {"knife": "undesirable", "shield": "desirable", "user:ball": "neutral"}
    listed = by_list(concepts(), {name: Label(side, "mine.tsv", "") for name, side in sides.items()})
    rows, opinions = label_concepts(concepts(), [listed, by_owner(concepts())])
    assert [row["polarity"] for row in rows] == ["undesirable", "desirable", "neutral", "neutral"]
    assert [row["polarity_source"] for row in rows] == ["mine.tsv"] * 3 + ["default"]
    assert differences(opinions) == (
        2,
        {
            "mine.tsv: neutral, concepts table: desirable": 1,
            "mine.tsv: undesirable, concepts table: neutral": 1,
        },
    )
    rows, opinions = label_concepts(concepts(), [by_owner(concepts()), listed])
    assert [row["polarity"] for row in rows] == ["neutral", "desirable", "desirable", "neutral"]
    assert [row["polarity_source"] for row in rows] == [
        "concepts table",
        "mine.tsv",
        "concepts table",
        "default",
    ]
    assert differences(opinions)[0] == 2
    assert [row["used"] for row in opinions] == [True, False, True, True, False, True]


def test_an_empty_side_warns_and_names_what_to_set() -> None:
    with pytest.warns(UserWarning, match=r"got no desirable one among 3; .* polarity\.path"):
        polarity.warn_of_empty_sides({"undesirable": 1, "desirable": 0, "neutral": 2})
    with pytest.warns(UserWarning, match="got no undesirable and no desirable one among 2"):
        polarity.warn_of_empty_sides({"undesirable": 0, "desirable": 0, "neutral": 2})


def test_the_common_list_has_no_contradictions_and_both_sides() -> None:
    labels, contradictions = read_labels(WORDS)
    sides = [label.polarity for label in labels.values()]
    assert contradictions == 0
    assert set(sides) <= set(POLARITIES)
    assert sides.count("undesirable") >= 140
    assert sides.count("desirable") >= 80
    assert (labels["pistol"].polarity, labels["shield"].polarity) == ("undesirable", "desirable")


def finished(work: Work, name: str, table: object) -> None:
    write_table(work.folder / name, table)
    work.finish({"in": 1, "out": 1, "skipped": {}})


def test_the_stage_keeps_the_linked_concepts_with_their_counts(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, polarity={"path": str(write(tmp_path / "l.tsv", LIST))})
    finished(opened(recipe, tmp_path / "run", "concepts"), "concepts.parquet", table_of(concepts(), CONCEPTS))
    blank = {"dist": 1.0, "sim_image": 0.5, "sim_text": 0.5, "concept": ""}
    links = [
        blank | {"concept_id": f"user:{name}", "stimulus_id": f"{i:016x}", "role": role, "rank": i}
        for name, role, n in (("shield", "positive", 3), ("knife", "positive", 2), ("knife", "negative", 2))
        for i in range(n)
    ]
    finished(opened(recipe, tmp_path / "run", "stimuli"), "links.parquet", table_of(links, LINKS))
    with pytest.warns(UserWarning, match="labels name no concept that has stimuli here, such as "):
        polarity.run(opened(recipe, tmp_path / "run", "polarity"))
    rows = read_table(tmp_path / "run" / "polarity" / "concepts.parquet", CONCEPTS).to_pylist()
    assert [(row["concept"], row["n_positive"]) for row in rows] == [("knife", 2), ("shield", 3)]
    assert done(tmp_path / "run", "polarity")["counts"] == {"in": 4, "out": 2, "skipped": {"no_stimuli": 2}}
    facts = json.loads((tmp_path / "run" / "polarity" / "facts.json").read_text())
    assert facts == {
        "undesirable": 1,
        "desirable": 1,
        "neutral": 0,
        "disagreements": 1,
        "opinions_against": {"l.tsv: undesirable, concepts table: neutral": 1},
        "contradictions_in_list": 1,
    }
