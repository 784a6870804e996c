"""What methods that take an activation apart into concepts share: undesirable ones go, the rest stays."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
    shift,
    shift_notes,
)

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary


class ConceptRemoval:
    """`z <- z - sum over undesirable c_i D_i + gamma R unit(sum of desirable D_i)`; how c is found differs.

    A kind of it fills `_weights`, by layer what `_placed` makes, and says `strengths`.
    """

    _weights: dict[int, Placed]

    def __init__(
        self,
        dictionary: "ConceptDictionary",
        gamma: float,
        layers: Sequence[int] | None,
        on_empty: str,
    ) -> None:
        check_on_empty(on_empty)
        self.gamma = number("gamma", gamma, 0.0)
        self.layers = chosen_layers(layers, dictionary.layers)
        self.base_model = dictionary.model
        self._concepts = list(dictionary.concepts["concept"])
        self._undesirable = np.flatnonzero(dictionary.mask("undesirable"))
        self._desirable = np.flatnonzero(dictionary.mask("desirable"))
        some = len(self._undesirable) or self.shifted(0)
        self.nothing = "" if some else no_polarity("undesirable", dictionary)
        raise_if(self.nothing, on_empty)

    def strengths(self, layer: int, z: Tensor, w: Any) -> Tensor:
        """Coefficients `[n, n_undesirable]` of undesirable concepts; z is in the method's dtype."""
        raise NotImplementedError

    def change(self, layer: int, z: Tensor) -> Change:
        """Coefficients and delta of activations `[n, d_model]`, in the method's dtype."""
        w = self._weights[layer].on(z.device)
        strengths = self.strengths(layer, z.to(w.removed.dtype), w)
        return Change(w.shift - strengths @ w.removed, strengths)

    def is_empty(self, layer: int) -> bool:
        """Whether nothing is removed or added."""
        return bool(self.nothing)

    def atoms(self, layer: int) -> list[int]:
        """Rows of undesirable concepts."""
        return [int(row) for row in self._undesirable]

    def names(self, layer: int, atom: int) -> list[str]:
        """The concept of a row."""
        return [str(self._concepts[atom])]

    def shifted(self, layer: int) -> bool:
        """Whether gamma and the desirable concepts make a shift."""
        return self.gamma > 0 and len(self._desirable) > 0

    def notes(self) -> list[str]:
        """Why nothing happens, or no shift."""
        return [*empty_notes(self), *shift_notes(self, self.gamma)]

    def _unit_rows(self, dictionary: "ConceptDictionary", layer: int, dtype: torch.dtype) -> Tensor:
        return normalize(dictionary.raw(layer).to(dtype), dim=-1)

    def _placed(
        self, dictionary: "ConceptDictionary", layer: int, rows: Tensor, **tensors: Tensor | None
    ) -> Placed:
        """What `change` reads at a layer, and what `strengths` does."""
        return Placed(
            removed=rows[torch.from_numpy(self._undesirable)],
            shift=shift(rows[torch.from_numpy(self._desirable)], self.gamma * dictionary.R[layer]),
            **tensors,
        )
