"""Which of torch's kernels attend where every batch has a length of its own; no files."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_plans() -> Iterator[None]:
    """Attention, inside, by kernels that plan nothing; also a decorator. It changes nothing but on a GPU.

    On Hopper and Blackwell torch gives masked attention to cuDNN, which makes a plan for each length that it
    has not seen: every token of an answer, and most batches of prompts. That costs more than attending, and
    falls on whatever runs first.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
