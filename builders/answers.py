"""One forward of the frozen MLLM over prompts with answers, given or its own: tokens for the SAEs.

Reads and writes nothing. The answer stands where the model's own turn begins, token by token as if it had
been generated: the prompt's tokens never change with it, and its own count as `generated`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from builders.attention import without_plans
from builders.forward import Read, forward_tokens, special_ids
from builders.mllm import chat_inputs
from builders.tokens import MODALITIES
from daco.prompts import plain_text
from daco.sites import image_token_ids


@torch.no_grad()
def read_answers(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Image] | None,
    answers: Sequence[str] | None,
    layers: Sequence[int],
    max_answer: int,
) -> Read:
    """Forward a batch of prompts with their answers, stopping after the last layer needed.

    Args:
        model: The MLLM.
        processor: Its processor.
        prompts: Texts of the user's turns.
        images: One a prompt, or None for text alone.
        answers: One a prompt; None: the model answers first, greedily.
        layers: Decoder blocks whose output is read, rising.
        max_answer: Tokens of an answer, at most.

    Raises:
        ActivationError: an activation is NaN or infinite.
    """
    inputs = chat_inputs(processor, prompts, images).to(model.device)
    if answers is None:
        said = generated_ids(model, processor, inputs, max_answer)
    else:
        said = answer_ids(processor, answers, max_answer)
    whole = with_answers(dict(inputs), said, processor.tokenizer.pad_token_id or 0)
    kinds = answer_kinds(model, whole["input_ids"].cpu(), [len(ids) for ids in said])
    return forward_tokens(model, processor, whole, kinds, layers)


def answer_ids(processor: Any, answers: Sequence[str], at_most: int) -> list[Tensor]:
    """Tokens of given answers, a tensor each; what spells a control token in them is broken up."""
    texts = [plain_text(processor, text) for text in answers]
    rows = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [torch.tensor(row[:at_most], dtype=torch.int64) for row in rows]


@without_plans()
def generated_ids(model: Any, processor: Any, inputs: Any, at_most: int, **settings: Any) -> list[Tensor]:
    """Tokens of the model's own greedy answers, a tensor each, without what ends them.

    Special tokens that end nothing are never generated: an image's placeholder would ask for an image.

    Args:
        model: The MLLM.
        processor: Its processor.
        inputs: Of the prompts, on the model's device.
        at_most: Tokens of an answer, at most.
        settings: Further ones of `generate`, in place of the model's own.
    """
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    never = sorted((special_ids(model, processor) | set(image_token_ids(model))) - ends)
    options: dict[str, Any] = {
        "max_new_tokens": at_most,
        "do_sample": False,
        "suppress_tokens": never,
    } | settings
    whole = model.generate(**inputs, **options)
    rows = whole[:, inputs["input_ids"].shape[1] :].cpu()
    over = torch.isin(rows, torch.tensor(sorted(ends), dtype=rows.dtype)).int().cumsum(1) > 0
    return [row[~gone] for row, gone in zip(rows, over, strict=True)]


def with_answers(inputs: dict[str, Any], answers: Sequence[Tensor], pad: int) -> dict[str, Any]:
    """Model inputs of prompts as those of prompts with answers, padded on the left again.

    Args:
        inputs: Of `builders.mllm.chat_inputs`.
        answers: Tokens, a tensor a row.
        pad: Id of the padding token.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    whole = dict(inputs)
    for name, x in inputs.items():
        if x.shape != ids.shape or x.is_floating_point():
            continue  # pixels and the like: not one number a token
        of_answer = {"input_ids": answers, "attention_mask": [torch.ones_like(a) for a in answers]}
        tails = of_answer.get(name) or [torch.zeros_like(a) for a in answers]
        rows = [torch.cat([row[m], a.to(row)]) for row, m, a in zip(x, mask, tails, strict=True)]
        fill = pad if name == "input_ids" else 0
        whole[name] = pad_sequence(rows, batch_first=True, padding_value=fill, padding_side="left")
    return whole


def answer_kinds(model: Any, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """What each token belongs to, [batch, tokens] uint8: to the image, the prompt or the answer behind it.

    Args:
        model: The MLLM.
        input_ids: [batch, tokens], padded on the left.
        lengths: Tokens of each answer.
    """
    image, prompt, generated = (MODALITIES.index(name) for name in ("image", "prompt", "generated"))
    kinds = torch.full(input_ids.shape, prompt, dtype=torch.uint8)
    kinds[torch.isin(input_ids, torch.tensor(sorted(image_token_ids(model))))] = image
    for row, n in zip(kinds, lengths, strict=True):
        row[len(row) - n :] = generated
    return kinds
