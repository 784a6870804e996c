"""The real clip-retrieval embeds, indexes and serves real images; our embeddings and links agree with its.

Runs with `make test-clip-retrieval`, which names its environment in CLIP_RETRIEVAL_BIN; images are the emoji
of DACO_TEST_DATA, or drawn ones without.
"""

import csv
import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import make_folder, tiny_recipe
from PIL import Image
from small_run import opened

from builders import clip, corpus, embeddings, stimuli, vocabulary
from builders.knn_service import Service, propose, recall, search_candidates
from builders.recipe import Recipe
from builders.retrieval import search
from builders.scores import Corpus
from builders.stages import done
from daco.tables import read_table

BIN = os.environ.get("CLIP_RETRIEVAL_BIN")
DATA = os.environ.get("DACO_TEST_DATA")
pytestmark = pytest.mark.skipif(not BIN, reason="CLIP_RETRIEVAL_BIN names no environment with clip-retrieval")

N_TARS, PER_TAR = 3, 100


def pairs(folder: Path) -> Iterator[tuple[bytes, str]]:
    """PNG bytes and captions."""
    if DATA:
        with (Path(DATA) / "emoji" / "index.tsv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                image = Path(DATA) / "emoji" / "images" / Path(row["file"]).name
                yield image.read_bytes(), f"{row['name']}, {row['keywords'].replace('|', ', ')}"
        return
    pictures = make_folder(folder / "pics", N_TARS * PER_TAR)
    for image in sorted(pictures.glob("*.png")):
        yield image.read_bytes(), image.with_suffix(".txt").read_text()


def write_tars(folder: Path) -> Path:
    """Tars as img2dataset writes them."""
    (folder / "tars").mkdir()
    source = pairs(folder)
    for number in range(N_TARS):
        with tarfile.open(folder / "tars" / f"{number:05d}.tar", "w") as tar:
            for i in range(PER_TAR):
                image, caption = next(source)
                key = f"{number:05d}{i:04d}"
                facts = json.dumps({"key": key, "url": f"https://example.org/{key}.png"})
                for ending, content in (("json", facts.encode()), ("png", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder / "tars"


def openai_tokenizer() -> Any:
    """CLIP's own tokenizer, from the vocabulary that clip-retrieval brings along."""
    found = next(Path(str(BIN)).parent.glob("lib/python*/site-packages/clip/bpe_simple_vocab_16e6.txt.gz"))
    merges = gzip.decompress(found.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = bytes_in_order()
    tokens = [*letters, *(f"{one}</w>" for one in letters), *("".join(line.split()) for line in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return clip.CLIPTokenizer(vocabulary, [tuple(line.split()) for line in merges], model_max_length=77)


def bytes_in_order() -> list[str]:
    """The letters that stand for bytes, in the order of OpenAI's `bytes_to_unicode`."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def save_clip(folder: Path) -> Path:
    """A small CLIP with random weights and CLIP's own tokenizer."""
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    config = clip.CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = clip.CLIPModel(config)
    with torch.no_grad():  # random towers answer all alike: spread them
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    images = clip.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    clip.CLIPProcessor(images, openai_tokenizer()).save_pretrained(folder)
    images.save_pretrained(folder)  # where the transformers of clip-retrieval looks
    return folder


def command(name: str, options: dict[str, Any]) -> list[str]:
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [str(Path(str(BIN)) / "clip-retrieval"), name, *flags]


def call(name: str, options: dict[str, Any]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        command(name, options), capture_output=True, text=True, env=environment, timeout=900
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars, a CLIP, and what clip-retrieval made of them: `emb` and `index`."""
    folder = tmp_path_factory.mktemp("clip-retrieval")
    tars, model = write_tars(folder), save_clip(folder / "clip")
    inference = {
        "input_dataset": f"{tars}/{{00000..{N_TARS - 1:05d}}}.tar",
        "input_format": "webdataset",
        "wds_image_key": "png",
        "output_folder": folder / "emb",
        "clip_model": f"hf_clip:{model}",
        "enable_wandb": False,
        "enable_metadata": True,
        "num_prepro_workers": 1,
        "batch_size": 32,
        "wds_number_file_per_input_file": PER_TAR,
        "write_batch_size": PER_TAR,
    }
    call("inference", inference)
    index = {"embeddings_folder": folder / "emb", "index_folder": folder / "index", "nb_cores": 1}
    call("index", index | {"max_index_memory_usage": "100M", "current_memory_available": "1G"})
    return folder


def recipe_of(made: Path, **more: Any) -> Recipe:
    sections = {
        "corpus": {"kind": "webdataset", "name": "cc"},
        "clip": {"model": str(made / "clip")},
        "embeddings": {"path": str(made / "emb")},
        "concepts": {"min_count": 3, "max_concepts": 60},
        "stimuli": {"n_positive": 5, "min_positive": 1, "pool": 100, **more},
    }
    return tiny_recipe(made / "tars", **sections)


def run_stages(recipe: Recipe, out: Path) -> Path:
    for stage, module in (("corpus", corpus), ("concepts", vocabulary), ("clip", clip),
                          ("embeddings", embeddings), ("stimuli", stimuli)):  # fmt: skip
        module.run(opened(recipe, out, stage))
    return out


@pytest.fixture(scope="module")
def ours(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that reads clip-retrieval's embeddings and searches all of them."""
    return run_stages(recipe_of(made), tmp_path_factory.mktemp("ours"))


def test_its_embeddings_are_ours(made: Path, ours: Path) -> None:
    assert len(list((made / "emb" / "img_emb").iterdir())) > 1
    assert done(ours, "embeddings")["counts"] == {"in": 300, "out": 300, "skipped": {}}
    found = embeddings.load_embeddings(ours / "embeddings")
    rows = {row["stimulus_id"]: row for row in read_table(ours / "corpus" / "stimuli.parquet").to_pylist()}
    mine = clip.load_clip(made / "clip")
    # OpenAI's tokenizer straightens curly quotes first, that of transformers does not: other tokens.
    chosen = [i for i in range(0, 300, 7) if rows[found.ids[i]]["caption"].isascii()]
    assert len(chosen) > 25
    files = [corpus.image_file(ours / "corpus", rows[found.ids[i]]["file"]) for i in chosen]
    captions = [rows[found.ids[i]]["caption"] for i in chosen]
    images, texts, _ = embeddings.embed_pairs(mine, files, captions, 16)
    np.testing.assert_allclose(found.images[chosen], images, atol=4e-3)
    np.testing.assert_allclose(found.texts[chosen], texts, atol=4e-3)
    assert np.ptp(images.astype(float), axis=0).max() > 0.1  # the comparison means something


@pytest.fixture(scope="module")
def service(made: Path) -> Iterator[str]:
    """A running `clip-retrieval back`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (made / "indices.json").write_text(json.dumps({"emoji": str(made / "index")}))
    options = {
        "indices_paths": made / "indices.json",
        "port": port,
        "enable_mclip_option": False,
        "use_jit": False,
        "provide_aesthetic_embeddings": False,
        "clip_model": f"hf_clip:{made / 'clip'}",
    }
    log = (made / "back.log").open("w")
    process = subprocess.Popen(command("back", options), stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/indices-list", timeout=2).read()
                break
            except OSError:
                assert process.poll() is None, (made / "back.log").read_text()[-4000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_its_service_proposes_what_the_exact_search_finds(made: Path, ours: Path, service: str) -> None:
    found = embeddings.load_embeddings(ours / "embeddings")
    queries = stimuli.embed_concepts(
        clip.load_clip(made / "clip"),
        [row["concept"] for row in read_table(ours / "concepts" / "concepts.parquet").to_pylist()],
        "{concept}",
    )
    everything = Corpus.of(found.images, found.texts, found.ids)
    exact = search(queries, everything, 5).nearest
    assert found.source_rows is not None
    rows = np.argsort(found.source_rows)
    shares = {}
    for n in (10, 50, 300):
        proposed = propose(Service(service, "emoji", n), queries, rows)
        shares[n] = recall(search_candidates(queries, everything, 5, proposed), exact)
    print(f"recall of the 5 nearest among 300 by number proposed: {shares}")
    assert shares[10] <= shares[50] <= shares[300]
    assert shares[300] > 0.95
    assert any(image.size for image in exact.rows)


def test_the_stage_links_alike_through_the_service(
    made: Path, ours: Path, service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(made, service=service, index="emoji", proposals=300)
    out = run_stages(recipe, tmp_path / "run")
    exact, served = (read_table(folder / "stimuli" / "links.parquet").to_pandas() for folder in (ours, out))
    same = served.merge(exact, on=["concept_id", "stimulus_id", "role"])
    assert len(same) > 0.95 * len(exact)
    np.testing.assert_allclose(same["dist_x"], same["dist_y"])
    told = re.search(
        r"stimuli.service found (\d+) % of the exact answers of (\d+) concepts", capsys.readouterr().err
    )
    assert told
    assert int(told[1]) > 95
    assert (
        int(told[2]) == recipe.stimuli.block
    )  # the first block's, of which there are fewer than are checked


def test_images_open_from_the_tars(ours: Path) -> None:
    row = read_table(ours / "corpus" / "stimuli.parquet").to_pylist()[7]
    assert isinstance(corpus.open_image(corpus.image_file(ours / "corpus", row["file"])), Image.Image)
