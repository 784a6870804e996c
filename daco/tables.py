"""The parquet tables of DACO: their schemas, and a writer whose bytes depend on the rows alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from daco.errors import FormatError, IntegrityError

STIMULI = pa.schema(
    [
        ("stimulus_id", pa.string()),
        ("caption", pa.string()),
        ("image_url", pa.string()),
        ("image_sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source", pa.string()),
        ("source_key", pa.string()),
    ]
)
"""One row per unique caption-image pair. `image` bytes are a further column where the licence allows them."""

LINKS = pa.schema(
    [
        ("concept_id", pa.string()),
        ("concept", pa.string()),
        ("stimulus_id", pa.string()),
        ("role", pa.string()),
        ("rank", pa.int32()),
        ("dist", pa.float32()),
        ("sim_image", pa.float32()),
        ("sim_text", pa.float32()),
    ]
)
"""One row per concept and stimulus; role is `positive` or `negative`, rank counts from 0 within both."""

CONCEPTS = pa.schema(
    [
        ("concept_id", pa.string()),
        ("concept", pa.string()),
        ("synset", pa.string()),
        ("pos", pa.string()),
        ("definition", pa.string()),
        ("group", pa.string()),
        ("rank", pa.int32()),
        ("polarity", pa.string()),
        ("polarity_source", pa.string()),
        ("n_positive", pa.int32()),
    ]
)
"""One row per concept, in dictionary order."""

ATOMS = pa.schema(
    [
        ("atom", pa.int32()),
        ("polarity", pa.string()),
        ("cos_undesirable", pa.float32()),
        ("cos_desirable", pa.float32()),
        ("nearest_concept_ids", pa.list_(pa.string())),
        ("nearest_concepts", pa.list_(pa.string())),
        ("nearest_cosines", pa.list_(pa.float32())),
        ("firing_rate", pa.float32()),
    ]
)
"""One row per atom of an SAE, in order."""

ATOMS_MORE = pa.schema(
    [
        ("group", pa.string()),
        ("cos_undesirable_group", pa.float32()),
        ("undesirable_group", pa.string()),
        ("cos_desirable_group", pa.float32()),
        ("desirable_group", pa.string()),
        ("firing_image", pa.float32()),
        ("firing_prompt", pa.float32()),
        ("firing_caption", pa.float32()),
        ("firing_generated", pa.float32()),
        ("top_stimuli", pa.list_(pa.string())),
        ("top_values", pa.list_(pa.float32())),
    ]
)
"""Further columns of atoms that a release may have: the nearest concept's group; largest cosine to the
centroid of a group of concepts of one polarity, and which group; firing rate by what a token belongs to;
held-out stimuli that fire it most."""

POLARITIES = ("desirable", "undesirable", "neutral")

MAX_VECTOR_ROWS = 25_000
"""Rows of a row group of a table with vectors: keeps groups under 100 MB, so that streaming starts soon."""


def directions_schema(d_model: int) -> pa.Schema:
    """One row per concept of one layer; `vector` is the raw direction of `d_model` float32."""
    return pa.schema(
        [
            ("concept_id", pa.string()),
            ("concept", pa.string()),
            ("vector", pa.list_(pa.float32(), d_model)),
            ("norm", pa.float32()),
            ("n_positive", pa.int32()),
            ("n_negative", pa.int32()),
        ]
    )


def recognition_schema(d_model: int) -> pa.Schema:
    """One row per concept of one layer, what tells from a reading whether it is shown.

    `vector` times (reading - mean) is its score, in standard deviations; `threshold` the score from which on
    it is named (null: never); `n_shown` how many training stimuli show it, left out in turn while others that
    do were not; `precision` and `recall` those of its name among them (null: never named).
    """
    return pa.schema(
        [
            ("concept_id", pa.string()),
            ("concept", pa.string()),
            ("vector", pa.list_(pa.float32(), d_model)),
            ("threshold", pa.float32()),
            ("n_shown", pa.int32()),
            ("precision", pa.float32()),
            ("recall", pa.float32()),
        ]
    )


def statistics_schema(d_model: int) -> pa.Schema:
    """One row per dimension of the activations of one layer: mean reading, row of the inverse covariance."""
    return pa.schema(
        [
            ("dimension", pa.int32()),
            ("mean", pa.float32()),
            ("vector", pa.list_(pa.float32(), d_model)),
        ]
    )


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer with content-defined chunking and a page index, whose bytes depend on the rows alone."""
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        write_page_index=True,
        use_content_defined_chunking=True,
        version="2.6",
    )


def write_table(path: Path, table: pa.Table, row_group_size: int = MAX_VECTOR_ROWS) -> int:
    """Write a table in one file of deterministic bytes; returns its number of rows."""
    temporary = path.with_name(f".{path.name}.partial")
    with parquet_writer(temporary, table.schema) as writer:
        writer.write_table(table, row_group_size=row_group_size)
    temporary.replace(path)
    return int(table.num_rows)


def table_of(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly this schema."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read a parquet file; with a schema, check that its columns are there with their types.

    Raises:
        IntegrityError: the file is no parquet (truncated or altered).
        FormatError: a column is missing or of another type.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(
            f"{path.name}: expected a parquet file, got {error}; download or build it again"
        ) from error
    for field in schema or ():
        if field.name not in table.column_names:
            raise FormatError(f"{path.name}: expected column {field.name!r}, got {table.column_names}")
        if not _same_type(table.schema.field(field.name).type, field.type):
            got = table.schema.field(field.name).type
            raise FormatError(f"{path.name}: column {field.name!r}: expected {field.type}, got {got}")
    return table


def _same_type(got: pa.DataType, expected: pa.DataType) -> bool:
    """Equal but for the name of a list's item ("item" or "element", as writers differ)."""
    if pa.types.is_fixed_size_list(expected) and pa.types.is_fixed_size_list(got):
        return bool(got.list_size == expected.list_size and got.value_type == expected.value_type)
    if pa.types.is_list(expected) and pa.types.is_list(got):
        return bool(got.value_type == expected.value_type)
    return bool(got == expected)
