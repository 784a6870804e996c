"""The concept dictionary: concepts with polarity, and their directions at each layer.

Reads dataset releases (`concepts` and `directions_<model>` configs).
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from daco.errors import FormatError, UnknownConceptError, UnknownLayerError
from daco.load import Snapshot, resolve
from daco.sites import ModelFacts
from daco.tables import CONCEPTS, POLARITIES, directions_schema, read_table


@dataclass(frozen=True)
class ConceptDictionary:
    """Directions of concepts in a model's activation space; row i of every layer is concept i.

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
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load the directions of one model from a dataset release.

        Args:
            repo_or_folder: `org/name` on the Hub, or a release folder.
            model: Short name of the model, as in `directions_<model>`; may be left out when there is one.
            revision: Tag, branch or commit; None is the newest release.
            token: As in huggingface_hub.
            cache_dir: As in huggingface_hub.
            local_files_only: Use the cache alone.

        Raises:
            ArtefactNotFoundError: no such repo, revision or folder, or no right to read it.
            FormatTooNewError: written by a newer major version of the format.
            FormatError: the release breaks the format, or has no directions of that model.
            IntegrityError: a file is missing, truncated or altered.
        """
        snapshot = resolve(
            repo_or_folder,
            "dataset",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        name = _choose(snapshot, model)
        facts = snapshot.manifest["models"][name]
        keys = ModelFacts.__dataclass_fields__
        model_facts = ModelFacts(**{key: facts[key] for key in keys})
        concepts = _read(snapshot, "concepts", "train", CONCEPTS)
        ids = concepts.column("concept_id").to_pylist()
        vectors = {
            layer: _vectors(snapshot, name, layer, ids, model_facts.hidden_size) for layer in facts["layers"]
        }
        R = {int(layer): float(value) for layer, value in facts["R"].items()}
        return cls(concepts.to_pandas(), vectors, model_facts, R)

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
        return (self.concepts["polarity"] == polarity).to_numpy()

    def centroid(self, layer: int, polarity: str) -> Tensor:
        """mu+ or mu-: the unit mean of the unit directions of that polarity, `[d_model]`; zero where none is.

        Source: arXiv 2604.08846, Eq. 9.
        """
        rows = self.unit(layer)[np.flatnonzero(self.mask(polarity))]
        return torch.nn.functional.normalize(rows.sum(0), dim=-1)

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

    def nearest(self, vector: Tensor, layer: int, n: int = 5) -> pd.DataFrame:
        """The concepts whose directions have the largest cosine with a vector.

        Args:
            vector: `[d_model]`, any norm.
            layer: Layer of the directions.
            n: How many.

        Returns:
            Rows of `concepts` with a column `cosine`, largest first.
        """
        rows = self.unit(layer)
        cosines = rows @ torch.nn.functional.normalize(vector.to(rows), dim=-1)
        order = torch.argsort(cosines, descending=True, stable=True)[:n]
        return self.concepts.iloc[order.numpy()].assign(cosine=cosines[order].numpy())


def _choose(snapshot: Snapshot, model: str | None) -> str:
    names = sorted(snapshot.manifest["models"])
    if model is None and len(names) == 1:
        return str(names[0])
    if model not in names:
        raise FormatError(f"{snapshot.name}: expected model to be one of {names}, got {model!r}")
    return str(model)


def _read(snapshot: Snapshot, config: str, split: str, schema: pa.Schema) -> pa.Table:
    """All files of one split of a config."""
    try:
        files: list[Any] = snapshot.manifest["configs"][config]["splits"][split]["files"]
    except KeyError as error:
        raise FormatError(
            f"{snapshot.name}: expected config {config!r} with split {split!r}, got no {error}"
        ) from error
    return pa.concat_tables([read_table(snapshot.path(name), schema) for name in files])


def _vectors(snapshot: Snapshot, name: str, layer: int, ids: list[str], d_model: int) -> Tensor:
    table = _read(snapshot, f"directions_{name}", f"layer_{layer}", directions_schema(d_model))
    if table.column("concept_id").to_pylist() != ids:
        raise FormatError(
            f"directions_{name}/layer_{layer}: expected the rows of `concepts` in order, got others"
        )
    values = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.astype(np.float32).reshape(len(ids), d_model))
