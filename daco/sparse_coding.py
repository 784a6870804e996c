"""Sparse codes on a dictionary, batched, each certified by its duality gap; tensors in, tensors out.

Most atoms are in no code: each row is solved on a working set of the atoms that pull hardest, on their Gram
matrix, and one product with the whole dictionary then shows which atoms were missing. On a GPU, a few rows at
a time go through `daco.solver_kernels` first, which asks the host for nothing but whether that was enough.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from daco.coarse import Coarse, Near, settle
from daco.kernels import kernels_of
from daco.replays import Replays

CHUNK = 256
"""Rows solved at a time: about five arrays `[CHUNK, n_atoms]` are alive at once."""

ROOM = 64 * 2**20
"""Numbers held in the atoms and Gram matrices of working sets at a time (256 MiB in float32), one row's at
least."""

GROUP = 16
"""Rows on a CPU that are solved together, on working sets as large as the neediest of them asks for."""

NEAR = 0.98
"""Atoms whose pull is above this share of the L1 penalty get a place in the working set."""

LONE = 32
"""Rows up to which a dictionary that is known coarsely is worth it beside a Gram matrix."""

MANY, NEWCOMERS = 256, 96
"""Where more atoms than MANY (or than the code has) pull that hard, most pull for a part that they share:
NEWCOMERS of them join, or as many as the code has."""

SMALL, WHOLE_ROUNDS, ROUND = 1_024, 30, 10
"""Dictionaries of at most SMALL atoms are tried whole first, rows on one Gram matrix: WHOLE_ROUNDS of ROUND
accelerated steps at most; what is not certified by then is solved on working sets."""

RECORDED = 32
"""Rows on a GPU up to which the work is recorded as a CUDA graph, which keeps its memory: 2 MB a row."""

FEW = 64
"""Rows on a GPU up to which one kernel solves all working sets, of equal size: what many need, all pay."""

TURNS, STEPS, MOST_STEPS, NEWTON_STEPS = 20, 8, 512, 8
"""On a working set: turns at most; accelerated steps in the first turn, twice as many in each further one, up
to a limit; Newton steps in each."""


_REPLAYS = Replays()


class SparseCode(NamedTuple):
    """Codes, and how good they are."""

    code: Tensor
    """`[n, n_atoms]`."""
    gap: Tensor
    """`[n]`: no code has an objective smaller by more than this."""
    certified: Tensor
    """`[n]` bool: whether the gap is within the tolerance."""


class _Penalty(NamedTuple):
    """What codes pay, row by row."""

    l1: Tensor
    """`[n, 1]`."""
    l2: Tensor
    """`[n, 1]`."""
    non_negative: bool

    def of(self, rows: Tensor | slice) -> "_Penalty":
        return _Penalty(self.l1[rows], self.l2[rows], self.non_negative)

    def strength(self, pull: Tensor) -> Tensor:
        """How hard atoms are drawn into the code; a new tensor."""
        return pull.clone() if self.non_negative else pull.abs()

    def most(self, pull: Near) -> Tensor:
        """How hard they may be drawn, where it is not known exactly."""
        return self.strength(pull.value).add_(pull.slack)

    def shrink(self, c: Tensor, step: Tensor) -> Tensor:
        """The L1 part's proximal step."""
        if self.non_negative:
            return (c - step * self.l1).relu()
        return c - c.clamp(-step * self.l1, step * self.l1)


