"""OMP, oblique projection and the refusal direction equal their numpy float64 twins, and steer a model."""

from typing import Any

import naive
import numpy as np
import pytest
import small_sae
import torch
from conftest import inputs_of
from sklearn.linear_model import orthogonal_mp

from daco import ConceptDictionary, ModelFacts, steer
from daco.capture import capture
from daco.errors import NothingToSteerError, UnknownLayerError
from daco.methods import (
    MOP,
    OMP,
    ActAdd,
    Method,
    ObliqueProjection,
    Projection,
    RefusalDirection,
    SAESteering,
    SafetyPrompt,
    prompt_activations,
)
from daco.pursuit import matching_pursuit

DESIRABLE = np.array(small_sae.POLARITY) == "desirable"
UNDESIRABLE = np.array(small_sae.POLARITY) == "undesirable"


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(12, 32)) * 3


def unit_rows(layer: int = 1) -> np.ndarray:
    return naive.unit(small_sae.dictionary().raw(layer).double().numpy())


# The twins.


def pursuit_twin(z: np.ndarray, D: np.ndarray, k: int) -> np.ndarray:
    """One atom at a time: the one that fits the residual best, then least squares on all chosen."""
    codes = np.zeros((len(z), len(D)))
    for row, token in enumerate(z):
        chosen: list[int] = []
        residual = token
        for _ in range(k):
            fit = [abs(atom @ residual) if i not in chosen else -1.0 for i, atom in enumerate(D)]
            chosen.append(int(np.argmax(fit)))
            found = np.linalg.lstsq(D[chosen].T, token, rcond=None)[0]
            residual = token - found @ D[chosen]
        codes[row, chosen] = found
    return codes


def oblique_twin(z: np.ndarray, U: np.ndarray, K: np.ndarray, strength: float) -> np.ndarray:
    """Least squares on both, then the part of U goes."""
    found = np.linalg.lstsq(np.concatenate([U, K]).T, z.T, rcond=None)[0].T
    return z - strength * found[:, : len(U)] @ U


