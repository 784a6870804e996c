"""Every suite is read from its official layout: prompts, pictures, subsets, filters; pictures drawn anew."""

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hub_fixture import LocalHub, local_hub  # noqa: F401
from suite_files import (
    PHRASES,
    image_bytes,
    jailbreakv_rows,
    make_figstep,
    make_harmbench,
    make_jailbreakv,
    make_mm_safetybench,
    make_mm_tables,
    make_mmmu,
    make_mossbench,
    make_xstest,
    mm_question,
)

from builders.safety import typography
from builders.safety.items import KINDS, Suite
from builders.safety.suites import SUITES, figstep, jailbreakv, mm_safetybench, mmmu, read_suite
from builders.safety.suites.spec import SuiteSpec, parse
from builders.safety.verdicts import FIGURES

MAKERS = {
    "mm-safetybench": make_mm_safetybench,
    "jailbreakv": make_jailbreakv,
    "figstep": make_figstep,
    "mossbench": make_mossbench,
    "xstest": make_xstest,
    "harmbench": make_harmbench,
    "mmmu": make_mmmu,
}
DATA = Path(os.environ.get("DACO_TEST_DATA", "/nonexistent"))
with_data = pytest.mark.skipif(not DATA.is_dir(), reason="DACO_TEST_DATA is not set")


def read(name: str, folder: Path) -> Suite:
    return read_suite(f"{name}={MAKERS[name.partition(':')[0]](folder)}")


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_reads_its_layout_whole(name: str, tmp_path: Path) -> None:
    suite = read(name, tmp_path)
    assert suite.name == name == SUITES[name].NAME
    assert not suite.skipped
    assert len({item.item_id for item in suite.items}) == len(suite.items) > 0
    for item in suite.items:
        assert item.suite == name
        assert item.kind in KINDS
        assert item.prompt.strip()
        assert item.question.strip()
        assert [picture.open().mode for picture in item.pictures] == ["RGB"] * len(item.pictures)
    assert read_suite(f"{name}={tmp_path}") == suite  # nothing depends on the order of a folder


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_knows_its_facts(name: str) -> None:
    module = SUITES[name]
    assert module.FIGURE in FIGURES
    assert module.URL.startswith("https://")
    assert module.TITLE
    assert module.LICENCE
    assert all(isinstance(rule, str) and rule.endswith(".") for rule in module.RULES.values())
    assert ("" in module.RULES) == (module.FIGURE != "right")
    assert module.ROWS[""] > 0


@pytest.mark.parametrize("name", SUITES)
def test_fewer_rows_than_the_official_files_have_are_told(name: str, tmp_path: Path) -> None:
    suite = read(name, tmp_path)
    official = SUITES[name].ROWS[""]
    assert f"{len(suite.items):,} rows where the official files have {official:,}" in suite.notes


# MM-SafetyBench.


def test_mm_safetybench_pairs_each_kind_of_picture_with_its_question(tmp_path: Path) -> None:
    suite = read("mm-safetybench", tmp_path)
    assert Counter(item.variant for item in suite.items) == dict.fromkeys(mm_safetybench.VARIANTS, 39)
    assert Counter(item.group for item in suite.items) == dict.fromkeys(mm_safetybench.SCENARIOS, 12)
    row = mm_question(PHRASES[1])
    found = {
        item.variant: item
        for item in suite.items
        if item.item_id.startswith("06-Fraud/") and item.item_id.endswith("/1")
    }
    assert found["SD"].prompt == row["Rephrased Question(SD)"]
    assert found["SD_TYPO"].prompt == found["TYPO"].prompt == row["Rephrased Question"]
    assert found["text"].prompt == row["Changed Question"]
    assert not found["text"].pictures
    for variant in ("SD", "SD_TYPO", "TYPO"):
        assert found[variant].question == row["Changed Question"]
        assert found[variant].pictures[0].path == tmp_path / "data" / "imgs" / "06-Fraud" / variant / "1.jpg"


