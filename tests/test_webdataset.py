"""Tars of img2dataset are read where they are: same rows as files, no pixels copied, broken tars named."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import make_folder, tiny_recipe
from small_run import Killed, digests, opened

from builders import clip, corpus, embeddings
from builders.corpus import image_file, open_image, read_image
from builders.stages import done
from builders.webdataset import read_member
from daco.errors import CorpusError
from daco.tables import read_table


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(folder: Path, pictures: Path, n: int = 12, a_tar: int = 5) -> Path:
    """Pictures as img2dataset lays them out: five samples a tar, keys that rise."""
    folder.mkdir(exist_ok=True)
    for start in range(0, n, a_tar):
        with tarfile.open(folder / f"{start // a_tar:05d}.tar", "w") as tar:
            for i in range(start, min(start + a_tar, n)):
                facts = {"url": f"https://example.org/{i}.png", "key": f"{i:09d}", "status": "success"}
                add(tar, f"{i:09d}.json", json.dumps(facts).encode())
                add(tar, f"{i:09d}.png", (pictures / f"{i:03d}.png").read_bytes())
                add(tar, f"{i:09d}.txt", (pictures / f"{i:03d}.txt").read_bytes())
    return folder


def test_rows_have_url_key_digest_and_size_and_no_pixels_are_copied(tmp_path: Path) -> None:
    pictures = make_folder(tmp_path / "pics", 12)
    tars = write_tars(tmp_path / "tars", pictures)
    recipe = tiny_recipe(tars, corpus={"kind": "webdataset", "name": "cc"})
    corpus.run(opened(recipe, tmp_path / "run", "corpus"))
    rows = read_table(tmp_path / "run" / "corpus" / "stimuli.parquet").to_pylist()
    assert [row["source_key"] for row in rows] == [f"{i:09d}" for i in range(12)]
    content = (pictures / "007.png").read_bytes()
    row = rows[7]
    assert row["image_url"] == "https://example.org/7.png"
    assert row["image_sha256"] == hashlib.sha256(content).hexdigest()
    assert (row["width"], row["height"], row["caption"]) == (20, 9, "knife, orange, thing 7")
    assert not list((tmp_path / "run" / "corpus" / "images").iterdir())
    file = image_file(tmp_path / "run" / "corpus", row["file"])
    assert read_image(file) == content
    assert open_image(file).size == (20, 9)
    assert file.suffix == ".png"


def test_a_clip_embeds_from_tars_and_a_killed_stage_ends_with_the_same_bytes(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", make_folder(tmp_path / "pics", 12))
    recipe = tiny_recipe(tars, corpus={"kind": "webdataset", "name": "cc"}, clip={"steps": 1})
    for out in (tmp_path / "whole", tmp_path / "killed"):
        if out.name == "killed":
            with pytest.raises(Killed):
                corpus.run(opened(recipe, out, "corpus", killed_at=9))
        corpus.run(opened(recipe, out, "corpus"))
        clip.run(opened(recipe, out, "clip"))
        embeddings.run(opened(recipe, out, "embeddings"))
    assert digests(tmp_path / "killed" / "embeddings") == digests(tmp_path / "whole" / "embeddings")
    assert done(tmp_path / "whole", "embeddings")["counts"]["out"] == 12


def test_what_a_sample_lacks_is_counted(tmp_path: Path) -> None:
    content = (make_folder(tmp_path / "pics", 1) / "000.png").read_bytes()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        add(tar, "a.png", content)
        add(tar, "b.txt", b"no image")
        add(tar, "c.json", b"{broken")
        add(tar, "c.png", content)
        add(tar, "c.txt", b"fine")
        add(tar, "d.png", content)
        add(tar, "d.json", json.dumps({"caption": "in json"}).encode())
        add(tar, "e.PNG", b"no picture")
        add(tar, "e.txt", b"caption")
        link = tarfile.TarInfo("f.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "f.txt", b"a link")
    recipe = tiny_recipe(tmp_path / "tars", corpus={"kind": "webdataset"})
    corpus.run(opened(recipe, tmp_path / "run", "corpus"))
    rows = read_table(tmp_path / "run" / "corpus" / "stimuli.parquet").to_pylist()
    assert [(row["source_key"], row["caption"]) for row in rows] == [("c", "fine"), ("d", "in json")]
    skipped = done(tmp_path / "run", "corpus")["counts"]["skipped"]
    assert skipped == {"missing_caption": 1, "missing_image": 2, "unreadable_image": 1}


def test_a_tar_that_ends_early_is_named(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", make_folder(tmp_path / "pics", 3), n=3)
    tar = tars / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:2300])
    recipe = tiny_recipe(tars, corpus={"kind": "webdataset"})
    with pytest.raises(CorpusError, match=r"00000.tar: expected a whole uncompressed tar"):
        corpus.run(opened(recipe, tmp_path / "run", "corpus"))
    with pytest.raises(CorpusError, match=r"expected a folder with \*.tar, or a tar"):
        corpus.check(tiny_recipe(tmp_path / "pics", corpus={"kind": "webdataset"}))


def test_a_table_cannot_name_a_tar_outside_its_folder(tmp_path: Path) -> None:
    write_tars(tmp_path / "secret", make_folder(tmp_path / "pics", 1), n=1)
    place = tmp_path / "secret" / "00000.tar#512+1.png"
    assert read_member(place) is not None
    (tmp_path / "open").mkdir()
    table = pa.Table.from_pylist(
        [{"image": str(place), "caption": "c"}, {"image": "../secret/00000.tar#0+9.png", "caption": "c"}]
    )
    pq.write_table(table, tmp_path / "open" / "t.parquet")
    recipe = tiny_recipe(tmp_path, corpus={"kind": "table", "path": str(tmp_path / "open" / "t.parquet")})
    with pytest.raises(CorpusError, match=r"outside_folder': 2"):
        corpus.run(opened(recipe, tmp_path / "run", "corpus"))
