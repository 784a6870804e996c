"""Proves that columns of a TopK are those of the whole: with the GPU's kernel, without, and compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from triton_process import with_triton

from daco.top_k import _as_operator, top_k, top_k_at

SCRIPT = "top_k_triton.py"
CASES = [(15_000, 64), (4_099, 7), (64, 64), (65_536, 64), (70_000, 3)]


def drawn(m: int, n: int = 70) -> torch.Tensor:
    """Pre-activations with many ties."""
    return torch.randn(n, m, generator=torch.Generator().manual_seed(m)).bfloat16().float()


def test_columns_with_the_kernel_are_those_without():
    assert with_triton(SCRIPT, "columns", TRITON_INTERPRET="1").count("equal") == 6


def test_the_kernel_compiles_for_a_gpu():
    assert with_triton(SCRIPT, "compile").count("bytes") == 3


def test_columns_are_those_of_the_whole():
    pre, at = drawn(300), torch.tensor([299, 3, 3, 0])
    expected = top_k(pre, 9)[:, at]
    assert expected.any()
    assert torch.equal(top_k_at(pre, 9, at), expected)
    assert torch.equal(_as_operator(pre, 9, at), expected)


def test_gradients_go_through_what_is_chosen():
    pre = drawn(300).requires_grad_()
    top_k_at(pre, 9, torch.arange(40)).sum().backward()
    assert torch.equal(pre.grad != 0, (top_k(pre, 9) > 0) & (torch.arange(300) < 40))


def test_the_operator_tells_a_compiler_what_it_gives():
    pre, at = drawn(300), torch.tensor([299, 3, 0])
    torch.library.opcheck(_as_operator, (pre, 9, at))
    found = torch.compile(lambda x: _as_operator(x, 9, at) * 2, fullgraph=True, backend="eager")(pre)
    assert torch.equal(found, 2 * top_k(pre, 9)[:, at])


def test_one_compilation_serves_every_number_of_rows_and_columns():
    compiled = CompileCounter()
    columns = torch.compile(_as_operator, fullgraph=True, backend=compiled, dynamic=True)
    for n in (2, 5, 9):
        pre, at = drawn(300, n), torch.arange(0, 300, 10 * n)
        assert torch.equal(columns(pre, 9, at), top_k(pre, 9)[:, at])
    assert compiled.frame_count == 1


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@on_a_gpu
@pytest.mark.parametrize(("m", "k"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_columns_on_a_gpu_are_those_of_a_cpu(m, k, dtype):
    pre, at = drawn(m).to(dtype), torch.arange(0, m, 13)
    pre[0, 13], pre[1], pre[2, 26] = torch.nan, torch.nan, torch.inf
    with torch.no_grad():
        assert torch.equal(top_k_at(pre.cuda(), k, at.cuda()).cpu(), top_k(pre, k)[:, at])


@on_a_gpu
def test_a_compiled_gpu_finds_the_same_columns_also_as_a_replayed_graph():
    at = torch.arange(0, 300, 13)
    columns = torch.compile(lambda x, at: top_k_at(x + 0, 9, at) * 1, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):
            pre = drawn(300).roll(seed, 1)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(columns(pre.cuda(), at.cuda()).cpu(), top_k(pre, 9)[:, at])


@on_a_gpu
def test_columns_on_a_gpu_wait_for_nothing():
    pytest.importorskip("triton")
    pre, at = drawn(300).cuda(), torch.arange(0, 300, 13, device="cuda")
    top_k_at(pre, 9, at)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        top_k_at(pre, 9, at)
    finally:
        torch.cuda.set_sync_debug_mode("default")
