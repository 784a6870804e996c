"""A server of OpenAI's chat protocol for tests: labels what it is asked for, or misbehaves as ordered."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler"], None]


def good(concepts: list[dict[str, Any]]) -> str:
    """Labels by name: what begins with `bad` is undesirable, with `good` desirable."""
    sides = {"bad": "undesirable", "goo": "desirable"}
    return json.dumps(
        [
            {
                "number": c["number"],
                "polarity": sides.get(c["concept"][:3], "neutral"),
                "rationale": "its name",
            }
            for c in concepts
        ]
    )


class Stub:
    """What the server says, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.answer: Callable[[list[dict[str, Any]]], str] = good
        self.reply_to: Callable[[str], str] | None = None
        """Answers a prompt, where it is not about concepts."""
        self.at_once, self.most_at_once = 0, 0
        """Requests under way, and how many there were at most."""
        self.delay = 0.0
        """Seconds before each answer."""
        self.faults: list[Fault] = []
        """What happens to the next requests, one each, before it answers again."""
        self.asked: list[list[str]] = []
        """Names of the concepts of each request that was answered, or its prompt."""
        self.headers: list[dict[str, str]] = []
        """Headers of every request."""
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    stub: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.stub.lock:
            self.stub.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.stub.bodies.append(body)
            fault = self.stub.faults.pop(0) if self.stub.faults else None
        if fault:
            fault(self)
            return
        prompt = body["messages"][0]["content"]
        if self.stub.reply_to:
            self._reply_to(prompt)
            return
        concepts = [
            json.loads(line) for line in re.findall(r'^\{"number": \d+, "concept".*', prompt, re.MULTILINE)
        ]
        with self.stub.lock:
            self.stub.asked.append([concept["concept"] for concept in concepts])
        time.sleep(self.stub.delay)
        self.reply(200, chat(self.stub.answer(concepts)))

    def _reply_to(self, prompt: str) -> None:
        with self.stub.lock:
            self.stub.at_once += 1
            self.stub.most_at_once = max(self.stub.most_at_once, self.stub.at_once)
            self.stub.asked.append([prompt])
        time.sleep(self.stub.delay)
        with self.stub.lock:
            self.stub.at_once -= 1
        self.reply(200, chat(self.stub.reply_to(prompt)))  # type: ignore[misc]

    def reply(self, status: int, body: str, headers: dict[str, str] | None = None) -> None:
        content = body.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def chat(text: str) -> str:
    """An answer in the form of the protocol."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}
    )


def status(code: int, body: str = '{"error": "no"}', **headers: str) -> Fault:
    """Answer with a status; `retry_after` becomes the header."""
    return lambda handler: handler.reply(code, body, {n.replace("_", "-"): v for n, v in headers.items()})


def body(text: str) -> Fault:
    """Answer 200 with this body."""
    return lambda handler: handler.reply(200, text)


def hang_up(handler: Handler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True
    handler.connection.close()


def sleep_long(handler: Handler) -> None:
    """Answer after the client has gone."""
    time.sleep(0.6)
    handler.close_connection = True


@contextmanager
def chat_server() -> Iterator[Stub]:
    """Serve on a free port of the loopback."""
    stub = Stub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"stub": stub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
