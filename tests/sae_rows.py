"""Tokens in memory, random weights and dense codes; for the tests of SAE training."""

import numpy as np
import torch
from small_run import D_MODEL

from builders.recipe import SaeConfig

ACTIVATIONS = ("topk", "batchtopk", "relu", "jumprelu")
CONFIG = SaeConfig(n_atoms=37, k=3, steps=9, batch=17, eval_steps=4, checkpoint_steps=2, learning_rate=1e-2)


class Rows:
    """Tokens in memory."""

    def __init__(self, z: torch.Tensor, modality: torch.Tensor | None = None) -> None:
        self.z, self.d_model, self.modality = z, z.shape[1], modality

    def __len__(self) -> int:
        return len(self.z)

    def rows(self, index: np.ndarray) -> torch.Tensor:
        return self.z[torch.from_numpy(index)]

    def blocks(self, size: int):
        return iter(self.z.split(size))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(m: int = 37, d: int = D_MODEL, activation: str = "topk") -> dict[str, torch.Tensor]:
    """In float64; decoder rows are not unit."""
    weights = {
        "W_enc": draw(d, m, seed=1),
        "b_enc": draw(m, seed=2),
        "W_dec": draw(m, d, seed=3),
        "b_dec": draw(d, seed=4),
    }
    return weights | ({"log_threshold": 0.1 * draw(m, seed=5)} if activation == "jumprelu" else {})


def dense(code, m: int = 37) -> torch.Tensor:
    """A CSR code as [batch, m]."""
    out = torch.zeros(len(code.starts) - 1, m, dtype=code.values.dtype)
    token = torch.repeat_interleave(code.starts.diff())
    return out.index_put((token, code.atoms), code.values)
