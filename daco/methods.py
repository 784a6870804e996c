"""Ways to steer: what each adds to the residual stream (DESIGN 4.6 and 4.7); `daco.steering` applies them.

Reads SAEs and dictionaries; knows nothing of models, hooks or tokens.
"""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from daco.errors import NothingToSteerError, UnknownLayerError
from daco.sae import LayerSAE, top_k
from daco.sites import ModelFacts
from daco.sparse_coding import elastic_net, largest_eigenvalue

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary
    from daco.steering_sae import SteeringSAE

SAFETY_PROMPT = (
    "You are a careful assistant. Refuse to help with anything harmful, illegal, hateful or deceptive, "
    "whether it is asked in text or shown in an image; say briefly why, and offer a safe alternative."
)


class Change(NamedTuple):
    """What a method does to some activations."""

    delta: Tensor
    """`[n, d_model]`, in the method's dtype; added to the activations."""
    strengths: Tensor
    """`[n, n_labelled]`: coefficients of what is removed, in the order of `atoms(layer)`."""


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


class _Placed:
    """Tensors of a layer, copied once to each device they are needed on."""

    def __init__(self, **tensors: Tensor | None) -> None:
        self._tensors = {name: None if t is None else t.detach() for name, t in tensors.items()}
        self._by_device: dict[torch.device, SimpleNamespace] = {}

    @torch.inference_mode(False)  # a copy made inside would be of no use outside
    def on(self, device: torch.device) -> Any:
        if device not in self._by_device:
            moved = {name: None if t is None else t.to(device) for name, t in self._tensors.items()}
            self._by_device[device] = SimpleNamespace(**moved)
        return self._by_device[device]


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
        self.gamma = _number("gamma", sae.defaults["gamma"] if gamma is None else gamma, 0.0)
        self.eta = _number("eta", sae.defaults["eta"] if eta is None else eta, -1.0, 1.0)
        self.layers = _chosen(layers, sorted(sae.layers))
        self.base_model = sae.base_model
        self._saes = {layer: sae.layers[layer] for layer in self.layers}
        labels = {layer: self._saes[layer].labels(eta) for layer in self.layers}
        self._atoms = {layer: np.flatnonzero(labels[layer] == "undesirable") for layer in self.layers}
        self._desirable = {layer: np.flatnonzero(labels[layer] == "desirable") for layer in self.layers}
        self._weights = {layer: self._weights_of(layer) for layer in self.layers}
        self.nothing = "" if any(not self.is_empty(layer) for layer in self.layers) else self._why_nothing()
        _raise_if(self.nothing, on_empty)

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
        return _empty_notes(self)

    def _strengths(self, layer: int, z: Tensor, w: Any) -> Tensor:
        """The code's columns of undesirable atoms, `[n, n_labelled]`."""
        sae = self._saes[layer].sae
        if not len(self._atoms[layer]):
            return z.new_zeros(len(z), 0)
        pre = (z - w.b_dec) @ w.W_enc + w.b_enc
        if sae.activation == "topk":  # which are the largest is decided among all atoms
            return top_k(pre, int(sae.k or 0))[:, w.atoms]
        return torch.where(pre > w.threshold, pre, 0) if w.threshold is not None else pre.relu()

    def _weights_of(self, layer: int) -> _Placed:
        """What `change` reads: all encoder columns for topk, else those of the undesirable atoms alone."""
        sae, atoms = self._saes[layer].sae, torch.from_numpy(self._atoms[layer])
        encoder = slice(None) if sae.activation == "topk" else atoms
        return _Placed(
            W_enc=sae.W_enc[:, encoder],
            b_enc=sae.b_enc[encoder],
            b_dec=sae.b_dec,
            W_dec=sae.W_dec[atoms],
            # a threshold below zero still stops at zero, as in the SAE itself
            threshold=None if sae.threshold is None else sae.threshold[atoms].clamp_min(0),
            atoms=atoms,
            shift=_shift(
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
        max_steps: Steps of the solver at most; codes that are not certified by then are used and reported.
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
        max_steps: int = 2_000,
        dtype: torch.dtype = torch.float32,
        on_empty: str = "raise",
    ) -> None:
        check_on_empty(on_empty)
        self.alpha = _number("alpha", alpha, 0.0, 1.0, open_ends=True)
        self.tau = _number("tau", tau, 0.0, 1.0)
        if not self.tau:
            raise ValueError("tau: expected above 0 to 1, got 0: without L1 no code is sparse")
        self.gamma, self.non_negative = _number("gamma", gamma, 0.0), non_negative
        self.tol, self.max_steps = _number("tol", tol, 0.0, 1.0, open_ends=True), max_steps
        self.layers = _chosen(layers, dictionary.layers)
        self.base_model = dictionary.model
        self._concepts = list(dictionary.concepts["concept"])
        self._undesirable = np.flatnonzero(dictionary.mask("undesirable"))
        self._desirable = np.flatnonzero(dictionary.mask("desirable"))
        self._weights = {
            layer: self._weights_of(dictionary, layer, dtype, (centre or {}).get(layer))
            for layer in self.layers
        }
        self._uncertified: dict[torch.device, Tensor] = {}
        self.nothing = (
            "" if len(self._undesirable) or self.shifted(0) else _no_polarity("undesirable", dictionary)
        )
        _raise_if(self.nothing, on_empty)

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
        return Change(w.shift - strengths @ w.D[w.undesirable], strengths)

    def code(self, layer: int, z: Tensor) -> Tensor:
        """Codes of activations `[n, d_model] -> [n, n_concepts]`; what is not certified is counted."""
        w = self._weights[layer].on(z.device)
        z = z.to(w.D.dtype)
        z = z if w.centre is None else z - w.centre
        alpha = self.alpha * (z @ w.D.T).abs().amax(-1) / self.tau
        options = {"tol": self.tol, "max_steps": self.max_steps, "lipschitz": w.lipschitz}
        solved = elastic_net(z, w.D, alpha, self.tau, non_negative=self.non_negative, **options)
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
        missed = f"{count} codes not certified within {self.max_steps} steps; raise max_steps or tol"
        return _empty_notes(self) + ([missed] if count else [])

    def _weights_of(
        self, dictionary: "ConceptDictionary", layer: int, dtype: torch.dtype, centre: Tensor | None
    ) -> _Placed:
        rows = normalize(dictionary.raw(layer).to(dtype), dim=-1)
        return _Placed(
            D=rows,
            undesirable=torch.from_numpy(self._undesirable),
            centre=None if centre is None else centre.to(dtype),
            lipschitz=largest_eigenvalue(rows),
            shift=_shift(rows[torch.from_numpy(self._desirable)], self.gamma * dictionary.R[layer]),
        )


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
        self.strength = _number("strength", strength, -math.inf)
        self.layers = _chosen(layers, dictionary.layers)
        self.base_model = dictionary.model
        self._weights = {}
        for layer in self.layers:
            towards = dictionary.centroid(layer, "desirable") - dictionary.centroid(layer, "undesirable")
            scale = self.strength * dictionary.R[layer]
            self._weights[layer] = _Placed(vector=scale * normalize(towards.to(dtype), dim=-1))
        self.nothing = self._why_nothing(dictionary)
        _raise_if(self.nothing, on_empty)

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
        return _empty_notes(self)

    def _why_nothing(self, dictionary: "ConceptDictionary") -> str:
        if self.strength == 0:
            return "strength is 0; pass another, or on_empty='pass' for an exact no-op"
        for polarity in ("desirable", "undesirable"):
            if not dictionary.mask(polarity).any():
                return _no_polarity(polarity, dictionary)
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
        self.strength, self.rank = _number("strength", strength, 0.0), rank
        self.layers = _chosen(layers, dictionary.layers)
        self.base_model = dictionary.model
        n_undesirable = int(dictionary.mask("undesirable").sum())
        self.nothing = self._why_nothing(dictionary)
        _raise_if(self.nothing, on_empty)
        if n_undesirable and not 1 <= rank <= n_undesirable:
            raise ValueError(f"rank: expected 1 to {n_undesirable} (undesirable concepts), got {rank!r}")
        self._weights = {
            layer: _Placed(basis=undesirable_basis(dictionary, layer, rank, dtype)) for layer in self.layers
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
        return _empty_notes(self)

    def _why_nothing(self, dictionary: "ConceptDictionary") -> str:
        if self.strength == 0:
            return "strength is 0; pass another, or on_empty='pass' for an exact no-op"
        empty = not dictionary.mask("undesirable").any()
        return _no_polarity("undesirable", dictionary) if empty else ""


class SafetyPrompt:
    """Steering by words: a system message in front of a conversation.

    Args:
        text: What the system message says.

    Raises:
        ValueError: the text is empty.
    """

    def __init__(self, text: str = SAFETY_PROMPT) -> None:
        if not text.strip():
            raise ValueError("text: expected a safety prompt, got an empty one")
        self.text = text

    def __str__(self) -> str:
        return "safety prompt"

    def apply(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The conversation with the prompt as its system message, before an existing one's text.

        Args:
            messages: As chat templates take them: role, and content as text or as parts; not changed.
        """
        copied = [dict(message) for message in messages]
        if not copied or copied[0].get("role") != "system":
            return [{"role": "system", "content": [{"type": "text", "text": self.text}]}, *copied]
        content = copied[0]["content"]
        if isinstance(content, str):
            copied[0]["content"] = f"{self.text}\n\n{content}"
        else:
            copied[0]["content"] = [{"type": "text", "text": f"{self.text}\n\n"}, *content]
        return copied


def undesirable_basis(
    dictionary: "ConceptDictionary", layer: int, rank: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Orthonormal rows `[rank, d_model]`: mu- alone, or the leading undesirable directions."""
    if rank == 1:
        return dictionary.centroid(layer, "undesirable").to(dtype)[None]
    rows = dictionary.unit(layer)[np.flatnonzero(dictionary.mask("undesirable"))]
    leading: Tensor = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:rank]
    return leading.to(dtype)


def check_on_empty(on_empty: str) -> None:
    """Raises ValueError where it is neither `raise` nor `pass`."""
    if on_empty not in ("raise", "pass"):
        raise ValueError(f"on_empty: expected 'raise' or 'pass', got {on_empty!r}")


def _raise_if(nothing: str, on_empty: str) -> None:
    if nothing and on_empty == "raise":
        raise NothingToSteerError(nothing)


def _no_polarity(polarity: str, dictionary: "ConceptDictionary") -> str:
    counts = dictionary.concepts["polarity"].value_counts().sort_index().to_dict()
    return (
        f"no concept is {polarity}: the dictionary has {counts}; label concepts, "
        "or pass on_empty='pass' for an exact no-op"
    )


def _empty_notes(method: Method) -> list[str]:
    if method.nothing:
        return [f"exact no-op: {method.nothing}"]
    empty = [layer for layer in method.layers if method.is_empty(layer)]
    return [f"layers {empty} stay as they are: nothing is labelled there"] if empty else []


def _number(name: str, value: float, low: float, high: float = math.inf, open_ends: bool = False) -> float:
    inside = low < value < high if open_ends else low <= value <= high
    if not (math.isfinite(value) and inside):
        ends = "between" if open_ends else "from"
        raise ValueError(f"{name}: expected a number {ends} {low:g} and {high:g}, got {value!r}")
    return float(value)


def _chosen(layers: Sequence[int] | None, known: list[int]) -> tuple[int, ...]:
    wanted = known if layers is None else sorted(set(layers))
    if unknown := [layer for layer in wanted if layer not in known]:
        raise UnknownLayerError(f"expected layers among {known}, got {unknown}")
    if not wanted:
        raise ValueError(f"layers: expected at least one of {known}, got none")
    return tuple(wanted)


def _shift(rows: Tensor, scale: float) -> Tensor:
    """`scale * unit(sum of rows)`, `[d_model]`; zero where there are no rows."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (scale * normalize(wide.sum(0), dim=-1)).to(rows.dtype)


def _column(layer: LayerSAE, name: str) -> np.ndarray:
    return np.asarray(layer.atoms[name], dtype=np.float64)
