"""Does an SAE gain from starting as the dictionary? FVE curves, names kept and names that fire, two models.

Reads the toy world's LLaVA (shipped) and, where `--data` or `DACO_TEST_DATA` has `emoji/`, a tiny random
LLaVA over emoji; writes `results/sae_start.json`, a list of {work, who, value, unit, ratio}. Every start is
trained with the same seeds and batches; `value` is a mean over seeds with its 95 % t-interval beside it,
`ratio` the value over that of the paper's start (`dictionary`: W_enc = W_dec^T). Directions are contrasts of
what pictures really show (toy) or of words of captions (emoji), from training stimuli alone. `--part read`
measures only how well directions alone tell what a picture shows, at the reading token, without any SAE.
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

from benchmarks.sae_training import machine
from builders.forward import read_batch
from builders.mllm import load_mllm
from builders.recipe import SaeConfig
from builders.sae_training import Training
from builders.tiny import tiny_mllm
from builders.toyworld import scenes
from builders.train_sae import train_sae
from daco.sae import SAE

WEIGHTS = Path(__file__).parent.parent / "builders" / "toyworld" / "weights" / "llava"
RESULTS = Path(__file__).parent / "results" / "sae_start.json"
LAYER, MARKS = 2, (0, 50, 100, 200, 400)
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}
"""Student's t for 95 % intervals, by number of seeds."""

BASE = SaeConfig(n_atoms=256, k=12, steps=MARKS[-1], batch=512, eval_steps=50, eval_tokens=4_096)
STARTS: dict[str, dict[str, Any]] = {
    "dictionary": {},
    "dictionary, fitted encoder": {"encoder_scale": "fit"},
    "dictionary, fitted, AuxK": {"encoder_scale": "fit", "aux_k": 32, "dead_tokens": 10_000},
    "dictionary, fitted, components": {"encoder_scale": "fit", "rest": "pca"},
    "random": {"start": "random"},
    "random, fitted, components": {"start": "random", "encoder_scale": "fit", "rest": "pca"},
    "random, fitted encoder": {"start": "random", "encoder_scale": "fit"},
}


class Read(NamedTuple):
    """Activations of one layer."""

    tokens: Tensor
    """[t, d]."""
    modality: Tensor
    """[t]."""
    readings: Tensor
    """[stimuli, d]."""
    lengths: list[int]
    """Tokens of each stimulus."""
    shows: Tensor
    """[stimuli, concepts] bool."""


