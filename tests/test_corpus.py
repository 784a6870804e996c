"""Every reader yields the same rows, bad rows are counted and never fatal, ids and bytes are stable."""

import csv
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import make_folder, save_picture, tiny_recipe
from PIL import Image
from small_run import Killed, digests, opened

from builders import corpus
from builders.corpus import Pair, check_pair, clean_caption, open_image, read_pairs, stimulus_id
from builders.pipeline import run
from builders.recipe import CorpusConfig, Recipe
from builders.stages import done
from daco.errors import CorpusError
from daco.tables import read_table

DATA = os.environ.get("DACO_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="DACO_TEST_DATA names no folder of real data")


def run_corpus(out: Path, pictures: Path, **fields: object) -> tuple[list[dict], dict]:
    corpus.run(opened(tiny_recipe(pictures, corpus=fields), out, "corpus"))
    return read_table(out / "corpus" / "stimuli.parquet").to_pylist(), done(out, "corpus")["counts"]


def test_a_folder_gives_one_row_a_pair_with_stable_ids(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 9)
    rows, counts = run_corpus(tmp_path / "run", pictures)
    assert counts == {"in": 9, "out": 9, "skipped": {}}
    first = rows[0]
    assert first["stimulus_id"] == hashlib.sha256(b"pics\x00000.png").hexdigest()[:16]
    assert first["caption"] == "knife, red, thing 0"
    assert first["image_sha256"] == hashlib.sha256((pictures / "000.png").read_bytes()).hexdigest()
    assert (first["width"], first["height"], first["source_key"]) == (13, 9, "000.png")
    assert (tmp_path / "run" / "corpus" / first["file"]).samefile(pictures / "000.png")


def test_bad_rows_are_counted_by_reason(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 8)
    (pictures / "000.png").write_bytes(b"no image")
    (pictures / "001.png").write_bytes((pictures / "001.png").read_bytes()[:60])  # truncated
    (pictures / "002.txt").write_text(" \n\t\x00")
    (pictures / "003.txt").unlink()
    (pictures / "004.png").unlink()
    for suffix in ("png", "txt"):
        (pictures / f"copy.{suffix}").write_bytes((pictures / f"007.{suffix}").read_bytes())
    rows, counts = run_corpus(tmp_path / "run", pictures)
    assert counts["skipped"] == {
        "unreadable_image": 2,
        "empty_caption": 1,
        "missing_caption": 1,
        "missing_image": 1,
        "duplicate_pair": 1,
    }
    assert [row["source_key"] for row in rows] == ["005.png", "006.png", "007.png"]
    assert counts["in"] == counts["out"] + sum(counts["skipped"].values())


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 24)
    run_corpus(tmp_path / "whole", pictures)
    recipe = tiny_recipe(pictures)
    with pytest.raises(Killed):
        corpus.run(opened(recipe, tmp_path / "killed", "corpus", killed_at=16))
    work = opened(recipe, tmp_path / "killed", "corpus")
    assert [path.name for path in work.shards()] == ["000000", "000001"]
    corpus.run(work)
    assert digests(tmp_path / "killed" / "corpus") == digests(tmp_path / "whole" / "corpus")


def test_no_usable_row_is_an_error_that_says_what_was_tried(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 2)
    for image in pictures.glob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(CorpusError, match=r"none in 2 rows of corpus.kind 'folder'.*unreadable_image': 2"):
        run_corpus(tmp_path / "run", pictures)
    with pytest.raises(CorpusError, match="expected a folder"):
        run_corpus(tmp_path / "run2", tmp_path / "nowhere")


