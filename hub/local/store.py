"""What a local Hub keeps on disk, repos with their commits, branches, tags and files; touches only its root.

    <root>/lock, secret, uploads/                held while open; key of the upload links; unfinished uploads
    <root>/<kind>/<org>/<name>/repo.json         kind, visibility, gate
                               refs.json         {"branches", "tags": {name: commit}, "pulls": {number: pull}}
                               commits/<id>.json parent, title, message, {path: file}
                               blobs/<git id>    regular files
                               lfs/<sha256>      large files; xet/<session>/ those that came by xet and wait

Objects are named by their content, and stay; a commit becomes visible by the one rename of `refs.json`,
so a crash leaves the old state or the new one. Commit ids are git's own, with a fixed author and date.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from daco.manifest import canonical_json, write_atomic

KINDS = ("models", "datasets")
"""The kinds of repo this Hub has; the words are those of the API's paths."""

MAIN = "main"
DATE = "2022-03-02T23:29:04.000Z"
"""The only date there is: nothing may depend on the clock."""

AUTHOR = "local"
LFS_SUFFIXES = (
    *(".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gz", ".h5", ".joblib", ".jpeg", ".jpg", ".mlmodel"),
    *(
        ".model",
        ".msgpack",
        ".npy",
        ".npz",
        ".onnx",
        ".ot",
        ".parquet",
        ".pb",
        ".pickle",
        ".pkl",
        ".png",
        ".pt",
        ".pth",
    ),
    *(".rar", ".safetensors", ".tar", ".tflite", ".tgz", ".wasm", ".webp", ".xz", ".zip", ".zst"),
)
"""Files the Hub always stores as LFS; the first commit's `.gitattributes` says the same."""

REGULAR_LIMIT = 10 * 1024 * 1024
"""Above this many bytes a file is LFS whatever its name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_PULL = re.compile(r"refs/pr/([1-9]\d*)")
_RESERVED = {"api", "datasets", "docs", "lfs", "models", "settings", "spaces"}


class ApiError(Exception):
    """A request is refused; never reaches a user, the server turns it into an HTTP answer."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    oid: str
    """Git id of the blob; for LFS, of its pointer."""
    size: int
    """Bytes of the content."""
    sha256: str | None = None
    """Set for LFS files only."""

    @property
    def etag(self) -> str:
        """What clients compare: sha256 for LFS, the git id otherwise."""
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer that stands in git for the content."""
        return len(lfs_pointer(self.sha256 or "", self.size))


@dataclass(frozen=True)
class Commit:
    """One commit and all files of its tree."""

    id: str
    parent: str | None
    title: str
    message: str
    files: Mapping[str, File]


@dataclass(frozen=True)
class Pull:
    """A pull request: a commit that waits to be merged into `main`."""

    number: int
    title: str
    author: str
    base: str
    """The commit of `main` it was made on."""
    head: str
    """Its own commit."""
    status: str = "open"
    """`open`, `merged` or `closed`."""


@dataclass
class Change:
    """What one commit does to the files of its parent, in the order given."""

    title: str
    message: str = ""
    parent: str | None = None
    """Refuse unless this is the branch's head (7 or more leading digits do)."""
    operations: list[tuple[str, str, Any]] = field(default_factory=list)
    """(verb, path, payload): `add` bytes, `lfs` (sha256, size or None), `delete` and `delete_folder` None."""


def git_id(kind: str, content: bytes) -> str:
    """Git's object id of `content`."""
    return hashlib.sha1(
        b"%s %d\0%s" % (kind.encode(), len(content), content), usedforsecurity=False
    ).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def tree_ids(files: Mapping[str, File]) -> dict[str, str]:
    """Git tree ids of every folder ("" is the root)."""
    entries: dict[str, dict[str, tuple[str, str]]] = {"": {}}
    for path, file in files.items():
        folder, _, name = path.rpartition("/")
        entries.setdefault(folder, {})[name] = ("100644", file.oid)
        while folder:
            folder = folder.rpartition("/")[0]
            entries.setdefault(folder, {})
    ids = {}
    for folder in sorted(entries, key=lambda path: -(path.count("/") + bool(path))):  # deepest first
        # git orders a folder as if its name ended in "/"
        rows = sorted(entries[folder].items(), key=lambda row: row[0] + "/" * (row[1][0] == "40000"))
        content = b"".join(
            f"{mode} {name}".encode() + b"\0" + bytes.fromhex(oid) for name, (mode, oid) in rows
        )
        ids[folder] = git_id("tree", content)
        if folder:
            above, _, name = folder.rpartition("/")
            entries[above][name] = ("40000", ids[folder])
    return ids


