"""Command line of the toy world: `python -m builders.toyworld train`."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from builders.toyworld.train import Plan, Trainer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

WEIGHTS = Path(__file__).resolve().parent / "weights"


@app.callback()
def main() -> None:
    """The toy world."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = WEIGHTS / "llava",
    work: Annotated[Path, typer.Option(help="Where checkpoints go; running again resumes.")] = Path(
        "runs/toyworld"
    ),
    plan: Annotated[str, typer.Option(help="JSON of fields of the plan that differ.")] = "{}",
    threads: Annotated[int, typer.Option(help="Threads of torch; part of what fixes the bytes.")] = 1,
) -> None:
    """Train the tiny LLaVA from nothing, or from the last checkpoint."""
    torch.set_num_threads(threads)
    trainer = Trainer(dataclasses.replace(Plan(), **json.loads(plan)))
    if (work / "checkpoint.safetensors").is_file():
        trainer.restore(work)
    for _ in tqdm(range(trainer.done, trainer.total), unit="step", disable=None):
        trainer.step()
        if trainer.done % trainer.plan.checkpoint_steps == 0:
            trainer.save(work)
    trainer.write(out)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    app()
