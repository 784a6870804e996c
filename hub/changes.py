"""What changed since an older release, how large a step in version that asks for, and the CHANGELOG of it.

Reads two releases (folders, or repos at a revision); `write_changelog` writes `CHANGELOG.md` and one fact of
the manifest into the newer folder.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow.parquet as pq

from cards.escape import md, number
from daco.dictionary import ConceptDictionary
from daco.dictionary_files import read_concepts, read_dictionary
from daco.errors import DacoError, RecipeError
from daco.load import Snapshot, resolve
from daco.manifest import MODEL_KEYS, file_entry, read_manifest, write_atomic, write_manifest
from daco.sae_files import layer_folder, read_config
from daco.tables import ATOMS, read_table

CHANGELOG = "CHANGELOG.md"

LEVELS = ("patch", "minor", "major")
"""How large a change is, and which number of the version it raises.

major: what readers rely on is gone or means something else (a concept, config, column, layer or model
dropped, a direction turned, another base model or size of an SAE). minor: content was added or changed.
patch: the card or the documentation alone.
"""

TURNED = 0.9
"""A direction whose cosine to the older one is below this is another direction."""

MOVED = 0.9999
"""A direction whose cosine to the older one is below this moved."""

NAMES = 8
"""Names listed with a change; the tables of both releases have the rest."""

_TITLE = "# Changelog\n\nEvery release; tags never move.\n"
_SECTION = re.compile(r"^## ", re.MULTILINE)


class Change(NamedTuple):
    """One thing that changed."""

    level: str
    """One of LEVELS."""
    text: str
    """What changed, in words; plain text."""
    names: Sequence[str] = ()
    """Of what, the first NAMES of them; plain texts, from data."""

    def __str__(self) -> str:
        return f"{self.text}: {', '.join(self.names)}" if self.names else self.text


class Changes(NamedTuple):
    """What tells a release from an older one."""

    since: str
    """Version of the older one."""
    found: Sequence[Change]
    """The largest first."""

    @property
    def level(self) -> str:
        """How large all of it is."""
        return max((change.level for change in self.found), key=LEVELS.index, default="patch")

    @property
    def least(self) -> str:
        """The lowest version that the newer release may have."""
        return next_version(self.since, self.level)

    def to_json(self) -> dict[str, Any]:
        """The changes as JSON-able facts."""
        found = [{"level": c.level, "text": c.text, "names": list(c.names)} for c in self.found]
        return {"since": self.since, "level": self.level, "least_version": self.least, "changes": found}

    def __str__(self) -> str:
        lines = [f"since v{self.since}: {self.level}, at least v{self.least}"]
        return "\n".join([*lines, *(f"  {change.level:<6} {change}" for change in self.found)])


def next_version(version: str, level: str) -> str:
    """The lowest version above `version` that a change of this level may have."""
    major, minor, patch = map(int, version.split("."))
    return {
        "major": f"{major + 1}.0.0",
        "minor": f"{major}.{minor + 1}.0",
        "patch": f"{major}.{minor}.{patch + 1}",
    }[level]


def changes(older: str | Path, newer: Path) -> Changes:
    """Compare a release folder with an older release of it.

    Args:
        older: A release folder, or `org/name@tag` on the Hub.
        newer: The release folder.

    Raises:
        ArtefactNotFoundError: there is no such older release.
        FormatError: they are of different kinds, or one breaks the format.
        IntegrityError: a file that is compared is missing or damaged.
    """
    after = resolve(newer, read_manifest(newer)["kind"])
    return _compare(_older(older, after), after)


def _older(older: str | Path, newer: Snapshot) -> Snapshot:
    repo, _, revision = (str(older), "", "") if Path(older).is_dir() else str(older).partition("@")
    return resolve(repo, newer.manifest["kind"], revision=revision or None)


def _compare(before: Snapshot, after: Snapshot) -> Changes:
    by_kind = _of_dataset if after.manifest["kind"] == "dataset" else _of_model
    found = [*_common(before, after), *by_kind(before, after)]
    ordered = sorted(found, key=lambda change: -LEVELS.index(change.level))
    return Changes(before.manifest["version"], ordered)


def write_changelog(folder: Path, since: str | Path) -> Changes:
    """Write `CHANGELOG.md` of a release folder: what changed since an older release, above that one's own.

    Raises:
        RecipeError: its version is too low for what changed; nothing is written.
    """
    manifest = read_manifest(folder)
    after = resolve(folder, manifest["kind"])
    before = _older(since, after)
    found = _compare(before, after)
    if problem := too_low(manifest["version"], found.since, found.level):
        raise RecipeError(f"{folder}: {problem}\n{found}")
    write_atomic(folder / CHANGELOG, _TITLE + _section(manifest["version"], found) + _history(before))
    manifest["files"][CHANGELOG] = file_entry(folder / CHANGELOG)
    manifest["facts"]["changes"] = {"since": found.since, "level": found.level}
    if yanked := {**before.manifest["facts"].get("yanked", {}), **manifest["facts"].get("yanked", {})}:
        manifest["facts"]["yanked"] = yanked  # what was withdrawn stays so
    write_manifest(folder, manifest)
    return found


def yank(folder: Path, version: str, reason: str) -> None:
    """Write into a release that an older version is withdrawn: the card says so, publishing tags it again.

    Raises:
        RecipeError: the version is none, or not below the release's own; or there is no reason.
    """
    manifest = read_manifest(folder)
    if not re.fullmatch(r"\d+\.\d+\.\d+", version) or _numbers(version) >= _numbers(manifest["version"]):
        raise RecipeError(
            f"expected a version MAJOR.MINOR.PATCH below {manifest['version']} to withdraw, got {version!r}; "
            "build the release that replaces it with a higher release.version"
        )
    if not reason.strip():
        raise RecipeError(f"expected a reason to withdraw {version}, got none")
    manifest["facts"].setdefault("yanked", {})[version] = reason.strip()
    write_manifest(folder, manifest)


def supersede(folder: Path, repo: str) -> None:
    """Write into a release that newer ones are in another repo; the card says so."""
    manifest = read_manifest(folder)
    manifest["facts"]["new_version"] = repo
    write_manifest(folder, manifest)


def too_low(version: str, since: str, level: str) -> str:
    """What is wrong with a version after changes of this level; empty where nothing is."""
    least = next_version(since, level)
    if _numbers(version) >= _numbers(least):
        return ""
    return (
        f"expected at least v{least} after a {level} change since v{since}, got v{version}; "
        f"build it again with release.version={least}"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _section(version: str, found: Changes) -> str:
    lines = [f"- {md(change.text)}{_named(change.names)}" for change in found.found]
    body = "\n".join(lines or ["- The card or documentation alone."])
    return f"\n## v{version}\n\nSince v{found.since}, a {found.level} change:\n\n{body}\n"


def _named(names: Sequence[str]) -> str:
    return f": {', '.join(map(md, names))}" if names else ""


def _history(before: Snapshot) -> str:
    """The older release's own sections, or a word that it has none."""
    if CHANGELOG not in before.manifest["files"]:
        return f"\n## v{before.manifest['version']}\n\nBefore there was a changelog.\n"
    text = before.path(CHANGELOG).read_text("utf-8")
    first = _SECTION.search(text)
    return "\n" + text[first.start() :] if first else ""


# Both kinds.


def _common(before: Snapshot, after: Snapshot) -> Iterator[Change]:
    old, new = ({one["name"] for one in release.manifest["sources"]} for release in (before, after))
    yield from _both("source", old, new, dropped="minor")


def _both(what: str, old: Any, new: Any, dropped: str = "major") -> Iterator[Change]:
    """What is only in one of two sets of names."""
    if gone := sorted(set(old) - set(new)):
        yield Change(dropped, f"{_count(len(gone), what)} dropped", _some(gone))
    if come := sorted(set(new) - set(old)):
        yield Change("minor", f"{_count(len(come), what)} added", _some(come))


def _count(n: int, one: str, many: str = "") -> str:
    return f"{number(n)} {one if n == 1 else many or one + 's'}"


def _some(names: Sequence[Any]) -> list[str]:
    return [*map(str, names[:NAMES]), *([f"and {len(names) - NAMES:,} more"] if len(names) > NAMES else [])]


# Datasets.

BESIDE_DIRECTIONS = {
    ("recognition", "statistics"): "concepts are recognised otherwise",
    ("baseline",): "the mean reading of negatives changed",
}
"""What it means where two versions have these configs of a model, and not the same."""


def _of_dataset(before: Snapshot, after: Snapshot) -> Iterator[Change]:
    old, new = before.manifest["configs"], after.manifest["configs"]
    yield from _both("config", old, new)
    for config in sorted(set(old) & set(new)):
        columns = (release[config].get("columns", []) for release in (old, new))
        yield from _both(f"column of {config}", *columns)
    yield from _of_concepts(read_concepts(before), read_concepts(after))
    yield from _of_stimuli(before, after)
    if _hashes(before, "links") != _hashes(after, "links"):
        yield Change("minor", f"links changed: {_rows(before, 'links')} before, {_rows(after, 'links')} now")
    for model in sorted(set(before.manifest["models"]) & set(after.manifest["models"])):
        yield from _of_directions(model, before, after)
        for configs, what in BESIDE_DIRECTIONS.items():
            old_files, new_files = (
                [_hashes(release, f"{config}_{model}") for config in configs] for release in (before, after)
            )
            if all(old_files) and all(new_files) and old_files != new_files:
                yield Change("minor", f"{model}: {what}")


