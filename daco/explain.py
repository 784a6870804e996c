"""Which atoms fire on inputs, by name and strength, without steering; reads a model's forward, no files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from daco.capture import capture
from daco.claims import claim, release
from daco.errors import UnknownLayerError
from daco.positions import Positions, positions
from daco.sae import LayerSAE
from daco.sites import find_trunk, image_token_ids, transformers_model

if TYPE_CHECKING:
    from daco.steering_sae import SteeringSAE

COLUMNS = (
    "row",
    "layer",
    "atom",
    "polarity",
    "concepts",
    "positions",
    "image",
    "prompt",
    "strength",
    "largest",
)
"""Columns of `SteeringSAE.explain`."""

CHUNK = 1_024
"""Tokens encoded at a time, which bounds the room codes take."""

NEAREST = 3
"""Concepts named of an atom."""


class _Reader:
    """Holds the model meanwhile, so that nobody steers what is being read."""

    what = "SteeringSAE.explain()"


@torch.no_grad()
def explain(
    sae: "SteeringSAE",
    model: nn.Module,
    inputs: Mapping[str, Any],
    layers: list[int] | None,
    base_model_ok: bool,
) -> pd.DataFrame:
    """See `SteeringSAE.explain`."""
    wanted = sorted(sae.layers) if layers is None else sorted(set(layers))
    if unknown := [layer for layer in wanted if layer not in sae.layers]:
        raise UnknownLayerError(f"expected layers among {sorted(sae.layers)}, got {unknown}")
    note = sae.base_model.check(model, base_model_ok)
    device = transformers_model(model).device
    call = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = positions(call, image_token_ids(model), ("all",), None)
    trunk, reader = find_trunk(model), _Reader()
    claim(trunk.layers, reader)  # what is steered would be read as steered
    try:
        with capture(model, wanted, stop=True) as captured:
            captured.run(**call)
    finally:
        release(trunk.layers, reader)
    rows = [
        fired
        for row in range(len(found.prompt))
        for layer in wanted
        for fired in _fired(sae.layers[layer], captured.activations[layer][row], _of_row(found, row), row)
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs["notes"] = [text for text in (note, _of_part(sae, wanted)) if text]
    return table


def _of_row(found: Positions, row: int) -> Tensor:
    """`[2, tokens]` bool: which tokens are of an image, and which are text; padding is neither."""
    return torch.stack([found.image[row], found.prompt[row]])


def _of_part(sae: "SteeringSAE", layers: list[int]) -> str | None:
    """What to say where only some of the atoms were loaded."""
    if all(sae.layers[layer].labelled_at is None for layer in layers):
        return None
    return "only labelled atoms were loaded (steering_only); others may fire as well"


def _fired(layer: LayerSAE, z: Tensor, places: Tensor, row: int) -> list[tuple[Any, ...]]:
    """Facts of the atoms that fire in one row's tokens `[tokens, d_model]`, the largest total first."""
    weights = layer.sae.W_dec
    kept = places.any(0)  # padding may hold anything, NaN too
    z, places = z[kept.to(z.device)].to(weights.device, weights.dtype), places[:, kept].to(weights.device)
    counts = torch.zeros(2, layer.sae.n_atoms, dtype=torch.int64, device=weights.device)
    total = torch.zeros(layer.sae.n_atoms, dtype=torch.float64, device=weights.device)
    largest = torch.zeros_like(total)
    for some, place in zip(torch.split(z, CHUNK), torch.split(places, CHUNK, dim=1), strict=True):
        code = layer.sae.encode(some)
        counts += torch.stack([(code[of] > 0).sum(0) for of in place])
        total += code.sum(0, dtype=torch.float64)
        largest = torch.maximum(largest, code.amax(0).double())
    order = total.argsort(descending=True, stable=True)[: int((total > 0).sum())]
    facts = [values[order].tolist() for values in (*counts, total, largest)]
    labels, numbers = layer.labels(), layer.numbers
    return [
        _facts(row, layer, int(numbers[at]), str(labels[at]), *measured)
        for at, *measured in zip(order.tolist(), *facts, strict=True)
    ]


def _facts(
    row: int, layer: LayerSAE, atom: int, label: str, image: int, prompt: int, total: float, largest: float
) -> tuple[Any, ...]:
    """A row of the table, in the order of COLUMNS."""
    named = row, layer.layer, atom, label, layer.names(atom)[:NEAREST]
    return (*named, image + prompt, image, prompt, total / (image + prompt), largest)
