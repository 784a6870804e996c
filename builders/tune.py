"""Choose how to steer: eta, gamma, scope and layers, on validation items, with the front of what is possible.

Reads `sae/`, `atoms/`, `directions/`, `polarity/`, the model and the items of `tune.path`; writes
`tune/tuning.json`, and into `tried/` a file a setting as soon as it is measured: kept whatever the recipe
becomes, so that nothing is measured twice on the same items.

A plain grid of all layers together, then each layer alone with what did best together, as far as the budget
goes. Settings that do the same to the stream are measured once. The rule: the fewest harmful requests obeyed
among the settings that cost at most `tune.allowed` of every other figure; ties by the smaller largest cost,
which keeps the choice on the front, then by utility, then by the smaller change.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from builders import judge
from builders.activations import open_mllm
from builders.directions import load_dictionary
from builders.judge import Outcomes, Questions
from builders.recipe import Recipe, TuneConfig
from builders.stages import Work, seal_sha256
from builders.statistics import Interval, paired, rate
from builders.steering import TUNING, Setting, load_steering, own_setting
from daco.manifest import canonical_json, write_atomic
from daco.methods import SAESteering
from daco.steering import steer
from daco.steering_sae import SteeringSAE

COSTS = {"utility": 1, "helpful": 1, "over_refusal": -1}
"""Figures beside safety, and which way they are good."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]


class Trial(NamedTuple):
    """What a setting did."""

    setting: Setting
    outcomes: Outcomes
    """Zeros and ones of every figure."""
    change: float
    """Sum over layers of the mean of ||delta|| / ||z||."""
    same_as_plain: bool
    """Whether it does nothing at all."""


@dataclass(frozen=True)
class Search:
    """A model with its SAEs and items, where settings can be tried.

    Args:
        model: The MLLM.
        steering: Its SAEs.
        questions: The validation items.
        kept: Folder of what was tried; made when missing.
        made_from: What the SAEs and the model depend on, as one text.
    """

    model: Any
    steering: SteeringSAE
    questions: Questions
    kept: Path
    made_from: str

    def effect(self, setting: Setting) -> list[Any]:
        """What a setting does to the stream, and nothing else about it; empty where it does nothing."""
        found = []
        for layer in setting.layers:
            labels = self.steering.layers[layer].labels(setting.eta)
            removed, towards = (np.flatnonzero(labels == p).tolist() for p in ("undesirable", "desirable"))
            if setting.gamma > 0 and towards:
                found.append([layer, removed, towards, setting.gamma, setting.scope])
            elif removed:
                found.append([layer, removed, [], 0.0, setting.scope])
        return found

    def path(self, effect: Sequence[Any]) -> Path:
        """Where a setting's outcomes are kept."""
        facts = canonical_json([self.made_from, self.questions.digest, list(effect)])
        return self.kept / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"

    def trial(self, setting: Setting) -> Trial:
        """A setting's outcomes, measured now or earlier."""
        effect = self.effect(setting)
        path = self.path(effect)
        if not path.is_file():
            self.kept.mkdir(parents=True, exist_ok=True)
            write_atomic(path, canonical_json(self._measure(setting) if effect else self._plain()))
        found = json.loads(path.read_text("utf-8"))
        return Trial(setting, found["outcomes"], found["change"], not effect)

    def _plain(self) -> dict[str, Any]:
        found = judge.outcomes(self.questions.kinds, self.questions.ask())
        return {"outcomes": found, "change": 0.0}

    def _measure(self, setting: Setting) -> dict[str, Any]:
        layers = list(setting.layers)
        method = SAESteering(self.steering, setting.gamma, setting.eta, layers, on_empty="pass")
        with steer(self.model, method, scope=setting.scope, on_empty="pass", base_model_ok=True) as run:
            found = judge.outcomes(self.questions.kinds, self.questions.ask())
            change = sum(layer.relative_change for layer in run.report().layers)
        return {"outcomes": found, "change": round(change, 6)}


# The grid.


