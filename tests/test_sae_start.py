"""Proves how an SAE starts: dictionary rows, centre, scale, components of the rest, the encoder's scale."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sae_rows import CONFIG, Rows, draw
from small_run import D_MODEL

from builders import sae_start
from builders.sae_losses import code_of, geometric_median
from builders.sae_metrics import measure
from builders.sae_training import exported
from daco.errors import ActivationError, ModelMismatchError, RecipeError


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def test_start_is_the_unit_dictionary_then_random_unit_rows():
    raw, mean = draw(11, D_MODEL).float() * 7, draw(D_MODEL, seed=8)
    weights = sae_start.start_weights(mean, 37, raw, rng())
    torch.testing.assert_close(weights["W_dec"][:11], raw / raw.norm(dim=1, keepdim=True))
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(37))
    assert torch.equal(weights["W_enc"], weights["W_dec"].T)
    assert not weights["b_enc"].any()
    torch.testing.assert_close(weights["b_dec"], mean.float())
    again = sae_start.start_weights(mean, 37, None, rng())["W_dec"]
    assert not torch.equal(again[:11], weights["W_dec"][:11])


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_zero_or_infinite_directions_are_refused(value):
    raw = torch.ones(3, D_MODEL)
    raw[1] = value
    with pytest.raises(ActivationError, match=r"got rows \[1\] otherwise"):
        sae_start.start_weights(torch.zeros(D_MODEL), 5, raw, rng())


def test_dictionaries_that_do_not_fit_are_refused():
    with pytest.raises(ModelMismatchError, match="expected directions of width 32, got 31"):
        sae_start.start_weights(torch.zeros(D_MODEL), 5, torch.ones(3, 31), rng())
    with pytest.raises(RecipeError, match=r"at least one atom a concept \(6\), got 5"):
        sae_start.start_weights(torch.zeros(D_MODEL), 5, draw(6, D_MODEL).float(), rng())


def test_mean_and_scale_equal_the_naive_ones():
    z = 3 * draw(29, D_MODEL).float() + 2
    mean, scale = sae_start.mean_and_scale(Rows(z), block=4)
    np.testing.assert_allclose(mean, z.double().mean(0))
    assert scale == pytest.approx(math.sqrt(((z.double() - z.double().mean(0)) ** 2).sum(1).mean() / D_MODEL))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_or_do_not_differ_are_refused(value):
    with pytest.raises(ActivationError, match=r"got a spread of 0\.0"):
        sae_start.mean_and_scale(Rows(torch.ones(5, D_MODEL)))
    z = draw(29, D_MODEL).float()
    z[3, 4] = value
    with pytest.raises(ActivationError, match="got a spread of nan"):
        sae_start.mean_and_scale(Rows(z))
    with pytest.raises(ActivationError, match="expected training tokens, got none"):
        sae_start.mean_and_scale(Rows(z[:0]))


def test_the_geometric_median_is_where_unit_pulls_cancel_and_outliers_do_not_move_it():
    x = draw(51, 5)
    point = geometric_median(x, iterations=300)
    pulls = (x - point) / (x - point).norm(dim=1, keepdim=True)
    assert float(pulls.sum(0).abs().max()) < 1e-3
    x[0] *= 1e6
    assert float((geometric_median(x, iterations=300) - point).norm()) < 0.3
    assert float((x.mean(0) - point).norm()) > 1e3
    config = dataclasses.replace(CONFIG, b_dec="median")
    weights, scale = sae_start.started(Rows(x.float()), config, None, rng())
    assert float((weights["b_dec"] * scale - point).norm()) < 0.5


def coherent(n: int = 23, d: int = D_MODEL) -> torch.Tensor:
    """Directions that share most of themselves, as those of a real dictionary do."""
    return (draw(n, d, seed=3) + 4 * draw(1, d, seed=4)).float()


def tokens(directions: torch.Tensor) -> torch.Tensor:
    code = draw(300, len(directions), seed=6).relu() * (draw(300, len(directions), seed=7) > 1)
    return (code.float() @ directions + draw(300, directions.shape[1], seed=8)).float()


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
def test_the_fitted_encoder_is_the_best_multiple_and_keeps_fve_above_zero(activation):
    D = coherent()
    z = tokens(D)
    config = dataclasses.replace(CONFIG, activation=activation, k=8)
    found = {}
    for how in ("one", "fit"):
        made = dataclasses.replace(config, encoder_scale=how)
        found[how], scale = sae_start.started(Rows(z), made, D, rng())
    plain, fitted = found["one"], found["fit"]
    factor = float((fitted["W_enc"] / plain["W_enc"]).median())
    assert 0 < factor < 0.5
    assert torch.equal(plain["W_dec"], fitted["W_dec"])
    x = z / scale

    def left(multiple: float) -> float:
        code = code_of(x, plain | {"W_enc": plain["W_enc"] * multiple}, config)
        return float((x - code @ plain["W_dec"] - plain["b_dec"]).square().sum())

    assert left(factor) < min(left(0.95 * factor), left(1.05 * factor))
    if activation == "topk":
        fve = {how: measure(Rows(z), exported(w, scale), config).fve for how, w in found.items()}
        assert fve["one"] < 0 < fve["fit"]


def test_the_rest_may_start_as_both_directions_of_what_the_dictionary_leaves_over():
    D, hidden = coherent(5), draw(1, D_MODEL, seed=12).float()
    hidden /= hidden.norm()
    z = tokens(D) + 30 * draw(300, 1, seed=13).float() * hidden
    weights, _ = sae_start.started(Rows(z), dataclasses.replace(CONFIG, rest="pca"), D, rng())
    torch.testing.assert_close(weights["W_dec"][:5], D / D.norm(dim=1, keepdim=True))
    first, second = weights["W_dec"][5], weights["W_dec"][6]
    torch.testing.assert_close(first, -second)
    assert float((first @ hidden[0]).abs()) > 0.9
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(37))
    assert torch.equal(weights["W_enc"], weights["W_dec"].T)
    bare, _ = sae_start.started(Rows(z), dataclasses.replace(CONFIG, rest="pca"), None, rng())
    variance, axes = torch.linalg.eigh(torch.cov(z.double().T))
    for row, axis in ((0, axes[:, -1]), (2, axes[:, -2])):
        assert float((bare["W_dec"][row].double() @ axis).abs()) > 0.99
    assert variance[-1] > variance[-2]
