#pragma once
// gpu.h's part for many rows: 16-bit floats on matrix instructions, asynchronous copies. The same rule: what differs
// between vendors is here and nowhere else.

#include "backend/hip/gpu_mma.h"

#if defined(DFLASH_GPU_CUDA)
#include <cuda_bf16.h>
#endif

namespace dflash::gpu {

// ---- products of many rows ------------------------------------------------------------------------------------------
// As in gpu.h a step is 16 weight rows by kMmaTokens token rows over a group of 32, its results at mma_row(i) and
// mma_token(j). A lane expands kHalfWords words of each weight row it holds: rows mma_row(i).
// Activations are 16-bit floats whose 32 elements lie in the order half_slot(), four chunks of 16 bytes.

#if defined(DFLASH_GPU_HIP)
#if defined(__gfx1200__) || defined(__gfx1201__)
inline constexpr int kHalfWords = 2;
#else
inline constexpr int kHalfWords = 4;
#endif
inline constexpr int kHalfHeld = 1;       // runs of 16 weight rows expanded at a time
inline constexpr int kHalfWaves = 4;      // waves of a block that multiply, each with weight rows of its own
inline constexpr int kHalfRuns = 4;       // runs of 16 weight rows of such a wave
inline constexpr int kHalfProducers = 0;  // waves of a block that only copy
inline constexpr int kHalfPass = 16;      // tokens whose results leave a wave at a time
inline constexpr int kHalfPad = 1;        // floats between their rows in shared memory
inline constexpr int kFlashWaves = 4;     // waves of a block of attention, at most
inline constexpr int kFlashBlocks = 1;    // __launch_bounds__' second number where it has four
inline constexpr int kFlashKeys = 32;     // keys of a tile
inline constexpr int kFlashPair = 1;      // runs of 16 keys, or of 16 dimensions, taken together
#else
inline constexpr int kHalfWords = 1;
inline constexpr int kHalfHeld = 2;
inline constexpr int kHalfWaves = 8;
inline constexpr int kHalfRuns = 2;
inline constexpr int kHalfProducers = 4;
inline constexpr int kHalfPass = 32;
inline constexpr int kHalfPad = 4;
inline constexpr int kFlashWaves = 12;
inline constexpr int kFlashBlocks = 3;
inline constexpr int kFlashKeys = 64;
inline constexpr int kFlashPair = 2;
#endif
inline constexpr int kHalfGroups = 2;  // groups of 32 in a stage

// Shared memory for the stages. On NVIDIA the weights pass through it too, so that many bytes are under way; that is
// more than a kernel may declare. On AMD they go straight to registers.
#if defined(DFLASH_GPU_HIP)
#define DFLASH_STAGES(name, bytes) alignas(16) __shared__ uint8_t name[bytes]
#else
#define DFLASH_STAGES(name, bytes) extern __shared__ __align__(1024) uint8_t name[]
#endif

// launch() of a kernel that declares DFLASH_STAGES of `bytes`.
template <typename... P, typename... A>
void launch_stages(Stream stream, dim3 grid, unsigned threads, size_t bytes, void (*kernel)(P...), A&&... args) {
#if defined(DFLASH_GPU_HIP)
  (void)bytes;
  launch(stream, grid, threads, kernel, std::forward<A>(args)...);
#else
  launch_shared(stream, grid, threads, bytes, kernel, std::forward<A>(args)...);
#endif
}

// Shared memory a block may ask for: what the stages of NVIDIA's kernels fill.
inline int shared_most() {
#if defined(DFLASH_GPU_HIP)
  return 64 << 10;
#else
  int bytes = 0;
  GPU_CHECK(DeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  return bytes;
#endif
}

// ---- a ring of stages between the waves that copy and the waves that multiply (NVIDIA) ------------------------------
#if defined(DFLASH_GPU_CUDA)

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A barrier in shared memory completes a phase whenever `count` arrivals have come.
__device__ inline void barrier_init(uint64_t* b, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}

// By a thread, for itself. (One lane for its wave would do, but racecheck does not see that the others have read.)
__device__ inline void barrier_arrive(uint64_t* b) {
  asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared.b64 t, [%0];\n}" ::"r"(shared_address(b)) : "memory");
}

// By every thread that copies: arrives when the copies it has begun are there. (Waiting for them, and the fence that
// shows them to the products, would hold up the copies after them: that fence waits for all of a thread's copies.)
__device__ inline void barrier_arrive_copied(uint64_t* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}

// Waits until the phase of this parity is complete; that before the first counts as parity 1.
__device__ inline void barrier_wait(uint64_t* b, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define DFLASH_WAIT "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define DFLASH_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\n" DFLASH_WAIT " p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  }
#undef DFLASH_WAIT
}

// By all waves of a warpgroup: the registers a thread has from here on.
template <int Count>
__device__ inline void more_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}
template <int Count>
__device__ inline void fewer_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

