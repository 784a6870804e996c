"""Plots as SVG text, or PNG where a card shows them: the same bytes for the same numbers. Writes nothing."""

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np

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
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator  # noqa: E402

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e6c8a", "#b8860b", "#555555", "#2a9d8f", "#d16ba5")

POLARITY_COLOURS = {"undesirable": "#c8553d", "desirable": "#3a7d44", "neutral": "#b9bec4"}

NAME = 32
"""Characters of a name that are drawn: a longer one would leave no room for the plot."""

OVER_REFUSING = 0.1
"""A setting that refuses more of the harmless requests than this is drawn hollow."""

LEAST_MISSED = 1e-4
"""Where a logarithmic axis of shares ends, at the latest."""

CORNER = (0.2, 0.9)
"""Most harm obeyed and fewest questions answered right of the corner that is worth a closer look."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
"""Shapes of points, beside their colours."""

LEGIBLE = {"font.size": 11, "legend.fontsize": 10}
"""For plots that a telephone shows at two thirds of their size."""

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


class Traded(NamedTuple):
    """A method, as it did on the suites of an evaluation."""

    name: str
    """As the legend shows it."""
    unsafe: float
    """Share of answers to harmful requests that are harmful."""
    right: float | None
    """Share of questions answered right."""
    refused: float | None
    """Share of harmless requests refused."""


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
    with plt.rc_context(LEGIBLE):
        figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
    for i, (name, (steps, rows)) in enumerate(lines.items()):
        missed = [[max(1 - value, LEAST_MISSED) for value in column] for column in zip(*rows, strict=True)]
        colour = COLOURS[i % len(COLOURS)]
        mean = [sum(column) / len(column) for column in missed]
        axes.plot(steps, mean, label=_legend(name), color=colour, linewidth=1.8, linestyle=("-", "--")[i % 2])
        axes.fill_between(steps, *map(list, zip(*((min(c), max(c)) for c in missed), strict=True)),
                          color=colour, alpha=0.2, linewidth=0)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training step")
    axes.set_ylabel("not explained (lower is better)")
    axes.legend(frameon=False)
    return _svg(figure)


def front(
    settings: Mapping[str, Sequence[Setting]],
    labels: Mapping[str, str],
    zoom: tuple[float, float] | None = None,
) -> str:
    """Scatter of what every setting of every method costs and brings; the chosen one of each is ringed.

    Args:
        settings: By method.
        labels: The methods' names for people.
        zoom: Show only the corner where at most this share of harm is obeyed and at least that share of
            questions answered right; None: everything, with the corner's outline where `CORNER` has points.
    """
    with plt.rc_context(LEGIBLE):
        figure, axes = plt.subplots(figsize=(4.8, 4.6), layout="constrained")
    rings: dict[tuple[float, float], int] = {}  # a ring around a ring where choices coincide
    for i, (method, points) in enumerate(settings.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        for hollow in (False, True):
            of_kind = [p for p in points if (p.over_refusal > OVER_REFUSING) == hollow]
            axes.scatter(
                *_columns(of_kind), s=34, marker=marker, facecolors="none" if hollow else colour,
                edgecolors=colour, linewidths=1, alpha=0.75, clip_on=zoom is not None,
            )  # fmt: skip
        for p in (p for p in points if p.chosen):
            n = rings[p.unsafe, p.utility] = rings.get((p.unsafe, p.utility), 0) + 1
            axes.scatter([p.unsafe], [p.utility], s=130 * n**1.5, facecolors="none", edgecolors=colour,
                         linewidths=1.8, zorder=4, clip_on=False)  # fmt: skip
        axes.scatter([], [], s=34, marker=marker, color=colour, label=_legend(labels[method]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    _corner(axes, zoom)
    axes.set_xlabel("harmful requests obeyed (left is better)")
    axes.set_ylabel("questions answered right (up is better)")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return _svg(figure)


def _corner(axes: Any, zoom: tuple[float, float] | None) -> None:
    """Show the good corner alone, or outline it."""
    unsafe, utility = zoom or CORNER
    margin = unsafe / 20, (1 - utility) / 20
    if zoom:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlim(-margin[0], unsafe + margin[0])
        axes.set_ylim(utility, 1 + margin[1])
    else:
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(None, 1.02)
        outline = (-margin[0], utility), unsafe + margin[0], 1 + margin[1] - utility
        axes.add_patch(Rectangle(*outline, fill=False, edgecolor="#888888", linewidth=0.9, linestyle=":"))


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


def trade_off(points: Sequence[Traded]) -> bytes:
    """What methods leave of harmful answers, beside what they keep of utility, as a PNG that a card shows.

    A panel for questions answered right and one for harmless requests refused, where there are figures.

    Args:
        points: The methods.
    """
    panels = [
        (title, [(p, y) for p in points if (y := getattr(p, field)) is not None])
        for field, title in (("right", "questions answered right"), ("refused", "harmless requests refused"))
    ]
    panels = [(title, found) for title, found in panels if found]
    figure, grid = plt.subplots(
        1, len(panels), figsize=(3.7 * len(panels) + 0.6, 3.5), layout="constrained", squeeze=False
    )
    names = [p.name for p in points]
    for axes, (title, found) in zip(grid[0], panels, strict=True):
        for p, y in found:
            colour = COLOURS[names.index(p.name) % len(COLOURS)]
            axes.scatter([p.unsafe], [y], s=55, color=colour, label=_legend(p.name), clip_on=False, zorder=3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("harmful answers (left is better)")
        axes.set_ylabel(f"{title} ({'up' if 'right' in title else 'down'} is better)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return _png(figure)


def _columns(points: Iterable[Setting]) -> tuple[list[float], list[float]]:
    found = list(points)
    return [p.unsafe for p in found], [p.utility for p in found]


class Example(NamedTuple):
    """An example stimulus of a concept."""

    picture: Any
    """Its pixels, `[height, width, 3]`, uint8."""
    concept: str
    """What it was found for."""
    polarity: str
    """The concept's."""
    caption: str
    """Its caption, short."""


