"""What does steering cost a token? Every way of it on one model, in turns, beside the bytes it must read.

Prints a table and writes `results/steering.json` (`--out`), a list of {work, who, value, unit, ratio,
machine}; rows of other work that the file has stay, so that one file holds runs in several modes. In a round
every contender decodes a few tokens (compiled: generates), in an order that is drawn anew; counted is the
median time between two. The time added is the ratio to `none` of the same round, its interval a bootstrap
over rounds of the logarithm. `none again` is `none` once more: what it seems to add is noise. `floor` is
what a contender's weights add to the bytes that a token reads. An aim is `met` or `missed` where the whole
interval is on one side of it, else `not resolvable`. `ratio` is another's time over `daco_rows`'s; of
DACO's own methods, the share of the limit that the floor sets. `cpu` is the processor's time, which others
at work on the machine disturb less; with one thread it is what a quiet machine's wall clock would show. On
a GPU both are the GPU's own, between events.

Models have random weights, and are built once for all of `--batch 1 16`. `--device cuda --shape 7b --mode
compiled` measures a compiled decode step.
"""

import argparse
import gc
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tqdm import tqdm

from benchmarks.steering_world import (
    SHAPES,
    Shape,
    build_model,
    build_saes,
    held_bytes,
    read_bytes,
    write_release,
)
from builders.statistics import Interval, interval
from daco import load
from daco.coarse import usable
from daco.errors import SteeringConflictError
from daco.methods import MOP, SAESteering
from daco.sites import find_trunk
from daco.steering import steer
from daco.steering_sae import SteeringSAE
from daco.wrapping import wrap

RESULTS = Path(__file__).parent / "results" / "steering.json"
OWN = ("daco_rows", "daco_rows_all", "daco_exact", "mop")
CLOCKS = {"wall": "", "cpu": ", cpu"}
WARM = 1
"""Tokens after the prompt that are not timed."""


class Contender(NamedTuple):
    """A way to steer."""

    put_on: Callable[[], AbstractContextManager[Any]]
    """Steers the model while it is entered."""
    reads: int
    """Bytes of its weights that a token reads, at least."""
    holds: int
    """Bytes that it keeps beside the model."""


class Times(NamedTuple):
    """Medians over the tokens of a round, in seconds."""

    wall: float
    cpu: float


class Ticks(transformers.StoppingCriteria):
    """Notes when each token is done."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.events: list[torch.cuda.Event] = []

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        """Called by `generate` after each token; never stops it, nor waits for a GPU."""
        self.tick(ids.is_cuda)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def tick(self, on_gpu: bool) -> None:
        """Note the time; on a GPU, when it gets there."""
        if on_gpu:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        else:
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())

    def times(self, warm: int = 0) -> Times:
        """Medians, the first tokens left out."""
        if self.events:
            torch.cuda.synchronize()
            first = self.events[0]
            self.wall = self.cpu = [first.elapsed_time(event) / 1_000 for event in self.events]
        return Times(*(float(np.median(np.diff(ticks)[warm:])) for ticks in (self.wall, self.cpu)))


# contenders


@contextmanager
def plain_hooks(model: Any, vectors: dict[int, torch.Tensor]) -> Generator[None, None, None]:
    """ActAdd as one writes it by hand."""

    def add(vector: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda module, args, output: output + vector

    blocks = find_trunk(model).layers
    handles = [blocks[layer].register_forward_hook(add(vector)) for layer, vector in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contenders(
    model: Any, sae: SteeringSAE, dictionary: Any, alpha: float, removed: int, compiled: bool
) -> dict[str, Contender]:
    """All of them, by name; `daco_rows_all` removes as many atoms as `daco_rows` has labelled."""
    way: Callable[..., AbstractContextManager[Any]] = wrap if compiled else steer
    width, dtype = sae.base_model.hidden_size, next(model.parameters()).dtype
    layers, rows = list(sae.layers), {layer: list(range(removed)) for layer in sae.layers}
    vectors = {n: (0.02 * dictionary.R[n] * dictionary.unit(n)[0]).to(model.device, dtype) for n in layers}
    methods = {
        "daco_rows": SAESteering(sae, form="threshold"),
        "daco_rows_all": SAESteering(sae, form="threshold", remove=rows),
        "daco_exact": SAESteering(sae, form="exact"),
        "mop": MOP(dictionary, alpha),
    }
    found = {name: Contender(nullcontext, 0, 0) for name in ("none", "none again")}
    kept_in_bytes = model.device.type == "cpu" and usable(dictionary.raw(layers[0]))
    added = sum(vector.nbytes for vector in vectors.values())
    found["actadd"] = Contender(lambda: plain_hooks(model, vectors), added, added)
    for name, method in methods.items():
        n_atoms = sum(len(layer.atoms) for layer in sae.layers.values())
        n_rows = sum(len(method.atoms(layer)) for layer in layers)
        held = n_rows * (2 if "rows" in name else 1) + (0 if "rows" in name else n_atoms)
        in_bytes = n_atoms // 4 if name == "mop" and kept_in_bytes else 0
        held += in_bytes
        # a code cannot be certified without one pass over the dictionary, by bytes where it is kept so
        reads = (in_bytes or n_atoms) if name == "mop" else held
        put_on = lambda method=method: way(model, method, base_model_ok=True)  # noqa: E731
        found[name] = Contender(put_on, 4 * width * reads, 4 * width * held)
    return found


# time


def generate(model: Any, ids: torch.Tensor, tokens: int, compiled: bool) -> Times:
    """Time a token of one generation."""
    ticks = Ticks()
    options: dict[str, Any] = {}
    if compiled:
        options = {"cache_implementation": "static", "compile_config": transformers.CompileConfig()}
        options["compile_config"]._compile_all_devices = True  # a CPU too
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens + WARM + 1,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([ticks]),
        **options,
    )
    return ticks.times(WARM)


@torch.inference_mode()
def prefilled(model: Any, ids: torch.Tensor) -> Any:
    """The cache after a prompt, to which each turn of a contender comes back."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, cache: Any, tokens: int) -> Times:
    """Time a token of a few that follow a prompt, chosen greedily; the cache is as before."""
    ticks, length, new = Ticks(), ids.shape[1], ids[:, -1:]
    mask = torch.ones(len(ids), length + tokens, dtype=torch.long, device=ids.device)
    ticks.tick(ids.is_cuda)
    for i in range(tokens):
        seen = mask[:, : length + i + 1]
        logits = model(input_ids=new, attention_mask=seen, past_key_values=cache, use_cache=True).logits
        new = logits[:, -1:].argmax(-1)
        ticks.tick(ids.is_cuda)
    cache.crop(-tokens)
    return ticks.times()


