"""MMMU: 900 questions of its validation split, of 30 subjects, with up to seven pictures each.

Reads `<subject>/validation-*.parquet` as the Hub has them; pictures stay in memory.

Source: arXiv 2311.16502.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builders.safety.items import Item, Picture, Suite
from builders.safety.scoring import letters, literal_list
from builders.safety.suites.reading import (
    BadRowError,
    Candidate,
    Skip,
    collect,
    picture_cell,
    read_parquet,
    text_of,
)
from builders.safety.suites.spec import SuiteSpec
from daco.errors import CorpusError

NAME = "mmmu"
TITLE = "MMMU (validation)"
FIGURE = "right"
LICENCE = "Apache-2.0"
URL = "https://huggingface.co/datasets/MMMU/MMMU"
HUB = "MMMU/MMMU"
PATTERNS = ("*/validation-*.parquet",)
ROWS = {"": 900}
RULES: dict[str, str] = {}

CHOICE = "Answer with the option's letter from the given choices directly."
OPEN = "Answer the question using a single word or phrase."
"""The last line of a prompt with options and of one without (the official repository's configuration)."""

COLUMNS = ("id", "question", "options", "answer", "question_type")
PICTURES = tuple(f"image_{number}" for number in range(1, 8))

_MARK = re.compile(r"<image (\d+)>")


def read(folder: Path, spec: SuiteSpec | None = None) -> Suite:
    """The suite from a folder with one folder a subject.

    Raises:
        CorpusError: it is none, or a file in it is not what it should be.
    """
    spec = spec or SuiteSpec(NAME)
    files = sorted(folder.glob("*/validation-*.parquet"))
    if not files:
        raise CorpusError(f"{folder}: expected <subject>/validation-*.parquet, got none; fetch {URL}")
    return collect(spec, _candidates(files, spec), folder)


def _candidates(files: list[Path], spec: SuiteSpec) -> Iterator[Candidate]:
    for path in files:
        subject = path.parent.name
        if not spec.takes("", subject):
            yield Skip("not_asked_for", group=subject)
            continue
        for row in read_parquet(path, COLUMNS, PICTURES):
            try:
                yield _item(subject, row)
            except BadRowError as reason:
                yield Skip(str(reason), group=subject)


def _item(subject: str, row: dict[str, Any]) -> Item:
    """One question, its markers `<image k>` meaning its k-th picture.

    Raises:
        BadRowError: it cannot be asked.
    """
    question, number = text_of(row["question"]), text_of(row["id"], "id")
    options, gold, form = _options(row), text_of(row["answer"], "answer"), "multiple-choice"
    if row["question_type"] == form:
        if gold not in letters(len(options)):
            raise BadRowError("unknown_answer")
        lines = [
            f"({letter}) {option}" for letter, option in zip(letters(len(options)), options, strict=True)
        ]
        text = "\n".join([question, *lines, "", CHOICE])
    else:
        options, text = [], f"{question}\n{OPEN}"
    prompt, pictures = _placed(text, [row.get(name) for name in PICTURES])
    return Item(
        NAME,
        number,
        "choice",
        subject,
        form if options else "open",
        prompt,
        pictures,
        question,
        tuple(options),
        gold,
    )


def _options(row: dict[str, Any]) -> list[str]:
    """The options, which the table holds as text of a Python list; it is parsed, never run."""
    if row["question_type"] != "multiple-choice":
        return []
    options = literal_list(text_of(row["options"], "options"))
    if not options or len(options) > 26:
        raise BadRowError("bad_options")
    return options


def _placed(text: str, cells: list[Any]) -> tuple[str, tuple[Picture, ...]]:
    """A text whose markers count the pictures that it shows from 1 on, and these pictures in their order.

    Pictures that no marker names are shown too, behind the others; official rows have none such.

    Raises:
        BadRowError: a marker without a picture, a picture that cannot be opened, or no picture at all.
    """
    found = {number: cell for number, cell in enumerate(cells, 1) if cell is not None}
    marked = {int(number) for number in _MARK.findall(text)}
    if not found or not marked <= found.keys():
        raise BadRowError("missing_image")
    order = {
        number: place for place, number in enumerate([*sorted(marked), *sorted(found.keys() - marked)], 1)
    }
    pictures = tuple(picture for number in order if (picture := picture_cell(found[number])))
    return _MARK.sub(lambda mark: f"<image {order[int(mark[1])]}>", text), pictures
