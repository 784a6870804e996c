"""How often are names right on held-out pictures: of atoms that fire, and of concepts that are recognised?

Reads the toy world's LLaVA (shipped) and, where `--data` or `DACO_TEST_DATA` has `emoji/`, a tiny random
LLaVA over emoji; writes `results/names.json`, a list of {work, who, value, unit, ratio}. A name is right
where the caption says it. Each seed draws other pictures (of emoji: holds out another fifth); directions,
covariance, thresholds and SAEs are made from the others alone. `value` is a mean over seeds with its 95 %
t-interval beside it, `ratio` the value over that of the atoms.
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from benchmarks.sae_start import BASE, STARTS, T95, WEIGHTS, Rows
from benchmarks.sae_training import machine
from builders.atoms import nearest
from builders.forward import read_batch
from builders.mllm import load_mllm
from builders.names import fired
from builders.recognition import HELD, Counts, Said, Shown, calibrate, class_sums, recognised, tally
from builders.statistics import precision_recall
from builders.tiny import tiny_mllm
from builders.toyworld import scenes
from builders.train_sae import train_sae
from daco.sae import SAE

RESULTS = Path(__file__).parent / "results" / "names.json"
FOLDS, MIN_PRECISION = 5, 0.5


class World(NamedTuple):
    """What a model makes of captioned pictures."""

    captions: list[str]
    """One a picture."""
    concepts: list[str]
    """Names."""
    layers: list[int]
    """Layers read."""
    readings: Tensor
    """[pictures, layers, d]."""
    tokens: list[Tensor]
    """A picture each: [tokens, layers, d]."""
    modality: list[Tensor]
    """A picture each: [tokens]."""


def world(
    model: Any, processor: Any, pairs: Sequence[tuple[Any, str]], concepts: list[str], layers: list[int]
) -> World:
    """One forward of all captioned pictures, a batch at a time."""
    images, captions = zip(*pairs, strict=True)
    parts = [
        read_batch(model, processor, captions[i : i + 50], images[i : i + 50], layers)
        for i in range(0, len(pairs), 50)
    ]
    readings = torch.cat([part.readings for part in parts if part.readings is not None])
    tokens, modality = ([x for part in parts for x in getattr(part, name)] for name in ("tokens", "modality"))
    return World(list(captions), concepts, layers, readings, [z.float() for z in tokens], modality)


def toy(n: int, seed: int) -> World:
    """Captioned pictures of the toy world, others for each seed."""
    model, processor = load_mllm(str(WEIGHTS))
    pairs = [(image, item.text) for image, item, _ in scenes.corpus(n, 100 + seed)]
    return world(model, processor, pairs, [row["concept"] for row in scenes.concepts()], [0, 1, 2, 3, 4, 5])


def emoji(folder: Path, n: int) -> World:
    """Fluent emoji with their names and keywords; concepts are the most frequent words of captions."""
    table = pd.read_csv(folder / "index.tsv", sep="\t").dropna().sample(frac=1.0, random_state=0).head(n)
    captions = [
        f"{name}, {keywords.replace('|', ', ')}"
        for name, keywords in table[["name", "keywords"]].itertuples(index=False)
    ]
    counts = Counter(word for caption in captions for word in set(caption.replace(",", " ").split()))
    concepts = [word for word, count in counts.most_common(80) if count >= 20 and len(word) > 2][:64]
    model, processor = tiny_mllm("llava", captions, hidden=64)
    images = [Image.open(folder / "images" / file).convert("RGB") for file in table["file"]]
    return world(model, processor, [*zip(images, captions, strict=True)], concepts, [1, 2])


class Held:
    """Readings of one layer in memory, as `builders.recognition.Readings` gives them."""

    def __init__(self, z: Tensor, part: np.ndarray) -> None:
        self.z, self.part = z, part

    def of(self, *parts: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Those of some parts."""
        if len(rows := np.flatnonzero(np.isin(self.part, parts))):
            yield rows, self.z[torch.from_numpy(rows)]


def contrasts(readings: Any, shown: Shown, n_concepts: int, parts: set[int]) -> Tensor:
    """Mean reading of what shows a concept minus that of all, of the stimuli of some parts, [concepts, d]."""
    ((_, z),) = readings.of(*parts)
    mean = z.double().mean(0)
    return class_sums(readings, shown, n_concepts, mean, *parts).directions(torch.zeros_like(mean))


