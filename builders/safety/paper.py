"""The paper's own table for Qwen2.5-VL-7B, and our figures in its terms; reads and writes nothing.

Source: arXiv 2604.08846, as DESIGN section 4 has it. Safety is the share of answers that are *not* unsafe; R
is an LLM that judges responses (here: an endpoint), QG a guard model.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """A column of the paper's table, and which of our figures is the same thing."""

    title: str
    suite: str
    """Of ours; empty: all suites together."""
    figure: str
    """Of `builders.safety.verdicts.FIGURES`, or `time`."""
    judge: str
    """What the judge's name begins with."""
    one_minus: bool = False
    """Whether the paper counts the others."""


COLUMNS = (
    Column("MM-SafetyBench R", "mm-safetybench", "unsafe", "endpoint", True),
    Column("MM-SafetyBench QG", "mm-safetybench", "unsafe", "guard", True),
    Column("JailBreakV R", "jailbreakv", "unsafe", "endpoint", True),
    Column("JailBreakV QG", "jailbreakv", "unsafe", "guard", True),
    Column("fluency", "", "fluency", "fluency"),
    Column("MMMU", "mmmu", "right", "choice"),
    Column("time a token", "", "time", ""),
)

PAPER: dict[str, tuple[float | None, ...]] = {
    "none": (0.442, 0.652, 0.564, 0.543, 0.917, 0.546, 1.0),
    "prompting": (0.607, 0.711, 0.659, 0.622, 0.923, 0.516, None),
    "actadd": (0.653, 0.735, 0.691, 0.675, 0.691, 0.441, 1.108),
    "mop": (0.771, 0.840, 0.835, 0.752, 0.816, 0.496, 1.494),
    "daco": (0.990, 0.984, 0.903, 0.841, 0.905, 0.521, 1.146),
}
"""By method, in the order of COLUMNS; time is relative to no steering. None: the paper gives no figure."""


class Ours(NamedTuple):
    """One of our figures."""

    suite: str
    figure: str
    judge: str
    method: str
    mean: float


def beside(ours: Sequence[Ours], times: Mapping[str, float]) -> list[dict[str, str]]:
    """The paper's table with our figure beside each of its own, or "not run".

    Args:
        ours: What was measured.
        times: Time a token by method, relative to no steering.

    Returns:
        One row a method: `method`, and by title of the column "ours / paper's".
    """
    rows = []
    for method, published in PAPER.items():
        row = {"method": method}
        for column, theirs in zip(COLUMNS, published, strict=True):
            mine = times.get(method) if column.figure == "time" else _ours(ours, column, method)
            row[column.title] = f"{_shown(mine, 'not run')} / {_shown(theirs, '-')}"
        rows.append(row)
    return rows


def _ours(ours: Sequence[Ours], column: Column, method: str) -> float | None:
    found = [
        one.mean
        for one in ours
        if one.method == method
        and one.figure == column.figure
        and one.judge.startswith(column.judge)
        and column.suite in ("", one.suite)
    ]
    if not found:
        return None
    mean = sum(found) / len(found)
    return 1 - mean if column.one_minus else mean


def _shown(value: float | None, absent: str) -> str:
    return absent if value is None else f"{value:.3f}"
