"""What every steering method is, and what several of them share; knows nothing of models, hooks or tokens."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from daco.errors import NothingToSteerError, UnknownLayerError
from daco.sites import ModelFacts

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary


class Change(NamedTuple):
    """What a method does to some activations."""

    delta: Tensor
    """`[n, d_model]`, in the method's dtype; added to the activations."""
    strengths: Tensor
    """`[n, n_labelled]`: coefficients of what is removed, in the order of `atoms(layer)`."""


@runtime_checkable
class Method(Protocol):
    """What `daco.steering` needs of a method."""

    layers: tuple[int, ...]
    """Layers it steers, rising."""
    base_model: ModelFacts
    """The model it was made for."""
    nothing: str
    """Why it cannot do anything; empty where it can."""

    def is_empty(self, layer: int) -> bool:
        """Whether it does nothing at a layer."""

    def change(self, layer: int, z: Tensor) -> Change:
        """What it does to activations `[n, d_model]`, of any dtype and device."""

    def atoms(self, layer: int) -> list[int]:
        """What it removes where it fires."""

    def names(self, layer: int, atom: int) -> list[str]:
        """Concepts of one of `atoms(layer)`."""

    def shifted(self, layer: int) -> bool:
        """Whether it adds a constant shift."""

    def notes(self) -> list[str]:
        """Remarks for the report."""


class Placed:
    """Tensors of a layer, copied once to each device they are needed on."""

    def __init__(self, **tensors: Tensor | None) -> None:
        self._tensors = {name: None if t is None else t.detach() for name, t in tensors.items()}
        self._by_device: dict[torch.device, SimpleNamespace] = {}

    def on(self, device: torch.device) -> Any:
        """The tensors on a device, by name."""
        if device not in self._by_device:
            self._place(device)
        return self._by_device[device]

    @torch.inference_mode(False)  # a copy made inside would be of no use outside
    def _place(self, device: torch.device) -> None:
        moved = {name: None if t is None else t.to(device) for name, t in self._tensors.items()}
        self._by_device[device] = SimpleNamespace(**moved)


def check_on_empty(on_empty: str) -> None:
    """Raises ValueError where it is neither `raise` nor `pass`."""
    if on_empty not in ("raise", "pass"):
        raise ValueError(f"on_empty: expected 'raise' or 'pass', got {on_empty!r}")


def raise_if(nothing: str, on_empty: str) -> None:
    """Raises NothingToSteerError where there is nothing to steer and that is not allowed."""
    if nothing and on_empty == "raise":
        raise NothingToSteerError(nothing)


def no_polarity(polarity: str, dictionary: "ConceptDictionary") -> str:
    """What is wrong with a dictionary without concepts of a polarity."""
    counts = dictionary.concepts["polarity"].value_counts().sort_index().to_dict()
    return (
        f"no concept is {polarity}: the dictionary has {counts}; label concepts, "
        "or pass on_empty='pass' for an exact no-op"
    )


def empty_notes(method: Method) -> list[str]:
    """Remarks on a method, or on layers of it, that do nothing."""
    if method.nothing:
        return [f"exact no-op: {method.nothing}"]
    empty = [layer for layer in method.layers if method.is_empty(layer)]
    return [f"layers {empty} stay as they are: nothing is labelled there"] if empty else []


def shift_notes(method: Method, gamma: float) -> list[str]:
    """A remark where gamma was to shift towards what is not there."""
    busy = [layer for layer in method.layers if not method.is_empty(layer)]  # of others empty_notes speaks
    missing = [layer for layer in busy if gamma > 0 and not method.shifted(layer)]
    if not missing:
        return []
    return [f"gamma {gamma:g} shifts nothing at layers {missing}: nothing is desirable there"]


def number(name: str, value: float, low: float, high: float = math.inf, open_ends: bool = False) -> float:
    """Raises ValueError where a parameter is not finite or out of range."""
    inside = low < value < high if open_ends else low <= value <= high
    if not (math.isfinite(value) and inside):
        ends = f"between {low:g} and {high:g}" if open_ends else f"from {low:g} to {high:g}"
        ends = ends if math.isfinite(high) else f"{'above' if open_ends else 'from'} {low:g}"
        raise ValueError(f"{name}: expected a number {ends}, got {value!r}")
    return float(value)


def chosen_layers(layers: Sequence[int] | None, known: list[int]) -> tuple[int, ...]:
    """Layers to steer, rising; raises UnknownLayerError or ValueError."""
    wanted = known if layers is None else sorted(set(layers))
    if unknown := [layer for layer in wanted if layer not in known]:
        raise UnknownLayerError(f"expected layers among {known}, got {unknown}")
    if not wanted:
        raise ValueError(f"layers: expected at least one of {known}, got none")
    return tuple(wanted)


def shift(rows: Tensor, scale: float) -> Tensor:
    """`scale * unit(sum of rows)`, `[d_model]`; zero where there are no rows."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (scale * normalize(wide.sum(0), dim=-1)).to(rows.dtype)
