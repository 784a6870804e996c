"""The tiny CLIP of the toy world, trained on its captioned pictures with the pipeline's own trainer.

Writes the model in half precision, its processor and its training curve.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from builders.clip import CURVE, MARGIN, Trainer, square
from builders.recipe import ClipConfig
from builders.toyworld import scenes
from daco.tables import write_table

CONFIG = ClipConfig(
    steps=1_500,
    batch=96,
    learning_rate=2e-3,
    image_size=scenes.SIDE,
    patch_size=16,
    hidden=96,
    n_layers=3,
    vocabulary=640,
    checkpoint_steps=250,
)
"""Sizes and steps."""

PICTURES = 6_000


def pairs(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures [n, 3, s, s], a little larger than the model sees them, and their captions."""
    side = scenes.SIDE + scenes.SIDE // MARGIN
    drawn = [(square(image, side), item.text) for image, item, _ in scenes.corpus(n, seed)]
    return torch.stack([image for image, _ in drawn]), [caption for _, caption in drawn]


def train(
    out: Path,
    work: Path,
    config: ClipConfig = CONFIG,
    pictures: int = PICTURES,
    seed: int = 0,
    progress: Callable[[range], Iterable[Any]] = lambda steps: steps,
) -> None:
    """Train from nothing, or from the checkpoint in `work`, which is deleted at the end.

    Args:
        out: Folder of the model.
        work: Folder of the checkpoint.
        config: Sizes and steps.
        pictures: How many are drawn.
        seed: Of pictures, weights and batches.
        progress: Wraps the range of steps.
    """
    trainer = Trainer(config, *pairs(pictures, seed), seed)
    if (work / "checkpoint.safetensors").is_file():
        trainer.restore(work)
    for _ in progress(range(trainer.done, config.steps)):
        trainer.step()
        if trainer.done % config.checkpoint_steps == 0:
            work.mkdir(parents=True, exist_ok=True)
            trainer.save(work)
    out.mkdir(parents=True, exist_ok=True)
    trainer.model.half()
    trainer.write(out)
    write_table(out / "training.parquet", pa.Table.from_pylist(trainer.curve, schema=CURVE))
    shutil.rmtree(work, ignore_errors=True)
