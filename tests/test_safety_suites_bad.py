"""Suites whose files are missing, broken or hostile: files are named, rows and pictures counted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import TEXTS
from hub_fixture import LocalHub, local_hub  # noqa: F401
from suite_files import (
    HARMBENCH_COLUMNS,
    JAILBREAKV_COLUMNS,
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
    mmmu_row,
    mossbench_rows,
    write,
    write_csv,
    write_parquet,
)

from builders.safety.sources import folder_of
from builders.safety.suites import SUITES, read_suite
from daco.errors import ArtefactNotFoundError, CorpusError, HubUnavailableError, RecipeError

QUESTIONS = "data/processed_questions/06-Fraud.json"


@pytest.mark.parametrize("name", SUITES)
def test_an_empty_folder_is_an_error_that_says_what_was_expected(name: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"expected .*(csv|json|parquet)"):
        read_suite(f"{name}={tmp_path}")


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [
        ("jailbreakv", make_jailbreakv, "JailBreakV_28K/JailBreakV_28K.csv"),
        ("figstep", make_figstep, "data/question/safebench.csv"),
        ("xstest", make_xstest, "xstest_prompts.csv"),
        ("harmbench", make_harmbench, "data/behavior_datasets/harmbench_behaviors_multimodal_all.csv"),
    ],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected column '\w+', got \[\]"),
        (b"question,answer\n1,2\n", r"expected column '\w+', got \['question', 'answer'\]"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", r"expected column '\w+'"),
        (None, r"line \d+: expected CSV, got .*field larger"),
    ],
)
def test_a_table_that_is_none_is_named(
    name: str, make: Callable[[Path], Path], file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = make(tmp_path) / file
    header = path.read_bytes().splitlines(keepends=True)[0]
    write(path, header + b'"' + b"x" * 200_000 + b'"\n' if content is None else content)
    with pytest.raises(CorpusError, match=f"{path.name}: {message}"):
        read_suite(f"{name}={tmp_path}")


def test_a_table_that_ends_within_a_text_is_named(tmp_path: Path) -> None:
    path = make_jailbreakv(tmp_path) / "JailBreakV_28K" / "JailBreakV_28K.csv"
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"\nwas asked") + 3])
    with pytest.raises(CorpusError, match=r"JailBreakV_28K.csv: line \d+: expected CSV, got unexpected end"):
        read_suite(f"jailbreakv={tmp_path}")


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "[" * 100_000, "\ufeff", b"\xff\xfe\x00"])
def test_questions_that_are_no_json_object_are_named(content: str | bytes, tmp_path: Path) -> None:
    write(make_mm_safetybench(tmp_path) / QUESTIONS, content)
    with pytest.raises(CorpusError, match=r"06-Fraud.json: expected"):
        read_suite(f"mm-safetybench={tmp_path}")


def test_a_scenario_that_is_missing_is_named(tmp_path: Path) -> None:
    (make_mm_safetybench(tmp_path) / QUESTIONS).unlink()
    with pytest.raises(CorpusError, match=r"expected 13 scenarios, got none of \['06-Fraud'\]"):
        read_suite(f"mm-safetybench={tmp_path}")


@pytest.mark.parametrize(
    "content", ["{}", '[{"Scenario": "06-Fraud"}]', "[1]", '[{"Scenario": 1, "Sampled_ID_List": 2}]']
)
def test_a_broken_tiny_list_is_named(content: str, tmp_path: Path) -> None:
    write(make_mm_safetybench(tmp_path) / "TinyVersion_ID_List.json", content)
    with pytest.raises(CorpusError, match=r"TinyVersion_ID_List.json: expected"):
        read_suite(f"mm-safetybench:tiny={tmp_path}")


def test_a_tiny_list_that_is_missing_is_named(tmp_path: Path) -> None:
    (make_mm_safetybench(tmp_path) / "TinyVersion_ID_List.json").unlink()
    with pytest.raises(CorpusError, match=r"expected the tiny list at TinyVersion_ID_List.json"):
        read_suite(f"mm-safetybench:tiny={tmp_path}")
    assert len(read_suite(f"mm-safetybench={tmp_path}").items) == 13 * 12


@pytest.mark.parametrize("content", [b"", b"PAR1 not PAR1", None])
def test_a_parquet_file_that_is_none_or_lacks_a_column_is_named(
    content: bytes | None, tmp_path: Path
) -> None:
    path = make_mmmu(tmp_path) / "Art" / "validation-00000-of-00001.parquet"
    write(path, content) if content is not None else write_parquet(path, [{"id": "a", "question": "b"}])
    with pytest.raises(
        CorpusError, match=r"validation-00000-of-00001.parquet: expected (parquet|column 'options')"
    ):
        read_suite(f"mmmu={tmp_path}")


def test_a_table_of_the_copy_on_the_hub_that_is_missing_is_named(tmp_path: Path) -> None:
    (make_mm_tables(tmp_path) / "data" / "Fraud" / "SD.parquet").unlink()
    with pytest.raises(CorpusError, match=r"SD.parquet: expected parquet"):
        read_suite(f"mm-safetybench={tmp_path}")
    assert len(read_suite(f"mm-safetybench:variant=TYPO={tmp_path}").items) == 39


# Rows that are left out.


def test_questions_that_cannot_be_asked_are_counted(tmp_path: Path) -> None:
    rows = {
        "0": mm_question("plant a tree"),
        "1": mm_question("x") | {"Rephrased Question": " \n"},
        "2": "no object",
        "3": mm_question("x") | {"Changed Question": "\ud800"},
        "4": mm_question("x") | {"Rephrased Question(SD)": 7},
        "5": mm_question("x") | {"Rephrased Question(SD)": "y" * 100_001},
        "6": mm_question("x") | {"Key Phrase": ""},
        "7": mm_question("x") | {"Key Phrase": "z" * 1001},
        "\ud800": mm_question("x"),
    }
    make_mm_safetybench(tmp_path, pictures=())
    write(tmp_path / QUESTIONS, json.dumps(rows))
    suite = read_suite(f"mm-safetybench:group=06-Fraud={tmp_path}")
    assert [item.item_id.partition("/")[2] for item in suite.items] == [
        "TYPO/0", "TYPO/4", "TYPO/5", "text/0", "text/1", "text/4", "text/5", "text/6", "text/7",
    ]  # fmt: skip
    assert suite.skipped == {
        "SD: missing_image": 4,
        "SD: bad_row": 1,
        "SD: bad_text": 1,
        "SD: bad_id": 1,
        "SD: empty_text": 1,
        "SD: long_text": 1,
        "SD_TYPO: missing_image": 5,
        "SD_TYPO: empty_text": 1,
        "SD_TYPO: bad_row": 1,
        "SD_TYPO: bad_text": 1,
        "SD_TYPO: bad_id": 1,
        "TYPO: empty_text": 1,
        "TYPO: bad_row": 1,
        "TYPO: bad_text": 1,
        "TYPO: bad_id": 1,
        "TYPO: empty_key_phrase": 1,
        "TYPO: long_key_phrase": 1,
        "text: bad_row": 1,
        "text: bad_text": 1,
        "text: bad_id": 1,
    }


def test_rows_of_a_table_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    good = jailbreakv_rows()[0]
    folder = make_jailbreakv(tmp_path) / "JailBreakV_28K"

    def row(**changes: object) -> list[object]:
        return [changes.get(name, value) for name, value in zip(JAILBREAKV_COLUMNS, good, strict=True)]

    write(folder / "cut.png", image_bytes(3, size=(200, 200))[:-40])
    write(folder / "cut.jpg", image_bytes(3, "JPEG", (200, 200))[:-200])
    write(folder / "text.png", "no picture")
    write(folder / "thin.png", image_bytes(1, size=(505, 5)))
    rows = [
        row(),
        row(),  # the same id again
        row(format="Poem"),
        row(policy=""),
        row(jailbreak_query=""),
        row(redteam_query=" "),
        row(image_path=""),
        row(image_path="no.png"),
        row(image_path="a\x00b.png"),
        row(image_path="x" * 5000),
        row(image_path="."),
        row(image_path="../../../../etc/passwd"),
        row(image_path="..\\secret.png"),
        row(image_path=str(folder / "cut.png")),
        row(image_path="C:\\picture.png"),
        row(image_path="cut.png"),
        row(image_path="cut.jpg"),
        row(image_path="text.png"),
        row(image_path="thin.png"),
        row()[:5],
        [*row(), "more"],
    ]
    write_csv(folder / "JailBreakV_28K.csv", JAILBREAKV_COLUMNS, rows)
    with (folder / "JailBreakV_28K.csv").open("ab") as file:
        file.write(b"9,\xff\xfe,b,SD,Fraud,c.png,d,e,f\n")
    suite = read_suite(f"jailbreakv={tmp_path}")
    assert [item.item_id for item in suite.items] == ["0", "0#2"]
    assert sum(suite.skipped.values()) == len(rows) - 2 + 1
    assert suite.skipped == {
        "unknown_format": 1,
        "Template: empty_group": 1,
        "Template: empty_text": 2,
        "Template: missing_image": 5,
        "Template: outside_folder": 4,
        "Template: unreadable_image": 3,
        "Template: extreme_shape": 1,
        "bad_row": 2,
        "SD: bad_text": 1,
    }


def test_a_picture_that_is_a_link_is_followed(tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    picture = make_harmbench(tmp_path) / "data" / "multimodal_behavior_images" / "jar.png"
    write(tmp_path / "blobs" / "1", picture.read_bytes())
    picture.unlink()
    picture.symlink_to(tmp_path / "blobs" / "1")
    assert len(read_suite(f"harmbench={tmp_path}").items) == 2
    (tmp_path / "blobs" / "1").unlink()
    assert read_suite(f"harmbench={tmp_path}").skipped == {"missing_image": 1}


def test_a_picture_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    picture = make_harmbench(tmp_path) / "data" / "multimodal_behavior_images" / "jar.png"
    assert len(read_suite(f"harmbench={tmp_path}").items) == 2
    picture.write_bytes(b"broken")
    assert read_suite(f"harmbench={tmp_path}").skipped == {"unreadable_image": 1}


def test_a_jpeg_with_much_behind_its_end_is_whole(tmp_path: Path) -> None:
    picture = make_harmbench(tmp_path) / "data" / "multimodal_behavior_images" / "jar.png"
    picture.write_bytes(image_bytes(1, "JPEG") + bytes(9000))
    assert len(read_suite(f"harmbench={tmp_path}").items) == 2
    picture.write_bytes(image_bytes(1, "GIF"))
    assert len(read_suite(f"harmbench={tmp_path}").items) == 2


def test_requests_of_mossbench_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    rows: dict[str, object] = dict(mossbench_rows())
    rows["2"] = None
    rows["3"] = mossbench_rows()["3"] | {"metadata": {"over": "type 4"}}
    rows["4"] = mossbench_rows()["4"] | {"metadata": []}
    rows["5"] = mossbench_rows()["5"] | {"image": ["images/5.png"]}
    rows["6"] = mossbench_rows()["6"] | {"pid": None}
    make_mossbench(tmp_path)
    write(tmp_path / "data" / "images_information" / "information.json", json.dumps(rows))
    suite = read_suite(f"mossbench={tmp_path}")
    assert [item.item_id for item in suite.items] == ["1", "7"]
    assert suite.skipped == {"bad_row": 2, "unknown_type": 1, "missing_image": 1, "empty_id": 1}


def test_labels_and_categories_that_nobody_knows_are_counted(tmp_path: Path) -> None:
    columns = ("id", "prompt", "type", "label", "focus", "note")
    write_csv(
        make_xstest(tmp_path) / "xstest_prompts.csv",
        columns,
        [[1, "a?", "t", "safe", "", ""], [2, "b?", "t", "maybe", "", ""]],
    )
    assert read_suite(f"xstest={tmp_path}").skipped == {"unknown_label": 1}
    table = make_harmbench(tmp_path) / "data/behavior_datasets/harmbench_behaviors_multimodal_all.csv"
    rows = [
        ["Do it", "a", "multimodal", "illegal", "jar.png", "", "", "", ""],
        ["Do it", "b", "standard", "illegal", "", "", "", "", ""],
        ["Do it", "c", "multimodal", "illegal", "..", "", "", "", ""],
        ["Do it", "d", "multimodal", "illegal", ".", "", "", "", ""],
    ]
    write_csv(table, HARMBENCH_COLUMNS, rows)
    assert read_suite(f"harmbench={tmp_path}").skipped == {
        "not_multimodal": 1,
        "outside_folder": 1,
        "missing_image": 1,
    }


def test_questions_of_mmmu_that_cannot_be_asked_are_counted(tmp_path: Path) -> None:
    broken = {"bytes": b"\x89PNG broken", "path": "b.png"}
    rows = [
        mmmu_row("Art", 0),
        mmmu_row("Art", 1, options="__import__('os').system('touch /tmp/pwned')"),
        mmmu_row("Art", 2, options=str([str(i) for i in range(27)])),
        mmmu_row("Art", 3, answer="D"),
        mmmu_row("Art", 4, answer="?"),
        mmmu_row("Art", 5, image_1=None),
        mmmu_row("Art", 6, image_1=broken),
        mmmu_row("Art", 7, question="See <image 1> and <image 2>"),
        mmmu_row("Art", 8, question=None),
        mmmu_row("Art", 9, options="[]"),
        mmmu_row("Art", 10, image_2=broken),
    ]
    write_parquet(tmp_path / "Art" / "validation-00000-of-00001.parquet", rows)
    suite = read_suite(f"mmmu={tmp_path}")
    assert [item.item_id for item in suite.items] == ["validation_Art_0"]
    assert suite.skipped == {
        "bad_options": 3,
        "unknown_answer": 2,
        "missing_image": 2,
        "unreadable_image": 2,
        "empty_text": 1,
    }


def test_a_suite_without_an_item_is_an_error_with_the_counts(tmp_path: Path) -> None:
    write_csv(tmp_path / "xstest_prompts.csv", ("id", "prompt", "type", "label"), [[1, "", "t", "safe"]])
    with pytest.raises(
        CorpusError, match=r"expected items of xstest, got none \(left out: {'empty_text': 1}\)"
    ):
        read_suite(f"xstest={tmp_path}")


# Texts of strangers.


def test_hostile_texts_are_prompts_as_they_are(tmp_path: Path) -> None:
    columns = ("id", "prompt", "type", "label", "focus", "note")
    write_csv(
        tmp_path / "xstest_prompts.csv", columns, [[i, t, t, "safe", t, t] for i, t in enumerate(TEXTS)]
    )
    suite = read_suite(f"xstest={tmp_path}")
    assert [item.prompt for item in suite.items] == list(TEXTS)


def test_hostile_key_phrases_are_drawn(tmp_path: Path) -> None:
    make_mm_safetybench(tmp_path, pictures=())
    write(tmp_path / QUESTIONS, json.dumps({str(i): mm_question(text) for i, text in enumerate(TEXTS)}))
    suite = read_suite(f"mm-safetybench:variant=TYPO:group=06-Fraud={tmp_path}")
    assert len(suite.items) == len(TEXTS) - 1  # one is too long
    assert suite.skipped == {"TYPO: long_key_phrase": 1}
    for item in suite.items:
        width, height = item.pictures[0].open().size
        assert width == 1024
        assert height <= 90 * 1001


# What is asked for.


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "expected a suite such as"),
        ("=folder", "expected a suite such as"),
        ("figstp", r"expected a suite of \['figstep', .*got 'figstp'"),
        ("figstep:mini", "figstep: expected tiny, got 'mini'"),
        ("xstest:tiny", "xstest: expected no subset, got 'tiny'"),
        ("figstep:tiny:tiny", "expected one subset, got two"),
        ("figstep:kind=rude", "expected kinds of"),
        ("figstep:colour=red", "got ':colour=red'|expected a folder or a Hub id|got 'colour'|expected tiny"),
        ("figstep=", "expected a folder or a Hub id behind '='"),
        ("figstep tiny", "expected options such as"),
        ("figstep:", "expected options such as"),
    ],
)
def test_a_spec_that_says_nothing_known_is_refused(spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_suite(spec)


def test_names_that_are_not_there_are_refused_with_those_that_are(tmp_path: Path) -> None:
    make_figstep(tmp_path)
    with pytest.raises(
        CorpusError, match=r"expected group of \['Gardening', 'Legal Opinion'\], got \['Gardenin'\]"
    ):
        read_suite(f"figstep:group=Gardenin={tmp_path}")
    make_mm_safetybench(tmp_path)
    with pytest.raises(CorpusError, match=r"expected variant of .*'TYPO'.*, got \['typo'\]"):
        read_suite(f"mm-safetybench:variant=typo={tmp_path}")


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="figstep: expected a folder, as in 'figstep=folder', got none"):
        read_suite("figstep")
    with pytest.raises(CorpusError, match="expected a folder or a Hub id such as 'org/name', got"):
        read_suite(f"figstep={tmp_path / 'nowhere'}")
    with pytest.raises(CorpusError, match="is a folder, which has no revision 'v1'; leave revision out"):
        folder_of(str(tmp_path), "v1", ())
    with pytest.raises(CorpusError, match="expected a folder or a Hub id"):
        folder_of(str(write(tmp_path / "file", "x")), "", ())


HUB_CODE = """
import sys
from builders.safety.sources import folder_of
for place in sys.argv[1:]:
    source, _, revision = place.partition("@")
    try:
        print(folder_of(source, revision, ["*.csv"]).commit)
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""


