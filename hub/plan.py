"""What publishing a release would do to a repo: pure, from the release's files and what the repo holds.

Reads and writes nothing; `hub.publish` looks at the Hub and carries plans out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

YANKED = "yanked-v"
"""What the second tag of a withdrawn version starts with; its first one stays where it is."""

KEPT = (".gitattributes",)
"""Files of the repo's own, which a release neither has nor deletes."""


@dataclass(frozen=True)
class Refusal:
    """One reason not to publish."""

    what: str
    """What is wrong."""
    where: str
    """File, column or ref."""
    fix: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Access:
    """Who is to see the repo."""

    private: bool | None = None
    """Whether only its organisation may; None is the Hub's default for a new repo, else as it is."""
    gated: str = ""
    """`auto` or `manual`: readers ask first, and are let in at once or by hand; empty leaves it as it is."""


AS_IT_IS = Access()
"""Nothing is asked for."""


@dataclass(frozen=True)
class File:
    """A file of the release, as it lies here."""

    bytes: int
    sha256: str
    git_oid: str = ""
    """git's id of the content; needed only where the repo holds the path as a regular file."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repo at some commit."""

    bytes: int
    git_oid: str
    sha256: str | None
    """sha256 of an LFS file; None for a regular file."""

    def holds(self, file: File) -> bool:
        """Whether its content is `file`'s."""
        if self.bytes != file.bytes:
            return False
        return self.git_oid == file.git_oid if self.sha256 is None else self.sha256 == file.sha256


@dataclass(frozen=True)
class Remote:
    """What the repo holds."""

    head: str | None
    """Commit of `main`; None while the repo does not exist."""
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    """Path -> file, at head."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tag -> commit."""
    tag_files: Mapping[str, RemoteFile] | None = None
    """Path -> file at the release's tag; None while there is no such tag."""
    private: bool | None = None
    """Whether only its organisation sees it; None where that was not asked."""
    gated: str | None = None
    """`auto`, `manual`, or empty where everyone may read; None where that was not asked."""


@dataclass(frozen=True)
class Add:
    """Upload a new or changed file."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Delete:
    """Remove a file that the release does not have."""

    path: str


@dataclass(frozen=True)
class Unchanged:
    """A file that the repo already holds."""

    path: str


Operation = Add | Delete | Unchanged


@dataclass(frozen=True)
class Plan:
    """What publishing would do, or why it is refused."""

    repo_id: str
    repo_type: str
    tag: str
    head: str | None
    operations: tuple[Operation, ...]
    tagged: bool
    """The tag already exists on this very content."""
    refusals: tuple[Refusal, ...] = ()
    withdraw: Mapping[str, str] = field(default_factory=dict)
    """Tag to be made -> commit: the second tags of withdrawn versions."""
    gate: str = ""
    """How the repo is to be gated before anything is sent; empty where it is so, or need not be."""

    @property
    def changes(self) -> tuple[Add | Delete, ...]:
        """The operations that need a commit."""
        return tuple(op for op in self.operations if not isinstance(op, Unchanged))

    @property
    def bytes_to_send(self) -> int:
        """Bytes of the files to upload; what the Hub already stores under another path counts too."""
        return sum(op.bytes for op in self.operations if isinstance(op, Add))

    @property
    def done(self) -> bool:
        """Nothing is left to do."""
        return self.tagged and not self.refusals and not self.withdraw and not self.gate

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able facts."""
        return {
            "repo_id": self.repo_id,
            "repo_type": self.repo_type,
            "tag": self.tag,
            "head": self.head,
            "add": [vars(op) for op in self.operations if isinstance(op, Add)],
            "delete": [op.path for op in self.operations if isinstance(op, Delete)],
            "unchanged": [op.path for op in self.operations if isinstance(op, Unchanged)],
            "tagged": self.tagged,
            "withdraw": sorted(self.withdraw),
            "gate": self.gate,
            "bytes_to_send": self.bytes_to_send,
            "refusals": [vars(refusal) for refusal in self.refusals],
        }

    def __str__(self) -> str:
        lines = [f"{self.repo_type} {self.repo_id} {self.tag} on {self.head or 'a new repo'}"]
        lines += [f"  refused  {refusal}" for refusal in self.refusals]
        lines += [f"  add      {op.path}  {op.bytes:,} B" for op in self.operations if isinstance(op, Add)]
        lines += [f"  delete   {op.path}" for op in self.operations if isinstance(op, Delete)]
        lines += [f"  tag      {tag} at {commit}" for tag, commit in self.withdraw.items()]
        lines += [f"  gate     {self.gate}: readers ask first"] if self.gate else []
        unchanged = len(self.operations) - len(self.changes)
        if self.done:
            return "\n".join([*lines[:1], "  nothing to do: the tag holds this very content"])
        return "\n".join([*lines, f"  unchanged {unchanged}, to send {self.bytes_to_send:,} B"])


