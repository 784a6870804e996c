"""Steering without hooks equals steering with them, compiled or not, and leaves nothing behind."""

from typing import Any

import pytest
import small_sae
import torch
from conftest import inputs_of, tiny
from test_sites import text_model
from test_steering import KINDS, METHODS, Case, TupleBlock
from torch import nn

from daco import PerRow, attach, find_trunk, steer, wrap
from daco.capture import capture
from daco.errors import ModelMismatchError, NothingToSteerError, SteeringConflictError, UnknownLayerError
from daco.methods import ActAdd, SAESteering
from daco.sites import ModelFacts

pytestmark = pytest.mark.filterwarnings("ignore:base model not confirmed")


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def llava() -> Case:
    return Case("llava")


def blocks_forward(model: nn.Module) -> list[bool]:
    return ["forward" in vars(block) for block in find_trunk(model).layers]


@pytest.mark.parametrize("name", METHODS)
def test_logits_are_those_of_steer(name: str, case: Case) -> None:
    method, kept, before = METHODS[name](case), case.masks()["all"], case.logits()
    with steer(case.model, method):
        expected = case.logits()
    with wrap(case.model, method):
        found = case.logits()
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=1e-9)
    assert (expected - before)[kept].abs().max() > 1e-3
    assert torch.equal(case.logits(), before)
    assert not any(blocks_forward(case.model))


def test_two_methods_come_one_after_the_other(llava: Case) -> None:
    both = [ActAdd(llava.dictionary(), 0.3, dtype=torch.float64), SAESteering(llava.sae(), gamma=0.2)]
    kept = llava.masks()["all"]
    with steer(llava.model, both):
        expected = llava.logits()
    with wrap(llava.model, both) as wrapped:
        found = llava.logits()
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=1e-9)
    assert wrapped.what.startswith("ActAdd")
    assert ", then SAE steering" in wrapped.what


@pytest.mark.parametrize("cache", [None, "static"])
def test_answers_are_those_of_steer(cache: str | None, llava: Case) -> None:
    method = SAESteering(llava.sae(), gamma=0.5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with steer(llava.model, method):
        expected = llava.model.generate(**llava.inputs, **options)
    with wrap(llava.model, method):
        found = llava.model.generate(**llava.inputs, **options, cache_implementation=cache)
    assert torch.equal(found, expected)
    assert not torch.equal(found, llava.model.generate(**llava.inputs, **options))


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_compiled_forward_is_one_graph_and_follows_wrapping_and_removal(activation: str) -> None:
    model = text_model("LlamaConfig").double().eval()
    inputs = {"input_ids": torch.arange(3, 11)[None], "use_cache": False}
    method = SAESteering(small_sae.steering_sae(ModelFacts.of(model), activation=activation), gamma=0.5)
    before = model(**inputs).logits
    with steer(model, method):
        expected = model(**inputs).logits
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, before)
    with wrap(model, method):
        found = compiled(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(compiled(**inputs).logits, before)


def test_half_precision_streams_keep_their_dtype() -> None:
    model, processor = tiny("llava")
    model.bfloat16()
    inputs = inputs_of(processor).to(dtype=torch.bfloat16)
    method = SAESteering(small_sae.steering_sae(ModelFacts.of(model), dtype=torch.float32))
    with steer(model, method), capture(model, [1, 2]) as hooked:
        hooked.run(**inputs)
    with wrap(model, method), capture(model, [1, 2]) as wrapped:
        wrapped.run(**inputs)
    kept = inputs["attention_mask"].bool()
    for layer in (1, 2):
        found = wrapped.activations[layer]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found[kept], hooked.activations[layer][kept])


def test_blocks_that_return_tuples_still_do(llava: Case) -> None:
    method = SAESteering(llava.sae(), layers=[1])
    before = llava.stream(1)
    with steer(llava.model, method):
        expected = llava.stream(1)
    layers, seen = find_trunk(llava.model).layers, []

    def unpack(_module: Any, _args: Any, output: Any) -> Any:
        seen.append(output)
        return output[0]

    block, layers[1] = layers[1], TupleBlock(layers[1])
    handle = layers[1].register_forward_hook(unpack)  # the stock trunk wants a Tensor
    try:
        with wrap(llava.model, method):
            llava.logits()
    finally:
        handle.remove()
        layers[1] = block
    kept = llava.masks()["all"]
    assert seen[0][1] == "rest"
    torch.testing.assert_close(seen[0][0][kept], expected[kept], rtol=0, atol=1e-9)
    assert (expected - before)[kept].abs().max() > 1e-2


def test_a_model_is_steered_by_one_at_a_time(llava: Case) -> None:
    method = SAESteering(llava.sae())
    with wrap(llava.model, method) as wrapped:
        with pytest.raises(SteeringConflictError, match="steered by SAE"):
            attach(llava.model, method)
        with pytest.raises(SteeringConflictError, match="steered by SAE"):
            wrap(llava.model, method)
        wrapped.remove()
        with steer(llava.model, method):
            llava.logits()
    with steer(llava.model, method, on_empty="pass"), pytest.raises(SteeringConflictError):
        wrap(llava.model, method)
    assert not any(blocks_forward(llava.model))


def test_a_forward_that_was_there_comes_back(llava: Case) -> None:
    block = find_trunk(llava.model).layers[1]
    own = block.forward
    block.forward = theirs = lambda *a, **k: own(*a, **k)
    try:
        with wrap(llava.model, SAESteering(llava.sae())):
            assert block.forward is not theirs
        assert block.forward is theirs
    finally:
        del block.forward


def test_an_error_in_the_block_takes_the_steering_off(llava: Case) -> None:
    with pytest.raises(RuntimeError, match="mine"), wrap(llava.model, SAESteering(llava.sae())):
        raise RuntimeError("mine")
    assert not any(blocks_forward(llava.model))


def test_what_cannot_be_is_refused_before_anything_changes(llava: Case, case: Case) -> None:
    method = SAESteering(llava.sae())
    with pytest.raises(TypeError, match="PerRow"):
        wrap(llava.model, PerRow([method, None]))
    with pytest.raises(TypeError, match="one of daco"):
        wrap(llava.model, "weapon")  # type: ignore[arg-type]
    nothing = SAESteering(llava.sae(), gamma=0.0, eta=1.0, on_empty="pass")
    with pytest.raises(NothingToSteerError):
        wrap(llava.model, nothing)
    wrap(llava.model, nothing, on_empty="pass").remove()
    if case.model.config.model_type != "llava":
        with pytest.raises(ModelMismatchError):
            wrap(case.model, method)
    method.layers = (99,)
    with pytest.raises(UnknownLayerError):
        wrap(llava.model, method)
    assert not any(blocks_forward(llava.model))
