"""Brings the pixels of stimuli back, from tars or from the web: a release of CC-3M carries none.

Reads the stimuli of a release or a run, or a table of URLs and captions; writes `images/`, `images.parquet`
(one row an image that came, readable by `corpus.kind = "table"`), `failed.parquet` and `counts.json`. Running
again resumes. Only http and https, no private addresses, limits of size and time; sha256 compared if known.
"""

import contextlib
import hashlib
import http.client
import ipaddress
import itertools
import json
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from builders import webdataset
from builders.corpus import SUFFIXES, image_suffix, open_image, read_rows, stimulus_id
from daco.errors import CorpusError
from daco.manifest import canonical_json, write_atomic
from daco.tables import STIMULI, read_table, table_of, write_table

JOINED = STIMULI.append(pa.field("image", pa.string())).append(pa.field("verified", pa.bool_()))
"""Columns of `images.parquet`: `image` is the file's path beside it, `verified` that its sha256 was known."""

ANSWERS = JOINED.append(pa.field("reason", pa.string()))
"""Columns of a shard; `reason` is empty where the image came."""

FAILED = pa.schema([("stimulus_id", pa.string()), ("image_url", pa.string()), ("reason", pa.string())])
"""Columns of `failed.parquet`."""

URL_COLUMNS, CAPTION_COLUMNS = ("image_url", "url", "URL"), ("caption", "TEXT", "text")


@dataclass(frozen=True)
class Limits:
    """What an image from the web may cost."""

    workers: int = 16
    """Images asked for at once."""
    seconds: float = 30.0
    """Time for one image, redirects included."""
    max_bytes: int = 20_000_000
    """Size of one image."""
    shard_rows: int = 1_000
    """Images that are done or not done together."""
    private: bool = False
    """Whether private addresses may be asked: for tests with a server of their own alone."""


class Refused(Exception):
    """An image that does not come, with the reason that is counted."""


# What is wanted.


def read_wanted(source: Path) -> Iterator[dict[str, Any]]:
    """Rows of STIMULI of a release, a run folder, a parquet file of stimuli, or a table of URLs and captions.

    A `.tsv` without a header is read as CC-3M is published: caption, URL.

    Raises:
        CorpusError: there is nothing of the kind.
    """
    if source.is_dir():
        yield from _of_folder(source)
        return
    columns, rows = read_rows(source)
    if {"stimulus_id", "image_url", "image_sha256"} <= set(columns):
        yield from rows
        return
    if len(columns) == 2 and columns[1].startswith(("http://", "https://")):
        first = dict(zip(columns, columns, strict=True))  # the header is a row
        rows = (
            dict(zip(("caption", "url"), row.values(), strict=False))
            for row in itertools.chain([first], rows)
        )
        columns = ["caption", "url"]
    url, caption = (next((c for c in names if c in columns), "") for names in (URL_COLUMNS, CAPTION_COLUMNS))
    if not url or not caption:
        raise CorpusError(f"{source}: expected columns {URL_COLUMNS[0]!r} and 'caption', got {columns}")
    for row in rows:
        yield _row_of(source.stem, row, str(row[url] or ""), str(row[caption] or ""))


def _row_of(source: str, row: dict[str, Any], url: str, caption: str) -> dict[str, Any]:
    key = str(row.get("key") or url)
    facts = {"image_url": url, "caption": caption, "source": source, "source_key": key}
    digest = str(row.get("sha256") or "")
    return facts | {"stimulus_id": stimulus_id(source, key), "image_sha256": digest, "width": 0, "height": 0}


def _of_folder(folder: Path) -> Iterator[dict[str, Any]]:
    """The linked stimuli of a run, or the stimuli of a release."""
    if (folder / "corpus" / "stimuli.parquet").is_file():
        linked = None
        if (folder / "stimuli" / "links.parquet").is_file():
            linked = set(read_table(folder / "stimuli" / "links.parquet")["stimulus_id"].to_pylist())
        files = [folder / "corpus" / "stimuli.parquet"]
    else:
        linked, files = None, sorted(folder.glob("**/stimuli*/*.parquet"))
    if not files:
        raise CorpusError(f"expected a run folder or a release with stimuli, got {folder}; check the path")
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(1024, columns=STIMULI.names):
            yield from (r for r in batch.to_pylist() if linked is None or r["stimulus_id"] in linked)


