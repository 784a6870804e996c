"""Reads a release back from a Hub at its tag, into an empty cache, and compares every byte with the manifest.

Writes only to temporary folders.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from tqdm import tqdm

from daco.errors import FormatError, HubRefusedError, IntegrityError, VerificationError
from daco.manifest import MANIFEST, check_file, parse_manifest
from hub import retry
from hub.plan import KEPT
from hub.remote import Target, own_bars


def verify(target: Target, tag: str, manifest: bytes | None = None) -> str:
    """Compare what the Hub serves at a tag with the release's manifest.

    Args:
        target: The repo.
        tag: The release's tag; a commit or branch works too.
        manifest: The bytes that `manifest.json` must have; None takes the repo's own.

    Returns:
        The commit behind the tag.

    Raises:
        VerificationError: lists everything that differs.
        HubRefusedError: no such repo or tag, or no right to read it.
        HubUnavailableError: the Hub did not answer within the bounded retries.
    """
    api, kind = target.api, target.repo_type
    info = retry.call(
        f"{target} at {tag}",
        target.secret,
        lambda: api.repo_info(target.repo_id, repo_type=kind, revision=tag),
    )
    commit = str(info.sha)
    there = retry.call(f"{target} at {tag}", target.secret, lambda: target.files(commit))
    with own_bars():
        problems, files = _manifest(target, commit, manifest)
        unlisted = sorted(set(there) - {*files, MANIFEST, *KEPT}) if files else []
        problems += [f"{name}: not in the manifest" for name in unlisted]
        for name, entry in tqdm(sorted(files.items()), desc="verify", unit="file", disable=None):
            problems += _problems(target, commit, name, entry)
    if problems:
        raise VerificationError(
            f"{target} at {tag} differs from its manifest; publish again under a higher version:\n- "
            + "\n- ".join(retry.redact(problem, target.secret) for problem in problems)
        )
    return commit


def _manifest(target: Target, commit: str, expected: bytes | None) -> tuple[list[str], Mapping[str, Any]]:
    """Problems of the manifest itself, and the files it lists."""
    with tempfile.TemporaryDirectory() as cache:
        try:
            content = _fetch(target, commit, MANIFEST, cache).read_bytes()
            files = parse_manifest(content)["files"]
        except (HubRefusedError, FormatError) as error:
            return [str(error)], {}
    if expected is not None and content != expected:
        return [f"{MANIFEST}: expected the bytes of the local one, got others"], files
    return [], files


def _problems(target: Target, commit: str, name: str, entry: Mapping[str, Any]) -> list[str]:
    with tempfile.TemporaryDirectory() as cache:
        try:
            check_file(_fetch(target, commit, name, cache), entry, name)
        except (HubRefusedError, IntegrityError) as error:
            return [str(error)]
    return []


def _fetch(target: Target, commit: str, name: str, cache: str) -> Path:
    """Download one file into an empty cache, so that nothing stored here can stand in for it."""
    options = {"repo_type": target.repo_type, "revision": commit, "cache_dir": cache}
    path = retry.call(
        name,
        target.secret,
        lambda: hf_hub_download(
            target.repo_id, name, endpoint=target.endpoint, token=target.token, **options
        ),
    )
    return Path(path)
