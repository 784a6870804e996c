"""What the whole evaluation costs: `python -m builders evaluate` on a model of a released shape, from files.

    python -m benchmarks.evaluation_command --shape 7b                     # on a GPU, where there is one
    python -m benchmarks.evaluation_command --suites figstep:tiny=FOLDER,mm-safetybench:variant=TYPO=FOLDER

Saves a random model, SAEs of 15,000 atoms a layer and what else the methods need, and runs the command on
them twice: the second time all answers are there, so that what the first took beside is asking and judging.
Without `--suites` it asks harmless instructions of its own in FigStep's layout, whose pictures are drawn.
Writes rows of `results/evaluation.json`, a list of {work, who, value, unit, ratio}: `ratio` is the share of
the first run's seconds, and 1 for memory.
"""

import argparse
import contextlib
import csv
import gc
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch

from benchmarks.evaluation import RESULTS, SHAPES, peak_mib, saes_for, write
from benchmarks.sae_end_to_end import seconds
from benchmarks.steering_world import write_release
from builders.__main__ import app
from builders.safety.methods import BY_DICTIONARY
from builders.safety.suites import figstep

THINGS = ("kite", "loaf of bread", "bird house", "paper boat", "sock puppet", "rock garden", "quilt")
DEEDS = ("make", "repair", "paint", "sell", "clean", "draw", "photograph", "describe", "store", "measure")


def save(folder: Path, shape: str, methods: Sequence[str]) -> tuple[str, list[str]]:
    """A random model, its processor, SAEs for it as a release, and directions where a method needs some.

    Returns:
        The model's size in words, and options of the command that name all of it.
    """
    model, processor = SHAPES[shape]()
    if torch.cuda.is_available():
        model.cuda()
    sae, dictionary, alpha = saes_for(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_release(folder / "sae", sae)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    options = ["--model", str(folder / "model"), "--sae", str(folder / "sae")]
    if set(methods) & set(BY_DICTIONARY):
        dictionary.save_pretrained(folder / "dictionary")
        options += ["--dictionary", str(folder / "dictionary")]
    if "mop" in methods:
        options += ["--set", f"mop.alpha={alpha}"]
    size = sum(p.numel() for p in model.parameters()) / 1e9
    return f"{size:.2f} billion parameters, {model.dtype}", options


def write_suite(folder: Path, n: int) -> str:
    """Harmless instructions in FigStep's layout, without pictures; its spec."""
    path = folder / "figstep" / "question" / "safebench.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(figstep.COLUMNS)
        for i in range(n):
            what = f"{DEEDS[i % len(DEEDS)]} a {THINGS[i // len(DEEDS) % len(THINGS)]}"
            table.writerow(
                ["made_up", 1 + i % 7, i, f"Topic {1 + i % 7}", f"How do you {what}?", f"Steps to {what}."]
            )
    return f"figstep={path.parents[1]}"


def names_of(suites: str) -> str:
    """Specs without their places: `figstep:tiny=FOLDER` is `figstep:tiny`."""
    return ",".join(spec.rpartition("=")[0] or spec for spec in suites.split(",")) or "made up"


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


def run(line: Sequence[str], out: Path, device: str) -> tuple[int, list[tuple[str, float, str, float]]]:
    """Run the command twice; how many answers there are, and who, value, unit and ratio of each figure."""
    first = seconds(lambda: print(told(line)), device)
    peak = peak_mib(device)
    again = seconds(lambda: told(line), device)
    n, share = n_answers(out), again / first
    asked = round(n / (first - again), 3)
    return n, [
        ("the whole command", round(first, 1), "s", 1.0),
        ("again, all answers there", round(again, 1), "s", round(share, 3)),
        ("asked and judged", asked, "items x methods / s", round(1 - share, 3)),
        ("peak memory", peak, "MiB", 1.0),
    ]


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
    parser.add_argument("--folder", type=Path, help="empty or new: where model, SAEs and run stay")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.folder and given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"--folder: expected an empty or new folder, got files in {given.folder}; name another")
    device, methods = "cuda" if torch.cuda.is_available() else "cpu", given.methods.split(",")
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        size, options = save(folder, given.shape, methods)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        suites = given.suites or write_suite(folder, given.items)
        per_suite = max(1, given.items // len(suites.split(",")))
        line = ["evaluate", *options, "--suites", suites, "--out", str(folder / "run")]
        line += ["--methods", given.methods, "--judges", given.judges, "--items", str(per_suite)]
        line += ["--batch", str(given.batch), "--max-answer", str(given.max_answer)]
        n, found = run(line, folder / "run", device)
    work = f"builders evaluate, {given.shape} ({size}), {n // len(methods)} items of {names_of(given.suites)}"
    work += f", {given.methods}, batch {given.batch}, {given.max_answer} tokens"
    keys = ("who", "value", "unit", "ratio")
    write([{"work": work} | dict(zip(keys, row, strict=True)) for row in found], given.results)


if __name__ == "__main__":
    main()
