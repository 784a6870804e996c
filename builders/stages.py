"""The frame every stage runs in: shards that are whole or absent, a log, counts, and a seal when it is done.

Writes `out/<stage>/stage.json` (what the stage depends on), `shards/<name>/` and `done.json` (its seal:
counts, sha256 of every file), and appends to `out/log.jsonl`. Killed at any moment, a stage loses at most the
shard in flight.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

from builders.recipe import Recipe
from daco.errors import DiskError, FormatError, IntegrityError
from daco.manifest import FORMAT_VERSION, canonical_json, file_entry, write_atomic

T = TypeVar("T")

LAYOUTS = {"activations": 2, "directions": 2, "evaluate": 2, "recognition": 2}
"""Stages whose files or figures were others before: what an earlier version left of them is made anew."""

PARTIAL = ".partial-"
DONE, STAGE, LOG = "done.json", "stage.json", "log.jsonl"


class Work:
    """One stage at work in a run folder.

    Args:
        recipe: The whole recipe; a stage reads its own section and a few others.
        out: The run folder.
        stage: The stage's name; its folder is `out/stage`.
    """

    def __init__(self, recipe: Recipe, out: Path, stage: str) -> None:
        self.recipe, self.out, self.stage = recipe, out, stage
        self.folder = out / stage

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.recipe.run.seed

    def upstream(self, stage: str) -> Path:
        """Folder of a finished stage.

        Raises:
            IntegrityError: that stage is not finished.
        """
        if not (self.out / stage / DONE).is_file():
            raise IntegrityError(
                f"stage {self.stage!r} needs {stage!r}, which is not finished in {self.out}; run it first"
            )
        return self.out / stage

    def open(self, fingerprint: str) -> bool:
        """Make the stage's folder ready; False when it is already done for this fingerprint.

        A folder of another fingerprint (the recipe or an upstream stage changed) is emptied first.
        """
        if self._fingerprint() != fingerprint:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_atomic(self.folder / STAGE, canonical_json({"fingerprint": fingerprint}))
        elif (self.folder / DONE).is_file():
            return False
        for left_over in [*self.folder.glob(f"shards/{PARTIAL}*"), *self.folder.rglob(".*.partial")]:
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)
        (self.folder / "shards").mkdir(exist_ok=True)
        return True

    def made_from(self, fingerprint: str) -> bool:
        """Whether what is in the folder belongs to this fingerprint; if not, `open` discards it."""
        return self._fingerprint() == fingerprint

    def _fingerprint(self) -> str | None:
        try:
            return str(json.loads((self.folder / STAGE).read_text("utf-8"))["fingerprint"])
        except (OSError, ValueError, KeyError):
            return None

    def has(self, name: str) -> bool:
        """Whether this shard was finished, now or in an earlier run."""
        return (self.folder / "shards" / name).is_dir()

    def shards(self) -> list[Path]:
        """Folders of the finished shards, by name."""
        found = (self.folder / "shards").iterdir()
        return sorted(path for path in found if path.is_dir() and not path.name.startswith(PARTIAL))

    @contextmanager
    def shard(self, name: str) -> Iterator[Path]:
        """A fresh folder for one shard, renamed into place when the block ends without an exception."""
        temporary = self.folder / "shards" / f"{PARTIAL}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.log("begin", shard=name)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        temporary.rename(self.folder / "shards" / name)
        self.log("shard", shard=name)

    def drop_shards(self) -> None:
        """Remove all shards, once what they were for is written elsewhere in the stage's folder."""
        shutil.rmtree(self.folder / "shards", ignore_errors=True)

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to the run's log; `at` is in seconds."""
        line = json.dumps({"at": round(time.time(), 4), "stage": self.stage, "event": event, **facts})
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def progress(self, items: Iterable[T], total: int | None = None, unit: str = "it") -> Iterable[T]:
        """`items` behind the stage's progress bar; quiet when not at a terminal."""
        quiet = not sys.stderr.isatty()
        return tqdm(items, total=total, unit=unit, desc=self.stage, disable=quiet)  # type: ignore[no-any-return]

    def finish(self, counts: Mapping[str, Any], rows: Mapping[str, int] | None = None) -> None:
        """Seal the stage: `done.json` with its counts (in, out, skipped) and every file's sha256."""
        rows = rows or {}
        names = [
            path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()
        ]
        files = {n: file_entry(self.folder / n, rows.get(n)) for n in sorted(names) if n not in (STAGE, DONE)}
        write_atomic(self.folder / DONE, canonical_json({"counts": dict(counts), "files": files}))
        self.log("done")


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Says what could not be written where the disk is full.

    Raises:
        DiskError: a file could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"expected room for {what}, got {error}; free some and run again: what was finished is kept"
        ) from error


def done(out: Path, stage: str) -> dict[str, Any]:
    """The seal of a finished stage: `counts` and `files`.

    Raises:
        FormatError: the seal is no JSON.
        IntegrityError: the stage is not finished.
    """
    path = out / stage / DONE
    if not path.is_file():
        raise IntegrityError(f"expected stage {stage!r} to be finished in {out}, got no {DONE}; run it first")
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise FormatError(
            f"{path}: expected JSON, got {error}; delete the stage's folder and run again"
        ) from error


def check_sizes(out: Path, stage: str) -> None:
    """Compare the files of a finished stage with its seal, by size alone: cheap, and finds what was cut off.

    Raises:
        IntegrityError: a file is missing or of another size.
    """
    for name, entry in done(out, stage)["files"].items():
        path = out / stage / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            raise IntegrityError(
                f"{path}: expected {entry['bytes']} bytes, got {'none' if size is None else size}; "
                f"delete {out / stage} and run again"
            )


def summed_counts(shards: Iterable[Path], name: str = "counts.json") -> Counter[str]:
    """Sum of the counts that shards kept in their `counts.json`."""
    total: Counter[str] = Counter()
    for shard in shards:
        if (shard / name).is_file():
            total.update(json.loads((shard / name).read_text("utf-8")))
    return total


def fingerprint(stage: str, sections: Mapping[str, Any], upstream: Mapping[str, str]) -> str:
    """What a stage's result depends on: its recipe sections and the seals of the stages it reads."""
    facts = {"stage": stage, "format": FORMAT_VERSION, "sections": dict(sections), "upstream": dict(upstream)}
    if stage in LAYOUTS:
        facts["layout"] = LAYOUTS[stage]
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def seal_sha256(out: Path, stage: str) -> str:
    """sha256 of a finished stage's seal, hence of all its files."""
    return file_entry(out / stage / DONE)["sha256"] if (out / stage / DONE).is_file() else ""


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
