#pragma once
// The only file that knows the vendor. AMD (HIP, wave32: gfx11 and gfx12) is what the project is for; NVIDIA (CUDA,
// sm_80 and later) builds the very same kernels so that they can be tested where AMD hardware is not at hand.
//
// Host side: errors as exceptions, memory, streams, events, graphs, launches.
// Device side: lanes, shuffles, dot products of four bytes, scalar conversions.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#if defined(DFLASH_GPU_HIP)
#include <hip/hip_runtime.h>
#define GPU_API(name) hip##name
#elif defined(DFLASH_GPU_CUDA)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GPU_API(name) cuda##name
#else
#error "build through csrc/backend/hip/CMakeLists.txt"
#endif

#include "core/error.h"

namespace dflash::gpu {

// ---- host: errors ---------------------------------------------------------------------------------------------------

using Status = GPU_API(Error_t);

inline constexpr Status kOk = GPU_API(Success);
inline constexpr Status kOutOfMemory = GPU_API(ErrorMemoryAllocation);

inline std::string describe(Status s) { return cat(GPU_API(GetErrorName)(s), " (", GPU_API(GetErrorString)(s), ")"); }

// Errors after which the runtime refuses every call until the process ends: a kernel faulted, or the driver reset the
// device. HIP uses CUDA's numbers.
inline bool is_lost(Status s) {
  switch (static_cast<int>(s)) {
    case 214:  // uncorrectable ECC error
    case 700:  // illegal address
    case 702:  // launch timeout
    case 709:  // context destroyed
    case 710:  // assert
    case 714:  // hardware stack error
    case 715:  // illegal instruction
    case 716:  // misaligned address
    case 717:  // invalid address space
    case 718:  // invalid program counter
    case 719:  // launch failure
    case 999:  // unknown: what is left after a reset
      return true;
    default:
      return false;
  }
}

// The first such error, or kOk. One for the process, because the device's context is.
inline std::atomic<int>& lost_status() {
  static std::atomic<int> status{static_cast<int>(kOk)};
  return status;
}

// What every call says from then on; "" while the device is there.
inline std::string lost_message() {
  const int status = lost_status();
  if (status == static_cast<int>(kOk)) return "";
  return cat("GPU: the device was lost: ", describe(static_cast<Status>(status)),
             ". Close what uses it; backend='cpu' goes on working, and a new process can use the GPU again.");
}

// Throws for an error, and for every call once the device is lost.
inline void check(Status s, const char* what) {
  if (s == kOk && lost_status() == static_cast<int>(kOk)) return;
  (void)GPU_API(GetLastError)();
  int none = static_cast<int>(kOk);
  if (is_lost(s)) (void)lost_status().compare_exchange_strong(none, static_cast<int>(s));
  const std::string lost = lost_message();
  if (!lost.empty()) throw Error(lost);
  if (s == kOutOfMemory) throw CapacityError(cat("GPU: out of memory in ", what));
  fail("GPU: ", what, " failed: ", describe(s));
}

#define GPU_CHECK(call) ::dflash::gpu::check(GPU_API(call), #call)

// ---- host: device, memory, streams ----------------------------------------------------------------------------------

using Stream = GPU_API(Stream_t);
using Event = GPU_API(Event_t);
using GraphExec = GPU_API(GraphExec_t);

struct DeviceInfo {
  std::string name;
  int compute_units = 0;
  bool integrated = false;
};

inline int device_count(Status* why) {
  int n = 0;
  *why = GPU_API(GetDeviceCount)(&n);
  if (*why != kOk) (void)GPU_API(GetLastError)();
  return *why == kOk ? n : 0;
}

// Compute units of a device (NVIDIA: multiprocessors). On RDNA, HIP counts work-group processors, which are two compute
// units each (ROCm/hip issues 2687 and 3767).
inline int compute_units(int device = 0) {
  int units = 0;
#if defined(DFLASH_GPU_HIP)
  GPU_CHECK(DeviceGetAttribute(&units, hipDeviceAttributeMultiprocessorCount, device));
  units *= 2;
#else
  GPU_CHECK(DeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device));
#endif
  return units;
}

