"""A recipe: one TOML file, one frozen flat dataclass a stage; read, checked, and passed on to every stage.

Reads `recipes/*.toml`; `--set section.field=value` overrides single fields.
"""

import dataclasses
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daco.errors import RecipeError


@dataclass(frozen=True)
class RunConfig:
    """What holds for all stages."""

    name: str = "daco"
    """Name of the run and of the release's files."""
    seed: int = 0
    """Every random choice is drawn from (seed, stage, shard)."""
    threads: int = 2
    """Threads of torch; part of what fixes the bytes of a run."""


@dataclass(frozen=True)
class CorpusConfig:
    """Where caption-image pairs come from."""

    kind: str = "folder"
    """`folder` (image.ext + image.txt), `table` (TSV, CSV or parquet), `coco` (captions JSON), `dataset`
    (a `datasets` data set), `webdataset` (tars of img2dataset, read where they are) or `toyworld` (drawn)."""
    path: str = ""
    """Folder, file or data set id, by kind."""
    images: str = ""
    """Folder of the images of a table or COCO file; default: the file's own folder."""
    image_column: str = "image"
    """Column with the image's path (table) or the image (dataset)."""
    caption_columns: tuple[str, ...] = ("caption",)
    """Columns that make the caption, joined by ", "."""
    caption_separator: str = ""
    """Where set, this character within a caption column reads as ", "."""
    url_column: str = ""
    """Column with the image's URL, if any."""
    key_column: str = ""
    """Column with the pair's key in its source; default: the image's path."""
    config: str = ""
    """Config of a `datasets` data set."""
    split: str = "train"
    """Split of a `datasets` data set."""
    rows: int = 0
    """Read at most this many pairs (toyworld: draw this many); 0 = all."""
    name: str = ""
    """Name of the source in the release."""
    revision: str = ""
    """Revision or date of the source, for the manifest."""
    url: str = ""
    """Page of the source, for the card."""
    licence: str = ""
    """SPDX id of the source's licence; nothing is published without one."""
    redistribute_images: bool = False
    """Whether the licence lets the release carry pixels."""
    allowed: bool = False
    """Whether the owner lets us pass on what is made from it, though the licence by itself does not."""
    shard_rows: int = 512
    """Pairs read in one shard."""


@dataclass(frozen=True)
class ConceptsConfig:
    """Which concepts the dictionary has."""

    source: str = "captions"
    """`captions` (frequent words and names of the corpus), `table` (a TSV with a column `concept`) or
    `wordnet` (15,000 words of WordNet 3.0, with their polarity)."""
    path: str = ""
    """The TSV of `table`: concept, and optionally synset, pos, definition, group, polarity, rationale. Of
    `wordnet`: what `python -m builders vocabulary` wrote; default: the vocabulary that the workshop has."""
    edits: str = ""
    """A TSV that adds, drops and relabels concepts: action, concept, polarity and what a table may have."""
    min_count: int = 3
    """A caption word is a concept when at least this many captions have it."""
    max_concepts: int = 15_000
    """At most this many, the most frequent first; of `wordnet` those labelled before all others."""


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP that embeds images and texts."""

    model: str = ""
    """Hub id or folder of a CLIP or SigLIP model; empty: train a tiny one on the corpus."""
    revision: str = ""
    """Revision of `model`."""
    steps: int = 600
    """Training steps of the tiny CLIP."""
    batch: int = 128
    """Pairs a step."""
    learning_rate: float = 1e-3
    """Peak learning rate (cosine schedule, AdamW)."""
    image_size: int = 32
    """Side of the tiny CLIP's images in pixels."""
    patch_size: int = 8
    """Side of its patches in pixels."""
    hidden: int = 96
    """Width of both towers."""
    n_layers: int = 3
    """Blocks of both towers."""
    vocabulary: int = 2_048
    """Size of its tokenizer, trained on the captions."""
    holdout: float = 0.2
    """Share of the pairs, chosen by hash of stimulus_id, kept out of the tiny CLIP's training."""
    checkpoint_steps: int = 100
    """Steps between checkpoints."""


@dataclass(frozen=True)
class EmbeddingsConfig:
    """Embedding the corpus with the CLIP."""

    path: str = ""
    """A folder that `clip-retrieval inference` wrote; empty: embed here."""
    batch: int = 64
    """Pairs a forward."""
    shard_rows: int = 512
    """Pairs a shard."""


