"""Plots as SVG text: small, crisp, the same bytes for the same numbers. Writes nothing."""

import io
import warnings
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {
    "svg.hashsalt": "daco",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e6c8a", "#b8860b", "#555555")

POLARITY_COLOURS = {"undesirable": "#c8553d", "desirable": "#3a7d44", "neutral": "#b9bec4"}

NAME = 32
"""Characters of a name that are drawn: a longer one would leave no room for the plot."""

Curve = tuple[Sequence[float], Sequence[float]]


def curves(lines: Mapping[str, Curve], x_label: str, y_label: str) -> str:
    """Line plot of named (x, y) curves."""
    figure, axes = plt.subplots(figsize=(4.6, 2.8), layout="constrained")
    for i, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, label=name.replace("$", r"\$"), color=COLOURS[i % len(COLOURS)], linewidth=1.6)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def concept_map(
    points: Sequence[tuple[float, float]], polarity: Sequence[str], names: Mapping[int, str]
) -> str:
    """Scatter of concepts in two dimensions, coloured by polarity; `names` are written at their rows."""
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for label, colour in POLARITY_COLOURS.items():
        rows = [point for point, kind in zip(points, polarity, strict=True) if kind == label]
        if rows:
            axes.scatter(
                *zip(*rows, strict=True), s=14, color=colour, label=f"{label} ({len(rows)})", linewidths=0
            )
    for row, name in names.items():
        place = {"xytext": (3, 2), "textcoords": "offset points"}
        axes.annotate(_short(name), points[row], fontsize=7, parse_math=False, **place)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=8, loc="best")
    return _svg(figure)


def _short(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
