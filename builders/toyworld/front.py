"""What choosing eta and gamma by `builders.tune` brings on the toy world, on items the choice has not seen.

Reads a run folder; writes what was tried and measured into `compare/front`, a file each. What is there is not
made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from builders import tune
from builders.recipe import Recipe, TuneConfig
from builders.statistics import paired, rate
from builders.steering import Setting, own_setting
from builders.toyworld.ablate import by_group
from builders.toyworld.arms import Parts, steering_of
from builders.toyworld.bench import Bench, Outcomes, figure, suites_of, validation
from daco.manifest import canonical_json, write_atomic

GRID = TuneConfig(
    path="toyworld",
    items=100,
    eta=(0.3, 0.5, 0.7),
    gamma=(0.0, 0.03, 0.06, 0.1),
    scope=("prompt", "all"),
    budget=40,
)
"""What is tried."""

FIGURES = ("unsafe", "unsafe_unseen_cues", "utility", "helpful", "over_refusal")

CENTROIDS = {"one": "one centroid a polarity", "group": "one centroid a group of concepts"}

UNTUNED = Recipe()
"""Its fields are the defaults of a recipe that says nothing."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]


class Row(NamedTuple):
    """One way to steer that is measured on test items."""

    name: str
    centroids: str
    setting: Setting | None
    """None: no steering."""


def run(bench: Bench, n: int, progress: Progress = list, grid: TuneConfig = GRID) -> dict[str, Any]:
    """Choose on validation items with either kind of centroids, and measure what was chosen on test items.

    Args:
        bench: The run.
        n: Test items of each suite.
        progress: Wraps lists of settings and of rows.
        grid: What is tried.

    Returns:
        `tuning` by kind of centroids (see `builders.tune.search`) and `held_out`: rows of `name`,
        `centroids`, `setting`, `figures` (`{rate, low, high, n}`) and `to_demo` (paired differences).
    """
    parts = {"one": bench.parts(bench.recipe.run.seed), "group": by_group(bench)}
    own = own_setting(bench.recipe, bench.dictionary.layers)
    questions = validation(bench.model, bench.processor, grid.items)
    tuning, tried = {}, bench.folder / "front" / "tried"
    for name, made in parts.items():
        steering = steering_of(made, "dictionary", made.dictionary)
        place = tune.Search(bench.model, steering, questions, tried, bench.made_from)
        tuning[name] = tune.search(place, grid, own, progress)
    return {"tuning": tuning, "held_out": _held_out(bench, parts, rows_of(own, tuning), n, progress)}


def rows_of(own: Setting, tuning: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """What is measured: no steering, recipes' settings, the fronts, and layers of the first choice alone."""
    untuned = own_setting(UNTUNED, own.layers)
    rows = [Row("no steering", "one", None), Row("demo", "one", own), Row("untuned", "one", untuned)]
    for name, found in tuning.items():
        front = [row["setting"] for row in found["tried"] if row["front"]]
        rows += [Row("tuned" if s == found["chosen"] else "front", name, _setting(s)) for s in front]
    rows.append(Row("demo", "group", own))
    first = next((row.setting for row in rows if row.name == "tuned" and row.setting), own)
    alone = [(f"layer {layer} alone", (layer,)) for layer in own.layers]
    return rows + [Row(f"tuned, {name}", "one", first._replace(layers=layers)) for name, layers in alone]


def _setting(found: Mapping[str, Any]) -> Setting:
    return Setting(found["eta"], found["gamma"], found["scope"], tuple(found["layers"]))


def _held_out(
    bench: Bench, parts: Mapping[str, Parts], rows: Sequence[Row], n: int, progress: Progress
) -> list[dict[str, Any]]:
    suites = {name: items for name, items in suites_of(n, "test").items() if name != "harmful"}
    measured = [_outcomes(bench, parts[row.centroids], row, suites, n) for row in progress(rows)]
    demo = measured[[(row.name, row.centroids) for row in rows].index(("demo", "one"))]
    return [
        {
            "name": row.name,
            "centroids": CENTROIDS[row.centroids],
            "setting": row.setting._asdict() if row.setting else None,
            "figures": {name: _rate(figure(found, name)) for name in FIGURES},
            "to_demo": {name: _difference(found, demo, name) for name in FIGURES},
        }
        for row, found in zip(rows, measured, strict=True)
    ]


def _outcomes(bench: Bench, parts: Parts, row: Row, suites: Mapping[str, Any], n: int) -> Outcomes:
    """A row's outcomes on test items, kept in a file."""
    arm, setting = ("daco", row.setting._asdict()) if row.setting else ("none", {})
    facts = canonical_json([bench.made_from, row.centroids, setting, n])
    path = bench.folder / "front" / "test" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, canonical_json(bench.outcomes(parts, arm, setting, suites)))
    return dict(json.loads(path.read_text("utf-8")))


def _rate(outcomes: np.ndarray) -> dict[str, float]:
    found = rate(outcomes[None])
    return {"rate": found.mean, "low": found.low, "high": found.high, "n": outcomes.size}


def _difference(found: Outcomes, demo: Outcomes, name: str) -> dict[str, float]:
    if found is demo:  # nothing to be uncertain of
        return {"mean": 0.0, "low": 0.0, "high": 0.0}
    return paired(figure(found, name)[None], figure(demo, name)[None])._asdict()


def as_text(found: Mapping[str, Any]) -> str:
    """The front of each kind of centroids, and the rows on test items in percent."""
    lines = []
    for name, tuning in found["tuning"].items():
        lines += [f"validation items, {CENTROIDS[name]}:", tune.as_text(tuning), ""]
    lines.append("test items: " + " | ".join(FIGURES))
    for row in found["held_out"]:
        cells = [f"{100 * row['figures'][name]['rate']:.1f}" for name in FIGURES]
        said = tune.describe(row["setting"]) if row["setting"] else ""
        lines.append(" | ".join([row["name"], row["centroids"], said, *cells]))
    return "\n".join(lines)