@dataclass(frozen=True)
class StimuliConfig:
    """Positives and negatives of each concept (Eq. 4)."""

    template: str = "{concept}"
    """Text that is embedded for a concept."""
    n_positive: int = 27
    """Positives a concept, at most."""
    min_positive: int = 4
    """A concept with fewer is dropped and counted."""
    pool: int = 65_536
    """Stimuli in the seeded pool of negatives."""
    max_uses: int = 0
    """Concepts that one stimulus may be a positive of, its closest ones; 0 = any number."""
    duplicate_image: float = 0.0
    """A positive whose image has this cosine with a closer one's is dropped and counted; 0 = none is."""
    duplicate_caption: float = 0.0
    """Likewise for captions."""
    spare: int = 37
    """Stimuli retrieved beyond `n_positive` where `max_uses` or a `duplicate_*` may drop some."""
    block: int = 256
    """Concepts a shard; each shard passes over the corpus once, so a large corpus wants many."""
    dtype: str = "float32"
    """`float32` or `bfloat16` proposals; float64 decides, so the result is the same."""
    device: str = "cpu"
    """Where proposals are computed: `cpu` or `cuda`."""
    memory: int = 1_536
    """MiB of working memory beside the embeddings, at most."""
    service: str = ""
    """Address of a `clip-retrieval back` whose index was built from `embeddings.path`: it proposes positives,
    and may miss some; empty: all of the corpus is searched."""
    index: str = ""
    """Name of the index in the service's `indices_paths.json`."""
    proposals: int = 1_000
    """Images, and captions, that the service proposes for a concept."""


@dataclass(frozen=True)
class PolarityConfig:
    """Labels of concepts."""

    annotator: str = ""
    """`list` (a TSV of words), `wordnet` (WordNet's subtrees), `endpoint` (a language model behind HTTP) or
    `mllm` (a local multimodal model); default: `wordnet` for concepts of WordNet, else `list`."""
    path: str = ""
    """TSV: concept, polarity; wins over every annotator. Default of `list`: `recipes/polarity_words.tsv`."""
    model: str = ""
    """Model of `endpoint` or `mllm`: a Hub id, what the endpoint calls it, or a folder."""
    revision: str = ""
    """Revision of the model of `mllm`."""
    base_url: str = ""
    """Server of OpenAI's chat protocol for `endpoint`, its token in the environment variable
    `DACO_ENDPOINT_TOKEN`; empty: a provider of Hugging Face, with the token you are logged in with."""
    provider: str = "auto"
    """Hugging Face's provider of inference for `endpoint`."""
    batch: int = 20
    """Concepts asked for in one prompt."""
    workers: int = 4
    """Prompts that are at the endpoint at once."""
    timeout: float = 120.0
    """Seconds an answer of the endpoint may take."""
    dtype: str = "bfloat16"
    """dtype of the weights of `mllm`."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen MLLM."""

    id: str = ""
    """Hub id or folder of an image-text-to-text model."""
    revision: str = ""
    """Its revision."""
    published: str = ""
    """Where a model of a folder is published, as `repo@revision`: what releases name as their base."""
    name: str = ""
    """Short name in config and repo names, e.g. `qwen2_5_vl_7b`."""
    tiny: str = ""
    """`llava`, `qwen2_5_vl` or `internvl`: a tiny random model of that class instead of `id`, for a try."""
    dtype: str = "float32"
    """dtype of its weights."""


