"""Stimuli that may be nearest, by rounded products: `builders.retrieval` decides among them in float64.

Reads a corpus block by block; for a GPU by all threads, ahead of it. What is dropped lies below a bar that is
known, and rounding is bounded from the rows as they are, so that nothing is missed unnoticed.
"""

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from builders.scores import FLOOR, Corpus, Floats, Ints, Rows, exact_scores
from daco.errors import RecipeError
from daco.kernels import kernels_of

MARGIN = {"float32": 16, "bfloat16": 80}
"""Stimuli proposed beyond k, by dtype: enough that float64 can nearly always tell the k best."""

GPU_MARGIN = 3
"""Times as many on a GPU, which a second look at the corpus costs more than a longer list."""

RIPE = {"float32": 10, "bfloat16": 24}
"""New stimuli a concept after which the bars are raised: sooner costs sorting, later costs looking."""

GROUP = 32
"""Products looked at together: only where the largest of them is above the bar, each is looked at."""

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
"""Above zero, floats are ordered as the integers of the same bits, which are compared faster."""

MOVED = 0.0021
"""Farthest that rounding to bfloat16 mostly moves a unit row. The search takes note of rows that it moves
farther, and looks again where that could matter."""

AHEAD = 2
"""Blocks of the corpus that are read for a GPU while it works on one."""

T, U = TypeVar("T"), TypeVar("U")


@dataclass(frozen=True)
class Engine:
    """How proposals are computed; changes the time and memory of a search, never its answer."""

    dtype: str = "float32"
    """`float32` or `bfloat16`."""
    device: str = "cpu"
    """`cpu` or `cuda`, optionally with a number."""
    memory: int = 1536
    """MiB of working memory beside the embeddings, at most."""
    block: int = 0
    """Stimuli scored at once; 0: what memory and device suggest."""
    tile: int = 0
    """Concepts scored at once; 0: likewise."""


