"""Reads a dataset release from the Hub of `HF_ENDPOINT` in every way; prints versions and digests as JSON.

Run by `test_clients.py` in environments with other versions of `datasets`, so it imports nothing of DACO.
"""

import hashlib
import json
import sys
from importlib.metadata import version

from datasets import load_dataset


def digest(rows):
    """sha256 of the rows in order, the same whatever library read them."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def all_of(repo, configs, **options):
    """Config and split -> digest of its rows."""
    found = {}
    for config in configs:
        for split, rows in load_dataset(repo, config, **options).items():
            found[f"{config}/{split}"] = digest(rows)
    return found


def main(repo, tag, configs, offline):
    """Print what this environment reads; offline only map-style, out of the cache."""
    ways = {"tag": all_of(repo, configs, revision=tag)}
    if not offline:
        ways["newest"] = all_of(repo, configs)
        ways["streaming"] = all_of(repo, configs, revision=tag, streaming=True)
    versions = {name: version(name) for name in ("datasets", "huggingface_hub", "pyarrow")}
    print(json.dumps({"versions": versions, "ways": ways}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4:] == ["offline"])
