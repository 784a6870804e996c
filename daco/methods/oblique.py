"""Oblique projection: undesirable concepts go, desirable ones stay exactly as they are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from daco.methods.coding import ConceptRemoval
from daco.methods.method import Placed, number

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary

LEAST_ANGLE = 1e-8
"""Smallest eigenvalue of the Gram matrix of unit rows, relative to the largest, at which they count as
independent."""


class ObliqueProjection(ConceptRemoval):
    """Take the undesirable subspace out along the desirable one: what desirable concepts explain stays.

    `z = sum over U u_i U_i + sum over K k_j K_j + r` by least squares, U the undesirable and K the desirable
    directions; then `z <- z - strength sum u_i U_i`. With strength 1 every vector in the span of K stays as
    it is and every one in the span of U goes; `Projection` takes what the two share as well. PaCE's own way
    (`MOP`) does the same by a sparse code on all concepts, of which there are more than dimensions.

    Args:
        dictionary: Directions, with polarity.
        strength: Share that is removed, >= 0.
        rank: Rows of each of U and K: their leading right singular vectors (all, where there are fewer); None
            takes the concepts' own directions, of which the report then names those that fire.
        layers: Only these layers; None is all.
        dtype: Of the maps.
        on_empty: `raise` where no concept is undesirable, or `pass`.

    Raises:
        ValueError: a parameter is out of range, or U and K are not independent (more rows than d_model, or
            concepts that are nearly the same): pass `rank`.
        UnknownLayerError: a layer the dictionary does not have.
        NothingToSteerError: no concept is undesirable.

    Source: oblique projections as in Behrens and Scharf 1994; for concepts arXiv 2406.04331, section 3.
    """

    def __init__(
        self,
        dictionary: "ConceptDictionary",
        strength: float = 1.0,
        rank: int | None = None,
        layers: Sequence[int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        on_empty: str = "raise",
    ) -> None:
        self.strength, self.rank = number("strength", strength, 0.0), rank
        if rank is not None and rank < 1:
            raise ValueError(f"rank: expected at least 1 or None, got {rank!r}")
        super().__init__(dictionary, 0.0, layers, on_empty)
        self._weights = {layer: self._maps(dictionary, layer, dtype) for layer in self.layers}

    def __str__(self) -> str:
        return f"oblique projection, strength {self.strength:g}, rank {self.rank or 'all'}"

    def strengths(self, layer: int, z: Tensor, w: Any) -> Tensor:
        """Coefficients of U, `[n, rows of U]`, by least squares on U and K together."""
        coefficients: Tensor = self.strength * (z @ w.dual.T)
        return coefficients

    def atoms(self, layer: int) -> list[int]:
        """Rows of undesirable concepts; none where leading directions stand for them."""
        return super().atoms(layer) if self.rank is None else []

    def change(self, layer: int, z: Tensor) -> Any:
        """Coefficients and delta of activations `[n, d_model]`, in the method's dtype."""
        change = super().change(layer, z)
        return change if self.rank is None else change._replace(strengths=change.strengths[:, :0])

    def _maps(self, dictionary: "ConceptDictionary", layer: int, dtype: torch.dtype) -> Placed:
        """U, and the rows whose products with z are its coefficients."""
        rows = normalize(dictionary.raw(layer).double(), dim=-1)
        U, K = (self._basis(rows[torch.from_numpy(of)]) for of in (self._undesirable, self._desirable))
        both = torch.cat([U, K])
        gram = both @ both.T
        values = torch.linalg.eigvalsh(gram) if len(both) else both.new_ones(1)
        if values[0] < LEAST_ANGLE * values[-1]:
            raise ValueError(
                f"layer {layer}: expected independent directions, got {len(U)} undesirable and {len(K)} "
                f"desirable ones in {rows.shape[1]} dimensions that are not; pass rank, or use MOP"
            )
        dual = torch.linalg.solve(gram, both)[: len(U)]
        return Placed(removed=U.to(dtype), dual=dual.to(dtype), shift=U.new_zeros(U.shape[1]).to(dtype))

    def _basis(self, rows: Tensor) -> Tensor:
        if self.rank is None or not len(rows):
            return rows
        leading: Tensor = torch.linalg.svd(rows, full_matrices=False).Vh[: self.rank]
        return leading
