"""Tiny random multimodal models of real transformers classes, to try things out and to test; writes nothing.

Classes, processors and chat format are the real ones, so whatever works here meets the same shapes, token
layouts and hooks as at 7B. The weights are random: such a model can be read and steered, but says nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from builders.vision import ensure_torchvision

KINDS = ("llava", "qwen2_5_vl", "internvl")

IMAGE_SIZE = 32
"""Side in pixels of the square that LLaVA and InternVL see; Qwen keeps the aspect, 32^2 to 64^2 pixels."""

PATCH_SIZE = 8

_CONTROL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
_IMAGE_TEXT = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}
_EXTRA_TOKENS = {
    "llava": {"image_token": "<image>"},
    "qwen2_5_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_mllm(
    kind: str,
    captions: Sequence[str],
    *,
    seed: int = 0,
    hidden: int = 32,
    n_layers: int = 4,
    vision_layers: int = 2,
    vocab: int = 389,
) -> tuple[Any, Any]:
    """Build a tiny model and its processor; both `save_pretrained` and load again through the Auto classes.

    Args:
        kind: `llava`, `qwen2_5_vl` or `internvl`.
        captions: texts the tokenizer is trained on; any other text tokenizes too (byte level).
        seed: of the weights.
        hidden: width of the text trunk, a multiple of 32.
        n_layers: decoder blocks of the text trunk.
        vision_layers: blocks of the vision tower.
        vocab: size of the vocabulary at most, at least 272 (256 bytes and the special tokens).

    Returns:
        The model in float32 and eval mode, and its processor.

    Raises:
        ValueError: `kind`, `hidden` or `vocab` is none of the above.
    """
    _check(kind, hidden, vocab)
    ensure_torchvision()
    tokenizer = train_tokenizer(captions, kind, vocab)
    sizes = {"hidden": hidden, "n_layers": n_layers, "vision_layers": vision_layers}
    config = {"llava": _llava_config, "qwen2_5_vl": _qwen_config, "internvl": _internvl_config}[kind]
    processor = {"llava": _llava_processor, "qwen2_5_vl": _qwen_processor, "internvl": _internvl_processor}[
        kind
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config(tokenizer, **sizes), dtype=torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval(), processor(tokenizer)


def train_tokenizer(captions: Sequence[str], kind: str, vocab: int) -> Any:
    """A byte-level BPE tokenizer with the special tokens of a model kind; same captions, same vocabulary."""
    special = [*_CONTROL, *_EXTRA_TOKENS[kind].values()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=4096,
        extra_special_tokens=_EXTRA_TOKENS[kind],
    )
    tokenizer.chat_template = _CHAT_TEMPLATE.replace("IMAGE", _IMAGE_TEXT[kind])
    return tokenizer


def _check(kind: str, hidden: int, vocab: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if hidden < 32 or hidden % 32:
        raise ValueError(f"hidden: expected a multiple of 32, got {hidden}")
    if vocab < 272:
        raise ValueError(f"vocab: expected at least 272 (256 bytes and the special tokens), got {vocab}")


def _text_sizes(tokenizer: Any, hidden: int, n_layers: int) -> dict[str, Any]:
    """What the text configs share; weights are drawn wide enough that blocks really change the stream."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden + 5,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": hidden**-0.5,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision_sizes(hidden: int) -> dict[str, Any]:
    width = hidden * 3 // 4  # not the trunk's, so that a mix-up of the two cannot pass
    return {"hidden_size": width, "intermediate_size": width + 5, "initializer_range": width**-0.5}


def _llava_config(tokenizer: Any, hidden: int, n_layers: int, vision_layers: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        **_vision_sizes(hidden),
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text_sizes(tokenizer, hidden, n_layers)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )


def _llava_processor(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _qwen_config(tokenizer: Any, hidden: int, n_layers: int, vision_layers: int) -> Any:
    from transformers import Qwen2_5_VLConfig

    half = hidden // 8  # half a head's width, shared out to time, height and width
    rope = {"rope_type": "default", "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}
    vision = {
        **_vision_sizes(hidden),
        "depth": vision_layers,
        "num_heads": 2,
        "patch_size": PATCH_SIZE,
        "out_hidden_size": hidden,
        "window_size": 4 * PATCH_SIZE,
        "fullatt_block_indexes": [vision_layers - 1],
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**_text_sizes(tokenizer, hidden, n_layers), "rope_parameters": rope},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def _qwen_processor(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    pixels = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": (2 * IMAGE_SIZE) ** 2}
    images = Qwen2VLImageProcessor(size=dict(pixels), patch_size=PATCH_SIZE)
    videos = Qwen2VLVideoProcessor(size=dict(pixels), patch_size=PATCH_SIZE)
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def _internvl_config(tokenizer: Any, hidden: int, n_layers: int, vision_layers: int) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        **_vision_sizes(hidden),
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_text_sizes(tokenizer, hidden, n_layers)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE // 2) ** 2,
        tie_word_embeddings=False,
    )


def _internvl_processor(tokenizer: Any) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = GotOcr2ImageProcessor(size=dict(size), crop_to_patches=True, min_patches=1, max_patches=2)
    return InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(size=dict(size)),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE // 2) ** 2,
        chat_template=tokenizer.chat_template,
    )
