"""The manifest of a release folder: written last, it means "complete"; one `validate` for writer and reader.

Reads and writes `manifest.json`; hashes the files beside it.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from daco.errors import FormatError, FormatTooNewError, IntegrityError
from daco.fingerprint import broken_fingerprint

FORMAT_VERSION = "1.3.0"
"""Semver of the layout of releases; a reader refuses a newer major."""

MANIFEST = "manifest.json"

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPLIT = re.compile(r"\w+")
_KEYS: dict[str, type] = {
    "format_version": str,
    "kind": str,
    "name": str,
    "version": str,
    "files": dict,
    "sources": list,
    "counts": dict,
    "recipe": dict,
    "seeds": dict,
    "versions": dict,
    "facts": dict,
}
_DATASET_KEYS: dict[str, type] = {"configs": dict, "models": dict}

MODEL_KEYS: dict[str, type] = {
    "id": str,
    "revision": str,
    "model_type": str,
    "hidden_size": int,
    "n_layers": int,
}
"""The fields of `daco.sites.ModelFacts` but its fingerprint, as releases write them."""

FINGERPRINT = "base_model_fingerprint"
"""Key of a model release's config for `ModelFacts.fingerprint`; beside `base_model`, where readers of format
1.1 accept it. In a dataset's manifest it is `fingerprint` among a model's facts. Optional in both."""


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys, two-space indent and a final newline: same value, same bytes."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` so that a reader sees all or nothing (temporary file, fsync, rename)."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path, rows: int | None = None) -> dict[str, Any]:
    """The manifest's entry for a file: sha256, size in bytes, and rows where it is a table."""
    entry: dict[str, Any] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    return entry if rows is None else entry | {"rows": rows}


