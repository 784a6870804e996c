"""DACO itself: undesirable atoms of an SAE are removed, desirable ones shifted to (DESIGN 4.6)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, threshold

from daco.errors import SteeringOnlyError
from daco.methods.method import (
    Change,
    Placed,
    check_on_empty,
    chosen_layers,
    empty_notes,
    number,
    raise_if,
    shift,
    shift_notes,
)
from daco.sae import LayerSAE
from daco.selection import Selection, strengths_of
from daco.top_k import top_k_at

if TYPE_CHECKING:
    from daco.steering_sae import SteeringSAE

FORMS = ("exact", "threshold")
"""How codes are made: as the SAE makes them; or from the rows of what is removed alone, where a TopK is
replaced by its calibrated threshold. The two differ for a TopK only."""


class SAESteering:
    """DACO: remove what undesirable atoms add, and shift towards the desirable ones.

    `z <- z - sum over undesirable i of s_i c_i W_dec[i] + gamma R unit(sum of desirable rows of W_dec)`: a
    delta, so the SAE's reconstruction error never enters the model.

    Args:
        sae: SAEs of a release.
        gamma: Strength of the shift in units of R, >= 0; None is the release's default.
        eta: Cosine threshold of labels, -1 to 1; None takes the labels as released.
        layers: Only these layers; None is the release's default, all of them where it names none.
        on_empty: `raise` where nothing is removed or shifted to, or `pass` for an exact no-op.
        remove: What is removed, in place of the atoms labelled undesirable: names of concepts (an atom has
            the name of its nearest one), of groups or of labels, or atoms by layer; with strengths s, where 1
            removes and 0 leaves. `{"weapon": 1.0, "noun.act": 0.5}`, `["weapon"]`, `{15: [3, 17]}`; what is
            named later counts.
        keep: Names or atoms that stay in any case.
        form: `exact`, or `threshold`: a TopK reads only the rows of what is removed, and its atoms fire above
            the release's calibrated threshold. None is exact wherever all weights were loaded.

    Raises:
        ValueError: a parameter is out of range.
        UnknownConceptError: no atom has a name that was asked for.
        UnknownLayerError: a layer the release does not have.
        NothingToSteerError: no layer has an atom to remove or a direction to shift to, or what was asked for
            is all kept.
        SteeringOnlyError: atoms, eta or form need weights that were not loaded, or a threshold the release
            does not have.

    Source: arXiv 2604.08846; DESIGN section 4.6.
    """

    def __init__(
        self,
        sae: "SteeringSAE",
        gamma: float | None = None,
        eta: float | None = None,
        layers: Sequence[int] | None = None,
        on_empty: str = "raise",
        *,
        remove: Selection | None = None,
        keep: Selection | None = None,
        form: str | None = None,
    ) -> None:
        check_on_empty(on_empty)
        self.gamma = number("gamma", sae.defaults["gamma"] if gamma is None else gamma, 0.0)
        self.eta = number("eta", sae.defaults["eta"] if eta is None else eta, -1.0, 1.0)
        self.layers = chosen_layers(_default(sae) if layers is None else layers, sorted(sae.layers))
        self.base_model = sae.base_model
        self._saes = {layer: sae.layers[layer] for layer in self.layers}
        self.form = _form(form, self._saes)
        self._remove = remove
        labels = {layer: found.labels(eta) for layer, found in self._saes.items()}
        strengths = strengths_of(self._saes, labels, remove, keep)
        self._rows = {layer: np.flatnonzero(found) for layer, found in strengths.items()}
        self._desirable = {layer: np.flatnonzero(labels[layer] == "desirable") for layer in self.layers}
        self._weights = {layer: self._weights_of(layer, strengths[layer]) for layer in self.layers}
        self._thresholds = {layer: self._same_threshold(layer) for layer in self.layers}
        self.nothing = self._why_nothing(labels)
        raise_if(self.nothing, on_empty)

    def __str__(self) -> str:
        removing = "" if self._remove is None else f", removing {_short(self._remove)}"
        return f"SAE steering, eta {self.eta:g}, gamma {self.gamma:g}{removing}"

    def is_empty(self, layer: int) -> bool:
        """Whether no atom is removed and nothing is added at a layer."""
        return not len(self._rows[layer]) and not self.shifted(layer)

    def change(self, layer: int, z: Tensor) -> Change:
        """Code and delta of activations `[n, d_model]`, in the SAE's dtype."""
        w = self._weights[layer].on(z.device)
        own = w.b_dec.dtype
        if z.dtype.itemsize >= own.itemsize:
            z = z.to(own)  # a narrower one is widened by the subtraction
        code = self._code(layer, z - w.b_dec, w)
        return Change(torch.addmm(w.shift, code, w.minus_W_dec), code)

    def atoms(self, layer: int) -> list[int]:
        """Atoms that are removed at a layer."""
        return [int(atom) for atom in self._saes[layer].numbers[self._rows[layer]]]

    def names(self, layer: int, atom: int) -> list[str]:
        """The concepts nearest to an atom."""
        return list(self._saes[layer].names(atom))

    def shifted(self, layer: int) -> bool:
        """Whether gamma and the desirable atoms make a shift."""
        return self.gamma > 0 and len(self._desirable[layer]) > 0

    def notes(self) -> list[str]:
        """Layers that are not steered or shifted; how the threshold form agrees; where names were sought."""
        rows_only = any(found.labelled_at is not None for found in self._saes.values())
        among = ["names were looked up among the labelled atoms alone (steering_only)"]
        return [
            *empty_notes(self),
            *shift_notes(self, self.gamma),
            *self._form_notes(),
            *(among if rows_only and self._remove is not None else []),
        ]

    def _code(self, layer: int, centred: Tensor, w: Any) -> Tensor:
        """The code's columns of what is removed, `[n, n_removed]`, from `z - b_dec`."""
        if w.W_enc is not None:  # which are the largest is decided among all atoms
            pre = torch.addmm(w.b_enc, centred, w.W_enc)
            return top_k_at(pre, int(self._saes[layer].sae.k or 0), w.rows)
        pre = linear(centred, w.W_enc_rows, w.b_enc)
        if (same := self._thresholds[layer]) is not None:
            return threshold(pre, same, 0)  # a ReLU, as its threshold is zero
        return torch.where(pre > w.threshold, pre, 0)

    def _weights_of(self, layer: int, strengths: np.ndarray) -> Placed:
        """What `change` reads: the encoder as a whole where it is exact for a TopK, else rows of it."""
        found, rows = self._saes[layer], torch.from_numpy(self._rows[layer])
        sae, desirable = found.sae, torch.from_numpy(self._desirable[layer])
        whole = sae.activation == "topk" and self.form == "exact" and len(rows) > 0
        scale = torch.from_numpy(strengths[self._rows[layer]]).to(sae.W_dec)
        return Placed(
            W_enc=sae.W_enc if whole else None,
            W_enc_rows=None if whole else sae.W_enc.T[rows].contiguous(),
            b_enc=sae.b_enc if whole else sae.b_enc[rows],
            b_dec=sae.b_dec,
            minus_W_dec=-scale[:, None] * sae.W_dec[rows],
            threshold=None if whole else _threshold(found, rows),
            rows=rows,
            shift=shift(sae.W_dec[desirable], self.gamma * found.R),
        )

    def _same_threshold(self, layer: int) -> float | None:
        """Above what all of a layer's rows fire; None where they differ."""
        each = _threshold(self._saes[layer], torch.from_numpy(self._rows[layer]))
        if each is None or not len(each):
            return 0.0
        return float(each[0]) if bool((each == each[0]).all()) else None

    def _form_notes(self) -> list[str]:
        """Agreement of the threshold form with a TopK, as it was measured at training."""
        found = {
            layer: "not measured" if sae.jumprelu_agreement is None else f"{sae.jumprelu_agreement:.3f}"
            for layer, sae in self._saes.items()
            if self.form == "threshold" and sae.jumprelu_threshold is not None and len(self._rows[layer])
        }
        if not found:
            return []
        by_layer = ", ".join(f"{text} (layer {layer})" for layer, text in found.items())
        return [
            "TopK by its calibrated threshold; share of active atoms that both forms have, on held-out "
            f"tokens: {by_layer}"
        ]

    def _why_nothing(self, labels: dict[int, np.ndarray]) -> str:
        """Why no layer is steered, or nothing removed though it was asked for; empty where neither is so."""
        removed = any(len(rows) for rows in self._rows.values())
        if not removed and self._remove:
            return (
                f"nothing of what was to be removed ({_short(self._remove)}) is left: its strength is 0 or "
                "it is kept; name less in keep, or pass on_empty='pass'"
            )
        if removed or any(self.shifted(layer) for layer in self.layers):
            return ""
        columns = {"cos_undesirable": "undesirable", "cos_desirable": "desirable"}
        largest = {
            text: max(float(_column(found, column).max(initial=-1.0)) for found in self._saes.values())
            for column, text in columns.items()
        }
        cosines = ", ".join(f"{value:.3f} ({text})" for text, value in largest.items())
        return (
            f"no atom of layers {list(self.layers)} is steered at eta={self.eta:g}, gamma={self.gamma:g}: "
            f"the largest cosine found is {cosines}; lower eta, raise gamma where only desirable atoms "
            "are labelled, or pass on_empty='pass' for an exact no-op"
        )


