"""A fingerprint of a model's weights: a few numbers of a few matrices, kept by releases to know the model.

Pure functions of decoder blocks; reads some 200 weights, writes nothing.

Numbers are kept rather than a hash of them: float32, bfloat16 and float16 copies of one model hold different
numbers, and no rounding brings all three to the same one (a number beside a rounding's edge falls to either
side). Numbers can be compared within the error that storing them in 8 bits of mantissa can make, and that
bound is hard: a copy never differs by chance. A weight of size w is told from another one from w / 200
upwards, and most weights of a language model are below .05. So one step of AdamW at a learning rate of 1e-4
is seen in most matrices, and a merged LoRA in those it was made for. That is why matrices of blocks are
sampled: norms are near 1, where 8 bits see no fine-tuning, and embeddings of unused words stay as they are.

What it does not see: models that differ in other parts alone (vision tower, projector, embeddings, heads).
Quantised, offloaded and sharded weights are not read.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

BLOCKS = 4
"""Decoder blocks that are sampled, evenly from the first to the last."""

MATRICES = 8
"""Matrices of a block that are sampled at most, evenly by name."""

ENTRIES = 8
"""Numbers of a matrix."""

RELATIVE = 1.25 * 2**-8
"""How far copies in other dtypes may lie apart: bfloat16's error, float16's beside it, and the text's."""

ABSOLUTE = 2**-24
"""As far as float16 is from numbers near zero."""

_GOLDEN = (5**0.5 - 1) / 2
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Compared(NamedTuple):
    """Names of sampled matrices, as a model at hand has them."""

    same: list[str]
    """Equal, but for rounding."""
    differ: list[str]
    """Of other weights."""
    unknown: list[str]
    """Not to be read here: quantised, offloaded, sharded, of another shape or name."""


def fingerprint(blocks: nn.ModuleList) -> dict[str, str]:
    """Sample the weights of decoder blocks.

    Args:
        blocks: Of the text trunk.

    Returns:
        By `<block>.<name of the matrix>`: `ENTRIES` numbers as text; empty where no weight can be read.
    """
    last = len(blocks) - 1
    numbers = sorted({round(i * last / (BLOCKS - 1)) for i in range(BLOCKS)})
    found = {f"{i}.{name}": _entries(blocks[i], name) for i in numbers for name in _matrices(blocks[i])}
    return {name: " ".join(f"{x:.6g}" for x in entries) for name, entries in found.items() if entries}


def compare(expected: Mapping[str, str], blocks: nn.ModuleList) -> Compared:
    """Compare decoder blocks with a fingerprint.

    Args:
        expected: Of `fingerprint`.
        blocks: Of the model at hand.
    """
    found = Compared([], [], [])
    for key, text in expected.items():
        number, _, name = key.partition(".")
        block = blocks[int(number)] if int(number) < len(blocks) else nn.Module()
        entries, wanted = _entries(block, name), [float(x) for x in text.split()]
        if len(entries) != len(wanted):
            found.unknown.append(key)
        else:
            (found.same if all(map(_near, entries, wanted)) else found.differ).append(key)
    return found


def broken_fingerprint(where: str, value: object) -> list[str]:
    """What is wrong with a fingerprint in a file; `where` names it."""
    if isinstance(value, Mapping) and all(_is_entry(name, text) for name, text in value.items()):
        return []
    return [f"{where}: expected texts of numbers by the name of a block's matrix, got {value!r:.200}"]


def _is_entry(name: object, text: object) -> bool:
    if not isinstance(name, str) or not isinstance(text, str) or not name.partition(".")[0].isdecimal():
        return False
    try:
        return all(math.isfinite(float(number)) for number in text.split())
    except ValueError:
        return False


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= RELATIVE * max(abs(a), abs(b)) + ABSOLUTE


def _matrices(block: nn.Module) -> list[str]:
    """Names of matrices of a block, evenly among all of them; experts may be stacked to three dimensions."""
    names = sorted(name for name, weight in _plain(block).named_parameters() if weight.ndim >= 2)
    step = max(1, math.ceil(len(names) / MATRICES))
    return names[::step]


@torch.no_grad()
def _entries(block: nn.Module, name: str) -> list[float]:
    """Fixed entries of a weight, spread over rows and columns; empty where they cannot be read."""
    try:
        weight: Any = _plain(block).get_parameter(name).data
    except AttributeError:
        return []
    # subclasses hold quantised or sharded weights; those of 8 bits and less need their scales
    if type(weight) is not Tensor or weight.is_meta or weight.dtype not in _DTYPES or not weight.numel():
        return []
    places = [int((i * _GOLDEN) % 1 * weight.numel()) for i in range(1, ENTRIES + 1)]
    index = np.unravel_index(places, tuple(weight.shape))
    found = weight[tuple(torch.from_numpy(axis).to(weight.device) for axis in index)].double().tolist()
    return found if all(map(math.isfinite, found)) else []


def _plain(block: nn.Module) -> nn.Module:
    """A block out of its compiled form."""
    inner = getattr(block, "_orig_mod", block)
    return inner if isinstance(inner, nn.Module) else block
