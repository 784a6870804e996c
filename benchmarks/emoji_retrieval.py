"""Does the tiny CLIP find an emoji by its name? Trains it on 80 % of the Fluent emoji and ranks all of them
for every name.

Reads `$DACO_TEST_DATA/emoji` (or `--data`); prints a table and writes `results/emoji_retrieval.json`, a list
of {work, who, value, unit, ratio}. A pair counts when its emoji's name is a single word; `who` says whether
it was trained on or held out, and `ratio` is the value over that of chance.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from builders import clip, corpus, embeddings
from builders.recipe import Recipe, load_recipe
from builders.scores import Scores, cosines
from builders.stages import Work, done, fingerprint
from builders.stimuli import embed_concepts
from builders.vocabulary import caption_name
from daco.tables import read_table

RECIPE = Path(__file__).parent.parent / "recipes" / "emoji.toml"
RESULTS = Path(__file__).parent / "results" / "emoji_retrieval.json"


def recipe(data: Path, threads: int, seed: int) -> Recipe:
    """The shipped recipe for the emoji."""
    places = [f"corpus.path={data / 'emoji' / 'index.tsv'}", f"corpus.images={data / 'emoji' / 'images'}"]
    return load_recipe(RECIPE, [*places, f"run.threads={threads}", f"run.seed={seed}"])


def build(facts: Recipe, out: Path) -> float:
    """Run corpus, clip and embeddings in `out`; returns the seconds of the training."""
    seconds = 0.0
    for stage, module in (("corpus", corpus), ("clip", clip), ("embeddings", embeddings)):
        work, start = Work(facts, out, stage), time.perf_counter()
        work.open(fingerprint(stage, {}, {}))
        module.run(work)
        seconds = time.perf_counter() - start if stage == "clip" else seconds
    return seconds


def ranks(scores: np.ndarray[Any, Any], own: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many stimuli are above a name's own [n], from scores [n, corpus]."""
    return np.asarray((scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1))


def measure(facts: Recipe, out: Path) -> list[dict[str, Any]]:
    """Shares of names whose own emoji is first, or among the first five, by image, by caption and by Eq.
    4."""
    rows = read_table(out / "corpus" / "stimuli.parquet").to_pylist()
    found = embeddings.load_embeddings(out / "embeddings")
    own = np.array([i for i, row in enumerate(rows) if caption_name(row["caption"])])
    names = [caption_name(rows[i]["caption"]) for i in own]
    held_out = np.array([clip.is_held_out(rows[i]["stimulus_id"], facts.clip.holdout) for i in own])
    work = Work(facts, out, "stimuli")
    queries = embed_concepts(clip.clip_of(work), names, facts.stimuli.template)
    scores: Scores = cosines(queries, found.images, found.texts)
    table = []
    for side, values in (("image", scores.image), ("caption", scores.text), ("eq4", scores.closeness)):
        place = ranks(values, own)
        for who, chosen in (("trained", ~held_out), ("held out", held_out)):
            for k in (1, 5):
                share = float((place[chosen] < k).mean())
                facts_row = {
                    "work": f"own emoji in the first {k} by {side}",
                    "who": who,
                    "unit": "share of names",
                }
                table.append(facts_row | {"value": round(share, 4), "ratio": round(share * len(rows) / k, 1)})
    table.append(
        {"work": "names", "who": "trained", "value": int((~held_out).sum()), "unit": "names", "ratio": 1.0}
    )
    table.append(
        {"work": "names", "who": "held out", "value": int(held_out.sum()), "unit": "names", "ratio": 1.0}
    )
    return table


def machine(threads: int) -> str:
    """Hardware and versions, in a line."""
    cpu = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return (
        f"{cpu}, {threads} of {os.cpu_count()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("DACO_TEST_DATA"), help="folder with emoji/"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("expected --data or DACO_TEST_DATA, got neither")
    facts = recipe(Path(arguments.data), arguments.threads, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        seconds = build(facts, Path(folder))
        table = measure(facts, Path(folder))
        pairs = done(Path(folder), "clip")["counts"]["in"]
    training = {
        "work": f"training the CLIP on {pairs} pairs",
        "who": "all",
        "value": round(seconds),
        "unit": "s",
    }
    table.append(training | {"ratio": 1.0})
    table = [row | {"machine": machine(arguments.threads)} for row in table]
    for row in table:
        print(f"{row['work']:<36} {row['who'][:10]:<10} {row['value']:>8} {row['unit']:<14} x {row['ratio']}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
