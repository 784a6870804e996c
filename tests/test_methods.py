"""Every steering equation equals its numpy float64 twin, and parameters that mean nothing are refused."""

import naive
import numpy as np
import pytest
import small_sae
import torch

from daco.errors import NothingToSteerError, UnknownLayerError
from daco.methods import MOP, ActAdd, Projection, SAESteering, SafetyPrompt
from daco.sae import labels_of
from daco.top_k import top_k


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(12, 32)) * 3


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_encode_and_decode_equal_their_twins(activation: str, z: np.ndarray) -> None:
    layer = small_sae.steering_sae(activation=activation).layers[1]
    w = {name: p.detach().numpy() for name, p in layer.sae.named_parameters()}
    codes = naive.encode(z, w["W_enc"], w["b_enc"], w["b_dec"], activation, layer.sae.k, w.get("threshold"))
    got = layer.sae.encode(torch.from_numpy(z)).detach().numpy()
    np.testing.assert_allclose(got, codes, atol=1e-12)
    assert 0 < (codes > 0).sum() < codes.size
    decoded = layer.sae.decode(torch.from_numpy(codes)).detach().numpy()
    np.testing.assert_allclose(decoded, naive.decode(codes, w["W_dec"], w["b_dec"]), atol=1e-12)


def test_topk_gives_ties_to_the_lower_index() -> None:
    draw = np.random.default_rng(0)
    pre = draw.integers(-2, 4, (200, 11)).astype(float)  # whole numbers: ties everywhere
    identity, zeros = np.eye(11), np.zeros(11)
    for k in (1, 4, 11):
        expected = naive.encode(pre, identity, zeros, zeros, "topk", k)
        np.testing.assert_array_equal(top_k(torch.from_numpy(pre), k).numpy(), expected)


def test_labels_equal_equation_9() -> None:
    draw = np.random.default_rng(1)
    mu_undesirable, mu_desirable = naive.unit(draw.normal(size=(2, 32)))
    atoms = draw.normal(size=(99, 32)) + 2 * np.outer(draw.normal(size=99), mu_undesirable + mu_desirable)
    cosines = naive.unit(atoms) @ mu_undesirable, naive.unit(atoms) @ mu_desirable
    for eta in (0.0, 0.2, 0.5):
        expected = [naive.label(w, mu_undesirable, mu_desirable, eta) for w in atoms]
        assert labels_of(*cosines, eta).tolist() == expected
        assert len(set(expected)) == 3
    assert labels_of(np.array([0.5]), np.array([0.5]), 0.3).tolist() == ["neutral"]
    assert labels_of(np.array([0.3]), np.array([0.1]), 0.3).tolist() == ["undesirable"]


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize(("gamma", "eta"), [(0.0, None), (0.3, None), (0.3, 0.7)])
def test_sae_steering_equals_its_twin(
    activation: str, gamma: float, eta: float | None, z: np.ndarray
) -> None:
    sae = small_sae.steering_sae(activation=activation)
    method = SAESteering(sae, gamma=gamma, eta=eta)
    for number, layer in sae.layers.items():
        change = method.change(number, torch.from_numpy(z))
        expected = small_sae.naive_steer(z, layer, gamma, layer.labels(eta))
        np.testing.assert_allclose(z + change.delta.numpy(), expected, atol=1e-12)
        assert np.linalg.norm(expected - z, axis=1).max() > 0.05 * np.linalg.norm(z, axis=1).max()
        assert change.strengths.shape == (12, len(method.atoms(number)))
    fewer = len(SAESteering(sae, eta=0.9, on_empty="pass").atoms(1))
    assert fewer < len(SAESteering(sae).atoms(1))


def test_the_reconstruction_error_never_enters(z: np.ndarray) -> None:
    sae = small_sae.steering_sae()
    silent = sae.layers[1].atoms.assign(polarity="neutral").copy()
    silent.loc[13, "polarity"] = "undesirable"
    object.__setattr__(sae.layers[1], "atoms", silent)
    sae.layers[1].sae.b_enc.data[13] = -1e6  # labelled, but never fires
    change = SAESteering(sae, gamma=0, layers=[1]).change(1, torch.from_numpy(z))
    assert change.delta.abs().max() == 0


