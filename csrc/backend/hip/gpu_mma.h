#pragma once
// Matrix instructions on bytes, for products of some rows with quantised weights, and the shape of a step that all
// matrix kernels share.

#include "backend/hip/gpu.h"

namespace dflash::gpu {

// One step multiplies 16 weight rows by kMmaTokens token rows over a group of 32: exact int32 sums. A lane holds
// kMmaRows x kMmaToks of the results, c[i * kMmaToks + j]: weight row mma_row(i), token mma_token(j).
//
// Operands are read as chunks: 16 bytes of a row, rows 16 bytes apart for weights; p is the same in all lanes, a chunk
// so many bytes behind it, the second of two `second` bytes behind the first. Q4 nibbles are one chunk (low
// nibbles: elements 0..15, high: 16..31), bytes two chunks (elements 0..15, 16..31).

// Rows of activations from which the matrix instructions are used; below, dot4 is at least as fast. The results are
// the same bits either way.
#if defined(DFLASH_GPU_HIP)
inline constexpr int kMmaFromRows = 5;      // five rows of activations are too many for the scalar registers
inline constexpr int kMmaUnroll = 1;        // groups in a loop body
inline constexpr int kAttentionUnroll = 1;  // steps over head_dim in a loop body: more need too many registers
inline constexpr int kDotAhead[] = {4, 1};  // groups of weights loaded ahead, for 1 row and for more
inline constexpr int kMmaTokens = 16, kMmaRows = 1, kMmaToks = 8;
inline constexpr int kHalfTokens = 32;  // tokens a block of the kernels for many rows takes
#else
inline constexpr int kMmaFromRows = 3;
inline constexpr int kMmaUnroll = 3;
inline constexpr int kAttentionUnroll = 2;
inline constexpr int kDotAhead[] = {3, 3};
inline constexpr int kMmaTokens = 8, kMmaRows = 2, kMmaToks = 2;
inline constexpr int kHalfTokens = 96;
#endif
inline constexpr int kMmaAcc = kMmaRows * kMmaToks;

// Sums start at kMmaZero and are read by mma_value(). NVIDIA converts integers at a fraction of the rate at which it
// adds floats, so there the sum grows in the mantissa of 1.5 * 2^23: exact for |sum| < 2^22, and 2^19 suffices.
#if defined(DFLASH_GPU_HIP)
inline constexpr int kMmaZero = 0;
__device__ inline float mma_value(int c) { return static_cast<float>(c); }
#else
inline constexpr int kMmaZero = 0x4b400000;
__device__ inline float mma_value(int c) { return __int_as_float(c) - 12582912.0f; }
#endif

#if defined(DFLASH_GPU_HIP)

#if defined(__gfx1200__) || defined(__gfx1201__)
// RDNA4: a lane holds half of its row's 16 bytes.
typedef int mma_bytes __attribute__((ext_vector_type(2)));
#else
// RDNA3: lanes l and l + 16 both hold row l's 16 bytes.
typedef int mma_bytes __attribute__((ext_vector_type(4)));
#endif
typedef int mma_sums __attribute__((ext_vector_type(8)));

struct MmaOperand {  // a group of 32: two instructions of depth 16
  mma_bytes k0, k1;
};
using MmaWeights = MmaOperand;
using MmaActs = MmaOperand;

__device__ inline mma_bytes mma_chunk(const uint8_t* row) {
#if defined(__gfx1200__) || defined(__gfx1201__)
  return load(reinterpret_cast<const mma_bytes*>(row + (lane() >> 4) * 8));
#else
  return load(reinterpret_cast<const mma_bytes*>(row));
#endif
}

__device__ inline int mma_row(int) { return lane() & 15; }
__device__ inline int mma_token(int j) {
#if defined(__gfx1200__) || defined(__gfx1201__)
  return j + 8 * (lane() >> 4);
#else
  return 2 * j + (lane() >> 4);
#endif
}

struct MmaNibbles {  // weights as they lie
  mma_bytes v;
};
__device__ inline MmaNibbles mma_load_nibbles(const uint8_t* p, uint32_t chunk) {
  return {mma_chunk(p + (chunk + (lane() & 15) * 16))};
}
__device__ inline MmaWeights mma_unpack(const MmaNibbles& n) { return {n.v & 0x0f0f0f0f, (n.v >> 4) & 0x0f0f0f0f}; }

__device__ inline MmaWeights mma_load_bytes(const uint8_t* p, uint32_t chunk, uint32_t second) {
  const uint8_t* at = p + (chunk + (lane() & 15) * 16);
  return {mma_chunk(at), mma_chunk(at + second)};
}

// The lane's token is mma_act_token(); its two chunks lie at p and p + second.
__device__ inline int mma_act_token() { return lane() & 15; }
__device__ inline MmaActs mma_load_acts(const uint8_t* p, int second) { return {mma_chunk(p), mma_chunk(p + second)}; }

__device__ inline void mma(int (&c)[kMmaAcc], [[maybe_unused]] const MmaWeights& w, [[maybe_unused]] const MmaActs& x) {
  mma_sums s;
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] = c[i];
#if defined(__gfx1200__) || defined(__gfx1201__)
  s = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, x.k0, true, w.k0, s, false);
  s = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, x.k1, true, w.k1, s, false);
