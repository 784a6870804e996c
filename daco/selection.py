"""Which atoms of each layer are removed, and how strongly: chosen by label, concept, group or number.

Reads the atoms' tables of a release; writes nothing.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from daco.errors import SteeringOnlyError, UnknownConceptError, UnknownLayerError
from daco.sae import LayerSAE
from daco.tables import POLARITIES

Atoms = int | Sequence[int] | Mapping[int, float]
"""Atoms of a layer by number, with or without strengths."""

Selection = (
    str | Sequence[str] | Mapping[str, float] | Mapping[int, Atoms] | Mapping[str | int, float | Atoms]
)
"""Names (of a label, a concept or a group), or atoms by layer; with or without strengths."""

KINDS = ("label", "concept", "group")
"""What a name can be of; `group:weapon` says which where it is of several."""


def strengths_of(
    layers: Mapping[int, LayerSAE],
    labels: Mapping[int, np.ndarray],
    remove: Selection | None = None,
    keep: Selection | None = None,
) -> dict[int, np.ndarray]:
    """How strongly each atom is removed: 1 takes away all that it adds, 0 leaves it.

    Args:
        layers: SAEs by layer.
        labels: Polarity of their atoms, likewise.
        remove: Names or atoms; what is named later counts. None is every atom labelled undesirable.
        keep: Names or atoms that stay, whatever `remove` says.

    Returns:
        By layer: `[n_atoms]` float64.

    Raises:
        UnknownConceptError: no atom has that name; the message has the nearest ones.
        UnknownLayerError: a layer that is not among `layers`.
        SteeringOnlyError: an atom whose rows were not loaded.
        ValueError: a strength is negative or not finite, an atom is out of range, or a name means several
            things.
    """
    found = {layer: np.zeros(len(labels[layer])) for layer in layers}
    for key, value in _items("label:undesirable" if remove is None else remove):
        for layer, rows, strength in _chosen(layers, labels, key, value):
            found[layer][rows] = strength
    for key, value in _items(() if keep is None else keep):
        for layer, rows, _ in _chosen(layers, labels, key, value):
            found[layer][rows] = 0.0
    return found


def _items(chosen: Selection) -> Iterator[tuple[str | int, float | Atoms]]:
    """What was chosen, as names with a strength and layers with atoms."""
    if isinstance(chosen, Mapping):
        yield from chosen.items()
        return
    for name in [chosen] if isinstance(chosen, str) else chosen:
        if not isinstance(name, str):
            raise ValueError(f"expected names, or atoms as {{layer: [atoms]}}, got {name!r}")
        yield name, 1.0


def _chosen(
    layers: Mapping[int, LayerSAE], labels: Mapping[int, np.ndarray], key: str | int, value: object
) -> Iterator[tuple[int, np.ndarray | int, float]]:
    """Layers, rows and strength of one name, or of one layer's atoms."""
    if isinstance(key, str):
        strength = _strength(key, value)
        for layer, rows in _rows_named(layers, labels, key).items():
            yield layer, rows, strength
        return
    if key not in layers:
        raise UnknownLayerError(f"expected layers among {sorted(layers)}, got {key!r}")
    for atom, given in _atoms(key, value).items():
        yield key, _row(layers[key], atom), _strength(f"atom {atom} of layer {key}", given)


def _atoms(layer: int, chosen: object) -> Mapping[int, object]:
    """Atoms of a layer with their strengths."""
    if isinstance(chosen, Mapping):
        return chosen
    numbers = [chosen] if isinstance(chosen, int | np.integer) else chosen
    if not isinstance(numbers, Sequence | np.ndarray) or isinstance(numbers, str):
        raise ValueError(f"layer {layer}: expected atoms as numbers, got {chosen!r}")
    return dict.fromkeys(numbers, 1.0)


def _strength(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
        raise ValueError(f"{what}: expected a strength from 0 (stays) by 1 (removed) upwards, got {value!r}")
    return float(value)


def _row(layer: LayerSAE, atom: int) -> int:
    """Where an atom is among those that were loaded."""
    numbers = layer.numbers
    row = int(np.searchsorted(numbers, atom))
    if row < len(numbers) and numbers[row] == atom:
        return row
    if layer.labelled_at is not None:
        raise SteeringOnlyError(
            f"layer {layer.layer}: expected atoms among the {len(numbers)} labelled ones, got {atom}; "
            "load without steering_only"
        )
    raise ValueError(f"layer {layer.layer}: expected atoms from 0 to {len(numbers) - 1}, got {atom}")


def _rows_named(
    layers: Mapping[int, LayerSAE], labels: Mapping[int, np.ndarray], name: str
) -> dict[int, np.ndarray]:
    """Rows of the atoms that a name is of, by layer; a layer without them is fine, no atom at all is not."""
    columns = {layer: _columns(found, labels[layer]) for layer, found in layers.items()}
    kind, _, rest = name.partition(":")
    kinds, name = ([kind], rest) if kind in KINDS else (list(KINDS), name)
    rows = {
        kind: {
            layer: np.flatnonzero(np.any([values == name for values in named[kind]], axis=0))
            for layer, named in columns.items()
            if named[kind]
        }
        for kind in kinds
    }
    matched = [kind for kind in kinds if any(len(found) for found in rows[kind].values())]
    if name in POLARITIES and "label" in kinds and "label" not in matched:
        matched.insert(0, "label")  # known, though no atom has it at this eta
    if len(matched) > 1:
        choices = " or ".join(repr(f"{kind}:{name}") for kind in matched)
        raise ValueError(f"{name!r} is the name of several things; write {choices}")
    if not matched:
        raise UnknownConceptError(_unknown(name, kinds, columns, layers))
    return rows[matched[0]]


def _columns(layer: LayerSAE, labels: np.ndarray) -> dict[str, list[np.ndarray]]:
    """What the atoms of a layer are called: label, nearest concept and its id, its group."""
    atoms = layer.atoms
    concepts = [_firsts(atoms[name]) for name in ("nearest_concepts", "nearest_concept_ids") if name in atoms]
    groups = [atoms["group"].to_numpy(dtype=object)] if "group" in atoms else []
    return {"label": [labels], "concept": concepts, "group": groups}


def _firsts(lists: Iterable[Sequence[str]]) -> np.ndarray:
    return np.array([names[0] if len(names) else "" for names in lists], dtype=object)


def _unknown(
    name: str,
    kinds: Sequence[str],
    columns: Mapping[int, Mapping[str, list[np.ndarray]]],
    layers: Mapping[int, LayerSAE],
) -> str:
    """What to say of a name that no atom has."""
    known = {str(text) for named in columns.values() for k in kinds for v in named[k] for text in v if text}
    near = difflib.get_close_matches(name, sorted(known), n=3)
    message = f"no atom of layers {sorted(layers)} is named {name!r}; nearest: {near or 'none'}"
    if kinds != ["concept"] and not any(any(v) for named in columns.values() for v in named["group"]):
        message += "; this release has no groups"
    others = [
        f"{atom} (layer {layer})"
        for layer, found in layers.items()
        for atom, names in zip(found.numbers.tolist(), found.atoms["nearest_concepts"], strict=True)
        if name in list(names)
    ]
    if others:
        message += f"; a further concept of atoms {', '.join(others[:3])}, which may be chosen by number"
    if any(found.labelled_at is not None for found in layers.values()):
        message += "; only labelled atoms were loaded (steering_only)"
    return message
