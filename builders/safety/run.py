"""Asks a model every item of every suite under every method, and has the answers judged.

Reads suites, methods and judges; writes into the folder of a run

    run.json                                          what is compared, and what all of it depends on
    answers/<suite>/<method>-<digest>/00000.parquet   every prompt with its answer; 00000.json: what it cost
    scores/<judge>-<digest>/<suite>/<method>-<digest>/00000.parquet   what a judge said of them

A digest stands for all that a file's content depends on, so that what is there never has to be made again and
never is mistaken for something else. Files appear whole or not at all: killed at any moment, a run loses at
most the shard in flight. Shards of a suite are asked under one method after the other, so that costs can be
compared although the machine is busier at one time than at another.
"""

import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from filelock import FileLock
from tqdm import tqdm

from builders.safety.asking import GREEDY, Answer, Pace, ask, batches, opened
from builders.safety.items import Item, Suite
from builders.safety.methods import Arm
from builders.safety.verdicts import Judge
from builders.stages import writing
from daco.errors import RecipeError
from daco.manifest import canonical_json, write_atomic
from daco.sites import ModelFacts
from daco.tables import read_table, table_of, write_table

RUN = "run.json"

SAMPLED = 64
"""Numbers of each weight that stand for it."""

SHARD = 64
"""Items a file: what a kill can cost."""

ANSWERS = pa.schema(
    [
        ("suite", pa.string()),
        ("item_id", pa.string()),
        ("kind", pa.string()),
        ("group", pa.string()),
        ("variant", pa.string()),
        ("question", pa.string()),
        ("prompt", pa.string()),
        ("n_pictures", pa.int32()),
        ("gold", pa.string()),
        ("method", pa.string()),
        ("setting", pa.string()),
        ("answer", pa.string()),
        ("n_tokens", pa.int32()),
        ("cut", pa.bool_()),
        ("trouble", pa.string()),
    ]
)
"""One row an item and method. `answer` is null where the item could not be asked, and `trouble` says why;
`cut`: the answer is as long as answers may be; `setting`: the method and its settings in words."""

SCORES = pa.schema([("item_id", pa.string()), ("value", pa.float64()), ("reason", pa.string())])
"""One row an answer that was judged; `value` is null where the judge could not be read."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked."""

    batch: int = 8
    """Items a call of `generate`."""
    max_answer: int = 256
    """Tokens of an answer, at most."""
    items: int = 0
    """Items of each suite, spread evenly over it; 0 is all."""
    base_model_ok: bool = False
    """Accept a model other than the one the SAEs were made for (a fine-tune, a quantised copy)."""
    part: tuple[int, int] = (1, 1)
    """Which part of the shards this process does, of how many: `(2, 4)` is the second of four."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        number, of = self.part
        if not 1 <= number <= of:
            raise RecipeError(f"part: expected 1/n to n/n, got {number}/{of}")
        for name, least in (("batch", 1), ("max_answer", 1), ("items", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def part_of(text: str) -> tuple[int, int]:
    """`2/4` as the second of four.

    Raises:
        RecipeError: it is not of that form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not found:
        raise RecipeError(f"part: expected such as 1/4, got {text!r}")
    return int(found[1]), int(found[2])


class Cell(NamedTuple):
    """The items of one suite under one method."""

    suite: Suite
    arm: Arm
    name: str
    """`<method>-<digest>`."""

    def folder(self, out: Path) -> Path:
        """Where its answers are."""
        return out / "answers" / self.suite.name / self.name


class Job(NamedTuple):
    """One file that is to be made."""

    cell: Cell
    number: int
    items: tuple[Item, ...]

    @property
    def file(self) -> str:
        """Its name, without ending."""
        return f"{self.number:05d}"


