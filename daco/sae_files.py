"""The files of a model release: `config.json`, and five files a layer; one check each for writer and reader.

Reads and writes `layers.<L>/{cfg.json,sae_weights.safetensors,atoms.parquet}` and, of labelled atoms alone,
`layers.<L>/{steering.safetensors,steering_atoms.parquet}`. The weights are in the layout of SAELens 6 and
load there as they lie.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from daco.errors import ArtefactNotFoundError, FormatError, IntegrityError, SteeringOnlyError
from daco.fingerprint import broken_fingerprint
from daco.load import Snapshot
from daco.manifest import (
    FINGERPRINT,
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
_JUMPRELU_FACTS = ("jumprelu_threshold", "jumprelu_agreement")
_STEERING_ATOMS = pa.schema([*ATOMS, ATOMS_MORE.field("group")])


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
        broken += broken_fingerprint(FINGERPRINT, config.get(FINGERPRINT, {}))
        broken += broken_layers("config.json", config["layers"], config["base_model"].get("n_layers"))
        broken += _broken_steering(config["steering"], config["layers"])
    if config.get("activation") not in ACTIVATIONS:
        broken.append(f"activation: expected one of {ACTIVATIONS}, got {config.get('activation')!r}")
    if broken:
        raise FormatError("config.json breaks the format:\n- " + "\n- ".join(broken))


def _broken_steering(steering: dict[str, Any], layers: list[Any]) -> list[str]:
    if missing := {"eta", "gamma", "scope"} - set(steering):
        return [f"steering: expected {sorted(missing)}, got none"]
    broken = [
        f"steering: {name}: expected a number, got {steering[name]!r}"
        for name in ("eta", "gamma")
        if type(steering[name]) not in (int, float) or not math.isfinite(steering[name])
    ]
    if not isinstance(steering["scope"], str):
        broken.append(f"steering: scope: expected a text, got {steering['scope']!r}")
    named = steering.get("layers", layers)
    if not isinstance(named, list) or not named or any(layer not in layers for layer in named):
        broken.append(f"steering: layers: expected some of {layers}, got {named!r}")
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
    facts = {name: getattr(layer, name) for name in _JUMPRELU_FACTS}
    cfg["metadata"] |= {name: value for name, value in facts.items() if value is not None}
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
    """Write a layer's five files into `folder/layers.<L>`; weights are stored as float32.

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
    labelled = layer.atoms[layer.atoms["polarity"] != "neutral"]
    _write_atoms(target / "atoms.parquet", layer.atoms, [*ATOMS, *ATOMS_MORE])
    _write_atoms(target / "steering_atoms.parquet", labelled, _STEERING_ATOMS)


def _write_atoms(path: Path, atoms: pd.DataFrame, fields: Iterable[pa.Field]) -> None:
    """Those columns of ATOMS and ATOMS_MORE that there are."""
    schema = pa.schema([field for field in fields if field.name in ATOMS.names or field.name in atoms])
    write_table(path, pa.Table.from_pandas(atoms, schema=schema, preserve_index=False))


def read_layer(snapshot: Snapshot, layer: int, dtype: torch.dtype, device: str | torch.device) -> LayerSAE:
    """Read a layer with all its weights; see `SteeringSAE.from_pretrained` for what it raises."""
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
    _check_binding(steering, snapshot, folder)
    return LayerSAE(layer, sae, atoms, R, **_jumprelu_facts(cfg, folder))


def read_labelled(
    snapshot: Snapshot, layer: int, dtype: torch.dtype, device: str | torch.device, eta: float
) -> LayerSAE:
    """Read a layer's labelled atoms alone, from the files that are made for it; a TopK becomes a JumpReLU.

    Args:
        snapshot: The release.
        layer: Which layer.
        dtype: Of the weights.
        device: Of the weights.
        eta: The release's, at which the atoms are labelled.

    Raises:
        SteeringOnlyError: a TopK without a calibrated threshold.
        FormatError: see `SteeringSAE.from_pretrained`.
    """
    folder = layer_folder(layer)
    cfg = _read_cfg(snapshot.path(f"{folder}/cfg.json"), folder)
    facts = _jumprelu_facts(cfg, folder)
    if cfg["architecture"] == "topk" and facts["jumprelu_threshold"] is None:
        raise SteeringOnlyError(
            f"{snapshot.name}: {folder}: expected a calibrated threshold, without which a TopK compares all "
            "atoms, got none in this release; load without steering_only"
        )
    path = snapshot.path(f"{folder}/steering.safetensors")
    R = _read_R(path, folder)
    _check_binding(path, snapshot, folder)
    tensors = _load_tensors(path)
    atoms = _labelled_atoms(snapshot, folder, tensors.get("atom_ids"))
    sae = _rows_sae(tensors, cfg["architecture"], facts["jumprelu_threshold"], folder)
    return LayerSAE(layer, sae.to(device, dtype), atoms, R, **facts, labelled_at=eta)


