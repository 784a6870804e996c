"""Reads SAEs that others trained: a folder of SAELens (>= 6) or of sparsify becomes an `SAE`.

Reads `cfg.json` with `sae_weights.safetensors` (SAELens) or `sae.safetensors` (sparsify); writes nothing.
What is read computes the same codes and reconstructions; what an `SAE` cannot express is refused.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from daco.errors import ArtefactNotFoundError, FormatError, IntegrityError
from daco.sae import SAE

_ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}


def read_sae(folder: str | Path) -> SAE:
    """An SAE from a folder of SAELens (>= 6) or sparsify, in float32.

    Args:
        folder: Holds `cfg.json` and one safetensors file of weights.

    Returns:
        The SAE; for raw activations, as the folder's own library would use it.

    Raises:
        ArtefactNotFoundError: no such folder, or a file is missing in it.
        IntegrityError: a file is of another format.
        FormatError: neither of the two layouts, or something in it that an `SAE` cannot express.
    """
    folder = Path(folder)
    if not (folder / "cfg.json").is_file():
        raise ArtefactNotFoundError(
            f"{folder}: expected an SAE's folder with cfg.json, got none; give the folder of one SAE"
        )
    cfg = _json(folder / "cfg.json")
    if "architecture" in cfg:
        return _from_saelens(cfg, _tensors(folder / "sae_weights.safetensors"), folder)
    if "expansion_factor" in cfg or "num_latents" in cfg:
        return _from_sparsify(cfg, _tensors(folder / "sae.safetensors"), folder)
    raise FormatError(f"{folder}/cfg.json: expected that of SAELens >= 6 or sparsify, got {sorted(cfg)[:8]}")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArtefactNotFoundError(f"expected {path.name} beside cfg.json in {path.parent}, got none")
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise IntegrityError(f"{path}: expected safetensors, got {error}") from error


def _expect(
    where: Path, cfg: Mapping[str, Any], rules: Mapping[str, tuple[Any, Callable[[Any], bool]]]
) -> None:
    """Refuse a cfg whose fields (missing: a default) ask for more than an SAE can express."""
    broken = [
        f"{name}: expected {default}, got {cfg.get(name)!r}"
        for name, (default, fits) in rules.items()
        if not fits(cfg.get(name, default))
    ]
    if broken:
        raise FormatError(f"{where}/cfg.json cannot be expressed: " + "; ".join(broken))


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _from_saelens(cfg: dict[str, Any], w: dict[str, Tensor], folder: Path) -> SAE:
    rules = {
        "architecture": ("standard, topk or jumprelu", _is(*_ACTIVATIONS)),
        "normalize_activations": ("none", _is("none", None)),
        "reshape_activations": ("none", _is("none", None)),
    }
    _expect(folder, cfg, rules)
    activation = _ACTIVATIONS[cfg["architecture"]]
    names = {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"threshold"} if activation == "jumprelu" else set())
    if set(w) != names:
        raise FormatError(f"{folder}: expected tensors {sorted(names)}, got {sorted(w)}")
    if not cfg.get("apply_b_dec_to_input", True):  # (z - b_dec) W + b = z W + (b - b_dec W)
        w["b_enc"] = w["b_enc"] + w["b_dec"] @ w["W_enc"]
    if activation == "topk" and cfg.get("rescale_acts_by_decoder_norm", False):
        norms = w["W_dec"].norm(dim=1)
        w |= {"W_enc": w["W_enc"] * norms, "b_enc": w["b_enc"] * norms, "W_dec": w["W_dec"] / norms[:, None]}
    return SAE(**w, activation=activation, k=cfg.get("k")).requires_grad_(False)


def _from_sparsify(cfg: dict[str, Any], w: dict[str, Tensor], folder: Path) -> SAE:
    rules = {
        "activation": ("topk", _is("topk")),
        "skip_connection": (False, _is(False)),
        "transcode": (False, _is(False)),
    }
    _expect(folder, cfg, rules)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    if set(w) != set(names):
        raise FormatError(f"{folder}: expected tensors {sorted(names)}, got {sorted(w)}")
    tensors = {ours: w[theirs] for theirs, ours in names.items()}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    return SAE(**tensors, activation="topk", k=cfg.get("k")).requires_grad_(False)
