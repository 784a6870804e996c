"""One forward pass of the frozen MLLM over every linked stimulus: contrastive readings, tokens for the SAEs.

Reads `corpus/`, `stimuli/links.parquet` and, where the recipe asks for them, a table of prompts; writes
`activations/facts.json`, a folder a shard with `ids.json`, `sides.json` (what is held out together),
`counts.json`, `readings.safetensors` (of stimuli) and `tokens.safetensors` (of the sources), and `model/` for
a tiny model.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from builders.answers import read_answers
from builders.corpus import open_image
from builders.forward import Prepared, Read, prepared, read_prepared
from builders.mllm import load_mllm
from builders.prefetch import prefetched
from builders.prompts import Prompt, check_prompts, read_prompts
from builders.recipe import ActivationsConfig, ModelConfig, Recipe
from builders.stages import Work, summed_counts, writing
from builders.tiny import tiny_mllm
from builders.token_choice import keep_tokens
from builders.tokens import MODALITIES, SIDES, sides_of, with_tokens
from daco.errors import ActivationError
from daco.manifest import canonical_json, sha256_file, write_atomic
from daco.sites import ModelFacts


class Stimulus(NamedTuple):
    """A caption-image pair to be read."""

    stimulus_id: str
    """Its id."""
    caption: str
    """Text of the user's turn."""
    file: Path
    """Its image."""
    picture: str
    """sha256 of it."""


def linked_stimuli(corpus: Path, links: Path) -> list[Stimulus]:
    """Unique stimuli that any link names, in the corpus's order.

    Raises:
        ActivationError: there are none.
    """
    wanted = set(pq.read_table(links, columns=["stimulus_id"]).column(0).unique().to_pylist())
    found = []
    columns = ["stimulus_id", "caption", "file", "image_sha256"]
    for batch in pq.ParquetFile(corpus / "stimuli.parquet").iter_batches(8_192, columns=columns):
        rows = (row for row in batch.to_pylist() if row["stimulus_id"] in wanted)
        found += [
            Stimulus(row["stimulus_id"], row["caption"], corpus / row["file"], row["image_sha256"])
            for row in rows
        ]
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


class Job(NamedTuple):
    """A shard to be written."""

    source: str
    """`stimuli`, `answers` or `generated`."""
    name: str
    """Of its folder; the stimuli's come first."""
    items: Sequence[Any]
    """The `Stimulus` or `Prompt` objects that it reads."""


class Shard(NamedTuple):
    """What the forwards of a shard gave."""

    ids: list[str]
    """Of the stimuli or prompts that were read."""
    reads: list[Read]
    """A batch each."""
    counts: Counter[str]
    """What was skipped, by reason."""


def check(recipe: Recipe) -> None:
    """Raise CorpusError where the table of prompts is missing or lacks a column."""
    for source in table_sources(recipe.activations):
        check_prompts(Path(recipe.activations.path), source)


def table_sources(config: ActivationsConfig) -> list[str]:
    """The sources that read the table of prompts, in order."""
    return [source for source in ("answers", "generated") if source in config.sources]


def run(work: Work) -> None:
    """The stage: shards of `activations.shard_rows` stimuli, in the corpus's order, then of prompts."""
    config = work.recipe.activations
    stimuli = linked_stimuli(work.upstream("corpus"), work.upstream("stimuli") / "links.parquet")
    jobs, n_in, skipped = jobs_of("stimuli", stimuli, config.shard_rows), len(stimuli), Counter[str]()
    asked: list[Prompt] = []
    for source in table_sources(config):
        prompts, unusable = read_prompts(Path(config.path), source)
        jobs += jobs_of(source, prompts, config.shard_rows)
        n_in, skipped = n_in + len(prompts) + unusable.total(), skipped + unusable
        asked += prompts
    sides = sides_of({s.stimulus_id: s.picture for s in stimuli} | pictures_of(asked))
    if work.recipe.model.tiny:
        _save_tiny(work)
    model, processor = open_mllm(work.recipe.model, work.folder)
    before: Tensor | None = None
    for job in work.progress(jobs, unit="shard"):
        if not work.has(job.name):
            with work.shard(job.name) as folder:
                read = _read(model, processor, config, job)
                with writing(f"the activations of shard {job.name}"):
                    _write_shard(folder, job, read, config, work.seed, before)
                    write_atomic(folder / SIDES, canonical_json([sides[i] for i in read.ids]))
        before = counts_so_far(before, work.folder / "shards" / job.name)
    _finish(work, model, n_in, skipped)


def pictures_of(prompts: Sequence[Prompt]) -> dict[str, str]:
    """By id, sha256 of the picture; empty for prompts without one, or with one that cannot be read."""
    files = {prompt.image for prompt in prompts if prompt.image}
    known = {file: _sha256(file) for file in files}
    return {prompt.prompt_id: known[prompt.image] if prompt.image else "" for prompt in prompts}


def _sha256(file: Path) -> str:
    try:
        return sha256_file(file)
    except OSError:  # counted where it is opened
        return ""


def jobs_of(source: str, items: Sequence[Any], size: int) -> list[Job]:
    """The shards of a source, `size` items each, in order."""
    prefix = "" if source == "stimuli" else f"{source}-"
    parts = (items[start : start + size] for start in range(0, len(items), size))
    return [Job(source, f"{prefix}{number:05d}", part) for number, part in enumerate(parts)]


def _read(model: Any, processor: Any, config: ActivationsConfig, job: Job) -> Shard:
    forward = read_stimuli_shard if job.source == "stimuli" else read_prompt_shard
    shard = forward(model, processor, config, job.items)
    if not shard.ids:
        raise ActivationError(
            f"expected usable stimuli in a shard, got none of {len(job.items)} ({dict(shard.counts)})"
        )
    return shard


