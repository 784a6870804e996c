"""MOP and OMP: sparse coding on the dictionary itself (DESIGN 4.7)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daco.coarse import Coarse, usable
from daco.methods.coding import ConceptRemoval
from daco.methods.method import number
from daco.pursuit import matching_pursuit
from daco.sparse_coding import SMALL, elastic_net

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary


class _SparseCoding(ConceptRemoval):
    """What the two share: a code on all rows, of which the undesirable part is removed."""

    def code(self, layer: int, z: Tensor) -> Tensor:
        """Codes of activations `[n, d_model] -> [n, n_concepts]`."""
        w = self._weights[layer].on(z.device)
        z = z.to(w.D.dtype)
        return self._code(layer, z if w.centre is None else z - w.centre, w)

    def strengths(self, layer: int, z: Tensor, w: Any) -> Tensor:
        """The code's columns of undesirable concepts."""
        return self.code(layer, z)[:, w.undesirable]

    def _code(self, layer: int, z: Tensor, w: Any) -> Tensor:
        raise NotImplementedError

    def _place_all(
        self,
        dictionary: "ConceptDictionary",
        dtype: torch.dtype,
        centre: Mapping[int, Tensor] | None,
        keep_gram: bool,
    ) -> None:
        self._weights = {}
        for layer in self.layers:
            rows, middle = self._unit_rows(dictionary, layer, dtype), (centre or {}).get(layer)
            self._weights[layer] = self._placed(
                dictionary,
                layer,
                rows,
                D=rows,
                undesirable=torch.from_numpy(self._undesirable),
                centre=None if middle is None else middle.to(dtype),
                gram=rows @ rows.T if keep_gram else None,
            )


class MOP(_SparseCoding):
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
        keep_gram: Keep `D D^T` of each layer (900 MB for 15,000 concepts in float32): faster. On a CPU the
            dictionary is kept in bytes too, a quarter of its size, whether or not.
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
        self.alpha = number("alpha", alpha, 0.0, 1.0, open_ends=True)
        self.tau = number("tau", tau, 0.0, 1.0)
        if not self.tau:
            raise ValueError("tau: expected above 0 to 1, got 0: without L1 no code is sparse")
        self.tol, self.max_rounds = number("tol", tol, 0.0, 1.0, open_ends=True), max_rounds
        self.non_negative = non_negative
        super().__init__(dictionary, gamma, layers, on_empty)
        self._place_all(dictionary, dtype, centre, keep_gram)
        self._uncertified: dict[torch.device, Tensor] = {}
        self._coarse: dict[int, Coarse] = {}

    def __str__(self) -> str:
        return f"MOP, alpha {self.alpha:g}, tau {self.tau:g}, gamma {self.gamma:g}"

    def notes(self) -> list[str]:
        """Why nothing happens, and codes that were used without a certificate."""
        count = int(sum(int(found) for found in self._uncertified.values()))
        missed = f"{count} codes not certified within {self.max_rounds} rounds; raise max_rounds or tol"
        return super().notes() + ([missed] if count else [])

    def _code(self, layer: int, z: Tensor, w: Any) -> Tensor:
        solved = elastic_net(
            z,
            w.D,
            z.new_full((len(z),), self.alpha),
            self.tau,
            non_negative=self.non_negative,
            tol=self.tol,
            max_rounds=self.max_rounds,
            gram=w.gram,
            coarse=self._coarsely(layer, w.D),
            relative=True,
        )
        uncertified = (~solved.certified).sum()
        self._uncertified[z.device] = self._uncertified.get(z.device, 0) + uncertified
        return solved.code

    def _coarsely(self, layer: int, D: Tensor) -> Coarse | None:
        """The layer's dictionary in bytes, made when it is first of use."""
        if not usable(D) or len(D) <= SMALL:
            return None
        if layer not in self._coarse:
            self._coarse[layer] = Coarse.of(D)
        return self._coarse[layer]


class OMP(_SparseCoding):
    """Greedy coding: k concepts an activation, by orthogonal matching pursuit; undesirable ones are removed.

    Args:
        dictionary: Directions, with polarity.
        k: Concepts in a code, 1 to d_model.
        gamma: Strength of the desirable shift in units of R, >= 0.
        centre: By layer `[d_model]`: taken off z before coding.
        layers: Only these layers; None is all.
        keep_gram: Keep `D D^T` of each layer (900 MB for 15,000 concepts in float32): without it each of the
            k steps reads the whole dictionary.
        dtype: Of code and delta.
        on_empty: `raise` where no concept is undesirable, or `pass`.

    Raises:
        ValueError: a parameter is out of range.
        UnknownLayerError: a layer the dictionary does not have.
        NothingToSteerError: no concept is undesirable (nor, with gamma > 0, desirable).

    Source: Pati et al. 1993; as a solver for concepts arXiv 2406.04331.
    """

    def __init__(
        self,
        dictionary: "ConceptDictionary",
        k: int = 32,
        *,
        gamma: float = 0.0,
        centre: Mapping[int, Tensor] | None = None,
        layers: Sequence[int] | None = None,
        keep_gram: bool = False,
        dtype: torch.dtype = torch.float32,
        on_empty: str = "raise",
    ) -> None:
        most = min(dictionary.model.hidden_size, len(dictionary.concepts))
        if not 1 <= k <= most:
            raise ValueError(f"k: expected 1 to {most} (d_model, or concepts), got {k!r}")
        self.k = k
        super().__init__(dictionary, gamma, layers, on_empty)
        self._place_all(dictionary, dtype, centre, keep_gram)

    def __str__(self) -> str:
        return f"OMP, k {self.k}, gamma {self.gamma:g}"

    def _code(self, layer: int, z: Tensor, w: Any) -> Tensor:
        return matching_pursuit(z, w.D, self.k, gram=w.gram)
