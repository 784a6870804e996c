"""Plots as SVG text, or PNG where a card shows them: the same bytes for the same numbers. Writes nothing."""

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator  # noqa: E402

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e6c8a", "#b8860b", "#555555", "#2a9d8f", "#d16ba5")

POLARITY_COLOURS = {"undesirable": "#c8553d", "desirable": "#3a7d44", "neutral": "#b9bec4"}

NAME = 32
"""Characters of a name that are drawn: a longer one would leave no room for the plot."""

OVER_REFUSING = 0.1
"""A setting that refuses more of the harmless requests than this is drawn hollow."""

LEAST_MISSED = 1e-4
"""Where a logarithmic axis of shares ends, at the latest."""

Curve = tuple[Sequence[float], Sequence[float]]

Runs = tuple[Sequence[float], Sequence[Sequence[float]]]
"""Steps, and a row of values for every seed."""


class Tried(NamedTuple):
    """One setting that was tried when a release's defaults were chosen."""

    unsafe: float
    """Share of harmful requests obeyed."""
    loss: float
    """Largest share lost of what the choice watches beside safety."""
    front: bool
    """Whether no other setting is as good in both, and better in one."""
    chosen: bool
    """Whether the release steers so."""


class Setting(NamedTuple):
    """One setting of a method, as it did on the validation items."""

    unsafe: float
    """Share of harmful requests obeyed."""
    utility: float
    """Share of questions answered right."""
    over_refusal: float
    """Share of harmless requests refused."""
    chosen: bool
    """Whether the method is tested with it."""


def curves(lines: Mapping[str, Curve], x_label: str, y_label: str) -> str:
    """Line plot of named (x, y) curves."""
    figure, axes = plt.subplots(figsize=(4.6, 2.8), layout="constrained")
    for i, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, label=_legend(name), color=COLOURS[i % len(COLOURS)], linewidth=1.6)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def unexplained(lines: Mapping[str, Runs]) -> str:
    """What autoencoders miss while they train: the mean over seeds, and a band from the least to the most."""
    figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    for i, (name, (steps, rows)) in enumerate(lines.items()):
        missed = [[max(1 - value, LEAST_MISSED) for value in column] for column in zip(*rows, strict=True)]
        colour = COLOURS[i % len(COLOURS)]
        mean = [sum(column) / len(column) for column in missed]
        axes.plot(steps, mean, label=_legend(name), color=colour, linewidth=1.6)
        axes.fill_between(steps, *map(list, zip(*((min(c), max(c)) for c in missed), strict=True)),
                          color=colour, alpha=0.2, linewidth=0)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training step")
    axes.set_ylabel("variance not explained (lower is better)")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def front(settings: Mapping[str, Sequence[Setting]], labels: Mapping[str, str]) -> str:
    """Scatter of what every setting of every method costs and brings; the chosen one of each is ringed.

    Args:
        settings: By method.
        labels: The methods' names for people.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for i, (method, points) in enumerate(settings.items()):
        colour = COLOURS[i % len(COLOURS)]
        for hollow in (False, True):
            of_kind = [p for p in points if (p.over_refusal > OVER_REFUSING) == hollow]
            face = "none" if hollow else colour
            axes.scatter(
                *_columns(of_kind), s=20, facecolors=face, edgecolors=colour, linewidths=0.9, alpha=0.75
            )
        chosen = [p for p in points if p.chosen]
        axes.scatter(*_columns(chosen), s=130, facecolors="none", edgecolors=colour, linewidths=1.8, zorder=4)
        axes.scatter([], [], s=20, color=colour, label=_legend(labels[method]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.set_xlabel("harmful requests obeyed (left is better)")
    axes.set_ylabel("questions answered right (up is better)")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return _svg(figure)


def choice(tried: Sequence[Tried], plain: float, allowed: float, spread: tuple[float, float] | None) -> bytes:
    """What every setting leaves of unsafe answers and what it costs, as a PNG that a card shows.

    Args:
        tried: Settings.
        plain: Share of harmful requests obeyed without steering.
        allowed: Largest loss a chosen setting may have.
        spread: 95 % interval of the chosen setting's unsafe share, if one was chosen.
    """
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    within = f"cost at most {100 * allowed:g} %"
    axes.axhspan(0, allowed, color=COLOURS[2], alpha=0.10, linewidth=0, label=within)
    axes.scatter([p.unsafe for p in tried], [p.loss for p in tried], s=22, color="#999999", label="tried",
                 clip_on=False, zorder=3)  # fmt: skip
    front = sorted({(p.unsafe, p.loss) for p in tried if p.front} | {(plain, 0.0)})
    style: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 1.3}
    axes.plot(*zip(*front, strict=True), color=COLOURS[0], label="front", **style)
    above: dict[str, Any] = {"clip_on": False, "zorder": 5}  # points on an axis are drawn whole
    axes.scatter([plain], [0], s=60, marker="s", color=COLOURS[0], label="no steering", **above)
    for p in (p for p in tried if p.chosen):
        axes.scatter([p.unsafe], [p.loss], s=80, color=COLOURS[1], label="chosen", **above)
        axes.plot(spread or (p.unsafe, p.unsafe), (p.loss, p.loss), color=COLOURS[1], linewidth=2, **above)
    axes.set_yscale("symlog", linthresh=max(allowed, 0.01), linscale=2)  # what matters is near zero
    axes.set_yticks([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, max(2 * allowed, 1.1 * max((p.loss for p in tried), default=0.0), 0.05))
    axes.set_xlabel("harmful requests obeyed (left is better)")
    axes.set_ylabel("largest cost to the rest (down is better)")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=5)
    return _png(figure)


def _columns(points: Iterable[Setting]) -> tuple[list[float], list[float]]:
    found = list(points)
    return [p.unsafe for p in found], [p.utility for p in found]


def concept_map(
    points: Sequence[tuple[float, float]], polarity: Sequence[str], names: Mapping[int, str]
) -> str:
    """Scatter of concepts in two dimensions, coloured by polarity.

    `names` are written at their rows, in their order, where they cover no name before them.
    """
    figure, axes = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    for label, colour in POLARITY_COLOURS.items():
        rows = [point for point, kind in zip(points, polarity, strict=True) if kind == label]
        if rows:
            axes.scatter(
                *zip(*rows, strict=True), s=14, color=colour, label=f"{label} ({len(rows)})", linewidths=0
            )
    axes.set_axis_off()
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    texts = [_name(axes, points[row], name) for row, name in names.items()]
    with _any_glyph():
        figure.draw_without_rendering()
    _drop_covered(texts, figure)
    return _svg(figure)


def _name(axes: Any, point: tuple[float, float], name: str) -> Any:
    place = {"xytext": (3, 2), "textcoords": "offset points"}
    return axes.annotate(_short(name), point, fontsize=7, parse_math=False, **place)


def _drop_covered(texts: Sequence[Any], figure: Figure) -> None:
    """Remove each text that would cover one before it."""
    kept: list[Any] = []
    for text in texts:
        box = text.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        if any(box.overlaps(other) for other in kept):
            text.remove()
        else:
            kept.append(box)


def _short(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def _legend(name: str) -> str:
    """A name as a legend shows it: no maths, and no leading underscore, which would hide it."""
    return "\u200b" * name.startswith("_") + _short(name).replace("$", r"\$")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with _any_glyph():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


@contextmanager
def _any_glyph() -> Iterator[None]:
    """No warning inside the block of glyphs that the font lacks: they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield
