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

SAMPLE = 2_000
"""Directions that the map's components are found on, at most."""

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
    polarity, names = concepts["polarity"].to_pylist(), concepts["concept"].to_pylist()
    named = [i for kind in ("undesirable", "desirable", "neutral")
             for i in [j for j, one in enumerate(polarity) if one == kind][:NAMED]]  # fmt: skip
    points = [(float(x), float(y)) for x, y in _points([folder / name for name in files["files"]])]
    return plots.concept_map_png(points, polarity, {i: names[i] for i in named})


def _blocks(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """The unit vectors of a split, some rows at a time, in float64: threads must not show in a picture."""
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(1_024, columns=["vector"]):
            rows = np.asarray(batch["vector"].flatten(), np.float64).reshape(batch.num_rows, -1)
            yield rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _points(paths: Sequence[Path]) -> np.ndarray:
    """Every vector on two principal components, `[n, 2]`: those of all, or of a sample of many."""
    n = sum(pq.read_metadata(path).num_rows for path in paths)
    step = -(-n // SAMPLE)
    some = [block[::step].copy() for block in _blocks(paths)]  # a view would keep its whole block
    mean, basis = components(np.concatenate(some))
    points = np.concatenate([(block - mean) @ basis for block in _blocks(paths)])
    largest = points[np.abs(points).argmax(0), range(2)]
    return np.asarray(np.round(points * np.where(largest < 0, -1, 1), 5))


def components(rows: np.ndarray, steps: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[d]` and two largest principal components `[d, 2]` of rows `[n, d]`.

    By orthogonal iteration, `steps` of it, from a fixed start.
    """
    mean = rows.mean(0)
    basis = np.random.default_rng(0).standard_normal((rows.shape[1], 2))
    for _ in range(steps):
        seen = rows @ basis - mean @ basis
        basis, _ = np.linalg.qr(rows.T @ seen - np.outer(mean, seen.sum(0)))
    return mean, basis


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
                picture = _thumbnail(row["image"]["bytes"]) if row["image"] else None
                if picture is not None:
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


def _thumbnail(content: bytes | None) -> np.ndarray | None:
    """A picture's pixels, small; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(content or b"")) as picture:
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
