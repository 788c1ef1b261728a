#pragma once
// What the blocks of one kernel tell each other.

#include "backend/hip/gpu.h"

namespace dflash::gpu {

// True in every thread of the block that arrives last of `total`; what all blocks wrote before is then visible through
// load_fresh(). The counter is left at zero.
__device__ inline bool last_to_arrive(int* counter, int total) {
  __shared__ int is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(counter, 1) == total - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return is_last != 0;
}

// Reads what another block of this kernel wrote, past caches that are not coherent.
__device__ inline float load_fresh(const float* p) {
#if defined(DFLASH_GPU_HIP)
  return __hip_atomic_load(p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#else
  return __ldcg(p);
#endif
}

__device__ inline int load_fresh(const int* p) {
#if defined(DFLASH_GPU_HIP)
  return __hip_atomic_load(p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#else
  return __ldcg(p);
#endif
}

// Blocks of one kernel pass values to each other in words that carry the launch's number: eight bytes arrive together,
// so whoever reads the number has the value, without a fence (NCCL's LL protocol).
__device__ inline void post(uint64_t* to, uint32_t value, uint32_t launch) {
  const uint64_t word = static_cast<uint64_t>(launch) << 32 | value;
#if defined(DFLASH_GPU_HIP)
  __hip_atomic_store(to, word, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#elif defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
#else
  *to = word;
#endif
}

__device__ inline uint64_t peek(const uint64_t* from) {
#if defined(DFLASH_GPU_HIP)
  return __hip_atomic_load(from, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#elif defined(__CUDA_ARCH__)
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
#else
  return *from;
#endif
}

__device__ inline bool posted(uint64_t word, uint32_t launch) { return static_cast<uint32_t>(word >> 32) == launch; }

}  // namespace dflash::gpu
