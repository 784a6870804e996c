"""Makes torchvision importable beside a CPU torch; reads and writes nothing.

Qwen-VL's and InternVL's processors import torchvision. A wheel built for CUDA cannot load its C++ operators
beside a CPU torch, and then its import fails where it registers shape rules for `nms`, although resizing
images needs none of them.
"""

import importlib.util
import sys
from pathlib import Path

import torch


def ensure_torchvision() -> None:
    """Declare the two operators whose absence breaks `import torchvision`; does nothing where they load.

    Called before processors are loaded. Calling `nms` itself still fails, as it should.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
        return
    if _operators_load(Path(spec.origin).parent):
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def _operators_load(folder: Path) -> bool:
    """Load the operators as torchvision itself would; loading them twice is harmless."""
    for library in sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return True
    return False
