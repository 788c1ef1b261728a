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

// The same with twelve bytes of values to a word of 16, which arrives as a whole too (NVIDIA).
__device__ inline void post([[maybe_unused]] uint4* to, [[maybe_unused]] uint32_t a, [[maybe_unused]] uint32_t b,
                            [[maybe_unused]] uint32_t c, [[maybe_unused]] uint32_t launch) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{\n.reg .b64 lo, hi;\n.reg .b128 word;\n"
      "mov.b64 lo, {%1, %2};\nmov.b64 hi, {%3, %4};\nmov.b128 word, {lo, hi};\n"
      "st.relaxed.gpu.global.b128 [%0], word;\n}" ::"l"(to),
      "r"(a), "r"(b), "r"(c), "r"(launch)
      : "memory");
#elif defined(DFLASH_EMULATE_STAGED)
  emulator::store(to, a, b, c, launch);
#endif
}

__device__ inline uint4 peek([[maybe_unused]] const uint4* from) {
  uint4 v = {};
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{\n.reg .b64 lo, hi;\n.reg .b128 word;\n"
      "ld.relaxed.gpu.global.b128 word, [%4];\n"
      "mov.b128 {lo, hi}, word;\nmov.b64 {%0, %1}, lo;\nmov.b64 {%2, %3}, hi;\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from)
      : "memory");
#elif defined(DFLASH_EMULATE_STAGED)
  v = emulator::load(from);
#endif
  return v;
}

__device__ inline bool posted(const uint4& word, uint32_t launch) { return word.w == launch; }
__device__ inline bool posted(uint64_t word, uint32_t launch) { return static_cast<uint32_t>(word >> 32) == launch; }

}  // namespace dflash::gpu
