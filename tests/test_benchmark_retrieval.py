"""The benchmark of retrieval in small: its parts, its table, and CC-3M as far as a CPU can show it."""

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.retrieval as benchmark

SMALL = ["--concepts", "40", "--pairs", "700", "--width", "48", "--least", "0.001", "--rounds", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SQUARE", 64)
    monkeypatch.setattr(benchmark, "GROWTH", (300, 600))


def test_the_whole_of_cc_3m_is_this_command_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = benchmark.parse(["--full", "--device", "cuda"])
    assert (arguments.concepts, arguments.pairs, arguments.width) == (15_000, 3_300_000, 768)
    assert arguments.parts == ["speed", "memory"]
    assert arguments.memory == 32_768
    out = tmp_path / "out.json"
    benchmark.main(["--full", *SMALL, "--profile", "--out", str(out)])
    assert capsys.readouterr().out.count("Self CPU time total") == 2
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert {row["part"] for row in rows} == {"speed", "memory"}
    assert all(row["work"].startswith("40 concepts x 700 pairs x 48") and row["machine"] for row in rows)
    for dtype in ("float32", "bfloat16"):
        found = [row for row in rows if row["who"] == "daco" and row["work"].endswith(dtype)]
        assert {row["unit"] for row in found} == {"s", "processor s"}
        assert all(row["ratio"] >= 0 for row in found)
    assert {row["who"] for row in rows} >= {"daco", "torch.mm"}


def test_a_part_replaces_its_own_rows_and_leaves_the_others(tmp_path: Path) -> None:
    out, data = tmp_path / "out.json", tmp_path / "data"
    given = [*SMALL, "--dtypes", "float32", "--out", str(out), "--data", str(data)]
    benchmark.main([*given, "--parts", "growth"])
    grown = json.loads(out.read_text(encoding="utf-8"))
    assert [row["work"].split(" x ")[1] for row in grown] == ["300 pairs", "600 pairs", "3,300,000 pairs"]
    written = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    benchmark.main([*given, "--parts", "memory"])
    benchmark.main([*given, "--parts", "memory"])
    both = json.loads(out.read_text(encoding="utf-8"))
    assert [row["part"] for row in both] == ["memory", "growth", "growth", "growth"]
    assert both[1:] == grown
    assert {path: path.stat().st_mtime_ns for path in data.iterdir()} == written


def test_parts_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--parts", "speed,spead"])
    assert "--parts: expected some of speed,faiss,memory,growth" in capsys.readouterr().err


def test_an_answer_that_is_not_the_float64_pass_s_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    search = benchmark.search

    def wrong(*given: Any, **named: Any) -> Any:
        found = search(*given, **named)
        found.nearest.rows[0][:2] = found.nearest.rows[0][1::-1].copy()
        return found

    monkeypatch.setattr(benchmark, "search", wrong)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        benchmark.main([*SMALL, "--parts", "speed", "--out", str(tmp_path / "out.json")])


def test_the_float64_pass_on_a_gpu_is_that_on_the_host() -> None:
    world = benchmark.World(48, seed=3)
    images, texts = (side.astype("float16") for side in world.pairs(0, 900))
    corpus = benchmark.corpus_of(images, texts)
    queries = world.concepts(11)
    there = benchmark.exhaustively_there(queries, corpus, "cpu", block=170)
    for rows, scores, expected in zip(*there, benchmark.exhaustively(queries, corpus, 2).rows, strict=True):
        assert rows.tolist() == expected.tolist()
        assert len(scores.image) == benchmark.TOP_K


def test_of_a_gpu_only_the_clock_is_told() -> None:
    arguments = [benchmark.parse(["--device", device]) for device in ("cpu", "cuda")]
    assert [[unit for _, unit, _ in benchmark.units_of(one)] for one in arguments] == [
        ["s", "processor s"],
        ["s"],
    ]
    assert [(one.memory, one.least) for one in arguments] == [(1536, 1.0), (32_768, 0.2)]
