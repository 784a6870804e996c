"""Every fault at every endpoint that publishing uses, and SIGKILL at drawn points: what is left on the Hub?

Prints a table, and ends with 1 if anything was lost, doubled or mixed: `python tests/fault_matrix.py`.
Each cell publishes a small dataset release to a fresh local Hub of which one answer is broken, and once more
if that ended in an error; then the Hub must hold what it holds after publishing in peace: one commit, one
tag, the same files. `test_fault_matrix.py` runs a few cells of it.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import huggingface_hub.constants
from hub_fixture import ROOT, WRITER, LocalHub, running
from huggingface_hub.hf_api import RepoFile
from release_fixture import write_dataset_release

from daco.errors import DacoError
from daco.manifest import MANIFEST, read_manifest
from hub import remote, retry
from hub.local.server import client_env
from hub.plan import Access
from hub.publish import publish
from hub.remote import Target
from hub.stage import stage
from hub.verify import verify

REPO = "org/DACO-tiny"

ACCESS = Access(gated="manual")
"""Every cell gates its repo too, so that these calls are among those that break."""

ENDPOINTS = {
    "list refs": ("GET", "/refs$"),
    "create repo": ("POST", "/repos/create$"),
    "repo facts": ("GET", "/api/datasets/[^/]+/[^/]+$"),
    "gate": ("PUT", "/settings$"),
    "list files": ("GET", "/tree/"),
    "how to upload": ("POST", "/preupload/"),
    "LFS batch": ("POST", "/objects/batch$"),
    "LFS upload": ("PUT", "^/lfs/"),
    "LFS verify": ("POST", "/lfs/verify$"),
    "check card": ("POST", "/validate-yaml$"),
    "commit": ("POST", "/commit/"),
    "tag": ("POST", "/tag/"),
    "look up tag": ("GET", "/revision/"),
    "file facts": ("HEAD", "/resolve/"),
    "download": ("GET", "/resolve/"),
}

ONCE = ("create repo", "gate", "check card", "commit", "tag", "look up tag")
"""Calls of which publishing in peace makes one."""

JSON = {"content-type": "application/json"}

FAULTS: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "body": "{}", "headers": JSON | {"retry-after": "3"}},
    "500": {"status": 500, "body": "{}", "headers": JSON},
    "503 HTML": {"status": 503},
    "504 landed": {"status": 504, "landed": True},
    "dropped": {"drop": True},
    "landed, dropped": {"drop": True, "landed": True},
    "time-out": {"status": 504, "landed": True, "wait": 3.0},
    "412": {"status": 412, "body": "{}", "headers": JSON},
    "409": {"status": 409, "body": "{}", "headers": JSON},
}
"""`time-out`: what was asked is done, and the client has given up by the time the answer comes."""

PATIENCE = 1.0
"""Seconds that the client waits for an answer here."""


@dataclass(frozen=True)
class Outcome:
    """What a cell came to."""

    errors: int
    """Runs that ended in an error of ours before one finished."""
    wrong: str
    """What the Hub holds that it should not, or lacks; empty where all is well."""
    asked: bool = True
    """Whether there was such a call; where not, nothing was broken."""

    def __str__(self) -> str:
        if not self.asked:
            return "no such call"
        return self.wrong or ("ok" if not self.errors else f"ok, run {self.errors + 1} x")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Retries follow at once, ours and huggingface_hub's; uploads go by git-LFS, whose calls we can break."""
    with (
        mock.patch.object(retry, "sleep"),
        mock.patch("huggingface_hub.utils._http.time.sleep"),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True),
        mock.patch.object(remote, "PATIENCE", PATIENCE),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", PATIENCE),
        mock.patch("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", PATIENCE),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def gate_open() -> Iterator[None]:
    """The gate needs no network and is slow: it is not asked each time."""
    with mock.patch("hub.publish.check_release", return_value=[]):
        yield


def target(hub: LocalHub) -> Target:
    """The repo on this Hub."""
    return Target(REPO, "dataset", hub.url, WRITER)


@cache
def release() -> Path:
    """The release that every cell publishes."""
    folder = write_dataset_release(Path(tempfile.mkdtemp(prefix="daco-faults-")) / "release")
    stage(folder)
    return folder


