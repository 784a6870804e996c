"""The plain facts a card needs, from a release folder; what is unknown is empty, and its section is dropped.

Reads `manifest.json`, the tables and, of a model, `config.json`, `evaluation.json` and the layers' files.

Names and permissions come from the manifest's `recipe.release` (org, dataset, model, licence, contact); its
`facts` override them with the same keys, and may add `repo_id`, `pretty_name` and `limits` (texts).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from cards.album import PICTURES
from cards.escape import number, one_line
from cards.suites import SECTIONS, model_index, suite_facts
from cards.tuning import TUNING, chosen_results, tuning_facts
from daco.errors import FormatError, IntegrityError
from daco.manifest import read_manifest
from daco.sae_files import validate_config
from daco.tables import POLARITIES

CARD = "README.md"

CONFIG_NOTES = {
    "stimuli": "one row per unique caption-image pair",
    "links": "one row per concept and stimulus: positives with their rank and distance, negatives",
    "concepts": "one row per concept, in dictionary order",
    "directions": "one row per concept, one split per layer: the concept's raw direction",
    "baseline": "one row per layer: the mean reading of negatives, from which an added concept is told apart",
    "recognition": "one row per concept, one split per layer: what tells it from a reading, and how well",
    "statistics": "one row per dimension, one split per layer: mean and inverse covariance of readings",
}
"""What a row of each config is; `directions_<model>` and the like share one note."""

OF_MODEL = ("directions", "baseline", "recognition", "statistics")
"""Configs that there are for each model."""

LOADED = ("stimuli", "links", "concepts", "directions")
"""Configs that the quick start loads."""

BASE_KEYS = ("id", "revision", "model_type", "hidden_size", "n_layers")
"""What is said of a model, in a manifest's `models` and a config's `base_model`."""

UNITS = {
    "corpus": "pairs",
    "concepts": "concepts",
    "clip": "pairs",
    "embeddings": "pairs",
    "stimuli": "concepts",
    "polarity": "concepts",
    "activations": "stimuli",
    "tokens": "tokens",
    "directions": "links",
    "recognition": "concepts, a layer",
    "sae": "tokens",
    "atoms": "atoms",
    "tune": "validation items",
    "evaluate": "stimuli",
    "release": "pairs",
}
"""What the counts of each stage count, in the order of the stages."""

OF_MODELS = ("tokens", "sae", "atoms", "tune", "evaluate")
"""Stages that a dataset does not depend on."""

EVALUATION_NOTES = {
    "chance": "share of all concepts that a caption names",
    "atoms_precision": "share of the concepts nearest to atoms that fire (last token) that captions say",
    "atoms_recall": "share of what captions say that those are: atoms tell sides apart, hardly what is shown",
    "recognised_precision": "share of the concepts that the dictionary recognises that captions say",
    "recognised_recall": "share of what captions say that it recognises (95 % intervals over pictures)",
    "fve": "variance explained on held-out tokens (95 % intervals over pictures)",
    "fve_at_start": "the same before training",
    "l0": "atoms active per token",
    "dead": "atoms that never fired",
    "ce": "cross-entropy of the model's own answers, in nats a token",
    "ce_spliced": "the same with the layer's output replaced by the SAE's reconstruction",
    "ce_ablated": "the same with zeros there",
    "ce_recovered": "share of what zeros lose that the reconstruction keeps",
    "changed": "share of positions steered",
    "relative_change": "size of the change over size of the activation, after the last layer",
    "kl": "KL divergence of the next token from the unsteered model, in nats",
    "next_token_changed": "share of prompts with another likeliest next token (95 % intervals over pictures)",
    "n_fired": "undesirable atoms or concepts that fired",
}
"""What the figures of an evaluation are."""

ROWS_ARE = {"names": "layer", "sae": "layer", "layers": "layer", "steering": "method", "retrieval": "links"}
"""What a row of each section of an evaluation is."""

SAMPLES = 3
"""Example concepts of each polarity, and example atoms of each layer and polarity."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)


