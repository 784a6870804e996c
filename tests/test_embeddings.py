"""Embeddings are unit float16 rows in corpus order, resume alike, and join from clip-retrieval's folders."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pictures import make_folder, tiny_recipe
from small_run import Killed, digests, opened

from builders import clip, corpus, embeddings
from builders.embeddings import METADATA, Join, clip_retrieval_parts, load_embeddings, unit_half
from builders.recipe import Recipe
from builders.stages import done
from daco.errors import ActivationError, CorpusError, FormatError, IntegrityError
from daco.tables import read_table, table_of, write_table


def until_clip(pictures: Path, out: Path, **sections: dict) -> Recipe:
    recipe = tiny_recipe(pictures, **{"clip": {"steps": 1}, **sections})
    corpus.run(opened(recipe, out, "corpus"))
    clip.run(opened(recipe, out, "clip"))
    return recipe


def test_rows_are_unit_and_in_corpus_order_and_a_lost_image_is_counted(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 24)
    out = tmp_path / "run"
    recipe = until_clip(pictures, out)
    (pictures / "010.png").unlink()
    embeddings.run(opened(recipe, out, "embeddings"))
    found = load_embeddings(out / "embeddings")
    stimuli = read_table(out / "corpus" / "stimuli.parquet").to_pylist()
    assert found.ids == [row["stimulus_id"] for row in stimuli if row["source_key"] != "010.png"]
    assert found.images.shape == found.texts.shape == (23, 32)
    assert found.images.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(np.float32(found.texts), axis=1), 1, atol=2e-3)
    assert done(out, "embeddings")["counts"] == {"in": 24, "out": 23, "skipped": {"unreadable_image": 1}}
    model = clip.load_clip(out / "clip" / "model")
    last = stimuli[-1]
    np.testing.assert_allclose(found.texts[-1], model.embed_texts([last["caption"]]).numpy()[0], atol=1e-3)
    image = corpus.open_image(out / "corpus" / last["file"])
    np.testing.assert_allclose(found.images[-1], model.embed_images([image]).numpy()[0], atol=1e-3)


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 24)
    recipe = until_clip(pictures, tmp_path / "whole")
    until_clip(pictures, tmp_path / "killed")
    embeddings.run(opened(recipe, tmp_path / "whole", "embeddings"))
    with pytest.raises(Killed):
        embeddings.run(opened(recipe, tmp_path / "killed", "embeddings", killed_at=1))
    work = opened(recipe, tmp_path / "killed", "embeddings")
    assert len(work.shards()) == 1
    embeddings.run(work)
    assert digests(tmp_path / "killed" / "embeddings") == digests(tmp_path / "whole" / "embeddings")


# Folders that clip-retrieval wrote.


def write_part(folder: Path, number: str, rows: np.ndarray, metadata: dict) -> None:
    for kind, array in (("img_emb", rows), ("text_emb", rows[:, ::-1])):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        np.save(folder / kind / f"{kind}_{number}.npy", array.astype(np.float16))
    (folder / "metadata").mkdir(exist_ok=True)
    pd.DataFrame(metadata).to_parquet(folder / "metadata" / f"metadata_{number}.parquet")


def random_rows(n: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, 7))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_clip_retrieval_folder_is_joined_and_rows_of_other_pairs_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "CHUNK", 4)
    pictures = make_folder(tmp_path / "pics", 12)
    out, folder = tmp_path / "run", tmp_path / "emb"
    recipe = tiny_recipe(pictures, embeddings={"path": str(folder)})
    corpus.run(opened(recipe, out, "corpus"))
    captions = [(pictures / f"{i:03d}.txt").read_text().strip() for i in range(12)]
    rows = random_rows(6)
    names = [f"/elsewhere/{name}.png" for name in ("005", "000", "001", "099", "002", "003")]
    told = [captions[5], captions[0], captions[1], "x", captions[2], "another caption"]
    write_part(folder, "0", rows, {"image_path": names, "caption": told})
    more = random_rows(2, seed=1)
    write_part(
        folder, "10", more, {"image_path": ["a/005.png", "a/007.png"], "caption": [captions[5], captions[7]]}
    )
    embeddings.run(opened(recipe, out, "embeddings"))
    table = read_table(out / "corpus" / "stimuli.parquet").to_pylist()
    found = load_embeddings(out / "embeddings")
    assert found.ids == [table[i]["stimulus_id"] for i in (5, 0, 1, 2, 7)]
    kept = np.float16([*rows[[0, 1, 2, 4]], more[1]])
    np.testing.assert_array_equal(found.images, unit_half(kept))
    np.testing.assert_array_equal(found.texts, unit_half(kept[:, ::-1]))
    counts = done(out, "embeddings")["counts"]
    assert counts["skipped"] == {"unknown_row": 1, "other_caption": 1, "duplicate_row": 1}


def spoilt(folder: Path, what: str) -> None:
    """Three good parts, one of them spoilt."""
    for number in ("0", "1", "2"):
        metadata = {"key": ["p", "q", "r"], "caption": ["1", "2", "3"]}
        write_part(folder, number, random_rows(3), metadata)
    image, text = (folder / kind / f"{kind}_1.npy" for kind in ("img_emb", "text_emb"))
    if what == "truncated":
        text.write_bytes(text.read_bytes()[:-5])
    elif what == "no array":
        image.write_bytes(b"\x93NUMPY half")
    elif what == "shorter":
        np.save(image, np.load(image)[:2])
    elif what == "nan":
        rows = np.load(text)
        rows[2, 3] = np.nan
        np.save(text, rows)
    elif what == "zero":
        np.save(image, np.load(image) * np.float16([[1], [0], [1]]))
    elif what == "width":
        write_part(folder, "1", random_rows(3)[:, :5], {"key": ["p", "q", "r"], "caption": ["1", "2", "3"]})
    elif what == "captions":
        pd.DataFrame({"key": ["p", "q", "r"]}).to_parquet(folder / "metadata" / "metadata_1.parquet")
    elif what == "metadata":
        (folder / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize(
    ("what", "error", "told"),
    [
        ("truncated", IntegrityError, r"text_emb_1.npy: expected a whole .npy file"),
        ("no array", IntegrityError, r"img_emb_1.npy: expected a whole .npy file"),
        (
            "shorter",
            FormatError,
            r"metadata_1.parquet: expected 3 rows .* got \[2, 7\] in img_emb_1.npy",
        ),
        ("nan", FormatError, r"text_emb_1.npy, row 2: expected an embedding, got NaN or infinity"),
        ("zero", FormatError, r"img_emb_1.npy, row 1: expected an embedding, got norm 0"),
        ("width", FormatError, r"img_emb_1.npy: expected rows of width 7, as the parts before, got 5"),
        ("captions", FormatError, r"metadata_1.parquet: expected column 'caption', got \['key'\]"),
        ("metadata", IntegrityError, r"metadata_1.parquet: expected a parquet file"),
    ],
)
def test_what_is_wrong_in_a_clip_retrieval_folder_is_named_by_file_and_row(
    tmp_path: Path, what: str, error: type[Exception], told: str
) -> None:
    recipe = tiny_recipe(make_folder(tmp_path / "pics", 3), embeddings={"path": str(tmp_path / "emb")})
    corpus.run(opened(recipe, tmp_path / "run", "corpus"))
    spoilt(tmp_path / "emb", what)
    with pytest.raises(error, match=told):
        embeddings.run(opened(recipe, tmp_path / "run", "embeddings"))


def test_rows_join_by_id_key_or_caption_and_never_by_guess() -> None:
    join = Join(
        pa.Table.from_pylist(
            [
                {"stimulus_id": "i0", "caption": "one", "source_key": "a/x.png#1", "file": "/p/a/x.png"},
                {"stimulus_id": "i1", "caption": "two", "source_key": "a/x.png#2", "file": "/p/a/x.png"},
                {"stimulus_id": "i2", "caption": "one", "source_key": "000000017", "file": "images/i2.jpeg"},
            ]
        )
    )
    assert join.find({"stimulus_id": "i1"}) == 1
    assert join.find({"image_path": "/other/x.png", "caption": "two\n"}) == 1
    assert join.find({"key": "000000017", "caption": "one"}) == 2
    assert join.find({"key": "000000017"}) == 2
    assert join.find({"image_path": "x.png"}) == "ambiguous_row"
    assert join.find({"caption": "two"}) == 1
    assert join.find({"caption": "one"}) == "ambiguous_row"
    assert join.find({"key": "no", "caption": "two"}) == "unknown_row"


def test_parts_are_read_by_number_and_must_be_whole(tmp_path: Path) -> None:
    for number in ("10", "9", "0"):
        write_part(tmp_path, number, random_rows(1), {"key": ["x"]})
    assert [part[2].stem for part in clip_retrieval_parts(tmp_path)] == [
        "metadata_0",
        "metadata_9",
        "metadata_10",
    ]
    (tmp_path / "text_emb" / "text_emb_9.npy").unlink()
    with pytest.raises(CorpusError, match=r"expected \['text_emb_9.npy'\], got none"):
        clip_retrieval_parts(tmp_path)
    with pytest.raises(CorpusError, match="expected a clip-retrieval folder"):
        clip_retrieval_parts(tmp_path / "nowhere")


def test_embeddings_of_another_corpus_are_an_error(tmp_path: Path) -> None:
    recipe = tiny_recipe(make_folder(tmp_path / "pics", 3), embeddings={"path": str(tmp_path / "emb")})
    corpus.run(opened(recipe, tmp_path / "run", "corpus"))
    write_part(tmp_path / "emb", "0", random_rows(2), {"key": ["p", "q"], "caption": ["a", "b"]})
    with pytest.raises(ActivationError, match=r"expected embeddings of 3 pairs, got none .*unknown_row': 2"):
        embeddings.run(opened(recipe, tmp_path / "run", "embeddings"))


def test_arrays_that_do_not_fit_their_metadata_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path, "0", random_rows(3), {})
    rows = [{"stimulus_id": name, "caption": ""} for name in "ab"]
    write_table(tmp_path / "metadata" / "metadata_0.parquet", table_of(rows, METADATA))
    with pytest.raises(FormatError, match=r"as many image and text rows as metadata rows \(2\), got 3 and 3"):
        load_embeddings(tmp_path)
    (tmp_path / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError):
        load_embeddings(tmp_path)
