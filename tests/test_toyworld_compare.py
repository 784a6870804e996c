"""The comparison gives every arm the same chances, changes only what it says, pairs items, and resumes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders.pipeline import run as run_pipeline
from builders.recipe import Recipe, TuneConfig, load_recipe
from builders.toyworld import arms, compare, front, judge, world
from builders.toyworld.bench import FIGURES, SUITES, Bench, figure, prompted, suites_of
from builders.toyworld.truth import truth_dictionary, truth_links
from daco.capture import capture
from daco.errors import RecipeError

ROOT = Path(__file__).parent.parent
SMALL = ("run.threads=1", "corpus.rows=400", "stimuli.n_positive=6", "stimuli.min_positive=2",
         "activations.layers=[1,2]", "sae.steps=30", "sae.eval_steps=15", "sae.batch=128")  # fmt: skip
PLAN = compare.Plan(n=6, seeds=2, rounds=1)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(ROOT / "recipes" / "demo.toml", [*SMALL, *_folders()])


def _folders() -> list[str]:
    weights = ROOT / "builders" / "toyworld" / "weights"
    concepts = ROOT / "builders" / "toyworld" / "concepts.tsv"
    return [f"clip.model={weights / 'clip'}", f"model.id={weights / 'llava'}", f"concepts.path={concepts}"]


@pytest.fixture(scope="module")
def bench(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    out = tmp_path_factory.mktemp("run")
    run_pipeline(recipe, out, until="sae")
    return Bench(out, recipe)


def settings() -> dict[str, Any]:
    chosen = {arm: arms.settings_of(arm, [1, 2])[0] for arm in arms.LABELS}
    figures = dict.fromkeys(FIGURES, 0.5)
    tried = [{"arm": arm, "setting": setting} | figures for arm, setting in chosen.items()]
    return {"chosen": chosen, "tried": tried, "n": 2}


def test_every_arm_chooses_from_as_many_settings() -> None:
    for arm in arms.LABELS:
        found = arms.settings_of(arm, range(6))
        assert len(found) == (1 if arm == "none" else arms.N_SETTINGS)
        assert len({json.dumps(setting) for setting in found}) == len(found)
        assert len({arms.describe(setting) for setting in found}) == len(found)


def test_controls_change_labels_and_nothing_else(bench: Bench) -> None:
    parts = bench.parts(0)
    labels = parts.dictionary.concepts["polarity"]
    shuffled, objects = (
        arms.relabelled(parts, f"control_{name}").concepts["polarity"]
        for name in ("shuffled", "harm_objects")
    )
    assert sorted(shuffled) == sorted(labels)
    assert (shuffled != labels).mean() > 0.2
    assert set(parts.dictionary.concepts["concept"][objects == "undesirable"]) == set(world.HARMFUL)
    steering = arms.steering_of(parts, "dictionary", parts.dictionary)
    drawn = arms.with_random_labels(steering, 0.3, seed=0)
    for number, layer in steering.layers.items():
        real, random = layer.labels(0.3), drawn.layers[number].labels()
        assert sorted(real) == sorted(random)
        assert (real != random).any()
        assert torch.equal(layer.sae.W_dec, drawn.layers[number].sae.W_dec)


def test_a_safety_prompt_stands_before_the_text_or_in_a_system_message(bench: Bench) -> None:
    items = judge.suite("question", 2, 0)
    system, before = ({"place": place, "text": "be careful"} for place in ("system", "user"))
    assert prompted(items, {}) == (items, "")
    assert prompted(items, system) == (items, "be careful")
    assert [item.text for item in prompted(items, before)[0]] == [f"be careful : {i.text}" for i in items]
    ids = bench.batcher.prompts(items[:1], "be careful")["input_ids"][0]
    said = bench.batcher.tokenizer.decode(ids)
    assert said.startswith("<|im_start|>system\nbe careful<|im_end|>\n<|im_start|>user\n<image>")


def test_what_retrieval_found_is_held_against_what_pictures_show(bench: Bench) -> None:
    links = truth_links(bench.out)
    counts = links.groupby("concept_id")["role"].value_counts().unstack()
    assert (counts.sum(axis=1) == links["stimulus_id"].nunique()).all()
    truth = truth_dictionary(bench.out, bench.dictionary)
    cosines = (truth.unit(1) * bench.dictionary.unit(1)).sum(1)
    assert cosines.median() > 0.5
    assert (cosines < 0.999).all()


def test_steering_by_the_dictionary_moves_answers_and_shuffled_labels_hardly_do(bench: Bench) -> None:
    parts, items = bench.parts(0), judge.suite("jailbreak_a", 24, 3)
    setting = {"strength": 0.3, "layers": [1, 2], "scope": "prompt"}
    plain, steered, again = (
        bench.answers(parts, arm, setting if arm == "actadd" else {}, items)
        for arm in ("none", "actadd", "none")
    )
    assert plain == again
    refused = [np.mean(["sorry" in text for text in texts]) for texts in (plain, steered)]
    assert refused[0] < 0.2
    assert refused[1] > 0.5


def test_cells_are_kept_paired_and_measured_anew_when_settings_change(
    bench: Bench, recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings()))
    results = compare.run(bench.out, recipe, PLAN, settings=path)
    assert set(results["methods"]) == set(arms.LABELS)
    for arm, found in results["methods"].items():
        assert found["runs"] == (2 if arm in arms.SAE_ARMS else 1)
        assert 0 <= found["unsafe"]["low"] <= found["unsafe"]["rate"] <= found["unsafe"]["high"] <= 1
        assert ("difference" in found["unsafe"]) == (arm != "none")
        assert found["utility"]["n"] == found["over_refusal"]["n"] == 6
    assert len(results["sae_fve"]["random"]["fve"]) == 2
    check_examples(bench, results)
    assert results["labels"].keys() == {"dictionary", "random"}
    found = results["labels"]["dictionary"]
    assert 0 < found["fire"] <= found["undesirable"] + found["desirable"] <= found["atoms"]
    cell = bench.folder / "cells" / "none-0.json"
    before, kept = cell.stat().st_mtime_ns, cell.read_bytes()
    compare.run(bench.out, recipe, PLAN, settings=path)
    assert cell.stat().st_mtime_ns == before
    cell.unlink()
    compare.run(bench.out, recipe, PLAN, settings=path)
    assert cell.read_bytes() == kept
    other = settings()
    other["chosen"]["actadd"]["strength"] = 0.3
    path.write_text(json.dumps(other))
    compare.run(bench.out, recipe, PLAN, settings=path)
    assert cell.stat().st_mtime_ns > before
    assert len(compare.as_text(results).splitlines()) == len(arms.LABELS) + 1


def check_examples(bench: Bench, results: dict[str, Any]) -> None:
    """Each suite's first item is shown as it was asked; before the picture, what is removed is alike."""
    shown = results["examples"]
    assert {(one["suite"], one["index"]) for one in shown} >= {(suite, 0) for suite in SUITES}
    for one in shown:
        item = judge.suite(one["suite"], one["index"] + 1, 0)[one["index"]]
        assert (one["prompt"], one["expected"], one["object"]) == (item.text, item.answer, item.scene.object)
        assert one["answers"].keys() == set(compare.EXAMPLE_ARMS)
        assert all(0 < atom["share"] < 10 for atom in one["atoms"])
    parts, setting = bench.parts(bench.recipe.run.seed), {"eta": 0.3, "gamma": 0.0, "layers": [1, 2]}
    items = [judge.suite(suite, 1, 5)[0] for suite in ("jailbreak_a", "question")]
    both = [compare._removed(bench, parts, setting | {"scope": "prompt"}, [item])[0] for item in items]
    assert [atom["atom"] for atom in both[0]] == [atom["atom"] for atom in both[1]]
    assert [a["share"] for a in both[0]] == pytest.approx([a["share"] for a in both[1]], rel=1e-4)


