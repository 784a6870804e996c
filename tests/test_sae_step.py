"""Proves the losses and gradients of four kinds of SAE against numpy, and the fast step against them."""

import dataclasses

import numpy as np
import pytest
import torch
from sae_rows import ACTIVATIONS, CONFIG, dense, draw, random_weights
from small_run import D_MODEL

from builders import sae_losses, sae_step
from builders import sae_training as stage
from builders.sae_step import Encoder, Step


def naive(x: np.ndarray, w: dict[str, np.ndarray], config, price: float):
    """Loss and gradients by hand, one row at a time; the batch's code first."""
    norms, B = np.sqrt((w["W_dec"] ** 2).sum(1)), len(x)
    pre = np.stack([(row - w["b_dec"]) @ w["W_enc"] + w["b_enc"] for row in x])
    theta = np.exp(w.get("log_threshold", np.full(pre.shape[1], -np.inf)))
    on = pre > np.maximum(theta, 0)
    if config.activation == "topk":
        for row in range(B):
            keep = sorted(range(pre.shape[1]), key=lambda i: (-pre[row, i], i))[: config.k]
            on[row] &= np.isin(np.arange(pre.shape[1]), keep)
    if config.activation == "batchtopk":
        on &= pre >= np.sort(pre, axis=None)[-config.k * B]
    g = {name: np.zeros_like(value) for name, value in w.items()}
    l1, total = price if config.activation == "relu" else 0.0, 0.0
    for row, pre_row, active in zip(x, pre, on, strict=True):
        c = np.where(active, pre_row, 0)
        error = c @ w["W_dec"] + w["b_dec"] - row
        total += (error**2).sum() + l1 * (c * norms).sum()
        slope = 2 * error / B
        pulled = slope @ w["W_dec"].T + l1 / B * norms
        if config.activation == "jumprelu":
            total += price * active.sum()
            near = (np.abs(pre_row - theta) < config.bandwidth / 2) / config.bandwidth
            g["log_threshold"] -= near * (theta * pulled + price / B) * theta
        pulled = pulled * active
        g["W_dec"] += np.outer(c, slope) + l1 / B * (c / norms)[:, None] * w["W_dec"]
        g["W_enc"] += np.outer(row - w["b_dec"], pulled)
        g["b_enc"] += pulled
        g["b_dec"] += slope - w["W_enc"] @ pulled
    return total / B, g


def config_of(activation: str, **changes):
    return dataclasses.replace(CONFIG, activation=activation, k=5, bandwidth=1.5, **changes)


