"""Proves that each reason not to publish a release is found, and told with what, where and what to do."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from release_fixture import N_STIMULI, RECIPE, SOURCES, write_dataset_release, write_model_release
from safetensors import safe_open
from safetensors.numpy import load_file, save

from daco.manifest import (
    FORMAT_VERSION,
    canonical_json,
    file_entry,
    read_manifest,
    sha256_file,
    write_manifest,
)
from hub.gate import check_release
from hub.plan import Refusal
from hub.stage import stage


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
IMAGES = pa.array([{"bytes": PNG, "path": "x.png"}] * N_STIMULI)
MAY = [SOURCES[0] | {"redistribute_images": True}]
TOKEN = "hf_" + "aB3" * 12
STIMULI = "data/stimuli/train-00000-of-00001.parquet"


def staged(folder: Path) -> Path:
    stage(folder)
    return folder


def dataset(folder: Path, **facts: Any) -> Path:
    return staged(write_dataset_release(folder, **facts))


def model(folder: Path, **facts: Any) -> Path:
    return staged(write_model_release(folder, **facts))


def rewrite(folder: Path, name: str, content: bytes | str) -> Path:
    """Change a file and make the manifest agree with it."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    manifest = read_manifest(folder)
    manifest["files"][name] = manifest["files"].get(name, {}) | file_entry(folder / name)
    write_manifest(folder, manifest)
    return folder


def card(folder: Path, old: str, new: str) -> Path:
    """Change the text of a card."""
    text = (folder / "README.md").read_text("utf-8")
    assert old in text
    return rewrite(folder, "README.md", text.replace(old, new, 1))


