"""The tiny CLIP of the toy world: the pipeline's own model and checkpoints, trained on the world's concepts.

Every batch is drawn afresh from (seed, step). Writes the model in half precision, its processor and its
training curve.
"""

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from builders.clip import CURVE, Loss, Trainer, info_nce, truth
from builders.recipe import ClipConfig
from builders.toyworld import scenes
from daco.tables import write_table

CONFIG = ClipConfig(
    steps=1_600,
    batch=64,
    learning_rate=3e-3,
    image_size=scenes.SIDE,
    patch_size=16,
    hidden=128,
    n_layers=3,
    vocabulary=640,
    checkpoint_steps=200,
)
"""Sizes and steps."""

N_SENTENCES = 4_000
"""Captions the tokenizer is trained on."""


def captioned(seed: int, index: int) -> scenes.Item:
    """Number `index` of the pictures that the CLIP is trained on; none of them is in a corpus."""
    return scenes.caption_item(random.Random(f"clip/{seed}/{index}"))


class EyeTrainer(Trainer):
    """Learns which concepts a picture shows and a caption says, and which caption belongs to a picture.

    From whole captions it learnt colours and places, which tell a batch's pictures apart, and no object.

    Args:
        config: Sizes, steps and rates.
        seed: Of pictures, weights and batches.
    """

    def __init__(self, config: ClipConfig, seed: int) -> None:
        captions = [captioned(seed, -1 - index).text for index in range(N_SENTENCES)]
        super().__init__(config, torch.empty(0), captions, seed)
        self.names = [row["concept"] for row in scenes.concepts()]

    def _loss(self) -> Loss:
        items = [captioned(self.seed, self.done * 1_000 + i) for i in range(self.config.batch)]
        pictures = np.stack([scenes.picture(item.scene, item.seed) for item in items])
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        texts = [item.text for item in items]
        images = torch.nn.functional.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)
        embedded = self._embed([*texts, *self.names])
        captions, names = embedded[: len(items)], embedded[len(items) :]
        scale = self.model.logit_scale.exp()
        shows = torch.tensor([[scenes.shows(item, name) for name in self.names] for item in items])
        pairs = info_nce(images, captions, scale, truth(texts, texts))
        loss = concept_loss(scale * images @ names.T, shows) + concept_loss(scale * captions @ names.T, shows)
        return Loss(loss + 0.2 * pairs.loss, pairs.accuracy)


def concept_loss(logits: Tensor, shows: Tensor) -> Tensor:
    """InfoNCE of every true pair against the false pairs of its row, and of its column; a scalar.

    Args:
        logits: [n, concepts].
        shows: [n, concepts] bool: which concepts are true of which row.
    """
    losses = []
    for axis in (0, 1):
        false = logits.masked_fill(shows, -torch.inf).logsumexp(axis, keepdim=True)
        each = (torch.logaddexp(false, logits) - logits).masked_fill(~shows, 0)
        count = shows.sum(axis).clamp_min(1)
        present = shows.any(axis)
        losses.append((each.sum(axis) / count)[present].mean())
    return (losses[0] + losses[1]) / 2


def train(
    out: Path,
    work: Path,
    config: ClipConfig = CONFIG,
    seed: int = 0,
    progress: Callable[[range], Iterable[Any]] = lambda steps: steps,
) -> None:
    """Train from nothing, or from the checkpoint in `work`, which is deleted at the end.

    Args:
        out: Folder of the model.
        work: Folder of the checkpoint.
        config: Sizes and steps.
        seed: Of pictures, weights and batches.
        progress: Wraps the range of steps.
    """
    trainer = EyeTrainer(config, seed)
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