inline DeviceInfo device_info(int device) {
  DeviceInfo info;
  int value = 0;
#if defined(DFLASH_GPU_HIP)
  char name[256] = {};
  GPU_CHECK(DeviceGetName(name, sizeof(name) - 1, device));
  info.name = name;
  info.compute_units = compute_units(device);
  GPU_CHECK(DeviceGetAttribute(&value, hipDeviceAttributeIntegrated, device));
#else
  cudaDeviceProp prop;
  GPU_CHECK(GetDeviceProperties(&prop, device));
  info.name = prop.name;
  info.compute_units = compute_units(device);
  GPU_CHECK(DeviceGetAttribute(&value, cudaDevAttrIntegrated, device));
#endif
  info.integrated = value != 0;
  return info;
}

// 11.5 for gfx1151, 9.0 for sm_90.
struct Architecture {
  int major = 0, minor = 0;
};

inline Architecture architecture(int device) {
  Architecture a;
#if defined(DFLASH_GPU_HIP)
  GPU_CHECK(DeviceGetAttribute(&a.major, hipDeviceAttributeComputeCapabilityMajor, device));
  GPU_CHECK(DeviceGetAttribute(&a.minor, hipDeviceAttributeComputeCapabilityMinor, device));
#else
  GPU_CHECK(DeviceGetAttribute(&a.major, cudaDevAttrComputeCapabilityMajor, device));
  GPU_CHECK(DeviceGetAttribute(&a.minor, cudaDevAttrComputeCapabilityMinor, device));
#endif
  return a;
}

inline void* host_alloc(size_t bytes) {
  void* p = nullptr;
#if defined(DFLASH_GPU_HIP)
  GPU_CHECK(HostMalloc(&p, bytes, 0));
#else
  GPU_CHECK(MallocHost(&p, bytes));
#endif
  return p;
}

inline void host_free(void* p) {
#if defined(DFLASH_GPU_HIP)
  (void)hipHostFree(p);
#else
  (void)cudaFreeHost(p);
#endif
}

inline void copy_to_device(void* dst, const void* src, size_t bytes, Stream s) {
  GPU_CHECK(MemcpyAsync(dst, src, bytes, GPU_API(MemcpyHostToDevice), s));
}

inline void copy_to_host(void* dst, const void* src, size_t bytes, Stream s) {
  GPU_CHECK(MemcpyAsync(dst, src, bytes, GPU_API(MemcpyDeviceToHost), s));
}

// Ends a capture begun with StreamBeginCapture and makes it launchable.
inline GraphExec end_capture(Stream s) {
  GPU_API(Graph_t) graph = nullptr;
  GPU_CHECK(StreamEndCapture(s, &graph));
  GraphExec exec = nullptr;
#if defined(DFLASH_GPU_HIP)
  const Status status = hipGraphInstantiate(&exec, graph, nullptr, nullptr, 0);
#else
  const Status status = cudaGraphInstantiate(&exec, graph, 0);
#endif
  (void)GPU_API(GraphDestroy)(graph);
  check(status, "GraphInstantiate");
  return exec;
}

template <typename... P, typename... A>
void launch_shared(Stream stream, dim3 grid, unsigned threads, size_t shared, void (*kernel)(P...), A&&... args);

// Queues kernel<<<grid, threads>>>(args...). On NVIDIA the launch may begin before its predecessor ends; every kernel
// therefore starts with wait_for_previous().
template <typename... P, typename... A>
void launch(Stream stream, dim3 grid, unsigned threads, void (*kernel)(P...), A&&... args) {
  launch_shared(stream, grid, threads, 0, kernel, std::forward<A>(args)...);
}

// The same with bytes of shared memory beside what the kernel declares.
template <typename... P, typename... A>
void launch_shared(Stream stream, dim3 grid, unsigned threads, size_t shared, void (*kernel)(P...), A&&... args) {
#if defined(DFLASH_GPU_HIP)
  hipLaunchKernelGGL(kernel, grid, dim3(threads), shared, stream, static_cast<P>(std::forward<A>(args))...);
#else
  if (shared > 0) {
    GPU_CHECK(FuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  GPU_CHECK(LaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(args))...));
#endif
  GPU_CHECK(GetLastError());
}

// Shared memory in a kernel, as much as its launch asked for.
#ifndef DFLASH_DYNAMIC_SHARED  // tests/gpu/emulator has its own
#define DFLASH_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]
#endif

// ---- device: lanes
// ---------------------------------------------------------------------------------------------------

inline constexpr int kWave = 32;

