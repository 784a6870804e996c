"""Proves that a step with the GPU's kernels is that of the plain products, and does without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builders import sae_step

SCRIPT = Path(__file__).with_name("kernels_triton.py")


def with_triton(what: str, **environment: str) -> str:
    """What the script says in a process that can import Triton, which a CPU build of torch lacks."""
    place = os.environ.get("TRITON_PATH")
    if not place:
        pytest.skip("TRITON_PATH is not set: it names a folder with Triton")
    paths = os.pathsep.join([str(Path(place).resolve()), str(SCRIPT.parent), str(SCRIPT.parent.parent)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_with_kernels_is_that_with_plain_products():
    assert with_triton("step", TRITON_INTERPRET="1").count("equal") == 4


def test_the_kernels_compile_for_a_gpu():
    assert with_triton("compile").count("bytes") == 6


def test_without_triton_or_without_a_gpu_the_plain_products_are_taken(monkeypatch):
    monkeypatch.setattr(sae_step.importlib.util, "find_spec", lambda name: None)
    sae_step.triton_kernels.cache_clear()
    assert sae_step.triton_kernels() is None
    monkeypatch.setattr(sae_step, "triton_kernels", lambda: "kernels")
    assert sae_step.kernels_for(torch.zeros(1)) is None
    assert sae_step.kernels_for(torch.zeros(1, device="meta")) is None