#endif

// Where element e of a group lies: nibbles 0 and 2 of a word unpack together, so do 1 and 3.
__host__ __device__ inline int half_slot(int e) {
  const int in_word = (e & 1) << 1 | (e >> 1 & 1);
#if defined(DFLASH_GPU_HIP)
  return (e & ~3) | in_word;
#else
  return (e >> 4) * 16 + (in_word >> 1) * 8 + (e >> 2 & 3) * 2 + (in_word & 1);
#endif
}

struct HalfWeightWords {  // an instruction's operand, of depth 16
  uint32_t w[kHalfWords * 2 * kMmaRows];
};
struct HalfActWords {
  uint32_t w[kHalfWords * 2];
};
struct HalfWeights {  // 16 rows, a group of 32
  HalfWeightWords k[2];
};

// The lane's bytes of its first row among 16; its further rows lie kHalfRowBytes apart.
inline constexpr int kHalfRowBytes = 128;
__device__ inline int half_weight_at() {
#if defined(DFLASH_GPU_HIP)
  return (lane() & 15) * 16 + (kHalfWords == 2 ? (lane() >> 4) * 8 : 0);
#else
  return lane() * 4;
#endif
}

// p: the pairs made of word `word` of row i, low nibbles (or first bytes) before high.
__device__ inline void half_put(HalfWeights& w, int i, int word, const uint32_t (&p)[4]) {
#if defined(DFLASH_GPU_HIP)
  (void)i;
  for (int k = 0; k < 2; ++k) {
    w.k[k].w[word * 2] = p[k * 2];
    w.k[k].w[word * 2 + 1] = p[k * 2 + 1];
  }
#else
  (void)word;
  for (int k = 0; k < 2; ++k) {
    w.k[k].w[i] = p[k * 2];
    w.k[k].w[i + 2] = p[k * 2 + 1];
  }
#endif
}

// The two 16-bit floats. scale(): a block's f16 scale as it multiplies; nibbles(): (nibble - 8) * scale of a word, as
// pairs (elements 0 2, 1 3, then the high nibbles 16 18, 17 19); nibbles_min(): nibble * scale + min; bytes(): signed
// bytes of two words.
#if defined(DFLASH_GPU_HIP)
typedef _Float16 half2_t __attribute__((ext_vector_type(2)));
typedef _Float16 half16_t __attribute__((ext_vector_type(16)));
typedef _Float16 half8_t __attribute__((ext_vector_type(8)));
typedef short short16_t __attribute__((ext_vector_type(16)));
typedef short short8_t __attribute__((ext_vector_type(8)));
typedef float float8_t __attribute__((ext_vector_type(8)));

__device__ inline float byte_float(uint32_t w, int i) { return static_cast<float>(w >> 8 * i & 255u); }
__device__ inline float signed_byte_float(uint32_t w, int i) {
  return static_cast<float>(static_cast<int32_t>(w << (24 - 8 * i)) >> 24);
}

