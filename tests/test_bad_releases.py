"""Proves that each way in which a release or its repo can be bad ends in an error from a line of its own.

The cases are the rows of CONTRIBUTING's table that name this test; each is made, refused, and its refusal
traced to the line that it comes from.
"""

import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_contributing
from hub_fixture import READER, WRITER, LocalHub, running
from huggingface_hub import HfApi, hf_hub_download
from release_fixture import N_STIMULI, SOURCES, write_dataset_release, write_model_release
from safetensors.numpy import load_file, save
from test_gate import (
    IMAGES,
    PNG,
    STIMULI,
    TOKEN,
    card,
    damaged,
    dataset,
    extra_column,
    infinite,
    lost_rows,
    manifest_of,
    model,
    rewrite,
    symlink,
    unlink,
    without_release,
    write,
)
from test_publish import next_version, slept  # noqa: F401

import daco
import hub.gate
import hub.plan
from builders.release import removed_ids, table_split, write_split
from daco.errors import DacoError
from daco.load import resolve
from daco.tables import LINKS, read_table
from hub.__main__ import _checked
from hub.base_model import stage_base_model
from hub.changes import write_changelog, yank
from hub.gate import check_release
from hub.plan import Access, Refusal
from hub.propose import propose
from hub.publish import publish
from hub.quick_start import record, run
from hub.remote import Target
from hub.stage import stage
from hub.verify import verify

ROOT = Path(__file__).parents[1]
WEIGHTS = "layers.1/sae_weights.safetensors"
REPO = "org/DACO-tiny"

Origin = tuple[str, int]


class Traced(Refusal):
    """A refusal that knows the line it comes from."""

    origin: Origin


def raised_at(error: BaseException) -> Origin:
    """The innermost line of ours that an error came from."""
    ours = [
        (one.filename, one.lineno or 0)
        for one in traceback.extract_tb(error.__traceback__)
        if any(
            part in one.filename
            for part in (f"{ROOT}/{room}/" for room in ("daco", "builders", "cards", "hub"))
        )
    ]
    return ours[-1]


class Place:
    """Where a case is made: a folder of its own, and a Hub that all share."""

    def __init__(self, folder: Path, local: LocalHub, number: int) -> None:
        self.folder, self.local, self.number = folder, local, number

    @property
    def release(self) -> Path:
        """Where its release goes."""
        return self.folder / "release"

    def target(self, token: str = WRITER, kind: str = "model") -> Target:
        """A repo of its own."""
        return Target(f"org/case-{self.number}", kind, self.local.url, token)

    def published(self) -> Path:
        """A model release that is out."""
        publish(write_model_release(self.release), self.target())
        return self.release

    def failing(self, method: str, path: str, status: int) -> None:
        """Answers that fail for as long as anybody asks."""
        self.local.faults.fail(method, path, status, times=99)

    def load(self, repo: str = "", **options: Any) -> Any:
        """Load a model from the Hub into an empty cache."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("daco.load.HfApi", partial(HfApi, endpoint=self.local.url))
            patch.setattr("daco.load.hf_hub_download", partial(hf_hub_download, endpoint=self.local.url))
            name = repo or self.target().repo_id
            return daco.SteeringSAE.from_pretrained(
                name, cache_dir=self.folder / "cache", **{"token": WRITER} | options
            )


def weights(folder: Path, **changes: Any) -> Path:
    """Change tensors of a layer's weights."""
    tensors = load_file(folder / WEIGHTS)
    return rewrite(folder, WEIGHTS, save(tensors | {name: f(tensors[name]) for name, f in changes.items()}))


def atoms(folder: Path, table: Callable[[pa.Table], pa.Table]) -> Path:
    """Change the atoms of a layer."""
    path = folder / "layers.1" / "atoms.parquet"
    pq.write_table(table(pq.read_table(path)), path)
    return rewrite(folder, "layers.1/atoms.parquet", path.read_bytes())


def released_at(place: Place, version: str, **facts: Any) -> Path:
    """Another version of what is out."""
    return next_version(place.published(), version, **facts)


def nan(values: Any) -> Any:
    values = values.copy()
    values.reshape(-1)[0] = float("nan")
    return values


Case = tuple[Callable[[Place], Any], str, str]
"""What is done, the error's class (a refusal is a RefusedError), and what it says."""