def _of_concepts(old: pd.DataFrame, new: pd.DataFrame) -> Iterator[Change]:
    old, new = old.set_index("concept_id"), new.set_index("concept_id")
    shared = old.index.intersection(new.index)
    for level, verb, table in (("major", "dropped", old), ("minor", "added", new)):
        names = table.loc[table.index.difference(shared, sort=False), "concept"].tolist()
        if names:
            yield Change(level, f"{_count(len(names), 'concept')} {verb}", _some(names))
    old, new = old.loc[shared].fillna(""), new.loc[shared].fillna("")
    for column, verb in (("polarity", "relabelled"), ("concept", "renamed"), ("definition", "defined anew")):
        which = new.index[(old[column] != new[column]).to_numpy()]
        names = new.loc[which, "concept"].tolist()
        if column != "definition":
            before, now = old.loc[which, column], new.loc[which, column]
            names = [f"{n} ({a} to {b})" for n, a, b in zip(names, before, now, strict=True)]
        if names:
            yield Change("minor", f"{_count(len(names), 'concept')} {verb}", _some(names))


def _of_stimuli(before: Snapshot, after: Snapshot) -> Iterator[Change]:
    """Which stimuli are gone or new; which of the others say something else is not looked up."""
    if _hashes(before, "stimuli") == _hashes(after, "stimuli"):
        return
    old, new = (_ids(release) for release in (before, after))
    gone, come = len(old - new), len(new - old)
    if gone:
        yield Change("minor", f"{_count(gone, 'stimulus', 'stimuli')} dropped")
    if come:
        yield Change("minor", f"{_count(come, 'stimulus', 'stimuli')} added")
    if not gone and not come:
        yield Change("minor", "rows of stimuli changed")


def _ids(release: Snapshot) -> set[str]:
    tables = (
        pq.read_table(release.path(name), columns=["stimulus_id"]) for name in _paths(release, "stimuli")
    )
    return {one for table in tables for one in table["stimulus_id"].to_pylist()}


def _paths(release: Snapshot, config: str) -> list[str]:
    splits = release.manifest["configs"].get(config, {}).get("splits", {})
    return [name for part in splits.values() for name in part["files"]]