def measure(
    model: Any, found: dict[str, Contender], ids: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, list[Times]]:
    """Times by contender and round; a contender that refuses the mode has none."""
    compiled = arguments.mode == "compiled"
    times: dict[str, list[Times]] = {name: [] for name in found}
    running, caches = dict(found), {}
    for name, contender in found.items():  # warm up, and see who takes part
        try:
            with contender.put_on():
                start = time.perf_counter()
                if compiled:  # a longer cache, later, would be compiled for again
                    generate(model, ids, arguments.tokens, compiled)
                else:
                    caches[name] = prefilled(model, ids)
                    decode(model, ids, caches[name], arguments.tokens)  # cuDNN plans anew for every length
                print(f"{name} is warm after {time.perf_counter() - start:.1f} s", flush=True)
        except (SteeringConflictError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"{name} refuses: {error}", flush=True)
            del running[name]
    draw = np.random.default_rng(arguments.seed)
    gc.collect()
    for number in tqdm(range(1, arguments.pairs + 1), unit="round", disable=None):
        for name in draw.permutation(list(running)):
            with found[name].put_on():
                took = (
                    generate(model, ids, arguments.tokens, compiled)
                    if compiled
                    else decode(model, ids, caches[name], arguments.tokens)
                )
                times[name].append(took)
        if number % 5 == 0 or number == 1:
            print(f"round {number}: {progress(times)}", flush=True)
    return times


def progress(times: dict[str, list[Times]]) -> str:
    """Medians up to now."""
    medians = {name: np.median([t.wall for t in found]) for name, found in times.items() if found}
    return ", ".join(f"{name} {1_000 * value:.1f} ms" for name, value in medians.items())


def added(times: dict[str, list[Times]], who: str, clock: str, over: str = "none") -> Interval:
    """What a contender adds to a token's time over another's, as a share of it."""
    mine, theirs = (np.array([getattr(t, clock) for t in times[name]]) for name in (who, over))
    return Interval(*(math.expm1(value) for value in interval(np.log(mine / theirs)[None])))


# rows


def aims(floors: dict[str, float], device: str) -> dict[str, float]:
    """The largest share that each may add."""
    rows = 0.04 if device == "cpu" else 0.02
    exact = {"daco_exact": floors["daco_exact"] + 0.03} if "daco_exact" in floors else {}
    mop = {} if device == "cpu" else {"mop": 0.25}
    return {"daco_rows": rows, "daco_rows_all": rows} | exact | mop


def verdict(found: Interval, aim: float | None) -> str:
    """Whether an aim is met, as far as the noise allows to say."""
    if aim is None:
        return ""
    return "met" if found.high <= aim else "missed" if found.low > aim else "not resolvable"


def percent(found: Interval) -> dict[str, float]:
    """An interval as columns."""
    names = ("value", "low", "high")
    return {name: round(100 * value, 2) for name, value in zip(names, found, strict=True)}


