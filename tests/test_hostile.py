"""Captions and concept names that spell markup, code or control tokens stay text, from corpus to page."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hostile import CONTROL_TOKENS, TEXTS
from markdown_it import MarkdownIt
from PIL import Image

from builders.corpus import clean_caption
from builders.forward import read_batch
from builders.mllm import chat_inputs
from builders.pipeline import run
from builders.recipe import Recipe, recipe_of
from builders.stages import done
from builders.vocabulary import MAX_NAME, slug
from cards.report import report_html
from daco import ConceptDictionary, SteeringSAE
from daco.manifest import read_manifest
from daco.prompts import plain_text
from hub.gate import check_release
from hub.stage import stage

KINDS = ("llava", "qwen2_5_vl", "internvl")
PLAIN = 2 * len(TEXTS)
_TAGS = """
html head meta title style body main h1 h2 h3 p a table tr th td div b br small figure img figcaption em span
pre code svg defs g path use metadata rdf:rdf cc:work dc:type dc:format clippath rect
hr thead tbody ul li blockquote strong nav details summary dl dt dd
"""
TAGS = frozenset(_TAGS.split())
"""Elements that our own templates and plots make."""
LINKS = ("https://arxiv.org/abs/2604.08846", "https://example.org/")


def write_corpus(folder: Path) -> Path:
    """Every hostile text as a caption, plain ones, and one too long, each with its own picture."""
    draw = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for i, text in enumerate(
        [*TEXTS, *(f"plain knife {i}" for i in range(PLAIN - len(TEXTS))), "x" * 10_001]
    ):
        pixels = draw.integers(0, 256, (33, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(text, "utf-8", newline="")
    return folder


def write_concepts(path: Path) -> Path:
    polarities = ("undesirable", "desirable", "neutral")
    rows = [
        {"concept": text, "definition": text, "polarity": polarities[i % 3]} for i, text in enumerate(TEXTS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def recipe(folder: Path, kind: str) -> Recipe:
    sections: dict[str, Any] = {
        "run": {"name": TEXTS[0], "seed": 5, "threads": 1},
        "corpus": {"path": str(folder / "pictures"), "licence": "cc0-1.0", "redistribute_images": True,
                   "name": "<i>source</i> | `{{ 7*7 }}`", "url": "javascript:alert(1)"},
        "concepts": {"source": "table", "path": str(folder / "concepts.parquet")},
        "clip": {"steps": 2, "batch": 8, "hidden": 32, "n_layers": 1, "vocabulary": 560, "image_size": 32},
        "stimuli": {"n_positive": 5, "min_positive": 1, "pool": 64},
        "model": {"tiny": kind},
        "activations": {"layers": [1, 2], "batch": 4},
        "sae": {"k": 4, "holdout": 0.4, "steps": 6, "batch": 32, "eval_steps": 3},
        "atoms": {"eta": 0.2},
        "evaluate": {"items": 6, "batch": 3},
        "release": {"dataset": "DACO-hostile", "contact": TEXTS[1]},
    }  # fmt: skip
    return recipe_of(sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `run` has everything up to the labels, which do not depend on the model."""
    folder = tmp_path_factory.mktemp("hostile")
    write_corpus(folder / "pictures")
    write_concepts(folder / "concepts.parquet")
    run(recipe(folder, KINDS[0]), folder / "run", until="polarity")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def built(folder: Path, request: pytest.FixtureRequest) -> tuple[Path, Recipe]:
    """A finished run over hostile texts with each kind of model, and its recipe."""
    out = folder / request.param
    shutil.copytree(folder / "run", out)
    run(recipe(folder, request.param), out)
    for kind in ("dataset", "model"):
        stage(out / "release" / kind)
    return out, recipe(folder, request.param)


def test_nothing_is_lost_but_what_is_counted(built: tuple[Path, Recipe]) -> None:
    out, _ = built
    assert done(out, "corpus")["counts"] == {"in": PLAIN + 1, "out": PLAIN, "skipped": {"long_caption": 1}}
    named = [text for text in map(clean_caption, TEXTS) if slug(text) and len(text) <= MAX_NAME]
    counts = done(out, "concepts")["counts"]
    assert counts["out"] == len({slug(text) for text in named})
    assert counts["skipped"]["long_concept"] == 1
    assert done(out, "activations")["counts"]["skipped"] == {}


