#!/usr/bin/env bash
# Makes a virtual environment with clip-retrieval, whose pins (numpy<2, pandas<3, pyarrow<16) allow no other.
# Usage: clip_retrieval_env.sh FOLDER [PYTHON]
set -euo pipefail
folder="$1"
python="${2:-python3}"
"$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
  clip-retrieval==2.45.0 torch==2.13.0 torchvision==0.28.0 "setuptools<81"
# torchvision's wheel for CUDA does not import on a torch without it unless these operators are known.
site="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
cat > "$site/sitecustomize.py" <<'END'
try:
    import torch

    if not torch.cuda.is_available():
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except (ImportError, RuntimeError):
    pass
END
"$folder/bin/clip-retrieval" --help > /dev/null 2>&1 || { "$folder/bin/clip-retrieval" --help; exit 1; }
