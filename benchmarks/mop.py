"""How fast does MOP find its codes, beside scikit-learn, at 15,000 x 3,584?

Draws dictionaries of unit rows (random; with a mean |cosine| of .3 by a part they share) and targets, finds
the penalty that leaves about 60 coefficients, and solves the elastic net of DESIGN 4.7 until the duality gap
is within `TOL` of `1/2 ||z||^2`. scikit-learn stops at the same gap. It is given its best: cyclic and random
selection, without and with a Gram matrix made beforehand, `fit_intercept=False`, `copy_X=False`, float32 in
Fortran order, inputs not checked (`check_input=False`, `assume_finite=True`). All are tried on a few tokens;
the one of least processor time meets DACO in turns, in an order that is drawn anew each round. `daco` has the
dictionary and its rows in bytes (a quarter of it, `daco.coarse`), as MOP has by default; `Gram kept` has the
Gram matrix too (`keep_gram`). Products of a batch with the dictionary are made at once; a token's share of
them is in everyone's time.

Prints a table and writes `results/mop.json`, a list of {work, who, value, unit, ratio, machine}: times are a
token's, by the clock and of the processor, which others at work on the machine disturb less. `ratio` is how
many times longer than DACO another takes, the median over rounds. DACO's own is the share of the limit
(gaps: of 1e-4); of its times, scikit-learn's ratio over the one that is asked for (15 at batch 64, 5 at
batch 1). PaCE's solvers were measured once, on random rows and 2 threads of a like machine.
"""

import argparse
import json
import os
import platform
import random
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
from sklearn.linear_model import ElasticNet, enet_path
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from benchmarks.retrieval import Took, took
from daco.coarse import Coarse, usable
from daco.sparse_coding import duality_gap, elastic_net

RESULTS = Path(__file__).parent / "results" / "mop.json"
TAU, TOL, LIMIT = 0.95, 5e-5, 1e-4
VARIANTS = ("daco", "daco, Gram kept")
AIMS = {64: 15.0, 1: 5.0}
"""By batch: how many times faster a token than scikit-learn is asked for."""
KINDS = {
    "random rows": (0.0, 0.0),
    "rows with mean |cos| .3": (0.3, 0.3),
    "rows with mean |cos| .3, targets without the shared part": (0.3, 0.0),
}
"""Share of the common part in rows, and in targets."""
SETTINGS = ("cyclic", "random", "Gram, cyclic", "Gram, random")
PACE = {
    "PaCE as released": 6.5,
    "spams elastic net": 2.0,
    "scikit-learn coordinate descent, then": 0.38,
    "OMP k=32": 0.30,
}
"""Seconds a token."""


class World(NamedTuple):
    """What is solved."""

    D: Tensor
    z: Tensor
    alpha: Tensor
    gram: Tensor
    coarse: Coarse | None
    D_there: Tensor
    """Where DACO works, as `gram_there`."""
    gram_there: Tensor


class Turn(NamedTuple):
    """Times a token in one round."""

    daco: dict[tuple[str, int], Took]
    """By variant and batch."""
    sklearn: dict[int, Took]
    """By batch."""


# Data.


def draw(n: int, d: int, share: float, common: Tensor, seed: int) -> Tensor:
    """Unit rows [n, d] of which the common part is a share."""
    own = normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return normalize(share**0.5 * common + (1 - share) ** 0.5 * own, dim=-1)


def products_of(z: Tensor, D: Tensor, fraction: float) -> Tensor:
    """alpha [n] that is a fraction of the one above which codes are zero."""
    return fraction * (z @ D.T).abs().amax(-1) / TAU


def fraction_for(z: Tensor, D: Tensor, gram: Tensor, wanted: float) -> float:
    """Penalty, as a fraction, that leaves the wanted number of coefficients on average: by halving."""
    low, high = 0.02, 1.0
    for _ in range(9):
        middle = (low + high) / 2
        code = elastic_net(z, D, products_of(z, D, middle), TAU, tol=TOL, gram=gram).code
        low, high = (middle, high) if float((code != 0).sum(-1).double().mean()) > wanted else (low, middle)
    return high


def worlds(arguments: argparse.Namespace) -> Iterator[tuple[str, World]]:
    """One after the other: a Gram matrix is 900 MB."""
    n, d = arguments.atoms, arguments.width
    common = normalize(torch.randn(d, generator=torch.Generator().manual_seed(9)), dim=-1)
    rows = gram = there = gram_there = torch.empty(0)
    coarse, last = None, -1.0
    for kind, (share, of_targets) in KINDS.items():
        if share != last:
            rows = draw(n, d, share, common, seed=1)
            there, last = rows.to(arguments.device), share
            gram_there = there @ there.T
            gram = gram_there.cpu()
            coarse = Coarse.of(rows) if arguments.device == "cpu" and usable(rows) else None
        z = 60 * draw(arguments.batch, d, of_targets, common, seed=2)
        fraction = fraction_for(z[:16].to(there), there, gram_there, arguments.coefficients)
        cosine = float(gram[:500, 500:1000].abs().mean())
        print(f"{kind}: mean |cos| {cosine:.3f}, alpha {fraction:.3f} of the largest", flush=True)
        yield kind, World(rows, z, products_of(z, rows, fraction), gram, coarse, there, gram_there)


