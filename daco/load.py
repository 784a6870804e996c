"""A release at one commit, from a Hub repo or a local folder; every file is checked against the manifest.

Reads through huggingface_hub's cache, so `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and tokens work.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, of either version
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from daco.errors import ArtefactNotFoundError, FormatError, HubUnavailableError, IntegrityError
from daco.manifest import MANIFEST, check_file, parse_manifest, read_manifest


@dataclass(frozen=True)
class Snapshot:
    """A release whose revision was resolved once; `path` gives its files."""

    name: str
    """Repo id or folder, as it was asked for."""
    commit: str | None
    """The commit behind the revision; None for a folder."""
    manifest: dict[str, Any] = field(repr=False)
    """The validated manifest."""
    folder: Path | None = None
    """The local folder, where it is one."""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    """What `hf_hub_download` is called with."""

    def path(self, name: str) -> Path:
        """Local path of a file of the release, fetched where needed and compared with the manifest.

        A file that huggingface_hub's cache holds in an altered or truncated state is fetched once more.

        Raises:
            ArtefactNotFoundError: the manifest has no such file, or the repo has lost it.
            IntegrityError: it is truncated or altered, also after fetching it again.
        """
        if (entry := self.manifest["files"].get(name)) is None:
            raise ArtefactNotFoundError(
                f"{self.name}: expected {name!r} in {MANIFEST}, got none; is it the right revision?"
            )
        if self.folder is not None:
            check_file(self.folder / name, entry, name)
            return self.folder / name
        path = _download(self.name, name, revision=self.commit, **self.options)
        try:
            check_file(path, entry, name)
        except IntegrityError:
            if self.options.get("local_files_only"):
                raise
            path = _download(self.name, name, revision=self.commit, force_download=True, **self.options)
            check_file(path, entry, name)
        return path


def resolve(
    repo_or_folder: str | Path,
    kind: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Snapshot:
    """Find a release and read its manifest; the revision is resolved once, here.

    Args:
        repo_or_folder: `org/name` on the Hub, or a release folder. An existing folder wins.
        kind: `dataset` or `model`.
        revision: Tag, branch or commit of the repo; None is the newest. A folder has none.
        token: As in huggingface_hub.
        cache_dir: As in huggingface_hub.
        local_files_only: Use the cache alone, without asking the Hub.

    Raises:
        ArtefactNotFoundError: no such repo, revision or folder, or no right to read it.
        FormatError: the release is of another kind, or breaks the format.
        IntegrityError: its manifest is missing or damaged.
    """
    folder = Path(repo_or_folder)
    if folder.is_dir():
        if revision is not None:
            raise ArtefactNotFoundError(
                f"{folder} is a folder, which has no revision {revision!r}; leave revision out"
            )
        snapshot = Snapshot(str(folder), None, read_manifest(folder), folder)
    else:
        options = {
            "repo_type": kind,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only or constants.HF_HUB_OFFLINE,
        }
        commit, manifest = _manifest(str(repo_or_folder), revision, options)
        snapshot = Snapshot(str(repo_or_folder), commit, manifest, None, options)
    if (got := snapshot.manifest["kind"]) != kind:
        raise FormatError(f"{snapshot.name}: expected a {kind} release, got a {got} release")
    return snapshot


def _manifest(repo: str, revision: str | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The commit behind a revision and its manifest; a damaged one in the cache is fetched once more."""
    where = f"{repo}/{MANIFEST}"
    path = _download(repo, MANIFEST, revision=revision, **options)
    try:
        return path.parent.name, parse_manifest(path.read_bytes(), where)
    except IntegrityError:
        if options["local_files_only"]:
            raise
        path = _download(repo, MANIFEST, revision=path.parent.name, force_download=True, **options)
        return path.parent.name, parse_manifest(path.read_bytes(), where)


def _download(repo: str, name: str, **options: Any) -> Path:
    """`hf_hub_download` with its errors turned into ours."""
    where = f"{repo}@{options['revision']}" if options.get("revision") else repo
    kind = options["repo_type"]
    try:
        return Path(hf_hub_download(repo, name, library_name="daco", **options))
    except GatedRepoError as error:
        problem = f"{where} is gated: ask for access on its page, then log in with `hf auth login`"
        raise ArtefactNotFoundError(problem) from error
    except RepositoryNotFoundError as error:
        raise ArtefactNotFoundError(_no_repo(repo, where, kind, options.get("token"))) from error
    except RevisionNotFoundError as error:
        raise ArtefactNotFoundError(_no_revision(repo, str(options.get("revision")))) from error
    except LocalEntryNotFoundError as error:
        problem = f"{where}: {name} is not in the cache and the Hub was not asked or did not answer"
        raise ArtefactNotFoundError(problem) from error
    except EntryNotFoundError as error:
        raise ArtefactNotFoundError(f"{where} has no {name}: it is no DACO {kind} release") from error
    except HFValidationError as error:
        hint = "; the revision goes apart (revision=, --revision)" if "@" in repo else ""
        raise ArtefactNotFoundError(
            f"expected an existing folder or a repo id `org/name`, got {repo!r}{hint}"
        ) from error
    except (HTTPError, OSError) as error:
        raise HubUnavailableError(
            f"{where}: could not fetch {name}: {type(error).__name__}; try again"
        ) from error


_READS = {"model": "SteeringSAE", "dataset": "ConceptDictionary"}


def _no_repo(repo: str, where: str, kind: str, token: str | bool | None) -> str:
    """What to say of a repo that is not there, which may be one of the other kind."""
    other = "dataset" if kind == "model" else "model"
    try:
        HfApi(token=token).repo_info(repo, repo_type=other, timeout=10)
    except (HTTPError, OSError, ValueError):
        return (
            f"expected a folder or a {kind} repo {where}, got neither; check the name and your login "
            "(`hf auth login`)"
        )
    return f"expected a {kind} repo, got the {other} repo {repo}; daco.{_READS[other]} loads it"


def _no_revision(repo: str, revision: str) -> str:
    """What to say of a revision that is not there; releases' tags start with v, which is easily left out."""
    meant = re.fullmatch(r"\d+\.\d+\.\d+", revision)
    hint = f"did you mean 'v{revision}'?" if meant else "list them with `HfApi().list_repo_refs`"
    return f"{repo} has no revision {revision!r}; {hint}"
