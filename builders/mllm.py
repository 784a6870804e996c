"""Loads a multimodal model with its processor, and renders caption-image pairs as chat prompts for it.

Reads models from the Hub or a folder; writes nothing. Captions are texts of strangers: what spells a control
token in them is broken up here, so that no caption can end a turn or claim an image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from builders.attention import windows_at_once
from builders.vision import ensure_torchvision
from daco.errors import ArtefactNotFoundError
from daco.prompts import plain_text

_MARK = "\ue000caption\ue000"
READINGS = ("last", "caption_last", "caption_mean")


def load_mllm(id_or_folder: str, revision: str | None = None, dtype: str = "float32") -> tuple[Any, Any]:
    """Load an image-text-to-text model (eval mode) and its processor; code from the repo is never run.

    Args:
        id_or_folder: Hub id, or a folder that `save_pretrained` wrote.
        revision: commit, tag or branch of a Hub id; empty or None: the default branch.
        dtype: of the weights, a torch name such as `float32` or `bfloat16`.

    Raises:
        ArtefactNotFoundError: there is no such model, or it is none that takes images and text.
    """
    ensure_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        processor = AutoProcessor.from_pretrained(id_or_folder, **where)
        model = AutoModelForImageTextToText.from_pretrained(
            id_or_folder, dtype=getattr(torch, dtype), use_safetensors=True, **where
        )
    except (OSError, ValueError) as error:
        raise ArtefactNotFoundError(
            f"expected an image-text-to-text model at {id_or_folder!r}, got {error}; "
            "check model.id and model.revision"
        ) from error
    windows_at_once(model)
    return model.eval(), processor


def user_turn(caption: str, image: Image | None = None) -> list[dict[str, Any]]:
    """One stimulus as a conversation of one user turn: the image, if any, then the caption."""
    picture = [] if image is None else [{"type": "image"}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": caption}]}]


def chat_inputs(processor: Any, captions: Sequence[str], images: Sequence[Image] | None = None) -> Any:
    """Render one user turn a row, ending in the generation prompt, as a left-padded batch of model inputs.

    Args:
        processor: of an image-text-to-text model, with a chat template.
        captions: one text a row; see `plain_text` for those that spell control tokens.
        images: one image a row, or None for text alone.

    Returns:
        What `model(**inputs)` takes: input_ids and attention_mask `[batch, tokens]`, and the pixels. The last
        token of every row is the last of its prompt.
    """
    rows = [None] * len(captions) if images is None else images
    texts = [
        _render(processor, user_turn(plain_text(processor, caption), image))
        for caption, image in zip(captions, rows, strict=True)
    ]
    pictures = None if images is None else [[image.convert("RGB")] for image in images]
    processor.tokenizer.padding_side = "left"
    return processor(images=pictures, text=texts, padding=True, return_tensors="pt", padding_side="left")


def reading_weights(processor: Any, inputs: Any, captions: Sequence[str], reading: str = "last") -> Tensor:
    """Where a row's contrastive reading is taken, as weights over its tokens.

    Args:
        processor: the one that made `inputs`.
        inputs: of `chat_inputs(processor, captions, ...)`.
        captions: the same captions.
        reading: `last` (the prompt's last token), `caption_last` or `caption_mean`.

    Returns:
        float32 `[batch, tokens]`, rows sum to 1; the reading is `(weights[..., None] * z).sum(1)`.

    Raises:
        ValueError: another reading, or a caption without a token.
    """
    if reading not in READINGS:
        raise ValueError(f"reading: expected one of {READINGS}, got {reading!r}")
    weights = torch.zeros(inputs["input_ids"].shape)
    for row, caption in enumerate(captions):
        weights[row, _positions(processor, caption, reading)] = 1.0
    return weights / weights.sum(1, keepdim=True)


def _positions(processor: Any, caption: str, reading: str) -> list[int]:
    """Positions of a reading, counted from the end: left padding and image tokens do not move these."""
    if reading == "last":
        return [-1]
    caption = plain_text(processor, caption).strip()
    text = _render(processor, user_turn(caption))
    # by what follows it: "user" is a caption too, and stands elsewhere in the prompt
    behind = _render(processor, user_turn(_MARK)).rpartition(_MARK)[2]
    start = len(text) - len(behind) - len(caption)
    if text[start:] != caption + behind or not caption:
        raise ValueError(f"expected the caption {caption!r} before {behind!r} in its prompt, got {text!r}")
    tail = processor.tokenizer(text[start:], add_special_tokens=False, return_offsets_mapping=True)
    ends = len(caption)
    offsets = tail["offset_mapping"]
    inside = [i - len(offsets) for i, (first, last) in enumerate(offsets) if first < ends and last > first]
    return inside[-1:] if reading == "caption_last" else inside


def _render(processor: Any, messages: list[dict[str, Any]]) -> str:
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
