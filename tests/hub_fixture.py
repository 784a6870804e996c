"""A local Hub for tests: on a free loopback port, with a fresh root, clients, and faults to order.

from hub_fixture import LocalHub, local_hub  # noqa: F401

def test_it(local_hub: LocalHub) -> None:
    local_hub.api().create_repo("org/name", repo_type="dataset")
    print(local_hub.run("from datasets import load_dataset; ..."))
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from hub.local.faults import Faults
from hub.local.server import background, client_env

ROOT = Path(__file__).parents[1]
WRITER, READER = "hf_local", "hf_local_reader"


@dataclass
class LocalHub:
    """A running Hub and how to talk to it."""

    url: str
    root: Path
    home: Path
    faults: Faults

    def api(self, token: str | None = WRITER) -> HfApi:
        """A client of this process; None sends no token."""
        return HfApi(endpoint=self.url, token=token if token is not None else False)

    def run(self, code: str, *arguments: str, token: str | None = WRITER, **env: str) -> str:
        """Run Python code in a fresh process whose Hub this is; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=client_env(self.url, self.home, token) | {"PYTHONPATH": str(ROOT)} | env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


@contextlib.contextmanager
def running(folder: Path, page: int = 1000, strict: bool = True) -> Iterator[LocalHub]:
    """A Hub whose root is `folder/hub`; open it again after closing to see what a restart keeps.

    A client that asked for something which the Hub does not know fails the test, unless not `strict`.
    """
    (folder / "home").mkdir(parents=True, exist_ok=True)
    faults = Faults()
    with background(folder / "hub", page=page, wrap=faults.around) as url:
        yield LocalHub(url, folder / "hub", folder / "home", faults)
    assert not (strict and faults.strange), faults.strange


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A fresh Hub, and this process as a client that uses git-LFS and never tells anybody."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with running(tmp_path) as hub:
        yield hub
