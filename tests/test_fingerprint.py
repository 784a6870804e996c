"""A model's fingerprint knows its weights in every dtype and from files, and nothing that was trained on."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from release_fixture import write_dataset_release, write_model_release
from test_load import edit_json
from torch import nn

import daco
from daco.errors import FormatError, ModelMismatchError
from daco.fingerprint import BLOCKS, ENTRIES, MATRICES, compare, fingerprint
from daco.sites import ModelFacts, find_trunk

KINDS = ("llava", "qwen2_5_vl", "internvl")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    found: nn.Module = tiny(request.param)[0]
    found.config._name_or_path = "/some/folder"  # nobody knows it by its name
    return found


def blocks(model: nn.Module) -> nn.ModuleList:
    return find_trunk(model).layers


def test_it_is_small_and_the_same_each_time(model: nn.Module) -> None:
    found = fingerprint(blocks(model))
    assert found == fingerprint(blocks(copy.deepcopy(model)))
    assert len(found) > 2 * BLOCKS
    assert {name.partition(".")[0] for name in found} == {"0", "1", "2", "3"}
    assert max(sum(name.startswith(f"{i}.") for name in found) for i in range(BLOCKS)) <= MATRICES
    assert all(len(set(text.split())) == ENTRIES for text in found.values())
    assert len(json.dumps(found)) < 8_000


@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_copies_in_other_dtypes_agree(made: torch.dtype, used: torch.dtype, model: nn.Module) -> None:
    ours, theirs = copy.deepcopy(model).to(made), copy.deepcopy(model).to(used)
    facts = ModelFacts.of(ours)
    assert len(compare(facts.fingerprint, blocks(theirs)).same) == len(facts.fingerprint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert facts.check(theirs) is None  # the weights confirm what no name could


def test_a_saved_and_loaded_copy_agrees(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    assert ModelFacts.of(model).check(loaded) is None


def trained(model: nn.Module) -> nn.Module:
    """After one step of AdamW on one short text, at a low learning rate."""
    copied = copy.deepcopy(model).train()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-4)
    copied(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return copied.eval()


def drawn_anew(model: nn.Module) -> nn.Module:
    torch.manual_seed(17)
    return type(model)(copy.deepcopy(model.config))  # type: ignore[call-arg, arg-type]


def merged(model: nn.Module) -> nn.Module:
    """With a LoRA of rank 1 in the queries and values of all blocks, merged."""
    copied, draw = copy.deepcopy(model), torch.Generator().manual_seed(3)
    for name, weight in blocks(copied).named_parameters():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            up, down = (torch.randn(n, generator=draw) for n in weight.shape)
            weight.data += 0.002 * torch.outer(up, down)
    return copied


@pytest.mark.parametrize("change", [trained, drawn_anew, merged])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_are_refused_or_said(change: Any, dtype: torch.dtype, model: nn.Module) -> None:
    facts = ModelFacts.of(copy.deepcopy(model).to(dtype))
    other = change(model).to(dtype)
    with pytest.raises(
        ModelMismatchError, match=r"expected the weights of the base model, got others in \d+ "
    ):
        facts.check(other)
    note = facts.check(other, base_model_ok=True)
    assert note is not None
    assert note.startswith("base_model_ok: expected the weights of the base model, got others in ")
    found = compare(facts.fingerprint, blocks(other))
    only = ("q_proj", "v_proj") if change is merged else ("",)
    assert {n for n in found.differ if any(part in n for part in only)} == set(found.differ) != set()


def test_a_name_that_is_right_does_not_help_other_weights(model: nn.Module) -> None:
    facts = dataclasses.replace(ModelFacts.of(model), id="org/base")
    other = drawn_anew(model)
    other.config._name_or_path = "org/base"
    with pytest.raises(ModelMismatchError, match="expected the weights of org/base, got others"):
        facts.check(other)


def quantised(model: nn.Module) -> nn.Module:
    """As libraries do it: packed bytes in place of weights, or none under that name."""
    copied = copy.deepcopy(model)
    for layer in [m for m in blocks(copied).modules() if isinstance(m, nn.Linear)]:
        layer.weight = nn.Parameter(torch.zeros(3, 1, dtype=torch.uint8), requires_grad=False)
    return copied


def offloaded(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    blocks(copied).to("meta")
    return copied


@pytest.mark.parametrize("change", [quantised, offloaded])
def test_weights_that_cannot_be_read_leave_it_to_the_name(change: Any, model: nn.Module) -> None:
    facts = dataclasses.replace(ModelFacts.of(model), id="org/base")
    other = change(model)
    assert fingerprint(blocks(other)) == {}
    n = len(facts.fingerprint)
    said = f"weights not compared in {n} of {n} sampled matrices"
    with pytest.warns(UserWarning, match=f"base model not confirmed .*{said}"):
        facts.check(other)
    other.config._name_or_path = "org/base"
    assert facts.check(other) == f"revision of org/base not known; {said} (quantised, offloaded or adapted)"
    other.config._name_or_path = "org/other"
    with pytest.raises(ModelMismatchError, match="expected base model org/base, got org/other"):
        facts.check(other)


def test_a_part_that_cannot_be_read_is_said(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    blocks(other)[3].to("meta")
    note = ModelFacts.of(model).check(other)
    assert note is not None
    assert note.startswith("weights not compared in ")


def test_a_release_without_one_is_checked_by_name(model: nn.Module) -> None:
    facts = dataclasses.replace(ModelFacts.of(model), fingerprint={})
    with pytest.warns(UserWarning, match="base model not confirmed beyond type and shape"):
        facts.check(drawn_anew(model))


# In files.

GOOD = {"0.self_attn.q_proj.weight": "0.5 -1e-05"}


def test_releases_carry_it(tmp_path: Path) -> None:
    release = write_model_release(tmp_path / "model")
    assert daco.SteeringSAE.from_pretrained(release).base_model.fingerprint == {}
    edit_json(release, "config.json", base_model_fingerprint=GOOD)
    assert daco.SteeringSAE.from_pretrained(release).base_model.fingerprint == GOOD
    dictionary = daco.ConceptDictionary.from_pretrained(write_dataset_release(tmp_path / "dataset"))
    assert dictionary.model.fingerprint == {}
    known = dataclasses.replace(dictionary, model=dataclasses.replace(dictionary.model, fingerprint=GOOD))
    known.save_pretrained(tmp_path / "saved")
    assert daco.ConceptDictionary.from_pretrained(tmp_path / "saved").model.fingerprint == GOOD


@pytest.mark.parametrize("wrong", [[], {"q_proj": "0.5"}, {"0.q": 0.5}, {"0.q": "a b"}, {"0.q": "nan"}])
def test_a_broken_one_is_refused(wrong: Any, tmp_path: Path) -> None:
    release = write_model_release(tmp_path / "model")
    edit_json(release, "config.json", base_model_fingerprint=wrong)
    with pytest.raises(FormatError, match="base_model_fingerprint: expected texts of numbers"):
        daco.SteeringSAE.from_pretrained(release)
    folder = write_dataset_release(tmp_path / "dataset")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["models"]["tiny_vl"]["fingerprint"] = wrong
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="fingerprint: expected texts of numbers"):
        daco.ConceptDictionary.from_pretrained(folder)
