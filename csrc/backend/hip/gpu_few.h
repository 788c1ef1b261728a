#pragma once
// Decode: weights on their way to a wave. NVIDIA: a wave has its weights copied to shared memory, far ahead and before
// the kernel waits for its predecessor (by its lanes: the bulk copy engine takes some 40 ns a copy, too long for pieces
// of 2 KB). AMD reads them from global memory into registers a few groups ahead; there is no such copy on gfx11.

#include "backend/hip/gpu_mma.h"

namespace dflash::gpu {

#if defined(DFLASH_GPU_HIP) && !defined(DFLASH_EMULATE_STAGED)  // which the emulator defines to run NVIDIA's way
inline constexpr bool kStaged = false;
inline constexpr bool kTakeIn = false;  // attention takes q, k, v in: there the scalar registers do not suffice
inline constexpr size_t kSharedMost = size_t{64} << 10;  // shared memory a block may ask for
#else
inline constexpr bool kStaged = true;
inline constexpr bool kTakeIn = true;
inline constexpr size_t kSharedMost = size_t{226} << 10;
#endif

// Registers a thread of a kernel may have, where a bound on blocks is too coarse (NVIDIA).
#if defined(DFLASH_GPU_CUDA)
#define DFLASH_REGISTERS(n) __maxnreg__(n)
#else
#define DFLASH_REGISTERS(n)
#endif

// Blocks of a few-row kernel that should fit a multiprocessor at a time, by the rows it is made for: with few rows room
// is left for the next kernel, whose copies then begin early. (AMD: what registers and shared memory give.)
constexpr int few_blocks(int rows) {
#if defined(DFLASH_GPU_HIP)
  return rows > 0 ? 1 : 0;
#else
  return rows == 1 ? 4 : 2;
#endif
}

// Blocks of a kernel whose blocks take work until none is left, by the rows it works on.
constexpr int blocks_per_unit(int rows) {
#if defined(DFLASH_GPU_HIP)
  return rows > 0 ? 4 : 0;
#else
  return rows == 1 ? 3 : 2;
#endif
}

// Blocks of a kernel that a multiprocessor holds at a time.
template <typename... P>
int blocks_that_fit(void (*kernel)(P...), unsigned threads, size_t shared) {
  int blocks = 0;
#if defined(DFLASH_GPU_CUDA)
  GPU_CHECK(FuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
#endif
  GPU_CHECK(OccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), shared));
  return blocks;
}

// A lane begins to copy N bytes (8 or 16, aligned) to shared memory.
template <int N>
__device__ inline void copy_begin([[maybe_unused]] void* to, [[maybe_unused]] const void* from) {
#if defined(__CUDA_ARCH__)
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (N == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
  }
#elif defined(DFLASH_EMULATE_STAGED)
  emulator::copy_begin(to, from, N);
#endif
}

// What was begun since the last call is one batch.
__device__ inline void copy_commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(DFLASH_EMULATE_STAGED)
  emulator::copy_commit();
#endif
}

// By a wave: waits until at most Later of its batches, the last ones, are still on their way.
template <int Later>
__device__ inline void copy_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(Later) : "memory");
  __syncwarp();
#elif defined(DFLASH_EMULATE_STAGED)
  emulator::copy_wait(Later);
  emulator::wave_barrier();
#endif
}

}  // namespace dflash::gpu