class Rows:
    """Tokens in memory."""

    def __init__(self, z: Tensor, modality: Tensor) -> None:
        self.z, self.d_model, self.modality = z, z.shape[1], modality

    def __len__(self) -> int:
        return len(self.z)

    def rows(self, index: np.ndarray[Any, Any]) -> Tensor:
        """Rows of these numbers."""
        return self.z[torch.from_numpy(index)]

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All rows in order."""
        return iter(self.z.split(size))


def read(model: Any, processor: Any, pairs: Sequence[tuple[Image.Image, str]], shows: Tensor) -> Read:
    """One forward of all pairs, a batch at a time."""
    tokens, modality, readings = [], [], []
    for start in range(0, len(pairs), 50):
        images, captions = zip(*pairs[start : start + 50], strict=True)
        found = read_batch(model, processor, captions, images, [LAYER])
        tokens += [z[:, 0].float() for z in found.tokens]
        modality += found.modality
        readings.append(found.readings[:, 0])
    lengths = [len(z) for z in tokens]
    return Read(torch.cat(tokens), torch.cat(modality), torch.cat(readings), lengths, shows)


def toy(n: int) -> Read:
    """Captioned pictures of the toy world, and the concepts that they show."""
    model, processor = load_mllm(str(WEIGHTS))
    drawn = [*scenes.corpus(n, 7)]
    concepts = [row["concept"] for row in scenes.concepts()]
    shows = torch.tensor([[scenes.shows(item, concept) for concept in concepts] for _, item, _ in drawn])
    return read(model, processor, [(image, item.text) for image, item, _ in drawn], shows)


def emoji(folder: Path, n: int) -> Read:
    """Fluent emoji with their names and keywords; concepts are words of 20 captions and more."""
    table = pd.read_csv(folder / "index.tsv", sep="\t").dropna().sample(n, random_state=0)
    captions = [
        f"{row.name_}, {row.keywords.replace('|', ', ')}"
        for row in table.rename(columns={"name": "name_"}).itertuples()
    ]
    words = [set(caption.replace(",", " ").split()) for caption in captions]
    common = Counter(word for found in words for word in found if len(word) > 2)
    concepts = [word for word, count in common.most_common(64) if count >= 20]
    shows = torch.tensor([[concept in found for concept in concepts] for found in words])
    model, processor = tiny_mllm("llava", captions, hidden=64)
    images = [Image.open(folder / "images" / file).convert("RGB") for file in table["file"]]
    return read(model, processor, [*zip(images, captions, strict=True)], shows)


def contrasts(found: Read, train: int) -> Tensor:
    """Mean reading of the stimuli that show a concept minus that of the others, [concepts, d]."""
    z, shows = found.readings[:train], found.shows[:train]
    return torch.stack([z[on].mean(0) - z[~on].mean(0) for on in shows.T])


def trained(found: Read, start: str, seed: int) -> tuple[Training, Tensor, int]:
    """An SAE from a start, the directions, and how many stimuli were trained on."""
    train = round(0.9 * len(found.lengths))
    cut = sum(found.lengths[:train])
    sides = [Rows(found.tokens[part], found.modality[part]) for part in (slice(0, cut), slice(cut, None))]
    config = dataclasses.replace(BASE, **STARTS[start])
    directions = contrasts(found, train)
    given = directions if config.start == "dictionary" else None
    return train_sae(*sides, config, directions=given, seed=seed, layer=LAYER), directions, train


def names_that_fire(found: Read, training: Training, n_concepts: int, train: int) -> tuple[float, float]:
    """Precision and recall of the concepts' own atoms at the reading tokens of held-out stimuli."""
    sae = SAE(**training.exported(), activation="topk", k=BASE.k).requires_grad_(False)
    fired = sae.encode(found.readings[train:])[:, :n_concepts] > 0
    shows = found.shows[train:]
    right = float((fired & shows).sum())
    return right / max(1.0, float(fired.sum())), right / float(shows.sum())


NAMED = 5
"""Names given to each picture where directions alone give them."""


def readers(z: Tensor, directions: Tensor, ridge: float = 0.01) -> dict[str, Tensor]:
    """Ways to read concepts from readings, columns of [d, concepts].

    A direction is a difference of means: it tells on which side of a contrast a picture is, with all that
    concepts share. Divided by the covariance of readings it is Fisher's discriminant, which drops what varies
    whatever is shown.

    Args:
        z: [stimuli, d], training readings.
        directions: [concepts, d].
        ridge: Added to the covariance, as a share of its mean variance.
    """
    unit = torch.nn.functional.normalize(directions, dim=1)
    covariance = torch.cov(z.T)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance))
    return {
        "direction": unit.T,
        "direction over the readings' covariance": torch.linalg.solve(covariance, unit.T),
    }