# From the web.


def _connect(
    address: tuple[str, int], timeout: float | None = None, source: Any = None, *, private: bool
) -> socket.socket:
    """Connect to a host whose every address is public; the address looked at is the one connected to."""
    host, port = address
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not private and not all(_is_public(str(info[4][0])) for info in found):
        raise Refused("private_address")
    return socket.create_connection((str(found[0][4][0]), port), timeout)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.split("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast


class _Fetch:
    """One image from the web, ended from outside when its time is over.

    Args:
        limits: Size and time.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.connections: list[http.client.HTTPConnection] = []
        self.over = threading.Event()

    def _made(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> Any:
        connection = kind(host, **options)
        connection._create_connection = partial(_connect, private=self.limits.private)  # type: ignore[attr-defined]
        self.connections.append(connection)
        return connection

    def _opener(self) -> urllib.request.OpenerDirector:
        """http and https with redirects; no proxies, files, FTP or cookies."""
        fetch = self

        class Http(urllib.request.HTTPHandler):
            def http_open(self, request: Any) -> Any:
                return self.do_open(partial(fetch._made, http.client.HTTPConnection), request)

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, request: Any) -> Any:
                options = {"context": ssl.create_default_context()}
                return self.do_open(partial(fetch._made, http.client.HTTPSConnection), request, **options)

        opener = urllib.request.OpenerDirector()
        for handler in (Http(), Https()):
            opener.add_handler(handler)
        opener.add_handler(urllib.request.HTTPRedirectHandler())
        opener.add_handler(urllib.request.HTTPErrorProcessor())
        opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
        return opener

    def _end(self) -> None:
        self.over.set()
        for connection in self.connections:
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # it ended by itself
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def read(self, url: str) -> bytes:
        """The image's bytes.

        Raises:
            Refused: it does not come; the reason is one word.
        """
        if not url.lower().startswith(("http://", "https://")):
            raise Refused("not_http")
        timer = threading.Timer(self.limits.seconds, self._end)
        timer.start()
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "daco-join-images"})
            with self._opener().open(request, timeout=self.limits.seconds) as answer:
                content = self._body(answer)
        except Refused:
            raise
        except Exception as error:  # a hostile server: http, ssl, socket and urllib raise all sorts
            raise Refused(_reason(error, self.over.is_set())) from error
        finally:
            timer.cancel()
        if answer.length:  # fewer bytes than it said
            raise Refused("broken_answer")
        return content

    def _body(self, answer: Any) -> bytes:
        """The body as it comes, so that a slow one is noticed."""
        content = b""
        while part := answer.read1(2**16):
            content += part
            if self.over.is_set():
                raise Refused("timeout")
            if len(content) > self.limits.max_bytes:
                raise Refused("too_large")
        return content


def _reason(error: Exception, over: bool) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, Refused):
        return str(inner)
    if over or isinstance(inner, TimeoutError):
        return "timeout"
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (404, 410):
            return "dead_link"
        return "redirects" if 300 <= error.code < 400 else f"http_{error.code}"
    if isinstance(inner, socket.gaierror | ConnectionRefusedError):
        return "dead_link"
    if isinstance(error, ValueError | http.client.InvalidURL):
        return "bad_url"
    return "broken_answer"


# From tars.


def index_tars(folder: Path) -> dict[str, Path]:
    """Place of the image of every key of the tars of a folder.

    Raises:
        CorpusError: there are none, or one is broken.
    """
    found = (sample for tar in webdataset.tars(folder) for sample in webdataset.samples(tar, SUFFIXES))
    return {sample.key: sample.image for sample in found if sample.image is not None}


# Joining.


def join_images(
    source: Path, out: Path, tars: Path | None = None, limits: Limits | None = None, quiet: bool = False
) -> Counter[str]:
    """Bring back the images of `source` into `out`; running again resumes.

    Args:
        source: A release, a run folder, a table of stimuli, or a table of URLs and captions.
        out: Folder for the images and tables.
        tars: Folder of webdataset tars to take images from by key; else they come from the web.
        limits: What an image from the web may cost.
        quiet: Without a progress bar.

    Returns:
        Counts: in, out, unverified (came without a sha256 to compare), and every reason for none.

    Raises:
        CorpusError: `source` or `tars` cannot be read.
    """
    limits = limits or Limits()
    places = index_tars(tars) if tars else None
    repeated: Counter[str] = Counter()
    wanted = _unique(read_wanted(source), repeated)
    (out / "shards").mkdir(parents=True, exist_ok=True)
    bar = tqdm(unit="image", desc="join-images", disable=True if quiet else None)
    with ThreadPoolExecutor(limits.workers) as workers:
        for number in itertools.count():
            rows = list(itertools.islice(wanted, limits.shard_rows))
            if not rows:
                break
            shard = out / "shards" / f"{number:06d}.parquet"
            if not shard.is_file() or not _is_of(shard, rows):
                answers = list(workers.map(partial(_join_one, out=out, places=places, limits=limits), rows))
                write_table(shard, table_of(answers, ANSWERS))
            bar.update(len(rows))
    bar.close()
    return _finish(out, number, repeated)


def _unique(rows: Iterator[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows whose stimulus_id did not come before; the others are counted."""
    seen: set[str] = set()
    for row in rows:
        if row["stimulus_id"] in seen:
            counts["duplicate_id"] += 1
        else:
            seen.add(row["stimulus_id"])
            yield row


def _is_of(shard: Path, rows: list[dict[str, Any]]) -> bool:
    return read_table(shard)["stimulus_id"].to_pylist() == [row["stimulus_id"] for row in rows]


def _join_one(
    row: dict[str, Any], out: Path, places: dict[str, Path] | None, limits: Limits
) -> dict[str, Any]:
    """The row with the image's facts and `reason` "", or with the reason why there is no image."""
    facts = {name: row.get(name) for name in STIMULI.names} | {
        "image": "",
        "reason": "",
        "verified": bool(row["image_sha256"]),
    }
    try:
        content = _content(row, out, places, limits)
        digest = hashlib.sha256(content).hexdigest()
        if row["image_sha256"] and digest != row["image_sha256"]:
            raise Refused("other_image")
        try:
            width, height = open_image(content).size
        except Exception as error:  # Pillow's plug-ins raise all sorts
            raise Refused("unreadable_image") from error
    except Refused as refused:
        return facts | {"reason": str(refused)}
    name = f"images/{row['stimulus_id'][:2]}/{row['stimulus_id']}{image_suffix(content)}"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out / name, content)
    return facts | {"image": name, "image_sha256": digest, "width": width, "height": height}


