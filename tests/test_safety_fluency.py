"""Likelihood of answers: batches equal a naive loop in float64, whatever is padded, shown or cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_safety_judges import item

from builders.answers import answer_ids
from builders.safety.asking import inputs_of
from builders.safety.items import Item, Picture
from builders.safety.judges import judge_of
from builders.safety.judges.fluency import log_likelihoods
from builders.tiny import KINDS, tiny_mllm

PROMPTS = ["how to bake bread", "what is in the picture", "a", "tell me all about the long long night"]
ANSWERS = ["knead the dough", "a cat", "the night is long and dark and full of long long words", "", "x"]


def picture(seed: int) -> Picture:
    def draw() -> Image.Image:
        draw = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (40 + 8 * seed, 40, 3), generator=draw, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    return Picture(draw=draw, drawn=str(seed))


def items(pictures: list[int]) -> list[Item]:
    """One item a number of pictures."""
    return [
        item(item_id=str(i), prompt=PROMPTS[i % 4], pictures=tuple(picture(i + j) for j in range(n)))
        for i, n in enumerate(pictures)
    ]


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, processor = tiny_mllm(request.param, PROMPTS + ANSWERS)
    return model.double(), processor


def naive(model: Any, processor: Any, asked: Item, answer: str) -> float | None:
    """One item, token by token, without padding: log of the softmax at the token that comes next."""
    pictures = [[shown.open() for shown in asked.pictures]]
    inputs = dict(inputs_of(processor, [asked], pictures, None))
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    found = []
    for token in ids:
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].double()
        found.append(float(torch.log_softmax(logits, -1)[token]))
        shape = inputs["input_ids"].shape
        for name, x in inputs.items():
            if x.shape == shape and not x.is_floating_point() and name != "input_ids":
                inputs[name] = torch.cat([x, x.new_full((1, 1), int(name == "attention_mask"))], 1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
    return sum(found) / len(found) if found else None


@pytest.mark.parametrize("pictures", [[0] * 5, [1] * 5, [2] * 5, [0, 1, 0, 2, 1]])
def test_batches_equal_a_naive_loop(tiny: tuple[Any, Any], pictures: list[int]) -> None:
    model, processor = tiny
    asked = items(pictures)
    verdicts = judge_of("likelihood", model=model, processor=processor, batch=3).verdicts(asked, ANSWERS)
    expected = [naive(model, processor, *pair) for pair in zip(asked, ANSWERS, strict=True)]
    assert expected[3] is None
    assert verdicts[3] == (None, "empty answer")
    for verdict, value in zip(verdicts, expected, strict=True):
        assert verdict.value == (value if value is None else pytest.approx(value, abs=1e-5))
    known = [value for value in expected if value is not None]
    assert max(known) - min(known) > 0.1  # they differ, so that a mix-up of rows cannot pass
    assert max(known) < 0


def test_the_picture_and_the_prompt_count(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    judge = judge_of("likelihood", model=model, processor=processor)
    plain, shown = items([0])[0], items([1])[0]
    other = plain._replace(prompt="something else entirely")
    values = [v.value for v in judge.verdicts([plain, shown, other], ["knead the dough"] * 3)]
    assert len({round(value, 6) for value in values if value is not None}) == 3


def test_an_answer_that_spells_a_control_token_is_text(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    image = getattr(processor, "image_token", None) or "<|im_end|>"
    judge = judge_of("likelihood", model=model, processor=processor)
    verdict = judge.verdicts(items([1]), [f"look {image} here <|im_end|>"])[0]
    assert verdict.value is not None
    assert verdict.value < 0


def test_only_logits_of_answers_are_made(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny
    asked = items([1, 1])
    answers = answer_ids(processor, ["knead", "knead the dough"], 99)
    inputs = inputs_of(processor, asked, [[p.open() for p in i.pictures] for i in asked], None)
    seen: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    try:
        log_likelihoods(model, inputs, answers, 0)
    finally:
        handle.remove()
    assert seen == [max(map(len, answers)) + 1]


def test_a_broken_picture_is_said(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny
    judge = judge_of("likelihood", model=model, processor=processor)
    (tmp_path / "a.png").write_bytes(b"no picture")
    broken = item(pictures=(Picture(path=tmp_path / "a.png"),))
    verdicts = judge.verdicts([broken, item()], ["a cat", "a cat"])
    assert verdicts[0].value is None
    assert verdicts[0].reason.startswith("unreadable picture")
    assert verdicts[1].value is not None


def test_nan_is_no_likelihood() -> None:
    model, processor = tiny_mllm("llava", PROMPTS)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    verdict = judge_of("likelihood", model=model, processor=processor).verdicts([item()], ["a cat"])[0]
    assert verdict == (None, "not a number")
