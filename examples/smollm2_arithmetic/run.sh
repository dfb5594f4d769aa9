#!/usr/bin/env bash
# Turns the packaged weights into a Hugging Face folder (once), then trains on 2 CPU ranks.
#   bash examples/smollm2_arithmetic/run.sh [--section.field value ...]
# OUTPUT_DIR names the run directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
run="${OUTPUT_DIR:-runs/smollm2_arithmetic-$(date +%Y%m%d-%H%M%S)}"
export OMP_NUM_THREADS=1

python tools/smollm2_from_wheel.py .cache/smollm2
torchrun --standalone --nproc-per-node 2 -m megatron_fipo.cli train examples/smollm2_arithmetic/config.yaml \
  --output_dir "$run" "$@"
python tools/show_evaluation.py "$run"