CASES: dict[str, Case] = {
    # a release folder that the gate looks at
    "release without a manifest": (
        lambda p: check_release(unlink(model(p.release), "manifest.json")),
        "RefusedError", "expected manifest.json, got none",
    ),
    "manifest that is no JSON": (
        lambda p: check_release(write(model(p.release), "manifest.json", b"{")),
        "RefusedError", "expected JSON, got",
    ),
    "manifest that is a list": (
        lambda p: check_release(write(model(p.release), "manifest.json", b"[]")),
        "RefusedError", "expected a JSON object, got list",
    ),
    "manifest without a version of the format": (
        lambda p: check_release(manifest_of(model(p.release), format_version=None)),
        "RefusedError", "expected format_version like",
    ),
    "manifest of a newer format": (
        lambda p: check_release(manifest_of(model(p.release), format_version="9.0.0")),
        "RefusedError", "pip install --upgrade daco",
    ),
    "manifest that breaks a rule": (
        lambda p: check_release(manifest_of(model(p.release), kind="space")),
        "RefusedError", "kind: expected 'dataset' or 'model', got 'space'",
    ),
    "listed file that is missing": (
        lambda p: check_release(unlink(model(p.release), "evaluation.json")),
        "RefusedError", "bytes, got none",
    ),
    "listed file that is cut off": (
        lambda p: check_release(write(model(p.release), "evaluation.json", b"{")),
        "RefusedError", "got 1: truncated?",
    ),
    "listed file that was altered": (
        lambda p: check_release(write(f := model(p.release), "evaluation.json",
                                      (f / "evaluation.json").read_bytes()[::-1])),
        "RefusedError", "altered",
    ),
    "table that cannot be read": (
        lambda p: check_release(damaged(dataset(p.release), -20)),
        "RefusedError", "expected a table that can be read",
    ),
    "file that the manifest does not list": (
        lambda p: check_release(write(model(p.release), "notes.txt", b"x")),
        "RefusedError", "the manifest does not list it",
    ),
    "link in place of a file": (
        lambda p: check_release(symlink(model(p.release))),
        "RefusedError", "expected a file, got a link",
    ),
    "file of a format that runs code": (
        lambda p: check_release(model(p.release, extra_files={"w/sae.PT": b"\x80\x04."})),
        "RefusedError", "can run code when it is opened",
    ),
    "file of a format that cannot be checked": (
        lambda p: check_release(model(p.release, extra_files={"photos.zip": PNG})),
        "RefusedError", "expected a file of .parquet, .safetensors,",
    ),
    "file of text that is no text": (
        lambda p: check_release(model(p.release, extra_files={"photo.txt": PNG})),
        "RefusedError", "expected text in UTF-8, got other bytes",
    ),
    "version that the changelog's changes do not allow": (
        lambda p: check_release(model(p.release, facts={"changes": {"since": "1.0.0", "level": "major"}})),
        "RefusedError", "expected at least v2.0.0 after a major change",
    ),
    "release of no source": (
        lambda p: check_release(model(p.release, sources=[])),
        "RefusedError", "expected at least one source, got none",
    ),
    "source of no licence": (
        lambda p: check_release(model(p.release, sources=[SOURCES[0] | {"licence": "tbd"}])),
        "RefusedError", "expected a licence, got tbd",
    ),
    "source whose licence forbids to pass it on": (
        lambda p: check_release(model(p.release, sources=[SOURCES[0] | {"licence": "All rights reserved"}])),
        "RefusedError", "expected a licence to pass on what is made from it",
    ),
    "release whose licence forbids to pass it on": (
        lambda p: check_release(model(p.release, recipe=without_release(licence="cc-by-nd-4.0"))),
        "RefusedError", "expected a licence that lets others pass it on",
    ),
    "picture of a source that forbids it": (
        lambda p: check_release(model(p.release, extra_files={"look/a.JPG": PNG})),
        "RefusedError", "it is a picture, which 'Drawn pairs' does not let us pass on",
    ),
    "column of pixels of a source that forbids it": (
        lambda p: check_release(dataset(p.release, stimuli_columns={"image": IMAGES})),
        "RefusedError", "it holds image bytes, which 'Drawn pairs'",
    ),
    "release without a card": (
        lambda p: check_release(write_model_release(p.release)),
        "RefusedError", "expected a card, got none",
    ),
    "card whose metadata a Hub refuses": (
        lambda p: check_release(card(model(p.release), "tags:\n", "tags: [\n")),
        "RefusedError", "metadata: invalid YAML",
    ),
    "metadata that no release may set": (
        lambda p: check_release(card(model(p.release), "tags:\n", "widget: []\ntags:\n")),
        "RefusedError", "'widget' is not among the keys that a release may set",
    ),
    "card that lacks a section": (
        lambda p: check_release(card(model(p.release), "## Limits and misuse", "## Praise")),
        "RefusedError", "expected the sections ## Files",
    ),
    "card without a licence of ours": (
        lambda p: check_release(model(p.release, recipe=without_release(licence=""))),
        "RefusedError", "metadata: expected 'license', got none",
    ),
    "card of other configs": (
        lambda p: check_release(card(dataset(p.release), f"    - {STIMULI}", "    - data/*.parquet")),
        "RefusedError", "metadata: expected configs",
    ),
    "secret in any text": (
        lambda p: check_release(dataset(p.release, captions=[f"my key {TOKEN}"])),
        "RefusedError", "it holds what looks like a Hugging Face token",
    ),
    "config that `load_dataset` cannot load": (
        lambda p: check_release(card(dataset(p.release), f"num_examples: {N_STIMULI}", "num_examples: 5")),
        "RefusedError", "load_dataset fails on it: NonMatchingSplitsSizesError",
    ),
    "config of other rows than the manifest's": (
        lambda p: check_release(lost_rows(dataset(p.release))),
        "RefusedError", "load_dataset expected {'train': 29} rows, got {'train': 5}",
    ),
    "config of other columns than the manifest's": (
        lambda p: check_release(extra_column(dataset(p.release))),
        "RefusedError", "streaming: expected columns",
    ),
    "SAE of NaN weights": (
        lambda p: check_release(weights(model(p.release), b_enc=nan)),
        "RefusedError", "expected finite numbers",
    ),
    "SAE of weights of another shape": (
        lambda p: check_release(weights(model(p.release), b_dec=lambda b: b[:-1].copy())),
        "RefusedError", "b_dec",
    ),
    "SAE whose compact file is of other weights": (
        lambda p: check_release(weights(model(p.release), b_enc=lambda b: b + 1)),
        "RefusedError", "made from weights",
    ),
    "SAE whose atoms table is out of order": (
        lambda p: check_release(atoms(model(p.release), lambda t: t.slice(1))),
        "RefusedError", "expected atoms 0 to",
    ),
    "SAE that steers to NaN or infinity": (
        lambda p: check_release(infinite(model(p.release))),
        "RefusedError", "steering a tiny model: expected finite logits",
    ),
    # staging
    "table of a dataset that is no parquet where its card is made": (
        lambda p: stage(rewrite(write_dataset_release(p.release), STIMULI, b"no parquet")),
        "IntegrityError", "expected readable tables",
    ),
    "evaluation that is no JSON object": (
        lambda p: stage(rewrite(write_model_release(p.release), "evaluation.json", "[]")),
        "FormatError", "evaluation.json: expected",
    ),
    "choice of settings that is broken": (
        lambda p: stage(write_model_release(p.release, extra_files={"tuning.json": b"{}"})),
        "FormatError", "tuning.json: expected what `builders.tune` writes",
    ),
    "card without a quick start to run": (
        lambda p: record(write_dataset_release(p.release, recipe={})),
        "QuickStartError", "expected a quick start in README.md, got none",
    ),
    "quick start that fails": (
        lambda p: run(["1 / 0\n"], p.local.url, p.folder / "home"),
        "QuickStartError", "as printed fails: .*ZeroDivisionError",
    ),
    "base model that is no model": (
        lambda p: stage_base_model(p.folder, p.folder / "staged", "org/x", "1.0.0"),
        "ArtefactNotFoundError", "expected a model in",
    ),
    # versions
    "version too low for what changed": (
        lambda p: write_changelog(
            write_dataset_release(p.folder / "new", version="1.0.1", sources=[*SOURCES, {"name": "web"}]),
            write_dataset_release(p.release),
        ),
        "RecipeError", "expected at least v1.1.0 after a minor change",
    ),
    "withdrawal of a version that is not older": (
        lambda p: yank(write_model_release(p.release), "1.0.0", "bad"),
        "RecipeError", "expected a version MAJOR.MINOR.PATCH below 1.0.0",
    ),
    "withdrawal without a reason": (
        lambda p: yank(write_model_release(p.release), "0.9.0", " "),
        "RecipeError", "expected a reason to withdraw",
    ),
    "list of removals that is not there": (
        lambda p: removed_ids(str(p.folder / "none.txt")),
        "RecipeError", "expected a text file",
    ),
    "list of removals that holds another thing than ids": (
        lambda p: removed_ids(str(write(p.folder, "gone.txt", b"cat\n") / "gone.txt")),
        "RecipeError", "line 1: expected a stimulus id of 16 hex digits",
    ),
    "fewer rows than a split promised": (
        lambda p: write_split(p.folder, table_split("links", links(p), LINKS)._replace(rows=10_000)),
        "IntegrityError", "expected 10000 rows, got",
    ),
    # a repo
    "repo id that is none": (
        lambda p: _checked("name", "folder"), "RecipeError", "expected a repo `org/name`, got 'name'",
    ),
    "tag that is out with other content": (
        lambda p: publish(released_at(p, "1.0.0", **{"evaluation.json": b'{"a": {"b": 1}}\n'}), p.target()),
        "TagMovedError", "expected no tag v1.0.0, or one on this very content",
    ),
    "version below the newest that is out": (
        lambda p: publish(released_at(p, "0.9.0"), p.target()),
        "RefusedError", "expected a version above v1.0.0",
    ),
    "next version without a changelog": (
        lambda p: publish(released_at(p, "1.1.0"), p.target()),
        "RefusedError", "expected a changelog since v1.0.0",
    ),
    "private release for a repo that is public": (
        lambda p: publish(released_at(p, "1.1.0", since="1.0.0"), p.target(), Access(private=True)),
        "RefusedError", "expected a private repo, got a public one",
    ),
    "prompts for a repo that is open to all": (
        lambda p: publish(write_model_release(p.release, extra_files={"a.csv": b"prompt\n"}), p.target()),
        "RefusedError", "which leave only to a gated repo",
    ),
    "proposal to a repo that is not there": (
        lambda p: propose(write_model_release(p.release), p.target()),
        "RefusedError", "expected a repo to propose to, got none",
    ),
    "proposal of what is out": (
        lambda p: propose(p.published(), p.target()),
        "RefusedError", "expected something to propose, got what it holds already",
    ),
    "token that may not write": (
        lambda p: publish(write_model_release(p.release), p.target(READER)),
        "HubRefusedError", "check your login and rights",
    ),
    "Hub that keeps failing while it is written to": (
        lambda p: (p.failing("POST", "/commit/", 503), publish(write_model_release(p.release), p.target())),
        "HubUnavailableError", "gave up after 6 tries",
    ),
    "Hub that refuses to be read": (
        lambda p: verify(p.target(), "v1.0.0"), "HubRefusedError", "Repository Not Found",
    ),
    "Hub that keeps failing while it is read": (
        lambda p: (p.published(), p.failing("GET", "/revision/", 500), verify(p.target(), "v1.0.0")),
        "HubUnavailableError", "gave up after 6 tries",
    ),
    "Hub that serves other bytes": (
        lambda p: (p.published(), verify(p.target(), "v1.0.0", b"{}")),
        "VerificationError", "expected the bytes of the local one, got others",
    ),
    # a release that is loaded
    "repo that is not there": (
        lambda p: p.load("org/none"), "ArtefactNotFoundError", "got neither",
    ),
    "revision that is not there": (
        lambda p: (p.published(), p.load(revision="v9.9.9")), "ArtefactNotFoundError", "has no revision",
    ),
    "repo that is gated": (
        lambda p: (p.published(), HfApi(p.local.url, WRITER).update_repo_settings(p.target().repo_id,
                                                                                   gated="manual"),
                   p.load(token=READER)),
        "ArtefactNotFoundError", "is gated: ask for access on its page",
    ),
    "repo without a release": (
        lambda p: (HfApi(p.local.url, WRITER).create_repo(p.target().repo_id), p.load()),
        "ArtefactNotFoundError", "it is no DACO model release",
    ),
    "release that the cache does not have, offline": (
        lambda p: p.load(local_files_only=True), "ArtefactNotFoundError", "not in the cache",
    ),
    "name that is neither folder nor repo": (
        lambda p: p.load("a/b/c"), "ArtefactNotFoundError", "expected an existing folder or a repo id",
    ),
    "Hub that fails while a release is loaded": (
        lambda p: (p.published(), p.local.faults.fail("GET", "/resolve/", drop=True, times=99), p.load()),
        "HubUnavailableError", "could not fetch manifest.json",
    ),
    "folder with a revision": (
        lambda p: resolve(write_model_release(p.release), "model", revision="v1.0.0"),
        "ArtefactNotFoundError", "is a folder, which has no revision",
    ),
    "release of the other kind": (
        lambda p: resolve(write_model_release(p.release), "dataset"),
        "FormatError", "expected a dataset release",
    ),
    "file that the release does not have": (
        lambda p: resolve(write_model_release(p.release), "model").path("none.json"),
        "ArtefactNotFoundError", "expected 'none.json' in manifest.json, got none",
    ),
    "table that is no parquet": (
        lambda p: read_table(write(p.folder, "a.parquet", b"x") / "a.parquet"),
        "IntegrityError", "expected a parquet file",
    ),
    "table that lacks a column": (
        lambda p: read_table(write_dataset_release(p.release) / STIMULI, LINKS),
        "FormatError", "expected column 'concept_id'",
    ),
    "column of another type": (
        lambda p: read_table(
            write_dataset_release(p.release) / STIMULI, pa.schema([("caption", pa.int32())])
        ),
        "FormatError", "column 'caption': expected int32, got string",
    ),
}  # fmt: skip