def test_mm_safetybench_draws_missing_typo_pictures_and_no_others(tmp_path: Path) -> None:
    make_mm_safetybench(tmp_path, pictures=())
    suite = read_suite(f"mm-safetybench={tmp_path}")
    assert suite.skipped == {"SD: missing_image": 39, "SD_TYPO: missing_image": 39}
    assert {item.variant for item in suite.items} == {"TYPO", "text"}
    assert any(note.startswith("39 TYPO pictures were missing and drawn anew") for note in suite.notes)
    assert "SD: 39 pictures are missing and left out" in suite.notes
    drawn = {item.item_id: item.pictures[0] for item in suite.items if item.variant == "TYPO"}
    picture = drawn["01-Illegal_Activitiy/TYPO/1"]
    assert PHRASES[1] in picture.drawn
    assert picture.open().tobytes() == typography.typo(PHRASES[1]).tobytes()
    assert pickle.loads(pickle.dumps(picture)).open().tobytes() == picture.open().tobytes()  # goes to workers


def test_a_mixed_folder_draws_only_what_is_missing(tmp_path: Path) -> None:
    make_mm_safetybench(tmp_path)
    (tmp_path / "data/imgs/07-Sex/TYPO/2.jpg").unlink()
    suite = read_suite(f"mm-safetybench:variant=TYPO={tmp_path}")
    assert [item.item_id for item in suite.items if item.pictures[0].draw] == ["07-Sex/TYPO/2"]
    assert any(note.startswith("1 TYPO pictures") for note in suite.notes)


def test_mm_safetybench_tiny_is_the_official_list(tmp_path: Path) -> None:
    suite = read("mm-safetybench:tiny", tmp_path)
    assert {item.item_id.rpartition("/")[2] for item in suite.items} == {"1"}
    assert len(suite.items) == 13 * 4
    assert "the tiny set" in suite.notes
    inner = read_suite(f"mm-safetybench:tiny={tmp_path / 'data'}")  # the list lies beside `data`
    assert [item.item_id for item in inner.items] == [item.item_id for item in suite.items]


def test_the_copy_on_the_hub_gives_the_same_items(tmp_path: Path) -> None:
    files = read("mm-safetybench", tmp_path / "files")
    tables = read_suite(f"mm-safetybench={make_mm_tables(tmp_path / 'tables')}")
    assert not tables.skipped
    assert [i._replace(pictures=()) for i in tables.items] == [i._replace(pictures=()) for i in files.items]
    for one, other in zip(files.items, tables.items, strict=True):
        assert [p.open().tobytes() for p in one.pictures] == [p.open().tobytes() for p in other.pictures]


def test_own_rules_for_lobbying_advice_and_government() -> None:
    own = {name for name in mm_safetybench.SCENARIOS if name in mm_safetybench.RULES}
    assert {name[:2] for name in own} == {"08", "10", "11", "12", "13"}
    assert set(mm_safetybench.RULES) - own == {""}


# The other suites.


def test_jailbreakv_has_sixteen_policies_and_seven_formats(tmp_path: Path) -> None:
    suite = read("jailbreakv", tmp_path)
    assert len(suite.items) == len({item.group for item in suite.items}) == 16
    assert {item.variant for item in suite.items} == set(jailbreakv.FORMATS)
    first = suite.items[0]
    assert first.prompt == jailbreakv_rows()[0][1]  # quotes and line ends as they are
    assert first.question == jailbreakv_rows()[0][2]
    assert first.pictures[0].open().getpixel((0, 0)) == (0, 0, 200)


def test_jailbreakv_mini_is_its_file_or_the_rows_marked_so(tmp_path: Path) -> None:
    own = read("jailbreakv:mini", tmp_path / "a")
    assert len(own.items) == 4
    make_jailbreakv(tmp_path / "b", mini=False)
    marked = read_suite(f"jailbreakv:mini={tmp_path / 'b'}")
    assert [i.prompt for i in marked.items] == [i.prompt for i in own.items]
    inner = read_suite(
        f"jailbreakv:mini={tmp_path / 'b' / 'JailBreakV_28K'}"
    )  # the folder of the table itself
    assert inner == marked


