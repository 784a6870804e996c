"""Stage `corpus`: reads caption-image pairs from any source, checks every one, and gives it its id.

Reads a folder, a table, a COCO captions file, a `datasets` data set, webdataset tars or the toy world; writes
`stimuli.parquet` (one row a usable unique pair) and, where the source has no image files or tars, `images/`.
"""

import csv
import hashlib
import io
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from builders import webdataset
from builders.recipe import CorpusConfig, Recipe
from builders.stages import Work, summed_counts
from builders.toyworld import scenes
from daco.errors import CorpusError
from daco.manifest import canonical_json, write_atomic
from daco.tables import STIMULI, read_table, table_of, write_table

T = TypeVar("T")

ROWS = STIMULI.append(pa.field("file", pa.string()))
"""Columns of `stimuli.parquet`; `file` is absolute, or relative to the stage's folder where stored there."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Endings of files that count as images in a folder."""

MAX_SHAPE = 100
"""An image's longer side over its shorter one, at most: processors refuse or blow up anything thinner."""

MAX_CAPTION = 10_000
"""Characters of a caption, at most: one longer would pad every prompt of its batch to its own length."""

_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_UNSAFE = re.compile(r"[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Pair:
    """One caption-image pair as its source gives it, before any check."""

    key: str
    """Names the pair in its source; stable across revisions."""
    caption: str
    """As found; text of strangers, never interpreted."""
    image: Path | Callable[[], bytes]
    """The image's file, or what makes its bytes where the source has no files."""
    url: str = ""
    """Where the image is on the web, if known."""


Candidate = Pair | str
"""A pair, or the reason why a row of the source gives none."""


def stimulus_id(source: str, key: str) -> str:
    """First 16 hex digits of sha256(source, NUL, key)."""
    return hashlib.sha256(f"{source}\0{key}".encode()).hexdigest()[:16]


def clean_caption(text: object) -> str:
    """`text` with each run of white space, control characters and lone surrogates as one space."""
    return _BLANK.sub(" ", text).strip() if isinstance(text, str) else ""


def read_image(file: Path) -> bytes:
    """Bytes of an image as its source has them; `file` may be a member of a tar (see `webdataset`).

    Raises:
        OSError: it is not there.
    """
    if ".tar#" in file.name and not file.is_file():
        content = webdataset.read_member(file)
        if content is not None:
            return content
    return file.read_bytes()


def open_image(file: Path | bytes) -> Image.Image:
    """Decode an image wholly, as RGB; transparent parts lie on white, of an animation the first frame counts.

    Raises:
        Exception: whatever Pillow's plug-ins raise on a broken file; they agree on no class.
    """
    content = file if isinstance(file, bytes) else read_image(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content)) as image:
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                above = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
            return image.convert("RGB")


# Readers: each yields candidates lazily, in an order that depends on the source alone.


def read_folder(folder: Path) -> Iterator[Candidate]:
    """Pairs of `name.png` (or another image ending) and `name.txt` in a folder and those below it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    captioned = {path.with_suffix("") for path in images}
    texts = {path.with_suffix("") for path in files if path.suffix.lower() == ".txt"}
    yield from ["missing_image"] * len(texts - captioned)
    for image in images:
        if (text := image.with_suffix(".txt")).is_file():
            caption = text.read_text("utf-8-sig", errors="replace")
            yield Pair(image.relative_to(folder).as_posix(), caption, image)
        else:
            yield "missing_caption"


def read_rows(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Column names and lazy rows of a `.tsv`, `.csv` or `.parquet` file.

    Raises:
        CorpusError: the file is missing, has another ending, or is no such table.
    """
    if not path.is_file():
        raise CorpusError(f"expected a table at {path}, got none; check corpus.path")
    if path.suffix.lower() == ".parquet":
        with _table_errors(path):
            file = pq.ParquetFile(path)
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        return file.schema_arrow.names, _rows_of(path, rows)
    if path.suffix.lower() not in (".tsv", ".csv"):
        raise CorpusError(f"{path}: expected a .tsv, .csv or .parquet file, got {path.suffix!r}")
    lines = path.open(encoding="utf-8-sig", errors="replace", newline="")
    if path.suffix.lower() == ".tsv":  # quotes are plain characters in a TSV
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(lines)
    with _table_errors(path):
        columns = list(reader.fieldnames or ())
    return columns, _rows_of(path, reader)


