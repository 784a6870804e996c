"""Every check of a release that needs no network, made before anything leaves this machine.

Reads a staged release folder and loads it as its users will; writes only to a temporary folder.
"""

import csv
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builders.vision import ensure_torchvision
from cards.album import EXAMPLES, PICTURES
from cards.facts import CARD
from daco.errors import DacoError
from daco.manifest import MANIFEST, check_file, read_manifest, release_files
from daco.sae_files import read_config
from daco.sites import ModelFacts
from hub.changes import too_low
from hub.local.card_rules import card_data, check_card
from hub.plan import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from daco import SteeringSAE

EXECUTABLE = (".bin", ".pt", ".pkl", ".pickle", ".pth", ".ckpt", ".npy", ".npz", ".joblib")
"""Suffixes of formats that can run code when they are opened."""

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an AWS access key": r"\bAKIA[0-9A-Z]{16}\b",
    "an API key": r"\bsk-(?:[A-Za-z]+-)?[A-Za-z0-9_]{20,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
"""What a secret looks like, in the syntax that `re` and RE2 share."""

CARD_KEYS = {
    "dataset": ("license", "pretty_name", "tags", "size_categories", "configs"),
    "model": ("license", "library_name", "pipeline_tag", "tags"),
}
"""Metadata a card must have."""

MORE_CARD_KEYS = {
    "dataset": ("license_name", "language", "dataset_info"),
    "model": ("license_name", "base_model", "base_model_relation", "datasets", "model-index", "new_version"),
}
"""Further metadata a card may have, and no other: what a Hub reads there changes what it shows and runs."""

SECTIONS = (
    *("## Files", "## How it was made", "## Numbers", "## Limits and misuse", "## Licence"),
    *("## Versions", "## Citation"),
)
"""Headings that a card must have, in this order."""

PROMPTS = frozenset(
    (
        *("behavior", "behaviour", "goal", "instruction", "jailbreak", "message", "messages"),
        *("prompt", "prompts", "query", "question", "request"),
    )
)
"""Names of columns and fields that hold what somebody asks a model; such texts may be harmful."""

TINY_ATTENTION = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}

NO_LICENCE = frozenset({"", "-", "?", "n/a", "na", "none", "tbd", "todo", "unknown"})
"""What stands for a licence where there is none; without a licence nothing may be passed on."""

UNREADABLE = (pa.ArrowException, OSError)
"""What pyarrow raises on a damaged parquet file."""

PIXELS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Suffixes of pictures."""

PLOTS = tuple(name for name in PICTURES if name != EXAMPLES)
"""Pictures that hold nothing of any source."""

_BINARY = (".safetensors", *PIXELS)


def check_release(folder: Path) -> list[Refusal]:
    """Every reason not to publish a staged release folder; empty when it may leave.

    Checks that need readable files are left out while there are reasons that they would only repeat.
    """
    try:
        manifest = read_manifest(folder)
    except DacoError as error:
        return [Refusal(str(error), MANIFEST, "write the release again")]
    found = [*_files(folder, manifest), *_formats(folder)]
    if found:
        return found
    found = [*_version(manifest), *_licences(manifest), *_images(folder, manifest), *_card(folder, manifest)]
    found += _secrets(folder, manifest)
    return found or list((_configs if manifest["kind"] == "dataset" else _saes)(folder, manifest))


def _files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    for name, entry in manifest["files"].items():
        try:
            check_file(folder / name, entry, name)
            if name.endswith(".parquet"):
                pq.read_metadata(folder / name)
        except DacoError as error:
            yield Refusal(str(error), name, "run `python -m builders run` again")
        except UNREADABLE as error:
            yield _unreadable(name, error)
    for name in release_files(folder):
        if name not in manifest["files"]:
            yield Refusal("the manifest does not list it", name, "remove it from the release folder")
        elif (folder / name).is_symlink():
            yield Refusal("expected a file, got a link", name, "copy the file into the release folder")


def _formats(folder: Path) -> Iterator[Refusal]:
    for name in release_files(folder):
        if name.lower().endswith(EXECUTABLE):
            yield Refusal(
                "this format can run code when it is opened", name, "use safetensors, parquet or JSON"
            )


def _version(manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    """The version must be as much higher as the changelog's changes are large."""
    if not (found := manifest["facts"].get("changes")):
        return
    try:
        problem = too_low(manifest["version"], found["since"], found["level"])
    except (KeyError, TypeError, ValueError, AttributeError):
        problem = (
            f"facts.changes: expected since and level, got {found!r}; stage the release again with --since"
        )
    if problem:
        what, _, fix = problem.partition("; ")
        yield Refusal(what, "version", fix)