struct F16 {
  static constexpr bool kF16 = true;
  using Scale = half2_t;
  static __device__ inline uint32_t pack(float a, float b) {
    const half2_t v = {static_cast<_Float16>(fminf(fmaxf(a, -65504.0f), 65504.0f)),
                       static_cast<_Float16>(fminf(fmaxf(b, -65504.0f), 65504.0f))};
    return __builtin_bit_cast(uint32_t, v);
  }
  static __device__ inline uint32_t pack_small(float a, float b) {  // of values that fit
    return __builtin_bit_cast(uint32_t, half2_t{static_cast<_Float16>(a), static_cast<_Float16>(b)});
  }
  static __device__ inline Scale scale(uint16_t d) {
    const _Float16 h = __builtin_bit_cast(_Float16, d);
    return {h, h};
  }
  static __device__ inline half2_t low(uint32_t w) {
    return __builtin_bit_cast(half2_t, (w & 0x000f000fu) | 0x64006400u);
  }
  static __device__ inline half2_t plain(_Float16 v) { return half2_t{v, v}; }
  static __device__ inline void nibbles(uint32_t w, Scale d, uint32_t (&p)[4]) {
    const half2_t z = plain(static_cast<_Float16>(-1032.0f));
    for (int i = 0; i < 4; ++i) p[i] = __builtin_bit_cast(uint32_t, (low(w >> (i / 2 * 4 + i % 2 * 8)) + z) * d);
  }
  static __device__ inline void nibbles_min(uint32_t w, Scale d, Scale m, uint32_t (&p)[4]) {
    const half2_t z = plain(static_cast<_Float16>(-1024.0f));
    for (int i = 0; i < 4; ++i) {
      p[i] = __builtin_bit_cast(uint32_t, __builtin_elementwise_fma(low(w >> (i / 2 * 4 + i % 2 * 8)) + z, d, m));
    }
  }
  static __device__ inline void mma(float (&c)[kMmaAcc], const HalfWeightWords& w, const HalfActWords& x) {
    float8_t s;
    for (int i = 0; i < 8; ++i) s[i] = c[i];
#if defined(__gfx1200__) || defined(__gfx1201__)
    s = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(__builtin_bit_cast(half8_t, x), __builtin_bit_cast(half8_t, w),
                                                         s);
#elif defined(__HIP_DEVICE_COMPILE__)
    s = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(__builtin_bit_cast(half16_t, x), __builtin_bit_cast(half16_t, w), s);
#else
    (void)w;
    (void)x;
#endif
    for (int i = 0; i < 8; ++i) c[i] = s[i];
  }
};

struct BF16 {
  static constexpr bool kF16 = false;
  using Scale = float;
  static __device__ inline uint32_t pack(float a, float b) {  // to nearest
    return __builtin_amdgcn_perm(__float_as_uint(b) + 0x8000u, __float_as_uint(a) + 0x8000u, 0x07060302u);
  }
  static __device__ inline Scale scale(uint16_t d) { return half_to_float(d); }
  static __device__ inline void nibbles(uint32_t w, Scale d, uint32_t (&p)[4]) { nibbles_min(w, d, -8.0f * d, p); }
  static __device__ inline void nibbles_min(uint32_t w, Scale d, Scale m, uint32_t (&p)[4]) {
    const uint32_t n[2] = {w & 0x0f0f0f0fu, w >> 4 & 0x0f0f0f0fu};
    for (int i = 0; i < 4; ++i) {
      p[i] = pack(fmaf(byte_float(n[i / 2], i % 2), d, m), fmaf(byte_float(n[i / 2], i % 2 + 2), d, m));
    }
  }
  static __device__ inline void mma(float (&c)[kMmaAcc], const HalfWeightWords& w, const HalfActWords& x) {
    float8_t s;
    for (int i = 0; i < 8; ++i) s[i] = c[i];
#if defined(__gfx1200__) || defined(__gfx1201__)
    s = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(__builtin_bit_cast(short8_t, x),
                                                          __builtin_bit_cast(short8_t, w), s);
#elif defined(__HIP_DEVICE_COMPILE__)
    s = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(__builtin_bit_cast(short16_t, x), __builtin_bit_cast(short16_t, w),
                                                    s);
#else
    (void)w;
    (void)x;
#endif
    for (int i = 0; i < 8; ++i) c[i] = s[i];
  }
};

#else

__device__ inline float signed_byte_float(uint32_t w, int i) {  // in the mantissa of 2^23
  return __uint_as_float(__byte_perm(w ^ 0x80808080u, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i))) - 8388736.0f;
}

