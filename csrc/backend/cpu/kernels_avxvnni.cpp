// AVX2 with 256-bit VNNI (Alder Lake, Zen 5). Compiled with these instructions on; called only when the CPU has them
// (isa.cpp).
#include <immintrin.h>

#include "backend/cpu/kernels.h"

#define DFLASH_AVXVNNI
namespace dflash::cpu {
namespace {
#include "backend/cpu/vec_avx2.inc"

#include "backend/cpu/kernels.inc"
}  // namespace

extern const Kernels kKernels_avxvnni = kTable;
}  // namespace dflash::cpu
