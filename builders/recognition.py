"""What tells from a reading which concepts it shows: a discriminant and a threshold of each.

Reads `corpus/` (captions), `stimuli/links.parquet`, of `polarity/concepts.parquet` ids and names alone, and
readings of `activations/`; writes `recognition/facts.json` and, in a shard a layer, `statistics.safetensors`
(`mean`, `inverse`), `concepts.parquet` (as releases have it), `facts.json` and `figures.json` (how often the
names of held-out stimuli are right). What is held out of SAE training (by `sae.holdout`) is so here, too.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders.directions import with_readings
from builders.stages import Work, writing
from builders.statistics import by_cluster, precision_recall
from builders.tokens import check_activations, held_out, read_facts, read_ids, read_sides
from daco.dictionary_files import recogniser_of, recognition_table
from daco.errors import ActivationError, IntegrityError
from daco.manifest import canonical_json, write_atomic
from daco.recognition import MEASURED, Recogniser, discriminants, measured
from daco.tables import CONCEPTS, LINKS, read_table, recognition_schema, write_table

STEP, N_STEPS = 1 / 32, 1_024
"""Thresholds are multiples of STEP below N_STEPS * STEP; which of them is best is counted, not sorted."""

MIN_RIGHT = 3
"""Left-out stimuli that a name must be right of, at least."""

USUAL = 0.99
"""Share of the left-out stimuli whose distance is usual."""

BLOCK = 1_024
"""Stimuli scored at a time."""

CHUNK = 4_096
"""Pairs of a stimulus and a concept that it shows, added up at a time."""

HELD = -1
"""Part of the stimuli that are held out; those of the others are 0, 1, ..."""


# What captions say.


class Said:
    """Finds which concepts captions name, word by word as they are written.

    Args:
        concepts: Names; `fire_alarm` and `Fire alarm` are the same.
    """

    def __init__(self, concepts: Sequence[str]) -> None:
        self.numbers: dict[tuple[str, ...], list[int]] = {}
        for number, concept in enumerate(concepts):
            if words := _words(concept):
                self.numbers.setdefault(words, []).append(number)
        self.longest = max(map(len, self.numbers), default=0)

    def of(self, caption: str) -> set[int]:
        """Numbers of the concepts that a caption names."""
        words = _words(caption)
        spans = (words[i : i + n] for n in range(1, self.longest + 1) for i in range(len(words) - n + 1))
        return {number for span in spans for number in self.numbers.get(span, ())}


def _words(text: str) -> tuple[str, ...]:
    """Letters, with the marks on them, and digits that stand together, in one case and form."""
    plain = unicodedata.normalize("NFKC", text.casefold())
    pairs = zip(f" {plain}", plain, strict=False)
    kept = (c if c.isalnum() or (_is_mark(c) and _in_word(before)) else " " for before, c in pairs)
    return tuple("".join(kept).split())


def _is_mark(character: str) -> bool:
    """Of vowels in many scripts, of accents that no composed letter has."""
    return unicodedata.category(character)[0] == "M"


def _in_word(character: str) -> bool:
    return character.isalnum() or _is_mark(character)


# How readings vary.


class Moments(NamedTuple):
    """Sums over readings about a fixed point near their mean."""

    n: int
    """How many."""
    total: Tensor
    """[d] float64, sum."""
    scatter: Tensor
    """[d, d] float64, sum of outer products."""
    fourth: float
    """Sum of the fourth powers of their norms."""

    def plus(self, other: "Moments", sign: int = 1) -> "Moments":
        """Of both together, or without the other's."""
        return Moments(*(a + sign * b for a, b in zip(self, other, strict=True)))


def moments(z: Tensor, about: Tensor) -> Moments:
    """Of readings `[n, d]` about a point `[d]`."""
    x = z.double() - about
    return Moments(len(x), x.sum(0), x.T @ x, float((x * x).sum(1).square().sum()))


class Shrunk(NamedTuple):
    """Statistics that recognition rests on."""

    mean: Tensor
    """[d] float64."""
    inverse: Tensor
    """[d, d] float64, of the shrunk covariance."""
    shrinkage: float
    """Share of the covariance that is its mean variance in all directions."""


