"""Proves that a step with the GPU's kernels is that of the plain products, and does without Triton."""

import dataclasses

import pytest
import torch
from sae_rows import ACTIVATIONS, CONFIG, draw, random_weights
from test_sae_step import close, config_of, stepped
from triton_process import with_triton

from builders import sae_step
from builders.sae_training import Training

SCRIPT = "kernels_triton.py"


def test_a_step_with_kernels_is_that_with_plain_products():
    assert with_triton(SCRIPT, "step", TRITON_INTERPRET="1").count("equal") == 4


@pytest.mark.parametrize(("what", "cases"), [("largest", 6), ("training", 2)])
def test_what_else_kernels_do_is_what_torch_does(what, cases):
    assert with_triton(SCRIPT, what, TRITON_INTERPRET="1").count("equal") == cases


def test_a_step_that_reads_bfloat16_copies_is_the_exact_one_but_for_their_rounding():
    assert with_triton(SCRIPT, "halves", TRITON_INTERPRET="1").count("rounded") == 4


def test_the_kernels_compile_for_a_gpu():
    assert with_triton(SCRIPT, "compile").count("bytes") == 12


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@on_a_gpu
def test_a_gpu_with_triton_has_the_kernels():
    pytest.importorskip("triton")
    assert sae_step.kernels_for(torch.zeros(1, device="cuda")) is not None


@on_a_gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_on_a_gpu_is_that_of_a_cpu(activation):
    x, config = draw(17, 64, seed=9).float(), config_of(activation)
    weights = {name: w.float() / 8 for name, w in random_weights(37, 64, activation).items()}
    here = stepped(x, weights, config, 0.3)
    there = stepped(x.cuda(), {name: w.cuda() for name, w in weights.items()}, config, 0.3)
    close(there.loss.cpu(), here.loss)
    for name, gradient in here.by_name.items():
        close(there.by_name[name].cpu(), gradient, 1e-4)


@on_a_gpu
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_step_on_a_gpu_waits_for_nothing(activation):
    config = dataclasses.replace(CONFIG, activation=activation, aux_k=2, select="bfloat16")
    training = Training({n: w.float().cuda() for n, w in random_weights(37, 64).items()}, 1.0, config)
    z = draw(17, 64, seed=9).float().cuda()
    training.step(z)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step(z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize(("m", "k"), [(15_000, 64), (65_536, 64), (4_099, 7), (64, 64)])
def test_the_k_largest_on_a_gpu_are_those_of_torch(m, k):
    pre = draw(70, m).bfloat16().float().cuda()  # with ties
    values, places = sae_step.k_largest(pre, k)
    assert torch.equal(pre.gather(1, places), values)
    assert torch.equal(values.sort(1, descending=True).values, pre.topk(k, 1).values)
    assert all(len(set(row)) == k for row in places.tolist())


@on_a_gpu
def test_training_on_a_gpu_is_that_on_a_cpu():
    z, config = draw(17, 64, seed=9).float(), config_of("topk", learning_rate=1e-2)
    start = {name: w.float() / 8 for name, w in random_weights(37, 64).items()}
    start["W_dec"] = torch.nn.functional.normalize(start["W_dec"], dim=1)
    here = Training(start, 1.0, config)
    there = Training({name: w.cuda() for name, w in start.items()}, 1.0, config)
    for _ in range(3):
        here.step(z)
        there.step(z.cuda())
    for name, weight in here.parameters.items():
        close(there.parameters[name].detach().cpu(), weight.detach(), 1e-4)
