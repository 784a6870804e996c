"""Runs a script where Triton can be imported, which a CPU build of torch lacks; for the tests of kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def with_triton(script: str, what: str, **environment: str) -> str:
    """What a script beside this says in a process of its own; skips where no folder with Triton is named."""
    place = os.environ.get("TRITON_PATH")
    if not place:
        pytest.skip("TRITON_PATH is not set: it names a folder with Triton")
    paths = os.pathsep.join([str(Path(place).resolve()), str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, str(HERE / script), what],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