@cache
def undisturbed() -> dict[str, Any]:
    """What a Hub holds after it was published in peace."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as hub:
        publish(release(), target(hub), ACCESS)
        return held(hub)


def held(hub: LocalHub) -> dict[str, Any]:
    """History, tags and files at the tag."""
    api = hub.api()
    refs = api.list_repo_refs(REPO, repo_type="dataset")
    files = api.list_repo_tree(REPO, repo_type="dataset", recursive=True, revision="v1.0.0")
    return {
        "gated": api.repo_info(REPO, repo_type="dataset").gated,
        "commits": [commit.title for commit in api.list_repo_commits(REPO, repo_type="dataset")],
        "tags": {tag.name: tag.target_commit for tag in refs.tags},
        "files": {file.path: file.blob_id for file in files if isinstance(file, RepoFile)},
    }


def difference(hub: LocalHub) -> str:
    """How the Hub differs from the undisturbed one."""
    found = held(hub)
    return ", ".join(name for name, value in undisturbed().items() if found[name] != value)


def cell(endpoint: str, fault: str, nth: int) -> Outcome:
    """Publish with the `nth` call of an endpoint broken, or the first two where there is one in peace."""
    method, path = ENDPOINTS[endpoint]
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as hub, no_waiting(), gate_open():
        if endpoint in ONCE:  # a second call follows a first that failed
            hub.faults.fail(method, path, times=nth, **FAULTS[fault])
        else:
            hub.faults.fail(method, path, nth=nth, **FAULTS[fault])
        errors = 0
        while errors < 3:
            try:
                publish(release(), target(hub), ACCESS)
                break
            except DacoError:
                errors += 1
        asked = hub.faults.rules[0].seen >= nth
        hub.faults.rules.clear()
        return Outcome(errors, "never finished" if errors == 3 else difference(hub), asked)


PUBLISH = """
import sys
from hub.__main__ import main
sys.argv = ["hub", "publish", sys.argv[1], "--endpoint", sys.argv[2], "--gated", "manual"]
sys.exit(main())
"""


def killed(at: int) -> Outcome:
    """Publish in a process that is killed when the Hub gets its `at`-th request, then once more."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as hub:
        first = start(hub)
        threading.Thread(target=kill_at, args=(hub, first, at), daemon=True).start()
        first.wait(120)
        errors = 0 if first.returncode == 0 else 1
        again = start(hub)
        again.wait(120)
        return Outcome(errors, difference(hub) if again.returncode == 0 else "never finished")


def start(hub: LocalHub, folder: Path | None = None) -> "subprocess.Popen[bytes]":
    """Publish in a process of its own."""
    env = client_env(hub.url, hub.home, WRITER) | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PUBLISH, str(folder or release()), hub.url]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_at(hub: LocalHub, process: "subprocess.Popen[bytes]", at: int) -> None:
    """Kill it as soon as that many requests were answered."""
    while process.poll() is None:
        if len(hub.faults.log) >= at:
            os.kill(process.pid, signal.SIGKILL)
            return
        threading.Event().wait(0.001)


def matrix(endpoints: list[str]) -> bool:
    """Print the table; whether all is well."""
    width = max(map(len, ENDPOINTS))
    print(f"{'call':<{width}}  n  " + "  ".join(f"{name:<12}" for name in FAULTS))
    well = True
    for endpoint in endpoints:
        for nth in (1, 2):
            outcomes = [cell(endpoint, fault, nth) for fault in FAULTS]
            well &= not any(outcome.wrong for outcome in outcomes)
            print(f"{endpoint:<{width}}  {nth}  " + "  ".join(f"{one!s:<12}" for one in outcomes), flush=True)
    return well


def at_once(first: Path, second: Path) -> str:
    """Publish two releases of one repo from two processes at once; what is wrong then, empty if nothing."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as hub:
        both = [start(hub, one) for one in (first, second)]
        ended = [one.wait(120) for one in both]
        if first == second:
            return difference(hub) if ended == [0, 0] else f"ended with {ended}"
        if sorted(ended) != [0, 1]:
            return f"expected one to win, they ended with {ended}"
        winner = (first, second)[ended.index(0)]
        tag = f"v{read_manifest(winner)['version']}"
        commit = verify(target(hub), tag, (winner / MANIFEST).read_bytes())
        api = hub.api()
        commits = [one.commit_id for one in api.list_repo_commits(REPO, repo_type="dataset")]
        tags = {one.name: one.target_commit for one in api.list_repo_refs(REPO, repo_type="dataset").tags}
    return "" if tags == {tag: commit} and commits[:-1] == [commit] else f"tags {tags}, commits {commits}"


def races(n: int) -> bool:
    """Two publishers at once, `n` times, of the same release and of two versions; whether all is well."""
    newer = release().with_name("newer")
    if not newer.exists():
        write_dataset_release(newer, version="1.1.0")
        stage(newer)
    well = True
    for what, second in (("the same release", release()), ("two versions", newer)):
        wrong = [problem for problem in (at_once(release(), second) for _ in range(n)) if problem]
        well &= not wrong
        print(f"two publishers at once, {what}, {n} times: {', '.join(wrong) or 'ok'}", flush=True)
    return well


def kills(n: int, seed: int) -> bool:
    """Kill at `n` drawn requests; whether all is well."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as hub:
        publish(release(), target(hub), ACCESS)
        requests = len(hub.faults.log)
    well = True
    for at in sorted(random.Random(seed).sample(range(1, requests), min(n, requests - 1))):
        outcome = killed(at)
        well &= not outcome.wrong
        print(f"SIGKILL at request {at:>3} of {requests}: {outcome}", flush=True)
    return well


def main() -> int:
    """Run the whole of it, or a part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=ENDPOINTS, action="append", help="this endpoint alone")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--races", type=int, default=5, help="of two publishers, of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    huggingface_hub.logging.set_verbosity_error()
    well = matrix(arguments.only or [*ENDPOINTS])
    well &= kills(arguments.kills, arguments.seed)
    return 0 if races(arguments.races) and well else 1


if __name__ == "__main__":
    sys.exit(main())
