"""Every check of a release that needs no network, made before anything leaves this machine.

Reads a staged release folder and loads it as its users will; writes only to a temporary folder.
"""

import csv
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builders.vision import ensure_torchvision
from cards import suites, tuning
from cards.album import MAP
from cards.facts import CARD
from daco.dictionary_files import baseline_schema
from daco.errors import DacoError
from daco.manifest import MANIFEST, check_file, read_manifest, release_files
from daco.sae_files import read_config
from daco.sites import ModelFacts
from daco.tables import (
    ATOMS,
    ATOMS_MORE,
    CONCEPTS,
    LINKS,
    STIMULI,
    directions_schema,
    recognition_schema,
    statistics_schema,
)
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
        *("behavior", "behaviors", "behaviour", "behaviours", "goal", "goals", "instruction", "instructions"),
        *("jailbreak", "jailbreaks", "message", "messages", "conversation", "conversations"),
        *("prompt", "prompts", "query", "queries", "question", "questions", "request", "requests"),
    )
)
"""Words in names of columns, fields and files that hold what somebody asks a model; it may be harmful."""

OURS = frozenset(
    name
    for schema in (
        *(STIMULI, LINKS, CONCEPTS, ATOMS, ATOMS_MORE),
        *(directions_schema(1), baseline_schema(1), recognition_schema(1), statistics_schema(1)),
    )
    for name in schema.names
)
"""Names of columns of DACO's own tables, none of which holds prompts."""

TINY_ATTENTION = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}

NO_LICENCE = frozenset({"", "-", "?", "n/a", "na", "none", "tbd", "todo", "unknown"})
"""What stands for a licence where there is none; without a licence nothing may be passed on."""

FORBIDDING = re.compile(
    r"all\W+rights\W+reserved|(?<!non[- ])proprietary|\bno[\W_]*deriv|(?:\b|_)nd(?:\b|_)", re.IGNORECASE
)
"""What a licence says under which nothing, or nothing that was made from it, may be passed on."""

UNREADABLE = (pa.ArrowException, OSError)
"""What pyarrow raises on a damaged parquet file."""

