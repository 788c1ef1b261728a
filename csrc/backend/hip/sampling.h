#pragma once
// Drawing tokens on the device; sampling.hip says how.

#include "backend/hip/gpu.h"
#include "backend/sampling.h"

namespace dflash::hip {

size_t sampling_scratch_bytes(const Sampling& s);

// Queues the draw of every row of logits [s.rows(), n], which it edits in place; out [s.rows()] ids, -1 for a row in
// which every token is forbidden. inputs: device memory that holds pack_sampling(s). scratch:
// sampling_scratch_bytes(s).
void launch_sampling(gpu::Stream stream, const Sampling& s, float* logits, int64_t n, const void* inputs, void* scratch,
                     int32_t* out);
std::vector<char> pack_sampling(const Sampling& s);

}  // namespace dflash::hip
