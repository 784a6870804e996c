"""Proves that SAEs train, that export folds their scale in, and that killed training resumes bit for bit."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sae_rows import ACTIVATIONS, CONFIG, Rows, dense, draw, random_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_run import (
    D_MODEL,
    LAYERS,
    N_CONCEPTS,
    Killed,
    digests,
    opened,
    small_recipe,
    write_activations,
    write_directions,
)

from builders import pipeline, sae_training
from builders import train_sae as stage
from builders.sae_batches import batch_index
from builders.sae_losses import code_of
from builders.sae_metrics import encode
from daco.errors import ActivationError, DiskError, ModelMismatchError, RecipeError


def start(activation: str) -> dict[str, torch.Tensor]:
    weights = {name: w.float() for name, w in random_weights(activation=activation).items()}
    return weights | {"W_dec": torch.nn.functional.normalize(weights["W_dec"], dim=1)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_export_folds_the_scale_in(activation):
    config = dataclasses.replace(CONFIG, activation=activation)
    training = sae_training.Training(start(activation), 12.5, config)
    z = 40 * draw(7, D_MODEL, seed=5).float()
    if activation == "batchtopk":
        training.step(z)
    scaled = code_of(z / 12.5, training.weights, config)
    raw = training.exported()
    there = dense(encode(z, raw, config))
    assert torch.equal(scaled > 0, there > 0)
    torch.testing.assert_close(12.5 * scaled, there, rtol=1e-4, atol=1e-3)
    assert set(raw) == {"W_enc", "b_enc", "W_dec", "b_dec"} | (
        {"threshold"} if activation in ("batchtopk", "jumprelu") else set()
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_lowers_the_loss_and_keeps_unit_rows(activation):
    z = draw(90, 6) @ draw(6, D_MODEL, seed=2)
    config = dataclasses.replace(CONFIG, activation=activation, steps=60, eval_steps=60)
    trained = stage.train_sae(Rows(z.float()), Rows(z[:20].float()), config, seed=1)
    torch.testing.assert_close(trained.weights["W_dec"].norm(dim=1), torch.ones(37))
    assert [row["step"] for row in trained.records] == [0, 60]
    assert trained.records[-1]["fve"] > max(0.3, trained.records[0]["fve"])
    assert trained.records[-1]["loss"] < 0.7 * trained.records[0]["loss"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_resumed_training_is_the_undisturbed_one_bit_for_bit(activation, tmp_path):
    z = (draw(90, 6) @ draw(6, D_MODEL, seed=2)).float()
    options = {"aux_k": 2, "dead_tokens": 34, "steps": 50, "eval_steps": 25, "checkpoint_steps": 21}
    config = dataclasses.replace(CONFIG, activation=activation, **options)

    def keep(training):
        if training.steps_done == 21:
            training.save(tmp_path)

    whole = stage.train_sae(Rows(z), Rows(z[:20]), config, seed=1, checkpoint=keep)
    halfway = sae_training.Training.load(tmp_path, config)
    if activation in ("topk", "batchtopk"):
        assert len(halfway.state["dead"]) > 0  # AuxK was at work
    resumed = stage.train_sae(Rows(z), Rows(z[:20]), config, seed=1, resume=halfway)
    assert resumed.records == whole.records
    for name, w in whole.parameters.items():
        assert torch.equal(w, resumed.parameters[name]), name
        assert torch.equal(
            whole.adam.state[w]["exp_avg_sq"], resumed.adam.state[resumed.parameters[name]]["exp_avg_sq"]
        )


def test_the_price_of_being_active_rises_over_the_warm_up():
    config = dataclasses.replace(CONFIG, activation="relu", steps=100, warm_up=0.1, l1=2.0)
    assert [sae_training.penalty(step, config) for step in (0, 4, 9, 50)] == pytest.approx(
        [0.2, 1.0, 2.0, 2.0]
    )
    assert sae_training.penalty(50, dataclasses.replace(config, activation="jumprelu", l0=3.0)) == 3.0
    assert sae_training.penalty(50, dataclasses.replace(config, activation="topk")) == 0.0


def test_warm_up_is_linear_over_five_percent_then_constant():
    config = dataclasses.replace(CONFIG, steps=100, learning_rate=1.0)
    rates = [sae_training.learning_rate(step, config) for step in (0, 1, 4, 5, 99)]
    assert rates == pytest.approx([0.2, 0.4, 1.0, 1.0, 1.0])


def test_batches_depend_on_seed_layer_and_step_alone():
    one = batch_index(1, 15, 3, 17, 1000)
    assert np.array_equal(one, batch_index(1, 15, 3, 17, 1000))
    others = [(2, 15, 3), (1, 16, 3), (1, 15, 4)]
    assert all(not np.array_equal(one, batch_index(*other, 17, 1000)) for other in others)


@pytest.fixture
def upstream(tmp_path):
    write_activations(tmp_path)
    write_directions(tmp_path)
    return tmp_path


def recipe(**changes):
    return small_recipe(sae=dataclasses.asdict(CONFIG) | {"holdout": 0.3} | changes)


def trained(out, killed_at=None, **changes):
    stage.run(opened(recipe(**changes), out, "sae", killed_at))
    return digests(out / "sae")


def test_stage_writes_weights_measurements_and_facts(upstream):
    trained(upstream)
    for layer in LAYERS:
        folder = upstream / "sae" / f"layers.{layer}"
        weights = load_file(folder / "sae_weights.safetensors")
        shapes = {name: list(w.shape) for name, w in weights.items()}
        assert shapes == {"W_enc": [32, 37], "b_enc": [37], "W_dec": [37, 32], "b_dec": [32]}
        table = pq.read_table(folder / "training.parquet").to_pylist()
        assert [row["step"] for row in table] == [0, 4, 8, 9]
        assert table[-1]["fve"] > table[0]["fve"]
        assert table[0]["own"] == 11
        assert table[0]["drift_cos"] == pytest.approx(1.0)
        assert table[-1]["drift_cos"] < 1
        facts = json.loads((folder / "facts.json").read_text())
        assert facts["threshold"] > 0
        assert facts["selected_in"] == "float32"  # so small a product is exact on any machine
        assert 0.3 < facts["agreement"] <= 1
        assert facts["threshold_l0"] == pytest.approx(3, abs=1.5)
    assert not (upstream / "sae" / "shards").exists()


@pytest.mark.parametrize("at", [0, 1, 5, 9, 14])
def test_killed_and_resumed_equals_undisturbed(upstream, at):
    expected = trained(upstream)
    (upstream / "sae" / "stage.json").unlink()
    with pytest.raises(Killed):
        trained(upstream, killed_at=at)
    assert not (upstream / "sae" / "done.json").exists()
    if at in (5, 14):  # at least two steps of a layer are done: a checkpoint must be there to be used
        assert len([*(upstream / "sae" / "shards").glob("layer-*")]) == 1
    assert trained(upstream) == expected


def test_dictionary_start_beats_random_start(upstream):
    def fve_at_start(**changes):
        (upstream / "sae" / "stage.json").unlink(missing_ok=True)
        trained(upstream, steps=1, **changes)
        return pq.read_table(upstream / "sae" / "layers.1" / "training.parquet")["fve"][0].as_py()

    assert fve_at_start() > fve_at_start(start="random") + 0.1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_written_in_a_form_that_can_be_used(upstream, activation):
    trained(upstream, activation=activation)
    folder = upstream / "sae" / "layers.1"
    sae, facts = stage.load_sae(folder), json.loads((folder / "facts.json").read_text())
    assert sae.activation == {"batchtopk": "jumprelu"}.get(activation, activation)
    assert facts["trained_as"] == activation
    z = Rows(draw(20, D_MODEL).float())
    assert sae.encode(5 * z.z).shape == (20, 37)
    said = stage.threshold_form(facts)
    if activation == "topk":
        assert said == {"jumprelu_threshold": facts["threshold"], "jumprelu_agreement": facts["agreement"]}
    elif activation == "batchtopk":
        assert 0 < facts["agreement"] <= 1
        assert said == {"jumprelu_agreement": facts["agreement"]}
        assert sae.threshold.unique().item() == pytest.approx(facts["threshold"])
    else:
        assert said == {}


def test_atoms_default_to_concepts_rounded_up(upstream):
    trained(upstream, n_atoms=0, k=3, start="random")
    weights = load_file(upstream / "sae" / "layers.1" / "sae_weights.safetensors")
    assert len(weights["b_enc"]) == 16  # N_CONCEPTS = 11


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"n_atoms": N_CONCEPTS - 1}, RecipeError, r"at least one atom a concept \(11\), got 10"),
        ({"k": 38}, RecipeError, "expected 1 to n_atoms = 37, got 38"),
        ({"k": 0}, RecipeError, "expected 1 to n_atoms = 37, got 0"),
        ({"holdout": 1.0}, ActivationError, "expected training tokens, got none"),
        ({"holdout": 0.0}, ActivationError, "expected held-out tokens, got none"),
    ],
)
def test_bad_recipes_are_refused(upstream, changes, error, says):
    with pytest.raises(error, match=says):
        trained(upstream, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"n_atoms": 0, "k": 17}, RecipeError, "expected 1 to n_atoms = 16, got 17"),
        ({"n_atoms": N_CONCEPTS - 1}, RecipeError, r"at least one atom a concept \(11\), got 10"),
        ({"holdout": 1.0}, ActivationError, "expected training tokens, got none; lower sae.holdout"),
        ({"holdout": 0.0}, ActivationError, "expected held-out tokens, got none; raise sae.holdout"),
        ({}, ModelMismatchError, "expected directions of width 32, got 31"),
    ],
)
def test_what_cannot_be_trained_does_not_discard_what_was(upstream, changes, error, says):
    assert pipeline.run(recipe(), upstream, only="sae") == ["sae"]
    before = digests(upstream / "sae")
    if not changes:
        narrow = {f"layer_{layer}": torch.ones(11, 31) for layer in LAYERS}
        save_file(narrow, upstream / "directions" / "directions.safetensors")
        (upstream / "directions" / "done.json").write_text('{"files": {}, "counts": {}}')
    with pytest.raises(error, match=says):
        pipeline.run(recipe(**changes), upstream, only="sae")
    assert digests(upstream / "sae") == before


def test_dictionary_of_another_width_is_refused(upstream):
    save_file({"layer_1": torch.ones(11, 31)}, upstream / "directions" / "directions.safetensors")
    with pytest.raises(ModelMismatchError, match="expected directions of width 32, got 31"):
        trained(upstream)


def test_nan_stops_training_and_keeps_the_last_good_checkpoint(upstream, monkeypatch):
    class Poisoned(stage.TokenShards):
        def rows(self, index):
            z = super().rows(index)
            return z * math.nan if np.array_equal(index, batch_index(0, 1, 5, 17, len(self))) else z

    monkeypatch.setattr(stage, "TokenShards", Poisoned)
    with pytest.raises(ActivationError, match="got NaN or infinity after step 5"):
        trained(upstream)
    kept = [*(upstream / "sae" / "shards").glob("layer-1-*")]
    assert [path.name for path in kept] == ["layer-1-step-00000004"]
    assert all(w.isfinite().all() for w in load_file(kept[0] / "training.safetensors").values())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(upstream, monkeypatch, error):
    whole = trained(upstream)
    (upstream / "sae" / "stage.json").unlink()
    calls = []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half a file")
            raise error
        return save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sae_training, "save_file", full)
        with pytest.raises(DiskError, match=r"room for checkpoint layer-1-step-00000006, got .*No space"):
            trained(upstream)
    kept = [path.name for path in (upstream / "sae" / "shards").iterdir() if path.name.startswith("layer")]
    assert kept == ["layer-1-step-00000004"]
    running = pq.read_table(upstream / "sae" / "shards" / kept[0] / "training.parquet")
    assert running["step"].to_pylist() == [0, 4]  # measurements are there while training goes on
    assert trained(upstream) == whole


def test_diverging_weights_are_never_saved(tmp_path):
    training = sae_training.Training({n: w.float() for n, w in random_weights().items()}, 1.0, CONFIG)
    training.weights["b_enc"].data[3] = math.inf
    with pytest.raises(ActivationError, match="expected finite numbers"):
        training.save(tmp_path)
    assert not [*tmp_path.iterdir()]
