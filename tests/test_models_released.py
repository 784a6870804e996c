"""Released models of every tested architecture resolve at their real widths and depths, on the meta device.

Each row says where its sizes were looked up; what rests on memory says so.
"""

from typing import Any, NamedTuple

import pytest
import torch
from families import MULTIMODAL, TEXT
from torch import nn

from builders.vision import ensure_torchvision
from daco.sites import find_trunk, image_token_ids

ensure_torchvision()
HUB = "https://huggingface.co/"


class Released(NamedTuple):
    """What a released model's config.json says, and what else its class needs."""

    config: str
    model: str
    source: str
    """Where its sizes were looked up: a page, or `memory`."""
    hidden_size: int
    n_layers: int
    vision_layers: int = 0
    text: dict[str, Any] = {}  # noqa: RUF012
    vision: dict[str, Any] = {}  # noqa: RUF012


def heads(n: int, kv: int) -> dict[str, int]:
    return {"num_attention_heads": n, "num_key_value_heads": kv}


CLIP = {"model_type": "clip_vision_model"}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_attention_heads": 16}
RELEASED = [
    Released(
        "LlavaConfig",
        "llava-hf/llava-1.5-7b-hf",
        f"{HUB}mohitsha/llava-1.5-7b-hf/blob/main/config.json, a copy; text: its class's defaults",
        4096,
        32,
        24,
        {"model_type": "llama"},
        CLIP,
    ),
    Released(
        "LlavaNextConfig",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "memory; the text as in mistralai/Mistral-7B-Instruct-v0.3, the tower its class's default",
        4096,
        32,
        24,
        {"model_type": "mistral"},
        CLIP,
    ),
    Released(
        "LlavaOnevisionConfig",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        f"text: {HUB}onlyforsub/model-2/blob/main/config.json (Qwen2-7B); the tower is its class's default",
        3584,
        28,
        26,
        {"model_type": "qwen2", **heads(28, 4)},
        SIGLIP,
    ),
    Released(
        "Qwen2VLConfig",
        "Qwen/Qwen2-VL-7B-Instruct",
        "https://github.com/acproject/duorou docs/new_feat.md, the model printed",
        3584,
        28,
        32,
        heads(28, 4),
    ),
    Released(
        "Qwen2_5_VLConfig",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        f"{HUB}Qwen/Qwen2.5-VL-7B-Instruct/blame/main/config.json",
        3584,
        28,
        32,
        heads(28, 4),
        {"out_hidden_size": 3584},
    ),
    Released(
        "Qwen3VLConfig",
        "Qwen/Qwen3-VL-8B-Instruct",
        f"text: {HUB}Chhagan005/CSM-DocExtract-8N/blob/main/config.json, made from it; tower: "
        f"{HUB}quanliang/F1/blob/main/config.json, made from its 32B sibling",
        4096,
        36,
        27,
        heads(32, 8),
        {"out_hidden_size": 4096},
    ),
    Released(
        "InternVLConfig",
        "OpenGVLab/InternVL3-8B-hf",
        "memory",
        3584,
        28,
        24,
        {"model_type": "qwen2", **heads(28, 4)},
    ),
    Released(
        "InternVLConfig",
        "OpenGVLab/InternVL3-38B-hf",
        f"text: {HUB}OpenGVLab/InternVL3-38B-hf/blob/refs%2Fpr%2F2/config.json; tower's depth: memory",
        5120,
        64,
        45,
        {"model_type": "qwen2", **heads(40, 8)},
        {"hidden_size": 3200, "num_attention_heads": 25},
    ),
    Released(
        "Gemma3Config",
        "google/gemma-3-4b-it",
        f"{HUB}mlx-community/gemma-3-4b-it-bf16/blob/main/config.json, a copy",
        2560,
        34,
        27,
        heads(8, 4),
        SIGLIP,
    ),
    Released(
        "Idefics3Config",
        "HuggingFaceM4/Idefics3-8B-Llama3",
        f"width: {HUB}HuggingFaceM4/Idefics3-8B-Llama3/blob/"
        "92a708af3b96e7fe9aeac5d439a1f64083868a05/config.json; depth as in Llama 3.1 8B; tower: memory",
        4096,
        32,
        27,
        {"model_type": "llama"},
        {"hidden_size": 1152, "num_attention_heads": 16},
    ),
    Released(
        "SmolVLMConfig",
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "memory",
        2048,
        24,
        27,
        {"model_type": "llama"},
        {"hidden_size": 1152, "num_attention_heads": 16},
    ),
    Released(
        "Mistral3Config",
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        f"text: {HUB}mistralai/Mistral-Small-3.1-24B-Instruct-2503/blob/main/config.json; the tower is its "
        "class's default",
        5120,
        40,
        24,
        {"model_type": "mistral", "head_dim": 128, **heads(32, 8)},
        {"model_type": "pixtral"},
    ),
    Released(
        "PaliGemmaConfig",
        "google/paligemma-3b-pt-224",
        "memory",
        2048,
        18,
        27,
        {"model_type": "gemma", "head_dim": 256, **heads(8, 1)},
        SIGLIP,
    ),
    Released(
        "AyaVisionConfig",
        "CohereLabs/aya-vision-8b",
        "memory",
        4096,
        32,
        27,
        {"model_type": "cohere2", **heads(32, 8)},
        SIGLIP,
    ),
    Released("Glm4vConfig", "zai-org/GLM-4.1V-9B-Thinking", "memory", 4096, 40, 24, heads(32, 2)),
    Released(
        "Qwen3VLMoeConfig",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "memory",
        2048,
        48,
        27,
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, **heads(32, 4)},
        {"out_hidden_size": 2048},
    ),
    Released("Qwen3_5Config", "Qwen/Qwen3.5-9B", "memory: its class's defaults", 4096, 32, 27),
    Released(
        "LlamaConfig",
        "meta-llama/Llama-3.1-8B-Instruct",
        "https://github.com/vulkomilev/oumi configs/recipes/llama3_1/README.md",
        4096,
        32,
        text=heads(32, 8),
    ),
    Released(
        "Qwen2Config",
        "Qwen/Qwen2.5-7B-Instruct",
        f"{HUB}osllmai-community/Qwen2.5-7B-Instruct/blob/main/config.json, a copy",
        3584,
        28,
        text=heads(28, 4),
    ),
    Released(
        "Qwen3Config",
        "Qwen/Qwen3-8B",
        f"{HUB}thejaminator/qwen-hook-layer-9/commit/478fb720f1f3ced834fce0275b55b2732d438edc, a copy",
        4096,
        36,
        text={"head_dim": 128, **heads(32, 8)},
    ),
    Released(
        "MistralConfig",
        "mistralai/Mistral-7B-Instruct-v0.3",
        f"{HUB}mistralai/Mistral-7B-Instruct-v0.3/blob/c170c708c41dac9275d15a8fff4eca08d52bab71/config.json",
        4096,
        32,
        text=heads(32, 8),
    ),
    Released(
        "GemmaConfig",
        "google/gemma-1.1-7b-it",
        f"{HUB}julioc-p/CNCF/blob/main/config.json, made from it",
        3072,
        28,
        text={"head_dim": 256, **heads(16, 16)},
    ),
    Released(
        "Gemma2Config",
        "google/gemma-2-9b-it",
        f"{HUB}hfhugs/gemma-2-9b-it/blob/main/config.json, a copy",
        3584,
        42,
        text={"head_dim": 256, **heads(16, 8)},
    ),
    Released("Phi3Config", "microsoft/Phi-3-mini-4k-instruct", "memory", 3072, 32, text=heads(32, 32)),
    Released("Olmo2Config", "allenai/OLMo-2-1124-7B", "memory", 4096, 32, text=heads(32, 32)),
    Released("MixtralConfig", "mistralai/Mixtral-8x7B-v0.1", "memory", 4096, 32, text=heads(32, 8)),
    Released("GptOssConfig", "openai/gpt-oss-20b", "memory", 2880, 24, text=heads(64, 8)),
    Released("FalconConfig", "tiiuae/falcon-7b", "memory", 4544, 32, text={"num_attention_heads": 71}),
    Released("Gemma3TextConfig", "google/gemma-3-1b-it", "memory", 1152, 26, text=heads(4, 1)),
    Released(
        "GPTNeoXConfig",
        "EleutherAI/pythia-6.9b",
        f"{HUB}EleutherAI/pythia-6.9b/blob/main/config.json",
        4096,
        32,
        text={"num_attention_heads": 32},
    ),
    Released(
        "OPTConfig",
        "facebook/opt-6.7b",
        f"{HUB}titanbot/opt-6.7b-4bit-AWQ/blob/main/config.json, made from it",
        4096,
        32,
        text={"num_attention_heads": 32, "ffn_dim": 16384, "word_embed_proj_dim": 4096},
    ),
    Released("GPT2Config", "openai-community/gpt2-xl", "memory", 1600, 48, text={"n_head": 25}),
]