def _rows_of(path: Path, rows: Iterable[T]) -> Iterator[T]:
    with _table_errors(path):
        yield from rows


@contextmanager
def _table_errors(path: Path) -> Iterator[None]:
    """Turns what pyarrow and csv raise on a broken table, at its beginning or far inside, into our error."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(
            f"{path}: expected {path.suffix[1:].lower()}, got {error}; write it again"
        ) from error


def caption_of(row: dict[str, Any], columns: Iterable[str], separator: str = "") -> str:
    """The caption columns of a row joined by ", "; `separator` within a column reads as ", " too."""
    texts = [str(row[column]) for column in columns if row.get(column) is not None]
    if separator:
        texts = [", ".join(part.strip() for part in text.split(separator)) for text in texts]
    return ", ".join(text.strip() for text in texts if text.strip())


def read_pairs_table(config: CorpusConfig) -> Iterator[Candidate]:
    """Pairs of a table with a column of image paths, relative to `config.images` or the table's own folder.

    Raises:
        CorpusError: the table or one of the columns is missing.
    """
    path = Path(config.path)
    columns, rows = read_rows(path)
    optional = [name for name in (config.url_column, config.key_column) if name]
    for column in (config.image_column, *config.caption_columns, *optional):
        if column not in columns:
            raise CorpusError(f"{path.name}: expected column {column!r}, got {columns}; set corpus.*_column")
    root = Path(config.images) if config.images else path.parent
    for row in rows:
        name = row[config.image_column]
        if not isinstance(name, str) or not name:
            yield "missing_image"
            continue
        key = str(row[config.key_column]) if config.key_column else name
        url = str(row.get(config.url_column) or "") if config.url_column else ""
        yield Pair(key, caption_of(row, config.caption_columns, config.caption_separator), root / name, url)


def read_coco(path: Path, root: Path, url_column: str = "") -> Iterator[Candidate]:
    """One pair a caption of a COCO captions file; images are found by `file_name` in `root`.

    Raises:
        CorpusError: the file is no COCO captions file.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        images = {image["id"]: image for image in content["images"]}
        annotations = [dict(annotation) for annotation in content["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{path}: expected COCO captions (images and annotations), got {error!r}; check corpus.path"
        ) from error
    for annotation in annotations:
        number = annotation.get("image_id")
        image = images.get(number) if isinstance(number, int | str) else None
        if image is None or not isinstance(image.get("file_name"), str):
            yield "missing_image"
            continue
        key = f"{image['file_name']}#{annotation.get('id')}"
        url = str(image.get(url_column or "coco_url") or "")
        yield Pair(key, annotation.get("caption"), root / image["file_name"], url)


def read_dataset(config: CorpusConfig) -> Iterator[Candidate]:
    """Pairs of a data set, streamed by `datasets`; the image column may hold images or their bytes.

    Raises:
        CorpusError: the data set cannot be opened or lacks a column.
    """
    import datasets

    try:
        rows = datasets.load_dataset(
            config.path,
            config.config or None,
            split=config.split,
            revision=config.revision or None,
            streaming=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise CorpusError(f"expected a data set {config.path!r}, got {error}; check corpus.path") from error
    if isinstance((rows.features or {}).get(config.image_column), datasets.Image):
        rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
    for index, row in enumerate(rows):
        for column in (config.image_column, *config.caption_columns):
            if column not in row:
                raise CorpusError(f"{config.path}: expected column {column!r}, got {sorted(row)}")
        key = str(row.get(config.key_column)) if config.key_column else str(index)
        caption = caption_of(row, config.caption_columns, config.caption_separator)
        url = str(row.get(config.url_column) or "") if config.url_column else ""
        yield Pair(key, caption, partial(_bytes_of, row[config.image_column]), url)


def _bytes_of(value: Any) -> bytes:
    """Image bytes of a `datasets` cell: an encoded image, a decoded one, or plain bytes."""
    if isinstance(value, dict):
        return value["bytes"] if value.get("bytes") else Path(value["path"]).read_bytes()
    return png_bytes(value) if isinstance(value, Image.Image) else bytes(value)


def read_webdataset(path: Path) -> Iterator[Candidate]:
    """Pairs of webdataset tars: `key.jpg`, `key.txt`, and `key.json` with the image's `url`.

    Raises:
        CorpusError: there is no tar, or one is broken.
    """
    for tar in webdataset.tars(path.resolve()):
        for sample in webdataset.samples(tar, SUFFIXES):
            if sample.image is None:
                yield "missing_image"
            elif sample.caption is None:
                yield "missing_caption"
            else:
                yield Pair(sample.key, sample.caption, sample.image, str(sample.facts.get("url") or ""))


def read_toyworld(n: int, seed: int) -> Iterator[Candidate]:
    """`n` pairs of the toy world."""
    for image, item, key in scenes.corpus(n, seed):
        yield Pair(key, item.text, partial(png_bytes, image))


def png_bytes(image: Image.Image) -> bytes:
    """An image as PNG, without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def read_pairs(config: CorpusConfig, seed: int = 0) -> Iterator[Candidate]:
    """The candidates of any kind of source, at most `config.rows` of them.

    Raises:
        CorpusError: the source cannot be read at all.
    """
    path = Path(config.path)
    if config.kind == "folder":
        if not config.path or not path.is_dir():
            raise CorpusError(
                f"expected a folder of images and captions, got {config.path!r}; set corpus.path"
            )
        found = read_folder(path)
    elif config.kind == "table":
        found = read_pairs_table(config)
    elif config.kind == "coco":
        found = read_coco(path, Path(config.images or path.parent), config.url_column)
    elif config.kind == "dataset":
        found = read_dataset(config)
    elif config.kind == "webdataset":
        found = read_webdataset(path)
    else:
        found = read_toyworld(config.rows or 1000, seed)
    return itertools.islice(found, config.rows) if config.rows else found


# The stage.


def source_name(config: CorpusConfig) -> str:
    """Name of the source in ids and in the release: as the recipe says, else by kind."""
    if config.name:
        return config.name
    if config.kind == "dataset":
        return config.path
    return "toyworld" if config.kind == "toyworld" else Path(config.path).resolve().stem


def images_root(config: CorpusConfig) -> Path:
    """The folder that images of a source with files must lie in."""
    path = Path(config.path)
    return (Path(config.images) if config.images else path if path.is_dir() else path.parent).resolve()


def check_pair(pair: Pair, source: str, root: Path, store: Path) -> dict[str, Any] | str:
    """Check one pair and make its row; images that are no files are written to `store`.

    Returns:
        A row of `stimuli.parquet`, or the reason why there is none.
    """
    caption = clean_caption(pair.caption)
    if not caption:
        return "empty_caption"
    if len(caption) > MAX_CAPTION:
        return "long_caption"
    if not pair.key or _UNSAFE.search(pair.key):
        return "bad_key"
    identity = stimulus_id(source, pair.key)
    found = _inside(pair.image, root) if isinstance(pair.image, Path) else None
    if isinstance(found, str):
        return found
    try:
        data = read_image(found) if found else pair.image()
        width, height = open_image(data).size
    except Exception:  # a hostile file: Pillow's plug-ins raise all sorts, and one image must not end a run
        return "unreadable_image"
    if max(width, height) > MAX_SHAPE * min(width, height):
        return "extreme_shape"
    file = str(found) if found else f"{store.name}/{identity}{image_suffix(data)}"
    if not found:
        write_atomic(store.parent / file, data)
    return {
        "stimulus_id": identity,
        "caption": caption,
        "image_url": _UNSAFE.sub("", pair.url),
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "width": width,
        "height": height,
        "source": source,
        "source_key": pair.key,
        "file": file,
    }


def _inside(file: Path, root: Path) -> Path | str:
    """The file that a source names, links followed, or why it is not opened (outside `root`)."""
    try:
        tar, _, member = file.name.rpartition("#")
        if tar.endswith(".tar") and not file.is_file():
            found = _inside(file.parent / tar, root)
            return found.parent / f"{found.name}#{member}" if isinstance(found, Path) else found
        resolved = file.resolve()
        if not resolved.is_relative_to(root):
            return "outside_folder"
        return resolved if resolved.is_file() else "missing_image"
    except (OSError, ValueError, RuntimeError):  # NUL in the name, a name too long, a loop of links
        return "missing_image"


def image_suffix(data: bytes) -> str:
    """Ending of an image's file by what is in it, as `.png`."""
    with Image.open(io.BytesIO(data)) as image:
        return f".{(image.format or 'img').lower()}"


def check_shard(
    candidates: Iterable[Candidate], source: str, root: Path, store: Path
) -> tuple[pa.Table, Counter[str]]:
    """Check a shard's candidates; the counts hold `in` and the reasons of what was skipped."""
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for candidate in candidates:
        counts["in"] += 1
        row = candidate if isinstance(candidate, str) else check_pair(candidate, source, root, store)
        if isinstance(row, str):
            counts[row] += 1
        else:
            rows.append(row)
    return table_of(rows, ROWS), counts


def drop_duplicates(table: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """Keep the first row of each id, then the first of each (image, caption); count the others."""
    frame = table.select(["stimulus_id", "image_sha256", "caption"]).to_pandas()
    same_id = frame.duplicated("stimulus_id")
    same_pair = frame[~same_id].duplicated(["image_sha256", "caption"]).reindex(frame.index, fill_value=False)
    counts = Counter({"duplicate_id": int(same_id.sum()), "duplicate_pair": int(same_pair.sum())})
    return table.filter(pa.array(~(same_id | same_pair).to_numpy())), +counts


def check(recipe: Recipe) -> None:
    """Look whether the source can be opened, before anything of an earlier run is discarded.

    Raises:
        CorpusError: it cannot.
    """
    next(iter(read_pairs(recipe.corpus, recipe.run.seed)), None)


def run(work: Work) -> None:
    """Read, check and write the corpus of the recipe.

    Raises:
        CorpusError: the source cannot be read, or no pair of it is usable.
    """
    config = work.recipe.corpus
    store = work.folder / "images"
    store.mkdir(exist_ok=True)
    candidates = iter(work.progress(read_pairs(config, work.seed), total=config.rows or None, unit="pair"))
    for number in itertools.count():
        chunk = list(itertools.islice(candidates, config.shard_rows))
        if not chunk:
            break
        if work.has(name := f"{number:06d}"):
            continue
        with work.shard(name) as folder:
            table, counts = check_shard(chunk, source_name(config), images_root(config), store)
            write_table(folder / "stimuli.parquet", table)
            write_atomic(folder / "counts.json", canonical_json(counts))
    _join(work, config, store)


def _join(work: Work, config: CorpusConfig, store: Path) -> None:
    """Join the shards, drop duplicates across them, and seal the stage."""
    shards = work.shards()
    table = pa.concat_tables([ROWS.empty_table(), *(read_table(s / "stimuli.parquet") for s in shards)])
    skipped = summed_counts(shards)
    n_in = skipped.pop("in", 0)
    table, duplicates = drop_duplicates(table)
    skipped.update(duplicates)
    if n_same := duplicates["duplicate_id"]:
        warnings.warn(
            f"{n_same} of {n_in} rows have a key that an earlier row has and are left out; where a picture "
            "has several captions, name a column that tells rows apart as corpus.key_column",
            stacklevel=3,
        )
    if not table.num_rows:
        work.drop_shards()  # so that the next run looks again
        raise CorpusError(
            f"expected at least one readable image with a caption, got none in {n_in} rows of corpus.kind "
            f"{config.kind!r} at {config.path!r} (skipped: {dict(skipped)}); check corpus.path, corpus.images"
        )
    kept = set(table["file"].to_pylist())
    for file in store.iterdir():
        if f"{store.name}/{file.name}" not in kept:
            file.unlink()
    write_table(work.folder / "stimuli.parquet", table)
    work.drop_shards()
    counts = {"in": n_in, "out": table.num_rows, "skipped": dict(skipped)}
    work.finish(counts, rows={"stimuli.parquet": table.num_rows})


def source_facts(config: CorpusConfig) -> dict[str, Any]:
    """What the manifest and the card say about the source."""
    facts = {
        "name": source_name(config),
        "revision": config.revision,
        "url": config.url,
        "licence": config.licence,
        "redistribute_images": config.redistribute_images,
    }
    return facts | ({"allowed": True} if config.allowed else {})


def image_file(corpus: Path, file: str) -> Path:
    """Path of a stimulus's image, from the corpus stage's folder and the column `file`."""
    return corpus / file
