#!/usr/bin/env bash
# Compiles the C++ tests for 64-bit ARM and runs them in an emulator, on CPUs with and without SDOT and the int8 matrix
# products: every NEON kernel gives the bits of plain C++, and the choice falls back. Nothing is timed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64-static >/dev/null; then
  root=()
  if [[ "$(id -u)" != 0 ]]; then root=(sudo); fi
  "${root[@]}" apt-get update -q
  "${root[@]}" apt-get install -y -q --no-install-recommends g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
fi
# -O1: the kernels take minutes to compile above that.
cmake -G Ninja -S . -B "$work/build" -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/aarch64-linux-gnu.cmake" -DDFLASH_GPU=off \
  -DDFLASH_PYTHON=OFF -DDFLASH_TESTS=ON -DCMAKE_BUILD_TYPE=None "-DCMAKE_CXX_FLAGS=-O1"
cmake --build "$work/build" -j "$(nproc)" --target test_cpu_ops test_instruction_sets

pair=()
if command -v dflash-cpp >/dev/null; then  # the embedded pair; without the package, random weights
  scripts/nano_pair.sh "$work"
  pair=("$work/target.gguf" "$work/drafter.gguf")
fi
on() { qemu-aarch64-static -L /usr/aarch64-linux-gnu -cpu "$1" "$work/build/tests/cpp/$2" "${@:3}"; }
on max test_cpu_ops &
ops=$!
on max test_instruction_sets --isas neon_i8mm,neon_dotprod,neon,plain "${pair[@]}"
on neoverse-n1 test_instruction_sets --isas neon_dotprod,neon,plain
on cortex-a72 test_instruction_sets --isas neon,plain
wait "$ops"
