"""What the Hub demands of the YAML at the top of a README.md; reads text, writes nothing."""

import re
from typing import Any

import yaml

_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research
lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql
ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENCES = frozenset(_LICENCES.split())
"""The licence ids the Hub accepts."""

_LISTS = (
    "tags",
    "datasets",
    "metrics",
    "language",
    "task_categories",
    "task_ids",
    "size_categories",
    "base_model",
)
_SIZE = re.compile(
    r"n<1K|1K<n<10K|10K<n<100K|100K<n<1M|1M<n<10M|10M<n<100M|100M<n<1B|1B<n<10B|10B<n<100B|"
    r"100B<n<1T|n>1T|unknown|other"
)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9-]+)?|code|multilingual")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")


def front_matter(text: str) -> str | None:
    """The YAML block at the very start of a card, None when there is none."""
    found = re.match(r"---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(\r?\n|$)", text, re.DOTALL)
    return found[1] if found else None


def card_data(text: str) -> dict[str, Any]:
    """The metadata of a card that passed `check_card`; {} when it has none."""
    data = yaml.safe_load(front_matter(text) or "")
    return data if isinstance(data, dict) else {}


def check_card(text: str, kind: str) -> tuple[list[str], list[str]]:
    """Check the metadata of a README.md as the Hub does.

    Args:
        text: the whole README.md.
        kind: "models" or "datasets".

    Returns:
        Errors (a commit with one is refused) and warnings.
    """
    block = front_matter(text)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return [f"expected a mapping of metadata, got {type(data).__name__}"], []
    errors = [*_licence(data), *_lists(data), *_values(data)]
    errors += _configs(data) if kind == "datasets" else _model(data)
    return errors, []


def _licence(data: dict[str, Any]) -> list[str]:
    given = data.get("license", [])
    unknown = [one for one in (given if isinstance(given, list) else [given]) if one not in LICENCES]
    errors = [f'"license": {one!r} is not a known licence id' for one in unknown]
    if given == "other" and "license_link" in data and not isinstance(data["license_link"], str):
        errors.append('"license_link" must be a string')
    return errors


def _lists(data: dict[str, Any]) -> list[str]:
    errors = []
    for key in _LISTS:
        given = data.get(key, [])
        if not all(isinstance(one, str) for one in (given if isinstance(given, list) else [given])):
            errors.append(f'"{key}" must be a string or an array of strings')
        elif key in ("tags", "datasets", "metrics") and not isinstance(given, list):
            errors.append(f'"{key}" must be an array')
    return errors


def _values(data: dict[str, Any]) -> list[str]:
    errors = [
        f'"size_categories": {one!r} is unknown'
        for one in _each(data, "size_categories")
        if not _SIZE.fullmatch(one)
    ]
    errors += [
        f'"language": {one!r} is not an ISO code'
        for one in _each(data, "language")
        if not _LANGUAGE.fullmatch(one)
    ]
    errors += [f'"tags": {one!r} must not be empty' for one in _each(data, "tags") if not one.strip()]
    return errors


def _each(data: dict[str, Any], key: str) -> list[str]:
    given = data.get(key, [])
    return [str(one) for one in (given if isinstance(given, list) else [given])]


def _configs(data: dict[str, Any]) -> list[str]:
    configs = data.get("configs", [])
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        return ['"configs" must be an array of objects']
    errors = [
        f'"configs[{i}].config_name" must be a string'
        for i, one in enumerate(configs)
        if not isinstance(one.get("config_name"), str)
    ]
    names = [one.get("config_name") for one in configs]
    errors += [
        f'"configs": {name!r} occurs twice' for name in sorted({str(n) for n in names if names.count(n) > 1})
    ]
    if sum(one.get("default") is True for one in configs) > 1:
        errors.append('"configs": only one may be the default')
    for config in configs:
        errors += _data_files(config)
    return errors


def _data_files(config: dict[str, Any]) -> list[str]:
    files, name = config.get("data_files"), config.get("config_name")
    if files is None or isinstance(files, str):
        return []
    if not isinstance(files, list):
        return [f'"configs" {name!r}: "data_files" must be a string or an array']
    errors = []
    for one in files:
        if isinstance(one, str):
            continue
        if not isinstance(one, dict) or set(one) != {"split", "path"}:
            errors.append(f'"configs" {name!r}: expected "split" and "path" in "data_files", got {one!r}')
        elif not re.fullmatch(r"\w+(\.\w+)*", str(one["split"])):
            errors.append(f'"configs" {name!r}: split {one["split"]!r} must match \\w+')
    return errors


def _model(data: dict[str, Any]) -> list[str]:
    errors = []
    if "base_model_relation" in data and data["base_model_relation"] not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of {list(_RELATIONS)}')
    for key in ("pipeline_tag", "library_name"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    return errors + [f'"model-index"{error}' for error in _model_index(data.get("model-index", []))]


def _model_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return [" must be an array"]
    errors = []
    for i, entry in enumerate(index):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            errors.append(f"[{i}].name must be a string")
            continue
        for j, result in enumerate(entry.get("results", [])):
            missing = {"task", "dataset", "metrics"} - set(result if isinstance(result, dict) else ())
            errors += [f"[{i}].results[{j}].{key} is required" for key in sorted(missing)]
    return errors
