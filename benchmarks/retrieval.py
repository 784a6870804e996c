"""How near to the speed of the hardware is exact retrieval by Eq. 4, and how does it compare with faiss?

Draws embeddings with cosines like CLIP's (image .1 to .35, caption .3 to .9) into memory-mapped files; prints
a table and writes `results/retrieval.json`, a list of {work, who, value, unit, ratio, machine}. DACO's own
`ratio` is the share of the matrix product's rate measured right before and after (for memory: of 2 GiB), that
of others how many times longer they take. Times are by the clock and in seconds of all threads on processors,
which others at work on the machine disturb less. `faiss` is compared where it is installed: two inner-product
searches, one an image and one a caption, which do not give Eq. 4. On a GPU: `--full --device cuda`.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from builders.retrieval import Corpus, Engine, Floats, Searched, draw_places, draw_pool, exhaustive, search

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
TOP_K, POOL, LATENT = 32, 65_536, 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROWTH = (50_000, 100_000, 200_000, 400_000, 800_000)
FULL = (15_000, 3_300_000, 768)


# Data.


class World:
    """Concepts, images and captions as sums of a mean of their modality, a common meaning and noise."""

    def __init__(self, width: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.normal(size=(width, LATENT + 2)))[0].T.astype(np.float32)
        self.meanings, self.text = basis[:LATENT], basis[LATENT]
        self.image = 0.3 * self.text + np.sqrt(1 - 0.3**2) * basis[LATENT + 1]
        self.width, self.seed = width, seed

    def _unit(self, mean: Floats, meaning: Floats, share: float, rng: np.random.Generator) -> Floats:
        noise = rng.standard_normal((len(meaning), self.width), dtype=np.float32) / np.sqrt(self.width)
        rows = np.sqrt(share) * mean + np.sqrt(1 - share) * (meaning @ self.meanings) + 0.1 * noise
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    def _meaning(self, n: int, rng: np.random.Generator) -> Floats:
        drawn = rng.standard_normal((n, LATENT), dtype=np.float32)
        return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))

    def concepts(self, n: int) -> Floats:
        """Unit text embeddings [n, width]."""
        rng = np.random.default_rng([self.seed, 1])
        return self._unit(self.text, self._meaning(n, rng), 0.58, rng)

    def pairs(self, block: int, n: int) -> tuple[Floats, Floats]:
        """Image and caption embeddings [n, width] of a block of pairs; a pair's two share their meaning."""
        rng = np.random.default_rng([self.seed, 2, block])
        meaning = self._meaning(n, rng)
        seen = 0.8 * meaning + 0.6 * self._meaning(n, rng)
        return self._unit(self.image, seen, 0.9, rng), self._unit(self.text, meaning, 0.58, rng)


