"""The methods that are compared: which there are, their settings, and how each is put on a model.

Reads and writes nothing. Settings that are not given are those of the release (eta, gamma, scope, layers) or
the method's own defaults.
"""

import dataclasses
import hashlib
import inspect
import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from daco.dictionary import ConceptDictionary
from daco.errors import RecipeError
from daco.methods import MOP, ActAdd, Method, Projection, SAESteering, SafetyPrompt
from daco.steering import SCOPES, Run, steer
from daco.steering_sae import SteeringSAE

METHODS: dict[str, type | None] = {
    "none": None,
    "prompting": SafetyPrompt,
    "actadd": ActAdd,
    "mop": MOP,
    "projection": Projection,
    "daco": SAESteering,
}
"""By the name in tables, what does it; None does nothing."""

LABELS = {
    "none": "no steering",
    "prompting": "safety prompt",
    "actadd": "ActAdd",
    "mop": "MOP",
    "projection": "projection",
    "daco": "DACO",
}
"""How each is shown."""

BY_DICTIONARY = ("actadd", "mop", "projection")
"""Methods that are built from directions."""
_GIVEN = {"self", "dictionary", "sae", "centre", "dtype", "on_empty", "remove", "keep", "max_rounds"}
"""Parameters that a setting cannot name."""


@dataclass(frozen=True)
class Arm:
    """One method with its settings, ready to be put on a model."""

    name: str
    """A key of METHODS."""
    settings: dict[str, Any]
    """What was set, by parameter; `scope` is that of `daco.steer`."""
    method: Method | None = None
    """What steers; None: no activation is touched."""
    prompt: SafetyPrompt | None = None
    """A system message in front of every conversation."""
    scope: str = "all"
    """Positions that are steered."""
    made_of: dict[str, Any] = field(default_factory=dict, repr=False)
    """Digests of the SAEs or directions that it was built from."""

    def __str__(self) -> str:
        if self.method is None:
            return str(self.prompt or LABELS["none"])
        return f"{self.method}, scope {self.scope}"

    @property
    def facts(self) -> dict[str, Any]:
        """All that its answers depend on, beside the model."""
        text = "" if self.prompt is None else self.prompt.text
        layers = [] if self.method is None else list(self.method.layers)
        return {
            "name": self.name,
            "settings": self.settings,
            "says": str(self),
            "text": text,
            "layers": layers,
            "made_of": self.made_of,
        }

    def on(self, model: Any, base_model_ok: bool = False) -> AbstractContextManager[Run | None]:
        """The model with this arm on; afterwards it is as before. One that can do nothing is a no-op."""
        if self.method is None:
            return nullcontext()
        return steer(model, self.method, scope=self.scope, on_empty="pass", base_model_ok=base_model_ok)


def allowed(name: str) -> list[str]:
    """Settings that a method takes."""
    method = METHODS[name]
    if method is None:
        return []
    own = [p for p in inspect.signature(method.__init__).parameters if p not in _GIVEN]  # type: ignore[misc]
    return own if method is SafetyPrompt else [*own, "scope"]


def parse_settings(names: Sequence[str], overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings of each method from texts such as `daco.gamma=0.05`.

    Args:
        names: The methods that are compared.
        overrides: `method.setting=value`; values as in TOML, a bare word is a text.

    Raises:
        RecipeError: an unknown method or setting, or one given twice.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise RecipeError(f"methods: expected some of {list(METHODS)}, got {unknown[0]!r}")
    if len(set(names)) != len(names) or not names:
        raise RecipeError(f"methods: expected each once and at least one, got {list(names)}")
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in overrides:
        key, equals, value = text.partition("=")
        name, dot, setting = key.strip().partition(".")
        if not (equals and dot) or name not in found or setting not in allowed(name):
            known = [f"{n}.{s}" for n in names for s in allowed(n)]
            raise RecipeError(f"--set: expected one of {known} with a value, got {text!r}")
        found[name][setting] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def build(
    settings: dict[str, dict[str, Any]], steering: SteeringSAE | None, dictionary: ConceptDictionary | None
) -> list[Arm]:
    """Methods with their settings, ready to be put on a model.

    Args:
        settings: Of `parse_settings`.
        steering: SAEs, for `daco`; their scope is that of every method which says nothing else.
        dictionary: Directions, for `actadd`, `mop` and `projection`.

    Raises:
        RecipeError: a method lacks what it is built from, or a setting has a value it cannot have.
    """
    scope = str(steering.defaults["scope"]) if steering else "all"
    made_of = dict.fromkeys(BY_DICTIONARY, _made_of_directions(dictionary)) if dictionary else {}
    if steering:
        made_of["daco"] = made_of_sae(steering)
    arms = [_arm(name, given, scope, steering, dictionary) for name, given in settings.items()]
    return [dataclasses.replace(arm, made_of=made_of.get(arm.name, {})) for arm in arms]


def _arm(
    name: str,
    given: dict[str, Any],
    scope: str,
    steering: SteeringSAE | None,
    dictionary: ConceptDictionary | None,
) -> Arm:
    source = {"daco": steering} | dict.fromkeys(BY_DICTIONARY, dictionary)
    if name in source and source[name] is None:
        needed = "SAEs (--sae)" if name == "daco" else "a dictionary (--dictionary, or an SAE that names one)"
        raise RecipeError(f"{name}: expected {needed}, got none; name it, or leave the method out")
    own = {key: value for key, value in given.items() if key != "scope"}
    scope = given.get("scope", scope)
    if scope not in SCOPES:
        raise RecipeError(f"{name}.scope: expected one of {SCOPES}, got {scope!r}")
    try:
        if name == "none":
            return Arm(name, given)
        if name == "prompting":
            return Arm(name, given, prompt=SafetyPrompt(**own))
        method = METHODS[name](source[name], on_empty="pass", **own)  # type: ignore[misc]
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{name}: expected settings it can steer by, got {json.dumps(own)}: {error}"
        ) from error
    return Arm(name, given, method=method, scope=scope)


def _digest(parts: Mapping[int, Any]) -> str:
    """Stands for the weights or directions of every layer."""
    found = hashlib.sha256()
    for layer, part in sorted(parts.items()):
        tensors = {"": part} if isinstance(part, Tensor) else part.sae.state_dict()
        for name, tensor in sorted(tensors.items()):
            found.update(f"{layer} {name} {list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def made_of_sae(sae: SteeringSAE) -> dict[str, Any]:
    """Digests of the weights and labels of SAEs, and how they steer by default."""
    labels = {
        str(layer): hashlib.sha256("\n".join(found.labels(None)).encode()).hexdigest()
        for layer, found in sae.layers.items()
    }
    return {"weights": _digest(sae.layers), "labels": labels, "defaults": sae.defaults}


def _made_of_directions(dictionary: ConceptDictionary) -> dict[str, Any]:
    polarity = hashlib.sha256("\n".join(dictionary.concepts["polarity"]).encode()).hexdigest()
    directions = {layer: dictionary.raw(layer) for layer in dictionary.layers}
    return {
        "directions": _digest(directions),
        "polarity": polarity,
        "R": {str(k): v for k, v in dictionary.R.items()},
    }
