"""Proves the stage `recognition` and figures of names against naive ones: names are right as asked for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import ledoit_wolf
from small_run import (
    D_MODEL,
    LAYERS,
    N_CONCEPTS,
    Killed,
    concept_rows,
    digests,
    model_facts,
    opened,
    small_recipe,
    stimulus_ids,
    write_activations,
    write_corpus,
    write_ids,
    write_links,
    write_polarity,
)

from builders import atoms, directions, names, release, train_sae
from builders import recognition as stage
from builders.directions import contrast, load_dictionary
from builders.pipeline import STAGES, open_stage
from builders.tokens import held_out, sides_of
from daco import ConceptDictionary
from daco.errors import ActivationError, DiskError, IntegrityError
from daco.manifest import canonical_json, check_files, read_manifest
from daco.tables import CONCEPTS, LINKS, STIMULI, table_of, write_table

SECTIONS = {"sae": {"n_atoms": 37, "k": 3, "steps": 4, "batch": 17, "holdout": 0.3}}
STAGE = next(one for one in STAGES if one.name == "recognition")


# What captions say.


def test_captions_say_whole_words_however_they_are_written():
    said = stage.Said(["fire alarm", "fire", "Bow", "fire_alarm", "...", "café"])
    assert said.of("A FIRE-ALARM, near the bows") == {0, 1, 3}
    assert said.of("bow: firearm alarm fire") == {1, 2}
    assert said.of("the Café\nfire") == {1, 5}
    assert said.of("") == set()
    assert stage.Said([]).of("fire") == set()


def test_letters_keep_their_marks_and_have_one_form():
    said = stage.Said(["caf\u00e9", "\u0915\u093e", "\u0915\u093f", "fire"])  # two vowels on one consonant
    assert said.of("A CAFE\u0301!") == {0}
    assert said.of("a cafe") == set()
    assert said.of("\u0915\u093f, \u0915") == {2}
    assert said.of("\u0915\u093e") == {1}
    assert said.of("\uff26\uff29\uff32\uff25") == {3}  # full-width letters
    assert said.of("\u2615\ufe0ffire\u2615\ufe0f") == {3}  # marks of emoji are on no letter


def test_shown_is_kept_in_order():
    each = [{3, 1}, set(), {0}, {2, 4}]
    shown, rows = stage.Shown.of(each), np.array([3, 0, 1])
    found = shown.matrix(rows, 5)
    assert [set(row.nonzero().flatten().tolist()) for row in found] == [{2, 4}, {1, 3}, set()]
    place, concept = shown.pairs(rows)
    assert list(zip(place.tolist(), concept.tolist(), strict=True)) == [(0, 2), (0, 4), (1, 1), (1, 3)]
    assert [len(part) for part in stage.Shown.of([set(), set()]).pairs(np.array([1, 0]))] == [0, 0]


# How readings vary.


def spread_out(n: int) -> np.ndarray:
    """Readings [n, D_MODEL] far from zero that vary a hundred times as much along some axes as others."""
    draw = np.random.default_rng(n)
    return (draw.normal(size=(n, D_MODEL)) * np.logspace(-1, 1, D_MODEL) + 20).astype(np.float32)


@pytest.mark.parametrize("n", [7, 40, 500])
def test_statistics_equal_those_of_scikit_learn(n):
    """Of fewer readings than dimensions, of a few more and of many, added up in parts."""
    z = spread_out(n)
    about = torch.from_numpy(z.astype(np.float64).mean(0))
    total, *more = [stage.moments(part, about) for part in torch.from_numpy(z).split(3)]
    for part in more:
        total = total.plus(part)
    found = stage.shrunk(total, about)
    covariance, share = ledoit_wolf(z.astype(np.float64))
    assert found.shrinkage == pytest.approx(share, rel=1e-9)
    np.testing.assert_allclose(found.mean, z.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.inverse.numpy() @ covariance, np.eye(D_MODEL), atol=1e-8)


def test_a_part_can_be_taken_out_again():
    z = torch.from_numpy(spread_out(200))
    about = z.double().mean(0)
    total, part = stage.moments(z, about), stage.moments(z[150:], about)
    found, alone = stage.shrunk(total.plus(part, -1), about), stage.moments(z[:150], about)
    expected = stage.shrunk(alone, about)
    torch.testing.assert_close(found.inverse, expected.inverse, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.mean, z[:150].double().mean(0), rtol=1e-12)
    _, share = ledoit_wolf(z[:150].double().numpy())
    assert found.shrinkage == pytest.approx(share, rel=0.05)  # fourth moments are about the mean of all


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.randn(1, D_MODEL), "expected at least 2 readings to tell how they vary, got 1"),
        (torch.ones(9, D_MODEL), "expected readings that differ, got 9 of variance 0"),
    ],
)
def test_too_few_or_equal_readings_are_refused(z, message):
    with pytest.raises(ActivationError, match=f"{message}.*recognition.min_precision = 0"):
        stage.shrunk(stage.moments(z, z[0].double()), z[0].double())


# From which score on.


def naive_threshold(scores: np.ndarray, shown: np.ndarray, min_precision: float) -> tuple:
    """The lowest multiple of STEP from which on names are right often enough: tried one by one."""
    there = np.isfinite(scores)
    for step in range(stage.N_STEPS):
        named = there & (np.minimum(scores, stage.STEP * (stage.N_STEPS - 0.5)) >= step * stage.STEP)
        right = int((named & shown).sum())
        if right >= stage.MIN_RIGHT and right >= min_precision * named.sum():
            return step * stage.STEP, right / named.sum(), right / (there & shown).sum()
    return np.nan, np.nan, np.nan


@pytest.mark.parametrize("min_precision", [0.3, 0.8, 1.0])
def test_thresholds_equal_those_tried_one_by_one(min_precision):
    draw = np.random.default_rng(3)
    shown = draw.random((300, 9)) < 0.15
    scores = draw.normal(size=(300, 9)) + 1.5 * shown
    scores[:, 1] += 5 * shown[:, 1]  # told apart always
    scores[:, 2] = -scores[:, 2]  # never
    scores[40:80, 3] = np.nan  # folds without its positives
    scores[:, 4] = np.nan
    scores[shown[:, 5], 5] = 1e9  # above the last step
    shown[:, 6] = False
    shown[:, 7] = np.arange(300) < 2  # two are too few to know
    scores[:, 7] = 4 * shown[:, 7]
    counts = stage.Counts(9)
    for block in np.array_split(np.arange(300), 7):
        counts.add(torch.from_numpy(scores[block]), torch.from_numpy(shown[block]))
    found = counts.thresholds(min_precision)
    expected = [naive_threshold(scores[:, c], shown[:, c], min_precision) for c in range(9)]
    np.testing.assert_allclose(found[["threshold", "precision", "recall"]], expected)
    assert found["n_shown"].tolist() == (shown & np.isfinite(scores)).sum(0).tolist()
    never = set(np.flatnonzero(found["threshold"].isna()))
    assert {4, 6, 7} <= never
    assert not never & {1, 5}


def test_all_captions_of_a_picture_are_in_one_part():
    ids = stimulus_ids(400)
    pictures = {i: f"{n % 100 if n < 300 else n:064x}" for n, i in enumerate(ids)}  # a hundred have three
    sides = sides_of(pictures)
    part = stage.parts_of([sides[i] for i in ids], 0.2, 4)
    for n in range(100):
        assert len(set(part[[n, n + 100, n + 200]])) == 1
    for n in range(300, 400):
        assert part[n] == (stage.HELD if held_out(ids[n], 0.2) else stage.fold_of(ids[n], 4))
    assert set(part[:100]) == set(part[300:]) == {stage.HELD, 0, 1, 2, 3}


# A world whose concepts are planted.

N, N_NAMED, WIDTH = 900, N_CONCEPTS, D_MODEL


def planted(out: Path, seed: int = 1) -> Path:
    """Readings that hold what a caption says: directions that share much, below what varies in any case."""
    draw = np.random.default_rng(seed)
    ids, rows = stimulus_ids(N), concept_rows()
    shown = draw.random((N, N_NAMED)) < 0.15
    said = shown & (draw.random(shown.shape) < 0.9)  # captions leave out some of what is there
    told = [" and ".join(f"a concept {i}," for i in np.flatnonzero(row)) or "nothing" for row in said]
    of = draw.normal(size=(len(LAYERS), N_NAMED, WIDTH)) + 2 * draw.normal(size=(len(LAYERS), 1, WIDTH))
    nuisance = 6 * draw.normal(size=(len(LAYERS), 4, WIDTH))
    z = (
        10
        + np.einsum("nc,lcd->nld", shown, of)
        + np.einsum("nk,lkd->nld", draw.normal(size=(N, 4)), nuisance)
    )
    z = (z + draw.normal(scale=0.8, size=z.shape)).astype(np.float32)
    work = opened(small_recipe(), out, "corpus")
    blank = {
        "image_url": "",
        "width": 1,
        "height": 1,
        "source": "s",
        "file": "x.png",
    }
    table = [
        blank | {"stimulus_id": i, "caption": text, "source_key": i, "image_sha256": f"{i:0>64}"}
        for i, text in zip(ids, told, strict=True)
    ]
    write_table(
        work.folder / "stimuli.parquet", table_of(table, STIMULI.append(pa.field("file", pa.string())))
    )
    work.finish({})
    work = opened(small_recipe(), out, "activations")
    for number, start in enumerate(range(0, N, 250)):
        with work.shard(f"{number:05d}") as folder:
            part = torch.from_numpy(z[start : start + 250])
            save_file({"readings": part}, folder / "readings.safetensors")
            write_ids(folder, ids[start : start + 250])
    facts = {"model": model_facts(), "layers": list(LAYERS), "tokens": {"in": 0, "out": 0, "skipped": {}}}
    (work.folder / "facts.json").write_text(canonical_json(facts))
    work.finish({})
    write_polarity(out)
    links = [
        {
            "concept_id": rows[c]["concept_id"],
            "concept": rows[c]["concept"],
            "stimulus_id": ids[i],
            "role": role,
        }
        | {"rank": rank, "dist": 1.0, "sim_image": 0.5, "sim_text": 0.5}
        for c in range(N_NAMED)
        for role, among in (("positive", shown[:, c]), ("negative", ~shown[:, c]))
        for rank, i in enumerate(draw.choice(np.flatnonzero(among), 60, replace=False))
    ]
    work = opened(small_recipe(), out, "stimuli")
    write_table(work.folder / "links.parquet", pa.Table.from_pylist(links, schema=LINKS))
    work.finish({})
    work = opened(small_recipe(), out, "directions")
    found = contrast(
        [row["concept_id"] for row in rows], pd.DataFrame(links), ids, [(0, torch.from_numpy(z))]
    )
    tensors = {f"layer_{layer}": found.directions[i].clone() for i, layer in enumerate(LAYERS)}
    save_file(tensors, work.folder / "directions.safetensors")
    baseline = {f"layer_{layer}": found.baseline[i].clone() for i, layer in enumerate(LAYERS)}
    save_file(baseline, work.folder / "baseline.safetensors")
    facts |= {"R": {str(layer): 10.0 for layer in LAYERS}, "n_positive": [60] * 11, "n_negative": [60] * 11}
    (work.folder / "facts.json").write_text(canonical_json(facts))
    work.finish({})
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def upstream(world, tmp_path):
    return shutil.copytree(world, tmp_path / "run")


def run(out: Path, killed_at: int | None = None, **changes) -> Path:
    sections = {"sae": {"holdout": 0.3}, "recognition": {"folds": 4} | changes}
    stage.run(opened(small_recipe(**sections), out, "recognition", killed_at))
    return out / "recognition"


def all_readings(out: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Readings [n, layers, d] in float64, their ids, and what captions say [n, concepts]."""
    shards = sorted((out / "activations" / "shards").iterdir())
    z = torch.cat([load_file(s / "readings.safetensors")["readings"] for s in shards])
    ids = [i for s in shards for i in json.loads((s / "ids.json").read_text())]
    captions = dict(
        zip(
            *(
                pq.read_table(out / "corpus" / "stimuli.parquet")[c].to_pylist()
                for c in ("stimulus_id", "caption")
            ),
            strict=True,
        )
    )
    says = [[f"concept {c}," in captions[i] for c in range(N_NAMED)] for i in ids]
    return z.double().numpy(), ids, np.array(says)