def write_pairs(world: World, folder: Path, n: int, block: int = 10_000) -> tuple[Floats, Floats]:
    """float16 files of n pairs, opened memory-mapped."""
    sides = [
        np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float16, shape=(n, world.width))
        for name in ("images.npy", "texts.npy")
    ]
    for start in range(0, n, block):
        for side, rows in zip(sides, world.pairs(start // block, min(block, n - start)), strict=True):
            side[start : start + block] = rows
    del sides
    images, texts = (np.load(folder / name, mmap_mode="r") for name in ("images.npy", "texts.npy"))
    return images, texts


def corpus_of(images: Floats, texts: Floats) -> Corpus:
    return Corpus.of(images, texts, [f"{i * 2654435761 % 2**64:016x}" for i in range(len(images))])


# Measuring.


class Took(NamedTuple):
    """Time of a call: on a machine shared with others the processor's is the steadier."""

    wall: float
    """Seconds by the clock."""
    cpu: float
    """Seconds of all threads on processors."""


def took(call: Callable[[], Any], device: str) -> Took:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def peak(dtype: str, width: int, device: str, least: float = 2.0) -> Took:
    """Rate of matrix products in flop/s and in flop per processor second: the best of several shapes, each
    kept up for `least` s."""
    rates = []
    for m, n, d in ((4096, 4096, 4096), (512, 4096, width), (2048, 8192, width)):
        left = torch.randn(m, d, device=device).to(DTYPES[dtype])
        right = torch.randn(n, d, device=device).to(DTYPES[dtype])
        out = torch.empty(m, n, dtype=DTYPES[dtype], device=device)
        torch.mm(left, right.T, out=out)
        times, wall, cpu = 0, 0.0, 0.0
        while wall < least:
            one = took(lambda: torch.mm(left, right.T, out=out), device)  # noqa: B023
            times, wall, cpu = times + 1, wall + one.wall, cpu + one.cpu
        flop = 2 * m * n * d * times
        rates.append((flop / wall, flop / cpu))
    return Took(max(rate[0] for rate in rates), max(rate[1] for rate in rates))


def retrieve(queries: Floats, corpus: Corpus, dtype: str, device: str) -> Searched:
    """What the stage asks of the search: the nearest and negatives of every concept."""
    pool = draw_pool(len(corpus), POOL, 0)
    draws = [draw_places(f"user:{i}", len(pool), TOP_K, 0) for i in range(len(queries))]
    engine = Engine(dtype, device)
    return search(queries, corpus, TOP_K, pool=pool, draws=draws, n_negative=TOP_K, engine=engine)


def share(queries: Floats, corpus: Corpus, dtype: str, device: str) -> dict[str, float]:
    """Seconds of a search, the rates of the matrix product before and after, and its share of their mean."""
    width = corpus.images.width
    before = peak(dtype, width, device)
    search_took = took(lambda: retrieve(queries, corpus, dtype, device), device)
    after = peak(dtype, width, device)
    flop = 4 * len(queries) * len(corpus) * width
    wall, cpu = ((before[i] + after[i]) / 2 for i in (0, 1))
    return {
        "seconds": search_took.wall,
        "cpu": search_took.cpu,
        "peak": wall,
        "share": flop / search_took.wall / wall,
        "cpu_share": flop / search_took.cpu / cpu,
    }


def faiss_took(queries: Floats, images: Floats, texts: Floats, threads: int) -> Took | None:
    """Time of two exact inner-product searches, building excluded; None without faiss."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    wall, cpu = 0.0, 0.0
    for side in (images, texts):
        index = faiss.IndexFlatIP(side.shape[1])
        index.add(np.asarray(side, dtype=np.float32))
        one = took(lambda: index.search(queries, TOP_K), "cpu")  # noqa: B023
        wall, cpu = wall + one.wall, cpu + one.cpu
    return Took(wall, cpu)


def anonymous_mib() -> float:
    """Memory of this process that is no mapped file (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def memory_of(call: Callable[[], Any]) -> float:
    """Most MiB that a call takes beside what was there before and mapped files."""
    before, most, over = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        over.set()
        watcher.join()
    return most[0] - before


def check(queries: Floats, corpus: Corpus, dtype: str, device: str) -> None:
    """Some answers against the float64 pass.

    Raises:
        AssertionError: one differs.
    """
    chosen = np.linspace(0, len(queries) - 1, 16).astype(int)
    found = retrieve(queries[chosen], corpus, dtype, device)
    slow = exhaustive(queries[chosen], corpus, TOP_K)
    for one, other in zip(found.nearest.rows, slow.rows, strict=True):
        np.testing.assert_array_equal(one, other)


def machine(arguments: argparse.Namespace) -> str:
    """Hardware and versions, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    if arguments.device != "cpu":
        cpu = f"{torch.cuda.get_device_name()} + {cpu}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions += f", faiss-cpu {importlib.metadata.version('faiss-cpu')}"
    return f"{cpu}, {arguments.threads} of {os.cpu_count()} threads; {versions}"


# The table.


def size(n_concepts: int, n_pairs: int, width: int) -> str:
    return f"{n_concepts:,} concepts x {n_pairs:,} pairs x {width}"


def row(work: str, who: str, value: float, unit: str, ratio: float) -> dict[str, Any]:
    return {"work": work, "who": who, "value": value, "unit": unit, "ratio": round(ratio, 3)}


def speed(
    queries: Floats, images: Floats, texts: Floats, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the main size: both dtypes and faiss in turns, the median round of each counts."""
    corpus, rounds = corpus_of(images, texts), []
    for number in range(arguments.rounds):
        turn: dict[str, Any] = {d: share(queries, corpus, d, arguments.device) for d in DTYPES}
        turn["faiss"] = faiss_took(queries, images, texts, arguments.threads)
        rounds.append(turn)
        print(f"round {number}: load {os.getloadavg()[0]:.1f} {turn}", flush=True)
    work = f"{size(len(queries), len(images), images.shape[1])}, top {TOP_K} + {TOP_K} negatives"
    return [one for dtype in DTYPES for one in _speed_rows(f"{work}, {dtype}", dtype, rounds)]


def _speed_rows(work: str, dtype: str, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def median(values: Iterable[float]) -> float:
        return statistics.median(values)

    wall = median(turn[dtype]["seconds"] for turn in rounds)
    part = median(turn[dtype]["share"] for turn in rounds)
    cpu = median(turn[dtype]["cpu"] for turn in rounds)
    cpu_part = median(turn[dtype]["cpu_share"] for turn in rounds)
    rate = median(turn[dtype]["peak"] for turn in rounds) / 1e9
    rows = [
        row(work, "daco", round(wall, 1), "s", part),
        row(work, "daco", round(cpu, 1), "processor s", cpu_part),
        row(work, "matrix product alone", round(rate, 1), "Gflop/s", part),
    ]
    if rounds[0]["faiss"]:
        for i, unit, key in ((0, "s", "seconds"), (1, "processor s", "cpu")):
            value = median(turn["faiss"][i] for turn in rounds)
            ratio = median(turn["faiss"][i] / turn[dtype][key] for turn in rounds)
            rows.append(row(work, "faiss.IndexFlatIP twice", round(value, 1), unit, ratio))
    return rows


def growth(
    queries: Floats, images: Floats, texts: Floats, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of rising corpora, and what they say of CC-3M."""
    rows, per_flop = [], 0.0
    for n in (n for n in GROWTH if n <= len(images)):
        found = share(queries, corpus_of(images[:n], texts[:n]), "float32", arguments.device)
        work = f"{size(len(queries), n, images.shape[1])}, memory-mapped"
        rows.append(row(work, "daco", round(found["cpu"], 2), "processor s", found["cpu_share"]))
        per_flop = found["cpu"] / (4 * len(queries) * n * images.shape[1])
        print(f"growth {n}: {found}", flush=True)
    there = per_flop * 4 * np.prod([float(number) for number in FULL])
    last = rows[-1]["ratio"]
    rows.append(row(f"{size(*FULL)}, extrapolated", "daco", round(there), "processor s", last))
    return rows


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    world = World(arguments.width, seed=0)
    queries = world.concepts(arguments.concepts)
    most = max(arguments.pairs, 0 if arguments.full or arguments.no_growth else GROWTH[-1])
    images, texts = write_pairs(world, folder, most)
    main = images[: arguments.pairs], texts[: arguments.pairs]
    for dtype in DTYPES:
        check(queries, corpus_of(*main), dtype, arguments.device)
    rows = speed(queries, *main, arguments)
    used = memory_of(lambda: retrieve(queries, corpus_of(*main), "float32", arguments.device))
    work = f"{size(len(queries), len(main[0]), arguments.width)}, memory beside the embeddings"
    rows.append(row(work, "daco", round(used), "MiB", used / 2048))
    if most > arguments.pairs:
        rows += growth(queries[:2_000], images, texts, arguments)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=15_000)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--full", action="store_true", help=f"the whole of CC-3M: {size(*FULL)}")
    parser.add_argument("--no-growth", action="store_true", help="the main size only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.full:
        arguments.concepts, arguments.pairs, arguments.width = FULL
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        table = [one | {"machine": machine(arguments)} for one in measure(Path(folder), arguments)]
    for one in table:
        print(f"{one['work']:<75} {one['who']:<24} {one['value']:>9} {one['unit']:<8} x {one['ratio']}")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
