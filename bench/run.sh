#!/usr/bin/env bash
# Every benchmark, one command: sets up the peers' environment, runs, writes tables and figures to bench/results/.
#   bench/run.sh           all, about an hour on two quiet cores
#   bench/run.sh quick     each benchmark with few rounds and steps, some minutes: shows that all of it works
# quality.py trains on the runner's own cached activations, read with PROJECT_PYTHON: a python with requirements.txt installed
# (default: the environment of `make env`, made if it is not there).
set -euo pipefail
cd "$(dirname "$0")/.."
peers_python="$(bench/setup_peers.sh)"
results=bench/results
cache="${SAE_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/temporal-sae-runner}"
mkdir -p "$results"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ "${1:-}" = quick ]; then
  steps=(--rounds 3 --warmup 10 --exact-steps 20 --cells topk:4096 standard:4096)
  collect=(--rounds 1 --windows 64)
  quality=(--epochs 2)
  ranks=(--rounds 1 --steps 3 --batches 1024)
else
  steps=(--rounds 15 --memory)
  collect=(--rounds 5)
  quality=(--epochs 20)
  ranks=(--rounds 3)
fi

"$peers_python" bench/train_step.py "${steps[@]}" | tee "$results/train_step.md"
"$peers_python" bench/train_step.py --cells topk:4096 --exact --allocator keep --out "$results/train_step_keep.json" \
    | tee "$results/train_step_keep.md"
"$peers_python" bench/collect.py "${collect[@]}" | tee "$results/collect.md"
project_python="${PROJECT_PYTHON:-$(make --no-print-directory env | tee /dev/stderr | sed -n "s|.*'\(.*\)/bin/activate'.*|\1/bin/python|p")}"
"$project_python" bench/ranks.py "${ranks[@]}" | tee "$results/ranks.md"
"$project_python" bench/quality.py --export "$cache/quality_activations.npz"
"$peers_python" bench/quality.py --activations "$cache/quality_activations.npz" "${quality[@]}" | tee "$results/quality.md"
