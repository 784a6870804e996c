"""Runs the local Hub over HTTP, for unmodified huggingface_hub, datasets and daco clients.

Keeps everything in a `Store`. It is never kinder than the real one: what it does not know it refuses.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from hub.local import files, repos  # noqa: F401  they register what the Hub answers
from hub.local.app import TOKENS, Hub
from hub.local.store import Store


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket (port 0: any free one) and the URL it is reached by."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((host, port))
    found.listen(128)
    return found, f"http://{host}:{found.getsockname()[1]}"


def runner(app: ASGIApp) -> uvicorn.Server:
    """uvicorn without an access log: it would print the signatures of upload links."""
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", lifespan="off", timeout_graceful_shutdown=2
    )
    return uvicorn.Server(config)


def serve(
    root: Path, host: str = "127.0.0.1", port: int = 0, tokens: Mapping[str, str] = TOKENS, page: int = 1000
) -> None:
    """Serve the Hub kept in `root` until interrupted; prints its URL when it is ready.

    Args:
        root: folder of the store, made if missing.
        host: address to listen on; keep it on the loopback, the tokens are no secrets.
        port: 0 picks a free one.
        tokens: bearer tokens and what each may do, "read" or "write".
        page: entries of one page of a tree listing.

    Raises:
        BlockingIOError: another process serves this folder.
    """
    store = Store(root)
    try:
        where, url = listen(host, port)
        print(f"Hub ready at {url} (root {root})", flush=True)
        runner(Hub(store, tokens, page).app).run(sockets=[where])
    finally:
        store.close()


@contextmanager
def background(
    root: Path,
    tokens: Mapping[str, str] = TOKENS,
    page: int = 1000,
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> Iterator[str]:
    """The Hub kept in `root` on a free loopback port, in a thread, while the block runs.

    Args:
        root: folder of the store, made if missing.
        tokens: bearer tokens and what each may do, "read" or "write".
        page: entries of one page of a tree listing.
        wrap: puts something around the application, for instance one that fails now and then.

    Yields:
        Its URL.
    """
    store = Store(root)
    where, url = listen("127.0.0.1", 0)
    server = runner(wrap(Hub(store, tokens, page).app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [where]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join()
        where.close()
        store.close()


def client_env(url: str, home: Path, token: str | None = "hf_local") -> dict[str, str]:
    """The environment in which an unmodified client talks to the Hub at `url` and to nothing else.

    Args:
        url: of the Hub; huggingface_hub reads it once, when it is imported.
        home: an own folder for caches, so that nothing of the user's is read or written.
        token: what the client sends; None for nobody.
    """
    keep = {
        name: os.environ[name]
        for name in ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")
        if name in os.environ
    }
    off = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "DO_NOT_TRACK")
    bars = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    env = (
        keep | dict.fromkeys((*off, *bars), "1") | {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1"}
    )
    env |= {
        "HF_ENDPOINT": url,
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "OMP_NUM_THREADS": "1",
    }
    return env | ({"HF_TOKEN": token} if token is not None else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})