def naive_line(rows: np.ndarray, shows: np.ndarray, P: np.ndarray) -> np.ndarray:
    """The discriminant of one concept."""
    d = rows[shows].mean(0) - rows.mean(0)
    return P @ d / np.sqrt(d @ P @ d)


def shown_naively(out: Path, ids: list[str], says: np.ndarray) -> np.ndarray:
    """What captions say, and positives."""
    links = pd.read_parquet(out / "stimuli" / "links.parquet")
    pairs = set(
        links[links.role == "positive"][["concept_id", "stimulus_id"]].itertuples(index=False, name=None)
    )
    positive = [[(row["concept_id"], i) in pairs for row in concept_rows()] for i in ids]
    return says | np.array(positive)


def test_the_stage_equals_a_naive_one(upstream):
    """Every stimulus scored by what the others say, a concept at a time, with numpy's inverse."""
    folder = run(upstream)
    z, ids, says = all_readings(upstream)
    shows = shown_naively(upstream, ids, says)
    assert (shows != says).sum() > 20  # positives whose captions do not say it
    part = np.array([stage.HELD if held_out(i, 0.3) else stage.fold_of(i, 4) for i in ids])
    position, layer = 1, LAYERS[1]
    z = z[:, position]
    scores, distances = np.full((N, N_NAMED), np.nan), []
    for fold in range(4):
        others, here = (part != fold) & (part != stage.HELD), part == fold
        mean, P = z[others].mean(0), np.linalg.inv(ledoit_wolf(z[others])[0])
        for c in range(N_NAMED):
            scores[here, c] = (z[here] - mean) @ naive_line(z[others], shows[others, c], P)
        distances += [x @ P @ x / D_MODEL for x in z[here] - mean]
    found = stage.load_recognisers(folder)[layer]
    assert found.usual == pytest.approx(np.quantile(distances, 0.99), rel=1e-2)  # shrinkage differs a little
    expected = np.array([naive_threshold(scores[:, c], shows[:, c], 0.5) for c in range(N_NAMED)])
    ours = found.concepts[["threshold", "precision", "recall"]].to_numpy()
    assert (
        np.abs(ours[:, 0] - expected[:, 0]) <= 1.01 * stage.STEP
    ).all()  # shrinkage differs in the 4th digit
    np.testing.assert_allclose(ours[:, 1:], expected[:, 1:], atol=0.02)
    train = part != stage.HELD
    P = np.linalg.inv(ledoit_wolf(z[train])[0])
    np.testing.assert_allclose(found.mean, z[train].mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.inverse, P, rtol=1e-4, atol=1e-6)
    lines = [naive_line(z[train], shows[train, c], P) for c in range(N_NAMED)]
    np.testing.assert_allclose(found.vectors, lines, rtol=1e-4, atol=1e-6)
    assert found.concepts["n_shown"].tolist() == shows[train].sum(0).tolist()


