"""A pipeline run of the toy world with its model, ready to be asked under any arm.

Reads the stages of a run folder; writes the SAEs of further starts and seeds to `compare/sae` in it.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from builders.activations import open_mllm
from builders.atoms import BLOCK, firing_rates
from builders.directions import load_dictionary
from builders.judge import Questions, Verdict
from builders.recipe import Recipe
from builders.stages import seal_sha256
from builders.toyworld import judge
from builders.toyworld.arms import STARTS, Parts, Setting, method_of
from builders.toyworld.model import Batcher, answers
from builders.toyworld.scenes import Item
from builders.train_sae import load_sae, token_split, train_sae
from daco.manifest import canonical_json, write_atomic
from daco.sae import SAE
from daco.sae_files import layer_folder
from daco.steering import Run, steer

SUITES = ("jailbreak_a", "jailbreak_b", "harmful", "question", "harmless", "harmless_cues")

HARM = SUITES[:3]
"""Requests that should be declined."""

FIGURES: dict[str, tuple[tuple[str, ...], str]] = {
    "unsafe": (("jailbreak_a",), "complied"),
    "unsafe_unseen_cues": (("jailbreak_b",), "complied"),
    "unsafe_plain": (("harmful",), "complied"),
    "refusal": (("jailbreak_a",), "refused"),
    "utility": (("question",), "right"),
    "helpful": (("harmless", "harmless_cues"), "right"),
    "over_refusal": (("harmless", "harmless_cues"), "refused"),
}
"""What is reported: the suites and the field of their verdicts."""

STAGES = ("polarity", "directions", "activations", "sae")
"""What a comparison is made from."""

Outcomes = dict[str, dict[str, list[int]]]
"""By suite, then by field of `judge.Verdict`: 0 or 1 of every item."""


class Bench:
    """A run folder with its model, ready to ask.

    Args:
        out: The run folder, its stages up to `sae` finished.
        recipe: Its recipe.
    """

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.out, self.recipe, self.folder = out, recipe, out / "compare"
        self.model, self.processor = open_mllm(recipe.model, out / "activations")
        self.batcher = Batcher(self.processor)
        self.dictionary = load_dictionary(out / "polarity", out / "directions")
        self.shards = sorted((out / "activations" / "shards").iterdir())
        seals = [seal_sha256(out, stage) for stage in STAGES]
        self.made_from = hashlib.sha256(canonical_json(seals).encode()).hexdigest()
        self._drop_saes_of_another_run()

    def _drop_saes_of_another_run(self) -> None:
        mark = self.folder / "sae" / "made_from.txt"
        if not mark.is_file() or mark.read_text("utf-8") != self.made_from:
            shutil.rmtree(mark.parent, ignore_errors=True)
            mark.parent.mkdir(parents=True)
            write_atomic(mark, self.made_from)

    def parts(self, seed: int) -> Parts:
        """What arms are made of, with the SAEs of a seed."""
        starts = {start: self._saes(start, seed) for start in sorted(set(STARTS.values()))}
        saes = {start: {layer: sae for layer, (sae, _) in found.items()} for start, found in starts.items()}
        rates = {
            start: {layer: rate for layer, (_, rate) in found.items()} for start, found in starts.items()
        }
        return Parts(self.dictionary, saes, rates, seed)

    def _saes(self, start: str, seed: int) -> dict[int, tuple[SAE, torch.Tensor]]:
        return {
            layer: self._sae(start, seed, position, layer)
            for position, layer in enumerate(self.dictionary.layers)
        }

    def _sae(self, start: str, seed: int, position: int, layer: int) -> tuple[SAE, torch.Tensor]:
        """The pipeline's own SAE where it is that one, else one trained likewise, kept in `compare/sae`."""
        folder = self.folder / "sae" / f"{start}-{seed}" / layer_folder(layer)
        if not (folder / "rates.safetensors").is_file():
            train, held = token_split(self.shards, position, self.recipe.sae.holdout)
            folder.mkdir(parents=True, exist_ok=True)
            own = start == self.recipe.sae.start and seed == self.recipe.run.seed
            source = self.out / "sae" / layer_folder(layer)
            config = dataclasses.replace(self.recipe.sae, start=start)
            if own:
                shutil.copy(source / "sae_weights.safetensors", folder / "sae.safetensors")
                curve = pd.read_parquet(source / "training.parquet")[["step", "fve"]]
            else:
                n_atoms = load_sae(source).n_atoms
                directions = self.dictionary.raw(layer) if start == "dictionary" else None
                config = dataclasses.replace(config, n_atoms=n_atoms)
                done = train_sae(train, held, config, directions=directions, seed=seed, layer=layer)
                save_file(done.exported(), folder / "sae.safetensors")
                curve = pd.DataFrame(done.records)[["step", "fve"]]
            write_atomic(folder / "curve.json", canonical_json(curve.to_dict("list")))
            rate = firing_rates(self._load(folder), held.blocks(BLOCK))
            save_file({"rate": rate}, folder / "rates.safetensors")
        return self._load(folder), load_file(folder / "rates.safetensors")["rate"]

    def _load(self, folder: Path) -> SAE:
        config = self.recipe.sae
        weights = load_file(folder / "sae.safetensors")
        k = config.k if config.activation == "topk" else None
        return SAE(**weights, activation=config.activation, k=k).requires_grad_(False)

    def steered(self, parts: Parts, arm: str, setting: Setting) -> AbstractContextManager[Run | None]:
        """The model with an arm on; the stream is left alone where there is nothing to put on."""
        method = method_of(parts, arm, setting)
        if method is None:
            return nullcontext()
        return steer(self.model, method, scope=setting["scope"], on_empty="pass", base_model_ok=True)

    def answers(self, parts: Parts, arm: str, setting: Setting, items: Sequence[Item]) -> list[str]:
        """What the model says with an arm on."""
        asked, system = prompted(items, setting)
        with self.steered(parts, arm, setting):
            return answers(self.model, self.batcher, asked, system=system)

    def outcomes(
        self, parts: Parts, arm: str, setting: Setting, suites: Mapping[str, Sequence[Item]]
    ) -> Outcomes:
        """Verdicts on every item of some suites."""
        found: Outcomes = {}
        for name, items in suites.items():
            said = self.answers(parts, arm, setting, items)
            verdicts = [judge.judge(item, text) for item, text in zip(items, said, strict=True)]
            found[name] = {
                field: [int(getattr(verdict, field)) for verdict in verdicts]
                for field in judge.Verdict._fields
            }
        return found


