"""Bad days of a Hub, to order: an application around the local one that notes every request and breaks some.

faults = Faults()
with background(root, wrap=faults.around) as url:
    faults.fail("POST", "/commit/", 504, landed=True)   # the commit is made, and the answer is lost
    faults.fail("GET", "/resolve/", drop=True, nth=2)   # the second download breaks off in its middle
    faults.fail("GET", "/resolve/", slow=9.0)           # a download trickles for nine seconds
    faults.stale("GET", "/refs$", times=2)              # two answers are what the last one before said
"""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.local.app import STRANGE

PARTS = 10
"""Pieces in which a slow body comes."""

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
    slow: float = 0.0
    stale: bool = False
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
        self.bodies: list[tuple[str, str, bytes]] = []
        """(method, path, body) of every request but uploads, while `recording`."""
        self.recording = False
        self.strange: list[str] = []
        """What clients asked that this Hub does not know."""
        self.rules: list[Rule] = []
        self._answers: dict[tuple[str, str], list[Message]] = {}

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
        slow: float = 0.0,
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
            slow: Do what the request asks, and let the answer's body come byte by byte over these seconds.
        """
        rule = Rule(method, path, times, nth, status, body, landed=landed, drop=drop, wait=wait, slow=slow)
        if headers is not None:
            rule.headers = headers
        self.rules.append(rule)

    def stale(self, method: str, path: str, times: int = 1, nth: int = 1) -> None:
        """Answer matching requests as the same request was answered the last time, as a lagging copy does."""
        self.rules.append(Rule(method, path, times, nth, stale=True))

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

        where = scope["method"], scope["raw_path"].decode() + "?" + scope["query_string"].decode()
        answer: list[Message] = []

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.log.append((scope["method"], scope["path"], message["status"]))
                self._note_strange(scope, message)
            if scope["method"] == "GET" and "/api/" in scope["path"]:
                answer.append(message)
            await send(message)

        if self.recording and not scope["path"].startswith("/lfs/"):
            receive = self._recorded(scope, receive)
        taking = [rule for rule in self.rules if rule.takes(scope)]
        if taking and taking[0].stale and where in self._answers:
            for message in self._answers[where]:
                await noted(message)
            return
        if not taking or taking[0].stale:
            await self.app(scope, receive, noted)
            if answer:
                self._answers[where] = answer
            return
        await self._broken(taking[0], scope, receive, noted)

    def _note_strange(self, scope: Scope, start: Message) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in start["headers"]}
        if headers.get(b"x-error-code") == STRANGE:
            self.strange.append(f"{scope['method']} {scope['path']}: {headers.get(b'x-error-message')}")

    def _recorded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, which keeps what comes."""
        body = bytearray()

        async def kept() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    self.bodies.append((scope["method"], scope["path"], bytes(body)))
            return message

        return kept

    async def _broken(self, rule: Rule, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        await asyncio.sleep(rule.wait)
        if rule.call is not None:
            await run_in_threadpool(rule.call)
            return await self.app(scope, receive, send)
        if rule.slow:
            return await self.app(scope, receive, _trickling(send, rule.slow))
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


def _trickling(send: Send, seconds: float) -> Send:
    """`send`, with each part of a body in `PARTS` pieces over these seconds."""

    async def slowly(message: Message) -> None:
        body = message.get("body", b"")
        if message["type"] != "http.response.body" or not body:
            return await send(message)
        size = -(-len(body) // PARTS)
        for at in range(0, len(body), size):
            await asyncio.sleep(seconds / PARTS)
            await send({"type": "http.response.body", "body": body[at : at + size], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": message.get("more_body", False)})

    return slowly
