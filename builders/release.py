"""Write the two releases of a run, dataset and model, ready for their cards; `manifest.json` comes last.

Reads the folders of all finished stages; writes `release/dataset/` and `release/model/`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import daco
from builders.corpus import image_file, read_image, source_facts
from builders.directions import load_dictionary
from builders.recipe import Recipe, model_name, public_recipe, repo_name
from builders.recognition import load_figures, load_recognisers
from builders.stages import Work, done
from builders.steering import TUNING, load_layer, read_tuning, release_setting, steering_config
from builders.train_sae import threshold_form
from daco.dictionary import ConceptDictionary
from daco.dictionary_files import baseline_table, recognition_table, statistics_table
from daco.errors import DacoError, IntegrityError, RecipeError
from daco.manifest import (
    FINGERPRINT,
    FORMAT_VERSION,
    MODEL_KEYS,
    canonical_json,
    check_files,
    file_entry,
    read_manifest,
    release_files,
    write_atomic,
    write_manifest,
)
from daco.recognition import Recogniser
from daco.sae_files import layer_folder, write_config, write_layer
from daco.tables import (
    CONCEPTS,
    LINKS,
    MAX_VECTOR_ROWS,
    STIMULI,
    directions_schema,
    parquet_writer,
    read_table,
    recognition_schema,
    statistics_schema,
)

SHARD_BYTES = 400_000_000
"""Aimed size of a parquet file."""

GROUP_BYTES = 64_000_000
"""Aimed size of a row group: a reader holds one at a time."""

TEXT_ROWS = 100_000
"""Rows of a row group without vectors or images."""

PACKAGES = (
    "datasets",
    "matplotlib",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
"""Packages whose versions a manifest names, where they are installed."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""How `datasets` stores an image in parquet."""


class Split(NamedTuple):
    """The rows of one split of a config, before they are files."""

    config: str
    """Name of the config."""
    split: str
    """Name of the split."""
    schema: pa.Schema
    """Its columns."""
    tables: Iterable[pa.Table]
    """Its rows, lazily."""
    rows: int
    """How many there are."""
    bytes: int
    """About how large they are, stored."""
    max_group: int
    """Rows of a row group, at most."""


def features(schema: pa.Schema) -> dict[str, Any]:
    """The schema as `datasets` features; vectors in the style that all its versions read."""
    return {field.name: _feature(field.type) for field in schema}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "Sequence"}
    name = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"}


def described(schema: pa.Schema) -> pa.Schema:
    """The schema with `datasets` features in its metadata."""
    info = json.dumps({"info": {"features": features(schema)}}, sort_keys=True)
    return schema.with_metadata({"huggingface": info})


