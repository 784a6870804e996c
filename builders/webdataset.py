"""Reads webdataset tars, as img2dataset writes them, without unpacking: a member is a place in its tar.

Reads `*.tar` of `key.jpg` (or another image), `key.txt` and `key.json`; writes nothing.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from daco.errors import CorpusError

_MEMBER = re.compile(r"(?P<tar>.+\.tar)#(?P<offset>\d+)\+(?P<size>\d+)(?:\.\w+)?", re.DOTALL)


@dataclass
class Sample:
    """The members of a tar that share a key; those of no known kind are left out."""

    key: str
    """Path of the members up to the first dot of the last part, as webdataset has it."""
    image: Path | None = None
    """Place of the image: `x.tar#offset+size.jpg`; read it by `read_member`."""
    caption: str | None = None
    """Text of `key.txt`, else `caption` of `key.json`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What `key.json` says: url, width, height, sha256 ..."""


def tars(path: Path) -> list[Path]:
    """The tars of a folder by name, or the one tar at `path`.

    Raises:
        CorpusError: there is none.
    """
    found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not found or not all(file.is_file() for file in found):
        raise CorpusError(f"expected a folder with *.tar, or a tar, got {str(path)!r}; check the path")
    return found


def samples(tar: Path, images: frozenset[str]) -> Iterator[Sample]:
    """The samples of a tar in its order; members of a sample lie side by side.

    Args:
        tar: The file; uncompressed.
        images: Endings of images, as `.jpg`.

    Raises:
        CorpusError: the file is no tar, or ends in the middle of a member.
    """
    sample: Sample | None = None
    try:
        size = _whole_size(tar)
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                if not member.isreg():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} ends behind the end of the file")
                folder, name = PurePosixPath(member.name).parent, PurePosixPath(member.name).name
                stem, _, ending = name.partition(".")
                key = (folder / stem).as_posix()
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key)
                _add(sample, opened, member, f".{ending.lower()}", images)
    except (tarfile.TarError, OSError) as error:
        raise CorpusError(f"{tar}: expected a whole uncompressed tar, got {error}; fetch it again") from error
    if sample is not None:
        yield sample


def _whole_size(tar: Path) -> int:
    """Bytes of a tar that has its end mark; `tarfile` takes one without for whole."""
    size = tar.stat().st_size
    with tar.open("rb") as file:
        file.seek(max(0, size - 1024))
        if size < 1024 or file.read().strip(b"\0"):
            raise tarfile.ReadError("no end mark")
    return size


def _add(
    sample: Sample, opened: tarfile.TarFile, member: tarfile.TarInfo, ending: str, images: frozenset[str]
) -> None:
    if ending in images:
        place = f"{opened.name}#{member.offset_data}+{member.size}{ending}"
        sample.image = sample.image or Path(place)
    elif ending in (".txt", ".json") and member.size < 2**20:
        file = opened.extractfile(member)
        text = file.read().decode("utf-8", errors="replace") if file else ""
        if ending == ".txt":
            sample.caption = text
        else:
            sample.facts = _facts(text)
            told = sample.facts.get("caption")
            sample.caption = sample.caption if sample.caption is not None or told is None else str(told)


def _facts(text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def read_member(place: Path) -> bytes | None:
    """Bytes of a member by its place in its tar; None where `place` names no member.

    Raises:
        OSError: the tar is not there.
    """
    found = _MEMBER.fullmatch(str(place))
    if found is None:
        return None
    with open(found["tar"], "rb") as file:
        file.seek(int(found["offset"]))
        return file.read(int(found["size"]))