template <typename T>
__device__ inline uint32_t half_bits(T v) {
  static_assert(sizeof(T) == 4);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <typename T>
__device__ inline T half_from(uint32_t v) {
  return *reinterpret_cast<const T*>(&v);
}

// (v & mask) | bits in one instruction.
__device__ inline uint32_t and_or(uint32_t v, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
  return r;
}

struct F16 {
  static constexpr bool kF16 = true;
  using Scale = __half2;
  static __device__ inline uint32_t pack(float a, float b) {
    return half_bits(__floats2half2_rn(fminf(fmaxf(a, -65504.0f), 65504.0f), fminf(fmaxf(b, -65504.0f), 65504.0f)));
  }
  static __device__ inline uint32_t pack_small(float a, float b) { return half_bits(__floats2half2_rn(a, b)); }
  static __device__ inline Scale scale(uint16_t d) { return __half2half2(__ushort_as_half(d)); }
  // nibble + 1024 in the low nibbles of each half, 16 * nibble + 1024 in the next
  static __device__ inline __half2 low(uint32_t w) { return half_from<__half2>(and_or(w, 0x000f000fu, 0x64006400u)); }
  static __device__ inline __half2 high(uint32_t w) { return half_from<__half2>(and_or(w, 0x00f000f0u, 0x64006400u)); }
  template <int Minus>
  static __device__ inline void whole(uint32_t w, __half2 (&v)[4]) {
    const __half2 zl = half_from<__half2>(Minus == 8 ? 0xe408e408u : 0xe400e400u);  // -1032, -1024
    const __half2 zh = half_from<__half2>(Minus == 8 ? 0xd480d480u : 0xd400d400u);  // -72, -64
    const __half2 sixteenth = half_from<__half2>(0x2c002c00u);
    const uint32_t u = w >> 8;
    v[0] = __hadd2(low(w), zl);
    v[1] = __hadd2(low(u), zl);
    v[2] = __hfma2(high(w), sixteenth, zh);
    v[3] = __hfma2(high(u), sixteenth, zh);
  }
  static __device__ inline void nibbles(uint32_t w, Scale d, uint32_t (&p)[4]) {
    __half2 v[4];
    whole<8>(w, v);
    for (int i = 0; i < 4; ++i) p[i] = half_bits(__hmul2(v[i], d));
  }
  static __device__ inline void nibbles_min(uint32_t w, Scale d, Scale m, uint32_t (&p)[4]) {
    __half2 v[4];
    whole<0>(w, v);
    for (int i = 0; i < 4; ++i) p[i] = half_bits(__hfma2(v[i], d, m));
  }
  static __device__ inline void mma(float (&c)[kMmaAcc], const HalfWeightWords& w, const HalfActWords& x) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(w.w[0]), "r"(w.w[1]), "r"(w.w[2]), "r"(w.w[3]), "r"(x.w[0]), "r"(x.w[1]));
  }
};

struct BF16 {
  static constexpr bool kF16 = false;
  using Scale = __nv_bfloat162;
  static __device__ inline uint32_t pack(float a, float b) { return half_bits(__floats2bfloat162_rn(a, b)); }
  static __device__ inline Scale scale(uint16_t d) {
    const float f = half_to_float(d);
    return __floats2bfloat162_rn(f, f);
  }
  template <int Minus>
  static __device__ inline __nv_bfloat162 whole(uint32_t w) {  // nibble + 128, minus 136 or 128
    return __hadd2(half_from<__nv_bfloat162>(and_or(w, 0x000f000fu, 0x43004300u)),
                   half_from<__nv_bfloat162>(Minus == 8 ? 0xc308c308u : 0xc300c300u));
  }
  static __device__ inline void nibbles(uint32_t w, Scale d, uint32_t (&p)[4]) {
    for (int i = 0; i < 4; ++i) p[i] = half_bits(__hmul2(whole<8>(w >> (i / 2 * 4 + i % 2 * 8)), d));
  }
  static __device__ inline void nibbles_min(uint32_t w, Scale d, Scale m, uint32_t (&p)[4]) {
    for (int i = 0; i < 4; ++i) p[i] = half_bits(__hfma2(whole<0>(w >> (i / 2 * 4 + i % 2 * 8)), d, m));
  }
  static __device__ inline void mma(float (&c)[kMmaAcc], const HalfWeightWords& w, const HalfActWords& x) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(w.w[0]), "r"(w.w[1]), "r"(w.w[2]), "r"(w.w[3]), "r"(x.w[0]), "r"(x.w[1]));
  }
};

#endif

// Signed bytes of words a (elements 0..3) and b (16..19) times d.
template <typename N>
__device__ inline void half_bytes(uint32_t a, uint32_t b, float d, uint32_t (&p)[4]) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = i < 2 ? a : b;
    p[i] = N::pack(signed_byte_float(w, i % 2) * d, signed_byte_float(w, i % 2 + 2) * d);
  }
}