def _hashes(release: Snapshot, config: str) -> list[str]:
    return [release.manifest["files"][name]["sha256"] for name in _paths(release, config)]


def _rows(release: Snapshot, config: str) -> str:
    splits = release.manifest["configs"].get(config, {}).get("splits", {})
    return number(sum(part["rows"] for part in splits.values()))


def _of_directions(model: str, before: Snapshot, after: Snapshot) -> Iterator[Change]:
    """What happened to one model's directions; a layer at a time, which bounds the memory."""
    old, new = (release.manifest["models"][model] for release in (before, after))
    if differing := [key for key in MODEL_KEYS if old[key] != new[key]]:
        yield Change("major", f"{model}: directions of another base model", differing)
        return
    yield from _both(f"layer of {model}", old["layers"], new["layers"])
    if _hashes(before, f"directions_{model}") == _hashes(after, f"directions_{model}"):
        return
    lowest: dict[str, tuple[float, int]] = {}
    for layer in sorted(set(old["layers"]) & set(new["layers"])):
        a, b = (ConceptDictionary(**read_dictionary(release, model, [layer])) for release in (before, after))
        try:
            moved = a.diff(b, moved=MOVED).moved
        except DacoError as error:
            yield Change("major", f"{model}: directions that cannot be compared", [str(error)])
            return
        for concept, cosine in zip(moved["concept"], moved["cosine"].tolist(), strict=True):
            lowest[concept] = min(lowest.get(concept, (2.0, 0)), (cosine, layer))
    ordered = sorted(lowest.items(), key=lambda item: item[1])
    for level, text, found in (
        ("major", f"turned (cosine below {TURNED})", [one for one in ordered if one[1][0] < TURNED]),
        ("minor", f"moved (cosine {TURNED} to {MOVED})", [one for one in ordered if one[1][0] >= TURNED]),
    ):
        said = [f"{concept} ({cosine:.3f} at layer {layer})" for concept, (cosine, layer) in found]
        if said:
            yield Change(level, f"{model}: {_count(len(said), 'direction')} {text}", _some(said))


# Models.


def _of_model(before: Snapshot, after: Snapshot) -> Iterator[Change]:
    old, new = (read_config(release.path("config.json")) for release in (before, after))
    if differing := [key for key in MODEL_KEYS if old["base_model"][key] != new["base_model"][key]]:
        said = [f"{key}: {old['base_model'][key]} before, {new['base_model'][key]} now" for key in differing]
        yield Change("major", "another base model", said)
    if old["activation"] != new["activation"]:
        yield Change("major", f"activation: {old['activation']} before, {new['activation']} now")
    yield from _both("layer", old["layers"], new["layers"])
    for name, value in sorted(new["steering"].items()):
        if old["steering"].get(name) != value:
            yield Change("minor", f"steering default {name}: {old['steering'].get(name)} before, {value} now")
    for layer in sorted(set(old["layers"]) & set(new["layers"])):
        yield from _of_layer(layer, before, after)


def _of_layer(layer: int, before: Snapshot, after: Snapshot) -> Iterator[Change]:
    name, weights = f"{layer_folder(layer)}/atoms.parquet", f"{layer_folder(layer)}/sae_weights.safetensors"
    old, new = (read_table(release.path(name), ATOMS).to_pandas() for release in (before, after))
    if len(old) != len(new):
        yield Change("major", f"layer {layer}: {_count(len(old), 'atom')} before, {number(len(new))} now")
        return
    hashes: list[Mapping[str, Any]] = [release.manifest["files"][weights] for release in (before, after)]
    if hashes[0]["sha256"] != hashes[1]["sha256"]:
        yield Change("minor", f"layer {layer}: other weights")
    if relabelled := int((old["polarity"] != new["polarity"]).sum()):
        yield Change("minor", f"layer {layer}: {_count(relabelled, 'atom')} relabelled")
