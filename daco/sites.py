"""Where to find a model's text trunk and layers, and which model it is; reads models, writes nothing."""

import operator
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import nn

from daco.errors import ModelMismatchError, UnknownLayerError, UnsupportedModelError
from daco.fingerprint import Compared, compare, fingerprint

_CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INNER = ("language_model", "model", "decoder", "transformer")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Config names of the placeholders of images and videos."""
_BLOCKS = ("layers", "h", "blocks")
_STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")
"""Config names of how many residual streams run side by side (Gemma 3n's AltUp, hyper-connections)."""


class Trunk(NamedTuple):
    """The text trunk of a model."""

    layers: nn.ModuleList
    """Its decoder blocks, in order."""
    hidden_size: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    path: str
    """Dotted name of the list of blocks, as in `model.named_modules()`."""


@dataclass(frozen=True)
class ModelFacts:
    """Which model an artefact belongs to."""

    id: str
    """Hub id; empty where unknown (a local folder)."""
    revision: str
    """Commit, tag or branch of the id; empty where unknown."""
    model_type: str
    """`config.model_type`."""
    hidden_size: int
    """Width of the text trunk."""
    n_layers: int
    """Decoder blocks of the text trunk."""
    fingerprint: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Some of its weights, see `daco.fingerprint`; empty where not known."""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Facts of a loaded model.

        Raises:
            UnsupportedModelError: its text trunk cannot be found.
        """
        return replace(cls._named(model), fingerprint=fingerprint(find_trunk(model).layers))

    @classmethod
    def _named(cls, model: nn.Module) -> Self:
        """Facts of a loaded model but its weights."""
        trunk, config = find_trunk(model), transformers_model(model).config
        return cls(*_origin(config), str(config.model_type), trunk.hidden_size, trunk.n_layers)

    def check(self, model: nn.Module, base_model_ok: bool = False) -> str | None:
        """Refuse a model other than this one.

        Args:
            model: The model at hand.
            base_model_ok: Accept another id, revision or weights (a fine-tune, a quantised copy), never
                another shape.

        Returns:
            What could not be confirmed or was overridden, for reports; None where all agrees.

        Raises:
            ModelMismatchError: shape or type differ, or id, revision or weights are known and differ.
        """
        found = self._named(model)
        for name in ("model_type", "hidden_size", "n_layers"):
            if (expected := getattr(self, name)) != (got := getattr(found, name)):
                raise ModelMismatchError(
                    f"expected a model with {name} {expected} ({self.id or 'the artefact'}'s), got {got}; "
                    "load the base model this artefact was made for"
                )
        weights = compare(self.fingerprint, find_trunk(model).layers)
        problems = self._other_origin(found), self._other_weights(weights)
        problem = "; ".join(text for text in problems if text)
        if problem and not base_model_ok:
            raise ModelMismatchError(
                f"{problem}; load that one, or pass base_model_ok=True for a fine-tune or a quantised copy"
            )
        if problem:
            return f"base_model_ok: {problem}"
        if len(weights.same) > len(weights.unknown):  # what the weights say is worth more than a name
            return _not_read(weights)
        return self._unconfirmed(found, base_model_ok, _not_read(weights))

    def _other_origin(self, found: "ModelFacts") -> str | None:
        """Where both sides know id or revision and they differ."""
        if self.id and found.id and self.id != found.id:
            return f"expected base model {self.id}, got {found.id}"
        commits = _COMMIT.fullmatch(self.revision) and _COMMIT.fullmatch(found.revision)
        if commits and self.revision != found.revision:
            return f"expected revision {self.revision} of {self.id}, got {found.revision}"
        return None

    def _other_weights(self, weights: Compared) -> str | None:
        """Where the weights of both sides are known and differ."""
        if not weights.differ:
            return None
        read = len(weights.differ) + len(weights.same)
        return (
            f"expected the weights of {self.id or 'the base model'}, got others in {len(weights.differ)} of "
            f"{read} sampled matrices (block {weights.differ[0].replace('.', ': ', 1)})"
        )

    def _unconfirmed(self, found: "ModelFacts", base_model_ok: bool, not_read: str | None) -> str | None:
        """What is left to say where no weights were compared."""
        behind = f"; {not_read}" if not_read else ""
        if self.id and found.id:
            # transformers does not say which commit it loaded: no cause for alarm, but not confirmed either
            known = _COMMIT.fullmatch(found.revision)
            return not_read if known else f"revision of {found.id} not known{behind}"
        expected = f"expected {self.id}" if self.id else "the artefact names none"
        got = f"got {found.id}" if found.id else "the model at hand has no Hub id"
        note = f"base model not confirmed beyond type and shape: {expected}, {got}{behind}"
        if not base_model_ok:
            warnings.warn(f"{note}; base_model_ok=True silences this", UserWarning, stacklevel=4)
        return note


def _not_read(weights: Compared) -> str | None:
    """What to say of weights that were sampled for the artefact and cannot be read here."""
    if not (n := len(weights.unknown)):
        return None
    total = n + len(weights.same)
    return f"weights not compared in {n} of {total} sampled matrices (quantised, offloaded or adapted)"


def transformers_model(model: nn.Module) -> Any:
    """The transformers model itself, out of a PEFT wrapper if it has one.

    Raises:
        UnsupportedModelError: there is none with a config.
    """
    if not hasattr(model, "peft_config") and hasattr(getattr(model, "config", None), "get_text_config"):
        return model
    if callable(unwrap := getattr(model, "get_base_model", None)):
        return transformers_model(unwrap())
    raise UnsupportedModelError(
        f"expected a transformers model with a config, got {type(model).__name__}; "
        "pass the model whose generate() is called"
    )


def find_trunk(model: nn.Module) -> Trunk:
    """Find the decoder blocks of the text trunk, by the model's own account, and check them with its config.

    A vision tower may have as many blocks or more, so lists of blocks are never compared by length.

    Raises:
        UnsupportedModelError: no decoder has blocks of the config's number and width, or it is the decoder of
            an encoder-decoder, whose prompt stands elsewhere, or there are several residual streams.
    """
    base = transformers_model(model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(base).__name__}: expected a text trunk that reads prompt and answer, got an "
            "encoder-decoder; use a decoder-only model"
        )
    config = base.config.get_text_config(decoder=True)
    streams = max(getattr(config, name, 1) or 1 for name in _STREAMS)
    if streams > 1:
        raise UnsupportedModelError(
            f"{type(base).__name__}: expected a text trunk of one residual stream, got {streams} side by "
            "side, where a direction has no one place; use another model"
        )
    n_layers, width = getattr(config, "num_hidden_layers", -1), getattr(config, "hidden_size", -1)
    decoder = _decoder(base)
    seen = []
    for _ in range(4):  # a decoder may wrap another one, never deeper than this
        layers = _own_blocks(decoder)
        if layers is not None:
            seen.append(f"{len(layers)} blocks of width {_width(decoder)} in {type(decoder).__name__}")
            if (len(layers), _width(decoder)) == (n_layers, width):
                return Trunk(layers, width, n_layers, _path(model, layers))
        decoder = next(
            (inner for name in _INNER if (inner := getattr(decoder, name, None)) is not None), None
        )
        if decoder is None:
            break
    raise UnsupportedModelError(
        f"{type(base).__name__}: expected a text trunk of {n_layers} blocks of width {width} (its config), "
        f"got {'; '.join(seen) or 'no decoder with blocks'}"
    )


