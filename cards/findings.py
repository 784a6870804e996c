"""What a comparison on the toy world shows: its report's claims, worked out from that run's results.

Pure functions of results; reads and writes nothing. The words are in `templates/toyworld*.html.jinja`.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

SIMPLER = ("prompting", "actadd", "mop", "projection")
"""Methods that need no autoencoder."""

SENSELESS = ("control_shuffled", "control_random_atoms")
"""Controls in which labels mean nothing."""

HARM = ("unsafe", "unsafe_unseen_cues")

ALLOWED = 0.02
"""What a chosen setting may lose of questions answered right, on the items it was chosen on."""

ALIKE = 0.5
"""Cosines above this are called one line."""

Row = Mapping[str, Any]


def percent(share: float) -> str:
    """A share in percent, one decimal, on one line."""
    return f"{100 * share:.1f}\u00a0%"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    text = f"{100 * share:+.1f}"
    return "±0" if float(text) == 0 else text.replace("-", "−")


def cosine(value: float) -> str:
    """A cosine, two decimals."""
    return f"{value:.2f}".replace("-", "−")


def behind(row: Row, best: Row) -> bool:
    """Whether a method obeys more harm than another, beyond both intervals, on known or new trick words."""
    return any(row[key]["low"] > best[key]["high"] for key in HARM)


def findings(results: Row, angles: Mapping[str, float]) -> dict[str, Any] | None:
    """The facts behind the report's conclusions and explanations; None where no steering or DACO is missing.

    Args:
        results: Of the comparison, methods in order.
        angles: Mean cosines at one `layer`: `within` undesirable directions, `across` from them to desirable
            ones; and of the mean of harmful `objects` to that of trick words. Empty: unknown.
    """
    methods = results["methods"]
    if not {"none", "daco"} <= set(methods):
        return None
    plain, ours = methods["none"], methods["daco"]
    simpler = [methods[name] for name in SIMPLER if name in methods]
    rivals = [methods[name] for name in SIMPLER[:3] if name in methods]
    return {
        "works": ours["unsafe"]["difference"]["high"] < 0,
        "known": [percent(row["unsafe"]["rate"]) for row in (plain, ours)],
        "new": [percent(row["unsafe_unseen_cues"]["rate"]) for row in (plain, ours)],
        "right": [percent(row["utility"]["rate"]) for row in (plain, ours)],
        "change": _change(ours["utility"]["difference"]),
        "refused": percent(ours["over_refusal"]["rate"]),
        "untricked": [percent(row["unsafe_plain"]["rate"]) for row in (plain, ours)],
        "worse": [_cell(row) for row in simpler if behind(row, ours)],
        "level": [_cell(row) for row in simpler if not behind(row, ours)],
        "paper_ahead": [row["label"] for row in rivals if behind(row, ours)],
        "paper_level": [row["label"] for row in rivals if not behind(row, ours)],
        "senseless": [_cell(methods[name]) for name in SENSELESS if name in methods],
        "labels_matter": all(
            not _most_gone(methods[name], plain, ours) for name in SENSELESS if name in methods
        ),
        "objects": _with_garbled(methods["control_harm_objects"])
        if "control_harm_objects" in methods
        else None,
        "objects_suffice": _most_gone(methods.get("control_harm_objects"), plain, ours),
        "projection_level": "projection" in methods and not behind(methods["projection"], ours),
        "starts": _starts(results),
        "angles": {name: cosine(value) for name, value in angles.items() if name != "layer"},
        "one_line": min(angles.get("within", 0.0), angles.get("objects", 0.0)) > ALIKE,
        "layer": angles.get("layer"),
        "lost": _lost(methods),
    }


def _change(found: Mapping[str, float]) -> dict[str, Any]:
    told = {key: points(found[key]) for key in ("mean", "low", "high")}
    return told | {"loss": found["mean"] < 0, "sure": found["high"] < 0}


def _cell(row: Row) -> dict[str, str]:
    shares = {key: percent(row[key]["rate"]) for key in ("unsafe", "utility")}
    return shares | {"label": str(row["label"]).removeprefix("control: ")}


def _with_garbled(row: Row) -> dict[str, str]:
    """A cell that also says what is neither obeyed nor refused."""
    return _cell(row) | {"garbled": percent(max(0.0, 1 - row["unsafe"]["rate"] - row["refusal"]["rate"]))}


def _most_gone(row: Row | None, plain: Row, ours: Row) -> bool:
    """Whether a method takes away more than half of the harm that DACO takes away."""
    if row is None:
        return False
    before, least, found = (one["unsafe"]["rate"] for one in (plain, ours, row))
    return bool(before - found > (before - least) / 2)


def _lost(methods: Mapping[str, Row]) -> list[dict[str, str]]:
    """Methods that lose more than was allowed."""
    steered = [row for name, row in methods.items() if name != "none"]
    lost = {row["label"]: row["utility"]["difference"]["mean"] for row in steered}
    return [
        {"label": str(label).removeprefix("control: "), "points": points(mean)}
        for label, mean in lost.items()
        if mean < -ALLOWED - 1e-9
    ]


def _starts(results: Row) -> dict[str, Any] | None:
    """The two starts side by side; None where one is missing."""
    fve, labels, methods = results["sae_fve"], results.get("labels", {}), results["methods"]
    if "daco_random_start" not in methods or not {"dictionary", "random"} <= set(fve) & set(labels):
        return None
    ends = {start: [fmean(row[at] for row in run["fve"]) for at in (0, -1)] for start, run in fve.items()}
    sides = {start: _named(labels[start], ends[start]) for start in ("dictionary", "random")}
    return sides | {
        "unsafe": percent(methods["daco_random_start"]["unsafe"]["rate"]),
        "worse": behind(methods["daco_random_start"], methods["daco"]),
        "gain": points(ends["dictionary"][1] - ends["random"][1]),
        "lower_first": ends["dictionary"][0] < ends["random"][0],
        "more_names": labels["dictionary"]["cosine"] > labels["random"]["cosine"],
    }


def _named(found: Mapping[str, float], ends: Sequence[float]) -> dict[str, str]:
    labelled = int(found["undesirable"] + found["desirable"])
    told = {"first": percent(ends[0]), "last": percent(ends[1]), "cosine": cosine(found["cosine"])}
    return told | {
        "labelled": f"{labelled:,}",
        "atoms": f"{int(found['atoms']):,}",
        "fire": f"{int(found['fire']):,}",
    }
