"""Proves that two processes with half of each batch train the SAE that one trains, and so does torchrun."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_rows import ACTIVATIONS, CONFIG, Rows, draw
from safetensors.torch import load_file, save_file
from small_run import D_MODEL, LAYERS, write_activations, write_directions

from builders import pipeline
from builders import train_sae as stage
from builders.recipe import load_recipe
from builders.sae_batches import own_share
from daco.errors import RecipeError

WORLD = 2


def trained(activation: str) -> dict[str, torch.Tensor]:
    """A short training; under torch.distributed on this process's half of each batch."""
    # so many tokens that hardly one is drawn twice at once: which of two equal values is kept is arbitrary
    z = (draw(900, 6) @ draw(6, D_MODEL, seed=2) + 0.1 * draw(900, D_MODEL, seed=3)).float()
    options = {"activation": activation, "batch": 18, "steps": 40, "eval_steps": 20, "l1": 0.1}
    config = dataclasses.replace(CONFIG, **options, aux_k=2, dead_tokens=100)
    training = stage.train_sae(Rows(z), Rows(z[:20]), config, seed=1, directions=z[:11])
    fve = torch.tensor([row["fve"] for row in training.records])
    return training.exported() | {"fve": fve, "fired_at": training.state["fired_at"]}


def process(rank: int, port: int, folder: Path) -> subprocess.Popen:
    facts = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
    }
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    environment = (
        os.environ | facts | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    )
    return subprocess.Popen([sys.executable, __file__, str(folder)], env=environment)


def main(folder: Path) -> None:
    with stage.in_a_group():
        rank = torch.distributed.get_rank()
        for activation in ACTIVATIONS:
            save_file(trained(activation), folder / f"{activation}-{rank}.safetensors")
        with pytest.raises(RecipeError, match="expected a multiple of the 2 processes, got 17"):
            own_share(torch.arange(17).numpy())
        assert group_threads() or sys.platform != "linux"
    assert not group_threads()  # one that is left aborts a process that ends, every so often


def group_threads() -> list[str]:
    """Threads of torch's process group, by name (Linux)."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [process(rank, port, tmp_path) for rank in range(WORLD)]
    assert [one.wait(120) for one in running] == [0, 0]
    for activation in ACTIVATIONS:
        first, second = (load_file(tmp_path / f"{activation}-{rank}.safetensors") for rank in range(WORLD))
        alone = trained(activation)
        for name, value in alone.items():
            if name != "fired_at":  # what a process saw since the last look is its own
                assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name].float(), value.float(), rtol=1e-3, atol=1e-4, msg=name)


RECIPE = """
[model]
tiny = "llava"
[activations]
layers = [1, 2]
[sae]
n_atoms = 37
k = 3
steps = 8
batch = 18
eval_steps = 4
checkpoint_steps = 3
holdout = 0.3
"""


def test_the_stage_runs_under_torchrun_and_a_plain_run_finds_it_done(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    write_activations(tmp_path / "two")
    write_directions(tmp_path / "two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    command = [*torchrun, "-m", "builders.train_sae", str(recipe), "--out", str(tmp_path / "two")]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=root)
    assert done.returncode == 0, done.stderr
    assert pipeline.run(load_recipe(recipe), tmp_path / "two", only="sae") == []
    write_activations(tmp_path / "one")
    write_directions(tmp_path / "one")
    assert pipeline.run(load_recipe(recipe), tmp_path / "one", only="sae") == ["sae"]
    for layer in LAYERS:
        one, two = (
            load_file(tmp_path / run / "sae" / f"layers.{layer}" / "sae_weights.safetensors")
            for run in ("one", "two")
        )
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3, msg=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
