"""Proves that the benchmark of steering counts no length at which a GPU may still have to plan attention."""

import argparse
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks import steering


def test_every_length_that_counts_was_decoded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def decode(model: Any, ids: torch.Tensor, cache: Any, tokens: int) -> steering.Times:
        decoded.append(tokens)
        return steering.Times(1.0, 1.0)

    monkeypatch.setattr(steering, "prefilled", lambda model, ids: None)
    monkeypatch.setattr(steering, "decode", decode)
    found = {name: steering.Contender(nullcontext, 0, 0) for name in ("none", "daco_rows")}
    arguments = argparse.Namespace(mode="eager", tokens=5, pairs=2, seed=0)
    times = steering.measure(None, found, torch.zeros(1, 3, dtype=torch.int64), arguments)
    assert decoded == [5] * (2 + 2 * 2)
    assert [len(rounds) for rounds in times.values()] == [2, 2]
