#!/bin/bash
# The whole GPU check on an NVIDIA machine: op tests, compute-sanitizer, the M2.7-shaped bench.
# Build first (cmake -DDFLASH_GPU=cuda -DDFLASH_PYTHON=OFF -DDFLASH_TESTS=ON; targets gpu_test_ops, gpu_test_engine, gpu_step) into the
# folder given as $1; $2: layers of the bench (62; 0: none); $3: "check" adds compute-sanitizer.
set -u
build=${1:-build/cuda}
export engine=$build/csrc/gpu_test_engine ops=$build/csrc/backend/hip/gpu_test_ops out=${OUT:-.}
layers=${2:-62}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
timeout 240 "$ops" 2>&1 | tee "$out/test_ops.log"
for part in sampling loading long lost; do
  timeout 120 "$engine" $part 2>&1 | tee "$out/test_$part.log"
done

# racecheck of one kernel alone: with all of them watched at once it takes hours, one by one a minute.
sanitize() { # tool, part of the kernels' names ("-": all), program...
  local tool=$1 kernel=$2 log=$out/$1.$2.$4.log
  shift 2
  local options=(--tool "$tool" --print-limit 20 --show-backtrace no)
  [ "$kernel" = - ] || options+=(--kernel-name "kns=$kernel")
  [ "$tool" != racecheck ] || options+=(--racecheck-report all)
  [ "$tool" != memcheck ] || options+=(--report-api-errors no)  # the test asks for 64 TiB
  [ "$tool" != synccheck ] || options+=(--num-cuda-barriers 100000)
  timeout 150 compute-sanitizer "${options[@]}" "$@" > "$log" 2>&1
  echo "$tool ${kernel/#-/all} ${*:2}: rc $? | $(grep 'SUMMARY' "$log" | head -1) | $(grep -v '=====' "$log" | tail -1)"
}
if [ "${3:-}" = check ]; then
  export -f sanitize
  {
    for kernel in experts_row experts_queue experts_stream group_kernel route_few router_kernel choose_kernel gate_up_few down_few \
      gate_up_half gate_up_dense gate_up_many down_many add_experts float_gate_up float_down dense_routing; do
      echo "racecheck $kernel $ops quick experts ffn layers"
    done
    for kernel in attention_split attention_many; do echo "racecheck $kernel $ops quick attention"; done
    for kernel in matmul_few matmul_half matmul_many float_matmul; do echo "racecheck $kernel $ops quick matmul"; done
    for kernel in matmul_resident qkv_ norm_; do echo "racecheck $kernel $ops quick layers steps small"; done
    for kernel in draw_token bin_by row_top top1_ edit_logits; do echo "racecheck $kernel $engine sampling quick"; done
    echo "initcheck - $ops quick matmul experts ffn"
    for tool in memcheck synccheck; do
      echo "$tool - $ops quick"
      echo "$tool - $engine sampling quick"
    done
  } | xargs -P 12 -L 1 bash -c 'sanitize "$@"' _
fi
[ "$layers" = 0 ] || timeout 240 "$build/csrc/backend/hip/gpu_step" "$layers" 2>&1 | tee "$out/gpu_step.log"
