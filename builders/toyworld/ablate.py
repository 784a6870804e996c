"""Takes DACO's choices apart on the toy world, one at a time, around the settings that tuning chose.

Reads a run folder; writes rows into `compare/ablations`, one file each. What is there is not made again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from builders.directions import contrast, readings
from builders.statistics import rate
from builders.tokens import read_ids
from builders.toyworld.arms import Parts, Setting, describe
from builders.toyworld.bench import Bench, figure, suites_of
from builders.toyworld.truth import truth_dictionary
from builders.train_sae import load_sae, token_split, train_sae
from daco.dictionary import ConceptDictionary
from daco.manifest import canonical_json, write_atomic
from daco.sae import SAE
from daco.sae_files import layer_folder

FIGURES = ("unsafe", "unsafe_unseen_cues", "utility", "helpful", "over_refusal")

POSITIVES = (5, 15, 30, 60)
"""Positives (and as many negatives) a direction is made of."""


class Row(NamedTuple):
    """One variant."""

    choice: str
    """What is varied."""
    value: str
    """To what."""
    setting: Setting
    """How DACO steers then."""
    parts: Callable[[], Parts]
    """What it steers with."""


def rows(bench: Bench, chosen: Setting) -> list[Row]:
    """Every variant of the chosen setting."""

    def as_built() -> Parts:
        return bench.parts(bench.recipe.run.seed)

    layers = bench.dictionary.layers
    sets = [[layer] for layer in layers] + [layers[: len(layers) // 2], layers[len(layers) // 2 :], layers]
    found = [
        Row("eta", str(eta), chosen | {"eta": eta}, as_built) for eta in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    ]
    found += [Row("gamma", str(g), chosen | {"gamma": g}, as_built) for g in (0.0, 0.01, 0.03, 0.1, 0.3)]
    found += [Row("layers", describe({"layers": s}), chosen | {"layers": s}, as_built) for s in sets]
    found += [
        Row("scope", s, chosen | {"scope": s}, as_built) for s in ("prompt", "generated", "image", "all")
    ]
    for n in POSITIVES:
        found.append(Row("positives a concept", str(n), chosen, lambda n=n: fewer_positives(bench, n)))  # type: ignore[misc]
    found.append(Row("stimuli", "as the world knows them", chosen, lambda: from_truth(bench)))
    found.append(Row("centroids", "one a group of concepts", chosen, lambda: by_group(bench)))
    for scale in ("one", "fit"):
        found.append(Row("encoder at the start", scale, chosen, lambda s=scale: scaled(bench, s)))  # type: ignore[misc]
    return found


def fewer_positives(bench: Bench, n: int) -> Parts:
    """Directions of the `n` nearest positives and the first `n` negatives, with SAEs started from them."""
    links = pd.read_parquet(bench.out / "stimuli" / "links.parquet")
    ids = read_ids(bench.shards)
    concepts = list(bench.dictionary.concepts["concept_id"])
    found = contrast(concepts, links[links["rank"] < n], ids, readings(bench.shards))
    vectors = {layer: found.directions[i] for i, layer in enumerate(bench.dictionary.layers)}
    return rebuilt(bench, dataclasses.replace(bench.dictionary, vectors=vectors))


def from_truth(bench: Bench) -> Parts:
    """Directions of what pictures really show, with SAEs started from them."""
    return rebuilt(bench, truth_dictionary(bench.out, bench.dictionary))


def by_group(bench: Bench) -> Parts:
    """The run's own parts, atoms labelled by the nearest of several centroids."""
    return dataclasses.replace(bench.parts(bench.recipe.run.seed), centroids="group")


def scaled(bench: Bench, scale: str) -> Parts:
    """SAEs whose encoder starts as the decoder's transpose (`one`), or as the multiple that fits (`fit`)."""
    return rebuilt(bench, bench.dictionary, encoder_scale=scale)


def rebuilt(bench: Bench, dictionary: ConceptDictionary, **changed: Any) -> Parts:
    """Parts whose SAEs of the dictionary start are trained anew."""
    parts = bench.parts(bench.recipe.run.seed)
    config = dataclasses.replace(bench.recipe.sae, start="dictionary", **changed)
    saes = {}
    for position, layer in enumerate(dictionary.layers):
        train, held = token_split(bench.shards, position, config.holdout)
        own = load_sae(bench.out / "sae" / layer_folder(layer))
        sized = dataclasses.replace(config, n_atoms=own.n_atoms)
        done = train_sae(
            train, held, sized, directions=dictionary.raw(layer), seed=bench.recipe.run.seed, layer=layer
        )
        saes[layer] = SAE(**done.exported(), activation=own.activation, k=own.k).requires_grad_(False)
    return dataclasses.replace(parts, dictionary=dictionary, saes={**parts.saes, "dictionary": saes})


def run(
    bench: Bench,
    chosen: Setting,
    n: int,
    progress: Callable[[Sequence[Row]], Iterable[Row]] = lambda found: found,
) -> list[dict[str, Any]]:
    """Measure every variant on `n` test items of each suite.

    Returns:
        Rows: `choice`, `value`, `setting`, and `{rate, low, high, n}` of each of `FIGURES`.
    """
    suites = {name: items for name, items in suites_of(n, "test").items() if name != "harmful"}
    folder = bench.folder / "ablations"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for row in progress(rows(bench, chosen)):
        facts = canonical_json([bench.made_from, row.choice, row.value, row.setting, n])
        path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
        if not path.is_file():
            outcomes = bench.outcomes(row.parts(), "daco", row.setting, suites)
            figures = {name: _rate(figure(outcomes, name)) for name in FIGURES}
            named = {"choice": row.choice, "value": row.value, "setting": describe(row.setting)}
            write_atomic(path, canonical_json(named | figures))
        found.append(dict(json.loads(path.read_text("utf-8"))))
    return found


def _rate(outcomes: Any) -> dict[str, float]:
    found = rate(outcomes[None])
    return {"rate": found.mean, "low": found.low, "high": found.high, "n": outcomes.size}


def as_text(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of percentages."""
    lines = ["choice | value | " + " | ".join(FIGURES)]
    for row in found:
        cells = [f"{100 * row[name]['rate']:.1f}" for name in FIGURES]
        lines.append(" | ".join([row["choice"], row["value"], *cells]))
    return "\n".join(lines)
