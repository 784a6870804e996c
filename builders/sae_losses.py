"""The four sparse autoencoders as their papers write them: dense, differentiated by autograd, easy to check.

Reads and writes nothing. `builders.sae_step` computes the same losses and gradients fast; the tests compare.
Everything is in the units that are trained on: activations divided by their scale.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from builders.recipe import SaeConfig
from daco.top_k import top_k

Weights = dict[str, Tensor]
"""W_enc [d, m], b_enc [m], W_dec [m, d], b_dec [d]; JumpReLU also log_threshold [m]."""


def pre_activations(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """`(x - b_dec) W_enc + b_enc`, [batch, d] -> [batch, m]."""
    return (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]


def batch_top_k(pre: Tensor, k: int) -> Tensor:
    """The `k * batch` largest of a whole batch, where they are above zero; some tokens get more than others.

    Source: Bussmann et al., BatchTopK Sparse Autoencoders (arXiv 2412.06410).
    """
    kept = pre.relu().flatten()
    chosen = kept.topk(k * len(pre)).indices
    return torch.zeros_like(kept).index_copy(0, chosen, kept[chosen]).view_as(pre)


class _Jump(torch.autograd.Function):
    """`pre * H(pre - threshold)`; the step's derivative is that of a ramp as wide as the bandwidth."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype) / ctx.bandwidth
        return slopes[0] * (pre > threshold), (-threshold * near * slopes[0]).sum(0), None


class _Count(torch.autograd.Function):
    """`H(pre - threshold)`, whose only gradient is the threshold's."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype) / ctx.bandwidth
        return None, (-near * slopes[0]).sum(0), None


jump_relu: Callable[[Tensor, Tensor, float], Tensor] = _Jump.apply
"""JumpReLU with straight-through gradients for its threshold (arXiv 2407.14435, Eq. 11)."""
count_above: Callable[[Tensor, Tensor, float], Tensor] = _Count.apply
"""Active atoms, 0 or 1 each (arXiv 2407.14435, Eq. 12)."""


def code_of(x: Tensor, weights: Mapping[str, Tensor], config: SaeConfig) -> Tensor:
    """The code of a batch in training, [batch, m]."""
    pre = pre_activations(x, weights)
    if config.activation == "relu":
        return pre.relu()
    if config.activation == "topk":
        return top_k(pre, config.k)
    if config.activation == "batchtopk":
        return batch_top_k(pre, config.k)
    return jump_relu(pre, weights["log_threshold"].exp(), config.bandwidth)


def loss_of(x: Tensor, weights: Mapping[str, Tensor], config: SaeConfig, penalty: float) -> Tensor:
    """Mean over tokens of `||x - x^||^2` and, where the activation has one, the price of being active.

    Args:
        x: [batch, d], scaled.
        weights: See `Weights`.
        config: Activation, k, bandwidth.
        penalty: lambda as it stands at this step. ReLU: of `sum_i c_i ||W_dec[i]||`; JumpReLU: of the number
            of active atoms; the other two pay nothing.

    Returns:
        A scalar.
    """
    code = code_of(x, weights, config)
    squared = (x - code @ weights["W_dec"] - weights["b_dec"]).square().sum(-1)
    if config.activation == "relu":
        squared = squared + penalty * code @ weights["W_dec"].norm(dim=1)
    if config.activation == "jumprelu":
        active = count_above(pre_activations(x, weights), weights["log_threshold"].exp(), config.bandwidth)
        squared = squared + penalty * active.sum(-1)
    return squared.mean()


def aux_loss(residual: Tensor, centred: Tensor, dead: Mapping[str, Tensor], k: int) -> Tensor:
    """AuxK: dead atoms model what the live ones leave over; their encoder and decoder both learn from it.

    Args:
        residual: [batch, d], `x - x^`; no gradient goes there.
        centred: [batch, d], `x - b_dec`; likewise.
        dead: W_enc [n, d] (rows), b_enc [n], W_dec [n, d] of the dead atoms.
        k: How many of them may be active a token.

    Returns:
        A scalar, mean over tokens of `||residual - residual^||^2`. The paper takes it as a share of the
        residual (and the loss as a share of the activations): `residual_unit` makes it so.

    Source: Gao et al., Scaling and evaluating sparse autoencoders (arXiv 2406.04093), appendix A.2.
    """
    pre = centred.detach() @ dead["W_enc"].T + dead["b_enc"]
    values, atoms = pre.relu().topk(min(k, pre.shape[1]), dim=-1)
    code = torch.zeros_like(pre).scatter(1, atoms, values)
    return (residual.detach() - code @ dead["W_dec"]).square().sum(-1).mean()


def residual_unit(residual: Tensor, centred: Tensor) -> Tensor:
    """Size of the centred activations over that of the residual, of the whole batch of all processes."""
    sizes = torch.stack([centred.square().sum(), residual.square().sum().clamp_min(1e-30)])
    if dist.is_initialized():
        dist.all_reduce(sizes)
    return sizes[0] / sizes[1]


def geometric_median(x: Tensor, iterations: int = 50, epsilon: float = 1e-6) -> Tensor:
    """The point [d] with the least sum of distances to the rows of x [n, d], by Weiszfeld's iterations."""
    x = x.double()
    point = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - point).norm(dim=1).clamp_min(epsilon)
        point = (weight[:, None] * x).sum(0) / weight.sum()
    return point
