"""What a release is and whether its files are whole: behind `daco info` and `daco verify`; writes nothing."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import LocalEntryNotFoundError

from daco.dictionary_files import read_concepts
from daco.errors import ArtefactNotFoundError, IntegrityError
from daco.load import Snapshot, resolve
from daco.manifest import release_files
from daco.sae_files import layer_folder, read_config
from daco.tables import ATOMS, POLARITIES, read_table

KINDS = ("model", "dataset")


def is_folder(name: str) -> bool:
    """Whether it names a folder, not a repo."""
    return Path(name).is_dir()


def find(repo_or_folder: str, kind: str | None, revision: str | None, offline: bool) -> Snapshot:
    """The release, of whichever kind it is.

    Raises:
        ArtefactNotFoundError: there is none of either kind.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": offline}
    if Path(repo_or_folder).is_dir():
        from daco.manifest import read_manifest

        return resolve(repo_or_folder, read_manifest(Path(repo_or_folder))["kind"], **options)
    problems = []
    for one in [kind] if kind else KINDS:
        try:
            return resolve(repo_or_folder, one, **options)
        except ArtefactNotFoundError as error:
            if isinstance(error.__cause__, LocalEntryNotFoundError) and not offline:
                raise  # the Hub cannot be reached: asking again takes as long
            problems.append(error)
    if len({str(problem) for problem in problems}) == 1 or kind:
        raise problems[0]
    # of two kinds, the one that is there but cannot be used is the one that was meant
    meant = [problem for problem in problems if "got neither" not in str(problem)]
    meant = [problem for problem in meant if " repo, got the " not in str(problem)]
    raise (
        meant[0]
        if meant
        else ArtefactNotFoundError(
            f"expected a folder or a repo {repo_or_folder}, got neither; check the name and your login"
        )
    )


def cached(repo_or_folder: str, kind: str | None, revision: str | None, download: bool) -> Snapshot:
    """The release as the cache has it, or from the Hub where it may be downloaded.

    Raises:
        ArtefactNotFoundError: there is none.
    """
    try:
        return find(repo_or_folder, kind, revision, offline=not download)
    except ArtefactNotFoundError as error:
        if download or not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        where = f"{repo_or_folder}@{revision}" if revision else repo_or_folder
        raise ArtefactNotFoundError(
            f"{where}: expected a release in the cache, got none; --download fetches it"
        ) from error


def described(snapshot: Snapshot) -> dict[str, Any]:
    """What a release is, as JSON-able facts."""
    manifest = snapshot.manifest
    found = {
        "name": manifest["name"],
        "kind": manifest["kind"],
        "version": manifest["version"],
        "format_version": manifest["format_version"],
        "commit": snapshot.commit,
        "licence": manifest["recipe"].get("release", {}).get("licence") or None,
        "files": len(manifest["files"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "sources": [
            {key: source.get(key) for key in ("name", "revision", "licence", "url")}
            for source in manifest["sources"]
        ],
        "limits": [str(text) for text in manifest["facts"].get("limits", [])],
    }
    return found | (_dataset(snapshot) if manifest["kind"] == "dataset" else _model(snapshot))


def _dataset(snapshot: Snapshot) -> dict[str, Any]:
    manifest = snapshot.manifest
    rows = {
        f"{config}/{split}": part["rows"]
        for config, facts in manifest["configs"].items()
        for split, part in facts["splits"].items()
    }
    labels = read_concepts(snapshot)["polarity"].value_counts().to_dict()
    return {
        "rows": rows,
        "concepts": {polarity: int(labels.get(polarity, 0)) for polarity in POLARITIES},
        "models": manifest["models"],
    }


def _model(snapshot: Snapshot) -> dict[str, Any]:
    config = read_config(snapshot.path("config.json"))
    has_evaluation = "evaluation.json" in snapshot.manifest["files"]
    evaluation = json.loads(snapshot.path("evaluation.json").read_bytes()) if has_evaluation else {}
    by_layer = evaluation.get("sae") or evaluation.get("layers") or {}
    layers = []
    for layer in config["layers"]:
        atoms = read_table(snapshot.path(f"{layer_folder(layer)}/atoms.parquet"), ATOMS)
        labels = atoms.column("polarity").to_pylist()
        counts: dict[str, Any] = {"layer": layer, "atoms": len(labels)}
        counts |= {name: labels.count(name) for name in ("undesirable", "desirable")}
        layers.append(counts | _figures(by_layer, layer))
    keys = ("base_model", "dictionary", "activation", "steering", "training")
    return {"layers": layers} | {key: config[key] for key in keys if key in config}


def _figures(by_layer: Any, layer: int) -> dict[str, Any]:
    found = by_layer.get(str(layer), {}) if isinstance(by_layer, Mapping) else {}
    return {key: found[key] for key in ("fve", "l0", "dead") if isinstance(found.get(key), int | float)}


class Checked(NamedTuple):
    """One file of a release, compared with the manifest."""

    file: str
    """Its path in the release."""
    state: str
    """`whole`, `not here` or `broken`."""
    problem: str
    """What is wrong."""


def check(snapshot: Snapshot) -> Iterator[Checked]:
    """Hash every file of a release again, one after another, and look for files it should not have.

    Of a repo, files that are not in the cache are `not here`, unless the snapshot may download them.
    """
    for name in sorted(snapshot.manifest["files"]):
        try:
            snapshot.path(name)
        except IntegrityError as error:
            yield Checked(name, "broken", str(error))
        except ArtefactNotFoundError as error:
            yield Checked(name, "not here", str(error))
        else:
            yield Checked(name, "whole", "")
    if snapshot.folder is not None:
        for name in release_files(snapshot.folder):
            if name not in snapshot.manifest["files"]:
                yield Checked(name, "broken", f"{name}: not in the manifest; remove it")
