#pragma once
// A gfx1151 on the CPU, for tests: this stands in for HIP's header when the .hip sources are compiled as plain C++,
// with the macros of a device compile set, so that the code that runs is what gfx1151 would be given. Lanes are fibers
// that run one after the other between barriers; blocks are spread over a few threads. emulator.cpp has the scheduler
// and the runtime's functions.
//
// It shows whether kernels compute what they should: indices, lane layouts, barriers, reads past the end. It says
// nothing about time, nor about what a compiler or the hardware might do differently.
//
// The lanes of a wave meet at every operation between lanes. One where only some of them take part (their values would
// be undefined on the hardware) ends the program with a message.

#include <hip/hip_runtime_api.h>
#include <hip/hip_vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // a block stays on its thread
#define __launch_bounds__(...)
#undef __align__
#define __align__(n) __attribute__((aligned(n)))

namespace emulator {

inline constexpr int kWave = 32;

struct Lane {
  dim3 thread, block, threads, blocks;
  uint8_t* shared = nullptr;  // what the launch asked for
  void* wave = nullptr;
};
extern thread_local Lane* here;

void block_barrier();
void wave_barrier();
void yield();  // to the other lanes, by one that waits for another block

// NVIDIA's copies to shared memory: they come as late as they may, when a lane waits for them.
void copy_begin(void* to, const void* from, int bytes);
void copy_commit();
void copy_wait(int later);

// What the lanes of a wave hand to each other: `bytes` from every lane of `from` (at most 64), all of them at the
// result, 64 bytes apart. Valid until the next but one. lanes: those that took part.
const uint8_t* exchange(const void* from, size_t bytes, uint32_t* lanes);

// Ends the program when a lane that took no part is asked.
void check_lane(uint32_t lanes, int lane);

template <typename T>
T shuffle(T v, int from) {
  uint32_t lanes;
  const uint8_t* all = exchange(&v, sizeof(T), &lanes);
  check_lane(lanes, from);
  std::memcpy(&v, all + from * 64, sizeof(T));
  return v;
}

inline int lane() { return static_cast<int>(here->thread.x) % kWave; }

inline int move_dpp(int v, int control) {
  const int at = control & 15;
  if ((control & ~15) != 0x160 && (control & ~15) != 0x150) std::abort();
  return shuffle(v, (control & ~15) == 0x160 ? lane() ^ at : (lane() & ~15) | at);
}

// Runs the kernel's blocks; while a stream records, notes them down instead.
void launch(hipStream_t stream, dim3 blocks, dim3 threads, size_t shared, std::function<void()> kernel);

// A copy of the arguments, as a launch makes it.
template <typename... P, typename... A>
void launch_kernel(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared, hipStream_t stream, A... arguments) {
  launch(stream, blocks, threads, shared, [=] { kernel(arguments...); });
}

// v_wmma_*_16x16x16 of gfx11 with 32 lanes: lanes l and l + 16 hold row l of a and column l of b; element v of a lane
// is row 2 v + lane / 16, column lane % 16 of the sums. (AMD, "How to accelerate AI applications on RDNA 3 using
// WMMA".)
template <typename Sums, typename A, typename Product>
Sums wmma(const A& a, const A& b, Sums c, Product product) {
  struct {
    A a, b;
  } mine = {a, b};
  static_assert(sizeof(mine) <= 64);
  uint32_t lanes;
  const uint8_t* all = exchange(&mine, sizeof(mine), &lanes);
  check_lane(lanes, kWave - 1);
  const int column = lane() % 16;
  A right;
  std::memcpy(&right, all + column * 64 + sizeof(A), sizeof(A));
  for (int v = 0; v < 8; ++v) {
    A left;
    std::memcpy(&left, all + (2 * v + lane() / 16) * 64, sizeof(A));
    c[v] = product(left, right, c[v]);
  }
  return c;
}

typedef int Ints4 __attribute__((ext_vector_type(4)));
typedef int Ints8 __attribute__((ext_vector_type(8)));
typedef float Floats8 __attribute__((ext_vector_type(8)));
typedef _Float16 Halves16 __attribute__((ext_vector_type(16)));
typedef short Shorts16 __attribute__((ext_vector_type(16)));

inline int dot4(bool a_signed, int a, bool b_signed, int b, int c) {
  for (int i = 0; i < 32; i += 8) {
    const int x = a_signed ? static_cast<int8_t>(a >> i) : static_cast<uint8_t>(a >> i);
    const int y = b_signed ? static_cast<int8_t>(b >> i) : static_cast<uint8_t>(b >> i);
    c += x * y;
  }
  return c;
}

inline Ints8 wmma_bytes(bool a_signed, Ints4 a, bool b_signed, Ints4 b, Ints8 c) {
  return wmma(a, b, c, [=](const Ints4& x, const Ints4& y, int sum) {
    for (int i = 0; i < 4; ++i) sum = dot4(a_signed, x[i], b_signed, y[i], sum);
    return sum;
  });
}

inline Floats8 wmma_halves(Halves16 a, Halves16 b, Floats8 c) {
  return wmma(a, b, c, [](const Halves16& x, const Halves16& y, float sum) {
    for (int i = 0; i < 16; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(y[i]);
    return sum;
  });
}

inline Floats8 wmma_bf16(Shorts16 a, Shorts16 b, Floats8 c) {
  return wmma(a, b, c, [](const Shorts16& x, const Shorts16& y, float sum) {
    auto value = [](short v) {
      return __builtin_bit_cast(float, static_cast<uint32_t>(static_cast<uint16_t>(v)) << 16);
    };
    for (int i = 0; i < 16; ++i) sum += value(x[i]) * value(y[i]);
    return sum;
  });
}

// v_perm_b32: bytes 0..3 of the result are picked from b (0..3) and a (4..7).
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t pick) {
  const uint64_t bytes = static_cast<uint64_t>(a) << 32 | b;
  uint32_t r = 0;
  for (int i = 0; i < 32; i += 8) r |= static_cast<uint32_t>(bytes >> (pick >> i & 7u) * 8 & 255u) << i;
  return r;
}

template <typename T>
T atomic_extreme(T* p, T v, bool largest) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while ((largest ? v > old : v < old) &&
         !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace emulator

#define threadIdx (::emulator::here->thread)
#define blockIdx (::emulator::here->block)
#define blockDim (::emulator::here->threads)
#define gridDim (::emulator::here->blocks)
#define DFLASH_DYNAMIC_SHARED(name) uint8_t* const name = ::emulator::here->shared

#undef hipLaunchKernelGGL
#define hipLaunchKernelGGL(kernel, ...) ::emulator::launch_kernel(kernel, __VA_ARGS__)

inline void __syncthreads() { ::emulator::block_barrier(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
T __shfl(T v, int from, int) {
  return ::emulator::shuffle(v, from & (::emulator::kWave - 1));
}
template <typename T>
T __shfl_xor(T v, int mask, int) {
  return ::emulator::shuffle(v, ::emulator::lane() ^ mask);
}
template <typename T>
T __shfl_up(T v, unsigned step, int) {
  const int from = ::emulator::lane() - static_cast<int>(step);
  return ::emulator::shuffle(v, from < 0 ? ::emulator::lane() : from);
}
inline uint64_t __ballot(int v) {
  uint32_t lanes;
  const uint8_t* all = ::emulator::exchange(&v, sizeof(v), &lanes);
  uint64_t set = 0;
  for (int l = 0; l < ::emulator::kWave; ++l) {
    int other;
    std::memcpy(&other, all + l * 64, sizeof(other));
    if ((lanes >> l & 1u) != 0 && other != 0) set |= uint64_t{1} << l;
  }
  return set;
}
inline int __any(int v) { return __ballot(v) != 0; }
inline int __ffs(int v) { return __builtin_ffs(v); }

inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
inline uint32_t __float_as_uint(float v) { return __builtin_bit_cast(uint32_t, v); }
inline float __uint_as_float(uint32_t v) { return __builtin_bit_cast(float, v); }
inline float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t pick) {  // a nibble says which byte
  const uint32_t bytes = (pick & 7u) | (pick & 0x70u) << 4 | (pick & 0x700u) << 8 | (pick & 0x7000u) << 12;
  return ::emulator::permute(b, a, bytes);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }

template <typename T, typename U>
T atomicAdd(T* p, U v) {
  return __atomic_fetch_add(p, static_cast<T>(v), __ATOMIC_RELAXED);
}
template <typename T, typename U>
T atomicMax(T* p, U v) {
  return ::emulator::atomic_extreme(p, static_cast<T>(v), true);
}
template <typename T, typename U>
T atomicMin(T* p, U v) {
  return ::emulator::atomic_extreme(p, static_cast<T>(v), false);
}

template <typename T, typename U>
std::common_type_t<T, U> min(T a, U b) {
  using V = std::common_type_t<T, U>;
  return static_cast<V>(b) < static_cast<V>(a) ? static_cast<V>(b) : static_cast<V>(a);
}
template <typename T, typename U>
std::common_type_t<T, U> max(T a, U b) {
  using V = std::common_type_t<T, U>;
  return static_cast<V>(a) < static_cast<V>(b) ? static_cast<V>(b) : static_cast<V>(a);
}

#define __builtin_amdgcn_fence(...) ((void)0)
#define __builtin_amdgcn_wave_barrier() ::emulator::wave_barrier()
#define __builtin_amdgcn_sched_barrier(mask) ((void)0)
#define __builtin_amdgcn_readfirstlane(v) (v)  // asked of values that are the same in all lanes
// Of the lane moves row_xmask, row_share, and halves of 16 exchanged.
#define __builtin_amdgcn_update_dpp(old, v, control, rows, banks, bound) ::emulator::move_dpp(v, control)
#define __builtin_amdgcn_permlanex16(old, v, low, high, inactive, bound) ::emulator::shuffle(v, ::emulator::lane() ^ 16)
#define __builtin_amdgcn_readlane(v, from) ::emulator::shuffle(v, from)
#define __builtin_amdgcn_sudot4(as, a, bs, b, c, clamp) ::emulator::dot4(as, a, bs, b, c)
#define __builtin_amdgcn_perm(a, b, pick) ::emulator::permute(a, b, pick)
#define __builtin_amdgcn_exp2f(v) ::exp2f(v)
#define __builtin_amdgcn_rcpf(v) (1.0f / (v))
#define __builtin_amdgcn_rsqf(v) (1.0f / ::sqrtf(v))
#define __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(as, a, bs, b, c, clamp) ::emulator::wmma_bytes(as, a, bs, b, c)
#define __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(a, b, c) ::emulator::wmma_halves(a, b, c)
#define __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(a, b, c) ::emulator::wmma_bf16(a, b, c)

#undef __HIP_MEMORY_SCOPE_AGENT
#define __HIP_MEMORY_SCOPE_AGENT 0
#define __hip_atomic_load(p, order, scope) ::emulator::load(p)
#define __hip_atomic_store(p, v, order, scope) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)

namespace emulator {
template <typename T>
T load(const T* p) {
  yield();
  T v;
  __atomic_load(p, &v, __ATOMIC_SEQ_CST);
  return v;
}
// A word of 16 bytes whose last four say that all are there.
inline uint4 load(const uint4* p) {
  const uint32_t* const from = reinterpret_cast<const uint32_t*>(p);
  const uint32_t last = load(from + 3);
  return uint4{from[0], from[1], from[2], last};
}
inline void store(uint4* p, uint32_t a, uint32_t b, uint32_t c, uint32_t last) {
  uint32_t* const to = reinterpret_cast<uint32_t*>(p);
  to[0] = a, to[1] = b, to[2] = c;
  __atomic_store_n(to + 3, last, __ATOMIC_SEQ_CST);
}
}  // namespace emulator
