"""The sparse autoencoder of one layer, and what is known of its atoms: names, polarity, firing rate."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from daco.errors import FormatError, SteeringOnlyError
from daco.top_k import top_k

ACTIVATIONS = ("relu", "topk", "jumprelu")


class SAE(nn.Module):
    """`c = act((z - b_dec) W_enc + b_enc)`, `z^ = c W_dec + b_dec` (DESIGN section 4.4).

    Args:
        W_enc: `[d_model, n_atoms]`.
        b_enc: `[n_atoms]`.
        W_dec: `[n_atoms, d_model]`; a row is an atom.
        b_dec: `[d_model]`.
        activation: `relu`, `topk` or `jumprelu`.
        k: Active atoms of `topk`.
        threshold: `[n_atoms]`, of `jumprelu`: a pre-activation counts where it is above its threshold.

    Raises:
        FormatError: shapes do not fit together, or k or threshold is missing or out of range.
    """

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        activation: str = "topk",
        k: int | None = None,
        threshold: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_shapes(W_enc, b_enc, W_dec, b_dec)
        _check_activation(activation, k, threshold, n_atoms=W_dec.shape[0])
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.activation, self.k = activation, k
        self.threshold = None if threshold is None else nn.Parameter(threshold)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return int(self.W_dec.shape[1])

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return int(self.W_dec.shape[0])

    def pre_activations(self, z: Tensor) -> Tensor:
        """`(z - b_dec) W_enc + b_enc`, `[..., d_model] -> [..., n_atoms]`."""
        return (z - self.b_dec) @ self.W_enc + self.b_enc

    def activate(self, pre: Tensor) -> Tensor:
        """The activation function on pre-activations `[..., n_atoms]`."""
        if self.activation == "topk":
            return top_k(pre, self.k)  # type: ignore[arg-type]
        if self.threshold is not None:
            return torch.where(pre > self.threshold, pre.relu(), 0)
        return pre.relu()

    def encode(self, z: Tensor) -> Tensor:
        """The code `c` of activations, `[..., d_model] -> [..., n_atoms]`."""
        return self.activate(self.pre_activations(z))

    def decode(self, c: Tensor) -> Tensor:
        """The reconstruction from a code, `[..., n_atoms] -> [..., d_model]`."""
        return c @ self.W_dec + self.b_dec

    def as_jumprelu(self, threshold: float) -> "SAE":
        """The same weights with one threshold for all atoms: a TopK that need not compare its atoms.

        The weights are shared.

        Args:
            threshold: Of all pre-activations, e.g. a release's `jumprelu_threshold`.
        """
        thresholds = torch.full_like(self.b_enc, threshold)
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        return SAE(*weights, "jumprelu", threshold=thresholds).requires_grad_(self.W_enc.requires_grad)

    def forward(self, z: Tensor) -> Tensor:
        """The reconstruction `z^` of activations `[..., d_model]`."""
        return self.decode(self.encode(z))


def _check_shapes(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
    if W_dec.ndim != 2:
        raise FormatError(f"W_dec: expected [n_atoms, d_model], got {list(W_dec.shape)}")
    m, d = W_dec.shape
    for name, tensor, shape in (("W_enc", W_enc, [d, m]), ("b_enc", b_enc, [m]), ("b_dec", b_dec, [d])):
        if list(tensor.shape) != shape:
            raise FormatError(f"{name}: expected {shape} to go with W_dec {[m, d]}, got {list(tensor.shape)}")


def _check_activation(activation: str, k: int | None, threshold: Tensor | None, n_atoms: int) -> None:
    if activation not in ACTIVATIONS:
        raise FormatError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if activation == "topk" and not (isinstance(k, int) and 0 < k <= n_atoms):
        raise FormatError(f"k: expected 1 to {n_atoms} (the number of atoms), got {k}")
    if activation == "jumprelu" and (threshold is None or list(threshold.shape) != [n_atoms]):
        got = None if threshold is None else list(threshold.shape)
        raise FormatError(f"threshold: expected [{n_atoms}] for jumprelu, got {got}")


def labels_of(cos_undesirable: np.ndarray, cos_desirable: np.ndarray, eta: float) -> np.ndarray:
    """Polarity of atoms by their cosines to the two centroids (Eq. 9); ties are neutral.

    Args:
        cos_undesirable: `[n_atoms]`, cosine to the unit mean of undesirable directions.
        cos_desirable: `[n_atoms]`, likewise of desirable ones.
        eta: Cosine threshold.

    Returns:
        `[n_atoms]` of `undesirable`, `desirable` and `neutral`.

    Source: arXiv 2604.08846, Eq. 9.
    """
    undesirable = (cos_undesirable >= eta) & (cos_undesirable > cos_desirable)
    desirable = (cos_desirable >= eta) & (cos_desirable > cos_undesirable)
    return np.select([undesirable, desirable], ["undesirable", "desirable"], "neutral")


@dataclass(frozen=True)
class LayerSAE:
    """The SAE of one layer with what is known of its atoms.

    Loaded with `steering_only`, it has the labelled atoms alone, and a TopK stands there as a JumpReLU.

    Raises:
        FormatError: atoms and weights differ in number.
    """

    layer: int
    """0-based decoder block whose output it encodes."""
    sae: SAE
    """The weights."""
    atoms: pd.DataFrame
    """One row an atom, columns of `daco.tables.ATOMS`."""
    R: float
    """Median norm of the layer's unmasked training tokens; the unit of gamma."""
    jumprelu_threshold: float | None = None
    """At this threshold `sae.as_jumprelu` has as many active atoms a token as a TopK; None: not known."""
    jumprelu_agreement: float | None = None
    """Jaccard index of the atoms active in both forms, on held-out tokens; None: not known."""
    labelled_at: float | None = None
    """The eta at which the atoms that are here are labelled; None: all atoms are here."""

    def __post_init__(self) -> None:
        if len(self.atoms) != self.sae.n_atoms:
            raise FormatError(
                f"layer {self.layer}: expected {self.sae.n_atoms} atoms, got {len(self.atoms)} rows"
            )

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of the atoms that are here, rising, `[n_atoms]`."""
        if self.labelled_at is None:
            return np.arange(len(self.atoms))
        return np.asarray(self.atoms["atom"])

    def labels(self, eta: float | None = None) -> np.ndarray:
        """Polarity of each atom `[n_atoms]`: as released, or at another cosine threshold `eta`.

        Raises:
            SteeringOnlyError: `eta` is below the one at which the atoms that are here are labelled.
        """
        if eta is None:
            return np.asarray(self.atoms["polarity"], dtype=object)
        if self.labelled_at is not None and eta < self.labelled_at:
            raise SteeringOnlyError(
                f"layer {self.layer}: expected eta from {self.labelled_at:g}, at which the atoms that were "
                f"loaded are labelled, got {eta:g}; load without steering_only"
            )
        cosines = self.atoms["cos_undesirable"].to_numpy(), self.atoms["cos_desirable"].to_numpy()
        return labels_of(*cosines, eta)

    def names(self, atom: int) -> list[str]:
        """The concepts nearest to an atom, nearest first."""
        return list(self.atoms["nearest_concepts"].iloc[np.searchsorted(self.numbers, atom)])
