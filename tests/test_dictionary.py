"""Proves what dictionaries do: search, nearest, parts, merge, diff, one concept more, to disk and back."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CAPTIONS, drawn_images
from release_fixture import BASE, LAYERS, N_CONCEPTS, WORDS, write_dataset_release
from torch import Tensor
from torch.nn.functional import normalize

from daco import ConceptDictionary, ModelFacts
from daco.errors import (
    ActivationError,
    ArtefactNotFoundError,
    FormatError,
    ModelMismatchError,
    UnknownConceptError,
    UnknownLayerError,
    UnsupportedModelError,
)

D = BASE["hidden_size"]


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> ConceptDictionary:
    folder = write_dataset_release(tmp_path_factory.mktemp("release"))
    return ConceptDictionary.from_pretrained(folder)


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def readings(n: int, seed: int, layers: tuple[int, ...] = LAYERS) -> dict[int, Tensor]:
    return {layer: draw(n, D, seed=seed + layer) for layer in layers}


def changed(dictionary: ConceptDictionary, **columns: object) -> ConceptDictionary:
    return dataclasses.replace(dictionary, concepts=dictionary.concepts.assign(**columns))


def named(dictionary: ConceptDictionary, names: list[str], definitions: list[str]) -> ConceptDictionary:
    """A dictionary of other names."""
    part = dictionary.subset(WORDS[: len(names)])
    ids = [f"wn30:{i}" for i in range(len(names))]
    return changed(part, concept=names, concept_id=ids, definition=definitions)


# Finding concepts.


def test_search_puts_the_best_first(dictionary: ConceptDictionary) -> None:
    names = ["firearm", "fire alarm", "fire", "Café au lait", "oak", "river"]
    texts = ["a weapon", "a bell", "flames (and heat)", "a drink", "a tree of the forest", "water; flows"]
    small = named(dictionary, names, texts)
    found = small.search("fire")
    assert list(found["concept"]) == ["fire", "fire alarm", "firearm"]
    assert found["score"].iloc[0] == 1.0
    assert found["score"].is_monotonic_decreasing
    assert list(small.search("ALARM")["concept"]) == ["fire alarm"]
    assert list(small.search("cafe_au-lait")["concept"]) == ["Café au lait"]
    assert list(small.search("rivver")["concept"]) == ["river"]
    assert list(small.search("heat")["concept"]) == ["fire"]
    assert small.search("wn30:4")["concept"].iloc[0] == "oak"
    assert list(small.search("fire", n=1)["concept"]) == ["fire"]
    assert len(small.search("zzzzqqqq")) == 0
    with pytest.raises(ValueError, match="expected words to search for"):
        small.search(" - ")


def test_nearest_of_many_equals_nearest_of_each(
    dictionary: ConceptDictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daco.dictionary.QUERIES", 2)
    queries = draw(5, D)
    found = dictionary.nearest(queries, 1, n=3)
    unit = normalize(dictionary.raw(1), dim=-1).numpy()
    for number, query in enumerate(queries):
        rows = found[found["query"] == number]
        cosines = unit @ (query / query.norm()).numpy()
        order = np.argsort(-cosines)[:3]
        assert list(rows["concept"]) == [WORDS[i] for i in order]
        np.testing.assert_allclose(rows["cosine"], cosines[order], atol=1e-6)
        alone = dictionary.nearest(query, 1, n=3)
        assert list(alone["concept"]) == list(rows["concept"])
    assert len(dictionary.nearest(queries, 1, n=99)) == 5 * N_CONCEPTS


def test_nearest_refuses_what_has_no_direction(dictionary: ConceptDictionary) -> None:
    with pytest.raises(ModelMismatchError, match=re.escape("expected vectors [32] or [n, 32], got [1, 31]")):
        dictionary.nearest(draw(31), 1)
    for bad in (torch.zeros(D), torch.full((D,), float("nan"))):
        with pytest.raises(ActivationError, match="finite and not zero"):
            dictionary.nearest(bad, 1)
    with pytest.raises(UnknownLayerError):
        dictionary.nearest(draw(D), 9)


def test_groups_count_concepts_by_polarity(dictionary: ConceptDictionary) -> None:
    groups = ["tool"] * 3 + ["animal"] * (N_CONCEPTS - 3)
    found = changed(dictionary, group=groups).groups()
    assert list(found["group"]) == ["animal", "tool"]
    assert list(found["n_concepts"]) == [N_CONCEPTS - 3, 3]
    tools = found.iloc[1]
    assert (tools["undesirable"], tools["neutral"], tools["desirable"]) == (2, 1, 0)
    assert tools["examples"] == "knife, dog, gun"


# Parts.


def test_a_subset_keeps_rows_vectors_and_order(dictionary: ConceptDictionary) -> None:
    part = dictionary.subset(["gun", "knife"], layers=[2])
    assert list(part.concepts["concept"]) == ["knife", "gun"]
    assert part.layers == [2]
    assert list(part.R) == [2]
    assert torch.equal(part.raw(2), dictionary.raw(2)[[0, 2]])
    undesirable = dictionary.subset(polarity="undesirable")
    assert undesirable.mask("undesirable").all()
    assert len(undesirable) == dictionary.mask("undesirable").sum()
    assert len(dictionary) == N_CONCEPTS


def test_a_subset_of_nothing_names_what_there_is(dictionary: ConceptDictionary) -> None:
    with pytest.raises(UnknownConceptError, match="'knife'"):
        dictionary.subset(["knive"])
    with pytest.raises(UnknownConceptError, match=r"group: expected one of 'noun.artifact', got 'food'"):
        dictionary.subset(group="food")
    with pytest.raises(UnknownConceptError, match="expected at least one concept that fits all filters"):
        dictionary.subset(["knife"], polarity="neutral")
    with pytest.raises(UnknownLayerError):
        dictionary.subset(layers=[9])


# Two in one.


def test_merging_parts_gives_the_whole(dictionary: ConceptDictionary) -> None:
    a, b = dictionary.subset(WORDS[:8]), dictionary.subset(WORDS[5:])
    merged, conflicts = a.merge(b)
    assert len(conflicts) == 0
    assert list(merged.concepts["concept"]) == WORDS
    assert list(merged.concepts["rank"]) == list(range(N_CONCEPTS))
    for layer in LAYERS:
        assert torch.equal(merged.raw(layer), dictionary.raw(layer))
    assert merged.sources == dictionary.sources


@pytest.mark.parametrize("rule", ["ours", "theirs"])
def test_a_conflict_is_settled_by_rule_and_reported(dictionary: ConceptDictionary, rule: str) -> None:
    turned = {layer: rows.clone() for layer, rows in dictionary.vectors.items()}
    turned[2][1] = -turned[2][1]
    labels = dictionary.concepts["polarity"].to_numpy().copy()
    labels[3] = "neutral"
    theirs = dataclasses.replace(
        changed(dictionary, polarity=labels), vectors=turned, sources=[{"name": "other", "version": "2.0.0"}]
    )
    with pytest.raises(FormatError, match=r"got 2 they do not agree on: \['dog', 'first-aid'\]"):
        dictionary.merge(theirs)
    merged, conflicts = dictionary.merge(theirs, on_conflict=rule)
    assert list(conflicts["concept"]) == ["dog", "first-aid"]
    assert list(conflicts["differs"]) == [["direction"], ["polarity"]]
    assert conflicts["cosine"].tolist() == pytest.approx([-1.0, 1.0])
    assert set(conflicts["kept"]) == {rule}
    expected = dictionary if rule == "ours" else theirs
    for layer in LAYERS:
        assert torch.equal(merged.raw(layer), expected.raw(layer))
    assert list(merged.concepts["polarity"]) == list(expected.concepts["polarity"])
    assert [source["name"] for source in merged.sources] == ["DACO-tiny", "other"]


def test_only_what_is_comparable_is_merged(dictionary: ConceptDictionary) -> None:
    facts = ModelFacts(**BASE)
    for name, value in {"model_type": "qwen2_vl", "id": "org/other", "revision": "e" * 40}.items():
        other = dataclasses.replace(dictionary, model=dataclasses.replace(facts, **{name: value}))
        with pytest.raises(ModelMismatchError, match=f"got {name}"):
            dictionary.merge(other)
    unknown = dataclasses.replace(dictionary, model=dataclasses.replace(facts, id="", revision=""))
    assert len(dictionary.merge(unknown).dictionary) == N_CONCEPTS
    with pytest.raises(ModelMismatchError, match="read at one place, got 'last' and 'caption_mean'"):
        dictionary.merge(dataclasses.replace(dictionary, reading="caption_mean"))
    with pytest.raises(UnknownLayerError, match=r"expected a layer both have, got \[1\] and \[2\]"):
        dictionary.subset(layers=[1]).merge(dictionary.subset(layers=[2]))
    assert dictionary.merge(dictionary.subset(layers=[2])).dictionary.layers == [2]
    with pytest.raises(ValueError, match="on_conflict: expected one of"):
        dictionary.merge(dictionary, on_conflict="newest")


def test_a_far_R_is_warned_about(dictionary: ConceptDictionary) -> None:
    other = dataclasses.replace(dictionary, R={1: dictionary.R[1], 2: 2 * dictionary.R[2]})
    with pytest.warns(UserWarning, match=r"more than 5% at layers \[2\]"):
        merged = dictionary.merge(other).dictionary
    assert merged.R == dictionary.R


# What tells two apart.


def test_a_diff_names_what_changed(dictionary: ConceptDictionary) -> None:
    older, newer = dictionary.subset(WORDS[:-1]), dictionary.subset(WORDS[1:])
    vectors = {layer: rows.clone() for layer, rows in newer.vectors.items()}
    vectors[2][4] = draw(D)  # bomb is the fifth of the newer one
    vectors[1][5] *= 3  # a longer direction has not moved
    labels = newer.concepts["polarity"].to_numpy().copy()
    labels[0] = "undesirable"
    newer = dataclasses.replace(changed(newer, polarity=labels), vectors=vectors)
    found = older.diff(newer)
    assert list(found.added["concept"]) == ["oak"]
    assert list(found.dropped["concept"]) == ["knife"]
    assert found.relabelled.to_dict("records") == [
        {"concept_id": "user:1", "concept": "dog", "before": "neutral", "after": "undesirable"}
    ]
    assert list(found.moved["concept"]) == ["bomb"]
    assert list(found.moved["layer"]) == [2]
    cosine = torch.cosine_similarity(vectors[2][4], dictionary.raw(2)[5], dim=0)
    assert found.moved["cosine"].iloc[0] == pytest.approx(float(cosine), abs=1e-6)
    assert str(found) == "1 added, 1 dropped, 1 relabelled, 1 moved, 9 the same"
    nothing = dictionary.diff(dictionary)
    assert (len(nothing.added), len(nothing.moved), nothing.same) == (0, 0, N_CONCEPTS)


# One concept more.


def test_a_concept_is_added_from_its_readings(dictionary: ConceptDictionary) -> None:
    positives, negatives = readings(10, 1), readings(7, 50)
    larger = dictionary.extend("Cross  bow", positives, negatives, polarity="undesirable", definition="d")
    assert len(larger) == N_CONCEPTS + 1
    assert len(dictionary) == N_CONCEPTS
    row = larger.concepts.iloc[-1]
    assert (row["concept_id"], row["concept"], row["polarity"]) == (
        "user:cross-bow",
        "Cross bow",
        "undesirable",
    )
    assert (row["n_positive"], row["rank"], row["polarity_source"]) == (10, N_CONCEPTS, "user")
    for layer in LAYERS:
        naive = positives[layer].numpy().astype(float).mean(0) - negatives[layer].numpy().mean(0)
        np.testing.assert_allclose(larger.raw(layer)[-1], naive, atol=1e-6)
        assert torch.equal(larger.raw(layer)[:-1], dictionary.raw(layer))
    assert larger.nearest(larger.raw(1)[-1], 1)["concept"].iloc[0] == "Cross bow"
    assert list(dictionary.diff(larger).added["concept"]) == ["Cross bow"]


def test_the_mean_of_negatives_stands_in_for_negatives(dictionary: ConceptDictionary) -> None:
    positives = readings(3, 1)
    with pytest.raises(ActivationError, match="expected negatives, or a release that holds its mean"):
        dictionary.extend("bow", positives)
    baseline = {layer: draw(D, seed=70 + layer) for layer in LAYERS}
    larger = dataclasses.replace(dictionary, baseline=baseline).extend("bow", positives)
    for layer in LAYERS:
        expected = positives[layer].mean(0) - baseline[layer]
        torch.testing.assert_close(larger.raw(layer)[-1], expected)


@pytest.mark.parametrize(
    ("positives", "facts", "error", "message"),
    [
        (readings(3, 1, layers=(1,)), {}, UnknownLayerError, r"readings at layers \[1, 2\], got \[1\]"),
        (readings(0, 1), {}, ActivationError, r"n at least 1, got \[0, 32\]"),
        ({i: draw(3, 31) for i in LAYERS}, {}, ActivationError, r"expected readings \[n, 32\]"),
        ({i: draw(3, D) / 0 for i in LAYERS}, {}, ActivationError, "got NaN or infinity"),
        (readings(4, 50), {}, ActivationError, "expected a direction that is not zero"),
        (readings(3, 1), {"concept": "..."}, ValueError, "expected a name with letters or digits"),
        (readings(3, 1), {"polarity": "bad"}, ValueError, "polarity: expected one of"),
        (readings(3, 1), {"concept_id": "user:3"}, FormatError, "concept_id that the dictionary does not"),
    ],
)
def test_a_concept_that_cannot_be_added_is_refused(
    dictionary: ConceptDictionary, positives: dict, facts: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        dictionary.extend(facts.pop("concept", "bow"), positives, readings(4, 50), **facts)


def of_tiny(model: object, layers: tuple[int, ...] = (0, 2)) -> ConceptDictionary:
    """A dictionary of a tiny model."""
    facts = ModelFacts.of(model)  # type: ignore[arg-type]
    table = pd.DataFrame([{"concept_id": f"user:{w}", "concept": w, "polarity": "neutral"} for w in WORDS])
    vectors = {layer: draw(len(WORDS), facts.hidden_size, seed=layer) for layer in layers}
    return ConceptDictionary(table, vectors, facts, dict.fromkeys(layers, 1.0))


@pytest.mark.filterwarnings("ignore:base model not confirmed")
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "internvl"])
def test_stimuli_are_read_as_the_workshop_reads_them(kind: str, request: pytest.FixtureRequest) -> None:
    from builders.forward import read_batch

    model, processor = request.getfixturevalue(f"tiny_{kind}")
    captions = [*CAPTIONS, "a <image> that <|im_end|> is text"]
    images = drawn_images(5)
    layers = (0, 2)
    found = of_tiny(model).read(model, processor, captions, images, batch=2)
    expected = read_batch(model, processor, captions, images, layers).readings
    for number, layer in enumerate(layers):
        torch.testing.assert_close(found[layer], expected[:, number], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:base model not confirmed")
def test_what_cannot_be_read_is_refused(tiny_llava: tuple) -> None:
    model, processor = tiny_llava
    dictionary = of_tiny(model)
    with pytest.raises(ActivationError, match="got 2 captions and 1 images"):
        dictionary.read(model, processor, CAPTIONS[:2], drawn_images(1))
    with pytest.raises(ActivationError, match="expected at least one stimulus"):
        dictionary.read(model, processor, [])
    with pytest.raises(ModelMismatchError, match="read at the last token, got 'caption_mean'"):
        dataclasses.replace(dictionary, reading="caption_mean").read(model, processor, CAPTIONS)
    with pytest.raises(UnsupportedModelError, match="expected text alone, got an image"):
        dictionary.read(model, processor.tokenizer, CAPTIONS[:1], drawn_images(1))
    other = dataclasses.replace(dictionary, model=dataclasses.replace(dictionary.model, n_layers=99))
    with pytest.raises(ModelMismatchError, match="n_layers 99"):
        other.read(model, processor, CAPTIONS)


# To disk and back.


def test_a_saved_dictionary_opens_again(dictionary: ConceptDictionary, tmp_path: Path) -> None:
    baseline = {layer: draw(D, seed=70 + layer) for layer in LAYERS}
    larger = dataclasses.replace(dictionary, baseline=baseline).extend("bow", readings(3, 1))
    for name in ("a", "b"):
        larger.save_pretrained(tmp_path / name, name="mine", model="tiny", version="1.2.0")
    again = ConceptDictionary.from_pretrained(tmp_path / "a")
    pd.testing.assert_frame_equal(again.concepts, larger.concepts)
    for layer in LAYERS:
        assert torch.equal(again.raw(layer), larger.raw(layer))
        assert torch.equal(again.baseline[layer], baseline[layer])
    assert (again.model, again.R, again.reading) == (larger.model, larger.R, "last")
    assert again.licences == dictionary.licences
    assert again.sources == [{"name": "mine", "version": "1.2.0"}]
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 3 + len(LAYERS)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(ArtefactNotFoundError, match="expected an empty or new folder"):
        larger.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="model: expected letters"):
        larger.save_pretrained(tmp_path / "c", model="a/b")


def test_a_release_without_a_mean_of_negatives_loads(dictionary: ConceptDictionary) -> None:
    assert dictionary.baseline == {}
    assert dictionary.sources == [{"name": "DACO-tiny", "version": "1.0.0"}]


def test_only_the_layers_asked_for_are_read(tmp_path: Path) -> None:
    folder = write_dataset_release(tmp_path)
    found = ConceptDictionary.from_pretrained(folder, layers=[2])
    assert (found.layers, list(found.R)) == ([2], [2])
    with pytest.raises(UnknownLayerError, match=r"expected layers among \[1, 2\], got \[7\]"):
        ConceptDictionary.from_pretrained(folder, layers=[2, 7])