PIXELS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Suffixes of pictures."""

PLOTS = {"dataset": (MAP,), "model": (tuning.PICTURE, suites.PICTURE)}
"""Pictures that hold nothing of any source, by kind of release."""

TABLES = (".csv", ".tsv")

JSON_LINES = (".jsonl", ".ndjson")

TEXTS = (*TABLES, *JSON_LINES, ".json", ".txt", ".md", ".jinja")
"""Suffixes of files of text, which must be UTF-8."""

KNOWN = (".parquet", ".safetensors", *TEXTS, *PIXELS)
"""Suffixes of what may leave: files that the checks can look into."""


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
        elif not name.lower().endswith(KNOWN):
            what = f"expected a file of {', '.join(KNOWN)}, got {Path(name).suffix or 'no suffix'}"
            yield Refusal(what, name, "leave it out, or convert it: nothing else can be checked")
        elif name.lower().endswith(TEXTS) and not _is_utf8(folder / name):
            yield Refusal("expected text in UTF-8, got other bytes", name, "leave it out, or convert it")


def _is_utf8(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            while file.read(2**20):
                pass
    except UnicodeDecodeError:
        return False
    return True


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
        where = f"sources[{i}] {source.get('name', '')!r}"
        if licence.lower() in NO_LICENCE:
            what = f"expected a licence, got {licence or 'none'}"
            yield Refusal(what, where, "set corpus.licence in the recipe")
        elif FORBIDDING.search(licence) and source.get("allowed") is not True:
            fix = "use another source; where its owner allows it, set corpus.allowed in the recipe"
            yield Refusal(f"expected a licence to pass on what is made from it, got {licence}", where, fix)
    ours = str(manifest["recipe"].get("release", {}).get("licence") or "")
    if FORBIDDING.search(ours):
        what = f"expected a licence that lets others pass it on and build on it, got {ours}"
        yield Refusal(what, "release.licence", "set another in the recipe")


def _images(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Refusal]:
    """Pixels may be in a release only if every source lets them; not known counts as no.

    Every picture but the plots of the release's kind counts, and every column of any table that is named
    `image` or holds bytes.
    """
    forbidding = [s.get("name", "?") for s in manifest["sources"] if s.get("redistribute_images") is not True]
    if not forbidding:
        return
    whose = f"which {', '.join(map(repr, forbidding))} does not let us pass on"
    for name in manifest["files"]:
        if name.lower().endswith(PIXELS) and name not in PLOTS[manifest["kind"]]:
            yield Refusal(f"it is a picture, {whose}", name, "leave it out of the release")
        for field in _fields(folder / name):
            if field.name == "image" or _holds(field.type, _is_bytes):
                what = f"it holds image bytes, {whose}"
                fix = "build again without them, or set corpus.redistribute_images if the licence allows it"
                yield Refusal(what, f"{name}, column {field.name!r}", fix)


def _fields(path: Path) -> list[pa.Field]:
    """Columns of a parquet file; none of another file, or of one that cannot be read."""
    try:
        return list(pq.read_schema(path)) if path.suffix.lower() == ".parquet" else []
    except UNREADABLE:
        return []  # which `_files` refuses


def _inner(kind: pa.DataType) -> list[pa.Field]:
    """The fields right below a type: of a struct its own, of a list its item, of a map its entries."""
    if isinstance(kind, pa.BaseExtensionType):
        return [pa.field("", kind.storage_type)]
    if pa.types.is_dictionary(kind):
        return [pa.field("", kind.value_type)]
    return [kind.field(i) for i in range(kind.num_fields)]


def _holds(kind: pa.DataType, what: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type, or any below it, is such a one."""
    return what(kind) or any(_holds(field.type, what) for field in _inner(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    """Bytes, or numbers of a byte as in decoded pixels."""
    t = pa.types
    binary = t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind)
    return bool(binary or t.is_fixed_size_binary(kind) or t.is_uint8(kind))


def _is_text(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind))


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
    if path.suffix.lower() == ".parquet":
        yield from _secrets_in_table(path)
        return
    with path.open("rb") as file:
        # of a binary file only the head is text: safetensors keep their metadata there
        content = file.read() if path.name.lower().endswith(TEXTS) else file.read(2**20)
    yield from (("", kind) for kind in _kinds(content))


def _kinds(content: bytes) -> list[str]:
    text = content.decode("utf-8", "ignore")
    return [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]


def _secrets_in_table(path: Path) -> Iterator[tuple[str, str]]:
    """Secrets in a table's metadata, and in all its texts and bytes but the pictures of `image`."""
    table = pq.ParquetFile(path)
    told = [*_metadata(table.schema_arrow), table.metadata.metadata or {}]
    found = {("", kind) for one in told for pair in one.items() for kind in _kinds(b"=".join(pair))}
    leaves = [table.schema.column(i) for i in range(len(table.schema))]
    paths = [leaf.path for leaf in leaves if leaf.physical_type.endswith("BYTE_ARRAY")]
    for batch in table.iter_batches(columns=[one for one in paths if one not in ("image", "image.bytes")]):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for texts in _texts(column):
                for kind, pattern in SECRETS.items():
                    if pc.any(pc.match_substring_regex(texts, pattern)).as_py():
                        found.add((name, kind))
    yield from sorted(found)


def _metadata(fields: Iterable[pa.Field] | pa.Schema) -> Iterator[Mapping[bytes, bytes]]:
    """What is written beside a schema or fields, and all below them."""
    if isinstance(fields, pa.Schema):
        yield fields.metadata or {}
    for field in fields:
        yield field.metadata or {}
        yield from _metadata(_inner(field.type))


