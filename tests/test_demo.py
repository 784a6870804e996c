"""The demo's whole way, small: drawn pictures, real emoji and real photographs go out and come back equal."""

import os
from pathlib import Path

import pytest

from hub.demo import demo

RECIPES = Path(__file__).parent.parent / "recipes"

SMALL = [
    "run.threads=1",
    "clip.steps=20",
    "clip.learning_rate=1e-3",
    "clip.batch=16",
    "clip.checkpoint_steps=10",
    "concepts.max_concepts=20",
    "stimuli.n_positive=4",
    "stimuli.min_positive=1",
    "sae.steps=20",
    "evaluate.items=8",
]


def real(*parts: str) -> str:
    """A path of the real data, whose folder the environment names."""
    root = os.environ.get("DACO_TEST_DATA")
    if not root:
        pytest.skip("DACO_TEST_DATA names no folder of real data")
    return str(Path(root, *parts))


LABELS = {"undesirable": ("big", "weather", "man"), "desirable": ("small", "plant", "street")}
"""Frequent words of the three corpora, so that a small dictionary has both kinds."""


def run(recipe: str, out: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    rows = [f"{word}\t{label}\n" for label, words in LABELS.items() for word in words]
    labels = out.with_name("labels.tsv")
    labels.write_text("concept\tpolarity\n" + "".join(rows), "utf-8")
    demo(out, RECIPES / recipe, [*SMALL, f"polarity.path={labels}", *overrides])
    assert (out / "report.html").read_text("utf-8").count("<figure>") > 3
    return capsys.readouterr().out


def assert_came_back(printed: str, configs: int) -> None:
    assert printed.count("streaming equal row by row: True") == configs
    assert "streaming equal row by row: False" not in printed
    assert "exactly as before afterwards: True" in printed
    moved = float(printed.split("moved by up to ")[1].split()[0])
    assert moved > 0


def test_drawn_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_came_back(run("demo.toml", tmp_path / "run", capsys, "corpus.rows=80"), configs=5)


def test_emoji(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"corpus.path={real('emoji', 'index.tsv')}", f"corpus.images={real('emoji', 'images')}"]
    assert_came_back(run("emoji.toml", tmp_path / "run", capsys, *places, "corpus.rows=120"), configs=5)


def test_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = real("photos", "annotations", "captions_train2017.json")
    places = [f"corpus.path={captions}", f"corpus.images={real('photos', 'train2017')}"]
    printed = run("coco.toml", tmp_path / "run", capsys, *places, "concepts.min_count=2")
    assert_came_back(printed, configs=5)
