"""The text trunk is found by the model's own account, beside a deep vision tower, or refused by name."""

import warnings
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import nn

from daco.errors import ModelMismatchError, UnknownLayerError, UnsupportedModelError
from daco.sites import ModelFacts, find_trunk, image_token_ids, site

KINDS = ("llava", "qwen2_5_vl", "internvl")


@pytest.mark.parametrize("vision_layers", [2, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_is_the_text_models_beside_a_decoy(kind: str, vision_layers: int) -> None:
    model, _ = tiny(kind, vision_layers=vision_layers)
    trunk = find_trunk(model)
    assert trunk.layers is model.model.language_model.layers
    assert trunk[1:] == (32, 4, "model.language_model.layers")
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == vision_layers]
    assert any(m is not trunk.layers for m in lists), "no decoy in the model"
    assert site(model, 3) is model.model.language_model.layers[3]
    assert find_trunk(model.model).layers is trunk.layers


TEXT_MODELS = {
    "GPT2Config": {"n_layer": 3, "n_embd": 32, "n_head": 4},
    "LlamaConfig": {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 37,
    },
    "OPTConfig": {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 37},
    "GPTNeoXConfig": {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 37,
    },
}


def text_model(config: str) -> nn.Module:
    import transformers

    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes = TEXT_MODELS[config] | ids
    if config == "OPTConfig":
        sizes["word_embed_proj_dim"] = 32
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(vocab_size=99, **sizes)
    )


@pytest.mark.parametrize("config", TEXT_MODELS)
def test_text_models_have_trunks_too(config: str) -> None:
    model = text_model(config)
    trunk = find_trunk(model)
    assert (trunk.hidden_size, trunk.n_layers, len(trunk.layers)) == (32, 3, 3)
    assert image_token_ids(model) == ()
    assert ModelFacts.of(model).hidden_size == 32


def test_a_wrapper_with_a_base_model_is_looked_through(tiny_llava: Any) -> None:
    model, _ = tiny_llava

    class Wrapper(nn.Module):
        peft_config = {}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.base_model = model
            self.config = model.config

        def get_base_model(self) -> nn.Module:
            return model

    trunk = find_trunk(Wrapper())
    assert trunk.layers is find_trunk(model).layers
    assert trunk.path == "base_model.model.language_model.layers"


def test_what_has_no_trunk_is_refused(tiny_llava: Any) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    with pytest.raises(
        UnsupportedModelError, match="expected a transformers model with a config, got Linear"
    ):
        find_trunk(nn.Linear(2, 3))
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37}
    with pytest.raises(UnsupportedModelError, match="expected a text trunk of 3 blocks of width 32"):
        find_trunk(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)))
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )
    with pytest.raises(UnsupportedModelError, match=r"expected a text trunk that .*got an encoder-decoder"):
        find_trunk(t5)
    model, _ = tiny("llava")
    model.config.text_config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match=r"of 5 blocks of width 32 .*got 4 blocks of width 32"):
        find_trunk(model)


@pytest.mark.parametrize("config", ["Gemma3nTextConfig", "DeepseekV4Config", "HYV4Config", "Glm5NextConfig"])
def test_several_residual_streams_are_refused(config: str) -> None:
    import transformers

    found = getattr(transformers, config)()
    auto = transformers.AutoModelForImageTextToText if "Next" in config else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(found)
    with pytest.raises(UnsupportedModelError, match="expected a text trunk of one residual stream, got 4"):
        find_trunk(model)


@pytest.mark.parametrize("layer", [4, -1, 99])
def test_unknown_layers_are_refused(layer: int, tiny_llava: Any) -> None:
    with pytest.raises(UnknownLayerError, match=f"expected a layer from 0 to 3 .*got {layer}"):
        site(tiny_llava[0], layer)


@pytest.fixture
def named() -> nn.Module:
    """A model that says where it came from, and at which commit."""
    model, _ = tiny("llava")
    model.config._name_or_path = "org/base"
    model.config._commit_hash = "a" * 40
    return model


FACTS = ModelFacts("org/base", "a" * 40, "llava", 32, 4)


def test_the_right_model_passes_without_a_word(named: nn.Module) -> None:
    assert ModelFacts.of(named) == FACTS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FACTS.check(named) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type qwen2_5_vl .*got llava"),
        ({"hidden_size": 64}, "hidden_size 64 .*got 32"),
        ({"n_layers": 28}, "n_layers 28 .*got 4"),
    ],
)
def test_another_shape_or_type_is_never_accepted(
    change: dict[str, Any], message: str, named: nn.Module
) -> None:
    expected = ModelFacts(**(FACTS.__dict__ | change))
    for base_model_ok in (False, True):
        with pytest.raises(ModelMismatchError, match=message):
            expected.check(named, base_model_ok)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "org/other"}, "expected base model org/other, got org/base"),
        ({"revision": "b" * 40}, f"expected revision {'b' * 40} of org/base, got {'a' * 40}"),
    ],
)
def test_another_origin_needs_an_override(change: dict[str, Any], message: str, named: nn.Module) -> None:
    expected = ModelFacts(**(FACTS.__dict__ | change))
    with pytest.raises(ModelMismatchError, match=f"{message}.*base_model_ok=True"):
        expected.check(named)
    assert expected.check(named, base_model_ok=True) == f"base_model_ok: {message}"


def test_an_unknown_origin_warns(named: nn.Module, tmp_path: Any) -> None:
    named.config._name_or_path = str(tmp_path)
    with pytest.warns(UserWarning, match="base model not confirmed beyond type and shape: expected org/base"):
        note = FACTS.check(named)
    assert note is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FACTS.check(named, base_model_ok=True) == note
    with pytest.warns(UserWarning, match="base model not confirmed"):
        ModelFacts("", "", "llava", 32, 4).check(named)


def test_a_folder_of_the_hubs_cache_names_id_and_commit(named: nn.Module) -> None:
    del named.config._commit_hash
    named.config._name_or_path = f"/cache/hub/models--org--base/snapshots/{'a' * 40}"
    assert ModelFacts.of(named) == FACTS
    named.config._name_or_path = "org/base"
    assert FACTS.check(named) == "revision of org/base not known"
