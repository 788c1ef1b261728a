#!/usr/bin/env bash
# The embedded pair for C++ tests: target.gguf, drafter.gguf and prompts (token ids) in FOLDER, by the installed
# dflash-cpp.
#
#   scripts/nano_pair.sh FOLDER
set -euo pipefail
models="$(dirname "${BASH_SOURCE[0]}")/../python/dflash_cpp/models"
dflash-cpp convert "$models/nano-m2" -o "$1/target.gguf"
dflash-cpp convert "$models/nano-m2-dflash" --target-model "$models/nano-m2" -o "$1/drafter.gguf"
echo "1 5 9 17 33 65 20 40 80 100 120 7 8 9 14 3 77 60 2 31" > "$1/prompts"