def leading(rows: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.eigh(rows.T @ rows)[1][:, -rank:].T


# Orthogonal matching pursuit.


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_pursuit_equals_its_twin_and_sklearn(k: int, with_gram: bool, z: np.ndarray) -> None:
    D = naive.unit(np.random.default_rng(3).normal(size=(71, 32)))
    tensors = torch.from_numpy(z), torch.from_numpy(D)
    gram = tensors[1] @ tensors[1].T if with_gram else None
    codes = matching_pursuit(*tensors, k, gram=gram).numpy()
    np.testing.assert_allclose(codes, pursuit_twin(z, D, k), atol=1e-10)
    np.testing.assert_allclose(codes, orthogonal_mp(D.T, z.T, n_nonzero_coefs=k).T, atol=1e-10)
    assert ((codes != 0).sum(1) == k).all()


@pytest.mark.parametrize("with_gram", [False, True])
def test_pursuit_stops_where_all_is_explained(with_gram: bool) -> None:
    D = torch.from_numpy(naive.unit(np.random.default_rng(3).normal(size=(71, 32))))
    D = torch.cat([D, D[:5]])  # atoms that are there twice are of no further use
    z = torch.stack([4 * D[0] - 7 * D[3], torch.zeros(32, dtype=torch.float64), D[1]])
    gram = D @ D.T if with_gram else None
    codes = matching_pursuit(z, D, 6, gram=gram)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes @ D, z, atol=1e-10, rtol=0)
    assert not codes[1].any()
    assert (codes[2] != 0).sum() <= 2
    half = matching_pursuit(z.bfloat16(), D.bfloat16(), 2)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.3}, {"centre": {1: torch.ones(32)}}, {"keep_gram": True}]
)
def test_omp_equals_its_twin(options: dict, z: np.ndarray) -> None:
    method = OMP(small_sae.dictionary(), 5, layers=[1], dtype=torch.float64, **options)
    D = unit_rows()
    coded = z - options["centre"][1].double().numpy() if "centre" in options else z
    codes = pursuit_twin(coded, D, 5)
    expected = naive.mop_steer(z, codes, D, small_sae.POLARITY, options.get("gamma", 0.0), small_sae.R)
    change = method.change(1, torch.from_numpy(z))
    np.testing.assert_allclose(z + change.delta.numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(change.strengths.numpy(), codes[:, UNDESIRABLE], atol=1e-9)
    assert np.linalg.norm(expected - z, axis=1).max() > 0.05 * np.linalg.norm(z, axis=1).max()
    assert method.names(1, 3) == ["c3"]


def test_mop_is_the_same_with_its_gram_matrix_kept(z: np.ndarray) -> None:
    made = [
        MOP(small_sae.dictionary(), tol=1e-13, keep_gram=kept, dtype=torch.float64).change(
            1, torch.from_numpy(z)
        )
        for kept in (False, True)
    ]
    torch.testing.assert_close(made[0].delta, made[1].delta, atol=1e-10, rtol=0)
    assert made[0].delta.any()


# Oblique projection.


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_oblique_projection_equals_its_twin(rank: int | None, strength: float, z: np.ndarray) -> None:
    D = unit_rows()
    U, K = (rows if rank is None else leading(rows, rank) for rows in (D[UNDESIRABLE], D[DESIRABLE]))
    expected = oblique_twin(z, U, K, strength)
    method = ObliqueProjection(small_sae.dictionary(), strength, rank, dtype=torch.float64)
    change = method.change(1, torch.from_numpy(z))
    np.testing.assert_allclose(z + change.delta.numpy(), expected, atol=1e-9)
    assert np.linalg.norm(expected - z, axis=1).max() > 0.05 * np.linalg.norm(z, axis=1).max()
    assert method.atoms(1) == (list(range(6)) if rank is None else [])
    assert change.strengths.shape == (12, len(method.atoms(1)))


def test_oblique_projection_keeps_what_is_desirable_and_takes_what_is_not() -> None:
    D = unit_rows()
    found = small_sae.dictionary()
    draw = np.random.default_rng(0)
    wanted = draw.normal(size=(4, 5)) @ D[DESIRABLE]
    unwanted = draw.normal(size=(4, 6)) @ D[UNDESIRABLE]
    method = ObliqueProjection(found, dtype=torch.float64)
    for rows, left in ((wanted, wanted), (unwanted, 0 * unwanted), (wanted + unwanted, wanted)):
        moved = torch.from_numpy(rows) + method.change(1, torch.from_numpy(rows)).delta
        np.testing.assert_allclose(moved.numpy(), left, atol=1e-9)
    orthogonal = Projection(found, rank=6, dtype=torch.float64).change(1, torch.from_numpy(wanted)).delta
    assert orthogonal.norm() > 0.05 * np.linalg.norm(wanted)  # that one takes of the desirable as well


def test_directions_that_depend_on_each_other_are_refused() -> None:
    found = small_sae.dictionary()
    found.concepts["polarity"] = ["undesirable"] * 6 + ["desirable"] * 17
    with pytest.raises(ValueError, match=r"rank: expected at least 1 or None, got 0"):
        ObliqueProjection(found, rank=0)
    vectors = {1: found.raw(1).clone()}
    vectors[1][8] = 2 * vectors[1][2]  # a desirable concept that is an undesirable one
    concepts = small_sae.dictionary().concepts
    twice = ConceptDictionary(concepts, vectors, small_sae.FACTS, {1: small_sae.R})
    with pytest.raises(ValueError, match="layer 1: expected independent directions, got 6 undesirable and 5"):
        ObliqueProjection(twice)
    with pytest.raises(ValueError, match=r"k: expected 1 to 23 \(d_model, or concepts\), got 24"):
        OMP(found, 24)


# The refusal direction.


@pytest.fixture(scope="module")
def sets() -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    draw = np.random.default_rng(7)
    refused = {layer: torch.from_numpy(draw.normal(size=(9, 32)) + 1) for layer in (1, 2)}
    accepted = {layer: torch.from_numpy(draw.normal(size=(7, 32))) for layer in (1, 2)}
    return refused, accepted


@pytest.mark.parametrize("source", [None, 2])
@pytest.mark.parametrize(
    ("mode", "strength"), [("add", 1.0), ("add", -0.5), ("ablate", 1.0), ("ablate", 0.3)]
)
def test_the_refusal_direction_equals_its_twin(
    mode: str, strength: float, source: int | None, sets: Any, z: np.ndarray
) -> None:
    method = RefusalDirection(
        *sets, small_sae.FACTS, mode=mode, strength=strength, source=source, dtype=torch.float64
    )
    r = sets[0][source or 1].numpy().mean(0) - sets[1][source or 1].numpy().mean(0)
    unit = naive.unit(r)
    expected = z + strength * r if mode == "add" else z - strength * np.outer(z @ unit, unit)
    moved = z + method.change(1, torch.from_numpy(z)).delta.numpy()
    np.testing.assert_allclose(moved, expected, atol=1e-12)
    if mode == "ablate" and strength == 1:
        np.testing.assert_allclose(moved @ unit, 0, atol=1e-12)
    assert method.layers == (1, 2)
    assert method.shifted(1) == (mode == "add")


def test_a_source_steers_layers_without_activations(sets: Any) -> None:
    method = RefusalDirection(*sets, small_sae.FACTS, source=1, layers=[0, 3], mode="ablate")
    z = torch.randn(3, 32)
    assert method.layers == (0, 3)
    assert torch.equal(method.change(0, z).delta, method.change(3, z).delta)


def test_refusal_directions_that_mean_nothing_are_refused(sets: Any) -> None:
    refused, accepted = sets
    facts = small_sae.FACTS
    with pytest.raises(ValueError, match="mode: expected one of"):
        RefusalDirection(refused, accepted, facts, mode="subtract")
    with pytest.raises(ValueError, match="strength: expected"):
        RefusalDirection(refused, accepted, facts, mode="ablate", strength=-1.0)
    with pytest.raises(UnknownLayerError, match=r"among \[1, 2\], got \[3\]"):
        RefusalDirection(refused, accepted, facts, layers=[3])
    with pytest.raises(
        ValueError, match=r"accepted, layer 1: expected finite activations \[at least 1, 32\]"
    ):
        RefusalDirection(refused, {1: accepted[1][:0], 2: accepted[2]}, facts)
    with pytest.raises(ValueError, match="not finite"):
        RefusalDirection({1: refused[1] / 0}, accepted, facts)
    with pytest.raises(NothingToSteerError, match="same mean"):
        RefusalDirection(refused, refused, facts)
    with pytest.raises(NothingToSteerError, match="strength is 0"):
        RefusalDirection(refused, accepted, facts, strength=0.0)
    assert RefusalDirection(refused, refused, facts, on_empty="pass").nothing


@torch.no_grad()
def test_prompts_are_read_at_their_last_token(tiny_llava: tuple[Any, Any]) -> None:
    model, processor = tiny_llava
    model.eval()
    inputs = inputs_of(processor)
    kept = inputs["attention_mask"].bool()
    assert not kept.all(), "the batch has no padding"
    with capture(model, [0, 2]) as captured:
        model(**inputs)
    found = prompt_activations(model, [inputs, inputs], [0, 2])
    for layer in (0, 2):
        ends = [int(row.nonzero().max()) for row in kept]
        expected = captured.activations[layer][torch.arange(len(ends)), ends]
        assert torch.equal(found[layer], torch.cat([expected, expected]).to(found[layer].dtype))
    right = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "input_ids": torch.ones(2, 3).long()}
    from daco.methods.refusal import _last_tokens

    assert _last_tokens(right).tolist() == [1, 2]
    with pytest.raises(ValueError, match="at least one prompt"):
        prompt_activations(model, [], [0])


@torch.no_grad()
def test_all_methods_are_methods_and_steer_a_model(tiny_llava: tuple[Any, Any], sets: Any) -> None:
    model, processor = tiny_llava
    inputs = inputs_of(processor)
    facts = ModelFacts.of(model)
    found = small_sae.dictionary(facts)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
    methods = [
        SAESteering(small_sae.steering_sae(facts)),
        MOP(found),
        OMP(found, 4),
        ActAdd(found),
        Projection(found),
        ObliqueProjection(found),
        RefusalDirection(*sets, facts, mode="ablate"),
        RefusalDirection.from_model(model, [inputs], [other], [1, 2], strength=3.0),
    ]
    plain = model(**inputs).logits
    for method in methods:
        assert isinstance(method, Method)
        assert not isinstance(SafetyPrompt(), Method)
        with steer(model, method, base_model_ok=True) as run:
            moved = model(**inputs).logits
        report = run.report()
        assert (moved - plain).abs().max() > 1e-4, str(method)
        assert report.positions
        assert str(method) in str(report)
    assert torch.equal(model(**inputs).logits, plain)
