"""A card says of an evaluation what `evaluation.json` says, escaped, with its picture and `model-index`."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hostile import TEXTS
from markdown_it import MarkdownIt
from PIL import Image
from release_fixture import write_model_release

from builders.safety.methods import made_of_sae
from builders.safety.report import EVALUATION, into_release
from cards.suites import PICTURE, model_index, pictures, suite_facts
from daco.errors import FormatError, RecipeError
from daco.manifest import read_manifest
from daco.steering_sae import SteeringSAE
from hub.gate import check_release
from hub.stage import stage


def cell(mean: float, against: float | None = None) -> dict[str, Any]:
    told = {"mean": mean, "low": mean - 0.011, "high": mean + 0.017}
    return told if against is None else told | {"against_none": cell(against)}


def figure(name: str, kind: str, judge: str, none: float, daco: float) -> dict[str, Any]:
    methods = {"none": cell(none), "daco": cell(daco, daco - none)}
    told = {"figure": name, "kind": kind, "judge": judge, "n": 251, "methods": methods, "by": {}}
    return told | {"unreadable": {"none": 3, "daco": 4}}


def evaluation(judge: str = "guard:org/guard", note: str = "pictures were drawn anew") -> dict[str, Any]:
    harmful = [
        figure("unsafe", "harmful", judge, 0.713, 0.127),
        figure("refused", "harmful", "rule", 0.21, 0.83),
    ]
    suites = {
        "mm-safetybench": {"items": 263, "skipped": {"no picture": 7}, "notes": [note], "figures": harmful},
        "mmmu": {
            "items": 251,
            "skipped": {},
            "notes": [],
            "figures": [figure("right", "choice", "choice", 0.53, 0.51)],
        },
    }
    pair = {"figure": "unsafe", "judges": [judge, "rule"], "kappa": cell(0.61), "same": 0.8, "n": 502}
    protocol = {
        "model": {"id": "org/tiny-vl", "model_type": "llava", "dtype": "bfloat16"},
        "decoding": {"greedy": True, "max_answer": 277},
        "judges": [judge, "rule", "choice"],
        "settings": {"none": "no steering", "daco": "SAE steering, eta 0.31, gamma 0.07, scope all"},
    }
    costs = {
        "none": {"time_per_token": 1.0, "n_tokens": 99},
        "daco": {"time_per_token": 1.137, "n_tokens": 98},
    }
    return {"suites": suites, "agreement": [pair], "costs": costs, "protocol": protocol}


def released(folder: Path, found: dict[str, Any]) -> str:
    folder.mkdir()
    write_model_release(folder)
    protocol = found["protocol"] | {"made_of": {"daco": made_of_sae(SteeringSAE.from_pretrained(folder))}}
    into_release(found | {"protocol": protocol}, folder)
    stage(folder)
    return (folder / "README.md").read_text("utf-8")


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_of_the_section_is_one_of_the_evaluation(tmp_path: Path) -> None:
    found = evaluation()
    card = released(tmp_path / "release", found)
    section = re.split(r"\n##+ ", card[card.index("### Safety suites") + 3 :])[0]
    known = {f"{abs(x):.3f}" for x in numbers(found)} | {f"{x:g}" for x in numbers(found)} | {"95", "7"}
    known |= {"0.31", "0.07", "16"}  # of a setting and of a dtype
    shown = re.findall(r"\d+(?:\.\d+)?", re.sub(r"`[^`]*`|\(\./[^)]*\)", "", html.unescape(section)))
    assert set(shown) <= known
    without = released(tmp_path / "one judge", found | {"agreement": []})
    html_of = MarkdownIt("commonmark", {"html": True}).enable("table").render
    assert html_of(card).count("<table>") == html_of(without).count("<table>") + 1  # none runs into another
    for value in ("0.713", "0.127", "263", "251", "277", "0.610"):
        assert value in section, value


def test_the_release_still_passes_the_gate_with_its_picture_and_index(tmp_path: Path) -> None:
    card = released(tmp_path / "release", evaluation())
    assert f"(./{PICTURE})" in card
    assert PICTURE in read_manifest(tmp_path / "release")["files"]
    with Image.open(tmp_path / "release" / PICTURE) as picture:
        assert min(picture.size) > 300
    assert not [
        r for r in check_release(tmp_path / "release") if PICTURE in str(r) or "model-index" in str(r)
    ]
    assert "model-index:" in card


def test_the_index_has_what_daco_did(tmp_path: Path) -> None:
    (entry,) = model_index(evaluation(), "daco-sae-tiny")
    assert entry["name"] == "daco-sae-tiny"
    told = [(r["dataset"]["name"], m["type"], m["value"]) for r in entry["results"] for m in r["metrics"]]
    assert told == [
        ("mm-safetybench", "unsafe", 0.127),
        ("mm-safetybench", "refused", 0.83),
        ("mmmu", "right", 0.51),
    ]
    assert model_index({}, "x") == model_index({"suites": {}}, "x") == []


def test_names_of_strangers_stay_text(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        card = released(tmp_path / str(i), evaluation(judge=f"endpoint:{text}", note=text))
        body = card[card.index("\n---\n", 4) :]
        page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
        assert "<script" not in page
        assert "onerror=" not in page.replace("onerror=alert(1)&gt;", "")
        assert page.count("<h1") == 1


def test_the_papers_figures_stand_beside_those_of_its_own_model_alone() -> None:
    found = evaluation()
    assert suite_facts(found)["paper"] == {}
    found["protocol"]["model"]["id"] = "Qwen/Qwen2.5-VL-7B-Instruct"
    told = dict(suite_facts(found)["paper"]["rows"])
    columns = suite_facts(found)["paper"]["columns"]
    assert told["DACO"][columns.index("MM-SafetyBench QG")] == "0.873 / 0.984"
    assert told["DACO"][columns.index("JailBreakV QG")] == "not run / 0.841"


def test_a_broken_evaluation_is_named(tmp_path: Path) -> None:
    found = evaluation()
    del found["suites"]["mmmu"]["figures"][0]["unreadable"]
    with pytest.raises(FormatError, match=r"evaluation\.json: expected what"):
        suite_facts(found)
    (tmp_path / EVALUATION).write_text("{")
    with pytest.raises(FormatError, match=r"evaluation\.json: expected what"):
        pictures(tmp_path)


def test_figures_go_into_no_dataset_release(tmp_path: Path) -> None:
    from release_fixture import write_dataset_release

    write_dataset_release(tmp_path)
    with pytest.raises(RecipeError, match="expected a model release, got a dataset"):
        into_release(json.loads(json.dumps(evaluation())), tmp_path)