def commit_id(parent: str | None, title: str, message: str, files: Mapping[str, File]) -> str:
    """Git's commit id with a fixed author and date: a function of content, parent and message alone."""
    who = f"{AUTHOR} <{AUTHOR}@localhost> 1646263744 +0000"
    lines = [f"tree {tree_ids(files)['']}", *([f"parent {parent}"] if parent else [])]
    lines += [f"author {who}", f"committer {who}", "", title, *(["", message] if message else [])]
    return git_id("commit", ("\n".join(lines) + "\n").encode())


def stored_as_lfs(path: str, size: int, head: bytes) -> bool:
    """Whether the Hub stores a file as LFS: by its name, its size, or because it is binary."""
    by_name = any(path.lower().endswith(suffix) for suffix in LFS_SUFFIXES)
    return size > 0 and (by_name or size > REGULAR_LIMIT or b"\0" in head[:512])


def check_path(path: str) -> str:
    """Return `path` if it may name a file of a repo, else refuse."""
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or re.search(r"[\\\x00-\x1f\x7f]", path):
        raise ApiError(
            400, f"expected a plain relative path, got {path!r}; give it without '..', '.git' or '//'"
        )
    return path


def check_ref(name: str) -> str:
    """Return `name` if it may name a branch or tag, else refuse."""
    if (
        not _REF.fullmatch(name)
        or re.search(r"\.\.|//|/\.|\.lock(/|$)|[./]$", name)
        or name.startswith("refs/")
    ):
        raise ApiError(
            400, f"expected the name of a branch or tag, got {name!r}; use letters, digits, '.', '_' and '-'"
        )
    return name