def make_plan(
    repo_id: str,
    repo_type: str,
    version: str,
    files: Mapping[str, File],
    remote: Remote,
    refusals: Sequence[Refusal] = (),
    since: str = "",
    yanked: Sequence[str] = (),
    access: Access = AS_IT_IS,
    prompts: Sequence[str] = (),
) -> Plan:
    """Compare a release with its repo.

    Args:
        repo_id: `org/name`.
        repo_type: `dataset` or `model`.
        version: MAJOR.MINOR.PATCH; the tag is `v` + version.
        files: Every file of the release, the manifest too.
        remote: What the repo holds.
        refusals: Those already found offline.
        since: Version that the release's changelog compares it with; empty where it has none.
        yanked: Older versions that the release says are withdrawn.
        access: Who is to see the repo.
        prompts: Where the release holds prompts that may be harmful; they need a gated repo.
    """
    tag = f"v{version}"
    tagged = remote.tag_files is not None and not _changes(files, remote.tag_files)
    found = list(refusals)
    if remote.tag_files is not None and not tagged:
        found.append(_tag_moved(tag, remote.tags.get(tag, "")))
    elif remote.tag_files is None and (newest := _newest(remote.tags)):
        if newest > _numbers(version):
            found.append(_too_old(tag, newest))
        elif newest != _numbers(since):
            found.append(_untold(repo_id, newest, since))
    if access.private and remote.private is False:
        found.append(_public(repo_id))
    if prompts and not (access.gated or remote.gated):
        found.append(_open_prompts(prompts))
    gate = access.gated if access.gated != (remote.gated or "") else ""
    operations = _operations(files, remote.tag_files if tagged and remote.tag_files else remote.files)
    withdraw = {
        f"{YANKED}{old}": remote.tags[f"v{old}"]
        for old in sorted(yanked)
        if f"v{old}" in remote.tags and f"{YANKED}{old}" not in remote.tags
    }
    return Plan(repo_id, repo_type, tag, remote.head, operations, tagged, tuple(found), withdraw, gate)


def _changes(files: Mapping[str, File], there: Mapping[str, RemoteFile]) -> bool:
    return any(not isinstance(op, Unchanged) for op in _operations(files, there))


def _operations(files: Mapping[str, File], there: Mapping[str, RemoteFile]) -> tuple[Operation, ...]:
    operations: list[Operation] = []
    for path, file in sorted(files.items()):
        held = path in there and there[path].holds(file)
        operations.append(Unchanged(path) if held else Add(path, file.bytes, file.sha256))
    stale = sorted(set(there) - set(files) - set(KEPT))
    return (*operations, *(Delete(path) for path in stale))


def _newest(tags: Mapping[str, str]) -> tuple[int, ...] | None:
    return max((_numbers(tag[1:]) for tag in tags if tag.startswith("v") and _numbers(tag[1:])), default=None)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(part.isdecimal() for part in parts) else ()


def _tag_moved(tag: str, commit: str) -> Refusal:
    return Refusal(
        f"expected no tag {tag}, or one on this very content, got it on other content at {commit[:12]}",
        tag,
        "tags never move: build the release again with a higher release.version",
    )


def _untold(repo_id: str, newest: tuple[int, ...], since: str) -> Refusal:
    before = f"v{'.'.join(map(str, newest))}"
    got = f"one since v{since}" if since else "none"
    return Refusal(
        f"expected a changelog since {before}, the newest tag, got {got}",
        "CHANGELOG.md",
        f"run `python -m hub stage FOLDER --since {repo_id}@{before}`, or name that release's folder",
    )


def _public(repo_id: str) -> Refusal:
    return Refusal(
        "expected a private repo, got a public one",
        repo_id,
        "make it private on its page, or publish without --private",
    )


def _open_prompts(prompts: Sequence[str]) -> Refusal:
    return Refusal(
        f"it holds prompts ({', '.join(prompts)}), which leave only to a gated repo, got one open to all",
        "prompts",
        'publish with --gated manual, or set release.prompts = "harmless" in the recipe if they are',
    )


def _too_old(tag: str, newest: tuple[int, ...]) -> Refusal:
    return Refusal(
        f"expected a version above v{'.'.join(map(str, newest))}, the newest tag, got {tag}",
        tag,
        "`main` must stay the newest release: build again with a higher release.version",
    )