#elif defined(__HIP_DEVICE_COMPILE__)
  s = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, x.k0, true, w.k0, s, false);
  s = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, x.k1, true, w.k1, s, false);
#endif
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i] = s[i];
}

#else  // NVIDIA: mma.m16n8k32, weights as A (row g = lane / 4 and g + 8), tokens as B

struct MmaWeights {
  uint32_t a0, a1, a2, a3;
};
struct MmaActs {
  uint32_t b0, b1;
};

__device__ inline int mma_row(int i) { return (lane() >> 2) + 8 * i; }
__device__ inline int mma_token(int j) { return (lane() & 3) * 2 + j; }

__device__ inline uint32_t mma_word(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }

struct MmaNibbles {  // weights as they lie
  uint32_t top, bottom;
};
__device__ inline MmaNibbles mma_load_nibbles(const uint8_t* p, uint32_t chunk) {
  p += chunk + lane() * 4;  // row lane / 4, word lane % 4
  return {mma_word(p), mma_word(p + 128)};
}
__device__ inline MmaWeights mma_unpack(const MmaNibbles& n) {
  return {n.top & 0x0f0f0f0fu, n.bottom & 0x0f0f0f0fu, (n.top >> 4) & 0x0f0f0f0fu, (n.bottom >> 4) & 0x0f0f0f0fu};
}

__device__ inline MmaWeights mma_load_bytes(const uint8_t* p, uint32_t chunk, uint32_t second) {
  p += chunk + lane() * 4;
  return {mma_word(p), mma_word(p + 128), mma_word(p + second), mma_word(p + second + 128)};
}

__device__ inline int mma_act_token() { return lane() >> 2; }
__device__ inline MmaActs mma_load_acts(const uint8_t* p, int second) {
  const uint8_t* q = p + (lane() & 3) * 4;
  return {mma_word(q), mma_word(q + second)};
}

__device__ inline void mma(int (&c)[kMmaAcc], const MmaWeights& w, const MmaActs& x) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(w.a0), "r"(w.a1), "r"(w.a2), "r"(w.a3), "r"(x.b0), "r"(x.b1));
}

#endif

__device__ inline MmaWeights mma_unpack(const MmaWeights& w) { return w; }  // bytes are operands as they lie

// What belongs to the lane's tokens. A lane of AMD asks for one token's, mma_own_token(), and has its eight from the
// lanes that asked for them; NVIDIA's two are asked for in place.
#if defined(DFLASH_GPU_HIP)
inline constexpr int kMmaAsked = 1;
__device__ inline int mma_own_token(int) { return mma_token(lane() & 7); }
#else
inline constexpr int kMmaAsked = kMmaToks;
__device__ inline int mma_own_token(int i) { return mma_token(i); }
#endif

template <int J, typename T>
__device__ inline T mma_of_token(const T (&asked)[kMmaAsked]) {
#if defined(DFLASH_GPU_HIP)
  return share_in_16<J>(asked[0]);
#else
  return asked[J];
#endif
}

}  // namespace dflash::gpu