@dataclass(frozen=True)
class ActivationsConfig:
    """One forward pass of the MLLM over the linked stimuli, and over prompts with answers where asked for."""

    layers: tuple[int, ...] = (15, 16, 17, 18, 19)
    """Decoder blocks whose output is read, 0-based."""
    reading: str = "last"
    """Contrastive reading: `last` token of the prompt, `caption_last` token, or `caption_mean`."""
    batch: int = 16
    """Stimuli a forward."""
    shard_rows: int = 128
    """Stimuli a shard."""
    max_norm: float = 10.0
    """Tokens whose norm is over this multiple of the median of all so far are masked and counted."""
    tokens_per_stimulus: int = 0
    """Unmasked tokens of a stimulus kept for the SAE, drawn by (seed, stimulus); 0 = all."""
    modalities: tuple[str, ...] = ("image", "prompt", "caption", "generated")
    """Tokens kept for the SAE, by what they belong to: the `image`, the `prompt` (the chat template, and the
    text of a prompt from `path`), the `caption` of a stimulus, a `generated` (or given) answer."""
    sources: tuple[str, ...] = ("stimuli",)
    """Whence the SAE's tokens are, any of: `stimuli`; `answers`, prompts with the answers of the table at
    `path`; `generated`, its prompts with the model's own greedy answers. Readings are of stimuli always."""
    path: str = ""
    """Table (.parquet, .tsv, .csv or .jsonl) of `prompt`, `answer` and, if any, `image` (relative to it)."""
    max_answer: int = 128
    """Tokens of an answer at most: longer given ones are cut, generated ones end there."""


@dataclass(frozen=True)
class SaeConfig:
    """Training of the SAEs, one a layer."""

    activation: str = "topk"
    """`topk`, `batchtopk` (released as a JumpReLU), `relu` (with an L1 penalty) or `jumprelu` (with an L0
    penalty)."""
    n_atoms: int = 0
    """Atoms; 0: as many as concepts, rounded up to a multiple of 8."""
    k: int = 32
    """Active atoms of TopK; of BatchTopK on average."""
    l1: float = 1e-3
    """lambda of ReLU's L1 penalty."""
    l0: float = 1e-2
    """lambda of JumpReLU's L0 penalty, a price for each active atom."""
    warm_up: float = 0.05
    """Share of the steps over which lambda rises linearly from zero."""
    threshold: float = 0.1
    """Threshold that JumpReLU starts with, in units of the activations' scale."""
    bandwidth: float = 0.1
    """Width over which JumpReLU's thresholds feel a gradient, in the same units."""
    start: str = "dictionary"
    """`dictionary` or `random` start of the decoder."""
    rest: str = "random"
    """Rows beyond the dictionary: `random`, or `pca`, both directions of the principal components of what the
    dictionary leaves over, then random."""
    encoder_scale: str = "one"
    """`one`: the encoder starts as the decoder's transpose; `fit`: as the multiple of it that reconstructs
    the first batch best, so that FVE never starts below zero."""
    b_dec: str = "mean"
    """Start of b_dec: `mean` or (geometric) `median` of the activations."""
    aux_k: int = 0
    """Dead atoms a token that model what the live ones leave over (AuxK); 0 = off."""
    aux_weight: float = 0.03125
    """Weight of that loss."""
    dead_tokens: int = 100_000
    """An atom that did not fire for so many tokens is dead."""
    select: str = "auto"
    """dtype in which TopK and BatchTopK select atoms: `auto`, `float32`, `bfloat16` or `int8`; the values of
    the selected are float32 always. `auto` takes what the machine is quickest in. On a GPU with Triton
    `bfloat16`, which `auto` is there, also rounds what reconstructions and gradients are summed up from
    (decoder rows, errors, activations); sums, weights and Adam are float32. `float32` rounds nothing."""
    steps: int = 500
    """Training steps."""
    batch: int = 512
    """Tokens a step."""
    learning_rate: float = 1e-3
    """Of Adam, constant after a linear warm-up of 5 %."""
    holdout: float = 0.1
    """Share of the pictures, with all their captions, and of the prompts without one, whose tokens are never
    trained on. Chosen by hash of the least id that a picture has."""
    eval_steps: int = 50
    """Steps between measurements."""
    checkpoint_steps: int = 100
    """Steps between checkpoints."""
    eval_tokens: int = 16_384
    """Held-out tokens of a measurement while training goes on, at most; 0 = all. The last one takes all."""


@dataclass(frozen=True)
class AtomsConfig:
    """Labels and names of atoms (Eq. 9)."""

    eta: float = 0.3
    """Cosine threshold of labels."""
    n_nearest: int = 5
    """Nearest concepts kept for each atom."""
    centroids: str = "one"
    """`one` centroid a polarity, as in the paper, or `group`: one for each group of concepts of a polarity,
    the nearest of which counts."""
    min_group: int = 5
    """Groups with fewer concepts of a polarity are taken together."""
    n_top: int = 5
    """Held-out stimuli kept for each atom, those that fire it most."""


