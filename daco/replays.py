"""Work on a GPU that is recorded as a CUDA graph and replayed: one launch instead of a hundred.

Reads and writes nothing. A decode step of an MLLM is mostly the host's launching of kernels, so that what a
method launches counts more there than what it computes.
"""

import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Work = Callable[..., tuple[Tensor, ...]]
"""Tensors to tensors by the same steps on the same memory: it neither waits for the GPU nor branches."""


class Replays:
    """Recorded work, which is forgotten with the tensor that it belongs to.

    Args:
        most: Recordings of one tensor, at most; what comes later runs step by step.
    """

    def __init__(self, most: int = 8) -> None:
        self.lock, self._most = threading.RLock(), most
        self._of: Any = WeakTensorKeyDictionary()

    def run(self, owner: Tensor, key: Hashable, work: Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`work(*inputs)`: step by step the first time, recorded the second, then replayed.

        What comes back may be overwritten by the next call: hold `lock` until it is copied and the GPU was
        waited for.

        Args:
            owner: What else the work reads must live as long as this.
            key: Says which work it is; of the same key, inputs have the same shapes, and what else it reads
                lies at the same addresses.
            work: What to do.
            inputs: On a GPU.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return work(*inputs)
        known = self._of.setdefault(owner, {})
        if key not in known:
            if len(known) < self._most:
                known[key] = None
            return work(*inputs)
        if known[key] is None:
            known[key] = _recorded(work, inputs)
        recorded: _Recorded | bool = known[key]
        return work(*inputs) if isinstance(recorded, bool) else recorded(inputs)


class _Recorded:
    """A CUDA graph with the memory that it reads and writes."""

    def __init__(self, work: Work, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [t.clone() for t in inputs]
        self._graph = torch.cuda.CUDAGraph()
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # what only a first call does must not be recorded
            work(*self._inputs)
        here.wait_stream(aside)
        # torch's own stream stays on the device of the first recording, and would record nothing of others
        with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
            self._outputs = work(*self._inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for own, new in zip(self._inputs, inputs, strict=True):
            own.copy_(new)
        self._graph.replay()
        return self._outputs


def _recorded(work: Work, inputs: tuple[Tensor, ...]) -> "_Recorded | bool":
    """The recording; False where it cannot be made."""
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(inputs[0].device):
            return _Recorded(work, inputs)
    except Exception as error:  # whatever CUDA raises, also where memory is short
        warnings.warn(f"goes on without a CUDA graph, more slowly: {error}", stacklevel=2)
        return False
