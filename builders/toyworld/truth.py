"""What retrieval found, held against what the toy world's pictures really show; reads a run folder."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from builders.directions import contrast, readings
from builders.tokens import read_ids
from builders.toyworld import scenes
from daco.dictionary import ConceptDictionary


def truth_links(out: Path) -> pd.DataFrame:
    """Links as the world knows them: of the stimuli that were read, which show a concept and which do not."""
    stimuli = pd.read_parquet(out / "corpus" / "stimuli.parquet", columns=["stimulus_id", "source_key"])
    linked = set(pd.read_parquet(out / "stimuli" / "links.parquet", columns=["stimulus_id"])["stimulus_id"])
    concepts = pd.read_parquet(out / "polarity" / "concepts.parquet", columns=["concept_id", "concept"])
    rows = []
    for stimulus in stimuli[stimuli["stimulus_id"].isin(linked)].itertuples():
        item = scenes.corpus_item(stimulus.source_key)
        for concept_id, concept in concepts.itertuples(index=False):
            role = "positive" if scenes.shows(item, concept) else "negative"
            rows.append((concept_id, stimulus.stimulus_id, role))
    return pd.DataFrame(rows, columns=["concept_id", "stimulus_id", "role"])


def truth_dictionary(out: Path, dictionary: ConceptDictionary) -> ConceptDictionary:
    """The dictionary with directions from what pictures really show instead of what was retrieved."""
    shards = sorted((out / "activations" / "shards").iterdir())
    found = contrast(
        list(dictionary.concepts["concept_id"]), truth_links(out), read_ids(shards), readings(shards)
    )
    vectors = {layer: found.directions[i] for i, layer in enumerate(dictionary.layers)}
    return dataclasses.replace(dictionary, vectors=vectors)


def against_truth(out: Path, dictionary: ConceptDictionary) -> dict[str, Any]:
    """Share of the positives that show their concept, and cosines of directions to the true ones."""
    links = pd.read_parquet(out / "stimuli" / "links.parquet")
    positive = links[links["role"] == "positive"]
    truth = truth_links(out)
    right = truth[truth["role"] == "positive"].set_index(["concept_id", "stimulus_id"]).index
    shown = pd.Series(
        positive.set_index(["concept_id", "stimulus_id"]).index.isin(right), positive["concept"]
    )
    real = truth_dictionary(out, dictionary)
    cosines = {
        str(layer): float((dictionary.unit(layer) * real.unit(layer)).sum(1).median())
        for layer in real.layers
    }
    return {
        "precision": {name: float(value) for name, value in shown.groupby(level=0).mean().items()},
        "directions_agreement": cosines,
    }
