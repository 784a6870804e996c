"""What does publishing a full-size release take, in time and memory, and how little is sent after a change?

Draws 15,000 concepts, 400,000 stimuli, their links and directions of 5 layers x 3,584; stages, publishes and
verifies them on a local Hub, each step in a process of its own; then changes 0.1 % of the rows of stimuli and
links, scattered or in one place. Prints a table and writes `results/publish.json`, a list of {work, who,
value, unit, ratio, machine}: `ratio` is how many times more `datasets.push_to_hub` of the same tables takes
(of DACO's memory: the share of 1 GiB; of bytes sent again: how many times more without content-defined
chunking). Memory is what is no mapped file. Linux only.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from benchmarks.retrieval import anonymous_mib, machine, memory_of
from builders.release import directions_split, table_split, write_split
from daco.dictionary import ConceptDictionary
from daco.manifest import FORMAT_VERSION, file_entry, release_files, write_manifest
from daco.sites import ModelFacts
from daco.tables import CONCEPTS, LINKS, STIMULI, write_table
from hub.local.server import background
from hub.publish import publish
from hub.remote import Target
from hub.stage import stage
from hub.verify import verify

RESULTS = Path(__file__).parent / "results" / "publish.json"
REPO, TOKEN = "org/DACO-400K", "hf_local"
LAYERS = (15, 16, 17, 18, 19)
CHANGED = 1_000
"""One row in so many is changed."""


# Data.


def draw_tables(folder: Path, n_concepts: int, n_stimuli: int, n_links: int, seed: int = 0) -> None:
    """The three tables of a release, as the stages leave them."""
    rng = np.random.default_rng(seed)
    words = np.array([f"word{i}" for i in range(20_000)])
    ids = np.array([f"{i * 2654435761 % 2**64:016x}" for i in range(n_stimuli)])
    captions = [" ".join(words[row]) for row in rng.zipf(1.3, (n_stimuli, 12)) % len(words)]
    stimuli = {
        "stimulus_id": ids,
        "caption": captions,
        "image_url": [f"https://example.org/{one}.jpg" for one in ids],
        "image_sha256": [f"{one}{one}{one}{one}" for one in ids],
        "width": rng.integers(200, 1_000, n_stimuli),
        "height": rng.integers(200, 1_000, n_stimuli),
        "source": np.full(n_stimuli, "drawn"),
        "source_key": ids,
    }
    write_table(folder / "stimuli.parquet", pa.table(stimuli).cast(STIMULI))
    concept = np.sort(rng.integers(0, n_concepts, n_links))
    links = {
        "concept_id": [f"user:{i}" for i in concept],
        "concept": [f"concept {i}" for i in concept],
        "stimulus_id": ids[rng.integers(0, n_stimuli, n_links)],
        "role": np.where(rng.random(n_links) < 0.5, "positive", "negative"),
        "rank": rng.integers(0, 27, n_links),
        "dist": rng.random(n_links),
        "sim_image": rng.random(n_links),
        "sim_text": rng.random(n_links),
    }
    write_table(folder / "links.parquet", pa.table(links).cast(LINKS))
    texts = {name: [f"{name} of {i}" for i in range(n_concepts)] for name in CONCEPTS.names}
    texts |= {"concept_id": [f"user:{i}" for i in range(n_concepts)]}
    texts |= {"concept": [f"concept {i}" for i in range(n_concepts)], "polarity": ["neutral"] * n_concepts}
    numbers = {"rank": np.arange(n_concepts), "n_positive": np.full(n_concepts, 27)}
    write_table(folder / "concepts.parquet", pa.table(texts | numbers).cast(CONCEPTS))


def draw_directions(folder: Path, n_concepts: int, d_model: int) -> None:
    """The directions of all layers, as their stage leaves them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer_{i}": torch.randn(n_concepts, d_model, generator=generator) for i in LAYERS}
    save_file(tensors, folder / "directions.safetensors")


def dictionary_of(folder: Path, d_model: int) -> ConceptDictionary:
    """The dictionary; its directions stay in their file."""
    tensors = load_file(folder / "directions.safetensors")
    return ConceptDictionary(
        concepts=pq.read_table(folder / "concepts.parquet").to_pandas(),
        vectors={layer: tensors[f"layer_{layer}"] for layer in LAYERS},
        model=ModelFacts("org/vl-7b", "", "qwen2_5_vl", d_model, 28),
        R=dict.fromkeys(LAYERS, 1.0),
    )


