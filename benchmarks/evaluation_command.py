"""What the whole evaluation costs: `python -m builders evaluate` on a model of a released shape, from files.

    python -m benchmarks.evaluation_command --shape 7b                     # on a GPU, where there is one
    python -m benchmarks.evaluation_command --suites figstep:tiny=FOLDER,mm-safetybench:variant=TYPO=FOLDER

Saves a random model and SAEs of 15,000 atoms a layer, and runs the command on them twice: the second time all
answers are there, so that what the first took beside it is asking and judging. Without `--suites` it asks
harmless instructions of its own in FigStep's layout, whose pictures are drawn. Writes rows of
`results/evaluation.json`, a list of {work, who, value, unit, ratio}: `ratio` is the share of the first run's
seconds, and 1 for memory.
"""

import argparse
import contextlib
import csv
import gc
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.evaluation import RESULTS, SHAPES, peak_mib, saes_for, write
from benchmarks.sae_end_to_end import seconds
from benchmarks.steering_world import write_release
from builders.__main__ import app
from builders.safety.suites import figstep

THINGS = (
    "a kite",
    "a loaf of bread",
    "a bird house",
    "a paper boat",
    "a sock puppet",
    "a herb garden",
    "a quilt",
)
DEEDS = ("make", "repair", "paint", "sell", "clean", "draw", "photograph", "describe", "store", "measure")


def save(folder: Path, shape: str) -> str:
    """A random model, its processor and SAEs for it as a release; the number of its parameters in words."""
    model, processor = SHAPES[shape]()
    if torch.cuda.is_available():
        model.cuda()
    folder.mkdir(exist_ok=True)
    write_release(folder / "sae", saes_for(model)[0])
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters, {model.dtype}"


def write_suite(folder: Path, n: int) -> str:
    """Harmless instructions in FigStep's layout, without pictures; its spec."""
    path = folder / "figstep" / "question" / "safebench.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(figstep.COLUMNS)
        for i in range(n):
            what = f"{DEEDS[i % len(DEEDS)]} {THINGS[i // len(DEEDS) % len(THINGS)]}"
            table.writerow(
                ["made_up", 1 + i % 7, i, f"Topic {1 + i % 7}", f"How do you {what}?", f"Steps to {what}."]
            )
    return f"figstep={path.parents[1]}"


def told(arguments: Sequence[str]) -> str:
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        app(list(arguments), standalone_mode=False)
    return printed.getvalue()


def n_answers(out: Path) -> int:
    """Answers that a run kept."""
    files = sorted(out.glob("answers/*/*/*.parquet"))
    tables = [pq.read_table(file, columns=["answer"]) for file in files]
    return sum(table.num_rows - table["answer"].null_count for table in tables)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--suites", default="", help="specs as the command takes them")
    parser.add_argument("--methods", default="none,daco")
    parser.add_argument("--judges", default="rule,choice,likelihood")
    parser.add_argument("--items", type=int, default=64, help="of all suites together")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-answer", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="a new one, where model, SAEs and run stay")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes = save(folder, given.shape)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        suites = given.suites or write_suite(folder, given.items)
        out, per_suite = folder / "run", given.items // len(suites.split(","))
        line = [
            "evaluate",
            "--model",
            str(folder / "model"),
            "--sae",
            str(folder / "sae"),
            "--suites",
            suites,
        ]
        line += ["--methods", given.methods, "--judges", given.judges, "--out", str(out)]
        line += ["--batch", str(given.batch), "--max-answer", str(given.max_answer)]
        line += ["--items", str(per_suite)]
        first = seconds(lambda: print(told(line)), device)
        peak = peak_mib(device)
        again = seconds(lambda: told(line), device)
        n = n_answers(out)
    methods = len(given.methods.split(","))
    what = f"builders evaluate, {given.shape} ({sizes}), {n // methods} items, {given.methods}"
    what += f", batch {given.batch}, {given.max_answer} tokens"
    facts = [
        ("the whole command", round(first, 1), "s", 1.0),
        ("again, all answers there", round(again, 1), "s", round(again / first, 3)),
        (
            "asked and judged",
            round(n / (first - again), 3),
            "items x methods / s",
            round(1 - again / first, 3),
        ),
        ("peak memory", peak, "MiB", 1.0),
    ]
    rows: list[dict[str, Any]] = [
        {"work": what, "who": who, "value": value, "unit": unit, "ratio": ratio}
        for who, value, unit, ratio in facts
    ]
    write(rows, given.results)


if __name__ == "__main__":
    main()