def _texts(column: pa.Array) -> Iterator[pa.Array]:
    """The arrays of texts or bytes in a column, however deep."""
    kind, t = column.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        yield from _texts(column.storage)
    elif t.is_dictionary(kind):
        yield from _texts(column.dictionary)
    elif t.is_map(kind):
        yield from (*_texts(column.keys), *_texts(column.items))
    elif t.is_struct(kind):
        for below in column.flatten():
            yield from _texts(below)
    elif t.is_nested(kind):
        yield from _texts(column.flatten())
    elif _is_text(kind):
        yield column.cast(pa.large_string())
    elif _is_bytes(kind) and not t.is_uint8(kind):
        yield column.cast(pa.large_binary())


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
    """Where a release holds prompts that may be harmful: `file, column 'name'`, or a file's name.

    They are known by names, never by what they say: a word of `PROMPTS` in the name of a column or field, at
    any depth, of a table (parquet with texts below it, CSV, TSV) or of JSON with a text below it; else, where
    no column tells, in the path of a file that is not a table of DACO's own. Other files are not looked into.

    None where the manifest's `facts.prompts` or `recipe.release.prompts` says that they are harmless.
    """
    said = {**manifest["recipe"].get("release", {}), **manifest["facts"]}.get("prompts")
    if said == "harmless":
        return []
    return [where for name in manifest["files"] for where in _prompts_of(folder / name, name)]


def _prompts_of(path: Path, name: str) -> list[str]:
    columns = list(dict.fromkeys(_asking(path)))
    if columns:
        return [f"{name}, column {column!r}" for column in columns]
    fields = _fields(path)
    own = fields and all(field.name in OURS for field in fields)
    return [name] if name.lower().endswith((".parquet", *TEXTS)) and not own and _asks(name) else []


def _asks(name: str) -> bool:
    """Whether a name says that it is about prompts; `userPrompt` has the words of `user_prompt`."""
    words = re.split(r"[\W_\d]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return not PROMPTS.isdisjoint(words)


def _asking(path: Path) -> Iterator[str]:
    """Columns and fields of prompts, nested ones with a dot: of parquet, CSV, TSV and JSON."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _text_fields(_fields(path))
    elif suffix in TABLES:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = next(csv.reader([file.readline()], delimiter="," if suffix == ".csv" else "\t"), [])
        yield from (name for name in header if name not in OURS and _asks(name))
    elif suffix in (".json", *JSON_LINES):
        for value in _json_values(path):
            yield from _text_keys(value)


def _text_fields(fields: Iterable[pa.Field], above: str = "") -> Iterator[str]:
    """Dotted names of fields of prompts that hold texts or bytes."""
    for field in fields:
        if _holds(field.type, lambda kind: _is_text(kind) or _is_bytes(kind)):
            if _asks(field.name):
                yield f"{above}{field.name}"
            else:
                yield from _text_fields(_inner(field.type), f"{above}{field.name}.")


def _json_values(path: Path) -> Iterator[Any]:
    """The value of a JSON file, or those of its lines; what is no JSON is left out."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for text in file if path.suffix.lower() in JSON_LINES else [file.read()]:
            try:
                yield json.loads(text)
            except (ValueError, RecursionError):
                continue


def _text_keys(value: Any, above: str = "") -> Iterator[str]:
    """Dotted keys of prompts, at any depth, whose values may hold texts: not those of numbers alone."""
    if isinstance(value, list):
        for one in value:
            yield from _text_keys(one, above)
    elif isinstance(value, dict):
        for key, one in value.items():
            if _asks(key) and _may_be_text(one):
                yield f"{above}{key}"
            else:
                yield from _text_keys(one, f"{above}{key}.")


def _may_be_text(value: Any) -> bool:
    if isinstance(value, list | dict):
        below = value.values() if isinstance(value, dict) else value
        return not value or any(map(_may_be_text, below))
    return isinstance(value, str)