def manifest_of(folder: Path, **changes: Any) -> Path:
    """Change the manifest without looking."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8")) | changes
    (folder / "manifest.json").write_text(canonical_json(manifest), "utf-8")
    return folder


def without_release(**changes: Any) -> dict[str, Any]:
    return RECIPE | {"release": {**RECIPE["release"], **changes}}


def unlink(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder


def symlink(folder: Path) -> Path:
    target = folder / "evaluation.json"
    target.rename(folder.with_name("elsewhere.json"))
    target.symlink_to(folder.with_name("elsewhere.json"))
    return folder


def damaged(folder: Path, at: int) -> Path:
    """A table with 16 bytes overwritten, which the manifest agrees with."""
    content = bytearray((folder / STIMULI).read_bytes())
    at %= len(content)
    content[at : at + 16] = b"\xff" * 16
    return rewrite(folder, STIMULI, bytes(content))


def infinite(folder: Path) -> Path:
    """Weights that are finite and whose products are not."""
    path = folder / "layers.1" / "steering.safetensors"
    weights = load_file(folder / "layers.1" / "sae_weights.safetensors")
    weights["W_dec"] = np.full_like(weights["W_dec"], 3e38)
    weights["b_enc"] = np.full_like(weights["b_enc"], 3e38)
    rewrite(folder, "layers.1/sae_weights.safetensors", save(weights))
    tensors = load_file(path)
    ids = tensors["atom_ids"]
    tensors |= {"W_dec_rows": weights["W_dec"][ids], "b_enc": weights["b_enc"][ids]}
    with safe_open(path, "numpy") as file:
        said = file.metadata() | {
            "sae_weights_sha256": sha256_file(folder / "layers.1/sae_weights.safetensors")
        }
    return rewrite(folder, "layers.1/steering.safetensors", save(tensors, said))


def extra_column(folder: Path) -> Path:
    """A column that the manifest does not tell of."""
    table = pq.read_table(folder / STIMULI).replace_schema_metadata(None)
    pq.write_table(table.append_column("mood", pa.array(["fine"] * N_STIMULI)), folder / STIMULI)
    return staged(rewrite(folder, STIMULI, (folder / STIMULI).read_bytes()))


def lost_rows(folder: Path) -> Path:
    """A table with fewer rows than the manifest tells."""
    pq.write_table(pq.read_table(folder / STIMULI).slice(0, 5), folder / STIMULI)
    return staged(rewrite(folder, STIMULI, (folder / STIMULI).read_bytes()))


def other_hidden_size(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["base_model"]["hidden_size"] = 31
    return rewrite(folder, "config.json", canonical_json(config))


Make = Callable[[Path], Path]
CASES: dict[str, tuple[Make, str, str, str]] = {
    "no manifest": (
        lambda f: unlink(model(f), "manifest.json"),
        "expected manifest.json, got none",
        "manifest.json",
        "write the release again",
    ),
    "format too new": (
        lambda f: manifest_of(model(f), format_version="9.0.0"),
        f"format 9.0.0 is newer than our {FORMAT_VERSION}",
        "manifest.json",
        "write the release again",
    ),
    "missing file": (
        lambda f: unlink(model(f), "evaluation.json"),
        "bytes, got none",
        "evaluation.json",
        "run `python -m builders run` again",
    ),
    "truncated file": (
        lambda f: write(model(f), "evaluation.json", b"{"),
        "got 1: truncated?",
        "evaluation.json",
        "run `python -m builders run` again",
    ),
    "altered file": (
        lambda f: write(model(f), "evaluation.json", (f / "evaluation.json").read_bytes()[::-1]),
        "altered",
        "evaluation.json",
        "run `python -m builders run` again",
    ),
    "stray file": (
        lambda f: write(model(f), "notes.txt", b"x"),
        "the manifest does not list it",
        "notes.txt",
        "remove it from the release folder",
    ),
    "link": (
        lambda f: symlink(model(f)),
        "expected a file, got a link",
        "evaluation.json",
        "copy the file into the release folder",
    ),
    "pickle": (
        lambda f: model(f, extra_files={"w/sae.PT": b"\x80\x04."}),
        "can run code when it is opened",
        "w/sae.PT",
        "use safetensors, parquet or JSON",
    ),
    "no source": (
        lambda f: model(f, sources=[]),
        "expected at least one source, got none",
        "sources",
        "fill in [corpus] of the recipe",
    ),
    "no licence of a source": (
        lambda f: model(f, sources=[SOURCES[0] | {"licence": " "}]),
        "expected a licence, got none",
        "sources[0] 'Drawn pairs'",
        "set corpus.licence in the recipe",
    ),
    "images that may not leave": (
        lambda f: dataset(f, stimuli_columns={"image": IMAGES}),
        "it holds image bytes, which 'Drawn pairs' does not let us pass on",
        f"{STIMULI}, column 'image'",
        "build again without them, or set corpus.redistribute_images if the licence allows it",
    ),
    "images under another name": (
        lambda f: dataset(f, stimuli_columns={"look": pa.array([b"x"] * N_STIMULI)}),
        "it holds image bytes",
        f"{STIMULI}, column 'look'",
        "build again without them",
    ),
    "images of one source of two": (
        lambda f: dataset(
            f,
            sources=[*MAY, {"name": "web", "licence": "x", "redistribute_images": "yes"}],
            stimuli_columns={"image": IMAGES},
        ),
        "which 'web' does not let us",
        "column 'image'",
        "",
    ),
    "no card": (
        lambda f: write_model_release(f),
        "expected a card, got none",
        "README.md",
        "python -m hub stage",
    ),
    "broken front matter": (
        lambda f: card(model(f), "tags:\n", "tags: [\n"),
        "metadata: invalid YAML",
        "README.md",
        "python -m hub stage",
    ),
    "no front matter": (
        lambda f: card(model(f), "---\n", "\n---\n"),
        "metadata: empty or missing yaml metadata",
        "README.md",
        "",
    ),
    "unknown licence of ours": (
        lambda f: model(f, recipe=without_release(licence="free-for-all")),
        "metadata: \"license\": 'free-for-all' is not a known licence id",
        "README.md",
        "",
    ),
    "no licence of ours": (
        lambda f: model(f, recipe=without_release(licence="")),
        "metadata: expected 'license', got none",
        "README.md",
        "fill in [release] of the recipe",
    ),
    "configs that are not the manifest's": (
        lambda f: card(dataset(f), STIMULI, "data/*.parquet"),
        "metadata: expected configs",
        "README.md",
        "",
    ),
    "a secret in a text": (
        lambda f: model(f, extra_files={"notes.md": f"token={TOKEN}".encode()}),
        "it holds what looks like a Hugging Face token",
        "notes.md",
        "remove it, and revoke it if it is real",
    ),
    "a secret in a caption": (
        lambda f: dataset(f, captions=["a key: AKIAABCDEFGHIJKLMNOP."]),
        "it holds what looks like an AWS access key",
        f"{STIMULI}, column 'caption'",
        "revoke it",
    ),
    "a secret in a nested column": (
        lambda f: model(f, words=["-----BEGIN RSA PRIVATE KEY-----", "b", "c"]),
        "it holds what looks like a private key",
        "layers.1/atoms.parquet, column 'nearest_concepts'",
        "revoke it",
    ),
    "a secret in the manifest": (
        lambda f: model(f, seeds={"run": "ghp_" + "x" * 36}),
        "it holds what looks like a GitHub token",
        "manifest.json",
        "revoke it",
    ),
    "a table that does not load": (
        lambda f: card(dataset(f), f"num_examples: {N_STIMULI}", "num_examples: 5"),
        "load_dataset fails on it",
        "config 'stimuli'",
        "mend its parquet files and build the release again",
    ),
    "a table whose footer is damaged": (
        lambda f: damaged(dataset(f), -20),
        "expected a table that can be read",
        STIMULI,
        "build the release again",
    ),
    "a table whose pages are damaged": (
        lambda f: damaged(dataset(f), 8),
        "expected a table that can be read",
        STIMULI,
        "build the release again",
    ),
    "metadata that no release may set": (
        lambda f: card(model(f), "tags:\n", "widget: []\ntags:\n"),
        "metadata: 'widget' is not among the keys that a release may set",
        "README.md",
        "python -m hub stage",
    ),
    "a card without its limits": (
        lambda f: card(model(f), "## Limits and misuse", "## Praise"),
        "expected the sections ## Files, ## How it was made, ## Numbers, ## Limits and misuse",
        "README.md",
        "python -m hub stage",
    ),
    "a picture of a forbidding source": (
        lambda f: model(f, extra_files={"look/a.JPG": PNG}),
        "it is a picture, which 'Drawn pairs' does not let us pass on",
        "look/a.JPG",
        "leave it out of the release",
    ),
    "weights that steer to infinity": (
        lambda f: infinite(model(f)),
        "steering a tiny model: expected finite logits, got NaN or infinity",
        "layers.1",
        "build the release again",
    ),
    "other rows": (
        lambda f: lost_rows(dataset(f)),
        "load_dataset expected {'train': 29} rows, got {'train': 5}",
        "config 'stimuli'",
        "build the release again",
    ),
    "other columns": (
        lambda f: extra_column(dataset(f)),
        "streaming: expected columns ['stimulus_id',",
        "config 'stimuli'",
        "build the release again",
    ),
    "weights that do not load": (
        lambda f: other_hidden_size(model(f)),
        "SteeringSAE.from_pretrained fails on it: FormatError",
        "config.json and layers.*",
        "build the release again",
    ),
}


@pytest.mark.parametrize(("make", "what", "where", "fix"), CASES.values(), ids=CASES)
def test_a_release_is_refused(tmp_path: Path, make: Make, what: str, where: str, fix: str) -> None:
    folder = make(tmp_path / "release")
    found = check_release(folder)
    right = [one for one in found if what in one.what and where in one.where and fix in one.fix]
    assert right, [str(one) for one in found]
    assert not any(TOKEN in str(one) for one in found)


@pytest.mark.parametrize("facts", [{}, {"sources": MAY, "stimuli_columns": {"image": IMAGES}}])
def test_a_dataset_may_leave(tmp_path: Path, facts: dict[str, Any]) -> None:
    assert check_release(dataset(tmp_path / "release", **facts)) == []


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_model_may_leave_and_stays_as_it_is(tmp_path: Path, activation: str) -> None:
    folder = model(tmp_path / "release", activation=activation)
    before = digests(folder)
    assert check_release(folder) == []
    assert digests(folder) == before


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    secret = {"notes.txt": TOKEN.encode()}
    folder = model(tmp_path / "release", sources=[], recipe=without_release(licence=""), extra_files=secret)
    assert [one.where for one in check_release(folder)] == ["sources", "README.md", "notes.txt"]


def test_words_that_only_sound_like_secrets_may_leave(tmp_path: Path) -> None:
    words = [
        "hf_hub",
        "sk-learn and its friends",
        "AKIAB",
        "-----BEGIN CERTIFICATE-----",
        "task-oriented",
        "ghp_x",
    ]
    assert check_release(model(tmp_path / "release", words=words)) == []


def test_a_refusal_reads_as_one_sentence() -> None:
    assert str(Refusal("expected a, got b", "file", "do c")) == "file: expected a, got b; do c"


def digests(folder: Path) -> dict[Path, str]:
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}