@dataclass(frozen=True)
class RecognitionConfig:
    """Telling which concepts a reading shows (`ConceptDictionary.recognise`)."""

    min_precision: float = 0.5
    """A concept is named from the lowest score on at which the name is right this often, among training
    stimuli that were left out in turn; 0: nothing of it is built or released. It adds a vector a concept and
    one a dimension to the dataset: 266 MB a layer of 15,000 concepts and width 3,584, whose directions take
    215. Only who asks for it loads it."""
    folds: int = 5
    """Parts of the stimuli that are left out in turn."""


@dataclass(frozen=True)
class TuneConfig:
    """Choosing how to steer, on validation items; what is chosen stands for `atoms.eta`, `evaluate.gamma` and
    `evaluate.scope`, which are tried as well."""

    path: str = ""
    """A table of prompts, see `builders.judge`, or `toyworld` (drawn); empty: nothing is tried."""
    items: int = 200
    """Items of each kind, at most: the first."""
    eta: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5)
    """Cosine thresholds that are tried."""
    gamma: tuple[float, ...] = (0.0, 0.03, 0.1)
    """Strengths of the desirable shift that are tried, in units of R."""
    scope: tuple[str, ...] = ("prompt", "all")
    """Positions that are tried."""
    single_layers: bool = True
    """Whether each layer alone is tried too, with what did best on all together."""
    budget: int = 64
    """Settings that are tried, at most."""
    allowed: float = 0.02
    """Share of questions, of help and of harmless requests that a chosen setting may cost, at most."""
    batch: int = 16
    """Items asked at once."""
    max_answer: int = 64
    """Tokens of an answer, at most."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Measuring what was built."""

    items: int = 64
    """Held-out stimuli steered, at most: each picture with one caption before any with a second."""
    batch: int = 16
    """Stimuli a forward."""
    splice_items: int = 64
    """Of these stimuli, those on which each layer's SAE is spliced in (cross-entropy recovered of the model's
    own answers), rounded up to whole forwards; 0 = none."""
    gamma: float = 0.0
    """Strength of the desirable shift, in units of R; written as the steering default."""
    scope: str = "all"
    """Positions that are steered, see `daco.steering.SCOPES`; written as the steering default."""


@dataclass(frozen=True)
class ReleaseConfig:
    """What is published, and under which names."""

    org: str = "local"
    """Namespace of the repos."""
    dataset: str = "DACO-400K"
    """Dataset repo."""
    model: str = ""
    """Model repo; default `daco-sae-<model name>`."""
    version: str = "1.0.0"
    """MAJOR.MINOR.PATCH; the tag is `v` + version."""
    licence: str = "cc-by-4.0"
    """Licence of the release itself (concepts, links, directions, SAE)."""
    contact: str = ""
    """Where to ask for removals."""
    removed: str = ""
    """Text file of stimulus ids, one a line, that somebody asked to have removed: they are not released."""
    prompts: str = ""
    """`harmless`: what files of the release hold under names such as `prompt` may go to an open repo."""
    example: str = ""
    """What the model card asks about `example.png` of the base model's repo; empty: a text, no picture."""


