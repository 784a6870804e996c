"""Makes a release folder ready to publish: renders its card and lists it in the manifest.

Reads a release folder; writes `README.md`, the pictures it shows and `manifest.json` there. Running it
again changes no byte.
"""

from pathlib import Path

from cards.album import PICTURES, pictures
from cards.facts import CARD
from cards.render import render
from daco.manifest import check_size, file_entry, read_manifest, write_atomic, write_manifest


def stage(folder: Path) -> None:
    """Render README.md and its pictures into a release folder, and list them in the manifest.

    Raises:
        IntegrityError: a file of the release is missing or unreadable.
        FormatError: the manifest or config breaks the format.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if name not in (CARD, *PICTURES):  # which are about to be written
            check_size(folder / name, entry, name)
    made = pictures(folder)
    for name in set(PICTURES) & set(manifest["files"]) - set(made):  # of data that is gone
        del manifest["files"][name]
        (folder / name).unlink(missing_ok=True)
        write_manifest(folder, manifest)
    for name, content in made.items():
        write_atomic(folder / name, content)
        manifest["files"][name] = file_entry(folder / name)
        write_manifest(folder, manifest)  # the card lists them
    write_atomic(folder / CARD, render(folder))
    manifest["files"][CARD] = file_entry(folder / CARD)
    write_manifest(folder, manifest)
