"""How fast are SAEs trained, and how well, beside SAELens and sparsify? Same start, same batches, in turns.

Writes `results/sae_training.json`, a list of {work, who, value, unit, ratio}: `ratio` says how many times
better DACO is than `who`; DACO's own rows have its share of the encoder's float32 product alone. Speeds are
tokens a second of CPU time, so that other work on the machine counts less; `wall` is the wall clock's.
Activations are made up here: sparse mixtures of 4 d unit features with Zipf frequencies, a mean, noise, three
dimensions far larger than the others, one token in 500 eight times as long; then centred and scaled.

With `--device cuda` the same on a GPU, in tokens a second of the clock, several steps a turn, and with the
share of its bf16 peak that the encoder's product alone makes of DACO's step (`--shape paper --batch 4096`,
`--shape wide`). A run replaces the rows of the contenders that it runs: memory need not hold all at once.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.sae_contender import CONTENDERS

RESULTS = Path(__file__).parent / "results" / "sae_training.json"
SHAPES = {
    "small": {"d": 1_024, "m": 8_192, "k": 32, "batch": 2_048},
    "paper": {"d": 3_584, "m": 15_000, "k": 64, "batch": 1_024},
    "wide": {"d": 3_584, "m": 65_536, "k": 64, "batch": 4_096},
    "tiny": {"d": 32, "m": 64, "k": 4, "batch": 64},
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second of GPUs, by a part of their name (NVIDIA's data sheets, SXM)."""
RATE, HELD_OUT = 1e-3, 2_048


def activations(n: int, d: int, seed: int, device: str = "cpu", block: int = 4_096) -> Iterator[Tensor]:
    """[n, d] float32 made-up activations, see above; a block at a time, made on a device."""
    draw = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": draw, "device": device}
    n_features = 4 * d
    features = torch.nn.functional.normalize(torch.randn(n_features, d, **options), dim=1)
    chance = 1 / torch.arange(1, n_features + 1, device=device) ** 0.8
    chance *= 20 / chance.sum()
    centre = 2 * torch.randn(d, **options)
    width = torch.ones(d, device=device)
    width[torch.randperm(d, **options)[:3]] = 10
    for start in range(0, n, block):
        size = min(block, n - start)
        code = torch.zeros(size, n_features, device=device)
        there = torch.rand(size, n_features, **options) < chance
        uniform = torch.rand(2, int(there.sum()), **options)
        code[there] = -2 * (1 - uniform).log().sum(
            0
        )  # gamma of shape 2, scale 2: the sum of two exponentials
        z = code @ features + 0.2 * torch.randn(size, d, **options)
        z[torch.rand(size, **options) < 1 / 500] *= 8
        yield (z + centre) * width


def prepare(folder: Path, shape: dict[str, Any], n_tokens: int, seed: int) -> None:
    """Write shape, scaled tokens (the last are held out) and the common start."""
    d, device = shape["d"], shape["device"]
    z = torch.empty(n_tokens, d)
    for place, made in zip(z.split(4_096), activations(n_tokens, d, seed, device), strict=True):
        place.copy_(made)
    centre = torch.stack([part.mean(0) for part in z.split(HELD_OUT)]).mean(0)
    size = 0.0
    for part in z.split(HELD_OUT):
        size += float(part.sub_(centre).square().sum())
    z.div_((size / z.numel()) ** 0.5).numpy().tofile(folder / "tokens.f32")
    draw = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(shape["m"], d, generator=draw, device=device)
    W_dec = torch.nn.functional.normalize(rows, dim=1)
    start = {"W_enc": W_dec.T.contiguous().cpu(), "b_enc": torch.zeros(shape["m"]), "W_dec": W_dec.cpu()}
    save_file(start | {"b_dec": torch.zeros(d)}, folder / "start.safetensors")
    (folder / "shape.json").write_text(json.dumps(shape))


class Worker:
    """A contender at work in its environment."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        self.name, self.fve = name, 0.0
        self.steps: list[dict[str, Any]] = []
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [python, "-W", "ignore", str(Path(__file__).parent / "sae_contender.py"), name, str(folder)]
        self.log = (folder / f"{name}.log").open("w")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def ask(self, command: str) -> dict[str, Any]:
        """Its answer to a line."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {Path(self.log.name).read_text()[-600:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


def race(
    names: list[str], pythons: dict[str, str], shape: dict[str, Any], folder: Path, rounds: int
) -> list[Worker]:
    """All contenders in turns; the first round warms up. Then each has its FVE in `fve`."""
    workers = [Worker(name, pythons[CONTENDERS[name][0]], folder, shape["threads"]) for name in names]
    workers = [worker for worker in workers if runs(worker, shape["steps"])]
    for turn in range(1, rounds + 1):
        for worker in workers:
            first = turn * shape["steps"] * shape["batch"]
            worker.steps.append(worker.ask(f"step {first} {shape['steps']}"))
    for worker in workers:
        worker.fve = 0.0 if worker.name.startswith("matmul") else worker.ask("fve")["fve"]
        worker.close()
    return workers


