"""The pictures that the card of a release shows: the map of its concepts, example stimuli, plots of steering.

Reads a release folder; writes nothing. The same bytes for the same release.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from cards import plots, suites, tuning
from cards.escape import one_line
from daco.errors import IntegrityError
from daco.manifest import read_manifest
from daco.tables import POLARITIES

MAP, EXAMPLES = "map.png", "examples.png"

PICTURES = (MAP, EXAMPLES, tuning.PICTURE, suites.PICTURE)
"""Every file that `pictures` may make."""

NAMED = 14
"""Concepts of each polarity whose names are tried on the map."""

SHOWN = 4
"""Concepts of each polarity of which an example stimulus is shown."""

THUMBNAIL = 224
"""Longest side in pixels of an example's picture."""

LONGEST = 60
"""Characters of a caption that are shown under its picture."""


def pictures(folder: Path) -> dict[str, bytes]:
    """The pictures of a release folder by file name; those that it has nothing for are left out.

    Raises:
        FormatError: what they are drawn from breaks the format.
        IntegrityError: a table cannot be read.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] == "model":
        return tuning.pictures(folder) | suites.pictures(folder)
    try:
        found = {MAP: _map(folder, manifest), EXAMPLES: _examples(folder, manifest)}
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{folder.name}: expected readable tables, got {error}; build the release again"
        ) from error
    return {name: content for name, content in found.items() if content is not None}


# The map of concepts.


def _map(folder: Path, manifest: Mapping[str, Any]) -> bytes | None:
    """Concepts by the two largest principal components of their unit directions, at the middle layer."""
    if not manifest["models"] or not (
        concepts := _table(folder, manifest, "concepts", ["concept", "polarity"])
    ):
        return None
    model, facts = sorted(manifest["models"].items())[0]
    layer = facts["layers"][len(facts["layers"]) // 2]
    files = manifest["configs"].get(f"directions_{model}", {}).get("splits", {}).get(f"layer_{layer}", {})
    if not files or concepts.num_rows < 3:
        return None
    rows = _vectors([folder / name for name in files["files"]])
    polarity, names = concepts["polarity"].to_pylist(), concepts["concept"].to_pylist()
    named = [i for kind in ("undesirable", "desirable", "neutral")
             for i in [j for j, one in enumerate(polarity) if one == kind][:NAMED]]  # fmt: skip
    points = [(float(x), float(y)) for x, y in principal(rows)]
    return plots.concept_map_png(points, polarity, {i: names[i] for i in named})


def _vectors(paths: Sequence[Path]) -> np.ndarray:
    """The vectors of a split, read in pieces: they are held once."""
    tables = [pq.ParquetFile(path) for path in paths]
    width = tables[0].schema_arrow.field("vector").type.list_size
    rows, at = np.empty((sum(one.metadata.num_rows for one in tables), width), np.float32), 0
    for table in tables:
        for batch in table.iter_batches(1_024, columns=["vector"]):
            rows[at : at + batch.num_rows] = np.asarray(batch["vector"].flatten()).reshape(-1, width)
            at += batch.num_rows
    return rows


def principal(rows: np.ndarray, steps: int = 12) -> np.ndarray:
    """Rows, made unit, on their two largest principal components, by orthogonal iteration from a fixed start.

    In float64, a block of rows at a time, and rounded: threads must not show in a picture's bytes.

    Args:
        rows: `[n, d]`.
        steps: Of the iteration.

    Returns:
        `[n, 2]`; each component's largest coordinate is positive.
    """
    mean = sum(block.sum(0) for block in _unit_blocks(rows)) / len(rows)
    basis = np.random.default_rng(0).standard_normal((rows.shape[1], 2))
    for _ in range(steps):
        moved = sum((block - mean).T @ ((block - mean) @ basis) for block in _unit_blocks(rows))
        basis, _ = np.linalg.qr(moved)
    points = np.concatenate([(block - mean) @ basis for block in _unit_blocks(rows)])
    largest = points[np.abs(points).argmax(0), range(2)]
    return np.asarray(np.round(points * np.where(largest < 0, -1, 1), 5))


def _unit_blocks(rows: np.ndarray, size: int = 1_024) -> Iterator[np.ndarray]:
    for at in range(0, len(rows), size):
        block = rows[at : at + size].astype(np.float64)
        yield block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)


# Example stimuli.


def _examples(folder: Path, manifest: Mapping[str, Any]) -> bytes | None:
    """The nearest stimulus of a few concepts of each polarity, where the release holds pixels."""
    if "image" not in manifest["configs"].get("stimuli", {}).get("columns", ()):
        return None
    chosen = dict(_nearest(folder, manifest))
    shown = []
    for name in _files(manifest, "stimuli"):
        for batch in pq.ParquetFile(folder / name).iter_batches(
            256, columns=["stimulus_id", "caption", "image"]
        ):
            rows = pa.Table.from_batches([batch])
            for row in rows.filter(pc.is_in(rows["stimulus_id"], pa.array(list(chosen)))).to_pylist():
                if (picture := _thumbnail(row["image"]["bytes"])) is not None:
                    order, concept, polarity = chosen[row["stimulus_id"]]
                    caption = one_line(row["caption"])
                    text = caption if len(caption) <= LONGEST else caption[: LONGEST - 1] + "…"
                    shown.append((order, plots.Example(picture, one_line(concept), polarity, text)))
    return plots.examples([one for _, one in sorted(shown, key=lambda pair: pair[0])]) if shown else None


def _nearest(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, str, str]]]:
    """Stimulus -> (place, concept, polarity), of the first concepts that have a stimulus of their own."""
    concepts = _table(folder, manifest, "concepts", ["concept_id", "concept", "polarity"])
    links = _table(folder, manifest, "links", ["concept_id", "stimulus_id", "role", "rank"])
    if not concepts or not links:
        return
    best = links.filter(pc.and_(pc.equal(links["role"], "positive"), pc.equal(links["rank"], 0)))
    nearest = dict(zip(best["concept_id"].to_pylist(), best["stimulus_id"].to_pylist(), strict=True))
    taken: set[str] = set()
    for polarity in POLARITIES:
        n = 0
        for row in concepts.filter(pc.equal(concepts["polarity"], polarity)).to_pylist():
            stimulus = nearest.get(row["concept_id"])
            if stimulus is None or stimulus in taken or n == SHOWN:
                continue
            taken.add(stimulus)
            n += 1
            yield stimulus, (len(taken), row["concept"], polarity)


def _thumbnail(content: bytes) -> np.ndarray | None:
    """A picture's pixels, small; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _table(folder: Path, manifest: Mapping[str, Any], config: str, columns: list[str]) -> pa.Table | None:
    """Some columns of a config, or None where the release has none."""
    files = _files(manifest, config)
    return (
        pa.concat_tables([pq.read_table(folder / name, columns=columns) for name in files]) if files else None
    )


def _files(manifest: Mapping[str, Any], config: str) -> list[str]:
    splits = manifest["configs"].get(config, {}).get("splits", {})
    return [name for _, part in sorted(splits.items()) for name in part["files"]]
