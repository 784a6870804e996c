"""Steering where models are served, with streamers, pipelines, device maps and threads, as in a script."""

import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import small_sae
import torch
from conftest import CAPTIONS, drawn_images, in_thread, inputs_of, tiny

from daco.errors import SteeringConflictError
from daco.sites import ModelFacts
from daco.steering_sae import SteeringSAE

pytestmark = pytest.mark.filterwarnings("ignore:base model not confirmed")

KINDS = ("llava", "qwen2_5_vl", "internvl")
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def without_gradients() -> Generator[None, None, None]:
    with torch.no_grad():
        yield


class Served:
    """A tiny model with its processor, a prompt with an image, and SAEs for it."""

    def __init__(self, kind: str) -> None:
        self.model, self.processor = tiny(kind)
        self.sae: SteeringSAE = small_sae.steering_sae(ModelFacts.of(self.model), dtype=torch.float32)
        self.inputs = inputs_of(self.processor, 1)
        self.tokenizer = self.processor.tokenizer

    def tokens(self, **options: Any) -> torch.Tensor:
        return self.model.generate(**self.inputs, **GREEDY, **options)

    def steered(self, gamma: float = 0.5) -> torch.Tensor:
        with self.sae.steer(self.model, gamma=gamma):
            return self.tokens()


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest) -> Served:
    return Served(request.param)


@pytest.fixture(scope="module")
def llava() -> Served:
    return Served("llava")


def test_a_streamer_is_given_the_steered_tokens(served: Served) -> None:
    from transformers import TextIteratorStreamer

    expected = served.steered()
    assert not torch.equal(expected, served.tokens()), "steering changes nothing"
    new = expected[0, served.inputs["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(served.tokenizer, skip_prompt=True, timeout=60)
    run = served.sae.attach(served.model, gamma=0.5)  # generate runs in a thread that did not steer
    try:
        thread = threading.Thread(target=lambda: served.tokens(streamer=streamer))
        thread.start()
        said = "".join(streamer)
        thread.join()
    finally:
        run.remove()
    assert said == served.tokenizer.decode(new)
    assert run.report().layers[0].positions["generated"] == GREEDY["max_new_tokens"] - 1


def test_a_pipeline_is_steered_by_its_model(served: Served) -> None:
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=served.model, processor=served.processor)
    content = [{"type": "image", "image": drawn_images(1)[0]}, {"type": "text", "text": CAPTIONS[0]}]
    messages = [{"role": "user", "content": content}]
    options = {"generate_kwargs": GREEDY, "return_full_text": False}
    with served.sae.steer(pipe.model, gamma=0.5) as run:
        said = pipe(text=messages, **options)[0]["generated_text"]
    new = served.steered()[0, served.inputs["input_ids"].shape[1] :]
    assert said == served.tokenizer.decode(new, skip_special_tokens=True)
    assert said != pipe(text=messages, **options)[0]["generated_text"]
    assert run.report().layers[0].positions["image"] > 0


def test_a_model_loaded_with_a_device_map_is_steered_alike(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    served.model.save_pretrained(tmp_path / "model")
    room = {"cpu": 2 * sum(p.nbytes for p in served.model.parameters()) // 3}  # the rest goes to the disk
    loaded = type(served.model).from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=room, offload_folder=tmp_path / "disk"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    with served.sae.steer(loaded, gamma=0.5) as run:
        found = loaded.generate(**served.inputs, **GREEDY)
    assert torch.equal(found, served.steered())
    assert run.report().positions > 0


def test_two_threads_do_not_get_each_others_settings(llava: Served) -> None:
    expected = llava.steered()

    def steer_too() -> None:
        with llava.sae.steer(llava.model, gamma=0.0):
            llava.tokens()

    with llava.sae.steer(llava.model, gamma=0.5):
        error = in_thread(steer_too)
        assert isinstance(error, SteeringConflictError)
        assert "steered by SAE steering, eta 0.5, gamma 0.5" in str(error)
        error = in_thread(llava.tokens)  # nor is it steered by what it did not ask for
        assert isinstance(error, SteeringConflictError)
        assert "attach()" in str(error)
        assert torch.equal(llava.tokens(), expected)
    in_thread(steer_too)
    assert isinstance(in_thread(lambda: llava.steered(0.5)), torch.Tensor)
    assert torch.equal(llava.tokens(), in_thread(llava.tokens)), "a hook is left"


def test_threads_that_race_for_a_model_are_steered_as_asked_or_refused(llava: Served) -> None:
    expected = {gamma: llava.steered(gamma) for gamma in (0.1, 0.5)}
    assert not torch.equal(expected[0.1], expected[0.5])
    found: list[tuple[float, Any]] = []
    start = threading.Barrier(4)

    def work(gamma: float) -> None:
        start.wait()
        for _ in range(3):
            try:
                with torch.no_grad():
                    found.append((gamma, llava.steered(gamma)))
            except SteeringConflictError as error:
                found.append((gamma, error))

    threads = [threading.Thread(target=work, args=(gamma,)) for gamma in (0.1, 0.5, 0.1, 0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    answers = [(gamma, tokens) for gamma, tokens in found if isinstance(tokens, torch.Tensor)]
    assert answers
    assert all(torch.equal(tokens, expected[gamma]) for gamma, tokens in answers)


def test_many_threads_are_served_by_one_attached_run(llava: Served) -> None:
    expected = llava.steered()
    run = llava.sae.attach(llava.model, gamma=0.5)
    found: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(llava.tokens())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.remove()
    assert len(found) == 4
    assert all(torch.equal(tokens, expected) for tokens in found)
    report = run.report()
    assert report.forwards == 4 * GREEDY["max_new_tokens"]
    assert report.layers[0].positions["generated"] == 4 * (GREEDY["max_new_tokens"] - 1)
