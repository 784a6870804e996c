"""Reads a parquet file with DuckDB, Polars and pandas; prints the digest of the rows of each as JSON."""

import hashlib
import json
import sys

import duckdb
import pandas as pd
import polars as pl


def digest(rows):
    """sha256 of the rows in order; arrays become lists."""
    text = json.dumps(rows, sort_keys=True, default=lambda array: array.tolist())
    return hashlib.sha256(text.encode()).hexdigest()


path = sys.argv[1]
table = duckdb.connect().execute("select * from read_parquet(?)", [path])
names = [column[0] for column in table.description]
readers = {
    "duckdb": [dict(zip(names, row, strict=True)) for row in table.fetchall()],
    "polars": pl.read_parquet(path).to_dicts(),
    "pandas": pd.read_parquet(path).to_dict("records"),
}
print(json.dumps({name: digest(rows) for name, rows in readers.items()}))