def write_tsv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["tsv", "csv", "parquet"])
def test_a_table_reads_alike_in_every_format(tmp_path: Path, ending: str) -> None:
    make_folder(tmp_path / "pics", 3)
    rows = [{"file": f"00{i}.png", "name": f"n{i}", "tags": "a|b", "u": f"http://x/{i}"} for i in range(3)]
    path = tmp_path / f"index.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "csv":
        path.write_text("file,name,tags,u\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        write_tsv(path, rows)
    fields = {
        "kind": "table",
        "path": str(path),
        "images": str(tmp_path / "pics"),
        "image_column": "file",
        "caption_columns": ["name", "tags"],
        "caption_separator": "|",
        "url_column": "u",
    }
    found, counts = run_corpus(tmp_path / "run", tmp_path, **fields)
    assert [row["caption"] for row in found] == ["n0, a, b", "n1, a, b", "n2, a, b"]
    assert [row["image_url"] for row in found] == ["http://x/0", "http://x/1", "http://x/2"]
    assert found[2]["source_key"] == "002.png"
    assert counts["out"] == 3


def test_a_table_cannot_reach_outside_the_images_folder(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 2)
    secret = save_picture(tmp_path / "secret.png", "red")
    (pictures / "link.png").symlink_to(secret)
    names = ["../secret.png", str(secret), "link.png", "sub/../000.png", "no.png", "a\0b", "", "x" * 5000]
    rows = [{"image": name, "caption": "c"} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), pictures / "t.parquet")
    found, counts = run_corpus(tmp_path / "run", tmp_path, kind="table", path=str(pictures / "t.parquet"))
    assert counts["skipped"] == {"outside_folder": 3, "missing_image": 3, "bad_key": 1}
    assert [row["source_key"] for row in found] == ["sub/../000.png"]


def test_a_table_without_a_column_names_it_and_those_it_has(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "t.tsv", [{"image": "a.png", "text": "x"}])
    with pytest.raises(CorpusError, match=r"expected column 'caption', got \['image', 'text'\]"):
        list(read_pairs(CorpusConfig(kind="table", path=str(path))))
    with pytest.raises(CorpusError, match="expected a table at"):
        list(read_pairs(CorpusConfig(kind="table", path=str(tmp_path / "no.tsv"))))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(CorpusError, match="expected parquet"):
        list(read_pairs(CorpusConfig(kind="table", path=str(tmp_path / "t.parquet"))))


def test_coco_gives_a_pair_a_caption_and_counts_images_that_are_not_there(tmp_path: Path) -> None:
    make_folder(tmp_path / "pics", 1)
    content = {
        "images": [
            {"id": 5, "file_name": "000.png", "coco_url": "http://c/5", "flickr_url": "http://f/5"},
            {"id": 6, "file_name": "gone.png"},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "caption": "A red  thing.\n"},
            {"id": 2, "image_id": 5, "caption": "A knife."},
            {"id": 3, "image_id": 6, "caption": "Gone."},
            {"id": 4, "image_id": 7, "caption": "No image."},
            {"id": 8, "image_id": 5, "caption": None},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    fields = {"kind": "coco", "path": str(tmp_path / "captions.json"), "images": str(tmp_path / "pics")}
    rows, counts = run_corpus(tmp_path / "run", tmp_path, **fields, url_column="flickr_url")
    assert [(row["source_key"], row["caption"]) for row in rows] == [
        ("000.png#1", "A red thing."),
        ("000.png#2", "A knife."),
    ]
    assert rows[0]["image_url"] == "http://f/5"
    assert counts["skipped"] == {"missing_image": 2, "empty_caption": 1}
    (tmp_path / "captions.json").write_text("[1]")
    with pytest.raises(CorpusError, match="expected COCO captions"):
        run_corpus(tmp_path / "run2", tmp_path, **fields)


def test_a_data_set_is_streamed_and_its_images_are_kept_as_they_were(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = make_folder(tmp_path / "pics", 3)
    cells = [str(pictures / f"00{i}.png") for i in range(3)]
    table = datasets.Dataset.from_dict({"image": cells, "caption": ["a", "b", ""], "id": ["x", "y", "z"]})
    table = table.cast_column("image", datasets.Image())
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    fields = {"kind": "dataset", "path": str(tmp_path / "set"), "key_column": "id", "name": "set"}
    rows, counts = run_corpus(tmp_path / "run", tmp_path, **fields)
    assert counts == {"in": 3, "out": 2, "skipped": {"empty_caption": 1}}
    assert rows[0]["file"] == f"images/{stimulus_id('set', 'x')}.png"
    stored = tmp_path / "run" / "corpus" / rows[0]["file"]
    assert stored.read_bytes() == (pictures / "000.png").read_bytes()
    with pytest.raises(CorpusError, match="expected column 'text'"):
        run_corpus(tmp_path / "run2", tmp_path, **fields, caption_columns=["caption", "text"])


def test_toy_world_pairs_are_stored_and_a_smaller_corpus_is_its_beginning(tmp_path: Path) -> None:
    rows, _ = run_corpus(tmp_path / "run", tmp_path, kind="toyworld", rows=9)
    fewer, _ = run_corpus(tmp_path / "less", tmp_path, kind="toyworld", rows=4)
    assert rows[:4] == fewer
    assert len(list((tmp_path / "run" / "corpus" / "images").iterdir())) == 9
    assert open_image(tmp_path / "run" / "corpus" / rows[0]["file"]).size == (64, 64)


def test_images_of_dropped_pairs_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = corpus.png_bytes(Image.new("RGB", (5, 7)))
    pairs = [Pair(key, "same", lambda: image) for key in ("a", "b", "a")]
    monkeypatch.setattr(corpus, "read_pairs", lambda config, seed: iter(pairs))
    with pytest.warns(UserWarning, match="1 of 3 rows have a key that an earlier row has"):
        rows, counts = run_corpus(tmp_path / "run", tmp_path, kind="toyworld", name="s")
    assert counts["skipped"] == {"duplicate_id": 1, "duplicate_pair": 1}
    assert [p.name for p in (tmp_path / "run" / "corpus" / "images").iterdir()] == [
        Path(rows[0]["file"]).name
    ]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  two\n\tlines\x00 ", "two lines"),
        ("a\u2028b\x1b[31m", "a b [31m"),
        ("lone \ud83d surrogate", "lone surrogate"),
        ("<|endoftext|> {{x}} <script>", "<|endoftext|> {{x}} <script>"),
        ("family 👨\u200d👩\u200d👧", "family 👨\u200d👩\u200d👧"),
        (None, ""),
    ],
)
def test_captions_keep_everything_but_blanks_and_control_characters(text: object, clean: str) -> None:
    assert clean_caption(text) == clean


