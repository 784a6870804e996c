"""DACO itself: undesirable atoms of an SAE are removed, desirable ones shifted to (DESIGN 4.6)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from daco.methods.method import (
    Change,
    Placed,
    check_on_empty,
    chosen_layers,
    empty_notes,
    number,
    raise_if,
    shift,
)
from daco.sae import LayerSAE, top_k

if TYPE_CHECKING:
    from daco.steering_sae import SteeringSAE


class SAESteering:
    """DACO: remove what undesirable atoms add, and shift towards the desirable ones.

    `z <- z - sum over undesirable i of c_i W_dec[i] + gamma R unit(sum of desirable rows of W_dec)`: a delta,
    so the SAE's reconstruction error never enters the model.

    Args:
        sae: SAEs of a release.
        gamma: Strength of the shift in units of R, >= 0; None is the release's default.
        eta: Cosine threshold of labels, -1 to 1; None takes the labels as released.
        layers: Only these layers; None is all.
        on_empty: `raise` where no atom is labelled, or `pass` for an exact no-op.

    Raises:
        ValueError: a parameter is out of range.
        UnknownLayerError: a layer the release does not have.
        NothingToSteerError: no layer has an atom to remove or a direction to shift to.

    Source: arXiv 2604.08846; DESIGN section 4.6.
    """

    def __init__(
        self,
        sae: "SteeringSAE",
        gamma: float | None = None,
        eta: float | None = None,
        layers: Sequence[int] | None = None,
        on_empty: str = "raise",
    ) -> None:
        check_on_empty(on_empty)
        self.gamma = number("gamma", sae.defaults["gamma"] if gamma is None else gamma, 0.0)
        self.eta = number("eta", sae.defaults["eta"] if eta is None else eta, -1.0, 1.0)
        self.layers = chosen_layers(layers, sorted(sae.layers))
        self.base_model = sae.base_model
        self._saes = {layer: sae.layers[layer] for layer in self.layers}
        labels = {layer: self._saes[layer].labels(eta) for layer in self.layers}
        self._atoms = {layer: np.flatnonzero(labels[layer] == "undesirable") for layer in self.layers}
        self._desirable = {layer: np.flatnonzero(labels[layer] == "desirable") for layer in self.layers}
        self._weights = {layer: self._weights_of(layer) for layer in self.layers}
        self.nothing = "" if any(not self.is_empty(layer) for layer in self.layers) else self._why_nothing()
        raise_if(self.nothing, on_empty)

    def __str__(self) -> str:
        return f"SAE steering, eta {self.eta:g}, gamma {self.gamma:g}"

    def is_empty(self, layer: int) -> bool:
        """Whether no atom is removed and nothing is added at a layer."""
        return not len(self._atoms[layer]) and not self.shifted(layer)

    def change(self, layer: int, z: Tensor) -> Change:
        """Code and delta of activations `[n, d_model]`, in the SAE's dtype."""
        w = self._weights[layer].on(z.device)
        strengths = self._strengths(layer, z.to(w.W_dec.dtype), w)
        return Change(w.shift - strengths @ w.W_dec, strengths)

    def atoms(self, layer: int) -> list[int]:
        """Undesirable atoms of a layer."""
        return [int(atom) for atom in self._atoms[layer]]

    def names(self, layer: int, atom: int) -> list[str]:
        """The concepts nearest to an atom."""
        return list(self._saes[layer].names(atom))

    def shifted(self, layer: int) -> bool:
        """Whether gamma and the desirable atoms make a shift."""
        return self.gamma > 0 and len(self._desirable[layer]) > 0

    def notes(self) -> list[str]:
        """Layers that stay as they are."""
        return empty_notes(self)

    def _strengths(self, layer: int, z: Tensor, w: Any) -> Tensor:
        """The code's columns of undesirable atoms, `[n, n_labelled]`."""
        sae = self._saes[layer].sae
        if not len(self._atoms[layer]):
            return z.new_zeros(len(z), 0)
        pre = (z - w.b_dec) @ w.W_enc + w.b_enc
        if sae.activation == "topk":  # which are the largest is decided among all atoms
            return top_k(pre, int(sae.k or 0))[:, w.atoms]
        return torch.where(pre > w.threshold, pre, 0) if w.threshold is not None else pre.relu()

    def _weights_of(self, layer: int) -> Placed:
        """What `change` reads: all encoder columns for topk, else those of the undesirable atoms alone."""
        sae, atoms = self._saes[layer].sae, torch.from_numpy(self._atoms[layer])
        encoder = slice(None) if sae.activation == "topk" else atoms
        return Placed(
            W_enc=sae.W_enc[:, encoder],
            b_enc=sae.b_enc[encoder],
            b_dec=sae.b_dec,
            W_dec=sae.W_dec[atoms],
            # a threshold below zero still stops at zero, as in the SAE itself
            threshold=None if sae.threshold is None else sae.threshold[atoms].clamp_min(0),
            atoms=atoms,
            shift=shift(
                sae.W_dec[torch.from_numpy(self._desirable[layer])], self.gamma * self._saes[layer].R
            ),
        )

    def _why_nothing(self) -> str:
        names = {"cos_undesirable": "undesirable", "cos_desirable": "desirable"}
        largest = {
            text: max(float(_column(found, column).max(initial=-1.0)) for found in self._saes.values())
            for column, text in names.items()
        }
        found = ", ".join(f"{value:.3f} ({text})" for text, value in largest.items())
        return (
            f"no atom of layers {list(self.layers)} is steered at eta={self.eta:g}, gamma={self.gamma:g}: "
            f"the largest cosine found is {found}; lower eta, raise gamma where only desirable atoms "
            "are labelled, or pass on_empty='pass' for an exact no-op"
        )


def _column(layer: LayerSAE, name: str) -> np.ndarray:
    return np.asarray(layer.atoms[name], dtype=np.float64)