def test_shares_are_lengths_of_what_steering_takes_away(bench: Bench) -> None:
    """Of each atom: its part of the SAE's sum at the last position, over the state it is taken from."""
    parts, item = bench.parts(0), judge.suite("jailbreak_a", 1, 2)
    setting = {"eta": 0.3, "gamma": 0.0, "layers": [2], "scope": "prompt"}
    method = arms.method_of(parts, "daco", setting)
    assert method is not None
    with torch.no_grad(), capture(bench.model, [2]) as read:
        bench.model(**bench.batcher.prompts(item))
    z = read.activations[2][:, -1]
    _, (found,) = compare._removed(bench, parts, setting, item)
    code = parts.saes["dictionary"][2].encode(z)[0]
    rows = parts.saes["dictionary"][2].W_dec
    expected = {a: float((code[a] * rows[a]).norm() / z.norm()) for a in method.atoms(2) if code[a] > 0}
    assert {atom["atom"]: atom["share"] for atom in found} == pytest.approx(expected, rel=1e-4)
    assert [atom["share"] for atom in found] == sorted(expected.values(), reverse=True)


def test_examples_are_the_first_of_each_suite_and_of_each_failure() -> None:
    def outcomes(**changes: list[int]) -> dict[str, dict[str, list[int]]]:
        found = {suite: {"right": [1, 1, 1], "refused": [0, 0, 0], "complied": [0, 0, 0]} for suite in SUITES}
        for name, values in changes.items():
            suite, field = name.split("__")
            found[suite][field] = values
        return found

    plain = outcomes(question__right=[0, 1, 1])
    firsts = {(suite, 0, "first") for suite in SUITES}
    assert {pick[:3] for pick in compare.picked(plain, plain)} == firsts
    worse = outcomes(
        question__right=[0, 1, 0],
        harmless__right=[0, 1, 1],
        harmless__refused=[1, 0, 0],
        harmless_cues__refused=[0, 1, 1],
        harmless_cues__right=[1, 0, 0],
        harmful__complied=[0, 0, 1],
        jailbreak_b__complied=[0, 1, 1],
    )
    picks = compare.picked(plain, worse)
    failures = {("question", 2, "wrong", 1), ("harmless", 0, "refuses", 1), ("jailbreak_b", 1, "obeys", 2)}
    assert set(picks) >= failures
    assert {pick[:3] for pick in picks} - {pick[:3] for pick in failures} == firsts - {
        ("harmless", 0, "first")
    }


