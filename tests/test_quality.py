"""Figures of concepts are those of their definitions; the page shows them, and texts as text."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hostile import TEXTS
from pictures import make_folder, tiny_recipe
from small_run import opened

from builders import clip, corpus, embeddings, stimuli, vocabulary
from builders.embeddings import METADATA, unit_half, write_embeddings
from builders.quality import concept_quality
from cards.quality import main, quality_html
from daco.tables import LINKS, table_of, write_table


def write_run(out: Path) -> None:
    """Two concepts: `good`, whose pairs all mean the first axis, and `bad`, whose images mean another."""
    axes = np.eye(7)
    images = unit_half([axes[0], axes[0] + 0.1 * axes[2], axes[3], axes[4], axes[5], axes[6]])
    texts = unit_half([axes[0], axes[0] + 0.1 * axes[3], axes[5], axes[6], axes[3], axes[4]])
    ids = [f"{i:016x}" for i in range(6)]
    (out / "embeddings").mkdir(parents=True)
    table = pa.Table.from_pylist([{"stimulus_id": i, "caption": ""} for i in ids], schema=METADATA)
    write_embeddings(out / "embeddings", [(images, texts)], table)
    links = []
    for name, positives, dists in (("bad", (2, 3), (2.0, 2.1)), ("good", (0, 1), (0.5, 0.6))):
        for role, rows, away in (("positive", positives, dists), ("negative", (4, 5), (2.05, 3.0))):
            concept = {"concept_id": f"user:{name}", "concept": name, "sim_image": 0.1, "sim_text": 0.2}
            pairs = enumerate(zip(rows, away, strict=True))
            links += [
                concept | {"stimulus_id": ids[row], "role": role, "rank": rank, "dist": dist}
                for rank, (row, dist) in pairs
            ]
    (out / "stimuli").mkdir()
    write_table(out / "stimuli" / "links.parquet", table_of(links, LINKS))


def test_figures_are_those_of_their_definitions(tmp_path: Path) -> None:
    write_run(tmp_path)
    good, bad = concept_quality(tmp_path).to_dict("records")
    assert (good["concept"], bad["concept"], good["n_positive"]) == ("good", "bad", 2)
    assert good["margin"] == pytest.approx((2.05 + 3.0) / 2 - 0.55)
    assert good["gap"] == pytest.approx(2.05 - 0.6)
    assert bad["gap"] == pytest.approx(2.05 - 2.1)
    assert good["agreement"] == pytest.approx(np.mean([1 / 1.01**0.5, 1 / 1.01**0.5]), abs=1e-3)
    # Its images are those of the negatives' captions: it agrees with them, not with its own.
    assert bad["agreement"] == pytest.approx(-0.5)
    assert good["spread"] == pytest.approx(1 - 1 / 1.01**0.5, abs=1e-3)
    assert bad["spread"] == pytest.approx(1.0)


def test_the_page_shows_texts_as_text_and_lost_pictures_as_nothing(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 24)
    for i, text in enumerate(TEXTS[:8]):
        (pictures / f"{i:03d}.txt").write_text(f"knife, {text}", encoding="utf-8", errors="replace")
    recipe = tiny_recipe(pictures, clip={"steps": 1})
    for stage, module in (("corpus", corpus), ("concepts", vocabulary), ("clip", clip),
                          ("embeddings", embeddings), ("stimuli", stimuli)):  # fmt: skip
        module.run(opened(recipe, tmp_path / "run", stage))
    for lost in list(pictures.glob("*[02468].png")):
        lost.unlink()
    page = quality_html(tmp_path / "run", "A <b>title</b>")
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list) -> None:
            tags.append(tag)
            assert not any(name.startswith("on") for name, _ in attributes)

    Tags().feed(page)
    assert not {"script", "iframe", "a"} & set(tags)
    assert tags.count("section") == 3 * min(6, len(concept_quality(tmp_path / "run")))
    assert tags.count("img") > 9
    assert "A &lt;b&gt;title" in page
    assert 'class="none"' in page


def test_a_run_without_stimuli_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["quality", str(tmp_path / "run"), str(tmp_path / "page.html")])
    assert main() == 1
    assert "stage 'stimuli' to be finished" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
