"""Proves that a search with the GPU's kernel is that without it, and does without Triton."""

import pytest
import torch
from triton_process import with_triton

from builders import proposals

SCRIPT = "retrieval_triton.py"


def test_a_search_with_the_kernel_is_that_of_the_naive_twin() -> None:
    assert with_triton(SCRIPT, "search", TRITON_INTERPRET="1").count("equal") == 28


def test_the_kernel_compiles_for_a_gpu() -> None:
    assert with_triton(SCRIPT, "compile").count("bytes") == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_with_triton_has_the_kernel() -> None:
    pytest.importorskip("triton")
    assert proposals.kernels_for(torch.device("cuda")) is not None