def test_code_and_delta_are_in_the_dtype_of_the_sae() -> None:
    half = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).half()
    for dtype in (torch.float32, torch.float64):
        change = SAESteering(small_sae.steering_sae(dtype=dtype)).change(1, half)
        assert change.delta.dtype == change.strengths.dtype == dtype
        assert not change.delta.requires_grad


def test_a_code_that_is_not_certified_is_reported(z: np.ndarray) -> None:
    method = MOP(small_sae.dictionary(), tol=1e-12, max_rounds=1)
    method.change(1, torch.from_numpy(z))
    assert "12 codes not certified within 1 rounds" in method.notes()[0]
    assert MOP(small_sae.dictionary()).notes() == []


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.3}, {"non_negative": True}, {"centre": {1: torch.ones(32)}}]
)
def test_mop_equals_its_twin(options: dict, z: np.ndarray) -> None:
    found = small_sae.dictionary()
    method = MOP(found, 0.05, 0.9, tol=1e-13, layers=[1], dtype=torch.float64, **options)
    D = naive.unit(found.raw(1).double().numpy())
    coded = z - options["centre"][1].double().numpy() if "centre" in options else z
    alpha = [naive.mop_alpha(row, D, 0.05, 0.9) for row in coded]
    positive = options.get("non_negative", False)
    codes = np.stack([naive.mop_code(row, D, a, 0.9, positive) for row, a in zip(coded, alpha, strict=True)])
    expected = naive.mop_steer(z, codes, D, small_sae.POLARITY, options.get("gamma", 0.0), small_sae.R)
    change = method.change(1, torch.from_numpy(z))
    np.testing.assert_allclose(z + change.delta.numpy(), expected, atol=1e-5)
    assert np.linalg.norm(expected - z, axis=1).max() > 0.05 * np.linalg.norm(z, axis=1).max()
    assert method.names(1, 3) == ["c3"]


def test_actadd_equals_its_twin(z: np.ndarray) -> None:
    found = small_sae.dictionary()
    expected = naive.actadd(z, found.raw(2).double().numpy(), small_sae.POLARITY, 0.3, small_sae.R)
    change = ActAdd(found, 0.3, dtype=torch.float64).change(2, torch.from_numpy(z))
    np.testing.assert_allclose(z + change.delta.numpy(), expected, atol=1e-5)  # centroids are float32
    assert np.isclose(np.linalg.norm(expected - z, axis=1), 0.3 * small_sae.R).all()


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_projection_equals_its_twin(rank: int, strength: float, z: np.ndarray) -> None:
    found = small_sae.dictionary()
    D = naive.unit(found.raw(2).double().numpy())
    expected = naive.project(z, D, small_sae.POLARITY, rank, strength)
    change = Projection(found, strength, rank, dtype=torch.float64).change(2, torch.from_numpy(z))
    np.testing.assert_allclose(z + change.delta.numpy(), expected, atol=1e-5)
    assert np.linalg.norm(expected - z, axis=1).max() > 0.05 * np.linalg.norm(z, axis=1).max()


def test_projection_of_every_undesirable_direction_leaves_none_of_them(z: np.ndarray) -> None:
    found = small_sae.dictionary()
    rows = found.unit(1)[np.flatnonzero(found.mask("undesirable"))].double()
    method = Projection(found, rank=len(rows), dtype=torch.float64)
    left = torch.from_numpy(z) + method.change(1, torch.from_numpy(z)).delta
    assert (left @ rows.T).abs().max() < 1e-6
    for rank in (0, len(rows) + 1):
        with pytest.raises(ValueError, match=f"rank: expected 1 to {len(rows)}"):
            Projection(found, rank=rank)


def neutral() -> object:
    found = small_sae.dictionary()
    found.concepts["polarity"] = "neutral"
    return found


