"""Images come back from tars and from a server that misbehaves; what does not come is counted by reason."""

import hashlib
import http.server
import io
import multiprocessing
import os
import signal
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from pictures import make_folder
from PIL import Image
from small_run import digests
from test_webdataset import write_tars

from builders import corpus, join_images
from builders.join_images import Limits, Refused, _Fetch, _is_public, counts_of
from builders.recipe import CorpusConfig
from daco.errors import CorpusError
from daco.tables import STIMULI, read_table, table_of, write_table


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (7 + i, 5), (i, 2 * i, 3 * i)).save(buffer, "PNG")
    return buffer.getvalue()


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """`/ok/3.png` is an image; every other path goes wrong in its own way."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        what = self.path.split("/")[1]
        if what == "ok":
            return self.answer(png(int(self.path.split("/")[2].split(".")[0])))
        if what == "moved":
            return self.answer(b"", 302, ("Location", "/ok/4.png"))
        if what == "round":
            return self.answer(b"", 302, ("Location", self.path))
        if what == "file":
            return self.answer(b"", 302, ("Location", "file:///etc/passwd"))
        if what == "gone":
            return self.answer(b"no", 404)
        if what == "error":
            return self.answer(b"no", 503)
        if what == "html":
            return self.answer(b"<html>we moved</html>")
        if what == "large":
            return self.answer(b"x" * 60_000)
        if what == "short":
            return self.answer(png(1)[:40], 200, ("X-Odd", "1"), length=4000)
        if what == "drip":
            return self.drip()
        self.close_connection = True
        self.connection.close()
        return None

    def answer(self, body: bytes, code: int = 200, *headers: tuple[str, str], length: int = -1) -> None:
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        """A byte now and then, for ever: no single read takes long."""
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            return

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    class Threading(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

    Misbehaving.asked = []
    with Threading(("127.0.0.1", 0), Misbehaving) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


LIMITS = Limits(workers=4, seconds=1.0, max_bytes=50_000, shard_rows=3, private=True)


def stimuli(path: Path, urls: list[str], digests_of: dict[int, str] | None = None) -> Path:
    rows = [
        {"stimulus_id": f"{i:016x}", "caption": f"picture {i}", "image_url": url, "source": "s", "width": 0,
         "height": 0, "source_key": f"{i:09d}", "image_sha256": (digests_of or {}).get(i, "")}
        for i, url in enumerate(urls)
    ]  # fmt: skip
    write_table(path, table_of(rows, STIMULI))
    return path


def test_what_comes_is_written_and_what_does_not_is_counted(tmp_path: Path, server: str) -> None:
    paths = [
        "ok/0.png",
        "moved",
        "gone",
        "error",
        "html",
        "large",
        "short",
        "drip",
        "hangup",
        "round",
        "file",
    ]
    urls = [*(f"{server}/{path}" for path in paths), "ftp://example.org/x.png", "http://[bad", ""]
    urls += ["http://no-such-host.invalid/x.png", f"{server}/ok/15.png", f"{server}/ok/16.png"]
    told = {15: hashlib.sha256(png(15)).hexdigest(), 16: "0" * 64}
    begun = time.monotonic()
    counts = join_images.join_images(
        stimuli(tmp_path / "s.parquet", urls, told), tmp_path / "out", None, LIMITS, True
    )
    assert time.monotonic() - begun < 20
    assert dict(counts) == {
        "in": 17, "out": 3, "unverified": 2, "dead_link": 2, "http_503": 1, "unreadable_image": 1,
        "too_large": 1, "broken_answer": 2, "timeout": 1, "redirects": 2, "not_http": 2, "bad_url": 1,
        "other_image": 1,
    }  # fmt: skip
    assert counts_of(tmp_path / "out") == dict(counts)
    rows = read_table(tmp_path / "out" / "images.parquet").to_pylist()
    assert [(row["stimulus_id"][-1:], row["width"], row["verified"]) for row in rows] == [
        ("0", 7, False), ("1", 11, False), ("f", 22, True)]  # fmt: skip
    assert (tmp_path / "out" / rows[2]["image"]).read_bytes() == png(15)
    failed = read_table(tmp_path / "out" / "failed.parquet").to_pylist()
    assert {row["reason"] for row in failed if row["image_url"].endswith("drip")} == {"timeout"}
    assert len(failed) == 14


def test_what_came_is_a_corpus_with_the_same_ids(tmp_path: Path, server: str) -> None:
    lines = [f"a red thing {i}\t{server}/ok/{i}.png" for i in range(4)]
    (tmp_path / "cc3m.tsv").write_text("\n".join(lines) + f"\n{lines[0]}\n")
    counts = join_images.join_images(tmp_path / "cc3m.tsv", tmp_path / "out", None, LIMITS, True)
    assert dict(counts) == {"in": 5, "out": 4, "unverified": 4, "duplicate_id": 1}
    rows = read_table(tmp_path / "out" / "images.parquet").to_pylist()
    assert rows[1]["caption"] == "a red thing 1"
    config = CorpusConfig(kind="table", path=str(tmp_path / "out" / "images.parquet"), url_column="image_url",
                          key_column="source_key", name="cc3m")  # fmt: skip
    for row, pair in zip(rows, corpus.read_pairs(config), strict=True):
        found = corpus.check_pair(pair, "cc3m", tmp_path / "out", tmp_path)  # type: ignore[arg-type]
        assert {name: found[name] for name in STIMULI.names} == {name: row[name] for name in STIMULI.names}


def test_private_addresses_are_never_asked(server: str) -> None:
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433"):
        with pytest.raises(Refused, match=r"private_address|dead_link"):
            _Fetch(Limits(seconds=2)).read(f"http://{host}:{port}/ok/1.png")
    assert Misbehaving.asked == []
    for private in (
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "fe80::1%eth0",
        "::1",
        "224.0.0.1",
    ):
        assert not _is_public(private)
    assert _is_public("93.184.216.34")
    assert _is_public("2606:2800:220:1::1")


def test_tars_give_images_by_key_and_digest(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 12)
    tars = write_tars(tmp_path / "tars", pictures)
    told = {
        i: hashlib.sha256((pictures / f"{i:03d}.png").read_bytes()).hexdigest() for i in range(13) if i < 12
    }
    source = stimuli(tmp_path / "s.parquet", [""] * 13, told | {2: "0" * 64})
    counts = join_images.join_images(source, tmp_path / "out", tars, LIMITS, True)
    assert dict(counts) == {"in": 13, "out": 11, "other_image": 1, "not_in_tars": 1}
    row = read_table(tmp_path / "out" / "images.parquet").to_pylist()[5]
    assert (tmp_path / "out" / row["image"]).read_bytes() == (pictures / "006.png").read_bytes()


def test_a_run_that_was_killed_asks_for_no_finished_shard_again(tmp_path: Path, server: str) -> None:
    urls = [f"{server}/ok/{i}.png" for i in range(9)]
    told = {i: hashlib.sha256(png(i)).hexdigest() for i in range(9)}
    source = stimuli(tmp_path / "s.parquet", [*urls[:7], f"{server}/drip", urls[8]], told)
    process = multiprocessing.get_context("fork").Process(
        target=join_images.join_images, args=(source, tmp_path / "killed", None, LIMITS, True)
    )
    process.start()
    while not (tmp_path / "killed" / "shards" / "000001.parquet").is_file() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "killed" / "images.parquet").is_file()
    before = len(Misbehaving.asked)
    join_images.join_images(source, tmp_path / "killed", None, LIMITS, True)
    assert len(Misbehaving.asked) - before <= 3
    join_images.join_images(source, tmp_path / "whole", None, LIMITS, True)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,words\na,b\n")
    with pytest.raises(
        CorpusError, match=r"expected columns 'image_url' and 'caption', got \['image', 'words'\]"
    ):
        join_images.join_images(tmp_path / "t.csv", tmp_path / "out", None, LIMITS, True)
    with pytest.raises(CorpusError, match="expected a run folder or a release with stimuli"):
        join_images.join_images(tmp_path, tmp_path / "out2", None, LIMITS, True)


def test_a_run_folder_gives_its_linked_stimuli(tmp_path: Path, server: str) -> None:
    (tmp_path / "run" / "corpus").mkdir(parents=True)
    (tmp_path / "run" / "stimuli").mkdir()
    stimuli(tmp_path / "run" / "corpus" / "stimuli.parquet", [f"{server}/ok/{i}.png" for i in range(5)])
    links = read_table(tmp_path / "run" / "corpus" / "stimuli.parquet").select(["stimulus_id"]).slice(1, 2)
    pq.write_table(links, tmp_path / "run" / "stimuli" / "links.parquet")
    counts = join_images.join_images(tmp_path / "run", tmp_path / "out", None, LIMITS, True)
    assert (counts["in"], counts["out"]) == (2, 2)