# The two.


def daco(world: World, tokens: slice, with_gram: bool, device: str) -> Callable[[], Tensor]:
    """Codes of some tokens, the products with the dictionary included."""
    D, gram = world.D_there, world.gram_there if with_gram else None
    z, alpha = (part.to(device) for part in (world.z[tokens], world.alpha[tokens]))
    return lambda: elastic_net(z, D, alpha, TAU, tol=TOL, gram=gram, coarse=world.coarse).code


def of_sklearn(world: World, tokens: slice, setting: str, batch: int) -> Callable[[], np.ndarray]:
    """Codes of some tokens, one after the other."""
    X, d = world.D.numpy().T, world.D.shape[1]
    options: dict[str, Any] = {"l1_ratio": TAU, "tol": TOL / 2, "max_iter": 20_000, "random_state": 0}
    options |= {"selection": "random" if "random" in setting else "cyclic", "copy_X": False}
    options["precompute"] = world.gram.numpy() if "Gram" in setting else False
    alphas = (world.alpha[tokens] / d).tolist()
    targets, products = world.z[tokens].numpy(), (world.z[tokens] @ world.D.T).numpy()

    def alone() -> np.ndarray:
        nets = [ElasticNet(alpha=alpha, fit_intercept=False, **options) for alpha in alphas]
        return np.stack(
            [net.fit(X, z, check_input=False).coef_ for net, z in zip(nets, targets, strict=True)]
        )

    def given() -> np.ndarray:
        of = zip(targets, alphas, products, strict=True)
        return np.stack(
            [enet_path(X, z, alphas=[a], Xy=q, check_input=False, **options)[1][:, 0] for z, a, q in of]
        )

    return given if batch > 1 and "Gram" in setting else alone


def best_setting(world: World, tokens: slice, batch: int) -> tuple[str, dict[str, Took]]:
    """The setting of least processor time, and all of them a token."""
    found = {}
    for setting in tqdm(SETTINGS, "scikit-learn's settings", disable=None):
        of_sklearn(world, tokens, setting, batch)()
        found[setting] = sklearn_took(world, tokens, setting, batch)
    return min(found, key=lambda name: found[name].cpu), found


def sklearn_took(world: World, tokens: slice, setting: str, batch: int) -> Took:
    """Time a token, its share of a batch's products with the dictionary included where they are given."""
    one = per_token(took(of_sklearn(world, tokens, setting, batch), "cpu"), tokens)
    if batch == 1 or "Gram" not in setting:
        return one
    whole = slice(0, batch)
    made = per_token(took(lambda: world.z[whole] @ world.D.T, "cpu"), whole)
    return Took(one.wall + made.wall, one.cpu + made.cpu)


def per_token(one: Took, tokens: slice) -> Took:
    n = tokens.stop - tokens.start
    return Took(one.wall / n, one.cpu / n)


# Measuring.


def rounds_of(world: World, settings: dict[int, str], arguments: argparse.Namespace) -> list[Turn]:
    """All in turns; each round has tokens of its own for those who take them one by one."""
    turns, order = [], random.Random(0)
    variants = [(name, batch) for name in VARIANTS for batch in settings]
    for number in tqdm(range(arguments.rounds), "rounds", disable=None):
        some = slice(number * arguments.few, (number + 1) * arguments.few)
        turn = Turn({}, {})
        for who in order.sample([*variants, *settings], len(variants) + len(settings)):
            if isinstance(who, int):
                turn.sklearn[who] = sklearn_took(world, some, settings[who], who)
            else:
                turn.daco[who] = daco_took(world, who, some, arguments)
        turns.append(turn)
        print(f"round {number}: load {os.getloadavg()[0]:.1f} {turn}", flush=True)
    return turns


def daco_took(world: World, who: tuple[str, int], some: slice, arguments: argparse.Namespace) -> Took:
    """Time a token of a whole batch, or of some tokens each by itself."""
    name, batch = who
    whole = slice(0, batch)
    parts = [whole] if batch > 1 else [slice(i, i + 1) for i in range(some.start, some.stop)]
    calls = [daco(world, part, "Gram" in name, arguments.device) for part in parts]
    times = [took(call, arguments.device) for call in calls]
    n = batch if batch > 1 else len(parts)
    return Took(sum(one.wall for one in times) / n, sum(one.cpu for one in times) / n)