def test_nothing_labelled_names_eta_and_the_largest_cosine() -> None:
    sae = small_sae.steering_sae()
    largest = max(layer.atoms["cos_undesirable"].max() for layer in sae.layers.values())
    with pytest.raises(NothingToSteerError, match=rf"eta=0\.999.*{largest:.3f} \(undesirable\)"):
        SAESteering(sae, eta=0.999)
    assert SAESteering(sae, eta=0.999, on_empty="pass").notes()[0].startswith("exact no-op")
    with pytest.raises(NothingToSteerError, match=r"no concept is undesirable: .*'neutral': 23"):
        MOP(neutral())
    with pytest.raises(NothingToSteerError, match="no concept is desirable"):
        ActAdd(neutral())
    with pytest.raises(NothingToSteerError, match="no concept is undesirable"):
        Projection(neutral())
    for kind in (ActAdd, Projection):
        with pytest.raises(NothingToSteerError, match="strength is 0"):
            kind(small_sae.dictionary(), 0.0)
    for method in (kind(neutral(), on_empty="pass") for kind in (MOP, ActAdd, Projection)):
        assert method.is_empty(1)
        assert method.nothing


def test_one_layer_without_labels_is_noted() -> None:
    sae = small_sae.steering_sae(gamma=0.0)
    object.__setattr__(sae.layers[2], "atoms", sae.layers[2].atoms.assign(polarity="neutral"))
    method = SAESteering(sae)
    assert (method.is_empty(1), method.is_empty(2)) == (False, True)
    assert "layers [2] stay as they are" in method.notes()[0]
    assert len(method.notes()) == 1


def test_a_gamma_that_shifts_nothing_is_noted() -> None:
    sae, found = small_sae.steering_sae(), small_sae.dictionary()
    labels = sae.layers[2].atoms["polarity"].replace("desirable", "neutral")
    object.__setattr__(sae.layers[2], "atoms", sae.layers[2].atoms.assign(polarity=labels))
    said = "gamma 0.2 shifts nothing at layers {}: nothing is desirable there"
    assert SAESteering(sae).notes() == [said.format([2])]
    assert SAESteering(sae, gamma=0.0).notes() == SAESteering(small_sae.steering_sae()).notes() == []
    found.concepts["polarity"] = found.concepts["polarity"].replace("desirable", "neutral")
    assert MOP(found, gamma=0.2).notes() == [said.format([1, 2])]
    assert MOP(found).notes() == MOP(small_sae.dictionary(), gamma=0.2).notes() == []


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: SAESteering(small_sae.steering_sae(), gamma=-0.1), "gamma"),
        (lambda: SAESteering(small_sae.steering_sae(), gamma=float("nan")), "gamma"),
        (lambda: SAESteering(small_sae.steering_sae(), eta=1.5), "eta"),
        (lambda: SAESteering(small_sae.steering_sae(), on_empty="ignore"), "on_empty"),
        (lambda: SAESteering(small_sae.steering_sae(), layers=[]), "layers"),
        (lambda: MOP(small_sae.dictionary(), alpha=0.0), "alpha"),
        (lambda: MOP(small_sae.dictionary(), alpha=1.0), "alpha"),
        (lambda: MOP(small_sae.dictionary(), tau=0.0), "tau"),
        (lambda: MOP(small_sae.dictionary(), tol=0.0), "tol"),
        (lambda: ActAdd(small_sae.dictionary(), float("inf")), "strength"),
        (lambda: SafetyPrompt("  "), "text"),
    ],
)
def test_parameters_out_of_range_are_refused(build, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        build()


def test_unknown_layers_are_refused() -> None:
    for build in (SAESteering, MOP, ActAdd):
        source = small_sae.steering_sae() if build is SAESteering else small_sae.dictionary()
        with pytest.raises(UnknownLayerError, match=r"among \[1, 2\], got \[7\]"):
            build(source, layers=[1, 7])


def test_safety_prompt_leads_the_conversation() -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}
    prompt = SafetyPrompt("Be kind.")
    messages = [turn]
    assert prompt.apply(messages)[0] == {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    assert prompt.apply(messages)[1:] == messages == [turn]
    system = {"role": "system", "content": "Be brief."}
    assert prompt.apply([system, turn])[0]["content"] == "Be kind.\n\nBe brief."
    parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [part["text"] for part in prompt.apply([parts])[0]["content"]] == ["Be kind.\n\n", "Be brief."]
    assert system["content"] == "Be brief."
