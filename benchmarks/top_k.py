"""How fast are some columns of a TopK, as exact steering needs them, beside torch? On a GPU with Triton.

    python -m benchmarks.top_k

500 columns of the 64 largest, for SAEs of several widths; both are recorded as CUDA graphs, so that only what
the GPU does counts. Writes `results/top_k.json`, a list of {work, who, value, unit, ratio}: `ratio` is how
many times longer than DACO's kernel `who` takes.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sae_training import machine
from daco.top_k import kernels_for, top_k, top_k_at

RESULTS = Path(__file__).parent / "results" / "top_k.json"
K, CHOSEN, CALLS = 64, 500, 20


def microseconds(work: Callable[[], Tensor]) -> float:
    """Of the GPU, a call."""
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1_000 * start.elapsed_time(end) / CALLS


def rows(n: int, m: int) -> list[dict[str, Any]]:
    """The table of n tokens and m atoms."""
    pre = torch.randn(n, m, device="cuda")
    at = torch.arange(0, m, m // CHOSEN, device="cuda")[:CHOSEN]
    spent = {
        "DACO": microseconds(lambda: top_k_at(pre, K, at)),
        "torch": microseconds(lambda: top_k(pre, K).index_select(-1, at)),
    }
    work = {"work": f"{CHOSEN} of {m:,} columns, TopK of {K}, {n:,} tokens", "unit": "us"}
    return [
        work | {"who": who, "value": round(value, 1), "ratio": round(value / spent["DACO"], 2)}
        for who, value in spent.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if kernels_for(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")) is None:
        parser.error("expected a GPU with Triton, got none that works; run it on a machine with one")
    table = [row for m in (15_000, 32_768, 65_536) for n in (1, 16, 1_024) for row in rows(n, m)]
    for row in table:
        row["machine"] = machine(torch.get_num_threads())
        print(f"{row['work']:<56} {row['who']:<6} {row['value']:>9,} {row['unit']}  x {row['ratio']}")
    given.results.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
