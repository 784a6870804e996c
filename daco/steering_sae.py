"""The steering SAEs of a model release: loaded from a Hub repo or a folder, applied to their base model."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
import torch
from torch import nn

from daco.errors import FormatError, UnknownLayerError
from daco.load import resolve
from daco.manifest import FINGERPRINT
from daco.sae import LayerSAE
from daco.sae_files import read_config, read_labelled, read_layer
from daco.selection import Selection
from daco.sites import ModelFacts

if TYPE_CHECKING:
    from daco.steering import Run


@dataclass(frozen=True)
class SteeringSAE:
    """The SAEs of a model release, ready to steer the model they were made for.

    Example:
        >>> sae = SteeringSAE.from_pretrained("org/daco-sae-toy", revision="v1.0.0")  # doctest: +SKIP
        >>> with sae.steer(model) as run:  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> print(run.report())  # doctest: +SKIP
    """

    config: dict[str, Any] = field(repr=False)
    """The release's root `config.json`."""
    layers: dict[int, LayerSAE] = field(repr=False)
    """By layer, rising."""
    name: str = ""
    """Repo id or folder it came from."""
    commit: str | None = None
    """Commit it came from."""

    @property
    def base_model(self) -> ModelFacts:
        """The model these SAEs belong to."""
        return ModelFacts(**{"fingerprint": self.config.get(FINGERPRINT, {})} | self.config["base_model"])

    @property
    def defaults(self) -> dict[str, Any]:
        """The release's steering defaults: eta, gamma, scope and, where not all are steered, layers."""
        return dict(self.config["steering"])

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        revision: str | None = None,
        layers: list[int] | None = None,
        steering_only: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load the SAEs of a model release.

        Args:
            repo_or_folder: `org/name` on the Hub, or a release folder.
            revision: Tag, branch or commit; None is the newest release.
            layers: Only these layers; None is all.
            steering_only: Read the labelled atoms alone: megabytes in place of gigabytes. They steer as
                labelled at the release's eta or a higher one; a TopK does so by its calibrated threshold.
            dtype: dtype of weights, codes and deltas.
            device: Where the weights go; they follow the activations when steering.
            token: As in huggingface_hub.
            cache_dir: As in huggingface_hub.
            local_files_only: Use the cache alone.

        Raises:
            ArtefactNotFoundError: no such repo, revision or folder, or no right to read it.
            FormatTooNewError: written by a newer major version of the format.
            FormatError: the release breaks the format.
            IntegrityError: a file is missing, truncated or altered.
            SteeringOnlyError: `steering_only` of a TopK whose release has no calibrated threshold.
            UnknownLayerError: a layer was asked for that the release does not have.
        """
        snapshot = resolve(
            repo_or_folder,
            "model",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = read_config(snapshot.path("config.json"))
        wanted = config["layers"] if layers is None else layers
        if unknown := sorted(set(wanted) - set(config["layers"])):
            raise UnknownLayerError(
                f"{snapshot.name}: expected layers among {config['layers']}, got {unknown}"
            )
        eta = config["steering"]["eta"]
        loaded = {
            layer: read_labelled(snapshot, layer, dtype, device, eta)
            if steering_only
            else read_layer(snapshot, layer, dtype, device)
            for layer in sorted(wanted)
        }
        _check_widths(loaded, config["base_model"]["hidden_size"])
        return cls(config, loaded, snapshot.name, snapshot.commit)

    def steer(
        self,
        model: nn.Module,
        *,
        gamma: float | None = None,
        eta: float | None = None,
        layers: list[int] | None = None,
        scope: str | Sequence[str] | None = None,
        on_empty: str = "raise",
        base_model_ok: bool = False,
        prompt_tokens: int | None = None,
        remove: Selection | None = None,
        keep: Selection | None = None,
        form: str | None = None,
    ) -> "AbstractContextManager[Run]":
        """Steer `model` inside a `with` block (DESIGN section 4.6); see `daco.steer`.

        Args:
            model: The transformers model these SAEs belong to.
            gamma: Strength of the desirable shift in units of R; None is the release's default.
            eta: Cosine threshold of labels; None takes the labels as released.
            layers: Only these layers; None is the release's default.
            scope: `all`, or some of `image`, `prompt`, `generated` and `last`; None is the release's default.
            on_empty: `raise` when nothing can be steered, or `pass` for an exact no-op.
            base_model_ok: Accept another base model id or revision (a fine-tune, a quantised copy).
            prompt_tokens: Columns of the prompt where a forward holds more or less than it.
            remove: What is removed, by name of concept, group or label, or by layer and atom, with or without
                strengths: `{"weapon": 1.0, "noun.act": 0.5}`; None is what is labelled undesirable.
            keep: What stays in any case, likewise.
            form: `exact` or `threshold`, see `daco.SAESteering`; None is the nearest to exact there is.

        Raises:
            ModelMismatchError: it is not the model these SAEs were made for.
            NothingToSteerError: no atom is labelled at this eta, nothing is left to remove, or the scope is
                empty.
            SteeringConflictError: the model is already steered.
            SteeringOnlyError: what is asked for needs weights that were not loaded.
            UnknownConceptError: no atom has a name that was asked for.
        """
        from daco.methods import SAESteering
        from daco.steering import steer

        method = SAESteering(self, gamma, eta, layers, on_empty, remove=remove, keep=keep, form=form)
        return steer(
            model,
            method,
            scope=scope or self.defaults["scope"],
            on_empty=on_empty,
            base_model_ok=base_model_ok,
            prompt_tokens=prompt_tokens,
        )

    def attach(
        self,
        model: nn.Module,
        *,
        gamma: float | None = None,
        eta: float | None = None,
        layers: list[int] | None = None,
        scope: str | Sequence[str] | None = None,
        on_empty: str = "raise",
        base_model_ok: bool = False,
        prompt_tokens: int | None = None,
        remove: Selection | None = None,
        keep: Selection | None = None,
        form: str | None = None,
    ) -> "Run":
        """As `steer`, but until `remove()` is called on the returned handle: for servers."""
        from daco.methods import SAESteering
        from daco.steering import attach

        method = SAESteering(self, gamma, eta, layers, on_empty, remove=remove, keep=keep, form=form)
        return attach(
            model,
            method,
            scope=scope or self.defaults["scope"],
            on_empty=on_empty,
            base_model_ok=base_model_ok,
            prompt_tokens=prompt_tokens,
        )

    def explain(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        layers: list[int] | None = None,
        base_model_ok: bool = False,
    ) -> pd.DataFrame:
        """Which atoms fire on inputs, and how strongly; nothing is steered.

        An atom's name says which side it takes, hardly what is shown, which
        `ConceptDictionary.recognise` tells.

        Args:
            model: The transformers model these SAEs belong to.
            inputs: What `model(**inputs)` takes, a batch or one row; moved to the model's device.
            layers: Only these layers; None is all that were loaded.
            base_model_ok: Accept another base model id or revision (a fine-tune, a quantised copy).

        Returns:
            One row a batch row, layer and atom that fires, the largest total strength of a layer first:
            `row`, `layer`, `atom`, `polarity` (as released), `concepts` (nearest first), `positions` where
            it fires, of them those of `image` and of `prompt` text, and of its code there the mean
            `strength` and the `largest`. Padding is left out. `attrs["notes"]` lists what else to know: a
            base model that is not confirmed, or that only labelled atoms were loaded.

        Raises:
            ModelMismatchError: it is not the model these SAEs were made for.
            SteeringConflictError: the model is being steered.
            UnknownLayerError: a layer that was not loaded.

        Example:
            >>> fired = sae.explain(model, inputs)  # doctest: +SKIP
            >>> fired[fired["polarity"] == "undesirable"].head()  # doctest: +SKIP
        """
        from daco.explain import explain

        return explain(self, model, inputs, layers, base_model_ok)


def _check_widths(layers: dict[int, LayerSAE], hidden_size: int) -> None:
    for layer, found in layers.items():
        if found.sae.d_model != hidden_size:
            raise FormatError(
                f"layer {layer}: expected SAE width {hidden_size} (the base model's), got {found.sae.d_model}"
            )
