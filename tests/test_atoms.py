"""Proves labels, nearest concepts and firing rates of atoms against a naive reading of Eq. 9."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from sae_rows import Rows
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
    stimulus_ids,
    write_activations,
    write_directions,
    write_polarity,
    write_sae,
)

from builders import atoms as stage
from builders.tokens import MODALITIES, held_out
from builders.train_sae import load_sae, token_split
from daco.dictionary import ConceptDictionary
from daco.errors import ActivationError, RecipeError, UnknownLayerError
from daco.sae import SAE
from daco.sites import ModelFacts


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


class Stimuli(Rows):
    """Held-out tokens in memory, with whose they are."""

    def __init__(self, z, lengths, modality=None):
        super().__init__(z, modality)
        self.ends = np.cumsum(lengths)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_firing_by_modality_and_top_stimuli_equal_the_naive_ones(block, device):
    draw = torch.Generator().manual_seed(6)
    W, z = torch.randn(37, D_MODEL, generator=draw), torch.randn(29, D_MODEL, generator=draw)
    sae = SAE(W.T.contiguous(), torch.zeros(37), W, torch.zeros(D_MODEL), "topk", 3).requires_grad_(False)
    lengths = [5, 1, 9, 2, 12]
    kinds = torch.tensor([0, 1, 2] * 9 + [0, 0], dtype=torch.uint8)
    codes = sae.encode(z)
    found = stage.firing_of(sae.to(device), Stimuli(z, lengths, kinds), n_top=2, block=block)
    torch.testing.assert_close(found.rate, (codes > 0).double().mean(0))
    for number, name in enumerate(MODALITIES[:3]):
        torch.testing.assert_close(found.by_modality[name], (codes[kinds == number] > 0).double().mean(0))
    assert found.by_modality["generated"] is None
    largest = torch.stack([part.amax(0) for part in codes.split(lengths)])  # [stimulus, atom]
    for atom in range(37):
        order = sorted(range(5), key=lambda i: (-float(largest[i, atom]), i))[:2]
        kept = [i for i in order if largest[i, atom] > 0]
        assert [i for i in found.stimuli[atom].tolist() if i >= 0] == kept
        np.testing.assert_allclose(found.values[atom], largest[order, atom], rtol=1e-5)
    unknown = stage.firing_of(sae, Stimuli(z, lengths), n_top=2, block=block)
    assert set(unknown.by_modality.values()) == {None}
    assert torch.equal(unknown.rate, found.rate)


def test_centroids_by_group_equal_the_naive_ones():
    concepts, W = small_dictionary(), atoms()
    concepts.concepts["group"] = ["a", "a", "b", "a", "b", "b", "a", "a", "c", "b", "b"]
    D, rows = concepts.unit(1).numpy(), concepts.concepts.to_dict("records")
    table = stage.atoms_table(W, concepts, 1, torch.zeros(37), eta=0.3, centroids="group", min_group=2)
    for polarity in ("undesirable", "desirable"):
        members = {
            g: [i for i, r in enumerate(rows) if (r["polarity"], r["group"]) == (polarity, g)] for g in "abc"
        }
        small = [i for numbers in members.values() if len(numbers) < 2 for i in numbers]
        members = {g: numbers for g, numbers in members.items() if len(numbers) >= 2} | {"": small}
        for w, row in zip(W.numpy().astype(np.float64), table.to_pylist(), strict=True):
            cosines = {g: naive_cosine(w, D[n].mean(0)) for g, n in members.items() if n}
            best = max(cosines, key=cosines.get)
            assert row[f"{polarity}_group"] == best
            assert row[f"cos_{polarity}_group"] == pytest.approx(cosines[best], abs=1e-6)
            assert row[f"cos_{polarity}"] == row[f"cos_{polarity}_group"]
    one = stage.atoms_table(W, concepts, 1, torch.zeros(37), eta=0.3, min_group=2)
    assert one["cos_undesirable"].to_pylist() != table["cos_undesirable"].to_pylist()
    assert one["cos_undesirable_group"].to_pylist() == table["cos_undesirable_group"].to_pylist()
    assert one["polarity"].to_pylist() != table["polarity"].to_pylist()


def test_no_held_out_tokens_is_refused():
    sae = SAE(torch.ones(3, 5), torch.zeros(5), torch.ones(5, 3), torch.zeros(3), "relu")
    with pytest.raises(ActivationError, match="expected held-out tokens, got none"):
        stage.firing_rates(sae, [])
    with pytest.raises(ActivationError, match="expected held-out tokens, got none"):
        stage.firing_of(sae, Stimuli(torch.empty(0, 3), []), 2)


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
        assert table.schema.equals(stage.SCHEMA)
        assert table["atom"].to_pylist() == list(range(37))
        sae = load_sae(upstream / "sae" / f"layers.{layer}")
        z = torch.cat([*token_split(shards, position, 0.3)[1].blocks(5)])
        rates = (sae.encode(z) > 0).double().mean(0)
        np.testing.assert_allclose(table["firing_rate"].to_numpy(), rates, rtol=1e-6)
        held = {i for i in stimulus_ids(23) if held_out(i, 0.3)}
        top = table["top_stimuli"].to_pylist()
        assert {i for row in top for i in row} <= held
        assert max(map(len, top)) > 1
        assert [len(row) for row in top] == [len(row) for row in table["top_values"].to_pylist()]
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
