"""One forward pass of the frozen MLLM over every linked stimulus: contrastive readings, tokens for the SAEs.

Reads `corpus/` and `stimuli/links.parquet`; writes `activations/facts.json`, a folder a shard with
`readings.safetensors`, `tokens.safetensors`, `ids.json` and `counts.json`, and `model/` for a tiny model.
"""

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor

from builders.corpus import open_image
from builders.mllm import chat_inputs, load_mllm, reading_weights
from builders.recipe import ModelConfig
from builders.stages import Work, summed_counts
from builders.tiny import tiny_mllm
from builders.tokens import MODALITIES, keep_tokens
from daco.capture import capture
from daco.errors import ActivationError
from daco.manifest import canonical_json, write_atomic
from daco.sites import ModelFacts, image_token_ids


class Stimulus(NamedTuple):
    """A caption-image pair to be read."""

    stimulus_id: str
    """Its id."""
    caption: str
    """Text of the user's turn."""
    file: Path
    """Its image."""


class Read(NamedTuple):
    """What the MLLM said of a batch of stimuli."""

    readings: Tensor
    """[batch, n_layers, d_model] float32: the contrastive reading."""
    tokens: list[Tensor]
    """A stimulus each: [tokens, n_layers, d_model] of the tokens that are neither padding nor special."""
    modality: list[Tensor]
    """A stimulus each: [tokens] uint8, what each of these tokens belongs to (numbers in `MODALITIES`)."""
    masked: Counter[str]
    """Tokens left out, by reason."""


def modalities(model: Any, processor: Any, input_ids: Tensor, captions: Sequence[str]) -> Tensor:
    """What each token of a batch belongs to, [batch, tokens] uint8, numbers in `MODALITIES`.

    Args:
        model: The MLLM.
        processor: Its processor.
        input_ids: [batch, tokens] of `chat_inputs(processor, captions, ...)`.
        captions: One a stimulus; a caption that its prompt does not show as it is counts as prompt.
    """
    image, prompt, caption = (MODALITIES.index(name) for name in ("image", "prompt", "caption"))
    kinds = torch.full(input_ids.shape, prompt, dtype=torch.uint8)
    for row, text in enumerate(captions):
        with contextlib.suppress(ValueError):
            here = reading_weights(processor, {"input_ids": input_ids[row : row + 1]}, [text], "caption_mean")
            kinds[row, here[0] > 0] = caption
    kinds[torch.isin(input_ids, torch.tensor(sorted(image_token_ids(model))))] = image
    return kinds


def special_ids(model: Any, processor: Any) -> set[int]:
    """Ids of special tokens, without the image's placeholder: at its places stand the image's own patches."""
    tokenizer = processor.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return special - set(image_token_ids(model))


@torch.no_grad()
def read_batch(
    model: Any,
    processor: Any,
    captions: Sequence[str],
    images: Sequence[Image],
    layers: Sequence[int],
    reading: str = "last",
) -> Read:
    """Forward a batch of stimuli, stopping after the last layer needed.

    Args:
        model: The MLLM.
        processor: Its processor.
        captions: One a stimulus; they stand in the user's turn with the image.
        images: One a stimulus.
        layers: Decoder blocks whose output is read, rising.
        reading: See `builders.mllm.reading_weights`.

    Raises:
        ActivationError: an activation is NaN or infinite.
    """
    inputs = chat_inputs(processor, captions, images)
    weights = reading_weights(processor, inputs, captions, reading)
    with capture(model, layers, stop=True) as captured:
        captured.run(**inputs.to(model.device))
    z = torch.stack([captured.activations[layer].cpu() for layer in layers], dim=2)
    attended = inputs["attention_mask"].cpu().bool()
    special = torch.tensor(sorted(special_ids(model, processor)))
    ordinary = attended & ~torch.isin(inputs["input_ids"].cpu(), special)
    _check_finite(z[attended], layers)
    masked = Counter(padding=int((~attended).sum()), special=int((attended & ~ordinary).sum()))
    readings = torch.einsum("bt,btld->bld", weights, z.float())
    kinds = modalities(model, processor, inputs["input_ids"].cpu(), captions)
    tokens, modality = ([row[keep] for row, keep in zip(x, ordinary, strict=True)] for x in (z, kinds))
    return Read(readings, tokens, modality, masked)


def _check_finite(z: Tensor, layers: Sequence[int]) -> None:
    bad = ~torch.isfinite(z).all(-1).all(0)
    if bad.any():
        where = [layer for layer, wrong in zip(layers, bad.tolist(), strict=True) if wrong]
        raise ActivationError(
            f"expected finite activations, got NaN or infinity at layers {where}; "
            "try model.dtype = 'bfloat16' or 'float32'"
        )


def linked_stimuli(corpus: Path, links: Path) -> list[Stimulus]:
    """Unique stimuli that any link names, in the corpus's order.

    Raises:
        ActivationError: there are none.
    """
    wanted = set(pq.read_table(links, columns=["stimulus_id"]).column(0).unique().to_pylist())
    found = []
    columns = ["stimulus_id", "caption", "file"]
    for batch in pq.ParquetFile(corpus / "stimuli.parquet").iter_batches(8_192, columns=columns):
        rows = [row for row in batch.to_pylist() if row["stimulus_id"] in wanted]
        found += [Stimulus(row["stimulus_id"], row["caption"], corpus / row["file"]) for row in rows]
    if not found:
        raise ActivationError(f"expected links to stimuli of the corpus, got none in {links.name}")
    return found


