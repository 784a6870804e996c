"""Proves that the workshop attends by no kernel that plans, and leaves torch as it was."""

from typing import Any

import pytest
import torch
from conftest import inputs_of, tiny

from builders.answers import generated_ids
from builders.attention import without_plans


def allowed() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_inside_nothing_plans_and_outside_all_is_as_before(before: bool) -> None:
    was = allowed()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with without_plans():
            assert not allowed()
        assert allowed() is before
        with pytest.raises(KeyError), without_plans():
            raise KeyError
        assert allowed() is before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def test_answers_are_asked_for_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("llava")
    seen: list[bool] = []

    def generate(**inputs: Any) -> torch.Tensor:
        seen.append(allowed())
        return inputs["input_ids"]

    monkeypatch.setattr(model, "generate", generate)
    generated_ids(model, processor, inputs_of(processor, 2), 3)
    assert seen == [False]
