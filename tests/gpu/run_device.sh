#!/bin/bash
# The whole GPU check on an NVIDIA machine: op tests, memory and race checker, the M2.7-shaped bench.
# Build first (cmake -DDFLASH_GPU=cuda -DDFLASH_PYTHON=OFF -DDFLASH_TESTS=ON; targets gpu_test_ops, gpu_test_engine, gpu_step) into the
# folder given as $1; $2: layers of the bench (62); $3: "check" adds compute-sanitizer.
set -u
engine=${1:-build/cuda}/csrc/gpu_test_engine
build=${1:-build/cuda}/csrc/backend/hip
layers=${2:-62}
out=${OUT:-.}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
timeout 240 "$build/gpu_test_ops" 2>&1 | tee "$out/test_ops.log"
for part in sampling loading long lost; do
  timeout 120 "$engine" $part 2>&1 | tee "$out/test_$part.log"
done
if [ "${3:-}" = check ]; then
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    timeout 150 compute-sanitizer --tool $tool "$build/gpu_test_ops" quick 2>&1 | tail -15 | tee "$out/$tool.log"
    timeout 150 compute-sanitizer --tool $tool "$engine" sampling quick 2>&1 | tail -5 | tee "$out/$tool.sampling.log"
  done
fi
timeout 240 "$build/gpu_step" "$layers" 2>&1 | tee "$out/gpu_step.log"