// half_step: sum[m][b] += w[m] * the tokens of block b, for Runs runs of 16 weight rows and Blocks blocks of kMmaTokens
// tokens, 16 deep: pieces `piece` and `piece` + 1 of acts [token][8 turned pieces of 16 bytes], aligned to 1024 bytes.
// On Hopper this only starts the product: products_begin() before it, products_end() after, and products_wait<n>()
// until all but the last n are done; till then neither the sums nor the weights may be touched.
inline constexpr int kHalfTurn = 128;  // bytes of a token there
__device__ inline int half_turned(int piece, int token) { return piece ^ (token & 7); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A matrix in shared memory whose rows are 128 turned bytes; `across`: bytes to the columns past those, where there
// are.
__device__ inline uint64_t wgmma_turned(const uint8_t* p, int across) {
  const uint64_t at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  return (at & 0x3ffff) >> 4 | static_cast<uint64_t>(across >> 4) << 16 | uint64_t{kHalfTurn * 8 >> 4} << 32 |
         uint64_t{1} << 62;
}

#define DFLASH_D4(b) "+f"(d[b][0]), "+f"(d[b][1]), "+f"(d[b][2]), "+f"(d[b][3])
#define DFLASH_WGMMA(tokens, type, results, a, last, ...)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type " {" results "}, " a ", " last \
               : __VA_ARGS__                                                                                       \
               : "r"(w.w[0]), "r"(w.w[1]), "r"(w.w[2]), "r"(w.w[3]), "l"(x), "n"(Transposed ? 1 : 0))
#define DFLASH_R16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define DFLASH_R32 DFLASH_R16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define DFLASH_R48 DFLASH_R32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define DFLASH_R64 DFLASH_R48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define DFLASH_R80 DFLASH_R64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define DFLASH_R96 DFLASH_R80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define DFLASH_R128 DFLASH_R96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define DFLASH_D32 DFLASH_D4(0), DFLASH_D4(1), DFLASH_D4(2), DFLASH_D4(3)
#define DFLASH_D64 DFLASH_D32, DFLASH_D4(4), DFLASH_D4(5), DFLASH_D4(6), DFLASH_D4(7)
#define DFLASH_D96 DFLASH_D64, DFLASH_D4(8), DFLASH_D4(9), DFLASH_D4(10), DFLASH_D4(11)

// All four waves: 64 weight rows, 16 of each wave, by 8 * Blocks tokens, depth 16.
template <bool F16Type, int Blocks, bool Transposed = false, int Most>
__device__ inline void wgmma(float (&d)[Most][4], const HalfWeightWords& w, uint64_t x) {
  static_assert(Blocks == 2 || Blocks == 4 || Blocks == 6 || Blocks == 8 || Blocks == 10 || Blocks == 12 ||
                Blocks == 16);
#define DFLASH_WGMMA_OF(type)                                                                                  \
  if constexpr (Blocks == 2) {                                                                                 \
    DFLASH_WGMMA(16, type, DFLASH_R16, "{%8,%9,%10,%11}", "%12, 1, 1, 1, %13;", DFLASH_D4(0), DFLASH_D4(1));   \
  } else if constexpr (Blocks == 4) {                                                                          \
    DFLASH_WGMMA(32, type, DFLASH_R32, "{%16,%17,%18,%19}", "%20, 1, 1, 1, %21;", DFLASH_D32);                 \
  } else if constexpr (Blocks == 6) {                                                                          \
    DFLASH_WGMMA(48, type, DFLASH_R48, "{%24,%25,%26,%27}", "%28, 1, 1, 1, %29;", DFLASH_D32, DFLASH_D4(4),    \
                 DFLASH_D4(5));                                                                                \
  } else if constexpr (Blocks == 8) {                                                                          \
    DFLASH_WGMMA(64, type, DFLASH_R64, "{%32,%33,%34,%35}", "%36, 1, 1, 1, %37;", DFLASH_D64);                 \
  } else if constexpr (Blocks == 10) {                                                                         \
    DFLASH_WGMMA(80, type, DFLASH_R80, "{%40,%41,%42,%43}", "%44, 1, 1, 1, %45;", DFLASH_D64, DFLASH_D4(8),    \
                 DFLASH_D4(9));                                                                                \
  } else if constexpr (Blocks == 12) {                                                                         \
    DFLASH_WGMMA(96, type, DFLASH_R96, "{%48,%49,%50,%51}", "%52, 1, 1, 1, %53;", DFLASH_D96);                 \
  } else {                                                                                                     \
    DFLASH_WGMMA(128, type, DFLASH_R128, "{%64,%65,%66,%67}", "%68, 1, 1, 1, %69;", DFLASH_D96, DFLASH_D4(12), \
                 DFLASH_D4(13), DFLASH_D4(14), DFLASH_D4(15));                                                 \
  }
  if constexpr (F16Type) {
    DFLASH_WGMMA_OF("f16")
  } else {
    DFLASH_WGMMA_OF("bf16")
  }
#undef DFLASH_WGMMA_OF
}
#undef DFLASH_D96
#undef DFLASH_D64
#undef DFLASH_D32
#undef DFLASH_R128
#undef DFLASH_R96
#undef DFLASH_R80
#undef DFLASH_R64
#undef DFLASH_R48
#undef DFLASH_R32
#undef DFLASH_R16
#undef DFLASH_WGMMA
#undef DFLASH_D4

