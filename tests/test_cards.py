"""Proves that cards say what manifests say, as text and valid metadata, and that their quick starts run."""

import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import cmarkgfm
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import release_fixture
import torch
import yaml
from conftest import tiny
from hostile import TEXTS
from hub_fixture import WRITER, LocalHub, local_hub, running  # noqa: F401
from markdown_it import MarkdownIt
from PIL import Image
from release_fixture import (
    BASE,
    COUNTS,
    N_ATOMS,
    N_CONCEPTS,
    N_STIMULI,
    RECIPE,
    SOURCES,
    write_dataset_release,
    write_model_release,
)
from test_hostile import Page, check_page

from cards import escape
from cards.album import components, pictures
from cards.facts import is_hub_id, repo_id, scalars, tables_of
from cards.render import render, with_outputs
from daco import ConceptDictionary
from daco.errors import FormatError, IntegrityError, QuickStartError
from daco.manifest import FORMAT_VERSION, canonical_json, file_entry, read_manifest, write_manifest
from daco.recognition import MEASURED, Recogniser, measured
from daco.tables import CONCEPTS, LINKS, STIMULI
from hub.changes import supersede
from hub.gate import SECTIONS, check_release
from hub.local.card_rules import check_card
from hub.publish import publish
from hub.quick_start import code_blocks, record, run
from hub.remote import Target
from hub.stage import stage

WRITERS = {"dataset": write_dataset_release, "model": write_model_release}
BARE = {"recipe": {}, "counts": {}, "seeds": {}, "versions": {}, "sources": []}
"""Facts of a manifest that knows nothing it need not."""


def rendered(folder: Path, kind: str, **facts: Any) -> tuple[dict[str, Any], str]:
    """Metadata and Markdown of a card."""
    return taken_apart(render(WRITERS[kind](folder, **facts)))


def taken_apart(card: str) -> tuple[dict[str, Any], str]:
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(front), body


