"""Rows of labelled atoms steer as all weights do: a TopK by its threshold, from the compact file too."""

import dataclasses

import numpy as np
import pytest
import small_sae
import torch

from daco.errors import SteeringOnlyError
from daco.methods import SAESteering
from daco.sae import top_k
from daco.steering_sae import SteeringSAE

THRESHOLD = 1.25


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(size=(12, 32)) * 3)


def with_threshold(sae: SteeringSAE, threshold: float = THRESHOLD) -> SteeringSAE:
    layers = {
        number: dataclasses.replace(layer, jumprelu_threshold=threshold, jumprelu_agreement=0.875)
        for number, layer in sae.layers.items()
    }
    return dataclasses.replace(sae, layers=layers)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_rows_give_the_columns_of_the_whole_code(activation, z):
    sae = with_threshold(small_sae.steering_sae(activation=activation))
    for number, layer in sae.layers.items():
        method = SAESteering(sae, gamma=0.0, form="threshold")
        atoms = method.atoms(number)
        whole = layer.sae.as_jumprelu(THRESHOLD) if activation == "topk" else layer.sae
        expected = whole.encode(z)[:, atoms]
        change = method.change(number, z)
        torch.testing.assert_close(change.strengths, expected, rtol=1e-12, atol=1e-12)
        assert 0 < (expected > 0).sum() < expected.numel()
        torch.testing.assert_close(change.delta, -expected @ layer.sae.W_dec[atoms], rtol=1e-12, atol=1e-12)
        if activation != "topk":  # the one form there is
            assert torch.equal(SAESteering(sae, gamma=0.0).change(number, z).delta, change.delta)


def test_the_threshold_form_differs_from_topk_and_says_how_much(z):
    sae = with_threshold(small_sae.steering_sae())
    exact, rows = SAESteering(sae, gamma=0.0), SAESteering(sae, gamma=0.0, form="threshold")
    assert (exact.form, rows.form) == ("exact", "threshold")
    assert not torch.allclose(exact.change(1, z).delta, rows.change(1, z).delta)
    assert exact.notes() == []
    assert rows.notes() == [
        "TopK by its calibrated threshold; share of active atoms that both forms have, on held-out tokens: "
        "0.875 (layer 1), 0.875 (layer 2)"
    ]
    unmeasured = {n: dataclasses.replace(x, jumprelu_agreement=None) for n, x in sae.layers.items()}
    silent = SAESteering(dataclasses.replace(sae, layers=unmeasured), form="threshold")
    assert "tokens: not measured (layer 1)" in silent.notes()[0]
    assert SAESteering(with_threshold(small_sae.steering_sae(activation="relu")), form="exact").notes() == []


def test_the_threshold_of_the_kth_atom_is_the_exact_form(z):
    """With a threshold between the kth and the next pre-activation of a token, both forms are the same."""
    sae = small_sae.steering_sae()
    layer = sae.layers[1]
    for token in z[:, None]:
        values = layer.sae.pre_activations(token).relu()[0].sort(descending=True).values
        between = float((values[layer.sae.k - 1] + values[layer.sae.k]).detach() / 2)
        exact, rows = SAESteering(sae), SAESteering(with_threshold(sae, between), form="threshold")
        torch.testing.assert_close(exact.change(1, token), rows.change(1, token), rtol=1e-12, atol=1e-12)


def test_a_topk_without_a_threshold_has_no_threshold_form():
    with pytest.raises(SteeringOnlyError, match=r"threshold for TopK layers \[1, 2\], got none"):
        SAESteering(small_sae.steering_sae(), form="threshold")
    with pytest.raises(ValueError, match="form: expected one of"):
        SAESteering(small_sae.steering_sae(), form="rows")
    assert SAESteering(small_sae.steering_sae(activation="relu"), form="threshold").notes() == []


def test_topk_still_gives_ties_to_the_lower_index():
    pre = torch.from_numpy(np.random.default_rng(0).integers(-2, 4, (500, 11)).astype(float))
    for k in (1, 4, 11):
        order = (-pre.relu()).sort(dim=1, stable=True).indices[:, :k]
        expected = torch.zeros_like(pre).scatter(1, order, pre.relu().gather(1, order))
        assert torch.equal(top_k(pre, k), expected)
