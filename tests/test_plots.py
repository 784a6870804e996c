"""Proves that plots have the same bytes for the same numbers, take any name, and write none over another."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hostile import TEXTS
from test_hostile import TAGS, Page

from cards import plots
from cards.plots import Setting, Tried

RUNS = {"dictionary start": ([0, 50, 100], [[-1.5, 0.7, 0.99], [-1.2, 0.8, 1.0]]),
        "random start": ([0, 50, 100], [[0.1, 0.5, 0.98], [0.2, 0.4, 0.97]])}  # fmt: skip
SETTINGS = {"daco": [Setting(0.1, 0.9, 0.0, True), Setting(0.0, 0.5, 0.4, False)]}
TRIED = [Tried(0.0, 0.02, True, True), Tried(0.4, 0.0, True, False), Tried(0.9, 0.3, False, False)]
POINTS = [(0.0, 0.0), (0.0, 0.001), (1.0, 1.0), (-1.0, 0.5)]
POLARITIES = ["undesirable", "desirable", "neutral", "neutral"]


def names_drawn(svg: str, polarity: Sequence[str] = POLARITIES) -> int:
    """How many texts the map has beside its legend and its axes: matplotlib numbers the groups of glyphs."""
    return len(re.findall(r'id="text_\d+"', svg)) - len(set(polarity)) - 2


def test_the_same_numbers_make_the_same_bytes() -> None:
    assert plots.unexplained(RUNS) == plots.unexplained(RUNS)
    assert plots.front(SETTINGS, {"daco": "DACO"}) == plots.front(SETTINGS, {"daco": "DACO"})
    names = dict(enumerate(["knife", "gun", "cup", "ball"]))
    assert plots.concept_map(POINTS, POLARITIES, names) == plots.concept_map(POINTS, POLARITIES, names)


def test_other_numbers_make_another_plot() -> None:
    steps, rows = RUNS["random start"]
    assert plots.unexplained(RUNS) != plots.unexplained(RUNS | {"random start": (steps, [rows[0], rows[0]])})
    chosen_other = [point._replace(chosen=not point.chosen) for point in SETTINGS["daco"]]
    assert plots.front(SETTINGS, {"daco": "DACO"}) != plots.front({"daco": chosen_other}, {"daco": "DACO"})
    hollow = [point._replace(over_refusal=1.0) for point in SETTINGS["daco"]]
    assert plots.front(SETTINGS, {"daco": "DACO"}) != plots.front({"daco": hollow}, {"daco": "DACO"})


def test_the_corner_is_drawn_closer_and_equal_choices_stay_apart() -> None:
    labels = {"daco": "DACO", "mop": "MOP"}
    same = {"daco": SETTINGS["daco"], "mop": [SETTINGS["daco"][0]]}
    whole, corner = plots.front(same, labels), plots.front(same, labels, zoom=plots.CORNER)
    assert whole != corner
    rings = re.findall(
        r"stroke-width: 1.8; fill: none|fill: none; stroke: #[0-9a-f]+; stroke-width: 1.8", corner
    )
    assert len(rings) == 2
    radii = {path.split()[1] for path in re.findall(r'<path id="[^"]+" d="(M [^"]+)"', corner)}
    assert len(radii) >= 3  # a point, a ring, a ring around it


def test_the_picture_of_a_choice_shows_what_was_chosen() -> None:
    """Bytes alone can be compared: what is drawn was looked at."""
    picture = plots.choice(TRIED, 1.0, 0.02, (0.0, 0.1))
    assert picture == plots.choice(TRIED, 1.0, 0.02, (0.0, 0.1))
    assert picture.startswith(b"\x89PNG")
    assert b"atplotlib" not in picture  # no versions in it
    none = [point._replace(chosen=False) for point in TRIED]
    others = [
        plots.choice(none, 1.0, 0.02, None),
        plots.choice(TRIED, 1.0, 0.05, (0.0, 0.1)),
        plots.choice(TRIED, 0.8, 0.02, (0.0, 0.1)),
        plots.choice(TRIED, 1.0, 0.02, (0.0, 0.3)),
    ]
    assert len({picture, *others}) == 5


def test_no_name_covers_another() -> None:
    assert names_drawn(plots.concept_map(POINTS, POLARITIES, {0: "knife", 2: "cup"})) == 2
    crowd = [(0.0, 0.0)] * 300 + [(1.0, 1.0)]
    names = {i: f"a long name of a concept {i}" for i in range(301)}
    drawn = names_drawn(plots.concept_map(crowd, ["neutral"] * 301, names), ["neutral"])
    assert 2 < drawn < 200


def test_names_keep_clear_of_points_and_of_one_another() -> None:
    rng = np.random.default_rng(0)
    points = [tuple(point) for point in rng.normal(size=(60, 2)) / 3]
    figure = plots._concept_map(points, ["neutral"] * 60, {i: f"name {i}" for i in range(60)})
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    plots.plt.close(figure)
    assert len(boxes) > 20
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    dots = axes.transData.transform(np.array(points))
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


@pytest.mark.parametrize("text", [*TEXTS, "_hidden", "$x", "50 % $"])
def test_any_name_is_drawn(text: str) -> None:
    for svg in (
        plots.unexplained({text: RUNS["random start"], "b": RUNS["random start"]}),
        plots.front({"a": SETTINGS["daco"], "b": SETTINGS["daco"]}, {"a": text, "b": "b"}),
        plots.concept_map(POINTS, POLARITIES, {0: text}),
    ):
        assert svg.startswith("<svg")
        page = Page(svg)
        assert page.tags <= TAGS
        assert page.handlers == []