def html(body: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


def rows(body: str, *starts: str) -> list[list[str]]:
    """The table rows whose first cells are these."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
    return [row for row in cells if tuple(row[: len(starts)]) == starts]


# --- metadata


def test_metadata_of_a_dataset(tmp_path: Path) -> None:
    def files(config: str, split: str) -> dict[str, Any]:
        return {"split": split, "path": [f"data/{config}/{split}-00000-of-00001.parquet"]}

    directions = "directions_tiny_vl"
    metadata = rendered(tmp_path / "r", "dataset")[0]
    told = metadata.pop("dataset_info")
    assert metadata == {
        "license": "cc-by-4.0",
        "pretty_name": "DACO-tiny",
        "language": ["en"],
        "tags": ["daco", "multimodal", "concepts", "activation-steering", "interpretability", "safety"],
        "size_categories": ["n<1K"],
        "configs": [
            {"config_name": "stimuli", "default": True, "data_files": [files("stimuli", "train")]},
            {"config_name": "links", "data_files": [files("links", "train")]},
            {"config_name": "concepts", "data_files": [files("concepts", "train")]},
            {"config_name": directions, "data_files": [files(directions, f"layer_{n}") for n in (1, 2)]},
        ],
    }
    assert [one["config_name"] for one in told] == ["stimuli", "links", "concepts", directions]
    tables = {"stimuli": STIMULI, "links": LINKS, "concepts": CONCEPTS}
    entries = read_manifest(tmp_path / "r")["files"]
    for one in told:
        if schema := tables.get(one["config_name"]):
            types = {"float": "float32"}
            expected = [{"name": f.name, "dtype": types.get(str(f.type), str(f.type))} for f in schema]
            assert one["features"] == expected
        else:
            assert "features" not in one  # of vectors they do not survive YAML
        paths = [f"data/{one['config_name']}/{part['name']}-00000-of-00001.parquet" for part in one["splits"]]
        assert one["download_size"] == sum(entries[path]["bytes"] for path in paths)
        assert [part["num_examples"] for part in one["splits"]] == [entries[path]["rows"] for path in paths]
        assert one["dataset_size"] == sum(part["num_bytes"] for part in one["splits"]) > 0


def fve(layer: int, value: float) -> dict[str, Any]:
    """The entry of a `model-index` for what `release_fixture` writes into evaluation.json."""
    return {
        "task": {"type": "feature-extraction", "name": f"Reconstruction, layer {layer}"},
        "dataset": {"type": "held-out", "name": "Held-out tokens"},
        "metrics": [{"type": "fve", "name": "Variance explained", "value": value}],
    }


def test_metadata_of_a_model(tmp_path: Path) -> None:
    metadata, _ = rendered(tmp_path / "r", "model")
    assert metadata == {
        "license": "cc-by-4.0",
        "base_model": "org/tiny-vl",
        "base_model_relation": "adapter",
        "library_name": "daco",
        "pipeline_tag": "image-text-to-text",
        "datasets": ["org/DACO-tiny"],
        "tags": [
            *("daco", "sparse-autoencoder", "saelens"),
            *("activation-steering", "interpretability", "safety"),
        ],
        "model-index": [{"name": "daco-sae-tiny", "results": [fve(1, 0.51), fve(2, 0.52)]}],
    }


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", {"license": "mit"}),
        ("", {}),
        ("Our own: 'terms'\n---\n", {"license": "other", "license_name": "Our own: 'terms' ---"}),
    ],
)
def test_a_licence_is_an_id_or_has_a_name(tmp_path: Path, licence: str, expected: dict[str, str]) -> None:
    metadata, _ = rendered(tmp_path / "r", "model", recipe={"release": {"licence": licence}})
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected


def test_layers_are_in_order_as_numbers(tmp_path: Path) -> None:
    folder = write_dataset_release(tmp_path / "r")
    manifest = read_manifest(folder)
    splits = manifest["configs"]["directions_tiny_vl"]["splits"]
    splits |= {f"layer_{n}": splits["layer_1"] for n in (10, 9)}
    write_manifest(folder, manifest)
    metadata, body = taken_apart(render(folder))
    names = [part["split"] for part in metadata["configs"][-1]["data_files"]]
    assert names == ["layer_1", "layer_2", "layer_9", "layer_10"]
    assert "`layer_9` 13, `layer_10` 13" in body


def test_the_hub_takes_the_metadata(tmp_path: Path) -> None:
    for kind in WRITERS:
        card = render(WRITERS[kind](tmp_path / kind))
        assert check_card(card, f"{kind}s") == ([], [])


# --- numbers


def test_numbers_of_a_dataset_are_the_manifest_s(tmp_path: Path) -> None:
    folder = write_dataset_release(tmp_path / "r")
    manifest = read_manifest(folder)
    _, body = taken_apart(render(folder))
    assert rows(body, "corpus") == [["corpus", "pairs", "31", "29", "2 unreadable"]]
    assert rows(body, "concepts") == [
        ["concepts", "concepts", "17", "13", "4 too few positives"],
        ["concepts", "desirable", "neutral", "undesirable"],
    ]
    assert rows(body, str(N_CONCEPTS)) == [["13", "3", "3", "7"]]
    assert f"Links: {N_CONCEPTS * 3} negative, {N_CONCEPTS * 3} positive." in body
    assert f"| `stimuli` (default) | one row per unique caption-image pair | `train` {N_STIMULI} |" in body
    model = ["tiny_vl", "org/tiny-vl", "f" * 12, "32", "1, 2", "layer 1: 4.5, layer 2: 5.5"]
    assert rows(body, "tiny_vl") == [model]
    assert rows(body, "knife") == [["knife", "undesirable", "what knife means", "3"]]
    for path, entry in manifest["files"].items():
        (row,) = rows(body, f"`{path}`")
        n, types = entry["rows"], "float32, float32&#91;32&#93;, int32, string"
        assert row[1] == f"{n}×{pq.read_metadata(folder / path).num_columns}"
        assert row[2] == types if "directions" in path else "string" in row[2]
        assert row[3:] == [str(n), escape.size(entry["bytes"]), f"`{entry['sha256'][:12]}…`"]
    assert "seeds: run 7." in body
    assert f"`v1.0.0` in format `{FORMAT_VERSION}`" in body
    assert "Made with torch 2.13.0, transformers 5.23.0." in body
    assert rows(body, "Drawn pairs") == [["Drawn pairs", "1", "cc0-1.0", "<https://example.org/drawn>"]]
    permitted = [SOURCES[0] | {"licence": "cc-by-nd-4.0", "allowed": True}]
    _, body = rendered(tmp_path / "permitted", "dataset", sources=permitted)
    assert rows(body, "Drawn pairs")[0][2] == "cc-by-nd-4.0, passed on as its owner allows"


def test_numbers_of_a_model_are_its_files(tmp_path: Path) -> None:
    folder = write_model_release(tmp_path / "r")
    _, body = taken_apart(render(folder))
    counted = ["21", "10", "10"]  # of the 41 atoms: every other one, and every fourth
    assert rows(body, "1", str(N_ATOMS)) == [["1", str(N_ATOMS), *counted, "4", "4.5"]]
    assert rows(body, "2", str(N_ATOMS)) == [["2", str(N_ATOMS), *counted, "4", "5.5"]]
    assert "Steering defaults: eta 0.3, gamma 0.5, scope all." in body
    assert rows(body, "1", "0.51") == [["1", "0.51", "7.25"]]
    explained = "`fve`: variance explained on held-out tokens (95 % intervals over pictures)"
    assert f"{explained}; `l0`: atoms active per token." in body
    assert rows(body, "items") == [["items", "16"]]
    assert rows(body, "tokens") == [["tokens", "1,234"]]
    assert rows(body, "fve.2") == [["fve.2", "0.47"]]
    first = ["1", "0", "undesirable", "0.90", "knife 0.90, dog 0.50, gun 0.25"]
    assert rows(body, "1", "0", "undesirable") == [first]
    assert rows(body, "dictionary") == [["dictionary", "org/DACO-tiny at `v1.0.0`"]]
    (row,) = rows(body, "`layers.1/sae_weights.safetensors`")
    assert row[1:4] == ["`W_dec` 41×32, `W_enc` 32×41, `b_dec` 32, `b_enc` 41", "F32", ""]


def test_a_dataset_says_how_well_its_concepts_are_recognised(tmp_path: Path) -> None:
    """Of two layers; at the second no concept can be named, at the first nine of them."""
    plain = ConceptDictionary.from_pretrained(write_dataset_release(tmp_path / "plain"))
    table = pd.DataFrame({"threshold": [1.0] * 9 + [np.nan] * 4, "n_shown": 7})
    table = table.assign(precision=[0.5, 0.75, 1.0] * 3 + [np.nan] * 4, recall=[0.25] * 9 + [np.nan] * 4)
    none = measured(pd.DataFrame(np.nan, index=range(N_CONCEPTS), columns=list(MEASURED)))
    found = {
        layer: Recogniser(torch.zeros(32), torch.eye(32), torch.ones(N_CONCEPTS, 32), known, usual=1.0)
        for layer, known in ((1, measured(table)), (2, none))
    }
    dataclasses.replace(plain, recognisers=found).save_pretrained(tmp_path / "saved", model="tiny")
    _, body = taken_apart(render(tmp_path / "saved"))
    assert rows(body, "tiny", "1") == [["tiny", "1", "13", "9", "0.75", "0.25"]]
    assert rows(body, "tiny", "2") == [["tiny", "2", "13", "0", "", ""]]
    assert "dictionary.recognise(readings)" in body
    assert "recognise" not in rendered(tmp_path / "without", "dataset")[1]


def test_figures_are_named_and_fit_the_page() -> None:
    figures = {"kl": 0.5, "n_stimuli": 64, "fired": ["a", "b"], "kl_interval": [0.25, 0.751]}
    evaluation = {"steering": {"a": {"method": "A, 1", **figures}, "b": {"method": "B, 2", **figures}}}
    (table,) = tables_of(evaluation | {"suites": {}})
    assert (table["rows_are"], table["columns"], table["shared"]) == ("method", ["kl"], {"n_stimuli": 64})
    assert table["rows"] == {"A, 1": {"kl": "0.5 (0.25 to 0.751)", "n_stimuli": 64}} | {
        "B, 2": {"kl": "0.5 (0.25 to 0.751)", "n_stimuli": 64}
    }
    assert table["notes"]["kl"].startswith("KL divergence")
    evaluation["steering"]["b"]["method"] = "A, 1"
    assert tables_of(evaluation)[0]["rows"].keys() == {"a", "b"}  # no row is lost to another of its name
    assert tables_of({"loss": 0.5}) == [
        {"title": "overall", "rows_are": "", "columns": ["value"], "rows": {"loss": {"value": 0.5}}}
        | {"shared": {}, "notes": {}}
    ]
    assert scalars({"a": {"b": [1, 2], "c": None, "d": [], "e": ""}}) == {"a.b": "1, 2"}


# --- what is not known, and what is hostile


@pytest.mark.parametrize("kind", WRITERS)
def test_unknown_facts_drop_their_section(tmp_path: Path, kind: str) -> None:
    metadata, body = rendered(tmp_path / "r", kind, **BARE)
    for word in (
        "Quick start",
        "| source",
        "seeds",
        "Made with",
        "| stage",
        "daco-release",
        "None",
        "Undefined",
    ):
        assert word not in body
    assert "license" not in metadata
    assert "the authors' release" in body
    assert "## Numbers" in body
    assert not re.search(r"^## [^\n]*\n+(?=## |\Z)", body, re.MULTILINE)  # no heading without text


def test_an_unknown_base_model_is_told_by_its_shape(tmp_path: Path) -> None:
    folder = write_model_release(tmp_path / "r")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["base_model"] |= {"id": "", "revision": ""}
    (folder / "config.json").write_text(canonical_json(config), "utf-8")
    manifest = read_manifest(folder)
    manifest["files"]["config.json"] = file_entry(folder / "config.json")
    write_manifest(folder, manifest)
    metadata, body = taken_apart(render(folder))
    assert "for 2 layers of a llava model with hidden size 32" in body
    assert "AutoModel" not in body
    assert not {"base_model", "base_model_relation"} & metadata.keys()


def test_no_empty_column_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_fixture, "BASE", BASE | {"id": "", "revision": ""})
    _, body = rendered(tmp_path / "r", "dataset")
    assert rows(body, "tiny_vl") == [["tiny_vl", "32", "1, 2", "layer 1: 4.5, layer 2: 5.5"]]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("i", range(len(TEXTS)))
def test_hostile_facts_come_out_as_text(tmp_path: Path, kind: str, i: int) -> None:
    text = TEXTS[i]
    release = {**RECIPE["release"], "licence": text, "contact": text, "org": text}
    metadata, body = rendered(
        tmp_path / "r",
        kind,
        words=[text, "b", "c", text],
        name=text,
        recipe=RECIPE | {"release": release},
        facts={"limits": [text], "pretty_name": text},
        sources=[{"name": text, "revision": text, "licence": text, "url": text}],
        counts=COUNTS | {text: {"in": 1, "out": 0, "skipped": {text: 1}}},
        versions={text: text},
    )
    assert metadata["license"] in ("other", text)
    page = Page(html(body))
    check_page(page, "https://arxiv.org/abs/2604.08846", "https://example.org/")
    assert html(body).count("<h1") == 1
    shown = escape.one_line(text)
    assert "".join(page.text.split()).count("".join(shown.split())) >= 7
    assert ("Quick start" in body) == is_hub_id(f"{text}/name")


@pytest.mark.parametrize(
    "text", [*TEXTS, "1. a", "- b", "a_b_c", "*", "\\", "&amp;", "`", "``|``", "~~~", "=", "+ x"]
)
def test_each_filter_keeps_the_text(text: str) -> None:
    line = escape.one_line(text)
    for shown in (escape.md(text), escape.code(text)):
        page = Page(html(f"- {shown}\n\n| a |\n|---|\n| {shown} |\n"))
        assert page.text.split() == [*line.split(), "a", *line.split()]
        assert page.tags <= {"ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert json.loads(escape.py(text)) == line
    assert yaml.safe_load(escape.yaml_metadata({"name": text})) == {"name": text}
    assert not set("{}\\`\n") & set(escape.bib(text))


ADDRESSES = (
    "see https://a.example/x_y now|HTTP://a.example|ftp://a.example/b|xhttps://a.example|www.a.example|"
    "(www.a.example)|www.www.a.example|me@a.example|m.e+f@a.example|_@b.example"
)


@pytest.mark.parametrize("text", ADDRESSES.split("|"))
def test_an_address_in_a_text_is_no_link_on_github_and_the_hub(text: str) -> None:
    def shown(markdown: str) -> Page:
        with_html = cmarkgfm.cmark.Options.CMARK_OPT_UNSAFE
        return Page(cmarkgfm.github_flavored_markdown_to_html(markdown, with_html))

    assert shown(text).links or text.startswith(("_", "x"))
    for escaped in (escape.md(text), escape.code(text)):
        page = shown(f"- {escaped}\n\n| a |\n|---|\n| {escaped} |\n")
        assert page.links == []
        assert page.text.split() == [*text.split(), "a", *text.split()]


def test_numbers_and_sizes_for_people() -> None:
    shown = [escape.number(value) for value in (1234, 0.123456, 1e-7, True, "a|b", float("nan"))]
    assert shown == ["1,234", "0.1235", "1e-07", "True", "a&#124;b", "nan"]
    sizes = [escape.size(n).replace("\u00a0", " ") for n in (0, 999, 1000, 2_500_000, 10**13)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "2.5 MB", "10.0 TB"]
    assert escape.link("https://example.org/a?b=1") == "<https://example.org/a?b=1>"
    assert escape.link("me@example.org") == "<me@example.org>"
    assert escape.link("javascript:alert(1)") == "javascript:alert(1)"
    assert escape.link("https://example.org/ <b>") == "https://<!-- -->example.org/ &#60;b&#62;"


def test_repo_ids(tmp_path: Path) -> None:
    manifest = read_manifest(write_model_release(tmp_path / "r"))
    assert repo_id(manifest) == "org/daco-sae-tiny"
    assert repo_id(manifest | {"facts": {"repo_id": "other/name"}}) == "other/name"
    assert repo_id(manifest | {"recipe": {}}) == ""
    assert not any(map(is_hub_id, ("x", "a/b/c", "/a", "a/", "../b", "a b/c", 3, None, "a/b\n")))


# --- staging


@pytest.mark.parametrize("kind", WRITERS)
def test_staging_again_changes_no_byte(tmp_path: Path, kind: str) -> None:
    first, second = (WRITERS[kind](tmp_path / name) for name in ("first", "second"))
    for folder in (first, first, second):
        stage(folder)
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
    card = first / "README.md"
    assert read_manifest(first)["files"]["README.md"] == file_entry(card)
    assert str(tmp_path) not in card.read_text("utf-8")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("dataset", "data/concepts/train-00000-of-00001.parquet"), ("model", "layers.1/steering.safetensors")],
)
def test_a_damaged_release_gets_no_card(tmp_path: Path, kind: str, name: str) -> None:
    folder = WRITERS[kind](tmp_path / "r")
    (folder / name).write_bytes(b"\xff" * (folder / name).stat().st_size)
    with pytest.raises(IntegrityError, match="build the release again"):
        stage(folder)
    assert not (folder / "README.md").exists()


# --- how the defaults were chosen


def tuning(judge: str = "words of the answer", chosen: int | None = 1) -> bytes:
    """What `builders.tune` writes, of three settings."""

    def share(rate: float) -> dict[str, float]:
        return {"rate": rate, "low": max(0.0, rate - 0.1), "high": min(1.0, rate + 0.1), "n": 20}

    made = [(0.3, 0.0, 0.9, 0.0), (0.3, 0.5, 0.05, 0.02), (0.5, 0.5, 0.4, 0.3)]
    tried = [
        {
            "setting": {"eta": eta, "gamma": gamma, "scope": "all", "layers": [1, 2]},
            "figures": {"unsafe": share(unsafe), "utility": share(0.9 - loss)},
            "loss": loss,
            "change": 0.1,
            "front": number < 2,
            "same_as_plain": False,
        }
        for number, (eta, gamma, unsafe, loss) in enumerate(made)
    ]
    found = {
        "items": {"harmful": 20, "question": 20},
        "judge": judge,
        "allowed": 0.02,
        "plain": {"unsafe": share(1.0), "utility": share(0.9)},
        "default": tried[0]["setting"],
        "chosen": None if chosen is None else tried[chosen]["setting"],
        "tried": tried,
    }
    return canonical_json(found).encode()


def test_the_card_says_how_the_defaults_were_chosen(tmp_path: Path) -> None:
    folder = write_model_release(tmp_path / "r", extra_files={"tuning.json": tuning()})
    stage(folder)
    _, body = taken_apart((folder / "README.md").read_text("utf-8"))
    assert "Of 3 settings, the one that obeys the fewest harmful requests" in body
    assert "on validation items (20 harmful, 20 question), judged by words of the answer." in body
    (best,) = rows(body, "eta 0.3, gamma 0.5, all, layers 1 to 2 (chosen)")
    assert best[1:] == ["5.0 (0.0 to 15.0)", "88.0 (78.0 to 98.0)"]
    assert rows(body, "no steering") == [["no steering", "100.0 (90.0 to 100.0)", "90.0 (80.0 to 100.0)"]]
    assert len(rows(body, "eta 0.3, gamma 0, all, layers 1 to 2 (recipe)")) == 1
    assert "eta 0.5" not in body  # neither on the front nor anybody's choice
    assert "](./tuning.png)" in body
    assert "chosen on few prompts" in body
    assert read_manifest(folder)["files"]["tuning.png"] == file_entry(folder / "tuning.png")
    assert rows(body, "`tuning.png`")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    stage(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_a_card_says_where_no_setting_helped(tmp_path: Path) -> None:
    folder = write_model_release(tmp_path / "r", extra_files={"tuning.json": tuning(chosen=None)})
    stage(folder)
    _, body = taken_apart((folder / "README.md").read_text("utf-8"))
    assert "none was found to obey fewer harmful requests than no steering" in body
    assert "(chosen)" not in body


def test_the_judge_s_name_is_text(tmp_path: Path) -> None:
    folder = write_model_release(tmp_path / "r", extra_files={"tuning.json": tuning(judge=" ".join(TEXTS))})
    page = Page(html(taken_apart(render(folder))[1]))
    assert page.handlers == []
    assert page.images == ["./tuning.png"]


def test_a_broken_choice_is_refused(tmp_path: Path) -> None:
    folder = write_model_release(tmp_path / "r", extra_files={"tuning.json": b'{"tried": [1]}'})
    with pytest.raises(FormatError, match=r"expected what `builders\.tune` writes"):
        stage(folder)
    assert not (folder / "README.md").exists()


def test_sections_come_in_the_order_that_the_gate_asks_for(tmp_path: Path) -> None:
    for kind in WRITERS:
        _, body = rendered(tmp_path / kind, kind)
        assert [line for line in body.splitlines() if line.startswith("## ")] == ["## Quick start", *SECTIONS]


def test_who_asks_for_removal_has_somebody_to_ask(tmp_path: Path) -> None:
    for kind in WRITERS:
        _, body = rendered(tmp_path / f"{kind}-1", kind)
        assert "To have something removed, write to <removals@example.org>; the next version" in body
        _, body = rendered(tmp_path / f"{kind}-2", kind, recipe={})
        assert "To have something removed, open a discussion on this repo's page; the next version" in body


def test_a_superseded_repo_says_where_to_go(tmp_path: Path) -> None:
    for kind in WRITERS:
        folder = WRITERS[kind](tmp_path / kind)
        supersede(folder, "org/newer")
        metadata, body = taken_apart(render(folder))
        assert "**This repo is superseded: newer releases are in org/newer.**" in body
        assert metadata.get("new_version") == ("org/newer" if kind == "model" else None)
        assert check_card(render(folder), f"{kind}s") == ([], [])


def test_what_a_release_does_not_hold_is_not_pictured(tmp_path: Path) -> None:
    for kind in WRITERS:
        assert pictures(WRITERS[kind](tmp_path / kind)).keys() == (
            {"map.png"} if kind == "dataset" else set()
        )


def picture(colour: tuple[int, int, int]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 31), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "x.png"}


def test_pictures_are_made_of_what_the_licence_allows_and_stay_the_same(tmp_path: Path) -> None:
    images = pa.array([picture((i * 8, 0, 0)) for i in range(N_STIMULI)])
    may = [SOURCES[0] | {"redistribute_images": True}]
    folder = write_dataset_release(tmp_path / "r", stimuli_columns={"image": images}, sources=may)
    made = pictures(folder)
    assert made.keys() == {"map.png", "examples.png"}
    assert pictures(folder) == made
    stage(folder)
    _, body = taken_apart((folder / "README.md").read_text("utf-8"))
    for name, content in made.items():
        assert (folder / name).read_bytes() == content
        assert f"](./{name})" in body
        assert rows(body, f"`{name}`")
        with Image.open(folder / name) as shown:
            assert shown.width > 400
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stage(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_components_are_the_principal_ones() -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((40, 7)).astype(np.float32) * np.array([9, 5, 1, 1, 1, 1, 1], np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    mean, basis = components(unit.astype(np.float64))
    np.testing.assert_allclose(np.abs((unit - mean) @ basis), np.abs(u[:, :2] * s[:2]), atol=2e-3)


# --- the quick starts, as they are printed


def test_the_quick_start_of_a_dataset_runs_and_shows_what_it_printed(tmp_path: Path) -> None:
    folder = write_dataset_release(tmp_path / "r", sources=SOURCES)
    printed = record(folder)
    assert "first-aid" in printed[1]
    assert printed[1].endswith("torch.Size([13, 32])\n")
    first = printed[0].splitlines()
    assert first[0].endswith("'caption': 'a picture of knife'}")
    assert first[1:] == [
        "{'concept': 'knife', 'role': 'positive', 'rank': 0, 'dist': 1.0}",
        "{'concept_id': 'user:0', 'polarity': 'undesirable', 'n_positive': 3}",
    ]
    card = (folder / "README.md").read_text("utf-8")
    for block, output in zip(code_blocks(card), printed, strict=True):
        assert f"```python\n{block}```\n\nPrints:\n\n```text\n{output}```\n" in card
    assert check_release(folder) == []
    stage(folder)
    assert (folder / "README.md").read_text("utf-8") == card
    manifest = read_manifest(folder)  # output of other code is not shown
    manifest["facts"]["quick_start"][0]["code"] = "0" * 64
    write_manifest(folder, manifest)
    assert first[1] not in render(folder)


def test_what_code_printed_stays_inside_its_block(tmp_path: Path) -> None:
    block = 'print("x")\n'
    output = "a\x1b[31m ```\n````\n# no heading <b>\n"
    text = with_outputs(f"```python\n{block}```\nrest", {hashlib.sha256(block.encode()).hexdigest(): output})
    page = html(text)
    assert "<h1" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    assert page.count("<pre>") == 2
    assert page.rstrip().endswith("<p>rest</p>")


@pytest.mark.parametrize("inner", ["```\x00`", "```\u200e`", "``\x07``", "````"])
def test_no_output_ends_its_own_block(inner: str) -> None:
    block = escape.output(f"{inner}\n<script>alert(1)</script>\n# big")
    html = MarkdownIt("commonmark", {"html": True}).render(block)
    assert "<script" not in html
    assert "<h1" not in html


def test_code_that_a_model_printed_is_never_taken_for_the_quick_start(tmp_path: Path) -> None:
    folder = write_dataset_release(tmp_path / "release", sources=SOURCES)
    stage(folder)
    (block, *_) = blocks = code_blocks((folder / "README.md").read_text("utf-8"))
    printed = "I would run:\n```python\nopen('PWNED', 'w')\n```\n"
    manifest = read_manifest(folder)
    digest = hashlib.sha256(block.encode()).hexdigest()
    manifest["facts"]["quick_start"] = [{"code": digest, "output": printed}]
    write_manifest(folder, manifest)
    stage(folder)
    card = (folder / "README.md").read_text("utf-8")
    assert "open('PWNED', 'w')" in card
    assert code_blocks(card) == blocks


def test_what_a_killed_staging_left_is_taken_up(tmp_path: Path) -> None:
    folder = write_dataset_release(tmp_path / "release", sources=SOURCES)
    for name in ("README.md", "map.png", "manifest.json"):
        (folder / f".{name}.partial").write_bytes(b"half")
    stage(folder)
    assert not list(folder.rglob("*.partial"))
    assert check_release(folder) == []


def test_pictures_of_data_that_is_gone_are_taken_away(tmp_path: Path) -> None:
    folder = write_dataset_release(tmp_path / "release", sources=SOURCES)
    stage(folder)
    manifest = read_manifest(folder)
    (folder / "tuning.png").write_bytes(b"an older one")
    manifest["files"]["tuning.png"] = file_entry(folder / "tuning.png")
    write_manifest(folder, manifest)
    stage(folder)
    assert "tuning.png" not in read_manifest(folder)["files"]
    assert not (folder / "tuning.png").exists()
    assert "map.png" in read_manifest(folder)["files"]


ODD_FACTS: list[dict[str, Any]] = [
    {"quick_start": [1]},
    {"quick_start": {"a": 1}},
    {"yanked": ["v1"]},
    {"limits": 5},
]


@pytest.mark.parametrize("facts", ODD_FACTS)
def test_facts_of_another_form_are_named(tmp_path: Path, facts: dict[str, Any]) -> None:
    folder = write_dataset_release(tmp_path / "release", sources=SOURCES)
    manifest = read_manifest(folder)
    write_manifest(folder, manifest | {"facts": manifest["facts"] | facts})
    with pytest.raises(FormatError, match=r"facts"):
        stage(folder)


def test_a_quick_start_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dataset_release(tmp_path / "bare", recipe={})
    with pytest.raises(QuickStartError, match=r"expected a quick start in README\.md, got none"):
        record(folder)
    monkeypatch.setattr(release_fixture, "BASE", BASE | {"id": ""})
    with pytest.raises(QuickStartError, match="expected a base model that the quick start can load"):
        record(write_model_release(tmp_path / "model"))
    with (
        running(tmp_path) as hub,
        pytest.raises(QuickStartError, match=r"as printed fails: .*ZeroDivisionError"),
    ):
        run(["1 / 0\n"], hub.url, tmp_path / "home")


def test_the_quick_start_of_a_model_runs(
    local_hub: LocalHub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = tiny("llava", n_layers=BASE["n_layers"])
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    api = local_hub.api()
    api.create_repo(BASE["id"])
    commit = api.upload_folder(repo_id=BASE["id"], folder_path=tmp_path / "base").oid
    monkeypatch.setattr(release_fixture, "BASE", BASE | {"revision": commit})
    folder = write_model_release(tmp_path / "r")
    publish(folder, Target("org/daco-sae-tiny", "model", local_hub.url, WRITER))
    (code,) = code_blocks((folder / "README.md").read_text("utf-8"))
    (printed,) = run([f"{code}assert run.report().positions > 64\n"], local_hub.url, tmp_path / "home")
    assert "positions" in printed
    (again,) = record(folder, base=tmp_path / "base")
    assert again == printed
    assert printed.splitlines()[-2] in (folder / "README.md").read_text("utf-8")