def card_facts(folder: Path) -> dict[str, Any]:
    """All facts for the card of a release folder, with the card's YAML `metadata`.

    Raises:
        IntegrityError: a file is missing or unreadable.
        FormatError: the manifest or config breaks the format.
    """
    manifest = read_manifest(folder)
    try:
        facts = _common(folder, manifest)
        return facts | (_dataset if manifest["kind"] == "dataset" else _model)(folder, manifest, facts)
    except (pa.ArrowException, SafetensorError, OSError) as error:
        raise IntegrityError(
            f"{folder.name}: expected readable tables and weights, got {error}; build the release again"
        ) from error
    except (TypeError, AttributeError, KeyError) as error:
        raise FormatError(
            f"{folder.name}: expected facts of a release in its manifest, got something else ({error!r}); "
            "mend `facts` or build the release again"
        ) from error


def repo_id(manifest: Mapping[str, Any]) -> str:
    """The repo that the manifest says the release is for, `org/name`; empty when it does not say."""
    release = _release(manifest)
    name = release.get(manifest["kind"]) or manifest["name"]
    found = release.get("repo_id") or f"{release.get('org', '')}/{name}"
    return str(found) if is_hub_id(found) else ""


def is_hub_id(text: object) -> bool:
    """Whether a text can be the id of a repo on a Hub, `org/name`."""
    return isinstance(text, str) and _HUB_ID.fullmatch(text) is not None


