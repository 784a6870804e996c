"""What is removed is what was chosen: by label, concept, group or number, as strongly as was asked."""

import dataclasses

import numpy as np
import pytest
import small_sae
import torch

from daco.errors import NothingToSteerError, UnknownConceptError, UnknownLayerError
from daco.methods import SAESteering
from daco.steering_sae import SteeringSAE

N, N_CONCEPTS = small_sae.N_ATOMS, small_sae.N_CONCEPTS


def strengths(sae: SteeringSAE, **chosen) -> dict[int, dict[int, float]]:
    """By layer, atoms with how strongly they are removed, read off the method's own numbers."""
    method = SAESteering(sae, gamma=0.0, on_empty="pass", **chosen)
    found = {}
    for layer in method.layers:
        w, rows = method._weights[layer]._tensors, sae.layers[layer].sae.W_dec
        found[layer] = {
            atom: round(float((-w["minus_W_dec"][i] / rows[atom].detach())[0]), 9)
            for i, atom in enumerate(method.atoms(layer))
        }
    return found


def undesirable(sae: SteeringSAE, layer: int) -> set[int]:
    return set(np.flatnonzero(sae.layers[layer].labels() == "undesirable").tolist())


def with_atoms(sae: SteeringSAE, **columns) -> SteeringSAE:
    layers = {
        number: dataclasses.replace(layer, atoms=layer.atoms.assign(**columns))
        for number, layer in sae.layers.items()
    }
    return dataclasses.replace(sae, layers=layers)


SAE = small_sae.steering_sae()
C3 = {atom: 1.0 for atom in range(N) if atom % N_CONCEPTS == 3}
GROUP_B = {atom: 1.0 for atom in range(N) if atom % 3 == 1}


def test_without_a_word_it_is_the_atoms_labelled_undesirable():
    for chosen in ({}, {"remove": None}, {"remove": "undesirable"}, {"remove": "label:undesirable"}):
        assert strengths(SAE, **chosen) == {
            layer: dict.fromkeys(sorted(undesirable(SAE, layer)), 1.0) for layer in (1, 2)
        }
    few = strengths(SAE, eta=0.8)
    assert set(few[1]) < undesirable(SAE, 1)  # the label follows eta
    assert strengths(SAE, eta=0.999) == {1: {}, 2: {}}


@pytest.mark.parametrize(
    ("remove", "expected"),
    [
        ("c3", C3),
        (["c3"], C3),
        ("user:c3", C3),
        ("concept:c3", C3),
        ("noun.b", GROUP_B),
        ("group:noun.b", GROUP_B),
        ({"c3": 0.5}, dict.fromkeys(C3, 0.5)),
        ({"noun.b": 0.25, "c4": 2.0}, GROUP_B | {1: 0.25} | dict.fromkeys(GROUP_B, 0.25) | {4: 2.0, 27: 2.0}),
        ({"c4": 2.0, "noun.b": 0.25}, dict.fromkeys(GROUP_B, 0.25) | {27: 2.0}),  # named later counts
        (["c3", "c4"], C3 | {4: 1.0, 27: 1.0}),
        ({1: [5, 7], 2: [5, 7]}, {5: 1.0, 7: 1.0}),
        ({1: {5: 0.5}, 2: {5: 0.5}}, {5: 0.5}),
        ({1: 36, 2: np.array([36])}, {36: 1.0}),
        ({"c3": 1.0, 1: {3: 0.5, 5: 1.0}, 2: {3: 0.5, 5: 1.0}}, C3 | {3: 0.5, 5: 1.0}),
    ],
)
def test_names_and_numbers_choose_atoms(remove, expected):
    expected = dict(sorted(expected.items()))
    assert strengths(SAE, remove=remove) == {1: expected, 2: expected}


def test_what_is_kept_stays():
    everything = {layer: undesirable(SAE, layer) for layer in (1, 2)}
    got = strengths(SAE, keep={1: [3, 20], 2: 4})
    assert {layer: set(found) for layer, found in got.items()} == {
        1: everything[1] - {3},
        2: everything[2] - {4},
    }
    for chosen in ({"keep": "c3"}, {"remove": {"undesirable": 1.0, "c3": 0.0}}):
        assert {layer: set(found) for layer, found in strengths(SAE, **chosen).items()} == {
            layer: found - set(C3) for layer, found in everything.items()
        }
    assert strengths(SAE, remove="noun.b", keep=["c3", "noun.b"]) == {1: {}, 2: {}}