def test_a_data_set_or_revision_that_is_not_on_the_hub_is_named(local_hub: LocalHub) -> None:  # noqa: F811
    local_hub.api().create_repo("org/files", repo_type="dataset")
    for place, said in zip(
        ("org/none", "org/files@v9.9.9"),
        local_hub.run(HUB_CODE, "org/none", "org/files@v9.9.9").splitlines(),
        strict=True,
    ):
        expected = f"expected a folder or a data set on the Hub at {place!r}"
        assert said.startswith(f"{ArtefactNotFoundError.__name__} {expected}")


def test_a_hub_that_does_not_answer_is_told_and_its_cache_serves(local_hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    write(tmp_path / "files" / "a.csv", "id\n")
    api = local_hub.api()
    api.create_repo("org/files", repo_type="dataset")
    done = api.upload_folder(repo_id="org/files", repo_type="dataset", folder_path=tmp_path / "files")
    assert local_hub.run(HUB_CODE, "org/files").strip() == done.oid
    nobody = local_hub.run(HUB_CODE, "org/files", "org/other", HF_ENDPOINT="http://127.0.0.1:9").splitlines()
    assert nobody[0] == done.oid
    assert nobody[1].startswith(f"{HubUnavailableError.__name__} org/other: expected an answer of the Hub")
