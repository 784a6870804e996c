"""Proves the evaluation's figures against naive ones, and that no steering changes exactly nothing."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from small_run import (
    LAYERS,
    Killed,
    digests,
    opened,
    small_recipe,
    write_corpus,
    write_ids,
    write_links,
    write_polarity,
)

from builders import activations, atoms, directions, recognition, splice, train_sae
from builders import evaluate as stage
from builders.activations import linked_stimuli, open_mllm
from builders.corpus import open_image
from builders.mllm import chat_inputs
from builders.tokens import held_ids, held_out, read_ids
from daco.errors import ActivationError

SECTIONS = {
    "activations": {"batch": 5, "shard_rows": 12},
    "sae": {"n_atoms": 37, "k": 3, "steps": 12, "batch": 17, "holdout": 0.4, "learning_rate": 1e-2},
    "atoms": {"eta": 0.2},
    "evaluate": {"items": 7, "batch": 3, "gamma": 0.4},
}


def forwards(seed: int, n: int = 13, batch: int = 2) -> stage.Forward:
    draw = torch.Generator().manual_seed(seed)
    return stage.Forward(torch.randn(n, 2, 32, generator=draw), torch.randn(batch, 99, generator=draw))


def test_effect_equals_the_naive_one():
    plain, steered = forwards(1), forwards(2)
    steered.z[:4] = plain.z[:4]
    steered.z[4, 1] = plain.z[4, 1]  # changed at the first layer alone
    found = stage.effect(plain, steered)
    p, q = (torch.softmax(f.logits.double(), -1).numpy() for f in (plain, steered))
    z, w = plain.z[:, 1].double().numpy(), steered.z[:, 1].double().numpy()
    relative = sum(np.linalg.norm(w[i] - z[i]) / np.linalg.norm(z[i]) for i in range(13))
    assert (found["stimuli"], found["positions"], found["changed"]) == (2, 13, 9)
    assert found["relative_change"] == pytest.approx(relative)
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum()))
    assert found["next_token_changed"] == int((p.argmax(1) != q.argmax(1)).sum())


def test_effect_of_nothing_is_exactly_zero():
    plain = forwards(1)
    found = stage.effect(plain, stage.Forward(plain.z.clone(), plain.logits.clone()))
    assert [found[k] for k in ("changed", "relative_change", "kl", "next_token_changed")] == [0, 0, 0, 0]


def test_averages_weigh_positions_and_stimuli():
    one, two = stage.effect(forwards(1), forwards(2)), stage.effect(forwards(3, 5, 1), forwards(4, 5, 1))
    found = stage.averaged([one, two])
    assert (found["n_positions"], found["n_stimuli"]) == (18, 3)
    assert found["kl"] == pytest.approx((one["kl"] + two["kl"]) / 3)
    assert found["relative_change"] == pytest.approx((one["relative_change"] + two["relative_change"]) / 18)


def test_intervals_are_of_the_figures_of_each_stimulus():
    batches = [stage.each(forwards(i), forwards(i + 50)) for i in range(20)]
    sums = [stage.effect(forwards(i), forwards(i + 50)) for i in range(20)]
    for each, batch in zip(batches, sums, strict=True):
        assert sum(each["kl"]) == pytest.approx(batch["kl"])
        assert sum(each["next_token_changed"]) == batch["next_token_changed"]
    found = stage.intervals(batches, [f"{i}" for i in range(40)])
    assert found["n_pictures"] == 40
    kl = np.array([x for each in batches for x in each["kl"]])
    low, high = found["kl_interval"]
    half = 1.96 * kl.std(ddof=1) / np.sqrt(len(kl))
    assert (low, high) == (
        pytest.approx(kl.mean() - half, abs=half / 4),
        pytest.approx(kl.mean() + half, abs=half / 4),
    )
    assert found["next_token_changed_interval"] == pytest.approx([0.912, 1.0], abs=1e-3)  # 40 of 40, Wilson


def test_captions_of_one_picture_are_drawn_together():
    batches = [stage.each(forwards(i), forwards(i + 50)) for i in range(20)]
    pictures = [f"{i}" for i in range(40)]
    one, twice = stage.intervals(batches, pictures), stage.intervals(batches * 2, pictures * 2)
    assert twice["n_pictures"] == one["n_pictures"] == 40
    for name in ("kl_interval", "next_token_changed_interval"):  # said twice it is no more certain
        assert twice[name] == pytest.approx(one[name])


def test_intervals_are_over_the_pictures_of_the_corpus(upstream):
    path = upstream / "corpus" / "stimuli.parquet"
    table = pd.read_parquet(path)
    table["image_sha256"] = [f"{i // 3:064x}" for i in range(len(table))]
    table.to_parquet(path)
    pictures = dict(zip(table.stimulus_id, table.image_sha256, strict=True))
    held = [s.stimulus_id for s in linked(upstream) if held_out(s.stimulus_id, 0.4)]
    found = run(upstream, items=99)["steering"]
    n = len({pictures[i] for i in held})
    assert n < len(held)
    assert {row["n_stimuli"] for row in found.values()} == {len(held)}
    assert {row["n_pictures"] for row in found.values()} == {n}
    wilson = [0.0, 1.959964**2 / (n + 1.959964**2)]
    assert found["none"]["next_token_changed_interval"] == pytest.approx(wilson)


def test_every_picture_is_steered_once_before_any_is_again(upstream):
    path = upstream / "corpus" / "stimuli.parquet"
    table = pd.read_parquet(path)
    table["image_sha256"] = [f"{i // 3:064x}" for i in range(len(table))]
    table.to_parquet(path)
    held = [s for s in linked(upstream) if held_out(s.stimulus_id, 0.4)]
    n = len({s.picture for s in held})
    assert len({s.picture for s in held[:n]}) < n
    found = run(upstream, items=n)["steering"]["none"]
    assert (found["n_stimuli"], found["n_pictures"]) == (n, n)
    turns = stage.by_turns(held)
    assert sorted(turns) == sorted(held)
    first = [s for i, s in enumerate(held) if s.picture not in {t.picture for t in held[:i]}]
    assert turns[:n] == first
    assert stage.by_turns(turns[:n]) == turns[:n]


def test_figures_that_are_not_finite_are_refused():
    with pytest.raises(ActivationError, match="mop: expected finite figures, got kl = nan"):
        stage.check_finite({"changed": 0.5, "kl": float("nan")}, "mop")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """All stages before the evaluation, for real but for corpus and links."""
    out = tmp_path_factory.mktemp("run")
    write_corpus(out)
    write_links(out)
    write_polarity(out)
    for module in (activations, directions, recognition, train_sae, atoms):
        name = {"builders.train_sae": "sae"}.get(module.__name__, module.__name__.split(".")[-1])
        module.run(opened(small_recipe(**SECTIONS), out, name))
    return out


@pytest.fixture
def upstream(stages, tmp_path):
    return shutil.copytree(stages, tmp_path / "run")


def run(out, killed_at=None, **evaluate):
    (out / "evaluate" / "stage.json").unlink(missing_ok=True)
    sections = SECTIONS | {"evaluate": SECTIONS["evaluate"] | evaluate}
    stage.run(opened(small_recipe(**sections), out, "evaluate", killed_at))
    return json.loads((out / "evaluate" / "evaluation.json").read_text())


def test_evaluation_has_every_section_with_its_numbers(upstream):
    found = run(upstream)
    assert set(found) == {"suites", "sae", "names", "retrieval", "steering"}
    held = [s for s in linked(upstream) if held_out(s.stimulus_id, 0.4)]
    assert len(held) > 7
    assert set(found["steering"]) == {"none", "actadd", "mop", "daco"}
    assert all(figures["n_stimuli"] == 7 for figures in found["steering"].values())
    counts = json.loads((upstream / "evaluate" / "done.json").read_text())["counts"]
    assert counts == {"in": len(held), "out": 7, "skipped": {"over_limit": len(held) - 7}}


def test_what_is_held_out_is_what_the_activations_say(upstream):
    shards = sorted((upstream / "activations" / "shards").iterdir())
    before = held_ids(shards, 0.4)
    one, other = (next(i for i in read_ids(shards) if (i in before) is held) for held in (True, False))
    for shard in shards:  # both have one picture now
        ids = read_ids([shard])
        write_ids(shard, ids, [one if i == other else i for i in ids])
    found = run(upstream)
    counts = json.loads((upstream / "evaluate" / "done.json").read_text())["counts"]
    assert counts["in"] == len(before) + 1
    assert {row["n_stimuli"] for row in found["names"].values()} == {len(before) + 1}


def linked(out):
    return linked_stimuli(out / "corpus", out / "stimuli" / "links.parquet")


def test_no_steering_changes_exactly_nothing_and_steering_does(upstream):
    steering = run(upstream)["steering"]
    zero = {"changed", "relative_change", "kl", "next_token_changed"}
    assert {steering["none"][key] for key in zero} == {0.0}
    for method in ("actadd", "daco"):
        assert steering[method]["changed"] == 1.0  # both shift every position, gamma > 0
        assert steering[method]["relative_change"] > 1e-3
        assert steering[method]["kl"] > 0


def test_sae_figures_are_those_of_the_training(upstream):
    figures = run(upstream)["sae"]
    for layer in LAYERS:
        table = pq.read_table(upstream / "sae" / f"layers.{layer}" / "training.parquet").to_pylist()
        assert figures[str(layer)]["fve"] == table[-1]["fve"]
        assert figures[str(layer)]["fve_at_start"] == table[0]["fve"]
        low, high = figures[str(layer)]["fve_interval"]
        assert low < figures[str(layer)]["fve"] < high
        assert figures[str(layer)]["n_tokens"] == table[-1]["tokens"] > 50


@pytest.mark.parametrize(("items", "n"), [(0, 0), (4, 6), (64, 7)])
def test_cross_entropy_recovered_is_that_of_the_first_items_in_whole_batches(upstream, items, n):
    figures = run(upstream, batch=3, splice_items=items)["sae"]
    if not items:
        assert not any(key.startswith("ce") for key in figures["1"])
        return
    model, processor = open_mllm(small_recipe().model, upstream / "activations")
    stimuli = [s for s in linked(upstream) if held_out(s.stimulus_id, 0.4)][:n]
    saes = {layer: train_sae.load_sae(upstream / "sae" / f"layers.{layer}") for layer in LAYERS}
    inputs = chat_inputs(processor, [s.caption for s in stimuli], [open_image(s.file) for s in stimuli])
    expected = splice.splice(model, *splice.answered(model, processor, inputs), saes)
    for layer in LAYERS:
        found, naive = figures[str(layer)], splice.recovered([expected[layer]])
        for key in ("ce_tokens", "ce", "ce_spliced", "ce_ablated"):
            assert found[key] == pytest.approx(naive[key], rel=1e-4)
        assert found["ce_tokens"] > n
        assert found["ce_recovered"] == pytest.approx(naive["ce_recovered"], rel=1e-3)


def test_retrieval_equals_the_naive_medians(upstream):
    frame = pd.DataFrame(pq.read_table(upstream / "stimuli" / "links.parquet").to_pylist())
    found = run(upstream)["retrieval"]
    for role in ("positive", "negative"):
        rows = frame[frame.role == role]
        assert found[role]["n_links"] == len(rows) == 33
        assert found[role]["median_sim_text"] == pytest.approx(float(np.median(rows.sim_text)))
        assert found[role]["median_dist"] == pytest.approx(float(np.median(rows.dist)))


def test_batches_do_not_change_the_figures(upstream):
    one, other = (run(upstream, batch=batch)["steering"] for batch in (3, 7))
    for method, figures in one.items():
        for key in ("n_positions", "n_stimuli"):
            assert figures[key] == other[method][key]
        for key in ("relative_change", "kl"):
            assert figures[key] == pytest.approx(other[method][key], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_and_resumed_equals_undisturbed(upstream, at):
    run(upstream)
    expected = digests(upstream / "evaluate")
    with pytest.raises(Killed):
        run(upstream, killed_at=at)
    stage.run(opened(small_recipe(**SECTIONS), upstream, "evaluate"))
    assert digests(upstream / "evaluate") == expected


def test_a_hook_that_is_left_behind_is_noticed(upstream, monkeypatch):
    model, processor = open_mllm(small_recipe().model, upstream / "activations")
    stimuli = linked(upstream)[:2]
    inputs = chat_inputs(processor, [s.caption for s in stimuli], [open_image(s.file) for s in stimuli])
    real, calls = stage.forward, []

    def leaky(model, inputs, layers):
        if len(calls) == 0:
            calls.append(1)
            plain = real(model, inputs, layers)
            model.get_decoder().layers[1].register_forward_hook(lambda m, a, out: out * 1.01)
            return plain
        return real(model, inputs, layers)

    monkeypatch.setattr(stage, "forward", leaky)
    with pytest.raises(ActivationError, match="expected no trace of steering"):
        stage.evaluate_batch(model, inputs, LAYERS, {})


def test_no_held_out_stimulus_is_refused(upstream):
    with pytest.raises(ActivationError, match="expected held-out stimuli, got none"):
        stage.run(opened(small_recipe(**SECTIONS | {"sae": {"holdout": 0.0}}), upstream, "evaluate"))


def test_what_fired_most_is_counted_over_all_batches(upstream):
    daco = run(upstream)["steering"]["daco"]
    assert daco["method"] == "SAE steering, eta 0.2, gamma 0.4"
    table = pq.read_table(upstream / "atoms" / "layers.1" / "atoms.parquet").to_pylist()
    undesirable = {
        f"1/{row['atom']} {row['nearest_concepts'][0]}" for row in table if row["polarity"] == "undesirable"
    }
    counts = dict(text.rsplit(": ", 1) for text in daco["fired_most"])
    assert list(map(int, counts.values())) == sorted(map(int, counts.values()), reverse=True)
    assert {name for name in counts if name.startswith("1/")} <= undesirable
    assert 0 < len(counts) <= daco["n_fired"]
    assert max(map(int, counts.values())) <= daco["n_positions"]


def test_nothing_labelled_is_an_exact_no_op(upstream):
    (upstream / "evaluate" / "stage.json").unlink(missing_ok=True)
    recipe = small_recipe(**SECTIONS | {"atoms": {"eta": 1.0}})
    stage.run(opened(recipe, upstream, "evaluate"))
    found = json.loads((upstream / "evaluate" / "evaluation.json").read_text())
    daco = found["steering"]["daco"]
    assert [daco[key] for key in ("changed", "relative_change", "kl", "n_fired")] == [0, 0, 0, 0]
