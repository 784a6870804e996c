"""Proves that the benchmark of forward and SAEs together runs, its big model being of the published size."""

import json

import torch

from benchmarks import sae_end_to_end as bench
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


def test_the_big_model_has_the_published_size():
    model = bench.built(bench.SHAPES["7b"], "meta", torch.bfloat16)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 8.29  # as its page says
    assert (find_trunk(model).hidden_size, find_trunk(model).n_layers) == (3584, 28)