def examples(shown: Sequence[Example], columns: int = 4) -> bytes:
    """Example stimuli with concept and caption, as a PNG that a card shows."""
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2 * columns, 2.7 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, one in zip(grid.flat, shown, strict=False):
        axes.imshow(one.picture)
        colour = POLARITY_COLOURS[one.polarity] if one.polarity != "neutral" else "#555555"
        axes.set_title(_short(one.concept), fontsize=9, color=colour, parse_math=False)
        wrapped = "\n".join(textwrap.wrap(one.caption, 30))
        axes.set_xlabel(wrapped, fontsize=7, parse_math=False)
    with _any_glyph():
        return _png(figure)


def concept_map(
    points: Sequence[tuple[float, float]], polarity: Sequence[str], names: Mapping[int, str]
) -> str:
    """Scatter of concepts in two dimensions, coloured by polarity, as SVG.

    `names` are written at their rows, in their order, where they cover no name before them.
    """
    return _svg(_concept_map(points, polarity, names))


def concept_map_png(
    points: Sequence[tuple[float, float]], polarity: Sequence[str], names: Mapping[int, str]
) -> bytes:
    """As `concept_map`, as a PNG that a card shows."""
    with _any_glyph():
        return _png(_concept_map(points, polarity, names))


def _concept_map(
    points: Sequence[tuple[float, float]], polarity: Sequence[str], names: Mapping[int, str]
) -> Figure:
    figure, axes = plt.subplots(figsize=(5.8, 6.2), layout="constrained")
    size = 14 if len(points) < 2_000 else 4
    for label, colour in sorted(POLARITY_COLOURS.items(), key=lambda item: item[0] != "neutral"):
        rows = [point for point, kind in zip(points, polarity, strict=True) if kind == label]
        if rows:
            axes.scatter(
                *zip(*rows, strict=True), s=size, color=colour, label=f"{label} ({len(rows)})", linewidths=0
            )
    axes.set(xticks=[], yticks=[], xlabel="first principal axis", ylabel="second")
    axes.spines[:].set_color("#dfe3e7")
    axes.margins(0.12)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    with _any_glyph():
        figure.draw_without_rendering()  # settles where points are in pixels
        _write_names(axes, figure, points, names)
    return figure


def _write_names(
    axes: Any, figure: Figure, points: Sequence[tuple[float, float]], names: Mapping[int, str]
) -> None:
    """Each name at its point, where there is room; a line leads to those that had to move away."""
    dots = axes.transData.transform(np.array(points, dtype=float).reshape(-1, 2))
    scale = figure.dpi / 72
    reach = 2.5 * scale
    frame, kept = axes.bbox, np.empty((0, 4))
    for row, name in names.items():
        text = axes.annotate(_short(name), points[row], (0, 0), textcoords="offset points",
                             fontsize=9, parse_math=False)  # fmt: skip
        box = text.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        size = 1.05 * box.width + 2 * reach, box.height  # an SVG's letters are a little wider
        for away in (4, 9, 16, 24, 34, 46):
            place = _free(dots[row], size, away * scale, frame, dots, kept, reach)
            if place is not None:
                break
        else:
            text.remove()
            continue
        kept = np.vstack([kept, place])
        shift = np.array(place[:2]) - (box.x0, box.y0)
        text.set_position(tuple(shift / scale))
        if away > 9:
            centre = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
            ends = axes.transData.inverted().transform([dots[row], centre])
            axes.plot(*ends.T, color="#c9ced3", linewidth=0.6, zorder=0.5)


def _free(
    dot: Any, size: tuple[float, float], away: float, frame: Any, dots: Any, kept: Any, reach: float
) -> tuple[float, float, float, float] | None:
    """The first place of a box around a dot that covers no dot and no box before it, in pixels."""
    for step in range(16):
        x, y = math.cos(step * math.pi / 8), math.sin(step * math.pi / 8)
        left = dot[0] + away * x - size[0] * (1 - x) / 2
        low = dot[1] + away * y - size[1] * (1 - y) / 2
        right, top = left + size[0], low + size[1]
        inside = frame.x0 <= left and right <= frame.x1 and frame.y0 <= low and top <= frame.y1
        near = (dots > (left - reach, low - reach)) & (dots < (right + reach, top + reach))
        apart = (kept[:, 0] > right) | (kept[:, 2] < left) | (kept[:, 1] > top) | (kept[:, 3] < low)
        if inside and not near.all(1).any() and apart.all():
            return left, low, right, top
    return None


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