def names_read(where: str, found: Read) -> list[dict[str, Any]]:
    """Precision and recall of the `NAMED` concepts read highest over their own training mean and spread."""
    train = round(0.9 * len(found.lengths))
    z, shows = found.readings, found.shows[train:]
    plain: dict[str, float] = {}
    table = []
    for who, reader in readers(z[:train], contrasts(found, train)).items():
        scores = z @ reader
        scores = (scores[train:] - scores[:train].mean(0)) / scores[:train].std(0)
        named = torch.zeros_like(shows).scatter(1, scores.topk(NAMED, 1).indices, True)
        right = float((named & shows).sum())
        for what, value in (
            ("precision", right / float(named.sum())),
            ("recall", right / float(shows.sum())),
        ):
            plain.setdefault(what, value)
            row = {"work": f"{where}: {NAMED} names read: {what}", "who": who, "unit": "share"}
            table.append(
                row | {"value": round(value, 4), "interval": 0.0, "ratio": round(value / plain[what], 3)}
            )
    chance = {
        "work": f"{where}: {NAMED} names read: precision",
        "who": "chance",
        "unit": "share",
        "ratio": None,
    }
    return [*table, chance | {"value": round(float(shows.float().mean()), 4), "interval": 0.0}]


def figures(found: Read, start: str, seed: int) -> dict[str, float]:
    """All that is reported of one training."""
    training, directions, train = trained(found, start, seed)
    by_step = {row["step"]: row for row in training.records}
    last = training.records[-1]
    row = {f"FVE at step {step}": by_step[step]["fve"] for step in MARKS} | {
        "dead atoms": float(last["dead"])
    }
    if last["own"] is not None:
        precision, recall = names_that_fire(found, training, len(directions), train)
        row |= {"concepts whose atom is still theirs": last["own"] / len(directions)}
        row |= {"cosine to the own concept": last["drift_cos"]}
        row |= {"names that fire: precision": precision, "names that fire: recall": recall}
    return row


def table_of(where: str, found: Read, seeds: int) -> list[dict[str, Any]]:
    """Rows of all starts, and the paired difference of both fitted ones."""
    runs = {start: [figures(found, start, seed) for seed in range(seeds)] for start in STARTS}
    gained = {
        f"dictionary - random, {how}": [
            {key: a[key] - b[key] for key in b if key.startswith("FVE")}
            for a, b in zip(runs[f"dictionary, {how}"], runs[f"random, {how}"], strict=True)
        ]
        for how in ("fitted encoder", "fitted, components")
    }
    rows = []
    for start, found_rows in (runs | gained).items():
        for key in found_rows[0]:
            values = [row[key] for row in found_rows]
            mean = statistics.mean(values)
            plain = (
                statistics.mean(row[key] for row in runs["dictionary"])
                if key in runs["dictionary"][0]
                else 0.0
            )
            half = T95[seeds] * statistics.stdev(values) / seeds**0.5
            ratio = round(mean / plain, 3) if plain and not start.startswith("dictionary -") else None
            row = {
                "work": f"{where}: {key}",
                "who": start,
                "value": round(mean, 4),
                "interval": round(half, 4),
            }
            rows.append(row | {"unit": "share" if "FVE" not in key else "FVE", "ratio": ratio})
    shown = found.shows[round(0.9 * len(found.lengths)) :].float().mean()
    rows.append(
        {"work": f"{where}: names that fire: precision", "who": "chance", "value": round(float(shown), 4)}
    )
    rows[-1] |= {"unit": "share", "ratio": None, "interval": 0.0}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("DACO_TEST_DATA"))
    parser.add_argument("--stimuli", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T95))
    parser.add_argument("--part", choices=("all", "read"), default="all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    worlds = {"toy world": toy(arguments.stimuli)}
    if arguments.data and (Path(arguments.data) / "emoji" / "index.tsv").is_file():
        worlds["emoji"] = emoji(Path(arguments.data) / "emoji", min(1_400, arguments.stimuli))
    table = []
    for where, found in worlds.items():
        table += names_read(where, found)
        table += table_of(where, found, arguments.seeds) if arguments.part == "all" else []
    table = [row | {"machine": machine(1)} for row in table]
    for row in table:
        print(
            f"{row['work']:<52} {row['who']:<40} {row['value']:>8} +- {row['interval']:<7} x {row['ratio']}"
        )
    old = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    again = {(row["work"], row["who"]) for row in table}
    kept = [row for row in old if (row["work"], row["who"]) not in again]
    RESULTS.write_text(json.dumps(kept + table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
