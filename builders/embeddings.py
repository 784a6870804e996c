"""Stage `embeddings`: image and caption embeddings of the corpus, in clip-retrieval's folder format.

Reads `corpus/stimuli.parquet` with its images and the run's CLIP, or a folder that `clip-retrieval inference`
wrote; writes `img_emb/img_emb_0.npy`, `text_emb/text_emb_0.npy` (float16 unit rows) and
`metadata/metadata_0.parquet` (stimulus_id, caption).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from builders.clip import Clip, clip_of
from builders.corpus import clean_caption, image_file, open_image
from builders.prefetch import prefetched
from builders.recipe import Recipe
from builders.stages import Work, summed_counts
from daco.errors import ActivationError, CorpusError, FormatError, IntegrityError
from daco.manifest import canonical_json, write_atomic
from daco.tables import read_table, write_table

METADATA = pa.schema([("stimulus_id", pa.string()), ("caption", pa.string())])
"""Columns of our own metadata; clip-retrieval's has image_path or key instead of stimulus_id."""

Half = NDArray[np.float16]

CHUNK = 65_536
"""Rows of a clip-retrieval part read at once; its parts have a million."""

AHEAD = 4
"""Batches of images that are opened and scaled at once, each by a thread, while the CLIP is at work."""

_PART = re.compile(r"_(\d+)$")


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of a corpus, row i of each belonging to stimulus i; arrays are memory-mapped."""

    images: Half
    """[n, d] unit rows."""
    texts: Half
    """[n, d] unit rows."""
    ids: list[str]
    """stimulus_id of each row."""
    source_rows: NDArray[np.int64] | None = None
    """Row of each in the clip-retrieval folder that it was read from, parts one after another."""


def load_embeddings(folder: Path) -> Embeddings:
    """Open what this stage wrote.

    Raises:
        FormatError: the arrays and the metadata do not belong together.
    """
    images, texts = (_load(folder / kind / f"{kind}_0.npy") for kind in ("img_emb", "text_emb"))
    metadata = read_table(folder / "metadata" / "metadata_0.parquet", METADATA)
    ids = metadata["stimulus_id"].to_pylist()
    if not len(images) == len(texts) == len(ids):
        raise FormatError(
            f"{folder}: expected as many image and text rows as metadata rows ({len(ids)}), "
            f"got {len(images)} and {len(texts)}; run the stage again"
        )
    given = "source_row" in metadata.column_names
    return Embeddings(images, texts, ids, metadata["source_row"].to_numpy() if given else None)


def _load(path: Path) -> Half:
    """Open a .npy file of [n, d] floats, memory-mapped.

    Raises:
        IntegrityError: it is no whole .npy file.
        FormatError: it holds something else.
    """
    try:
        array: Half = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise IntegrityError(
            f"{path}: expected a whole .npy file, got {error}; embed or download it again"
        ) from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise FormatError(
            f"{path}: expected floats [rows, width], got {array.dtype} {list(array.shape)}; embed again"
        )
    return array


def unit_half(rows: NDArray[Any]) -> Half:
    """Rows scaled to unit length in float32, then rounded to float16."""
    single = np.asarray(rows, dtype=np.float32)
    return (single / np.linalg.norm(single, axis=1, keepdims=True)).astype(np.float16)


def embed_pairs(
    clip: Clip, files: Sequence[Path], captions: Sequence[str], batch: int
) -> tuple[Half, Half, NDArray[np.bool_]]:
    """Embed pairs in batches.

    Returns:
        Image rows [m, d], text rows [m, d] and which of the n pairs they are ([n], m of them true): the image
        of the others could not be read.
    """
    images: list[Any] = []
    texts: list[Any] = []
    readable: list[bool] = []
    starts = range(0, len(files), batch)
    parts = prefetched(lambda start: _read(clip, files[start : start + batch]), starts, AHEAD)
    for start, (there, pixels) in zip(starts, parts, strict=True):
        readable += there
        if pixels is not None:
            images.append(clip.embed_pixels(pixels).numpy())
            texts.append(clip.embed_texts(list(compress(captions[start : start + batch], there))).numpy())
    mask = np.array(readable, dtype=bool)
    if not images:
        return np.empty((0, 0), np.float16), np.empty((0, 0), np.float16), mask
    return unit_half(np.concatenate(images)), unit_half(np.concatenate(texts)), mask


def _read(clip: Clip, files: Sequence[Path]) -> tuple[list[bool], Any]:
    """Which images can be read, and those as the model takes them; None: not one."""
    images = [_try_open(file) for file in files]
    kept = [image for image in images if image is not None]
    return [image is not None for image in images], clip.pixels(kept) if kept else None


def _try_open(file: Path) -> Any:
    try:
        return open_image(file)
    except Exception:  # it was readable once; a file that went away since is counted, not fatal
        return None


def write_embeddings(folder: Path, parts: Sequence[tuple[Half, Half]], ids: pa.Table) -> None:
    """Write parts one after another as one clip-retrieval folder, without holding all of them in memory."""
    width = max(images.shape[1] for images, _ in parts)
    for side, kind in enumerate(("img_emb", "text_emb")):
        (folder / kind).mkdir(exist_ok=True)
        target = np.lib.format.open_memmap(
            folder / kind / f"{kind}_0.npy", mode="w+", dtype=np.float16, shape=(ids.num_rows, width)
        )
        start = 0
        for part in parts:
            target[start : start + len(part[side])] = part[side]
            start += len(part[side])
        target.flush()
    (folder / "metadata").mkdir(exist_ok=True)
    write_table(folder / "metadata" / "metadata_0.parquet", ids)


# A folder that clip-retrieval wrote.


def clip_retrieval_parts(folder: Path) -> list[tuple[Path, Path, Path]]:
    """(image rows, text rows, metadata) of a clip-retrieval folder, in the order of their numbers.

    Raises:
        CorpusError: there are none, or a part lacks one of its three files.
    """
    numbered = {}
    for metadata in (folder / "metadata").glob("metadata_*.parquet"):
        if match := _PART.search(metadata.stem):
            numbered[int(match[1])] = (match[1], metadata)
    parts = []
    for _, (number, metadata) in sorted(numbered.items()):
        arrays = [folder / kind / f"{kind}_{number}.npy" for kind in ("img_emb", "text_emb")]
        if missing := [path.name for path in arrays if not path.is_file()]:
            raise CorpusError(f"{folder}: expected {missing}, got none; embed images and texts")
        parts.append((arrays[0], arrays[1], metadata))
    if not parts:
        raise CorpusError(
            f"expected a clip-retrieval folder with metadata/*.parquet, got {folder}; set embeddings.path"
        )
    return parts


class Join:
    """Finds the stimulus of a clip-retrieval metadata row, by stimulus_id, image_path, key or caption.

    Args:
        stimuli: Columns of the corpus: stimulus_id, caption, source_key, file.
    """

    def __init__(self, stimuli: pa.Table) -> None:
        self.stimuli = stimuli
        self.captions = stimuli["caption"].to_pylist()

    @cached_property
    def by_id(self) -> dict[str, int]:
        """Index of each stimulus_id."""
        return {name: i for i, name in enumerate(self.stimuli["stimulus_id"].to_pylist())}

    @cached_property
    def by_caption(self) -> dict[str, list[int]]:
        """Indices of each caption."""
        found: dict[str, list[int]] = defaultdict(list)
        for i, caption in enumerate(self.captions):
            found[caption].append(i)
        return found

    @cached_property
    def by_name(self) -> dict[str, list[int]]:
        """Indices of each name that a row may go by: key, file, its last part, that without its ending."""
        found: dict[str, list[int]] = defaultdict(list)
        keys, files = (self.stimuli[name].to_pylist() for name in ("source_key", "file"))
        for i, (key, path) in enumerate(zip(keys, files, strict=True)):
            file = PurePosixPath(path)
            for name in {key, path, file.name, file.stem}:
                found[name].append(i)
        return found

    def find(self, row: Mapping[str, Any]) -> int | str:
        """Index of the stimulus, or the reason why there is none."""
        if "stimulus_id" in row:
            return self.by_id.get(row["stimulus_id"], "unknown_row")
        name = row.get("image_path") or row.get("key")
        caption = clean_caption(row["caption"]) if "caption" in row else None
        if name is None:
            found = self.by_caption.get(caption or "", [])
        else:
            found = self.by_name.get(str(name)) or self.by_name.get(PurePosixPath(str(name)).name, [])
            if found and caption is not None:
                found = [i for i in found if self.captions[i] == caption]
                if not found:
                    return "other_caption"  # its text row does not embed our caption
        if len(found) > 1:
            return "ambiguous_row"
        return found[0] if found else "unknown_row"


@dataclass(frozen=True)
class Part:
    """One part of a clip-retrieval folder, checked."""

    images: Half
    """[n, d], memory-mapped."""
    texts: Half
    """[n, d], memory-mapped."""
    rows: pa.Table
    """Of the metadata what rows are found by."""
    files: tuple[Path, Path, Path]
    """Where the three are."""


def open_part(images: Path, texts: Path, metadata: Path) -> Part:
    """Open a part of a clip-retrieval folder.

    Raises:
        IntegrityError: a file is truncated.
        FormatError: the three do not belong together, or the metadata has no captions.
    """
    sides = (_load(images), _load(texts))
    rows = read_table(metadata)
    if sides[0].shape != sides[1].shape or len(sides[0]) != rows.num_rows:
        raise FormatError(
            f"{metadata}: expected {rows.num_rows} rows of one width, got {list(sides[0].shape)} in "
            f"{images.name} and {list(sides[1].shape)} in {texts.name}; run clip-retrieval inference again"
        )
    if not {"caption", "stimulus_id"} & set(rows.column_names):
        raise FormatError(
            f"{metadata}: expected column 'caption', got {rows.column_names}; run clip-retrieval inference "
            "with --enable_text True"
        )
    names = [name for name in ("stimulus_id", "image_path", "key", "caption") if name in rows.column_names]
    return Part(*sides, rows.select(names), (images, texts, metadata))


def read_rows(
    part: Part, start: int, join: Join
) -> tuple[Half, Half, list[int], NDArray[np.int64], Counter[str]]:
    """Unit rows of a chunk of a part that belong to stimuli, the indices of those, their rows, and counts.

    Raises:
        FormatError: a row is no direction: NaN, infinite or zero.
    """
    rows = part.rows.slice(start, CHUNK).to_pylist()
    counts: Counter[str] = Counter({"in": len(rows)})
    sides = [np.asarray(side[start : start + CHUNK], np.float32) for side in (part.images, part.texts)]
    for side, file in zip(sides, part.files, strict=False):
        _check_rows(side, file, start)
    places, indices = [], []
    for place, row in enumerate(rows):
        found = join.find(row)
        if isinstance(found, str):
            counts[found] += 1
        else:
            places.append(place)
            indices.append(found)
    mine = start + np.array(places, dtype=np.int64)
    return unit_half(sides[0][places]), unit_half(sides[1][places]), indices, mine, counts


def _check_rows(rows: NDArray[Any], file: Path, start: int) -> None:
    norms = np.linalg.norm(rows, axis=1)
    wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 1e-3)))
    if len(wrong):
        what = "norm 0" if np.isfinite(norms[wrong[0]]) else "NaN or infinity"
        raise FormatError(
            f"{file}, row {start + wrong[0]}: expected an embedding, got {what} (in {len(wrong)} rows from "
            f"{start} to {start + len(rows) - 1}); embed again without those pairs"
        )


# The stage.


def run(work: Work) -> None:
    """Embed the corpus, or take its embeddings from a clip-retrieval folder.

    Raises:
        ActivationError: not one pair has embeddings.
        IntegrityError: a file of `embeddings.path` is truncated.
        FormatError: its files do not belong together, or hold what is no embedding.
    """
    torch.set_num_threads(work.recipe.run.threads)
    stimuli = read_table(work.upstream("corpus") / "stimuli.parquet")
    if work.recipe.embeddings.path:
        _read_shards(work, stimuli)
    else:
        _embed_shards(work, stimuli)
    _join(work, stimuli)


def _embed_shards(work: Work, stimuli: pa.Table) -> None:
    config, corpus = work.recipe.embeddings, work.upstream("corpus")
    clip = clip_of(work)
    starts = range(0, stimuli.num_rows, config.shard_rows)
    for start in work.progress(starts, unit="shard"):
        if work.has(name := f"{start // config.shard_rows:06d}"):
            continue
        rows = stimuli.slice(start, config.shard_rows)
        files = [image_file(corpus, file) for file in rows["file"].to_pylist()]
        with work.shard(name) as folder:
            images, texts, readable = embed_pairs(clip, files, rows["caption"].to_pylist(), config.batch)
            counts = Counter({"in": len(files), "unreadable_image": int((~readable).sum())})
            _write_shard(folder, images, texts, start + np.flatnonzero(readable), +counts)


def check(recipe: Recipe) -> None:
    """Look whether the recipe's embeddings are there, before anything of an earlier run is discarded.

    Raises:
        CorpusError: they are not.
    """
    if recipe.embeddings.path:
        clip_retrieval_parts(Path(recipe.embeddings.path))


def _read_shards(work: Work, stimuli: pa.Table) -> None:
    parts = clip_retrieval_parts(Path(work.recipe.embeddings.path))
    join = Join(stimuli)
    width, first = None, 0
    for number, files in enumerate(work.progress(parts, unit="part")):
        part = open_part(*files)
        width = width or part.images.shape[1]
        if part.images.shape[1] != width:
            raise FormatError(
                f"{files[0]}: expected rows of width {width}, as the parts before, got {part.images.shape[1]}"
                "; embed all parts with one model"
            )
        for start in range(0, part.rows.num_rows, CHUNK):
            if work.has(name := f"{number:06d}-{start:09d}"):
                continue
            with work.shard(name) as folder:
                images, texts, indices, rows, counts = read_rows(part, start, join)
                _write_shard(folder, images, texts, np.array(indices, dtype=np.int64), counts, first + rows)
        first += part.rows.num_rows


def _write_shard(
    folder: Path,
    images: Half,
    texts: Half,
    indices: NDArray[Any],
    counts: Counter[str],
    rows: NDArray[Any] | None = None,
) -> None:
    arrays = {"images": images, "texts": texts, "indices": indices}
    for name, array in (arrays | ({} if rows is None else {"rows": rows})).items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    write_atomic(folder / "counts.json", canonical_json(counts))


def _shard_arrays(
    shards: Sequence[Path],
) -> Iterator[tuple[Half, Half, NDArray[Any], NDArray[Any] | None]]:
    for shard in shards:
        indices = np.load(shard / "indices.npy", allow_pickle=False)
        if len(indices):
            rows = shard / "rows.npy"
            source = np.load(rows, mmap_mode="r", allow_pickle=False) if rows.is_file() else None
            yield _load(shard / "images.npy"), _load(shard / "texts.npy"), indices, source


def _join(work: Work, stimuli: pa.Table) -> None:
    """Join the shards, keep the first row of each stimulus, and seal the stage."""
    skipped = summed_counts(work.shards())
    n_in = skipped.pop("in", 0)
    seen = np.zeros(stimuli.num_rows, dtype=bool)
    parts, order, sources = [], [], []
    for images, texts, indices, source in _shard_arrays(work.shards()):
        _, first = np.unique(indices, return_index=True)
        fresh = np.sort(first[~seen[indices[first]]])
        skipped["duplicate_row"] += len(indices) - len(fresh)
        seen[indices[fresh]] = True
        parts.append((images[fresh], texts[fresh]) if len(fresh) < len(indices) else (images, texts))
        order.append(indices[fresh])
        if source is not None:
            sources.append(source[fresh])
    if not seen.any():
        raise ActivationError(
            f"expected embeddings of {stimuli.num_rows} pairs, got none (skipped: {dict(+skipped)}); "
            "check that embeddings.path was made from this corpus"
        )
    ids = stimuli.select(METADATA.names).take(np.concatenate(order))
    if sources:
        ids = ids.append_column("source_row", pa.array(np.concatenate(sources), pa.int64()))
    write_embeddings(work.folder, parts, ids)
    work.drop_shards()
    counts = {"in": n_in, "out": ids.num_rows, "skipped": dict(+skipped)}
    work.finish(counts, rows={"metadata/metadata_0.parquet": ids.num_rows})