def thinned(suite: Suite, at_most: int) -> Suite:
    """At most so many items, spread evenly over the suite; 0 is all."""
    n = len(suite.items)
    if not at_most or at_most >= n:
        return suite
    rows = [i * n // at_most for i in range(at_most)]
    notes = (*suite.notes, f"{at_most} of {n} items, spread evenly")
    return suite._replace(items=tuple(suite.items[row] for row in rows), notes=notes)


def digest(*facts: Any) -> str:
    """Ten hex digits that stand for facts."""
    told = canonical_json(list(facts)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(told).hexdigest()[:10]


def item_facts(item: Item) -> list[Any]:
    """An item with its pictures; a file counts by its name and size."""
    pictures = [
        [p.path.name, p.path.stat().st_size]
        if p.path
        else [p.drawn, hashlib.sha256(p.data).hexdigest() if p.data else ""]
        for p in item.pictures
    ]
    return [*item._replace(pictures=()), pictures]


def model_facts(model: Any, processor: Any) -> list[Any]:
    """Which model answers: facts, some of every weight, and how pictures and chats are made inputs."""
    weights = hashlib.sha256()
    for name, p in model.named_parameters():
        some = p.detach().flatten()[:: max(1, p.numel() // SAMPLED)][:SAMPLED].float().cpu()
        weights.update(name.encode() + some.numpy().tobytes())
    pictures = getattr(processor, "image_processor", None)
    shown = json.dumps(pictures.to_dict() if pictures else {}, default=str, sort_keys=True)
    template = str(getattr(processor, "chat_template", None) or processor.tokenizer.chat_template)
    facts = dataclasses.asdict(ModelFacts.of(model))
    return [facts, str(model.dtype), weights.hexdigest(), shown, template]


def cells_of(
    model: Any, processor: Any, suites: Sequence[Suite], arms: Sequence[Arm], asking: Asking
) -> list[Cell]:
    """Every suite under every method, suite by suite.

    Args:
        model: The MLLM.
        processor: Its processor.
        suites: As they are asked.
        arms: The methods.
        asking: How; batch and part change no answer but by rounding.
    """
    known = [model_facts(model, processor), GREEDY, asking.max_answer]
    found = []
    for suite in suites:
        items = digest([item_facts(item) for item in suite.items])
        for arm in arms:
            found.append(Cell(suite, arm, f"{arm.name}-{digest(known, items, arm.facts)}"))
    return found


def jobs_of(cells: Sequence[Cell], part: tuple[int, int]) -> list[Job]:
    """The files of this process's part: of each shard of items, one a method."""
    found = []
    for suite in dict.fromkeys(cell.suite.name for cell in cells):
        mine = [cell for cell in cells if cell.suite.name == suite]
        items = mine[0].suite.items
        for number in range((len(items) + SHARD - 1) // SHARD):
            some = items[number * SHARD : (number + 1) * SHARD]
            found += [Job(cell, number, some) for cell in mine if number % part[1] == part[0] - 1]
    return found


def answer_all(out: Path, model: Any, processor: Any, jobs: Sequence[Job], asking: Asking) -> None:
    """Ask whatever was not asked before; shows what is left and how long it takes.

    Raises:
        DiskError: there is no room.
        ModelMismatchError: the methods were made for another model.
    """
    todo = [job for job in jobs if not (job.cell.folder(out) / f"{job.file}.parquet").is_file()]
    if todo and (first := opened(todo[0].items[:1])).rows:
        ask(
            model, processor, todo[0].items[:1], first.pictures, 2
        )  # what only a first call costs is no method's
    with _progress(len(jobs), len(jobs) - len(todo), "items x methods asked") as bar:
        for job in todo:
            bar.set_postfix_str(f"{job.cell.suite.name}, {job.cell.arm.name}")
            _answer_job(out, model, processor, job, asking)
            bar.update()


def _progress(total: int, done: int, what: str) -> Any:
    return tqdm(total=total, initial=done, desc=what, unit="shard", disable=not sys.stderr.isatty())


def _answer_job(out: Path, model: Any, processor: Any, job: Job, asking: Asking) -> None:
    answers: dict[int, Answer] = {}
    seconds, steps = 0.0, 0
    with job.cell.arm.on(model, asking.base_model_ok) as run:
        for rows in batches(job.items, asking.batch):
            asked = opened([job.items[row] for row in rows])
            answers |= {rows[row]: Answer(None, 0, False, why) for row, why in asked.trouble.items()}
            kept = [rows[row] for row in asked.rows]
            if kept:
                pace = Pace(lambda: _clock(model))
                said = ask(
                    model,
                    processor,
                    [job.items[row] for row in kept],
                    asked.pictures,
                    asking.max_answer,
                    job.cell.arm.prompt,
                    pace,
                )
                if pace.steps >= 0:  # else the model's window held none of them
                    seconds, steps = seconds + _clock(model) - pace.first, steps + pace.steps
                answers |= dict(zip(kept, said, strict=True))
    report = run.report() if run else None
    cost = {
        "seconds": seconds,  # behind the first token: neither pictures nor the prompt are in it
        "steps": steps,
        "batch": asking.batch,
        "device": str(model.device),
        "positions": report.positions if report else 0,
        "fired": sum(len(layer.atoms) for layer in report.layers) if report else 0,
        "notes": list(report.notes) if report else [],
    }
    folder = job.cell.folder(out)
    rows_of = [_row(job, item, answers[number]) for number, item in enumerate(job.items)]
    with writing(f"answers {job.cell.suite.name}, {job.cell.name}, shard {job.number}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{job.file}.json", canonical_json(cost))
        write_table(folder / f"{job.file}.parquet", table_of(rows_of, ANSWERS))


def _row(job: Job, item: Item, answer: Answer) -> dict[str, Any]:
    texts = {name: getattr(item, name) for name in ("suite", "item_id", "kind", "group", "variant", "gold")}
    asked = {"question": item.question, "prompt": item.prompt, "n_pictures": len(item.pictures)}
    said = {"answer": answer.text, "n_tokens": answer.n_tokens, "cut": answer.cut, "trouble": answer.trouble}
    arm = job.cell.arm
    return texts | asked | {"method": arm.name, "setting": str(arm)} | said


def _clock(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def slug(name: str) -> str:
    """A judge's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "judge"


def scores_name(judge: Judge) -> str:
    """Folder of a judge's scores."""
    return f"{slug(judge.name)}-{judge.figure}-{digest(judge.digest)}"


def suites_of(judge: Judge, cells: Sequence[Cell]) -> list[str]:
    """Names of the suites that have an item for a judge."""
    suites = {cell.suite.name: cell.suite for cell in cells}
    return [name for name, suite in suites.items() if any(judge.judges(item) for item in suite.items)]


def judge_facts(judge: Judge, cells: Sequence[Cell]) -> dict[str, Any]:
    """A judge as `run.json` names it."""
    told = {"name": judge.name, "figure": judge.figure, "folder": scores_name(judge)}
    return told | {"suites": suites_of(judge, cells)}


def judge_all(out: Path, judge: Judge, jobs: Sequence[Job]) -> None:
    """Have a judge look at the answers that are there and that it has not seen.

    Raises:
        DiskError: there is no room.
    """
    suites = suites_of(judge, [job.cell for job in jobs])
    mine = [job for job in jobs if job.cell.suite.name in suites]
    todo = [job for job in mine if not _scores_file(out, judge, job).is_file()]
    with _progress(len(mine), len(mine) - len(todo), f"judged by {judge.name}") as bar:
        for job in todo:
            _judge_job(out, judge, job)
            bar.update()


def _scores_file(out: Path, judge: Judge, job: Job) -> Path:
    folder = out / "scores" / scores_name(judge) / job.cell.suite.name / job.cell.name
    return folder / f"{job.file}.parquet"


def _judge_job(out: Path, judge: Judge, job: Job) -> None:
    table = read_table(job.cell.folder(out) / f"{job.file}.parquet", ANSWERS)
    said = dict(zip(table["item_id"].to_pylist(), table["answer"].to_pylist(), strict=True))
    items = [item for item in job.items if judge.judges(item) and said[item.item_id] is not None]
    verdicts = judge.verdicts(items, [said[item.item_id] for item in items])
    rows = [
        {"item_id": item.item_id, "value": verdict.value, "reason": verdict.reason}
        for item, verdict in zip(items, verdicts, strict=True)
    ]
    path = _scores_file(out, judge, job)
    with writing(f"scores of {judge.name}, shard {job.number}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, table_of(rows, SCORES))


def locked(out: Path) -> FileLock:
    """Held while a file is written that every part of a run writes; a killed process holds it no longer."""
    return FileLock(out / ".lock")


def record(out: Path, cells: Sequence[Cell], judges: Sequence[dict[str, str]], facts: dict[str, Any]) -> None:
    """Write `run.json`: what is compared, for the report; the newest run in a folder is the one that counts.

    Args:
        out: The folder; made when missing.
        cells: Of `cells_of`.
        judges: Of `judge_facts`.
        facts: Of the protocol: model, decoding, what the methods are made from.
    """
    suites = {
        cell.suite.name: {
            "items": len(cell.suite.items),
            "skipped": dict(sorted(cell.suite.skipped.items())),
            "notes": list(cell.suite.notes),
        }
        for cell in cells
    }
    told = [
        {"suite": cell.suite.name, "method": cell.arm.name, "cell": cell.name}
        | {"setting": str(cell.arm), "made_of": cell.arm.made_of}
        for cell in cells
    ]
    with writing("the record of the run"):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out), writing("the record of the run"):
        facts = facts | {"suites": suites, "cells": told, "judges": list(judges)}
        write_atomic(out / RUN, canonical_json(facts))


def read_record(out: Path) -> dict[str, Any]:
    """What `record` wrote.

    Raises:
        RecipeError: there is none, or it is broken.
    """
    try:
        return dict(json.loads((out / RUN).read_text("utf-8")))
    except FileNotFoundError as error:
        raise RecipeError(
            f"expected the folder of an evaluation, got no {RUN} in {out}; run `python -m builders evaluate`"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{out / RUN}: expected JSON, got {error}; run the evaluation again") from error


def shard_files(folder: Path) -> Iterator[Path]:
    """The tables of a cell that are there, in order."""
    yield from sorted(folder.glob("[0-9]*.parquet"))
