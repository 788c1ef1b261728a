#!/bin/bash
# Builds the GPU backend for gfx1151 on a bare Debian machine, without ROCm and without a GPU: installs what it needs,
# assembles the device library the distribution lacks, compiles and links, prints the kernels' registers, shared memory
# and occupancy, and fails when a hot kernel spills, uses scratch memory or has a flat memory instruction (a pointer that
# the compiler could not tell from one to shared memory: gpu::load).
#
#   scripts/build_hip.sh [build folder: build/hip] [arch: gfx1151]
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/hip}
arch=${2:-gfx1151}
llvm=19

missing=()
for tool in clang++-$llvm ld.lld-$llvm llvm-as-$llvm llvm-readelf-$llvm llvm-objdump-$llvm; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
[ -e /usr/include/hip/hip_runtime.h ] || missing+=(hip_runtime.h)
bitcode=/usr/lib/x86_64-linux-gnu/amdgcn/bitcode
[ -e $bitcode/ocml.bc ] || missing+=(ocml.bc)
if [ ${#missing[@]} -gt 0 ]; then
  echo "missing: ${missing[*]}; installing"
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -q
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q --no-install-recommends \
    clang-$llvm lld-$llvm clang-tools-$llvm llvm-$llvm libamdhip64-dev rocm-device-libs
fi

# Debian's device libraries know no gfx1151: one module names the instruction set, the rest are the same for all.
libs=$(pwd)/$build/device_libs
mkdir -p "$libs"
cp $bitcode/*.bc "$libs/"
number=${arch#gfx}                                              # gfx1151 -> major 11, minor 5, stepping 1 -> 11501
major=$((10#${number:0:2})); minor=$((16#${number:2:1})); step=$((16#${number:3:1}))
if [ ! -e "$libs/oclc_isa_version_$number.bc" ]; then
  layout=$(echo 'target triple = "amdgcn-amd-amdhsa"' | opt-$llvm -mtriple=amdgcn-amd-amdhsa -mcpu="$arch" -S 2>/dev/null |
           sed -n 's/^target datalayout = //p')
  if [ -z "$layout" ]; then
    layout=$(echo 'void f(void) {}' | clang-$llvm -x c - -target amdgcn-amd-amdhsa -nogpulib -mcpu="$arch" -S -emit-llvm -o - |
             sed -n 's/^target datalayout = //p')
  fi
  cat > "$libs/isa.ll" <<EOF
target datalayout = $layout
target triple = "amdgcn-amd-amdhsa"
@__oclc_ISA_version = linkonce_odr hidden local_unnamed_addr addrspace(4) constant i32 $((major * 1000 + minor * 100 + step)), align 4
EOF
  llvm-as-$llvm "$libs/isa.ll" -o "$libs/oclc_isa_version_$number.bc"
fi

cmake -S . -B "$build" -DDFLASH_GPU=hip -DDFLASH_GPU_ARCH="$arch" -DDFLASH_HIP_COMPILER="$(command -v clang++-$llvm)" \
      -DDFLASH_HIP_DEVICE_LIBS="$libs" -DDFLASH_PYTHON="${DFLASH_PYTHON:-OFF}" -DDFLASH_TESTS=ON >"$build/configure.log"
cmake --build "$build" --target gpu_test_ops gpu_test_driver_errors --parallel "$(nproc)"

# One device-only compile of each source for the table.
table=$build/kernels.txt code=$build/kernels.s
: > "$table"
: > "$code"
for source in csrc/backend/hip/*.hip; do
  object=$build/$(basename "$source" .hip).co
  clang++-$llvm -x hip -std=c++17 -O3 -D__HIP_PLATFORM_AMD__ -DDFLASH_GPU_HIP -ffp-contract=off -fno-math-errno \
    --offload-arch="$arch" --rocm-device-lib-path="$libs" -mcode-object-version=5 -Icsrc -DDFLASH_GPU_ARCHS="\"$arch\"" --cuda-device-only \
    --no-gpu-bundle-output "$source" -o "$object"
  llvm-readelf-$llvm --notes "$object" >> "$table"
  llvm-objdump-$llvm -d --no-show-raw-insn "$object" >> "$code"
done
python3 - "$table" "$code" <<'EOF'
import re
import subprocess
import sys

# Kernels that run once a load or once a prompt may do as they like.
COLD = ("random_", "repack_", "probe_", "group_kernel", "dense_routing", "norm_quantize_any")
VGPRS, GRANULE, WAVES, LDS = 1536, 24, 16, 128 * 1024  # a SIMD of RDNA3.5; shared memory of a work-group processor

text = open(sys.argv[1]).read()
flat = {}  # a kernel's flat memory instructions
symbol = None
for line in open(sys.argv[2]):
    if label := re.match(r"[0-9a-f]+ <(\S+)>:", line):
        symbol = label.group(1)
    elif re.match(r"\s+flat_(load|store|atomic)", line):
        flat[symbol] = flat.get(symbol, 0) + 1
rows, bad, flat_kernels = [], [], []
for block in re.split(r"\n  - \.args:", text)[1:]:
    def field(key):
        return re.search(rf"\.{key}:\s+(\S+)", block).group(1)
    symbol = field("name")
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|dflash::(hip::)?|void ", "", name)
    name = re.sub(r"\(DType\)(\d+)", r"\1", name)
    name = name[: name.index("(")] if "(" in name else name
    vgpr, sgpr, lds = (int(field(k)) for k in ("vgpr_count", "sgpr_count", "group_segment_fixed_size"))
    vspill, sspill, scratch = (int(field(k)) for k in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"))
    threads = int(field("max_flat_workgroup_size"))
    per_simd = min(WAVES, VGPRS // max(GRANULE, -(-vgpr // GRANULE) * GRANULE))
    if lds:
        per_simd = min(per_simd, max(1, LDS // lds * -(-threads // 32) // 4))
    rows.append((name, vgpr, sgpr, lds, vspill, sspill, scratch, per_simd))
    if (vspill or sspill or scratch) and not name.startswith(COLD):
        bad.append(name)
    if symbol in flat and not name.startswith(COLD):
        flat_kernels.append(f"{name} ({flat[symbol]})")
print("| kernel | VGPR | SGPR | LDS | VGPR spills | SGPR spills | scratch | waves/SIMD of 16 |")
print("|---|---|---|---|---|---|---|---|")
for r in sorted(set(rows)):
    print("| " + " | ".join(str(v) for v in r) + " |")
faults = []
if bad:
    faults.append("spills or scratch in hot kernels: " + ", ".join(bad))
if flat_kernels:
    faults.append("flat memory instructions in hot kernels: " + ", ".join(flat_kernels))
if faults:
    sys.exit("\n".join(faults))
EOF
tests=$build/csrc/backend/hip
"$tests/gpu_test_ops" || [ $? = 77 ]
# What a driver may answer: none that opens, and a fake one that fails on demand.
mkdir -p "$tests/none"
for version in .7 .6 .5 ""; do : > "$tests/none/libamdhip64.so$version"; done
LD_LIBRARY_PATH=$tests/none "$tests/gpu_test_driver_errors" missing
LD_LIBRARY_PATH=$tests/fake "$tests/gpu_test_driver_errors" fake