class Workers:
    """As many threads as torch has, each with one of its own: no operation waits for the other threads.

    A GPU is given its work by one thread; the others read the corpus for it.
    """

    def __init__(self, engine: Engine) -> None:
        self.gpu = on_gpu(engine)
        self.threads = torch.get_num_threads()
        self.n = 1 if self.gpu else self.threads
        """Tiles scored at once."""

    def __enter__(self) -> "Workers":
        self.reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        if self.gpu:  # sums in bfloat16 are no part of the error's bound
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.gpu:
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = self.reduced
        torch.set_num_threads(self.threads)  # the threads' own setting was everybody's

    def map(self, step: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """`step`, which computes on the device, of every item, in order."""
        return [step(item) for item in items] if self.n == 1 else self.spread(step, items)

    def spread(self, step: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """`step`, which computes on processors, of every item, in order; not from within another step."""
        if self.threads == 1:
            return [step(item) for item in items]
        return list(self.pool.map(step, items))

    def shares(self, n: int, most: int) -> Iterator[slice]:
        """n items in slices of `most` or fewer, so that every thread gets several; for a GPU in one."""
        return slices(n, max(1, n if self.gpu else min(most, -(-n // (4 * self.threads)))))


def on_gpu(engine: Engine) -> bool:
    """Whether proposals are computed on a GPU."""
    return engine.device.startswith("cuda")


def device_of(engine: Engine) -> torch.device:
    """The engine's device; a GPU with its number, for threads that read for it have another current one."""
    device = torch.device(engine.device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def slices(n: int, step: int) -> Iterator[slice]:
    """n items in slices of `step`, the last one shorter."""
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def split(found: Floats, lengths: Ints) -> list[Floats]:
    """Consecutive pieces of these lengths."""
    ends = np.cumsum(lengths).tolist()
    return [found[start:end] for start, end in itertools.pairwise([0, *ends])]


@functools.cache
def onednn_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's float32 product `a @ b.T`, None where torch has none.

    MKL, behind torch.mm, does without AVX-512 on processors of other makers, and takes twice as long there.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return found

    try:
        product(torch.eye(2), torch.eye(2))
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or a processor that it does not know
        return None
    return product


def kernels_for(device: torch.device) -> Any:
    """The kernels that look through cosines there; None: torch does."""
    if device.type != "cuda":
        return None
    return kernels_of("builders.retrieval_kernels", "retrieval goes on")


def check_products(device: torch.device) -> None:
    """Some settings of torch round the factors of float32 products; no bound holds for those.

    Raises:
        RecipeError: one of them is on.
    """
    unit = torch.eye(128, device=device)
    fine = unit * (1 + 2.0**-12)  # which TF32 and bfloat16 do not tell from 1
    onednn = onednn_product() if device.type == "cpu" else None
    for product in (onednn or torch.mm, torch.mm):
        if not torch.equal(product(fine, unit), fine):
            raise RecipeError(
                "expected float32 products in float32, got factors of lower precision; "
                'call torch.set_float32_matmul_precision("highest") and unset ONEDNN_DEFAULT_FPMATH_MODE'
            )


def _sizes(n: int, width: int, engine: Engine, n_workers: int) -> tuple[int, int]:
    """(stimuli, concepts) scored at once: blocks and their products take a quarter of the memory each."""
    quarter = engine.memory * 2**20 // 4
    widest, most = (65_536, 16_384) if on_gpu(engine) else (2_048, 768)
    block = engine.block or max(GROUP, min(widest, quarter // (24 * width)) // GROUP * GROUP)
    share = -(-n // (2 * n_workers))  # every worker gets something to do
    return block, engine.tile or max(1, min(most, max(64, share), quarter // (16 * block * n_workers)))


def query_parts(n: int, k: int, n_pool: int, width: int, engine: Engine) -> list[slice]:
    """Queries whose running best fit into the memory that is left, part by part.

    Raises:
        RecipeError: there is no room for one.
    """
    left = engine.memory * 2**20 // 2 - 8 * n_pool * width
    most = left // (16 * (_room(k, engine) + width))
    if most < 1:
        raise RecipeError(
            f"stimuli.memory: expected more than {engine.memory} MiB for a pool of {n_pool} x {width}; "
            "raise stimuli.memory or lower stimuli.pool"
        )
    return [slice(start, start + most) for start in range(0, max(n, 1), most)]


def _kept(k: int, engine: Engine) -> int:
    return k + MARGIN[engine.dtype] * (GPU_MARGIN if on_gpu(engine) else 1)


def _room(k: int, engine: Engine) -> int:
    return 4 * _kept(k, engine)


class Proposer:
    """Running best of every query by a rounded closeness, and a bar that everything dropped lies below.

    `bar[q]` only rises, and what of the corpus is not among `values[q]` has a rounded closeness <= bar[q].
    """

    def __init__(
        self, queries: Floats, corpus: Corpus, k: int, pool: Ints, engine: Engine, workers: Workers
    ) -> None:
        self.corpus, self.k, self.pool, self.engine = corpus, k, pool, engine
        self.workers, self.local = workers, threading.local()
        self.device = device_of(engine)
        self.dtype = torch.bfloat16 if engine.dtype == "bfloat16" else torch.float32
        self.block, self.tile = _sizes(len(queries), corpus.images.width, engine, workers.n)
        self.kept, self.room = _kept(k, engine), _room(k, engine)
        self.queries = queries
        self.single = torch.from_numpy(queries).to(self.device)
        self.asked = self.single.to(self.dtype)
        self.error = _Error(corpus.images.width, self.single, self.asked)
        n = len(queries)
        self.values = torch.full((n, self.room), -1.0, device=self.device)
        self.columns = torch.zeros((n, self.room), dtype=torch.int64, device=self.device)
        self.count = torch.zeros(n, dtype=torch.int64, device=self.device)
        self.bar = torch.full((n,), self.error.at(0.0), device=self.device)
        self.kernels = kernels_for(self.device)

    def tiles(self) -> Iterator[slice]:
        """Slices of the queries."""
        return slices(len(self.asked), self.tile)

    def scan_rest(self) -> None:
        """Score everything that is not in the pool."""
        rest = np.delete(np.arange(len(self.corpus)), self.pool)
        blocks = [rest[start : start + self.block] for start in range(0, len(rest), self.block)]
        for rows, read in zip(blocks, self._read_blocks(blocks), strict=True):
            singles = self.workers.map(self._single, read)
            halves = [single.to(self.dtype) for single in singles]
            for single, rounded in zip(singles, halves, strict=True):
                self.error.note(single, rounded)
            self._score_block(torch.from_numpy(rows).to(self.device), halves)

    def _read_blocks(self, blocks: list[Ints]) -> Iterator[list[Tensor]]:
        """(image, text) rows of each block; for a GPU the next ones are read meanwhile."""
        if not self.workers.gpu:
            for rows in blocks:
                yield self.workers.map(
                    lambda side: torch.from_numpy(side.take(rows)),  # noqa: B023
                    (self.corpus.images, self.corpus.texts),
                )
            return
        with ThreadPoolExecutor(AHEAD) as readers:
            coming = deque(readers.submit(self._upload, rows) for rows in blocks[:AHEAD])
            for rows in itertools.chain(blocks[AHEAD:], [None] * len(coming)):
                read = coming.popleft().result()
                if rows is not None:
                    coming.append(readers.submit(self._upload, rows))
                for side in read:
                    if side.is_cuda:  # was made on another stream, which may not have it back too soon
                        side.record_stream(torch.cuda.current_stream(self.device))
                yield read

    def _upload(self, rows: Ints) -> list[Tensor]:
        """(image, text) rows on a GPU: all threads gather them into memory that it reads by itself."""
        sides = (self.corpus.images, self.corpus.texts)
        staged = [self._staged(number, len(rows), side) for number, side in enumerate(sides)]
        parts = itertools.product(range(2), slices(len(rows), -(-len(rows) // self.workers.threads)))

        def gather(work: tuple[int, slice]) -> None:
            number, part = work
            sides[number].take(rows[part], out=staged[number].numpy()[part])

        self.workers.spread(gather, parts)
        return _moved_to(self.device, staged, self.local)

    def _staged(self, number: int, n: int, side: Rows) -> Tensor:
        """[n, d] of a reader's own in pinned memory, where there is a GPU to read it."""
        held: dict[int, Tensor] = self.local.__dict__.setdefault("staged", {})
        if number not in held or len(held[number]) < n:
            dtype = torch.from_numpy(np.empty(0, side.dtype)).dtype
            pinned = self.device.type == "cuda"
            held[number] = torch.empty(n, side.width, dtype=dtype, pin_memory=pinned)
        return held[number][:n]

    def _single(self, rows: Tensor) -> Tensor:
        """Rows in float32, and rows of zeros up to a number divisible by GROUP: no bar lies as low."""
        single = rows.to(self.device).float()
        missing = -len(single) % GROUP
        return torch.nn.functional.pad(single, (0, 0, 0, missing)) if missing else single

    def _score_block(self, rows: Tensor, sides: list[Tensor]) -> None:
        def score(tile: slice) -> None:
            image, text = self._cosines(self.asked[tile], sides)
            if not self.kernels or not self._take_above(tile, image, text, rows):
                self._offer(tile, image.mul_(text), text, rows)

        self.workers.map(score, self.tiles())

    def _cosines(self, asked: Tensor, sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Rounded (image, text) cosines [tile, block]; a thread's next ones take their place."""
        if asked.dtype == torch.float32 and asked.device.type == "cpu" and (onednn := onednn_product()):
            return onednn(asked, sides[0]), onednn(asked, sides[1])
        image, text = (
            self._buffer(name, len(asked), len(sides[0]), asked.dtype) for name in ("image", "text")
        )
        for out, side in ((image, sides[0]), (text, sides[1])):
            torch.mm(asked, side.T, out=out)
        return image, text

    def _buffer(self, name: str, m: int, n: int, dtype: torch.dtype) -> Tensor:
        """[m, n] of a thread's own; fresh memory for every tile would cost much."""
        size = m * n
        buffers: dict[str, Tensor] = self.local.__dict__
        found = buffers.get(f"{name}{dtype}")
        if found is None or len(found) < size:
            found = buffers[f"{name}{dtype}"] = torch.zeros(size, dtype=dtype, device=self.device)
        return found[:size].view(m, -1)

    def _offer(self, tile: slice, product: Tensor, text: Tensor, rows: Tensor) -> None:
        """Take what lies above the bars of a tile's queries into their running best.

        Two negative cosines have a product that looks good: looked at again where it is above the bar.
        """
        grouped, bar = _grouped(product), self.bar[tile]
        largest = grouped.view(INTEGERS[product.dtype]).amax(2)
        who, group = where_true(largest > _bits(bar, product.dtype)[:, None])
        if len(who) * 4 > largest.numel() * 3:
            self._merge_best(tile, product, text, rows)
            return
        values = grouped[who, group]
        hit, place = where_true(values > bar[who, None])
        number = _grouped(torch.arange(product.shape[1], device=self.device)[None], product.dtype)[0]
        who, columns, values = who[hit], number[group[hit], place], values[hit, place].float()
        sound = text[who, columns] > 0
        if not bool(sound.all()):
            who, columns, values = who[sound], columns[sound], values[sound]
        if not self._append(tile, who, rows[columns], values):
            self._merge_best(tile, product, text, rows)

    def _take_above(self, tile: slice, image: Tensor, text: Tensor, rows: Tensor) -> bool:
        """`_offer` by a kernel that reads the cosines once; False where there is no room: nothing is done."""
        lists = self.values[tile], self.columns[tile], self.count[tile]
        slots = torch.arange(self.room, device=self.device)
        for again in (False, True):
            before = self.count[tile].clone()
            self.kernels.take_above(image, text, self.bar[tile], rows, *lists)
            most, total = torch.stack([self.count[tile].max(), self.count[tile].sum()]).tolist()
            if most <= self.room:
                if total > (self.kept + RIPE[self.engine.dtype]) * len(before):
                    self._compact(tile)
                return True
            self.values[tile].masked_fill_(slots >= before[:, None], -1.0)
            self.count[tile] = before
            if not again:
                self._compact(tile)
        return False

    def _append(self, tile: slice, who: Tensor, columns: Tensor, values: Tensor) -> bool:
        """Append to the running lists; False where there is no room, and nothing is done."""
        fresh = torch.bincount(who, minlength=tile.stop - tile.start)
        if int((self.count[tile] + fresh).max()) > self.room:
            self._compact(tile)
            if int((self.count[tile] + fresh).max()) > self.room:
                return False
        slot = self.count[tile][who] + torch.arange(len(who), device=self.device)
        slot -= (fresh.cumsum(0) - fresh)[who]
        self.values[tile][who, slot], self.columns[tile][who, slot] = values, columns
        self.count[tile] += fresh
        if int(self.count[tile].sum()) > (self.kept + RIPE[self.engine.dtype]) * len(fresh):
            self._compact(tile)
        return True

    def _merge_best(self, tile: slice, product: Tensor, text: Tensor, rows: Tensor) -> None:
        """Where a tile has more above the bar than there is room: keep only its best."""
        n = len(rows)
        signed = torch.where(text[:, :n] > 0, product[:, :n].float(), -1.0)
        values, columns = signed.topk(min(self.kept + 1, n), dim=1)
        if n > self.kept:
            self._raise(tile, values[:, -1])
            values, columns = values[:, :-1], columns[:, :-1]
        self._compact(tile)
        width = values.shape[1]
        self.values[tile, self.kept : self.kept + width] = values
        self.columns[tile, self.kept : self.kept + width] = rows[columns]
        self._compact(tile)

    def _compact(self, tile: slice) -> None:
        """Keep the best of the running lists, and raise the bars to what was dropped."""
        values, order = self.values[tile].topk(self.kept + 1, dim=1)
        columns = self.columns[tile].gather(1, order)
        self._raise(tile, values[:, -1])
        self.values[tile, : self.kept], self.columns[tile, : self.kept] = values[:, :-1], columns[:, :-1]
        self.values[tile, self.kept :] = -1.0
        self.count[tile] = self.kept
        last = values[:, self.k - 1]
        sure = last - 2.1 * self.error.at(last)  # nothing below can be among the k best
        self._raise(tile, torch.where(last > 0, sure, self.bar[tile]))

    def _raise(self, tile: slice, bar: Tensor) -> None:
        self.bar[tile] = torch.maximum(self.bar[tile], bar)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """(values, columns) [n, kept] of all queries, best first; what is empty has the value -1."""
        for tile in self.tiles():
            self._compact(tile)
        return self.values[:, : self.kept], self.columns[:, : self.kept]

    def exact(self, who: Tensor, columns: Tensor) -> Tensor:
        """Float64 cosines [2, n] (image, text) of pairs (queries[who[i]], stimulus columns[i]).

        A GPU adds them up itself, from rows that the threads read for it, each once: numpy's calls hand
        round the interpreter's lock, so that 16 threads got through little more than two would. Its sums
        have another order than `exact_scores`', and may differ from those in the last bits.
        """
        if not self.workers.gpu:
            return torch.from_numpy(
                np.stack(exact_scores(self.queries, self.corpus, who.numpy(), columns.numpy()))
            )
        found = self.single.new_empty((2, len(who)), dtype=torch.float64)
        if not len(who):
            return found
        columns, order = columns.sort(stable=True)
        distinct, at = torch.unique_consecutive(columns, return_inverse=True)
        ends = at.new_tensor([part.stop for part in slices(len(distinct), self.block)])
        ends = [0, *torch.searchsorted(at, ends).tolist()]
        wanted = distinct.cpu().numpy()
        blocks = [wanted[part] for part in slices(len(wanted), self.block)]
        for number, sides in enumerate(self._read_blocks(blocks)):
            for part in slices(ends[number + 1] - ends[number], max(1, self.block // 4)):
                pairs = slice(ends[number] + part.start, ends[number] + part.stop)
                asked = self.single[who[order[pairs]]].double()
                for out, side in zip(found, sides, strict=True):
                    out[order[pairs]] = side[at[pairs] - number * self.block].double().mul_(asked).sum(1)
        return found

    # The pool.

    def scan_pool(self, draws: Sequence[Ints], n: int) -> list[Ints]:
        """Score the pool in float32: its members are proposed like all others, and far draws are found.

        Returns:
            For every query the corpus rows of its first n draws that lie in the farther half of the pool.
        """
        sides = [self._single(read) for read in next(self._read_blocks([self.pool]))]
        rows = torch.from_numpy(self.pool).to(self.device)
        most = self.engine.memory * 2**18 // (4 * len(self.pool) * self.workers.n)
        step = max(1, min(self.tile, most))
        block = max(GROUP, self.block // GROUP * GROUP)  # so that a block begins where a group does

        def score(tile: slice) -> list[Ints]:
            whole = self._buffer("whole", tile.stop - tile.start, len(sides[0]), torch.float32)
            for start in range(0, len(self.pool), block):
                part = slice(start, start + block)
                image, text = self._cosines(self.single[tile], [side[part] for side in sides])
                product = torch.mul(image.clamp_(min=0), text, out=whole[:, part])
                self._offer(tile, product, text, rows[part])
            return self._far(tile, whole[:, : len(self.pool)], draws[tile], n)

        found = self.workers.map(score, slices(len(self.asked), step))
        return [far for part in found for far in part]

    def _far(self, tile: slice, product: Tensor, draws: Sequence[Ints], n: int) -> list[Ints]:
        """The first n draws of each query whose exact closeness is in the farther half of the pool."""
        middle = _middles(product, self.workers.gpu)
        doubt = 2.1 * self.error.single(middle)
        low, high = (middle - doubt).astype(np.float32), (middle + doubt).astype(np.float32)
        walked, there = _padded([tried[: 4 * n] for tried in draws])
        drawn = product.gather(1, torch.from_numpy(walked).to(self.device)).cpu().numpy()
        drawn = np.where(there, np.maximum(drawn, 0), np.inf)  # a caption's cosine is clamped at 0
        sure = drawn < low[:, None]
        ahead = np.cumsum(sure, axis=1)
        looked_at = there & (ahead - sure < n)  # draws beyond are not needed
        short = (ahead[:, -1:] < n).any(axis=1) & (there.sum(1) < [len(tried) for tried in draws])
        unsure = looked_at & ~sure & (drawn <= high[:, None])
        taken = sure & looked_at
        far = split(self.pool[walked[taken]], taken.sum(1))
        doubtful = np.flatnonzero(short | unsure.any(axis=1))
        # Products looked at together: with copies an eighth of the memory, or what a cache holds.
        most = min(self.engine.memory * 2**14, 2**30) if self.workers.gpu else 2**20
        for part in slices(len(doubtful), max(1, most // len(self.pool))):
            some = doubtful[part]
            values = product[torch.from_numpy(some).to(self.device)].clamp_(min=0)
            tried = [draws[query] for query in some.tolist()]
            settled = self._far_exactly(tile.start + some, values, (low[some], high[some]), tried, n)
            for query, rows in zip(some.tolist(), settled, strict=True):
                far[query] = rows
        return far

    def _far_exactly(
        self, queries: Ints, values: Tensor, between: tuple[Floats, Floats], draws: Sequence[Ints], n: int
    ) -> list[Ints]:
        """`_far` of some queries [m], values [m, pool]: float64 orders the members about the middle.

        Those are few, but for data whose cosines are often below zero: half the pool ties at the clamp then.
        """
        low, high = (torch.from_numpy(bound).to(self.device)[:, None] for bound in between)
        far, unsure = values < low, (values >= low) & (values <= high)
        # A pair takes about 128 bytes here: of all threads together an eighth of the memory.
        if len(queries) > 1 and int(unsure.sum()) > self.engine.memory * 2**10 // self.workers.n:
            halves = slice(0, len(queries) // 2), slice(len(queries) // 2, None)
            return [
                rows
                for part in halves
                for rows in self._far_exactly(
                    queries[part], values[part], (between[0][part], between[1][part]), draws[part], n
                )
            ]
        n_near = len(self.pool) // 2 - (values > high).sum(1).cpu().numpy()
        who, column = where_true(unsure)
        member, asker = column.cpu().numpy(), who.cpu().numpy()
        rows, asked = self.pool[member], queries[asker]
        exact = self.exact(*(torch.from_numpy(found).to(self.device) for found in (asked, rows)))
        closeness = closeness_of(exact).cpu().numpy()
        order = np.lexsort((self.corpus.place[rows], -closeness, asker))
        rank = np.arange(len(order)) - np.searchsorted(asker, asker)  # askers rise, ordered or not
        farther = np.empty(len(order), dtype=bool)
        farther[order] = rank >= n_near[asker]
        far[who, column] = torch.from_numpy(farther).to(self.device)
        walked, there = _padded(draws)
        taken = far.gather(1, torch.from_numpy(walked).to(self.device)).cpu().numpy() & there
        taken &= np.cumsum(taken, axis=1) <= n
        return split(self.pool[walked[taken]], taken.sum(1))


def _padded(lists: Sequence[Ints]) -> tuple[Ints, NDArray[np.bool_]]:
    """Lists as rows of one matrix, zeros behind them, and where something is."""
    lengths = np.array([len(some) for some in lists])
    there = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.zeros(there.shape, dtype=np.int64)
    padded[there] = np.concatenate(lists)
    return padded, there


def closeness_of(scores: Tensor) -> Tensor:
    """`Scores.closeness` of float64 cosines [2, ...] on any device: the same bits."""
    image, text = scores.clamp(min=FLOOR)
    return (image * text).float()


def _moved_to(device: torch.device, staged: Sequence[Tensor], local: threading.local) -> list[Tensor]:
    """Copies on a device, complete; on a GPU by a stream of the thread's own, beside what is computed."""
    if device.type != "cuda":
        return [rows.clone() for rows in staged]
    if not hasattr(local, "stream"):
        local.stream = torch.cuda.Stream(device)
    with torch.cuda.stream(local.stream):
        moved = [rows.to(device, non_blocking=True) for rows in staged]
    local.stream.synchronize()
    return moved


def _middles(product: Tensor, gpu: bool) -> Floats:
    """Of each row [n, m] the highest value of the lower half, 0 at least; float64 [n]."""
    at = product.shape[1] - product.shape[1] // 2 - 1
    if gpu:
        middles = product.kthvalue(at + 1, dim=1).values.double().cpu().numpy()
    else:  # row by row, so that it stays in the cache
        middles = np.array([np.partition(row, at)[at] for row in product.numpy()], dtype=np.float64)
    return np.maximum(middles, 0.0)


def _grouped(columns: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Columns [n, m] as groups [n, m / size, size] of those looked at together.

    Neighbours, which a second look finds in one place; of 16-bit numbers, whose neighbours compare slowly,
    fewer that lie apart.
    """
    if (dtype or columns.dtype) == torch.float32:
        return columns.unflatten(1, (-1, GROUP))
    return columns.unflatten(1, (GROUP // 2, -1)).transpose(1, 2)


def where_true(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of what is true; numpy finds a few among many sooner than torch."""
    if mask.device.type != "cpu":
        rows, columns = torch.nonzero(mask, as_tuple=True)
        return rows, columns
    places = torch.from_numpy(np.flatnonzero(mask.numpy()))
    rows = torch.div(places, mask.shape[1], rounding_mode="floor")
    return rows, places - rows * mask.shape[1]


def _bits(bar: Tensor, dtype: torch.dtype) -> Tensor:
    """Bars > 0 as integers that the bits of a product in `dtype` are above where the product is."""
    bits = bar.view(torch.int32)
    return bits if dtype == torch.float32 else (bits >> 16).to(torch.int16)


class _Error:
    """Bound on |rounded closeness - float64 closeness|, from the rows as they are.

    A cosine's error is at most |x||q - q'| + |q'||x - x'| for the rounding of the rows, d u |x||q| for the
    sum in float32 (2 u where a GPU's units for bfloat16 cut off instead of rounding), and u' |cos| for a
    bfloat16 result; the product p of two such is off by the first (1 + p).
    """

    SLACK = 1.05
    """Rows are unit within float16, and the bound itself is computed in float32."""

    def __init__(self, width: int, single: Tensor, rounded: Tensor) -> None:
        self.sum = (width + 4) * 2.0**-24
        self.rounded_sum = self.sum * (2 if rounded.dtype == torch.bfloat16 else 1)
        self.queries = _moved(single, rounded)
        self.seen = MOVED if rounded.dtype == torch.bfloat16 else 0.0
        self.relative = 3 * 2.0**-8 if rounded.dtype == torch.bfloat16 else 2.0**-22

    def note(self, single: Tensor, rounded: Tensor) -> None:
        """Remember the farthest that rounding moved a row."""
        if rounded.dtype != single.dtype:
            self.seen = max(self.seen, _moved(single, rounded))

    def at(self, closeness: Any) -> Any:
        """The bound at some closeness (number or tensor), for the rows noted so far."""
        return self._bound(self.queries + self.seen + self.rounded_sum, closeness, self.relative)

    def single(self, closeness: Any) -> Any:
        """The bound of a float32 product."""
        return self._bound(self.sum, closeness, 2.0**-22)

    def _bound(self, cosine: float, closeness: Any, relative: float) -> Any:
        return self.SLACK * (cosine * (1.01 + closeness) + cosine**2 + relative * closeness + 2 * FLOOR)


def _moved(single: Tensor, rounded: Tensor) -> float:
    if rounded.dtype == single.dtype or not len(single):
        return 0.0
    return float((single - rounded.float()).norm(dim=1).max())
