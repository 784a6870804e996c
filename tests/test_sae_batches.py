"""Proves that training reads a shuffled order across all shards, reproducible and in bounded memory."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_rows import CONFIG
from safetensors.torch import save_file
from small_run import stimulus_ids, write_ids

from builders.sae_batches import AHEAD, batch_index, batches
from builders.tokens import TokenShards

N_SHARDS, STIMULI, TOKENS, D_MODEL = 8, 16, 32, 1024
SIZE = N_SHARDS * STIMULI * TOKENS


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    """8 shards of 512 tokens at two layers, 33 MB in all; the first number of a token is its own number."""
    folder, ids = tmp_path_factory.mktemp("shards"), stimulus_ids(N_SHARDS * STIMULI)
    for number in range(N_SHARDS):
        shard = folder / f"{number:05d}"
        shard.mkdir()
        tokens = torch.full((STIMULI * TOKENS, 2, D_MODEL), float(number))
        tokens[:, 1, 0] = torch.arange(len(tokens)) + number * len(tokens)
        save_file(
            {"tokens": tokens, "n_tokens": torch.full((STIMULI,), TOKENS)}, shard / "tokens.safetensors"
        )
        write_ids(shard, ids[number * STIMULI :][:STIMULI])
    return TokenShards(sorted(folder.iterdir()), 1, 0.0, False)


def order(shards: TokenShards, steps: range, seed: int = 3) -> torch.Tensor:
    """Numbers of the tokens that these steps see, [steps, batch]."""
    return torch.tensor([z[:, 0].tolist() for z in batches(shards, CONFIG, seed, 1, steps, "cpu")]).long()


def test_the_order_is_the_same_again_and_taken_up_at_any_step(shards):
    whole = order(shards, range(12))
    assert whole.shape == (12, CONFIG.batch)
    assert torch.equal(order(shards, range(12)), whole)
    assert torch.equal(order(shards, range(5, 12)), whole[5:])
    assert not torch.equal(order(shards, range(12), seed=4), whole)


def test_every_batch_is_drawn_evenly_from_all_shards():
    index = batch_index(0, 1, 0, 4_096, SIZE) // (STIMULI * TOKENS)
    counts = np.bincount(index, minlength=N_SHARDS)
    assert len(counts) == N_SHARDS
    expected = 4_096 / N_SHARDS
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-squared, 7 degrees, one in a thousand


def test_tokens_are_drawn_with_replacement_independently_of_one_another():
    steps, size = 64, 1_024
    drawn = np.concatenate([batch_index(0, 1, step, size, steps * size) for step in range(steps)])
    times = np.bincount(np.bincount(drawn, minlength=steps * size), minlength=8)[:8] / (steps * size)
    poisson = [math.exp(-1) / math.factorial(n) for n in range(8)]
    assert times == pytest.approx(
        poisson, abs=0.01
    )  # in the time of an epoch a token is seen once on average


def test_no_more_than_a_few_batches_are_read_ahead(shards):
    asked: list[int] = []

    class Counting:
        d_model = D_MODEL

        def __len__(self):
            return len(shards)

        def rows(self, index):
            asked.append(len(index))
            return shards.rows(index)

    for step, _ in enumerate(batches(Counting(), CONFIG, 3, 1, range(9), "cpu")):
        assert step + 1 <= len(asked) <= step + 1 + AHEAD
    assert asked == [CONFIG.batch] * 9


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="needs /proc to see this process's memory"
)
def test_shards_stay_on_disk_whatever_their_size(shards):
    def own_memory() -> int:
        """Bytes of this process that no file stands behind."""
        text = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))

    on_disk = sum(path.stat().st_size for folder in shards.folders for path in folder.iterdir())
    order(shards, range(3))
    before = own_memory()
    again = TokenShards(shards.folders, 1, 0.0, False)
    seen = order(again, range(400)).unique()
    assert len(seen) > 0.75 * SIZE  # nearly all of it was read
    assert own_memory() - before < on_disk / 4
