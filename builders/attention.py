"""How the workshop's models attend: without what costs a GPU more than attending itself; no files."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

AT_ONCE = "flash_of_windows"
"""Name of `attend_at_once` in transformers; "flash" in it makes a vision tower hand over all its windows."""


@contextmanager
def without_plans() -> Iterator[None]:
    """Attention, inside, by kernels that plan nothing; also a decorator. It changes nothing but on a GPU.

    On Hopper and Blackwell torch gives masked attention to cuDNN, which makes a plan for each length that it
    has not seen: every token of an answer, and most batches of prompts. That costs more than attending, and
    falls on whatever runs first. The switch is the process's: one thread at a time.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def windows_at_once(model: Any) -> None:
    """Have vision towers that attend window by window (Qwen-VL's, GLM-4V's) do all windows of a size at once.

    Without flash attention, which not every machine has, transformers calls torch for each window of each
    layer, thousands of times a batch, and has the host wait for the device in each layer. What comes out is
    the same.

    Args:
        model: A model of transformers; changed in place.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(AT_ONCE, attend_at_once)
    text = model.config.get_text_config()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or config is text or not _by_window(type(module)):
            continue
        if config._attn_implementation == "sdpa":
            config._attn_implementation = AT_ONCE


def _by_window(kind: type[nn.Module]) -> bool:
    """Whether a module attends within windows whose ends it is told."""
    return "cu_seqlens" in inspect.signature(kind.forward).parameters


class _Group(NamedTuple):
    """Windows of one length."""

    length: int
    rows: Tensor | None
    """Their places, window by window, on the device; None: all there are, as they stand."""


_groups: Any = WeakTensorKeyDictionary()
"""By the windows' ends, which all layers of a forward share: to read them is to wait for the device."""


def attend_at_once(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within windows, in as many calls as they have lengths; what transformers calls by AT_ONCE.

    Args:
        module: Unused.
        q: `[1, heads, n, width]`, as k and v: windows one after the other.
        k: Keys.
        v: Values.
        attention_mask: None.
        scaling: Of the products.
        cu_seq_lens_q: `[windows + 1]`: where they end, from 0.
        others: Unused.

    Returns:
        `[1, n, heads, width]`.
    """
    heads, n, width = q.shape[1:]
    if (groups := _groups.get(cu_seq_lens_q)) is None:
        groups = _groups[cu_seq_lens_q] = _grouped(cu_seq_lens_q)
    out = q.new_empty(n, heads, width)
    for length, rows in groups:
        parts = (x[0] if rows is None else x[0].index_select(1, rows) for x in (q, k, v))
        windows = (x.unflatten(1, (-1, length)).transpose(0, 1) for x in parts)
        found = scaled_dot_product_attention(*windows, scale=scaling)
        found = found.transpose(1, 2).reshape(-1, heads, width)
        out = found if rows is None else out.index_copy_(0, rows, found)
    return out[None], None


def _grouped(ends: Tensor) -> list[_Group]:
    places = ends.tolist()
    lengths = [end - start for start, end in pairwise(places)]
    if len(set(lengths)) == 1:
        return [_Group(lengths[0], None)]
    starts, sizes = torch.tensor(places[:-1]), torch.tensor(lengths)
    found = []
    for length in sorted(set(lengths) - {0}):
        rows = (starts[sizes == length, None] + torch.arange(length)).flatten()
        found.append(_Group(length, rows.to(ends.device)))
    return found