class Repo:
    """One repo; every method reads what is on disk, so nothing is lost with the process."""

    def __init__(self, folder: Path, kind: str, repo_id: str, lock: AbstractContextManager[Any]) -> None:
        self.folder, self.kind, self.id, self._lock = folder, kind, repo_id, lock

    @property
    def settings(self) -> dict[str, Any]:
        """`private` (bool) and `gated` (False, "auto" or "manual")."""
        return {name: self._settings[name] for name in ("private", "gated")}

    @property
    def _settings(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "repo.json").read_bytes()))

    @property
    def access(self) -> list[str]:
        """Users who were let into the repo while it is gated, sorted."""
        return list(self._settings.get("access", ()))

    def set_access(self, user: str, granted: bool) -> None:
        """Let a user into the repo while it is gated, or no longer."""
        with self._lock:
            users = {*self.access, user} if granted else {*self.access} - {user}
            self.change_settings(access=sorted(users))

    def change_settings(self, **changes: Any) -> None:
        """Replace some settings."""
        with self._lock:
            write_atomic(self.folder / "repo.json", canonical_json(self._settings | changes))

    @property
    def refs(self) -> dict[str, dict[str, Any]]:
        """`branches` and `tags`, each from name to commit id, and `pulls` from number to pull request."""
        return {"pulls": {}} | dict(json.loads((self.folder / "refs.json").read_bytes()))

    @property
    def pulls(self) -> list[Pull]:
        """The pull requests, oldest first."""
        return [Pull(**pull) for _, pull in sorted(self.refs["pulls"].items(), key=lambda one: int(one[0]))]

    def _set_ref(self, group: str, name: str, commit: Any) -> None:
        refs = self.refs
        refs[group].pop(name, None)
        if commit is not None:
            refs[group][name] = commit
        write_atomic(self.folder / "refs.json", canonical_json(refs))

    def commit(self, revision: str) -> Commit:
        """The commit a branch, tag, or id (7 or more digits) names."""
        refs = self.refs
        found = refs["branches"].get(revision) or refs["tags"].get(revision) or self._by_digits(revision)
        if pull := _PULL.fullmatch(revision):
            found = refs["pulls"].get(pull[1], {}).get("head")
        if found is None:
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        record = json.loads((self.folder / "commits" / f"{found}.json").read_bytes())
        files = {path: File(**file) for path, file in record["files"].items()}
        return Commit(found, record["parent"], record["title"], record["message"], files)

    def _by_digits(self, digits: str) -> str | None:
        if not _COMMIT.fullmatch(digits):
            return None
        found = [path.stem for path in (self.folder / "commits").glob(f"{digits}*.json")]
        return found[0] if len(found) == 1 else None

    def history(self, revision: str) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        commit: Commit | None = self.commit(revision)
        while commit is not None:
            yield commit
            commit = self.commit(commit.parent) if commit.parent else None

    def add_branch(self, name: str, revision: str) -> None:
        """Start a branch at `revision`; 409 if there is one of that name."""
        self._add_ref("branches", name, revision)

    def add_tag(self, name: str, revision: str) -> None:
        """Tag `revision`; 409 if there is a tag of that name."""
        self._add_ref("tags", name, revision)

    def _add_ref(self, group: str, name: str, revision: str) -> None:
        with self._lock:
            commit = self.commit(revision).id
            if check_ref(name) in self.refs[group]:
                word = "Tag" if group == "tags" else "Branch"
                raise ApiError(409, f"{word} reference exists already: {name}; choose another name")
            self._set_ref(group, name, commit)

    def remove_branch(self, name: str) -> None:
        """Delete a branch; `main` stays."""
        if name == MAIN:
            raise ApiError(403, "Cannot delete refs/heads/main")
        self._remove_ref("branches", name)

    def remove_tag(self, name: str) -> None:
        """Delete a tag."""
        self._remove_ref("tags", name)

    def _remove_ref(self, group: str, name: str) -> None:
        with self._lock:
            if name not in self.refs[group]:
                raise ApiError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            self._set_ref(group, name, None)

    def path_of(self, file: File) -> Path:
        """Where the content of a file lies."""
        return self.folder / "lfs" / file.sha256 if file.sha256 else self.folder / "blobs" / file.oid

    def lfs_size(self, sha256: str) -> int | None:
        """Bytes of an LFS object, None while it is not stored."""
        path = self.folder / "lfs" / sha256
        return path.stat().st_size if path.is_file() else None

    def apply(self, branch: str, change: Change) -> Commit:
        """Make one commit on `branch`; all of it becomes visible or nothing.

        Returns:
            The new head, or the old one when nothing changed.

        Raises:
            ApiError: 404 no such branch or file, 412 stale parent, 400 an operation that cannot be done.
        """
        with self._lock:
            if branch not in self.refs["branches"]:
                raise ApiError(404, f"Invalid rev id: {branch}; expected a branch", "RevisionNotFound")
            head = self.commit(branch)
            if change.parent is not None and not head.id.startswith(change.parent.lower()):
                raise ApiError(412, "A commit has happened since. Please refresh and try again.")
            files, blobs = self._changed(dict(head.files), change.operations)
            if files == head.files:
                return head
            new = self._write(head.id, change, files, blobs)
            self._set_ref("branches", branch, new.id)  # the commit is part of the branch from here on
            return new

    def propose(self, change: Change, author: str) -> tuple[Commit, Pull]:
        """Make one commit that waits to be merged: it starts at the change's parent, or at `main`.

        Raises:
            ApiError: 400 nothing changes, or an operation that cannot be done; 404 no such parent.
        """
        with self._lock:
            base = self.commit(change.parent or MAIN)
            files, blobs = self._changed(dict(base.files), change.operations)
            if files == base.files:
                raise ApiError(400, "expected a change, got none: a pull request needs one")
            new = self._write(base.id, change, files, blobs)
            pull = Pull(len(self.pulls) + 1, change.title, author, base.id, new.id)
            self._set_ref("pulls", str(pull.number), vars(pull))
            return new, pull

    def merge(self, number: int) -> None:
        """Bring what an open pull request changed to `main`, as one commit.

        Raises:
            ApiError: 404 no such pull request, 400 it is not open, 409 `main` changed the same files since.
        """
        with self._lock:
            pull = self._open(number)
            base, head, main = (self.commit(one) for one in (pull.base, pull.head, MAIN))
            files = dict(main.files)
            for path in sorted(base.files.keys() | head.files.keys()):
                before, after = base.files.get(path), head.files.get(path)
                if before == after:
                    continue
                if main.files.get(path) not in (before, after):
                    raise ApiError(409, f"{path!r} was changed on main since; open a new pull request")
                files.pop(path, None)
                if after is not None:
                    files[path] = after
            merged = self._write(main.id, Change(pull.title), files, {})
            self._set_ref("branches", MAIN, merged.id)
            self._set_ref("pulls", str(number), vars(pull) | {"status": "merged"})

    def close(self, number: int) -> None:
        """Close an open pull request; see `merge` for what it raises."""
        with self._lock:
            self._set_ref("pulls", str(number), vars(self._open(number)) | {"status": "closed"})

    def _open(self, number: int) -> Pull:
        if (pull := next((one for one in self.pulls if one.number == number), None)) is None:
            raise ApiError(404, f"no pull request {number}", "EntryNotFound")
        if pull.status != "open":
            raise ApiError(400, f"expected an open pull request, got {number}, which is {pull.status}")
        return pull

    def _changed(
        self, files: dict[str, File], operations: Sequence[tuple[str, str, Any]]
    ) -> tuple[dict[str, File], dict[str, bytes]]:
        blobs: dict[str, bytes] = {}
        added: set[str] = set()
        for verb, path, payload in operations:
            if path in added or (
                verb == "delete_folder" and any(one.startswith(f"{path}/") for one in added)
            ):
                raise ApiError(
                    400, f"expected one operation a path in a commit, got a second one on {path!r}"
                )
            if verb.startswith("delete"):
                _delete(files, path, folder=verb == "delete_folder")
                continue
            files[check_path(path)] = (
                self._lfs_file(path, *payload) if verb == "lfs" else _blob(blobs, path, payload)
            )
            added.add(path)
        _check_no_file_is_a_folder(files)
        return files, blobs

    def _lfs_file(self, path: str, sha256: str, size: int | None) -> File:
        stored = self.lfs_size(sha256)
        if stored is None:
            raise ApiError(
                400, f"LFS object {sha256} of {path!r} is not stored here; upload it before the commit"
            )
        if size is not None and size != stored:
            raise ApiError(400, f"{path!r}: expected the {stored} bytes that are stored, got size {size}")
        return File(git_id("blob", lfs_pointer(sha256, stored)), stored, sha256)

    def _write(
        self,
        parent: str | None,
        change: Change,
        files: Mapping[str, File],
        blobs: Mapping[str, bytes],
    ) -> Commit:
        for oid, content in blobs.items():
            if not (path := self.folder / "blobs" / oid).exists():
                write_atomic(path, content)
        new = commit_id(parent, change.title, change.message, files)
        record = {"parent": parent, "title": change.title, "message": change.message}
        rows = {path: vars(file) for path, file in files.items()}
        write_atomic(self.folder / "commits" / f"{new}.json", canonical_json(record | {"files": rows}))
        return Commit(new, parent, change.title, change.message, files)

    def start(self) -> None:
        """Make the first commit, as the Hub does: `.gitattributes` alone."""
        for name in ("blobs", "commits", "lfs"):
            (self.folder / name).mkdir(parents=True)
        write_atomic(self.folder / "refs.json", canonical_json({"branches": {}, "tags": {}}))
        rows = [f"*{suffix} filter=lfs diff=lfs merge=lfs -text" for suffix in LFS_SUFFIXES]
        blobs: dict[str, bytes] = {}
        files = {".gitattributes": _blob(blobs, ".gitattributes", ("\n".join(rows) + "\n").encode())}
        first = self._write(None, Change("initial commit"), files, blobs)
        self._set_ref("branches", MAIN, first.id)


