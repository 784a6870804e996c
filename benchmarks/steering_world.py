"""What `benchmarks/steering.py` steers: models of a released shape with random weights, and SAEs for them.

Writes nothing but the release that its loading is timed on.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from builders.vision import ensure_torchvision
from daco.capture import capture
from daco.dictionary import ConceptDictionary
from daco.manifest import FORMAT_VERSION, file_entry, release_files, write_manifest
from daco.sae import SAE, LayerSAE
from daco.sae_files import write_config, write_layer
from daco.sites import ModelFacts, find_trunk
from daco.sparse_coding import elastic_net
from daco.steering_sae import SteeringSAE

ETA, GAMMA, K = 0.3, 0.05, 64


@dataclass(frozen=True)
class Shape:
    """A model's shape and the layers that are steered."""

    name: str
    """As it is shown."""
    kind: str
    """`qwen2` (text only) or `qwen2_5_vl`."""
    config: dict[str, Any]
    """Fields of the text trunk's config."""
    layers: tuple[int, ...]
    """Five in the middle."""


def _qwen(hidden: int, mlp: int, blocks: int, heads: int, kv: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": Shape("tiny", "qwen2", _qwen(64, 96, 6, 4, 2, 512, True), (1, 2, 3, 4, 5)),
    "0.5b": Shape("Qwen2.5-0.5B", "qwen2", _qwen(896, 4864, 24, 14, 2, 151936, True), (12, 13, 14, 15, 16)),
    "7b": Shape(
        "Qwen2.5-VL-7B", "qwen2_5_vl", _qwen(3584, 18944, 28, 28, 4, 152064, False), (15, 16, 17, 18, 19)
    ),
}


