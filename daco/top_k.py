"""The TopK activation: the k largest of each row stay, or some columns of what it gives; no files."""

from typing import Any

import torch
from torch import Tensor

from daco.kernels import kernels_of


def top_k(pre: Tensor, k: int) -> Tensor:
    """ReLU, then the `k` largest of the last axis, the rest zero; ties go to the lower index.

    Args:
        pre: Pre-activations `[..., n_atoms]`.
        k: How many stay.

    Returns:
        `[..., n_atoms]`, at most `k` non-zero on the last axis.
    """
    pre = pre.relu()
    values = pre.topk(k, dim=-1).values
    kth = values[..., -1:]
    above, ties = pre > kth, pre == kth
    room = (values == kth).sum(-1, keepdim=True)
    return torch.where(above | (ties & (ties.cumsum(-1) <= room)), pre, 0)


def top_k_at(pre: Tensor, k: int, at: Tensor) -> Tensor:
    """The columns `at` of `top_k(pre, k)`: on a GPU by one kernel where Triton works.

    Args:
        pre: Pre-activations `[n, n_atoms]`.
        k: How many stay of each row.
        at: Columns, `[w]` int64.

    Returns:
        `[n, w]`.
    """
    if not pre.is_cuda or (torch.is_grad_enabled() and pre.requires_grad):
        return top_k(pre, k).index_select(-1, at)
    if torch.compiler.is_compiling():  # a compiler need not look into it
        found: Tensor = _as_operator(pre, k, at)
        return found
    return _on_gpu(pre, k, at)


def kernels_for(x: Tensor) -> Any:
    """The kernel that looks up columns where x lies; None: torch does."""
    if x.device.type != "cuda":
        return None
    return kernels_of("daco.top_k_kernels", "atoms are chosen")


def _on_gpu(pre: Tensor, k: int, at: Tensor) -> Tensor:
    kernels = kernels_for(pre)
    if kernels is None or pre.dtype not in kernels.DTYPES or pre.shape[-1] > kernels.WIDEST:
        return top_k(pre, k).index_select(-1, at)
    found: Tensor = kernels.top_k_at(pre, k, at)
    return found


@torch.library.custom_op("daco::top_k_at", mutates_args=())
def _as_operator(pre: Tensor, k: int, at: Tensor) -> Tensor:
    return _on_gpu(pre, k, at)


@_as_operator.register_fake
def _(pre: Tensor, k: int, at: Tensor) -> Tensor:
    return pre.new_empty(pre.shape[0], at.shape[0])  # len() would make a compiler compile for each length
