"""Cross-entropy recovered: how much of what a model would say is left when a layer passes through its SAE.

Reads and writes nothing; the `evaluate` stage calls it on held-out stimuli. A layer's output is left as it
is, replaced by its reconstruction, and replaced by zeros; all three predict the answers that the untouched
model gives. Those it knows, whatever it was trained on: of users' texts a chat model may know little.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from builders.answers import answer_kinds, generated_ids, with_answers
from builders.attention import without_plans
from builders.tokens import MODALITIES
from daco.capture import block_output
from daco.errors import ActivationError
from daco.sae import SAE
from daco.sites import site

ANSWER = 16
"""Tokens of an answer, at most."""


class Spliced(NamedTuple):
    """What a model loses on some tokens when a layer's output is replaced: sums over them, in nats."""

    tokens: int
    """Tokens that were predicted."""
    ce: float
    """Cross-entropy of the model as it is."""
    ce_spliced: float
    """With the reconstruction in the place of the activation."""
    ce_ablated: float
    """With zeros there."""


def recovered(parts: Iterable[Spliced]) -> dict[str, float | int | None]:
    """Cross-entropies in nats a token over all parts, and the share recovered.

    Returns:
        `ce_tokens`, `ce`, `ce_spliced`, `ce_ablated` and `ce_recovered`, the share of what zeros lose that
        the reconstruction keeps (below 0: worse than zeros); None where there are no tokens, or where zeros
        lose nothing, as in a model that has learnt nothing.
    """
    n, *sums = (sum(column) for column in zip(Spliced(0, 0.0, 0.0, 0.0), *parts, strict=True))
    names = Spliced._fields[1:]
    if not n:
        return {"ce_tokens": 0} | dict.fromkeys((*names, "ce_recovered"))
    whole, spliced, ablated = (total / n for total in sums)
    share = (ablated - spliced) / (ablated - whole) if ablated > whole else None
    means = dict(zip(names, (whole, spliced, ablated), strict=True))
    return {"ce_tokens": n, **means, "ce_recovered": share}


@torch.no_grad()
def answered(model: Any, processor: Any, inputs: Any, at_most: int = ANSWER) -> tuple[dict[str, Any], Tensor]:
    """A batch with the model's own greedy answers behind it, and labels: the answers' tokens, -100 elsewhere.

    Args:
        model: The MLLM.
        processor: Its processor.
        inputs: Of `builders.mllm.chat_inputs`, on the model's device.
        at_most: Tokens of an answer.

    Returns:
        Inputs and labels [batch, tokens], as `splice` takes them.
    """
    said = generated_ids(model, processor, inputs, at_most)
    whole = with_answers(dict(inputs), said, processor.tokenizer.pad_token_id or 0)
    kinds = answer_kinds(model, whole["input_ids"].cpu(), [len(ids) for ids in said])
    of_answer = (kinds == MODALITIES.index("generated")).to(whole["input_ids"].device)
    return whole, whole["input_ids"].masked_fill(~of_answer, -100)


@torch.no_grad()
@without_plans()
def splice(
    model: Any, inputs: Mapping[str, Any], labels: Tensor, saes: Mapping[int, SAE]
) -> dict[int, Spliced]:
    """Cross-entropy of a batch with one layer's output at a time as it is, reconstructed, and zero.

    Args:
        model: The MLLM.
        inputs: Its inputs.
        labels: [batch, tokens] as `input_ids`, -100 where a token does not count (image, prompt, padding).
        saes: By 0-based decoder block, for raw activations, on the model's device.

    Returns:
        By layer, sums in nats.

    Raises:
        ActivationError: a cross-entropy is NaN or infinite.
    """
    counted = (labels[:, 1:] != -100).any(0).nonzero().flatten()
    if not len(counted):
        return {layer: Spliced(0, 0.0, 0.0, 0.0) for layer in saes}
    n_last = labels.shape[1] - int(counted[0])  # a vocabulary of logits for every image token is gigabytes
    n = int((labels[:, 1:] != -100).sum())

    def loss(layer: int, replace: Callable[[Tensor], Tensor] | None) -> float:
        with _replaced(site(model, layer), replace) if replace else nullcontext():
            logits = model(**inputs, logits_to_keep=n_last).logits
        targets = labels[:, -n_last:][:, 1:].flatten()
        rows = logits[:, :-1].flatten(0, 1)[targets != -100].float()
        return float(F.cross_entropy(rows, targets[targets != -100], reduction="sum"))

    whole = loss(min(saes), None)
    found = {
        layer: Spliced(n, whole, loss(layer, sae), loss(layer, torch.zeros_like))
        for layer, sae in saes.items()
    }
    _check_finite(found)
    return found


def _check_finite(found: Mapping[int, Spliced]) -> None:
    for layer, part in found.items():
        if bad := [name for name, value in part._asdict().items() if not math.isfinite(value)]:
            raise ActivationError(
                f"expected finite cross-entropies, got {bad[0]} = {getattr(part, bad[0])} at layer {layer}; "
                "try model.dtype = 'bfloat16' or 'float32'"
            )


@contextmanager
def _replaced(block: torch.nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The block's output goes through `replace`; nothing is left behind."""

    def hook(module: Any, given: Any, output: Any) -> Any:
        z = block_output(output)
        new = replace(z.float()).to(z.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
