"""Proves directions against a naive mean of positives minus mean of negatives, and R against a median."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import D_MODEL, LAYERS, digests, opened, small_recipe, stimulus_ids, write_activations

from builders import directions as stage
from builders.tokens import held_out
from daco.errors import ActivationError
from daco.tables import CONCEPTS, LINKS, write_table

IDS = stimulus_ids(23)
CONCEPT_IDS = [f"user:c{i}" for i in range(5)]


def links(seed: int = 1, stimuli: list[str] | None = None) -> pd.DataFrame:
    """3 to 6 positives and as many negatives a concept."""
    draw, rows = np.random.default_rng(seed), []
    for concept in CONCEPT_IDS:
        n = int(draw.integers(3, 7))
        chosen = draw.choice(stimuli or IDS, 2 * n, replace=False)
        rows += [(concept, s, "positive" if i < n else "negative") for i, s in enumerate(chosen)]
    return pd.DataFrame(rows, columns=["concept_id", "stimulus_id", "role"])


def naive(frame: pd.DataFrame, z: dict[str, np.ndarray], concept: str) -> np.ndarray:
    means = []
    for role in ("positive", "negative"):
        chosen = frame[(frame.concept_id == concept) & (frame.role == role)].stimulus_id
        means.append(np.mean([z[s].astype(np.float64) for s in chosen if s in z], axis=0))
    return means[0] - means[1]


def readings(n: int = 23, n_layers: int = 2) -> torch.Tensor:
    return 100 + torch.randn(n, n_layers, D_MODEL, generator=torch.Generator().manual_seed(7))


def blocks(z: torch.Tensor, size: int):
    return [(start, z[start : start + size]) for start in range(0, len(z), size)]


@pytest.mark.parametrize("size", [1, 9, 100])
def test_directions_equal_the_naive_ones(size, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK", 4)
    frame, z = links(), readings()
    found = stage.contrast(CONCEPT_IDS, frame, IDS, blocks(z, size))
    by_id = dict(zip(IDS, z.numpy(), strict=True))
    for row, concept in enumerate(CONCEPT_IDS):
        expected = naive(frame, by_id, concept)
        np.testing.assert_allclose(found.directions[:, row], expected, rtol=1e-5, atol=1e-6)
    assert found.n_positive == [
        sum((frame.concept_id == c) & (frame.role == "positive")) for c in CONCEPT_IDS
    ]
    assert found.n_negative == [
        sum((frame.concept_id == c) & (frame.role == "negative")) for c in CONCEPT_IDS
    ]
    assert found.directions.shape == (2, 5, D_MODEL)
    negatives = [by_id[s] for s in frame[frame.role == "negative"].stimulus_id]
    np.testing.assert_allclose(found.baseline, np.mean(negatives, axis=0), rtol=1e-5)


def test_stimuli_without_a_reading_are_left_out_of_the_means():
    frame, z = links(), readings()
    found = stage.contrast(CONCEPT_IDS, frame, IDS[:20], blocks(z[:20], 9))
    expected = naive(frame, dict(zip(IDS[:20], z[:20].numpy(), strict=True)), CONCEPT_IDS[2])
    np.testing.assert_allclose(found.directions[:, 2], expected, rtol=1e-5, atol=1e-6)
    read = dict(zip(IDS[:20], z[:20].numpy(), strict=True))
    negatives = [read[s] for s in frame[frame.role == "negative"].stimulus_id if s in read]
    np.testing.assert_allclose(found.baseline, np.mean(negatives, axis=0), rtol=1e-5)
    assert (
        sum(found.n_positive) + sum(found.n_negative) == frame.stimulus_id.isin(IDS[:20]).sum() < len(frame)
    )


def test_concept_without_negatives_is_refused():
    frame = links()
    frame = frame[(frame.concept_id != "user:c3") | (frame.role == "positive")]
    with pytest.raises(ActivationError, match=r"got none for 1 of 5: \['user:c3'\]"):
        stage.contrast(CONCEPT_IDS, frame, IDS, blocks(readings(), 9))


def test_zero_direction_is_refused():
    frame, z = links(), readings()
    z[:] = 1.5
    with pytest.raises(ActivationError, match="finite and not zero, got otherwise for 5 concepts"):
        stage.contrast(CONCEPT_IDS, frame, IDS, blocks(z, 9))


def test_nan_reading_is_refused():
    frame, z = links(), readings()
    z[IDS.index(frame.stimulus_id[0]), 1, 3] = torch.nan
    with pytest.raises(ActivationError, match="user:c0"):
        stage.contrast(CONCEPT_IDS, frame, IDS, blocks(z, 9))


@pytest.fixture
def upstream(tmp_path):
    write_activations(tmp_path)
    recipe = small_recipe()
    work = opened(recipe, tmp_path, "polarity")
    rows = [
        {"concept_id": c, "concept": c[5:], "polarity": "neutral", "n_positive": 3, "rank": i}
        for i, c in enumerate(CONCEPT_IDS)
    ]
    write_table(work.folder / "concepts.parquet", pa.Table.from_pylist(rows, schema=CONCEPTS))
    work.finish({})
    work = opened(recipe, tmp_path, "stimuli")
    table = pa.Table.from_pylist(links().to_dict("records"), schema=LINKS)
    write_table(work.folder / "links.parquet", table)
    work.finish({})
    return tmp_path


def run(out):
    stage.run(opened(small_recipe(sae={"holdout": 0.3}), out, "directions"))
    return digests(out / "directions")


def test_stage_writes_directions_and_facts(upstream):
    run(upstream)
    tensors = load_file(upstream / "directions" / "directions.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == {"layer_1": [5, 32], "layer_2": [5, 32]}
    shards = sorted((upstream / "activations" / "shards").iterdir())
    z = torch.cat([load_file(s / "readings.safetensors")["readings"] for s in shards]).numpy()
    for position, layer in enumerate(LAYERS):
        expected = naive(links(), dict(zip(IDS, z[:, position], strict=True)), "user:c4")
        np.testing.assert_allclose(tensors[f"layer_{layer}"][4], expected, rtol=1e-4, atol=1e-5)
    facts = json.loads((upstream / "directions" / "facts.json").read_text())
    assert (facts["layers"], facts["model"]["hidden_size"]) == ([1, 2], 32)
    assert sum(facts["n_positive"]) == (links().role == "positive").sum()


def test_R_is_the_median_norm_of_training_tokens(upstream):
    run(upstream)
    norms = []
    for shard in sorted((upstream / "activations" / "shards").iterdir()):
        stored, row = load_file(shard / "tokens.safetensors"), 0
        for stimulus, n in zip(json.loads((shard / "ids.json").read_text()), stored["n_tokens"], strict=True):
            if not held_out(stimulus, 0.3):
                norms.append(stored["tokens"][row : row + int(n)].norm(dim=-1))
            row += int(n)
    expected = np.median(torch.cat(norms).numpy(), axis=0)
    found = json.loads((upstream / "directions" / "facts.json").read_text())["R"]
    assert [found["1"], found["2"]] == pytest.approx(expected.tolist(), rel=1e-6)


def test_same_inputs_same_bytes(upstream):
    first = run(upstream)
    (upstream / "directions" / "stage.json").unlink()
    assert run(upstream) == first


def test_empty_source_is_refused(upstream):
    for shard in sorted((upstream / "activations" / "shards").iterdir()):
        (shard / "ids.json").write_text("[]")
        save_file({"readings": torch.empty(0, 2, 32)}, shard / "readings.safetensors")
    with pytest.raises(ActivationError, match="got none for 5 of 5"):
        run(upstream)
