"""What each token of a forward is: image, prompt text, generated or padding; from the arguments of the call.

Pure functions of a call's arguments; reads no weight, changes nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from daco.errors import SteeringConflictError


class Positions(NamedTuple):
    """Places of a forward's tokens, padding left out; the first three are in the order of PLACES."""

    image: Tensor
    """`[batch, tokens]` bool."""
    prompt: Tensor
    """Likewise: the prompt's text."""
    generated: Tensor
    """Likewise: after the prompt."""
    last: Tensor
    """Likewise: the prompt's last token, where this forward holds it; also among image or prompt."""
    absent: tuple[str, ...]
    """Places that cannot occur in this forward, known without looking at the tokens."""
    first: bool
    """Whether this forward starts a sequence."""
    guessed: bool
    """Whether prompt and answer may share this forward and nothing tells where the one ends."""


def positions(
    call: dict[str, Any], image_ids: tuple[int, ...], scopes: tuple[str, ...], prompt_tokens: int | None
) -> Positions:
    """Places of the tokens of one forward, from the arguments the model is called with."""
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None:
        raise SteeringConflictError("expected input_ids or inputs_embeds in the model's call, got neither")
    batch, width = tokens.shape[:2]
    kept = _kept(call.get("attention_mask"), batch, width, tokens.device)
    past = _past_length(call.get("past_key_values"))
    guessed = prompt_tokens is None and _may_be_shared(call, past, width)
    if guessed and {"prompt", "generated", "last"} & set(scopes):
        raise SteeringConflictError(
            f"scope {named(scopes)}: prompt and generated tokens may share a forward (no KV cache, chunked "
            "prefill, assisted decoding, logits_to_keep, a further turn); pass "
            "prompt_tokens=inputs['input_ids'].shape[1]"
        )
    # without further word, a first forward is all prompt, and later ones are generated
    start = width if past == 0 else 0
    if prompt_tokens is not None:
        start = min(max(prompt_tokens - past, 0), width)
    if start == 0:  # most forwards of a generation, which must cost next to nothing
        none = torch.zeros_like(kept)
        return Positions(none, none, kept, none, ("image", "prompt", "last"), past == 0, guessed)
    prompt = kept.clone()
    prompt[:, start:] = False
    image = torch.zeros_like(kept)
    if image_ids:
        if ids is not None:
            image = prompt & torch.isin(ids, torch.tensor(image_ids, device=ids.device))
        elif {"image", "prompt"} & set(scopes):
            raise SteeringConflictError(
                f"scope {named(scopes)}: expected input_ids, got inputs_embeds; use scope 'all'"
            )
    absent = ("generated",) if start == width else ()
    ends = prompt_tokens is None or prompt_tokens - past <= width
    last = _last(prompt) if ends else torch.zeros_like(prompt)
    return Positions(image, prompt & ~image, kept & ~prompt, last, absent, past == 0, guessed)


def named(scopes: tuple[str, ...]) -> str:
    """Scopes, for messages."""
    return " + ".join(map(repr, scopes))


def _last(prompt: Tensor) -> Tensor:
    """Of each row the last position that holds; found without waiting for the device."""
    columns = torch.arange(prompt.shape[1], device=prompt.device)
    last = (prompt * columns).amax(1, keepdim=True)
    return prompt & (columns == last)


def _kept(mask: Tensor | None, batch: int, width: int, device: torch.device) -> Tensor:
    """`[batch, width]`: which of a forward's tokens are not padding."""
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < width:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SteeringConflictError(
            f"expected an attention mask [batch, tokens], got {shape}: padding cannot be told from it; "
            "a static or compiled KV cache makes such masks: use the default cache, or daco.wrap"
        )
    return mask[:, -width:].to(device=device, dtype=torch.bool)


def _past_length(cache: Any) -> int:
    if cache is None:
        return 0
    if isinstance(cache, tuple):  # the KV cache before transformers had classes for it
        return int(cache[0][0].shape[-2]) if cache else 0
    return int(cache.get_seq_length())


def _may_be_shared(call: dict[str, Any], past: int, width: int) -> bool:
    """Whether prompt and answer cannot be told apart from one call."""
    if past:
        return width > 1
    kept = call.get("logits_to_keep")  # of several tokens, where a draft behind the prompt is checked
    several = kept.numel() > 1 if isinstance(kept, Tensor) else isinstance(kept, int) and kept > 1
    return call.get("use_cache") is False or several
