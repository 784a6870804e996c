"""Proves that a search with the GPU's kernel is that without it, and does without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builders import proposals

SCRIPT = Path(__file__).with_name("retrieval_triton.py")


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


def test_a_search_with_the_kernel_is_that_of_the_naive_twin() -> None:
    assert with_triton("search", TRITON_INTERPRET="1").count("equal") == 28


def test_the_kernel_compiles_for_a_gpu() -> None:
    assert with_triton("compile").count("bytes") == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_with_triton_has_the_kernel() -> None:
    pytest.importorskip("triton")
    assert proposals.kernels_for(torch.device("cuda")) is not None
