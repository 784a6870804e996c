"""How the SAEs of a run learn, as a picture: also while they are still learning.

Reads `sae/layers.<L>/training.parquet` and, of layers that are not finished, the last checkpoint's; returns
SVG, or writes it: `python -m cards.training RUN PICTURE.svg`.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from builders.tokens import MODALITIES
from cards.plots import COLOURS, _svg
from daco.errors import ArtefactNotFoundError, DacoError
from daco.manifest import write_atomic

PANELS = {
    "fve": "variance explained",
    **{f"fve_{name}": f"variance explained, {name} tokens" for name in MODALITIES},
    "l0": "active atoms a token",
    "dead": "dead atoms",
    "dense": "dense atoms",
    "drift_cos": "cosine to the concept it started as",
    "own": "atoms that still are their concept",
}
"""Columns of `training.parquet` that are drawn, where they hold anything."""
LOWEST = -0.1
"""Variance explained is drawn from here on: a start far below zero would hide all that follows."""
COLUMNS = 3


def tables(out: Path) -> dict[str, pd.DataFrame]:
    """Measurements of each layer of a run, finished or not, in the order of layers.

    Raises:
        ArtefactNotFoundError: there are none yet.
    """
    sae = out / "sae"
    found = {path.parent.name.removeprefix("layers."): path for path in sae.glob("layers.*/training.parquet")}
    for path in sorted(sae.glob("shards/layer-*-step-*/training.parquet")):
        found.setdefault(path.parent.name.split("-")[1], path)
    if not found:
        raise ArtefactNotFoundError(
            f"{out}: expected measurements in sae/, got none; they come with the first checkpoint"
        )
    return {f"layer {layer}": pd.read_parquet(found[layer]) for layer in sorted(found, key=int)}


def training_svg(measured: Mapping[str, pd.DataFrame]) -> str:
    """Every kind of measurement in a panel of its own, every layer a line.

    Args:
        measured: By name, rows of `training.parquet`.
    """
    shown = [name for name in PANELS if any(table[name].notna().any() for table in measured.values())]
    rows = -(-len(shown) // COLUMNS)
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(8.4, 2 * rows + 0.4), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid.flat, shown, strict=False):
        _panel(axes, name, measured)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, len(shown) - COLUMNS) : len(shown)]:
        axes.set_xlabel("training step", fontsize=7)
    if len(measured) > 1:
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=6)
    return _svg(figure)


def _panel(axes: Axes, name: str, measured: Mapping[str, pd.DataFrame]) -> None:
    for number, (label, table) in enumerate(measured.items()):
        values = table[name].astype(float)
        axes.plot(table["step"], values, label=label, color=COLOURS[number % len(COLOURS)], linewidth=1.4)
    axes.set_title(PANELS[name], fontsize=8)
    axes.tick_params(labelsize=7)
    if name.startswith("fve"):
        least = min(float(np.nanmin(table[name].astype(float), initial=1.0)) for table in measured.values())
        axes.set_ylim(max(LOWEST, least - 0.02), 1.02)
    elif name in ("l0", "dead", "dense"):
        axes.set_ylim(bottom=0)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(prog="python -m cards.training", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("picture", type=Path, help="SVG file")
    arguments = parser.parse_args()
    try:
        write_atomic(arguments.picture, training_svg(tables(arguments.run)).encode())
    except DacoError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
