"""Proves that the toy LLaVA is published as a plain transformers repo whose quick start runs as printed."""

import re
from pathlib import Path

import pytest
import yaml
from hub_fixture import WRITER, LocalHub, local_hub  # noqa: F401
from safetensors.torch import load_file

from builders.toyworld.model import Sizes
from builders.toyworld.train import Plan, Trainer
from cards.toy_llava import QUESTIONS
from daco.errors import ArtefactNotFoundError, TagMovedError
from hub.base_model import publish_base_model, stage_base_model
from hub.local.card_rules import check_card
from hub.remote import Target

SMALL = Plan(sizes=Sizes(hidden=32, mlp=37, n_layers=2, vision_hidden=32, vision_layers=1), steps=1, batch=2,
             sight_steps=1, sight_batch=2)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a training writes it, after a step of each phase."""
    folder = tmp_path_factory.mktemp("base") / "llava"
    trainer = Trainer(SMALL)
    for _ in range(trainer.total):
        trainer.step()
    trainer.write(folder)
    return folder


def test_the_card_is_valid_and_says_what_it_is(model: Path, tmp_path: Path) -> None:
    stage_base_model(model, tmp_path / "staged", "local/toy-llava", "1.0.0")
    text = (tmp_path / "staged" / "README.md").read_text("utf-8")
    assert check_card(text, "models") == ([], [])
    metadata = yaml.safe_load(text.removeprefix("---\n").split("\n---\n")[0])
    expected = {"license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    assert expected.items() <= metadata.items()
    for part in (
        "not the authors' release",
        "What it is not",
        "drawn",
        "by construction",
        "2 text blocks of width 32",
    ):
        assert part in text, part


def test_staging_again_changes_no_byte(model: Path, tmp_path: Path) -> None:
    (model / "notes.txt").write_text("not published")
    releases = [
        stage_base_model(model, tmp_path / name, "local/toy-llava", "1.0.0") for name in ("a", "b", "a")
    ]
    assert releases[0].files == releases[1].files == releases[2].files
    assert {"README.md", "config.json", "example.png", "model.safetensors"} <= releases[0].files.keys()
    assert "notes.txt" not in releases[0].files


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactNotFoundError, match="expected a model in"):
        stage_base_model(tmp_path, tmp_path / "staged", "local/toy-llava", "1.0.0")


def test_the_quick_start_runs_as_printed(local_hub: LocalHub, model: Path, tmp_path: Path) -> None:  # noqa: F811
    target = Target("local/toy-llava", "model", local_hub.url, WRITER)
    first = publish_base_model(model, tmp_path / "staged", target, "1.0.0")
    again = publish_base_model(model, tmp_path / "staged", target, "1.0.0")
    assert (first.committed, again.committed) == (True, False)
    assert first.commit == again.commit == local_hub.api().repo_info("local/toy-llava", revision="v1.0.0").sha
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "staged" / "README.md").read_text("utf-8"), re.DOTALL
    )
    torchvision = "from builders.vision import ensure_torchvision\nensure_torchvision()\n"
    printed = local_hub.run(torchvision + code)
    assert [line.split(" -> ")[0] for line in printed.splitlines()] == list(QUESTIONS)


def test_a_tag_never_moves(local_hub: LocalHub, model: Path, tmp_path: Path) -> None:  # noqa: F811
    target = Target("local/toy-llava", "model", local_hub.url, WRITER)
    publish_base_model(model, tmp_path / "staged", target, "1.0.0")
    config = (model / "config.json").read_bytes()
    (model / "config.json").write_bytes(config + b"\n")
    try:
        with pytest.raises(TagMovedError):
            publish_base_model(model, tmp_path / "staged", target, "1.0.0")
    finally:
        (model / "config.json").write_bytes(config)


def test_weights_are_published_as_they_lie(model: Path, tmp_path: Path) -> None:
    stage_base_model(model, tmp_path / "staged", "local/toy-llava", "1.0.0")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "staged"))
    assert all(ours[name].equal(theirs[name]) for name in {*ours, *theirs})
