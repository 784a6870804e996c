"""Runs the quick start of a release's card as it is printed, and puts what it printed into the card.

Reads a release folder; publishes it to a Hub of its own in a temporary folder, and runs the card's code there
in a fresh process with an empty cache. Writes `facts.quick_start` of the manifest and the card.
"""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from cards.facts import CARD, is_hub_id, repo_id
from cards.render import python_blocks
from daco.errors import QuickStartError
from daco.manifest import read_manifest, write_manifest
from daco.sae_files import read_config
from hub.local.server import background, client_env
from hub.plan import AS_IT_IS, Access
from hub.publish import Release, send
from hub.remote import Target
from hub.stage import stage

ROOT = Path(__file__).parent.parent

TOKEN = "hf_local"
"""The temporary Hub's own; it opens nothing else."""

PATIENCE = 3_600
"""Seconds that a quick start may take: large models load slowly."""

END = "--- end of block {} of the quick start ---"

RUN = """
import runpy, sys
from builders.vision import ensure_torchvision
ensure_torchvision()
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Runs a file as it is, on machines too where torchvision was built for another torch."""


def code_blocks(card: str) -> list[str]:
    """The blocks of a card's quick start, in order; those of other libraries are left out."""
    return [block for block in python_blocks(card) if "sae_lens" not in block]


def record(folder: Path, others: Sequence[Path] = (), base: Path | None = None) -> list[str]:
    """Run the quick start of a release folder's card, and put its output below the code.

    Args:
        folder: The release folder; it is staged.
        others: Further release folders that the code loads.
        base: Folder of the base model, where the code loads it; `config.json` names its repo and revision.

    Returns:
        What each block printed.

    Raises:
        QuickStartError: the card has no quick start, or it fails.
    """
    _forget(folder)  # what ran before was printed by models: none of it may be taken for code
    stage(folder)
    if not (blocks := code_blocks((folder / CARD).read_text("utf-8"))):
        raise QuickStartError(f"{folder}: expected a quick start in {CARD}, got none; set release.org")
    if read_manifest(folder)["kind"] == "model" and not is_hub_id(
        read_config(folder / "config.json")["base_model"]["id"]
    ):
        raise QuickStartError(
            f"{folder}: expected a base model that the quick start can load, got none on a Hub; readers "
            "bring their own: publish without trying, or set model.id or model.published in the recipe"
        )
    with tempfile.TemporaryDirectory() as name, background(Path(name) / "hub") as url:
        if base is not None:
            send_base(folder, base, url)
        for one in [*others, folder]:
            manifest = read_manifest(one)
            release = Release.of(one)
            access = Access(gated="auto") if release.prompts else AS_IT_IS
            send(release, Target(repo_id(manifest), manifest["kind"], url, TOKEN), access)
        printed = run(blocks, url, Path(name) / "home")
    manifest = read_manifest(folder)
    manifest["facts"]["quick_start"] = [
        {"code": hashlib.sha256(block.encode()).hexdigest(), "output": output}
        for block, output in zip(blocks, printed, strict=True)
        if output.strip()
    ]
    write_manifest(folder, manifest)
    stage(folder)
    return printed


def _forget(folder: Path) -> None:
    """Take an earlier run's output out of the manifest."""
    manifest = read_manifest(folder)
    if manifest["facts"].pop("quick_start", None) is not None:
        write_manifest(folder, manifest)


def send_base(folder: Path, base: Path, url: str) -> None:
    """Put a base model where the quick start of `folder` looks for it."""
    facts = read_config(folder / "config.json")["base_model"]
    api = HfApi(endpoint=url, token=TOKEN)
    api.create_repo(facts["id"])
    api.upload_folder(repo_id=facts["id"], folder_path=base)
    if facts["revision"] not in ("", "main"):
        api.create_tag(facts["id"], tag=facts["revision"])


def run(blocks: Sequence[str], url: str, home: Path) -> list[str]:
    """Run blocks of code one after another in one fresh process against the Hub at `url`.

    Returns:
        What each of them printed.

    Raises:
        QuickStartError: the process failed.
    """
    home.mkdir(parents=True, exist_ok=True)
    script = home / "quick_start.py"
    ends = [END.format(i) for i in range(len(blocks))]
    script.write_text("".join(f"{b}\nprint({e!r})\n" for b, e in zip(blocks, ends, strict=True)), "utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", RUN, str(script)],
            env=client_env(url, home) | {"PYTHONPATH": str(ROOT), "COLUMNS": "110"},
            cwd=home,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise QuickStartError(f"the quick start as printed did not end within {PATIENCE} s") from error
    if done.returncode:
        raise QuickStartError(
            f"the quick start as printed fails: {' '.join(done.stderr.split())[-600:]}; mend the release"
        )
    printed, left = [], done.stdout
    for end in ends:
        output, _, left = left.partition(f"{end}\n")
        printed.append(output)
    return printed
