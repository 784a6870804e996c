"""The report page of a run: one HTML file with stimuli, the dictionary, curves and what steering changed.

Reads a finished run folder of `python -m builders run`, and its `compare/` where there is one; returns HTML.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from safetensors.numpy import load_file

from builders.corpus import image_file, open_image
from builders.pipeline import stage_names
from builders.recipe import Recipe
from builders.stages import done
from cards import plots
from cards.escape import size
from cards.pictures import data_url
from cards.render import TEMPLATES
from cards.toyworld import toyworld_facts

CONCEPTS_SHOWN = {"undesirable": 4, "desirable": 3, "neutral": 3}
STIMULI_SHOWN = 6
ATOMS_SHOWN = 8
"""Atoms shown of each polarity, shared by the layers, at least two of each: the ones that fire most."""
NAMED = 40
"""Concepts of each polarity whose names the map may show."""
THUMBNAIL = 96
TOY_WORLD = (
    "A small model refuses harm, and falls for trick words. DACO looks for what makes it give in, inside the "
    "model, and takes that away while it answers. The small model that is steered, and a second one that "
    "finds pictures for words, come trained with the repository; the rest of the page was made here."
)
TOY_MODEL = (
    "The model is tiny and lives in a drawn world whose rules are known: this page shows whether the method "
    "finds and removes what is there to be found, not how safe a real model becomes."
)
RANDOM_MODEL = (
    "The language model of this run is tiny and has random weights: all parts work together here, but "
    "concepts, labels and steering mean nothing to it."
)
STAGES = {
    "corpus": "captioned pictures read and checked",
    "concepts": "words of the dictionary",
    "clip": "training steps of the model that finds pictures (0: it comes trained)",
    "embeddings": "pictures and captions turned into vectors to search",
    "stimuli": "words for which pictures were found",
    "polarity": "words given a label",
    "activations": "pictures that some word was linked to, read by the steered model",
    "directions": "links between a word and a picture, averaged into directions",
    "recognition": "words, a layer, that can be told from an inner state often enough to be named",
    "sae": "inner states to learn from, a layer; some are held out to measure on",
    "atoms": "atoms of all layers; the others point to neither side",
    "tune": "settings tried in this run (0: the recipe gives them; those of the table were chosen before)",
    "evaluate": "held-out pictures for the figures of the published card; the table above asks its own items",
    "release": "pictures published: those that some word was linked to",
}
"""What each stage counts."""

STEERING_COLUMNS = {
    "changed": "positions changed",
    "relative_change": "size of the change / size of the activation",
    "kl": "KL of the next token",
    "next_token_changed": "next token changed",
}
"""Figures of `evaluation.json` shown for each method."""


def report_html(out: Path, recipe: Recipe, published: dict[str, Any]) -> str:
    """The report of a run.

    Args:
        out: The run folder, all stages done.
        recipe: What it was made from.
        published: `repos` (repo_id, repo_type, tag, commit, files, bytes of each), `runs` (title, what it
            `proves`, code and output of each client) and `seconds`.

    Returns:
        A self-contained HTML page; every text from data is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    environment.filters["size"] = size
    layer = recipe.activations.layers[-1]
    toy = toyworld_facts(out)
    facts = {
        **_opening(recipe, toy is not None),
        "toy": toy and toy | {name: Markup(toy[name]) for name in ("front_svg", "corner_svg", "fve_svg")},
        "made": _made(recipe),
        "contents": _contents(toy is not None, bool(toy and toy["findings"])),
        "stages": _stages(out),
        "concepts": _concepts(out),
        "map_layer": layer,
        "map_svg": Markup(_map(out, layer)),
        "fve_svg": "" if toy else Markup(_fve(out, recipe)),
        "atoms": _atoms(out, recipe),
        **_steering(out),
        **published,
    }
    return environment.get_template("report.html.jinja").render(facts)


CONTENTS = {
    "conclusions": "Conclusions",
    "problem": "The problem",
    "method": "What DACO does",
    "table": "The table",
    "cost": "What it costs",
    "examples": "Before and after",
    "odd": "What looks odd",
    "concepts": "Concepts",
    "dictionary": "Dictionary",
    "saes": "Autoencoders",
    "inside": "Inside",
    "developers": "For developers",
}
"""Sections of the page, in order."""


def _contents(toy: bool, found: bool) -> list[tuple[str, str]]:
    """The sections that a page has."""
    of_toy, of_found = ("problem", "method", "table", "cost", "examples"), ("conclusions", "odd")
    has = {**dict.fromkeys(of_toy, toy), **dict.fromkeys(of_found, toy and found), "inside": not toy}
    return [(name, title) for name, title in CONTENTS.items() if has.get(name, True)]


def _opening(recipe: Recipe, toy: bool) -> dict[str, str]:
    if toy:
        return {
            "title": "DACO in a toy world: a small model, steered away from harm",
            "lead": TOY_WORLD,
            "caveat": TOY_MODEL,
        }
    return {
        "title": f"DACO run “{recipe.run.name}”",
        "lead": "From captioned images to a steered model, published and loaded back.",
        "caveat": RANDOM_MODEL if recipe.model.tiny else "",
    }


