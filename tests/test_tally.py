"""Counting many positions at once gives what counting one by one does, and keeps few of them."""

import sys
import threading
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import inputs_of

import daco
from daco.report import HELD, HELD_POSITIONS, PLACES, Tally, layer_report
from daco.sites import ModelFacts


class Removed:
    """A method that removes atoms numbered from 10, and shifts nothing."""

    def __init__(self, n_atoms: int) -> None:
        self.numbers = list(range(10, 10 + n_atoms))

    def atoms(self, layer: int) -> list[int]:
        return self.numbers

    def names(self, layer: int, atom: int) -> list[str]:
        return [str(atom)]

    def shifted(self, layer: int) -> bool:
        return False


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[1] * 203, [5] * 40, [300, 1, 1, 70, 1], [1], [HELD_POSITIONS]])
def test_counts_are_those_of_every_position(sizes: list[int]) -> None:
    n, tally = sum(sizes), Tally(7, torch.device("cpu"))
    z, delta, strengths = draw(n, 32, seed=0), draw(n, 32, seed=1), draw(n, 7, seed=2)
    strengths[strengths.abs() < 0.5] = 0  # MOP's codes have a sign
    weight = draw(n, seed=3) > 0
    weight[-1] = True
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        whole = size > 1  # several positions are chosen before, single ones by a weight
        weight[part] = True if whole else weight[part]
        tally.add(z[part], delta[part], strengths[part], None if whole else weight[part])
        assert len(tally._held) < HELD
        assert sum(len(held[0]) for held in tally._held) < HELD_POSITIONS
        start += size
    kept = int(weight.sum())
    tally.add_places(torch.tensor([[0, 0, kept - 2], [0, 1, 0]]))
    tally.add_places(torch.tensor([[0, 0, 1]]))  # a batch of fewer rows
    report = layer_report(3, tally, Removed(7))
    relative = (delta.norm(dim=1) / z.norm(dim=1))[weight]
    assert report.positions == dict(zip(PLACES, (0, 1, kept - 1), strict=True))
    assert report.by_row == [dict(zip(PLACES, row, strict=True)) for row in ((0, 0, kept - 1), (0, 1, 0))]
    assert report.relative_change == pytest.approx(float(relative.mean()), rel=1e-12)
    assert report.relative_change_max == pytest.approx(float(relative.max()), rel=1e-12)
    fired = {found.atom - 10: found for found in report.atoms}
    for atom in range(7):
        own = strengths[weight, atom]
        own = own[own != 0]
        assert len(own) == (fired[atom].positions if atom in fired else 0)
        if len(own):
            assert fired[atom].mean_strength == pytest.approx(float(own.mean()), rel=1e-9)
    totals = [abs(found.mean_strength * found.positions) for found in report.atoms]
    assert totals == sorted(totals, reverse=True)


def test_a_report_read_while_another_thread_steers_loses_no_count(tiny_llava: Any) -> None:
    model, processor = tiny_llava
    inputs = inputs_of(processor, 1, images=False)
    facts = ModelFacts.of(model)
    vectors = {1: draw(3, facts.hidden_size, seed=0).float()}
    concepts = pd.DataFrame(
        {
            "concept_id": list("abc"),
            "concept": list("abc"),
            "polarity": ["undesirable", "desirable", "neutral"],
        }
    )
    method = daco.ActAdd(daco.ConceptDictionary(concepts, vectors, facts, {1: 1.0}))
    handle = daco.attach(model, method, base_model_ok=True)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            handle.report()

    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(60):
            model(**inputs)
    finally:
        done.set()
        reader.join()
        sys.setswitchinterval(old)
        handle.remove()
    assert handle.report().positions == 60 * int(inputs["attention_mask"].sum())


def test_a_report_may_be_read_again_and_counting_goes_on() -> None:
    tally = Tally(1, torch.device("cpu"))
    for expected in (1, 2, 3):
        with torch.inference_mode():
            tally.add(draw(1, 4, seed=0), draw(1, 4, seed=1), torch.ones(1, 1), None)
        for _ in range(2):
            report = layer_report(0, tally, Removed(1))
            assert report.atoms[0].positions == expected