@dataclass(frozen=True)
class Recipe:
    """All sections of a recipe file."""

    run: RunConfig = field(default_factory=RunConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    embeddings: EmbeddingsConfig = field(default_factory=EmbeddingsConfig)
    stimuli: StimuliConfig = field(default_factory=StimuliConfig)
    polarity: PolarityConfig = field(default_factory=PolarityConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    atoms: AtomsConfig = field(default_factory=AtomsConfig)
    recognition: RecognitionConfig = field(default_factory=RecognitionConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    release: ReleaseConfig = field(default_factory=ReleaseConfig)


LOCAL_FIELDS = {
    ("corpus", "path"),
    ("corpus", "images"),
    ("concepts", "path"),
    ("concepts", "edits"),
    ("activations", "path"),
    ("polarity", "path"),
    ("polarity", "base_url"),
    ("embeddings", "path"),
    ("stimuli", "service"),
    ("tune", "path"),
    ("release", "removed"),
}
"""Fields that name places on this machine; they never reach a manifest."""


def load_recipe(path: Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file; `overrides` are `section.field=value`.

    Raises:
        RecipeError: the file is missing or no TOML; an unknown section or field; a value of the wrong type.
    """
    try:
        sections: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"expected a recipe file, got none at {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: expected TOML, got {error}") from error
    for override in overrides:
        _override(sections, override)
    return recipe_of(sections)


def recipe_of(sections: dict[str, Any]) -> Recipe:
    """A recipe from a dict of sections; see `load_recipe`."""
    known = {f.name: f.default_factory for f in dataclasses.fields(Recipe)}
    if unknown := sorted(set(sections) - set(known)):
        raise RecipeError(f"unknown section {unknown[0]!r}; expected one of {sorted(known)}")
    built = {
        name: _section(name, typing.cast(type, known[name]), values) for name, values in sections.items()
    }
    recipe = Recipe(**built)
    _check(recipe)
    return recipe


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able facts, without places on this machine."""
    facts = dataclasses.asdict(recipe)
    for section, name in LOCAL_FIELDS:
        facts[section].pop(name)
    for section, name in (("model", "id"), ("clip", "model"), ("polarity", "model")):
        if Path(facts[section][name]).is_dir():
            facts[section].pop(name)
    return facts


def model_name(recipe: Recipe) -> str:
    """Short name of the model in config names: letters, digits and underscores."""
    config = recipe.model
    name = config.name or (f"tiny_{config.tiny}" if config.tiny else config.id.rstrip("/").split("/")[-1])
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def repo_name(recipe: Recipe, kind: str) -> str:
    """Name of the `dataset` or `model` repo that a recipe publishes to, without its namespace."""
    if kind == "dataset":
        return recipe.release.dataset
    return recipe.release.model or f"daco-sae-{model_name(recipe).replace('_', '-')}"


def repo_id(recipe: Recipe, kind: str) -> str:
    """`org/name` of the `dataset` or `model` repo that a recipe publishes to."""
    return f"{recipe.release.org}/{repo_name(recipe, kind)}"


def _section(name: str, config: type, values: object) -> Any:
    if not isinstance(values, dict):
        raise RecipeError(f"[{name}]: expected a table of fields, got {values!r}")
    hints = typing.get_type_hints(config)
    if unknown := sorted(set(values) - set(hints)):
        raise RecipeError(f"[{name}]: unknown field {unknown[0]!r}; expected one of {sorted(hints)}")
    return config(**{key: _typed(f"{name}.{key}", hints[key], value) for key, value in values.items()})


def _typed(where: str, expected: Any, value: object) -> object:
    """Check a TOML value against a field's type; lists become tuples, whole numbers may stand for floats."""
    if isinstance(expected, types.GenericAlias):
        item = expected.__args__[0]
        if not isinstance(value, list):
            raise RecipeError(f"{where}: expected a list, got {value!r}")
        return tuple(_typed(where, item, v) for v in value)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise RecipeError(f"{where}: expected {expected.__name__}, got {value!r}")
    return value


def _override(sections: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise RecipeError(f"--set: expected section.field=value, got {text!r}")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word: a path or a name
    sections.setdefault(section, {})[name] = parsed


_AT_LEAST = {
    0: "run.seed corpus.rows sae.n_atoms activations.tokens_per_stimulus sae.eval_tokens sae.aux_k "
    "evaluate.splice_items atoms.n_top stimuli.max_uses stimuli.spare",
    1: "run.threads corpus.shard_rows concepts.min_count concepts.max_concepts clip.steps clip.batch "
    "clip.image_size clip.patch_size clip.hidden clip.n_layers embeddings.batch embeddings.shard_rows "
    "stimuli.n_positive stimuli.min_positive stimuli.block stimuli.memory stimuli.proposals "
    "activations.batch activations.shard_rows activations.max_answer clip.checkpoint_steps sae.steps "
    "sae.batch sae.eval_steps sae.checkpoint_steps atoms.n_nearest "
    "evaluate.items evaluate.batch tune.items tune.budget tune.batch tune.max_answer polarity.batch "
    "polarity.workers sae.dead_tokens atoms.min_group",
    2: "stimuli.pool recognition.folds",
}
"""Fields of whole numbers, by the least they may be."""

_RANGES = {
    "polarity.timeout": (0.1, 3_600.0),
    "clip.learning_rate": (0.0, 1.0),
    "clip.holdout": (0.0, 1.0),
    "activations.max_norm": (1.0, math.inf),
    "stimuli.duplicate_image": (0.0, 1.0),
    "stimuli.duplicate_caption": (0.0, 1.0),
    "sae.learning_rate": (0.0, 1.0),
    "sae.l1": (0.0, math.inf),
    "sae.l0": (0.0, math.inf),
    "sae.warm_up": (0.0, 1.0),
    "sae.threshold": (1e-6, math.inf),
    "sae.bandwidth": (1e-6, math.inf),
    "sae.aux_weight": (0.0, math.inf),
    "sae.holdout": (0.0, 1.0),
    "atoms.eta": (0.0, 1.0),
    "recognition.min_precision": (0.0, 1.0),
    "evaluate.gamma": (0.0, math.inf),
    "tune.allowed": (0.0, 1.0),
}
"""Fields of real numbers, by the least and the most they may be."""

_REPO_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"


def _check_ranges(recipe: Recipe) -> None:
    for least, names in _AT_LEAST.items():
        for where in names.split():
            if (value := _field(recipe, where)) < least:
                raise RecipeError(f"{where}: expected at least {least}, got {value}")
    for where, (low, high) in _RANGES.items():
        if not (math.isfinite(value := _field(recipe, where)) and low <= value <= high):
            raise RecipeError(f"{where}: expected a number from {low:g} to {high:g}, got {value}")


def _check_release(recipe: Recipe) -> None:
    """What would otherwise fail after hours, when the release is written."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", recipe.release.version):
        raise RecipeError(
            f"release.version: expected MAJOR.MINOR.PATCH like 1.0.0, got {recipe.release.version!r}"
        )
    for where in ("release.org", "release.dataset", "release.model"):
        name = _field(recipe, where)
        if (name or where != "release.model") and not re.fullmatch(_REPO_PART, name):
            raise RecipeError(f"{where}: expected letters, digits, '-', '_' and '.', got {name!r}")


def check_k(config: SaeConfig, n_atoms: int) -> None:
    """Refuse a k that TopK cannot have.

    Raises:
        RecipeError: k is below 1 or above the number of atoms.
    """
    if config.activation in ("topk", "batchtopk") and not 0 < config.k <= n_atoms:
        raise RecipeError(
            f"sae.k: expected 1 to n_atoms = {n_atoms}, got {config.k}; lower k or raise n_atoms"
        )


def _check_annotator(config: PolarityConfig) -> None:
    named = config.model or (config.annotator == "endpoint" and config.base_url)
    if config.annotator in ("endpoint", "mllm") and not named:
        raise RecipeError(f"polarity.model: expected the model of annotator {config.annotator!r}, got none")


def _field(recipe: Recipe, where: str) -> Any:
    section, _, name = where.partition(".")
    return getattr(getattr(recipe, section), name)


SCOPES = ("all", "image", "prompt", "generated", "last")


def _check_tune(config: TuneConfig) -> None:
    """Lists of values that can be steered by, each once, and no more settings than the budget has."""
    for name, most in (("eta", 1.0), ("gamma", math.inf)):
        if wrong := [x for x in getattr(config, name) if not (math.isfinite(x) and 0 <= x <= most)]:
            raise RecipeError(f"tune.{name}: expected numbers from 0 to {most:g}, got {wrong}")
    if unknown := sorted(set(config.scope) - set(SCOPES)):
        raise RecipeError(f"tune.scope: expected some of {SCOPES}, got {unknown}")
    for name in ("eta", "gamma", "scope"):
        values = list(getattr(config, name))
        if not values or len(set(values)) < len(values):
            raise RecipeError(f"tune.{name}: expected at least one value, each once, got {values}")
    n = 1 + len(config.eta) * len(config.gamma) * len(config.scope)
    if n > config.budget:
        raise RecipeError(
            f"tune.budget: expected at least {n}, one for the recipe's own setting and each combination of "
            f"eta, gamma and scope, got {config.budget}"
        )


def _check_sources(config: ActivationsConfig) -> None:
    """Lists of known names, none empty; a table of prompts exactly where it is read."""
    allowed = {
        "sources": ("stimuli", "answers", "generated"),
        "modalities": ("image", "prompt", "caption", "generated"),
    }
    for name, known in allowed.items():
        chosen = list(getattr(config, name))
        if not chosen or len(set(chosen)) < len(chosen) or set(chosen) - set(known):
            raise RecipeError(f"activations.{name}: expected some of {known}, each once, got {chosen}")
    if bool(config.path) != (set(config.sources) != {"stimuli"}):
        raise RecipeError(
            "activations.path: expected a table of prompts where activations.sources has 'answers' or "
            f"'generated', and none elsewhere, got {config.path!r} for {list(config.sources)}"
        )


def _check(recipe: Recipe) -> None:
    """Ranges and choices; the first broken one is raised."""
    _check_ranges(recipe)
    _check_release(recipe)
    if recipe.sae.n_atoms:
        check_k(recipe.sae, recipe.sae.n_atoms)
    choices = {
        "corpus.kind": (recipe.corpus.kind, ("folder", "table", "coco", "dataset", "webdataset", "toyworld")),
        "concepts.source": (recipe.concepts.source, ("captions", "table", "wordnet")),
        "stimuli.dtype": (recipe.stimuli.dtype, ("float32", "bfloat16")),
        "stimuli.device": (recipe.stimuli.device, ("cpu", "cuda")),
        "polarity.annotator": (recipe.polarity.annotator, ("", "list", "wordnet", "endpoint", "mllm")),
        "polarity.dtype": (recipe.polarity.dtype, ("float32", "bfloat16", "float16")),
        "model.dtype": (recipe.model.dtype, ("float32", "bfloat16", "float16")),
        "model.tiny": (recipe.model.tiny, ("", "llava", "qwen2_5_vl", "internvl")),
        "activations.reading": (recipe.activations.reading, ("last", "caption_last", "caption_mean")),
        "sae.activation": (recipe.sae.activation, ("topk", "batchtopk", "relu", "jumprelu")),
        "sae.rest": (recipe.sae.rest, ("random", "pca")),
        "sae.encoder_scale": (recipe.sae.encoder_scale, ("one", "fit")),
        "sae.b_dec": (recipe.sae.b_dec, ("mean", "median")),
        "sae.select": (recipe.sae.select, ("auto", "float32", "bfloat16", "int8")),
        "atoms.centroids": (recipe.atoms.centroids, ("one", "group")),
        "sae.start": (recipe.sae.start, ("dictionary", "random")),
        "evaluate.scope": (recipe.evaluate.scope, SCOPES),
        "release.prompts": (recipe.release.prompts, ("", "harmless")),
    }
    for where, (value, allowed) in choices.items():
        if value not in allowed:
            raise RecipeError(f"{where}: expected one of {allowed}, got {value!r}")
    layers = list(recipe.activations.layers)
    if not layers or layers != sorted(set(layers)) or layers[0] < 0:
        raise RecipeError(f"activations.layers: expected rising layer numbers from 0, got {layers}")
    if recipe.clip.image_size % recipe.clip.patch_size:
        raise RecipeError(
            f"clip.image_size: expected a multiple of clip.patch_size = {recipe.clip.patch_size}, "
            f"got {recipe.clip.image_size}"
        )
    if recipe.model.id and recipe.model.tiny:
        raise RecipeError(
            f"model: expected `id` or `tiny`, got both ({recipe.model.id!r}, {recipe.model.tiny!r}); "
            "for a real model add `--set model.tiny=`"
        )
    if not recipe.model.id and not recipe.model.tiny:
        raise RecipeError("model: expected an `id` (Hub id or folder) or `tiny`, got neither")
    if recipe.model.published and not re.fullmatch(rf"{_REPO_PART}/{_REPO_PART}@\S+", recipe.model.published):
        raise RecipeError(f"model.published: expected `org/name@revision`, got {recipe.model.published!r}")
    _check_annotator(recipe.polarity)
    _check_sources(recipe.activations)
    _check_tune(recipe.tune)
    if recipe.stimuli.service and not recipe.embeddings.path:
        raise RecipeError(
            "stimuli.service: expected embeddings.path, which its index was built from, got none"
        )
    if "{concept}" not in recipe.stimuli.template:
        raise RecipeError(f"stimuli.template: expected '{{concept}}' in it, got {recipe.stimuli.template!r}")
