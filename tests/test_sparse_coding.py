"""Sparse codes are the minimisers of naive solvers, on every kind of dictionary, and certificates hold."""

from typing import NamedTuple

import naive
import numpy as np
import pytest
import small_sae
import torch
from torch import Tensor

from daco import sparse_coding
from daco.sparse_coding import SparseCode, duality_gap, elastic_net


@pytest.fixture(autouse=True)
def on_working_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dictionaries here are small, but only where a test says so are they solved as small ones."""
    monkeypatch.setattr(sparse_coding, "SMALL", 0)


class Problem(NamedTuple):
    z: Tensor
    D: Tensor
    alpha: Tensor


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(12, 32)) * 3


def problem(
    n: int = 9,
    n_atoms: int = 331,
    d: int = 61,
    shared: float = 0.0,
    fraction: float = 0.3,
    tau: float = 0.95,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Random unit rows whose mean |cosine| is about `shared`, and targets with that part in them."""
    draw = np.random.default_rng(seed)
    common = naive.unit(draw.normal(size=d))
    mixed = [
        shared**0.5 * common + (1 - shared) ** 0.5 * naive.unit(draw.normal(size=(m, d)))
        for m in (n_atoms, n)
    ]
    D, z = naive.unit(mixed[0]), 7 * mixed[1]
    alpha = np.array([naive.mop_alpha(row, D, fraction, tau) for row in z])
    return Problem(*(torch.from_numpy(part).to(dtype) for part in (z, D, alpha)))


def fista(p: Problem, tau: float, non_negative: bool = False, steps: int = 20_000) -> Tensor:
    """Accelerated proximal gradient steps on all atoms; stops where nothing moves."""
    top = torch.linalg.eigvalsh(p.D.T @ p.D)[-1]
    l1, l2 = (p.alpha * tau)[:, None], (p.alpha * (1 - tau))[:, None]
    size, t = 1 / (top + l2), 1.0
    x = y = torch.zeros(len(p.z), len(p.D), dtype=p.z.dtype)
    for _ in range(steps):
        moved = y + size * ((p.z - y @ p.D) @ p.D.T - l2 * y)
        new = (moved - size * l1).relu() if non_negative else moved - moved.clamp(-size * l1, size * l1)
        t = 1.0 if ((y - new) * (new - x)).sum() > 0 else t
        grown = (1 + (1 + 4 * t * t) ** 0.5) / 2
        x, y, t, old = new, new + (t - 1) / grown * (new - x), grown, x
        if (x - old).abs().max() <= 1e-12 * x.abs().max():
            break
    return x


def objective(p: Problem, code: Tensor, tau: float) -> Tensor:
    rows = zip(p.z.double().numpy(), code.double().numpy(), p.alpha.double().numpy(), strict=True)
    D = p.D.double().numpy()
    return torch.tensor([naive.mop_objective(z, D, c, float(a), tau) for z, c, a in rows])


def half(z: Tensor) -> Tensor:
    return 0.5 * z.double().square().sum(-1)


def check(p: Problem, solved: SparseCode, tau: float, tol: float, non_negative: bool = False) -> None:
    """Certified, by a certificate that holds, and no worse than the naive solver."""
    assert solved.certified.all()
    true_gap = duality_gap(
        p.z.double(), p.D.double(), solved.code.double(), p.alpha.double(), tau, non_negative
    )
    assert (true_gap <= solved.gap.double() * (1 + 1e-6) + 1e-14 * half(p.z)).all()
    assert (solved.gap <= tol * half(p.z)).all()
    wide = Problem(*(part.double() for part in p))
    best = objective(wide, fista(wide, tau, non_negative), tau)
    excess = objective(p, solved.code, tau) - best
    assert (excess <= tol * half(p.z)).all()
    assert not non_negative or (solved.code >= 0).all()


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize(("fraction", "tau"), [(0.1, 0.95), (0.02, 0.5), (0.3, 1.0)])
def test_sparse_codes_equal_coordinate_descent(
    fraction: float, tau: float, non_negative: bool, z: np.ndarray
) -> None:
    D = naive.unit(small_sae.dictionary().raw(1).double().numpy())
    alpha = np.array([naive.mop_alpha(row, D, fraction, tau) for row in z])
    tensors = torch.from_numpy(z), torch.from_numpy(D), torch.from_numpy(alpha)
    solved = elastic_net(*tensors, tau, non_negative=non_negative, tol=1e-13)
    expected = np.stack(
        [naive.mop_code(row, D, a, tau, non_negative) for row, a in zip(z, alpha, strict=True)]
    )
    assert solved.certified.all()
    np.testing.assert_allclose(solved.code.numpy(), expected, atol=1e-5)
    assert 0 < (expected != 0).sum() < expected.size
    assert (expected >= 0).all() == non_negative
    for row, a, got, best in zip(z, alpha, solved.code.numpy(), expected, strict=True):
        found = naive.mop_objective(row, D, got, a, tau)
        assert found <= naive.mop_objective(row, D, best, a, tau) + 1e-9


