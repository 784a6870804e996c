"""The demo's whole way, small: drawn pictures, real emoji and real photographs go out and come back equal."""

import json
import os
import re
from pathlib import Path

import pytest

from hub.demo import demo, first_code

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

DRAWN = """
[run]
name = "drawn"
[corpus]
kind = "toyworld"
rows = 80
licence = "cc0-1.0"
redistribute_images = true
[clip]
hidden = 32
n_layers = 1
vocabulary = 640
[model]
tiny = "llava"
[activations]
layers = [1, 2]
[sae]
k = 8
[release]
dataset = "drawn-concepts"
"""
"""Drawn pictures without the world's own model: nothing can be compared."""


def real(*parts: str) -> str:
    """A path of the real data, whose folder the environment names."""
    root = os.environ.get("DACO_TEST_DATA")
    if not root:
        pytest.skip("DACO_TEST_DATA names no folder of real data")
    return str(Path(root, *parts))


LABELS = {"undesirable": ("big", "weather", "man"), "desirable": ("small", "plant", "street")}
"""Frequent words of the three corpora, so that a small dictionary has both kinds."""


def run(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    rows = [f"{word}\t{label}\n" for label, words in LABELS.items() for word in words]
    labels = out.with_name("labels.tsv")
    labels.write_text("concept\tpolarity\n" + "".join(rows), "utf-8")
    demo(out, recipe, [*SMALL, f"polarity.path={labels}", *overrides])
    page = (out / "report.html").read_text("utf-8")
    assert page.count("<figure>") > 3
    assert "trick words" not in page
    return capsys.readouterr().out


def assert_came_back(printed: str, splits: int) -> None:
    assert printed.count("streaming equal row by row: True") == splits
    assert "streaming equal row by row: False" not in printed
    assert "exactly as before afterwards: True" in printed
    assert re.search(r"^of a picture of .+ layer \d shows: ('.+'|nothing)$", printed, re.MULTILINE)
    moved = float(printed.split("moved by up to ")[1].split()[0])
    assert moved > 0


def test_drawn_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "drawn.toml").write_text(DRAWN)
    assert_came_back(run(tmp_path / "drawn.toml", tmp_path / "run", capsys), splits=10)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert (summary["methods"], summary["sae_fve"]) == ({}, {})
    assert [repo["repo_type"] for repo in summary["repos"]] == ["dataset", "model"]


def test_emoji(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"corpus.path={real('emoji', 'index.tsv')}", f"corpus.images={real('emoji', 'images')}"]
    recipe = RECIPES / "emoji.toml"
    assert_came_back(run(recipe, tmp_path / "run", capsys, *places, "corpus.rows=120"), splits=10)


def test_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = real("photos", "annotations", "captions_train2017.json")
    places = [f"corpus.path={captions}", f"corpus.images={real('photos', 'train2017')}"]
    printed = run(RECIPES / "coco.toml", tmp_path / "run", capsys, *places, "concepts.min_count=2")
    assert_came_back(printed, splits=10)


def test_the_quick_start_is_the_first_code_of_a_card() -> None:
    card = "# x\n\n```bash\nls\n```\n\n```python\na = 1\n\nb = 2\n```\n\n```python\nc\n```\n"
    assert first_code(card) == "a = 1\n\nb = 2\n"
