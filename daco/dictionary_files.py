"""The files of a dictionary: reads them from a dataset release, writes them as a release folder of their own.

Reads and writes `data/<config>/*.parquet` of configs `concepts`, `directions_<model>` and, where there are,
`baseline_<model>`, `recognition_<model>` and `statistics_<model>`, and `manifest.json`.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from daco.errors import ArtefactNotFoundError, FormatError, UnknownLayerError
from daco.load import Snapshot
from daco.manifest import FORMAT_VERSION, MODEL_KEYS, file_entry, write_manifest
from daco.recognition import MEASURED, Recogniser, measured
from daco.sites import ModelFacts
from daco.tables import (
    CONCEPTS,
    directions_schema,
    read_table,
    recognition_schema,
    statistics_schema,
    write_table,
)

if TYPE_CHECKING:
    from daco.dictionary import ConceptDictionary


def baseline_schema(d_model: int) -> pa.Schema:
    """One row per layer: the mean reading of negatives, of `d_model` float32, and of how many links."""
    return pa.schema(
        [("layer", pa.int32()), ("vector", pa.list_(pa.float32(), d_model)), ("n_negative", pa.int64())]
    )


def read_concepts(snapshot: Snapshot) -> pd.DataFrame:
    """The concepts of a dataset release alone: one row a concept, columns of `daco.tables.CONCEPTS`."""
    concepts: pd.DataFrame = _read(snapshot, "concepts", "train", CONCEPTS).to_pandas()
    return concepts


def read_dictionary(
    snapshot: Snapshot, model: str | None, layers: Collection[int] | None, recognition: bool = False
) -> dict[str, Any]:
    """Arguments of `ConceptDictionary`, from a dataset release; see its `from_pretrained`."""
    name = _choose(snapshot, model)
    facts = snapshot.manifest["models"][name]
    model_facts = ModelFacts(
        **{key: facts[key] for key in MODEL_KEYS}, fingerprint=facts.get("fingerprint", {})
    )
    concepts = read_concepts(snapshot)
    ids, width = concepts["concept_id"].tolist(), model_facts.hidden_size
    wanted = _chosen(facts["layers"], layers, snapshot.name)
    baseline = _baseline(snapshot, name, width)
    recognised = [layer for layer in wanted if recognition and str(layer) in facts.get("usual", {})]
    return {
        "concepts": concepts,
        "vectors": {layer: _vectors(snapshot, name, layer, ids, width) for layer in wanted},
        "model": model_facts,
        "R": {layer: float(facts["R"][str(layer)]) for layer in wanted},
        "baseline": {layer: row for layer, row in baseline.items() if layer in wanted},
        "recognisers": {layer: _recogniser(snapshot, name, layer, ids, width) for layer in recognised},
        "reading": _reading(snapshot.manifest),
        "sources": [_source(snapshot)],
        "licences": list(snapshot.manifest["sources"]),
    }


def _chosen(known: list[int], layers: Collection[int] | None, where: str) -> list[int]:
    if unknown := sorted(set(layers or ()) - set(known)):
        raise UnknownLayerError(f"{where}: expected layers among {known}, got {unknown}")
    return known if layers is None else sorted(set(layers))


def _source(snapshot: Snapshot) -> dict[str, str]:
    manifest = snapshot.manifest
    found = {"name": str(manifest["name"]), "version": str(manifest["version"])}
    return found | ({"commit": snapshot.commit} if snapshot.commit else {})


def _reading(manifest: Mapping[str, Any]) -> str:
    reading = manifest["recipe"].get("activations", {}).get("reading", "last")
    if not isinstance(reading, str):
        raise FormatError(f"recipe.activations.reading: expected a text, got {reading!r}")
    return reading


def _choose(snapshot: Snapshot, model: str | None) -> str:
    names = sorted(snapshot.manifest["models"])
    if model is None and len(names) == 1:
        return str(names[0])
    if model not in names:
        raise FormatError(f"{snapshot.name}: expected model to be one of {names}, got {model!r}")
    return str(model)


def _read(snapshot: Snapshot, config: str, split: str, schema: pa.Schema) -> pa.Table:
    """All files of one split of a config."""
    try:
        files: list[Any] = snapshot.manifest["configs"][config]["splits"][split]["files"]
    except KeyError as error:
        raise FormatError(
            f"{snapshot.name}: expected config {config!r} with split {split!r}, got no {error}"
        ) from error
    return pa.concat_tables([read_table(snapshot.path(name), schema) for name in files])


def _vectors(snapshot: Snapshot, name: str, layer: int, ids: list[str], d_model: int) -> Tensor:
    table = _read(snapshot, f"directions_{name}", f"layer_{layer}", directions_schema(d_model))
    if table.column("concept_id").to_pylist() != ids:
        raise FormatError(
            f"directions_{name}/layer_{layer}: expected the rows of `concepts` in order, got others"
        )
    return _rows(table, d_model)


def _rows(table: pa.Table, d_model: int) -> Tensor:
    values = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.astype(np.float32).reshape(table.num_rows, d_model))


def _baseline(snapshot: Snapshot, name: str, d_model: int) -> dict[int, Tensor]:
    """Mean readings of negatives; empty where the release does not hold them."""
    if (config := f"baseline_{name}") not in snapshot.manifest["configs"]:
        return {}
    table = _read(snapshot, config, "train", baseline_schema(d_model))
    return dict(zip(table.column("layer").to_pylist(), _rows(table, d_model), strict=True))


def _recogniser(snapshot: Snapshot, name: str, layer: int, ids: list[str], d_model: int) -> Recogniser:
    """How the readings of a layer vary, and what tells its concepts."""
    split = f"layer_{layer}"
    table = _read(snapshot, f"recognition_{name}", split, recognition_schema(d_model))
    if table.column("concept_id").to_pylist() != ids:
        raise FormatError(f"recognition_{name}/{split}: expected the rows of `concepts` in order, got others")
    statistics = _read(snapshot, f"statistics_{name}", split, statistics_schema(d_model))
    if statistics.column("dimension").to_pylist() != list(range(d_model)):
        raise FormatError(f"statistics_{name}/{split}: expected dimensions 0 to {d_model - 1}, got others")
    mean = torch.from_numpy(statistics.column("mean").to_numpy().copy())
    usual = float(snapshot.manifest["models"][name]["usual"][str(layer)])
    try:
        return recogniser_of(table, mean, _rows(statistics, d_model), usual)
    except FormatError as error:
        raise FormatError(f"recognition_{name} or statistics_{name}, {split}: {error}") from error


def recogniser_of(table: pa.Table, mean: Tensor, inverse: Tensor, usual: float) -> Recogniser:
    """A recogniser from the rows of a split of config `recognition_<model>` and its statistics."""
    vectors, concepts = _rows(table, len(mean)), measured(table.select(MEASURED).to_pandas())
    return Recogniser(mean, inverse, vectors, concepts, usual)


# Writing.


def write_dictionary(
    dictionary: "ConceptDictionary", folder: Path, name: str, model: str, version: str
) -> None:
    """See `ConceptDictionary.save_pretrained`."""
    if not re.fullmatch(r"\w+", model):
        raise ValueError(f"model: expected letters, digits and _, got {model!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactNotFoundError(f"expected an empty or new folder, got {folder}; choose another")
    width, ids = dictionary.model.hidden_size, dictionary.concepts[["concept_id", "concept"]]
    table = pa.Table.from_pandas(dictionary.concepts, schema=CONCEPTS, preserve_index=False)
    tables = {("concepts", "train"): table}
    for layer in dictionary.layers:
        rows = dictionary.raw(layer)
        columns: dict[str, Any] = {
            "concept_id": pa.array(ids["concept_id"], pa.string()),
            "concept": pa.array(ids["concept"], pa.string()),
        }
        columns |= {"vector": vector_column(rows), "norm": pa.array(rows.norm(dim=1).numpy())}
        columns |= {"n_positive": table.column("n_positive"), "n_negative": pa.nulls(len(ids), pa.int32())}
        tables[f"directions_{model}", f"layer_{layer}"] = pa.table(columns, schema=directions_schema(width))
    if dictionary.baseline:
        tables[f"baseline_{model}", "train"] = baseline_table(dictionary.baseline, None)
    for layer, one in sorted(dictionary.recognisers.items()):
        tables[f"recognition_{model}", f"layer_{layer}"] = recognition_table(dictionary.concepts, one)
        tables[f"statistics_{model}", f"layer_{layer}"] = statistics_table(one)
    configs, files = _write_tables(folder, tables)
    write_manifest(folder, _manifest(dictionary, name, model, version, configs, files))


def recognition_table(concepts: pd.DataFrame, one: Recogniser) -> pa.Table:
    """The rows of a split of config `recognition_<model>`; what is not known is null."""
    schema = recognition_schema(one.vectors.shape[1])
    frame = pd.concat([concepts[["concept_id", "concept"]], one.concepts], axis=1)
    columns = {name: pa.array(frame[name], from_pandas=True) for name in frame.columns}
    columns["vector"] = vector_column(one.vectors)
    return pa.table(
        {name: columns[name].cast(schema.field(name).type) for name in schema.names}, schema=schema
    )


def statistics_table(one: Recogniser) -> pa.Table:
    """The rows of a split of config `statistics_<model>`."""
    columns = {
        "dimension": pa.array(range(len(one.mean)), pa.int32()),
        "mean": pa.array(one.mean.float().numpy()),
        "vector": vector_column(one.inverse.float()),
    }
    return pa.table(columns, schema=statistics_schema(len(one.mean)))


def vector_column(rows: Tensor) -> pa.FixedSizeListArray:
    """Rows `[n, d_model]` as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.contiguous().numpy().reshape(-1)), rows.shape[1])


