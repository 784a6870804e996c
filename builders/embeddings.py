"""Stage `embeddings`: image and caption embeddings of the corpus, in clip-retrieval's folder format.

Reads `corpus/stimuli.parquet` with its images and the run's CLIP, or a folder that `clip-retrieval inference`
wrote; writes `img_emb/img_emb_0.npy`, `text_emb/text_emb_0.npy` (float16 unit rows) and
`metadata/metadata_0.parquet` (stimulus_id, caption).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from builders.clip import Clip, clip_of
from builders.corpus import clean_caption, image_file, open_image
from builders.stages import Work, summed_counts
from daco.errors import ActivationError, CorpusError, FormatError
from daco.manifest import canonical_json, write_atomic
from daco.tables import read_table, write_table

METADATA = pa.schema([("stimulus_id", pa.string()), ("caption", pa.string())])
"""Columns of our own metadata; clip-retrieval's has image_path or key instead of stimulus_id."""

Half = NDArray[np.float16]

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


def load_embeddings(folder: Path) -> Embeddings:
    """Open what this stage wrote.

    Raises:
        FormatError: the arrays and the metadata do not belong together.
    """
    images, texts = (_load(folder / kind / f"{kind}_0.npy") for kind in ("img_emb", "text_emb"))
    ids = read_table(folder / "metadata" / "metadata_0.parquet", METADATA)["stimulus_id"].to_pylist()
    if not len(images) == len(texts) == len(ids):
        raise FormatError(
            f"{folder}: expected as many image and text rows as metadata rows ({len(ids)}), "
            f"got {len(images)} and {len(texts)}; run the stage again"
        )
    return Embeddings(images, texts, ids)


def _load(path: Path) -> Half:
    array: Half = np.load(path, mmap_mode="r", allow_pickle=False)
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
    readable = np.zeros(len(files), dtype=bool)
    texts: list[Any] = []
    for start in range(0, len(files), batch):
        decoded = [_try_open(file) for file in files[start : start + batch]]
        readable[start : start + batch] = [image is not None for image in decoded]
        if kept := [image for image in decoded if image is not None]:
            pairs = zip(decoded, captions[start : start + batch], strict=True)
            images.append(clip.embed_images(kept).numpy())
            texts.append(clip.embed_texts([caption for image, caption in pairs if image is not None]).numpy())
    if not images:
        return np.empty((0, 0), np.float16), np.empty((0, 0), np.float16), readable
    return unit_half(np.concatenate(images)), unit_half(np.concatenate(texts)), readable


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
        stimuli: Rows of the corpus: stimulus_id, caption, source_key, file.
    """

    def __init__(self, stimuli: Sequence[Mapping[str, Any]]) -> None:
        self.captions = [row["caption"] for row in stimuli]
        self.by_name: dict[str, list[int]] = defaultdict(list)
        self.by_caption: dict[str, list[int]] = defaultdict(list)
        self.by_id = {row["stimulus_id"]: i for i, row in enumerate(stimuli)}
        for i, row in enumerate(stimuli):
            file = PurePosixPath(row["file"])
            for name in {row["source_key"], str(file), file.name, file.stem}:
                self.by_name[name].append(i)
            self.by_caption[row["caption"]].append(i)

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


def read_part(
    images: Path, texts: Path, metadata: Path, join: Join
) -> tuple[Half, Half, list[int], Counter[str]]:
    """Unit rows of one clip-retrieval part that belong to stimuli, the indices of those, and counts."""
    rows = pq.read_table(metadata).to_pylist()
    counts: Counter[str] = Counter({"in": len(rows)})
    try:
        sides = (_load(images), _load(texts))
        if not len(rows) == len(sides[0]) == len(sides[1]):
            raise ValueError(
                f"{len(rows)} metadata rows, {len(sides[0])} image rows, {len(sides[1])} text rows"
            )
    except (OSError, ValueError, EOFError):  # truncated, not an array, or not the metadata's
        counts["unreadable_part"] = len(rows)
        return np.empty((0, 0), np.float16), np.empty((0, 0), np.float16), [], counts
    places, indices = [], []
    norms = np.stack([np.linalg.norm(np.asarray(side, np.float32), axis=1) for side in sides])
    sound = (np.isfinite(norms) & (norms > 1e-3)).all(axis=0)
    for place, row in enumerate(rows):
        found = join.find(row) if sound[place] else "bad_embedding"
        if isinstance(found, str):
            counts[found] += 1
        else:
            places.append(place)
            indices.append(found)
    return unit_half(sides[0][places]), unit_half(sides[1][places]), indices, counts


# The stage.


def run(work: Work) -> None:
    """Embed the corpus, or take its embeddings from a clip-retrieval folder.

    Raises:
        ActivationError: not one pair has embeddings.
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


def _read_shards(work: Work, stimuli: pa.Table) -> None:
    parts = clip_retrieval_parts(Path(work.recipe.embeddings.path))
    join = Join(stimuli.select(["stimulus_id", "caption", "source_key", "file"]).to_pylist())
    for number, part in enumerate(work.progress(parts, unit="part")):
        if work.has(name := f"{number:06d}"):
            continue
        with work.shard(name) as folder:
            images, texts, indices, counts = read_part(*part, join)
            _write_shard(folder, images, texts, np.array(indices, dtype=np.int64), counts)


def _write_shard(
    folder: Path, images: Half, texts: Half, indices: NDArray[Any], counts: Counter[str]
) -> None:
    for name, array in (("images", images), ("texts", texts), ("indices", indices)):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    write_atomic(folder / "counts.json", canonical_json(counts))


def _shard_arrays(shards: Sequence[Path]) -> Iterator[tuple[Half, Half, NDArray[Any]]]:
    for shard in shards:
        indices = np.load(shard / "indices.npy", allow_pickle=False)
        if len(indices):
            yield _load(shard / "images.npy"), _load(shard / "texts.npy"), indices


def _join(work: Work, stimuli: pa.Table) -> None:
    """Join the shards, keep the first row of each stimulus, and seal the stage."""
    skipped = summed_counts(work.shards())
    n_in = skipped.pop("in", 0)
    seen = np.zeros(stimuli.num_rows, dtype=bool)
    parts, order = [], []
    for images, texts, indices in _shard_arrays(work.shards()):
        _, first = np.unique(indices, return_index=True)
        fresh = np.sort(first[~seen[indices[first]]])
        skipped["duplicate_row"] += len(indices) - len(fresh)
        seen[indices[fresh]] = True
        parts.append((images[fresh], texts[fresh]) if len(fresh) < len(indices) else (images, texts))
        order.append(indices[fresh])
    if not seen.any():
        raise ActivationError(
            f"expected embeddings of {stimuli.num_rows} pairs, got none (skipped: {dict(+skipped)}); "
            "check that embeddings.path was made from this corpus"
        )
    ids = stimuli.select(METADATA.names).take(np.concatenate(order))
    write_embeddings(work.folder, parts, ids)
    work.drop_shards()
    counts = {"in": n_in, "out": ids.num_rows, "skipped": dict(+skipped)}
    work.finish(counts, rows={"metadata/metadata_0.parquet": ids.num_rows})