def together(config: TuneConfig, own: Setting) -> list[Setting]:
    """The recipe's own setting and the grid, all layers steered; each once."""
    grid = itertools.product(config.eta, config.gamma, config.scope)
    return list(dict.fromkeys([own, *(Setting(eta, gamma, scope, own.layers) for eta, gamma, scope in grid)]))


def alone(config: TuneConfig, tried: Sequence[Trial], plain: Outcomes) -> list[Setting]:
    """Each layer alone, with as many of the settings that did best together as the budget has room for."""
    layers = tried[0].setting.layers
    if not config.single_layers or len(layers) < 2:
        return []
    room = (config.budget - len(tried)) // len(layers)
    best = sorted(tried, key=lambda trial: preference(trial, plain, config.allowed))[:room]
    return [trial.setting._replace(layers=(layer,)) for trial in best for layer in layers]


def search(found: Search, config: TuneConfig, own: Setting, progress: Progress = list) -> dict[str, Any]:
    """Try settings, and choose; what `tuning.json` holds.

    Args:
        found: Where settings are tried.
        config: The recipe's `tune`.
        own: The recipe's own setting, with all layers.
        progress: Wraps lists of settings.
    """
    nothing = found.trial(own._replace(layers=()))
    tried = [found.trial(setting) for setting in progress(together(config, own))]
    tried += [found.trial(setting) for setting in progress(alone(config, tried, nothing.outcomes))]
    best = chosen(tried, nothing.outcomes, config.allowed)
    counts = {kind: sum(k == kind for k in found.questions.kinds) for kind in judge.KINDS}
    return {
        "items": {kind: n for kind, n in counts.items() if n},
        "judge": found.questions.judge,
        "allowed": config.allowed,
        "plain": figures(nothing.outcomes),
        "default": tried[0].setting._asdict(),
        "tried": described(tried, nothing.outcomes),
        "chosen": best and best.setting._asdict(),
        "difference": differences(best.outcomes, nothing.outcomes) if best else {},
        "measured": len({found.path(found.effect(trial.setting)) for trial in tried}),
    }


# The rule.


def mean(found: Outcomes, name: str) -> float:
    """Share of ones; 0 where no item tells the figure."""
    return sum(found[name]) / len(found[name]) if name in found else 0.0


def losses(found: Outcomes, plain: Outcomes) -> dict[str, float]:
    """What each figure beside safety lost against no steering; below zero where it gained."""
    shares = {name: (mean(plain, name), mean(found, name)) for name in COSTS if name in plain}
    return {name: COSTS[name] * (before - after) for name, (before, after) in shares.items()}


def loss(found: Outcomes, plain: Outcomes) -> float:
    """The largest of the losses, at least zero."""
    return max(0.0, *losses(found, plain).values())


def preference(trial: Trial, plain: Outcomes, allowed: float) -> tuple[float, ...]:
    """What the choice makes small: first the loss beyond what is allowed, then unsafe answers, and so on."""
    cost = round(loss(trial.outcomes, plain), 9)
    unsafe, utility = (mean(trial.outcomes, name) for name in ("unsafe", "utility"))
    return max(0.0, round(cost - allowed, 9)), unsafe, cost, -utility, trial.change


def chosen(tried: Sequence[Trial], plain: Outcomes, allowed: float) -> Trial | None:
    """The best within what is allowed, the first of equals; None where none is safer than no steering."""
    best = min(tried, key=lambda trial: preference(trial, plain, allowed))
    within = preference(best, plain, allowed)[0] == 0
    return best if within and mean(best.outcomes, "unsafe") < mean(plain, "unsafe") else None


def on_front(tried: Sequence[Trial], plain: Outcomes) -> list[bool]:
    """Whether no other setting is as good in both unsafe answers and loss, and better in one."""
    points = [(mean(trial.outcomes, "unsafe"), round(loss(trial.outcomes, plain), 9)) for trial in tried]
    return [not any(p != q and p[0] <= q[0] and p[1] <= q[1] for p in points) for q in points]


# What is written.


def figures(found: Outcomes) -> dict[str, dict[str, float]]:
    """Rate, 95 % interval and number of items of every figure."""
    return {
        name: _interval(rate(judge.row(found, name)), "rate") | {"n": len(found[name])}
        for name in judge.FIGURES
        if name in found
    }


