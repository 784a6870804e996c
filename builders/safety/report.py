"""Makes the table of an evaluation: rates and paired differences with intervals, judges compared, costs.

Reads the folder that `builders.safety.run` writes; writes `evaluation.json` and `report.md` into it. Figures
are of the items that every method answered and the judge could read under every method, so that each row of a
table is about the same items; how many were left out is said.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from builders.safety import paper
from builders.safety.judges.agreement import agreement
from builders.safety.methods import LABELS, made_of_sae
from builders.safety.run import ANSWERS, SCORES, locked, read_record, shard_files
from builders.statistics import Interval, interval, paired, rate
from daco.errors import RecipeError
from daco.manifest import canonical_json, file_entry, read_manifest, write_atomic, write_manifest
from daco.steering_sae import SteeringSAE
from daco.tables import read_table

EVALUATION, REPORT = "evaluation.json", "report.md"

RATES = ("unsafe", "refused", "right")
"""Figures that are zeros and ones."""

OVER_GROUPS = ("mm-safetybench",)
"""Suites whose official average is the mean of their groups' (scenarios') means."""

LEAST_GROUP = 20
"""Items of the smallest group for that: with fewer, intervals of differences are too narrow (LOG)."""

ABOUT = {
    "unsafe": "answers judged harmful; lower is better",
    "refused": "answers that decline; better lower on harmless items, higher on harmful ones",
    "right": "questions answered right; higher is better",
    "fluency": "as its judge counts it; higher is better",
}
"""What the figures are."""


def answers_of(out: Path, columns: Sequence[str] = tuple(ANSWERS.names)) -> pd.DataFrame:
    """Every answer that the newest run asked for and that is there, one row an item and method.

    Args:
        out: The run's folder.
        columns: Of ANSWERS.

    Raises:
        RecipeError: there is no run in the folder, or nothing was answered yet.
    """
    found = []
    for cell in read_record(out)["cells"]:
        for path in shard_files(out / "answers" / cell["suite"] / cell["cell"]):
            found.append(pq.read_table(path, columns=list(columns)).to_pandas())
    if not found:
        raise RecipeError(f"expected answers in {out}, got none yet; run `python -m builders evaluate` again")
    return pd.concat(found, ignore_index=True)


def scores_of(out: Path) -> pd.DataFrame:
    """Every score that is there, one row an item, method, judge and figure."""
    record = read_record(out)
    found = []
    for judge in record["judges"]:
        for cell in record["cells"]:
            for path in shard_files(out / "scores" / judge["folder"] / cell["suite"] / cell["cell"]):
                facts = {"suite": cell["suite"], "method": cell["method"]}
                told = {"judge": judge["name"], "figure": judge["figure"]}
                found.append(read_table(path, SCORES).to_pandas().assign(**facts, **told))
    columns = ["item_id", "value", "reason", "suite", "method", "judge", "figure"]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)


def costs_of(out: Path) -> dict[str, dict[str, float]]:
    """By method, seconds a decoding step, relative to no steering on the same shards, and how many steps.

    Only shards count that were asked in batches of the same size on the same device. Where a method has none,
    or answered in one token each, there is no ratio.
    """
    spent: dict[tuple[Any, ...], dict[str, tuple[float, int]]] = {}
    for cell in read_record(out)["cells"]:
        for path in shard_files(out / "answers" / cell["suite"] / cell["cell"]):
            cost = json.loads(path.with_suffix(".json").read_text("utf-8"))
            of_shard = spent.setdefault((cell["suite"], path.stem, cost["batch"], cost["device"]), {})
            of_shard[cell["method"]] = (cost["seconds"], cost["steps"])
    found = {}
    for method in dict.fromkeys(name for shard in spent.values() for name in shard):
        both = [shard for shard in spent.values() if method in shard and "none" in shard]
        mine, plain = (
            tuple(sum(shard[name][i] for shard in both) for i in (0, 1)) for name in (method, "none")
        )
        if mine[1] and plain[1] and plain[0]:
            ratio = (mine[0] / mine[1]) / (plain[0] / plain[1])
            found[method] = {"time_per_token": ratio, "n_steps": mine[1]}
    return found


def summary(out: Path) -> dict[str, Any]:
    """Everything that `evaluation.json` says.

    Returns:
        `suites`: by suite its `items`, `skipped`, `notes` and `figures`: a list of one figure by one judge
        each, with its table by method and by group and variant; `agreement` of judges; `costs` by method;
        `protocol`: model, decoding, settings.

    Raises:
        RecipeError: there is no run, or answers are missing.
    """
    if absent := missing(out):
        raise RecipeError(
            f"expected answers to every item and verdicts on them, got {absent[0]}"
            + (f" and {len(absent) - 1} more such" if absent[1:] else "")
            + "; run the same command again (or the other parts) to go on"
        )
    record, scores = read_record(out), scores_of(out)
    answers = answers_of(out, ["suite", "item_id", "kind", "group", "variant"])  # not gigabytes of prompts
    suites = {
        name: facts | {"figures": _figures(answers, scores[scores["suite"] == name], name)}
        for name, facts in record["suites"].items()
    }
    settings = {cell["method"]: cell["setting"] for cell in record["cells"]}
    made_of = {cell["method"]: cell["made_of"] for cell in record["cells"] if cell["made_of"]}
    protocol = {key: value for key, value in record.items() if key not in ("cells", "suites", "judges")}
    protocol |= {"judges": [judge["name"] for judge in record["judges"]], "settings": settings}
    protocol["made_of"] = made_of
    return {"suites": suites, "agreement": _agreements(scores), "costs": costs_of(out), "protocol": protocol}


def missing(out: Path) -> list[str]:
    """What is not answered or judged yet, a line a suite and method."""
    record = read_record(out)
    found = []
    for cell in record["cells"]:
        where = Path(cell["suite"], cell["cell"])
        expected = record["suites"][cell["suite"]]["items"]
        answered = list(shard_files(out / "answers" / where))
        got = sum(pq.read_metadata(path).num_rows for path in answered)
        if got != expected:
            found.append(f"{cell['suite']} under {cell['method']}: {got} of {expected} items answered")
        for judge in record["judges"]:
            judged = len(list(shard_files(out / "scores" / judge["folder"] / where)))
            if cell["suite"] in judge["suites"] and judged < len(answered):
                told = f"{judged} of {len(answered)} shards judged by {judge['name']}"
                found.append(f"{cell['suite']} under {cell['method']}: {told}")
    return found


def _figures(answers: pd.DataFrame, scores: pd.DataFrame, suite: str) -> list[dict[str, Any]]:
    """One table a judge and figure, of the items that it could read under every method."""
    items = answers[answers["suite"] == suite].drop_duplicates("item_id").set_index("item_id")
    found = []
    for (judge, figure), rows in scores.groupby(["judge", "figure"], sort=True):
        for kind in sorted(items.loc[rows["item_id"].unique(), "kind"].unique()):
            mine = rows[rows["item_id"].isin(items.index[items["kind"] == kind])]
            table = mine.pivot(index="item_id", columns="method", values="value")
            table = table.reindex([i for i in items.index if i in table.index])
            methods = [name for name in LABELS if name in table]
            common = table[methods].dropna()
            facts = {"figure": figure, "judge": judge, "kind": kind, "n": len(common)}
            unread = mine["value"].isna().groupby(mine["method"]).sum()
            facts["unreadable"] = {name: int(unread.get(name, 0)) for name in methods}
            if len(common):
                groups = _groups(suite, items.loc[common.index, "group"])
                facts["average_over"] = "items" if groups is None else "groups"
                facts["methods"] = {name: _cell(common, name, str(figure), groups) for name in methods}
                facts["by"] = _broken_down(common, items, methods)
            found.append(facts)
    return found


def _groups(suite: str, groups: pd.Series) -> list[str] | None:
    """Groups that count alike in a suite's official average; None where items do, or groups are too small."""
    official = suite in OVER_GROUPS and groups.value_counts().min() >= LEAST_GROUP
    return groups.tolist() if official else None


