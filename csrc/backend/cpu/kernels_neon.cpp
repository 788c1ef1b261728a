// NEON of ARMv8.0: every 64-bit ARM CPU.
#include <arm_neon.h>

#include "backend/cpu/kernels.h"

namespace dflash::cpu {
namespace {
#include "backend/cpu/vec_neon.inc"

#include "backend/cpu/kernels.inc"
}  // namespace

extern const Kernels kKernels_neon = kTable;
}  // namespace dflash::cpu