def open_mllm(config: ModelConfig, activations: Path) -> tuple[Any, Any]:
    """The recipe's model and processor, on the GPU where there is one; a tiny one from its folder."""
    place = activations / "model" if config.tiny else config.id
    model, processor = load_mllm(str(place), None if config.tiny else config.revision, config.dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def model_facts(model: Any, config: ModelConfig) -> ModelFacts:
    """Facts of the recipe's model for a release; a folder has an id and a revision where it is published."""
    facts = ModelFacts.of(model)
    if config.published:
        repo, _, revision = config.published.partition("@")
        return dataclasses.replace(facts, id=repo, revision=revision)
    return dataclasses.replace(facts, revision=facts.revision or (config.revision if facts.id else ""))


def run(work: Work) -> None:
    """The stage: shards of `activations.shard_rows` stimuli, in the corpus's order."""
    config = work.recipe.activations
    stimuli = linked_stimuli(work.upstream("corpus"), work.upstream("stimuli") / "links.parquet")
    if work.recipe.model.tiny:
        _save_tiny(work)
    model, processor = open_mllm(work.recipe.model, work.folder)
    starts = range(0, len(stimuli), config.shard_rows)
    for number, start in enumerate(work.progress(starts, unit="shard")):
        if not work.has(f"{number:05d}"):
            with work.shard(f"{number:05d}") as folder:
                _write_shard(work, folder, model, processor, stimuli[start : start + config.shard_rows])
    _finish(work, model, len(stimuli))


def _save_tiny(work: Work) -> None:
    """Build the tiny model from the corpus's captions, whole or not at all."""
    target, partial = work.folder / "model", work.folder / ".model.partial"
    if target.is_dir():
        return
    shutil.rmtree(partial, ignore_errors=True)
    captions = pq.read_table(work.upstream("corpus") / "stimuli.parquet", columns=["caption"]).column(0)
    depth = max(work.recipe.activations.layers) + 2  # one block after the last that is read
    model, processor = tiny_mllm(
        work.recipe.model.tiny, captions.to_pylist(), seed=work.seed, n_layers=max(4, depth)
    )
    for part in (model, processor):
        part.save_pretrained(partial)
    partial.rename(target)


def _write_shard(work: Work, folder: Path, model: Any, processor: Any, stimuli: Sequence[Stimulus]) -> None:
    config = work.recipe.activations
    ids: list[str] = []
    readings, tokens, modality, counts = [], [], [], Counter(stimuli=len(stimuli))
    for start in range(0, len(stimuli), config.batch):
        usable, skipped = _open_images(stimuli[start : start + config.batch], config.reading)
        counts += skipped
        if not usable:
            continue
        batch, images = zip(*usable, strict=True)
        read = read_batch(model, processor, [s.caption for s in batch], images, config.layers, config.reading)
        ids += [s.stimulus_id for s in batch]
        readings.append(read.readings)
        tokens += read.tokens
        modality += read.modality
        counts.update({f"token.{reason}": n for reason, n in read.masked.items()})
    if not ids:
        raise ActivationError(f"expected usable stimuli in a shard, got none of {len(stimuli)}")
    drawn = config.tokens_per_stimulus
    tensors, left_out = keep_tokens(ids, tokens, config.max_norm, drawn, work.seed, modality)
    counts.update({f"token.{reason}": n for reason, n in left_out.items()})
    counts.update({"read": len(ids), "token.kept": len(tensors["tokens"])})
    save_file({"readings": torch.cat(readings)}, folder / "readings.safetensors")
    save_file(tensors, folder / "tokens.safetensors")
    write_atomic(folder / "ids.json", canonical_json(ids))
    write_atomic(folder / "counts.json", canonical_json(dict(counts)))


def _open_images(
    stimuli: Sequence[Stimulus], reading: str
) -> tuple[list[tuple[Stimulus, Image]], Counter[str]]:
    """Stimuli with their images; those that cannot be read are counted."""
    usable, skipped = [], Counter[str]()
    for stimulus in stimuli:
        if reading != "last" and not stimulus.caption.strip():
            skipped["skipped.empty_caption"] += 1
            continue
        try:
            usable.append((stimulus, open_image(stimulus.file)))
        except Exception:  # Pillow's plug-ins agree on no class
            skipped["skipped.unreadable_image"] += 1
    return usable, skipped


def _finish(work: Work, model: Any, n_stimuli: int) -> None:
    total = summed_counts(work.shards())
    tokens = _part(total, "token.")
    kept = tokens.pop("kept", 0)
    facts = {
        "model": dataclasses.asdict(model_facts(model, work.recipe.model)),
        "layers": list(work.recipe.activations.layers),
        "tokens": {"in": kept + sum(tokens.values()), "out": kept, "skipped": tokens},
    }
    write_atomic(work.folder / "facts.json", canonical_json(facts))
    work.finish({"in": n_stimuli, "out": total["read"], "skipped": _part(total, "skipped.")})


def _part(counts: Counter[str], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): n for name, n in sorted(counts.items()) if name.startswith(prefix)}
