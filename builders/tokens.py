"""Token activations on disk: what a shard keeps, and how the SAE's stages read it.

Writes nothing itself; reads `activations/facts.json` and the stage's shards (`tokens.safetensors`: `tokens`
[t, n_layers, d_model], `norms` [t, n_layers], `modality` [t], `n_tokens` [stimuli] ...; `ids.json`;
`sides.json`). Which tokens a shard keeps is decided in `builders.token_choice`.

What is held out of SAE training is held out picture by picture. A picture stands before its text, so that all
its captions have the same image tokens: an SAE that learnt from one of them has seen those of the others.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from builders.stages import Work
from daco.errors import ActivationError, FormatError

MODALITIES = ("image", "prompt", "caption", "generated")
"""What a token belongs to; a shard's `modality` holds their numbers."""


def read_facts(folder: Path) -> dict[str, Any]:
    """`facts.json` of the stage: `model` (ModelFacts), `layers`, `tokens` (counts)."""
    return dict(json.loads((folder / "facts.json").read_text("utf-8")))


SIDES = "sides.json"
"""A shard's file beside `ids.json`: of each stimulus or prompt the id that decides its side."""


def sides_of(pictures: Mapping[str, str]) -> dict[str, str]:
    """By id, the one that decides its side: the least of those that have its picture, so none is on both.

    Args:
        pictures: By id of all stimuli and prompts, sha256 of its picture; empty where it has none.
    """
    least: dict[str, str] = {}
    for i, picture in pictures.items():
        least[picture] = min(i, least.get(picture, i))
    return {i: least[picture] if picture else i for i, picture in pictures.items()}


