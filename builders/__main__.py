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


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Hub id, with @revision if you like, or a folder.")],
    suites: Annotated[str, typer.Option(help="Such as mm-safetybench=FOLDER,figstep=FOLDER,mmmu.")],
    out: Out,
    sae: Annotated[str, typer.Option(help="Model release: repo@tag or a folder; for daco.")] = "",
    dictionary: Annotated[str, typer.Option(help="Dataset release; default: the SAEs' own.")] = "",
    directions: Annotated[str, typer.Option(help="Model's short name in it, where several are.")] = "",
    methods: Annotated[
        str, typer.Option(help="Methods, comma separated.")
    ] = "none,prompting,actadd,mop,daco",
    judges: Annotated[
        str, typer.Option(help="Of rule, choice, likelihood, guard:MODEL, endpoint:MODEL, fluency:MODEL.")
    ] = "rule,choice",
    base_url: Annotated[str, typer.Option(help="Server of OpenAI's protocol for endpoint judges.")] = "",
    rubric: Annotated[
        Path | None, typer.Option(help="Wording for endpoint judges, in place of ours.")
    ] = None,
    categories: Annotated[
        Path | None, typer.Option(help="JSON of category and text, for guards that take them.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="method.setting=value; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model's weights.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Items a call of generate.")] = 8,
    max_answer: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 256,
    items: Annotated[int, typer.Option(help="Items of each suite, evenly spread; 0 is all.")] = 0,
    part: Annotated[str, typer.Option(help="Do the i-th of n parts: one a process or machine.")] = "1/1",
    base_model_ok: Annotated[bool, typer.Option(help="Accept a fine-tune or quantised copy.")] = False,
) -> None:
    """Ask a model the items of safety suites under each method, judge the answers, make the table."""
    from builders.safety import command
    from builders.safety.run import Asking, part_of

    asking = Asking(batch, max_answer, items, base_model_ok, part_of(part))
    made = command.evaluate(
        command.Evaluation(
            model=model,
            out=out,
            suites=_listed(suites),
            judges=_listed(judges),
            methods=_listed(methods),
            sae=sae,
            dictionary=dictionary,
            directions=directions,
            settings=tuple(overrides or ()),
            dtype=dtype,
            base_url=base_url,
            rubric=rubric,
            categories=categories,
            asking=asking,
        )
    )
    print((out / "report.md").read_text("utf-8") if made else f"part {part} is done; others are not yet")


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of an evaluation.")],
    into: Annotated[Path | None, typer.Option(help="Model release whose evaluation.json takes it.")] = None,
) -> None:
    """Make the table of an evaluation anew, and put it into a release."""
    from builders.safety.report import REPORT, into_release, write_report

    found = write_report(out)
    print((out / REPORT).read_text("utf-8"))
    if into:
        into_release(found, into)
        print(f"next: python -m hub stage {into}")


def _listed(text: str) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


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
