"""Stage `clip`: the CLIP that embeds images and texts: any CLIP or SigLIP, or a tiny one trained here.

Reads `corpus/stimuli.parquet` and its images; writes `model/` (a `transformers.CLIPModel` and its processor),
`training.parquet` and `facts.json`. With `recipe.clip.model` set it trains nothing and writes only
`facts.json`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from builders.corpus import image_file, open_image
from builders.recipe import ClipConfig
from builders.stages import Work
from builders.vision import ensure_torchvision
from builders.vocabulary import words
from daco.errors import ActivationError, ArtefactNotFoundError, CorpusError, UnsupportedModelError
from daco.manifest import canonical_json, write_atomic
from daco.tables import read_table, write_table

ensure_torchvision()  # before transformers looks at torchvision

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

transformers.utils.logging.disable_progress_bar()  # stages have their own

MAX_TOKENS = 48
"""Positions of the tiny CLIP's text tower."""

MARGIN = 8
"""Training images are cached one part in `MARGIN` larger than they are seen: room for random crops."""

WEIGHT_DECAY = 0.1
WHOLE = 0.1
"""Share of the batches that train on whole captions."""

MAX_LOGIT_SCALE = math.log(100)

CURVE = pa.schema(
    [("step", pa.int32()), ("loss", pa.float64()), ("accuracy", pa.float64()), ("rate", pa.float64())]
)
"""Columns of `training.parquet`: accuracy is the share of a batch's images whose best text is a true one."""


@dataclass(frozen=True)
class Clip:
    """A CLIP or SigLIP and its processor, ready to embed."""

    model: Any
    """A `transformers` model with `get_image_features` and `get_text_features`."""
    processor: Any
    """Its processor: images and texts to tensors."""

    def pixels(self, images: Sequence[Image.Image]) -> Any:
        """What the model takes of RGB images, on the CPU; several threads may call it at once."""
        return self.processor(images=list(images), return_tensors="pt")

    @torch.no_grad()
    def embed_pixels(self, pixels: Any) -> Tensor:
        """Unit embeddings [n, d] in float32, on the CPU, of what `pixels` gives."""
        return _unit(self.model.get_image_features(**pixels.to(self.model.device)))

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings [n, d] in float32, on the CPU, of RGB images."""
        return self.embed_pixels(self.pixels(images))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings [n, d] in float32, on the CPU; padding is full: a row depends on its text alone."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            split_special_tokens=True,  # a caption that spells a special token stays text
            return_tensors="pt",
        )
        allowed = ("input_ids", "attention_mask")
        given = {k: v.to(self.model.device) for k, v in tokens.items() if k in allowed}
        return _unit(self.model.get_text_features(**given))


def _unit(features: Any) -> Tensor:
    pooled = features if isinstance(features, Tensor) else features.pooler_output
    return functional.normalize(pooled.float(), dim=-1).cpu()


def load_clip(name: str | Path, revision: str = "") -> Clip:
    """Load a CLIP or SigLIP by Hub id or folder, onto the GPU if there is one.

    Raises:
        ArtefactNotFoundError: there is no such model, or it cannot be read.
        UnsupportedModelError: it is no two-tower image-text model.
    """
    try:
        model = AutoModel.from_pretrained(name, revision=revision or None, use_safetensors=True).eval()
        processor = AutoProcessor.from_pretrained(name, revision=revision or None)
    except (OSError, ValueError) as error:
        raise ArtefactNotFoundError(
            f"expected a CLIP or SigLIP at {str(name)!r}, got {error}; check clip.model and clip.revision"
        ) from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise UnsupportedModelError(
            f"{name}: expected a CLIP or SigLIP, got {type(model).__name__}; choose another"
        )
    return Clip(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor)


def clip_of(work: Work) -> Clip:
    """The run's CLIP: the recipe's model at the revision that stage `clip` found, or the one it trained."""
    folder, config = work.upstream("clip"), work.recipe.clip
    if not config.model:
        return load_clip(folder / "model")
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    return load_clip(config.model, facts["revision"])


# The tiny CLIP.


def train_tokenizer(captions: Sequence[str], vocabulary: int) -> CLIPTokenizer:
    """A CLIP tokenizer (lower case, byte-level BPE) of at most `vocabulary` tokens, from `captions`.

    The 514 tokens of bytes and ends are always there.
    """
    untrained = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer, tokenizer.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    letters = byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        # Every byte may end a word, also an unseen one; named here, their ids are fixed, which break ties of
        # merg
        special_tokens=[f"{letter}</w>" for letter in letters],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learnt = tokenizer.get_vocab()
    tokens = [*sorted(learnt, key=learnt.__getitem__), "<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges, model_max_length=MAX_TOKENS)


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, sorted."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tiny_processor(config: ClipConfig, captions: Sequence[str]) -> CLIPProcessor:
    """The tiny CLIP's processor: a tokenizer trained on `captions`, images of `config.image_size` pixels."""
    side = config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return CLIPProcessor(images, train_tokenizer(captions, config.vocabulary))


