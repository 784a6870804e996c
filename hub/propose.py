"""Proposes a release of somebody else's repo: one pull request, which its maintainers merge and then tag.

Reads the release folder and the Hub; writes the folder's card and manifest, and a pull request on the Hub.
"""

from dataclasses import dataclass
from pathlib import Path

from daco.errors import RefusedError
from daco.manifest import MANIFEST
from hub.plan import AS_IT_IS, Access, Plan, Unchanged
from hub.publish import Release, Work, checked, title
from hub.remote import Target
from hub.verify import verify


@dataclass(frozen=True)
class Proposed:
    """What proposing did."""

    repo_id: str
    """`org/name`."""
    repo_type: str
    """`dataset` or `model`."""
    tag: str
    """The tag that the release is to get."""
    revision: str
    """`refs/pr/N` of the pull request."""
    commit: str
    """Its commit."""
    url: str
    """Its page."""
    committed: bool
    """Whether it was opened now; False where there was one of this very content."""
    bytes_sent: int
    """Bytes of the files in its commit, as planned."""


def propose(folder: Path, target: Target) -> Proposed:
    """Open a pull request with a release, or find the open one that has it; running it again makes no second.

    The repo's maintainers merge it, and run `publish` on the same folder, which then only tags.

    Raises:
        RefusedError: the release must not leave, there is no such repo, or the repo holds this release.
        HubRefusedError: the Hub refused the token or the request.
        HubUnavailableError: the Hub did not answer within the bounded retries.
        PublishConflictError: others kept changing the repo.
        VerificationError: the Hub serves something else than was sent.
    """
    work = _Proposing(checked(folder), target, AS_IT_IS)
    work.finish()
    commit = verify(target, work.revision, (folder / MANIFEST).read_bytes())
    names = target.repo_id, target.repo_type, work.release.tag
    url = f"{target.url}/discussions/{work.revision.rpartition('/')[2]}"
    return Proposed(*names, work.revision, commit, url, work.committed, work.bytes_sent)


class _Proposing(Work):
    pull_request = True

    def __init__(self, release: Release, target: Target, access: Access) -> None:
        super().__init__(release, target, access)
        self.revision = ""  # of the pull request, once there is one

    def done(self, plan: Plan) -> bool:
        """Whether an open pull request has this very content."""
        if plan.head is None:
            raise RefusedError(f"{self.target}: expected a repo to propose to, got none; publish makes one")
        if plan.tagged or not plan.changes:
            raise RefusedError(
                f"{self.target}: expected something to propose, got what it holds already; nothing to do"
            )
        opened = [self.revision] if self.revision else []  # the list of pull requests may lag behind
        for revision in [*opened, *self.target.proposals(title(plan.tag))]:
            if self._holds(revision):
                self.revision = revision
                return True
        return False

    def _holds(self, revision: str) -> bool:
        """Whether a pull request has this very content."""
        remote = self.target.at(revision)
        operations = self.release.plan(self.target, remote).operations
        return all(isinstance(operation, Unchanged) for operation in operations)

    def step(self, plan: Plan) -> None:
        """Open the pull request."""
        self.revision = str(self.commit(plan).pr_revision)
