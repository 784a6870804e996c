"""Proves that old and new `datasets`, DuckDB, Polars and pandas read the same rows of a published release."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hub_fixture import WRITER, LocalHub, local_hub  # noqa: F401
from release_fixture import write_dataset_release

from daco.manifest import read_manifest
from hub.local.server import client_env
from hub.publish import publish
from hub.remote import Target
from hub.stage import stage

REPO, TAG = "org/DACO-tiny", "v1.0.0"


def interpreters() -> dict[str, str]:
    """Version of `datasets` -> interpreter."""
    found = os.environ.get("CLIENTS_PYTHONS", "").split()
    if not found:
        pytest.skip("CLIENTS_PYTHONS is not set: it names interpreters; `make test-clients` makes them")
    return {Path(python).parents[1].name: python for python in found}


def digest(path: Path) -> str:
    rows = pq.read_table(path).to_pylist()
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def expected(folder: Path) -> dict[str, str]:
    configs = read_manifest(folder)["configs"].items()
    splits = ((name, split, part) for name, config in configs for split, part in config["splits"].items())
    return {f"{name}/{split}": digest(folder / part["files"][0]) for name, split, part in splits}


def ran(python: str, script: str, *arguments: str, **env: str) -> Any:
    command = [python, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=env or None, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_version_of_datasets_reads_the_same_rows(local_hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    pythons = interpreters()
    folder = write_dataset_release(tmp_path / "release")
    stage(folder)
    publish(folder, Target(REPO, "dataset", local_hub.url, WRITER))
    rows = expected(folder)
    assert len(rows) == 5
    configs = ",".join(read_manifest(folder)["configs"])
    for version, python in pythons.items():
        env = client_env(local_hub.url, tmp_path / version)
        online = ran(python, "clients_read.py", REPO, TAG, configs, **env)
        print(online["versions"])
        assert online["versions"]["datasets"].startswith(version)
        assert online["ways"] == dict.fromkeys(("tag", "newest", "streaming"), rows), version
        offline = env | {"HF_HUB_OFFLINE": "1"}
        asked = len(local_hub.faults.log)
        again = ran(python, "clients_read.py", REPO, TAG, configs, "offline", **offline)
        assert again["ways"] == {"tag": rows}, version
        assert len(local_hub.faults.log) == asked


def test_duckdb_polars_and_pandas_read_the_parquet_files_as_they_lie(tmp_path: Path) -> None:
    python = interpreters()["5.2"]
    folder = write_dataset_release(tmp_path / "release")
    paths = sorted(folder.rglob("*.parquet"))
    assert len(paths) == 5
    for path in paths:
        got = ran(python, "clients_parquet.py", str(path))
        assert got == dict.fromkeys(("duckdb", "polars", "pandas"), digest(path)), path.name