def tiny_model(config: ClipConfig, tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """An untrained `CLIPModel` of the recipe's size, its weights drawn from `seed`."""
    tower = {
        "hidden_size": config.hidden,
        "intermediate_size": 4 * config.hidden,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": max(1, config.hidden // 32),
        "projection_dim": config.hidden,
        "hidden_act": "gelu",  # one fused operation; CLIP's own quick_gelu is three
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": config.image_size, "patch_size": config.patch_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(
            CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=config.hidden)
        )


def is_held_out(stimulus_id: str, share: float) -> bool:
    """Whether a stimulus is kept out of training; its id alone decides, however the corpus grows."""
    return int(stimulus_id[:8], 16) < share * 2**32


def cache_images(files: Sequence[Path], side: int) -> Tensor:
    """Images [n, 3, side, side] in uint8: the shorter edge resized to `side`, then the centre cropped."""
    cache = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    for row, file in zip(cache, files, strict=True):
        row.copy_(square(open_image(file), side))
    return cache


def square(image: Image.Image, side: int) -> Tensor:
    """One image as uint8 [3, side, side], cropped as the processor does it."""
    scale = side / min(image.size)
    width, height = (max(side, round(edge * scale)) for edge in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(resized.crop((left, top, left + side, top + side)), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def augment(images: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """A random crop of `side` pixels of every image, half of them mirrored; uint8 in and out."""
    room = images.shape[-1] - side
    offsets = rng.integers(0, room + 1, size=(len(images), 2))
    mirrored = rng.random(len(images)) < 0.5
    crops = [
        image[:, y : y + side, x : x + side].flip(-1) if flip else image[:, y : y + side, x : x + side]
        for image, (y, x), flip in zip(images, offsets.tolist(), mirrored.tolist(), strict=True)
    ]
    return torch.stack(crops)


def sample_texts(captions: Sequence[str], counts: Mapping[str, int], rng: np.random.Generator) -> list[str]:
    """A text for every caption of a batch: whole ones in one batch of ten, else parts (short, cheap)."""
    if rng.random() < WHOLE:
        return list(captions)
    return [sample_part(caption, counts, rng) for caption in captions]


def sample_part(caption: str, counts: Mapping[str, int], rng: np.random.Generator) -> str:
    """Part of a caption, so that single words learn their images too.

    A caption of comma-joined keywords gives its first part (the name) half of the time, else up to three of
    its parts; a sentence gives one of its words half of the time, rare ones more often, else a run of them.

    Args:
        caption: The whole of it.
        counts: How many captions have a word; missing means one.
        rng: Source of the draw.
    """
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    if len(parts) > 1:
        if rng.random() < 0.5:
            return parts[0]
        size = int(rng.integers(1, min(3, len(parts)) + 1))
        return ", ".join(parts[i] for i in rng.permutation(len(parts))[:size])
    if rng.random() < 0.5 and (telling := words(caption)):
        weights = np.array([1 / counts.get(word, 1) for word in telling])
        return telling[int(rng.choice(len(telling), p=weights / weights.sum()))]
    tokens = caption.split()
    size = int(rng.integers(1, len(tokens) + 1))
    start = int(rng.integers(0, len(tokens) - size + 1))
    return " ".join(tokens[start : start + size])


def truth(texts: Sequence[str], captions: Sequence[str]) -> Tensor:
    """[n, n] bool: row i, column j says that text j is true of image i: all its words are in caption i."""
    asked, known = ([frozenset(re.findall(r"\w+", t.lower())) for t in side] for side in (texts, captions))
    true = torch.tensor([[text <= caption for text in asked] for caption in known])
    return true | torch.eye(len(texts), dtype=torch.bool)


class Loss(NamedTuple):
    """What one batch gives."""

    loss: Tensor
    """Symmetric InfoNCE, a scalar."""
    accuracy: float
    """Share of the images whose best text is a true one."""


def info_nce(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor) -> Loss:
    """Symmetric InfoNCE where a text that is true of several images is no negative of any of them.

    Args:
        images: Unit embeddings [n, d].
        texts: Unit embeddings [n, d]; row i belongs to image i.
        scale: Logit scale, already exponentiated.
        true: [n, n] bool of `truth`; the diagonal is true.
    """
    logits = scale * images @ texts.T
    positive = logits.diagonal()
    ignored = true & ~torch.eye(len(true), dtype=torch.bool)
    masked = logits.masked_fill(ignored, -torch.inf)
    by_image = (torch.logsumexp(masked, dim=1) - positive).mean()
    by_text = (torch.logsumexp(masked, dim=0) - positive).mean()
    best = logits.argmax(dim=1)
    return Loss((by_image + by_text) / 2, true[torch.arange(len(true)), best].float().mean().item())


def batch_rows(n: int, batch: int, seed: int, step: int) -> np.ndarray[Any, Any]:
    """Rows of a step's batch: every epoch is a permutation drawn from (seed, epoch), cut into batches."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = places // n
    orders = {e: np.random.default_rng([seed, 1, e]).permutation(n) for e in np.unique(epochs).tolist()}
    return np.array([orders[e][p] for e, p in zip(epochs.tolist(), (places % n).tolist(), strict=True)])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Trainer:
    """The tiny CLIP in training: `step()` is one batch; `save` and `restore` are exact.

    Args:
        config: Sizes, steps and rates.
        images: [n, 3, s, s] uint8 of the training pairs, s a little over `config.image_size`.
        captions: Their captions.
        seed: Every draw is from (seed, step).
    """

    def __init__(self, config: ClipConfig, images: Tensor, captions: Sequence[str], seed: int) -> None:
        self.config, self.images, self.captions, self.seed = config, images, captions, seed
        self.counts = Counter(word for caption in captions for word in set(words(caption)))
        self.processor = tiny_processor(config, captions)
        self.model = tiny_model(config, self.processor.tokenizer, seed)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True
        )
        normal = self.processor.image_processor
        self.mean = torch.tensor(normal.image_mean).view(3, 1, 1)
        self.std = torch.tensor(normal.image_std).view(3, 1, 1)
        self.done = 0
        self.curve: list[dict[str, Any]] = []

    def step(self) -> None:
        """One batch: draw, embed both sides, step.

        Raises:
            ActivationError: the loss is NaN or infinite.
        """
        rate = learning_rate(self.done, self.config.steps, self.config.learning_rate)
        for group in self.adam.param_groups:
            group["lr"] = rate
        loss, accuracy = self._loss()
        if not torch.isfinite(loss):
            raise ActivationError(
                f"clip step {self.done}: expected a finite loss, got {loss.item()}; lower clip.learning_rate"
            )
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        self.curve.append({"step": self.done, "loss": loss.item(), "accuracy": accuracy, "rate": rate})
        self.done += 1

    def _loss(self) -> Loss:
        size = min(self.config.batch, len(self.captions))
        rows = batch_rows(len(self.captions), size, self.seed, self.done)
        rng = np.random.default_rng([self.seed, 2, self.done])
        captions = [self.captions[row] for row in rows]
        texts = sample_texts(captions, self.counts, rng)
        pixels = augment(self.images[rows], self.config.image_size, rng)
        return info_nce(
            _unit(self.model.get_image_features((pixels / 255 - self.mean) / self.std)),
            self._embed(texts),
            self.model.logit_scale.exp(),
            truth(texts, captions),
        )

    def _embed(self, texts: Sequence[str]) -> Tensor:
        tokens = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, split_special_tokens=True, return_tensors="pt"
        )
        return _unit(self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]))

    def save(self, folder: Path) -> None:
        """Write weights, Adam's moments and the curve so far."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            state = self.adam.state[parameter]
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
            tensors[f"weight.{name}"] = parameter.detach()
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, folder / "checkpoint.safetensors"
        )
        write_table(folder / "training.parquet", pa.Table.from_pylist(self.curve, schema=CURVE))

    def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        tensors = load_file(folder / "checkpoint.safetensors")
        self.curve = read_table(folder / "training.parquet").to_pylist()
        self.done = len(self.curve)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                moments = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
                self.adam.state[parameter] = {"step": torch.tensor(float(self.done)), **moments}

    def write(self, folder: Path) -> None:
        """Write the model and its processor, as `AutoModel` and `AutoProcessor` read them."""
        self.model.save_pretrained(folder)
        backend = self.processor.tokenizer.backend_tokenizer
        backend.no_truncation()  # else the file tells how the tokenizer was last called, if it was
        backend.no_padding()
        self.processor.save_pretrained(folder)


def train_steps(work: Work, trainer: Trainer) -> Iterator[int]:
    """Train to the end, writing a checkpoint every `checkpoint_steps`; yields after each step."""
    config = trainer.config
    if checkpoints := work.shards():
        trainer.restore(checkpoints[-1])
    while trainer.done < config.steps:
        trainer.step()
        if trainer.done % config.checkpoint_steps == 0 or trainer.done == config.steps:
            with work.shard(f"step-{trainer.done:08d}") as folder:
                trainer.save(folder)
        yield trainer.done


def training_rows(corpus: Path, holdout: float) -> tuple[list[Path], list[str], int]:
    """Image files and captions to train on, and how many pairs were held out.

    Raises:
        CorpusError: fewer than two pairs are left.
    """
    table = read_table(corpus / "stimuli.parquet").select(["stimulus_id", "file", "caption"]).to_pylist()
    kept = [row for row in table if not is_held_out(row["stimulus_id"], holdout)]
    if len(kept) < 2:
        raise CorpusError(f"expected at least 2 pairs to train a CLIP on, got {len(kept)} of {len(table)}")
    files = [image_file(corpus, row["file"]) for row in kept]
    return files, [row["caption"] for row in kept], len(table) - len(kept)


def run(work: Work) -> None:
    """Train the tiny CLIP, or note which model is used."""
    config = work.recipe.clip
    if config.model:
        _note(work, config)
        return
    torch.set_num_threads(work.recipe.run.threads)
    files, captions, n_held_out = training_rows(work.upstream("corpus"), config.holdout)
    images = cache_images(files, config.image_size + config.image_size // MARGIN)
    trainer = Trainer(config, images, captions, work.seed)
    for _ in work.progress(train_steps(work, trainer), total=config.steps, unit="step"):
        pass
    _seal(work, trainer, n_held_out)


def _note(work: Work, config: ClipConfig) -> None:
    """Load the recipe's model once, so that a wrong one ends the run here, and note its revision."""
    found = load_clip(config.model, config.revision).model.config
    local = Path(config.model).is_dir()
    facts = {
        "id": Path(config.model).name if local else config.model,
        "revision": config.revision or getattr(found, "_commit_hash", None) or "",
        "model_type": found.model_type,
    }
    write_atomic(work.folder / "facts.json", canonical_json(facts))
    work.drop_shards()
    work.finish({"in": 0, "out": 0, "skipped": {}})


def _seal(work: Work, trainer: Trainer, n_held_out: int) -> None:
    trainer.write(work.folder / "model")
    write_table(work.folder / "training.parquet", pa.Table.from_pylist(trainer.curve, schema=CURVE))
    n = len(trainer.captions)
    facts = {
        "id": "tiny CLIP trained on the corpus",
        "n_train": n,
        "n_holdout": n_held_out,
        "n_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.done,
        "loss": trainer.curve[-1]["loss"] if trainer.curve else None,
    }
    write_atomic(work.folder / "facts.json", canonical_json(facts))
    work.drop_shards()
    work.finish({"in": n + n_held_out, "out": n, "skipped": {"held_out": n_held_out} if n_held_out else {}})
