"""A small dictionary and steering SAEs for a model, random but with atoms near both poles; for tests."""

from dataclasses import asdict
from typing import Any

import naive
import numpy as np
import pandas as pd
import torch

from daco.dictionary import ConceptDictionary
from daco.sae import SAE, LayerSAE
from daco.sites import ModelFacts
from daco.steering_sae import SteeringSAE

N_CONCEPTS, N_ATOMS = 23, 37
POLARITY = ["undesirable"] * 6 + ["desirable"] * 5 + ["neutral"] * 12
ETA, R = 0.5, 7.0
FACTS = ModelFacts("org/model", "a" * 40, "llava", 32, 4)


def dictionary(
    facts: ModelFacts = FACTS, layers: tuple[int, ...] = (1, 2), seed: int = 0
) -> ConceptDictionary:
    """Concepts whose poles lie apart: each polarity has a common part."""
    draw = np.random.default_rng(seed)
    concepts = pd.DataFrame(
        {
            "concept_id": [f"user:c{i}" for i in range(N_CONCEPTS)],
            "concept": [f"c{i}" for i in range(N_CONCEPTS)],
        }
    ).assign(polarity=POLARITY)
    vectors = {}
    for layer in layers:
        poles = dict(
            zip(
                ("undesirable", "desirable", "neutral"), draw.normal(size=(3, facts.hidden_size)), strict=True
            )
        )
        rows = [poles[name] * (name != "neutral") + draw.normal(size=facts.hidden_size) for name in POLARITY]
        vectors[layer] = torch.from_numpy(np.stack(rows) * 3).float()
    return ConceptDictionary(concepts, vectors, facts, dict.fromkeys(layers, R))


def layer_sae(
    found: ConceptDictionary, layer: int, activation: str = "topk", dtype: torch.dtype = torch.float64
) -> LayerSAE:
    """Atoms near both centroids (12 and 9 of them) and random ones; labelled by the naive Eq. 9."""
    draw = np.random.default_rng(100 + layer)
    D = found.raw(layer).double().numpy()
    mu = {name: naive.centroid(D[np.array(POLARITY) == name]) for name in ("undesirable", "desirable")}
    W_dec = draw.normal(size=(N_ATOMS, D.shape[1])) / D.shape[1] ** 0.5
    W_dec[:12] = mu["undesirable"] + 0.8 * W_dec[:12]
    W_dec[12:21] = mu["desirable"] + 0.8 * W_dec[12:21]
    W_dec *= draw.uniform(0.5, 1.5, (N_ATOMS, 1))
    W_enc = (W_dec + 0.1 * draw.normal(size=W_dec.shape)).T
    weights = [W_enc, 0.1 * draw.normal(size=N_ATOMS), W_dec, 0.1 * draw.normal(size=D.shape[1])]
    threshold = (
        torch.from_numpy(draw.uniform(-0.8, 0.5, N_ATOMS)).to(dtype) if activation == "jumprelu" else None
    )
    sae = SAE(
        *(torch.from_numpy(np.ascontiguousarray(w)).to(dtype) for w in weights),
        activation=activation,
        k=9 if activation == "topk" else None,
        threshold=threshold,
    )
    atoms = pd.DataFrame(
        {
            "atom": range(N_ATOMS),
            "polarity": [naive.label(w, mu["undesirable"], mu["desirable"], ETA) for w in W_dec],
            "cos_undesirable": naive.unit(W_dec) @ mu["undesirable"],
            "cos_desirable": naive.unit(W_dec) @ mu["desirable"],
            "nearest_concept_ids": [[f"user:c{i % N_CONCEPTS}", "user:other"] for i in range(N_ATOMS)],
            "nearest_concepts": [[f"c{i % N_CONCEPTS}", "other"] for i in range(N_ATOMS)],
            "group": [f"noun.{'abc'[i % 3]}" for i in range(N_ATOMS)],
        }
    )
    return LayerSAE(layer, sae, atoms, R)


def steering_sae(
    facts: ModelFacts = FACTS,
    layers: tuple[int, ...] = (1, 2),
    activation: str = "topk",
    dtype: torch.dtype = torch.float64,
    gamma: float = 0.2,
) -> SteeringSAE:
    """As a release would load."""
    found = dictionary(facts, layers)
    config: dict[str, Any] = {
        "base_model": asdict(facts),
        "steering": {"eta": ETA, "gamma": gamma, "scope": "all"},
    }
    return SteeringSAE(config, {layer: layer_sae(found, layer, activation, dtype) for layer in layers})


def naive_steer(z: np.ndarray, layer: LayerSAE, gamma: float, labels: Any = None) -> np.ndarray:
    """The twin of SAE steering on `[n, d_model]`."""
    w = {name: p.detach().numpy() for name, p in layer.sae.named_parameters()}
    codes = naive.encode(
        z, w["W_enc"], w["b_enc"], w["b_dec"], layer.sae.activation, layer.sae.k, w.get("threshold")
    )
    return naive.sae_steer(z, codes, w["W_dec"], layer.labels() if labels is None else labels, gamma, layer.R)