@pytest.mark.parametrize("price", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_losses_and_gradients_equal_the_naive_ones(activation, price):
    x, weights, config = (
        draw(7, D_MODEL, seed=9),
        random_weights(activation=activation),
        config_of(activation),
    )
    expected, gradients = naive(x.numpy(), {n: w.numpy() for n, w in weights.items()}, config, price)
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = sae_losses.loss_of(x, leaves, config, price)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(leaves[name].grad, gradient, rtol=1e-10, atol=1e-11, err_msg=name)


def stepped(x, weights, config, price, dtype="float32", **options):
    """What the fast step finds, from weights in the papers' layout."""
    rows = {name: w.T.contiguous() if name == "W_enc" else w for name, w in weights.items()}
    return Step(rows, config, dtype)(x, price, **options)


def close(found, expected, rel=1e-5):
    scale = expected.abs().max()
    assert scale > 0
    assert float((found - expected).abs().max() / scale) < rel


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_fast_step_equals_the_papers(activation, share, monkeypatch):
    monkeypatch.setattr(sae_step, "DENSE_SHARE", share)  # never or always by dense products
    monkeypatch.setitem(sae_step.PRE_ELEMENTS, "cpu", 37 * 5)  # several, and an uneven last part
    x, config = draw(17, D_MODEL, seed=9).float(), config_of(activation)
    weights = {name: w.float() for name, w in random_weights(activation=activation).items()}
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = sae_losses.loss_of(x, leaves, config, 0.3)
    loss.backward()
    found = stepped(x, weights, config, 0.3)
    assert found.loss.shape == ()
    close(found.loss, loss.detach())
    close(dense(found.code), sae_losses.code_of(x, weights, config))
    for name, leaf in leaves.items():
        close(found.by_name[name].T if name == "W_enc" else found.by_name[name], leaf.grad)


def test_gradients_of_one_batch_leave_nothing_to_the_next():
    weights = {name: w.float() for name, w in random_weights().items()}
    rows = {name: w.T.contiguous() if name == "W_enc" else w for name, w in weights.items()}
    x, step = draw(17, D_MODEL, seed=9).float(), Step(rows, config_of("topk"), "float32")
    first = {name: g.clone() for name, g in step(x, 0.0).by_name.items()}
    step(draw(13, D_MODEL, seed=2).float(), 0.0)
    assert all(torch.equal(first[name], g) for name, g in step(x, 0.0).by_name.items())


@pytest.mark.parametrize("guess", [0.0, 1.0, 1e9])
def test_batch_top_k_does_not_depend_on_the_guess(guess):
    weights = {name: w.float() for name, w in random_weights().items()}
    x, config = draw(17, D_MODEL, seed=9).float(), config_of("batchtopk")
    found = stepped(x, weights, config, 0.0, guess=guess).code
    assert len(found.values) == 17 * 5
    close(dense(found), sae_losses.code_of(x, weights, config))


@pytest.mark.parametrize("parts", [1, 4])
def test_batch_top_k_of_a_gpu_is_that_of_a_cpu(parts, monkeypatch):
    """A GPU takes all of the batch's pre-activations instead of guessing; the function runs anywhere."""
    monkeypatch.setitem(sae_step.PRE_ELEMENTS, "cpu", 37 * -(-17 // parts))
    weights = {name: w.float() for name, w in random_weights().items()}
    x, config = draw(17, D_MODEL, seed=9).float(), config_of("batchtopk")
    centred = x - weights["b_dec"]
    code = sae_step.largest(centred, Encoder(weights["W_enc"].T.contiguous(), weights["b_enc"]), 5)
    assert len(code.values) == 17 * 5
    close(dense(code), sae_losses.code_of(x, weights, config))


@pytest.mark.parametrize(("m", "k"), [(37, 5), (512, 4), (1024, 3), (24, 2), (640, 10)])
def test_k_largest_are_the_k_largest(m, k):
    pre = draw(11, m).float()
    values, atoms = sae_step.k_largest(pre, k)
    torch.testing.assert_close(pre.gather(1, atoms), values)
    torch.testing.assert_close(values.sort(1, descending=True).values, pre.topk(k, 1).values)
    assert all(len(set(row)) == k for row in atoms.tolist())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_quick_selection_chooses_nearly_the_same_atoms_and_keeps_exact_values(dtype):
    weights = {name: w.float() for name, w in random_weights(512, 64).items()}
    x = draw(40, 64, seed=9).float()
    exact = dense(stepped(x, weights, config_of("topk"), 0.0).code, 512)
    quick = dense(stepped(x, weights, config_of("topk"), 0.0, dtype).code, 512)
    shared = (exact > 0) & (quick > 0)
    assert shared.sum() > 0.9 * 40 * 5
    torch.testing.assert_close(quick[shared], exact[shared], rtol=1e-5, atol=1e-4)
    assert not torch.equal(exact, quick)  # else this looks at nothing


def test_narrow_encoders_are_multiplied_exactly():
    assert sae_step.quickest(torch.device("cpu"), 100) == "float32"
    assert sae_step.quickest(torch.device("cpu"), 2**24) in ("float32", "bfloat16", "int8")


def test_thresholds_are_never_judged_by_a_quick_product():
    rows = {n: w.float().T.contiguous() if n == "W_enc" else w.float() for n, w in random_weights().items()}
    assert Step(rows, config_of("relu"), "int8").encoder.dtype == "float32"
    assert Step(rows, config_of("topk"), "int8").encoder.dtype == "int8"


def test_pre_activations_are_right_whatever_the_part():
    weights = {name: w.float() for name, w in random_weights().items()}
    encoder = Encoder(weights["W_enc"].T.contiguous(), weights["b_enc"])
    x = draw(7, D_MODEL).float()
    torch.testing.assert_close(encoder(x), x @ weights["W_enc"] + weights["b_enc"])


def test_aux_k_teaches_encoder_and_decoder_of_dead_atoms_alone():
    config = config_of("topk", aux_k=2, aux_weight=0.5)
    weights = {name: w.float() for name, w in random_weights().items()}
    x, dead = draw(17, D_MODEL, seed=9).float(), torch.tensor([3, 8, 21, 30])
    plain = {name: g.clone() for name, g in stepped(x, weights, config, 0.0).by_name.items()}
    found = stepped(x, weights, config, 0.0, dead=dead)
    residual = x - sae_losses.code_of(x, weights, config) @ weights["W_dec"] - weights["b_dec"]
    leaves = {
        name: (w.T if name == "W_enc" else w)[dead].clone().requires_grad_()
        for name, w in weights.items()
        if name != "b_dec"
    }
    unit = (x - weights["b_dec"]).square().sum() / residual.square().sum()
    loss = 0.5 * unit * sae_losses.aux_loss(residual, x - weights["b_dec"], leaves, 2)
    loss.backward()
    close(found.loss - stepped(x, weights, config, 0.0).loss, loss.detach(), 1e-3)
    found = stepped(x, weights, config, 0.0, dead=dead).by_name
    for name, leaf in leaves.items():
        added = found[name] - plain[name]
        close(added[dead], leaf.grad, 1e-4)
        others = torch.ones(37, dtype=torch.bool).index_fill(0, dead, False)
        assert not added[others].any()


def test_aux_k_equals_the_naive_one():
    residual, centred = draw(5, 6, seed=1), draw(5, 6, seed=2)
    dead = {"W_enc": draw(4, 6, seed=3), "b_enc": draw(4, seed=4), "W_dec": draw(4, 6, seed=5)}
    total = 0.0
    for r, x in zip(residual.numpy(), centred.numpy(), strict=True):
        pre = np.maximum(dead["W_enc"].numpy() @ x + dead["b_enc"].numpy(), 0)
        kept = sorted(range(4), key=lambda i: -pre[i])[:2]
        total += ((r - sum(pre[i] * dead["W_dec"].numpy()[i] for i in kept)) ** 2).sum()
    assert float(sae_losses.aux_loss(residual, centred, dead, 2)) == pytest.approx(total / 5)


def test_one_step_moves_weights_as_projected_adam_does():
    """First step of Adam: every coordinate moves by lr against the sign of its (projected) gradient."""
    start = {n: w.float() for n, w in random_weights().items()}
    start["W_dec"] = torch.nn.functional.normalize(start["W_dec"], dim=1)
    config = dataclasses.replace(CONFIG, activation="relu", l1=0.1, warm_up=0.0)
    training = stage.Training(start, 2.0, config)
    z = 2 * draw(7, D_MODEL, seed=5).float()
    _, g = naive((z / 2).numpy(), {n: w.numpy() for n, w in start.items()}, config, 0.1)
    training.step(z)
    rate = stage.learning_rate(0, CONFIG)
    moved = start["W_enc"].numpy() - rate * np.sign(g["W_enc"])
    np.testing.assert_allclose(training.weights["W_enc"].detach(), moved, atol=1e-5)
    W = start["W_dec"].numpy()
    tangent = g["W_dec"] - (g["W_dec"] * W).sum(1, keepdims=True) * W
    stepped_to = W - rate * np.sign(tangent)
    stepped_to /= np.linalg.norm(stepped_to, axis=1, keepdims=True)
    clear = np.abs(tangent) > 1e-4  # a coordinate without gradient has no sign
    np.testing.assert_allclose(
        training.weights["W_dec"].detach().numpy()[clear], stepped_to[clear], atol=1e-3
    )