def time_rows(times: dict[str, list[Times]], floors: dict[str, float], what: str) -> Iterator[dict[str, Any]]:
    """Time a token; None of a contender that refuses."""
    for name, found in times.items():
        row = {"work": f"{what}, time a token", "who": name, "value": None, "unit": "refused", "ratio": None}
        if found:
            value = round(1_000 * float(np.median([t.wall for t in found])), 3)
            row |= {"value": value, "unit": "ms", "ratio": ratio_of(times, floors, name)}
        yield row


def ratio_of(times: dict[str, list[Times]], floors: dict[str, float], name: str) -> float | None:
    """A contender's time over `daco_rows`'s; of DACO's own, the floor's over its."""
    if name in OWN:
        return round((1 + floors[name]) / (1 + added(times, name, "wall").mean), 3)
    return round(1 + added(times, name, "wall", "daco_rows").mean, 3) if times["daco_rows"] else None


def added_rows(
    times: dict[str, list[Times]], floors: dict[str, float], what: str, device: str
) -> Iterator[dict[str, Any]]:
    """What each adds to a token's time, by both clocks."""
    for name in [name for name in times if times[name] and name != "none"]:
        aim = aims(floors, device).get(name)
        row = {"who": name, "unit": "% of none", "ratio": ratio_of(times, floors, name)}
        row |= {"floor": round(100 * floors[name], 2), "aim": aim and round(100 * aim, 2)}
        for clock, note in CLOCKS.items():
            extra = added(times, name, clock)
            yield row | {"work": f"{what}, added{note}", "verdict": verdict(extra, aim)} | percent(extra)
    for clock, note in CLOCKS.items() if times["daco_rows"] and times.get("actadd") else ():
        over = added(times, "daco_rows", clock, "actadd")
        row = {"work": f"{what}, added by daco_rows{note}", "who": "actadd", "unit": "% of actadd"}
        row |= {"aim": 1.0, "ratio": round(1 + over.mean, 3)}
        yield row | percent(over) | {"verdict": verdict(over, 0.01)}


def memory_rows(found: dict[str, Contender], weights: int, what: str) -> Iterator[dict[str, Any]]:
    """What each keeps beside the model."""
    for name, contender in found.items():
        if contender.holds:
            share = contender.holds / weights
            row = {"work": f"{what}, memory added", "who": name, "value": round(100 * share, 3)}
            aim = {"aim": 1.0, "verdict": "met" if share <= 0.01 else "missed"} if name == "daco_rows" else {}
            ratio = found["daco_rows"].holds / contender.holds if name in OWN else 1.0
            yield row | {"unit": "% of the model", "ratio": round(ratio, 3)} | aim


# loading


def forget(folder: Path) -> None:
    """Ask the system to drop the files of a folder from its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_once(folder: Path, steering_only: bool, cold: bool) -> tuple[float, int]:
    """Seconds and bytes of one load, up to a method that can steer."""
    read: dict[str, int] = {}
    path_of = load.Snapshot.path

    def counted(snapshot: load.Snapshot, name: str) -> Path:
        read[name] = (folder / name).stat().st_size
        return path_of(snapshot, name)

    if cold:
        forget(folder)
    load.Snapshot.path = counted  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        SAESteering(SteeringSAE.from_pretrained(folder, steering_only=steering_only), form="threshold")
        return time.perf_counter() - start, sum(read.values()) + (folder / "manifest.json").stat().st_size
    finally:
        load.Snapshot.path = path_of  # type: ignore[method-assign]


def load_rows(sae: SteeringSAE, repeats: int, what: str) -> Iterator[dict[str, Any]]:
    """Loading with and without `steering_only`, from a folder, cold and warm."""
    labelled = np.concatenate([layer.labels() != "neutral" for layer in sae.layers.values()]).mean()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "release"
        write_release(folder, sae)
        seconds: dict[tuple[bool, bool], list[float]] = {}
        size: dict[bool, int] = {}
        for _ in range(repeats):
            for cold in (True, False):
                for only in (True, False):
                    took, size[only] = load_once(folder, only, cold)
                    seconds.setdefault((only, cold), []).append(took)
    for (only, cold), found in seconds.items():
        gain = float(np.median(seconds[False, cold]) / np.median(found))
        row = {
            "work": f"{what}, load, {'cold' if cold else 'warm'}",
            "value": round(float(np.median(found)), 3),
        }
        gain = gain if only else float(np.median(found) / np.median(seconds[True, cold]))
        yield row | {"who": "steering_only" if only else "whole", "unit": "s", "ratio": round(gain, 1)}
    limit = (labelled + 0.01) * size[False]
    row = {"work": f"{what}, bytes read", "unit": "MB"}
    yield row | {
        "who": "whole",
        "value": round(size[False] / 1e6, 2),
        "ratio": round(size[False] / size[True], 1),
    }
    yield row | {
        "who": "steering_only",
        "value": round(size[True] / 1e6, 2),
        "ratio": round(limit / size[True], 3),
        "aim": round(limit / 1e6, 2),
        "verdict": "met" if size[True] <= limit else "missed",
    }


def machine(arguments: argparse.Namespace) -> str:
    """Hardware and versions, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    place = f"{cpu or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    if arguments.device == "cuda":
        place = f"{torch.cuda.get_device_name()}; {place}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{place}; {versions}, transformers {transformers.__version__}"


