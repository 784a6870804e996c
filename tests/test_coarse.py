"""Products with a dictionary in bytes are within their slack, and codes made with them are as good."""

import pytest
import small_sae
import torch
from test_sparse_coding import check, problem
from torch import Tensor

from daco import coarse, sparse_coding
from daco.coarse import Coarse, settle, usable
from daco.methods import MOP
from daco.sparse_coding import duality_gap, elastic_net


@pytest.fixture(autouse=True)
def on_working_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dictionaries here are small; small ones are not solved coarsely."""
    monkeypatch.setattr(sparse_coding, "SMALL", 0)


def spiky(n: int, d: int, seed: int) -> Tensor:
    """Rows with one number that is 200 times as large as the others, as activations of models have."""
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    z[:, 5] *= 200
    return z


@pytest.mark.parametrize("n", [1, 2, 17, 40])
@pytest.mark.parametrize("spikes", [False, True])
def test_no_product_is_further_away_than_its_slack(n: int, spikes: bool) -> None:
    D = problem(n_atoms=331, d=61, dtype=torch.float32).D
    z = spiky(n, 61, 3) if spikes else problem(n=n, d=61, dtype=torch.float32).z
    near = Coarse.of(D).products(z)
    off = (near.value.double() - z.double() @ D.double().T).abs()
    assert (off <= near.slack).all()
    assert off.max() > 0
    assert not near.exact
    # of use at all: a product is known to within a few hundredths of a row's norm
    assert (near.slack <= 0.04 * z.norm(dim=1, keepdim=True)).all()


def test_a_row_of_zeros_has_products_of_zero() -> None:
    D = torch.cat([problem(dtype=torch.float32).D, torch.zeros(2, 61)])
    near = Coarse.of(D).products(torch.zeros(3, 61))
    assert near.value.abs().max() == 0
    assert near.slack.abs().max() < 1e-30
    assert Coarse.of(D).products(torch.ones(1, 61)).value[0, -2:].tolist() == [0, 0]


@pytest.mark.parametrize("share", [0.02, 0.5])  # fewer and more than are picked one by one
def test_settled_products_are_exact(share: float) -> None:
    p = problem(dtype=torch.float32)
    near = Coarse.of(p.D).products(p.z)
    where = torch.rand(near.value.shape, generator=torch.Generator().manual_seed(0)) < share
    where[2] = False
    settled, exact = settle(near, where, p.z, p.D), p.z @ p.D.T
    assert 0 < where.float().mean() < 1
    torch.testing.assert_close(settled[where], exact[where], rtol=1e-5, atol=1e-5)
    kept = near.value if share < coarse.FEW else exact
    torch.testing.assert_close(settled[~where], kept[~where], rtol=0, atol=0)


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("shared", [0.0, 0.3])
@pytest.mark.parametrize("n", [1, 9])
def test_codes_are_as_good_as_the_naive_solvers(
    n: int, shared: float, with_gram: bool, non_negative: bool
) -> None:
    p = problem(n=n, shared=shared, dtype=torch.float32)
    gram = p.D @ p.D.T if with_gram else None
    solved = elastic_net(*p, 0.95, non_negative=non_negative, gram=gram, coarse=Coarse.of(p.D))
    check(p, solved, 0.95, 1e-4, non_negative)
    assert (solved.code != 0).any(-1).all()


@pytest.mark.parametrize("with_gram", [False, True])
def test_outliers_and_zeros_are_solved_too(with_gram: bool) -> None:
    p = problem(dtype=torch.float32)
    z = torch.cat([spiky(3, 61, 1), torch.zeros(1, 61)])
    alpha = torch.tensor([20.0, 1e9, 2.0, 1.0])  # of the second no atom is worth it
    gram = p.D @ p.D.T if with_gram else None
    solved = elastic_net(z, p.D, alpha, 0.95, gram=gram, coarse=Coarse.of(p.D))
    gap = duality_gap(z.double(), p.D.double(), solved.code.double(), alpha.double(), 0.95)
    assert solved.certified.all()
    assert (gap <= solved.gap * (1 + 1e-6) + 1e-12).all()
    assert (solved.code != 0).any(-1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_relative_penalty_is_one_of_the_largest_product(as_bytes: bool) -> None:
    p = problem(dtype=torch.float32)
    known = Coarse.of(p.D) if as_bytes else None
    alpha = 0.4 * (p.z @ p.D.T).abs().amax(-1) / 0.95
    expected = elastic_net(p.z, p.D, alpha, 0.95, tol=1e-5)
    found = elastic_net(p.z, p.D, torch.full((9,), 0.4), 0.95, tol=1e-5, coarse=known, relative=True)
    assert found.certified.all()
    torch.testing.assert_close(found.code, expected.code, rtol=1e-3, atol=1e-2)
    above = elastic_net(p.z, p.D, torch.full((9,), 1.001), 0.95, coarse=known, relative=True)
    assert not above.code.any()


def test_mop_keeps_each_layer_in_bytes_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = small_sae.dictionary()
    z = torch.randn(5, dictionary.model.hidden_size, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("daco.methods.mop.SMALL", 0)
    method = MOP(dictionary, alpha=0.3, tol=1e-5)
    layer = dictionary.layers[0]
    found = method.code(layer, z)
    assert list(method._coarse) == [layer]
    monkeypatch.setattr("daco.methods.mop.usable", lambda D: False)
    other = MOP(dictionary, alpha=0.3, tol=1e-5)
    torch.testing.assert_close(found, other.code(layer, z), rtol=1e-2, atol=1e-2)
    assert not other._coarse
    assert found.any()


def test_bytes_are_used_only_where_sums_of_them_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    D = problem(dtype=torch.float32).D
    assert usable(D)
    assert not usable(D.double())
    assert not usable(D.bfloat16())
    assert not usable(D.to("meta"))
    right = torch._int_mm
    for wrong in (lambda a, b: right(a, b).clamp(-32768, 32767), None):
        coarse._exact.cache_clear()
        if wrong:
            monkeypatch.setattr(torch, "_int_mm", wrong)
        else:
            monkeypatch.delattr(torch, "_int_mm")
        assert not usable(D)
    monkeypatch.undo()
    coarse._exact.cache_clear()
    assert usable(D)