def write_split(folder: Path, part: Split) -> dict[str, Any]:
    """Write a split as parquet files of about `SHARD_BYTES`, a row group at a time.

    Args:
        folder: The release folder.
        part: What to write.

    Returns:
        `files` (posix paths) and `rows`, as the manifest has them.

    Raises:
        IntegrityError: there were other than `part.rows` rows.
    """
    group = max(1, min(part.max_group, GROUP_BYTES * part.rows // max(1, part.bytes)))
    n_groups = max(1, math.ceil(part.rows / group))
    per_file = math.ceil(n_groups / max(1, math.ceil(part.bytes / SHARD_BYTES)))
    n_files = math.ceil(n_groups / per_file)
    names = [f"data/{part.config}/{part.split}-{i:05d}-of-{n_files:05d}.parquet" for i in range(n_files)]
    groups, written = regroup(part.tables, group), 0
    for name in names:
        written += _write_file(folder / name, described(part.schema), groups, per_file)
    if written != part.rows or next(groups, None) is not None:
        raise IntegrityError(f"{part.config}: expected {part.rows} rows, got {written} or more; run again")
    return {"files": names, "rows": written}


def _write_file(path: Path, schema: pa.Schema, groups: Iterator[pa.Table], n_groups: int) -> int:
    """The next `n_groups` row groups as one file; returns its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with parquet_writer(path, schema) as writer:
        for _, table in zip(range(n_groups), groups, strict=False):
            writer.write_table(table.cast(schema), row_group_size=max(1, table.num_rows))
            rows += table.num_rows
    return rows


def regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` rows, but for the last."""
    held: list[pa.Table] = []
    n_held = 0
    for table in tables:
        while n_held + table.num_rows >= rows:
            head, table = table.slice(0, rows - n_held), table.slice(rows - n_held)
            yield pa.concat_tables([*held, head])
            held, n_held = [], 0
        held.append(table)
        n_held += table.num_rows
    if n_held:
        yield pa.concat_tables(held)


def removed_ids(path: str) -> pa.Array:
    """Stimulus ids of a text file, one a line; none where there is no file to read.

    Raises:
        RecipeError: there is no such file, or a line is no stimulus id.
    """
    if not path:
        return pa.array([], pa.string())
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"release.removed: expected a text file, got {path!r}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line and not re.fullmatch("[0-9a-f]{16}", line):
            raise RecipeError(f"{path}, line {number}: expected a stimulus id of 16 hex digits, got {line!r}")
    return pa.array(sorted({line for line in lines if line}), pa.string())


def links_without(path: Path, removed: pa.Array) -> pa.Table:
    """The links of a stage but those of removed stimuli; ranks keep their gaps."""
    links = read_table(path, LINKS)
    return links.filter(pc.invert(pc.is_in(links["stimulus_id"], removed)))


def stimuli_split(corpus: Path, links: pa.Table, with_images: bool) -> Split:
    """Stimuli that a link names, in the corpus's order; with their images where those may be passed on."""
    wanted = links["stimulus_id"].combine_chunks().unique()
    path = corpus / "stimuli.parquet"
    linked = pq.read_table(path, columns=["stimulus_id", "caption", "source_key", "image_url", "file"])
    linked = linked.filter(pc.is_in(linked["stimulus_id"], wanted))
    size = linked.drop_columns(["file"]).nbytes
    if with_images:
        size += sum(len(read_image(image_file(corpus, file))) for file in linked["file"].to_pylist())
    schema = STIMULI.append(pa.field("image", IMAGE)) if with_images else STIMULI
    tables = _stimuli(path, wanted, schema, corpus)
    return Split("stimuli", "train", schema, tables, linked.num_rows, size, TEXT_ROWS)


def _stimuli(path: Path, wanted: pa.Array, schema: pa.Schema, corpus: Path) -> Iterator[pa.Table]:
    batch_rows = 64 if "image" in schema.names else 8_192
    for batch in pq.ParquetFile(path).iter_batches(batch_rows):
        table = pa.Table.from_batches([batch])
        table = table.filter(pc.is_in(table["stimulus_id"], wanted))
        if "image" in schema.names:
            rows = table.select(["stimulus_id", "file", "image_sha256"]).to_pylist()
            images = [_image(image_file(corpus, row["file"]), row) for row in rows]
            table = table.append_column("image", pa.array(images, IMAGE))
        yield table.select(schema.names)


def _image(file: Path, row: Mapping[str, str]) -> dict[str, Any]:
    content = read_image(file)
    if hashlib.sha256(content).hexdigest() != row["image_sha256"]:
        raise IntegrityError(
            f"{file.name}: expected the image that the corpus stage read, got another; run that stage again"
        )
    return {"bytes": content, "path": f"{row['stimulus_id']}{file.suffix.lower()}"}


def table_split(config: str, table: pa.Table, schema: pa.Schema) -> Split:
    """A table of a stage, as it is."""
    tables = (pa.Table.from_batches([batch]) for batch in table.select(schema.names).to_batches(TEXT_ROWS))
    return Split(config, "train", schema, tables, table.num_rows, table.nbytes, TEXT_ROWS)


def directions_split(
    dictionary: ConceptDictionary, layer: int, model: str, n_positive: list[int], n_negative: list[int]
) -> Split:
    """The directions of one layer."""
    schema, vectors = directions_schema(dictionary.model.hidden_size), dictionary.raw(layer)
    size = vectors.numel() * 4
    rows = min(MAX_VECTOR_ROWS, max(1, GROUP_BYTES // (4 * vectors.shape[1])))
    frame = dictionary.concepts[["concept_id", "concept"]].assign(
        norm=vectors.norm(dim=1).numpy(), n_positive=n_positive, n_negative=n_negative
    )
    tables = (
        _directions(frame.iloc[i : i + rows], vectors[i : i + rows], schema)
        for i in range(0, len(frame), rows)
    )
    return Split(f"directions_{model}", f"layer_{layer}", schema, tables, len(frame), size, rows)


def baseline_split(dictionary: ConceptDictionary, model: str, n_negative: int) -> Split:
    """The mean reading of negatives at each layer, from which concepts that are added are told apart."""
    table = baseline_table(dictionary.baseline, n_negative)
    return Split(
        f"baseline_{model}", "train", table.schema, [table], len(table), table.nbytes, MAX_VECTOR_ROWS
    )


def recognition_splits(dictionary: ConceptDictionary, layer: int, model: str, one: Recogniser) -> list[Split]:
    """What tells the concepts of one layer, and how its readings vary."""
    d = dictionary.model.hidden_size
    tables = {
        "recognition": (recognition_table(dictionary.concepts, one), recognition_schema(d)),
        "statistics": (statistics_table(one), statistics_schema(d)),
    }
    return [
        _vectors_split(f"{name}_{model}", layer, table, schema) for name, (table, schema) in tables.items()
    ]


def _vectors_split(config: str, layer: int, table: pa.Table, schema: pa.Schema) -> Split:
    """A table with a vector a row."""
    rows = min(MAX_VECTOR_ROWS, max(1, GROUP_BYTES * len(table) // table.nbytes))
    parts = (table.slice(i, rows) for i in range(0, len(table), rows))
    return Split(config, f"layer_{layer}", schema, parts, len(table), table.nbytes, rows)


def _directions(frame: pd.DataFrame, vectors: Any, schema: pa.Schema) -> pa.Table:
    flat = pa.array(vectors.contiguous().numpy().reshape(-1))
    columns = {name: pa.array(frame[name]) for name in frame.columns}
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that made the release."""
    found = {"daco": daco.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except (
            importlib.metadata.PackageNotFoundError
        ):  # a checkout that is not installed, a package not needed
            continue
    return found


def dictionary_sha256(manifest: Mapping[str, Any], model: str) -> str:
    """Digest of a dictionary: of the sha256 of its concepts' and its directions' files."""
    configs = [manifest["configs"][name] for name in ("concepts", f"directions_{model}")]
    names = [name for c in configs for part in c["splits"].values() for name in part["files"]]
    files = {name: manifest["files"][name]["sha256"] for name in names}
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def write_dataset(work: Work, folder: Path) -> None:
    """Write the dataset release of a run: stimuli, links, concepts, and directions a layer."""
    corpus, removed = work.upstream("corpus"), removed_ids(work.recipe.release.removed)
    links = links_without(work.upstream("stimuli") / "links.parquet", removed)
    dictionary = load_dictionary(work.upstream("polarity"), work.upstream("directions"))
    facts = json.loads((work.upstream("directions") / "facts.json").read_text("utf-8"))
    model = model_name(work.recipe)
    stimuli = stimuli_split(corpus, links, work.recipe.corpus.redistribute_images)
    parts = [
        stimuli,
        table_split("links", links, LINKS),
        table_split(
            "concepts", read_table(work.upstream("polarity") / "concepts.parquet", CONCEPTS), CONCEPTS
        ),
    ]
    parts += [
        directions_split(dictionary, layer, model, facts["n_positive"], facts["n_negative"])
        for layer in dictionary.layers
    ]
    parts.append(baseline_split(dictionary, model, sum(facts["n_negative"])))
    recognisers = load_recognisers(work.upstream("recognition"))
    for layer, one in recognisers.items():
        parts += recognition_splits(dictionary, layer, model, one)
    configs: dict[str, Any] = {}
    for part in work.progress(parts, unit="split"):
        config = configs.setdefault(part.config, {"splits": {}, "columns": part.schema.names})
        config["splits"][part.split] = write_split(folder, part)
    ids = pq.read_table(corpus / "stimuli.parquet", columns=["stimulus_id"])["stimulus_id"]
    n_removed = int(pc.sum(pc.is_in(ids, removed)).as_py() or 0)
    skipped = {"not_linked": len(ids) - stimuli.rows - n_removed, "removed": n_removed}
    counts = {"in": len(ids), "out": stimuli.rows, "skipped": skipped}
    manifest = _manifest(work, folder, "dataset", work.recipe.release.dataset, {"release": counts})
    manifest["configs"] = configs
    described = {**facts["model"], "layers": dictionary.layers, "R": facts["R"]}
    if recognisers:
        described["usual"] = {str(layer): one.usual for layer, one in recognisers.items()}
    manifest["models"] = {model: described}
    write_manifest(folder, manifest)


def write_model(work: Work, folder: Path, dataset: Mapping[str, Any]) -> None:
    """Write the model release of a run: the SAEs with their atoms, the root config, the evaluation.

    Args:
        work: The stage.
        folder: The release folder.
        dataset: Manifest of the dataset release, which the SAEs were started from.
    """
    dictionary = load_dictionary(work.upstream("polarity"), work.upstream("directions"))
    evaluation = _evaluation(work)
    setting, training = release_setting(work.out, work.recipe, dictionary.layers), {}
    for layer in work.progress(dictionary.layers, unit="layer"):
        source = work.upstream("sae") / layer_folder(layer)
        training[str(layer)] = facts = json.loads((source / "facts.json").read_text("utf-8"))
        sae = load_layer(work.upstream("sae"), work.upstream("atoms"), layer, dictionary, setting.eta)
        write_layer(folder, dataclasses.replace(sae, **threshold_form(facts)), dictionary.model)
    config = _config(work.recipe, dictionary, dataset, training)
    config["steering"] = steering_config(setting, dictionary.layers)
    config["training"] |= _measured(evaluation.get("sae", {}))
    write_config(folder, config)
    write_atomic(folder / "evaluation.json", canonical_json(evaluation))
    if tuning := read_tuning(work.out):
        write_atomic(folder / TUNING, canonical_json(tuning))
    write_manifest(folder, _manifest(work, folder, "model", repo_name(work.recipe, "model"), {}))


def _evaluation(work: Work) -> dict[str, Any]:
    """What was evaluated, and beside the figures of atoms' names those of what is recognised."""
    found = dict(json.loads((work.upstream("evaluate") / "evaluation.json").read_text("utf-8")))
    recognised = load_figures(work.upstream("recognition"))
    for layer, row in found.get("names", {}).items():
        row |= recognised.get(layer, {})
    return found


TRAINING = ("start", "steps", "batch", "learning_rate", "l1", "holdout")
"""Fields of the recipe's `sae` that say how it was trained."""


def _config(
    recipe: Recipe, dictionary: ConceptDictionary, dataset: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """The root `config.json`."""
    first = training[str(dictionary.layers[0])]
    said = {
        name: getattr(recipe.sae, name)
        for name in TRAINING
        if name != "l1" or recipe.sae.activation == "relu"
    }
    tokens = {"n_atoms": first["n_atoms"], "n_train_tokens": first["n_train_tokens"]}
    known = dictionary.model.fingerprint
    return ({FINGERPRINT: dict(known)} if known else {}) | {
        "format_version": FORMAT_VERSION,
        "base_model": {name: getattr(dictionary.model, name) for name in MODEL_KEYS},
        "layers": dictionary.layers,
        "dictionary": {
            "dataset": f"{recipe.release.org}/{recipe.release.dataset}",
            "tag": f"v{recipe.release.version}",
            "sha256": dictionary_sha256(dataset, model_name(recipe)),
        },
        "activation": first["activation"],
        "training": said | tokens | ({"k": first["k"]} if first["k"] else {}),
    }


def _measured(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How well the SAE of each layer reconstructs, and how much of the model's cross-entropy it recovers."""
    found = {
        name: {layer: row[name] for layer, row in figures.items() if row.get(name) is not None}
        for name in ("fve", "ce_recovered")
    }
    return {name: by_layer for name, by_layer in found.items() if by_layer}


WORDNET = {
    "name": "WordNet",
    "revision": "3.0",
    "url": "https://wordnet.princeton.edu/license-and-commercial-use",
    "licence": "WordNet 3.0 licence",
    "redistribute_images": True,
}
"""Source of synsets and their definitions; it has no images that it could forbid."""


def names_synsets(work: Work) -> bool:
    """Whether any concept is a WordNet synset, whose definition is then passed on."""
    concepts = read_table(work.upstream("polarity") / "concepts.parquet", CONCEPTS)
    return any(str(i).startswith("wn30:") for i in concepts.column("concept_id").to_pylist())


def _manifest(
    work: Work, folder: Path, kind: str, name: str, more_counts: Mapping[str, Any]
) -> dict[str, Any]:
    """What the manifests of both releases say, over the files that are in the folder."""
    source = source_facts(work.recipe.corpus)
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "name": name,
        "version": work.recipe.release.version,
        "files": {path: file_entry(folder / path, _rows(folder / path)) for path in release_files(folder)},
        "sources": [source, *([WORDNET] if names_synsets(work) else [])],
        "counts": _counts(work) | dict(more_counts),
        "recipe": public_recipe(work.recipe),
        "seeds": {"run": work.seed},
        "versions": versions(),
        "facts": {"limits": _limits(work)} if _limits(work) else {},
    }


def _rows(path: Path) -> int | None:
    return pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None


def _counts(work: Work) -> dict[str, Any]:
    """Counts of every finished stage that kept any, and of the tokens."""
    sealed = [path.parent.name for path in sorted(work.out.glob("*/done.json"))]
    counts = {stage: done(work.out, stage)["counts"] for stage in sealed if stage != work.stage}
    tokens = json.loads((work.upstream("activations") / "facts.json").read_text("utf-8"))["tokens"]
    return {stage: found for stage, found in counts.items() if found.get("in")} | {"tokens": tokens}


def _limits(work: Work) -> list[str]:
    """What a reader must know that the numbers do not say."""
    missing = json.loads((work.upstream("atoms") / "facts.json").read_text("utf-8"))["missing_polarities"]
    limits = [f"No concept is {polarity}, so no atom is labelled {polarity}." for polarity in missing]
    if work.recipe.model.tiny:
        limits.append(
            "The model is a tiny one with random weights: this release shows that the pipeline works and the "
            "files load, and says nothing about safety."
        )
    return limits


def is_complete(folder: Path) -> bool:
    """Whether a release folder has a manifest and every file is as it says."""
    try:
        check_files(folder, read_manifest(folder))
    except DacoError:
        return False
    return True


def check_upstream(work: Work) -> None:
    """Raise IntegrityError where recognition is an earlier version's, before a release is discarded."""
    load_figures(work.upstream("recognition"))


def run(work: Work) -> None:
    """The stage: a complete release is left alone, a half-written one is written anew."""
    dataset, model = work.folder / "dataset", work.folder / "model"
    if not is_complete(dataset):
        _emptied(dataset)
        write_dataset(work, dataset)
    manifest = read_manifest(dataset)
    if not is_complete(model):
        _emptied(model)
        write_model(work, model, manifest)
    work.drop_shards()
    work.finish(manifest["counts"]["release"])


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
