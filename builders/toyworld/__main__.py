"""Command line of the toy world: train its models, look at them, compare ways to steer."""

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from builders.pipeline import run as run_pipeline
from builders.recipe import load_recipe
from builders.release import versions
from builders.toyworld import ablate, arms, compare, eyes, front, judge, scenes
from builders.toyworld.bench import Bench
from builders.toyworld.model import Batcher
from builders.toyworld.train import Plan, Trainer
from daco.manifest import canonical_json, write_atomic

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

WEIGHTS = Path(__file__).resolve().parent / "weights"
"""Where the committed models are: `llava` and `clip`."""

Threads = Annotated[int, typer.Option(help="Threads of torch; part of what fixes the bytes.")]
Work = Annotated[Path, typer.Option(help="Where checkpoints go; running again resumes.")]


RESULTS = Path("benchmarks/results/toyworld.json")
"""The committed table."""

ABLATIONS = Path("benchmarks/results/toyworld_ablations.json")
FRONT = Path("benchmarks/results/toyworld_tune.json")


def cells_bar(cells: Sequence[Any]) -> Iterable[Any]:
    """Progress of a comparison, quiet when not a terminal."""
    return tqdm(cells, unit="cell", disable=None)


def bar(steps: range) -> Iterable[Any]:
    """Progress of a training, quiet when not a terminal."""
    return tqdm(steps, unit="step", disable=None)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the models go.")] = WEIGHTS,
    work: Work = Path("runs/toyworld"),
    plan: Annotated[str, typer.Option(help="JSON of fields of the LLaVA's plan that differ.")] = "{}",
    only: Annotated[str, typer.Option(help="`llava` or `clip`; empty: both.")] = "",
    threads: Threads = 1,
) -> None:
    """Train the tiny CLIP and the tiny LLaVA from nothing, or from their last checkpoints."""
    torch.set_num_threads(threads)
    if only != "llava":
        eyes.train(out / "clip", work / "clip", progress=bar)
    if only != "clip":
        train_llava(out / "llava", work / "llava", dataclasses.replace(Plan(), **json.loads(plan)))


def train_llava(out: Path, work: Path, plan: Plan) -> None:
    """Train to the end of the plan; the checkpoint is deleted when the model is written."""
    trainer = Trainer(plan)
    if (work / "checkpoint.safetensors").is_file():
        trainer.restore(work)
    for _ in bar(range(trainer.done, trainer.total)):
        trainer.step()
        if trainer.done % plan.checkpoint_steps == 0:
            trainer.save(work)
    trainer.write(out)
    shutil.rmtree(work, ignore_errors=True)


@app.command()
def corpus(
    out: Annotated[Path, typer.Argument(help="Folder for images, stimuli.tsv and concepts.tsv.")],
    n: Annotated[int, typer.Option(help="Pictures.")] = 4_000,
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures.")] = 7,
) -> None:
    """Write captioned pictures and the table of concepts, as recipes of kind `table` read them."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = [("image", "caption", "key")]
    for image, item, key in scenes.corpus(n, seed):
        image.save(out / "images" / f"{key}.png")
        rows.append((f"images/{key}.png", item.text, key))
    concepts = [tuple(scenes.concepts()[0]), *(tuple(row.values()) for row in scenes.concepts())]
    for name, table in (("stimuli", rows), ("concepts", concepts)):
        text = "".join("\t".join(row) + "\n" for row in table)
        write_atomic(out / f"{name}.tsv", text)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of a LLaVA.")] = WEIGHTS / "llava",
    n: Annotated[int, typer.Option(help="Items of each suite.")] = 200,
    seed: Annotated[int, typer.Option(help="Another seed draws other items.")] = 0,
    split: Annotated[str, typer.Option(help="`validation` or `test`.")] = "validation",
    threads: Threads = 1,
) -> None:
    """Ask a model the world's questions, without steering, and print how it does."""
    from builders.mllm import load_mllm

    torch.set_num_threads(threads)
    loaded, processor = load_mllm(str(model))
    print(canonical_json(judge.evaluate(loaded, Batcher(processor), n, seed, split)), end="")


