"""A repo on a Hub as publishing sees it: what it holds now.

Reads through `huggingface_hub.HfApi`; writes nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hub import retry
from hub.plan import Remote, RemoteFile

MAIN = "main"

PATIENCE = 300.0
"""Seconds without a byte after which a call has failed; huggingface_hub alone would wait for ever."""


@contextmanager
def own_bars() -> Iterator[None]:
    """No progress bars of huggingface_hub inside the block: it draws several a file, also into logs."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@dataclass(frozen=True)
class Target:
    """One repo on one Hub."""

    repo_id: str
    """`org/name`."""
    repo_type: str
    """`dataset` or `model`."""
    endpoint: str | None = None
    """Address of the Hub; None is huggingface_hub's own setting."""
    token: str | None = field(default=None, repr=False)
    """None is the token of the login, if any."""

    @property
    def api(self) -> HfApi:
        """The client; a call that it would wait for without end fails after `PATIENCE`."""
        get_session().timeout = PATIENCE
        return self._api

    @cached_property
    def _api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token, library_name="daco-hub")

    @property
    def secret(self) -> str | None:
        """The token in use, to keep it out of every message."""
        return self.token or get_token()

    @property
    def url(self) -> str:
        """The repo's page."""
        folder = "datasets/" if self.repo_type == "dataset" else ""
        return f"{self.api.endpoint}/{folder}{self.repo_id}"

    def __str__(self) -> str:
        return f"{self.repo_type} {self.repo_id}"

    def look(self, tag: str) -> Remote:
        """What the repo holds at `main` and at `tag`; raises what huggingface_hub raises."""
        try:
            refs = self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type)
        except RepositoryNotFoundError:
            return Remote(None)
        head = next((branch.target_commit for branch in refs.branches if branch.name == MAIN), None)
        tags = {one.name: one.target_commit for one in refs.tags}
        files = self.files(head) if head else {}
        if tag not in tags:
            return Remote(head, files, tags)
        return Remote(head, files, tags, files if tags[tag] == head else self.files(tag))

    def look_all(self, tag: str) -> Remote:
        """As `look`, and who may see the repo."""
        found = self.look(tag)
        if found.head is None:
            return found
        info = self.api.repo_info(self.repo_id, repo_type=self.repo_type)
        return replace(found, private=bool(info.private), gated=info.gated or "")

    def at(self, revision: str) -> Remote:
        """What the repo holds at a revision, of whose tags nothing is said."""
        return Remote(revision, self.files(revision))

    def files(self, revision: str) -> Mapping[str, RemoteFile]:
        """Path -> file at a revision."""
        entries = self.api.list_repo_tree(
            self.repo_id, repo_type=self.repo_type, revision=revision, recursive=True
        )
        return {
            entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def look_again(self, tag: str) -> Remote:
        """As `look_all`, tried again while the Hub has trouble."""
        return retry.call(f"reading {self}", self.secret, lambda: self.look_all(tag))

    def proposals(self, title: str) -> list[str]:
        """The revisions of open pull requests of this title, the newest first."""
        found = self.api.get_repo_discussions(
            self.repo_id,
            repo_type=self.repo_type,
            discussion_type="pull_request",
            discussion_status="open",
        )
        return [f"refs/pr/{one.num}" for one in found if one.title == title]