def held_out(side: str, share: float) -> bool:
    """Whether the tokens of a side (see `sides_of`) are kept out of SAE training; a function of its id alone.

    Of a prompt's id only the part before its `-` counts: no prompt is on both sides, whatever its answers.
    """
    digest = hashlib.sha256(f"sae holdout\0{side.partition('-')[0]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_ids(shards: Sequence[Path]) -> list[str]:
    """Ids of the stimuli or prompts of these shards, in order."""
    return [i for shard in shards for i in json.loads((shard / "ids.json").read_text("utf-8"))]


def check_sides(shards: Iterable[Path]) -> None:
    """Raise FormatError where a shard does not say what decides the sides."""
    for shard in shards:
        if not (shard / SIDES).is_file():
            raise FormatError(
                f"{shard}: expected {SIDES}, got none: an earlier version wrote it; run the activations again"
            )


def check_activations(work: Work) -> None:
    """Raise FormatError where the activations are an earlier version's, before its results are discarded."""
    check_sides((work.upstream("activations") / "shards").iterdir())


def read_sides(shards: Sequence[Path]) -> list[str]:
    """What decides the side of each of them, in the same order; see `check_sides`."""
    check_sides(shards)
    return [side for shard in shards for side in json.loads((shard / SIDES).read_text("utf-8"))]


def held_ids(shards: Sequence[Path], holdout: float) -> set[str]:
    """Ids of what is held out among the stimuli or prompts of these shards."""
    pairs = zip(read_ids(shards), read_sides(shards), strict=True)
    return {i for i, side in pairs if held_out(side, holdout)}


def with_tokens(shards: Sequence[Path]) -> list[Path]:
    """The shards that hold tokens; those of stimuli need not, where the SAEs learn from answers alone."""
    return [shard for shard in shards if (shard / "tokens.safetensors").is_file()]


class TokenShards:
    """Tokens of one layer in finished shards, memory-mapped; of training or of held-out stimuli only.

    Args:
        shards: The shard folders, in order; those that hold no tokens (readings alone) are passed over.
        position: Position of the layer among the stage's layers.
        holdout: Share of pictures, and of prompts without one, that is held out.
        held: Take what is held out, else the rest.
    """

    def __init__(self, shards: Sequence[Path], position: int, holdout: float, held: bool) -> None:
        self.position, self.folders, self.holdout, self.held = position, with_tokens(shards), holdout, held
        self.shards = [load_file(shard / "tokens.safetensors")["tokens"] for shard in self.folders]
        self.d_model = self.shards[0].shape[-1] if self.shards else 0
        spans = [_spans(shard, number, holdout, held) for number, shard in enumerate(self.folders)]
        self.spans = np.concatenate([*spans, np.empty((0, 3), np.int64)])
        self.ends = self.spans[:, 2].cumsum()

    @cached_property
    def stimulus_ids(self) -> list[str]:
        """Ids of the stimuli that have tokens here, in order."""
        return self._of_spans(read_ids)

    @cached_property
    def pictures(self) -> np.ndarray:
        """Number of the picture of each of them, [stimuli], in order; a prompt without one has its own."""
        sides = [side.partition("-")[0] for side in self._of_spans(read_sides)]
        return pd.factorize(np.array(sides, dtype=object))[0]

    def _of_spans(self, read: Callable[[Sequence[Path]], list[str]]) -> list[str]:
        """What is read of each stimulus, of those that have tokens here."""
        kept = (_kept(shard, self.holdout, self.held)[1] for shard in self.folders)
        return [
            x for shard, mask in zip(self.folders, kept, strict=True) for x in compress(read([shard]), mask)
        ]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def modality(self) -> Tensor | None:
        """Number in `MODALITIES` of every token, [len] uint8; None: a shard does not say."""
        kinds = [load_file(shard / "tokens.safetensors").get("modality") for shard in self.folders]
        if not kinds or any(kind is None for kind in kinds):
            return None
        parts = [kinds[shard][first : first + n] for shard, first, n in self.spans.tolist()]  # type: ignore[index]
        return torch.cat(parts) if parts else None

    def rows(self, index: np.ndarray) -> Tensor:
        """The tokens of these numbers `[n]`, as `[n, d_model]` float32."""
        span = np.searchsorted(self.ends, index, side="right")
        shard, first, length = self.spans[span].T
        row = first + index - (self.ends[span] - length)
        order = np.argsort(shard, kind="stable")
        rows, starts = torch.from_numpy(row[order]), np.flatnonzero(np.diff(shard[order], prepend=-1))
        found = torch.empty(len(index), self.d_model, dtype=self.shards[0].dtype)
        for start, end in pairwise([*starts.tolist(), len(index)]):
            layer = self.shards[shard[order[start]]][:, self.position]
            torch.index_select(layer, 0, rows[start:end], out=found[start:end])
        return found[torch.from_numpy(np.argsort(order))].float()

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All tokens in order, at most `size` at a time, `[n, d_model]` float32."""
        for start in range(0, len(self), size):
            yield self.rows(np.arange(start, min(start + size, len(self))))


def _spans(shard: Path, number: int, holdout: float, held: bool) -> np.ndarray:
    """Rows (shard, first token, tokens) of the wanted stimuli of a shard."""
    lengths, kept = _kept(shard, holdout, held)
    first = lengths.cumsum() - lengths
    return np.stack([np.full(len(lengths), number), first, lengths], axis=1)[kept]


def _kept(shard: Path, holdout: float, held: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of each stimulus of a shard how many tokens it has, and whether it is wanted and has any."""
    with safe_open(shard / "tokens.safetensors", "np") as file:
        lengths = file.get_tensor("n_tokens")
    wanted = np.array([held_out(side, holdout) is held for side in read_sides([shard])], dtype=bool)
    return lengths, wanted & (lengths > 0)


def median_norms(shards: Sequence[Path], n_layers: int, holdout: float) -> list[float]:
    """R of each layer: the median norm of unmasked training tokens.

    Raises:
        ActivationError: there are none.
    """
    kept = []
    for number, shard in enumerate(with_tokens(shards)):
        with safe_open(shard / "tokens.safetensors", "np") as file:
            norms = file.get_tensor("norms")
        kept += [norms[first : first + n] for _, first, n in _spans(shard, number, holdout, held=False)]
    if not kept:
        raise ActivationError("expected training tokens, got none; lower sae.holdout or add stimuli")
    return [float(np.median(np.concatenate([norms[:, i] for norms in kept]))) for i in range(n_layers)]
