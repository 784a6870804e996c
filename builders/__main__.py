"""Command line of the workshop: `python -m builders run RECIPE --out DIR`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from builders.pipeline import run as run_pipeline
from builders.pipeline import stage_names
from builders.recipe import load_recipe
from builders.stages import DONE, done
from daco.errors import DacoError, RecipeError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

RecipePath = Annotated[Path, typer.Argument(help="Recipe file (TOML).")]
Out = Annotated[Path, typer.Option(help="Run folder; running again resumes.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.field=value; may be repeated.")]


@app.command()
def run(
    recipe: RecipePath,
    out: Out,
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """Run the stages of a recipe that are not done yet."""
    worked = run_pipeline(load_recipe(recipe, overrides or ()), out, only, until)
    print("ran: " + ", ".join(worked) if worked else "nothing to do: every stage is done")
    print_status(out)
    for folder in sorted((out / "release").glob("*/manifest.json")):
        print(f"next: python -m hub plan {folder.parent}")


@app.command()
def tune(recipe: RecipePath, out: Out, overrides: Overrides = None) -> None:
    """Try ways to steer on the validation items of `tune.path`; the release then steers with the best."""
    from builders import steering, tune

    loaded = load_recipe(recipe, overrides or ())
    if not loaded.tune.path:
        raise RecipeError("tune.path: expected a table of validation items or `toyworld`, got none; name one")
    run_pipeline(loaded, out)
    print(tune.as_text(steering.read_tuning(out)))
    for folder in sorted((out / "release").glob("model/manifest.json")):
        print(f"next: python -m hub stage {folder.parent}")


@app.command()
def status(out: Out) -> None:
    """Show which stages of a run folder are done, and their counts."""
    if not out.is_dir():
        raise RecipeError(f"expected a run folder, got none at {out}; make it with `python -m builders run`")
    print_status(out)


@app.command()
def stages() -> None:
    """List the stages in order."""
    print("\n".join(stage_names()))


@app.command()
def vocabulary(
    wordnet: Annotated[Path, typer.Option(help="WordNet 3.0 folder, such as /usr/share/wordnet.")],
    out: Annotated[Path, typer.Option(help="Parquet to write.")],
    size: Annotated[int, typer.Option(min=1, help="Concepts, at most.")] = 15_000,
) -> None:
    """Make a vocabulary from WordNet, for `concepts.source = "wordnet"`; needs nltk."""
    from builders.wordnet import write_vocabulary

    counts = write_vocabulary(wordnet, out, size)
    print("\n".join(f"{name:<16} {count:>8}" for name, count in counts.items()))


@app.command("join-images")
def join_images(
    source: Annotated[Path, typer.Argument(help="A release, a run folder, or a table of URLs and captions.")],
    out: Annotated[Path, typer.Option(help="Folder for images and tables; running again resumes.")],
    tars: Annotated[Path | None, typer.Option(help="Take images from these webdataset tars.")] = None,
    workers: Annotated[int, typer.Option(help="Images asked for at once.")] = 16,
    seconds: Annotated[float, typer.Option(help="Time for one image.")] = 30.0,
    max_bytes: Annotated[int, typer.Option(help="Size of one image.")] = 20_000_000,
) -> None:
    """Bring the pixels of stimuli back, from tars or from the web."""
    from builders.join_images import Limits
    from builders.join_images import join_images as join

    counts = join(source, out, tars, Limits(workers, seconds, max_bytes))
    print(", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()))


def print_status(out: Path) -> None:
    """Print one line a stage: rows in, rows out, and what was skipped why."""
    for name in stage_names():
        if not (out / name / DONE).is_file():
            print(f"{name:<12} not done")
            continue
        counts = done(out, name)["counts"]
        skipped = ", ".join(
            f"{count} {reason}" for reason, count in sorted(counts["skipped"].items()) if count
        )
        print(
            f"{name:<12} {counts['in']:>8} in {counts['out']:>8} out"
            + (f"   skipped: {skipped}" if skipped else "")
        )


def main() -> int:
    """Run the command line; our own errors end it with one line and exit code 1."""
    try:
        app()
    except DacoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