def test_the_duality_gap_bounds_the_distance_from_the_optimum(z: np.ndarray) -> None:
    D = naive.unit(small_sae.dictionary().raw(1).double().numpy())
    draw = np.random.default_rng(2)
    for tau in (0.95, 0.5):
        alpha = np.array([naive.mop_alpha(row, D, 0.1, tau) for row in z])
        best = np.stack([naive.mop_code(row, D, a, tau) for row, a in zip(z, alpha, strict=True)])
        for noise in (0.0, 0.01, 1.0):
            code = best + noise * draw.normal(size=best.shape)
            gap = duality_gap(*map(torch.from_numpy, (z, D, code, alpha)), tau).numpy()
            for row, a, c, b, g in zip(z, alpha, code, best, gap, strict=True):
                excess = naive.mop_objective(row, D, c, a, tau) - naive.mop_objective(row, D, b, a, tau)
                assert excess <= g + 1e-8
            assert (gap < 1e-6).all() == (noise == 0.0)


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.95, 0.3])
@pytest.mark.parametrize("shared", [0.0, 0.3])
@pytest.mark.parametrize("n_atoms", [331, 37])  # more and fewer than d_model
def test_codes_are_as_good_as_the_naive_solvers(
    n_atoms: int, shared: float, tau: float, non_negative: bool, with_gram: bool
) -> None:
    p = problem(n_atoms=n_atoms, shared=shared, tau=tau)
    gram = p.D @ p.D.T if with_gram else None
    solved = elastic_net(*p, tau, non_negative=non_negative, tol=1e-10, gram=gram, correlation=p.z @ p.D.T)
    check(p, solved, tau, 1e-10, non_negative)
    assert 0 < (solved.code != 0).sum(-1).double().mean() < n_atoms
    assert (solved.code.sum(-1) != 0).all()


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize(("fraction", "shared"), [(0.1, 0.0), (0.1, 0.3), (0.01, 0.3)])  # the last takes long
def test_small_dictionaries_are_solved_whole(
    fraction: float, shared: float, tau: float, non_negative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_coding, "SMALL", 200)
    p = problem(n=4, n_atoms=150, shared=shared, fraction=fraction)
    check(p, elastic_net(*p, tau, non_negative=non_negative, tol=1e-9), tau, 1e-9, non_negative)


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_float32_is_certified_in_float32(shared: float) -> None:
    for tol in (1e-4, 1e-5):
        p = problem(shared=shared, dtype=torch.float32)
        solved = elastic_net(*p, 0.95, tol=tol)
        assert solved.code.dtype == solved.gap.dtype == torch.float32
        check(p, solved, 0.95, tol)


def test_what_rounding_hides_is_not_certified() -> None:
    p = problem(dtype=torch.float32)
    solved = elastic_net(*p, 0.95, tol=1e-9)
    assert not solved.certified.any()
    assert (solved.gap < 5e-6 * half(p.z)).all()


def test_low_precision_is_solved_in_float32() -> None:
    p = Problem(*(part.bfloat16() for part in problem()))
    solved = elastic_net(*p, 0.95)
    assert solved.code.dtype == torch.bfloat16
    wide = elastic_net(*(part.float() for part in p), 0.95)
    assert torch.equal(solved.code, wide.code.bfloat16())


