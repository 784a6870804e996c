"""Capture reads what the blocks return, stops where it should, and leaves no hook behind."""

from typing import Any

import pytest
import torch
from conftest import inputs_of
from torch import nn

from daco.capture import block_output, capture
from daco.errors import UnknownLayerError, UnsupportedModelError

KINDS = ("llava", "qwen2_5_vl", "internvl")


def hooks(model: nn.Module) -> int:
    """Forward hooks and pre-hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, processor = request.getfixturevalue(f"tiny_{request.param}")
    inputs = inputs_of(processor)
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)  # transformers sets its own lazy hooks here, for good
    return model, inputs


@torch.no_grad()
def test_activations_are_the_hidden_states(loaded: tuple[Any, Any]) -> None:
    model, inputs = loaded
    with capture(model, [2, 0]) as captured:
        output = model(**inputs, output_hidden_states=True)
    assert sorted(captured.activations) == [0, 2]
    for layer in (0, 2):
        assert captured.activations[layer].shape == (*inputs["input_ids"].shape, 32)
        assert torch.equal(captured.activations[layer], output.hidden_states[layer + 1])


@torch.no_grad()
def test_stop_ends_the_forward_and_reads_the_same(loaded: tuple[Any, Any]) -> None:
    model, inputs = loaded
    seen = []
    spy = model.model.language_model.layers[2].register_forward_hook(lambda *_: seen.append(2))
    try:
        with capture(model, [0, 1], stop=True) as captured:
            assert captured.run(**inputs) is None
            stopped = dict(captured.activations)
            assert not seen
            output = model(**inputs)
            assert seen == [2]
        with capture(model, [0, 1]) as whole:
            assert whole.run(**inputs) is not None
    finally:
        spy.remove()
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    for layer in (0, 1):
        assert torch.equal(stopped[layer], whole.activations[layer])


def test_no_hook_is_left_also_after_an_error(loaded: tuple[Any, Any]) -> None:
    model, inputs = loaded
    before = hooks(model)
    with torch.no_grad():
        logits = model(**inputs).logits
        with capture(model, [1], stop=True) as captured:
            assert hooks(model) == before + 1
            captured.run(**inputs)
        assert hooks(model) == before
        with pytest.raises(RuntimeError, match="mine"), capture(model, [1]):
            raise RuntimeError("mine")
        assert hooks(model) == before
        assert torch.equal(model(**inputs).logits, logits)


def test_an_error_of_the_model_is_not_swallowed(tiny_llava: tuple[Any, Any]) -> None:
    model, processor = tiny_llava
    inputs = inputs_of(processor)
    with capture(model, [1], stop=True) as captured, pytest.raises(ValueError, match=r"(?i)image"):
        captured.run(input_ids=inputs["input_ids"][:, :-4], pixel_values=inputs["pixel_values"][:1])


def test_layers_are_checked_first(tiny_llava: tuple[Any, Any]) -> None:
    model, _ = tiny_llava
    before = hooks(model)
    with pytest.raises(UnknownLayerError, match="0 to 3"), capture(model, [1, 4]):
        pass
    with pytest.raises(ValueError, match="expected at least one"), capture(model, []):
        pass
    assert hooks(model) == before


def test_gradients_are_not_kept(tiny_llava: tuple[Any, Any]) -> None:
    model, processor = tiny_llava
    with capture(model, [1]) as captured:
        model(**inputs_of(processor))
    assert not captured.activations[1].requires_grad


def test_blocks_may_return_a_tensor_or_a_tuple() -> None:
    z = torch.ones(2, 3, 5)
    assert block_output(z) is z
    assert block_output((z, None)) is z
    with pytest.raises(UnsupportedModelError, match="expected a block to return a Tensor"):
        block_output({"z": z})
    with pytest.raises(UnsupportedModelError, match=r"expected a block to return one .*got \[4, 2, 3, 5\]"):
        block_output(torch.ones(4, 2, 3, 5))
