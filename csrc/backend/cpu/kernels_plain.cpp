// Plain C++: any CPU, and the reference for the others.
#include <cstring>

#include "backend/cpu/kernels.h"
#include "quant/half.h"

namespace dflash::cpu {
namespace {
#include "backend/cpu/vec_plain.inc"

#include "backend/cpu/kernels.inc"
}  // namespace

extern const Kernels kKernels_plain = kTable;
}  // namespace dflash::cpu