def on_meta(released: Released) -> nn.Module:
    import transformers

    kind = getattr(transformers, released.config)
    text = {"hidden_size": released.hidden_size, "num_hidden_layers": released.n_layers, **released.text}
    if released.vision_layers:
        depth = "depth" if released.config.startswith(("Qwen", "Glm")) else "num_hidden_layers"
        config = kind(text_config=text, vision_config={depth: released.vision_layers, **released.vision})
        auto = transformers.AutoModelForImageTextToText
    else:
        config, auto = kind(**text), transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("released", RELEASED, ids=lambda r: r.model)
def test_released_shapes_resolve(released: Released) -> None:
    model = on_meta(released)
    trunk = find_trunk(model)
    assert (trunk.hidden_size, trunk.n_layers) == (released.hidden_size, released.n_layers)
    assert "vision" not in trunk.path
    assert "visual" not in trunk.path
    assert len(trunk.layers) == released.n_layers
    widths = {p.shape[-1] for p in trunk.layers[-1].parameters() if p.ndim > 1}
    assert released.hidden_size in widths
    if released.vision_layers:
        depths = {len(m) for m in model.modules() if isinstance(m, nn.ModuleList)}
        assert released.vision_layers in depths, "the vision tower is not as published"
        assert image_token_ids(model)


def test_every_tested_architecture_has_a_released_shape() -> None:
    assert {family.config for family in (*MULTIMODAL, *TEXT)} == {row.config for row in RELEASED}
    assert all(row.source.startswith(("http", "text: http", "width: http", "memory")) for row in RELEASED)