def test_differences_are_of_the_same_items() -> None:
    def outcome(values: list[int]) -> dict[str, dict[str, list[int]]]:
        return {"jailbreak_a": {"complied": values}}

    plain, cells = [outcome([1, 1, 1, 0])], [outcome([0, 1, 0, 0]), outcome([0, 0, 0, 0])]
    found = compare._figure(cells, plain, "unsafe", "daco")
    assert found["rate"] == pytest.approx(1 / 8)
    assert found["difference"]["mean"] == pytest.approx(-5 / 8)
    assert figure(cells[0], "unsafe").tolist() == [0, 1, 0, 0]


def test_tuning_prefers_what_costs_no_utility_and_then_what_is_safe() -> None:
    plain = {"unsafe": 1.0, "utility": 0.97, "helpful": 0.95}
    costly = {"unsafe": 0.0, "utility": 0.9, "helpful": 0.95}
    safe = {"unsafe": 0.2, "utility": 0.96, "helpful": 0.94}
    assert min((plain, costly, safe), key=lambda found: compare.cost(found, plain)) is safe


def test_tuning_tries_all_and_resumes(bench: Bench) -> None:
    few = {arm: arms.settings_of(arm, [1, 2])[:2] for arm in ("none", "actadd")}
    found = compare.tune(bench, few, 2, lambda cells: cells)
    assert len(found["tried"]) == 3
    assert found["chosen"]["actadd"] in few["actadd"]
    kept = sorted((bench.folder / "tune").iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    assert compare.tune(bench, few, 2, lambda cells: cells) == found
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_the_front_is_held_against_the_recipe_s_own_setting(bench: Bench) -> None:
    config = TuneConfig(items=4, eta=(0.3,), gamma=(0.0, 0.1), scope=("prompt",), budget=6)
    found = front.run(bench, 4, grid=config)
    own = found["tuning"]["one"]["default"]
    assert (own["eta"], own["gamma"], own["scope"]) == (0.5, 0.1, "prompt")  # of the demo's recipe
    assert found["tuning"]["one"]["items"] == {"harmful": 4, "harmless": 4, "question": 4}
    assert set(found["tuning"]) == {"one", "group"}
    rows = {(row["name"], row["centroids"]): row for row in found["held_out"]}
    demo = rows["demo", front.CENTROIDS["one"]]
    assert all(value == {"mean": 0, "low": 0, "high": 0} for value in demo["to_demo"].values())
    plain = rows["no steering", front.CENTROIDS["one"]]
    rates = [row["figures"]["unsafe"]["rate"] for row in (plain, demo)]
    assert plain["to_demo"]["unsafe"]["mean"] == pytest.approx(rates[0] - rates[1])
    alone = [row["setting"]["layers"] for name, row in rows.items() if name[0].endswith("alone")]
    assert alone == [(1,), (2,)]
    kept = {path: path.stat().st_mtime_ns for path in (bench.folder / "front").rglob("*.json")}
    again = front.run(bench, 4, grid=config)
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_without_chosen_settings_the_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run `python -m builders.toyworld tune`"):
        compare.read_settings(tmp_path / "settings.json")


def test_suites_of_validation_and_test_share_no_item() -> None:
    first, second = (suites_of(30, split) for split in ("validation", "test"))
    assert {name: len(items) for name, items in first.items()} == {
        name: 15 if name.startswith("harmless") else 30 for name in first
    }
    assert not {item for items in first.values() for item in items} & {
        item for items in second.values() for item in items
    }