# Steps, each called in a process of its own.


def write_release(tables: Path, folder: Path, d_model: int) -> None:
    """Write the release folder and its card, as the stage `release` and `python -m hub stage` do."""
    dictionary = dictionary_of(tables, d_model)
    n = [27] * len(dictionary)
    parts = [
        table_split(name, pq.read_table(tables / f"{name}.parquet"), schema)
        for name, schema in (("stimuli", STIMULI), ("links", LINKS), ("concepts", CONCEPTS))
    ]
    parts += [directions_split(dictionary, layer, "vl_7b", n, n) for layer in LAYERS]
    configs: dict[str, Any] = {}
    for part in parts:
        config = configs.setdefault(part.config, {"splits": {}, "columns": part.schema.names})
        config["splits"][part.split] = write_split(folder, part)
    rows = {name: pq.read_metadata(folder / name).num_rows for name in release_files(folder)}
    facts = {name: getattr(dictionary.model, name) for name in ModelFacts.__dataclass_fields__}
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "dataset",
        "name": "DACO-400K",
        "version": "1.0.0",
        "files": {name: file_entry(folder / name, n_rows) for name, n_rows in rows.items()},
        "sources": [{"name": "drawn", "licence": "cc0-1.0", "redistribute_images": False}],
        "counts": {},
        "recipe": {"release": {"org": "org", "dataset": "DACO-400K", "licence": "cc-by-4.0"}},
        "seeds": {},
        "versions": {},
        "facts": {},
        "configs": configs,
        "models": {"vl_7b": facts | {"layers": [*LAYERS], "R": {str(i): 1.0 for i in LAYERS}}},
    }
    write_manifest(folder, manifest)
    stage(folder)


def publish_release(folder: Path, url: str) -> None:
    """What `python -m hub publish` does: gate, upload, commit, tag, read back."""
    publish(folder, Target(REPO, "dataset", url, TOKEN))


def verify_release(folder: Path, url: str) -> None:
    """What `python -m hub verify` does."""
    verify(Target(REPO, "dataset", url, TOKEN), "v1.0.0")


def push_to_hub(tables: Path, url: str) -> None:
    """The same tables by `datasets` alone: no card, tag, manifest, gate or reading back."""
    from datasets import Dataset

    for name in ("stimuli", "links", "concepts"):
        Dataset.from_parquet(str(tables / f"{name}.parquet"), cache_dir=str(tables / "cache")).push_to_hub(
            "org/pushed", name, token=TOKEN
        )
    tensors = load_file(tables / "directions.safetensors")
    concepts = pq.read_table(tables / "concepts.parquet", columns=["concept_id", "concept"])
    for layer, vectors in tensors.items():
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.numpy().reshape(-1)), vectors.shape[1])
        table = concepts.append_column("vector", flat)
        Dataset(table).push_to_hub("org/pushed", "directions_vl_7b", split=layer, token=TOKEN)


