"""What judges were asked and said, on disk, so that no question is paid for twice.

Reads and writes `<folder>/<two hex digits>/<sha256>.json`, one file an answer. Files appear whole or not at
all, and under a name of their own until then: a kill loses what was under way, and any number of processes
may share a folder. A file that cannot be read is asked for again.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from builders.stages import writing
from daco.manifest import canonical_json


class JudgeCache:
    """Answers by a hash of what was asked.

    Args:
        folder: Where they are kept; made when missing. None: in memory, for as long as this lives.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._kept: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        """What was answered; None: nothing, or nothing that can be read."""
        if self.folder is None:
            return self._kept.get(key)
        try:
            said = json.loads(self._path(key).read_text("utf-8"))["said"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return said if isinstance(said, str) else None

    def put(self, key: str, said: str) -> None:
        """Keep an answer.

        Raises:
            DiskError: there is no room.
        """
        if self.folder is None:
            self._kept[key] = said
            return
        path = self._path(key)
        with writing(f"what a judge said ({path.name})"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=path.parent, prefix=".", suffix=".partial", delete=False
            ) as file:
                temporary = Path(file.name)
            try:
                temporary.write_text(json.dumps({"said": said}), "utf-8")
                temporary.replace(path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()

    def through(
        self, keys: Sequence[str], ask: Callable[[list[int]], Iterable[tuple[int, str]]]
    ) -> list[str | None]:
        """Answers to all keys; what is not there is asked for, each key once, and kept as it comes.

        Args:
            keys: Of `key_of`.
            ask: Takes the numbers of the keys that are missing, yields number and answer in any order, and
                may leave some out.

        Returns:
            One a key; None: it was left out.
        """
        found = [self.get(key) for key in keys]
        missing = {key: row for row, key in reversed(list(enumerate(keys))) if found[row] is None}
        new: dict[str, str] = {}
        if missing:
            for row, said in ask(sorted(missing.values())):
                self.put(keys[row], said)
                new[keys[row]] = said
        return [new.get(key) if said is None else said for key, said in zip(keys, found, strict=True)]

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"


def key_of(digest: str, asked: str) -> str:
    """sha256 of a judge's digest and of what it is asked, item and answer in it."""
    told = canonical_json([digest, asked])
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
