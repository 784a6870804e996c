"""Asks a model the items of a suite, in batches; reads the items' pictures, writes nothing.

Answers are greedy. Pictures stand before the text of the user's turn, in their order, whatever markers the
text has. What spells a control token in a text is broken up (`daco.prompts`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jinja2.exceptions import TemplateError
from PIL.Image import Image

from builders.answers import generated_ids
from builders.safety.items import Item
from daco.errors import UnsupportedModelError
from daco.methods import SafetyPrompt
from daco.prompts import chat_inputs, turn

GREEDY: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""What a model's own settings of generation may change, put back to plain greedy decoding."""


class Pace:
    """Sees when the first token of a batch came and how many forwards followed; stops nothing.

    Args:
        clock: Seconds, once the device has done what it was given.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.first, self.steps = clock, 0.0, -1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called after each token."""
        self.steps += 1
        if not self.steps:
            self.first = self.clock()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Answer(NamedTuple):
    """What a model said to an item."""

    text: str | None
    """The answer; None where it was not asked."""
    n_tokens: int
    """Tokens that were generated, without the end."""
    cut: bool
    """Whether it is as long as answers may be."""
    trouble: str
    """Why it was not asked; empty where it was."""


class Asked(NamedTuple):
    """Items whose pictures could be opened, and what is wrong with the others."""

    rows: list[int]
    """Which of the items can be asked."""
    pictures: list[list[Image]]
    """Theirs."""
    trouble: dict[int, str]
    """Why the others cannot."""


def opened(items: Sequence[Item]) -> Asked:
    """The pictures of items; one that cannot be read leaves its item out."""
    found = Asked([], [], {})
    for row, item in enumerate(items):
        try:
            pictures = [picture.open() for picture in item.pictures]
        except Exception as error:  # Pillow's plug-ins agree on no class
            found.trouble[row] = f"unreadable picture: {type(error).__name__}"
            continue
        found.rows.append(row)
        found.pictures.append(pictures)
    return found


def conversation(processor: Any, item: Item, prompt: SafetyPrompt | None) -> list[dict[str, Any]]:
    """An item as a conversation of one user turn, behind the safety prompt where there is one."""
    turns = [turn(processor, "user", item.prompt, len(item.pictures))]
    return prompt.apply(turns) if prompt else turns


def inputs_of(
    processor: Any, items: Sequence[Item], pictures: Sequence[list[Image]], prompt: SafetyPrompt | None
) -> Any:
    """Model inputs of items, left-padded.

    Raises:
        UnsupportedModelError: the model's chat template cannot render them (some take no system message).
    """
    try:
        turns = [conversation(processor, item, prompt) for item in items]
        return chat_inputs(processor, turns, pictures)
    except TemplateError as error:
        what = "a system message" if prompt else "one user turn"
        raise UnsupportedModelError(
            f"expected a chat template that takes {what}, got {error}; leave the method out"
        ) from error


@torch.no_grad()
def ask(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    pictures: Sequence[list[Image]],
    max_answer: int,
    prompt: SafetyPrompt | None = None,
    pace: Pace | None = None,
) -> list[Answer]:
    """Greedy answers to one batch of items; one that the model's window does not hold is not asked.

    Args:
        model: The MLLM, steered or not.
        processor: Its processor.
        items: One a row.
        pictures: Theirs, opened.
        max_answer: Tokens of an answer, at most.
        prompt: A safety prompt in front.
        pace: Sees when tokens come.
    """
    inputs = inputs_of(processor, items, pictures, prompt)
    trouble = too_long(model, inputs["attention_mask"].sum(1).tolist(), max_answer)
    answers = [Answer(None, 0, False, why) for why in trouble]
    rows = [row for row, why in enumerate(trouble) if not why]
    if rows and len(rows) < len(items):
        inputs = inputs_of(processor, [items[row] for row in rows], [pictures[row] for row in rows], prompt)
    if rows:
        watched = {"stopping_criteria": [pace]} if pace else {}
        said = generated_ids(model, processor, inputs.to(model.device), max_answer, **GREEDY, **watched)
        texts = processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        for row, text, ids in zip(rows, texts, said, strict=True):
            answers[row] = Answer(text.strip(), len(ids), len(ids) >= max_answer, "")
    return answers


def too_long(model: Any, n_tokens: Sequence[int], max_answer: int) -> list[str]:
    """Why a window does not hold prompts of so many tokens with an answer; empty where it does."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return [
        f"longer than the model reads: {n} + {max_answer} tokens, {window} at most"
        if window is not None and n + max_answer > window
        else ""
        for n in n_tokens
    ]


def batches(items: Sequence[Item], size: int) -> list[list[int]]:
    """Numbers of the items of each batch: those of like length and as many pictures together.

    Some models take pictures in all rows of a batch or in none, and padding costs time.
    """
    found: list[list[int]] = []
    for n_pictures in sorted({len(item.pictures) for item in items}):
        rows = [row for row, item in enumerate(items) if len(item.pictures) == n_pictures]
        rows.sort(key=lambda row: (len(items[row].prompt), row))
        found += [rows[start : start + size] for start in range(0, len(rows), size)]
    return found
