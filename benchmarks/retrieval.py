"""How near to the speed of the hardware is exact retrieval by Eq. 4, and how does it compare with faiss?

Draws embeddings with cosines like CLIP's (image .1 to .35, caption .3 to .9) into memory-mapped files;
prints a table and writes `results/retrieval.json`, a list of {work, who, value, unit, ratio, machine,
part}. DACO's own `ratio` is the share of the machine's rate: the fastest of several matrix products that
torch has, measured right before and after (for memory: the share of 2 GiB). That of others is how many
times longer they take; torch.mm stands beside the fastest product, since the two are far apart on some
processors. Times are by the clock and in seconds of all threads on processors, which others at work on the
machine disturb less. `faiss` is compared where it is installed: two inner-product searches, one an image
and one a caption, which do not give Eq. 4.

Every row is written when it is there, and parts run on their own (`--parts speed,faiss,memory,growth`), so
that a machine need not be free for long; rows of the other parts stay. Files of embeddings are kept in
`--data`, if that is given. The whole of CC-3M on a GPU: `--full --device cuda` (10 GB on disk, read
memory-mapped; `--pairs` makes it smaller). A GPU's times are by the clock alone, from files to answers:
reading, copying to the GPU and deciding in float64 included, compiling at first use not; its memory is that
of the GPU, as a share of `--memory`. Of one size a GPU's rows take the place of a CPU's, but for `--out`.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from builders.proposals import Engine, onednn_product
from builders.retrieval import Searched, draw_places, draw_pool, search
from builders.scores import FLOOR, Corpus, Floats, Found, Ints, Rows, Scores, exact_scores, exhaustive, ranked

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
TOP_K, POOL, LATENT = 32, 65_536, 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROWTH = (50_000, 100_000, 200_000, 400_000, 800_000)
FULL = (15_000, 3_300_000, 768)
SQUARE = 4096
"""Side of the square matrices whose product's rate is measured beside that of our shapes."""
SHAPES = {"cpu": ((512, 4096), (768, 2048), (2048, 8192)), "cuda": ((8192, 8192), (8192, 65_536))}
"""Concepts and stimuli of the products whose rate is measured."""
CHECKED = 16
"""Concepts whose answers are compared with the float64 pass."""
WARMED = 2 * POOL
"""Pairs searched before a GPU is measured, so that its kernels are compiled."""
PARTS = ("speed", "faiss", "memory", "growth")


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
        rows = rng.standard_normal((len(meaning), self.width), dtype=np.float32)
        rows *= 0.1 / math.sqrt(self.width)
        rows += (math.sqrt(1 - share) * meaning) @ self.meanings
        rows += (math.sqrt(share) * mean).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows

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


def write_pairs(world: World, folder: Path, n: int, block: int = 1_000) -> tuple[Floats, Floats]:
    """float16 files of n pairs, opened memory-mapped; those that are there already are taken."""
    names = [folder / f"{side}-{world.width}-{n}.npy" for side in ("images", "texts")]
    if not all(name.is_file() for name in names):
        _write(world, [name.with_suffix(".part") for name in names], n, block)
        for name in names:
            name.with_suffix(".part").rename(name)
    images, texts = (np.load(name, mmap_mode="r") for name in names)
    return images, texts