// Lets the next kernel's blocks start. A kernel whose own reads are few and urgent does so late: the next one's
// weights, coming in all at once, would be in the way.
__device__ inline void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before is complete. What comes earlier in a kernel may only read what no kernel writes
// (weights). Every kernel waits, so "complete" reaches back to all before.
__device__ inline void wait_only() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What most kernels begin with.
__device__ inline void wait_for_previous() {
  release_next();
  wait_only();
}

// The other way round: the next kernel may, before it waits itself, read what was complete here.
__device__ inline void wait_then_release() {
  wait_only();
  release_next();
}

// A hint by a wave: these bytes (a multiple of 16) will be read soon.
__device__ inline void prefetch([[maybe_unused]] const void* p, [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (bytes > 0 && threadIdx.x % 32 == 0) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
  }
#endif
}

// Makes what the lanes of a wave wrote to shared memory visible to each other.
__device__ inline void wave_sync() {
#if defined(DFLASH_GPU_HIP)
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
#else
  __syncwarp();
#endif
}

__device__ inline int lane() { return static_cast<int>(threadIdx.x) & (kWave - 1); }

// v, which is the same in every lane, as a value the compiler knows to be so.
__device__ inline int uniform(int v) {
#if defined(DFLASH_GPU_HIP)
  return __builtin_amdgcn_readfirstlane(v);
#else
  return v;
#endif
}

// The wave's number in its block.
__device__ inline int wave() { return uniform(static_cast<int>(threadIdx.x) / kWave); }

// T is a number: outside a HIP compile (tests/gpu/emulator) HIP's headers make v.x of a float4 a class of its own, a
// copy of which is not the element.
template <typename T>
__device__ inline T shuffle_xor(T v, int mask) {
  static_assert(std::is_scalar_v<T>, "say which type: shuffle_xor<float>(v.x, mask)");
#if defined(DFLASH_GPU_HIP)
  return __shfl_xor(v, mask, kWave);
#else
  return __shfl_xor_sync(0xffffffffu, v, mask);
#endif
}

template <typename T>
__device__ inline T shuffle(T v, int from) {
  static_assert(std::is_scalar_v<T>, "say which type: shuffle<float>(v.x, lane)");
#if defined(DFLASH_GPU_HIP)
  return __shfl(v, from, kWave);
#else
  return __shfl_sync(0xffffffffu, v, from);
#endif
}

// v of lane `from`, the same for all lanes.
template <typename T>
__device__ inline T broadcast(T v, int from) {
#if defined(DFLASH_GPU_HIP)
  static_assert(sizeof(T) == sizeof(int), "a register");
  return __builtin_bit_cast(T, __builtin_amdgcn_readlane(__builtin_bit_cast(int, v), from));
#else
  return shuffle(v, from);
#endif
}

#if defined(DFLASH_GPU_HIP)
// v with f applied to each of its registers.
template <typename T, typename F>
__device__ inline T by_words(const T& v, F f) {
  static_assert(sizeof(T) % sizeof(int) == 0, "whole registers");
  struct Words {
    int w[sizeof(T) / sizeof(int)];
  };
  Words words = __builtin_bit_cast(Words, v);
  for (int& w : words.w) w = f(w);
  return __builtin_bit_cast(T, words);
}

// v of lane J of the sixteen that a lane belongs to.
template <int J, typename T>
__device__ inline T share_in_16(const T& v) {
  return by_words(v, [](int w) { return __builtin_amdgcn_update_dpp(0, w, 0x150 | J, 0xf, 0xf, true); });  // row_share
}
#endif

// shuffle_xor with a distance known to the compiler. AMD: within the vector unit (DPP) instead of through shared
// memory, often as an operand of the instruction that uses it.
template <int Mask, typename T>
__device__ inline T shuffle_xor(T v) {
#if defined(DFLASH_GPU_HIP)
  static_assert(Mask == 16 || (Mask > 0 && Mask < 16), "a distance within 16 lanes, or 16");
  return by_words(v, [](int w) {
    if constexpr (Mask == 16) {
      int other = __builtin_amdgcn_permlanex16(w, w, 0x76543210, 0xfedcba98, false, true);
#if defined(__HIP_DEVICE_COMPILE__)
      asm volatile("" : "+v"(other));  // LLVM 19 moves it into a branch that only some of the lanes take
#endif
      return other;
    } else {
      return __builtin_amdgcn_update_dpp(0, w, 0x160 | Mask, 0xf, 0xf, true);  // row_xmask
    }
  });
#else
  return shuffle_xor(v, Mask);
#endif
}

