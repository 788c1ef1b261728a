#pragma once
// Which instruction sets this build has and this CPU runs.

#include <string>
#include <vector>

#include "backend/cpu/kernels.h"

namespace dflash::cpu {

// Every table compiled in whose instructions the CPU (and the operating system) offers, best first.
std::vector<const Kernels*> available_kernels();

// By name; "auto" is the best. Throws Error that lists what there is.
const Kernels& select_kernels(const std::string& name);

}  // namespace dflash::cpu
