"""One SAE in training: its weights, Adam, its schedules, and how all of it is saved and taken up again.

Reads and writes `training.safetensors` and `training.json` of a checkpoint. The gradients come from
`builders.sae_step`, the tokens of each step from `builders.sae_batches`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import sae_step
from builders.recipe import SaeConfig
from builders.sae_losses import Weights
from builders.sae_step import Gradients, Step
from daco.errors import ActivationError
from daco.manifest import canonical_json, write_atomic

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises linearly."""
RECENT = 100
"""Steps over which BatchTopK's threshold is the mean of the smallest kept pre-activation."""
DEAD_STEPS = 20
"""Steps between looks for dead atoms, so that a GPU is not waited for at each."""


def exported(weights: Mapping[str, Tensor], scale: float) -> Weights:
    """Weights for raw activations: the input scale is folded into biases and thresholds, the rest stays."""
    folded = {
        name: w.detach() * scale for name, w in weights.items() if name in ("b_enc", "b_dec", "threshold")
    }
    if "log_threshold" in weights:
        folded["threshold"] = weights["log_threshold"].detach().exp() * scale
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    found = {name: folded.get(name, weights.get(name)) for name in names}
    return {name: w.detach().cpu().contiguous() for name, w in found.items() if w is not None}


class Training:
    """One SAE in training: weights, Adam, and the step it is at.

    Args:
        weights: The start, in scaled units; see `builders.sae_start.started`.
        scale: Activations are divided by it.
        config: The recipe's section.
        concepts: [n, d_model] unit directions that the first atoms started as; None: a random start.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], scale: float, config: SaeConfig, concepts: Tensor | None = None
    ) -> None:
        # the encoder lies transposed: an atom's weights side by side are what sparse gradients want
        rows = {name: w.T if name == "W_enc" else w for name, w in sorted(weights.items())}
        self.parameters = {
            name: torch.nn.Parameter(w.detach().clone(memory_format=torch.contiguous_format))
            for name, w in rows.items()
        }
        self.scale, self.config, self.concepts, self.steps_done = scale, config, concepts, 0
        self.records: list[dict[str, Any]] = []
        self.compute = Step(self.parameters, config, "" if config.select == "auto" else config.select)
        for name, parameter in self.parameters.items():
            parameter.grad = self.compute.gradients[name]
        self.adam = torch.optim.Adam(self.parameters.values(), lr=config.learning_rate, fused=True)
        n_atoms, device = self.parameters["b_enc"].shape[0], self.parameters["b_enc"].device
        self.state = {
            "fired_at": torch.zeros(
                n_atoms, dtype=torch.int64, device=device
            ),  # step of each atom's last firing
            "dead": torch.zeros(0, dtype=torch.int64, device=device),
            "smallest": torch.zeros(RECENT, device=device),  # smallest kept values of the last batches
        }

    @property
    def weights(self) -> Weights:
        """The weights as they stand, in scaled units; W_enc [d, m] is a view."""
        return {name: p.T if name == "W_enc" else p for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, z: Tensor) -> Tensor:
        """One step of Adam on raw activations [batch, d_model]; returns the loss, a scalar.

        Raises:
            ActivationError: on a CPU, the loss is no longer finite; the weights are left as they were. (On a
                GPU nothing waits for the loss; `check_finite` finds out at the next measurement.)
        """
        learned = self._learn(z)
        if z.device.type == "cpu":
            self.check_finite(bool(learned.loss.isfinite()))
        self._note(learned)
        self._average()
        self._update()
        self.steps_done += 1
        return learned.loss

    def loss(self, z: Tensor) -> Tensor:
        """Loss of raw activations [batch, d_model], a scalar; nothing is changed."""
        return self._learn(z).loss

    def _learn(self, z: Tensor) -> Gradients:
        c, dead = self.config, self.state["dead"] if self.config.aux_k else None
        cpu = z.device.type == "cpu"  # a GPU takes no guess, and would be waited for
        guess = 0.8 * self.threshold if c.activation == "batchtopk" and cpu else 0.0
        return self.compute(z / self.scale, penalty(self.steps_done, c), guess, dead)

    @property
    def threshold(self) -> float:
        """BatchTopK: mean of the smallest kept value of the last batches, scaled; 0 before the first."""
        n = min(self.steps_done, RECENT)
        return float(self.state["smallest"][:n].mean()) if n else 0.0

    def _note(self, learned: Gradients) -> None:
        """Remember which atoms fired, and how low BatchTopK had to go."""
        values, atoms = learned.code.values, learned.code.atoms
        if self.config.activation == "batchtopk":
            above = torch.where(values > 0, values, torch.inf)
            lowest = above.amin() if len(values) else values.new_full((), torch.inf)
            if dist.is_initialized():
                dist.all_reduce(lowest, dist.ReduceOp.MIN)
            self.state["smallest"][self.steps_done % RECENT] = lowest.nan_to_num(posinf=0.0)
        if not self.config.aux_k:
            return
        fired_at = self.state["fired_at"]
        fired = torch.where(values > 0, self.steps_done + 1, 0)
        fired_at.scatter_reduce_(0, atoms, fired, "amax")
        if (self.steps_done + 1) % DEAD_STEPS == 0:
            if dist.is_initialized():
                dist.all_reduce(fired_at, dist.ReduceOp.MAX)
            since = (self.steps_done + 1 - fired_at) * self.config.batch
            self.state["dead"] = (since >= self.config.dead_tokens).nonzero().flatten()

    def _average(self) -> None:
        """The mean gradient over the processes of a torchrun, each of which had its share of the batch."""
        if dist.is_initialized():
            for gradient in self.compute.gradients.values():
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()

    def _update(self) -> None:
        """Adam's step, which leaves the decoder's rows unit; a GPU takes these in one pass over memory."""
        group, W_dec = self.adam.param_groups[0], self.parameters["W_dec"]
        group["lr"] = learning_rate(self.steps_done, self.config)
        kernels, gradient = sae_step.kernels_for(W_dec), self.compute.gradients["W_dec"]
        if not kernels:
            tangent(gradient, W_dec)
            self.adam.step()
            normalise(W_dec)
            return
        W_dec.grad = None  # so that torch's Adam passes it by
        self.adam.step()
        if not self.adam.state[W_dec]:
            self.adam.state[W_dec] |= {name: torch.zeros_like(W_dec) for name in ("exp_avg", "exp_avg_sq")}
        moments = [self.adam.state[W_dec][name] for name in ("exp_avg", "exp_avg_sq")]
        kernels.unit_adam(
            W_dec, gradient, *moments, self.steps_done + 1, group["lr"], group["betas"], group["eps"]
        )

    def check_finite(self, finite: bool | None = None) -> None:
        """Raise ActivationError unless all weights (or what was looked at) are finite."""
        if finite is None:
            finite = all(bool(w.isfinite().all()) for w in self.parameters.values())
        if not finite:
            raise ActivationError(
                f"expected finite numbers, got NaN or infinity after step {self.steps_done}; lower "
                "sae.learning_rate or look for outliers in the activations; the last good checkpoint is kept"
            )

    def exported(self) -> Weights:
        """The weights as they stand, for raw activations; `threshold` [m] with them where there is one."""
        weights = self.weights
        if self.config.activation == "batchtopk":
            weights["threshold"] = torch.full_like(weights["b_enc"], self.threshold)
        return exported(weights, self.scale)

    def save(self, folder: Path) -> None:
        """Write weights, Adam's moments, what was noted and measured; raises as `check_finite` does."""
        self.check_finite()
        tensors = {name: w.detach().contiguous() for name, w in self.parameters.items()}
        for name, w in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.adam.state[w][moment].contiguous()
        save_file(tensors | self.state, folder / "training.safetensors")
        facts = {"steps_done": self.steps_done, "scale": self.scale, "records": self.records}
        write_atomic(folder / "training.json", canonical_json(facts))

    @classmethod
    def load(
        cls, folder: Path, config: SaeConfig, device: str = "cpu", concepts: Tensor | None = None
    ) -> "Training":
        """Continue from what `save` wrote, bit for bit."""
        tensors = load_file(folder / "training.safetensors", device=device)
        facts = json.loads((folder / "training.json").read_text("utf-8"))
        names = [name.removeprefix("exp_avg.") for name in tensors if name.startswith("exp_avg.")]
        weights = {name: tensors[name].T if name == "W_enc" else tensors[name] for name in names}
        training = cls(weights, facts["scale"], config, concepts)
        training.steps_done, training.records = facts["steps_done"], facts["records"]
        training.state = {name: tensors[name] for name in training.state}
        for name, w in training.parameters.items():
            training.adam.state[w] = {
                "step": torch.tensor(float(training.steps_done), device=device),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
        return training


def tangent(gradient: Tensor, rows: Tensor, block: int = 2_048) -> None:
    """Drop, in place, the part of a gradient [m, d] that would change the rows' norms; rows are unit."""
    for g, w in zip(gradient.split(block), rows.split(block), strict=True):
        g.addcmul_(w, (g * w).sum(1, keepdim=True), value=-1)


def normalise(rows: Tensor, block: int = 2_048) -> None:
    """Scale rows [m, d] to norm 1, in place."""
    for w in rows.split(block):
        w /= w.norm(dim=1, keepdim=True)


def learning_rate(step: int, config: SaeConfig) -> float:
    """Learning rate of a 0-based step: a linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, round(WARM_UP * config.steps)))


def penalty(step: int, config: SaeConfig) -> float:
    """lambda of a 0-based step: rises linearly over the first `warm_up` of the steps."""
    full = {"relu": config.l1, "jumprelu": config.l0}.get(config.activation, 0.0)
    return full * min(1.0, (step + 1) / max(1, round(config.warm_up * config.steps)))
