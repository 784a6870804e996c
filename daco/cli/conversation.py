"""A conversation with a model that may be steered: turns, settings, one answer at a time; no terminal."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer

from daco.cli.show import plain
from daco.methods import SAESteering
from daco.prompts import chat_inputs, tokenizer_of, turn
from daco.report import FiredAtom, Report
from daco.steering import steer
from daco.steering_sae import SteeringSAE


@dataclass(frozen=True)
class Settings:
    """How answers are steered."""

    on: bool = True
    """Whether they are."""
    gamma: float | None = None
    """Strength of the desirable shift; None is the release's."""
    eta: float | None = None
    """Cosine threshold of labels; None takes the labels as released."""
    scope: str = "all"
    """Positions that are steered."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    base_model_ok: bool = False
    """Whether another base model is accepted."""


class Answer(NamedTuple):
    """What the model said."""

    text: str
    """As it was decoded."""
    report: Report | None
    """What steering did; None where it was off."""

    @property
    def atoms(self) -> list[tuple[int, FiredAtom]]:
        """(layer, atom) of all that was removed, the largest total strength first."""
        found = (
            [(layer.layer, atom) for layer in self.report.layers for atom in layer.atoms]
            if self.report
            else []
        )
        return sorted(found, key=lambda one: -abs(one[1].mean_strength * one[1].positions))


@dataclass
class Conversation:
    """Turns that are rendered anew for each answer, so that steering acts on all of them alike."""

    model: Any
    """The transformers model."""
    processor: Any
    """Its processor, or its tokenizer."""
    sae: SteeringSAE
    """What steers it."""
    settings: Settings
    """How."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """What was said."""
    images: list[Any] = field(default_factory=list)
    """Images of the turns, in order."""
    pending: list[Any] = field(default_factory=list)
    """Images of the next turn."""
    said: tuple[str, int] | None = None
    """The last message that was answered, and how many images it showed."""
    _methods: dict[tuple[float | None, float | None], SAESteering] = field(default_factory=dict)

    def set(self, **changes: Any) -> None:
        """Change settings; refuses those that cannot be.

        Raises:
            ValueError: a value is out of range.
        """
        wanted = dataclasses.replace(self.settings, **changes)
        self._method(wanted)
        self.settings = wanted

    def reset(self) -> None:
        """Forget what was said and shown."""
        self.turns, self.images, self.pending, self.said = [], [], [], None

    def say(self, text: str, stream: Callable[[str], None] | None = None) -> Answer:
        """Ask, with the pending images; a turn that fails or is interrupted is forgotten.

        Args:
            text: What the user says.
            stream: Called with the answer's text, piece by piece, fit for a terminal.
        """
        asked = turn(self.processor, "user", text, n_images=len(self.pending))
        turns, images = [*self.turns, asked], [*self.images, *self.pending]
        inputs = chat_inputs(self.processor, [turns], [images]).to(self.model.device)
        if not self.settings.on:
            said, report = self._generate(inputs, stream), None
        else:
            options: dict[str, Any] = {
                "scope": self.settings.scope,
                "on_empty": "pass",
                "base_model_ok": self.settings.base_model_ok,
            }
            with steer(self.model, self._method(self.settings), **options) as run:
                said = self._generate(inputs, stream)
            report = run.report()
        self.said = text, len(self.pending)
        self.turns = [*turns, turn(self.processor, "assistant", said)]
        self.images, self.pending = images, []
        return Answer(said, report)

    def again(self, stream: Callable[[str], None] | None = None) -> tuple[str, Answer]:
        """Answer the last message once more, in place of the last answer; returns the message, too.

        Raises:
            ValueError: nothing was said yet.
        """
        if not self.said:
            raise ValueError("expected a message that was answered, got none yet")
        kept = self.turns, self.images, self.pending
        text, n_images = self.said
        start = len(self.images) - n_images
        self.turns, self.images, self.pending = self.turns[:-2], self.images[:start], self.images[start:]
        try:
            return text, self.say(text, stream)
        except BaseException:  # also where it is stopped: what was said stays
            self.turns, self.images, self.pending = kept
            raise

    def _method(self, settings: Settings) -> SAESteering:
        key = settings.gamma, settings.eta
        if key not in self._methods:  # copies of weights: one set is kept, not one a setting that was tried
            method = SAESteering(self.sae, gamma=settings.gamma, eta=settings.eta, on_empty="pass")
            self._methods = {key: method}
        return self._methods[key]

    @torch.no_grad()
    def _generate(self, inputs: Any, stream: Callable[[str], None] | None) -> str:
        tokenizer = tokenizer_of(self.processor)
        sampling: dict[str, Any] = {"do_sample": self.settings.temperature > 0}
        if sampling["do_sample"]:
            sampling["temperature"] = self.settings.temperature
        streamer = _Stream(tokenizer, stream) if stream else None
        said = self.model.generate(
            **inputs, max_new_tokens=self.settings.max_new_tokens, streamer=streamer, **sampling
        )
        new = said[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


class _Stream(TextStreamer):
    """Hands on text as it is generated; in the thread that generates, which is the one that may steer."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream, self._begun = stream, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the streamer with whole words."""
        shown = plain(text, lines=True)
        shown = shown if self._begun else shown.lstrip()
        self._begun = self._begun or bool(shown)
        if shown:
            self._stream(shown)
