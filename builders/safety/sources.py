"""Where a suite's files are: a local folder, or a data set of the Hub at one commit.

Reads through huggingface_hub's cache, so `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and tokens work.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from daco.errors import ArtefactNotFoundError, CorpusError, HubUnavailableError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Source(NamedTuple):
    """A folder with the files of a suite."""

    folder: Path
    commit: str
    """Of the data set on the Hub; empty for a folder."""


def folder_of(source: str, revision: str, patterns: Sequence[str]) -> Source:
    """The folder of a suite; from the Hub, the files that match `patterns`, at the commit behind `revision`.

    The revision is resolved once. An existing folder wins over a Hub id.

    Raises:
        CorpusError: it is neither a folder nor a Hub id, or a folder with a revision.
        ArtefactNotFoundError: no such data set or revision, or no right to read it.
        HubUnavailableError: the Hub does not answer, and its files are not in the cache.
    """
    if (folder := Path(source)).is_dir():
        if revision:
            raise CorpusError(f"{folder} is a folder, which has no revision {revision!r}; leave revision out")
        return Source(folder, "")
    if not _HUB_ID.fullmatch(source) or folder.exists():
        raise CorpusError(f"expected a folder or a Hub id such as 'org/name', got {source!r}")
    name = f"{source}@{revision}" if revision else source
    try:
        snapshot = snapshot_download(
            source, repo_type="dataset", revision=revision or None, allow_patterns=list(patterns)
        )
    except GatedRepoError as error:
        raise ArtefactNotFoundError(
            f"{name}: expected the right to read it, got a gated data set; accept its terms on the Hub and "
            "run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ArtefactNotFoundError(
            f"expected a folder or a data set on the Hub at {name!r}, got {type(error).__name__}; check the "
            "name and the revision"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise HubUnavailableError(
            f"{name}: expected an answer of the Hub, got {error}; try again, or give a folder"
        ) from error
    return Source(Path(snapshot), Path(snapshot).name)