class _Set(NamedTuple):
    """The problem of each row on the atoms of its working set."""

    G: Tensor
    """`[n, w, w]`: their Gram matrix."""
    q: Tensor
    """`[n, w]`: their products with z."""
    half: Tensor
    """`[n]`: `1/2 ||z||^2`."""
    penalty: _Penalty

    def of(self, rows: Tensor) -> "_Set":
        return _Set(self.G[rows], self.q[rows], self.half[rows], self.penalty.of(rows))

    def pull(self, c: Tensor) -> Tensor:
        """The negative gradient of the smooth part."""
        return self.q - self.product(c) - self.penalty.l2 * c

    def product(self, c: Tensor) -> Tensor:
        product: Tensor = (self.G @ c[:, :, None]).squeeze(-1)
        return product

    def primal_and_gap(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and duality gap on the working set, `[n]` each."""
        along, product = (c * self.q).sum(-1), self.product(c)
        square = 2 * (self.half - along) + (c * product).sum(-1)
        pull = self.q - product - self.penalty.l2 * c
        return _primal_and_gap(square, 2 * self.half - along, c, pull, self.penalty)


@torch.no_grad()
def elastic_net(
    z: Tensor,
    D: Tensor,
    alpha: Tensor,
    tau: float,
    *,
    non_negative: bool = False,
    tol: float = 1e-4,
    max_rounds: int = 100,
    correlation: Tensor | None = None,
    gram: Tensor | None = None,
    coarse: Coarse | None = None,
    relative: bool = False,
) -> SparseCode:
    """Minimise `1/2 ||z - c D||^2 + alpha (tau ||c||_1 + (1 - tau)/2 ||c||^2)` for each row.

    Room beside arguments and result, however many rows: about five arrays `[256, n_atoms]`, and 256 MiB (in
    float32) for working sets.

    Args:
        z: `[n, d_model]`.
        D: `[n_atoms, d_model]`, rows of norm 1.
        alpha: `[n]`, penalty of each row; absolute, or `relative`.
        tau: Share of the L1 penalty, in (0, 1].
        non_negative: Only coefficients >= 0.
        tol: Gap that is accepted, as a fraction of `1/2 ||z||^2`; float32 allows about 1e-5.
        max_rounds: Working sets a row is solved on at most; each costs a product with the dictionary.
        correlation: `z D^T` where it is known, `[n, n_atoms]`.
        gram: `D D^T`, `[n_atoms, n_atoms]`, where there is room for it (900 MB for 15,000 atoms in float32):
            saves the products with the dictionary after the first.
        coarse: `Coarse.of(D)`, a quarter of its size, where `daco.coarse.usable`: most products are then made
            with it, and those that decide anything with the dictionary. Codes are as good, sooner.
        relative: Whether alpha is a fraction of `max|D z| / tau`, above which codes are zero.

    Source: working sets as in Massias et al. 2018 (arXiv 1802.07481); steps on them by Beck and Teboulle 2009
    with restarts (O'Donoghue and Candes 2015), then Newton's on the signs found (Lee et al. 2006).
    scikit-learn's ElasticNet has `alpha / d_model` for alpha and `l1_ratio` for tau.
    """
    dtype = torch.promote_types(D.dtype, torch.float32)
    wide, alpha = z.to(dtype), alpha.to(dtype)[:, None]
    lasts = D.dtype == dtype and (gram is None or (gram.dtype == dtype and gram.is_contiguous()))
    D, gram = D.to(dtype), None if gram is None else gram.to(dtype).contiguous()
    known = _Dictionary(D, gram, coarse if gram is None or len(z) <= LONE else None, lasts)
    task = _Task(tau, non_negative, relative, tol, max_rounds)
    code, gap = wide.new_zeros(len(z), len(D)), wide.new_zeros(len(z))
    for part in _parts(len(z), CHUNK):
        here = wide[part]
        given = () if correlation is None else (correlation[part].to(dtype),)
        if len(here) <= FEW and len(D) > SMALL and max_rounds > 0 and known.by_kernel:
            code[part], gap[part] = _solve_few(known, task, here, alpha[part], *given)
            continue
        q, penalty = _posed(known, task, here, alpha[part], *given)
        solve = _solve if len(D) > SMALL else _solve_small
        code[part], gap[part] = solve(here, q, known, penalty, tol, max_rounds)
    return SparseCode(code.to(z.dtype), gap.to(z.dtype), gap <= tol * _half(wide))


@torch.no_grad()
def duality_gap(
    z: Tensor, D: Tensor, c: Tensor, alpha: Tensor, tau: float, non_negative: bool = False
) -> Tensor:
    """Objective of codes minus a lower bound of the optimum, `[n]`; at the solution no more than rounding.

    The elastic net is a lasso on `[D, sqrt(l2) I]`, whose dual point is the scaled residual.

    Args:
        z: `[n, d_model]`.
        D: `[n_atoms, d_model]`.
        c: Codes `[n, n_atoms]`.
        alpha: `[n]`.
        tau: Share of the L1 penalty.
        non_negative: Whether codes are bound to be >= 0.
    """
    penalty = _Penalty((alpha * tau)[:, None], (alpha * (1 - tau))[:, None], non_negative)
    residual = z - c @ D
    return _certificate(z, residual, c, residual @ D.T - penalty.l2 * c, penalty)


class _Task(NamedTuple):
    """What `elastic_net` is asked for, beside rows and dictionary."""

    tau: float
    non_negative: bool
    relative: bool
    tol: float
    max_rounds: int


class _Dictionary(NamedTuple):
    """The dictionary, and what is known of it beforehand."""

    D: Tensor
    """`[n_atoms, d_model]`."""
    gram: Tensor | None
    """`[n_atoms, n_atoms]`."""
    coarse: Coarse | None
    lasts: bool
    """Whether D and gram are the caller's own, no copies in another dtype that this call alone has."""

    @property
    def by_kernel(self) -> bool:
        """Whether a GPU's kernel can solve working sets of it."""
        return self.D.dtype == torch.float32 and self.coarse is None and kernels_for(self.D) is not None

    @property
    def places(self) -> tuple[int, ...]:
        """Where D and gram lie: a model that is moved and back keeps its tensors, not their memory."""
        return tuple(t.data_ptr() for t in (self.D, self.gram) if t is not None)

    def products(self, z: Tensor) -> Near:
        """Products with all atoms, `[n, n_atoms]`."""
        if self.coarse is None or len(self.D) <= SMALL:
            return Near(z @ self.D.T, z.new_zeros(()))
        return self.coarse.products(z)

    def largest(self, q: Near, z: Tensor) -> Tensor:
        """The largest size of the products, `[n, 1]`."""
        size = q.value.abs()
        if not q.exact:
            where = size + q.slack >= (size - q.slack).amax(-1, keepdim=True)
            size = torch.where(where, settle(q, where, z, self.D).abs(), 0)
        return size.amax(-1, keepdim=True)


def _solve(
    z: Tensor, q: Near, known: _Dictionary, penalty: _Penalty, tol: float, max_rounds: int
) -> tuple[Tensor, Tensor]:
    """Codes and gaps of some rows; a row leaves when it is certified, or when nothing more changes."""
    code = torch.zeros_like(q.value)
    gap = _certificate(z, z, code, penalty.most(q), penalty)
    inner = _inner(tol, z.dtype)
    rows = (gap > tol * _half(z)).nonzero().squeeze(-1)
    pull = q.value[rows]
    for _ in range(max_rounds):
        if not len(rows):
            break
        some, here, old, mine = penalty.of(rows), z[rows], code[rows], q.of(rows)
        new, residual, changed = torch.zeros_like(old), here.clone(), rows < 0
        for part, atoms in _working_sets(pull, old, some):
            before = old[part].gather(1, atoms)
            c = _solve_sets(here[part], mine.of(part), known, atoms, before, some.of(part), inner)
            new[part] = torch.zeros_like(old[part]).scatter_(1, atoms, c)
            residual[part] -= _sum_of(known.D, atoms, c)
            changed[part] = (c != before).any(-1)
            if known.gram is not None:
                pull[part] = mine.value[part] - _sum_of(known.gram, atoms, c)
        near = known.products(residual) if known.gram is None else Near(pull, mine.slack)
        pull = _pull(near, residual, new, known.D, some)
        code[rows], gap[rows] = new, _certificate(here, residual, new, pull, some)
        going = (gap[rows] > tol * _half(here)) & changed
        rows, pull = rows[going], pull[going]
    return code, gap


def _posed(
    known: _Dictionary, task: _Task, z: Tensor, alpha: Tensor, correlation: Tensor | None = None
) -> tuple[Near, _Penalty]:
    """Products with the dictionary, and what codes pay."""
    q = known.products(z) if correlation is None else Near(correlation, z.new_zeros(()))
    most = alpha * known.largest(q, z) / task.tau if task.relative else alpha
    return q, _Penalty(most * task.tau, most * (1 - task.tau), task.non_negative)


def _solve_few(
    known: _Dictionary, task: _Task, z: Tensor, alpha: Tensor, *correlation: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes and gaps of a few rows on a GPU, on working sets of fixed size; of the others by `_solve`.

    The host waits once for each size: to have less to launch counts more there than to have less to compute.
    """
    first, *wider = kernels_for(known.D).WIDTHS[: task.max_rounds]

    def begin(z: Tensor, alpha: Tensor, *correlation: Tensor) -> tuple[Tensor, ...]:
        q, penalty = _posed(known, task, z, alpha, *correlation)
        nothing = torch.zeros_like(q.value)
        code, pull, gap = _on_sets(first, z, q, known, nothing, q.value, penalty, task.tol)
        missed = gap > task.tol * _half(z)
        return code, gap, missed.any(), missed, pull, q.value, penalty.l1, penalty.l2

    with _REPLAYS.lock:
        key = (task, z.shape, len(correlation), known.places)
        recorded = known.lasts and z.is_cuda and len(z) <= RECORDED
        run = partial(_REPLAYS.run, known.D, key, begin) if recorded else begin
        code, gap, more, *state = run(z, alpha, *correlation)
        code, gap = code.clone(), gap.clone()
        if not more:
            return code, gap
        missed, *rest = state
        pull, products, l1, l2 = (part.clone() for part in rest)
        rows = missed.nonzero().squeeze(-1)  # waits, also for the copies
    q, penalty = Near(products, z.new_zeros(())), _Penalty(l1, l2, task.non_negative)
    pull = pull[rows]
    for width in wider:
        here, some = z[rows], penalty.of(rows)
        code[rows], pull, gaps = _on_sets(width, here, q.of(rows), known, code[rows], pull, some, task.tol)
        gap[rows] = gaps
        left = (gaps > task.tol * _half(here)).nonzero().squeeze(-1)
        if not len(left):
            return code, gap
        rows, pull = rows[left], pull[left]
    code[rows], gap[rows] = _solve(z[rows], q.of(rows), known, penalty.of(rows), task.tol, task.max_rounds)
    return code, gap


def _on_sets(
    width: int,
    z: Tensor,
    q: Near,
    known: _Dictionary,
    code: Tensor,
    pull: Tensor,
    penalty: _Penalty,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, what then pulls, and gaps, from working sets of so many atoms by the GPU's kernel."""
    strength = penalty.strength(pull).masked_fill_(code != 0, torch.inf)
    atoms = strength.topk(width, sorted=False).indices
    rows = known.D[atoms]
    G = _gram(rows) if known.gram is None else _block(known.gram, atoms)
    own, start = q.value.gather(1, atoms), code.gather(1, atoms)
    l1, l2, inner = penalty.l1.squeeze(-1), penalty.l2.squeeze(-1), _inner(tol, z.dtype)
    c = kernels_for(known.D).solve(G, own, start, l1, l2, _half(z), inner, penalty.non_negative)
    residual = torch.baddbmm(z[:, None], c[:, None], rows, alpha=-1).squeeze(1)
    code = torch.zeros_like(code).scatter_(1, atoms, c)
    pull = torch.addcmul(residual @ known.D.T, penalty.l2, code, value=-1)
    return code, pull, _certificate(z, residual, code, pull, penalty)


def kernels_for(x: Tensor) -> Any:
    """The kernels that solve working sets where x lies; None: torch does."""
    if x.device.type != "cuda":
        return None
    return kernels_of("daco.solver_kernels", "codes are found")


def _pull(near: Near, residual: Tensor, c: Tensor, D: Tensor, penalty: _Penalty) -> Tensor:
    """The negative gradient of the smooth part; where it is not exact, it is within the L1 penalty."""
    own, value = penalty.l2 * c, near.value
    if not near.exact:
        where = penalty.most(Near(value - own, near.slack)) > penalty.l1
        value = settle(near, where, residual, D)
    return value.sub_(own)


def _solve_small(
    z: Tensor, q: Near, known: _Dictionary, penalty: _Penalty, tol: float, max_rounds: int
) -> tuple[Tensor, Tensor]:
    """Codes and gaps of some rows by accelerated steps on all atoms, which few rows need more than."""
    D = known.D
    G = D @ D.T if known.gram is None else known.gram
    top = torch.linalg.eigvalsh(G)[-1]
    code = torch.zeros_like(q.value)
    gap = _certificate(z, z, code, q.value, penalty)
    rows = (gap > tol * _half(z)).nonzero().squeeze(-1)
    state = _start(code[rows])
    for _ in range(min(max_rounds, WHOLE_ROUNDS)):
        if not len(rows):
            return code, gap
        some, here = penalty.of(rows), q.value[rows]
        step = 1 / (top + some.l2)
        for _ in range(ROUND):
            pull = here - state.ahead @ G - some.l2 * state.ahead
            state = _advance(state, some.shrink(state.ahead + step * pull, step))
        residual = z[rows] - state.c @ D
        pull = residual @ D.T - some.l2 * state.c
        code[rows], gap[rows] = state.c, _certificate(z[rows], residual, state.c, pull, some)
        going = gap[rows] > tol * _half(z[rows])
        rows, state = rows[going], _State(*(part[going] for part in state))
    code[rows], gap[rows] = _solve(z[rows], q.of(rows), known, penalty.of(rows), tol, max_rounds)
    return code, gap


def _sum_of(rows: Tensor, atoms: Tensor, c: Tensor) -> Tensor:
    """The sum over atoms of coefficient times row; rows without a coefficient are not read."""
    most = max(1, int((c != 0).sum(-1).max()))
    places = c.abs().topk(most, sorted=False).indices
    chosen, weights = atoms.gather(1, places), c.gather(1, places)
    total: Tensor = embedding_bag(chosen, rows, per_sample_weights=weights, mode="sum")
    return total


def _working_sets(pull: Tensor, code: Tensor, penalty: _Penalty) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of rows, and atoms `[rows, w]` to solve each on: its code's, then those that pull hardest."""
    strength, inside = penalty.strength(pull), code != 0
    kept = inside.sum(-1)
    near = ((strength > NEAR * penalty.l1) & ~inside).sum(-1)
    few = near <= kept.clamp_min(MANY)
    places = kept + torch.where(few, near, kept.clamp_min(NEWCOMERS))
    strength.masked_fill_(inside, torch.inf)
    size = GROUP if pull.device.type == "cpu" else CHUNK
    order = places.argsort(stable=True)
    for group in _parts(len(order), size):
        part = order[group]
        width = min(16 * (int(places[part].max()) // 16 + 1), code.shape[1])
        yield part, strength[part].topk(width, sorted=False).indices


def _solve_sets(
    z: Tensor, q: Near, known: _Dictionary, atoms: Tensor, c: Tensor, penalty: _Penalty, tol: float
) -> Tensor:
    """Codes on working sets, `[n, w]`, of as many rows at a time as there is room for."""
    width, whole = atoms.shape[1], q.exact and known.gram is not None
    numbers = width * (4 * width + (0 if whole else known.D.shape[1]))
    found = []
    for part in _parts(len(z), max(1, ROOM // numbers)):
        some = atoms[part]
        rows = known.D[some[:, :0]] if whole else known.D[some]
        G = _gram(rows) if known.gram is None else _block(known.gram, some)
        own = q.value[part].gather(1, some) if q.exact else (rows @ z[part, :, None]).squeeze(-1)
        found.append(_descend(_Set(G, own, _half(z[part]), penalty.of(part)), c[part], tol))
    return torch.cat(found)


def _block(gram: Tensor, atoms: Tensor) -> Tensor:
    """The Gram matrices of some atoms, `[n, w, w]`; one index is looked up sooner than two."""
    return gram.view(-1).take(atoms[:, :, None] * len(gram) + atoms[:, None, :])


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def _descend(problem: _Set, c: Tensor, tol: float) -> Tensor:
    """Codes on working sets: accelerated steps find the signs, Newton steps the values.

    Newton steps are exact where the signs are right and may go astray where not: they count where they end
    with a certificate or at a lower objective. Any code that costs more than all of `1/2 ||z||^2` is astray,
    however well it seems to fit: its numbers are too large to be trusted.
    """
    gap = problem.primal_and_gap(c)[1]
    for turn in range(TURNS):
        rows = (gap > tol * problem.half).nonzero().squeeze(-1)
        if not len(rows):
            break
        some = problem.of(rows)
        slow = _accelerated(some, c[rows], min(STEPS * 2**turn, MOST_STEPS))
        fast = _newton(some, slow)
        primal, gaps = some.primal_and_gap(slow)
        fast_primal, fast_gaps = some.primal_and_gap(fast)
        sane = (some.penalty.l1 * fast.abs()).sum(-1) <= some.half
        better = sane & ((fast_primal < primal) | (fast_gaps <= tol * some.half))
        c = c.index_copy(0, rows, torch.where(better[:, None], fast, slow))
        gap = gap.index_copy(0, rows, torch.where(better, fast_gaps, gaps))
    return c


def _accelerated(problem: _Set, c: Tensor, steps: int) -> Tensor:
    """Proximal gradient steps with momentum; a row that overshot starts afresh."""
    penalty = problem.penalty
    # the largest row sum bounds the largest eigenvalue
    step = 1 / (problem.G.abs().sum(-1).amax(-1, keepdim=True) + penalty.l2)
    state = _start(c)
    for _ in range(steps):
        ahead = state.ahead
        state = _advance(state, penalty.shrink(ahead + step * problem.pull(ahead), step))
    return state.c


class _State(NamedTuple):
    """Where accelerated steps are."""

    c: Tensor
    """`[n, w]`: codes."""
    ahead: Tensor
    """`[n, w]`: where the next step is taken from."""
    t: Tensor
    """`[n, 1]`: momentum."""


def _start(c: Tensor) -> _State:
    return _State(c, c, c.new_ones(len(c), 1))


def _advance(state: _State, new: Tensor) -> _State:
    """Look ahead from new codes; a row that overshot starts afresh."""
    overshot = ((state.ahead - new) * (new - state.c)).sum(-1, keepdim=True) > 0
    t = torch.where(overshot, 1.0, state.t)
    grown = (1 + (1 + 4 * t.square()).sqrt()) / 2
    return _State(new, new + (t - 1) / grown * (new - state.c), grown)


def _newton(problem: _Set, c: Tensor) -> Tensor:
    """Solve for the signs of c, look which signs that gives, and again, until they stay.

    Ends at once where the signs are right. Atoms that are alike make the system singular: a little is added
    to its diagonal.
    """
    penalty, signs = problem.penalty, c.sign()
    for _ in range(NEWTON_STEPS):
        inside = signs != 0
        pairs = inside[:, :, None] & inside[:, None, :]
        little = 4 * torch.finfo(c.dtype).eps
        system = torch.where(pairs, problem.G, 0) + torch.where(inside, penalty.l2 + little, 1).diag_embed()
        right = torch.where(inside, problem.q - penalty.l1 * signs, 0)[:, :, None]
        c = torch.cholesky_solve(right, torch.linalg.cholesky_ex(system).L).squeeze(-1)
        old, signs = signs, penalty.shrink(c + problem.pull(c), torch.ones_like(penalty.l1)).sign()
        if torch.equal(old, signs):
            break
    # a code of other signs than were solved for is no better than any guess, but still a code
    return c.relu() if penalty.non_negative else c


def _certificate(z: Tensor, residual: Tensor, c: Tensor, pull: Tensor, penalty: _Penalty) -> Tensor:
    """Duality gap from what was computed with the whole dictionary, plus what rounding may hide, `[n]`."""
    residual, c = residual.double(), c.double()
    square, along = residual.square().sum(-1), (z * residual).sum(-1)
    wide = _Penalty(penalty.l1.double(), penalty.l2.double(), penalty.non_negative)
    rounding = 4 * torch.finfo(z.dtype).eps * _half(z)
    return _primal_and_gap(square, along, c, pull, wide)[1].to(z.dtype) + rounding


def _primal_and_gap(
    square: Tensor, along: Tensor, c: Tensor, pull: Tensor, penalty: _Penalty
) -> tuple[Tensor, Tensor]:
    """Objective and duality gap from `||r||^2` and `z r` of the residual r, `[n]` each."""
    l1, l2 = penalty.l1.squeeze(-1), penalty.l2.squeeze(-1)
    steepest = penalty.strength(pull).amax(-1)
    scale = torch.where(steepest > l1, l1 / steepest.clamp_min(1e-30), 1.0)
    square = square + l2 * c.square().sum(-1)
    primal = 0.5 * square + l1 * c.abs().sum(-1)
    dual = scale * along - 0.5 * scale.square() * square
    return primal, (primal - dual).clamp_min(0)


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _inner(tol: float, dtype: torch.dtype) -> float:
    """The tolerance on a working set; below the rounding of what is computed there is nothing to gain."""
    return max(0.1 * tol, 4 * torch.finfo(dtype).eps)


def _half(z: Tensor) -> Tensor:
    """`1/2 ||z||^2`, `[n]`."""
    return 0.5 * z.square().sum(-1)