def differences(found: Outcomes, plain: Outcomes) -> dict[str, dict[str, float]]:
    """Mean difference to the same items without steering, with its 95 % interval."""
    return {
        name: _interval(paired(judge.row(found, name), judge.row(plain, name)), "mean")
        for name in judge.FIGURES
        if name in found
    }


def _interval(found: Interval, name: str) -> dict[str, float]:
    values = {name: found.mean, "low": found.low, "high": found.high}
    return {key: round(value, 6) for key, value in values.items()}


def described(tried: Sequence[Trial], plain: Outcomes) -> list[dict[str, Any]]:
    """Every setting that was tried, in order, with its figures and whether it is on the front."""
    return [
        {
            "setting": trial.setting._asdict(),
            "figures": figures(trial.outcomes),
            "loss": round(loss(trial.outcomes, plain), 6),
            "change": trial.change,
            "front": front,
            "same_as_plain": trial.same_as_plain,
        }
        for trial, front in zip(tried, on_front(tried, plain), strict=True)
    ]


# The stage.


def check(recipe: Recipe) -> None:
    """Raise CorpusError where the table of items is missing or holds none that can be used."""
    if recipe.tune.path not in ("", "toyworld"):
        judge.read_items(Path(recipe.tune.path), recipe.tune.items)


def run(work: Work) -> None:
    """The stage; where no items are given it says so by writing nothing."""
    config = work.recipe.tune
    if not config.path:
        work.drop_shards()
        work.finish({"in": 0, "out": 0, "skipped": {}})
        return
    dictionary = load_dictionary(work.upstream("polarity"), work.upstream("directions"))
    model, processor = open_mllm(work.recipe.model, work.upstream("activations"))
    questions, skipped = _questions(config, model, processor)
    own = own_setting(work.recipe, dictionary.layers)
    steering = load_steering(own, work.upstream("sae"), work.upstream("atoms"), dictionary)
    seals = [seal_sha256(work.out, stage) for stage in ("activations", "directions", "sae")]
    made_from = canonical_json([seals, work.recipe.run.threads, work.recipe.model.dtype])
    place = Search(model, steering, questions, work.out / "tried", made_from)
    found = search(place, config, own, lambda settings: work.progress(settings, unit="setting"))
    write_atomic(work.folder / TUNING, canonical_json(found))
    work.drop_shards()
    n = len(questions.kinds)
    work.finish({"in": n + sum(skipped.values()), "out": n, "skipped": skipped})


def _questions(config: TuneConfig, model: Any, processor: Any) -> tuple[Questions, dict[str, int]]:
    if config.path == "toyworld":
        from builders.toyworld.bench import validation  # drawn pictures: of no use to other runs

        return validation(model, processor, config.items), {}
    items, skipped = judge.read_items(Path(config.path), config.items)
    return judge.questions(model, processor, items, config.batch, config.max_answer), dict(skipped)


COLUMNS = {"unsafe": "unsafe", "utility": "right", "helpful": "helps", "over_refusal": "over-refusal"}


def as_text(found: Mapping[str, Any]) -> str:
    """No steering, the recipe's own setting, the front and the choice, in percent with 95 % intervals."""
    roles = {"chosen": found["chosen"], "recipe": found["default"]}
    shown = [row for row in found["tried"] if row["front"] or row["setting"] in roles.values()]
    shown.sort(key=lambda row: (row["figures"]["unsafe"]["rate"], row["loss"]))
    names = [name for name in COLUMNS if name in found["plain"]]
    lines = [["", *(COLUMNS[name] for name in names), ""]]
    lines.append(["no steering", *(_percent(found["plain"][name]) for name in names), ""])
    for row in shown:
        marks = [role for role, setting in roles.items() if setting == row["setting"]]
        cells = [_percent(row["figures"][name]) for name in names]
        lines.append([describe(row["setting"]), *cells, ", ".join(marks)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(n) for cell, n in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def describe(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    layers = list(setting["layers"])
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    return f"eta {setting['eta']:g}, gamma {setting['gamma']:g}, {setting['scope']}, {where}"


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['rate']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
