"""`make demo`: the main job, end to end on an embedded default.

Builds dictionary and SAEs from a drawn world, compares the methods there, publishes three repos to a local
Hub, loads them back in fresh processes, steers, and writes `OUT/report.html` and `OUT/summary.json`. With
recipes of other corpora nothing is compared, and the base model is not published.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import typer
from tqdm import tqdm

from builders.corpus import image_file
from builders.pipeline import run as run_pipeline
from builders.recipe import Recipe, load_recipe, repo_id
from builders.toyworld import compare as toyworld_compare
from cards.comparison import printed, read_results, summary
from cards.facts import CARD
from cards.render import python_blocks
from cards.report import report_html
from cards.toy_llava import EXAMPLE, ITEM
from daco.manifest import canonical_json, read_manifest, write_atomic
from hub.base_model import publish_base_model
from hub.local.server import background, client_env
from hub.publish import Published, publish
from hub.quick_start import record
from hub.remote import Target

ROOT = Path(__file__).parent.parent
CLIENT = Path(__file__).with_name("demo_client.py")

LOCAL_TOKEN = "hf_local"
"""The local Hub's own; it opens nothing else."""

QUICK_START = """
import runpy, sys
from builders.vision import ensure_torchvision
ensure_torchvision()
runpy.run_path(sys.argv[1])
"""
"""Runs a file as it is, on machines too where torchvision was built for another torch."""


QUICK_START_PROVES = (
    "a fresh process with an empty cache loads the published repos and steers, by the card's own code"
)
CLIENT_PROVES = (
    "the dataset reads the same whole and streamed, and after steering the model is exactly as before"
)


class Base(NamedTuple):
    """The base model as clients find it."""

    where: str
    """A repo `org/name@tag`, or a folder."""
    text: str
    """What the client asks."""
    picture: Path
    """What it shows."""


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    recipe: Annotated[Path, typer.Option(help="Recipe to run.")] = ROOT / "recipes" / "demo.toml",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.field=value")] = None,
) -> None:
    """Build, compare, publish, load back, steer, report."""
    start = time.monotonic()
    loaded = load_recipe(recipe, overrides or ())
    say(f"building {loaded.run.name} in {out}")
    run_pipeline(loaded, out)
    results = compare(out, loaded) if is_toyworld(loaded) else None
    shutil.rmtree(out / "hub", ignore_errors=True)  # tags never move: a changed recipe needs a fresh Hub
    with background(out / "hub") as url:
        repos = publish_all(out, loaded, url)
        runs = run_clients(out, loaded, url)
    seconds = time.monotonic() - start
    write_atomic(out / "summary.json", canonical_json(summary(results, repos, seconds)))
    report = report_html(out, loaded, {"repos": repos, "runs": runs, "seconds": seconds})
    write_atomic(out / "report.html", report)
    say("\n" + (printed(results) if results else runs[-1]["output"].rstrip()))
    say(f"\nreport: {out / 'report.html'}, figures: {out / 'summary.json'}, {seconds:.0f} seconds")


def is_toyworld(recipe: Recipe) -> bool:
    """Whether the recipe is about the toy world and a model of its own, which is published and tested."""
    model = recipe.model
    return recipe.corpus.kind == "toyworld" and bool(model.published) and Path(model.id).is_dir()


def compare(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Put all methods to the test; running it again resumes. Returns the results as they were written."""
    say("comparing ways to steer")
    toyworld_compare.run(out, recipe, progress=lambda cells: tqdm(cells, unit="cell", disable=None))
    return read_results(out) or {}


def publish_all(out: Path, recipe: Recipe, url: str) -> list[dict[str, Any]]:
    """Publish the base model, where it is ours, the dataset and the SAEs; returns what the report shows."""
    repos = []
    if is_toyworld(recipe):
        name, _, tag = recipe.model.published.partition("@v")
        target, staged = Target(name, "model", url, LOCAL_TOKEN), out / "base_model"
        published = publish_base_model(Path(recipe.model.id), staged, target, tag)
        repos.append(described(published, [path.stat().st_size for path in staged.iterdir()]))
        record(out / "release" / "model", base=staged)
    record(out / "release" / "dataset")
    for kind in ("dataset", "model"):
        folder = out / "release" / kind
        published = publish(folder, Target(repo_id(recipe, kind), kind, url, LOCAL_TOKEN))
        files = read_manifest(folder)["files"].values()
        repos.append(described(published, [entry["bytes"] for entry in files]))
    return repos


def described(published: Published, sizes: list[int]) -> dict[str, Any]:
    """What the report shows of a repo."""
    say(f"published {published.repo_id} {published.tag} as {published.commit[:12]}")
    return asdict(published) | {"files": len(sizes), "bytes": sum(sizes)}


def run_clients(out: Path, recipe: Recipe, url: str) -> list[dict[str, str]]:
    """Run what users would run in fresh processes; returns of each what the report shows."""
    runs = []
    if is_toyworld(recipe):
        code = first_code((out / "release" / "model" / CARD).read_text("utf-8"))
        (out / "quick_start.py").write_text(code, "utf-8")
        output = fresh_process(out, url, "-c", QUICK_START, str((out / "quick_start.py").resolve()))
        runs.append({"title": "The model card's quick start, as printed", "proves": QUICK_START_PROVES}
                    | {"code": code, "output": output})  # fmt: skip
    client = {"title": "A longer client", "proves": CLIENT_PROVES, "code": CLIENT.read_text("utf-8")}
    return [*runs, client | {"output": read_back(out, recipe, url)}]


def first_code(card: str) -> str:
    """The first block of Python in a card."""
    return python_blocks(card)[0]


def read_back(out: Path, recipe: Recipe, url: str) -> str:
    """Run the client; returns what it printed."""
    repos = [repo_id(recipe, kind) for kind in ("dataset", "model")]
    base = base_of(out, recipe)
    arguments = [*repos, f"v{recipe.release.version}", base.where, base.text, str(base.picture.resolve())]
    return fresh_process(out, url, "-m", "hub.demo_client", *arguments)


def base_of(out: Path, recipe: Recipe) -> Base:
    """The base model that the client loads, and what it asks it."""
    if is_toyworld(recipe):
        return Base(recipe.model.published, ITEM.text, out / "base_model" / EXAMPLE)
    stimulus = pd.read_parquet(out / "corpus" / "stimuli.parquet").iloc[0]
    config = recipe.model
    folder = out / "activations" / "model" if config.tiny else Path(config.id)
    where = str(folder.resolve()) if folder.is_dir() else f"{config.id}@{config.revision}"
    return Base(where, stimulus["caption"], image_file(out / "corpus", stimulus["file"]))


def fresh_process(out: Path, url: str, *arguments: str) -> str:
    """Run Python with an empty cache against the Hub at `url`; returns what it printed."""
    cache = out / "client-cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    environment = client_env(url, cache.resolve())
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the client failed with code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(demo)
    app()