@pytest.mark.parametrize(
    ("fraction", "tau", "shared", "least"),
    [(1e-3, 0.5, 0.0, 96), (1e-2, 0.95, 0.3, 50), (5e-2, 1.0, 0.3, 40)],
)
def test_dense_codes_of_many_rounds(fraction: float, tau: float, shared: float, least: int) -> None:
    p = problem(n=4, fraction=fraction, shared=shared, tau=tau)
    solved = elastic_net(*p, tau, tol=1e-10)
    check(p, solved, tau, 1e-10)
    assert ((solved.code != 0).sum(-1) > least).all()


@pytest.mark.parametrize("tau", [1.0, 0.95])
def test_atoms_that_are_there_twice(tau: float) -> None:
    once = problem(n_atoms=40, tau=tau)
    twice = Problem(once.z, torch.cat([once.D, once.D, -once.D[:7]]), once.alpha)
    solved = elastic_net(*twice, tau, tol=1e-10)
    check(twice, solved, tau, 1e-10)
    if tau == 1:  # which of the twins is taken does not matter
        merged = solved.code[:, :40] + solved.code[:, 40:80]
        merged[:, :7] -= solved.code[:, 80:]
        single = elastic_net(*once, tau, tol=1e-10).code
        torch.testing.assert_close(merged, single, atol=1e-4, rtol=0)


def test_rows_of_zeros_and_penalties_that_leave_nothing() -> None:
    p = problem(n=3)
    z = p.z.clone()
    z[1] = 0
    alpha = (z @ p.D.T).abs().amax(-1) / 0.95
    solved = elastic_net(z, p.D, alpha * (1 + 1e-12), 0.95)
    assert solved.certified.all()
    assert not solved.code.any()
    assert (solved.gap <= 1e-12 * half(p.z)).all()
    some = elastic_net(z, p.D, alpha * torch.tensor([0.5, 0.5, 2.0]), 0.95, tol=1e-12)
    assert some.certified.all()
    assert [bool(row.any()) for row in some.code] == [True, False, False]
    positive = elastic_net(-p.D[:1], p.D[:1], p.alpha[:1], 0.95, non_negative=True)
    assert not positive.code.any()
    assert positive.certified.all()


def test_one_row_is_solved_like_many_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(n=1_000, n_atoms=211)
    whole = elastic_net(*p, 0.95, tol=1e-10)
    assert whole.certified.all()
    monkeypatch.setattr(sparse_coding, "CHUNK", 170)
    monkeypatch.setattr(sparse_coding, "ROOM", 3 * 10**6)
    parts = elastic_net(*p, 0.95, tol=1e-10)
    torch.testing.assert_close(parts.code, whole.code, atol=1e-6, rtol=0)
    for row in (0, 999):
        alone = elastic_net(*(part if part is p.D else part[[row]] for part in p), 0.95, tol=1e-10)
        torch.testing.assert_close(alone.code[0], whole.code[row], atol=1e-6, rtol=0)
    none = elastic_net(p.z[:0], p.D, p.alpha[:0], 0.95)
    assert none.code.shape == (0, 211)


def test_rounds_that_are_too_few_are_told() -> None:
    p = problem(n=4, fraction=1e-3)
    solved = elastic_net(*p, 0.5, tol=1e-10, max_rounds=1)
    assert not solved.certified.any()
    gap = duality_gap(*p[:2], solved.code, p.alpha, 0.5)
    torch.testing.assert_close(solved.gap, gap)


def test_a_row_that_is_not_a_number_does_not_spoil_the_others() -> None:
    p = problem(n=3)
    clean = elastic_net(*p, 0.95, tol=1e-10)
    z = p.z.clone()
    z[1] = torch.nan
    spoilt = elastic_net(z, p.D, p.alpha, 0.95, tol=1e-10)
    assert spoilt.certified.tolist() == [True, False, True]
    torch.testing.assert_close(spoilt.code[[0, 2]], clean.code[[0, 2]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gives_the_same() -> None:
    for shared in (0.0, 0.3):
        p = problem(n=70, shared=shared)
        here = elastic_net(*p, 0.95, tol=1e-10)
        there = elastic_net(*(part.cuda() for part in p), 0.95, tol=1e-10)
        assert there.certified.all()
        torch.testing.assert_close(there.code.cpu(), here.code, atol=1e-6, rtol=0)