def links(place: Place) -> pa.Table:
    path = write_dataset_release(place.release) / "data/links/train-00000-of-00001.parquet"
    return read_table(path, LINKS)


def refused(case: Case, place: Place) -> tuple[str, str, Origin]:
    """Error class, message and line of a case's refusal; of several, the one that the case is about."""
    do, _, said = case
    try:
        found = do(place)
    except DacoError as error:
        made = [one for one in TRACED if str(one) in str(error)]
        return type(error).__name__, str(error), made[-1].origin if made else raised_at(error)  # type: ignore[attr-defined]
    matching = [one for one in found if _says(said, str(one))] if isinstance(found, list) else []
    assert matching, found
    return "RefusedError", str(matching[0]), matching[0].origin


TRACED: list[Traced] = []
"""The refusals of the case at hand."""


def _says(pattern: str, text: str) -> bool:
    return re.search(pattern if ".*" in pattern else re.escape(pattern), text) is not None


def test_every_case_is_refused_from_a_line_of_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slept: list[float],  # noqa: F811
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)

    def traced(*arguments: str) -> Traced:
        TRACED.append(made := Traced.__new__(Traced))
        frame = sys._getframe(1)
        error = sys.exc_info()[1]
        Refusal.__init__(made, *arguments)
        origin = (
            raised_at(error) if isinstance(error, DacoError) else (frame.f_code.co_filename, frame.f_lineno)
        )
        object.__setattr__(made, "origin", origin)
        return made

    for module in (hub.gate, hub.plan):
        monkeypatch.setattr(module, "Refusal", traced)
    origins: dict[Origin, str] = {}
    wrong = []
    with running(tmp_path) as local:
        for number, (name, case) in enumerate(CASES.items()):
            TRACED.clear()
            local.faults.rules.clear()
            folder = tmp_path / str(number)
            folder.mkdir()
            try:
                kind, message, origin = refused(case, Place(folder, local, number))
            except Exception as error:  # whatever it is, all are told at the end
                wrong.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if kind != case[1] or not _says(case[2], message):
                wrong.append(f"{name}: expected {case[1]}: {case[2]}, got {kind}: {message[:300]}")
            if origin in origins:
                wrong.append(f"{name}: from {origin}, as {origins[origin]}")
            origins[origin] = name
            assert TOKEN not in message
    assert not wrong, "\n".join(wrong)
    assert len(origins) == len(CASES) >= 40


def test_the_cases_are_the_rows_of_contributing() -> None:
    here = f"`{Path(__file__).name}::test_every_case_is_refused_from_a_line_of_its_own`"
    rows = {row[0]: row[1] for row in test_contributing.rows() if row[2] == here}
    assert set(rows) == set(CASES)
    for name, case in CASES.items():
        assert rows[name].startswith(f"`{case[1]}`"), name