def read_stimuli_shard(
    model: Any, processor: Any, config: ActivationsConfig, stimuli: Sequence[Stimulus]
) -> Shard:
    """Forward stimuli, `activations.batch` at a time, the next inputs being made meanwhile.

    A plain function, to run anywhere.

    Raises:
        ActivationError: an activation is NaN or infinite.
    """
    shard = Shard([], [], Counter())
    batches = (stimuli[start : start + config.batch] for start in range(0, len(stimuli), config.batch))
    for ids, batch, skipped in prefetched(lambda b: _prepared(model, processor, config, b), batches):
        shard.counts.update(skipped)
        if batch is not None:
            shard.reads.append(read_prepared(model, processor, batch, config.layers))
            shard.ids.extend(ids)
    return shard


def _prepared(
    model: Any, processor: Any, config: ActivationsConfig, stimuli: Sequence[Stimulus]
) -> tuple[list[str], Prepared | None, Counter[str]]:
    """Ids of those that can be read, the batch of them, if any, and why the others cannot."""
    usable, skipped = _open_images(stimuli, config.reading)
    if not usable:
        return [], None, skipped
    captions, images = [s.caption for s, _ in usable], [image for _, image in usable]
    batch = prepared(model, processor, captions, images, config.reading)
    return [s.stimulus_id for s, _ in usable], batch, skipped


def read_prompt_shard(
    model: Any, processor: Any, config: ActivationsConfig, prompts: Sequence[Prompt]
) -> Shard:
    """Forward prompts with their answers, those with an image first; else as `read_stimuli_shard`."""
    shard = Shard([], [], Counter())
    for group in ([p for p in prompts if p.image], [p for p in prompts if not p.image]):
        batches = (group[start : start + config.batch] for start in range(0, len(group), config.batch))
        for usable, skipped in prefetched(_open_prompt_images, batches):
            shard.counts.update(skipped)
            if not usable:
                continue
            batch, images = zip(*usable, strict=True)
            answers = [p.answer for p in batch]
            shard.reads.append(
                read_answers(
                    model,
                    processor,
                    [p.prompt for p in batch],
                    images if images[0] else None,
                    None if None in answers else answers,
                    config.layers,
                    config.max_answer,
                )
            )
            shard.ids.extend(p.prompt_id for p in batch)
    return shard


def _open_prompt_images(prompts: Sequence[Prompt]) -> tuple[list[tuple[Prompt, Image | None]], Counter[str]]:
    """Prompts with their images, if any; those that cannot be read are counted."""
    usable: list[tuple[Prompt, Image | None]] = []
    skipped = Counter[str]()
    for prompt in prompts:
        try:
            usable.append((prompt, open_image(prompt.image) if prompt.image else None))
        except Exception:  # Pillow's plug-ins agree on no class
            skipped["skipped.unreadable_image"] += 1
    return usable, skipped


def counts_so_far(before: Tensor | None, shard: Path) -> Tensor | None:
    """Norms counted in earlier shards and in this one; see `builders.token_choice`."""
    if not with_tokens([shard]):
        return before
    with safe_open(shard / "tokens.safetensors", "pt") as file:
        counts = file.get_tensor("norm_counts").long()
    return counts if before is None else before + counts


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


def _write_shard(
    folder: Path, job: Job, read: Shard, config: ActivationsConfig, seed: int, before: Tensor | None
) -> None:
    """The shard's readings, where there are any, and its tokens, where they are a source."""
    counts = Counter(stimuli=len(job.items), read=len(read.ids), **read.counts)
    if job.source == "stimuli":
        readings = torch.cat([batch.readings for batch in read.reads])
        save_file({"readings": readings}, folder / "readings.safetensors")
    if job.source in config.sources:
        tensors, left_out = _tokens(read, config, seed, before)
        save_file(tensors, folder / "tokens.safetensors")
        for masked in (*(batch.masked for batch in read.reads), left_out):
            counts.update({f"token.{reason}": n for reason, n in masked.items()})
        counts["token.kept"] = len(tensors["tokens"])
        kinds = torch.bincount(tensors["modality"].long(), minlength=len(MODALITIES)).tolist()
        counts.update({f"kind.{name}": n for name, n in zip(MODALITIES, kinds, strict=True)})
    write_atomic(folder / "ids.json", canonical_json(read.ids))
    write_atomic(folder / "counts.json", canonical_json(dict(counts)))


def _tokens(
    read: Shard, config: ActivationsConfig, seed: int, before: Tensor | None
) -> tuple[dict[str, Tensor], Counter[str]]:
    return keep_tokens(
        read.ids,
        [z for batch in read.reads for z in batch.tokens],
        config.max_norm,
        config.tokens_per_stimulus,
        seed,
        [kind for batch in read.reads for kind in batch.modality],
        wanted=config.modalities,
        before=before,
        norms=[norms for batch in read.reads for norms in batch.norms],
    )


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


def _finish(work: Work, model: Any, n_in: int, unusable: Counter[str]) -> None:
    total = summed_counts(work.shards())
    total.update(unusable)
    tokens = _part(total, "token.")
    kept = tokens.pop("kept", 0)
    facts = {
        "model": dataclasses.asdict(model_facts(model, work.recipe.model)),
        "layers": list(work.recipe.activations.layers),
        "tokens": {"in": kept + sum(tokens.values()), "out": kept, "skipped": tokens},
        "modalities": _part(total, "kind."),
    }
    write_atomic(work.folder / "facts.json", canonical_json(facts))
    work.finish({"in": n_in, "out": total["read"], "skipped": _part(total, "skipped.")})


def _part(counts: Counter[str], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): n for name, n in sorted(counts.items()) if name.startswith(prefix)}
