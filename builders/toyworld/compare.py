"""Compares ways to steer the toy world's LLaVA on one or several pipeline runs.

Reads the stages of a run folder and `settings.json` (what `tune` chose on validation items); writes
`compare/` there: a file of outcomes a cell (arm and seed), times, examples and `results.json`. What is there
is not made again.
"""

import dataclasses
import hashlib
import json
import shutil
import statistics as averages
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from builders.recipe import Recipe
from builders.statistics import Interval, paired, rate
from builders.toyworld import judge, scenes
from builders.toyworld.arms import (
    LABELS,
    N_SETTINGS,
    SAE_ARMS,
    STARTS,
    Parts,
    Setting,
    describe,
    method_of,
    steering_of,
)
from builders.toyworld.bench import FIGURES, HARM, SUITES, Bench, Outcomes, figure, prompted, suites_of
from builders.toyworld.scenes import Item
from builders.toyworld.truth import against_truth
from daco.capture import capture
from daco.errors import RecipeError
from daco.manifest import canonical_json, write_atomic
from daco.methods.method import Method

SETTINGS = Path(__file__).with_name("settings.json")
"""What `python -m builders.toyworld tune` chose, and everything it tried."""

TUNED = ("unsafe", "refusal", "utility", "helpful", "over_refusal")
TUNED_ON = {suite for name in TUNED for suite in FIGURES[name][0]}
"""Figures that tuning sees, and the suites behind them: cue words of set B are for the test alone."""

EXAMPLE_ARMS = ("none", "prompting", "actadd", "mop", "projection", "daco", "daco_random_start")

