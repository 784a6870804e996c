"""What a model card says of an evaluation on safety suites: its tables, its picture, its `model-index`.

Reads `evaluation.json` of a model release, whose `suites`, `agreement` and `protocol` are written by
`python -m builders report --into RELEASE`; writes nothing. Times are not in a release, so the card has none.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builders.safety import paper
from builders.safety.methods import LABELS
from builders.safety.report import ABOUT, EVALUATION, paper_terms
from cards import plots
from cards.escape import one_line
from daco.errors import FormatError

PICTURE = "evaluation.png"

SECTIONS = ("suites", "agreement", "protocol")
"""Sections of `evaluation.json` that are shown here, and not as plain tables."""

JUDGES = ("rule", "guard", "endpoint")
"""Kinds of judges, the most trusted last."""

PAPERS_MODEL = "qwen2.5-vl-7b"
"""The paper's table stands beside ours for this model alone."""


def pictures(folder: Path) -> dict[str, bytes]:
    """The pictures that the card shows of an evaluation, by file name; none where there was none."""
    evaluation = _read(folder)
    try:
        points = _points(evaluation) if evaluation.get("suites") else []
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _broken(error) from error
    return {PICTURE: plots.trade_off(points)} if points else {}


def suite_facts(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says; empty where no suite was run.

    Raises:
        FormatError: it is not what the evaluation writes.
    """
    if not evaluation.get("suites"):
        return {}
    try:
        return _facts(evaluation)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _broken(error) from error


def model_index(evaluation: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The figures of DACO as the Hub's `model-index`; empty where there are none.

    Args:
        evaluation: Of `evaluation.json`.
        name: Of the model repo.
    """
    results = [
        {
            "task": {"type": "image-text-to-text"},
            "dataset": {"type": suite, "name": suite},
            "metrics": [
                {
                    "type": figure["figure"],
                    "name": f"{figure['figure']}, {figure['kind']} items, by {one_line(figure['judge'])}",
                    "value": round(figure["methods"]["daco"]["mean"], 6),
                }
            ],
        }
        for suite, figure in _figures(evaluation)
        if "daco" in figure["methods"]
    ]
    return [{"name": name, "results": results}] if results else []


def _figures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every figure that has a row, with its suite."""
    for suite, facts in evaluation.get("suites", {}).items():
        for figure in facts["figures"]:
            if "methods" in figure:
                yield suite, figure


def _facts(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    protocol = evaluation["protocol"]
    found = {
        "suites": [_suite(name, facts) for name, facts in evaluation["suites"].items()],
        "agreement": [_pair(pair) for pair in evaluation["agreement"]],
        "settings": [(LABELS[name], text) for name, text in _ordered(protocol["settings"])],
        "max_answer": protocol["decoding"]["max_answer"],
        "dtype": protocol["model"]["dtype"],
        "picture": PICTURE if _points(evaluation) else "",
        "paper": {},
    }
    if PAPERS_MODEL in protocol["model"]["id"].lower():
        rows = paper.beside(paper_terms(evaluation), {})
        columns = [column.title for column in paper.COLUMNS if column.figure != "time"]
        found["paper"] = {
            "columns": columns,
            "rows": [(LABELS[row["method"]], [row[c] for c in columns]) for row in rows],
        }
    return found


def _suite(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    tables = [
        {
            "figure": figure["figure"],
            "about": ABOUT[figure["figure"]],
            "kind": figure["kind"],
            "judge": figure["judge"],
            "n": figure["n"],
            "over": figure.get("average_over", "items"),
            "unreadable": sum(figure["unreadable"].values()),
            "rows": [_row(name, cell) for name, cell in _ordered(figure.get("methods", {}))],
        }
        for figure in facts["figures"]
    ]
    told = {"n_items": facts["items"], "skipped": facts["skipped"], "notes": facts["notes"]}
    return {"name": name, "tables": tables} | told


def _ordered(by_method: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What is known by method, in the order of all tables: no steering first, DACO last."""
    return [(name, by_method[name]) for name in LABELS if name in by_method]


def _row(method: str, cell: Mapping[str, Any]) -> tuple[str, str, str]:
    against = cell.get("against_none")
    return LABELS[method], _spread(cell), _spread(against, "+") if against else ""


def _spread(cell: Mapping[str, float], sign: str = "") -> str:
    return f"{cell['mean']:{sign}.3f} ({cell['low']:{sign}.3f} to {cell['high']:{sign}.3f})"


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    kappa = _spread(pair["kappa"]) if pair["kappa"] else "not defined"
    return {"figure": pair["figure"], "judges": pair["judges"], "kappa": kappa, "n": pair["n"]}


def _points(evaluation: Mapping[str, Any]) -> list[plots.Traded]:
    """By method, means over suites of what one judge said of them; none without safety figures."""
    found = []
    for method, label in LABELS.items():
        unsafe = _mean(evaluation, method, "unsafe", "harmful")
        right = _mean(evaluation, method, "right", "choice")
        refused = _mean(evaluation, method, "refused", "harmless")
        if unsafe is not None and (right is not None or refused is not None):
            found.append(plots.Traded(label, unsafe, right, refused))
    return found


def _mean(evaluation: Mapping[str, Any], method: str, figure: str, kind: str) -> float | None:
    by_judge: dict[str, list[float]] = {}
    for _, found in _figures(evaluation):
        if found["figure"] == figure and found["kind"] == kind and method in found["methods"]:
            by_judge.setdefault(found["judge"], []).append(found["methods"][method]["mean"])
    if not by_judge:
        return None
    judge = max(by_judge, key=lambda name: (len(by_judge[name]), _weight(name), name))
    return sum(by_judge[judge]) / len(by_judge[judge])


def _weight(judge: str) -> int:
    """Which judge the picture goes by where several judged as many suites: the last of JUDGES it is of."""
    return max((i for i, kind in enumerate(JUDGES) if judge.startswith(kind)), default=-1)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / EVALUATION
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise _broken(error) from error


def _broken(error: Exception) -> FormatError:
    return FormatError(
        f"{EVALUATION}: expected what `python -m builders report` writes, got {error!r}; write it again"
    )
