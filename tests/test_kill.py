"""A run killed by SIGKILL inside every stage redoes at most one shard and ends with the same bytes."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from builders.pipeline import STAGES, run
from builders.recipe import Recipe, recipe_of
from builders.stages import DONE

KILLS = 3
"""Kills in each stage, at seeded shards."""

SECTIONS = {
    "run": {"name": "kill", "seed": 5, "threads": 1},
    "corpus": {"kind": "drawn", "rows": 60, "name": "drawn", "licence": "cc0-1.0", "shard_rows": 12,
               "redistribute_images": True},
    "concepts": {"source": "captions", "min_count": 3, "max_concepts": 30},
    "clip": {"steps": 12, "batch": 16, "hidden": 32, "n_layers": 1, "vocabulary": 300, "image_size": 32,
             "checkpoint_steps": 2},
    "embeddings": {"batch": 6, "shard_rows": 12},
    "stimuli": {"n_positive": 5, "min_positive": 1, "pool": 64, "block": 5},
    "model": {"tiny": "llava"},
    "activations": {"layers": [1, 2], "batch": 4, "shard_rows": 12},
    "sae": {"k": 4, "steps": 20, "batch": 32, "eval_steps": 5, "checkpoint_steps": 4},
    "evaluate": {"items": 12, "batch": 3},
    "release": {"org": "local", "dataset": "DACO-kill", "licence": "cc0-1.0"},
}  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(tmp_path: Path) -> None:
    recipe = recipe_of(SECTIONS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [f"builders.{stage.module}" for stage in STAGES]
    )  # a restart then costs no import
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(context, recipe, whole)
    process.join()
    assert process.exitcode == 0
    kills = sum(kill_inside(context, recipe, killed, stage.name, whole) for stage in STAGES)
    process = start(context, recipe, killed)
    process.join()
    assert process.exitcode == 0
    assert kills >= KILLS * len([stage for stage in STAGES if shards_of(whole, stage.name) > 1])
    assert_at_most_one_shard_lost(killed, whole, kills)
    assert digests(killed) == digests(whole)


def start(context: multiprocessing.context.BaseContext, recipe: Recipe, out: Path) -> BaseProcess:
    process = context.Process(target=run, args=(recipe, out))  # type: ignore[attr-defined]
    process.start()
    return process


def kill_inside(context, recipe: Recipe, out: Path, stage: str, whole: Path) -> int:
    """Kill the run up to `KILLS` times while `stage` is at work, after seeded numbers of shards."""
    chance = random.Random(f"{recipe.run.seed} {stage}")
    total = shards_of(whole, stage)
    points = sorted(chance.sample(range(1, total), min(KILLS, total - 1))) if total > 1 else [0]
    done = 0
    for point in points:
        process = start(context, recipe, out)
        while (process.is_alive() and events(out)[(stage, "shard")] < point) or not (out / stage).exists():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        if process.is_alive() and not (out / stage / DONE).exists():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            done += 1
        process.join()
    return done


def events(out: Path) -> Counter[tuple[str, str]]:
    """How many events of each kind the log of a run has, by stage."""
    path = out / "log.jsonl"
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    parsed = [json.loads(line) for line in lines]
    return Counter((line["stage"], line["event"]) for line in parsed)


def shards_of(out: Path, stage: str) -> int:
    return events(out)[(stage, "shard")]


def assert_at_most_one_shard_lost(killed: Path, whole: Path, kills: int) -> None:
    begun, needed = events(killed), events(whole)
    again = sum(begun[(s.name, "begin")] - needed[(s.name, "begin")] for s in STAGES)
    assert 0 <= again <= kills


def digests(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in ("log.jsonl", ".lock")]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
