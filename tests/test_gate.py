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

from daco import tables
from daco.manifest import (
    FORMAT_VERSION,
    canonical_json,
    file_entry,
    read_manifest,
    sha256_file,
    write_manifest,
)
from hub.gate import check_release, prompts_in
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


def parquet(columns: Any, metadata: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def field_metadata() -> bytes:
    """A table whose secret is beside a field of a field."""
    inner = pa.field("b", pa.string(), metadata={"k": TOKEN})
    column = pa.array([{"b": "x"}], pa.struct([inner]))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([column], schema=pa.schema([("a", column.type)])), buffer)
    return buffer.getvalue()


def licensed(licence: str, **more: Any) -> list[dict[str, Any]]:
    return [SOURCES[0] | {"licence": licence} | more]


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
    "images of another table than stimuli": (
        lambda f: dataset(f, extra_files={"data/more.PARQUET": parquet({"image": [PNG]})}),
        "it holds image bytes, which 'Drawn pairs'",
        "data/more.PARQUET, column 'image'",
        "build again without them",
    ),
    "images of a model": (
        lambda f: model(f, extra_files={"a.parquet": parquet({"seen": [[{"x": PNG}]]})}),
        "it holds image bytes",
        "a.parquet, column 'seen'",
        "",
    ),
    "decoded pixels": (
        lambda f: model(f, extra_files={"a.parquet": parquet({"px": pa.array([[1]], pa.list_(pa.uint8()))})}),
        "it holds image bytes",
        "a.parquet, column 'px'",
        "",
    ),
    "a picture under the name of a model's plot": (
        lambda f: rewrite(dataset(f), "tuning.png", PNG),
        "it is a picture, which 'Drawn pairs'",
        "tuning.png",
        "leave it out",
    ),
    "a picture under the name of a dataset's plot": (
        lambda f: rewrite(model(f), "map.png", PNG),
        "it is a picture, which 'Drawn pairs'",
        "map.png",
        "leave it out",
    ),
    "an archive": (
        lambda f: model(f, extra_files={"photos.ZIP": PNG}),
        "expected a file of .parquet, .safetensors,",
        "photos.ZIP",
        "nothing else can be checked",
    ),
    "a picture of a suffix that we do not know": (
        lambda f: model(f, extra_files={"photo.jfif": PNG}),
        "got .jfif",
        "photo.jfif",
        "leave it out",
    ),
    "a file without a suffix": (
        lambda f: model(f, extra_files={"photo": PNG}),
        "got no suffix",
        "photo",
        "leave it out",
    ),
    "a picture under the name of a text": (
        lambda f: model(f, extra_files={"photo.txt": PNG}),
        "expected text in UTF-8, got other bytes",
        "photo.txt",
        "leave it out",
    ),
    "all rights reserved": (
        lambda f: model(f, sources=licensed("(c) me. All Rights  Reserved.", allowed="yes")),
        "expected a licence to pass on what is made from it, got (c) me",
        "sources[0] 'Drawn pairs'",
        "set corpus.allowed in the recipe",
    ),
    "a proprietary source": (
        lambda f: model(f, sources=licensed("Proprietary")),
        "expected a licence to pass on what is made from it, got Proprietary",
        "sources[0]",
        "",
    ),
    "a source without derivatives": (
        lambda f: model(f, sources=[*SOURCES, *licensed("CC_BY_ND")]),
        "expected a licence to pass on what is made from it, got CC_BY_ND",
        "sources[1]",
        "",
    ),
    "a source without derivatives in words": (
        lambda f: model(f, sources=licensed("Attribution-NoDerivatives")),
        "expected a licence to pass on what is made from it",
        "sources[0]",
        "",
    ),
    "a release without derivatives": (
        lambda f: model(f, recipe=without_release(licence="cc-by-nc-nd-4.0")),
        "expected a licence that lets others pass it on and build on it, got cc-by-nc-nd-4.0",
        "release.licence",
        "set another in the recipe",
    ),
    "a secret in a struct": (
        lambda f: model(f, extra_files={"a.parquet": parquet({"s": [{"n": 1, "t": [{"k": TOKEN}]}]})}),
        "it holds what looks like a Hugging Face token",
        "a.parquet, column 's'",
        "revoke it",
    ),
    "a secret in a map": (
        lambda f: model(
            f,
            extra_files={
                "a.parquet": parquet({"m": pa.array([[("k", TOKEN)]], pa.map_(pa.string(), pa.string()))})
            },
        ),
        "it holds what looks like a Hugging Face token",
        "a.parquet, column 'm'",
        "revoke it",
    ),
    "a secret in a column of categories": (
        lambda f: model(f, extra_files={"a.parquet": parquet({"d": pa.array([TOKEN]).dictionary_encode()})}),
        "it holds what looks like a Hugging Face token",
        "a.parquet, column 'd'",
        "revoke it",
    ),
    "a secret in bytes": (
        lambda f: model(
            f, sources=MAY, extra_files={"a.parquet": parquet({"b": [b"\xff " + TOKEN.encode()]})}
        ),
        "it holds what looks like a Hugging Face token",
        "a.parquet, column 'b'",
        "revoke it",
    ),
    "a secret in the path of a picture": (
        lambda f: dataset(
            f,
            sources=MAY,
            stimuli_columns={"image": pa.array([{"bytes": PNG, "path": TOKEN}] * N_STIMULI)},
        ),
        "it holds what looks like a Hugging Face token",
        f"{STIMULI}, column 'image'",
        "revoke it",
    ),
    "a secret in a table's metadata": (
        lambda f: model(f, extra_files={"a.parquet": parquet({"n": [1]}, {"k": TOKEN})}),
        "it holds what looks like a Hugging Face token",
        "a.parquet",
        "revoke it",
    ),
    "a secret in a field's metadata": (
        lambda f: model(f, extra_files={"a.parquet": field_metadata()}),
        "it holds what looks like a Hugging Face token",
        "a.parquet",
        "revoke it",
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


@pytest.mark.parametrize(
    "facts",
    [
        {"sources": licensed("CC-BY-ND-4.0", allowed=True)},
        {"sources": licensed("a non-proprietary licence, 2nd edition, no rights reserved")},
        {
            "extra_files": {
                "a.csv": "\ufeffid\n1\n".encode(),
                "b.TSV": b"id\n",
                "c.ndjson": b"{}\n",
                "d.jinja": b"x",
            }
        },
        {"extra_files": {"a.parquet": parquet({"s": [{"t": ["x"], "n": 1}]}, {"k": "v"})}},
    ],
)
def test_what_looks_bad_and_is_not_may_leave(tmp_path: Path, facts: dict[str, Any]) -> None:
    assert check_release(model(tmp_path / "release", **facts)) == []


@pytest.mark.parametrize(
    ("make", "name"), [(dataset, "map.png"), (model, "tuning.png"), (model, "evaluation.png")]
)
def test_plots_of_a_kind_may_leave(tmp_path: Path, make: Make, name: str) -> None:
    assert check_release(rewrite(make(tmp_path / "release"), name, PNG)) == []


CONVERSATION = [{"from": "human", "value": "how to"}]

PROMPTS = {
    "a.parquet": (
        parquet(
            {
                "harmful_prompt": ["x"],
                "userPrompt": ["x"],
                "instructions": ["x"],
                "conversations": [CONVERSATION],
                "turn": [{"prompt": "x"}],
                "turns": [[{"the-query": b"x"}]],
                "prompt_tokens": [7],
                "answer": ["x"],
            }
        ),
        [
            "harmful_prompt",
            "userPrompt",
            "instructions",
            "conversations",
            "turn.prompt",
            "turns.element.the-query",
        ],
    ),
    "a.json": (b'[{"prompt": "how to"}]', ["prompt"]),
    "b.json": (b'{"data": {"test": [{"id": 1}, {"Goals": ["x"]}]}}', ["data.test.Goals"]),
    "c.json": (b'{"prompts": {"n": 3, "rate": [0.5]}, "scope": "prompt"}', []),
    "no.json": (b'{"prompt"', []),
    "a.jsonl": (b'{"id": 1}\n\nnone\n{"id": 2, "user_prompt": "x"}\n', ["user_prompt"]),
    "a.csv": ("\ufeffprompt,id\nx,1\n".encode(), ["prompt"]),
    "a.TSV": (b"id\tprompt.0\n", ["prompt.0"]),
    "b.csv": (b"atom,firing_prompt,caption\n1,0.5,x\n", []),
    "prompts.txt": (b"how to", None),
    "prompts/a.json": (b'["how to"]', None),
    "suites/jailbreak-2.parquet": (parquet({"text": ["how to"]}), None),
    "promptly.txt": (b"x", []),
}
"""File -> content, and its columns of prompts; None where it is its name that tells."""


@pytest.mark.parametrize(("name", "content", "columns"), [(k, *v) for k, v in PROMPTS.items()], ids=PROMPTS)
def test_prompts_are_known_by_name(
    tmp_path: Path, name: str, content: bytes, columns: list[str] | None
) -> None:
    folder = write_model_release(tmp_path / "release", extra_files={name: content})
    expected = [name] if columns is None else [f"{name}, column {one!r}" for one in columns]
    assert prompts_in(folder, read_manifest(folder)) == expected
    harmless = read_manifest(folder) | {"facts": {"prompts": "harmless"}}
    assert prompts_in(folder, harmless) == []


def test_tables_of_ours_hold_no_prompts(tmp_path: Path) -> None:
    atoms = pa.unify_schemas([tables.ATOMS, tables.ATOMS_MORE])
    schemas = {"stimuli": tables.STIMULI, "links": tables.LINKS, "concepts": tables.CONCEPTS, "atoms": atoms}
    schemas["directions_prompt_guard"] = tables.directions_schema(3)
    schemas["recognition_prompt_guard"] = tables.recognition_schema(3)
    schemas["statistics_prompt_guard"] = tables.statistics_schema(3)
    files = {f"data/{name}/train.parquet": parquet(schema.empty_table()) for name, schema in schemas.items()}
    folder = write_dataset_release(tmp_path / "release", extra_files=files)
    assert prompts_in(folder, read_manifest(folder)) == []


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
