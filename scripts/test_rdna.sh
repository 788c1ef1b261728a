#!/usr/bin/env bash
# The machine code that users get for gfx1151, executed: the ordinary HIP build on a HIP runtime that interprets its
# instructions on the CPU (tests/gpu/rdna). The interpreter's own tests, every op against its reference, once more with
# waves and groups in reversed order, sampling, and the embedded pair. No GPU and no ROCm are needed; nothing is timed.
#
#   scripts/test_rdna.sh [all]    all: every shape of the op tests instead of the quick ones
#
# Uses the build of scripts/build_hip.sh and makes it where it is not there. Writes what the kernels executed to
# build/hip/counts_*.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
quick=(quick)
if [[ "${1:-}" == all ]]; then quick=(); fi

build="$PWD/build/hip"
tests="$build/csrc/backend/hip"
if [[ ! -x "$tests/gpu_test_ops" ]]; then scripts/build_hip.sh; fi
cmake --build "$build" --parallel "$(nproc)" --target gpu_test_ops gpu_test_rdna gpu_test_engine gpu_test_pairs

# The runtime reads its options from a file beside it.
interpreted() {  # interpreted "option value, option value" COMMAND...
  tr , '\n' <<< "$1" > "$tests/rdna/options"
  LD_LIBRARY_PATH="$tests/rdna" "${@:2}"
}
interpreted "" "$tests/gpu_test_rdna" 2> "$work/faults"  # it provokes faults, which are reported there
interpreted "counts $build/counts_ops.txt" "$tests/gpu_test_ops" "${quick[@]}"
interpreted "reverse_waves 1, reverse_groups 1" "$tests/gpu_test_ops" "${quick[@]}"
interpreted "" "$build/csrc/gpu_test_engine" sampling quick
if command -v dflash-cpp >/dev/null; then
  scripts/nano_pair.sh "$work"
  interpreted "counts $build/counts_pair.txt" "$build/csrc/gpu_test_pairs" "$work/target.gguf" "$work/drafter.gguf" \
    "$work/prompts" 1 quick
fi
rm -f "$tests/rdna/options"
