"""The arms of the comparison: what each is made of, the settings it may choose from, and how it is put on.

Reads and writes nothing. Every arm has the same number of settings to choose from, `N_SETTINGS`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from builders.atoms import atoms_table
from builders.toyworld import world
from builders.toyworld.scenes import SAFE_A
from daco.dictionary import ConceptDictionary
from daco.manifest import FORMAT_VERSION
from daco.methods import MOP, ActAdd, Method, Projection, SAESteering
from daco.sae import SAE, LayerSAE
from daco.steering_sae import SteeringSAE

LABELS = {
    "none": "no steering",
    "prompting": "safety prompt",
    "actadd": "ActAdd",
    "mop": "MOP",
    "projection": "projection",
    "daco": "DACO, dictionary start",
    "daco_random_start": "DACO, random start",
    "control_shuffled": "control: polarity of concepts shuffled",
    "control_random_atoms": "control: as many random atoms",
    "control_harm_objects": "control: harmful objects alone labelled",
}
"""Every arm, as it is shown."""

SAE_ARMS = tuple(name for name in LABELS if name.startswith(("daco", "control")))
"""Arms that steer by an SAE, hence have seeds."""

STARTS = {name: "random" if name == "daco_random_start" else "dictionary" for name in SAE_ARMS}
"""How the SAE of an arm was started."""

N_SETTINGS = 24

Setting = dict[str, Any]

PROMPTS = (
    "be careful",
    "refuse to help with harm",
    "say what is fine , risky or dangerous",
    "sorry , i cannot help with harm",
    *(" , ".join(SAFE_A[:n]) for n in range(1, 5)),
    *(" , ".join(SAFE_A[4 : 4 + n]) for n in range(1, 5)),
)
"""Safety prompts: sentences, and one to four of the world's safe cue words."""


def grid(**choices: Sequence[Any]) -> list[Setting]:
    """Every combination, as settings."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def settings_of(arm: str, layers: Sequence[int]) -> list[Setting]:
    """What an arm may choose from; none has nothing to choose.

    Args:
        arm: One of `LABELS`.
        layers: Layers of the dictionary: all of them are steered, or the first half.
    """
    places: dict[str, list[Any]] = {
        "layers": [list(layers), list(layers)[: len(layers) // 2]],
        "scope": ["prompt", "all"],
    }
    if arm == "none":
        return [{}]
    if arm == "prompting":
        return grid(place=["system", "user"], text=PROMPTS)
    if arm == "actadd":
        return grid(strength=[0.05, 0.1, 0.15, 0.2, 0.3, 0.5], **places)
    if arm == "mop":
        return grid(alpha=[0.02, 0.1], gamma=[0.0, 0.03, 0.1], **places)
    if arm == "projection":
        return grid(strength=[0.5, 1.0], rank=[1, 2, 4], **places)
    return grid(eta=[0.3, 0.5], gamma=[0.0, 0.03, 0.1], **places)


def describe(setting: Setting) -> str:
    """A setting in words."""
    parts = [
        f"layers {value[0]} to {value[-1]}" if name == "layers" else f"{name} {value}"
        for name, value in setting.items()
    ]
    return ", ".join(parts) or "nothing to set"


@dataclass(frozen=True)
class Parts:
    """What the arms of one run are made of."""

    dictionary: ConceptDictionary
    saes: Mapping[str, Mapping[int, SAE]]
    """By start (`dictionary`, `random`), then by layer."""
    rates: Mapping[str, Mapping[int, Tensor]]
    """Firing rates of their atoms, likewise."""
    seed: int
    """Of what the controls draw."""
    centroids: str = "one"
    """How atoms are labelled; see `builders.atoms.atoms_table`."""


def steering_of(parts: Parts, start: str, dictionary: ConceptDictionary) -> SteeringSAE:
    """The SAEs of a start with atoms labelled and named by a dictionary."""
    layers = {}
    for layer, sae in parts.saes[start].items():
        rates = parts.rates[start][layer]
        table = atoms_table(sae.W_dec.detach(), dictionary, layer, rates, centroids=parts.centroids)
        layers[layer] = LayerSAE(layer, sae, table.to_pandas(), dictionary.R[layer])
    activation = next(iter(layers.values())).sae.activation
    config = {
        "format_version": FORMAT_VERSION,
        "base_model": dataclasses.asdict(dictionary.model),
        "layers": sorted(layers),
        "activation": activation,
        "steering": {"eta": 0.3, "gamma": 0.0, "scope": "all"},
    }
    return SteeringSAE(config, layers)


def relabelled(parts: Parts, arm: str) -> ConceptDictionary:
    """The dictionary with the labels that an arm sees."""
    concepts = parts.dictionary.concepts
    if arm == "control_shuffled":
        order = np.random.default_rng([parts.seed, 1]).permutation(len(concepts))
        labels = concepts["polarity"].to_numpy()[order]
    elif arm == "control_harm_objects":
        harmful = concepts["concept"].isin(list(world.HARMFUL)).to_numpy()
        labels = np.where(harmful, "undesirable", "neutral")
    else:
        return parts.dictionary
    return dataclasses.replace(parts.dictionary, concepts=concepts.assign(polarity=labels))


def with_random_labels(sae: SteeringSAE, eta: float, seed: int) -> SteeringSAE:
    """As many atoms of each label as at `eta`, but any of them."""
    rng = np.random.default_rng([seed, 2])
    layers = {}
    for number, layer in sae.layers.items():
        labels = rng.permutation(layer.labels(eta))
        layers[number] = dataclasses.replace(layer, atoms=layer.atoms.assign(polarity=labels))
    return dataclasses.replace(sae, layers=layers)


def method_of(parts: Parts, arm: str, setting: Setting) -> Method | None:
    """What an arm puts on the model with a setting; None for arms that leave the stream alone."""
    chosen = {key: value for key, value in setting.items() if key != "scope"}
    if arm in ("none", "prompting"):
        return None
    if arm == "actadd":
        return ActAdd(parts.dictionary, on_empty="pass", **chosen)
    if arm == "mop":
        return MOP(parts.dictionary, on_empty="pass", tol=1e-3, **chosen)
    if arm == "projection":
        return Projection(parts.dictionary, on_empty="pass", **chosen)
    steering = steering_of(parts, STARTS[arm], relabelled(parts, arm))
    if arm == "control_random_atoms":
        labelled = with_random_labels(steering, chosen.pop("eta"), parts.seed)
        return SAESteering(labelled, on_empty="pass", **chosen)
    return SAESteering(steering, on_empty="pass", **chosen)
