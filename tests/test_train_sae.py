"""Proves the SAE loss and gradients against numpy, its export and start, and that killed training resumes."""

import dataclasses
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
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

from builders import train_sae as stage
from builders.recipe import SaeConfig
from daco.errors import ActivationError, ModelMismatchError, RecipeError

CONFIG = SaeConfig(n_atoms=37, k=3, steps=9, batch=17, eval_steps=4, checkpoint_steps=2, learning_rate=1e-2)


class Rows:
    """Tokens in memory."""

    def __init__(self, z: torch.Tensor) -> None:
        self.z, self.d_model = z, z.shape[1]

    def __len__(self) -> int:
        return len(self.z)

    def rows(self, index: np.ndarray) -> torch.Tensor:
        return self.z[torch.from_numpy(index)]

    def blocks(self, size: int):
        return iter(self.z.split(size))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(m: int = 37, d: int = D_MODEL) -> dict[str, torch.Tensor]:
    return {
        "W_enc": draw(d, m, seed=1),
        "b_enc": draw(m, seed=2),
        "W_dec": draw(m, d, seed=3),
        "b_dec": draw(d, seed=4),
    }


def naive(x: np.ndarray, w: dict[str, np.ndarray], activation: str, k: int, l1: float):
    """Loss and gradients by hand, one row at a time."""
    gradients = {name: np.zeros_like(value) for name, value in w.items()}
    norms = np.sqrt((w["W_dec"] ** 2).sum(1))
    l1 = l1 if activation == "relu" else 0.0
    total, B = 0.0, len(x)
    for row in x:
        pre = (row - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        on = pre > 0
        if activation == "topk":
            keep = sorted(range(len(pre)), key=lambda i: (-pre[i], i))[:k]
            on &= np.isin(np.arange(len(pre)), keep)
        c = np.where(on, pre, 0)
        error = c @ w["W_dec"] + w["b_dec"] - row
        total += (error**2).sum() + l1 * (c * norms).sum()
        g = 2 * error / B
        pulled = (g @ w["W_dec"].T + l1 / B * norms) * on
        gradients["W_dec"] += np.outer(c, g) + l1 / B * (c / norms)[:, None] * w["W_dec"]
        gradients["W_enc"] += np.outer(row - w["b_dec"], pulled)
        gradients["b_enc"] += pulled
        gradients["b_dec"] += g - w["W_enc"] @ pulled
    return total / B, gradients


@pytest.mark.parametrize(("activation", "l1"), [("relu", 0.3), ("relu", 0.0), ("topk", 0.3)])
def test_loss_and_gradients_equal_the_naive_ones(activation, l1):
    x, weights = draw(7, D_MODEL, seed=9), random_weights()
    expected, gradients = naive(x.numpy(), {n: w.numpy() for n, w in weights.items()}, activation, 5, l1)
    parameters = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = stage.loss_of(x, parameters, activation, 5, l1)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            parameters[name].grad.numpy(), gradient, rtol=1e-10, atol=1e-11, err_msg=name
        )


def test_start_is_the_unit_dictionary_then_random_unit_rows():
    raw, mean = draw(11, D_MODEL).float() * 7, draw(D_MODEL, seed=8)
    weights = stage.start_weights(mean, 37, raw, np.random.default_rng(1))
    torch.testing.assert_close(weights["W_dec"][:11], raw / raw.norm(dim=1, keepdim=True))
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(37))
    assert torch.equal(weights["W_enc"], weights["W_dec"].T)
    assert not weights["b_enc"].any()
    torch.testing.assert_close(weights["b_dec"], mean.float())
    again = stage.start_weights(mean, 37, None, np.random.default_rng(1))["W_dec"]
    assert not torch.equal(again[:11], weights["W_dec"][:11])


def test_export_folds_the_scale_in():
    training = stage.Training({n: w.float() for n, w in random_weights().items()}, 12.5, CONFIG)
    raw = training.exported()
    z = 40 * draw(7, D_MODEL, seed=5).float()
    scaled = stage.encode(z / 12.5, training.weights, "topk", 3)
    there = stage.encode(z, raw, "topk", 3)
    assert torch.equal(scaled.atoms, there.atoms)
    torch.testing.assert_close(12.5 * scaled.values, there.values, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        12.5 * stage.decode(scaled, training.weights), stage.decode(there, raw), rtol=1e-4, atol=1e-3
    )