template <typename N, int Blocks, int Runs, int Most>
__device__ inline void half_step(float (&sum)[Runs][Most][kMmaAcc], const HalfWeightWords (&w)[Runs],
                                 const uint8_t* acts, int piece) {
  const uint64_t x = wgmma_turned(acts + piece * 16, 16);
#pragma unroll
  for (int m = 0; m < Runs; ++m) wgmma<N::kF16, Blocks>(sum[m], w[m], x);
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Newer>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Newer) : "memory");
}
// What was copied to shared memory becomes visible to the products.
__device__ inline void products_see_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Results are not read before, nor the registers of weights written: up to here a product may still run.
template <int Blocks>
__device__ inline void products_hold(float (&sum)[Blocks][kMmaAcc]) {
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    asm volatile("" : "+f"(sum[b][0]), "+f"(sum[b][1]), "+f"(sum[b][2]), "+f"(sum[b][3])::"memory");
  }
}
template <int Runs>
__device__ inline void products_hold(HalfWeightWords (&w)[Runs]) {
#pragma unroll
  for (int m = 0; m < Runs; ++m) asm volatile("" : "+r"(w[m].w[0]), "+r"(w[m].w[1]), "+r"(w[m].w[2]), "+r"(w[m].w[3]));
}

#elif defined(DFLASH_GPU_CUDA)

template <typename N, int Blocks, int Runs, int Most>
__device__ inline void half_step(float (&sum)[Runs][Most][kMmaAcc], const HalfWeightWords (&w)[Runs],
                                 const uint8_t* acts, int piece) {
  const uint8_t* token = acts + mma_act_token() * kHalfTurn + (lane() & 3) * 4;
  const int first = half_turned(piece, mma_act_token()) * 16, second = half_turned(piece + 1, mma_act_token()) * 16;
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    const uint8_t* at = token + b * kMmaTokens * kHalfTurn;
    const HalfActWords x = {mma_word(at + first), mma_word(at + second)};
#pragma unroll
    for (int m = 0; m < Runs; ++m) N::mma(sum[m][b], w[m], x);
  }
}

#else

// The whole group at once.
template <typename N, int Blocks, int Runs, int Most>
__device__ inline void half_products(float (&sum)[Runs][Most][kMmaAcc], const HalfWeights (&w)[Runs],
                                     const uint8_t* chunks, int plane) {
  const uint8_t* token = chunks + mma_act_token() * 16;
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    HalfActWords x[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint8_t* at = token + b * kMmaTokens * 16 + 2 * k * plane;
#pragma unroll
      for (int c = 0; c < kHalfWords / 2; ++c) {
        const uint4 v = *reinterpret_cast<const uint4*>(at + (kHalfWords == 2 ? lane() >> 4 : c) * plane);
        x[k].w[c * 4] = v.x;
        x[k].w[c * 4 + 1] = v.y;
        x[k].w[c * 4 + 2] = v.z;
        x[k].w[c * 4 + 3] = v.w;
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // a result is not touched twice in a row: its sum takes a while
#pragma unroll
      for (int m = 0; m < Runs; ++m) N::mma(sum[m][b], w[m].k[k], x[k]);
    }
    keep_order();
  }
}

#endif

#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline void products_begin() {}
__device__ inline void products_end() {}
template <int Newer>
__device__ inline void products_wait() {}
__device__ inline void products_see_copies() {}
template <int Runs>
__device__ inline void products_hold(HalfWeightWords (&)[Runs]) {}
template <int Blocks>
__device__ inline void products_hold(float (&)[Blocks][kMmaAcc]) {}

#endif

}  // namespace dflash::gpu