// f over the values of the lanes whose numbers differ in Mask and the bits below it, the greatest distance first.
template <int Mask = kWave / 2, typename T, typename F>
__device__ inline T reduce(T v, F f) {
  v = f(v, shuffle_xor<Mask>(v));
  if constexpr (Mask > 1) v = reduce<Mask / 2>(v, f);
  return v;
}

__device__ inline float wave_sum(float v) {
  return reduce(v, [](float a, float b) { return a + b; });
}

// The same of N values, a power of two, in fewer shuffles: lanes i * 32 / N and those after it end with v[i]'s sum.
template <int N, int Mask = kWave / 2>
__device__ inline float wave_sums(float (&v)[N]) {
  static_assert((N & (N - 1)) == 0 && N <= kWave, "a power of two");
  constexpr int kHad = N * Mask * 2 / kWave, kLeft = kHad / 2;  // values a lane has before and after this step
  if constexpr (kHad <= 1) {
    v[0] += shuffle_xor<Mask>(v[0]);
  } else {
    const bool upper = (lane() & Mask) != 0;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const float mine = upper ? v[i + kLeft] : v[i], other = upper ? v[i] : v[i + kLeft];
      v[i] = mine + shuffle_xor<Mask>(other);
    }
  }
  if constexpr (Mask > 1) return wave_sums<N, Mask / 2>(v);
  return v[0];
}
constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

__device__ inline int wave_sum(int v) {
#if defined(DFLASH_GPU_HIP)
  return reduce(v, [](int a, int b) { return a + b; });
#else
  return __reduce_add_sync(0xffffffffu, v);
#endif
}

// The largest and the smallest v of a wave.
__device__ inline int wave_max(int v) {
#if defined(DFLASH_GPU_HIP)
  return reduce(v, [](int a, int b) { return max(a, b); });
#else
  return __reduce_max_sync(0xffffffffu, v);
#endif
}

__device__ inline uint32_t wave_most(uint32_t v) {
#if defined(DFLASH_GPU_HIP)
  return reduce(v, [](uint32_t a, uint32_t b) { return max(a, b); });
#else
  return __reduce_max_sync(0xffffffffu, v);
#endif
}

__device__ inline uint32_t wave_least(uint32_t v) {
#if defined(DFLASH_GPU_HIP)
  return reduce(v, [](uint32_t a, uint32_t b) { return min(a, b); });
#else
  return __reduce_min_sync(0xffffffffu, v);
#endif
}

// As integers in the order of the floats: nothing has to be said about NaN, and a step is one instruction.
__device__ inline float wave_max(float v) {
  auto turn = [](int i) { return i ^ ((i >> 31) & 0x7fffffff); };
  return __int_as_float(turn(wave_max(turn(__float_as_int(v)))));
}

// The sum of v over the lanes before this one.
__device__ inline int wave_sum_before(int v) {
  int sum = v;
  for (int step = 1; step < kWave; step <<= 1) {
#if defined(DFLASH_GPU_HIP)
    const int other = __shfl_up(sum, static_cast<unsigned>(step), kWave);
#else
    const int other = __shfl_up_sync(0xffffffffu, sum, static_cast<unsigned>(step));
#endif
    if (lane() >= step) sum += other;
  }
  return sum - v;
}

// ---- device: bytes and numbers
// -----------------------------------------------------------------------------------------

#if defined(__HIP__)
#define DFLASH_DEVICE_MEMORY __attribute__((address_space(1)))
#define DFLASH_CONSTANT_MEMORY __attribute__((address_space(4)))
#else  // NVIDIA and tests/gpu/emulator
#define DFLASH_DEVICE_MEMORY
#define DFLASH_CONSTANT_MEMORY
#endif