def test_mean_and_scale_and_measure_equal_the_naive_ones():
    z = 3 * draw(29, D_MODEL).float() + 2
    mean, scale = stage.mean_and_scale(Rows(z), block=4)
    np.testing.assert_allclose(mean, z.double().mean(0))
    assert scale == pytest.approx(math.sqrt(((z.double() - z.double().mean(0)) ** 2).sum(1).mean() / D_MODEL))
    weights = {name: w.float() for name, w in random_weights().items()}
    code = torch.relu((z - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    residual = ((z - code @ weights["W_dec"] - weights["b_dec"]) ** 2).sum()
    found = stage.measure(Rows(z), weights, "relu", 0, block=4)
    assert found.fve == pytest.approx(float(1 - residual / ((z - z.mean(0)) ** 2).sum()), rel=1e-5)
    assert found.l0 == pytest.approx(float((code > 0).sum(1).float().mean()))
    assert (found.dead, found.tokens) == (int((code == 0).all(0).sum()), 29)
    topk = stage.measure(Rows(z), weights, "topk", 3, limit=10, block=4)
    assert (topk.l0, topk.tokens) == (3.0, 10)
    fired = stage.encode(z[:10], weights, "topk", 3).atoms.unique()
    assert topk.dead == 37 - len(fired)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_training_lowers_the_loss_and_keeps_unit_rows(activation):
    z = draw(90, 6) @ draw(6, D_MODEL, seed=2)
    config = dataclasses.replace(CONFIG, activation=activation, steps=60, eval_steps=60)
    trained = stage.train_sae(Rows(z.float()), Rows(z[:20].float()), config, seed=1)
    torch.testing.assert_close(trained.weights["W_dec"].norm(dim=1), torch.ones(37))
    assert [row["step"] for row in trained.records] == [0, 60]
    assert trained.records[-1]["fve"] > max(0.3, trained.records[0]["fve"])
    assert trained.records[-1]["loss"] < 0.7 * trained.records[0]["loss"]


def test_one_step_moves_weights_as_projected_adam_does():
    """First step of Adam: every coordinate moves by lr against the sign of its (projected) gradient."""
    start = {n: w.float() for n, w in random_weights().items()}
    start["W_dec"] = torch.nn.functional.normalize(start["W_dec"], dim=1)
    training = stage.Training(start, 2.0, dataclasses.replace(CONFIG, activation="relu", l1=0.1))
    z = 2 * draw(7, D_MODEL, seed=5).float()
    _, g = naive((z / 2).numpy(), {n: w.numpy() for n, w in start.items()}, "relu", 0, 0.1)
    training.step(z)
    rate = stage.learning_rate(0, CONFIG)
    moved = start["W_enc"].numpy() - rate * np.sign(g["W_enc"])
    np.testing.assert_allclose(training.weights["W_enc"].detach(), moved, atol=1e-5)
    W = start["W_dec"].numpy()
    tangent = g["W_dec"] - (g["W_dec"] * W).sum(1, keepdims=True) * W
    stepped = W - rate * np.sign(tangent)
    stepped /= np.linalg.norm(stepped, axis=1, keepdims=True)
    clear = np.abs(tangent) > 1e-4  # a coordinate without gradient has no sign
    np.testing.assert_allclose(training.weights["W_dec"].detach().numpy()[clear], stepped[clear], atol=1e-3)


def test_warm_up_is_linear_over_five_percent_then_constant():
    config = dataclasses.replace(CONFIG, steps=100, learning_rate=1.0)
    rates = [stage.learning_rate(step, config) for step in (0, 1, 4, 5, 99)]
    assert rates == pytest.approx([0.2, 0.4, 1.0, 1.0, 1.0])


def test_batches_depend_on_seed_layer_and_step_alone():
    one = stage.batch_index(1, 15, 3, 17, 1000)
    assert np.array_equal(one, stage.batch_index(1, 15, 3, 17, 1000))
    others = [(2, 15, 3), (1, 16, 3), (1, 15, 4)]
    assert all(not np.array_equal(one, stage.batch_index(*other, 17, 1000)) for other in others)


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


def test_dictionary_of_another_width_is_refused(upstream):
    save_file({"layer_1": torch.ones(11, 31)}, upstream / "directions" / "directions.safetensors")
    with pytest.raises(ModelMismatchError, match="expected directions of width 32, got 31"):
        trained(upstream)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_zero_or_infinite_directions_are_refused(value):
    raw = torch.ones(3, D_MODEL)
    raw[1] = value
    with pytest.raises(ActivationError, match=r"got rows \[1\] otherwise"):
        stage.start_weights(torch.zeros(D_MODEL), 5, raw, np.random.default_rng(0))


def test_nan_stops_training_and_keeps_the_last_good_checkpoint(upstream, monkeypatch):
    real = stage.batch_index

    class Poisoned(stage.TokenShards):
        def rows(self, index):
            z = super().rows(index)
            return z * math.nan if np.array_equal(index, real(0, 1, 5, 17, len(self))) else z

    monkeypatch.setattr(stage, "TokenShards", Poisoned)
    with pytest.raises(ActivationError, match="got NaN or infinity after step 5"):
        trained(upstream)
    kept = [*(upstream / "sae" / "shards").glob("layer-1-*")]
    assert [path.name for path in kept] == ["layer-1-step-00000004"]
    assert all(w.isfinite().all() for w in load_file(kept[0] / "training.safetensors").values())


def test_activations_that_do_not_differ_are_refused():
    with pytest.raises(ActivationError, match=r"got a spread of 0\.0"):
        stage.mean_and_scale(Rows(torch.ones(5, D_MODEL)))


def test_diverging_weights_are_never_saved(tmp_path):
    training = stage.Training({n: w.float() for n, w in random_weights().items()}, 1.0, CONFIG)
    training.weights["b_enc"].data[3] = math.inf
    with pytest.raises(ActivationError, match="expected finite numbers"):
        training.save(tmp_path)
    assert not [*tmp_path.iterdir()]
