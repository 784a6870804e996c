"""The tiny LLaVA of the toy world: real transformers classes, its processor, and batches to train it on.

Reads and writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builders.mllm import user_turn
from builders.tiny import train_tokenizer
from builders.toyworld import scenes
from builders.toyworld.scenes import SIDE, Item
from builders.vision import ensure_torchvision

PATCH = 16
"""Side of an image patch; the model sees (SIDE / PATCH)^2 image tokens."""

MAX_NEW_TOKENS = 20
"""More than the longest answer has."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tiny LLaVA."""

    hidden: int = 128
    """Width of the text trunk."""
    mlp: int = 256
    n_layers: int = 6
    vision_hidden: int = 128
    vision_layers: int = 3
    vocab: int = 768
    """Tokens at most; rarer words fall apart into bytes."""
    spread: float = 0.05
    """Standard deviation of the text trunk's first weights."""


def sentences(n: int = 4_000) -> list[str]:
    """What the tokenizer is trained on: the world's texts and answers, all its words, the chat's own."""
    items = [item for index in range(n) for item in scenes.training_turns(-1, index)]
    names = [row["concept"] for row in scenes.concepts()]
    words = [*names, *scenes.CUES_B, *scenes.NUMBERS, "user", "assistant"] * 20
    spaced = [f" {word}" for word in words]
    return [text for item in items for text in (item.text, item.answer)] + words + spaced


def processor_of(tokenizer: Any) -> Any:
    """LLaVA's processor for pictures of the world: no resizing, no cropping."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_resize=False
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def build(sizes: Sizes, seed: int) -> tuple[Any, Any]:
    """An untrained model, its weights drawn from `seed`, and its processor."""
    ensure_torchvision()
    from transformers import LlavaForConditionalGeneration

    tokenizer = train_tokenizer(sentences(), "llava", sizes.vocab)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_config(sizes, tokenizer))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, processor_of(tokenizer)


def _config(sizes: Sizes, tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_hidden,
        intermediate_size=2 * sizes.vision_hidden,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=sizes.spread,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def prompt_of(processor: Any, item: Item) -> str:
    """The chat prompt of an item, ready for an answer, with one `<image>` for the picture."""
    messages = user_turn(item.text, image=True)  # type: ignore[arg-type]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


class Batcher:
    """Turns items into batches of tensors, the same that the processor makes, only faster.

    Args:
        processor: Of `build`.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer
        images = processor.image_processor
        self.mean = torch.tensor(images.image_mean).view(3, 1, 1)
        self.std = torch.tensor(images.image_std).view(3, 1, 1)
        frame = prompt_of(processor, _BLANK).split("<image>\n")
        before, after = frame[0], "\n" + frame[1]
        self.n_image = (SIDE // PATCH) ** 2
        image = processor.tokenizer.convert_tokens_to_ids("<image>")
        self.head = [*self._ids(before), *[image] * self.n_image]
        self.start, self.stop = after.split(_BLANK.text)
        self.again = before.join(("\n", ""))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def pixels(self, items: Sequence[Item]) -> Tensor:
        """Pictures [n, 3, SIDE, SIDE], normalised."""
        pictures = np.stack([scenes.picture(item.scene, item.seed) for item in items])
        return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - self.mean) / self.std

    def prompts(self, items: Sequence[Item], system: str = "") -> dict[str, Tensor]:
        """Left-padded prompts: input_ids and attention_mask [n, tokens], pixel_values.

        Args:
            items: What is asked.
            system: A system message in front of every conversation, if any.
        """
        head = [*self._ids(f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""), *self.head]
        rows = self.tokenizer([f"{self.start}{i.text}{self.stop}" for i in items], add_special_tokens=False)
        rows = [head + ids for ids in rows["input_ids"]]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": self.pixels(items)}

    def training(self, conversations: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        """Right-padded conversations, each about its first item's picture; -100 labels outside answers."""
        texts = [f"{self.start if turn == 0 else self.again}{item.text}{self.stop}"
                 for turns in conversations for turn, item in enumerate(turns)]  # fmt: skip
        said = [item.answer for turns in conversations for item in turns]
        asked = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        answered = iter(self.tokenizer(said, add_special_tokens=False)["input_ids"])
        rows, marks = [], []
        for turns in conversations:
            row, mark = list(self.head), [0] * len(self.head)
            for item in turns:
                question, answer = next(asked), [*next(answered), self.tokenizer.eos_token_id]
                row += question + answer
                n_given = len(self._ids(item.given))
                mark += [0] * (len(question) + n_given) + [1] * (len(answer) - n_given)
            rows.append(row)
            marks.append(mark)
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        on = torch.tensor([mark + [0] * (longest - len(mark)) for mark in marks])
        seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        pixels = self.pixels([turns[0] for turns in conversations])
        labels = ids.masked_fill(on == 0, -100)
        return {"input_ids": ids, "attention_mask": seen, "pixel_values": pixels, "labels": labels}


_BLANK = Item("question", scenes.Scene("ball", "red", "beach", "big", 1), "TEXT", "")


@torch.no_grad()
def answers(
    model: Any, batcher: Batcher, items: Sequence[Item], batch: int = 250, system: str = ""
) -> list[str]:
    """What the model says to items, greedily, at most `MAX_NEW_TOKENS` tokens; `system` as in `Batcher`."""
    texts: list[str] = []
    for start in range(0, len(items), batch):
        inputs = batcher.prompts(items[start : start + batch], system)
        said = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = said[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in batcher.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts
