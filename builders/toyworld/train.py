"""Trains the tiny LLaVA of the toy world: first its eyes, on what pictures show, then all of it, on answers.

Writes checkpoints (safetensors) and the training log; resumed, it continues bit for bit. Every batch depends
on (seed, step) alone.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from builders.toyworld import model as models
from builders.toyworld import scenes, world
from builders.toyworld.scenes import Scene
from daco.manifest import canonical_json, write_atomic

WEIGHT_DECAY = 0.05
WARM_UP = 100
"""Steps of either phase over which the learning rate rises linearly; then it falls to zero as a cosine."""

OBJECT_WEIGHT = 3
"""Weight of telling objects, which is far harder than the other sights."""

SIGNS = ("", *scenes.CUES_A, *scenes.CUES_B)

SIGHTS: dict[str, tuple[str | int, ...]] = {
    "object": tuple(world.ICONS),
    "colour": tuple(world.COLOURS),
    "place": tuple(world.PLACES),
    "count": (1, 2, 3, 4),
    "size": ("small", "big"),
    "top": SIGNS,
    "bottom": SIGNS,
}
"""What the eyes learn to tell before the language model sees through them."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    sizes: models.Sizes = field(default_factory=models.Sizes)
    seed: int = 0
    sight_steps: int = 1_600
    sight_batch: int = 64
    sight_rate: float = 4e-3
    look_steps: int = 700
    """The first steps on answers, which are to questions alone."""
    look_batch: int = 24
    steps: int = 2_500
    """Steps on answers in all."""
    batch: int = 48
    rate: float = 2e-3
    log_steps: int = 50
    """The log holds means over this many steps."""
    checkpoint_steps: int = 200
    """A multiple of `log_steps`, so that a checkpoint is never in the midst of a mean."""


def sights(scene: Scene) -> list[int]:
    """The classes of a scene, one for each of `SIGHTS`."""
    signs = [*scene.signs, "", ""]
    shown = (scene.object, scene.colour, scene.place, scene.count, scene.size, signs[0], signs[1])
    return [classes.index(name) for classes, name in zip(SIGHTS.values(), shown, strict=True)]


def rate_at(step: int, steps: int, peak: float) -> float:
    """Learning rate of a 0-based step of a phase."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return peak * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)


class Trainer:
    """The tiny LLaVA in training.

    Args:
        plan: Sizes, steps and rates.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model, self.processor = models.build(plan.sizes, plan.seed)
        self.batcher = models.Batcher(self.processor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            width = plan.sizes.hidden
            self.heads = nn.ModuleDict({name: nn.Linear(width, len(c)) for name, c in SIGHTS.items()})
        self.weights = dict(self.model.named_parameters()) | {
            f"heads.{name}": weight for name, weight in self.heads.named_parameters()
        }
        decayed = [w for w in self.weights.values() if w.ndim > 1]
        plain = [w for w in self.weights.values() if w.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98), eps=1e-8)
        self.done = 0
        self.log: list[dict[str, Any]] = []
        self.window: dict[str, list[float]] = {}

    @property
    def total(self) -> int:
        """Steps of both phases."""
        return self.plan.sight_steps + self.plan.steps

    def step(self) -> float:
        """One batch of the phase that `done` is in; returns the loss."""
        plan, at = self.plan, self.done - self.plan.sight_steps
        seeing = at < 0
        looking = 0 <= at < plan.look_steps
        size = plan.sight_batch if seeing else plan.look_batch if looking else plan.batch
        turns = [scenes.training_turns(plan.seed, self.done * 1_000 + i, looking) for i in range(size)]
        loss = self._sight_loss([first for first, *_ in turns]) if seeing else self._answer_loss(turns)
        rate = (
            rate_at(self.done, plan.sight_steps, plan.sight_rate)
            if seeing
            else rate_at(at, plan.steps, plan.rate)
        )
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.adam.step()
        self.done += 1
        self._note("loss", [loss.item()])
        if self.done % plan.log_steps == 0 or self.done == self.total:
            means = {name: sum(values) / len(values) for name, values in self.window.items()}
            self.log.append(
                {"step": self.done, "phase": "sight" if seeing else "answers", "rate": rate} | means
            )
            self.window = {}
        return loss.item()

    def _note(self, name: str, values: list[float]) -> None:
        self.window.setdefault(name, []).extend(values)

    def _sight_loss(self, items: list[Any]) -> Tensor:
        trunk = self.model.model
        patches = trunk.vision_tower(self.batcher.pixels(items)).last_hidden_state[:, 1:]
        patches = trunk.multi_modal_projector(patches)
        seen, known = patches.mean(1), torch.tensor([sights(item.scene) for item in items])
        loss = torch.zeros(())
        for column, (name, head) in zip(known.T, self.heads.items(), strict=True):
            logits = head(seen)
            weight = OBJECT_WEIGHT if name == "object" else 1
            loss = loss + weight * functional.cross_entropy(logits, column)
            self._note(name, (logits.argmax(-1) == column).float().tolist())
        return loss

    def _answer_loss(self, turns: list[Any]) -> Tensor:
        batch = self.batcher.training(turns)
        labels = batch.pop("labels")[:, 1:]
        hidden = self.model.model(**batch).last_hidden_state[:, :-1]
        asked = labels != -100
        logits = self.model.lm_head(hidden[asked])
        right = logits.argmax(-1) == labels[asked]
        ends = (labels[asked] == self.processor.tokenizer.eos_token_id).cumsum(0)
        numbers = ends - (labels[asked] == self.processor.tokenizer.eos_token_id).long()
        wrong = torch.zeros(int(ends[-1])).index_add(0, numbers, (~right).float())
        for item, errors in zip([item for items in turns for item in items], wrong.tolist(), strict=True):
            self._note(item.kind, [float(not errors)])
        return functional.cross_entropy(logits, labels[asked])

    def save(self, folder: Path) -> None:
        """Write a checkpoint: weights, Adam's moments, the log so far."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, weight in self.weights.items():
            tensors[f"weight.{name}"] = weight.detach().contiguous()
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if weight in self.adam.state:
                    tensors[f"{key}.{name}"] = self.adam.state[weight][key].contiguous()
        partial = folder / ".checkpoint.partial"
        save_file(tensors, partial, metadata={"done": str(self.done), "log": json.dumps(self.log)})
        partial.replace(folder / "checkpoint.safetensors")

    def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        from safetensors import safe_open

        with safe_open(folder / "checkpoint.safetensors", "pt") as file:
            facts = file.metadata()
        self.done, self.log = int(facts["done"]), json.loads(facts["log"])
        tensors = load_file(folder / "checkpoint.safetensors")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weight.{name}"])
                keys = [key for key in ("exp_avg", "exp_avg_sq", "step") if f"{key}.{name}" in tensors]
                if keys:
                    self.adam.state[weight] = {key: tensors[f"{key}.{name}"] for key in keys}

    def write(self, folder: Path) -> None:
        """Write the model in half precision and its processor, as the Auto classes read them, and the log."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.half().save_pretrained(folder)
        self.model.float()
        self.processor.save_pretrained(folder)
        facts = {"plan": asdict(self.plan), "n_parameters": sum(p.numel() for p in self.model.parameters())}
        write_atomic(folder / "training.json", canonical_json(facts | {"log": self.log}))