def _write(world: World, names: list[Path], n: int, block: int) -> None:
    sides = [
        np.lib.format.open_memmap(name, mode="w+", dtype=np.float16, shape=(n, world.width)) for name in names
    ]

    def write(start: int) -> None:
        for side, rows in zip(sides, world.pairs(start // block, min(block, n - start)), strict=True):
            side[start : start + block] = rows

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(write, range(0, n, block)))


def corpus_of(images: Floats, texts: Floats) -> Corpus:
    return Corpus.of(images, texts, [f"{i * 2654435761 % 2**64:016x}" for i in range(len(images))])


class Task(NamedTuple):
    """What the stage asks of the search: the nearest and negatives of every concept."""

    queries: Floats
    corpus: Corpus
    pool: Ints
    draws: list[Ints]


def task_of(queries: Floats, sides: Sequence[Floats]) -> Task:
    corpus = corpus_of(*sides)
    pool = draw_pool(len(corpus), POOL, 0)
    return Task(
        queries,
        corpus,
        pool,
        [draw_places(f"user:{i}", len(pool), TOP_K, 0) for i in range(len(queries))],
    )


# Measuring.


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
"""Computes `a @ b.T`, given a, b and a place for the result, which it may use."""
Sides = tuple[Floats, Floats]
"""Embeddings of images and captions."""


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


def products(dtype: str, device: str) -> dict[str, Product]:
    """Ways in which torch multiplies, by name."""
    found: dict[str, Product] = {"torch.mm": lambda a, b, out: torch.mm(a, b.T, out=out)}
    onednn = onednn_product() if (dtype, device) == ("float32", "cpu") else None
    if onednn:
        found["oneDNN"] = lambda a, b, out: onednn(a, b)
    return found


def peaks(dtype: str, width: int, arguments: argparse.Namespace) -> dict[str, Took]:
    """Rates of matrix products in flop/s and in flop per processor second: of each way the best of several
    shapes, each kept up for `--least` s."""
    device = arguments.device
    rates = {name: Took(0.0, 0.0) for name in products(dtype, device)}
    at_once = 1 if device == "cpu" else 8  # a GPU would stand still between products that are waited for
    shapes = [(*shape, width) for shape in SHAPES["cpu" if device == "cpu" else "cuda"]]
    for m, n, d in ((SQUARE, SQUARE, SQUARE), *shapes):
        left = torch.randn(m, d, device=device).to(DTYPES[dtype])
        right = torch.randn(n, d, device=device).to(DTYPES[dtype])
        out = torch.empty(m, n, dtype=DTYPES[dtype], device=device)
        for name, product in products(dtype, device).items():

            def several() -> None:
                for _ in range(at_once):
                    product(left, right, out)  # noqa: B023

            took(several, device)
            times, wall, cpu = 0, 0.0, 0.0
            while wall < arguments.least:
                one = took(several, device)
                times, wall, cpu = times + at_once, wall + one.wall, cpu + one.cpu
            flop, best = 2 * m * n * d * times, rates[name]
            rates[name] = Took(max(best.wall, flop / wall), max(best.cpu, flop / cpu))
    return rates


def retrieve(task: Task, dtype: str, arguments: argparse.Namespace) -> Searched:
    """The search that is measured."""
    return search(
        task.queries,
        task.corpus,
        TOP_K,
        pool=task.pool,
        draws=task.draws,
        n_negative=TOP_K,
        engine=Engine(dtype, arguments.device, arguments.memory),
    )


class Turn(NamedTuple):
    """A search between measurements of the machine."""

    took: Took
    peaks: dict[str, Took]
    """Rates of matrix products, before and after."""
    share: Took
    """Of the best of them: by the clock and in processor seconds."""
    found: Searched


def turn(task: Task, dtype: str, arguments: argparse.Namespace) -> Turn:
    """Time of a search, and its share of the rate of matrix products before and after."""
    width, found = task.corpus.images.width, []
    before = peaks(dtype, width, arguments)
    search_took = took(lambda: found.append(retrieve(task, dtype, arguments)), arguments.device)
    after = peaks(dtype, width, arguments)
    flop = 4 * len(task.queries) * len(task.corpus) * width
    rates = {name: Took(*((before[name][i] + after[name][i]) / 2 for i in (0, 1))) for name in before}
    shares = (flop / search_took[i] / max(rate[i] for rate in rates.values()) for i in (0, 1))
    return Turn(search_took, rates, Took(*shares), found[0])


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


def memory_of(call: Callable[[], Any], device: str) -> float:
    """Most MiB that a call takes beside what was there before and mapped files; on a GPU: of its memory."""
    if device != "cpu":
        torch.cuda.synchronize()  # there are no statistics before a first use
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - held) / 2**20
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


def exactly(task: Task, arguments: argparse.Namespace) -> tuple[Ints, Found]:
    """Some concepts, and their nearest by a float64 pass."""
    chosen = np.linspace(0, len(task.queries) - 1, CHECKED).astype(int)
    if arguments.device == "cpu":
        return chosen, exhaustively(task.queries[chosen], task.corpus, arguments.threads)
    return chosen, exhaustively_there(task.queries[chosen], task.corpus, arguments.device)


