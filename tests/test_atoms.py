"""Proves labels, nearest concepts and firing rates of atoms against a naive reading of Eq. 9."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from small_run import (
    D_MODEL,
    LAYERS,
    Killed,
    concept_rows,
    dictionary,
    digests,
    model_facts,
    opened,
    small_recipe,
    write_activations,
    write_directions,
    write_polarity,
    write_sae,
)

from builders import atoms as stage
from builders.train_sae import load_sae, token_split
from daco.dictionary import ConceptDictionary
from daco.errors import ActivationError, RecipeError, UnknownLayerError
from daco.sae import SAE
from daco.sites import ModelFacts
from daco.tables import ATOMS


def small_dictionary(polarities=("undesirable", "desirable", "neutral")) -> ConceptDictionary:
    vectors = {layer: dictionary()[f"layer_{layer}"] for layer in LAYERS}
    concepts = pd.DataFrame(concept_rows(polarities))
    return ConceptDictionary(concepts, vectors, ModelFacts(**model_facts()), {1: 11.0, 2: 12.0})


def atoms(n: int = 37, seed: int = 4) -> torch.Tensor:
    """Atoms that lie near concepts, at norms other than 1; the last are random."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, D_MODEL, generator=draw)
    near = dictionary()["layer_1"].repeat(3, 1)
    return torch.cat([near + 2 * rows[:33], rows[33:]])


def naive_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def naive_label(atom, centroids, eta):
    minus, plus = (naive_cosine(atom, centroids[p]) for p in ("undesirable", "desirable"))
    if minus >= eta and minus > plus:
        return "undesirable"
    return "desirable" if plus >= eta and plus > minus else "neutral"


@pytest.mark.parametrize("eta", [0.2, 0.5])
def test_labels_and_cosines_equal_the_naive_ones(eta):
    concepts, W = small_dictionary(), atoms()
    table = stage.atoms_table(W, concepts, 1, torch.zeros(37), eta=eta).to_pylist()
    D = [row.numpy().astype(np.float64) for row in dictionary()["layer_1"]]
    centroids = {
        polarity: np.mean(
            [
                v / np.linalg.norm(v)
                for v, r in zip(D, concept_rows(), strict=True)
                if r["polarity"] == polarity
            ],
            axis=0,
        )
        for polarity in ("undesirable", "desirable")
    }
    labels = [naive_label(w.numpy().astype(np.float64), centroids, eta) for w in W]
    assert [row["polarity"] for row in table] == labels
    assert set(labels) == {"undesirable", "desirable", "neutral"}
    for w, row in zip(W.numpy().astype(np.float64), table, strict=True):
        assert row["cos_undesirable"] == pytest.approx(naive_cosine(w, centroids["undesirable"]), abs=1e-6)
        assert row["cos_desirable"] == pytest.approx(naive_cosine(w, centroids["desirable"]), abs=1e-6)
        cosines = [naive_cosine(w, v) for v in D]
        order = sorted(range(11), key=lambda i: -cosines[i])[:5]
        assert row["nearest_concept_ids"] == [f"user:concept-{i}" for i in order]
        assert row["nearest_concepts"] == [f"concept {i}" for i in order]
        np.testing.assert_allclose(row["nearest_cosines"], [cosines[i] for i in order], atol=1e-6)


def test_ties_between_nearest_concepts_go_to_the_earlier_one(monkeypatch):
    monkeypatch.setattr(stage, "BLOCK", 2)
    concepts = torch.eye(5)[[0, 1, 0, 1, 2]]
    cosines, index = stage.nearest(torch.eye(5)[[0, 1, 1]], concepts, 9)
    assert index[:, :2].tolist() == [[0, 2], [1, 3], [1, 3]]
    assert cosines[0].tolist() == [1, 1, 0, 0, 0]