def _release(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {**manifest["recipe"].get("release", {}), **manifest["facts"]}


def _common(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    release = _release(manifest)
    return {
        "kind": manifest["kind"],
        "name": one_line(release.get("pretty_name") or manifest["name"]),
        "repo_id": repo_id(manifest),
        "tag": f"v{manifest['version']}",
        "yanked": dict(sorted(release.get("yanked", {}).items())),
        "format_version": manifest["format_version"],
        "licence": str(release.get("licence", "")),
        "contact": release.get("contact", ""),
        "limits": list(release.get("limits", ())),
        "new_version": str(release.get("new_version", "")),
        "outputs": {one["code"]: one["output"] for one in release.get("quick_start", ())},
        "pictures": [name for name in PICTURES if name in manifest["files"]],
        "files": [
            _file(folder, path, entry) for path, entry in sorted(manifest["files"].items()) if path != CARD
        ],
        "counts": _counts(manifest["counts"]),
        "sources": manifest["sources"],
        "seeds": manifest["seeds"],
        "versions": dict(sorted(manifest["versions"].items())),
    }


def _file(folder: Path, path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    rows, shapes, types = None, [], []
    if path.endswith(".parquet"):
        facts = pq.read_metadata(folder / path)
        schema = facts.schema.to_arrow_schema()
        rows, shapes = facts.num_rows, [("", f"{facts.num_rows}×{len(schema)}")]
        types = [_type(field.type) for field in schema]
    elif path.endswith(".safetensors"):
        shapes, types = _tensors(folder / path)
    found = {"path": path, "rows": rows, "shapes": shapes, "types": sorted(set(types))}
    return found | {key: entry[key] for key in ("bytes", "sha256")}


def _tensors(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, shape) of every tensor, and the dtypes of all."""
    with safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        shapes = [(name, "×".join(map(str, one.get_shape()))) for name, one in slices.items()]
        return shapes, [str(one.get_dtype()) for one in slices.values()]


def _type(kind: pa.DataType) -> str:
    """A column's type as people write it: a vector of 32 is `float[32]`."""
    if pa.types.is_fixed_size_list(kind):
        return f"{_type(kind.value_type)}[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list of {_type(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "image" if {field.name for field in kind} == {"bytes", "path"} else "struct"
    return "float32" if pa.types.is_float32(kind) else str(kind)


def _counts(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts by stage in the order of the stages, what was skipped written out."""
    order = list(UNITS)
    stages = sorted(counts, key=lambda name: (order.index(name) if name in order else len(order), name))
    rows = []
    for stage in stages:
        skipped = sorted(counts[stage].get("skipped", {}).items())
        reasons = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in skipped if n)
        row = {"stage": stage, "unit": UNITS.get(stage, ""), "skipped": reasons}
        rows.append(row | {key: counts[stage].get(key) for key in ("in", "out")})
    return rows


def _dataset(folder: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    configs = [_config(name, manifest["configs"][name]) for name in _config_order(manifest["configs"])]
    models = [_model_line(name, model) for name, model in sorted(manifest["models"].items())]
    columns = manifest["configs"].get("stimuli", {}).get("columns", ())
    return {
        "counts": [row for row in facts["counts"] if row["stage"] not in OF_MODELS],
        "configs": configs,
        "models": models,
        "has_images": "image" in columns,
        "polarities": _value_counts(folder, manifest, "concepts", "polarity"),
        "roles": _value_counts(folder, manifest, "links", "role"),
        "samples": _sample_concepts(folder, manifest),
        "recognition": list(_recognition(folder, manifest)),
        "metadata": _dataset_metadata(folder, manifest, facts),
    }


def _config_order(configs: Mapping[str, Any]) -> list[str]:
    """The default config first: the Hub and `datasets` choose a builder by the first one's files."""
    known = list(CONFIG_NOTES)
    return sorted(configs, key=lambda name: (known.index(name) if name in known else len(known), name))


def _config(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    kind = next((one for one in OF_MODEL if name.startswith(f"{one}_")), name)
    return {
        "name": name,
        "kind": kind if kind in LOADED else "",
        "note": CONFIG_NOTES.get(kind, ""),
        "splits": {split: part["rows"] for split, part in sorted(config["splits"].items(), key=_split_key)},
        "columns": list(config.get("columns", ())),
    }


def _split_key(item: tuple[str, Any]) -> tuple[int, str]:
    layer = re.fullmatch(r"layer_(\d+)", item[0])
    return (int(layer[1]) if layer else -1, item[0])


def _model_line(name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name} | {key: model.get(key) for key in (*BASE_KEYS, "layers", "R")}


def _config_files(manifest: Mapping[str, Any], config: str) -> list[str]:
    splits = manifest["configs"].get(config, {}).get("splits", {})
    return [path for _, part in sorted(splits.items()) for path in part["files"]]


def _value_counts(folder: Path, manifest: Mapping[str, Any], config: str, column: str) -> dict[str, int]:
    """How often each value of a column occurs, read file by file."""
    total: dict[str, int] = {}
    for path in _config_files(manifest, config):
        counted = pc.value_counts(pq.read_table(folder / path, columns=[column])[column])
        for row in counted.to_pylist():
            total[row["values"]] = total.get(row["values"], 0) + row["counts"]
    return dict(sorted(total.items()))


def _recognition(folder: Path, manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each model and layer: how many concepts can be named, and how often rightly."""
    for model in sorted(manifest["models"]):
        splits = manifest["configs"].get(f"recognition_{model}", {}).get("splits", {})
        for split, part in sorted(splits.items(), key=_split_key):
            columns = ["threshold", "precision", "recall"]
            table = pa.concat_tables(pq.read_table(folder / path, columns=columns) for path in part["files"])
            row = {"model": model, "layer": split.removeprefix("layer_"), "concepts": table.num_rows}
            row["named"] = table.num_rows - table["threshold"].null_count
            yield row | {name: pc.mean(table[name]).as_py() for name in columns[1:]}


def _sample_concepts(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first concepts of each polarity, in dictionary order."""
    columns = ["concept", "polarity", "definition", "n_positive"]
    taken: dict[str, list[dict[str, Any]]] = {polarity: [] for polarity in POLARITIES}
    for path in _config_files(manifest, "concepts"):
        table = pq.read_table(folder / path, columns=columns)
        for polarity, rows in taken.items():
            chosen = table.filter(pc.equal(table["polarity"], polarity)).slice(0, SAMPLES - len(rows))
            rows.extend(chosen.to_pylist())
    return [row for rows in taken.values() for row in rows]


def _dataset_metadata(folder: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """YAML of a dataset card. No features: those of vectors do not survive YAML, the parquet has them."""
    configs = []
    for name in _config_order(manifest["configs"]):
        splits = sorted(manifest["configs"][name]["splits"].items(), key=_split_key)
        entry: dict[str, Any] = {"config_name": name}
        if name == "stimuli":
            entry["default"] = True
        entry["data_files"] = [{"split": split, "path": list(part["files"])} for split, part in splits]
        configs.append(entry)
    stimuli = manifest["configs"].get("stimuli", {}).get("splits", {})
    rows = sum(part["rows"] for part in stimuli.values())
    return {
        **_licence_metadata(facts["licence"]),
        "pretty_name": facts["name"],
        "language": ["en"],
        "tags": ["daco", "multimodal", "concepts", "activation-steering", "interpretability", "safety"],
        "size_categories": [next((name for limit, name in _SIZES if rows < limit), "n>10M")],
        "dataset_info": [
            _dataset_info(folder, manifest, name) for name in _config_order(manifest["configs"])
        ],
        "configs": configs,
    }


def _dataset_info(folder: Path, manifest: Mapping[str, Any], config: str) -> dict[str, Any]:
    """What `datasets` knows of a config before it reads it: from its parquet files.

    Features of configs with vectors are left to the parquet schema: they do not survive YAML.
    """
    splits, info = [], {"config_name": config}
    parts = sorted(manifest["configs"][config]["splits"].items(), key=_split_key)
    for split, part in parts:
        read = [pq.read_metadata(folder / name) for name in part["files"]]
        stored = sum(one.row_group(i).total_byte_size for one in read for i in range(one.num_row_groups))
        splits.append({"name": split, "num_bytes": stored, "num_examples": sum(one.num_rows for one in read)})
    schema = pq.read_schema(folder / parts[0][1]["files"][0])
    features = [{"name": field.name, "dtype": _type(field.type)} for field in schema]
    if not any("[" in one["dtype"] or " " in one["dtype"] for one in features):
        info["features"] = features
    files = [name for _, part in parts for name in part["files"]]
    return info | {
        "splits": splits,
        "download_size": sum(manifest["files"][name]["bytes"] for name in files),
        "dataset_size": sum(one["num_bytes"] for one in splits),
    }


def _licence_metadata(licence: str) -> dict[str, str]:
    """The `license` keys; a name that cannot be an id of the Hub's list goes under `other`."""
    if not licence:
        return {}
    if _LICENCE_ID.fullmatch(licence.lower()):
        return {"license": licence.lower()}
    return {"license": "other", "license_name": one_line(licence)}


def _model(folder: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    config = _json(folder / "config.json")
    validate_config(config)
    layers = [_layer(folder, layer) for layer in config.get("layers", ())]
    evaluation = _json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else {}
    tuning = _json(folder / TUNING) if (folder / TUNING).is_file() else {}
    base = {key: config.get("base_model", {}).get(key) for key in BASE_KEYS}
    return {
        "base": base,
        "base_on_hub": is_hub_id(base["id"]),
        "example": one_line(_release(manifest).get("example", "")),
        "dictionary": {key: config.get("dictionary", {}).get(key) for key in ("dataset", "tag")},
        "activation": config.get("activation", ""),
        "start": manifest["recipe"].get("sae", {}).get("start", ""),
        "training": scalars(config.get("training", {})),
        "steering": scalars(config.get("steering", {})),
        "layers": layers,
        "evaluation": tables_of({k: v for k, v in evaluation.items() if k not in SECTIONS}),
        "safety": suite_facts(evaluation),
        "tuning": tuning_facts(tuning) if tuning else {},
        "metadata": _model_metadata(config, facts, evaluation, tuning),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path.name}: expected a JSON object, got {error}; write the release again"
        ) from error
    if not isinstance(value, dict):
        raise FormatError(
            f"{path.name}: expected a JSON object, got {type(value).__name__}; write the release again"
        )
    return value


def _layer(folder: Path, layer: int) -> dict[str, Any]:
    atoms = pq.read_table(folder / f"layers.{layer}" / "atoms.parquet")
    polarity = atoms["polarity"]
    counted = {name: pc.sum(pc.equal(polarity, name)).as_py() or 0 for name in POLARITIES}
    dead = pc.sum(pc.equal(atoms["firing_rate"], 0)).as_py() or 0
    samples = [row for name in ("undesirable", "desirable") for row in _sample_atoms(atoms, name)]
    return {
        "layer": layer,
        "atoms": atoms.num_rows,
        "polarities": counted,
        "dead": dead,
        "R": _R(folder, layer),
    } | {"samples": samples}


def _R(folder: Path, layer: int) -> float:
    with safe_open(folder / f"layers.{layer}" / "steering.safetensors", "numpy") as file:
        return float(file.get_tensor("R").reshape(-1)[0])


def _sample_atoms(atoms: Any, polarity: str) -> list[dict[str, Any]]:
    """The atoms of a polarity with the largest cosine to its centroid, ties to the lower atom."""
    cosine = f"cos_{polarity}"
    of_polarity = atoms.filter(pc.equal(atoms["polarity"], polarity))
    top = of_polarity.sort_by([(cosine, "descending"), ("atom", "ascending")]).slice(0, SAMPLES)
    return [
        {"atom": row["atom"], "polarity": polarity, "cosine": row[cosine], "firing_rate": row["firing_rate"]}
        | {"nearest": list(zip(row["nearest_concepts"], row["nearest_cosines"], strict=True))[:SAMPLES]}
        for row in top.to_pylist()
    ]


def _model_metadata(
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    tuning: Mapping[str, Any],
) -> dict[str, Any]:
    base, dictionary = config.get("base_model", {}).get("id"), config.get("dictionary", {}).get("dataset")
    metadata: dict[str, Any] = _licence_metadata(facts["licence"])
    if is_hub_id(base):
        metadata |= {"base_model": base, "base_model_relation": "adapter"}
    metadata |= {"library_name": "daco", "pipeline_tag": "image-text-to-text"}
    if is_hub_id(dictionary):
        metadata["datasets"] = [dictionary]
    tags = ["daco", "sparse-autoencoder", "saelens", "activation-steering", "interpretability", "safety"]
    if is_hub_id(facts["new_version"]):
        metadata["new_version"] = facts["new_version"]
    results = [one for entry in model_index(evaluation, facts["name"]) for one in entry["results"]]
    results += [*_reconstruction(evaluation), *chosen_results(tuning)]
    index = {"model-index": [{"name": facts["name"], "results": results}]} if results else {}
    return metadata | {"tags": tags} | index


def _reconstruction(evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """How well the SAE of each layer reconstructs, as entries of the `model-index`."""
    for section in ("sae", "layers"):
        for layer, row in evaluation.get(section, {}).items():
            if not isinstance(row, Mapping) or not _is_figure(row.get("fve")):
                continue
            n = f" (n = {row['n_tokens']:,})" if isinstance(row.get("n_tokens"), int) else ""
            yield {
                "task": {"type": "feature-extraction", "name": f"Reconstruction, layer {one_line(layer)}"},
                "dataset": {"type": "held-out", "name": f"Held-out tokens{n}"},
                "metrics": [{"type": "fve", "name": "Variance explained", "value": row["fve"]}],
            }


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def scalars(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts as one level of `a.b` keys; lists of scalars are joined, empty ones dropped."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= scalars(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            flat |= {f"{prefix}{key}": ", ".join(map(str, item))} if item else {}
        elif item is not None and item != "":
            flat[f"{prefix}{key}"] = item
    return flat


def tables_of(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Evaluation facts as tables: a section of sections has a row for each, others a row for each number."""
    loose = {key: value for key, value in evaluation.items() if not isinstance(value, Mapping)}
    sections = [*evaluation.items(), *([("overall", loose)] if scalars(loose) else [])]
    return [_table(title, section) for title, section in sections if isinstance(section, Mapping) and section]


def _table(title: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """One section: its rows of figures, those that all rows share apart, and what the figures are."""
    if all(isinstance(row, Mapping) for row in section.values()):
        # lists are for programs: a table of figures has no room for them
        found = {
            name: {k: _with_interval(k, row) for k, v in row.items() if not isinstance(v, list)}
            for name, row in section.items()
        }
        titles = [str(row.pop("method", name)) for name, row in found.items()]
        names = titles if len(set(titles)) == len(titles) else list(found)
        rows = {name: scalars(row) for name, row in zip(names, found.values(), strict=True)}
    else:
        rows = {name: {"value": value} for name, value in scalars(section).items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    shared = _shared(rows, columns)
    columns = [column for column in columns if column not in shared]
    notes = {column: EVALUATION_NOTES[column] for column in columns if column in EVALUATION_NOTES}
    of = ROWS_ARE.get(title, "")
    return {
        "title": title,
        "rows_are": of,
        "columns": columns,
        "rows": rows,
        "shared": shared,
        "notes": notes,
    }


def _with_interval(name: str, row: Mapping[str, Any]) -> Any:
    """A figure, with its 95 % interval where the row has one."""
    spread = row.get(f"{name}_interval")
    if not isinstance(spread, list) or len(spread) != 2:
        return row[name]
    low, high = (number(value) for value in spread)
    return f"{number(row[name])} ({low} to {high})"


def _shared(rows: Mapping[str, Mapping[str, Any]], columns: list[str]) -> dict[str, Any]:
    """How many there were of what, where that is the same for all of several rows."""
    found = {}
    for column in columns:
        values = [row.get(column) for row in rows.values()]
        if column.startswith("n_") and len(values) > 1 and values.count(values[0]) == len(values):
            found[column] = values[0]
    return found