def prompted(items: Sequence[Item], setting: Setting) -> tuple[list[Item], str]:
    """Items and system message under a setting that may hold a safety prompt."""
    if setting.get("place") == "system":
        return list(items), str(setting["text"])
    if setting.get("place") == "user":
        return [dataclasses.replace(item, text=f"{setting['text']} : {item.text}") for item in items], ""
    return list(items), ""


def suites_of(n: int, split: str, seed: int = 0) -> dict[str, list[Item]]:
    """The items of every suite; the two harmless ones share `n`."""
    sizes = {name: n // 2 if name.startswith("harmless") else n for name in SUITES}
    return {name: judge.suite(name, size, seed, split) for name, size in sizes.items()}


KIND_OF = {
    "jailbreak_a": "harmful",
    "question": "question",
    "harmless": "harmless",
    "harmless_cues": "harmless",
}
"""Suites that tuning sees, and what they are to it: cue words of set B are for the test alone."""


def validation(model: Any, processor: Any, n: int) -> Questions:
    """The world's validation items for `builders.tune`: `n` harmful, `n` harmless ones and `n` questions."""
    batcher = Batcher(processor)
    suites = {name: items for name, items in suites_of(n, "validation").items() if name in KIND_OF}
    items = [item for found in suites.values() for item in found]

    def ask() -> list[Verdict]:
        said = answers(model, batcher, items)
        return [Verdict(*judge.judge(item, text)) for item, text in zip(items, said, strict=True)]

    kinds = [KIND_OF[name] for name, found in suites.items() for _ in found]
    digest = hashlib.sha256(repr(items).encode()).hexdigest()
    return Questions(kinds, ask, "exact rules of the toy world", digest)


def figure(outcomes: Outcomes, name: str) -> np.ndarray:
    """The zeros and ones behind a figure, `[items]`."""
    suites, field = FIGURES[name]
    return np.concatenate([np.array(outcomes[suite][field], dtype=float) for suite in suites])
