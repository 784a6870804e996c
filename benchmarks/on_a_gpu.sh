#!/usr/bin/env bash
# All checks and benchmarks that need a GPU (one of 80 GB or more; about 15 minutes on an H200), into benchmarks/results:
#   benchmarks/on_a_gpu.sh [PART ...]
# Parts: tests top_k retrieval sae sae_end_to_end steering compiled evaluation; default: all.
# SAELENS_PYTHON and SPARSIFY_PYTHON name pythons of environments with sae-lens 6.54 and eai-sparsify 1.3.3, where there
# are any; PYTHON the one with DACO. A GPU of 80 GB holds not all trainers of `wide` at once: name some by --only.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
trainers=(--saelens "${SAELENS_PYTHON:-}" --sparsify "${SPARSIFY_PYTHON:-}")
run() { echo "== $*"; OPENBLAS_NUM_THREADS=1 "$python" -W ignore -m "$@"; }

tests() {
  run pytest -q tests/test_{sae_kernels,retrieval,retrieval_kernels,solver_kernels,sparse_coding,top_k,atoms,replays,steering_gpu}.py \
    -k "gpu or cuda or kernel"
}
top_k() { run benchmarks.top_k; }
retrieval() { run benchmarks.retrieval --full --device cuda --rounds 3; }
sae() {
  local common=(--device cuda --threads 4 "${trainers[@]}")
  run benchmarks.sae_training --shape paper --batch 4096 --rounds 7 --steps 5 "${common[@]}"
  run benchmarks.sae_training --shape wide --rounds 5 --steps 4 "${common[@]}"
}
sae_end_to_end() { run benchmarks.sae_end_to_end; }
steering() { run benchmarks.steering --shape 7b --device cuda --batch 1 16 --loads 0; }
compiled() { run benchmarks.steering --shape 7b --device cuda --mode compiled --loads 0 --who actadd daco_exact; }
evaluation() {
  run benchmarks.evaluation_command --shape 7b --max-answer 64
  run benchmarks.evaluation --shape 7b --device cuda --methods none,daco --rounds 2
}

for part in "${@:-tests top_k retrieval sae sae_end_to_end steering compiled evaluation}"; do
  for one in $part; do "$one"; done
done