def _default(sae: "SteeringSAE") -> list[int] | None:
    """The layers that the release steers by default, of those that were loaded; None: all of these."""
    return [layer for layer in sae.defaults.get("layers", ()) if layer in sae.layers] or None


def _form(form: str | None, saes: dict[int, LayerSAE]) -> str:
    """Exact where nothing is said and all weights are there."""
    if form is not None and form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
    rows_only = any(found.labelled_at is not None for found in saes.values())
    replaced = [layer for layer, found in saes.items() if found.jumprelu_threshold is not None]
    if form == "exact" and rows_only and replaced:
        raise SteeringOnlyError(
            f"form 'exact': expected the whole encoder of TopK layers {replaced}, got the labelled rows; "
            "load without steering_only"
        )
    missing = [
        layer
        for layer, found in saes.items()
        if found.sae.activation == "topk" and found.jumprelu_threshold is None
    ]
    if form == "threshold" and missing:
        raise SteeringOnlyError(
            f"form 'threshold': expected a calibrated threshold for TopK layers {missing}, got none in this "
            "release; use form='exact'"
        )
    return form or ("threshold" if rows_only else "exact")


def _threshold(found: LayerSAE, rows: Tensor) -> Tensor | None:
    """Above what each of the rows fires; None: above zero, by ReLU."""
    sae = found.sae
    if sae.activation == "topk":
        return torch.full_like(sae.b_enc[rows], found.jumprelu_threshold or 0.0)
    # a threshold below zero still stops at zero, as in the SAE itself
    return None if sae.threshold is None else sae.threshold[rows].clamp_min(0)


def _short(chosen: object) -> str:
    text = str(chosen)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _column(layer: LayerSAE, name: str) -> np.ndarray:
    return np.asarray(layer.atoms[name], dtype=np.float64)