def _delete(files: dict[str, File], path: str, folder: bool) -> None:
    gone = [one for one in files if (one.startswith(f"{path}/") if folder else one == path)]
    if not gone:
        word = "folder" if folder else "file"
        raise ApiError(404, f"A {word} with this name doesn't exist: {path}", "EntryNotFound")
    for one in gone:
        del files[one]


def _blob(blobs: dict[str, bytes], path: str, content: bytes) -> File:
    if stored_as_lfs(path, len(content), content):
        raise ApiError(400, f"{path!r} is large or binary: expected an LFS upload, got regular content")
    oid = git_id("blob", content)
    blobs[oid] = content
    return File(oid, len(content))


def _check_no_file_is_a_folder(files: Mapping[str, File]) -> None:
    folders = {path[:at] for path in files for at, letter in enumerate(path) if letter == "/"}
    if clash := sorted(folders & files.keys()):
        raise ApiError(
            400, f"{clash[0]!r} would be a file and a folder; delete one of them in the same commit"
        )


class Store:
    """All repos below one folder; only one process may have it open.

    Args:
        root: the folder; made if missing.

    Raises:
        BlockingIOError: another process serves this folder.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self._held = (root / "lock").open("w")
        self._take_root()
        self.uploads = root / "uploads"
        shutil.rmtree(self.uploads, ignore_errors=True)  # left by a crash: never referred to
        self.uploads.mkdir()
        self.key = self._key()
        self._locks: dict[Path, threading.RLock] = {}
        self._guard = threading.RLock()

    def _take_root(self) -> None:
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._held.close()
            raise BlockingIOError(
                f"{self.root} is served by another process; stop it or give another root"
            ) from error

    def _key(self) -> bytes:
        path = self.root / "secret"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()

    def close(self) -> None:
        """Let another process have the folder."""
        self._held.close()

    def _lock(self, folder: Path) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(folder, threading.RLock())

    def _repo(self, kind: str, repo_id: str) -> Repo:
        folder = self.root / kind / repo_id
        return Repo(folder, kind, repo_id, self._lock(folder))

    def repo(self, kind: str, repo_id: str) -> Repo | None:
        """The repo, or None."""
        if not all(_NAME.fullmatch(part) for part in repo_id.split("/")) or repo_id.count("/") != 1:
            return None
        return self._repo(kind, repo_id) if (self.root / kind / repo_id / "repo.json").is_file() else None

    def repos(self, kind: str) -> list[Repo]:
        """All repos of a kind, sorted by id."""
        found = sorted((self.root / kind).glob("*/*/repo.json"))
        return [self._repo(kind, path.parent.relative_to(self.root / kind).as_posix()) for path in found]

    def create(self, kind: str, repo_id: str, private: bool) -> Repo | None:
        """Create a repo with its first commit; None if there is one of that name already.

        Raises:
            ApiError: 400 a name that no repo may have.
        """
        org, _, name = repo_id.partition("/")
        if (
            not (_NAME.fullmatch(org) and _NAME.fullmatch(name))
            or org in _RESERVED
            or "--" in name
            or ".." in name
        ):
            raise ApiError(400, f"expected a repo id like 'org/name', got {repo_id!r}")
        if name.endswith((".git", ".ipynb")):
            raise ApiError(400, f"{repo_id!r}: a repo name cannot end with '.git' or '.ipynb'")
        with self._guard:
            if repo_id.lower() in {repo.id.lower() for repo in self.repos(kind)}:
                return None
            return self._create(kind, repo_id, private)

    def _create(self, kind: str, repo_id: str, private: bool) -> Repo:
        folder = self.root / kind / repo_id
        folder.parent.mkdir(parents=True, exist_ok=True)
        built = Path(tempfile.mkdtemp(dir=self.uploads))
        repo = Repo(built, kind, repo_id, threading.RLock())
        repo.start()
        write_atomic(built / "repo.json", canonical_json({"private": private, "gated": False}))
        built.chmod(0o755)
        built.rename(folder)  # the repo exists from here on
        return Repo(folder, kind, repo_id, self._locks.setdefault(folder, threading.RLock()))

    def delete(self, repo: Repo) -> None:
        """Delete a repo and all it holds."""
        with self._lock(repo.folder):
            gone = Path(tempfile.mkdtemp(dir=self.uploads)) / "repo"
            repo.folder.rename(gone)
        shutil.rmtree(gone.parent)

    @contextmanager
    def upload(self, repo: Repo, sha256: str, size: int) -> Iterator[IO[bytes]]:
        """A file to write an LFS object to; kept only if its size and sha256 are the announced ones.

        Raises:
            ApiError: 400 they are not.
        """
        handle, name = tempfile.mkstemp(dir=self.uploads)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            self.keep(repo, Path(name), sha256, size)
        finally:
            Path(name).unlink(missing_ok=True)

    def keep(self, repo: Repo, path: Path, sha256: str, size: int) -> None:
        """Make a finished file an LFS object, if its size and sha256 are the announced ones.

        Raises:
            ApiError: 400 they are not.
        """
        check_object(path, sha256, size)
        path.replace(repo.folder / "lfs" / sha256)


def check_object(path: Path, sha256: str, size: int) -> None:
    """Refuse a file whose bytes are not the announced ones."""
    if (got := path.stat().st_size) != size:
        raise ApiError(400, f"LFS object {sha256}: expected {size} bytes, got {got}; upload it again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ApiError(400, f"LFS object: expected sha256 {sha256}, got {digest}; upload it again")
