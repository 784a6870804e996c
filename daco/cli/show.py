"""Prints for people and for programs; text from models and data sets never reaches a terminal as it is."""

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}")

STYLES = {"undesirable": "red", "desirable": "green"}
"""How labels are coloured."""


def console(error: bool = False) -> Console:
    """Standard output, or standard error, without markup: brackets in a text are brackets."""
    return Console(stderr=error, markup=False, highlight=False, emoji=False)


def plain(text: object, lines: bool = False) -> str:
    """`text` without what a terminal would obey: escapes, control characters, marks of direction.

    Args:
        text: From a model, a data set or an error.
        lines: Keep line ends and tabs.
    """
    kept = (c if c.isprintable() or (lines and c in "\n\t") else _instead(c) for c in str(text))
    return "".join(kept)


def _instead(character: str) -> str:
    return "" if unicodedata.category(character) == "Cf" else " "


def one_line(text: object) -> str:
    """`text` on one line, without tokens of the Hub."""
    return _TOKEN.sub(r"\1_***", " ".join(plain(text).split()))


def say(text: object = "", style: str = "") -> None:
    """Print a text of our own, whose parts from elsewhere went through `plain`."""
    _print(console(), Text(str(text), style=style))


def fail(error: object) -> None:
    """Print an error, one line, to standard error."""
    _print(console(error=True), Text(f"error: {one_line(error)}", style="red"))


def _print(target: Console, text: Text) -> None:
    """Between words where a person reads it, on one line for a program."""
    target.print(text, soft_wrap=not target.is_terminal)


def as_json(value: Any) -> None:
    """Print a value as JSON on one line, in ASCII: no character of it can act on a terminal."""
    print(json.dumps(value, sort_keys=True, allow_nan=False), flush=True)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON-able facts."""
    return list(json.loads(frame.to_json(orient="records")))


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print rows: aligned and cut to the width of a terminal, whole and separated by tabs elsewhere.

    Args:
        rows: Facts by column; what is missing is empty.
        columns: In order; numbers stand to the right.
    """
    shown = [{name: _cell(row.get(name)) for name in columns} for row in rows]
    target = console()
    if not target.is_terminal:
        print("\t".join(columns))
        for row in shown:
            print("\t".join(row[name] for name in columns))
        return
    found = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    texts = [[name, *(row[name] for row in shown)] for name in columns]
    natural = [max(map(cell_len, column)) for column in texts]
    for name, width in zip(columns, _fitted(natural, target.width - 2 * (len(columns) - 1)), strict=True):
        right = all(re.fullmatch(r"-?[\d.,]+%?|", row[name]) for row in shown)
        found.add_column(
            Text(name),
            "",
            justify="right" if right else "left",
            width=width,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in shown:
        style = STYLES.get(row.get("polarity", ""), "")
        found.add_row(*(Text(row[name]) for name in columns), style=style)
    target.print(found)


def _fitted(natural: Sequence[int], room: int) -> list[int]:
    """Widths of columns: the widest give way until all of them fit."""
    widths = list(natural)
    while sum(widths) > room and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    return widths


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return plain(", ".join(map(str, value)))
    return plain(value).strip()


def facts(rows: Mapping[str, Any]) -> None:
    """Print names and values, one a line; empty ones are left out."""
    there = {name: text for name, value in rows.items() if (text := _cell(value))}
    width = max(map(len, there), default=0)
    for name, text in there.items():
        say(f"{name:<{width}}  {text}")


def is_terminal() -> bool:
    """Whether a person is at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()