def _rows_sae(tensors: dict[str, Tensor], architecture: str, threshold: float | None, folder: str) -> SAE:
    """The SAE that has the labelled atoms alone."""
    names = {"W_enc": "W_enc_rows", "b_enc": "b_enc", "W_dec": "W_dec_rows", "b_dec": "b_dec"}
    names |= {"threshold": "threshold"} if architecture == "jumprelu" else {}
    if missing := sorted(set(names.values()) - set(tensors)):
        raise FormatError(f"{folder}/steering: expected tensors {missing}, got {sorted(tensors)}")
    w = {name: tensors[stored] for name, stored in names.items()}
    _check_finite(w, f"{folder}/steering")
    if threshold is not None and architecture == "topk":
        w["threshold"] = torch.full_like(w["b_enc"], threshold)
    activation = "jumprelu" if "threshold" in w else "relu"
    sae = SAE(w["W_enc"].T, w["b_enc"], w["W_dec"], w["b_dec"], activation, threshold=w.get("threshold"))
    return sae.requires_grad_(False)


def _labelled_atoms(snapshot: Snapshot, folder: str, ids: Tensor | None) -> pd.DataFrame:
    """The rows of labelled atoms; from the table of all atoms in a release that has no smaller one."""
    name = f"{folder}/steering_atoms.parquet"
    small = name in snapshot.manifest["files"]
    path = snapshot.path(name if small else f"{folder}/atoms.parquet")
    atoms: pd.DataFrame = read_table(path, ATOMS).to_pandas()
    if not small:
        atoms = atoms[atoms["polarity"] != "neutral"].reset_index(drop=True)
    wanted = None if ids is None else ids.tolist()
    if list(atoms["atom"]) != wanted or not set(atoms["polarity"]) <= {"desirable", "undesirable"}:
        raise FormatError(
            f"{folder}/{path.name}: expected the labelled atoms of steering.safetensors in order, got "
            "others; build it again"
        )
    return atoms


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


def _jumprelu_facts(cfg: dict[str, Any], folder: str) -> dict[str, float | None]:
    """The threshold of a TopK's JumpReLU form and how it agrees; None where it is not there."""
    metadata = cfg.get("metadata")
    facts = {name: metadata.get(name) if isinstance(metadata, dict) else None for name in _JUMPRELU_FACTS}
    threshold, agreement = facts.values()
    if threshold is not None and not (isinstance(threshold, float) and 0 < threshold < math.inf):
        raise FormatError(
            f"{folder}/cfg.json: jumprelu_threshold: expected a number above 0, got {threshold!r}"
        )
    if agreement is not None and not (isinstance(agreement, float) and 0 <= agreement <= 1):
        raise FormatError(
            f"{folder}/cfg.json: jumprelu_agreement: expected a share from 0 to 1, got {agreement!r}"
        )
    return facts


def _read_R(path: Path, folder: str) -> float:
    try:
        with safe_open(path, "pt") as file:
            R = file.get_tensor("R") if "R" in file.keys() else None  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise IntegrityError(
            f"{path.name}: expected safetensors, got {error}; download or build it again"
        ) from error
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


def _check_binding(path: Path, snapshot: Snapshot, folder: str) -> None:
    """The compact file must have been written from these very weights, which need not be here."""
    name = f"{folder}/sae_weights.safetensors"
    if (entry := snapshot.manifest["files"].get(name)) is None:
        raise ArtefactNotFoundError(f"{snapshot.name}: expected {name!r} in its manifest, got none")
    weights_sha256 = entry["sha256"]
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