def test_figstep_shows_the_instruction_and_asks_its_one_prompt(tmp_path: Path) -> None:
    suite = read("figstep", tmp_path)
    assert {item.prompt for item in suite.items} == {figstep.PROMPT}
    assert [item.question for item in suite.items[:3]] == [f"How do you {phrase}?" for phrase in PHRASES]
    assert {item.group for item in suite.items} == {"Gardening", "Legal Opinion"}
    assert suite.items[-1].pictures[0].path == tmp_path / "data/images/SafeBench/query_ForbidQI_2_3_6.png"
    tiny = read_suite(f"figstep={tmp_path}:tiny")
    assert [item.item_id for item in tiny.items] == ["ForbidQI_1_1", "ForbidQI_2_1"]
    assert tiny.items[0].pictures[0].path == tmp_path / "data/images/SafeBench-Tiny/query_ForbidQI_1_1_6.png"


def test_figstep_draws_missing_pictures(tmp_path: Path) -> None:
    make_figstep(tmp_path, pictures=False)
    suite = read_suite(f"figstep={tmp_path / 'data'}")
    assert not suite.skipped
    assert any(note.startswith("6 pictures were missing and drawn anew") for note in suite.notes)
    assert (
        suite.items[0].pictures[0].open().tobytes() == typography.figstep(f"Steps to {PHRASES[0]}.").tobytes()
    )


def test_mossbench_is_harmless_of_three_types(tmp_path: Path) -> None:
    suite = read("mossbench", tmp_path)
    assert {item.kind for item in suite.items} == {"harmless"}
    assert [item.group for item in suite.items[:3]] == [
        "Exaggerated Risk",
        "Negated Harm",
        "Counterintuitive Interpretation",
    ]
    assert [item.pictures[0].path.name for item in suite.items] == [f"{i}.png" for i in range(1, 8)]
    assert len(read_suite(f"mossbench={tmp_path / 'data'}").items) == 7


def test_mossbench_as_a_table_of_the_same_facts(tmp_path: Path) -> None:
    folder = make_mossbench(tmp_path)
    suite = read_suite(f"mossbench={folder}")
    rows = [f"{item.item_id},{item.prompt},images/{item.item_id}.png,{item.group}" for item in suite.items]
    (folder / "data" / "information.csv").write_text(
        "\n".join(["pid,question,image_path,meta_data_over", *rows])
    )
    (folder / "data" / "images_information" / "information.json").unlink()
    assert read_suite(f"mossbench={folder / 'data'}") == suite


def test_xstest_has_safe_and_unsafe_prompts(tmp_path: Path) -> None:
    suite = read("xstest", tmp_path)
    assert [(item.kind, item.group) for item in suite.items] == [
        ("harmless", "homonyms"),
        ("harmless", "homonyms"),
        ("harmful", "contrast_homonyms"),
    ]
    assert suite.items[1].prompt == 'What is "shooting" in film, and why?'
    assert [item.item_id for item in read_suite(f"xstest:kind=harmful={tmp_path}").items] == ["3"]


def test_xstest_as_it_was_before_labels(tmp_path: Path) -> None:
    rows = ["id,type,prompt,focus,note", "v2-1,homonyms,May I?,,", "v2-2,contrast_homonyms,May I not?,,"]
    (tmp_path / "xstest_v2_prompts.csv").write_text("\n".join(rows))
    assert [item.kind for item in read_suite(f"xstest={tmp_path}").items] == ["harmless", "harmful"]


def test_harmbench_tells_judges_what_the_picture_shows(tmp_path: Path) -> None:
    suite = read("harmbench", tmp_path)
    assert [item.prompt for item in suite.items] == ["Say how to open this jar", "Say how to fold this"]
    assert [item.question for item in suite.items] == [
        "Say how to open this jar\n\n[The picture: a jar]",
        "Say how to fold this",
    ]
    assert suite.items[1].pictures[0].path.name == "paper.png"  # the table says paper.jpeg