def _made(recipe: Recipe) -> dict[str, Any]:
    """What the run was made with."""
    sizes: dict[str, Any] = dict.fromkeys(("parameters", "blocks", "width"))
    folder = Path(recipe.model.id)
    if (folder / "training.json").is_file():
        config, training = (
            json.loads((folder / f"{n}.json").read_text("utf-8")) for n in ("config", "training")
        )
        text = config["text_config"]
        sizes = {"parameters": training["n_parameters"], "blocks": text["num_hidden_layers"]}
        sizes |= {"width": text["hidden_size"]}
    return sizes | {
        "seed": recipe.run.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "n_atoms": recipe.sae.n_atoms,
        "k": recipe.sae.k,
        "layers": len(recipe.activations.layers),
    }


def _stages(out: Path) -> list[dict[str, Any]]:
    rows = []
    for name in stage_names():
        counts = done(out, name)["counts"]
        skipped = [
            f"{n:,} {reason.replace('_', ' ')}" for reason, n in sorted(counts["skipped"].items()) if n
        ]
        rows.append(
            {"name": name, "about": STAGES.get(name, ""), "skipped": ", ".join(skipped)}
            | {"n_in": counts["in"], "n_out": counts["out"]}
        )
    return rows


def _concepts(out: Path) -> list[dict[str, Any]]:
    """Some concepts of each polarity, over the whole dictionary, with their nearest stimuli as thumbnails."""
    concepts = pd.read_parquet(out / "polarity" / "concepts.parquet")
    stimuli = pd.read_parquet(out / "corpus" / "stimuli.parquet").set_index("stimulus_id")
    links = pd.read_parquet(out / "stimuli" / "links.parquet")
    positives = links[(links["role"] == "positive") & (links["rank"] < STIMULI_SHOWN)]
    shown = []
    for polarity, n in CONCEPTS_SHOWN.items():
        of_polarity = concepts[concepts["polarity"] == polarity]
        spread = (
            np.unique(np.linspace(0, len(of_polarity) - 1, n).round().astype(int)) if len(of_polarity) else []
        )
        for row in of_polarity.iloc[spread].itertuples():
            found = positives[positives["concept_id"] == row.concept_id].sort_values("rank")
            pictures = [
                _stimulus(out, stimuli.loc[link.stimulus_id], link.dist) for link in found.itertuples()
            ]
            shown.append({"name": row.concept, "polarity": polarity, "stimuli": pictures})
    return shown


def _stimulus(out: Path, row: Any, dist: float) -> dict[str, Any]:
    small = open_image(image_file(out / "corpus", row["file"]))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    caption = row["caption"] if len(row["caption"]) <= 80 else row["caption"][:79] + "…"
    return {"image": data_url(small), "caption": caption, "dist": dist}


def _map(out: Path, layer: int) -> str:
    concepts = pd.read_parquet(out / "polarity" / "concepts.parquet")
    rows = load_file(out / "directions" / "directions.safetensors")[f"layer_{layer}"].astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    points = _principal(rows)
    named = [i for polarity in ("undesirable", "desirable", "neutral")
             for i in np.flatnonzero((concepts["polarity"] == polarity).to_numpy())[:NAMED]]  # fmt: skip
    names = {int(i): concepts["concept"].iloc[i] for i in named}
    return plots.concept_map([tuple(point) for point in points], list(concepts["polarity"]), names)


def _principal(rows: np.ndarray) -> np.ndarray:
    """`rows` on their two largest principal components, `[n, 2]`."""
    centred = rows - rows.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return u[:, :2] * s[:2]


def _fve(out: Path, recipe: Recipe) -> str:
    lines = {}
    for layer in recipe.activations.layers:
        table = pd.read_parquet(out / "sae" / f"layers.{layer}" / "training.parquet")
        lines[f"layer {layer}"] = (table["step"].tolist(), table["fve"].tolist())
    return plots.curves(lines, "training step", "variance explained")


def _atoms(out: Path, recipe: Recipe) -> list[dict[str, Any]]:
    shown, n_each = [], max(2, ATOMS_SHOWN // len(recipe.activations.layers))
    for layer in recipe.activations.layers:
        table = pd.read_parquet(out / "atoms" / f"layers.{layer}" / "atoms.parquet")
        for polarity in ("undesirable", "desirable"):
            labelled = table[table["polarity"] == polarity]
            busiest = labelled.sort_values("firing_rate", ascending=False, kind="stable").head(n_each)
            shown += [_atom(layer, row) for row in busiest.to_dict("records")]
    return shown


def _atom(layer: int, row: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(row["nearest_concepts"], row["nearest_cosines"], strict=True)
    names = ", ".join(f"{name} ({cosine:.2f})" for name, cosine in list(pairs)[:3])
    return {key: row[key] for key in ("atom", "polarity", "firing_rate")} | {"layer": layer, "names": names}


def _steering(out: Path) -> dict[str, Any]:
    methods = json.loads((out / "evaluate" / "evaluation.json").read_text("utf-8"))["steering"]
    note = "Measured on {:,} held-out pairs, each method on, against the same model left alone."
    return {
        "steering_note": note.format(max(row["n_stimuli"] for row in methods.values())),
        "steering_columns": list(STEERING_COLUMNS.values()),
        "steering": [
            {"method": row["method"], "values": [f"{row[name]:.3g}" for name in STEERING_COLUMNS]}
            for row in methods.values()
        ],
    }
