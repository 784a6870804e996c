"""One forward of the frozen MLLM over a batch: contrastive readings, and the tokens that the SAEs may see.

Reads and writes nothing.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from builders.attention import without_plans
from builders.mllm import chat_inputs, reading_weights
from builders.token_choice import norms_of
from builders.tokens import MODALITIES
from daco.capture import capture
from daco.errors import ActivationError
from daco.sites import image_token_ids


class Read(NamedTuple):
    """What the MLLM said of a batch of stimuli, or of prompts with answers."""

    readings: Tensor | None
    """[batch, n_layers, d_model] float32: the contrastive reading; None: none was asked for."""
    tokens: list[Tensor]
    """A stimulus each: [tokens, n_layers, d_model] of the tokens that are neither padding nor special."""
    norms: list[Tensor]
    """A stimulus each: [tokens, n_layers] float32, of these tokens."""
    modality: list[Tensor]
    """A stimulus each: [tokens] uint8, what each of these tokens belongs to (numbers in `MODALITIES`)."""
    masked: Counter[str]
    """Tokens left out, by reason."""


def modalities(model: Any, processor: Any, input_ids: Tensor, captions: Sequence[str]) -> Tensor:
    """What each token of a batch belongs to, [batch, tokens] uint8, numbers in `MODALITIES`.

    Args:
        model: The MLLM.
        processor: Its processor.
        input_ids: [batch, tokens] of `chat_inputs(processor, captions, ...)`.
        captions: One a stimulus; a caption that its prompt does not show as it is counts as prompt.
    """
    image, prompt, caption = (MODALITIES.index(name) for name in ("image", "prompt", "caption"))
    kinds = torch.full(input_ids.shape, prompt, dtype=torch.uint8)
    for row, text in enumerate(captions):
        with contextlib.suppress(ValueError):
            here = reading_weights(processor, {"input_ids": input_ids[row : row + 1]}, [text], "caption_mean")
            kinds[row, here[0] > 0] = caption
    kinds[torch.isin(input_ids, torch.tensor(sorted(image_token_ids(model))))] = image
    return kinds


def special_ids(model: Any, processor: Any) -> set[int]:
    """Ids of special tokens, without the image's placeholder: at its places stand the image's own patches."""
    tokenizer = processor.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return special - set(image_token_ids(model))


class Prepared(NamedTuple):
    """A batch of stimuli, ready for the model."""

    inputs: Any
    """Of `chat_inputs`, on the CPU."""
    kinds: Tensor
    """[batch, tokens] of `modalities`."""
    weights: Tensor
    """[batch, tokens] of `reading_weights`."""


def prepared(
    model: Any, processor: Any, captions: Sequence[str], images: Sequence[Image], reading: str = "last"
) -> Prepared:
    """What `read_prepared` takes; may be done in another thread, as long as it alone uses the processor.

    Args:
        model: The MLLM, of which the config is read.
        processor: Its processor.
        captions: One a stimulus; they stand in the user's turn with the image.
        images: One a stimulus.
        reading: See `builders.mllm.reading_weights`.
    """
    inputs = chat_inputs(processor, captions, images)
    kinds = modalities(model, processor, inputs["input_ids"], captions)
    return Prepared(inputs, kinds, reading_weights(processor, inputs, captions, reading))


def read_prepared(model: Any, processor: Any, batch: Prepared, layers: Sequence[int]) -> Read:
    """Forward a batch of stimuli, stopping after the last layer needed.

    Args:
        model: The MLLM.
        processor: Its processor.
        batch: Of `prepared`.
        layers: Decoder blocks whose output is read, rising.

    Raises:
        ActivationError: an activation is NaN or infinite.
    """
    inputs = batch.inputs.to(model.device)
    return forward_tokens(model, processor, inputs, batch.kinds, layers, batch.weights)


def read_batch(
    model: Any,
    processor: Any,
    captions: Sequence[str],
    images: Sequence[Image],
    layers: Sequence[int],
    reading: str = "last",
) -> Read:
    """`read_prepared` of `prepared`; see there."""
    batch = prepared(model, processor, captions, images, reading)
    return read_prepared(model, processor, batch, layers)


@torch.no_grad()
@without_plans()
def forward_tokens(
    model: Any,
    processor: Any,
    inputs: Any,
    kinds: Tensor,
    layers: Sequence[int],
    weights: Tensor | None = None,
) -> Read:
    """Forward model inputs, stopping after the last layer needed.

    Args:
        model: The MLLM.
        processor: Its processor.
        inputs: What the model takes, on its device.
        kinds: [batch, tokens] uint8, what each token belongs to.
        layers: Decoder blocks whose output is read, rising.
        weights: [batch, tokens] of `builders.mllm.reading_weights`; None: no readings.

    Raises:
        ActivationError: an activation is NaN or infinite.
    """
    with capture(model, layers, stop=True) as captured:
        captured.run(**inputs)
    first = captured.activations[layers[0]]
    z = torch.stack([captured.activations[layer].to(first.device) for layer in layers], dim=2)
    # what needs floats of all tokens is done where they are: they are gigabytes
    norms = norms_of(z)
    attended = inputs["attention_mask"].to(z.device, torch.bool)
    _check_finite(z, norms, attended, layers)
    readings = None if weights is None else _weighted(z, weights)
    special = torch.tensor(sorted(special_ids(model, processor)))
    attended, z, norms = attended.cpu(), z.cpu(), norms.cpu()
    ordinary = attended & ~torch.isin(inputs["input_ids"].cpu(), special)
    masked = Counter(padding=int((~attended).sum()), special=int((attended & ~ordinary).sum()))
    tokens, of_tokens, modality = (
        [row[keep] for row, keep in zip(x, ordinary, strict=True)] for x in (z, norms, kinds)
    )
    return Read(readings, tokens, of_tokens, modality, masked)


def _weighted(z: Tensor, weights: Tensor) -> Tensor:
    """Sums over few of the tokens, [batch, n_layers, d_model] float32 on the CPU."""
    found = []
    for row, weight in zip(z, weights, strict=True):
        places = weight.nonzero().squeeze(-1)
        some = row[places.to(z.device)].float()
        found.append(torch.einsum("t,tld->ld", weight[places].to(z.device), some))
    return torch.stack(found).cpu()


def _check_finite(z: Tensor, norms: Tensor, attended: Tensor, layers: Sequence[int]) -> None:
    suspect = ~norms.isfinite() & attended[:, :, None]  # or too large to be squared
    if not suspect.any():
        return
    bad = (~z.isfinite().all(-1) & suspect).any(0).any(0)
    if bad.any():
        where = [layer for layer, wrong in zip(layers, bad.tolist(), strict=True) if wrong]
        raise ActivationError(
            f"expected finite activations, got NaN or infinity at layers {where}; "
            "try model.dtype = 'bfloat16' or 'float32'"
        )
