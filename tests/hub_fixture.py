"""A local Hub for tests: on a free loopback port, with a fresh root, clients, and faults to order.

from hub_fixture import LocalHub, local_hub  # noqa: F401

def test_it(local_hub: LocalHub) -> None:
    local_hub.api().create_repo("org/name", repo_type="dataset")
    print(local_hub.run("from datasets import load_dataset; ..."))
"""

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.local.server import background, client_env

ROOT = Path(__file__).parents[1]
WRITER, READER = "hf_local", "hf_local_reader"


@dataclass
class Rule:
    """What to do with the next requests that match."""

    method: str
    path: str
    times: int
    status: int = 0
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False
    call: Callable[[], object] | None = None

    def matches(self, scope: Scope) -> bool:
        return self.times > 0 and scope["method"] == self.method and bool(re.search(self.path, scope["path"]))


class Faults:
    """Around the application: notes every request, and breaks those it was told to break."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.log: list[tuple[str, str, int]] = []
        """(method, path, status) of every answer."""
        self.rules: list[Rule] = []

    def around(self, app: ASGIApp) -> ASGIApp:
        self.app = app
        return self

    def fail(
        self,
        method: str,
        path: str,
        status: int,
        body: str = "<html>sorry</html>",
        times: int = 1,
        headers: dict[str, str] | None = None,
        after: bool = False,
    ) -> None:
        """Answer the next `times` matching requests with `status`; with `after`, do what they ask first."""
        self.rules.append(
            Rule(method, path, times, status, body, headers or {"content-type": "text/html"}, after)
        )

    def before(self, method: str, path: str, call: Callable[[], object], times: int = 1) -> None:
        """Call something before the next matching requests go on, for instance somebody else's commit."""
        self.rules.append(Rule(method, path, times, call=call))

    def seen(self, method: str, path: str) -> list[int]:
        """The statuses of the matching requests so far."""
        return [status for one, where, status in self.log if one == method and re.search(path, where)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.log.append((scope["method"], scope["path"], message["status"]))
            await send(message)

        rule = next((one for one in self.rules if one.matches(scope)), None)
        if rule is None:
            return await self.app(scope, receive, noted)
        rule.times -= 1
        if rule.call is not None:
            await run_in_threadpool(rule.call)
            return await self.app(scope, receive, noted)
        if rule.after:
            await self.app(scope, receive, nothing)
        await Response(rule.body, rule.status, rule.headers)(scope, receive, noted)


async def nothing(message: Message) -> None:
    """Drop an answer."""


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
def running(folder: Path, page: int = 1000) -> Iterator[LocalHub]:
    """A Hub whose root is `folder/hub`; open it again after closing to see what a restart keeps."""
    (folder / "home").mkdir(parents=True, exist_ok=True)
    faults = Faults()
    with background(folder / "hub", page=page, wrap=faults.around) as url:
        yield LocalHub(url, folder / "hub", folder / "home", faults)


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A fresh Hub, and this process as a client that uses git-LFS and never tells anybody."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with running(tmp_path) as hub:
        yield hub
