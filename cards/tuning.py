"""How a release's steering defaults were chosen, for its card: the facts, and the picture that it shows.

Reads `tuning.json` of a model release (see `builders.tune`); writes nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cards import plots
from daco.errors import FormatError

TUNING, PICTURE = "tuning.json", "tuning.png"

NOTES = {
    "unsafe": "harmful requests obeyed",
    "utility": "questions answered right",
    "helpful": "harmless requests answered as expected",
    "over_refusal": "harmless requests refused",
}
"""What the figures are."""


def pictures(folder: Path) -> dict[str, bytes]:
    """The pictures that the card of a release folder shows, by file name.

    Raises:
        FormatError: what they are drawn from is not what `builders.tune` writes.
    """
    path = folder / TUNING
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        chosen = next((row for row in found["tried"] if row["setting"] == found["chosen"]), None)
        tried = [
            plots.Tried(row["figures"]["unsafe"]["rate"], row["loss"], row["front"], row is chosen)
            for row in found["tried"]
        ]
        spread = (chosen["figures"]["unsafe"]["low"], chosen["figures"]["unsafe"]["high"]) if chosen else None
        return {PICTURE: plots.choice(tried, found["plain"]["unsafe"]["rate"], found["allowed"], spread)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _broken(error) from error


def tuning_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """How the defaults were chosen: no steering, the front, the recipe's own setting and the choice.

    Args:
        found: Of `tuning.json`.

    Raises:
        FormatError: it is not what `builders.tune` writes.
    """
    try:
        return _facts(found)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _broken(error) from error


def chosen_results(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the chosen setting did on the validation items, as an entry of a card's `model-index`.

    Raises:
        FormatError: it is not what `builders.tune` writes.
    """
    if not found:
        return []
    try:
        chosen = next((row for row in found["tried"] if row["setting"] == found["chosen"]), None)
        if chosen is None:
            return []
        metrics = [
            {"type": name, "name": f"{NOTES[name]} (95 % interval {row['low']:.4g} to {row['high']:.4g})"}
            | {"value": row["rate"]}
            for name, row in chosen["figures"].items()
            if name in NOTES
        ]
        n = ", ".join(f"{n:,} {kind}" for kind, n in sorted(found["items"].items()))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _broken(error) from error
    task = {"type": "image-text-to-text", "name": "Steering at the released setting"}
    return [{"task": task, "dataset": {"type": "validation", "name": f"Validation items ({n})"}}
            | {"metrics": metrics}]  # fmt: skip


def _facts(found: Mapping[str, Any]) -> dict[str, Any]:
    own = {"recipe": found["default"], "chosen": found["chosen"]}
    shown = [row for row in found["tried"] if row["front"] or row["setting"] in own.values()]
    shown.sort(key=lambda row: (row["figures"]["unsafe"]["rate"], row["loss"]))
    columns = [name for name in NOTES if name in found["plain"]]
    plain = {"name": "no steering", "figures": _cells(found["plain"], columns)}
    return {
        "counts": dict(sorted(found["items"].items())),
        "judge": found["judge"],
        "allowed": 100 * found["allowed"],
        "tried": len(found["tried"]),
        "chosen": bool(found["chosen"]),
        "notes": {name: NOTES[name] for name in columns},
        "rows": [
            plain,
            *({"name": _setting(row, own), "figures": _cells(row["figures"], columns)} for row in shown),
        ],
        "picture": PICTURE,
    }


def _cells(figures: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Percentages with their 95 % intervals."""
    rows = [figures[name] for name in columns]
    return [f"{100 * row['rate']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})" for row in rows]


def _setting(row: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """A setting in words, with what it is."""
    setting = row["setting"]
    marks = [name for name, of in own.items() if of == setting]
    layers = list(setting["layers"])
    whole = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    named = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
    text = f"eta {setting['eta']:g}, gamma {setting['gamma']:g}, {setting['scope']}, layers {named}"
    return f"{text} ({' and '.join(marks)})" if marks else text


def _broken(error: Exception) -> FormatError:
    return FormatError(
        f"{TUNING}: expected what `builders.tune` writes, got {error!r}; write the release again"
    )
