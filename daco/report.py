"""What a steered run did: tallies in tensors while it runs, and a printable report; no files."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from daco.methods.method import Method

PLACES = ("image", "prompt", "generated")
"""Kinds of positions: image placeholders, the prompt's text, and tokens after the prompt."""


class FiredAtom(NamedTuple):
    """An atom (or concept) that was removed somewhere."""

    atom: int
    """Its number."""
    names: list[str]
    """Nearest concepts, nearest first."""
    positions: int
    """Positions where it fired."""
    mean_strength: float
    """Mean coefficient where it fired."""


class LayerReport(NamedTuple):
    """What happened at one layer."""

    layer: int
    """0-based decoder block."""
    labelled: int
    """Atoms (or concepts) that are removed where they fire."""
    shifted: bool
    """Whether a constant shift is added."""
    positions: dict[str, int]
    """Positions steered, by place."""
    atoms: list[FiredAtom]
    """What fired, the largest total strength first."""
    relative_change: float
    """Mean of ||delta|| / ||z|| over the positions steered; 0 where there are none."""
    relative_change_max: float
    """Largest of them."""
    by_row: list[dict[str, int]]
    """Positions steered, by row of the batch (beams are rows of their own) and place."""
    method: str
    """Which method did it, where there are several; else empty."""