def exhaustively(queries: Floats, corpus: Corpus, threads: int) -> Found:
    """The float64 pass, whose threads have a part of the corpus each."""
    k, step = TOP_K, -(-len(corpus) // threads)

    def nearest(start: int) -> Found:
        part = slice(start, start + step)
        sides = (Rows(side.slice(start, start + step)) for side in (corpus.images, corpus.texts))
        return exhaustive(queries, Corpus(*sides, corpus.place[part]), k)

    starts = range(0, len(corpus), step)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = list(pool.map(nearest, starts))
    torch.set_num_threads(threads)
    found = Found([], [])
    for query in range(len(queries)):
        rows = np.concatenate([start + part.rows[query] for start, part in zip(starts, parts, strict=True)])
        cosines = zip(*(part.scores[query] for part in parts), strict=True)
        best = ranked(rows, Scores(*(np.concatenate(side) for side in cosines)), corpus.place, k)
        for kept, one in zip(found, best, strict=True):
            kept.append(one)
    return found


def exhaustively_there(queries: Floats, corpus: Corpus, device: str, block: int = 32_768) -> Found:
    """Twice as many as wanted by float64 products on a GPU, of which the scores on the host choose."""
    asked = torch.from_numpy(queries).to(device).double()

    def best(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        sides = (
            np.array(side.slice(start, min(start + block, len(corpus))))
            for side in (corpus.images, corpus.texts)
        )
        image, text = ((asked @ torch.from_numpy(side).to(device).double().T) for side in sides)
        product = image.clamp_(min=FLOOR).mul_(text.clamp_(min=FLOOR))
        values, places = product.topk(min(2 * TOP_K, product.shape[1]), dim=1)
        return values.cpu(), places.cpu() + start

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(best, range(0, len(corpus), block)))
    values, places = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    rows = places.gather(1, values.topk(2 * TOP_K, dim=1).indices).numpy()
    found = Found([], [])
    for number, candidates in enumerate(rows):
        scores = exact_scores(queries, corpus, np.full(len(candidates), number), candidates)
        for kept, one in zip(found, ranked(candidates, scores, corpus.place, TOP_K), strict=True):
            kept.append(one)
    return found


def check(found: Searched, exact: tuple[Ints, Found], other: Searched | None) -> None:
    """A search's answers against the float64 pass, and all of them against another dtype's.

    Raises:
        AssertionError: one differs.
    """
    for place, rows in zip(exact[0].tolist(), exact[1].rows, strict=True):
        np.testing.assert_array_equal(found.nearest.rows[place], rows)
    if other:
        for one, another in ((found.nearest, other.nearest), (found.negatives, other.negatives)):
            np.testing.assert_array_equal(np.concatenate(one.rows), np.concatenate(another.rows))


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


def main_work(arguments: argparse.Namespace, dtype: str) -> str:
    pairs = size(arguments.concepts, arguments.pairs, arguments.width)
    return f"{pairs}, top {TOP_K} + {TOP_K} negatives, {dtype}"


def speed(task: Task, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the main size in both dtypes; the median round of each counts."""
    exact, other = exactly(task, arguments), None
    for dtype in arguments.dtypes:
        if arguments.device != "cpu":
            sides = [rows.slice(0, WARMED) for rows in (task.corpus.images, task.corpus.texts)]
            retrieve(task_of(task.queries[:64], sides), dtype, arguments)
        if arguments.profile:
            profiled(task, dtype, arguments)
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(turn(task, dtype, arguments))
            check(rounds[-1].found, exact, other)
            other = rounds[-1].found
            print(f"round {number}: load {os.getloadavg()[0]:.1f} {dtype} {said(rounds[-1])}", flush=True)
        yield from _speed_rows(main_work(arguments, dtype), rounds, units_of(arguments))


def profiled(task: Task, dtype: str, arguments: argparse.Namespace) -> None:
    """Print what took a search the time of the processor and of the GPU."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if arguments.device != "cpu":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        took(lambda: retrieve(task, dtype, arguments), arguments.device)
    key = "self_cpu_time_total" if arguments.device == "cpu" else "self_cuda_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=16, max_name_column_width=60), flush=True)


def said(one: Turn) -> str:
    return f"{one.took} {one.peaks} share {one.share} settled by {dict(one.found.answered)}"


def units_of(arguments: argparse.Namespace) -> tuple[tuple[int, str, str], ...]:
    """(index into `Took`, unit of a time, unit of a rate): of a GPU the processor's time says nothing."""
    units = ((0, "s", "Gflop/s"), (1, "processor s", "Gflop a processor s"))
    return units if arguments.device == "cpu" else units[:1]


def _speed_rows(
    work: str, rounds: list[Turn], units: tuple[tuple[int, str, str], ...]
) -> Iterator[dict[str, Any]]:
    for i, unit, _ in units:
        seconds, share = (
            statistics.median(values[i] for values in column)
            for column in ([one.took for one in rounds], [one.share for one in rounds])
        )
        yield row(work, "daco", round(seconds, 2 if seconds < 10 else 1), unit, share)
    for name in rounds[0].peaks:
        for i, _, unit in units:
            rate = statistics.median(one.peaks[name][i] for one in rounds)
            of_best = statistics.median(
                one.share[i] * max(other[i] for other in one.peaks.values()) / one.peaks[name][i]
                for one in rounds
            )
            yield row(f"{work}: its product alone", name, round(rate / 1e9, 1), unit, of_best)


def faiss_rows(task: Task, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Two searches of the same data by faiss, between two of ours."""
    sides = [rows.slice(0, len(rows)) for rows in (task.corpus.images, task.corpus.texts)]
    ours = [took(lambda: retrieve(task, "float32", arguments), arguments.device)]
    theirs = faiss_took(task.queries, sides[0], sides[1], arguments.threads)
    ours.append(took(lambda: retrieve(task, "float32", arguments), arguments.device))
    for i, unit, _ in units_of(arguments):
        if theirs:
            ratio = theirs[i] / statistics.mean(one[i] for one in ours)
            work = main_work(arguments, "float32")
            yield row(work, "faiss.IndexFlatIP twice", round(theirs[i], 1), unit, ratio)


def memory(task: Task, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The most memory taken beside the embeddings."""
    limit, what = (2048, "memory") if arguments.device == "cpu" else (arguments.memory, "memory of the GPU")
    for dtype in arguments.dtypes:
        used = memory_of(lambda: retrieve(task, dtype, arguments), arguments.device)  # noqa: B023
        work = f"{main_work(arguments, dtype)}, {what} beside the embeddings"
        yield row(work, "daco", round(used), "MiB", used / limit)


def growth(queries: Floats, sides: Sides, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of rising corpora, and what they say of CC-3M."""
    queries = queries[:2_000]
    i, unit, _ = units_of(arguments)[-1]
    for dtype in arguments.dtypes:
        for n in GROWTH:
            found = turn(task_of(queries, [side[:n] for side in sides]), dtype, arguments)
            work = f"{size(len(queries), n, arguments.width)}, memory-mapped, {dtype}"
            yield row(work, "daco", round(found.took[i], 2), unit, found.share[i])
            print(f"growth {n}: {said(found)}", flush=True)
        per_flop = found.took[i] / (len(queries) * GROWTH[-1] * arguments.width)
        there = per_flop * np.prod([float(number) for number in FULL])
        work = f"{size(*FULL)}, extrapolated, {dtype}"
        yield row(work, "daco", round(there), unit, found.share[i])


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Measure the parts asked for; each row is written when it is there."""
    world = World(arguments.width, seed=0)
    queries = np.asarray(world.concepts(arguments.concepts), dtype=np.float32)
    most = max(arguments.pairs, GROWTH[-1] if "growth" in arguments.parts else 0)
    sides = write_pairs(world, folder, most)
    task = task_of(queries, [side[: arguments.pairs] for side in sides])
    parts = {"speed": speed, "faiss": faiss_rows, "memory": memory}
    for part in arguments.parts:
        rows = growth(queries, sides, arguments) if part == "growth" else parts[part](task, arguments)
        for one in rows:
            write_row(part, one, arguments)


def write_row(part: str, one: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print a row and put it into the results, in place of that of the same work."""
    print(
        f"{one['work']:<90} {one['who']:<24} {one['value']:>9} {one['unit']:<20} x {one['ratio']}", flush=True
    )
    there = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else []
    same = [one[key] for key in ("work", "who", "unit")]
    table = [
        other
        for other in there
        if other.get("part") and [other[key] for key in ("work", "who", "unit")] != same
    ]  # rows without a part are of an older table
    table.append(one | {"machine": machine(arguments), "part": part})
    table.sort(key=lambda other: PARTS.index(other["part"]))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=int, help="default 15,000")
    parser.add_argument("--pairs", type=int, help="default 200,000")
    parser.add_argument("--width", type=int, help="default 512")
    parser.add_argument(
        "--full", action="store_true", help=f"CC-3M by default: {size(*FULL)}; speed and memory"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--memory", type=int, help="MiB of working memory; default: 1536, on a GPU 32768")
    parser.add_argument("--least", type=float, help="seconds for which a product is kept up; 1, on a GPU .2")
    parser.add_argument("--profile", action="store_true", help="print what a search does, by operation")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--parts", help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument(
        "--data", type=Path, help="folder where embeddings are kept; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(given)
    default = FULL if arguments.full else (15_000, 200_000, 512)
    for name, number in zip(("concepts", "pairs", "width"), default, strict=True):
        setattr(arguments, name, getattr(arguments, name) or number)
    cpu = arguments.device == "cpu"
    arguments.memory = arguments.memory or (1536 if cpu else 32_768)
    arguments.least = arguments.least or (1.0 if cpu else 0.2)
    parts = arguments.parts or ("speed,memory" if arguments.full else ",".join(PARTS))
    arguments.parts, arguments.dtypes = parts.split(","), arguments.dtypes.split(",")
    for name, known in (("parts", PARTS), ("dtypes", tuple(DTYPES))):
        if not set(getattr(arguments, name)) <= set(known):
            parser.error(f"--{name}: expected some of {','.join(known)}, got {getattr(arguments, name)}")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse(given)
    torch.set_num_threads(arguments.threads)
    with contextlib.ExitStack() as stack:
        folder = arguments.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        measure(folder, arguments)


if __name__ == "__main__":
    main()
