"""Methods that need a few vectors only: ActAdd and projection (DESIGN 4.7)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from daco.methods.method import (
    Change,
    Placed,
    check_on_empty,
    chosen_layers,
    empty_notes,
    no_polarity,
    number,
    raise_if,
)

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary


class ActAdd:
    """One vector for all tokens: `z + strength R unit(mu+ - mu-)`.

    Args:
        dictionary: Directions, with polarity.
        strength: In units of R; negative steers the other way.
        layers: Only these layers; None is all.
        dtype: Of the vector.
        on_empty: `raise` where there is no vector, or `pass`.

    Raises:
        ValueError: `strength` is not finite.
        UnknownLayerError: a layer the dictionary does not have.
        NothingToSteerError: no concept is desirable or undesirable, or `strength` is 0.

    Source: arXiv 2308.10248; arXiv 2604.08846; DESIGN section 4.7.
    """

    def __init__(
        self,
        dictionary: "ConceptDictionary",
        strength: float = 0.1,
        layers: Sequence[int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        on_empty: str = "raise",
    ) -> None:
        check_on_empty(on_empty)
        self.strength = number("strength", strength, -math.inf)
        self.layers = chosen_layers(layers, dictionary.layers)
        self.base_model = dictionary.model
        self._weights = {}
        for layer in self.layers:
            towards = dictionary.centroid(layer, "desirable") - dictionary.centroid(layer, "undesirable")
            scale = self.strength * dictionary.R[layer]
            self._weights[layer] = Placed(vector=scale * normalize(towards.to(dtype), dim=-1))
        self.nothing = self._why_nothing(dictionary)
        raise_if(self.nothing, on_empty)

    def __str__(self) -> str:
        return f"ActAdd, strength {self.strength:g}"

    def is_empty(self, layer: int) -> bool:
        """Whether the vector is missing."""
        return bool(self.nothing)

    def change(self, layer: int, z: Tensor) -> Change:
        """The vector, at every row of `[n, d_model]`."""
        vector = self._weights[layer].on(z.device).vector
        return Change(vector.expand(len(z), -1), vector.new_zeros(len(z), 0))

    def atoms(self, layer: int) -> list[int]:
        """None: nothing is taken apart."""
        return []

    def names(self, layer: int, atom: int) -> list[str]:
        """None."""
        return []

    def shifted(self, layer: int) -> bool:
        """Whether there is a vector."""
        return not self.nothing

    def notes(self) -> list[str]:
        """Why nothing happens."""
        return empty_notes(self)

    def _why_nothing(self, dictionary: "ConceptDictionary") -> str:
        if self.strength == 0:
            return "strength is 0; pass another, or on_empty='pass' for an exact no-op"
        for polarity in ("desirable", "undesirable"):
            if not dictionary.mask(polarity).any():
                return no_polarity(polarity, dictionary)
        return ""


class Projection:
    """Take the undesirable subspace out: `z <- z - strength B^T B z`, with B an orthonormal basis of it.

    Args:
        dictionary: Directions, with polarity.
        strength: Share that is removed; 1 is the orthogonal projection.
        rank: Rows of B: 1 is the undesirable centroid mu-; more are the leading right singular vectors of the
            undesirable unit directions.
        layers: Only these layers; None is all.
        dtype: Of the basis.
        on_empty: `raise` where no concept is undesirable, or `pass`.

    Raises:
        ValueError: `strength` is negative or not finite; `rank` is below 1 or above the number of undesirable
            concepts.
        UnknownLayerError: a layer the dictionary does not have.
        NothingToSteerError: no concept is undesirable, or `strength` is 0.

    Source: directional ablation, arXiv 2406.11717; with rank > 1 arXiv 2310.01405.
    """

    def __init__(
        self,
        dictionary: "ConceptDictionary",
        strength: float = 1.0,
        rank: int = 1,
        layers: Sequence[int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        on_empty: str = "raise",
    ) -> None:
        check_on_empty(on_empty)
        self.strength, self.rank = number("strength", strength, 0.0), rank
        self.layers = chosen_layers(layers, dictionary.layers)
        self.base_model = dictionary.model
        n_undesirable = int(dictionary.mask("undesirable").sum())
        self.nothing = self._why_nothing(dictionary)
        raise_if(self.nothing, on_empty)
        if n_undesirable and not 1 <= rank <= n_undesirable:
            raise ValueError(f"rank: expected 1 to {n_undesirable} (undesirable concepts), got {rank!r}")
        self._weights = {
            layer: Placed(basis=undesirable_basis(dictionary, layer, rank, dtype)) for layer in self.layers
        }

    def __str__(self) -> str:
        return f"projection, strength {self.strength:g}, rank {self.rank}"

    def is_empty(self, layer: int) -> bool:
        """Whether there is nothing to take out."""
        return bool(self.nothing)

    def change(self, layer: int, z: Tensor) -> Change:
        """What is taken out of activations `[n, d_model]`."""
        basis = self._weights[layer].on(z.device).basis
        inside = (z.to(basis.dtype) @ basis.T) @ basis
        return Change(-self.strength * inside, inside.new_zeros(len(z), 0))

    def atoms(self, layer: int) -> list[int]:
        """None: nothing is taken apart."""
        return []

    def names(self, layer: int, atom: int) -> list[str]:
        """None."""
        return []

    def shifted(self, layer: int) -> bool:
        """No: what is taken out depends on the activation."""
        return False

    def notes(self) -> list[str]:
        """Why nothing happens."""
        return empty_notes(self)

    def _why_nothing(self, dictionary: "ConceptDictionary") -> str:
        if self.strength == 0:
            return "strength is 0; pass another, or on_empty='pass' for an exact no-op"
        empty = not dictionary.mask("undesirable").any()
        return no_polarity("undesirable", dictionary) if empty else ""


def undesirable_basis(
    dictionary: "ConceptDictionary", layer: int, rank: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Orthonormal rows `[rank, d_model]`: mu- alone, or the leading undesirable directions."""
    if rank == 1:
        return dictionary.centroid(layer, "undesirable").to(dtype)[None]
    rows = dictionary.unit(layer)[np.flatnonzero(dictionary.mask("undesirable"))]
    leading: Tensor = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:rank]
    return leading.to(dtype)