def built(shape: Shape, arguments: argparse.Namespace) -> tuple[Any, SteeringSAE, dict[str, Contender]]:
    """The model, its SAEs, and who takes part."""
    start = time.perf_counter()
    model = build_model(shape, getattr(torch, arguments.dtype), arguments.device, arguments.seed)
    print(f"the model is there after {time.perf_counter() - start:.1f} s", flush=True)
    long = tokens_of(shape, (1, 256), arguments)
    sizes = arguments.atoms, arguments.labelled
    sae, dictionary, alpha = build_saes(model, shape, long, *sizes, arguments.seed)
    found = contenders(model, sae, dictionary, alpha, sizes[1], arguments.mode == "compiled")
    print(f"so are SAEs after {time.perf_counter() - start:.1f} s; MOP's alpha: {alpha:.2f}", flush=True)
    return model, sae, {name: found[name] for name in found if name in ("none", "daco_rows", *arguments.who)}


def tokens_of(shape: Shape, size: tuple[int, int], arguments: argparse.Namespace) -> torch.Tensor:
    """Random tokens, none of them special."""
    draw = torch.Generator().manual_seed(arguments.seed + size[0])
    return torch.randint(10, shape.config["vocab_size"] // 2, size, generator=draw).to(arguments.device)


def speed(
    model: Any, found: dict[str, Contender], ids: torch.Tensor, what: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rows of a batch but those of loading."""
    print(f"{what}: {held_bytes(model) / 1e9:.2f} GB, {read_bytes(model) / 1e9:.2f} GB a token", flush=True)
    times = measure(model, found, ids, arguments)
    floors = {name: contender.reads / read_bytes(model) for name, contender in found.items()}
    rows = [*time_rows(times, floors, what), *added_rows(times, floors, what, arguments.device)]
    return [*rows, *memory_rows(found, held_bytes(model), what)]


def others(out: Path, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of other work that were measured before."""
    old = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    works = {row["work"] for row in table}
    return [row for row in old if row["work"] not in works]


def show(row: dict[str, Any]) -> None:
    """A row of the table."""
    between = f"[{row['low']}, {row['high']}]" if "low" in row else ""
    notes = [f"{name} {row[name]}" for name in ("floor", "aim", "verdict") if row.get(name) not in (None, "")]
    print(
        f"{row['work']:<58} {row['who']:<14} {row['value']!s:>9} {row['unit']:<15} {between:<16} "
        f"x {row['ratio']}  {', '.join(notes)}"
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--mode", choices=["eager", "compiled"], default="eager")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--pairs", type=int, default=40, help="rounds")
    parser.add_argument("--tokens", type=int, default=6, help="timed tokens of a round")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the prompt")
    parser.add_argument("--atoms", type=int, default=15_000)
    parser.add_argument("--labelled", type=int, default=1_000, help="atoms a layer")
    names = ["none again", "actadd", "daco_rows_all", "daco_exact", "mop"]
    parser.add_argument("--who", nargs="*", default=names, choices=names, help="beside none and daco_rows")
    parser.add_argument("--loads", type=int, default=3, help="repeats of loading; 0: not timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    return arguments


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    if arguments.mode == "compiled":  # plain hooks, put on after compiling, are seen at the cost of a guard
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.config.recompile_limit = 64  # one graph for each contender
    shape = SHAPES[arguments.shape]
    model, sae, found = built(shape, arguments)
    for batch in arguments.batch:
        what = f"{shape.name}, {arguments.dtype}, {arguments.mode}, batch {batch}"
        ids = tokens_of(shape, (batch, arguments.prompt), arguments)
        write(speed(model, found, ids, what, arguments), arguments)
    if arguments.loads:
        del model, found
        gc.collect()
        write(list(load_rows(sae, arguments.loads, what)), arguments)


def write(table: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Show rows, and put them into the file in place of those of the same work."""
    table = [row | {"machine": machine(arguments)} for row in table]
    for row in table:
        show(row)
    arguments.out.parent.mkdir(exist_ok=True)
    table = [*others(arguments.out, table), *table]
    arguments.out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
