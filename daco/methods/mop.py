"""MOP: sparse coding on the dictionary itself (DESIGN 4.7)."""

from collections.abc import Mapping, Sequence
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
    shift,
)
from daco.sparse_coding import elastic_net

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary


class MOP:
    """Sparse coding on the dictionary itself: remove what undesirable concepts explain; the residual stays.

    `c = argmin 1/2 ||z - c D||^2 + alpha (tau ||c||_1 + (1 - tau)/2 ||c||^2)`; then
    `z <- z - sum over undesirable c_i D_i`, with D the unit directions. Codes are certified by their
    duality gap.

    Args:
        dictionary: Directions, with polarity.
        alpha: Penalty as a fraction of `max|D z| / tau`, above which the code is zero; in (0, 1).
        tau: Share of the L1 penalty, in (0, 1].
        gamma: Strength of the desirable shift in units of R, >= 0.
        non_negative: Only coefficients >= 0.
        centre: By layer `[d_model]`: taken off z before coding.
        layers: Only these layers; None is all.
        tol: Duality gap that is accepted, as a fraction of `1/2 ||z||^2`.
        max_rounds: Rounds of the solver at most; codes that are not certified by then are used and reported.
        keep_gram: Keep `D D^T` of each layer (900 MB for 15,000 concepts in float32): faster, most of all
            token by token on a CPU.
        dtype: Of code and delta.
        on_empty: `raise` where no concept is undesirable, or `pass`.

    Raises:
        ValueError: a parameter is out of range.
        UnknownLayerError: a layer the dictionary does not have.
        NothingToSteerError: no concept is undesirable (nor, with gamma > 0, desirable).

    Source: arXiv 2604.08846 and 2406.04331; DESIGN section 4.7.
    """

    def __init__(
        self,
        dictionary: "ConceptDictionary",
        alpha: float = 0.1,
        tau: float = 0.95,
        *,
        gamma: float = 0.0,
        non_negative: bool = False,
        centre: Mapping[int, Tensor] | None = None,
        layers: Sequence[int] | None = None,
        tol: float = 1e-4,
        max_rounds: int = 100,
        keep_gram: bool = False,
        dtype: torch.dtype = torch.float32,
        on_empty: str = "raise",
    ) -> None:
        check_on_empty(on_empty)
        self.alpha = number("alpha", alpha, 0.0, 1.0, open_ends=True)
        self.tau = number("tau", tau, 0.0, 1.0)
        if not self.tau:
            raise ValueError("tau: expected above 0 to 1, got 0: without L1 no code is sparse")
        self.gamma, self.non_negative = number("gamma", gamma, 0.0), non_negative
        self.tol, self.max_rounds = number("tol", tol, 0.0, 1.0, open_ends=True), max_rounds
        self.layers = chosen_layers(layers, dictionary.layers)
        self.base_model = dictionary.model
        self._concepts = list(dictionary.concepts["concept"])
        self._undesirable = np.flatnonzero(dictionary.mask("undesirable"))
        self._desirable = np.flatnonzero(dictionary.mask("desirable"))
        self._weights = {
            layer: self._weights_of(dictionary, layer, dtype, (centre or {}).get(layer), keep_gram)
            for layer in self.layers
        }
        self._uncertified: dict[torch.device, Tensor] = {}
        self.nothing = (
            "" if len(self._undesirable) or self.shifted(0) else no_polarity("undesirable", dictionary)
        )
        raise_if(self.nothing, on_empty)

    def __str__(self) -> str:
        return f"MOP, alpha {self.alpha:g}, tau {self.tau:g}, gamma {self.gamma:g}"

    def is_empty(self, layer: int) -> bool:
        """Whether nothing is removed or added."""
        return bool(self.nothing)

    def change(self, layer: int, z: Tensor) -> Change:
        """Codes and delta of activations `[n, d_model]`, in the method's dtype."""
        w = self._weights[layer].on(z.device)
        z = z.to(w.D.dtype)
        strengths = self.code(layer, z)[:, w.undesirable]
        return Change(w.shift - strengths @ w.removed, strengths)

    def code(self, layer: int, z: Tensor) -> Tensor:
        """Codes of activations `[n, d_model] -> [n, n_concepts]`; what is not certified is counted."""
        w = self._weights[layer].on(z.device)
        z = z.to(w.D.dtype)
        z = z if w.centre is None else z - w.centre
        correlation = z @ w.D.T
        alpha = self.alpha * correlation.abs().amax(-1) / self.tau
        solved = elastic_net(
            z,
            w.D,
            alpha,
            self.tau,
            non_negative=self.non_negative,
            tol=self.tol,
            max_rounds=self.max_rounds,
            correlation=correlation,
            gram=w.gram,
        )
        uncertified = (~solved.certified).sum()
        self._uncertified[z.device] = self._uncertified.get(z.device, 0) + uncertified
        return solved.code

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
        """Why nothing happens, and codes that were used without a certificate."""
        count = int(sum(int(found) for found in self._uncertified.values()))
        missed = f"{count} codes not certified within {self.max_rounds} rounds; raise max_rounds or tol"
        return empty_notes(self) + ([missed] if count else [])

    def _weights_of(
        self,
        dictionary: "ConceptDictionary",
        layer: int,
        dtype: torch.dtype,
        centre: Tensor | None,
        keep_gram: bool,
    ) -> Placed:
        rows = normalize(dictionary.raw(layer).to(dtype), dim=-1)
        return Placed(
            D=rows,
            undesirable=torch.from_numpy(self._undesirable),
            centre=None if centre is None else centre.to(dtype),
            removed=rows[torch.from_numpy(self._undesirable)],
            gram=rows @ rows.T if keep_gram else None,
            shift=shift(rows[torch.from_numpy(self._desirable)], self.gamma * dictionary.R[layer]),
        )
