#pragma once
// Whether the kernels of a build run on a device, from names and numbers alone.

#include <cstdlib>
#include <sstream>
#include <string>

#include "core/error.h"

namespace dflash::hip {

// "" when one of the built architectures ("gfx1151 gfx1201", or "80 90a" for NVIDIA) suits a device of compute
// capability major.minor, else why not. AMD: the same major and minor (gfx1151 is 11.5; the runtime tells steppings
// apart). NVIDIA: the same major and a minor not below; the very same with a letter.
inline std::string architecture_problem(const std::string& built, int major, int minor) {
  std::istringstream names(built);
  bool amd = false;
  for (std::string name; names >> name;) {
    const bool is_gfx = name.rfind("gfx", 0) == 0;
    amd = amd || is_gfx;
    const bool exact = is_gfx || name.find_first_not_of("0123456789") != std::string::npos;
    const std::string digits = is_gfx ? name.substr(3) : name.substr(0, name.find_first_not_of("0123456789"));
    const size_t tail = is_gfx ? 2 : 1;  // minor and, for AMD, stepping: hexadecimal digits
    if (digits.size() <= tail) continue;
    const int built_major = std::atoi(digits.substr(0, digits.size() - tail).c_str());
    const int built_minor = static_cast<int>(std::strtol(digits.substr(digits.size() - tail, 1).c_str(), nullptr, 16));
    if (built_major == major && (exact ? built_minor == minor : built_minor <= minor)) return "";
  }
  return cat("they are for ", built, ", and it is ", amd ? "gfx" : "sm_", major, amd ? "." : "", minor);
}

}  // namespace dflash::hip