RecipeFile = Annotated[Path, typer.Option("--recipe", help="The recipe of the runs.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.field=value")]
DEMO = Path("recipes/demo.toml")


@app.command("tune")
def tune_settings(
    out: Annotated[Path, typer.Option(help="Run folder; its pipeline is run first where it is not done.")],
    recipe: RecipeFile = DEMO,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option(help="Validation items of each suite.")] = 150,
    to: Annotated[Path, typer.Option(help="Where the chosen settings go.")] = compare.SETTINGS,
) -> None:
    """Try every setting of every arm on validation items, and keep the best of each."""
    loaded = load_recipe(recipe, overrides or ())
    run_pipeline(loaded, out, until="sae")
    bench = Bench(out, loaded)
    settings = {arm: arms.settings_of(arm, bench.dictionary.layers) for arm in arms.LABELS}
    found = compare.tune(bench, settings, n, progress=cells_bar)
    write_atomic(to, canonical_json(found))
    for arm, setting in found["chosen"].items():
        print(f"{arms.LABELS[arm]}: {arms.describe(setting)}")


@app.command()
def table(
    out: Annotated[Path, typer.Option(help="Folder of the runs, one a draw of stimuli.")],
    recipe: RecipeFile = DEMO,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option(help="Test items of each suite.")] = 1_000,
    seeds: Annotated[int, typer.Option(help="SAEs a start and draw.")] = 5,
    draws: Annotated[int, typer.Option(help="Draws of the stimuli.")] = 2,
    only: Annotated[
        int, typer.Option(help="Fill the cells of this draw alone; -1: all, and the table.")
    ] = -1,
    to: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
) -> None:
    """The full table: every arm on unseen items, over several seeds and draws of stimuli."""
    plan, settings = compare.Plan(n=n, seeds=seeds, rounds=7), compare.read_settings()
    for draw in range(draws) if only < 0 else [only]:
        loaded = load_recipe(recipe, [*(overrides or ()), f"run.seed={draw}"])
        run_pipeline(loaded, out / f"draw-{draw}", until="sae")
        compare.measure(Bench(out / f"draw-{draw}", loaded), plan, settings, cells_bar)
    if only < 0:
        folders = [out / f"draw-{draw}" / "compare" for draw in range(draws)]
        found = compare.summarise(folders, plan, settings)
        made_by = {"versions": versions(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
        write_atomic(to, canonical_json(found | made_by))
        print(compare.as_text(found))


@app.command("ablate")
def ablate_choices(
    out: Annotated[Path, typer.Option(help="Run folder; its pipeline is run first where it is not done.")],
    recipe: RecipeFile = DEMO,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option(help="Test items of each suite.")] = 300,
    to: Annotated[Path, typer.Option(help="Where the rows go.")] = ABLATIONS,
) -> None:
    """Vary DACO's choices one at a time around the chosen setting."""
    loaded = load_recipe(recipe, overrides or ())
    run_pipeline(loaded, out, until="sae")
    chosen = compare.read_settings()["chosen"]["daco"]
    found = ablate.run(Bench(out, loaded), chosen, n, cells_bar)
    write_atomic(to, canonical_json(found))
    print(ablate.as_text(found))


@app.command("front")
def find_front(
    out: Annotated[Path, typer.Option(help="Run folder; its pipeline is run first where it is not done.")],
    recipe: RecipeFile = DEMO,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option(help="Test items of each suite.")] = 300,
    to: Annotated[Path, typer.Option(help="Where the front and the rows go.")] = FRONT,
) -> None:
    """Choose eta, gamma, scope and layers by `builders.tune`; hold the choice against the recipe's own."""
    loaded = load_recipe(recipe, overrides or ())
    run_pipeline(loaded, out, until="sae")
    found = front.run(Bench(out, loaded), n, cells_bar)
    made_by = {"versions": versions(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    command = "python -m builders.toyworld front --out runs/front"
    write_atomic(to, canonical_json(found | made_by | {"command": command}))
    print(front.as_text(found))


if __name__ == "__main__":
    app()
