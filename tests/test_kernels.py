"""Proves that kernels are taken on a GPU alone, where Triton is and works, and are done without elsewhere."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from builders import proposals, sae_step
from daco import sparse_coding, top_k
from daco.kernels import kernels_of

ROOMS = {
    "builders.sae_kernels": (sae_step.kernels_for, "training goes on"),
    "builders.retrieval_kernels": (lambda x: proposals.kernels_for(x.device), "retrieval goes on"),
    "daco.solver_kernels": (sparse_coding.kernels_for, "codes are found"),
    "daco.top_k_kernels": (top_k.kernels_for, "atoms are chosen"),
}
"""Modules of kernels: what gives them for a tensor, and what is said where they do not work."""


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What was found before, and is found here, is forgotten: a GPU's other tests want the true kernels."""
    kernels_of.cache_clear()
    yield
    kernels_of.cache_clear()


def there(kind: str) -> Any:
    return SimpleNamespace(device=torch.device(kind))


@pytest.mark.parametrize("module", ROOMS)
def test_without_triton_there_are_none(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ROOMS[module][0](there("cuda")) is None


def with_triton(monkeypatch: pytest.MonkeyPatch, module: str, tried: Callable[[], None]) -> Any:
    """The module's place is taken by one that is tried so."""
    made = SimpleNamespace(tried=tried)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, module, made)
    return made


@pytest.mark.parametrize("module", ROOMS)
def test_with_triton_they_are_for_a_gpu_alone_and_tried_once(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    made = with_triton(monkeypatch, module, lambda: tried.append(1))
    for kind in ("cuda", "cuda:1", "cpu", "meta"):
        assert ROOMS[module][0](there(kind)) is (made if "cuda" in kind else None)
    assert tried == [1]


@pytest.mark.parametrize("module", ROOMS)
def test_a_triton_that_cannot_compile_is_done_without(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise RuntimeError("no C compiler")

    with_triton(monkeypatch, module, refuses)
    kernels_for, what = ROOMS[module]
    with pytest.warns(UserWarning, match=f"{what} without Triton, more slowly: no C compiler"):
        assert kernels_for(there("cuda")) is None
    assert kernels_for(there("cuda")) is None  # said once
