"""A run killed by SIGKILL inside every stage redoes at most one shard and ends with the same bytes."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from builders.pipeline import STAGES, run
from builders.recipe import Recipe, recipe_of
from builders.stages import DONE, Work

KILLS = 3
"""Kills in each stage, at seeded shards."""

SECTIONS = {
    "run": {"name": "kill", "seed": 5, "threads": 1},
    "corpus": {"kind": "toyworld", "rows": 60, "name": "toyworld", "licence": "cc0-1.0", "shard_rows": 12,
               "redistribute_images": True},
    "concepts": {"source": "captions", "min_count": 3, "max_concepts": 30},
    "clip": {"steps": 12, "batch": 16, "hidden": 32, "n_layers": 1, "vocabulary": 300, "image_size": 32,
             "checkpoint_steps": 2},
    "embeddings": {"batch": 6, "shard_rows": 12},
    "stimuli": {"n_positive": 5, "min_positive": 1, "pool": 64, "block": 5},
    "model": {"tiny": "llava"},
    "activations": {"layers": [1, 2], "batch": 4, "shard_rows": 5},
    "sae": {"k": 4, "holdout": 0.4, "steps": 20, "batch": 32, "eval_steps": 5, "checkpoint_steps": 4},
    "evaluate": {"items": 12, "batch": 3},
    "release": {"org": "local", "dataset": "DACO-kill", "licence": "cc0-1.0"},
}  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(tmp_path: Path) -> None:
    recipe = recipe_of(SECTIONS)
    modules = [f"builders.{stage.module}" for stage in STAGES]
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        modules
    )  # a restart then costs no import
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(run, recipe, whole) == 0
    kills = [point for stage in STAGES for point in kill_inside(recipe, killed, stage.name, whole)]
    assert finish(run, recipe, killed) == 0
    sharded = [stage.name for stage in STAGES if shards_of(whole, stage.name) > KILLS]
    assert len(sharded) >= 7
    for stage in sharded:
        assert len([name for name, _ in kills if name == stage]) == KILLS, kills
    assert_at_most_one_shard_lost(killed, whole, len(kills))
    assert digests(killed) == digests(whole)


def finish(target: Callable[..., object], *arguments: object) -> int | None:
    """Run in a process of its own; returns its exit code, negative when a signal ended it."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def kill_inside(recipe: Recipe, out: Path, stage: str, whole: Path) -> list[tuple[str, int]]:
    """Kill the run `KILLS` times inside `stage`, after seeded numbers of shards; returns the hits."""
    chance = random.Random(f"{recipe.run.seed} {stage}")
    total = shards_of(whole, stage)
    points = sorted(chance.sample(range(1, total), KILLS)) if total > KILLS else [0] * KILLS
    hits = []
    for point in points:
        code = finish(
            run_and_die, recipe, out, stage, point, chance.random() * shard_seconds(whole, stage) / 2
        )
        if code == -signal.SIGKILL and (out / stage).exists() and not (out / stage / DONE).exists():
            hits.append((stage, point))
    return hits


def run_and_die(recipe: Recipe, out: Path, stage: str, shards: int, delay: float) -> None:
    """Run the pipeline; SIGKILL strikes `delay` seconds after the stage has begun a shard behind `shards`.

    A stage that is quicker waits for it before its seal: a busy machine must not decide what is tested.
    """
    log, open_ = Work.log, Work.open
    struck: list[threading.Timer] = []

    def strike(work: Work) -> None:
        if work.stage == stage and shards_of(out, stage) >= shards:
            struck.append(threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)))
            struck[-1].start()

    def once_struck(end: Callable[..., None]) -> Callable[..., None]:
        def wait(work: Work, *arguments: object, **named: object) -> None:
            if struck and work.stage == stage:
                time.sleep(60)
            end(work, *arguments, **named)

        return wait

    def log_and_strike(work: Work, event: str, **facts: object) -> None:
        if event == "begin" and shards and struck and work.stage == stage:
            time.sleep(60)  # a late strike leaves the shards of the next ones alone
        log(work, event, **facts)
        if event == "begin" and shards:
            strike(work)

    def open_and_strike(work: Work, fingerprint: str) -> bool:
        opened = open_(work, fingerprint)
        if opened and not shards:
            strike(work)
        return opened

    Work.log, Work.open = log_and_strike, open_and_strike  # type: ignore[method-assign]
    Work.drop_shards, Work.finish = once_struck(Work.drop_shards), once_struck(Work.finish)  # type: ignore[method-assign]
    run(recipe, out, until=stage)  # a stage that was quicker than the strike must not finish those behind it


def shard_seconds(out: Path, stage: str) -> float:
    """Shortest time between two shards of a stage; a few milliseconds for one that has none."""
    ends = [line["at"] for line in lines_of(out) if (line["stage"], line["event"]) == (stage, "shard")]
    return min((b - a for a, b in itertools.pairwise(ends)), default=0.005)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def events(out: Path) -> Counter[tuple[str, str]]:
    """How many events of each kind the log of a run has, by stage."""
    return Counter((line["stage"], line["event"]) for line in lines_of(out))


def shards_of(out: Path, stage: str) -> int:
    return events(out)[(stage, "shard")]


def assert_at_most_one_shard_lost(killed: Path, whole: Path, kills: int) -> None:
    begun, needed = events(killed), events(whole)
    again = sum(begun[(s.name, "begin")] - needed[(s.name, "begin")] for s in STAGES)
    assert 0 <= again <= kills


def digests(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in ("log.jsonl", ".lock")]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
