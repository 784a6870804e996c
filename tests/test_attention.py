"""Proves that the workshop attends by no kernel that plans, and leaves torch as it was."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import inputs_of, tiny
from families import MULTIMODAL, tiny_model
from families import inputs_of as inputs_of_family
from PIL import Image

from builders import attention
from builders.answers import generated_ids
from builders.attention import attend_at_once, windows_at_once, without_plans
from builders.vision import ensure_torchvision

ensure_torchvision()


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


WINDOWED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v"}
"""Model types whose vision towers attend window by window."""


def calls_of(monkeypatch: pytest.MonkeyPatch, work: Any) -> tuple[Any, int]:
    """What work gives, and how often torch was called to attend."""
    real, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        patched.setattr(attention, "scaled_dot_product_attention", counted)
        return work(), len(calls)


@pytest.mark.parametrize("family", MULTIMODAL, ids=lambda family: family.name)
@torch.no_grad()
def test_towers_that_attend_by_window_give_the_same_at_once(family: Any) -> None:
    model, inputs = tiny_model(family), inputs_of_family(family)
    before = model(**inputs).logits
    names = {name: m.config._attn_implementation for name, m in model.named_modules() if configured(m)}
    windows_at_once(model)
    changed = {name for name, m in model.named_modules() if configured(m)
               if m.config._attn_implementation != names[name]}  # fmt: skip
    assert bool(changed) is (model.config.model_type in WINDOWED)
    assert not any("language_model" in name for name in changed)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-12)


def configured(module: Any) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) is not None


@torch.no_grad()
def test_windows_of_many_sizes_take_a_call_a_size_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("qwen2_5_vl")
    model.double()
    pictures = [[Image.effect_noise((side, 84), 50).convert("RGB")] for side in (56, 84, 140, 252)]
    texts = ["<|vision_start|><|image_pad|><|vision_end|> what is it"] * 4
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    before, slow = calls_of(monkeypatch, lambda: model(**inputs).logits)
    windows_at_once(model)
    after, fast = calls_of(monkeypatch, lambda: model(**inputs).logits)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert fast < slow / 2


def test_windows_keep_to_themselves() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    ends = torch.tensor([0, 2, 5, 5, 7, 9])
    found, _ = attend_at_once(torch.nn.Module(), q, k, v, None, scaling=0.3, cu_seq_lens_q=ends)
    for start, end in pairwise(ends.tolist()):
        scores = (q[0, :, start:end] @ k[0, :, start:end].mT * 0.3).softmax(-1) @ v[0, :, start:end]
        torch.testing.assert_close(found[0, start:end], scores.transpose(0, 1))