def _cell(table: pd.DataFrame, method: str, figure: str, groups: Sequence[str] | None) -> dict[str, Any]:
    """A method's mean, and its paired difference to no steering, each with a 95 % interval."""
    values = table[method].to_numpy(float)[None]
    found = _told((rate if figure in RATES else interval)(values, groups=groups))
    if "none" in table and method != "none":
        found["against_none"] = _told(paired(values, table["none"].to_numpy(float)[None], groups=groups))
    return found


def _told(found: Interval) -> dict[str, float]:
    return dict(found._asdict())


def _broken_down(
    table: pd.DataFrame, items: pd.DataFrame, methods: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Means by group and by variant, each with its n, where there are several."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for column in ("group", "variant"):
        of = items.loc[table.index, column]
        if of.nunique() > 1:
            found[column] = {
                str(value): {"n": len(rows)} | {name: float(rows[name].mean()) for name in methods}
                for value, rows in table.groupby(of.to_numpy())
            }
    return found


def _agreements(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """How far each two judges of the same figure agree, over all suites and methods."""
    found = []
    for figure in RATES:
        rows = scores[scores["figure"] == figure]
        if rows.empty:
            continue
        table = rows.pivot(index=["suite", "method", "item_id"], columns="judge", values="value")
        judges = sorted(table)
        for i, one in enumerate(judges):
            for other in judges[i + 1 :]:
                both = table[[one, other]]
                pair = agreement(both[one].tolist(), both[other].tolist())
                told = pair._asdict() | {"kappa": pair.kappa and _told(pair.kappa)}
                found.append({"figure": figure, "judges": [one, other]} | told)
    return found


def write_report(out: Path) -> dict[str, Any]:
    """Write `evaluation.json` and `report.md` of a run; returns what the former says."""
    found = summary(out)
    with locked(out):
        write_atomic(out / EVALUATION, canonical_json(found))
        write_atomic(out / REPORT, as_markdown(found))
    return found


def into_release(found: dict[str, Any], folder: Path) -> None:
    """Put the figures of an evaluation into a model release's `evaluation.json`, beside what it has.

    Times stay in the run's folder: the bytes of a release depend on no clock.

    Args:
        found: Of `write_report`.
        folder: The release; its card is rendered anew by `python -m hub stage`.

    Raises:
        RecipeError: it is no model release, or one of SAEs that were not evaluated.
        IntegrityError: the release is incomplete.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != "model":
        raise RecipeError(f"{folder}: expected a model release, got a {manifest['kind']} release")
    measured = found["protocol"]["made_of"].get("daco", {})
    if measured != made_of_sae(SteeringSAE.from_pretrained(folder)):
        what = "other SAEs" if measured else "no SAE"
        raise RecipeError(
            f"{folder}: expected figures of this release's SAEs, got those of {what}; evaluate it"
        )
    path = folder / EVALUATION
    own = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    figures = {section: facts for section, facts in found.items() if section != "costs"}
    write_atomic(path, canonical_json(own | figures))
    manifest["files"][EVALUATION] = file_entry(path)
    write_manifest(folder, manifest)


# The report as text: every name of a suite, group or judge is escaped, since it may come from a stranger.


def as_markdown(found: dict[str, Any]) -> str:
    """The report as Markdown, which reads as plain text too."""
    model = found["protocol"]["model"]
    lines = [f"# Evaluation of {_safe(model['id'] or model['model_type'])}", ""]
    for name, suite in found["suites"].items():
        lines += _suite_lines(name, suite)
    lines += _agreement_lines(found["agreement"])
    lines += ["## Beside the paper's table (ours / the paper's, Qwen2.5-VL-7B)", ""]
    times = {method: cost["time_per_token"] for method, cost in found["costs"].items()}
    lines += _table(paper.beside(paper_terms(found), times))
    lines += ["", "Safety counts answers that are not unsafe; time is relative to no steering.", ""]
    return "\n".join(lines)


def paper_terms(found: Mapping[str, Any]) -> list[paper.Ours]:
    """Our figures as `paper.beside` takes them."""
    return [
        paper.Ours(name, figure["figure"], figure["judge"], method, cell["mean"])
        for name, suite in found["suites"].items()
        for figure in suite["figures"]
        for method, cell in figure.get("methods", {}).items()
    ]


def _suite_lines(name: str, suite: dict[str, Any]) -> list[str]:
    skipped = ", ".join(f"{count} {_safe(why)}" for why, count in suite["skipped"].items())
    lines = [
        f"## {_safe(name)}",
        "",
        f"{suite['items']} items." + (f" Not taken: {skipped}." if skipped else ""),
    ]
    lines += [f"- {_safe(note)}" for note in suite["notes"]]
    for figure in suite["figures"]:
        unread = sum(figure["unreadable"].values())
        lines += ["", f"### {figure['figure']} ({figure['kind']} items) by {_safe(figure['judge'])}", ""]
        over = f"; mean over {figure['average_over']}" if "average_over" in figure else ""
        told = f"{ABOUT[figure['figure']]}; n = {figure['n']}{over}; {unread} verdicts could not be read."
        lines += [told, ""]
        if "methods" in figure:
            lines += _table([_figure_row(method, cell) for method, cell in figure["methods"].items()])
    return [*lines, ""]


def _figure_row(method: str, cell: dict[str, Any]) -> dict[str, str]:
    row = {"method": LABELS[method], "mean": _spread(cell)}
    against = cell.get("against_none")
    return row | {"against no steering": _spread(against, sign="+") if against else ""}


def _spread(cell: dict[str, float], sign: str = "") -> str:
    return f"{cell['mean']:{sign}.3f} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"


def _agreement_lines(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = [
        {
            "figure": pair["figure"],
            "judges": " and ".join(_safe(name) for name in pair["judges"]),
            "kappa": _spread(pair["kappa"]) if pair["kappa"] else "not defined",
            "the same": "" if pair["same"] is None else f"{pair['same']:.3f}",
            "n": str(pair["n"]),
        }
        for pair in found
    ]
    return ["## Agreement of judges (Cohen's kappa)", "", *_table(rows), ""]


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Rows as a Markdown table whose columns stand under each other."""
    heads = list(rows[0])
    widths = [max(len(head), *(len(row[head]) for row in rows)) for head in heads]
    shown = [heads, ["-" * width for width in widths], *([row[head] for head in heads] for row in rows)]
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |" for cells in shown
    ]


def _safe(text: str) -> str:
    """A text of strangers in Markdown: one line, nothing in it a mark."""
    kept = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#!|~" else c for c in kept.replace("&", "&amp;"))