def test_mmmu_places_markers_and_options(tmp_path: Path) -> None:
    suite = read("mmmu", tmp_path)
    first, second, third, fourth = suite.items
    assert first.prompt == (
        'What does <image 1> show?\n(A) a $\\alpha$\n(B) it\'s b\n(C) c, "d"\n\n' + mmmu.CHOICE
    )
    assert first.options == ("a $\\alpha$", "it's b", 'c, "d"')
    assert (first.gold, first.group, first.variant) == ("B", "Art", "multiple-choice")
    assert second.prompt.startswith("Which is it? <image 2>\n(A) <image 1>\n")  # of 1 and 3, the gap closed
    assert [p.data for p in second.pictures] == [image_bytes(2), image_bytes(13)]
    assert third.prompt == f"How many?\n{mmmu.OPEN}"
    assert (third.options, third.gold, third.variant) == ((), "3", "open")
    assert [p.data for p in third.pictures] == [image_bytes(3), image_bytes(12)]  # no marker: as they come
    assert fourth.group == "Math"  # and nothing of its test split
    assert {item.group for item in read_suite(f"mmmu:group=Math={tmp_path}").items} == {"Math"}


# What is asked for.


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("figstep", SuiteSpec("figstep")),
        ("figstep:tiny", SuiteSpec("figstep", subset="tiny")),
        ("mmmu=MMMU/MMMU@abc", SuiteSpec("mmmu", "MMMU/MMMU", "abc")),
        ("mmmu:group=Art+Math=o/n@v1", SuiteSpec("mmmu", "o/n", "v1", groups=("Art", "Math"))),
        ("a=o/n@v1:tiny:variant=SD", SuiteSpec("a", "o/n", "v1", "tiny", ("SD",))),
        ("a:kind=harmful:tiny", SuiteSpec("a", subset="tiny", kinds=("harmful",))),
    ],
)
def test_specs(text: str, spec: SuiteSpec) -> None:
    assert parse(text) == spec


def test_a_folder_may_have_signs_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a:tiny@b=c"
    folder.mkdir()
    assert parse(f"figstep:tiny={folder}") == SuiteSpec("figstep", str(folder), subset="tiny")


def test_filters_take_what_they_name(tmp_path: Path) -> None:
    make_mm_safetybench(tmp_path, pictures=())
    suite = read_suite(f"mm-safetybench:variant=TYPO:group=06-Fraud+07-Sex={tmp_path}")
    assert Counter(item.group for item in suite.items) == {"06-Fraud": 3, "07-Sex": 3}
    assert not suite.skipped  # SD was not asked for
    assert suite.notes[:2] == ("only variant TYPO", "only group 06-Fraud, 07-Sex")


def test_a_suite_from_the_hub_is_read_at_one_commit(local_hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    make_xstest(tmp_path / "files")
    (tmp_path / "files" / "big.bin").write_bytes(b"not asked for")
    api = local_hub.api()
    api.create_repo("org/xstest", repo_type="dataset")
    done = api.upload_folder(repo_id="org/xstest", repo_type="dataset", folder_path=tmp_path / "files")
    code = (
        "from builders.safety.suites import read_suite\n"
        "from builders.safety.sources import folder_of\n"
        "suite = read_suite('xstest=org/xstest@main')\n"
        "print(len(suite.items), suite.notes[-1])\n"
        "print(sorted(p.name for p in folder_of('org/xstest', '', ['*.csv']).folder.iterdir()))\n"
    )
    assert local_hub.run(code).splitlines() == [
        f"3 read from org/xstest at {done.oid}",
        "['xstest_prompts.csv']",
    ]


# Pictures that are drawn.


def ink(image: object) -> np.ndarray:
    return np.array(image.convert("L")) < 128  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("phrase", "lines"),
    [
        ("tea", ["tea"]),
        (
            "the quick brown fox jumps over the lazy dog",
            ["the quick brown fox", "jumps over the lazy", "dog"],
        ),
        (" tea \n and\tcake ", ["tea and cake"]),
        ("a " + "W" * 25 + " b", ["a", "W" * 11, "W" * 11, "WWW b"]),
    ],
)
def test_typo_pictures_are_wrapped_by_words(phrase: str, lines: list[str]) -> None:
    font = typography._font("DejaVuSans.ttf", 90)
    assert typography.wrapped(phrase, font, 1024) == lines
    image = typography.typo(phrase)
    assert image.size == (1024, 90 * (len(lines) + 1))
    rows = ink(image).any(1)
    assert not rows[:20].any()  # a margin above
    assert not rows[-20:].any()  # and below
    assert all(rows[90 * i + 45 : 90 * i + 135].any() for i in range(len(lines)))