def _licences(manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    if not manifest["sources"]:
        yield Refusal("expected at least one source, got none", "sources", "fill in [corpus] of the recipe")
    for i, source in enumerate(manifest["sources"]):
        licence = str(source.get("licence") or "").strip()
        if licence.lower() in NO_LICENCE:
            where = f"sources[{i}] {source.get('name', '')!r}"
            what = f"expected a licence, got {licence or 'none'}"
            yield Refusal(what, where, "set corpus.licence in the recipe")


def _images(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    """Pixels may be in `stimuli` only if every source lets them; not known counts as no."""
    forbidding = [s.get("name", "?") for s in manifest["sources"] if s.get("redistribute_images") is not True]
    if not forbidding:
        return
    whose = f"which {', '.join(map(repr, forbidding))} does not let us pass on"
    for name in manifest["files"]:
        if name.lower().endswith(PIXELS) and name not in PLOTS:
            yield Refusal(f"it is a picture, {whose}", name, "leave it out of the release")
    if manifest["kind"] != "dataset":
        return
    for path in _config_paths(manifest, "stimuli"):
        schema = pq.read_schema(folder / path)
        for field in schema:
            if field.name == "image" or _has_binary(field.type):
                what = f"it holds image bytes, {whose}"
                fix = "build again without them, or set corpus.redistribute_images if the licence allows it"
                yield Refusal(what, f"{path}, column {field.name!r}", fix)


def _has_binary(kind: pa.DataType) -> bool:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_has_binary(kind.field(i).type) for i in range(kind.num_fields))


def _config_paths(manifest: Mapping[str, Any], config: str) -> list[str]:
    splits = manifest["configs"].get(config, {}).get("splits", {})
    return [path for part in splits.values() for path in part["files"]]


def _card(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    kind, fix = manifest["kind"], "run `python -m hub stage` on the folder"
    if not (folder / CARD).is_file():
        yield Refusal("expected a card, got none", CARD, fix)
        return
    text = (folder / CARD).read_text("utf-8")
    errors, warnings = check_card(text, f"{kind}s")
    yield from (Refusal(f"metadata: {one}", CARD, fix) for one in (*errors, *warnings))
    if errors:
        return
    metadata = card_data(text)
    for key in sorted(set(metadata) - {*CARD_KEYS[kind], *MORE_CARD_KEYS[kind]}):
        yield Refusal(f"metadata: {key!r} is not among the keys that a release may set", CARD, fix)
    found = [line for line in text.splitlines() if line in SECTIONS]
    if found != list(SECTIONS):
        yield Refusal(f"expected the sections {', '.join(SECTIONS)}, got {', '.join(found)}", CARD, fix)
    yield from (
        Refusal(f"metadata: expected {key!r}, got none", CARD, f"fill in [release] of the recipe and {fix}")
        for key in CARD_KEYS[kind]
        if not metadata.get(key)
    )
    if kind == "dataset" and (got := _card_configs(metadata)) != (expected := _manifest_configs(manifest)):
        yield Refusal(f"metadata: expected configs {expected}, got {got}", CARD, fix)


Configs = dict[str, dict[str, list[str]]]


def _card_configs(metadata: Mapping[str, Any]) -> Configs:
    return {
        config["config_name"]: {part["split"]: part["path"] for part in config["data_files"]}
        for config in metadata.get("configs", ())
    }


def _manifest_configs(manifest: Mapping[str, Any]) -> Configs:
    return {
        name: {split: part["files"] for split, part in config["splits"].items()}
        for name, config in manifest["configs"].items()
    }


def _secrets(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    """Where something looks like a secret; the refusal never repeats it."""
    for name in [MANIFEST, *manifest["files"]]:
        try:
            for column, kind in _secrets_in(folder / name):
                where = f"{name}, column {column!r}" if column else name
                yield Refusal(
                    f"it holds what looks like {kind}", where, "remove it, and revoke it if it is real"
                )
        except UNREADABLE as error:
            yield _unreadable(name, error)


def _unreadable(name: str, error: Exception) -> Refusal:
    what = f"expected a table that can be read, got {type(error).__name__}: {error}"
    return Refusal(what, name, "build the release again")


def _secrets_in(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".parquet":
        yield from _secrets_in_table(path)
        return
    with path.open("rb") as file:
        # of a binary file only the head is text: safetensors keep their metadata there
        content = file.read(2**20) if path.suffix in _BINARY else file.read()
    text = content.decode("utf-8", "ignore")
    yield from (("", kind) for kind, pattern in SECRETS.items() if re.search(pattern, text))


def _secrets_in_table(path: Path) -> Iterator[tuple[str, str]]:
    table = pq.ParquetFile(path)
    names = [field.name for field in table.schema_arrow if _is_text(field.type)]
    found = set()
    for batch in table.iter_batches(columns=names):
        for name in names:
            column = batch.column(name)
            texts = column.flatten() if pa.types.is_nested(column.type) else column
            for kind, pattern in SECRETS.items():
                if pc.any(pc.match_substring_regex(texts, pattern)).as_py():
                    found.add((name, kind))
    yield from sorted(found)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _configs(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    """Load every config as users do, map-style and streaming, and compare rows and columns."""
    from datasets import load_dataset

    with _quiet_datasets(), tempfile.TemporaryDirectory() as cache:
        for name, config in manifest["configs"].items():
            expected = {split: part["rows"] for split, part in config["splits"].items()}
            try:
                loaded = load_dataset(str(folder), name, cache_dir=cache)
                streamed = load_dataset(str(folder), name, streaming=True, cache_dir=cache)
                first = {split: list(next(iter(part), {})) for split, part in streamed.items()}
            except Exception as error:  # whatever `datasets` raises, its users would meet it
                what = f"load_dataset fails on it: {type(error).__name__}: {error}"
                yield Refusal(what, f"config {name!r}", "mend its parquet files and build the release again")
                continue
            got = {split: part.num_rows for split, part in loaded.items()}
            if got != expected:
                what = f"load_dataset expected {expected} rows, got {got}"
                yield Refusal(what, f"config {name!r}", "build the release again")
            for split, columns in first.items():
                if expected.get(split) and columns != config.get("columns"):
                    what = f"streaming: expected columns {config.get('columns')}, got {columns}"
                    yield Refusal(what, f"config {name!r}, split {split!r}", "build the release again")


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets` inside the block."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _saes(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    """Load the SAEs as users do, one layer after another, and steer a tiny model of their width with each."""
    import torch

    from daco import SteeringSAE

    where, fix = "config.json and layers.*", "build the release again"
    try:
        facts = SteeringSAE.from_pretrained(folder, layers=[]).base_model
        layers = read_config(folder / "config.json")["layers"]
        model = stand_in(facts)
        with torch.no_grad():
            for layer in layers:
                if problem := _steered(model, SteeringSAE.from_pretrained(folder, layers=[layer]), layer):
                    yield Refusal(problem, f"layers.{layer}", fix)
    except (DacoError, KeyError, TypeError, ValueError) as error:
        what = f"SteeringSAE.from_pretrained fails on it: {type(error).__name__}: {error}"
        yield Refusal(what, where, fix)


def stand_in(facts: ModelFacts) -> "PreTrainedModel":
    """A small random model of the base model's width and depth, under its type's name."""
    import torch

    ensure_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": facts.hidden_size, "num_hidden_layers": facts.n_layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(**shape, **TINY_ATTENTION, intermediate_size=8, vocab_size=16, use_cache=False)
        )
    model.config.model_type = facts.model_type
    return model.eval()


def _steered(model: "PreTrainedModel", sae: "SteeringSAE", layer: int) -> str:
    """What is wrong with how these SAEs steer; empty where nothing is."""
    import torch

    ids = torch.arange(1, 13)[None] % 16
    before = model(ids).logits
    options: dict[str, Any] = {"scope": "all", "layers": [layer], "on_empty": "pass", "base_model_ok": True}
    with sae.steer(model, **options) as run:
        during = model(ids).logits
    if not during.isfinite().all():
        return "steering a tiny model: expected finite logits, got NaN or infinity"
    if not torch.equal(before, model(ids).logits):
        return "steering a tiny model: expected the model as before afterwards, got other logits"
    labelled = sum(sae.layers[layer].labels() != "neutral")
    if labelled and not run.report().positions:
        return (
            f"steering a tiny model: expected {labelled} labelled atoms to steer it, got no position steered"
        )
    return ""


def prompts_in(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Where a release holds prompts that may be harmful: `file, column 'name'`, or a text file's name.

    None where the manifest's `facts.prompts` or `recipe.release.prompts` says that they are harmless.
    """
    said = {**manifest["recipe"].get("release", {}), **manifest["facts"]}.get("prompts")
    if said == "harmless":
        return []
    found = []
    for name in manifest["files"]:
        columns = _columns(folder / name)
        found += [f"{name}, column {column!r}" for column in columns if column.lower() in PROMPTS]
    return found


def _columns(path: Path) -> list[str]:
    """Names of the columns of a table: parquet, CSV or TSV, or JSON lines."""
    if path.suffix == ".parquet":
        return list(pq.read_schema(path).names)
    if path.suffix not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        return []
    with path.open("r", encoding="utf-8", errors="replace") as file:
        first = file.readline()
    if path.suffix in (".csv", ".tsv"):
        return next(csv.reader([first], delimiter="," if path.suffix == ".csv" else "\t"), [])
    try:
        row = json.loads(first)
    except ValueError:
        return []
    return list(row) if isinstance(row, dict) else []
