"""A table of prompts, with answers or without, that the `activations` stage may read beside the stimuli.

Reads `.parquet`, `.tsv`, `.csv` or `.jsonl` with the columns `prompt`, `answer` (for given answers) and, if
any, `image` (relative to the table); writes nothing. What cannot be used is counted by its reason.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from builders.corpus import MAX_CAPTION, read_rows, stimulus_id
from daco.errors import CorpusError

_UNSAFE = re.compile(r"[\x00\ud800-\udfff]")


COLUMNS = {"answers": ("prompt", "answer"), "generated": ("prompt",)}
"""Columns that each source needs."""


class Prompt(NamedTuple):
    """A prompt to be read with its answer, or to be answered first."""

    prompt_id: str
    """Two ids joined by `-`: of the prompt with its image, and of the source with the answer."""
    prompt: str
    """Text of the user's turn."""
    answer: str | None
    """What the model is to have said; None: it is asked."""
    image: Path | None
    """The image of the user's turn, if any."""


def read_prompts(path: Path, source: str) -> tuple[list[Prompt], Counter[str]]:
    """The usable rows of a table, each once, and how many were skipped, by reason.

    Args:
        path: The table.
        source: `answers` (those of the table) or `generated` (the model's own; the column is not needed).

    Raises:
        CorpusError: the table is missing, broken, lacks a column, or no row of it can be used.
    """
    found: dict[str, Prompt] = {}
    skipped: Counter[str] = Counter()
    for row in rows_of(path, COLUMNS[source]):
        prompt = _prompt_of(row, source, path.parent)
        if isinstance(prompt, str):
            skipped[f"skipped.{prompt}"] += 1
        elif found.setdefault(prompt.prompt_id, prompt) is not prompt:
            skipped["skipped.duplicate_row"] += 1
    if not found:
        raise CorpusError(
            f"{path.name}: expected at least one usable row, got none of {skipped.total()} ({dict(skipped)})"
        )
    return list(found.values()), skipped


def check_prompts(path: Path, source: str) -> None:
    """Raise CorpusError where the table is missing or lacks a column; reads its first row alone."""
    next(rows_of(path, COLUMNS[source]), None)


def rows_of(path: Path, needed: tuple[str, ...], field: str = "activations.path") -> Iterator[dict[str, Any]]:
    """Lazy rows of a table of prompts that has the columns `needed`; `field` of the recipe names it.

    Raises:
        CorpusError: the table is missing, broken, or lacks a column.
    """
    if not path.is_file():
        raise CorpusError(f"expected a table of prompts at {path}, got none; check {field}")
    columns, rows = _read_jsonl(path) if path.suffix.lower() == ".jsonl" else read_rows(path)
    if missing := [name for name in needed if name not in columns]:
        raise CorpusError(f"{path.name}: expected column {missing[0]!r}, got {columns}; name it so")
    yield from rows


def _read_jsonl(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Columns of the first row, and lazy rows."""
    rows = _json_lines(path)
    first = next(_json_lines(path), {})
    return list(first), rows


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{path.name}: expected JSON, got {error} in line {number}") from error
            if not isinstance(row, dict):
                raise CorpusError(f"{path.name}: expected an object, got {line[:40]!r} in line {number}")
            yield row


def _prompt_of(row: dict[str, Any], source: str, root: Path) -> Prompt | str:
    """A row as a prompt, or why it is skipped."""
    texts = {name: text_of(row.get(name)) for name in COLUMNS[source]}
    for name, text in texts.items():
        if not text:
            return f"empty_{name}"
        if len(text) > MAX_CAPTION:
            return f"long_{name}"
    name = row.get("image") or ""
    image = image_of(name, root) if name else None
    if isinstance(image, str):
        return image
    prompt_id = f"{stimulus_id(texts['prompt'], name)}-{stimulus_id(source, texts.get('answer', ''))}"
    return Prompt(prompt_id, texts["prompt"], texts.get("answer"), image)


def text_of(value: object) -> str:
    """`value` without NUL and lone surrogates; line ends mean something in a prompt and stay."""
    return _UNSAFE.sub(" ", value).strip() if isinstance(value, str) else ""


def image_of(name: object, root: Path) -> Path | str:
    """The image's file, or why it is not opened; as in a corpus, none outside the table's folder is."""
    if not isinstance(name, str):
        return "unreadable_image"
    try:
        file = (root / name).resolve()
        if not file.is_relative_to(root.resolve()):
            return "outside_folder"
        return file if file.is_file() else "missing_image"
    except (OSError, ValueError, RuntimeError):  # NUL in the name, a name too long, a loop of links
        return "missing_image"
