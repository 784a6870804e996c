"""Proves that benchmarks of SAE training run when tiny, and that the big model is of the published size."""

import json

import pytest
import torch

from benchmarks import sae_end_to_end as bench
from benchmarks import sae_training
from daco.sites import find_trunk


def test_it_measures_a_tiny_model_on_a_cpu(tmp_path, capsys):
    results = tmp_path / "results.json"
    sizes = ["--atoms", "64", "--k", "3", "--batch", "16", "--stimuli", "2", "--rounds", "2"]
    bench.main(["--shape", "tiny", "--device", "cpu", "--results", str(results), *sizes])
    table = json.loads(results.read_text())
    assert [row["work"].split(",")[0] for row in table] == ["forward alone", "SAEs alone", "forward and SAEs"]
    assert all(row["value"] > 0 for row in table)
    assert table[0]["ratio"] == 1.0
    assert "forward and SAEs" in capsys.readouterr().out


def test_the_saes_learn_from_what_the_forward_gives():
    shape = bench.SHAPES["tiny"]
    model = bench.built(shape, "cpu", torch.float32)
    inputs = bench.pictures(model, 3, shape["side"], shape["words"], 0)
    found = bench.forward(model, inputs, shape["layers"])
    assert list(found) == shape["layers"]
    n_tokens = 3 * (1 + 4 + 5)  # a mark, 56 / 14 / 2 = 2 x 2 merged patches, words
    assert all(z.shape == (n_tokens, 32) for z in found.values())
    whole = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[1], whole[2].flatten(0, 1))  # the first is of the embeddings
    training = bench.started(found[1], bench.SaeConfig(n_atoms=64, k=3, steps=10, learning_rate=1e-2))
    first = float(training.loss(found[1]))
    for _ in range(10):
        training.step(found[1])
    assert float(training.loss(found[1])) < first


def test_windows_attended_to_in_one_call_give_what_transformers_gives():
    model = bench.built(bench.SHAPES["tiny"], "cpu", torch.float32)
    inputs = bench.pictures(model, 2, 224, 5, 0)  # 2 x 2 windows a picture
    found = bench.forward(model, inputs, [2])[2]
    model.model.visual.config._attn_implementation = "sdpa"
    torch.testing.assert_close(found, bench.forward(model, inputs, [2])[2])


def test_the_big_model_has_the_published_size():
    model = bench.built(bench.SHAPES["7b"], "meta", torch.bfloat16)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 8.29  # as its page says
    assert (find_trunk(model).hidden_size, find_trunk(model).n_layers) == (3584, 28)


def test_contenders_take_turns_and_keep_the_rows_of_those_that_did_not_run(tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    other = {
        "work": "train, d 32, m 64, k 4, batch 64",
        "who": "another",
        "unit": "tokens / CPU s",
        "value": 1,
    }
    old = other | {"who": "DACO"}
    results.write_text(json.dumps([other, old]))
    options = ["--shape", "tiny", "--rounds", "2", "--steps", "3", "--only", "DACO;matmul, float32"]
    monkeypatch.setattr("sys.argv", ["sae_training", *options, "--results", str(results)])
    sae_training.main()
    table = json.loads(results.read_text())
    assert [row["who"] for row in table] == ["another", "DACO", "DACO", "DACO", "matmul, float32"]
    speed, fve, memory, limit = table[1:]
    assert (speed["steps"], fve["work"].split(",")[0]) == (6, "FVE after 576 tokens")
    assert speed["ratio"] == pytest.approx(speed["value"] / limit["value"], rel=0.01, abs=6e-4)  # rounded
    assert fve["value"] > 0
    assert memory["value"] > 0


def test_the_share_of_a_gpu_s_peak_counts_the_encoder_s_product(monkeypatch):
    shape = {"batch": 4_096, "d": 3_584, "m": 15_000}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    (row,) = sae_training.of_the_peak("here", shape, seconds=2e-3)
    assert row["value"] == pytest.approx(2 * 4_096 * 3_584 * 15_000 / 2e-3 / 1e12, abs=0.1)
    assert row["ratio"] == pytest.approx(row["value"] / 989, abs=1e-3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert sae_training.of_the_peak("here", shape, seconds=2e-3) == []