def build_model(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Any:
    """A model of that shape with random weights, in eval mode."""
    ensure_torchvision()
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2Config

    torch.manual_seed(seed)
    with torch.device(device):
        if shape.kind == "qwen2":
            model = AutoModelForCausalLM.from_config(Qwen2Config(**shape.config), dtype=dtype)
        else:
            vision = {"out_hidden_size": shape.config["hidden_size"]}
            config = Qwen2_5_VLConfig(
                text_config=shape.config, vision_config=vision, tie_word_embeddings=False
            )
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def read_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: neither the vision tower nor untied input embeddings."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = set() if head is embedding else {id(embedding)}
    return sum(
        p.nbytes for name, p in model.named_parameters() if ".visual." not in name and id(p) not in unread
    )


def held_bytes(model: Any) -> int:
    """Bytes of all weights."""
    return sum(p.nbytes for p in model.parameters())


@torch.inference_mode()
def build_saes(
    model: Any, shape: Shape, ids: Tensor, n_atoms: int, n_labelled: int, seed: int
) -> tuple[SteeringSAE, ConceptDictionary, float]:
    """TopK SAEs for the model with a calibrated threshold, the dictionary they started from, and MOP's alpha.

    Rows are random and unit; half of the labelled ones are undesirable. `K` atoms a token fire on the model's
    own activations, in MOP's codes as well.
    """
    with capture(model, shape.layers, stop=True) as captured:
        captured.run(input_ids=ids)
        activations = {n: z.reshape(-1, z.shape[-1]).float().cpu() for n, z in captured.activations.items()}
    facts = ModelFacts("", "", model.config.model_type, *_sizes(model))
    saes = {n: _layer(n, z, n_atoms, n_labelled, seed) for n, z in activations.items()}
    first = saes[shape.layers[0]]
    concepts = pd.DataFrame(
        {"concept_id": [f"user:c{i}" for i in range(n_atoms)], "concept": [f"c{i}" for i in range(n_atoms)]}
    ).assign(**dict.fromkeys(("synset", "pos", "definition", "group", "polarity_source"), ""))
    concepts = concepts.assign(rank=range(n_atoms), polarity=first.labels(), n_positive=1)
    rows = {n: layer.sae.W_dec.detach() for n, layer in saes.items()}
    dictionary = ConceptDictionary(concepts, rows, facts, {n: layer.R for n, layer in saes.items()})
    config = {
        "format_version": FORMAT_VERSION,
        "base_model": {name: value for name, value in asdict(facts).items() if name != "fingerprint"},
        "layers": list(shape.layers),
        "dictionary": {"dataset": "none", "tag": "none", "sha256": "none"},
        "activation": "topk",
        "steering": {"eta": ETA, "gamma": GAMMA, "scope": "all"},
    }
    alpha = _alpha(dictionary, activations[shape.layers[0]][-8:], model.device)
    return SteeringSAE(config, saes), dictionary, alpha


def _alpha(dictionary: ConceptDictionary, z: Tensor, device: torch.device) -> float:
    """The smallest of MOP's penalties whose codes have no more than `K` atoms."""
    rows, z, chosen = dictionary.unit(dictionary.layers[0]).to(device), z.to(device), 0.95
    correlation = z @ rows.T
    for alpha in np.arange(0.9, 0.0, -0.05):
        given = z.new_full((len(z),), float(alpha))
        solved = elastic_net(z, rows, given, 0.95, correlation=correlation, relative=True)
        if (solved.code != 0).sum() > min(K, z.shape[1] // 8) * len(z):
            break
        chosen = float(alpha)
    return chosen


def _sizes(model: Any) -> tuple[int, int]:
    trunk = find_trunk(model)
    return model.get_input_embeddings().weight.shape[1], trunk.n_layers


def _layer(layer: int, z: Tensor, n_atoms: int, n_labelled: int, seed: int) -> LayerSAE:
    draw = torch.Generator().manual_seed(1_000 * seed + layer)
    W_dec = normalize(torch.randn(n_atoms, z.shape[1], generator=draw), dim=1)
    b_dec, norms = z.mean(0), z.norm(dim=1)
    active = ((z - b_dec) @ W_dec.T).relu()
    threshold = float(active.flatten().topk(K * len(z)).values[-1])
    sae = SAE(W_dec.T.contiguous(), torch.zeros(n_atoms), W_dec, b_dec, "topk", min(K, n_atoms // 4))
    return LayerSAE(
        layer, sae.requires_grad_(False), _atoms(n_atoms, n_labelled, seed), float(norms.median()), threshold
    )


def _atoms(n_atoms: int, n_labelled: int, seed: int) -> pd.DataFrame:
    """Names such as releases have; the same labels at every layer."""
    cosines = np.zeros((2, n_atoms))
    labelled = np.random.default_rng(seed).permutation(n_atoms)[:n_labelled]
    cosines[np.arange(n_labelled) % 2, labelled] = 0.5
    names = [[f"concept {(i + j) % n_atoms}" for j in range(5)] for i in range(n_atoms)]
    polarity = np.select([cosines[0] > ETA, cosines[1] > ETA], ["undesirable", "desirable"], "neutral")
    return pd.DataFrame(
        {
            "atom": range(n_atoms),
            "polarity": polarity,
            "cos_undesirable": cosines[0],
            "cos_desirable": cosines[1],
            "nearest_concept_ids": [
                [f"wn30:{7 * (i + j) % n_atoms:08d}-n" for j in range(5)] for i in range(n_atoms)
            ],
            "nearest_concepts": names,
            "nearest_cosines": [[0.9, 0.5, 0.4, 0.3, 0.2]] * n_atoms,
            "firing_rate": 0.004,
            "group": [f"noun.{'abcdefgh'[i % 8]}" for i in range(n_atoms)],
        }
    )


def write_release(folder: Path, sae: SteeringSAE) -> None:
    """The SAEs as a release folder."""
    folder.mkdir()
    for layer in sae.layers.values():
        write_layer(folder, layer, sae.base_model)
    write_config(folder, sae.config)
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": "model",
        "name": "benchmark",
        "version": "1.0.0",
        "files": {name: file_entry(folder / name) for name in release_files(folder)},
        "sources": [],
    }
    write_manifest(folder, facts | {name: {} for name in ("counts", "recipe", "seeds", "versions", "facts")})