def site(model: nn.Module, layer: int) -> nn.Module:
    """The decoder block whose output is the residual stream at `layer`.

    Raises:
        UnknownLayerError: the trunk has no such layer.
        UnsupportedModelError: there is no trunk.
    """
    trunk = find_trunk(model)
    number = operator.index(layer)
    if not 0 <= number < trunk.n_layers:
        raise UnknownLayerError(
            f"expected a layer from 0 to {trunk.n_layers - 1} ({trunk.path}), got {number}"
        )
    return trunk.layers[number]


def image_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids of the placeholders at whose places image or video patches enter the trunk."""
    config = transformers_model(model).config
    found = {getattr(config, name, None) for name in IMAGE_TOKENS}
    return tuple(sorted(token for token in found if isinstance(token, int)))


def _decoder(base: Any) -> Any:
    if hasattr(base, "get_decoder") and (decoder := base.get_decoder()) is not None:
        return decoder
    return getattr(base, "language_model", base)


def _own_blocks(decoder: Any) -> nn.ModuleList | None:
    """The list of blocks that is the decoder's own child."""
    children = dict(decoder.named_children()) if isinstance(decoder, nn.Module) else {}
    lists = (children.get(name) for name in _BLOCKS)
    return next((found for found in lists if isinstance(found, nn.ModuleList)), None)


def _width(decoder: Any) -> int | None:
    """Width of what the embedding feeds into the blocks: the vision tower has no token embedding."""
    try:
        embedding = decoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    width = getattr(embedding, "embedding_dim", None)
    return width if isinstance(width, int) else None


def _path(model: nn.Module, layers: nn.ModuleList) -> str:
    names = [name for name, module in model.named_modules() if module is layers]
    return str(names[0])


def _origin(config: Any) -> tuple[str, str]:
    """Hub id and commit a config was loaded from, where they can be known."""
    name = str(getattr(config, "_name_or_path", "") or "")
    if cached := _CACHED.search(Path(name).as_posix()):
        return f"{cached['org']}/{cached['name']}", cached["commit"]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).exists():
        return "", ""
    return name, str(getattr(config, "_commit_hash", "") or "")
