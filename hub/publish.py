"""Publishes a release folder: stage, gate, then look at the repo and take the next step until none is left.

Reads the folder and the Hub; writes the folder's card and manifest, and one commit and one tag on the Hub.
All state is the Hub's, so after a crash, a lost answer or a foreign commit, looking again says what is left.
"""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from tqdm import tqdm

from daco.errors import (
    DacoError,
    HubRefusedError,
    HubUnavailableError,
    PublishConflictError,
    RefusedError,
    TagMovedError,
)
from daco.manifest import MANIFEST, read_manifest, sha256_file
from hub import retry
from hub.gate import check_release, prompts_in
from hub.plan import AS_IT_IS, Access, Add, File, Plan, Refusal, Remote, make_plan
from hub.remote import MAIN, Target, own_bars
from hub.stage import stage
from hub.verify import verify

LOOKS = 5
"""Looks at the repo before one that shows no progress is trouble: to make it, to gate it, to fill it, to tag
what is withdrawn, to see it done."""

CONFLICTS = (409, 412)
"""Statuses that say the repo moved: the tag or repo appeared, or `main` has another head."""


@dataclass(frozen=True)
class Published:
    """What publishing did."""

    repo_id: str
    repo_type: str
    tag: str
    commit: str
    """The commit behind the tag."""
    url: str
    """Page of the release."""
    committed: bool
    """Whether a commit was made; False when the repo held this release already."""
    bytes_sent: int
    """Bytes of the files in that commit, as planned."""


