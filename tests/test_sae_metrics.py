"""Proves what is measured of an SAE against naive counts: FVE by modality, dense and dead atoms, drift."""

import dataclasses

import numpy as np
import pytest
import torch
from sae_rows import CONFIG, Rows, draw, random_weights
from small_run import D_MODEL

from builders import sae_metrics
from builders.statistics import ratio
from builders.tokens import MODALITIES
from daco.errors import ActivationError
from daco.sae import SAE

RELU, TOPK = (dataclasses.replace(CONFIG, activation=name) for name in ("relu", "topk"))


def weights() -> dict[str, torch.Tensor]:
    return {name: w.float() for name, w in random_weights().items()}


def fve(z, z_hat) -> float:
    return float(1 - ((z - z_hat) ** 2).sum() / ((z - z.mean(0)) ** 2).sum())


def test_measurements_equal_the_naive_ones_overall_and_by_modality():
    z, w = 3 * draw(29, D_MODEL).float() + 2, weights()
    kind = torch.tensor([0] * 9 + [2] * 20)[torch.randperm(29, generator=torch.Generator().manual_seed(1))]
    code = torch.relu((z - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    z_hat = code @ w["W_dec"] + w["b_dec"]
    found = sae_metrics.measure(Rows(z, kind.to(torch.uint8)), w, RELU, block=4)
    assert found.fve == pytest.approx(fve(z, z_hat), rel=1e-5)
    assert found.l0 == pytest.approx(float((code > 0).sum(1).float().mean()))
    assert (found.dead, found.tokens) == (int((code == 0).all(0).sum()), 29)
    assert found.dense == int(((code > 0).sum(0) > 2.9).sum())
    assert MODALITIES[0] == "image"
    assert found.fve_image == pytest.approx(fve(z[kind == 0], z_hat[kind == 0]), rel=1e-5)
    assert found.fve_caption == pytest.approx(fve(z[kind == 2], z_hat[kind == 2]), rel=1e-5)
    assert (found.fve_prompt, found.fve_generated) == (None, None)
    assert sae_metrics.measure(Rows(z), w, RELU).fve_image is None


def test_the_interval_of_fve_keeps_the_tokens_of_a_picture_together():
    z, w, lengths = 3 * draw(29, D_MODEL).float() + 2, weights(), [1, 9, 4, 15]
    tokens = Rows(z)
    tokens.ends, tokens.pictures = np.cumsum(lengths), np.array([1, 0, 2, 1])
    z_hat = torch.relu((z - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]
    parts = [
        [float(one.sum()) for one in part.double().square().split(lengths)]
        for part in (z - z_hat, z - z.mean(0))
    ]
    left, spread = (np.array([part[1], part[0] + part[3], part[2]]) for part in parts)
    expected = ratio(left, spread)
    for block in (3, 64):
        low, high = sae_metrics.fve_interval(tokens, w, RELU, block)
        assert (low, high) == pytest.approx((1 - expected.high, 1 - expected.low), rel=1e-4)
        assert low < fve(z, z_hat) < high


def test_only_the_first_tokens_are_measured_where_there_is_a_limit():
    z, w = 3 * draw(29, D_MODEL).float() + 2, weights()
    topk = sae_metrics.measure(Rows(z), w, TOPK, limit=10, block=4)
    assert (topk.l0, topk.tokens) == (3.0, 10)
    fired = SAE(**w, activation="topk", k=3).encode(z[:10]).any(0)
    assert topk.dead == int((~fired).sum())


def test_held_out_tokens_that_are_missing_or_the_same_are_refused():
    with pytest.raises(ActivationError, match="expected held-out tokens, got none"):
        sae_metrics.measure(Rows(torch.empty(0, D_MODEL)), weights(), TOPK)
    with pytest.raises(ActivationError, match="held-out activations that differ"):
        sae_metrics.measure(Rows(torch.ones(5, D_MODEL)), weights(), TOPK)


def test_drift_counts_atoms_that_still_are_their_concept():
    concepts = torch.nn.functional.normalize(draw(11, D_MODEL).float(), dim=1)
    W = torch.cat([concepts * 3, draw(5, D_MODEL, seed=2).float()])
    assert sae_metrics.drift(W, concepts, block=4) == (11, pytest.approx(1.0))
    W[[2, 7]] = W[[7, 2]]
    own, cosine = sae_metrics.drift(W, concepts, block=4)
    naive = np.mean([float(W[i] @ concepts[i] / W[i].norm()) for i in range(11)])
    assert (own, cosine) == (9, pytest.approx(naive, abs=1e-6))


def test_the_calibrated_threshold_lets_k_atoms_a_token_through():
    z, w = 3 * draw(500, D_MODEL).float() + 2, weights()
    threshold = sae_metrics.calibrated_threshold(Rows(z), w, 3, block=64)
    pre = (z - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    assert float((pre >= threshold).sum()) / 500 == pytest.approx(3, abs=0.01)
    half = sae_metrics.calibrated_threshold(Rows(z), w, 3, limit=250, block=64)
    assert half == pytest.approx(threshold, rel=0.1)


def test_agreement_of_exact_and_threshold_form_equals_the_naive_one():
    z, w = 3 * draw(50, D_MODEL).float() + 2, weights()
    exact = SAE(**w, activation="topk", k=3).requires_grad_(False)
    jump = SAE(**w, activation="jumprelu", threshold=torch.full((37,), 25.0)).requires_grad_(False)
    a, b = exact.encode(z) > 0, jump.encode(z) > 0
    found = sae_metrics.agreement(Rows(z), w, TOPK, 25.0, block=16)
    assert 0 < found.agreement < 1
    assert found.agreement == pytest.approx(float((a & b).sum() / (a | b).sum()))
    assert found.threshold_l0 == pytest.approx(float(b.sum(1).float().mean()))
    assert found.threshold_fve == pytest.approx(fve(z, jump(z)), rel=1e-4)
