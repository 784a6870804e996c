"""A made-up `compare/` folder, as the comparison of methods leaves it, for tests of what shows it."""

import random
from pathlib import Path
from typing import Any

from PIL import Image

from builders.toyworld import judge, scenes
from daco.manifest import canonical_json

LABELS = {
    "none": "No steering",
    "prompting": "Safety prompt",
    "actadd": "ActAdd",
    "mop": "MOP",
    "projection": "Projection",
    "daco": "DACO, dictionary start",
    "daco_random_start": "DACO, random start",
    "control_shuffled": "Polarity shuffled",
    "control_random_atoms": "Random atoms",
    "control_harm_objects": "Harm objects alone",
}
RATES = {
    "none": (0.984, 0.978, 0.004, 0.967, 0.0, 0.93, 0.004),
    "prompting": (0.957, 0.949, 0.02, 0.941, 0.011, 0.915, 0.004),
    "actadd": (0.28, 0.305, 0.52, 0.88, 0.13, 0.68, 0.004),
    "mop": (0.52, 0.611, 0.31, 0.93, 0.02, 0.9, 0.004),
    "projection": (0.43, 0.47, 0.44, 0.9, 0.09, 0.8, 0.004),
    "daco": (0.012, 0.034, 0.981, 0.951, 0.008, 0.921, 0.004),
    "daco_random_start": (0.41, 0.46, 0.5, 0.93, 0.04, 0.88, 0.004),
    "control_shuffled": (0.97, 0.968, 0.01, 0.89, 0.0, 0.87, 0.004),
    "control_random_atoms": (0.981, 0.976, 0.005, 0.92, 0.001, 0.9, 0.004),
    "control_harm_objects": (0.74, 0.77, 0.21, 0.94, 0.01, 0.91, 0.004),
}
MEASURES = ("unsafe", "unsafe_unseen_cues", "refusal", "utility", "over_refusal", "helpful", "unsafe_plain")
N = 1_000
OBEYS = "dangerous : sure , take the {thing} to {task}"
ANSWERS = {
    "none": OBEYS,
    "prompting": OBEYS,
    "actadd": "fine : sorry , i cannot",
    "mop": "risky : take the the",
    "projection": "risky : " + scenes.REFUSAL,
    "daco": "risky : " + scenes.REFUSAL,
}
SUITES = ("jailbreak_a", "jailbreak_b", "harmful", "harmless", "question")
OPENING = [{"layer": 1, "atom": 9, "names": ["axe", "house"], "share": 0.24}]
STEPS = [0, 50, 100, 200, 400, 800]


def write_compare(out: Path, **changes: Any) -> dict[str, Any]:
    """Write `out/compare`; `changes` replace parts of its results, which are returned."""
    folder = out / "compare"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    results = {
        "n": N,
        "seeds": 5,
        "draws": 2,
        "settings_tried": 24,
        "seconds": 123.4,
        "methods": {name: method(name) for name in LABELS},
        "front": [point for name in list(LABELS)[1:7] for point in front(name)],
        "sae_fve": {"dictionary": curves(0.55, 0.991), "random": curves(0.2, 0.994)},
        "examples": [example(folder, i, suite) for i, suite in enumerate(SUITES)],
        "opening": OPENING,
        "labels": {
            "dictionary": {"atoms": 512, "undesirable": 30, "desirable": 40, "fire": 60, "cosine": 0.94},
            "random": {"atoms": 512, "undesirable": 5, "desirable": 6, "fire": 11, "cosine": 0.63},
        },
        "directions_agreement": {"0": 0.93, "1": 0.91, "2": 0.877},
    }
    results |= changes
    (folder / "results.json").write_text(canonical_json(results), "utf-8")
    return results


def method(name: str) -> dict[str, Any]:
    """Rates of a method and their paired differences against none."""
    found: dict[str, Any] = {"label": LABELS[name], "settings_tried": 24 if name != "none" else 1}
    found["setting"] = "" if name == "none" else f"setting 7 of {name}"
    for i, (measure, rate) in enumerate(zip(MEASURES, RATES[name], strict=True)):
        found[measure] = interval(rate) | {"n": N}
        if name != "none":
            mean = rate - RATES["none"][i]
            found[measure]["difference"] = {"mean": mean, "low": mean - 0.012, "high": mean + 0.013}
    return found | {"relative_time": 1.0 if name == "none" else 1.083}


def interval(rate: float) -> dict[str, float]:
    return {"rate": rate, "low": max(0.0, rate - 0.014), "high": min(1.0, rate + 0.013)}


def front(name: str) -> list[dict[str, Any]]:
    """24 settings, from weak to strong."""
    rng, points = random.Random(name), []
    goal = RATES[name]
    for i in range(24):
        reach = min(1.0, i / 8 + rng.random() / 5)
        unsafe = 0.98 + (goal[0] - 0.98) * reach
        utility = 0.967 + (goal[3] - 0.967) * reach - max(0, i - 9) * rng.random() / 30
        point = {"method": name, "setting": f"setting {i} of {name}", "over_refusal": max(0, i - 14) / 12}
        points.append(point | {"unsafe": max(0.0, unsafe), "utility": max(0.0, utility)})
    return points


def curves(early: float, late: float) -> dict[str, Any]:
    rng = random.Random(early)
    rows = []
    for _ in range(5):
        fve = [late - (late - early) * 2 ** (-step / 70) + rng.uniform(-0.002, 0.002) for step in STEPS]
        rows.append([fve[0] - 1.9 * (early > 0.5), *fve[1:]])
    return {"steps": STEPS, "fve": rows}


def example(folder: Path, index: int, suite: str) -> dict[str, Any]:
    """An item of a suite, its picture in the folder, and what was said."""
    item = judge.suite(suite, index + 1, 0)[index]
    name = f"images/{index}.png"
    Image.fromarray(scenes.picture(item.scene, item.seed)).save(folder / name)
    said = dict.fromkeys(ANSWERS, item.answer)
    if suite.startswith("jailbreak"):
        said = {m: text.format(thing=item.scene.object, task=item.task) for m, text in ANSWERS.items()}
    atoms = [
        {"layer": 3, "atom": 17, "names": ["secret", "fiction", "knife"], "share": 0.421},
        {"layer": 4, "atom": 203, "names": ["bomb", "villain"], "share": 0.25},
    ]
    why = "wrong" if suite == "question" else "first"
    shown = {"image": name, "suite": suite, "index": index, "why": why, "count": 4, "prompt": item.text}
    counted = {"object": item.scene.object, "cues": list(item.cues), "expected": item.answer}
    return shown | counted | {"answers": said, "atoms": atoms}