def test_strengths_scale_what_is_taken_away():
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 32)) * 3)
    whole, half = (SAESteering(SAE, gamma=0.0, remove={"undesirable": s}).change(1, z) for s in (1.0, 0.5))
    assert torch.equal(whole.strengths, half.strengths)  # what fired is what fired
    assert whole.delta.abs().max() > 0.1
    torch.testing.assert_close(half.delta, whole.delta / 2)
    layer = SAE.layers[2]
    chosen = SAESteering(SAE, gamma=0.0, remove={"noun.b": 1.5}).change(2, z)
    rows = list(GROUP_B)
    torch.testing.assert_close(chosen.delta, -1.5 * layer.sae.encode(z)[:, rows] @ layer.sae.W_dec[rows])
    neutral = layer.labels()[rows] == "neutral"
    assert (chosen.strengths[:, torch.from_numpy(neutral)] > 0).any()  # labels do not matter where names are


def test_the_shift_is_by_labels_whatever_is_removed():
    by_name, by_label = SAESteering(SAE, remove="c3"), SAESteering(SAE)
    assert torch.equal(by_name._weights[1]._tensors["shift"], by_label._weights[1]._tensors["shift"])
    only_shift = SAESteering(SAE, remove=())
    assert only_shift.atoms(1) == []
    assert only_shift.shifted(1)


@pytest.mark.parametrize(
    ("remove", "error", "message"),
    [
        ("c99", UnknownConceptError, r"no atom of layers \[1, 2\] is named 'c99'; nearest: \['c9'"),
        ("noun.d", UnknownConceptError, r"nearest: \['noun.c', 'noun.b', 'noun.a'\]"),
        ("group:c3", UnknownConceptError, r"named 'c3'; nearest: none"),
        ("other", UnknownConceptError, r"a further concept of atoms 0 \(layer 1\), 1 \(layer 1\)"),
        ({7: [1]}, UnknownLayerError, r"expected layers among \[1, 2\], got 7"),
        ({1: [N]}, ValueError, rf"layer 1: expected atoms from 0 to {N - 1}, got {N}"),
        ({1: "c3"}, ValueError, "expected atoms as numbers, got 'c3'"),
        ({"c3": -1.0}, ValueError, "c3: expected a strength from 0"),
        ({"c3": float("nan")}, ValueError, "c3: expected a strength from 0"),
        ({1: {5: True}}, ValueError, "atom 5 of layer 1: expected a strength"),
        ([5], ValueError, r"atoms as {layer: \[atoms\]}, got 5"),
    ],
)
def test_what_is_not_there_is_named(remove, error, message):
    for argument in ("remove", "keep"):
        with pytest.raises(error, match=message):
            SAESteering(SAE, **{argument: remove})


def test_a_name_of_several_things_must_say_which():
    groups = ["c3" if i == 30 else "desirable" if i == 31 else "g" for i in range(N)]
    sae = with_atoms(SAE, group=groups)
    for name, choices in (
        ("c3", "'concept:c3' or 'group:c3'"),
        ("desirable", "'label:desirable' or 'group:"),
    ):
        with pytest.raises(ValueError, match=f"name of several things; write {choices}"):
            SAESteering(sae, remove=name)
    assert strengths(sae, remove="group:c3") == {1: {30: 1.0}, 2: {30: 1.0}}
    assert strengths(sae, remove="concept:c3")[1] == C3


def test_a_release_without_groups_says_so():
    layers = {
        number: dataclasses.replace(layer, atoms=layer.atoms.drop(columns="group"))
        for number, layer in SAE.layers.items()
    }
    sae = dataclasses.replace(SAE, layers=layers)
    with pytest.raises(UnknownConceptError, match="this release has no groups"):
        SAESteering(sae, remove="noun.b")
    assert strengths(sae, remove="c3")[1] == C3
    with pytest.raises(UnknownConceptError, match="this release has no groups"):
        SAESteering(with_atoms(SAE, group=""), remove="group:noun.b")


def test_a_choice_that_leaves_nothing_is_an_error():
    for chosen in ({"remove": "c3", "keep": "c3"}, {"remove": {"c3": 0.0}}):
        with pytest.raises(NothingToSteerError, match=r"to be removed \(.*c3.*\) is left"):
            SAESteering(SAE, gamma=0.5, **chosen)
        assert "is left" in SAESteering(SAE, on_empty="pass", **chosen).nothing
    with pytest.raises(NothingToSteerError, match="no atom of layers"):
        SAESteering(SAE, gamma=0.0, remove=())


def test_the_report_says_what_was_chosen():
    assert str(SAESteering(SAE, gamma=0.1)) == "SAE steering, eta 0.5, gamma 0.1"
    assert str(SAESteering(SAE, gamma=0.1, remove=["c3"])).endswith("gamma 0.1, removing ['c3']")
    assert len(str(SAESteering(SAE, gamma=0.1, remove={1: list(range(N))}))) < 140
