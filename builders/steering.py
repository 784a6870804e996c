"""How the release of a run steers, and its SAEs as the release holds them.

Reads the folders of finished stages: `sae/`, `atoms/` and, where settings were tried, `tune/tuning.json`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from builders.recipe import Recipe
from builders.train_sae import load_sae
from daco.dictionary import ConceptDictionary
from daco.manifest import FORMAT_VERSION
from daco.sae import LayerSAE
from daco.sae_files import layer_folder
from daco.steering_sae import SteeringSAE
from daco.tables import ATOMS, read_table

TUNING = "tuning.json"


class Setting(NamedTuple):
    """One way to steer."""

    eta: float
    """Cosine threshold of labels."""
    gamma: float
    """Strength of the desirable shift in units of R."""
    scope: str
    """Positions that are steered."""
    layers: tuple[int, ...]
    """Layers that are steered."""


def own_setting(recipe: Recipe, layers: Sequence[int]) -> Setting:
    """How a recipe steers that has chosen nothing."""
    return Setting(recipe.atoms.eta, recipe.evaluate.gamma, recipe.evaluate.scope, tuple(layers))


def read_tuning(out: Path) -> dict[str, Any]:
    """What the stage `tune` found in a run folder; empty where nothing was tried."""
    path = out / "tune" / TUNING
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def release_setting(out: Path, recipe: Recipe, layers: Sequence[int]) -> Setting:
    """How a run's release steers: as was chosen, or as the recipe says.

    Args:
        out: The run folder.
        recipe: Its recipe.
        layers: Layers of its dictionary.
    """
    found: Mapping[str, Any] | None = read_tuning(out).get("chosen")
    if not found:
        return own_setting(recipe, layers)
    return Setting(found["eta"], found["gamma"], found["scope"], tuple(found["layers"]))


def steering_config(setting: Setting, layers: Sequence[int]) -> dict[str, Any]:
    """`steering` of a release's config; `layers` is there only where not all of them are steered."""
    found = {"eta": setting.eta, "gamma": setting.gamma, "scope": setting.scope}
    return found | ({"layers": list(setting.layers)} if list(setting.layers) != list(layers) else {})


def load_layer(sae: Path, atoms: Path, layer: int, dictionary: ConceptDictionary, eta: float) -> LayerSAE:
    """The SAE of a layer with its atoms, labelled at `eta`.

    Args:
        sae: Folder of the finished stage.
        atoms: Likewise.
        layer: Which one.
        dictionary: Has its R.
        eta: Cosine threshold of labels.
    """
    table = read_table(atoms / layer_folder(layer) / "atoms.parquet", ATOMS).to_pandas()
    found = LayerSAE(layer, load_sae(sae / layer_folder(layer)), table, dictionary.R[layer])
    return dataclasses.replace(found, atoms=table.assign(polarity=found.labels(eta)))


def load_steering(setting: Setting, sae: Path, atoms: Path, dictionary: ConceptDictionary) -> SteeringSAE:
    """The SAEs of a run as a release would hold them that steers with `setting`."""
    layers = {layer: load_layer(sae, atoms, layer, dictionary, setting.eta) for layer in dictionary.layers}
    config = {
        "format_version": FORMAT_VERSION,
        "base_model": dataclasses.asdict(dictionary.model),
        "layers": dictionary.layers,
        "activation": layers[dictionary.layers[0]].sae.activation,
        "steering": steering_config(setting, dictionary.layers),
    }
    return SteeringSAE(config, layers)
