// AVX-512 with VNNI (Ice Lake, Zen 4 and later). Compiled with these instructions on; called only when the CPU has them
// (isa.cpp).
#include <immintrin.h>

#include "backend/cpu/kernels.h"

namespace dflash::cpu {
namespace {
#include "backend/cpu/vec_avx512.inc"

#include "backend/cpu/kernels.inc"
}  // namespace

extern const Kernels kKernels_avx512vnni = kTable;
}  // namespace dflash::cpu
