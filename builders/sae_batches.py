"""Which tokens a training step sees: drawn for each step, shared among processes, read some steps ahead.

Writes nothing; reads the rows of a step from the shards on disk, so that memory holds a few batches, no more.
"""

from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
from torch import Tensor

from builders.prefetch import prefetched
from builders.recipe import SaeConfig
from builders.sae_start import Tokens
from daco.errors import RecipeError

AHEAD = 4
"""Batches read ahead, each by its own thread: a disk answers several at once, and a GPU waits for none."""


def batch_index(seed: int, layer: int, step: int, size: int, n_tokens: int) -> np.ndarray:
    """Numbers of a batch's tokens, with replacement; of (seed, layer, step) alone, hence resumable."""
    return np.random.default_rng([seed, layer, step]).integers(n_tokens, size=size)


def own_share(index: np.ndarray) -> np.ndarray:
    """The part of a batch that this process of a torchrun takes; all of it where there is but one.

    Raises:
        RecipeError: the batch does not divide by the number of processes.
    """
    if not dist.is_initialized():
        return index
    world = dist.get_world_size()
    if len(index) % world:
        raise RecipeError(f"sae.batch: expected a multiple of the {world} processes, got {len(index)}")
    return np.split(index, world)[dist.get_rank()]


def batches(
    train: Tokens, config: SaeConfig, seed: int, layer: int, steps: range, device: str
) -> Iterator[Tensor]:
    """The batches of these steps, or this process's share; the next are read while one is worked on."""

    def batch(step: int) -> Tensor:
        z = train.rows(own_share(batch_index(seed, layer, step, config.batch, len(train))))
        return z.pin_memory() if device.startswith("cuda") else z

    for z in prefetched(batch, steps, AHEAD):
        yield z.to(device, non_blocking=True)


def is_first() -> bool:
    """Whether this process is the one that writes: the only one, or the first of a torchrun."""
    return not dist.is_initialized() or dist.get_rank() == 0