class Report(NamedTuple):
    """What a run did; `print` it, or take `as_dict()` as JSON."""

    method: str
    """The method and its settings."""
    scope: str
    """Where it was to steer."""
    forwards: int
    """Calls of the model that were seen."""
    layers: list[LayerReport]
    """By layer, rising."""
    notes: list[str]
    """Overrides, and whatever made the run do less than asked."""

    @property
    def positions(self) -> int:
        """Positions steered, summed over layers."""
        return sum(sum(layer.positions.values()) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able facts."""
        layers = [
            layer._asdict() | {"atoms": [atom._asdict() for atom in layer.atoms]} for layer in self.layers
        ]
        return self._asdict() | {"layers": layers}

    def __str__(self) -> str:
        lines = [f"{self.method}; scope {self.scope}; {self.forwards} forwards"]
        for layer in self.layers:
            lines += _layer_lines(layer)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _printable(text: str) -> str:
    """`text` without control characters: names come from a release, and terminals obey escapes."""
    return "".join(c if c.isprintable() else " " for c in text)


def _layer_lines(layer: LayerReport, shown: int = 5) -> list[str]:
    places = ", ".join(f"{count} {place}" for place, count in layer.positions.items() if count)
    shift = ", shifted" if layer.shifted else ""
    change = f"|delta|/|z| mean {layer.relative_change:.3f}, max {layer.relative_change_max:.3f}"
    who = f" ({layer.method})" if layer.method else ""
    head = f"layer {layer.layer}{who}: {len(layer.atoms)} of {layer.labelled} labelled fired{shift}"
    lines = [f"{head}; steered {places or 'nowhere'}; {change}"]
    if len(layer.by_row) > 1:
        lines.append(f"  by row: {', '.join(str(sum(row.values())) for row in layer.by_row)}")
    for atom in layer.atoms[:shown]:
        names = ", ".join(_printable(name) for name in atom.names[:3])
        lines.append(f"  {atom.atom} ({names}): {atom.positions} positions, mean {atom.mean_strength:.3g}")
    if (more := len(layer.atoms) - shown) > 0:
        lines.append(f"  and {more} more")
    return lines


HELD, HELD_POSITIONS = 64, 512
"""Forwards, or positions, that a tally keeps before it counts them all at once: one by one, counting costs
more than steering."""


class Tally:
    """Counts of one layer, on its device: adding never waits for it, and room does not grow with a run."""

    @torch.inference_mode(False)  # else later forwards outside inference mode could not add to it
    def __init__(self, n_atoms: int, device: torch.device) -> None:
        self.places = torch.zeros(1, len(PLACES), dtype=torch.int64, device=device)
        self.fired = torch.zeros(n_atoms, dtype=torch.int64, device=device)
        self.strength = torch.zeros(n_atoms, dtype=torch.float64, device=device)
        self.change = torch.zeros(2, dtype=torch.float64, device=device)
        self._held: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._held_places: list[Tensor] = []
        self._n_held = 0

    def add(self, z: Tensor, delta: Tensor, strengths: Tensor, weight: Tensor | None) -> None:
        """Add positions.

        Args:
            z: Activations `[n, d_model]`.
            delta: What was added to them, `[n, d_model]`.
            strengths: Coefficients of the labelled atoms, `[n, n_atoms]`.
            weight: `[n]`, whether a position counts; None: all do.
        """
        if torch.is_grad_enabled():
            z, delta, strengths = z.detach(), delta.detach(), strengths.detach()
        self._held.append((z, delta, strengths, weight))
        self._n_held += len(z)
        if len(self._held) >= HELD or self._n_held >= HELD_POSITIONS:
            self.count()

    def add_places(self, places: Tensor) -> None:
        """Add how many positions of each row `[batch, 3]` are of each of PLACES."""
        self._held_places.append(places)
        if len(self._held_places) >= HELD:
            self.count()

    @torch.inference_mode(False)
    @torch.no_grad()
    def count(self) -> None:
        """Count what is held."""
        self._count_places()
        held, self._held, self._n_held = self._held, [], 0
        if not held:
            return
        z, delta, strengths = (torch.cat([parts[i] for parts in held]) for i in range(3))  # type: ignore[misc]
        every = torch.ones(len(z), dtype=torch.bool, device=z.device)
        weight = torch.cat([every[: len(part)] if w is None else w for part, _, _, w in held])
        relative = delta.norm(dim=-1).double() / z.norm(dim=-1).double().clamp_min(1e-12)
        relative = torch.where(weight, relative, 0)
        strengths = torch.where(weight[:, None], strengths, 0)
        self.fired += (strengths != 0).sum(0)
        self.strength += strengths.double().sum(0)
        self.change[0] += relative.sum()
        self.change[1] = torch.maximum(self.change[1], relative.max())

    def _count_places(self) -> None:
        held, self._held_places = self._held_places, []
        if not held:
            return
        rows = max(len(self.places), *map(len, held))
        every = [_padded(one.to(self.places.device), rows) for one in held]
        self.places = _padded(self.places, rows) + torch.stack(every).sum(0)


def _padded(places: Tensor, rows: int) -> Tensor:
    """Counts of as many rows; those that have them already are not copied."""
    missing = rows - len(places)
    return nn.functional.pad(places, (0, 0, 0, missing)) if missing else places


def layer_report(layer: int, tally: Tally | None, method: Method, name: str = "") -> LayerReport:
    """Read what a method did at a layer off its device; no tally is a layer where nothing ran."""
    atoms, shifted = method.atoms(layer), method.shifted(layer)
    if tally is None:
        nowhere = dict.fromkeys(PLACES, 0)
        return LayerReport(layer, len(atoms), shifted, nowhere, [], 0.0, 0.0, [], name)
    tally.count()
    fired, strength = tally.fired.tolist(), tally.strength.tolist()
    order = sorted((i for i, count in enumerate(fired) if count), key=lambda i: (-abs(strength[i]), i))
    found = [
        FiredAtom(atoms[i], method.names(layer, atoms[i]), fired[i], strength[i] / fired[i]) for i in order
    ]
    by_row = [dict(zip(PLACES, row, strict=True)) for row in tally.places.tolist()]
    places = {place: sum(row[place] for row in by_row) for place in PLACES}
    total, largest = tally.change.tolist()
    mean = total / max(1, sum(places.values()))
    return LayerReport(layer, len(atoms), shifted, places, found, mean, largest, by_row, name)