@pytest.mark.parametrize("wanted", [0.5, 0.8])
def test_names_are_right_as_often_as_was_asked_for_on_stimuli_that_nothing_was_made_from(upstream, wanted):
    folder = run(upstream, min_precision=wanted)
    z, ids, says = all_readings(upstream)
    held = np.array([held_out(i, 0.3) for i in ids])
    for position, layer in enumerate(LAYERS):
        one = stage.load_recogniser(folder, layer)
        given = stage.recognised(one, torch.from_numpy(z[held, position])).numpy()
        right = (given & says[held]).sum()
        precision, recall = right / given.sum(), right / says[held].sum()
        assert wanted - 0.06 < precision
        assert recall > 0.5
        directions = load_file(upstream / "directions" / "directions.safetensors")[f"layer_{layer}"].numpy()
        unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        plain = (z[:, position] / np.linalg.norm(z[:, position], axis=1, keepdims=True)) @ unit.T
        plain = ((plain - plain[~held].mean(0)) / plain[~held].std(0))[held]
        as_many = plain >= np.sort(plain.ravel())[-given.sum()]
        assert (as_many & says[held]).sum() < 0.6 * right


def test_held_out_stimuli_and_their_pictures_have_no_part_in_it(upstream):
    """Sixty stimuli are other captions of a picture that is held out."""
    table = pd.read_parquet(upstream / "corpus" / "stimuli.parquet")
    held = table.stimulus_id.map(lambda i: held_out(i, 0.3))
    others = set(table.stimulus_id[~held][:60])
    for shard in sorted((upstream / "activations" / "shards").iterdir()):
        ids = json.loads((shard / "ids.json").read_text())
        write_ids(shard, ids, [table.stimulus_id[held].iloc[0] if i in others else i for i in ids])
    first = made(run(upstream))
    found = json.loads((upstream / "recognition" / "facts.json").read_text())["stimuli"]
    assert found == {"in": N, "held_out": held.sum() + 60}
    apart = {*table.stimulus_id[held], *others}
    for shard in sorted((upstream / "activations" / "shards").iterdir()):
        tensors = load_file(shard / "readings.safetensors")["readings"].clone()
        tensors[torch.tensor([i in apart for i in json.loads((shard / "ids.json").read_text())])] = 1e6
        save_file({"readings": tensors}, shard / "readings.safetensors")
    (upstream / "recognition" / "stage.json").unlink()
    assert made(run(upstream)) == first


