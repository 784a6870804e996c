"""Large files that clients store by xet: reads folders `hf_xet` wrote on this machine, writes LFS objects.

With `casUrl: local://<folder>` the real `hf_xet` uses a folder as its store. Each session gets its own,
`<repo>/xet/<session>/`, because only one process at a time can open one. A commit names a file by its sha256
only; the shards say which xet file that is, and the bytes that come out must have that sha256.
"""

import fcntl
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from hub.local.store import ApiError, Repo, Store

EXPIRY = 4102444800
"""When the tokens of a local store expire, in Unix seconds: never."""

_SESSION = re.compile(r"[0-9a-f-]{1,64}")
_HEADER, _ROW = 48, 48
_VERIFIED, _SHA256 = 1 << 31, 1 << 30


class XetFile(NamedTuple):
    """One file of a shard."""

    sha256: str
    xet_hash: str
    size: int


def session_url(repo: Repo, session: str) -> str:
    """Where a client session may store large files of a repo.

    Raises:
        ApiError: 400 no xet here, or a session without a name.
    """
    if find_spec("hf_xet") is None:
        raise ApiError(
            400, "this local Hub has no hf_xet: install it there, or set HF_HUB_DISABLE_XET=1 here"
        )
    if not _SESSION.fullmatch(session):
        raise ApiError(400, "expected the header x-xet-session-id, as hf_xet sends it")
    folder = repo.folder / "xet" / session
    folder.mkdir(parents=True, exist_ok=True)
    return f"local://{folder.resolve()}"


def files_of(shard: bytes) -> Iterator[XetFile]:
    """The files a shard describes, as far as it knows their sha256.

    A shard has a header, then for each file a row with hash, flags and the number of its segments, a row for
    each segment (its size at byte 36), as many rows to verify them if flagged, and one with the sha256 if
    flagged; a row with a hash of ones ends the list.
    """
    at = _HEADER
    while shard[at : at + 32] != b"\xff" * 32:
        xet_hash, flags, segments = _hex(shard[at : at + 32]), *struct.unpack_from("<II", shard, at + 32)
        at += _ROW
        size = sum(struct.unpack_from("<I", shard, at + _ROW * i + 36)[0] for i in range(segments))
        at += _ROW * segments * (2 if flags & _VERIFIED else 1)
        if flags & _SHA256:
            yield XetFile(_hex(shard[at : at + 32]), xet_hash, size)
            at += _ROW


def _hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _sessions(repo: Repo) -> Iterator[tuple[Path, list[XetFile]]]:
    for store in sorted((repo.folder / "xet").glob("*/xet/xorbs")):
        shards = sorted((store / "shards").glob("*.mdb"))
        yield store, [file for shard in shards for file in files_of(shard.read_bytes())]


def take_over(store: Store, repo: Repo, wanted: Iterable[str]) -> None:
    """Make LFS objects of files that clients stored by xet; the commit refuses what nobody stored.

    Args:
        store: where the repo is.
        repo: the repo that the commit is about.
        wanted: sha256 of the files the commit needs.
    """
    left = {sha256 for sha256 in wanted if repo.lfs_size(sha256) is None}
    for folder, files in _sessions(repo) if left else ():
        found = {file.sha256: file for file in files if file.sha256 in left}
        if found:
            try:
                _copy_out(store, repo, folder, list(found.values()))
            except (RuntimeError, OSError) as error:  # hf_xet raises the former for all that goes wrong
                raise ApiError(
                    400, f"expected whole files in the xet store, got {error}; upload again"
                ) from error
            left -= found.keys()


def _copy_out(store: Store, repo: Repo, folder: Path, files: list[XetFile]) -> None:
    import hf_xet

    with tempfile.TemporaryDirectory(dir=store.uploads) as place:
        seen = Path(place) / "store"
        shutil.copytree(folder, seen / "xet" / "xorbs", copy_function=_link)
        session = hf_xet.XetSession()
        with session.new_file_download_group(
            endpoint=f"local://{seen.resolve()}", token="local", token_expiry_unix_secs=EXPIRY
        ) as group:
            for file in files:
                group.start_download_file(
                    hf_xet.XetFileInfo(file.xet_hash, file.size), f"{place}/{file.sha256}"
                )
        for file in files:
            store.keep(repo, Path(place) / file.sha256, file.sha256, file.size)


def _link(source: str, target: str) -> None:
    # the client may still have its store open: its database is copied as it is, the rest never changes
    (shutil.copyfile if source.endswith(".redb") else os.link)(source, target)


def forget_finished(repo: Repo) -> None:
    """Delete the session folders whose files are all LFS objects and whose client is gone."""
    for folder, files in _sessions(repo):
        if all(repo.lfs_size(file.sha256) == file.size for file in files) and not _in_use(folder):
            shutil.rmtree(folder.parents[1])


def _in_use(folder: Path) -> bool:
    with (folder / "global_dedup_lookup.redb").open("rb") as database:
        try:
            fcntl.flock(
                database, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # hf_xet holds this lock while it has it open
        except BlockingIOError:
            return True
    return False