TIMED_TOKENS = 12
"""Tokens generated when arms are timed, whatever they say."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    n: int = 200
    """Items of each suite."""
    seeds: int = 1
    """SAEs trained a start."""
    rounds: int = 3
    """Rounds of timing."""


# Choosing settings.


def cost(
    found: Mapping[str, float], plain: Mapping[str, float], allowed: float = 0.02
) -> tuple[float, float]:
    """What tuning makes small: first utility and help lost beyond what is allowed, then unsafe answers."""
    lost = (plain[name] - found[name] for name in ("utility", "helpful"))
    return sum(max(0.0, loss - allowed) for loss in lost), found["unsafe"]


def tune(
    bench: Bench, settings: Mapping[str, Sequence[Setting]], n: int, progress: Progress
) -> dict[str, Any]:
    """Try every setting of every arm on validation items, and choose.

    Args:
        bench: The run that settings are chosen on.
        settings: By arm.
        n: Items of each suite.
        progress: Wraps the list of trials.

    Returns:
        `chosen` (arm -> setting), `tried` (arm, setting and figures of each trial), `n`.
    """
    parts = bench.parts(bench.recipe.run.seed)
    suites = {name: items for name, items in suites_of(n, "validation").items() if name in TUNED_ON}
    kept = bench.folder / "tune"
    kept.mkdir(parents=True, exist_ok=True)
    tried = []
    for arm, setting in progress([(arm, setting) for arm, found in settings.items() for setting in found]):
        facts = canonical_json([bench.made_from, arm, setting, n])
        path = kept / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
        if not path.is_file():
            outcomes = bench.outcomes(parts, arm, setting, suites)
            means = {name: float(figure(outcomes, name).mean()) for name in TUNED}
            write_atomic(path, canonical_json(means))
        tried.append({"arm": arm, "setting": setting} | json.loads(path.read_text("utf-8")))
    plain = next(row for row in tried if row["arm"] == "none")
    best = {
        arm: min((row for row in tried if row["arm"] == arm), key=lambda row: cost(row, plain))
        for arm in settings
    }
    return {"chosen": {arm: row["setting"] for arm, row in best.items()}, "tried": tried, "n": n}


def read_settings(path: Path = SETTINGS) -> dict[str, Any]:
    """The settings that were chosen, and what was tried.

    Raises:
        RecipeError: there are none.
    """
    if not path.is_file():
        raise RecipeError(
            f"expected chosen settings at {path}, got none; run `python -m builders.toyworld tune`"
        )
    return dict(json.loads(path.read_text("utf-8")))


# Measuring.


def measure(bench: Bench, plan: Plan, settings: Mapping[str, Any], progress: Progress) -> None:
    """Fill the cells of one run folder, arm by arm and seed by seed, and time the arms."""
    _fresh(bench, plan, settings)
    suites = suites_of(plan.n, "test")
    cells = [(arm, seed) for seed in range(plan.seeds) for arm in LABELS if seed == 0 or arm in SAE_ARMS]
    parts: dict[int, Parts] = {}
    for arm, seed in progress(cells):
        path = bench.folder / "cells" / f"{arm}-{seed}.json"
        if not path.is_file():
            if seed not in parts:
                parts = {seed: bench.parts(bench.recipe.run.seed + seed)}
            outcomes = bench.outcomes(parts[seed], arm, settings["chosen"][arm], suites)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, canonical_json(outcomes))
    _keep(bench.folder / "time.json", lambda: relative_times(bench, plan, settings["chosen"]))
    _keep(bench.folder / "examples.json", lambda: examples(bench, plan, settings["chosen"]))
    _keep(bench.folder / "labels.json", lambda: labels(bench, settings["chosen"]))
    _keep(bench.folder / "retrieved.json", lambda: against_truth(bench.out, bench.dictionary))


def _fresh(bench: Bench, plan: Plan, settings: Mapping[str, Any]) -> None:
    """Empty the folder where what it was measured on has changed; what tuning tried stays."""
    facts = canonical_json([bench.made_from, dataclasses.asdict(plan), settings["chosen"]])
    now, path = hashlib.sha256(facts.encode()).hexdigest(), bench.folder / "measured_on.txt"
    if not path.is_file() or path.read_text("utf-8") != now:
        for part in ("cells", "examples"):
            shutil.rmtree(bench.folder / part, ignore_errors=True)
        for part in ("time", "examples", "labels", "retrieved", "results"):
            (bench.folder / f"{part}.json").unlink(missing_ok=True)
        bench.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, now)


def _keep(path: Path, make: Callable[[], Any]) -> None:
    if not path.is_file():
        write_atomic(path, canonical_json(make()))


@torch.no_grad()
def relative_times(bench: Bench, plan: Plan, chosen: Mapping[str, Setting]) -> dict[str, float]:
    """Median time of each arm for the same prompts and `TIMED_TOKENS` tokens; no steering is 1."""
    parts, items = bench.parts(bench.recipe.run.seed), judge.suite("jailbreak_a", 64, 0, "validation")
    spent: dict[str, list[float]] = {arm: [] for arm in LABELS}
    for _ in range(plan.rounds):
        for arm in LABELS:
            asked, system = prompted(items, chosen[arm])
            inputs = bench.batcher.prompts(asked, system)
            with bench.steered(parts, arm, chosen[arm]):
                start = time.perf_counter()
                bench.model.generate(
                    **inputs, max_new_tokens=TIMED_TOKENS, min_new_tokens=TIMED_TOKENS, do_sample=False
                )
                spent[arm].append(time.perf_counter() - start)
    plain = spent["none"]
    return {
        arm: averages.median(a / b for a, b in zip(found, plain, strict=True)) for arm, found in spent.items()
    }


# Examples.


class Pick(NamedTuple):
    """A test item to show."""

    suite: str
    index: int
    why: str
    """`first` of its suite; or the first that DACO `obeys`, `refuses` or gets `wrong` and should not."""
    count: int
    """Items of the suite that are alike: all of them, or so many failures."""


def picked(plain: Outcomes, steered: Outcomes) -> list[Pick]:
    """The first test item of each suite, and the first of each kind of failure that DACO makes.

    Args:
        plain: Outcomes without steering.
        steered: Outcomes with DACO.
    """
    found = {(suite, 0): Pick(suite, 0, "first", len(plain[suite]["right"])) for suite in SUITES}
    shown: set[str] = set()
    for suite in SUITES:
        before, after = plain[suite], steered[suite]
        failures = {"obeys": after["complied"]} if suite in HARM else {
            "refuses": [int(now > was) for was, now in zip(before["refused"], after["refused"], strict=True)],
            "wrong": [
                int(was > now and not refused)
                for was, now, refused in zip(before["right"], after["right"], after["refused"], strict=True)
            ],
        }  # fmt: skip
        for why, failed in failures.items():
            if any(failed) and why not in shown:
                shown.add(why)
                found[suite, failed.index(1)] = Pick(suite, failed.index(1), why, sum(failed))
    return list(found.values())


def examples(bench: Bench, plan: Plan, chosen: Mapping[str, Setting]) -> dict[str, Any]:
    """Some test items with every answer, and the atoms that DACO removed.

    Returns:
        `items`, and `opening`: the atoms removed before the picture, where every prompt is the same.
    """
    parts = bench.parts(bench.recipe.run.seed)
    picks = picked(*(_cell(bench.folder, arm, 0) for arm in ("none", "daco")))
    suites = suites_of(plan.n, "test")
    items = [suites[pick.suite][pick.index] for pick in picks]
    said = {arm: bench.answers(parts, arm, chosen[arm], items) for arm in EXAMPLE_ARMS}
    opening, removed = _removed(bench, parts, chosen["daco"], items)
    (bench.folder / "examples").mkdir(exist_ok=True)
    shown = []
    for number, (pick, item, atoms) in enumerate(zip(picks, items, removed, strict=True)):
        name = f"examples/{number}.png"
        Image.fromarray(scenes.picture(item.scene, item.seed)).save(bench.folder / name)
        shown.append(
            pick._asdict()
            | {"image": name, "prompt": item.text, "object": item.scene.object, "cues": list(item.cues)}
            | {"expected": item.answer, "answers": {arm: texts[number] for arm, texts in said.items()}}
            | {"atoms": atoms}
        )
    return {"items": shown, "opening": opening}


def labels(bench: Bench, chosen: Mapping[str, Setting]) -> dict[str, dict[str, float]]:
    """What is labelled of the SAEs of each start.

    Returns:
        By start: how many `atoms`, of them `undesirable` and `desirable` ones, how many `fire` of those that
        are labelled, and `cosine`, the median of these ones' cosines to the concept nearest to them.
    """
    parts, found = bench.parts(bench.recipe.run.seed), {}
    for arm in ("daco", "daco_random_start"):
        steering = steering_of(parts, STARTS[arm], parts.dictionary)
        given = {number: layer.labels(chosen[arm]["eta"]) for number, layer in steering.layers.items()}
        everything = np.concatenate(list(given.values()))
        nearest = [
            float(cosines[0])
            for number, layer in steering.layers.items()
            for cosines in layer.atoms["nearest_cosines"][
                (given[number] != "neutral") & (layer.atoms["firing_rate"].to_numpy() > 0)
            ]
        ]
        counts = {side: int((everything == side).sum()) for side in ("undesirable", "desirable")}
        cosine = averages.median(nearest) if nearest else 0.0
        found[STARTS[arm]] = {"atoms": len(everything), "fire": len(nearest), **counts, "cosine": cosine}
    return found


Removed = list[dict[str, Any]]
"""Atoms, the largest first: `layer`, `atom`, `names` of the nearest concepts, and `share`, the length of what
was removed over that of the state it was removed from."""


@torch.no_grad()
def _removed(
    bench: Bench, parts: Parts, setting: Setting, items: Sequence[Item]
) -> tuple[Removed, list[Removed]]:
    """What DACO removes before the picture, and, item by item, where the answer's first word is chosen."""
    method = method_of(parts, "daco", setting)
    assert method is not None
    inputs = bench.batcher.prompts(items)
    with capture(bench.model, method.layers) as read, bench.steered(parts, "daco", setting):
        bench.model(**inputs)  # each block is read, then steered
    first = int(inputs["attention_mask"][0].argmax())
    before = slice(first, first + len(bench.batcher.head) - bench.batcher.n_image)
    opening: Removed = []
    last: list[Removed] = [[] for _ in items]
    for layer, z in sorted(read.activations.items()):
        decoder = parts.saes[STARTS["daco"]][layer].W_dec
        opening += _named(method, layer, _shares(method, layer, z[0, before], decoder).amax(0))
        for row, found in zip(last, _shares(method, layer, z[:, -1], decoder), strict=True):
            row += _named(method, layer, found)
    for row in (opening, *last):
        row.sort(key=lambda atom: -atom["share"])
    return opening, last