// What lies at p. AMD: in device memory, which the compiler cannot see of a pointer chosen at run time (one of several
// matrices): it would have every access ask whether the address is shared memory's, and wait for both kinds.
template <typename T>
__device__ inline T load(const T* p) {
#if defined(DFLASH_GPU_HIP)
  constexpr size_t kPiece = sizeof(T) < 16 ? sizeof(T) : 16, kWord = sizeof(T) < 4 ? sizeof(T) : 4;
  using Word = std::conditional_t<kWord == 4, uint32_t, std::conditional_t<kWord == 2, uint16_t, uint8_t>>;
  typedef Word Piece __attribute__((ext_vector_type(kPiece / kWord)));
  static_assert(sizeof(T) % kPiece == 0 && alignof(T) == kPiece, "whole, aligned pieces");
  struct {
    Piece piece[sizeof(T) / kPiece];
  } v;
  const auto* from = (const DFLASH_DEVICE_MEMORY Piece*)p;
  for (size_t i = 0; i < sizeof(T) / kPiece; ++i) v.piece[i] = from[i];
  return __builtin_bit_cast(T, v);
#else
  return *p;
#endif
}

// What lies at p in device memory, p the same in all lanes, T of whole words, and no block of this kernel writes there.
// AMD: by the scalar unit. Vector loads return in the order they were asked for, so that a wait for such a value would
// be one for all weights asked for before.
template <typename T>
__device__ inline T load_uniform(const T* p) {
#if defined(DFLASH_GPU_HIP)
  typedef uint32_t Words __attribute__((ext_vector_type(sizeof(T) / 4), aligned(4)));
  return __builtin_bit_cast(T, *(const DFLASH_CONSTANT_MEMORY Words*)p);
#else
  return *p;
#endif
}

// The compiler moves nothing across: it would load operands of many steps ahead and run out of registers.
__device__ inline void keep_order() {
#if defined(__HIP_DEVICE_COMPILE__)
  __builtin_amdgcn_sched_barrier(0);
#endif
}

// Reads data that this kernel uses once: past the small caches on AMD, from where copies brought it on NVIDIA.
__device__ inline uint4 load_once(const uint8_t* p) {
#if defined(DFLASH_GPU_HIP)
  typedef unsigned int u32x4 __attribute__((ext_vector_type(4)));
  const u32x4 v = __builtin_nontemporal_load((const DFLASH_DEVICE_MEMORY u32x4*)p);
  return make_uint4(v.x, v.y, v.z, v.w);
#else
  return *reinterpret_cast<const uint4*>(p);
#endif
}

__device__ inline float half_to_float(uint16_t h) {
#if defined(DFLASH_GPU_HIP)
  return static_cast<float>(__builtin_bit_cast(_Float16, h));
#else
  return __half2float(__ushort_as_half(h));
#endif
}

__device__ inline uint16_t float_to_half(float f) {
#if defined(DFLASH_GPU_HIP)
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(f));
#else
  return __half_as_ushort(__float2half_rn(f));
#endif
}

// 1 / v and 1 / sqrt(v) to within a unit or two of the last place: by one instruction, where IEEE's take a dozen on the
// way of what everybody waits for.
__device__ inline float reciprocal(float v) {
#if defined(DFLASH_GPU_HIP)
  return __builtin_amdgcn_rcpf(v);
#elif defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return 1.0f / v;
#endif
}

__device__ inline float inverse_sqrt(float v) {
#if defined(DFLASH_GPU_HIP)
  return __builtin_amdgcn_rsqf(v);
#elif defined(__CUDA_ARCH__)
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return 1.0f / sqrtf(v);
#endif
}

__device__ inline float bf16_to_float(uint16_t h) { return __uint_as_float(static_cast<uint32_t>(h) << 16); }

// c + the dot product of four bytes (signed, or else unsigned) with four signed bytes.
template <bool Signed = true>
__device__ inline int dot4(int a, int b, int c) {
#if defined(__gfx1100__) || defined(__gfx1101__) || defined(__gfx1102__) || defined(__gfx1103__) || \
    defined(__gfx1150__) || defined(__gfx1151__) || defined(__gfx1200__) || defined(__gfx1201__)
  return __builtin_amdgcn_sudot4(Signed, a, true, b, c, false);
#elif defined(__CUDA_ARCH__)
  if constexpr (Signed) return __dp4a(a, b, c);
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else  // the host pass only parses
  return a + b + c;
#endif
}

// Bit l: lane l's v.
__device__ inline uint32_t ballot(bool v) {
#if defined(DFLASH_GPU_HIP)
  return static_cast<uint32_t>(__ballot(v));
#else
  return __ballot_sync(0xffffffffu, v);
#endif
}

}  // namespace dflash::gpu