def _child(pipe: Any, env: dict[str, str], step: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(env)
    before = anonymous_mib()
    start, cpu = time.perf_counter(), time.process_time()
    most = memory_of(lambda: step(*arguments))
    pipe.send((time.perf_counter() - start, time.process_time() - cpu, before + most))


def measured(env: dict[str, str], step: Callable[..., None], *arguments: Any) -> tuple[float, float, float]:
    """(seconds, processor seconds, MiB in all) of a step in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, env, step, arguments))
    for name, value in env.items():  # huggingface_hub reads them when it is imported
        os.environ[name] = value
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{step.__name__} ended with {process.exitcode}")
    found: tuple[float, float, float] = ours.recv()
    return found


# A small change.


def scattered(table: pa.Table, column: str) -> pa.Table:
    """The table with one row in CHANGED changed in one column, anywhere."""
    rows = np.random.default_rng(7).choice(table.num_rows, table.num_rows // CHANGED, replace=False)
    values = table[column].to_pandas().copy()  # a view of arrow memory cannot be written
    values.iloc[rows] = values.iloc[rows].astype(str) + " changed" if column == "caption" else 0.5
    at = table.schema.get_field_index(column)
    return table.set_column(at, table.schema.field(at), pa.array(pd.Series(values), table.schema.types[at]))


def removed(table: pa.Table, column: str) -> pa.Table:
    """The table without one row in CHANGED, all in one place."""
    start, n = table.num_rows // 3, table.num_rows // CHANGED
    return pa.concat_tables([table.slice(0, start), table.slice(start + n)])


def sent_again(folder: Path, name: str, new: pa.Table, chunked: bool) -> tuple[int, int]:
    """(bytes of the file, bytes by which the xet store grows) where a table takes another's place."""
    import hf_xet

    work = folder / f"{name}-{chunked}"
    work.mkdir()
    sizes = []
    for version, rows in (("old", pq.read_table(folder / f"{name}.parquet")), ("new", new)):
        path = work / f"{version}.parquet"
        pq.write_table(rows, path, compression="zstd", use_content_defined_chunking=chunked)
        hf_xet.upload_files([str(path)], f"local://{work / 'store'}", None, None, None, "dataset")
        sizes.append(sum(one.stat().st_size for one in work.glob("store/**/*") if one.is_file()))
    size = path.stat().st_size
    shutil.rmtree(work)
    return size, sizes[1] - sizes[0]


# The table.


def row(work: str, who: str, value: float, unit: str, ratio: float) -> dict[str, Any]:
    """A row of the results."""
    return {"work": work, "who": who, "value": value, "unit": unit, "ratio": round(ratio, 3)}


def full_size(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of staging, publishing and verifying, and of `push_to_hub`."""
    tables, release = folder / "tables", folder / "release"
    size = f"{arguments.concepts:,} concepts, {arguments.stimuli:,} stimuli, 5 layers x {arguments.width:,}"
    with background(folder / "hub") as url:
        home = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}
        env = home | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        theirs = measured(env, push_to_hub, tables, url)
        ours = {
            "stage": measured(env, write_release, tables, release, arguments.width),
            "publish": measured(env, publish_release, release, url),
            "verify": measured(env, verify_release, release, url),
        }
    sent = sum((release / name).stat().st_size for name in release_files(release))
    yield row(f"{size}: release", "daco", round(sent / 1e6), "MB", 1.0)
    for name, (wall, cpu, memory) in ours.items():
        yield row(f"{size}: {name}", "daco", round(wall, 1), "s", 1.0)
        yield row(f"{size}: {name}", "daco", round(cpu, 1), "processor s", 1.0)
        yield row(f"{size}: {name}, memory", "daco", round(memory), "MiB", memory / 1024)
    both = [sum(ours[name][i] for name in ("stage", "publish")) for i in (0, 1)]
    who, work = "datasets.push_to_hub", f"{size}: stage and publish"
    yield row(work, who, round(theirs[0], 1), "s", theirs[0] / both[0])
    yield row(work, who, round(theirs[1], 1), "processor s", theirs[1] / both[1])
    most = max(ours["stage"][2], ours["publish"][2])
    yield row(f"{work}, memory", who, round(theirs[2]), "MiB", theirs[2] / most)


def again(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of what is sent after a small change, with and without chunking."""
    for name, column in (("stimuli", "caption"), ("links", "dist")):
        table = pq.read_table(folder / "tables" / f"{name}.parquet")
        for change in (scattered, removed):
            work = f"{name}, one row in {CHANGED:,} {change.__name__}"
            new = change(table, column)
            size, plain = sent_again(folder / "tables", name, new, chunked=False)
            _, ours = sent_again(folder / "tables", name, new, chunked=True)
            yield row(f"{work}: file", "daco", round(size / 1e6, 2), "MB", 1.0)
            yield row(f"{work}: sent again", "daco", round(ours / 1e6, 2), "MB", 1.0)
            mb = round(plain / 1e6, 2)
            yield row(f"{work}: sent again", "without chunking", mb, "MB", plain / max(ours, 1))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=15_000)
    parser.add_argument("--stimuli", type=int, default=400_000)
    parser.add_argument("--links", type=int, default=800_000)
    parser.add_argument("--width", type=int, default=3_584)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.threads, arguments.device = 1, "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tables").mkdir()
        draw_tables(folder / "tables", arguments.concepts, arguments.stimuli, arguments.links)
        draw_directions(folder / "tables", arguments.concepts, arguments.width)
        table = [
            one | {"machine": machine(arguments)} for one in (*again(folder), *full_size(folder, arguments))
        ]
    for one in table:
        print(f"{one['work']:<75} {one['who']:<22} {one['value']:>9} {one['unit']:<11} x {one['ratio']}")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
