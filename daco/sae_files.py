"""The files of a model release: `config.json`, and four files a layer; one check each for writer and reader.

Reads and writes `layers.<L>/{cfg.json,sae_weights.safetensors,steering.safetensors,atoms.parquet}`.
The weights are in the layout of SAELens 6 and load there as they lie.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from daco.errors import FormatError, IntegrityError
from daco.load import Snapshot
from daco.manifest import (
    FORMAT_VERSION,
    broken_layers,
    broken_model,
    canonical_json,
    check_format_version,
    sha256_file,
    write_atomic,
)
from daco.sae import ACTIVATIONS, SAE, LayerSAE
from daco.sites import ModelFacts
from daco.tables import ATOMS, ATOMS_MORE, POLARITIES, read_table, write_table

_ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
_SAE_LENS_VERSION = "6.54.0"


def layer_folder(layer: int) -> str:
    """Name of a layer's folder in a model release."""
    return f"layers.{layer}"


def validate_config(config: object) -> None:
    """Check the root `config.json` of a model release; the writer and the reader call this.

    Raises:
        FormatTooNewError: written by a newer major version of the format.
        FormatError: lists every rule that is broken.
    """
    if not isinstance(config, dict):
        raise FormatError(f"config.json: expected a JSON object, got {type(config).__name__}")
    check_format_version(config.get("format_version"), "config.json")
    broken = [
        f"{key}: expected a {kind.__name__}, got {config.get(key)!r}"
        for key, kind in (("base_model", dict), ("layers", list), ("dictionary", dict), ("steering", dict))
        if not isinstance(config.get(key), kind)
    ]
    if not isinstance(config.get("training", {}), dict):
        broken.append(f"training: expected a dict, got {config['training']!r}")
    if not broken:
        broken += broken_model("base_model", config["base_model"])
        broken += broken_layers("config.json", config["layers"], config["base_model"].get("n_layers"))
        broken += _broken_steering(config["steering"])
    if config.get("activation") not in ACTIVATIONS:
        broken.append(f"activation: expected one of {ACTIVATIONS}, got {config.get('activation')!r}")
    if broken:
        raise FormatError("config.json breaks the format:\n- " + "\n- ".join(broken))


def _broken_steering(steering: dict[str, Any]) -> list[str]:
    if missing := {"eta", "gamma", "scope"} - set(steering):
        return [f"steering: expected {sorted(missing)}, got none"]
    broken = [
        f"steering: {name}: expected a number, got {steering[name]!r}"
        for name in ("eta", "gamma")
        if type(steering[name]) not in (int, float) or not math.isfinite(steering[name])
    ]
    if not isinstance(steering["scope"], str):
        broken.append(f"steering: scope: expected a text, got {steering['scope']!r}")
    return broken


def read_config(path: Path) -> dict[str, Any]:
    """Read and validate the root `config.json` of a model release."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(
            f"{path.name}: expected JSON, got {error}; download or build it again"
        ) from error
    validate_config(config)
    return dict(config)


def sae_lens_cfg(layer: LayerSAE, model: ModelFacts) -> dict[str, Any]:
    """The `cfg.json` with which SAELens 6 opens a layer's weights as they lie."""
    sae = layer.sae
    cfg: dict[str, Any] = {
        "architecture": _ARCHITECTURES[sae.activation],
        "d_in": sae.d_model,
        "d_sae": sae.n_atoms,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _SAE_LENS_VERSION,
            "model_name": model.id,
            "hook_name": f"blocks.{layer.layer}.hook_resid_post",
            "daco_format_version": FORMAT_VERSION,
        },
    }
    if sae.activation == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if layer.jumprelu_threshold is not None:
        cfg["metadata"]["jumprelu_threshold"] = layer.jumprelu_threshold
    return cfg


def steering_tensors(layer: LayerSAE) -> dict[str, Tensor]:
    """Only what steering reads: the labelled rows of encoder and decoder, the desirable sum, and R."""
    labels, sae = layer.labels(), layer.sae
    ids = torch.from_numpy(np.flatnonzero(labels != "neutral"))
    desirable = torch.from_numpy(np.flatnonzero(labels == "desirable"))
    tensors = {
        "atom_ids": ids,
        "W_enc_rows": sae.W_enc.T[ids],
        "b_enc": sae.b_enc[ids],
        "W_dec_rows": sae.W_dec[ids],
        "b_dec": sae.b_dec,
        "desirable_sum": sae.W_dec[desirable].sum(0),
        "R": torch.tensor([layer.R], dtype=torch.float32),
    }
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold[ids]
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def write_layer(folder: Path, layer: LayerSAE, model: ModelFacts) -> None:
    """Write a layer's four files into `folder/layers.<L>`; weights are stored as float32.

    Args:
        folder: The release folder.
        layer: SAE and atoms.
        model: The base model.

    Raises:
        FormatError: the atoms' table does not go with the SAE.
    """
    _check_atoms(layer.atoms, layer.sae.n_atoms, layer.layer)
    target = folder / layer_folder(layer.layer)
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().float().contiguous() for name, p in layer.sae.named_parameters()}
    write_atomic(target / "sae_weights.safetensors", save(weights))
    write_atomic(target / "cfg.json", canonical_json(sae_lens_cfg(layer, model)))
    # a single key: safetensors writes several in any order, and the bytes must be the same each time
    metadata = {"sae_weights_sha256": sha256_file(target / "sae_weights.safetensors")}
    write_atomic(target / "steering.safetensors", save(steering_tensors(layer), metadata))
    schema = pa.schema([*ATOMS, *(field for field in ATOMS_MORE if field.name in layer.atoms)])
    write_table(
        target / "atoms.parquet", pa.Table.from_pandas(layer.atoms, schema=schema, preserve_index=False)
    )


