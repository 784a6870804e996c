"""Proves cross-entropies of spliced layers against plain losses: the identity recovers 1, zeros recover 0."""

import pytest
import torch
from PIL import Image

from builders import splice as room
from builders.answers import generated_ids
from builders.mllm import chat_inputs
from builders.tiny import tiny_mllm
from daco.errors import ActivationError
from daco.sae import SAE

CAPTIONS = ["a knife on a table", "two dogs"]
EYE = torch.eye(32)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "internvl"])
def tiny(request):
    return tiny_mllm(request.param, CAPTIONS, seed=3)


def inputs_of(processor):
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    return chat_inputs(processor, CAPTIONS, images)


def sae(bias: float = 0.0, share: float = 1.0) -> SAE:
    """That share of z, as relu(z) - relu(-z); nothing where the bias is far below zero."""
    zeros = torch.zeros(32)
    return SAE(
        torch.cat([EYE, -EYE], 1), torch.full((64,), bias), share * torch.cat([EYE, -EYE]), zeros, "relu"
    )


def naive(model, inputs, labels) -> tuple[int, float]:
    with torch.no_grad():
        logits = model(**inputs).logits.double().log_softmax(-1)
    chosen = labels[:, 1:] != -100
    picked = logits[:, :-1].gather(2, labels[:, 1:, None].clamp_min(0))[..., 0][chosen]
    return int(chosen.sum()), float(-picked.sum())


def test_labels_are_the_tokens_of_the_models_own_answers(tiny):
    model, processor = tiny
    inputs = inputs_of(processor)
    whole, labels = room.answered(model, processor, inputs, 5)
    n = inputs["input_ids"].shape[1]
    said = generated_ids(model, processor, inputs, 5)
    for row, ids in zip(labels, said, strict=True):
        assert row[row != -100].tolist() == ids.tolist()
        assert (row[-len(ids) :] != -100).all()
    assert whole["attention_mask"].sum() == inputs["attention_mask"].sum() + sum(map(len, said))
    assert whole["input_ids"].shape[1] >= n + max(map(len, said)) > n


def test_the_identity_recovers_everything_and_zeros_nothing(tiny):
    model, processor = tiny
    inputs, labels = room.answered(model, processor, inputs_of(processor))
    n, whole = naive(model, inputs, labels)
    found = room.splice(model, inputs, labels, {1: sae(), 2: sae(bias=-1e9)})
    assert found[1].tokens == found[2].tokens == n > 5
    assert found[1].ce == pytest.approx(whole, rel=1e-5)
    assert found[1].ce_ablated > 1.01 * whole
    assert room.recovered([found[1]])["ce_recovered"] == pytest.approx(1.0, abs=1e-3)
    assert room.recovered([found[2]])["ce_recovered"] == pytest.approx(0.0, abs=1e-6)
    assert naive(model, inputs, labels) == (n, whole)  # no hook is left
    assert not model.get_decoder().layers[1]._forward_hooks


def test_the_spliced_loss_is_that_of_a_model_whose_block_is_replaced(tiny):
    model, processor = tiny
    inputs, labels = room.answered(model, processor, inputs_of(processor))
    off = sae(share=0.5)
    found = room.splice(model, inputs, labels, {1: off})[1]

    def shifted(module, given, output):
        z = output[0] if isinstance(output, tuple) else output
        new = off(z)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.get_decoder().layers[1].register_forward_hook(shifted)
    try:
        _, expected = naive(model, inputs, labels)
    finally:
        handle.remove()
    assert found.ce_spliced == pytest.approx(expected, rel=1e-5)
    assert found.ce_spliced != pytest.approx(found.ce, rel=1e-4)


def test_batches_are_weighed_by_their_tokens():
    parts = [room.Spliced(1, 2.0, 3.0, 4.0), room.Spliced(3, 10.0, 13.0, 20.0)]
    found = room.recovered(parts)
    assert found == {"ce_tokens": 4, "ce": 3.0, "ce_spliced": 4.0, "ce_ablated": 6.0, "ce_recovered": 2 / 3}
    assert room.recovered([room.Spliced(2, 4.0, 4.0, 6.0)])["ce_recovered"] == 1.0
    assert room.recovered([room.Spliced(2, 4.0, 7.0, 6.0)])["ce_recovered"] == -0.5


def test_cross_entropies_that_are_not_finite_are_refused(tiny):
    model, processor = tiny
    inputs, labels = room.answered(model, processor, inputs_of(processor))
    with pytest.raises(ActivationError, match="got ce_spliced = nan at layer 1"):
        room.splice(model, inputs, labels, {1: sae(share=float("nan"))})


def test_no_tokens_or_nothing_lost_recover_nothing(tiny):
    model, processor = tiny
    inputs = inputs_of(processor)
    none = room.splice(model, inputs, torch.full_like(inputs["input_ids"], -100), {1: sae()})
    assert room.recovered(none.values()) == {
        "ce_tokens": 0,
        "ce": None,
        "ce_spliced": None,
        "ce_ablated": None,
        "ce_recovered": None,
    }
    for ablated in (4.0, 3.0):
        assert room.recovered([room.Spliced(2, 4.0, 4.0, ablated)])["ce_recovered"] is None
