"""The table of tested architectures: tiny configs of real classes, and inputs of the shapes they are given.

A new architecture is a row of `MULTIMODAL` or `TEXT`. Widths are odd and differ between the trunk and the
vision tower, which has as many blocks as the trunk: a mix-up of the two cannot pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCAB, WIDTH, N_LAYERS = 99, 32, 4
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 90, 91, 92, 93
SIDE, PATCH = 32, 8

IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
TRUNK = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": WIDTH**-0.5,
    **IDS,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 24**-0.5,
}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_VISION = {
    "depth": N_LAYERS,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": WIDTH,
    "initializer_range": 24**-0.5,
}
_HEAD = {**TRUNK, "head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "intermediate_size": 36}
"""Widths that the product of expert groups takes: rows of 16 bytes."""
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
WIDE = [[32, 64], [64, 32]]


class Family(NamedTuple):
    """One architecture."""

    name: str
    """As people call it."""
    config: str
    """Config class of transformers."""
    layers: str
    """Where its decoder blocks are, by its source code; DACO's own finder is not asked."""
    text: dict[str, Any] = {}  # noqa: RUF012
    """Of the text config; of the config itself where `image_tokens` is 0."""
    vision: dict[str, Any] = {}  # noqa: RUF012
    """Of the vision config."""
    whole: dict[str, Any] = {}  # noqa: RUF012
    """Of the config that holds the two."""
    image_tokens: int = 0
    """Placeholders an image takes in the prompt."""
    pixels: tuple[int, ...] = ()
    """Shape of `pixel_values` of one image."""
    sizes: dict[str, list[int]] = {}  # noqa: RUF012
    """What else goes with an image, such as its size or grid."""
    marks: str = ""
    """Name of the input that is 1 where the token is a placeholder, if it takes one."""
    by_row: bool = False
    """Whether pixels are `[batch, images, ...]`, padded with empty images, not `[images, ...]`."""
    dtype: torch.dtype = torch.float64
    """Of the model; the SAE is float64."""
    tolerance: float = 1e-8
    """Of logits."""


def _llava(name: str, config: str, **more: Any) -> Family:
    row = {"text": TRUNK, "vision": VISION, "whole": {"image_token_index": IMAGE}, "image_tokens": 16}
    return Family(name, config, "model.language_model.layers", **(row | {"pixels": (3, SIDE, SIDE)} | more))