def relative_gap(world: World, tokens: slice, code: Tensor) -> float:
    """Largest duality gap over the objective, in float64."""
    z, D, alpha, c = (part.double() for part in (world.z[tokens], world.D, world.alpha[tokens], code.cpu()))
    square = (z - c @ D).square().sum(-1)
    penalty = alpha * (TAU * c.abs().sum(-1) + (1 - TAU) / 2 * c.square().sum(-1))
    return float((duality_gap(z, D, c, alpha, TAU) / (0.5 * square + penalty)).max())


# The table.


def row(work: str, who: str, value: float, unit: str, ratio: float) -> dict[str, Any]:
    return {"work": work, "who": who, "value": value, "unit": unit, "ratio": round(ratio, 3)}


def time_rows(kind: str, settings: dict[int, str], turns: list[Turn]) -> list[dict[str, Any]]:
    """DACO's times, and how many times longer scikit-learn's are."""
    rows = []
    for batch, setting in settings.items():
        for name in VARIANTS:
            for i, unit in enumerate(("ms a token", "processor ms a token")):
                own = [turn.daco[name, batch][i] for turn in turns]
                other = [turn.sklearn[batch][i] for turn in turns]
                ratio = statistics.median(o / d for o, d in zip(other, own, strict=True))
                work, who = f"{kind}, batch {batch}", f"scikit-learn ({setting}), beside {name}"
                rows.append(
                    row(work, name, round(1e3 * statistics.median(own), 2), unit, ratio / AIMS[batch])
                )
                rows.append(row(work, who, round(1e3 * statistics.median(other), 1), unit, ratio))
    return rows


def quality_rows(
    kind: str, world: World, setting: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Certificates and coefficients."""
    whole, few = slice(0, arguments.batch), slice(0, arguments.few)
    code = daco(world, whole, False, arguments.device)()
    theirs = torch.from_numpy(of_sklearn(world, few, setting, 1)())
    gap, other = relative_gap(world, whole, code), relative_gap(world, few, theirs)
    count = float((code != 0).sum(-1).double().mean())
    return [
        row(kind, "daco", gap, "largest relative gap", gap / LIMIT),
        row(kind, f"scikit-learn ({setting})", other, "largest relative gap", other / max(gap, 1e-12)),
        row(kind, "daco", count, "coefficients a token", count / arguments.coefficients),
    ]


def setting_rows(kind: str, batch: int, found: dict[str, Took], turns: list[Turn]) -> list[dict[str, Any]]:
    """All settings of scikit-learn that were tried, on a few tokens."""
    own = statistics.median(turn.daco["daco", batch].cpu for turn in turns)
    work, unit = f"{kind}, batch {batch}, tried", "processor ms a token"
    return [
        row(work, f"scikit-learn ({name})", round(1e3 * t.cpu, 1), unit, t.cpu / own)
        for name, t in found.items()
    ]


def pace_rows(turns: list[Turn]) -> list[dict[str, Any]]:
    own = statistics.median(turn.daco["daco", 1].wall for turn in turns)
    work = "random rows, batch 1, not measured here"
    return [row(work, who, 1e3 * seconds, "ms a token", seconds / own) for who, seconds in PACE.items()]


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows, batches = [], (arguments.batch, 1)
    for kind, world in worlds(arguments):
        tried = {batch: best_setting(world, slice(0, arguments.few), batch) for batch in batches}
        settings = {batch: best for batch, (best, _) in tried.items()}
        for name in VARIANTS:  # once before it counts, at each size
            for batch in batches:
                daco(world, slice(0, batch), "Gram" in name, arguments.device)()
        turns = rounds_of(world, settings, arguments)
        rows += quality_rows(kind, world, settings[1], arguments) + time_rows(kind, settings, turns)
        for batch in batches:
            rows += setting_rows(kind, batch, tried[batch][1], turns)
        rows += pace_rows(turns) if kind == "random rows" else []
    return rows


def machine(arguments: argparse.Namespace) -> str:
    """Hardware and versions, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    if arguments.device != "cpu":
        cpu = f"{torch.cuda.get_device_name()} + {cpu}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    threads = f"{arguments.threads} of {os.cpu_count()} threads"
    return f"{cpu}, {threads}; {versions}, scikit-learn {sklearn.__version__}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atoms", type=int, default=15_000)
    parser.add_argument("--width", type=int, default=3_584)
    parser.add_argument("--batch", type=int, default=64, choices=[64])
    parser.add_argument("--coefficients", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--few", type=int, default=2, help="tokens a round that are solved one by one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where DACO works")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with (
        threadpool_limits(arguments.threads),
        sklearn.config_context(assume_finite=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of convergence: the gap that was reached is in the table
        table = [one | {"machine": machine(arguments)} for one in measure(arguments)]
    for one in table:
        print(f"{one['work']:<78} {one['who']:<62} {one['value']:>10.4g} {one['unit']:<26} x {one['ratio']}")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
