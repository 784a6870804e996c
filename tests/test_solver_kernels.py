"""Proves that codes found with the GPU's kernel are those found without, and that none is needed."""

from types import SimpleNamespace

import torch
from triton_process import with_triton

from daco import sparse_coding

SCRIPT = "solver_triton.py"


def test_codes_with_the_kernel_are_those_without():
    said = with_triton(SCRIPT, "codes", TRITON_INTERPRET="1")
    assert said.count("equal") == 2
    assert int(said.split()[-8]) > 0  # rows that need more than the kernel's sets were among them


def test_the_kernel_compiles_for_a_gpu():
    assert with_triton(SCRIPT, "compile").count("bytes") == 4


def test_recordings_belong_to_the_memory_that_they_read():
    rows, gram = torch.eye(3), torch.eye(3)
    known = [sparse_coding._Dictionary(rows, g, None, True) for g in (gram, None)]
    before = [one.places for one in known]
    assert before[0] != before[1]
    rows.data = rows.data.clone()  # as when a module is moved away and back
    assert [one.places for one in known] != before
    assert known[0].places[1] == before[0][1]


def test_no_rounds_give_no_code_with_the_kernel_either(monkeypatch):
    monkeypatch.setattr(sparse_coding, "kernels_for", lambda x: SimpleNamespace(WIDTHS=(128, 256)))
    z, D = torch.ones(2, 3), torch.eye(3).repeat(700, 1)
    found = sparse_coding.elastic_net(z, D, torch.full((2,), 0.5), 0.9, max_rounds=0, relative=True)
    assert not found.code.any()
    assert not found.certified.any()
