#!/usr/bin/env bash
# The GPU backend's code for gfx1151 as plain C++ on the CPU (tests/gpu/emulator): every op against its reference, sampling
# against the CPU's, weights loaded from a file, and the embedded pair, speculative equal to plain; then the few-row
# kernels as NVIDIA runs them. No GPU and no ROCm are needed; nothing is timed.
#
#   scripts/test_emulated.sh [all]   all: every shape of the op tests (10 minutes) instead of the quick ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
quick=(quick)
if [[ "${1:-}" == all ]]; then quick=(); fi

if ! command -v clang++-19 >/dev/null || [[ ! -e /usr/include/hip/hip_runtime_api.h ]] ||
  [[ ! -e /usr/include/boost/context/fiber.hpp ]]; then
  root=()
  if [[ "$(id -u)" != 0 ]]; then root=(sudo); fi
  "${root[@]}" apt-get update -q
  "${root[@]}" apt-get install -y -q --no-install-recommends clang-19 libamdhip64-dev libboost-context-dev
fi
build() { # folder, flags
  cmake -G Ninja -S . -B "$work/$1" -DDFLASH_GPU=emulated "-DDFLASH_GPU_FLAGS=$2" -DDFLASH_PYTHON=OFF -DDFLASH_TESTS=ON
  cmake --build "$work/$1" -j "$(nproc)" --target gpu_test_ops gpu_test_engine gpu_test_pairs
}
pair() { # folder
  if [[ ! -e "$work/target.gguf" ]]; then return; fi
  "$work/$1/csrc/gpu_test_pairs" "$work/target.gguf" "$work/drafter.gguf" "$work/prompts" 1 quick
}
if command -v dflash-cpp >/dev/null; then scripts/nano_pair.sh "$work"; fi

build gfx1151 ""
"$work/gfx1151/csrc/backend/hip/gpu_test_ops" "${quick[@]}"
"$work/gfx1151/csrc/gpu_test_engine" sampling quick
"$work/gfx1151/csrc/gpu_test_engine" loading quick
pair gfx1151

# Few rows as NVIDIA has them: weights through shared memory, kernels whose blocks wait for each other.
build staged -DDFLASH_EMULATE_STAGED
"$work/staged/csrc/backend/hip/gpu_test_ops" "${quick[@]}" matmul attention experts ffn layers steps
pair staged