def baseline_table(baseline: Mapping[int, Tensor], n_negative: int | None) -> pa.Table:
    """The rows of config `baseline_<model>`."""
    layers = sorted(baseline)
    rows = torch.stack([baseline[layer].float() for layer in layers])
    columns = {
        "layer": pa.array(layers, pa.int32()),
        "vector": vector_column(rows),
        "n_negative": pa.array([n_negative] * len(layers), pa.int64()),
    }
    return pa.table(columns, schema=baseline_schema(rows.shape[1]))


def _write_tables(
    folder: Path, tables: Mapping[tuple[str, str], pa.Table]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write each table as one file; returns the manifest's `configs` and `files`."""
    configs: dict[str, Any] = {}
    files = {}
    for (config, split), table in tables.items():
        path = f"data/{config}/{split}-00000-of-00001.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        rows = write_table(folder / path, table)
        files[path] = file_entry(folder / path, rows)
        entry = configs.setdefault(config, {"splits": {}, "columns": table.column_names})
        entry["splits"][split] = {"files": [path], "rows": rows}
    return configs, files


def _manifest(
    dictionary: "ConceptDictionary",
    name: str,
    model: str,
    version: str,
    configs: dict[str, Any],
    files: dict[str, Any],
) -> dict[str, Any]:
    import daco

    facts = asdict(dictionary.model) | {"layers": dictionary.layers}
    facts["R"] = {str(layer): dictionary.R[layer] for layer in dictionary.layers}
    if dictionary.recognisers:
        facts["usual"] = {str(layer): one.usual for layer, one in dictionary.recognisers.items()}
    return {
        "format_version": FORMAT_VERSION,
        "kind": "dataset",
        "name": name,
        "version": version,
        "files": files,
        "configs": configs,
        "models": {model: facts},
        "sources": dictionary.licences,
        "counts": {},
        "recipe": {"activations": {"reading": dictionary.reading}},
        "seeds": {},
        "versions": {"daco": daco.__version__},
        "facts": {"made_from": dictionary.sources},
    }
