"""Reads stimuli with a model the way a dictionary's own were read: the last token of the prompt; no files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from daco.capture import capture
from daco.errors import ActivationError, ModelMismatchError
from daco.prompts import chat_inputs, turn

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary


def read_stimuli(
    dictionary: "ConceptDictionary",
    model: nn.Module,
    processor: Any,
    captions: Sequence[str],
    images: Sequence[Any] | None,
    base_model_ok: bool,
    batch: int,
) -> dict[int, Tensor]:
    """See `ConceptDictionary.read`."""
    if dictionary.reading != "last":
        raise ModelMismatchError(
            f"expected a dictionary read at the last token, got {dictionary.reading!r}; "
            "read the stimuli yourself with `daco.capture` and pass them to `extend`"
        )
    pictures = [None] * len(captions) if images is None else list(images)
    if not captions or len(pictures) != len(captions):
        raise ActivationError(
            f"expected at least one stimulus and an image for each, got {len(captions)} captions and "
            f"{len(pictures)} images"
        )
    dictionary.model.check(model, base_model_ok)
    rows = list(zip(captions, pictures, strict=True))
    parts = [
        _read(dictionary.layers, model, processor, rows[i : i + batch]) for i in range(0, len(rows), batch)
    ]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in dictionary.layers}


@torch.no_grad()
def _read(layers: list[int], model: Any, processor: Any, rows: list[tuple[str, Any]]) -> dict[int, Tensor]:
    """The last token of each prompt: padding stands on the left."""
    turns = [[turn(processor, "user", text, n_images=int(image is not None))] for text, image in rows]
    shown = [[] if image is None else [image] for _, image in rows]
    inputs = chat_inputs(processor, turns, shown).to(model.device)
    with capture(model, layers, stop=True) as captured:
        captured.run(**inputs)
    found = {layer: captured.activations[layer][:, -1].float().cpu() for layer in layers}
    if bad := [layer for layer, z in found.items() if not bool(z.isfinite().all())]:
        raise ActivationError(
            f"expected finite activations, got NaN or infinity at layers {bad}; "
            "load the model in bfloat16 or float32"
        )
    return found
