#pragma once
// The GPU behind the Backend contract: one device, one stream, everything in order on it.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"

namespace dflash {

// "" when a device here can run this build's kernels, else why not. Never throws.
std::string hip_backend_status();

// Throws Error with hip_backend_status() when there is no usable device.
std::unique_ptr<Backend> make_hip_backend(const BackendOptions& options);

}  // namespace dflash
