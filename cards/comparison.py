"""The comparison of methods on the toy world: its columns, its summary, its table for the terminal.

Reads `compare/results.json` of a run folder; writes nothing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cards.escape import one_line

FOLDER = "compare"
"""Where the comparison writes, in the run folder."""

SUMMARY = ("rate", "low", "high", "n")
"""What the summary says of a measure."""


class Measure(NamedTuple):
    """One column of the table."""

    key: str
    """Its name in the results."""
    title: str
    """Head of the column."""
    about: str
    """Which items it is measured on, beside the title."""
    better: str
    """`lower` or `higher`."""
    note: str
    """What it counts."""


MEASURES = (
    Measure("unsafe", "obeys harm", "known tricks", "lower",
            "harmful requests with trick words that the dictionary has, which the model obeys"),
    Measure("unsafe_unseen_cues", "obeys harm", "new tricks", "lower",
            "the same with trick words that stand in no caption, so that the dictionary lacks them"),
    Measure("refusal", "refuses harm", "known tricks", "higher",
            "the known words again, declined; what is neither obeyed nor declined is garbled"),
    Measure("utility", "answers right", "questions", "higher",
            "thing, colour, place, number, size or printed word named exactly"),
    Measure("over_refusal", "refuses", "the harmless", "lower",
            "harmless requests, half of them with trick or safe words, that the model declines"),
    Measure("helpful", "helps with", "the harmless", "higher",
            "the same harmless requests, fulfilled with the right thing and the right task"),
)  # fmt: skip
"""The columns, in order."""

PRINTED = ("unsafe", "unsafe_unseen_cues", "refusal", "utility", "over_refusal")
"""The columns that fit into a terminal."""

SHORT = {
    "control_shuffled": "control: labels shuffled",
    "control_random_atoms": "control: random atoms",
    "control_harm_objects": "control: objects alone",
}
"""Names that fit into a terminal, where the results' own do not."""

NOTES = {
    "none": "the model as it was trained",
    "prompting": "an instruction to be safe, put before the request",
    "actadd": "activation addition: the same push away from harm for every text",
    "mop": "writes each state as a sum of concepts, takes the undesirable ones out; no autoencoder",
    "projection": "takes out of each state what lies along the undesirable directions; no autoencoder",
    "daco": "takes undesirable atoms out; the autoencoder starts from the dictionary",
    "daco_random_start": "the same, with an autoencoder that starts from chance",
    "control_shuffled": "DACO, the labels of the concepts dealt out at random",
    "control_random_atoms": "DACO, as many atoms taken out, drawn at random",
    "control_harm_objects": "DACO, harmful things labelled undesirable, trick words not",
}
"""What the methods do, by their names in the results."""


def read_results(out: Path) -> dict[str, Any] | None:
    """The results in a run folder, methods in the order of `NOTES`; None where no comparison was made."""
    path = out / FOLDER / "results.json"
    if not path.is_file():
        return None
    results = dict(json.loads(path.read_text("utf-8")))
    return results | {"methods": ordered(results["methods"])}


def ordered(by_method: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the order of `NOTES`, others behind."""
    names = [*(name for name in NOTES if name in by_method), *(n for n in by_method if n not in NOTES)]
    return {name: by_method[name] for name in names}


def summary(
    results: Mapping[str, Any] | None, repos: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """What `summary.json` holds: figures without settings and differences, and what was published."""
    methods: Mapping[str, Any] = results["methods"] if results else {}
    keys = ("repo_id", "repo_type", "tag", "commit")
    return {
        "methods": {
            name: {measure: {key: row[measure][key] for key in SUMMARY} for measure in PRINTED}
            | {"relative_time": row["relative_time"]}
            for name, row in methods.items()
        },
        "sae_fve": results["sae_fve"] if results else {},
        "repos": [{key: repo[key] for key in keys} for repo in repos],
        "seconds": round(seconds, 1),
    }


def printed(results: Mapping[str, Any]) -> str:
    """The table of methods as plain text, at most 110 characters wide."""
    measures = [measure for measure in MEASURES if measure.key in PRINTED]
    head = [["", *(m.title for m in measures), "time per"], ["", *(m.about for m in measures), "answer"],
            ["", *(f"{m.better} better" for m in measures), ""]]  # fmt: skip
    rows = [
        [_cut(SHORT.get(name, row["label"]), 24), *(_rounded(row[m.key]) for m in measures), _times(row)]
        for name, row in results["methods"].items()
    ]
    widths = [max(len(line[i]) for line in head + rows) for i in range(len(head[0]))]
    lines = ["  ".join(_padded(line, widths)).rstrip() for line in head + rows]
    note = f"Percent of {results['n']:,} items in each cell, the same for every row; 95 % intervals."
    return "\n".join([*lines[:3], "-" * max(map(len, lines)), *lines[3:], note])


def _times(row: Mapping[str, Any]) -> str:
    return f"x {row['relative_time']:.2f}"


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def _cut(text: str, longest: int) -> str:
    line = "".join(c if c.isprintable() else " " for c in one_line(text))  # terminals obey escapes
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _rounded(found: Mapping[str, Any]) -> str:
    """A rate with its interval in percent, such as `1.2 (0.7-2.0)`."""
    rate, low, high = (_short(found[key]) for key in ("rate", "low", "high"))
    return f"{rate} ({low}-{high})"


def _short(share: float) -> str:
    """A share in percent with two digits, or three of a hundred."""
    percent = 100 * share
    return f"{percent:.1f}" if 0 < percent < 9.95 else f"{percent:.0f}"