def test_published_texts_are_the_corpus_s_own(built: tuple[Path, Recipe], tmp_path: Path) -> None:
    import datasets

    out, _ = built
    folder = str(out / "release" / "dataset")
    ours = pq.read_table(out / "corpus" / "stimuli.parquet").to_pylist()
    captions = {row["stimulus_id"]: row["caption"] for row in ours}
    assert {clean_caption(text) for text in TEXTS} <= set(captions.values())
    rows = datasets.load_dataset(folder, "stimuli", split="train", cache_dir=str(tmp_path))
    assert {
        row["stimulus_id"]: row["caption"] for row in rows.remove_columns("image")
    }.items() <= captions.items()
    assert set(map(clean_caption, TEXTS)) & set(rows["caption"])
    concepts = datasets.load_dataset(folder, "concepts", split="train", cache_dir=str(tmp_path))
    assert concepts["concept"] == pq.read_table(out / "polarity" / "concepts.parquet")["concept"].to_pylist()
    assert check_release(out / "release" / "dataset") == []
    assert check_release(out / "release" / "model") == []
    assert len(ConceptDictionary.from_pretrained(folder)) == len(concepts)
    assert SteeringSAE.from_pretrained(out / "release" / "model").layers.keys() == {1, 2}


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.links += [str(value) for name, value in attrs if name == "href"]
        self.images += [str(value) for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(page: Page, *links: str) -> None:
    assert page.tags <= TAGS, page.tags - TAGS
    assert page.handlers == []
    assert {link for link in page.links if not link.startswith(("#", *links))} == set()
    ours = ("data:image/png;base64,", "./map.png", "./examples.png", "./tuning.png")
    assert all(image.startswith(ours) for image in page.images)
    assert "49" not in page.text.replace("7*7", "").split()  # {{ 7*7 }} was not worked out


def test_the_check_of_pages_finds_what_it_looks_for() -> None:
    for text in TEXTS[:3]:
        with pytest.raises(AssertionError):
            check_page(Page(f"<p>{text}</p>"), *LINKS)
    with pytest.raises(AssertionError):
        check_page(Page(MarkdownIt("commonmark").render(TEXTS[13])), *LINKS)


def test_the_report_shows_texts_as_text(built: tuple[Path, Recipe]) -> None:
    out, made_from = built
    repo = {"repo_id": TEXTS[0], "repo_type": "dataset", "tag": TEXTS[1], "commit": "0" * 40}
    published = {"repos": [repo | {"files": 1, "bytes": 2}], "seconds": 1.0}
    run = {"title": TEXTS[7], "proves": TEXTS[0], "code": TEXTS[2], "output": TEXTS[3]}
    page = Page(report_html(out, made_from, published | {"runs": [run]}))
    check_page(page, LINKS[0])
    for text in (*TEXTS[:4], TEXTS[7], *(t for t in shown(out) if len(t) <= 80)):
        assert text in page.text
    assert page.images  # the thumbnails


def shown(out: Path) -> list[str]:
    """Names of the first concepts, which the report must show."""
    table = pq.read_table(out / "polarity" / "concepts.parquet").to_pylist()
    return [next(r["concept"] for r in table if r["polarity"] == p) for p in ("undesirable", "desirable")]


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_the_cards_show_texts_as_text(built: tuple[Path, Recipe], kind: str) -> None:
    out, _ = built
    card = (out / "release" / kind / "README.md").read_text("utf-8")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert isinstance(yaml.safe_load(front), dict)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    page = Page(html)
    check_page(page, *LINKS)
    assert html.count("<h1") == 1
    assert "<i>source</i> | `{{ 7*7 }}`" in page.text
    assert "javascript:alert(1)" in page.text
    if kind == "dataset":
        assert shown(out)[0] in page.text


def test_no_place_of_this_machine_is_published(built: tuple[Path, Recipe], folder: Path) -> None:
    out, _ = built
    for kind in ("dataset", "model"):
        for path in (out / "release" / kind).rglob("*"):
            if path.is_file():
                assert str(folder).encode() not in path.read_bytes(), path


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.mark.parametrize("text", [*map(clean_caption, TEXTS), *CONTROL_TOKENS])
def test_no_caption_makes_a_control_token(model: tuple[Any, Any], text: str) -> None:
    _, processor = model
    image = Image.new("RGB", (40, 33), "red")
    plain, hostile = (chat_inputs(processor, [t], [image])["input_ids"][0].tolist() for t in ("a dog", text))
    for token in processor.tokenizer.added_tokens_decoder:
        assert hostile.count(token) == plain.count(token)
    decoded = processor.tokenizer.decode(hostile)
    assert plain_text(processor, text) in decoded
    assert plain_text(processor, text).replace(" ", "") == text.replace(" ", "")


def test_plain_texts_are_left_as_they_are(model: tuple[Any, Any]) -> None:
    for text in ("a red dog", "x < y > z", "| a | b |", "<script>", "im_end", "<|", ""):
        assert plain_text(model[1], text) == text


@pytest.mark.parametrize("reading", ["last", "caption_last", "caption_mean"])
def test_hostile_captions_are_read_as_any_other(model: tuple[Any, Any], reading: str) -> None:
    texts = [text for text in map(clean_caption, TEXTS) if len(text) < 500]
    images = [Image.new("RGB", (40, 33), "red")] * len(texts)
    read = read_batch(*model, texts, images, [1, 2], reading)
    assert read.readings.isfinite().all()
    rows = {tuple(row.flatten().tolist()) for row in read.readings}
    assert len(rows) == len(texts) or reading == "last"
    assert min(map(len, read.tokens)) > 0


def test_a_caption_that_spells_the_prompt_is_found_where_it_stands(model: tuple[Any, Any]) -> None:
    """ "s" and "assistant" occur behind the caption as well: a reading must not be taken there."""
    image, (trunk, processor) = Image.new("RGB", (40, 33), "red"), model
    for word in ("assistant", "s", "user"):
        alone = read_batch(trunk, processor, [word], [image], [1], "caption_mean").readings
        last = read_batch(trunk, processor, [word], [image], [1], "last").readings
        ids = chat_inputs(processor, [word], [image])["input_ids"][0].tolist()
        piece = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
        ends = [i for i in range(len(ids)) if ids[i : i + len(piece)] == piece]
        end_of_turn = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        place = next(i for i in ends if ids[i + len(piece)] == end_of_turn)
        whole = forward(trunk, processor, word, image)
        assert np.allclose(alone[0, 0], whole[place : place + len(piece)].mean(0), atol=1e-4), word
        assert not np.allclose(alone, last, atol=1e-3)


def forward(model: Any, processor: Any, caption: str, image: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        inputs = chat_inputs(processor, [caption], [image])
        return model(**inputs, output_hidden_states=True).hidden_states[2][0].numpy()


def test_manifests_keep_every_count(built: tuple[Path, Recipe]) -> None:
    out, _ = built
    for kind in ("dataset", "model"):
        counts = read_manifest(out / "release" / kind)["counts"]
        assert counts["corpus"]["skipped"] == {"long_caption": 1}
        assert json.loads(json.dumps(counts)) == counts