def shrunk(sums: Moments, about: Tensor) -> Shrunk:
    """Mean and inverse covariance, shrunk by Ledoit and Wolf's rule so that the error is expected least.

    scikit-learn's `ledoit_wolf` gives the same from all readings at once, which do not fit at full size.

    Args:
        sums: Of at least two readings.
        about: The point they are about.

    Raises:
        ActivationError: fewer than two readings, or they are all alike or not finite.

    Source: Ledoit and Wolf, Journal of Multivariate Analysis 88 (2004).
    """
    if sums.n < 2:
        raise ActivationError(
            f"expected at least 2 readings to tell how they vary, got {sums.n}; "
            "add stimuli, or set recognition.min_precision = 0"
        )
    mean, d = sums.total / sums.n, len(sums.total)
    covariance = sums.scatter / sums.n - mean.outer(mean)
    size, variance = float((covariance**2).sum()), float(covariance.trace()) / d
    noise, apart = (sums.fourth / sums.n - size) / (d * sums.n), size / d - variance**2
    share = min(1.0, max(0.0, noise / apart)) if apart > 0 else 1.0
    covariance = (1 - share) * covariance + share * variance * torch.eye(d, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not bool(factor.isfinite().all()):
        raise ActivationError(
            f"expected readings that differ, got {sums.n} of variance {variance:.3g}; add stimuli, or set "
            "recognition.min_precision = 0"
        )
    return Shrunk(about + mean, torch.cholesky_inverse(factor), share)


# Readings on disk, and what their stimuli show.


def parts_of(sides: Sequence[str], holdout: float, folds: int) -> np.ndarray:
    """The part of each stimulus, [n]: HELD or a fold, one for all captions of a picture.

    Args:
        sides: Of the stimuli (see `builders.tokens.sides_of`).
        holdout: Share that is held out.
        folds: How many there are.
    """
    return np.array([HELD if held_out(side, holdout) else fold_of(side, folds) for side in sides])


def fold_of(side: str, folds: int) -> int:
    """The fold of what is not held out, a function of its side alone."""
    digest = hashlib.sha256(f"recognition fold\0{side}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % folds


class Readings:
    """Readings of one layer, read from disk a shard at a time.

    Args:
        shards: Folders of the activations stage that hold readings.
        position: Of the layer among the stage's.
        part: [n] the part of each reading's stimulus.
    """

    def __init__(self, shards: Sequence[Path], position: int, part: np.ndarray) -> None:
        self.shards, self.position, self.part = shards, position, part

    def of(self, *parts: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(numbers [n], readings [n, d]) of the stimuli of these parts, at most BLOCK at a time."""
        start = 0
        for shard in self.shards:
            with safe_open(shard / "readings.safetensors", "pt") as file:
                z = file.get_slice("readings")[:, self.position]
            inside = np.flatnonzero(np.isin(self.part[start : start + len(z)], parts))
            for first in range(0, len(inside), BLOCK):
                rows = inside[first : first + BLOCK]
                yield start + rows, z[torch.from_numpy(rows)]
            start += len(z)


class Shown(NamedTuple):
    """Which concepts each stimulus shows."""

    ends: np.ndarray
    """[n] end of each stimulus's own within `concepts`."""
    concepts: np.ndarray
    """Numbers of concepts, a stimulus after the other."""

    @classmethod
    def of(cls, each: Sequence[set[int]]) -> "Shown":
        """Of one set a stimulus."""
        ends = np.cumsum([len(one) for one in each], dtype=np.int64)
        flat = [number for one in each for number in sorted(one)]
        return cls(ends, np.array(flat, dtype=np.int64))

    def pairs(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(place among `rows`, concept) of every concept that these stimuli show."""
        first = np.where(rows > 0, self.ends[rows - 1], 0)
        n = self.ends[rows] - first
        within = np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)
        concepts = self.concepts[np.repeat(first, n) + within]
        return torch.from_numpy(np.repeat(np.arange(len(rows)), n)), torch.from_numpy(concepts)

    def matrix(self, rows: np.ndarray, n_concepts: int) -> Tensor:
        """[len(rows), n_concepts] bool, of these stimuli."""
        found = torch.zeros(len(rows), n_concepts, dtype=torch.bool)
        found[self.pairs(rows)] = True
        return found


class Sums(NamedTuple):
    """Sums over what shows each concept, about the same point as `Moments`."""

    total: Tensor
    """[n_concepts, d] float64."""
    n: Tensor
    """[n_concepts] how many."""

    def directions(self, mean: Tensor) -> Tensor:
        """Mean of what shows a concept minus that of all, [n_concepts, d]; zero of what nothing shows.

        Args:
            mean: [d], of all, about the same point.
        """
        found = self.total / self.n[:, None] - mean
        return torch.where(self.n[:, None] > 0, found, 0.0)


def class_sums(readings: "Readings", shown: Shown, n_concepts: int, about: Tensor, *parts: int) -> Sums:
    """Sums over the stimuli of some parts."""
    total = torch.zeros(n_concepts, len(about), dtype=torch.float64)
    counts = torch.zeros(n_concepts, dtype=torch.int64)
    for rows, z in readings.of(*parts):
        place, concept = shown.pairs(rows)
        for some in torch.arange(len(place)).split(CHUNK):
            total.index_add_(0, concept[some], z[place[some]].double() - about)
        counts += concept.bincount(minlength=n_concepts)
    return Sums(total, counts)


# From which score on.


class Counts:
    """Left-out stimuli by their scores: of each concept, how many reach each step, and how many show it.

    Args:
        n_concepts: Rows.
    """

    def __init__(self, n_concepts: int) -> None:
        self.named, self.right = (torch.zeros(n_concepts, N_STEPS, dtype=torch.int64) for _ in range(2))
        self.shown = torch.zeros(n_concepts, dtype=torch.int64)

    def add(self, scores: Tensor, shown: Tensor) -> None:
        """Count stimuli: scores [n, n_concepts], NaN where there is none, and which they show, bool."""
        there = scores.isfinite()
        step = (torch.nan_to_num(scores) / STEP).floor().long().clamp(max=N_STEPS - 1)
        place = step + N_STEPS * torch.arange(scores.shape[1])
        counted = there & (step >= 0)
        for total, which in ((self.named, counted), (self.right, counted & shown)):
            total += place[which].bincount(minlength=total.numel()).view_as(total)
        self.shown += (there & shown).sum(0)

    def thresholds(self, min_precision: float) -> pd.DataFrame:
        """The lowest score of each concept from which on the name is right often enough.

        Args:
            min_precision: Share of the stimuli named that must show the concept.

        Returns:
            Columns threshold (NaN: no score does), n_shown, precision and recall at the threshold.
        """
        named, right = (total.flip(1).cumsum(1).flip(1) for total in (self.named, self.right))
        enough = (right >= MIN_RIGHT) & (right.double() >= min_precision * named.double())
        lowest = enough.int().argmax(1)
        ever, rows = enough.any(1), torch.arange(len(enough))
        right_at, named_at = right[rows, lowest].double(), named[rows, lowest].double()
        found = {
            "threshold": lowest * STEP,
            "precision": right_at / named_at,
            "recall": right_at / self.shown,
        }
        known = {name: torch.where(ever, value.double(), torch.nan).numpy() for name, value in found.items()}
        return pd.DataFrame(known | {"n_shown": self.shown.numpy()})


class Calibrated(NamedTuple):
    """What the stage finds of one layer."""

    recogniser: Recogniser
    """What tells the concepts."""
    shrinkage: float
    """See `Shrunk`."""
    n: int
    """Readings it rests on."""


def calibrate(
    readings: Readings, shown: Shown, n_concepts: int, *, folds: int, min_precision: float
) -> Calibrated:
    """Discriminants and thresholds of a layer; nothing that is held out has a part in them.

    Every stimulus is scored by discriminants and a covariance that it has no part in (its fold is left out):
    of those it has a part in, it would have too high a score where few show a concept.

    Args:
        readings: Of the layer.
        shown: What each reading's stimulus shows.
        n_concepts: How many concepts there are.
        folds: Parts that are left out in turn.
        min_precision: How often a name must be right.

    Raises:
        ActivationError: a reading is NaN or infinite, or too few of them, or they are alike.
    """
    parts = range(folds)
    about = _mean(readings, parts)
    sums = [_sums(readings, part, about) for part in parts]
    total = sums[0]
    for more in sums[1:]:
        total = total.plus(more)
    whole, of_all = shrunk(total, about), class_sums(readings, shown, n_concepts, about, *parts)
    counts, distances = Counts(n_concepts), []
    for part, own in enumerate(sums):
        if not own.n:
            continue
        others = shrunk(total.plus(own, -1), about)
        left_out = class_sums(readings, shown, n_concepts, about, part)
        known = Sums(of_all.total - left_out.total, of_all.n - left_out.n)
        one = _recogniser(others, known.directions(others.mean - about), None, float("inf"))
        for rows, z in readings.of(part):
            scores = one.scores(z).masked_fill(known.n == 0, torch.nan)
            counts.add(scores, shown.matrix(rows, n_concepts))
            distances.append(one.distance(z))
    usual = float(np.quantile(torch.cat(distances).numpy(), USUAL))
    directions = of_all.directions(whole.mean - about)
    found = _recogniser(whole, directions, counts.thresholds(min_precision), usual)
    return Calibrated(found, whole.shrinkage, total.n)


def _recogniser(
    statistics: Shrunk, directions: Tensor, thresholds: pd.DataFrame | None, usual: float
) -> Recogniser:
    """A recogniser stored in float32; without thresholds it only scores."""
    if thresholds is None:
        thresholds = pd.DataFrame(np.nan, index=range(len(directions)), columns=list(MEASURED))
    return Recogniser(
        statistics.mean.float(),
        statistics.inverse.float().contiguous(),
        discriminants(directions, statistics.inverse).float(),
        measured(thresholds),
        usual,
    )


def _mean(readings: Readings, parts: Sequence[int]) -> Tensor:
    total, n = torch.zeros(()), 0
    for _, z in readings.of(*parts):
        total, n = total + z.double().sum(0), n + len(z)
    if not n or not bool(total.isfinite().all()):
        raise ActivationError(
            f"expected finite readings of stimuli that are not held out, got {n}"
            f"{' with NaN or infinity' if n else ''}; add stimuli, or set recognition.min_precision = 0"
        )
    return total / n


def _sums(readings: Readings, part: int, about: Tensor) -> Moments:
    d = len(about)
    found = Moments(0, torch.zeros(d).double(), torch.zeros(d, d).double(), 0.0)
    for _, z in readings.of(part):
        found = found.plus(moments(z, about))
    return found


# How often names are right.


def recognised(one: Recogniser, z: Tensor) -> Tensor:
    """Which concepts `ConceptDictionary.recognise` names of readings [n, d], [n, n_concepts] bool."""
    return one.over(one.scores(z), one.distance(z)) >= 0


def tally(given: Tensor, true: Tensor) -> np.ndarray:
    """Names right, given and true of each stimulus, [n, 3], from both as [n, n_concepts] bool."""
    return torch.stack([(given & true).sum(1), given.sum(1), true.sum(1)], 1).numpy()


def held_out_figures(
    readings: Readings, said: Shown, one: Recogniser, sides: Sequence[str]
) -> dict[str, Any]:
    """How often what is recognised of held-out stimuli is what their captions name.

    Args:
        readings: Of the layer.
        said: What each reading's caption names.
        one: What tells the concepts.
        sides: Of the stimuli of all readings.

    Returns:
        `recognised_precision` and `recognised_recall`, each with its `_interval` over pictures; empty without
        held-out stimuli.
    """
    n = len(one.vectors)
    counted = [tally(recognised(one, z), said.matrix(rows, n)) for rows, z in readings.of(HELD)]
    if not counted:
        return {}
    pictures = list(compress(sides, readings.part == HELD))
    found = precision_recall(by_cluster(np.concatenate(counted), pictures))
    return {f"recognised_{name}": value for name, value in found.items()}


# The stage.


def load_figures(folder: Path) -> dict[str, dict[str, Any]]:
    """How often names were right of held-out stimuli, by layer; empty where the recipe wants none.

    Raises:
        IntegrityError: the stage was run by a version that did not measure it.
    """
    layers = json.loads((folder / "facts.json").read_text("utf-8"))["layers"]
    paths = {str(layer): folder / "shards" / shard_name(layer) / "figures.json" for layer in layers}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise IntegrityError(
            f"expected figures of names, got none at {missing[0]}: an earlier version left this folder; "
            "run again without --only"
        )
    return {layer: json.loads(path.read_text("utf-8")) for layer, path in paths.items()}


def load_recognisers(folder: Path) -> dict[int, Recogniser]:
    """What the stage found, by layer; empty where the recipe wants none."""
    layers = json.loads((folder / "facts.json").read_text("utf-8"))["layers"]
    return {layer: load_recogniser(folder, layer) for layer in layers}


def load_recogniser(folder: Path, layer: int) -> Recogniser:
    """What the stage found of one layer."""
    shard = folder / "shards" / shard_name(layer)
    tensors = load_file(shard / "statistics.safetensors")
    table = read_table(shard / "concepts.parquet", recognition_schema(len(tensors["mean"])))
    usual = json.loads((shard / "facts.json").read_text("utf-8"))["usual"]
    return recogniser_of(table, tensors["mean"], tensors["inverse"], usual)


def shard_name(layer: int) -> str:
    """Name of a layer's shard."""
    return f"layers.{layer}"


def corpus_columns(corpus: Path, ids: Sequence[str], *columns: str) -> list[list[str]]:
    """Columns of the corpus, of these stimuli in their order."""
    wanted, found = set(ids), {}
    for batch in pq.ParquetFile(corpus / "stimuli.parquet").iter_batches(
        8_192, columns=["stimulus_id", *columns]
    ):
        rows = zip(*(batch.column(name).to_pylist() for name in ("stimulus_id", *columns)), strict=True)
        found.update((i, values) for i, *values in rows if i in wanted)
    return [[found[i][n] for i in ids] for n in range(len(columns))]


check_upstream = check_activations


def run(work: Work) -> None:
    """The stage: a shard a layer."""
    config, source = work.recipe.recognition, work.upstream("activations")
    table = read_table(work.upstream("polarity") / "concepts.parquet", CONCEPTS)
    concepts = table.select(["concept_id", "concept"]).to_pandas()  # the others may change: see the pipeline
    layers = read_facts(source)["layers"] if config.min_precision else []
    facts = {"layers": layers, "stimuli": _calibrate_layers(work, concepts, layers) if layers else {}}
    named = sum(_facts(work.folder, layer)["named"] for layer in layers)
    write_atomic(work.folder / "facts.json", canonical_json(facts))
    n = len(layers) * len(concepts)
    work.finish({"in": n, "out": named, "skipped": {"never_right_enough": n - named}})


def _facts(folder: Path, layer: int) -> dict[str, Any]:
    return dict(json.loads((folder / "shards" / shard_name(layer) / "facts.json").read_text("utf-8")))


def _calibrate_layers(work: Work, concepts: pd.DataFrame, layers: Sequence[int]) -> dict[str, int]:
    """A shard a layer; how many stimuli there are, and how many of them are held out."""
    config = work.recipe.recognition
    shards = with_readings(sorted((work.upstream("activations") / "shards").iterdir()))
    ids = read_ids(shards)
    (captions,) = corpus_columns(work.upstream("corpus"), ids, "caption")
    sides = read_sides(shards)
    part = parts_of(sides, work.recipe.sae.holdout, config.folds)
    said, shown = _said_and_shown(work, concepts, ids, captions)
    for position, layer in enumerate(work.progress(layers, unit="layer")):
        if work.has(shard_name(layer)):
            continue
        readings = Readings(shards, position, part)
        found = calibrate(
            readings, shown, len(concepts), folds=config.folds, min_precision=config.min_precision
        )
        figures = held_out_figures(readings, said, found.recogniser, sides)
        with work.shard(shard_name(layer)) as folder, writing(f"what tells the concepts of layer {layer}"):
            _write(folder, concepts, found)
            write_atomic(folder / "figures.json", canonical_json(figures))
    return {"in": len(ids), "held_out": int((part == HELD).sum())}


def _said_and_shown(
    work: Work, concepts: pd.DataFrame, ids: Sequence[str], captions: Sequence[str]
) -> tuple[Shown, Shown]:
    """What captions name; a stimulus shows that, and the concepts that it is a positive of."""
    finder = Said(concepts["concept"].tolist())
    found = [finder.of(caption) for caption in captions]
    said = Shown.of(found)
    number, place = ({name: i for i, name in enumerate(names)} for names in (concepts["concept_id"], ids))
    links = read_table(work.upstream("stimuli") / "links.parquet", LINKS)
    columns = (links.column(name).to_pylist() for name in ("concept_id", "stimulus_id", "role"))
    for concept_id, stimulus_id, role in zip(*columns, strict=True):
        if role == "positive" and concept_id in number and stimulus_id in place:
            found[place[stimulus_id]].add(number[concept_id])
    return said, Shown.of(found)


def _write(folder: Path, concepts: pd.DataFrame, found: Calibrated) -> None:
    one = found.recogniser
    save_file({"mean": one.mean, "inverse": one.inverse}, folder / "statistics.safetensors")
    write_table(folder / "concepts.parquet", recognition_table(concepts, one))
    facts: dict[str, Any] = {"usual": one.usual, "shrinkage": found.shrinkage, "n_readings": found.n}
    facts["named"] = int(one.concepts["threshold"].notna().sum())
    write_atomic(folder / "facts.json", canonical_json(facts))
