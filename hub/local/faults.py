"""Bad days of a Hub, to order: an application around the local one that notes every request and breaks some.

faults = Faults()
with background(root, wrap=faults.around) as url:
    faults.fail("POST", "/commit/", 504, landed=True)   # the commit is made, and the answer is lost
    faults.fail("GET", "/resolve/", drop=True, nth=2)   # the second download breaks off in its middle
"""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HTML = "<html>sorry</html>"
"""What a real Hub's front says instead of JSON when it is in trouble."""


class Dropped(Exception):
    """Makes the server close the connection in the middle of an answer; it is no error worth a traceback."""


def _worth_telling(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[0] is Dropped)


logging.getLogger("uvicorn.error").addFilter(_worth_telling)


@dataclass
class Rule:
    """What to do with requests that match, from the `nth` on, `times` often."""

    method: str
    path: str
    times: int = 1
    nth: int = 1
    status: int = 0
    body: str = HTML
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "text/html"})
    landed: bool = False
    drop: bool = False
    wait: float = 0.0
    call: Callable[[], object] | None = None
    seen: int = 0

    def takes(self, scope: Scope) -> bool:
        """Whether this request is to be broken; counts those that match."""
        if scope["method"] != self.method or not re.search(self.path, scope["path"]):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class Faults:
    """Around the application: notes every request, and breaks those it was told to break."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.log: list[tuple[str, str, int]] = []
        """(method, path, status) of every answer; 0 where the connection was dropped."""
        self.rules: list[Rule] = []

    def around(self, app: ASGIApp) -> ASGIApp:
        """Stand before `app`; what `hub.local.server.background` takes as `wrap`."""
        self.app = app
        return self

    def fail(
        self,
        method: str,
        path: str,
        status: int = 503,
        body: str = HTML,
        times: int = 1,
        headers: dict[str, str] | None = None,
        *,
        nth: int = 1,
        landed: bool = False,
        drop: bool = False,
        wait: float = 0.0,
    ) -> None:
        """Break requests whose path has `path` (a regular expression) in it.

        Args:
            method: GET, POST ...
            path: Regular expression, searched in the path.
            status: What is answered.
            body: Its body.
            times: How many requests are broken.
            headers: Its headers; None says it is HTML.
            nth: The first one that is broken, from 1.
            landed: Do what the request asks first.
            drop: Close the connection in the middle of the body instead.
            wait: Seconds before the answer.
        """
        more = {} if headers is None else {"headers": headers}
        rule = Rule(method, path, times, nth, status, body, landed=landed, drop=drop, wait=wait, **more)
        self.rules.append(rule)

    def before(
        self, method: str, path: str, call: Callable[[], object], times: int = 1, nth: int = 1
    ) -> None:
        """Call something before matching requests go on, for instance somebody else's commit."""
        self.rules.append(Rule(method, path, times, nth, call=call))

    def answered(self, method: str, path: str) -> list[int]:
        """The statuses of the matching requests so far."""
        return [status for one, where, status in self.log if one == method and re.search(path, where)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or break it."""
        assert self.app is not None

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.log.append((scope["method"], scope["path"], message["status"]))
            await send(message)

        taking = [rule for rule in self.rules if rule.takes(scope)]
        if not taking:
            return await self.app(scope, receive, noted)
        await self._broken(taking[0], scope, receive, noted)

    async def _broken(self, rule: Rule, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        await asyncio.sleep(rule.wait)
        if rule.call is not None:
            await run_in_threadpool(rule.call)
            return await self.app(scope, receive, send)
        if rule.landed:
            await self.app(scope, receive, _nothing)
        if rule.drop:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"999")]}
            )
            await send({"type": "http.response.body", "body": b"{", "more_body": True})
            raise Dropped
        await Response(rule.body, rule.status, rule.headers)(scope, receive, send)


async def _nothing(message: Message) -> None:
    """Drop an answer."""