def test_drawn_pictures_are_the_same_every_time() -> None:
    for draw in (typography.typo, typography.figstep):
        first = draw("grow \u4e2d \u202e \x00 a <|image_pad|> cactus")
        typography._font.cache_clear()
        assert draw("grow \u4e2d \u202e \x00 a <|image_pad|> cactus").tobytes() == first.tobytes()
        assert draw("grow a cactus").tobytes() != first.tobytes()


def test_figstep_pictures_stand_on_the_official_grid() -> None:
    image = typography.figstep("List of considerations for a garden.")
    cells = letter_cells(image)
    lines = ["List of", "considerations", "for a garden.", "1.", "2.", "3."]
    for row, line in enumerate(lines):
        assert "".join("x" if cell else " " for cell in cells[row]).rstrip() == "".join(
            "x" if c != " " else " " for c in line
        )
    assert not cells[len(lines) :].any()


def letter_cells(image: object) -> np.ndarray:
    """Which places of the grid of 9 lines x 15 letters have ink [9, 15]."""
    dark = ink(image)
    return np.array(
        [
            [dark[75 * r + 24 : 75 * r + 75, 48 * c + 26 : 48 * c + 62].any() for c in range(15)]
            for r in range(9)
        ]
    )


# The real files.


@with_data
def test_the_real_questions_of_mm_safetybench() -> None:
    suite = read_suite(f"mm-safetybench={DATA / 'mm_safetybench'}")
    assert Counter(item.variant for item in suite.items) == {"TYPO": 1680, "text": 1680}
    assert suite.skipped == {"SD: missing_image": 1680, "SD_TYPO: missing_image": 1680}
    per = Counter(item.group for item in suite.items if item.variant == "text")
    assert [per[name] for name in mm_safetybench.SCENARIOS] == [
        97, 163, 44, 144, 122, 154, 109, 153, 139, 130, 167, 109, 149,
    ]  # fmt: skip
    assert not any("rows where" in note for note in suite.notes)
    tallest = max(len(item.pictures[0].drawn) for item in suite.items if item.pictures)
    assert (
        max(
            i.pictures[0].open().height
            for i in suite.items
            if i.pictures and len(i.pictures[0].drawn) == tallest
        )
        < 1024
    )


@with_data
def test_the_real_tiny_list_of_mm_safetybench() -> None:
    suite = read_suite(f"mm-safetybench:tiny:variant=TYPO+text={DATA / 'mm_safetybench'}")
    assert Counter(item.variant for item in suite.items) == {"TYPO": 168, "text": 168}
    assert "01-Illegal_Activitiy/TYPO/92" in {item.item_id for item in suite.items}


@with_data
def test_the_real_figstep() -> None:
    suite = read_suite(f"figstep={DATA / 'figstep'}")
    assert len(suite.items) == 500
    assert set(Counter(item.group for item in suite.items).values()) == {50}
    assert all(item.pictures[0].draw for item in suite.items)
    tiny = read_suite(f"figstep:tiny={DATA / 'figstep'}")
    assert len(tiny.items) == 50
    assert tiny.notes == ("the tiny set",)
    assert {item.pictures[0].open().size for item in tiny.items} == {(760, 760)}


@with_data
def test_figstep_pictures_drawn_anew_have_their_letters_where_the_official_ones_do() -> None:
    official = {
        i.question: i.pictures[0].open() for i in read_suite(f"figstep:tiny={DATA / 'figstep'}").items
    }
    drawn = {i.question: i.pictures[0] for i in read_suite(f"figstep={DATA / 'figstep'}").items}
    assert len(official) == 50
    for question, image in official.items():
        assert (letter_cells(image) == letter_cells(drawn[question].open())).all(), question
