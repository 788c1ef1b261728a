// NEON with SDOT (optional from ARMv8.2: Cortex-A76, Neoverse N1, Apple M1). Compiled with these instructions on;
// called only when the CPU has them (isa.cpp).
#include <arm_neon.h>

#include "backend/cpu/kernels.h"

#define DFLASH_DOTPROD
namespace dflash::cpu {
namespace {
#include "backend/cpu/vec_neon.inc"

#include "backend/cpu/kernels.inc"
}  // namespace

extern const Kernels kKernels_neon_dotprod = kTable;
}  // namespace dflash::cpu