def made(folder: Path) -> dict[str, str]:
    """What the stage found, without what it measures of it on held-out stimuli."""
    found = digests(folder / "shards")
    return {name: digest for name, digest in found.items() if Path(name).name != "figures.json"}


@pytest.mark.parametrize("at", range(len(LAYERS)))
def test_killed_and_resumed_equals_undisturbed(upstream, at):
    expected = digests(run(upstream))
    shutil.rmtree(upstream / "recognition")
    with pytest.raises(Killed):
        run(upstream, killed_at=at)
    assert len(list((upstream / "recognition" / "shards").iterdir())) == at
    assert digests(run(upstream)) == expected


@pytest.mark.parametrize(
    ("section", "field", "value", "anew"),
    [
        ("sae", "holdout", 0.2, True),
        ("recognition", "folds", 3, True),
        ("recognition", "min_precision", 0.6, True),
        ("sae", "steps", 7, False),
        ("sae", "n_atoms", 64, False),
        ("atoms", "eta", 0.4, False),
    ],
)
def test_it_is_found_anew_where_what_it_rests_on_changes(upstream, section, field, value, anew):
    def opens(**sections):
        return open_stage(STAGE, small_recipe(**sections), upstream)

    base = {"sae": {"holdout": 0.3}, "recognition": {"folds": 4}}
    stage.run(opens(**base))
    assert opens(**base) is None
    changed = opens(**base | {section: base.get(section, {}) | {field: value}})
    assert (changed is not None) == anew


