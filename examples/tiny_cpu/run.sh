#!/usr/bin/env bash
# Makes the quickstart's model (cached), trains it on 4 CPU ranks, and prints the accuracy before and after.
#   SEED=2 CONFIG=examples/tiny_cpu/dapo.yaml bash examples/tiny_cpu/run.sh [--section.field value ...]
# OUTPUT_DIR names the run directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seed="${SEED:-1}"
config="${CONFIG:-examples/tiny_cpu/config.yaml}"
made=".cache/tiny_cpu/seed_${seed}"
run="${OUTPUT_DIR:-runs/tiny_cpu/$(basename "$config" .yaml)-seed_${seed}-$(date +%Y%m%d-%H%M%S)}"
export OMP_NUM_THREADS=1

python examples/tiny_cpu/make_model.py --seed "$seed" --output "$made"
torchrun --standalone --nproc-per-node 4 -m megatron_fipo.cli train "$config" \
  --seed "$seed" --output_dir "$run" --model.path "$made/model" \
  --data.train.path "$made/train.jsonl" --data.evaluation.path "$made/eval.jsonl" "$@"
python tools/show_evaluation.py "$run"