def release_files(folder: Path) -> list[str]:
    """Posix paths of all files of a release folder but the manifest itself, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def check_format_version(version: object, where: str = MANIFEST) -> None:
    """Refuse a newer major version of the format.

    Raises:
        FormatError: `version` is not `MAJOR.MINOR.PATCH`.
        FormatTooNewError: its major is newer than `FORMAT_VERSION`'s.
    """
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise FormatError(
            f"{where}: expected format_version like {FORMAT_VERSION!r}, got {version!r}; no DACO release?"
        )
    if int(version.split(".")[0]) > int(FORMAT_VERSION.split(".")[0]):
        raise FormatTooNewError(
            f"{where}: format {version} is newer than our {FORMAT_VERSION}; run `pip install --upgrade daco`"
        )


def validate(manifest: object) -> None:
    """Check a manifest against the format; the writer and every reader call this.

    Raises:
        FormatTooNewError: written by a newer major version of the format.
        FormatError: lists every rule that is broken.
    """
    if not isinstance(manifest, Mapping):
        raise FormatError(f"{MANIFEST}: expected a JSON object, got {type(manifest).__name__}")
    check_format_version(manifest.get("format_version"))
    broken = [*_broken_keys(manifest), *_broken_files(manifest.get("files")), *_broken_facts(manifest)]
    if manifest.get("kind") == "dataset":
        broken += [*_broken_configs(manifest), *_broken_models(manifest.get("models"))]
    if broken:
        raise FormatError(f"{MANIFEST} breaks the format:\n- " + "\n- ".join(broken))


def _broken_keys(manifest: Mapping[str, Any]) -> list[str]:
    kind = manifest.get("kind")
    expected = _KEYS | (_DATASET_KEYS if kind == "dataset" else {})
    broken = [f"expected key {key!r}, got none" for key in expected if key not in manifest]
    broken += [f"unknown key {key!r}" for key in manifest if key not in expected]
    broken += [
        f"{key}: expected {wanted.__name__}, got {type(manifest[key]).__name__}"
        for key, wanted in expected.items()
        if key in manifest and not isinstance(manifest[key], wanted)
    ]
    if kind not in ("dataset", "model"):
        broken.append(f"kind: expected 'dataset' or 'model', got {kind!r}")
    if not _VERSION.fullmatch(str(manifest.get("version", ""))):
        broken.append(f"version: expected MAJOR.MINOR.PATCH, got {manifest.get('version')!r}")
    return broken


def _broken_files(files: object) -> list[str]:
    broken = []
    for path, entry in files.items() if isinstance(files, Mapping) else ():
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path or path == MANIFEST:
            broken.append(f"files: {path!r} is not a plain relative path of a release")
        if not isinstance(entry, Mapping) or not _SHA256.fullmatch(str(entry.get("sha256", ""))):
            broken.append(f"files: {path!r}: expected a sha256 of 64 hex digits")
        elif not _is_count(entry.get("bytes")):
            broken.append(f"files: {path!r}: expected a size in bytes, got {entry.get('bytes')!r}")
        elif not _is_count(entry.get("rows", 0)):
            broken.append(f"files: {path!r}: expected a number of rows, got {entry['rows']!r}")
    return broken


def _broken_facts(manifest: Mapping[str, Any]) -> list[str]:
    """What cards and gates read: recipe, sources and counts."""
    recipe, sources, counts = (manifest.get(key) for key in ("recipe", "sources", "counts"))
    broken = [
        f"recipe: {name!r}: expected an object of fields, got {section!r}"
        for name, section in (recipe.items() if isinstance(recipe, Mapping) else ())
        if not isinstance(section, Mapping)
    ]
    broken += [
        f"sources: expected objects with a name, got {source!r}"
        for source in (sources if isinstance(sources, list) else ())
        if not isinstance(source, Mapping) or not isinstance(source.get("name"), str)
    ]
    for stage, found in counts.items() if isinstance(counts, Mapping) else ():
        skipped = found.get("skipped", {}) if isinstance(found, Mapping) else None
        numbers = [found.get("in", 0), found.get("out", 0)] if isinstance(found, Mapping) else []
        if not isinstance(skipped, Mapping) or not all(map(_is_count, [*numbers, *skipped.values()])):
            broken.append(f"counts: {stage!r}: expected in, out and skipped as numbers, got {found!r}")
    return broken


def _broken_configs(manifest: Mapping[str, Any]) -> list[str]:
    configs, files = manifest.get("configs"), manifest.get("files")
    if not isinstance(configs, Mapping) or not isinstance(files, Mapping):
        return []
    broken = []
    for config, facts in configs.items():
        splits = facts.get("splits") if isinstance(facts, Mapping) else None
        if not isinstance(splits, Mapping) or not isinstance(facts.get("columns", []), list):
            broken.append(f"configs: {config!r}: expected an object with splits and columns, got {facts!r}")
            continue
        for split, part in splits.items():
            broken += _broken_split(f"{config}/{split}", split, part, files)
    return broken


def _broken_split(where: str, split: str, part: object, files: Mapping[str, Any]) -> list[str]:
    broken = []
    if not _SPLIT.fullmatch(split):
        broken.append(f"configs: split {split!r} of {where}: expected letters, digits and _ only")
    names = part.get("files") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(names, list):
        return [*broken, f"configs: {where}: expected an object with files and rows, got {part!r}"]
    missing = [name for name in names if not isinstance(name, str) or name not in files]
    broken += [f"configs: {where} names {name!r}, which is not among the files" for name in missing]
    entries = [files[name] for name in names if name not in missing]
    if not missing and all(
        isinstance(entry, Mapping) and _is_count(entry.get("rows", 0)) for entry in entries
    ):
        rows = sum(entry.get("rows", 0) for entry in entries)
        if rows != part.get("rows"):
            broken.append(f"configs: {where}: expected {part.get('rows')} rows, its files have {rows}")
    return broken


def _broken_models(models: object) -> list[str]:
    broken = []
    for name, facts in models.items() if isinstance(models, Mapping) else ():
        if not isinstance(facts, Mapping):
            broken.append(f"models: {name!r}: expected an object, got {facts!r}")
            continue
        where = f"models: {name!r}"
        found = broken_model(where, {key: facts.get(key) for key in MODEL_KEYS})
        found += broken_layers(where, facts.get("layers"), facts.get("n_layers"))
        found += broken_fingerprint(f"{where}: fingerprint", facts.get("fingerprint", {}))
        R, layers = facts.get("R"), facts.get("layers")
        if not found and (
            not isinstance(R, Mapping)
            or set(R) != {str(layer) for layer in layers}  # type: ignore[union-attr]
            or not all(_is_number(value) and value > 0 for value in R.values())
        ):
            found.append(f"{where}: expected R as a number above 0 for each of layers {layers}, got {R!r}")
        usual = facts.get("usual", {})
        if not found and (
            not isinstance(usual, Mapping)
            or not set(usual) <= {str(layer) for layer in layers}  # type: ignore[union-attr]
            or not all(_is_number(value) and value > 0 for value in usual.values())
        ):
            found.append(f"{where}: expected usual as numbers above 0 of some layers {layers}, got {usual!r}")
        broken += found
    return broken


def broken_model(where: str, facts: Mapping[str, Any]) -> list[str]:
    """What is wrong with the facts of a model, `MODEL_KEYS` with their types; `where` names them."""
    if set(facts) != set(MODEL_KEYS):
        return [f"{where}: expected keys {sorted(MODEL_KEYS)}, got {sorted(facts)}"]
    broken = [
        f"{where}: {key}: expected {kind.__name__}, got {facts[key]!r}"
        for key, kind in MODEL_KEYS.items()
        if type(facts[key]) is not kind
    ]
    return broken or [
        f"{where}: {key}: expected at least 1, got {facts[key]}"
        for key in ("hidden_size", "n_layers")
        if facts[key] < 1
    ]


def broken_layers(where: str, layers: object, n_layers: object) -> list[str]:
    """What is wrong with a list of layers: rising numbers below `n_layers` are right."""
    if (
        isinstance(layers, list)
        and layers
        and all(type(layer) is int for layer in layers)
        and layers == sorted(set(layers))
        and type(n_layers) is int
        and layers[0] >= 0
        and layers[-1] < n_layers
    ):
        return []
    return [f"{where}: expected layers as rising numbers from 0 and below {n_layers}, got {layers!r}"]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and validate `manifest.json` of a release folder.

    Raises:
        IntegrityError: there is none (the release was not finished) or it is not JSON.
        FormatError: it breaks the format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise IntegrityError(
            f"{folder}: expected {MANIFEST}, got none; the release is incomplete, write it again"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, where: str = MANIFEST) -> dict[str, Any]:
    """Parse and validate the bytes of a manifest; see `read_manifest` for what it raises."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise IntegrityError(f"{where}: expected JSON, got {error}; download or write it again") from error
    validate(manifest)
    return dict(manifest)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Validate `manifest` and write it, the last file of a release.

    Raises:
        FormatError: it breaks the format; nothing is written.
    """
    validate(manifest)
    write_atomic(folder / MANIFEST, canonical_json(manifest))


def check_size(path: Path, entry: Mapping[str, Any], name: str) -> None:
    """Compare one file with its manifest entry without reading it.

    Raises:
        IntegrityError: missing, or of another size.
    """
    if not path.is_file():
        raise IntegrityError(
            f"{name}: expected a file of {entry['bytes']} bytes, got none; download or build it again"
        )
    if (size := path.stat().st_size) != entry["bytes"]:
        raise IntegrityError(
            f"{name}: expected {entry['bytes']} bytes, got {size}: truncated? download or build it again"
        )


def check_file(path: Path, entry: Mapping[str, Any], name: str) -> None:
    """Compare one file with its manifest entry.

    Raises:
        IntegrityError: missing, of another size, or of another sha256.
    """
    check_size(path, entry, name)
    if (digest := sha256_file(path)) != entry["sha256"]:
        raise IntegrityError(
            f"{name}: expected sha256 {entry['sha256']}, got {digest}: altered; download or build it again"
        )


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Re-hash every file of a release folder against its manifest.

    Raises:
        IntegrityError: a file is missing, truncated or altered, or not in the manifest.
    """
    for name, entry in manifest["files"].items():
        check_file(folder / name, entry, name)
    if stray := [name for name in release_files(folder) if name not in manifest["files"]]:
        raise IntegrityError(f"{folder}: expected only the manifest's files, got also {stray}; remove them")
