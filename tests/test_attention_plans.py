"""Proves that whatever asks or reads a model in the workshop does so without cuDNN's plans."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import inputs_of, tiny
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from builders import evaluate
from builders.annotate import local_model
from builders.answers import generated_ids
from builders.forward import read_batch
from builders.safety.judges.fluency import log_likelihoods
from builders.splice import answered, splice


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[bool]]:
    """Whether attention may plan, as every forward of a block finds it."""
    seen: set[bool] = set()
    forward = LlamaDecoderLayer.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", noted)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield seen
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_models_are_asked_and_read_so(plans: set[bool]) -> None:
    model, processor = tiny("llava")
    inputs = inputs_of(processor, 2)
    said = generated_ids(model, processor, inputs, 3)
    assert plans == {False}
    whole, labels = answered(model, processor, inputs, 2)
    sae = {0: torch.nn.Identity()}
    reads: tuple[Callable[[], object], ...] = (
        lambda: read_batch(model, processor, ["a kite"], None, [0]),
        lambda: evaluate.forward(model, inputs, [0]),
        lambda: log_likelihoods(model, inputs, said, 0),
        lambda: splice(model, whole, labels, sae),
    )
    for read in reads:
        plans.clear()
        read()
        assert plans == {False}


def test_annotators_are_asked_so(plans: set[bool], tmp_path: Path) -> None:
    for saved in tiny("llava"):
        saved.save_pretrained(tmp_path)
    local_model(str(tmp_path), dtype="float32")("label this", 2)
    assert plans == {False}
