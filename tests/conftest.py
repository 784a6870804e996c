"""Fixtures of the whole suite: one thread of torch, and tiny models of real classes, built once a session."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from builders.vision import ensure_torchvision

CAPTIONS = [
    "a red circle beside a blue square",
    "two green triangles on a wide white ground, seen from far above",
    "a small yellow star over the sea",
    "nothing but a grey wall, dimly lit",
]

torch.set_num_threads(1)
ensure_torchvision()  # before anything of transformers is imported, whichever test comes first


def tiny(kind: str, **sizes: int) -> tuple[Any, Any]:
    """A tiny model and its processor; a fresh one each call."""
    from builders.tiny import tiny_mllm

    return tiny_mllm(kind, CAPTIONS, **sizes)


def drawn_images(n: int, seed: int = 0) -> list[Any]:
    """Random images of odd sizes."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    sizes = draw.integers(33, 90, (n, 2))
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def inputs_of(processor: Any, n: int = 2, images: bool = True) -> Any:
    """A left-padded batch of chat prompts of unequal length."""
    from builders.mllm import chat_inputs

    return chat_inputs(processor, CAPTIONS[:n], drawn_images(n) if images else None)


def in_thread(work: Any) -> Any:
    """Result or error of a call in another thread."""
    found: list[Any] = []

    def call() -> None:
        try:
            with torch.no_grad():
                found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


def _fixture(kind: str) -> Callable[[], tuple[Any, Any]]:
    @pytest.fixture(scope="session", name=f"tiny_{kind}")
    def build() -> tuple[Any, Any]:
        """Model and processor; leave both as they are."""
        return tiny(kind)

    return build


tiny_llava = _fixture("llava")
tiny_qwen2_5_vl = _fixture("qwen2_5_vl")
tiny_internvl = _fixture("internvl")
