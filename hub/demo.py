"""`make demo`: the main job, end to end on an embedded default.

Draws a corpus, builds dictionary and SAEs with tiny models, publishes both repos to a local Hub, loads them
back in a fresh process, steers, and writes `OUT/report.html`.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from builders.corpus import image_file
from builders.pipeline import run as run_pipeline
from builders.recipe import Recipe, load_recipe, repo_id
from cards.report import report_html
from daco.manifest import read_manifest, write_atomic
from hub.local.server import background, client_env
from hub.publish import publish
from hub.remote import Target

ROOT = Path(__file__).parent.parent
CLIENT = Path(__file__).with_name("demo_client.py")

LOCAL_TOKEN = "hf_local"
"""The local Hub's own; it opens nothing else."""


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    recipe: Annotated[Path, typer.Option(help="Recipe to run.")] = ROOT / "recipes" / "demo.toml",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.field=value")] = None,
) -> None:
    """Build, publish, load back, steer, report."""
    start = time.monotonic()
    loaded = load_recipe(recipe, overrides or ())
    say(f"building {loaded.run.name} in {out}")
    run_pipeline(loaded, out)
    shutil.rmtree(out / "hub", ignore_errors=True)  # tags never move: a changed recipe needs a fresh Hub
    with background(out / "hub") as url:
        repos = [publish_release(out, loaded, kind, url) for kind in ("dataset", "model")]
        client_output = read_back(out, loaded, url)
    published = {
        "repos": repos,
        "client_code": CLIENT.read_text("utf-8"),
        "client_output": client_output,
        "seconds": time.monotonic() - start,
    }
    write_atomic(out / "report.html", report_html(out, loaded, published))
    say(f"{client_output.rstrip()}\n\nreport: {out / 'report.html'}")


def publish_release(out: Path, recipe: Recipe, kind: str, url: str) -> dict[str, Any]:
    """Publish one release folder; returns what the report shows of it."""
    folder = out / "release" / kind
    published = publish(folder, Target(repo_id(recipe, kind), kind, url, LOCAL_TOKEN))
    say(f"published {published.repo_id} {published.tag} as {published.commit[:12]}")
    files = read_manifest(folder)["files"]
    return asdict(published) | {"files": len(files), "bytes": sum(entry["bytes"] for entry in files.values())}


def read_back(out: Path, recipe: Recipe, url: str) -> str:
    """Run the client in a fresh process with an empty cache; returns what it printed."""
    cache = out / "client-cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    stimulus = pd.read_parquet(out / "corpus" / "stimuli.parquet").iloc[0]
    repos = [repo_id(recipe, kind) for kind in ("dataset", "model")]
    tag, model = f"v{recipe.release.version}", out / "activations" / "model"
    picture = image_file(out / "corpus", stimulus["file"])
    arguments = [*repos, tag, model.resolve(), stimulus["caption"], picture.resolve()]
    command = [sys.executable, "-m", "hub.demo_client", *map(str, arguments)]
    environment = client_env(url, cache.resolve())
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
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