def _content(row: dict[str, Any], out: Path, places: dict[str, Path] | None, limits: Limits) -> bytes:
    if row["image_sha256"]:  # a run that was killed may have brought it
        for file in (out / "images" / row["stimulus_id"][:2]).glob(f"{row['stimulus_id']}.*"):
            if hashlib.sha256(content := file.read_bytes()).hexdigest() == row["image_sha256"]:
                return content
    if places is None:
        return _Fetch(limits).read(row["image_url"] or "")
    place = places.get(row["source_key"])
    content = webdataset.read_member(place) if place else None
    if content is None:
        raise Refused("not_in_tars")
    return content


def _finish(out: Path, n_shards: int, repeated: Counter[str]) -> Counter[str]:
    """Write the tables and counts of the shards."""
    counts = Counter(repeated)
    parts = [read_table(out / "shards" / f"{number:06d}.parquet") for number in range(n_shards)]
    table = pa.concat_tables(parts) if parts else ANSWERS.empty_table()
    reasons = table["reason"].to_pylist()
    counts.update(reason for reason in reasons if reason)
    came = pa.array([not reason for reason in reasons], pa.bool_())
    write_table(out / "images.parquet", table.filter(came).select(JOINED.names))
    failed = pa.array([bool(reason) for reason in reasons], pa.bool_())
    write_table(out / "failed.parquet", table.filter(failed).select(FAILED.names))
    n_in = len(reasons) + repeated.total()
    unverified = came.true_count - pc.sum(table.filter(came)["verified"]).as_py() if came.true_count else 0
    total = Counter({"in": n_in, "out": came.true_count, "unverified": unverified}) + counts
    write_atomic(out / "counts.json", canonical_json(dict(sorted(total.items()))))
    return total


def counts_of(out: Path) -> dict[str, int]:
    """What the last run of `join_images` counted."""
    return dict(json.loads((out / "counts.json").read_text("utf-8")))