def test_blocks_do_not_change_what_is_found(upstream, monkeypatch):
    expected = stage.load_recognisers(run(upstream))
    (upstream / "recognition" / "stage.json").unlink()
    monkeypatch.setattr(stage, "BLOCK", 13)
    found = stage.load_recognisers(run(upstream))
    for layer in LAYERS:
        torch.testing.assert_close(found[layer].inverse, expected[layer].inverse)
        torch.testing.assert_close(found[layer].vectors, expected[layer].vectors)
        pd.testing.assert_frame_equal(found[layer].concepts, expected[layer].concepts)


def test_nothing_is_built_where_nothing_is_wanted(upstream):
    folder = run(upstream, min_precision=0.0)
    assert stage.load_recognisers(folder) == {}
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "done.json",
        "facts.json",
        "stage.json",
    ]
    assert json.loads((folder / "done.json").read_text())["counts"]["in"] == 0


def test_readings_that_are_not_finite_are_refused(upstream):
    shard = next((upstream / "activations" / "shards").iterdir())
    tensors = load_file(shard / "readings.safetensors")["readings"].clone()
    ids = json.loads((shard / "ids.json").read_text())
    kept = [n for n, i in enumerate(ids) if not held_out(i, 0.3)]
    tensors[kept[0], 1, 3] = torch.nan
    save_file({"readings": tensors}, shard / "readings.safetensors")
    with pytest.raises(ActivationError, match="expected finite readings of stimuli that are not held out"):
        run(upstream)
    assert [p.name for p in (upstream / "recognition" / "shards").iterdir()] == ["layers.1"]


def test_a_corpus_that_is_all_held_out_is_refused(upstream):
    sections = {"sae": {"holdout": 1.0}}
    with pytest.raises(ActivationError, match="not held out, got 0; add stimuli"):
        stage.run(opened(small_recipe(**sections), upstream, "recognition"))