def read_layer(snapshot: Snapshot, layer: int, dtype: torch.dtype, device: str | torch.device) -> LayerSAE:
    """Read a layer's four files; see `SteeringSAE.from_pretrained` for what it raises."""
    folder = layer_folder(layer)
    cfg = _read_cfg(snapshot.path(f"{folder}/cfg.json"), folder)
    weights_path = snapshot.path(f"{folder}/sae_weights.safetensors")
    tensors = {name: tensor.to(device, dtype) for name, tensor in _load_tensors(weights_path).items()}
    expected = {"W_enc", "b_enc", "W_dec", "b_dec"} | (
        {"threshold"} if cfg["architecture"] == "jumprelu" else set()
    )
    if set(tensors) != expected:
        raise FormatError(f"{folder}/sae_weights: expected tensors {sorted(expected)}, got {sorted(tensors)}")
    _check_finite(tensors, f"{folder}/sae_weights")
    activation = {value: key for key, value in _ARCHITECTURES.items()}[cfg["architecture"]]
    sae = SAE(**tensors, activation=activation, k=cfg.get("k")).requires_grad_(False)
    atoms = read_table(snapshot.path(f"{folder}/atoms.parquet"), ATOMS).to_pandas()
    _check_atoms(atoms, sae.n_atoms, layer)
    steering = snapshot.path(f"{folder}/steering.safetensors")
    R = _read_R(steering, folder)
    _check_binding(steering, snapshot.manifest["files"][f"{folder}/sae_weights.safetensors"]["sha256"])
    return LayerSAE(layer, sae, atoms, R, _jumprelu_threshold(cfg, folder))


def _read_cfg(path: Path, folder: str) -> dict[str, Any]:
    """A layer's `cfg.json`, as far as we read it."""
    try:
        cfg = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(
            f"{folder}/cfg.json: expected JSON, got {error}; download or build it again"
        ) from error
    architecture = cfg.get("architecture") if isinstance(cfg, dict) else cfg
    if architecture not in (known := [*_ARCHITECTURES.values()]):
        raise FormatError(f"{folder}/cfg.json: expected an architecture of {known}, got {architecture!r}")
    return dict(cfg)


def _jumprelu_threshold(cfg: dict[str, Any], folder: str) -> float | None:
    metadata = cfg.get("metadata")
    value = metadata.get("jumprelu_threshold") if isinstance(metadata, dict) else None
    if value is not None and not (isinstance(value, float) and math.isfinite(value) and value > 0):
        raise FormatError(f"{folder}/cfg.json: jumprelu_threshold: expected a number above 0, got {value!r}")
    return value


def _read_R(path: Path, folder: str) -> float:
    R = _load_tensors(path).get("R")
    value = float(R[0]) if R is not None and list(R.shape) == [1] else math.nan
    if not (math.isfinite(value) and value > 0):
        raise FormatError(f"{folder}/steering: expected R as one number above 0, got {R}; build it again")
    return value


def _check_finite(tensors: dict[str, Tensor], where: str) -> None:
    bad = [name for name, tensor in sorted(tensors.items()) if not bool(tensor.isfinite().all())]
    if bad:
        raise FormatError(f"{where}: expected finite numbers, got NaN or infinity in {bad}; build it again")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise IntegrityError(
            f"{path.name}: expected safetensors, got {error}; download or build it again"
        ) from error


def _check_binding(path: Path, weights_sha256: str) -> None:
    """The compact file must have been written from these very weights."""
    with safe_open(path, "pt") as file:
        bound = (file.metadata() or {}).get("sae_weights_sha256")
    if bound != weights_sha256:
        raise FormatError(
            f"{path.name}: expected it made from weights {weights_sha256}, got {bound}; build it again"
        )


def _check_atoms(atoms: pd.DataFrame, n_atoms: int, layer: int) -> None:
    if list(atoms["atom"]) != list(range(n_atoms)):
        raise FormatError(f"layer {layer}: expected atoms 0 to {n_atoms - 1} in order, got {len(atoms)} rows")
    if unknown := set(atoms["polarity"]) - set(POLARITIES):
        raise FormatError(f"layer {layer}: expected polarity among {POLARITIES}, got {sorted(unknown)}")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Validate a model release's root config and write it to `folder/config.json`."""
    validate_config(config)
    write_atomic(folder / "config.json", canonical_json(config))