MULTIMODAL = (
    _llava("LLaVA-1.5", "LlavaConfig", vision={**VISION, "model_type": "clip_vision_model"}),
    _llava(
        "LLaVA-NeXT",
        "LlavaNextConfig",
        text={**TRUNK, "model_type": "mistral"},
        vision={**VISION, "model_type": "clip_vision_model"},
        whole={"image_token_index": IMAGE, "image_grid_pinpoints": WIDE},
        image_tokens=16 + 4 * (8 + 1),
        pixels=(3, 3, SIDE, SIDE),
        sizes={"image_sizes": [32, 64]},
    ),
    _llava(
        "LLaVA-OneVision",
        "LlavaOnevisionConfig",
        vision=SIGLIP,
        whole={"image_token_index": IMAGE, "video_token_index": VIDEO, "image_grid_pinpoints": WIDE},
        image_tokens=16 + 4 * (8 + 1),
        pixels=(3, 3, SIDE, SIDE),
        sizes={"image_sizes": [32, 64]},
    ),
    _llava(
        "Qwen2-VL",
        "Qwen2VLConfig",
        text={**TRUNK, "rope_parameters": MROPE},
        vision={
            "depth": N_LAYERS,
            "embed_dim": 24,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": PATCH,
        },
        whole=QWEN_IDS,
        image_tokens=4,
        pixels=(16, 3 * 2 * PATCH**2),
        sizes={"image_grid_thw": [1, 4, 4]},
        marks="mm_token_type_ids",
    ),
    _llava(
        "Qwen2.5-VL",
        "Qwen2_5_VLConfig",
        text={**TRUNK, "rope_parameters": MROPE},
        vision={**QWEN_VISION, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]},
        whole=QWEN_IDS,
        image_tokens=8,
        pixels=(32, 3 * 2 * PATCH**2),
        sizes={"image_grid_thw": [1, 4, 8]},
        marks="mm_token_type_ids",
    ),
    _llava(
        "Qwen3-VL",
        "Qwen3VLConfig",
        text={**TRUNK, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
        whole=QWEN_IDS,
        image_tokens=8,
        pixels=(32, 3 * 2 * PATCH**2),
        sizes={"image_grid_thw": [1, 4, 8]},
        marks="mm_token_type_ids",
    ),
    _llava(
        "InternVL",
        "InternVLConfig",
        text={**TRUNK, "model_type": "qwen2"},
        whole={"image_token_id": IMAGE, "image_seq_length": 4},
        image_tokens=4,
    ),
    _llava(
        "Gemma 3",
        "Gemma3Config",
        text={
            **TRUNK,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
        vision=SIGLIP,
        whole={"image_token_index": IMAGE, "mm_tokens_per_image": 4},
        image_tokens=4,
        marks="token_type_ids",
    ),
    _llava(
        "Idefics3",
        "Idefics3Config",
        text={**TRUNK, "model_type": "llama"},
        whole={"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": PAD},
        image_tokens=4,
        by_row=True,
    )._replace(layers="model.text_model.layers"),
    _llava(
        "SmolVLM",
        "SmolVLMConfig",
        text={**TRUNK, "model_type": "llama"},
        whole={"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": PAD},
        image_tokens=4,
        by_row=True,
    )._replace(layers="model.text_model.layers"),
    _llava(
        "Mistral 3",
        "Mistral3Config",
        text={**TRUNK, "model_type": "mistral", "head_dim": 8},
        vision={**VISION, "model_type": "pixtral", "image_size": 64, "head_dim": 12},
        whole={"image_token_index": IMAGE, "spatial_merge_size": 2},
        image_tokens=8,
        pixels=(3, SIDE, 2 * SIDE),
        sizes={"image_sizes": [32, 64]},
    ),
    _llava(
        "PaliGemma",
        "PaliGemmaConfig",
        text={**_HEAD, "model_type": "gemma"},
        vision={**SIGLIP, "projection_dim": WIDTH},
        whole={"image_token_index": IMAGE, "projection_dim": WIDTH},
        marks="token_type_ids",
    ),
    _llava(
        "Aya Vision",
        "AyaVisionConfig",
        text={**_HEAD, "model_type": "cohere2", "sliding_window": 6},
        vision=SIGLIP,
        whole={"image_token_index": IMAGE, "downsample_factor": 2, "alignment_intermediate_size": 36},
        image_tokens=4,
    ),
    _llava(
        "GLM-4.1V",
        "Glm4vConfig",
        text={**TRUNK, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        vision={**QWEN_VISION, "image_size": SIDE},
        whole={**QWEN_IDS, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END},
        image_tokens=8,
        pixels=(32, 3 * 2 * PATCH**2),
        sizes={"image_grid_thw": [1, 4, 8]},
        marks="mm_token_type_ids",
    ),
    _llava(
        "Qwen3-VL-MoE",
        "Qwen3VLMoeConfig",
        text={**_HEAD, **MOE, "num_experts": 4, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
        whole=QWEN_IDS,
        image_tokens=8,
        pixels=(32, 3 * 2 * PATCH**2),
        sizes={"image_grid_thw": [1, 4, 8]},
        marks="mm_token_type_ids",
        dtype=torch.float32,  # torch has no float64 product of expert groups
        tolerance=1e-4,
    ),
    _llava(
        "Qwen3.5",
        "Qwen3_5Config",
        text={
            **_HEAD,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        },
        vision={**QWEN_VISION, "num_position_embeddings": 16},
        whole=QWEN_IDS,
        image_tokens=8,
        pixels=(32, 3 * 2 * PATCH**2),
        sizes={"image_grid_thw": [1, 4, 8]},
        marks="mm_token_type_ids",
        tolerance=1e-4,  # its linear attention is float32: by chunks in a prompt, token by token behind it
    ),
)

TEXT = (
    Family("Llama", "LlamaConfig", "model.layers", TRUNK),
    Family("Qwen2", "Qwen2Config", "model.layers", TRUNK),
    Family("Qwen3", "Qwen3Config", "model.layers", _HEAD),
    Family("Mistral", "MistralConfig", "model.layers", {**_HEAD, "sliding_window": 6}),
    Family("Gemma", "GemmaConfig", "model.layers", _HEAD),
    Family(
        "Gemma 2",
        "Gemma2Config",
        "model.layers",
        {**_HEAD, "sliding_window": 6},
        dtype=torch.float32,  # in float64 its attention gives NaN at padding: eager, with a float32 softmax
        tolerance=1e-4,
    ),
    Family("Phi-3", "Phi3Config", "model.layers", TRUNK),
    Family("OLMo 2", "Olmo2Config", "model.layers", TRUNK),
    Family(
        "Mixtral",
        "MixtralConfig",
        "model.layers",
        {**TRUNK, **MOE, "num_local_experts": 4},
        dtype=torch.float32,
        tolerance=1e-4,
    ),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        "model.layers",
        {**_HEAD, **MOE, "num_local_experts": 4, "sliding_window": 6},
        dtype=torch.float32,
        tolerance=1e-4,
    ),
    Family(
        "Falcon",
        "FalconConfig",
        "transformer.h",
        {name: size for name, size in TRUNK.items() if name != "num_key_value_heads"},
    ),
    Family("Gemma 3 (text)", "Gemma3TextConfig", "model.layers", {**_HEAD, "sliding_window": 6}),
    Family("GPT-NeoX", "GPTNeoXConfig", "gpt_neox.layers", TRUNK),
    Family(
        "OPT", "OPTConfig", "model.decoder.layers", {**TRUNK, "ffn_dim": 37, "word_embed_proj_dim": WIDTH}
    ),
    Family(
        "GPT-2",
        "GPT2Config",
        "transformer.h",
        {"n_layer": N_LAYERS, "n_embd": WIDTH, "n_head": 4, "vocab_size": VOCAB, "n_positions": 512, **IDS},
    ),
)


def config_of(family: Family) -> Any:
    """The tiny config of a row."""
    import transformers

    kind = getattr(transformers, family.config)
    if not family.image_tokens:
        return kind(**family.text)
    return kind(text_config=dict(family.text), vision_config=dict(family.vision), **family.whole)


def tiny_model(family: Family, seed: int = 0) -> Any:
    """A random model of a row, in eval mode."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if family.image_tokens else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config_of(family), dtype=family.dtype)
        for weight in model.parameters():  # Gemma 3's image projection starts at zero: no image would be seen
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=0.2)
    for name, value in IDS.items():
        setattr(model.generation_config, name, value)
    return model.eval()


def blocks_of(family: Family, model: nn.Module) -> nn.ModuleList:
    """Its decoder blocks, by the table."""
    found = model.get_submodule(family.layers)
    assert isinstance(found, nn.ModuleList)
    return found


def inputs_of(family: Family, images: tuple[int, ...] = (1, 1), seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of prompts of unequal length, row i with `images[i]` images between its words."""
    draw = torch.Generator().manual_seed(seed)
    rows = [_tokens(family, n, 5 + 4 * (i % 2), draw) for i, n in enumerate(images)]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found = {"input_ids": ids, "attention_mask": mask}
    if family.marks:
        found[family.marks] = (ids == IMAGE).long()
    return found | _pixels(family, images, draw)


def _tokens(family: Family, n_images: int, words: int, draw: torch.Generator) -> list[int]:
    text = torch.randint(EOS + 1, IMAGE, (words * (n_images + 1),), generator=draw).tolist()
    row = [BOS, *text[:words]]
    for i in range(1, n_images + 1):
        placeholders = [VISION_START, *[IMAGE] * family.image_tokens, VISION_END]
        row += [*placeholders, *text[i * words : (i + 1) * words]]
    return row


def _pixels(family: Family, images: tuple[int, ...], draw: torch.Generator) -> dict[str, Tensor]:
    if not sum(images):
        return {}
    drawn = [torch.randn(n, *family.pixels, generator=draw, dtype=torch.float64) for n in images]
    drawn = [pixels.to(family.dtype) for pixels in drawn]
    if family.by_row:
        most = max(images)
        empty = [torch.zeros(most - n, *family.pixels, dtype=family.dtype) for n in images]
        return {"pixel_values": torch.stack([torch.cat(pair) for pair in zip(drawn, empty, strict=True)])}
    pixels = torch.cat(drawn)
    if "image_grid_thw" in family.sizes:  # patches of all images in one list
        pixels = pixels.flatten(0, 1)
    return {"pixel_values": pixels} | {k: torch.tensor([v] * sum(images)) for k, v in family.sizes.items()}
