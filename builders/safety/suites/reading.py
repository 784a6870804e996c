"""What all readers of suites share: tables and JSON, texts and pictures that are looked at, rows left out.

Reads files of suites; writes nothing. Whatever stands in them is text of strangers. A row or picture that is
broken is left out and counted; a file that is not what it should be ends the reading.
"""

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from builders.corpus import MAX_SHAPE, open_image
from builders.safety.items import Item, Picture, Suite
from builders.safety.suites.spec import SuiteSpec
from daco.errors import CorpusError

MAX_TEXT = 100_000
"""Characters of a text, at most: one longer would pad every prompt of its batch to its own length."""

_JPEG_TAIL = 4096


class Skip(NamedTuple):
    """A row that gives no item, and why."""

    reason: str
    variant: str = ""
    group: str = ""


Candidate = Item | Skip


class BadRowError(Exception):
    """A row cannot be used; its text is the reason that is counted. Never leaves this package."""


def collect(
    spec: SuiteSpec,
    candidates: Iterable[Candidate],
    where: Path,
    variants: Iterable[str] = (),
    groups: Iterable[str] = (),
) -> Suite:
    """The items that are asked for, and counts of the rows that give none.

    Args:
        spec: What is asked for.
        candidates: In the order of the files; an id that comes again gets a number.
        where: Place of the files, for messages.
        variants: Those that there are, where the candidates are not all.
        groups: The same.

    Raises:
        CorpusError: no item is left, or one that was asked for by name is not there.
    """
    items: list[Item] = []
    skipped: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    names = {"variant": set(variants), "group": set(groups)}
    for found in candidates:
        for field in names:
            names[field].add(getattr(found, field))
        if isinstance(found, Skip):
            if spec.takes(found.variant, found.group):
                skipped[f"{found.variant}: {found.reason}" if found.variant else found.reason] += 1
        elif spec.takes(found.variant, found.group, found.kind):
            seen[found.item_id] += 1
            again = seen[found.item_id]
            items.append(found if again == 1 else found._replace(item_id=f"{found.item_id}#{again}"))
    _check_names(spec, names, where)
    if not items:
        raise CorpusError(
            f"{where}: expected items of {spec.name}, got none (left out: {dict(skipped)}); "
            "check the folder and the options"
        )
    return Suite(spec.name, tuple(items), skipped, ())


def _check_names(spec: SuiteSpec, names: dict[str, set[str]], where: Path) -> None:
    for field, wanted in (("variant", spec.variants), ("group", spec.groups)):
        known = sorted(names[field] - {""})
        if missing := [name for name in wanted if name not in known]:
            raise CorpusError(f"{where}: expected {field} of {known}, got {missing}; check the options")


# Texts.


def text_of(value: object, what: str = "text") -> str:
    """A text as it is, if it can be asked.

    Raises:
        BadRowError: it is none, is empty, too long, or holds what no encoding can write.
    """
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"empty_{what}")
    if len(value) > MAX_TEXT:
        raise BadRowError(f"long_{what}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: of JSON escapes, or of bytes that are not UTF-8
        raise BadRowError(f"bad_{what}") from None
    return value


# Pictures.


def picture_file(folder: Path, name: object) -> Picture:
    """A picture that a table names, relative to `folder`; links in the folder are followed.

    Raises:
        BadRowError: it names none, one outside the folder, or one that is not there or cannot be opened.
    """
    if not isinstance(name, str) or not name.strip():
        raise BadRowError("missing_image")
    inner = PurePosixPath(name.replace("\\", "/"))
    if inner.is_absolute() or ".." in inner.parts or ":" in "".join(inner.parts[:1]):
        raise BadRowError("outside_folder")
    path = folder / inner
    try:
        if not path.is_file():
            raise BadRowError("missing_image")
        if reason := _reason_of(path, *_stamp(path)):
            raise BadRowError(reason)
    except (OSError, ValueError):  # NUL in the name, a name too long, no right to read
        raise BadRowError("missing_image") from None
    return Picture(path=path)


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


@lru_cache(maxsize=100_000)  # thousands of rows share a picture
def _reason_of(path: Path, size: int, changed: int) -> str:
    """Why the image of a file cannot be used; empty if it can."""
    try:
        check_image(path.read_bytes())
    except BadRowError as reason:
        return str(reason)
    return ""


def picture_cell(value: object) -> Picture | None:
    """A picture of a table of the Hub, stored as `{bytes, path}`; None where the cell is empty.

    Raises:
        BadRowError: it cannot be opened.
    """
    if value is None:
        return None
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise BadRowError("missing_image")
    check_image(data)
    return Picture(data=data)


def check_image(content: bytes) -> None:
    """Look whether an image opens; whole files of the usual kinds are not decoded for it.

    Raises:
        BadRowError: it does not, or is too thin for any model.
    """
    try:
        width, height = _looked_at(content) or open_image(content).size
    except Exception:  # a hostile file: Pillow's plug-ins raise all sorts, and one image must not end a run
        raise BadRowError("unreadable_image") from None
    if max(width, height) > MAX_SHAPE * min(width, height):
        raise BadRowError("extreme_shape")


def _looked_at(content: bytes) -> tuple[int, int] | None:
    """Size of an image that is whole by its checksums or its end; None: only decoding can tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.format == "PNG":
                    image.verify()
                    return image.size
                if image.format == "JPEG" and b"\xff\xd9" in content[-_JPEG_TAIL:]:
                    return image.size
        except (OSError, SyntaxError, ValueError):
            pass
    return None


# Files.


def first_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of these files that is in a folder.

    Raises:
        CorpusError: none is.
    """
    for name in names:
        if (path := folder / name).is_file():
            return path
    raise CorpusError(f"{folder}: expected {what} at {' or '.join(names)}, got none; check the folder")


def read_json(path: Path, kind: type | tuple[type, ...]) -> Any:
    """Content of a JSON file whose outermost value is of a kind.

    Raises:
        CorpusError: it is not there, is no JSON, or something else.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: expected JSON, got {error}; fetch the file again") from error
    if not isinstance(content, kind):
        raise CorpusError(
            f"{path}: expected another kind of JSON, got a {type(content).__name__}; is it the official file?"
        )
    return content


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str] | Skip]:
    """Rows of a CSV file; one of another length is left out.

    Raises:
        CorpusError: a column is missing, or it is no CSV.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            check_columns(path, reader.fieldnames or (), columns)
            for row in reader:
                whole = None not in row and None not in row.values()
                yield {key: str(value) for key, value in row.items()} if whole else Skip("bad_row")
        except csv.Error as error:
            raise CorpusError(
                f"{path}: line {reader.line_num}: expected CSV, got {error}; fetch the file again"
            ) from error


def read_parquet(
    path: Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, with those of its columns that are named.

    Raises:
        CorpusError: a column is missing, or it is no parquet.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_columns(path, names, columns)
            taken = [*columns, *(name for name in optional if name in names)]
            for batch in file.iter_batches(64, columns=taken):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: expected parquet, got {error}; fetch the file again") from error


def check_columns(path: Path, got: Iterable[str], columns: Sequence[str]) -> None:
    """Raises:
    CorpusError: a column is missing.
    """
    got = list(got)
    for column in columns:
        if column not in got:
            raise CorpusError(f"{path}: expected column {column!r}, got {got}; is it the official file?")