def test_firing_rates_equal_the_naive_ones():
    draw = torch.Generator().manual_seed(6)
    W, z = torch.randn(37, D_MODEL, generator=draw), torch.randn(29, D_MODEL, generator=draw)
    sae = SAE(W.T.contiguous(), torch.zeros(37), W, torch.zeros(D_MODEL), "topk", 3)
    fired = np.zeros(37)
    for row in z:
        pre = (row @ W.T).numpy()
        for atom in np.argsort(-pre)[:3]:
            fired[atom] += pre[atom] > 0
    np.testing.assert_allclose(stage.firing_rates(sae, z.split(7)), fired / 29)


def test_no_held_out_tokens_is_refused():
    sae = SAE(torch.ones(3, 5), torch.zeros(5), torch.ones(5, 3), torch.zeros(3), "relu")
    with pytest.raises(ActivationError, match="expected held-out tokens, got none"):
        stage.firing_rates(sae, [])


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.5])
def test_bad_eta_is_refused(eta):
    with pytest.raises(RecipeError, match=r"atoms\.eta: expected a cosine in \(0, 1\]"):
        stage.atoms_table(atoms(), small_dictionary(), 1, torch.zeros(37), eta=eta)


def test_unknown_layer_is_refused():
    with pytest.raises(UnknownLayerError):
        stage.atoms_table(atoms(), small_dictionary(), 3, torch.zeros(37))


@pytest.fixture
def upstream(tmp_path):
    write_activations(tmp_path)
    write_directions(tmp_path)
    write_polarity(tmp_path)
    write_sae(tmp_path)
    return tmp_path


def run(out, killed_at=None):
    recipe = small_recipe(sae={"holdout": 0.3}, atoms={"eta": 0.25, "n_nearest": 3})
    stage.run(opened(recipe, out, "atoms", killed_at))
    return digests(out / "atoms")


def test_stage_writes_a_table_a_layer(upstream):
    run(upstream)
    shards = sorted((upstream / "activations" / "shards").iterdir())
    for position, layer in enumerate(LAYERS):
        table = pq.read_table(upstream / "atoms" / f"layers.{layer}" / "atoms.parquet")
        assert table.schema.equals(ATOMS)
        assert table["atom"].to_pylist() == list(range(37))
        sae = load_sae(upstream / "sae" / f"layers.{layer}")
        z = torch.cat([*token_split(shards, position, 0.3)[1].blocks(5)])
        rates = (sae.encode(z) > 0).double().mean(0)
        np.testing.assert_allclose(table["firing_rate"].to_numpy(), rates, rtol=1e-6)
        assert table["nearest_concepts"][2].as_py()[0] == "concept 2"  # atom i was started from concept i
    labels = json.loads((upstream / "atoms" / "facts.json").read_text())["labels"]
    assert labels["1"]["undesirable"] >= 2
    counts = json.loads((upstream / "atoms" / "done.json").read_text())["counts"]
    assert counts["in"] == 74 == counts["out"] + counts["skipped"]["neutral"]


@pytest.mark.parametrize("at", [0, 1])
def test_killed_and_resumed_equals_undisturbed(upstream, at):
    expected = run(upstream)
    (upstream / "atoms" / "stage.json").unlink()
    with pytest.raises(Killed):
        run(upstream, killed_at=at)
    assert run(upstream) == expected


@pytest.mark.parametrize("missing", ["undesirable", "desirable"])
def test_a_polarity_that_no_concept_has_gives_zeros_and_a_warning(upstream, missing):
    (upstream / "polarity" / "stage.json").unlink()
    write_polarity(upstream, tuple(p for p in ("undesirable", "desirable", "neutral") if p != missing))
    run(upstream)
    table = pq.read_table(upstream / "atoms" / "layers.1" / "atoms.parquet")
    assert set(table[f"cos_{missing}"].to_pylist()) == {0.0}
    assert missing not in set(table["polarity"].to_pylist())
    facts = json.loads((upstream / "atoms" / "facts.json").read_text())
    assert facts["missing_polarities"] == [missing]
    warnings = [json.loads(line) for line in (upstream / "log.jsonl").read_text().splitlines()]
    assert [w["text"] for w in warnings if w["event"] == "warning"] == [
        f"no concept is {missing}: no atom can be, and its cosines are 0"
    ]