def by_direction(readings: Any, shown: Shown, n_concepts: int) -> Any:
    """Directions alone as scores, standardised, with thresholds chosen likewise; a function of z."""
    folds, counts = set(range(FOLDS)), Counts(n_concepts)

    def scorer(parts: set[int]) -> Any:
        d = contrasts(readings, shown, n_concepts, parts)
        ((_, z),) = readings.of(*parts)
        raw = z.double() @ d.T
        mean, spread = raw.mean(0), raw.std(0)
        return lambda x: (x.double() @ d.T - mean) / spread

    for fold in folds:
        ((rows, z),) = readings.of(fold)
        counts.add(scorer(folds - {fold})(z), shown.matrix(rows, n_concepts))
    threshold = torch.tensor(counts.thresholds(MIN_PRECISION)["threshold"].to_numpy())
    score = scorer(folds)
    return lambda x: score(x) >= threshold


def by_atoms(found: World, position: int, directions: Tensor, held: np.ndarray, seed: int) -> Any:
    """Concepts nearest to the atoms that fire, of an SAE trained on tokens of the others; a function of z."""
    sides = []
    for which in (~held, held):
        rows = np.flatnonzero(which)
        z, kinds = (torch.cat([parts[i] for i in rows]) for parts in (found.tokens, found.modality))
        sides.append(Rows(z[:, position].contiguous(), kinds))
    config = dataclasses.replace(BASE, **STARTS["dictionary, fitted encoder"])
    training = train_sae(*sides, config, directions=directions, seed=seed, layer=found.layers[position])
    sae = SAE(**training.exported(), activation="topk", k=BASE.k).requires_grad_(False)
    unit = (torch.nn.functional.normalize(rows, dim=1) for rows in (sae.W_dec, directions))
    own = nearest(*unit, 1)[1][:, 0]
    return lambda x: fired(sae, own, len(directions), x)


def measured(found: World, seed: int, held_share: float = 0.2) -> dict[tuple[int, str, str], float]:
    """Precision and recall by layer and way, on held-out pictures."""
    n, C = len(found.captions), len(found.concepts)
    part = np.random.default_rng(seed).permutation(n) % FOLDS
    part[np.random.default_rng(seed + 1_000).permutation(n)[: round(held_share * n)]] = HELD
    held = part == HELD
    said = Said(found.concepts)
    shown = Shown.of([said.of(caption) for caption in found.captions])
    true = shown.matrix(np.flatnonzero(held), C)
    values: dict[tuple[int, str, str], float] = {}
    for position, layer in enumerate(found.layers):
        readings: Any = Held(found.readings[:, position], part)
        directions = contrasts(readings, shown, C, set(range(FOLDS))).float()
        one = calibrate(readings, shown, C, folds=FOLDS, min_precision=MIN_PRECISION).recogniser
        ways = {
            "atoms that fire": by_atoms(found, position, directions, held, seed),
            "directions alone, thresholds likewise": by_direction(readings, shown, C),
            "recognised": lambda x, one=one: recognised(one, x),
        }
        for who, name in ways.items():
            given = name(found.readings[torch.from_numpy(held), position])
            figures = precision_recall(tally(given, true))
            values |= {(layer, who, what): figures.get(what, 0.0) for what in ("precision", "recall")}
        values[layer, "chance", "precision"] = float(true.double().mean())
    return values


def table_of(where: str, runs: Sequence[dict[tuple[int, str, str], float]]) -> list[dict[str, Any]]:
    """Rows of one world: means over seeds with t-intervals."""
    table = []
    for key in runs[0]:
        layer, who, what = key
        values = [run[key] for run in runs]
        mean = statistics.mean(values)
        half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        plain = statistics.mean(run[layer, "atoms that fire", what] for run in runs)
        row = {"work": f"{where}, layer {layer}: {what}", "who": who, "value": round(mean, 4)}
        row |= {"interval": round(half, 4), "unit": "share"}
        table.append(row | {"ratio": None if who == "chance" else round(mean / plain, 3)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("DACO_TEST_DATA"))
    parser.add_argument("--stimuli", type=int, default=2_500)
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T95))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(arguments.seeds)
    table = table_of("toy world", [measured(toy(arguments.stimuli, seed), seed) for seed in seeds])
    if arguments.data and (Path(arguments.data) / "emoji" / "index.tsv").is_file():
        found = emoji(Path(arguments.data) / "emoji", arguments.stimuli)
        table += table_of("emoji", [measured(found, seed) for seed in seeds])
    table = [row | {"machine": machine(1)} for row in table]
    for row in table:
        said = f"{row['value']:>8} +- {row['interval']:<7} x {row['ratio']}"
        print(f"{row['work']:<32} {row['who']:<36} {said}")
    RESULTS.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
