// AVX2 with FMA and F16C: the x86 baseline. Compiled with these instructions on; called only when the CPU has them
// (isa.cpp).
#include <immintrin.h>

#include "backend/cpu/kernels.h"

namespace dflash::cpu {
namespace {
#include "backend/cpu/vec_avx2.inc"

#include "backend/cpu/kernels.inc"
}  // namespace

extern const Kernels kKernels_avx2 = kTable;
}  // namespace dflash::cpu
