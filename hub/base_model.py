"""Publishes the toy world's LLaVA as a plain transformers repo: its files as they lie, a card, a picture.

Reads the model's folder; writes a staged copy of it, and one commit and one tag on the Hub.
"""

import shutil
from pathlib import Path

from cards.facts import CARD
from cards.toy_llava import EXAMPLE, card, example_picture
from daco.errors import ArtefactNotFoundError
from daco.manifest import file_entry, release_files, write_atomic
from hub.plan import File
from hub.publish import Published, Release, send
from hub.remote import Target

SUFFIXES = (".json", ".jinja", ".safetensors")
"""Files of a model's folder that are published; whatever else lies there is not."""


def stage_base_model(source: Path, staged: Path, repo_id: str, version: str) -> Release:
    """Copy a model's folder, with its card and its example picture; running it again changes no byte.

    Args:
        source: The model's folder, as `builders.toyworld.train` writes it.
        staged: Where the copy goes; what was there is deleted.
        repo_id: `org/name`, which the card names.
        version: MAJOR.MINOR.PATCH.

    Raises:
        ArtefactNotFoundError: there is no model in `source`.
    """
    if not (source / "model.safetensors").is_file():
        raise ArtefactNotFoundError(
            f"expected a model in {source}, got none; make one with `python -m builders.toyworld train`"
        )
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.suffix in SUFFIXES:
            shutil.copyfile(path, staged / path.name)
    example_picture().save(staged / EXAMPLE)
    write_atomic(staged / CARD, card(staged, repo_id, f"v{version}"))
    entries = {name: file_entry(staged / name) for name in release_files(staged)}
    return Release(
        staged, version, {n: File(entry["bytes"], entry["sha256"]) for n, entry in entries.items()}
    )


def publish_base_model(source: Path, staged: Path, target: Target, version: str) -> Published:
    """Publish a model's folder as one commit with one tag; see `stage_base_model` and `hub.publish.send`."""
    return send(stage_base_model(source, staged, target.repo_id, version), target)
