"""What SAE training adds to the forward of the MLLM: tokens a second of either and of both, in one process.

The model has Qwen2.5-VL-7B's shape and random weights (built from its config, nothing is downloaded), or is
tiny (`--shape tiny`, for a machine without a GPU). Each forward reads pictures with text and stops after the
last layer that is read; every layer's SAE takes a step on each batch of its tokens; all on one device.
Writes `results/sae_end_to_end.json`, a list of {work, who, value, unit, ratio}: `ratio` is the share of the
forward's own speed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.sae_training import machine
from builders.attention import windows_at_once
from builders.recipe import SaeConfig
from builders.sae_start import start_weights
from builders.sae_training import Training
from builders.vision import ensure_torchvision
from daco.capture import capture

RESULTS = Path(__file__).parent / "results" / "sae_end_to_end.json"
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        "text": {"hidden_size": 3_584, "intermediate_size": 18_944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        "vision": {"depth": 32, "hidden_size": 1_280, "intermediate_size": 3_420, "num_heads": 16}
        | {"out_hidden_size": 3_584, "fullatt_block_indexes": [7, 15, 23, 31]},
        "layers": [15, 16, 17, 18, 19],
        "side": 448,
        "words": 64,
    },
    "tiny": {
        "text": {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 4}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160}
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        "vision": {"depth": 2, "hidden_size": 24, "intermediate_size": 29, "num_heads": 2}
        | {"out_hidden_size": 32, "fullatt_block_indexes": [1]},
        "layers": [1, 2],
        "side": 56,
        "words": 5,
    },
}
"""Sizes of Qwen/Qwen2.5-VL-7B-Instruct's config.json, and tiny ones; a picture's side, words beside it."""


def built(shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """The model, random, on its device."""
    ensure_torchvision()
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    last = shape["text"]["vocab_size"] - 1
    ids = {"image_token_id": last, "video_token_id": last - 1, "vision_start_token_id": last - 2}
    config = Qwen2_5_VLConfig(text_config=shape["text"], vision_config=shape["vision"], **ids)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    windows_at_once(model)
    return model


def pictures(model: Any, n: int, side: int, words: int, seed: int) -> dict[str, Tensor]:
    """Inputs of n pictures of noise, each with random words behind it."""
    config, draw = model.config, torch.Generator().manual_seed(seed)
    vision = config.vision_config
    patches, merged = side // vision.patch_size, (side // vision.patch_size // vision.spatial_merge_size) ** 2
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    text = torch.randint(0, config.vision_start_token_id, (n, words), generator=draw)
    marks = torch.tensor([[config.vision_start_token_id, *[config.image_token_id] * merged]]).expand(n, -1)
    ids = torch.cat([marks, text], 1)
    found = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(n * patches**2, width, generator=draw).to(model.dtype),
        "image_grid_thw": torch.tensor([[1, patches, patches]] * n),
    }
    return {name: x.to(model.device) for name, x in found.items()}


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
    """Tokens of each layer, [batch * tokens, d_model] float32, where the model is."""
    with capture(model, layers, stop=True) as captured:
        captured.run(**inputs)
    return {layer: z.flatten(0, 1).float() for layer, z in captured.activations.items()}


def started(z: Tensor, config: SaeConfig) -> Training:
    """An SAE at a random start for these tokens."""
    centre = z.mean(0)
    scale = float((z - centre).square().mean().sqrt())
    weights = start_weights(centre.cpu() / scale, config.n_atoms, None, np.random.default_rng(0))
    return Training({name: w.to(z.device) for name, w in weights.items()}, scale, config)


def seconds(work: Callable[[], Any], device: str) -> float:
    """Of the clock, until the device has done it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def measured(
    shape: dict[str, Any], config: SaeConfig, stimuli: int, rounds: int, device: str
) -> dict[str, Any]:
    """Tokens a forward, and seconds (median of the rounds) of a forward, of all SAEs' steps, and of both."""
    model = built(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    layers = shape["layers"]
    batches = [pictures(model, stimuli, shape["side"], shape["words"], seed) for seed in range(rounds + 1)]
    tokens = forward(model, batches[0], layers)
    saes = {layer: started(z, config) for layer, z in tokens.items()}

    def train(found: dict[int, Tensor]) -> None:
        for layer, z in found.items():
            for part in z[torch.randperm(len(z), device=z.device)].split(config.batch):
                saes[layer].step(part)

    train(tokens)  # warms up
    taken: dict[str, list[float]] = {"forward": [], "SAEs": [], "both": []}
    for inputs in batches[1:]:
        taken["forward"].append(seconds(lambda inputs=inputs: forward(model, inputs, layers), device))
        tokens = forward(model, inputs, layers)
        taken["SAEs"].append(seconds(lambda tokens=tokens: train(tokens), device))
        taken["both"].append(seconds(lambda inputs=inputs: train(forward(model, inputs, layers)), device))
    return {"tokens": len(tokens[layers[0]])} | {name: statistics.median(t) for name, t in taken.items()}


def rows(found: dict[str, Any], name: str, shape: dict[str, Any], config: SaeConfig) -> list[dict[str, Any]]:
    """The table."""
    first, last = shape["layers"][0], shape["layers"][-1]
    where = f"{name}, layers {first} to {last}, d {shape['text']['hidden_size']:,}, m {config.n_atoms:,}"
    works = {"forward": "forward alone", "SAEs": "SAEs alone", "both": "forward and SAEs"}
    return [
        {
            "work": f"{work}, {where}",
            "who": "DACO",
            "value": round(found["tokens"] / found[key]),
            "unit": "tokens / s",
            "ratio": round(found["forward"] / found[key], 3),
        }
        for key, work in works.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--atoms", type=int, default=15_000)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4_096, help="tokens of a step")
    parser.add_argument("--stimuli", type=int, default=32, help="pictures of a forward")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    shape = SHAPES[given.shape]
    config = SaeConfig(n_atoms=given.atoms, k=given.k, batch=given.batch, steps=10_000, aux_k=0)
    found = measured(shape, config, given.stimuli, given.rounds, given.device)
    table = [
        row | {"machine": machine(torch.get_num_threads())} for row in rows(found, given.shape, shape, config)
    ]
    for row in table:
        print(f"{row['work']:<70} {row['value']:>10,} {row['unit']}  x {row['ratio']} of the forward")
    old = json.loads(given.results.read_text()) if given.results.is_file() else []
    kept = [row for row in old if row["work"] not in {r["work"] for r in table}]
    given.results.write_text(json.dumps(kept + table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
