"""The refusal direction: what sets a model's refusals apart, added or taken out.

Reads activations of prompts, or a model and processed prompts; needs no dictionary.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from daco.capture import capture
from daco.methods.method import (
    Change,
    Placed,
    check_on_empty,
    chosen_layers,
    empty_notes,
    number,
    raise_if,
)
from daco.sites import ModelFacts

MODES = ("add", "ablate")


class RefusalDirection:
    """Difference of means of activations of refused and of accepted prompts, a layer each.

    `add`: `z + strength (mean refused - mean accepted)` makes the model refuse more (less with a negative
    strength). `ablate`: `z - strength (z r) r` with r the unit difference: with strength 1 the model cannot
    write along r at the steered layers, and refuses less: a probe of safety, not a way to it.

    Args:
        refused: By layer, activations `[n, d_model]` of prompts the model refuses, where its answer begins
            (`prompt_activations` reads them).
        accepted: Likewise, of prompts it answers.
        base_model: Facts of the model they come from (`ModelFacts.of(model)`).
        mode: `add` or `ablate`.
        strength: Times the difference of means, or the share that is taken out (then >= 0).
        source: The layer whose direction is used at all steered layers, as the paper does; None uses each
            layer's own.
        layers: Layers to steer; None is all that have activations (with `source`, any layer will do).
        dtype: Of the vectors.
        on_empty: `raise` where the means do not differ or `strength` is 0, or `pass`.

    Raises:
        ValueError: a parameter is out of range, or activations are empty, not finite or of another width.
        UnknownLayerError: a layer without activations.
        NothingToSteerError: nothing would be done.

    Source: arXiv 2406.11717.
    """

    def __init__(
        self,
        refused: Mapping[int, Tensor],
        accepted: Mapping[int, Tensor],
        base_model: ModelFacts,
        *,
        mode: str = "add",
        strength: float = 1.0,
        source: int | None = None,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        on_empty: str = "raise",
    ) -> None:
        check_on_empty(on_empty)
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        self.mode, self.source, self.base_model = mode, source, base_model
        self.strength = number("strength", strength, -torch.inf if mode == "add" else 0.0)
        known = sorted(set(refused) & set(accepted))
        if source is not None:
            chosen_layers([source], known)
        every = known if source is None else list(range(base_model.n_layers))
        self.layers = chosen_layers(known if layers is None else layers, every)
        differences = {
            layer: _difference(refused[layer], accepted[layer], layer, base_model.hidden_size)
            for layer in ({source} if source is not None else self.layers)
        }
        self._found = {layer: differences[layer if source is None else source] for layer in self.layers}
        self._weights = {
            layer: Placed(vector=self._vector(found, dtype)) for layer, found in self._found.items()
        }
        self.nothing = self._why_nothing()
        raise_if(self.nothing, on_empty)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        refused: Iterable[Mapping[str, Any]],
        accepted: Iterable[Mapping[str, Any]],
        read: Sequence[int],
        **options: Any,
    ) -> Self:
        """Read the activations from a model.

        Args:
            model: A transformers model.
            refused: Batches as a processor returns them, of prompts the model refuses, rendered up to where
                its answer begins (`add_generation_prompt=True`).
            accepted: Likewise, of prompts it answers.
            read: Layers to read.
            **options: As for the class.
        """
        found = [prompt_activations(model, batches, read) for batches in (refused, accepted)]
        return cls(found[0], found[1], ModelFacts.of(model), **options)

    def __str__(self) -> str:
        return f"refusal direction, {self.mode}, strength {self.strength:g}"

    def is_empty(self, layer: int) -> bool:
        """Whether it does nothing at a layer."""
        return not self.strength or not bool(self._found[layer].any())

    def change(self, layer: int, z: Tensor) -> Change:
        """What is added to activations `[n, d_model]`."""
        vector = self._weights[layer].on(z.device).vector
        none = vector.new_zeros(len(z), 0)
        if self.mode == "add":
            return Change((self.strength * vector).expand(len(z), -1), none)
        along = z.to(vector.dtype) @ vector
        return Change(-self.strength * along[:, None] * vector, none)

    def atoms(self, layer: int) -> list[int]:
        """None: nothing is taken apart."""
        return []

    def names(self, layer: int, atom: int) -> list[str]:
        """None."""
        return []

    def shifted(self, layer: int) -> bool:
        """Whether a vector is added at a layer."""
        return self.mode == "add" and not self.is_empty(layer)

    def notes(self) -> list[str]:
        """Layers that stay as they are."""
        return empty_notes(self)

    def _vector(self, difference: Tensor, dtype: torch.dtype) -> Tensor:
        return (difference if self.mode == "add" else normalize(difference, dim=-1)).to(dtype)

    def _why_nothing(self) -> str:
        if self.strength == 0:
            return "strength is 0; pass another, or on_empty='pass' for an exact no-op"
        if all(self.is_empty(layer) for layer in self.layers):
            return "refused and accepted prompts have the same mean activations; pass prompts that differ"
        return ""


@torch.no_grad()
def prompt_activations(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], layers: Sequence[int]
) -> dict[int, Tensor]:
    """The residual stream at the last token of each prompt, where the answer begins.

    Args:
        model: A transformers model; blocks after the last of the layers are not run.
        batches: As a processor returns them: `input_ids` `[batch, tokens]`, `attention_mask` where there is
            padding, on either side, images.
        layers: 0-based decoder blocks.

    Returns:
        By layer `[prompts, d_model]`, float32 (float64 of a float64 model), on the CPU.

    Raises:
        ValueError: there is no prompt.
    """
    found: dict[int, list[Tensor]] = {}
    with capture(model, layers, stop=True) as captured:
        for batch in batches:
            captured.run(**batch)
            last = _last_tokens(batch)
            for layer, z in captured.activations.items():
                rows = z[torch.arange(len(z), device=z.device), last.to(z.device)]
                found.setdefault(layer, []).append(rows.to(torch.promote_types(z.dtype, torch.float32)).cpu())
    if not found:
        raise ValueError(
            "batches: expected at least one prompt, got none; an iterator is used up by one reading"
        )
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _last_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Index of the last token that is no padding, `[batch]`."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return torch.full((len(ids),), ids.shape[1] - 1)
    places = torch.arange(ids.shape[1], device=mask.device)
    return torch.where(mask.bool(), places, -1).amax(-1)


def _difference(refused: Tensor, accepted: Tensor, layer: int, width: int) -> Tensor:
    """`mean refused - mean accepted` `[d_model]`, float64."""
    for name, z in (("refused", refused), ("accepted", accepted)):
        if z.ndim != 2 or not len(z) or z.shape[1] != width or not bool(z.isfinite().all()):
            raise ValueError(
                f"{name}, layer {layer}: expected finite activations [at least 1, {width}], "
                f"got {list(z.shape)}{'' if z.isfinite().all() else ' with values that are not finite'}"
            )
    return refused.double().mean(0) - accepted.double().mean(0).to(refused.device)