def test_a_full_disk_is_named_and_finished_layers_are_kept(upstream, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    work = opened(small_recipe(sae={"holdout": 0.3}), upstream, "recognition")
    real, calls = stage.save_file, []

    def second_fails(*given):
        calls.append(1)
        (real if len(calls) == 1 else full)(*given)

    monkeypatch.setattr(stage, "save_file", second_fails)
    with pytest.raises(DiskError, match="expected room for what tells the concepts of layer 2"):
        stage.run(work)
    assert work.has("layers.1")
    assert not work.has("layers.2")


def test_concepts_that_one_fold_alone_or_nothing_shows_are_never_named(upstream):
    """Of a fold's own score nothing is left where no other stimulus shows the concept."""
    ids = pq.read_table(upstream / "corpus" / "stimuli.parquet")["stimulus_id"].to_pylist()
    parts = {i: stage.HELD if held_out(i, 0.3) else stage.fold_of(i, 4) for i in ids}
    table = pq.read_table(upstream / "corpus" / "stimuli.parquet").to_pandas()
    where = table.stimulus_id.map(parts)
    table.loc[where != 2, "caption"] = table.caption[where != 2].str.replace("concept 0,", "")
    table.loc[where != stage.HELD, "caption"] = table.caption[where != stage.HELD].str.replace(
        "concept 1,", ""
    )
    write_table(upstream / "corpus" / "stimuli.parquet", pa.Table.from_pandas(table, preserve_index=False))
    links = pd.read_parquet(upstream / "stimuli" / "links.parquet")
    rare = links.concept_id.isin([row["concept_id"] for row in concept_rows()[:2]])
    links = links[~rare | (links.role == "negative")]
    write_table(
        upstream / "stimuli" / "links.parquet", pa.Table.from_pandas(links, LINKS, preserve_index=False)
    )
    one = stage.load_recognisers(run(upstream))[1]
    assert one.concepts["n_shown"][:2].tolist() == [0, 0]
    assert one.concepts["threshold"][:2].isna().all()
    assert one.concepts["threshold"][2:].notna().all()
    assert float(one.vectors[0].norm()) > 0  # all of them together tell it; how well is not known
    assert float(one.vectors[1].norm()) == 0


# Figures of names.


def test_figures_of_names_equal_naive_ones(upstream):
    folder = run(upstream)
    draw = torch.Generator().manual_seed(4)
    write_saes(upstream, draw)
    sections = {"sae": {"holdout": 0.3, "n_atoms": 17, "k": 3}, "recognition": {"folds": 4}}
    work = opened(small_recipe(**sections), upstream, "evaluate")
    dictionary = load_dictionary(upstream / "polarity", upstream / "directions")
    of_atoms, recognised = names.names_figures(work, dictionary), stage.load_figures(folder)
    found = {layer: row | recognised[layer] for layer, row in of_atoms.items()}
    assert sorted(found) == sorted(recognised) == [str(layer) for layer in LAYERS]
    z, ids, says = all_readings(upstream)
    held = np.array([held_out(i, 0.3) for i in ids])
    for position, layer in enumerate(LAYERS):
        row = found[str(layer)]
        assert row["n_stimuli"] == held.sum()
        assert row["chance"] == pytest.approx(says[held].mean())
        one = stage.load_recogniser(folder, layer)
        table = pq.read_table(upstream / "atoms" / f"layers.{layer}" / "atoms.parquet")
        nearest = [x[0] for x in table["nearest_concept_ids"].to_pylist()]
        sae = train_sae.load_sae(upstream / "sae" / f"layers.{layer}")
        ways = {"recognised_": [0, 0], "atoms_": [0, 0]}
        for n in np.flatnonzero(held):
            x = torch.from_numpy(z[n : n + 1, position])
            over = one.scores(x)[0] >= torch.tensor(one.concepts["threshold"].to_numpy())
            read = (
                {f"user:concept-{c}" for c in range(N_NAMED) if over[c]}
                if one.distance(x) <= one.usual
                else set()
            )
            fired = {nearest[a] for a in range(17) if sae.encode(x.float())[0, a] > 0}
            for way, given in (("recognised_", read), ("atoms_", fired)):
                ways[way][0] += sum(says[n, int(c.split("-")[1])] for c in given)
                ways[way][1] += len(given)
        for way, (right, given) in ways.items():
            assert row[f"{way}precision"] == pytest.approx(right / given)
            assert row[f"{way}recall"] == pytest.approx(right / says[held].sum())
            for figure in ("precision", "recall"):
                low, high = row[f"{way}{figure}_interval"]
                assert low < row[f"{way}{figure}"] < high
        assert row["recognised_precision"] > 2 * row["atoms_precision"]


def test_intervals_of_names_are_over_pictures(upstream):
    """Every held-out stimulus is there three times, and is said to have one picture, or three."""
    sections = {"sae": {"holdout": 0.3, "n_atoms": 17, "k": 3}, "recognition": {"folds": 4}}
    held = [i for i in all_readings(upstream)[1] if held_out(i, 0.3)]
    held = held[: len(held) // 3 * 3]
    first = dict(zip(held, held[: len(held) // 3] * 3, strict=True))
    copy_stimuli(upstream, first)
    write_saes(upstream, torch.Generator().manual_seed(4))
    found = {}
    for n_pictures, sides in ((len(held), {}), (len(held) // 3, first)):
        for shard in (upstream / "activations" / "shards").iterdir():
            ids = json.loads((shard / "ids.json").read_text())
            write_ids(shard, ids, [sides.get(i, i) for i in ids])
        stage.run(opened(small_recipe(**sections), upstream, "recognition"))
        dictionary = load_dictionary(upstream / "polarity", upstream / "directions")
        work = opened(small_recipe(**sections), upstream, "evaluate")
        rows = names.names_figures(work, dictionary)
        assert {row["n_pictures"] - n_pictures for row in rows.values()} <= {0, 1, 2}
        recognised = stage.load_figures(upstream / "recognition")
        found[bool(sides)] = {layer: row | recognised[layer] for layer, row in rows.items()}
        for name in ("recognition", "evaluate"):
            shutil.rmtree(upstream / name)
    for layer, narrow in found[False].items():
        for name in ("atoms_precision", "atoms_recall", "recognised_precision", "recognised_recall"):
            wide = found[True][layer]
            assert wide[name] == pytest.approx(narrow[name])
            (a, b), (c, d) = (row[f"{name}_interval"] for row in (wide, narrow))
            assert 1.4 < (b - a) / (d - c) < 2.1  # the square root of three is 1.7


def copy_stimuli(out: Path, of: dict[str, str]) -> None:
    """Give stimuli the readings and captions of others."""
    z, ids, _ = all_readings(out)
    place = {i: n for n, i in enumerate(ids)}
    for shard in (out / "activations" / "shards").iterdir():
        rows = [place[of.get(i, i)] for i in json.loads((shard / "ids.json").read_text())]
        save_file({"readings": torch.from_numpy(z[rows])}, shard / "readings.safetensors")
    path = out / "corpus" / "stimuli.parquet"
    table = pd.read_parquet(path)
    captions = table.set_index("stimulus_id").caption
    table["caption"] = [captions[of.get(i, i)] for i in table.stimulus_id]
    table.to_parquet(path)


def write_saes(out: Path, draw: torch.Generator) -> None:
    """SAEs as the stage leaves them, of random atoms, with names."""
    from builders.atoms import atoms_table
    from daco.sae import SAE

    work, named = opened(small_recipe(), out, "sae"), opened(small_recipe(), out, "atoms")
    dictionary = load_dictionary(out / "polarity", out / "directions")
    for layer in LAYERS:
        W = torch.nn.functional.normalize(torch.randn(17, D_MODEL, generator=draw), dim=1)
        weights = {
            "W_enc": W.T.contiguous(),
            "b_enc": torch.zeros(17),
            "W_dec": W,
            "b_dec": 10 + torch.zeros(D_MODEL),
        }
        SAE(**weights, activation="topk", k=3)
        folder = work.folder / f"layers.{layer}"
        folder.mkdir()
        save_file({name: t.clone() for name, t in weights.items()}, folder / "sae_weights.safetensors")
        (folder / "facts.json").write_text(json.dumps({"activation": "topk", "k": 3, "n_atoms": 17}))
        (named.folder / f"layers.{layer}").mkdir()
        table = atoms_table(W, dictionary, layer, torch.zeros(17).double())
        write_table(named.folder / f"layers.{layer}" / "atoms.parquet", table)
    for one in (work, named):
        one.finish({})


def test_without_recognition_or_held_out_stimuli_there_are_fewer_figures(upstream):
    assert stage.load_figures(run(upstream, min_precision=0.0)) == {}
    write_saes(upstream, torch.Generator().manual_seed(4))
    dictionary = load_dictionary(upstream / "polarity", upstream / "directions")
    work = opened(small_recipe(sae={"holdout": 0.3}), upstream, "evaluate")
    assert names.names_figures(work, dictionary)["1"]["atoms_precision"] > 0
    work = opened(small_recipe(sae={"holdout": 0.0}), upstream, "evaluate")
    assert names.names_figures(work, dictionary) == {}
    stage.run(opened(small_recipe(sae={"holdout": 0.0}), fresh(upstream), "recognition"))
    assert stage.load_figures(upstream / "recognition") == {"1": {}, "2": {}}


def test_a_folder_of_an_earlier_version_is_not_taken_for_one_with_figures(upstream):
    (run(upstream) / "shards" / "layers.2" / "figures.json").unlink()
    with pytest.raises(IntegrityError, match=r"figures of names, got none at .*layers\.2.*without --only"):
        stage.load_figures(upstream / "recognition")


# Through a release.


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """All stages but corpus, links and polarity for real; one concept's name stands in captions."""
    out = tmp_path_factory.mktemp("run")
    for write in (write_corpus, write_links, write_polarity, write_activations):
        write(out)
    rows = [row | {"concept": f"thing {i}"} for i, row in enumerate(concept_rows())]
    write_table(out / "polarity" / "concepts.parquet", table_of(rows, CONCEPTS))
    for module, name in (
        (directions, "directions"),
        (stage, "recognition"),
        (train_sae, "sae"),
        (atoms, "atoms"),
    ):
        module.run(opened(small_recipe(**SECTIONS), out, name))
    work = opened(small_recipe(), out, "evaluate")
    (work.folder / "evaluation.json").write_text("{}")
    work.finish({})
    return out


def release_of(out: Path, **sections) -> Path:
    corpus = {"kind": "folder", "path": "/x", "licence": "cc0-1.0"}
    release.run(opened(small_recipe(**SECTIONS | {"corpus": corpus} | sections), out, "release"))
    return out / "release" / "dataset"


def test_a_release_recognises_as_the_stage_found(released, tmp_path):
    out = shutil.copytree(released, tmp_path / "run")
    folder = release_of(out)
    check_files(folder, read_manifest(folder))
    dictionary = ConceptDictionary.from_pretrained(folder, recognition=True)
    found = stage.load_recognisers(out / "recognition")
    assert sorted(dictionary.recognisers) == list(LAYERS)
    z = torch.cat(
        [
            load_file(s / "readings.safetensors")["readings"]
            for s in sorted((out / "activations/shards").iterdir())
        ]
    )
    for position, layer in enumerate(LAYERS):
        ours, theirs = found[layer], dictionary.recognisers[layer]
        assert ours.same_scale(theirs)
        assert ours.usual == theirs.usual
        assert torch.equal(ours.vectors, theirs.vectors)
        pd.testing.assert_frame_equal(ours.concepts, theirs.concepts)
        scores = [one.scores(z[:, position]) for one in (ours, theirs)]
        assert torch.equal(*scores)
        assert float(scores[0].std()) > 0.1
    assert set(dictionary.recognise({layer: z[:, i] for i, layer in enumerate(LAYERS)})["layer"]) <= set(
        LAYERS
    )


def test_a_release_without_it_is_as_before(released, tmp_path):
    out = shutil.copytree(released, tmp_path / "run")
    stage.run(opened(small_recipe(**SECTIONS, recognition={"min_precision": 0.0}), fresh(out), "recognition"))
    manifest = read_manifest(folder := release_of(out))
    assert set(manifest["configs"]) == {*("stimuli", "links", "concepts", "directions_toy", "baseline_toy")}
    assert "usual" not in manifest["models"]["toy"]
    assert ConceptDictionary.from_pretrained(folder, recognition=True).recognisers == {}


def fresh(out: Path) -> Path:
    shutil.rmtree(out / "recognition")
    return out