def test_transparency_is_laid_on_white_and_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    pair = Pair("k", "caption", tmp_path / "clear.png")
    assert check_pair(pair, "s", tmp_path, tmp_path / "images") == "unreadable_image"


def with_corpus(recipe: Recipe, **fields: object) -> Recipe:
    return dataclasses.replace(recipe, corpus=dataclasses.replace(recipe.corpus, **fields))


def test_licence_facts_make_no_stage_run_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(make_folder(tmp_path / "pics", 9), clip={"steps": 1})
    assert run(recipe, tmp_path / "run", until="clip") == ["corpus", "concepts", "clip"]
    told = {"licence": "cc-by-nd-4.0", "url": "https://example.org", "redistribute_images": True}
    allowed = with_corpus(recipe, **told, allowed=True)
    assert run(allowed, tmp_path / "run", until="clip") == []
    assert corpus.source_facts(allowed.corpus).items() >= {**told, "allowed": True}.items()
    assert "allowed" not in corpus.source_facts(recipe.corpus)
    assert run(with_corpus(recipe, rows=8), tmp_path / "run", until="corpus") == ["corpus"]


def test_a_forgotten_path_does_not_discard_the_corpus_that_is_there(tmp_path: Path) -> None:
    recipe = tiny_recipe(make_folder(tmp_path / "pics", 9))
    run(recipe, tmp_path / "run", until="corpus")
    before = digests(tmp_path / "run" / "corpus")
    with pytest.raises(CorpusError, match="expected a folder of images and captions, got ''"):
        run(with_corpus(recipe, path=""), tmp_path / "run", until="corpus")
    assert digests(tmp_path / "run" / "corpus") == before


@needs_data
def test_real_coco_photographs_join_on_file_name(tmp_path: Path) -> None:
    photos = Path(str(DATA)) / "photos"
    fields = {"kind": "coco", "path": str(photos / "annotations" / "captions_val2017.json"), "rows": 120}
    rows, counts = run_corpus(tmp_path / "run", tmp_path, **fields, images=str(photos / "val2017"))
    assert counts["in"] == 120
    assert counts["out"] + counts["skipped"]["missing_image"] == 120
    assert {row["source"] for row in rows} == {"pics"}
