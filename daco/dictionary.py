"""The concept dictionary: concepts with polarity, and their directions at each layer.

Reads dataset releases (`concepts` and `directions_<model>` configs).
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from daco import dictionary_edit as edit
from daco import text_search
from daco.dictionary_edit import Diff, Merged
from daco.dictionary_files import read_dictionary, write_dictionary
from daco.errors import FormatError, UnknownConceptError, UnknownLayerError
from daco.load import resolve
from daco.recognition import Recogniser, recognise
from daco.sites import ModelFacts
from daco.tables import POLARITIES

QUERIES = 1_024
"""Vectors compared with a dictionary at a time."""


@dataclass(frozen=True)
class ConceptDictionary:
    """Directions of concepts in a model's activation space; row i of every layer is concept i.

    A dictionary is never changed: `subset`, `merge` and `extend` return new ones.

    Raises:
        FormatError: rows, widths and concepts do not go together.
    """

    concepts: pd.DataFrame
    """One row a concept, columns of `daco.tables.CONCEPTS`."""
    vectors: dict[int, Tensor] = field(repr=False)
    """By layer: raw directions `[n_concepts, d_model]`, float32."""
    model: ModelFacts
    """The model the directions belong to."""
    R: dict[int, float]
    """By layer: median norm of unmasked tokens; the unit of steering strengths."""
    baseline: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """By layer: mean reading of negatives `[d_model]`; empty where the release does not hold it."""
    recognisers: dict[int, Recogniser] = field(default_factory=dict, repr=False)
    """By layer: what tells concepts from readings, for `recognise`; empty where it was not loaded."""
    reading: str = "last"
    """Where in the prompt stimuli were read."""
    sources: list[dict[str, str]] = field(default_factory=list)
    """Releases it was made from: name, version and, from a Hub, commit."""
    licences: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """What those releases rest on, as their manifests' `sources` say."""

    def __post_init__(self) -> None:
        expected = (len(self.concepts), self.model.hidden_size)
        for layer, rows in self.vectors.items():
            if tuple(rows.shape) != expected:
                raise FormatError(
                    f"layer {layer}: expected directions {list(expected)}, got {list(rows.shape)}"
                )
            if not bool(rows.isfinite().all()):
                raise FormatError(
                    f"layer {layer}: expected finite directions, got NaN or infinity; build them again"
                )
        if unknown := set(self.concepts["polarity"]) - set(POLARITIES):
            raise FormatError(f"concepts: expected polarity among {POLARITIES}, got {sorted(unknown)}")
        for layer, row in self.baseline.items():
            if tuple(row.shape) != expected[1:] or not bool(row.isfinite().all()):
                raise FormatError(
                    f"baseline, layer {layer}: expected {expected[1]} finite numbers, got others"
                )
        for layer, one in self.recognisers.items():
            if (len(one.concepts), len(one.mean)) != expected:
                raise FormatError(
                    f"recognition, layer {layer}: expected {expected[0]} concepts and width {expected[1]}, "
                    f"got {len(one.concepts)} and {len(one.mean)}"
                )

    def __len__(self) -> int:
        return len(self.concepts)

    @property
    def layers(self) -> list[int]:
        """Layers that have directions, rising."""
        return sorted(self.vectors)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        model: str | None = None,
        *,
        revision: str | None = None,
        layers: Sequence[int] | None = None,
        recognition: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load the directions of one model from a dataset release.

        Args:
            repo_or_folder: `org/name` on the Hub, or a release folder.
            model: Short name of the model, as in `directions_<model>`; may be left out when there is one.
            revision: Tag, branch or commit; None is the newest release.
            layers: Only these layers; None is all.
            recognition: Load what `recognise` needs, too, where the release holds it; it is larger than the
                directions.
            token: As in huggingface_hub.
            cache_dir: As in huggingface_hub.
            local_files_only: Use the cache alone.

        Raises:
            ArtefactNotFoundError: no such repo, revision or folder, or no right to read it.
            FormatTooNewError: written by a newer major version of the format.
            FormatError: the release breaks the format, or has no directions of that model.
            IntegrityError: a file is missing, truncated or altered.
            UnknownLayerError: a layer was asked for that the release does not have.
        """
        snapshot = resolve(
            repo_or_folder,
            "dataset",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls(**read_dictionary(snapshot, model, layers, recognition))

    def save_pretrained(
        self, folder: str | Path, *, name: str = "dictionary", model: str = "model", version: str = "1.0.0"
    ) -> None:
        """Write a release folder that `from_pretrained` opens again: parquet files and a manifest.

        Args:
            folder: Empty or new.
            name: Of the release.
            model: Short name of the model, as in `directions_<model>`.
            version: Of the release, MAJOR.MINOR.PATCH.

        Raises:
            ArtefactNotFoundError: there is something in the folder already.
            ValueError: `model` is more than letters, digits and `_`, or `version` is none.
        """
        write_dictionary(self, Path(folder), name, model, version)

    def raw(self, layer: int) -> Tensor:
        """Raw directions of a layer, `[n_concepts, d_model]`.

        Raises:
            UnknownLayerError: the dictionary does not have that layer.
        """
        if layer not in self.vectors:
            raise UnknownLayerError(f"expected a layer among {self.layers}, got {layer}")
        return self.vectors[layer]

    def unit(self, layer: int) -> Tensor:
        """The dictionary D[l]: directions scaled to norm 1, `[n_concepts, d_model]`."""
        return torch.nn.functional.normalize(self.raw(layer), dim=-1)

    def mask(self, polarity: str) -> np.ndarray:
        """Which concepts have this polarity, `[n_concepts]` of bool."""
        return np.asarray(self.concepts["polarity"] == polarity)

    def centroid(self, layer: int, polarity: str) -> Tensor:
        """mu+ or mu-: the unit mean of the unit directions of that polarity, `[d_model]`; zero where none is.

        Source: arXiv 2604.08846, Eq. 9.
        """
        rows = self.unit(layer)[np.flatnonzero(self.mask(polarity))]
        return torch.nn.functional.normalize(rows.sum(0), dim=-1)

    # Finding concepts.

    def index(self, concept: str) -> int:
        """Row of a concept, by its name or id.

        Raises:
            UnknownConceptError: there is none; names the most similar ones.
        """
        for column in ("concept_id", "concept"):
            rows = np.flatnonzero((self.concepts[column] == concept).to_numpy())
            if len(rows):
                return int(rows[0])
        near = difflib.get_close_matches(concept, list(self.concepts["concept"]), n=3)
        raise UnknownConceptError(
            f"expected a concept of the dictionary, got {concept!r}; nearest: {near or 'none'}"
        )

    def direction(self, concept: str, layer: int) -> Tensor:
        """Unit direction of one concept, `[d_model]`; raises as `index` and `raw` do."""
        return self.unit(layer)[self.index(concept)]

    def search(self, text: str, n: int = 10) -> pd.DataFrame:
        """Concepts whose name, id or definition answers a text, forgiving case, accents and misspellings.

        Args:
            text: What is sought.
            n: How many at most.

        Returns:
            Rows of `concepts` with a column `score`, 1 for an exact name or id, best first; none may fit.

        Raises:
            ValueError: there is no word in the text.
        """
        return text_search.best(self.concepts, text, n)

    def nearest(self, vector: Tensor, layer: int, n: int = 5) -> pd.DataFrame:
        """The concepts whose directions have the largest cosine with a vector, or with each of several.

        Args:
            vector: `[d_model]` or `[n_vectors, d_model]`, any norm.
            layer: Layer of the directions.
            n: How many a vector.

        Returns:
            Rows of `concepts` with a column `cosine`, largest first; of several vectors one after another,
            their number in the first column `query`.

        Raises:
            UnknownLayerError: the dictionary does not have that layer.
            ModelMismatchError: the vectors are of another width.
            ActivationError: a vector is zero or not finite.
        """
        directions = self.unit(layer)
        queries = edit.unit_rows(vector[None] if vector.ndim == 1 else vector, self.model.hidden_size)
        parts = []
        for part in torch.split(queries, QUERIES):
            found = (part @ directions.T).sort(dim=-1, descending=True, stable=True)
            parts.append((found.values[:, :n], found.indices[:, :n]))
        cosines, order = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        rows = self.concepts.iloc[order.reshape(-1)].assign(cosine=cosines.reshape(-1))
        if vector.ndim > 1:
            rows.insert(0, "query", np.repeat(np.arange(len(order)), order.shape[1]))
        return rows

    def groups(self) -> pd.DataFrame:
        """Groups of concepts, largest first: group, n_concepts, how many of each polarity, some names."""
        rows = [
            {"group": group, "n_concepts": len(part)}
            | {polarity: int((part["polarity"] == polarity).sum()) for polarity in POLARITIES}
            | {"examples": ", ".join(part["concept"].head(3))}
            for group, part in self.concepts.groupby("group", sort=True)
        ]
        columns = ["group", "n_concepts", *POLARITIES, "examples"]
        found = pd.DataFrame(rows, columns=columns)
        return found.sort_values("n_concepts", ascending=False, kind="stable").reset_index(drop=True)

    # New dictionaries from old ones.

    def subset(
        self,
        concepts: Sequence[str] | None = None,
        *,
        polarity: str | None = None,
        group: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> "ConceptDictionary":
        """The dictionary of some concepts, in the order they have here.

        Args:
            concepts: Names (all concepts of that name) or ids; None is all.
            polarity: Only of this polarity.
            group: Only of this group.
            layers: Only these layers.

        Raises:
            UnknownConceptError: a concept, polarity or group that no concept here has, or none fits all.
            UnknownLayerError: a layer the dictionary does not have.
        """
        return edit.subset(self, concepts, polarity, group, layers)

    def merge(self, other: "ConceptDictionary", on_conflict: str = "raise") -> Merged:
        """This dictionary and the concepts of another one of the same model, at the layers that both have.

        R and the mean of negatives stay this one's; a warning says where the other's R is far from it. What
        `recognise` knows stays this one's, too. Of new concepts, and of those that take the other one's
        direction, it knows what that does, if both rest on the same readings; if not, it never names them.

        Args:
            other: The other one.
            on_conflict: What to do with concepts whose texts, polarity or direction differ: `raise`, or keep
                `ours` or `theirs`.

        Returns:
            The merged dictionary, and the conflicts.

        Raises:
            FormatError: there are conflicts, and `on_conflict` is `raise`.
            ModelMismatchError: they are of different models, or read at different places.
            UnknownLayerError: no layer is in both.
        """
        return edit.merge(self, other, on_conflict)

    def read(
        self,
        model: nn.Module,
        processor: Any,
        captions: Sequence[str],
        images: Sequence[Any] | None = None,
        *,
        base_model_ok: bool = False,
        batch: int = 8,
    ) -> dict[int, Tensor]:
        """Read stimuli the way this dictionary's were read: what `extend` takes.

        Args:
            model: The model of the dictionary.
            processor: Its processor; a tokenizer does for captions alone.
            captions: One a stimulus.
            images: One PIL image a stimulus, or None.
            base_model_ok: Accept another base model id or revision.
            batch: Stimuli of one forward.

        Returns:
            By layer: readings `[n_stimuli, d_model]`, float32.

        Raises:
            ModelMismatchError: not the dictionary's model, or its stimuli were not read at the last token.
            ActivationError: a reading is NaN or infinite, or there is no stimulus.
        """
        from daco.readings import read_stimuli

        return read_stimuli(self, model, processor, captions, images, base_model_ok, batch)

    def recognise(
        self, readings: Mapping[int, Tensor], n: int | None = None, *, unusual_ok: bool = False
    ) -> pd.DataFrame:
        """Which concepts readings show, as far as they are like the stimuli this dictionary was read from.

        An atom's name says which side it takes, not what is shown. This has a linear discriminant for each
        concept (what readings that show it have more of, over the covariance of readings), and names it from
        the score on at which the name was right as often as the recipe asked for (by default half the time),
        among training stimuli left out in turn. That holds for captioned pictures like those: a reading that
        is farther from their mean than 99 % of them is named nothing, which `notes` say. Questions are; of
        requests that are not far, fewer names are right than of captions.

        Args:
            readings: By layer: `[n_readings, d_model]`, as `read` returns. Each layer is read by itself.
            n: Concepts a reading and layer, at most; None is all.
            unusual_ok: Name what far readings show, too.

        Returns:
            One row a reading, layer and concept named, the most certain first: reading (its number), layer,
            concept_id, concept, polarity; score, in standard deviations above an average reading; threshold;
            precision, how often the name was right. `attrs["notes"]`: a text for each reading that was not
            usual.

        Raises:
            FormatError: the release does not hold what that takes, or it was not loaded.
            UnknownLayerError: a layer for which it does not.
            ModelMismatchError: readings of another width.
            ActivationError: a reading is NaN or infinite.
            ValueError: `n` is below 1.

        Example:
            >>> dictionary = ConceptDictionary.from_pretrained(repo, recognition=True)  # doctest: +SKIP
            >>> readings = dictionary.read(model, processor, captions, images)  # doctest: +SKIP
            >>> dictionary.recognise(readings, n=5)  # doctest: +SKIP
        """
        return recognise(self, readings, n, unusual_ok)

    def extend(
        self,
        concept: str,
        positives: Mapping[int, Tensor],
        negatives: Mapping[int, Tensor] | None = None,
        *,
        polarity: str = "neutral",
        definition: str = "",
        group: str = "user",
        concept_id: str | None = None,
    ) -> "ConceptDictionary":
        """This dictionary with one concept more, from the readings of a handful of stimuli: no rebuild.

        Its direction is the mean of the positives minus the mean of the negatives, or minus `baseline`, the
        mean of the negatives that the dictionary was built with. `recognise` scores it and never names it: a
        handful of stimuli does not tell from which score on it is shown.

        Args:
            concept: Its name.
            positives: By layer: readings `[n, d_model]` of stimuli that show it, as `read` returns.
            negatives: Likewise of stimuli that do not; None takes `baseline`.
            polarity: `desirable`, `undesirable` or `neutral`.
            definition: What it means.
            group: Its group.
            concept_id: Its id; None is `user:<slug of the name>`.

        Raises:
            ActivationError: no reading, one of another width or not finite, or nothing to tell it apart from.
            FormatError: the dictionary has that id already.
            UnknownLayerError: readings of a layer of the dictionary are missing.
            ValueError: a name without letters or digits, or an unknown polarity.

        Example:
            >>> readings = dictionary.read(model, processor, captions, images)  # doctest: +SKIP
            >>> others = dictionary.read(model, processor, captions_without, images_without)  # doctest: +SKIP
            >>> larger = dictionary.extend("bow", readings, others, polarity="undesirable")  # doctest: +SKIP
            >>> with daco.steer(model, daco.Projection(larger)): ...  # doctest: +SKIP
        """
        facts = {"polarity": polarity, "polarity_source": "user", "definition": definition, "group": group}
        return edit.extend(self, concept, positives, negatives, facts | {"concept_id": concept_id or ""})

    def diff(self, newer: "ConceptDictionary", moved: float = 0.99) -> Diff:
        """What tells a newer version from this one.

        Args:
            newer: Of the same model; layers that both have are compared.
            moved: A direction has moved where its cosine with the older one is below this at any layer.

        Raises:
            ModelMismatchError: they are of different models, or read at different places.
            UnknownLayerError: no layer is in both.
        """
        return edit.diff(self, newer, moved)
