"""The table of models in the wheel is what code and tests say: nothing is called tested that is not."""

from importlib import metadata
from importlib.util import find_spec
from typing import Any

import pandas as pd
import pytest
import test_models
from families import MULTIMODAL, TEXT, config_of

from builders.model_table import EVIDENCE, REQUIRED, Listed, evidence, listed, resolve
from builders.vision import ensure_torchvision
from daco.models import COLUMNS, STATUSES, supported

ensure_torchvision()
TABLE = supported()
ROWS = TABLE.to_dict("records")
KEY = ("model_type", "model_class", "takes")
WITH_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
"""Their vision towers are timm's."""
EVERY = 6
"""The classes that resolve are looked at again one in so many; `python -m builders.model_table` does all."""

same_transformers = pytest.mark.skipif(
    TABLE.attrs["transformers"] != metadata.version("transformers"),
    reason=f"the table was made with transformers {TABLE.attrs['transformers']}",
)


def parametrised(test: str) -> set[str]:
    """Names of the families that a test of test_models.py runs over, none of them skipped."""
    marks = getattr(test_models, test).pytestmark
    assert not [mark for mark in marks if mark.name.startswith(("skip", "xfail"))]
    (families,) = [mark.args[1] for mark in marks if mark.args[:1] == ("family",)]
    return {family.name for family in families}


def test_tested_rows_are_the_families_of_the_tests() -> None:
    said = TABLE[TABLE["status"] == "tested"].set_index("name")
    assert set(said.index) == {family.name for family in (*MULTIMODAL, *TEXT)}
    for family in (*MULTIMODAL, *TEXT):
        assert said.loc[family.name, "model_type"] == config_of(family).model_type
        shown = {word for test, word in EVIDENCE.items() if family.name in parametrised(test)}
        assert set(said.loc[family.name, "shown"].split(", ")) == shown
        assert shown >= REQUIRED[said.loc[family.name, "takes"]]


def test_every_class_of_transformers_is_there_once() -> None:
    assert [*TABLE.columns] == [*COLUMNS]
    assert not TABLE.duplicated(["model_type", "takes"]).any()
    assert set(TABLE["status"]) == set(STATUSES)
    assert (TABLE["because"] != "").equals(TABLE["status"] == "does not")


@same_transformers
def test_no_class_is_left_out() -> None:
    assert {tuple(row[name] for name in KEY) for row in ROWS} == set(listed())


SAMPLE = [
    r
    for r in ROWS
    if r["takes"] != "text" and (r["status"] == "does not" or r["model_type"] in (*WITH_TIMM, "evolla"))
] + [r for r in ROWS if r["status"] != "does not" and r["model_type"] not in WITH_TIMM][::EVERY]


@same_transformers
@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: row["model_type"])
def test_a_row_is_what_the_code_says(row: dict[str, Any]) -> None:
    if row["model_type"] in WITH_TIMM and not find_spec("timm"):
        pytest.skip("timm is not installed")
    found = resolve(Listed(*(row[name] for name in KEY)))
    said = "resolves" if row["status"] == "tested" else row["status"]
    assert (found["status"], found["because"]) == (said, row["because"])
    assert (found["image_scope"], found["forward"]) == (row["image_scope"], row["forward"])


def test_the_table_is_a_frame_to_filter() -> None:
    assert isinstance(TABLE, pd.DataFrame)
    assert TABLE["image_scope"].dtype == TABLE["forward"].dtype == bool
    multimodal = TABLE[(TABLE["takes"] == "images and text") & (TABLE["status"] == "tested")]
    assert multimodal["image_scope"].all()
    assert len(multimodal) == len(MULTIMODAL)


CASE = '<testcase name="{test}[x]"><properties>{facts}</properties>{outcome}</testcase>'
FACTS = "".join(
    f'<property name="{name}" value="{name}s"/>' for name in ("name", "model_type", "model_class")
)


@pytest.mark.parametrize("outcome", ["", "<failure/>", "<error/>", "<skipped/>"])
def test_only_what_passed_is_evidence(outcome: str, tmp_path: Any) -> None:
    cases = [
        CASE.format(test="test_greedy", facts=FACTS, outcome=""),
        CASE.format(test="test_scopes", facts=FACTS, outcome=""),
        CASE.format(test="test_scopes", facts=FACTS, outcome=outcome),
        CASE.format(test="test_of_something_else", facts=FACTS, outcome=""),
    ]
    report = tmp_path / "junit.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    shown = ["greedy logits", "scopes"] if not outcome else ["greedy logits"]
    assert evidence(report) == {("model_types", "model_classs"): {"name": "names", "shown": shown}}
