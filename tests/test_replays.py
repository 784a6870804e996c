"""Proves that recorded work gives what it gives step by step, and is forgotten with its tensor."""

import contextlib
import gc
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from daco import replays
from daco.replays import Replays

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_the_first_call_runs_the_second_records_and_the_rest_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def recorded(work: replays.Work, inputs: tuple[torch.Tensor, ...]) -> object:
        made.append(len(inputs))
        return lambda given: (given[0] * 100,)

    monkeypatch.setattr(replays, "_recorded", recorded)
    owner, one, found = torch.zeros(3), torch.ones(1), Replays(most=2)
    for key in ("a", "b", "c"):
        seen = [float(found.run(owner, key, lambda x: (x * 2,), one)[0]) for _ in range(3)]
        assert seen == ([2.0, 100.0, 100.0] if key != "c" else [2.0, 2.0, 2.0])
    assert made == [1, 1]
    assert float(found.run(torch.zeros(3), "a", lambda x: (x * 2,), one)[0]) == 2.0  # of another tensor


def test_recordings_go_with_their_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "_recorded", lambda work, inputs: lambda given: given)
    owner, found = torch.zeros(3), Replays()
    for _ in range(2):
        found.run(owner, "a", lambda x: (x,), torch.ones(1))
    assert len(found._of) == 1
    del owner
    gc.collect()
    assert len(found._of) == 0


def test_what_cannot_be_recorded_runs_step_by_step_and_says_so_once() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU can record")
    owner, found = torch.zeros(3), Replays()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = [float(found.run(owner, "a", lambda x: (x * 2,), torch.ones(1))[0]) for _ in range(4)]
    assert seen == [2.0] * 4
    assert ["without a CUDA graph" in str(one.message) for one in caught] == [True]


def test_a_recording_is_made_on_a_stream_of_its_inputs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own stream for recordings stays on the device of the first, and records nothing of others."""
    current, recorded_on = [0], []

    @contextlib.contextmanager
    def device(number: int) -> Iterator[None]:
        before, current[0] = current[0], number
        yield
        current[0] = before

    @contextlib.contextmanager
    def graph(made: Any, stream: Any = None, **options: Any) -> Iterator[None]:
        recorded_on.append((current[0], stream.device if stream else 0, options))
        yield

    def stream() -> Any:
        return SimpleNamespace(device=current[0], wait_stream=lambda other: None)

    fakes = {"device": device, "graph": graph, "Stream": stream, "current_stream": stream}
    fakes |= {"stream": lambda chosen: contextlib.nullcontext(), "CUDAGraph": SimpleNamespace}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    there = SimpleNamespace(device=1, clone=lambda: torch.ones(2))
    made = replays._recorded(lambda x: (2 * x,), (there,))  # type: ignore[arg-type]
    assert isinstance(made, replays._Recorded)
    assert recorded_on == [(1, 1, {"capture_error_mode": "thread_local"})]
    assert made._outputs[0].tolist() == [2, 2]


@on_a_gpu
def test_replays_on_a_gpu_take_the_inputs_of_each_call() -> None:
    owner, found = torch.randn(700, 50, device="cuda"), Replays()

    def work(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        near = (x @ owner.T).topk(5, sorted=False).indices
        return owner[near].sum(1) * y, (y > 0).any()

    for i in range(5):
        x, y = torch.randn(3, 50, device="cuda"), torch.full((3, 1), float(i - 2), device="cuda")
        with torch.inference_mode(i % 2 == 0):
            got = [t.clone() for t in found.run(owner, "a", work, x, y)]
        for one, other in zip(got, work(x, y), strict=True):
            torch.testing.assert_close(one, other)
    assert isinstance(found._of[owner]["a"], replays._Recorded)