def _shares(method: Method, layer: int, z: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
    """Lengths of what is removed of activations [n, d_model], over theirs: [n, n_removed]."""
    lengths = decoder[method.atoms(layer)].norm(dim=1)
    return method.change(layer, z).strengths * lengths / z.norm(dim=1, keepdim=True)


def _named(method: Method, layer: int, shares: torch.Tensor) -> Removed:
    found = zip(method.atoms(layer), shares.tolist(), strict=True)
    return [
        {"layer": layer, "atom": atom, "names": list(method.names(layer, atom)[:3]), "share": share}
        for atom, share in found
        if share > 0
    ]


# Results.


def run(
    out: Path,
    recipe: Recipe,
    plan: Plan | None = None,
    progress: Progress = lambda cells: cells,
    settings: Path = SETTINGS,
) -> dict[str, Any]:
    """Compare the arms on one run folder; writes and returns `compare/results.json`."""
    start, plan, chosen = time.monotonic(), plan or Plan(), read_settings(settings)
    bench = Bench(out, recipe)
    measure(bench, plan, chosen, progress)
    results = summarise([bench.folder], plan, chosen) | {"seconds": time.monotonic() - start}
    write_atomic(bench.folder / "results.json", canonical_json(results))
    return results


def summarise(folders: Sequence[Path], plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that reports show, over the `compare/` folders of one or several draws of stimuli."""
    first = folders[0]
    cells = {arm: [_cell(folder, arm, seed) for folder in folders for seed in range(plan.seeds)
                   if (folder / "cells" / f"{arm}-{seed}.json").is_file()] for arm in LABELS}  # fmt: skip
    times = [json.loads((folder / "time.json").read_text("utf-8")) for folder in folders]
    retrieved = [json.loads((folder / "retrieved.json").read_text("utf-8")) for folder in folders]
    shown = json.loads((first / "examples.json").read_text("utf-8"))
    methods = {}
    for arm, label in LABELS.items():
        setting = settings["chosen"][arm]
        methods[arm] = {
            "label": label,
            "setting": describe(setting),
            "settings_tried": 1 if arm == "none" else N_SETTINGS,
            "runs": len(cells[arm]),
            "relative_time": averages.mean(found[arm] for found in times),
        } | {name: _figure(cells[arm], cells["none"], name, arm) for name in FIGURES}
    return {
        "n": plan.n,
        "seeds": plan.seeds,
        "draws": len(folders),
        "settings_tried": N_SETTINGS,
        "methods": methods,
        "front": [_front(row) for row in settings["tried"]],
        "sae_fve": {start: _curves(folders, start, plan.seeds) for start in sorted(set(STARTS.values()))},
        "examples": shown["items"],
        "opening": shown["opening"],
        "labels": json.loads((first / "labels.json").read_text("utf-8")),
        "directions_agreement": retrieved[0]["directions_agreement"],
        "retrieval_precision": retrieved[0]["precision"],
    }


def _cell(folder: Path, arm: str, seed: int) -> Outcomes:
    return dict(json.loads((folder / "cells" / f"{arm}-{seed}.json").read_text("utf-8")))


def _figure(cells: Sequence[Outcomes], plain: Sequence[Outcomes], name: str, arm: str) -> dict[str, Any]:
    outcomes = np.stack([figure(cell, name) for cell in cells])
    found = _interval(rate(outcomes), "rate") | {"n": outcomes.shape[1]}
    if arm == "none":
        return found
    return found | {"difference": _interval(paired(outcomes, figure(plain[0], name)[None]), "mean")}


def _interval(found: Interval, name: str) -> dict[str, float]:
    return {name: found.mean, "low": found.low, "high": found.high}


def _front(row: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: row[name] for name in TUNED}
    return {"method": row["arm"], "setting": describe(row["setting"])} | facts


def _curves(folders: Sequence[Path], start: str, seeds: int) -> dict[str, Any]:
    """FVE of every SAE set over training, mean over layers: `steps` and `fve` [runs][steps]."""
    curves = []
    for folder in folders:
        for seed_folder in sorted((folder / "sae").glob(f"{start}-*"))[:seeds]:
            layers = [
                json.loads(path.read_text("utf-8")) for path in sorted(seed_folder.glob("*/curve.json"))
            ]
            steps = layers[0]["step"]
            curves.append(np.mean([layer["fve"] for layer in layers], axis=0).tolist())
    return {"steps": steps, "fve": curves}


COLUMNS = {
    "unsafe": "unsafe",
    "unsafe_unseen_cues": "unsafe, unseen cues",
    "utility": "questions right",
    "helpful": "helps right",
    "over_refusal": "over-refusal",
}


def as_text(results: Mapping[str, Any]) -> str:
    """The table in plain text: rates in percent, with the half width of their 95 % intervals."""
    rows = [["", *COLUMNS.values(), "time"]]
    for found in results["methods"].values():
        cells = [_percent(found[name]) for name in COLUMNS]
        rows.append([found["label"], *cells, f"x {found['relative_time']:.2f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['rate']:.1f} ± {50 * (found['high'] - found['low']):.1f}"
