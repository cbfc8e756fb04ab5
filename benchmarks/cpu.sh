#!/usr/bin/env bash
# Every CPU figure of docs/performance.md, and the page, by processor time: five budgets on one shape, one on the others.
#
#     benchmarks/cpu.sh [repeats [decode steps]]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p benchmarks/results
repeats=${1:-3} steps=${2:-64} results=benchmarks/results
export OMP_NUM_THREADS=1
rm -f $results/cpu.json $results/kernels_cpu.json $results/peers.json
.venv/bin/vtoken bench --shape llava-1.5-7b --scale cpu --device cpu --clock cpu --repeats "$repeats" --decode "$steps" \
    --output $results/cpu.json
for shape in llava-next-7b qwen2.5-vl-7b-image qwen2.5-vl-7b-video qwen3-vl-8b-video llava-onevision-7b-video; do
    .venv/bin/vtoken bench --shape $shape --scale cpu --device cpu --clock cpu --repeats "$repeats" --decode "$steps" \
        --budget 0.2 --output $results/cpu.json
done
.venv/bin/python benchmarks/kernels.py --device cpu --shape small --clock cpu --out $results/kernels_cpu.json || true
benchmarks/peers.sh $results/peers.json "$repeats"
.venv/bin/python docs/generate_performance.py
