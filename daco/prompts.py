"""Renders conversations as inputs of a model; what spells a control token in a text is broken up first.

Reads chat templates of processors and tokenizers; writes nothing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from daco.errors import UnsupportedModelError


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a tokenizer's own self."""
    return getattr(processor, "tokenizer", processor)


def control_tokens(processor: Any) -> set[str]:
    """Texts that act in a prompt: special tokens, what the chat template writes, and image placeholders."""
    tokenizer = tokenizer_of(processor)
    template = str(_template(processor) or "")
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {token.content for token in added if token.special or token.content in template}
    found |= set(tokenizer.all_special_tokens)
    for name in ("image_token", "video_token"):  # a processor replaces these in the text itself
        if isinstance(token := getattr(processor, name, None), str):
            found.add(token)
    return {token for token in found if len(token) > 1 and not token.isspace()}


def plain_text(processor: Any, text: str) -> str:
    """`text` with a space behind the first character of whatever spells a control token, so that it is none.

    A space survives every normaliser, also those that drop invisible characters.
    """
    longest_first = sorted(control_tokens(processor), key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)
    while spelled.search(text):  # a token may hold another one
        text = spelled.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


def turn(processor: Any, role: str, text: str, n_images: int = 0) -> dict[str, Any]:
    """One turn of a conversation, as chat templates take it: images first, then the text.

    Args:
        processor: Of the model.
        role: `user`, `assistant` or `system`.
        text: What is said; control tokens in it are broken up.
        n_images: How many images it shows.

    Raises:
        UnsupportedModelError: images for a model that takes text alone.
    """
    safe = plain_text(processor, text)
    if not takes_images(processor):
        if n_images:
            raise UnsupportedModelError("expected text alone, got an image; this model takes none")
        return {"role": role, "content": safe}
    parts: list[dict[str, Any]] = [{"type": "image"}] * n_images
    return {"role": role, "content": [*parts, {"type": "text", "text": safe}]}


def takes_images(processor: Any) -> bool:
    """Whether it is a processor of images, not a tokenizer."""
    return getattr(processor, "image_processor", None) is not None


def chat_inputs(
    processor: Any, conversations: Sequence[Sequence[Mapping[str, Any]]], images: Sequence[Sequence[Any]]
) -> Any:
    """Render conversations, ending in the generation prompt, as a left-padded batch of model inputs.

    Args:
        processor: Of the model, with a chat template; a tokenizer does for text alone.
        conversations: Turns of `turn`, one list a row.
        images: The PIL images of each row, in the order its turns show them.

    Returns:
        What `model(**inputs)` takes; the last token of every row is the last of its prompt.

    Raises:
        UnsupportedModelError: there is no chat template.
    """
    if not _template(processor):
        raise UnsupportedModelError(
            f"expected a chat template in {type(processor).__name__}, got none; use a model made for chats"
        )
    texts = [
        processor.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
        for turns in conversations
    ]
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"
    options = {"padding": len(texts) > 1, "return_tensors": "pt"}
    if not takes_images(processor):
        return tokenizer(texts, add_special_tokens=False, **options)
    pictures = [[image.convert("RGB") for image in row] for row in images]
    shown = pictures if any(pictures) else None
    return processor(images=shown, text=texts, padding_side="left", **options)


def _template(processor: Any) -> Any:
    return getattr(processor, "chat_template", None) or getattr(
        tokenizer_of(processor), "chat_template", None
    )