@dataclass(frozen=True)
class Release:
    """A staged release folder and the files it would publish."""

    folder: Path
    version: str
    files: Mapping[str, File]
    """Path -> file, the manifest among them."""
    since: str = ""
    """Version its changelog compares it with; empty where it has none."""
    yanked: tuple[str, ...] = ()
    """Older versions that it says are withdrawn."""
    prompts: tuple[str, ...] = ()
    """Where it holds prompts that may be harmful."""

    @classmethod
    def of(cls, folder: Path) -> "Release":
        """Read the manifest of a release folder; see `daco.manifest.read_manifest` for what it raises."""
        manifest, path = read_manifest(folder), folder / MANIFEST
        files = {name: File(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        files[MANIFEST] = File(path.stat().st_size, sha256_file(path))
        since = str(manifest["facts"].get("changes", {}).get("since", ""))
        yanked = tuple(manifest["facts"].get("yanked", {}))
        return cls(folder, manifest["version"], files, since, yanked, tuple(prompts_in(folder, manifest)))

    @property
    def tag(self) -> str:
        """The tag it is published under."""
        return f"v{self.version}"

    def plan(
        self,
        target: Target,
        remote: Remote,
        refusals: list[Refusal] | None = None,
        access: Access = AS_IT_IS,
    ) -> Plan:
        """Compare it with what the repo holds."""
        files = {name: self._with_oid(name, remote) for name in self.files}
        return make_plan(
            target.repo_id,
            target.repo_type,
            self.version,
            files,
            remote,
            refusals or (),
            self.since,
            self.yanked,
            access,
            self.prompts,
        )

    def _with_oid(self, name: str, remote: Remote) -> File:
        """The file with git's id where the repo has a regular file of that size, which has no other hash."""
        file = self.files[name]
        for there in (remote.files.get(name), (remote.tag_files or {}).get(name)):
            if there is not None and there.sha256 is None and there.bytes == file.bytes:
                return replace(file, git_oid=git_oid(self.folder / name))
        return file


def git_oid(path: Path) -> str:
    """git's id of a file's content; regular files of a Hub are small."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def plan(folder: Path, target: Target, access: Access = AS_IT_IS) -> Plan:
    """What publishing this folder would do now; stages it, changes nothing on the Hub.

    Args:
        folder: A finished release folder.
        target: Where it would go.
        access: Who is to see the repo.

    Raises:
        FormatError: the manifest breaks the format.
        HubUnavailableError: the Hub did not answer within the bounded retries.
        HubRefusedError: the Hub refused to say.
    """
    stage(folder)
    refusals = check_release(folder)
    release = Release.of(folder)
    return release.plan(target, target.look_again(release.tag), refusals, access)


def publish(folder: Path, target: Target, access: Access = AS_IT_IS) -> Published:
    """Publish a release folder as one commit with one tag; running it again resumes, or finds nothing to do.

    Args:
        folder: A finished release folder.
        target: Where it goes.
        access: Who is to see the repo; it is gated before anything is sent.

    Raises:
        RefusedError: the release must not leave; lists why.
        TagMovedError: the tag exists on other content.
        PublishConflictError: others kept changing the repo.
        HubRefusedError: the Hub refused the token or the request.
        HubUnavailableError: the Hub did not answer within the bounded retries.
        VerificationError: the Hub serves something else than was sent.
    """
    release = checked(folder)
    published = send(release, target, access)
    commit = verify(target, release.tag, (folder / MANIFEST).read_bytes())
    return replace(published, commit=commit)


def checked(folder: Path) -> Release:
    """Stage a release folder and see that it may leave.

    Raises:
        RefusedError: it must not leave; lists why.
    """
    stage(folder)
    if refusals := check_release(folder):
        raise RefusedError(_listed(f"{folder.name} is not published", refusals))
    return Release.of(folder)


def send(release: Release, target: Target, access: Access = AS_IT_IS) -> Published:
    """Bring files to a repo as one commit with one tag, or see that the tag holds them; see `publish`.

    It ends when the Hub lists every file at the tag with the hash of the one here.
    """
    work = Work(release, target, access)
    work.finish()
    repo, url = (target.repo_id, target.repo_type), f"{target.url}/tree/{release.tag}"
    return Published(*repo, release.tag, work.tagged, url, work.committed, work.bytes_sent)


class Work:
    """One publishing of one release: what is planned, and what was uploaded so far."""

    pull_request = False
    """Whether the commit waits in a pull request."""

    def __init__(self, release: Release, target: Target, access: Access) -> None:
        self.release, self.target, self.access = release, target, access
        self.committed, self.bytes_sent = False, 0
        self.tagged = ""  # the commit behind the tag, once there is one
        self.additions: dict[str, CommitOperationAdd] = {}

    def finish(self) -> None:
        """Take steps until nothing is left to do, through a bounded number of troubles."""
        trouble: Exception | None = None
        for attempt in range(retry.ATTEMPTS):
            if trouble is not None:
                retry.sleep(retry.wait_seconds(trouble, attempt - 1))
            try:
                for _ in range(LOOKS):
                    if self.done(plan := self.look()):
                        return
                    self.step(plan)
                trouble = TimeoutError("the repo does not show what was written to it")
            except DacoError:
                raise
            except retry.CAUGHT as error:
                trouble = self._passing(error)
        problem = f"{self.target}: gave up after {retry.ATTEMPTS} tries: {self._told(trouble)}; run it again"
        raise (PublishConflictError if retry.status(trouble) in CONFLICTS else HubUnavailableError)(problem)

    def done(self, plan: Plan) -> bool:
        """Whether nothing is left to do."""
        return plan.done

    def look(self) -> Plan:
        """The plan for the repo as it is now.

        Raises:
            TagMovedError: the tag is on other content.
            RefusedError: the plan refuses for another reason.
        """
        special = self.access != AS_IT_IS or self.release.prompts
        remote = (self.target.look_all if special else self.target.look)(self.release.tag)
        self.tagged = remote.tags.get(self.release.tag, "")
        plan = self.release.plan(self.target, remote, access=self.access)
        if plan.refusals:
            moved = remote.tag_files is not None and not plan.tagged
            raise (TagMovedError if moved else RefusedError)(_listed(str(self.target), plan.refusals))
        return plan

    def step(self, plan: Plan) -> None:
        """Make the repo, or gate it, or commit what differs and tag it, or tag what is withdrawn."""
        api, repo_id, repo_type = self.target.api, plan.repo_id, plan.repo_type
        if plan.head is None:
            api.create_repo(repo_id, repo_type=repo_type, private=self.access.private, exist_ok=True)
            return
        if plan.gate:
            gated: Any = plan.gate
            api.update_repo_settings(repo_id, repo_type=repo_type, gated=gated)
            return
        if plan.tagged:
            for tag, at in plan.withdraw.items():
                api.create_tag(repo_id, repo_type=repo_type, tag=tag, revision=at)
            return
        commit = str(self.commit(plan).oid) if plan.changes else plan.head
        api.create_tag(repo_id, repo_type=repo_type, tag=plan.tag, revision=commit)

    def commit(self, plan: Plan) -> CommitInfo:
        """Upload what is new, one file after another, then commit all changes at once."""
        added = [op for op in plan.changes if isinstance(op, Add)]
        self.upload(plan, added)
        operations = [
            self.additions[op.path] if isinstance(op, Add) else CommitOperationDelete(op.path)
            for op in plan.changes
        ]
        self.committed, self.bytes_sent = True, plan.bytes_to_send  # also true if only the answer gets lost
        with warnings.catch_warnings():
            # a model release has atoms.parquet on purpose
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            answer: CommitInfo = self.target.api.create_commit(
                plan.repo_id,
                operations,
                commit_message=title(plan.tag),
                repo_type=plan.repo_type,
                revision=MAIN,
                parent_commit=plan.head,
                create_pr=self.pull_request,
            )
        self.additions.clear()  # huggingface_hub takes none of them for a second commit
        return answer

    def upload(self, plan: Plan, added: list[Add]) -> None:
        """Send the large files ahead of the commit; those sent before a trouble are not sent again."""
        total = sum(op.bytes for op in added)
        with own_bars(), tqdm(total=total, unit="B", unit_scale=True, desc=plan.repo_id, disable=None) as bar:
            for op in added:
                if op.path not in self.additions:
                    self.additions[op.path] = CommitOperationAdd(op.path, str(self.release.folder / op.path))
                self.target.api.preupload_lfs_files(
                    plan.repo_id,
                    [self.additions[op.path]],
                    repo_type=plan.repo_type,
                    create_pr=self.pull_request,
                    free_memory=False,
                )
                bar.update(op.bytes)

    def _passing(self, error: Exception) -> Exception:
        """`error`, if looking again may help; what the Hub said about the files is forgotten if it moved."""
        if retry.status(error) in CONFLICTS:
            self.additions.clear()
        elif not retry.is_transient(error):
            raise HubRefusedError(
                f"{self.target}: {self._told(error)}; check your login and rights"
            ) from None
        return error

    def _told(self, error: BaseException | None) -> str:
        return retry.told(error, self.target.secret) if error else "no answer"


def title(tag: str) -> str:
    """The title of a release's commit."""
    return f"Release {tag}"


def _listed(what: str, refusals: list[Refusal] | tuple[Refusal, ...]) -> str:
    return f"{what}:\n- " + "\n- ".join(map(str, refusals))
