"""The pipeline: the stages in order, what each reads, and a runner that skips what is already done.

Reads a recipe; writes one folder a stage into the run folder, and `release/` last.
"""

import dataclasses
import hashlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers.utils import logging as transformers_logging

from builders.recipe import LOCAL_FIELDS, Recipe
from builders.stages import Work, check_sizes, done, fingerprint, seal_sha256
from daco.errors import RecipeError
from daco.manifest import canonical_json, sha256_file
from daco.tables import read_table

LICENCE_FIELDS = {"url", "licence", "redistribute_images", "allowed"}
"""Fields of `corpus` that only the release depends on."""


@dataclass(frozen=True)
class Stage:
    """One stage: the module whose `run` does it, the recipe sections and the stages it reads."""

    name: str
    module: str
    sections: tuple[str, ...]
    """Names of sections, or of single fields: `sae.holdout`."""
    upstream: tuple[str, ...]
    """Names of stages, or of one column of a stage's `concepts.parquet`: `polarity.concept`."""

    @property
    def needed(self) -> list[str]:
        """Names of the stages it reads."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.upstream))


def _of(stage: str, *columns: str) -> tuple[str, ...]:
    """Columns of a stage's concepts: other labels start nothing anew that does not read them."""
    return tuple(f"{stage}.{column}" for column in columns)


LABELLED = ("concept_id", "concept", "polarity")
"""Columns that steering reads: who labelled a concept, and why, starts nothing anew but the release."""

STAGES = (
    Stage("corpus", "corpus", ("corpus",), ()),
    Stage("concepts", "vocabulary", ("concepts",), ("corpus",)),
    Stage("clip", "clip", ("clip",), ("corpus",)),
    Stage("embeddings", "embeddings", ("clip", "embeddings"), ("corpus", "clip")),
    Stage(
        "stimuli",
        "stimuli",
        ("clip", "stimuli"),
        (*_of("concepts", "concept_id", "concept"), "clip", "embeddings"),
    ),
    Stage("polarity", "polarity", ("concepts", "polarity"), ("concepts", "stimuli")),
    Stage("activations", "activations", ("model", "activations"), ("corpus", "stimuli")),
    Stage(
        "directions",
        "directions",
        ("sae.holdout",),
        ("stimuli", *_of("polarity", "concept_id"), "activations"),
    ),
    Stage(
        "recognition",
        "recognition",
        ("sae.holdout", "recognition"),  # hours at full size: no other field of `sae` must start it anew
        ("corpus", "stimuli", *_of("polarity", "concept_id", "concept"), "activations"),  # nor must labels
    ),
    Stage("sae", "train_sae", ("activations", "sae"), ("activations", "directions")),
    Stage(
        "atoms",
        "atoms",
        ("sae.holdout", "atoms"),
        (*_of("polarity", *LABELLED, "group"), "activations", "directions", "sae"),
    ),
    Stage(
        "tune",
        "tune",
        ("model", "atoms.eta", "tune", "evaluate.gamma", "evaluate.scope"),
        (*_of("polarity", *LABELLED), "activations", "directions", "sae", "atoms"),
    ),
    Stage(
        "evaluate",
        "evaluate",
        ("model", "activations", "sae", "atoms", "evaluate"),
        (
            *("corpus", "stimuli", *_of("polarity", *LABELLED)),
            *("activations", "directions", "sae", "atoms", "tune"),
        ),
    ),
    Stage(
        "release",
        "release",
        tuple(f.name for f in dataclasses.fields(Recipe)),
        # and texts of corpus and activations, whose images and tokens may be gone by then
        ("stimuli", "polarity", "directions", "recognition", "sae", "atoms", "tune", "evaluate"),
    ),
)


def stage_names() -> list[str]:
    """Names of all stages, in order."""
    return [stage.name for stage in STAGES]


def run(recipe: Recipe, out: Path, only: str | None = None, until: str | None = None) -> list[str]:
    """Run the stages of a recipe that are not done yet; running again resumes.

    Args:
        recipe: The recipe.
        out: The run folder; made when missing.
        only: Run this stage alone; the stages it reads must be done.
        until: Stop after this stage.

    Returns:
        Names of the stages that did any work.

    Raises:
        RecipeError: an unknown stage was named, or another process works in the same folder.
    """
    chosen = _choose(only, until)
    _make_folder(out)
    torch.set_num_threads(recipe.run.threads)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with FileLock(out / ".lock", timeout=0):
            return [stage.name for stage in chosen if _run_stage(stage, recipe, out)]
    except Timeout as error:
        raise RecipeError(
            f"{out}: another process is at work in this folder; wait for it, or use another"
        ) from error


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"expected a run folder that can be made, got {error}; choose another") from error


def _choose(only: str | None, until: str | None) -> list[Stage]:
    names = stage_names()
    for name in (only, until):
        if name is not None and name not in names:
            raise RecipeError(f"expected a stage among {names}, got {name!r}")
    if only is not None:
        return [stage for stage in STAGES if stage.name == only]
    return list(STAGES[: names.index(until) + 1] if until else STAGES)


def open_stage(stage: Stage, recipe: Recipe, out: Path) -> Work | None:
    """The stage ready to work, or None when it is done; raises IntegrityError where what it reads is not."""
    work = Work(recipe, out, stage.name)
    for needed in stage.needed:
        work.upstream(needed)
    seals = {read: _seal(out, read) for read in stage.upstream}
    wanted = fingerprint(stage.name, _sections(stage, recipe), seals)
    module = importlib.import_module(f"builders.{stage.module}")
    if not work.made_from(wanted):  # what would fail at once must not discard an earlier run's stage first
        for needed in stage.needed:
            check_sizes(out, needed)
        for name, given in (("check", recipe), ("check_upstream", work)):
            if check := getattr(module, name, None):
                check(given)
    if not work.open(wanted):
        return None
    for needed in stage.needed:
        check_sizes(out, needed)
    return work


def _seal(out: Path, read: str) -> str:
    """sha256 of a finished stage's seal, or of one column of its concepts."""
    name, _, column = read.partition(".")
    if not column:
        return seal_sha256(out, name)
    check_sizes(out, name)
    values = read_table(out / name / "concepts.parquet").column(column).to_pylist()
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def _run_stage(stage: Stage, recipe: Recipe, out: Path) -> bool:
    work = open_stage(stage, recipe, out)
    if work is None:
        return False
    importlib.import_module(f"builders.{stage.module}").run(work)
    done(out, stage.name)
    return True


def _sections(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """The sections a stage depends on; a local file or folder counts by what is in it, not by its place."""
    facts: dict[str, dict[str, Any]] = {}
    for name in ("run", *stage.sections):
        section, _, field = name.partition(".")
        values = dataclasses.asdict(getattr(recipe, section))
        facts.setdefault(section, {}).update({field: values[field]} if field else values)
    for section, field in LOCAL_FIELDS:
        if facts.get(section, {}).get(field):
            facts[section][field] = _digest(Path(facts[section][field]))
    if stage.name != "release":
        for name in LICENCE_FIELDS & facts.get("corpus", {}).keys():
            del facts["corpus"][name]
    return facts


def _digest(place: Path) -> str:
    """A file's sha256, a folder's over the names and sizes of its files; of anything else its name."""
    if place.is_file():
        return sha256_file(place)
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    listed = "".join(f"{path.relative_to(place).as_posix()}\0{path.stat().st_size}\0" for path in files)
    return hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest() if listed else str(place)
