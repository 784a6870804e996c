"""Small, valid release folders for tests, a dataset's and a model's, written file by file as the format says.

Not made with DACO's own writers of releases, so that readers meet the format itself. Odd sizes: hidden 32,
13 concepts, 29 stimuli, 41 atoms, layers 1 and 2 of 3.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from daco.manifest import (
    FORMAT_VERSION,
    canonical_json,
    file_entry,
    release_files,
    sha256_file,
    write_atomic,
    write_manifest,
)
from daco.tables import ATOMS, CONCEPTS, LINKS, STIMULI, directions_schema, table_of, write_table

D_MODEL, N_CONCEPTS, N_STIMULI, N_ATOMS, LAYERS = 32, 13, 29, 41, (1, 2)
WORDS = [
    "knife",
    "dog",
    "gun",
    "first-aid",
    "cat",
    "bomb",
    "helmet",
    "river",
    "poison",
    "doctor",
    "drug",
    "nail",
    "oak",
]
POLARITY = ["undesirable", "neutral", "undesirable", "desirable"]
"""Polarity of the concepts, over and over."""

BASE = {
    "id": "org/tiny-vl",
    "revision": "f" * 40,
    "model_type": "llava",
    "hidden_size": D_MODEL,
    "n_layers": 3,
}
MODEL_NAME = "tiny_vl"
SOURCES = [
    {"name": "Drawn pairs", "revision": "1", "licence": "cc0-1.0", "url": "https://example.org/drawn"}
    | {"redistribute_images": False}
]
RECIPE = {
    "release": {"org": "org", "dataset": "DACO-tiny", "model": "daco-sae-tiny", "licence": "cc-by-4.0"}
    | {"contact": "removals@example.org", "version": "1.0.0"},
    "stimuli": {"template": "{concept}"},
    "sae": {"start": "dictionary"},
}
COUNTS = {
    "corpus": {"in": 31, "out": N_STIMULI, "skipped": {"unreadable": 2}},
    "concepts": {"in": 17, "out": N_CONCEPTS, "skipped": {"too few positives": 4}},
}


def write_dataset_release(
    folder: Path,
    *,
    words: Sequence[str] = WORDS,
    captions: Sequence[str] = (),
    extra_files: Mapping[str, bytes] = {},
    stimuli_columns: Mapping[str, Any] = {},
    **manifest: Any,
) -> Path:
    """Write a dataset release (without its card) into `folder`; the named facts may be made hostile or wrong.

    Args:
        folder: Empty or absent.
        words: Names of the concepts; their number is the number of concepts.
        captions: The first captions; the rest are "a picture of ...".
        extra_files: Further files, listed in the manifest.
        stimuli_columns: Further columns of `stimuli`, arrow arrays of `N_STIMULI` rows.
        manifest: Overrides of the manifest's keys, such as `version` or `sources`.
    """
    stimuli, links, concepts = _stimuli(words, captions), _links(words), _concepts(words)
    for name, values in stimuli_columns.items():
        stimuli = stimuli.append_column(name, values)
    tables = {("stimuli", "train"): stimuli, ("links", "train"): links, ("concepts", "train"): concepts}
    directions = {(f"directions_{MODEL_NAME}", f"layer_{i}"): _directions(words, i) for i in LAYERS}
    configs: dict[str, Any] = {}
    for (config, split), table in {**tables, **directions}.items():
        path = f"data/{config}/{split}-00000-of-00001.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_table(folder / path, table)
        entry = configs.setdefault(config, {"splits": {}, "columns": table.column_names})
        entry["splits"][split] = {"files": [path], "rows": table.num_rows}
    _write_extra(folder, extra_files)
    model = BASE | {"layers": list(LAYERS), "R": {str(i): 3.5 + i for i in LAYERS}}
    rows = {
        path: part["rows"]
        for c in configs.values()
        for part in c["splits"].values()
        for path in part["files"]
    }
    facts = {"kind": "dataset", "name": "DACO-tiny", "configs": configs, "models": {MODEL_NAME: model}}
    return _seal(folder, rows, facts | manifest)


def write_model_release(
    folder: Path,
    *,
    words: Sequence[str] = WORDS,
    activation: str = "topk",
    extra_files: Mapping[str, bytes] = {},
    **manifest: Any,
) -> Path:
    """Write a model release (without its card) into `folder`; arguments as in `write_dataset_release`."""
    for layer in LAYERS:
        _write_layer(folder / f"layers.{layer}", layer, words, activation)
    config = {
        "format_version": FORMAT_VERSION,
        "base_model": BASE,
        "layers": list(LAYERS),
        "dictionary": {"dataset": "org/DACO-tiny", "tag": "v1.0.0", "sha256": "0" * 64},
        "activation": activation,
        "training": {"tokens": 1234, "steps": 50, "start": "dictionary", "fve": {"1": 0.51, "2": 0.47}},
        "steering": {"eta": 0.3, "gamma": 0.5, "scope": "all"},
    }
    evaluation = {
        "layers": {str(i): {"fve": 0.5 + i / 100, "l0": 7.25} for i in LAYERS},
        "steering": {"items": 16},
    }
    write_atomic(folder / "config.json", canonical_json(config))
    write_atomic(folder / "evaluation.json", canonical_json(evaluation))
    _write_extra(folder, extra_files)
    rows = {f"layers.{layer}/atoms.parquet": N_ATOMS for layer in LAYERS}
    return _seal(folder, rows, {"kind": "model", "name": "daco-sae-tiny"} | manifest)


def _stimuli(words: Sequence[str], captions: Sequence[str]) -> pa.Table:
    texts = [*captions, *(f"a picture of {words[i % len(words)]}" for i in range(N_STIMULI))][:N_STIMULI]
    keys = [f"{i:04d}.png" for i in range(N_STIMULI)]
    rows = [
        {
            "stimulus_id": _sha(f"drawn\0{key}")[:16],
            "caption": text,
            "image_url": f"https://example.org/{key}",
        }
        | {"image_sha256": _sha(key), "width": 48, "height": 31, "source": "drawn", "source_key": key}
        for key, text in zip(keys, texts, strict=True)
    ]
    return table_of(rows, STIMULI)


def _links(words: Sequence[str]) -> pa.Table:
    ids = _stimuli(words, ())["stimulus_id"].to_pylist()
    rows = [
        {
            "concept_id": f"user:{c}",
            "concept": word,
            "stimulus_id": ids[(c * 5 + rank) % N_STIMULI],
            "role": role,
        }
        | {"rank": rank, "dist": 1.0 + rank / 8, "sim_image": 0.5, "sim_text": 0.25}
        for c, word in enumerate(words)
        for role in ("positive", "negative")
        for rank in range(3)
    ]
    return table_of(rows, LINKS)


def _concepts(words: Sequence[str]) -> pa.Table:
    rows = [
        {
            "concept_id": f"user:{i}",
            "concept": word,
            "synset": "",
            "pos": "n",
            "definition": f"what {word} means",
        }
        | {"group": "noun.artifact", "rank": i, "polarity": POLARITY[i % 4], "polarity_source": "test"}
        | {"n_positive": 3}
        for i, word in enumerate(words)
    ]
    return table_of(rows, CONCEPTS)


def _directions(words: Sequence[str], layer: int) -> pa.Table:
    vectors = _random(layer, len(words), D_MODEL)
    rows = [
        {
            "concept_id": f"user:{i}",
            "concept": word,
            "vector": vector.tolist(),
            "norm": float(np.linalg.norm(vector)),
        }
        | {"n_positive": 3, "n_negative": 3}
        for i, (word, vector) in enumerate(zip(words, vectors, strict=True))
    ]
    return table_of(rows, directions_schema(D_MODEL))


def _write_layer(folder: Path, layer: int, words: Sequence[str], activation: str) -> None:
    folder.mkdir(parents=True)
    W_dec = _random(layer, N_ATOMS, D_MODEL)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    weights = {"W_enc": W_dec.T.copy(), "b_enc": np.zeros(N_ATOMS, np.float32)}
    weights |= {"W_dec": W_dec, "b_dec": _random(layer + 100, D_MODEL)}
    write_atomic(folder / "sae_weights.safetensors", save(weights))
    write_atomic(folder / "cfg.json", canonical_json(_cfg(layer, activation)))
    atoms = [_atom(i, words) for i in range(N_ATOMS)]
    write_table(folder / "atoms.parquet", table_of(atoms, ATOMS))
    ids = np.array([a["atom"] for a in atoms if a["polarity"] != "neutral"], np.int64)
    desirable = np.array([a["atom"] for a in atoms if a["polarity"] == "desirable"], np.int64)
    steering = {
        "atom_ids": ids,
        "W_enc_rows": W_dec[ids],
        "b_enc": weights["b_enc"][ids],
        "W_dec_rows": W_dec[ids],
    }
    steering |= {"b_dec": weights["b_dec"], "desirable_sum": W_dec[desirable].sum(0)}
    bound = {"sae_weights_sha256": sha256_file(folder / "sae_weights.safetensors"), "eta": "0.3"}
    content = save(
        steering | {"R": np.array([3.5 + layer], np.float32)}, bound | {"format_version": FORMAT_VERSION}
    )
    write_atomic(folder / "steering.safetensors", sorted_metadata(content))


def sorted_metadata(content: bytes) -> bytes:
    """The bytes of a safetensors file with its metadata in order; the library writes them in any order."""
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(n) + content[8 + n :]


def _atom(i: int, words: Sequence[str]) -> dict[str, Any]:
    polarity = POLARITY[i % 4]
    nearest = [words[(i + j) % len(words)] for j in range(3)]
    return {
        "atom": i,
        "polarity": polarity,
        "cos_undesirable": 0.9 - i / 100 if polarity == "undesirable" else 0.1,
        "cos_desirable": 0.9 - i / 100 if polarity == "desirable" else 0.05,
        "nearest_concept_ids": [f"user:{(i + j) % len(words)}" for j in range(3)],
        "nearest_concepts": nearest,
        "nearest_cosines": [0.9, 0.5, 0.25],
        "firing_rate": 0.0 if i % 10 == 9 else 0.125,
    }


def _cfg(layer: int, activation: str) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "architecture": {"topk": "topk", "relu": "standard"}[activation],
        "d_in": D_MODEL,
        "d_sae": N_ATOMS,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": f"blocks.{layer}.hook_resid_post"},
    }
    return cfg | ({"k": 5, "rescale_acts_by_decoder_norm": False} if activation == "topk" else {})


def _write_extra(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _seal(folder: Path, rows: Mapping[str, int], facts: Mapping[str, Any]) -> Path:
    """Write the manifest over all files that lie in `folder`."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "version": "1.0.0",
        "files": {path: file_entry(folder / path, rows.get(path)) for path in release_files(folder)},
        "sources": SOURCES,
        "counts": COUNTS,
        "recipe": RECIPE,
        "seeds": {"run": 7},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "facts": {},
    }
    write_manifest(folder, manifest | dict(facts))
    return folder


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
