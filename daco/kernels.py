"""Modules of Triton kernels, imported where Triton is and works; reads and writes nothing."""

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any


@cache
def kernels_of(module: str, what: str) -> Any:
    """A module of Triton kernels that ran once; None, with a warning where Triton is but does not work.

    Triton comes with torch's CUDA builds. It compiles at first use, for which some machines lack a compiler,
    and some GPUs are too old.

    Args:
        module: Its full name; its `tried()` runs a kernel.
        what: What then goes on in torch, for the warning.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module(module)
        kernels.tried()
    except Exception as error:  # whatever Triton raises where it cannot compile
        warnings.warn(f"{what} without Triton, more slowly: {error}", stacklevel=2)
        return None
    return kernels
