"""Steering follows a model that accelerate split over places, and one whose Linears a library quantised."""

import copy
import warnings
from collections.abc import Generator
from typing import Any

import pytest
import small_sae
import torch
from families import MULTIMODAL, TEXT, Family, blocks_of, inputs_of, tiny_model
from torch import nn

from builders.vision import ensure_torchvision
from daco.capture import capture
from daco.methods import SAESteering
from daco.sites import ModelFacts, find_trunk
from daco.steering import steer

ensure_torchvision()
pytestmark = pytest.mark.filterwarnings("ignore:base model not confirmed")
FEW = [f for f in (*MULTIMODAL, *TEXT) if f.name in ("LLaVA-1.5", "Qwen2.5-VL", "InternVL", "Llama")]
few = pytest.mark.parametrize("family", FEW, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def without_gradients() -> Generator[None, None, None]:
    with torch.no_grad():
        yield


def inputs_for(family: Family, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    made = inputs_of(family, (2, 1) if family.image_tokens else (0, 0))
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in made.items()}


def steered(model: Any, inputs: dict[str, Any], family: Family) -> tuple[torch.Tensor, Any]:
    """Tokens of a greedy answer, steered at a block of each half, and the report."""
    sae = small_sae.steering_sae(ModelFacts.of(model), (1, 2))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [90, 91]}
    with steer(model, SAESteering(sae, gamma=0.5)) as run:
        tokens = model.generate(**inputs, **options)
    return tokens, run.report()


@few
def test_a_model_split_over_places_is_steered_alike(family: Family, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, inputs = tiny_model(family), inputs_for(family)
    expected, report = steered(model, inputs, family)
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert not torch.equal(expected, tokens), "steering changes nothing"
    places = {f"{family.layers}.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    named = model.named_parameters(remove_duplicate=False)
    rest = {name.rpartition(".")[0]: "cpu" for name, _ in named if family.layers not in name}
    split = accelerate.dispatch_model(
        copy.deepcopy(model), places | rest, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert {p.device.type for p in blocks_of(family, split).parameters()} == {"cpu", "meta"}
    assert find_trunk(split).layers is blocks_of(family, split)
    found, again = steered(split, inputs, family)
    assert torch.equal(found, expected)
    assert [layer.positions for layer in again.layers] == [layer.positions for layer in report.layers]


@few
def test_int8_modules_of_torch_are_steered(family: Family) -> None:
    model, inputs = tiny_model(family).float(), inputs_for(family, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        blocks = torch.ao.quantization.quantize_dynamic(
            blocks_of(family, model), {nn.Linear}, dtype=torch.qint8
        )
    model.set_submodule(family.layers, blocks)
    kinds = {type(module).__module__ for module in blocks.modules()}
    assert "torch.ao.nn.quantized.dynamic.modules.linear" in kinds
    sae = small_sae.steering_sae(ModelFacts.of(model), (1,))
    kept = inputs["attention_mask"].bool()
    with capture(model, [1]) as before:
        plain = model(**inputs).logits
    with steer(model, SAESteering(sae, gamma=0.5)) as run, capture(model, [1]) as after:
        moved = model(**inputs).logits
    expected = small_sae.naive_steer(before.activations[1][kept].double().numpy(), sae.layers[1], 0.5)
    torch.testing.assert_close(
        after.activations[1][kept].double(), torch.from_numpy(expected), atol=1e-4, rtol=0
    )
    assert torch.equal(after.activations[1][~kept], before.activations[1][~kept])
    assert (moved - plain)[kept].abs().max() > 1e-2
    assert run.report().positions == int(kept.sum())
    tokens, report = steered(model, inputs, family)
    assert tokens.shape[1] == kept.shape[1] + 4
    assert report.layers[0].positions["generated"] == 2 * 3
