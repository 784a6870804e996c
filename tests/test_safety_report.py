"""The table of an evaluation says what the kept answers and scores say, of the same items in every row."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hostile import TEXTS
from markdown_it import MarkdownIt
from release_fixture import write_model_release
from safety_stand_ins import METHODS, Length, arms, cells, quick, suite, tiny

from builders.safety import paper, report, run
from builders.safety.run import answer_all, jobs_of, judge_all, judge_facts, record
from daco.errors import RecipeError
from daco.manifest import read_manifest, sha256_file
from daco.tables import read_table, table_of, write_table

PROTOCOL = {
    "model": {"id": "", "model_type": "llava", "dtype": "float32"},
    "decoding": {"greedy": True, "max_answer": 5},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two suites under all methods, two judges, one of whom cannot read everything."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, made = tiny(), arms(folder / "releases")
    found = cells(model, [suite(23), suite(9, "harmless", "harmless")], made)
    jobs, judges = jobs_of(found, (1, 1)), [Length(), Length("endpoint:x", unreadable=3)]
    answer_all(folder, *model, jobs, quick())
    for judge in judges:
        judge_all(folder, judge, jobs)
    record(folder, found, [judge_facts(judge, found) for judge in judges], PROTOCOL)
    return folder


def kept(out: Path, judge: int) -> dict[str, dict[str, float | None]]:
    """Scores as they lie: by method, by item."""
    told, found = run.read_record(out), {}
    for cell in told["cells"]:
        folder = out / "scores" / told["judges"][judge]["folder"] / cell["suite"] / cell["cell"]
        for path in run.shard_files(folder):
            for row in read_table(path, run.SCORES).to_pylist():
                found.setdefault(cell["method"], {})[row["item_id"]] = row["value"]
    return found


def test_rates_are_of_the_items_that_every_method_has_a_verdict_on(out: Path) -> None:
    figures = report.summary(out)["suites"]["ours"]["figures"]
    assert [figure["judge"] for figure in figures] == ["endpoint:x", "length"]
    for figure, judge in zip(figures, (1, 0), strict=True):
        scores = kept(out, judge)
        common = [i for i in scores["none"] if all(scores[m][i] is not None for m in METHODS)]
        assert figure["n"] == len(common) > 0
        unread = {m: sum(v is None for v in scores[m].values()) for m in METHODS}
        assert figure["unreadable"] == unread
        assert sum(unread.values()) > 0 or judge == 0
        for method in METHODS:
            values = np.array([scores[method][i] for i in common])
            assert figure["methods"][method]["mean"] == pytest.approx(values.mean(), abs=1e-12)
            if method != "none":
                against = values - np.array([scores["none"][i] for i in common])
                told = figure["methods"][method]["against_none"]
                assert told["mean"] == pytest.approx(against.mean(), abs=1e-12)
                assert told["low"] <= told["mean"] <= told["high"]


def test_groups_and_variants_sum_up_to_the_whole(out: Path) -> None:
    figure = report.summary(out)["suites"]["ours"]["figures"][1]
    for column, names in (("group", {"group 0", "group 1"}), ("variant", {"text", "picture"})):
        parts = figure["by"][column]
        assert set(parts) == names
        assert sum(part["n"] for part in parts.values()) == figure["n"]
        for method in METHODS:
            whole = sum(part["n"] * part[method] for part in parts.values()) / figure["n"]
            assert whole == pytest.approx(figure["methods"][method]["mean"])


def test_scenarios_of_mm_safetybench_count_alike_where_they_are_large_enough() -> None:
    sizes = {"01": 20, "02": 60}
    groups = pd.Series([name for name, n in sizes.items() for _ in range(n)])
    values = pd.DataFrame({"none": np.ones(80), "daco": [1.0] * 20 + [0.0] * 60})
    assert report._groups("figstep", groups) is None
    assert report._groups("mm-safetybench", groups[1:]) is None
    told = report._groups("mm-safetybench", groups)
    assert report._cell(values, "daco", "unsafe", told)["mean"] == 0.5
    assert report._cell(values, "daco", "unsafe", told)["against_none"]["mean"] == -0.5
    assert report._cell(values, "daco", "unsafe", None)["mean"] == 0.25


def test_judges_are_compared_on_what_both_could_read(out: Path) -> None:
    (pair,) = report.summary(out)["agreement"]
    assert pair["judges"] == ["endpoint:x", "length"]
    assert pair["kappa"]["mean"] == pytest.approx(1.0)  # the same rule, where both could read
    scores = kept(out, 1)
    assert pair["n"] == sum(v is not None for found in scores.values() for v in found.values())


def test_costs_are_ratios_to_no_steering(out: Path) -> None:
    costs = report.costs_of(out)
    assert costs["none"]["time_per_token"] == 1.0
    assert set(costs) == set(METHODS)
    assert all(cost["n_steps"] > 0 and cost["time_per_token"] > 0 for cost in costs.values())


def test_the_same_folder_gives_the_same_table_to_the_byte(out: Path) -> None:
    report.write_report(out)
    first = [(out / name).read_bytes() for name in (report.EVALUATION, report.REPORT)]
    report.write_report(out)
    assert first == [(out / name).read_bytes() for name in (report.EVALUATION, report.REPORT)]
    assert json.loads(first[0])["suites"]["ours"]["items"] == 23


def test_a_table_of_unfinished_answers_is_refused(out: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(out, part)
    gone = next((part / "answers" / "ours").glob("daco-*/00000.parquet"))
    gone.unlink()
    assert report.missing(part) == [f"ours under daco: {max(0, 23 - run.SHARD)} of 23 items answered"]
    with pytest.raises(RecipeError, match="expected answers to every item and verdicts on them, got ours"):
        report.summary(part)


def test_a_table_of_unfinished_verdicts_is_refused(out: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(out, part)
    next((part / "scores").glob("length*/ours/mop-*/00000.parquet")).unlink()
    assert report.missing(part) == ["ours under mop: 0 of 1 shards judged by length"]
    with pytest.raises(RecipeError, match="judged by length"):
        report.summary(part)


def test_the_report_is_one_markdown_page_whatever_names_hold(out: Path, tmp_path: Path) -> None:
    found = report.summary(out)
    for text in TEXTS:
        suites = {text: found["suites"]["ours"] | {"notes": [text], "skipped": {text: 1}}}
        page = report.as_markdown(found | {"suites": suites})
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(page)
        assert "<script" not in html
        assert "<img" not in html
        assert html.count("<h1") == 1
        assert html.count("<table>") == len(suites) * 2 + 2


def test_our_row_stands_beside_the_papers_or_says_that_it_was_not_run() -> None:
    ours = [
        paper.Ours("mm-safetybench", "unsafe", "endpoint:x", "daco", 0.25),
        paper.Ours("mm-safetybench", "unsafe", "rule", "daco", 0.5),
        paper.Ours("mmmu", "right", "choice", "none", 0.5),
    ]
    rows = {row["method"]: row for row in paper.beside(ours, {"daco": 1.1})}
    assert rows["daco"]["MM-SafetyBench R"] == "0.750 / 0.990"
    assert rows["daco"]["MM-SafetyBench QG"] == "not run / 0.984"
    assert rows["none"]["MMMU"] == "0.500 / 0.546"
    assert rows["daco"]["time a token"] == "1.100 / 1.146"
    assert rows["prompting"]["time a token"] == "not run / -"
    assert all(len(row) == 1 + len(paper.COLUMNS) for row in rows.values())


def test_figures_go_into_a_release_and_its_manifest(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    write_model_release(folder)
    own = (
        json.loads((folder / "evaluation.json").read_text()) if (folder / "evaluation.json").is_file() else {}
    )
    found = report.write_report(out)
    report.into_release(found, folder)
    told = json.loads((folder / "evaluation.json").read_text())
    assert "costs" not in told  # no clock in a release
    assert told["suites"] == json.loads(json.dumps(found["suites"]))
    assert {key: told[key] for key in own if key not in found} == {
        k: v for k, v in own.items() if k not in found
    }
    entry = read_manifest(folder)["files"]["evaluation.json"]
    assert entry["sha256"] == sha256_file(folder / "evaluation.json")


def test_figures_of_other_saes_go_into_no_release(out: Path, tmp_path: Path) -> None:
    write_model_release(tmp_path)
    found = report.summary(out)
    report.into_release(found, tmp_path)  # the same SAEs
    found["protocol"]["made_of"]["daco"]["weights"] = "0" * 64
    with pytest.raises(RecipeError, match="expected figures of this release's SAEs, got those of other SAEs"):
        report.into_release(found, tmp_path)
    del found["protocol"]["made_of"]["daco"]
    with pytest.raises(RecipeError, match="got those of no SAE"):
        report.into_release(found, tmp_path)


def test_a_score_that_no_method_shares_makes_no_row(out: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(out, part)
    told = run.read_record(part)
    for cell in told["cells"]:
        for path in run.shard_files(part / "scores" / told["judges"][0]["folder"] / "ours" / cell["cell"]):
            rows: list[dict[str, Any]] = read_table(path).to_pylist()
            write_table(path, table_of([row | {"value": None} for row in rows], run.SCORES))
    figure = next(f for f in report.summary(part)["suites"]["ours"]["figures"] if f["judge"] == "length")
    assert figure["n"] == 0
    assert "methods" not in figure
    assert "0 verdicts" not in report.as_markdown(report.summary(part)).split("length")[1][:200]