def runs(worker: Worker, steps: int) -> bool:
    """Take the first steps, which warm up; False where they fail (SAELens's sparse path does on a CPU)."""
    try:
        worker.ask(f"step 0 {steps}")
    except RuntimeError as error:
        print(str(error).splitlines()[-1][:200])
        return False
    return True


def rows(workers: list[Worker], shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed, FVE and peak memory of every contender, with DACO's ratio."""
    where = f"d {shape['d']:,}, m {shape['m']:,}, k {shape['k']}, batch {shape['batch']:,}"
    on_gpu = shape["device"] == "cuda"
    cpu = {w.name: statistics.median(step["cpu"] for step in w.steps) for w in workers}
    wall = {w.name: statistics.median(step["wall"] for step in w.steps) for w in workers}
    limit = cpu.get("matmul, bfloat16" if on_gpu else "matmul, float32", float("nan"))
    mine = next(w for w in workers if w.name == "DACO")
    found = []
    for w in workers:
        ratio = limit / cpu[w.name] if w.name.startswith("DACO") else cpu[w.name] / cpu["DACO"]
        row = {"work": f"train, {where}", "who": w.name, "unit": "tokens / s" if on_gpu else "tokens / CPU s"}
        row |= {"value": round(shape["batch"] / cpu[w.name]), "ratio": round(ratio, 3)}
        found.append(
            row | {"wall": round(shape["batch"] / wall[w.name]), "steps": len(w.steps) * shape["steps"]}
        )
        if w.name.startswith("matmul"):
            continue
        tokens = shape["batch"] * shape["steps"] * (len(w.steps) + 1)
        row = {"work": f"FVE after {tokens:,} tokens, {where}", "who": w.name, "unit": "FVE"}
        found.append(
            row | {"value": round(w.fve, 4), "ratio": round(mine.fve / w.fve, 3) if w.fve > 0 else None}
        )
        row = {"work": f"peak memory, {where}", "who": w.name, "unit": "MiB"}
        ratio = w.steps[-1]["peak"] / mine.steps[-1]["peak"]
        found.append(row | {"value": round(w.steps[-1]["peak"] / 2**20), "ratio": round(ratio, 2)})
    return found + (of_the_peak(where, shape, cpu["DACO"]) if on_gpu else [])


def of_the_peak(where: str, shape: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """DACO's share of the GPU's bf16 peak, the encoder's product alone counted; nothing of an unknown GPU."""
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAK.items() if part in name), None)
    if peak is None:
        return []
    rate = 2 * shape["batch"] * shape["d"] * shape["m"] / seconds
    row = {"work": f"share of the bf16 peak, {where}", "who": "DACO", "unit": "TFLOP / s"}
    return [row | {"value": round(rate / 1e12, 1), "ratio": round(rate / peak, 3)}]


def machine(threads: int) -> str:
    """Hardware, versions and how busy the machine was, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    cpu = next(named, platform.processor() or platform.machine())
    gpu = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{cpu}, {threads} of {os.cpu_count()} threads, load {os.getloadavg()[0]:.0f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, sae-lens 6.54, eai-sparsify 1.3.3"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--saelens", default="", help="python of an environment with sae-lens 6.54")
    parser.add_argument("--sparsify", default="", help="python of an environment with eai-sparsify 1.3.3")
    parser.add_argument("--only", default="", help="contenders, separated by ';'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=0, help="tokens a step; 0: the shape's")
    parser.add_argument("--steps", type=int, default=1, help="steps of each contender a turn")
    parser.add_argument("--rate", type=float, default=RATE, help="of Adam, where it is what learns")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    pythons = {"main": sys.executable, "saelens": arguments.saelens, "sparsify": arguments.sparsify}
    wanted = arguments.only.split(";") if arguments.only else list(CONTENDERS)
    names = [name for name in wanted if pythons[CONTENDERS[name][0]]]
    shape = SHAPES[arguments.shape] | {
        "threads": arguments.threads,
        "rate": arguments.rate,
        "held_out": HELD_OUT,
    }
    shape |= {"device": arguments.device, "steps": arguments.steps}
    shape |= {"batch": arguments.batch} if arguments.batch else {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        n_tokens = (arguments.rounds + 1) * arguments.steps * shape["batch"] + HELD_OUT
        prepare(Path(place), shape, n_tokens, arguments.seed)
        torch.cuda.empty_cache()  # the contenders need it
        workers = race(names, pythons, shape, Path(place), arguments.rounds)
    table = [row | {"machine": machine(arguments.threads)} for row in rows(workers, shape)]
    for row in table:
        print(f"{row['work']:<62} {row['who']:<32} {row['value']:>8} {row['unit']:<15} x {row['ratio']}")
    print(f"{time.perf_counter() - began:.0f} s")
    old = json.loads(arguments.results.read_text()) if arguments.results.is_file() else []
    run = {(row["work"].partition(", d ")[2], row["unit"], row["who"]) for row in table}
    kept = [row for row in old if (row["work"].partition(", d ")[2], row["unit"], row["who"]) not in run]
    text = json.dumps(kept + table, indent=2, sort_keys=True) + "\n"
    arguments.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
