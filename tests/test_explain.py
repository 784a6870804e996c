"""`SteeringSAE.explain` counts what the naive code has, row by row and place by place, padding left out."""

import dataclasses
import warnings
from typing import Any

import naive
import numpy as np
import pandas as pd
import pytest
import small_sae
import torch
from conftest import CAPTIONS, drawn_images, inputs_of, tiny
from test_capture import hooks

import daco.explain
from builders.mllm import chat_inputs
from daco.capture import capture
from daco.errors import ModelMismatchError, SteeringConflictError, UnknownLayerError
from daco.explain import COLUMNS
from daco.methods import SAESteering
from daco.sae import SAE
from daco.sites import ModelFacts, image_token_ids
from daco.steering import attach
from daco.steering_sae import SteeringSAE

LAYERS = (1, 2)
pytestmark = pytest.mark.filterwarnings("ignore:base model not confirmed")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llava")[0].double()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    """Two rows of unequal length, padded on the left."""
    made = inputs_of(tiny("llava")[1], 2)
    return {name: t.double() if t.is_floating_point() else t for name, t in made.items()}


def sae_of(model: Any, activation: str) -> SteeringSAE:
    return small_sae.steering_sae(ModelFacts.of(model), LAYERS, activation)


def expected(model: Any, inputs: Any, sae: SteeringSAE) -> dict[tuple[int, int, int], tuple[float, ...]]:
    """By row, layer and atom: positions in images, in text, mean and largest strength; the slow way."""
    with torch.no_grad(), capture(model, LAYERS) as captured:
        model(**inputs)
    found = {}
    for layer in LAYERS:
        w = {name: p.detach().numpy() for name, p in sae.layers[layer].sae.named_parameters()}
        one = sae.layers[layer].sae
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            z = captured.activations[layer][row].numpy()
            code = naive.encode(
                z, w["W_enc"], w["b_enc"], w["b_dec"], one.activation, one.k, w.get("threshold")
            )
            for atom in range(one.n_atoms):
                image, prompt = [], []
                for token, value in enumerate(code[:, atom]):
                    if inputs["attention_mask"][row, token] and value > 0:
                        (image if ids[token] in image_token_ids(model) else prompt).append(value)
                if both := [*image, *prompt]:
                    found[row, layer, atom] = (len(image), len(prompt), np.mean(both), max(both))
    return found


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_it_counts_what_the_naive_code_has(
    activation: str, model: Any, inputs: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(daco.explain, "CHUNK", 7)  # in several parts, the last one shorter
    sae = sae_of(model, activation)
    found = sae.explain(model, inputs)
    wanted = expected(model, inputs, sae)
    assert tuple(found.columns) == COLUMNS
    assert not inputs["attention_mask"].bool().all()  # there is padding that could be counted
    got = found.set_index(["row", "layer", "atom"])
    assert set(got.index) == set(wanted)
    for key, (image, prompt, mean, largest) in wanted.items():
        fact = got.loc[key]
        assert (fact["image"], fact["prompt"], fact["positions"]) == (image, prompt, image + prompt)
        assert fact["strength"] == pytest.approx(mean, rel=1e-9)
        assert fact["largest"] == pytest.approx(largest, rel=1e-9)
        assert fact["concepts"] == sae.layers[key[1]].names(key[2])[:3]
        assert fact["polarity"] == sae.layers[key[1]].labels()[key[2]]
    total = found["strength"] * found["positions"]
    for _, part in total.groupby([found["row"], found["layer"]]):
        assert part.is_monotonic_decreasing


def test_a_row_of_a_batch_is_as_it_is_alone(model: Any, inputs: Any) -> None:
    sae, processor = sae_of(model, "topk"), tiny("llava")[1]
    batch = sae.explain(model, inputs)
    for row in range(2):
        made = chat_inputs(processor, CAPTIONS[row : row + 1], drawn_images(2)[row : row + 1])
        alone = sae.explain(
            model, {name: t.double() if t.is_floating_point() else t for name, t in made.items()}
        )
        part = batch[batch["row"] == row].drop(columns="row").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, alone.drop(columns="row"), rtol=1e-6)


def test_labelled_atoms_alone_are_said_to_be_so(model: Any, inputs: Any) -> None:
    sae = sae_of(model, "relu")
    part = dataclasses.replace(sae, layers={n: labelled(layer) for n, layer in sae.layers.items()})
    found, whole = part.explain(model, inputs), sae.explain(model, inputs)
    assert "only labelled atoms were loaded" in found.attrs["notes"][-1]
    assert not any("labelled" in note for note in whole.attrs["notes"])
    named = whole[whole["polarity"] != "neutral"].reset_index(drop=True)
    assert 0 < len(named) < len(whole)
    pd.testing.assert_frame_equal(found, named, check_like=True)


def labelled(layer: Any) -> Any:
    """A layer as `steering_only` loads it."""
    kept = np.flatnonzero(layer.labels() != "neutral")
    w = layer.sae
    sae = SAE(w.W_enc[:, kept], w.b_enc[kept], w.W_dec[kept], w.b_dec, w.activation)
    atoms = layer.atoms.iloc[kept].reset_index(drop=True)
    return dataclasses.replace(layer, sae=sae, atoms=atoms, labelled_at=small_sae.ETA)


def test_some_layers_alone(model: Any, inputs: Any) -> None:
    sae = sae_of(model, "topk")
    before = hooks(model)
    found = sae.explain(model, inputs, layers=[2])
    assert set(found["layer"]) == {2}
    assert hooks(model) == before
    with pytest.raises(UnknownLayerError, match=r"expected layers among \[1, 2\], got \[0\]"):
        sae.explain(model, inputs, layers=[0, 2])


def test_the_model_is_checked_as_for_steering(model: Any, inputs: Any) -> None:
    sae = sae_of(model, "topk")
    base = sae.config["base_model"] | {"id": "org/base", "fingerprint": {}}
    other = dataclasses.replace(sae, config=sae.config | {"base_model": base | {"n_layers": 28}})
    with pytest.raises(ModelMismatchError, match="n_layers 28"):
        other.explain(model, inputs)
    named = dataclasses.replace(sae, config=sae.config | {"base_model": base})
    with pytest.warns(UserWarning, match="base model not confirmed"):
        assert "not confirmed" in named.explain(model, inputs).attrs["notes"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "not confirmed" in named.explain(model, inputs, base_model_ok=True).attrs["notes"][0]


def test_a_steered_model_is_refused_and_goes_on_being_steered(model: Any, inputs: Any) -> None:
    sae = sae_of(model, "topk")
    run = attach(model, SAESteering(sae))
    try:
        with pytest.raises(SteeringConflictError, match="expected a model that is not steered"):
            sae.explain(model, inputs)
        with torch.no_grad():
            model(**inputs)
        assert run.report().positions
    finally:
        run.remove()
    assert len(sae.explain(model, inputs))
