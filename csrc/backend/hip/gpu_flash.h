#pragma once
// gpu.h's part for the attention of many rows: what differs between vendors is here.

#include "backend/hip/gpu_half.h"

namespace dflash::gpu {

// ---- attention of many rows -----------------------------------------------------------------------------------------
// A step multiplies 16 queries by 16 others (keys, or dimensions of values) over a depth of 32 f16. A lane holds 8 of
// the 256 results: element i belongs to query flash_query(i) and other flash_other(i); its queries are numbered
// flash_row(i) < kFlashRows, and the lanes of one query are reached by exchanging with lanes l ^ m for m in
// flash_masks.

#if defined(DFLASH_GPU_HIP)
inline constexpr int kFlashRows = 1;
inline constexpr int kFlashWords = kHalfWords * 2;
#else
inline constexpr int kFlashRows = 2;
inline constexpr int kFlashWords = 4;
#endif

struct FlashWords {  // an instruction's operand: 16 queries or 16 others, depth 16
  uint32_t w[kFlashWords];
};
struct FlashOperand {  // depth 32
  FlashWords k[2];
};

__device__ inline int flash_row([[maybe_unused]] int i) {
#if defined(DFLASH_GPU_HIP)
  return 0;
#else
  return i >> 1 & 1;
#endif
}
// The query of the lane's row r.
__device__ inline int flash_query([[maybe_unused]] int r) {
#if defined(DFLASH_GPU_HIP)
  return lane() & 15;
#else
  return (lane() >> 2) + 8 * r;
#endif
}
__device__ inline int flash_other(int i) {
#if defined(__gfx1200__) || defined(__gfx1201__)
  return i + 8 * (lane() >> 4);
#elif defined(DFLASH_GPU_HIP)
  return 2 * i + (lane() >> 4);
#else
  return (i >> 2) * 8 + (lane() & 3) * 2 + (i & 1);
#endif
}
template <typename F>
__device__ inline float flash_reduce(float v, F f) {
#if defined(DFLASH_GPU_HIP)
  return f(v, shuffle_xor<16>(v));
#else
  v = f(v, shuffle_xor<1>(v));
  return f(v, shuffle_xor<2>(v));
#endif
}

// The key whose weight stands at place s of 32 in the depth of the second product.
__device__ inline int flash_key(int s) {
#if defined(__gfx1200__) || defined(__gfx1201__)
  return s;
#elif defined(DFLASH_GPU_HIP)
  return (s >> 4) * 16 + (s & 7) * 2 + (s >> 3 & 1);
#else
  return (s >> 1 & 3) * 8 + (s >> 3) * 2 + (s & 1);
#endif
}

// Where piece `piece` (16 bytes) of row `row` lies among its row's: rows read together meet in no bank.
__device__ inline int flash_piece(int piece, int row, int pieces) {
#if defined(DFLASH_GPU_HIP)
  return piece ^ (row & (pieces - 1) & 7);
#else
  return piece ^ ((row & 1) << 2 & (pieces - 1));
#endif
}

__device__ inline bool any(bool v) {
#if defined(DFLASH_GPU_HIP)
  return __any(v);
#else
  return __any_sync(0xffffffffu, v);
#endif
}

// octet(row, o): depth 8 o .. 8 o + 7 of query (or other) `row`, packed.
template <typename Octet>
__device__ inline FlashOperand flash_queries(Octet octet) {
  FlashOperand f;
#if defined(DFLASH_GPU_HIP)
  for (int o = 0; o < kHalfWords; ++o) {
    const uint4 v = octet(lane() & 15, kHalfWords == 2 ? o * 2 + (lane() >> 4) : o);
    FlashWords& k = f.k[kHalfWords == 2 ? o : o / 2];
    const int at = kHalfWords == 2 ? 0 : o % 2 * 4;
    k.w[at] = v.x;
    k.w[at + 1] = v.y;
    k.w[at + 2] = v.z;
    k.w[at + 3] = v.w;
  }
#else
  for (int i = 0; i < 2; ++i) {
    const uint4 v = octet((lane() >> 2) + 8 * i, lane() & 3);
    f.k[0].w[i] = v.x;
    f.k[0].w[i + 2] = v.y;
    f.k[1].w[i] = v.z;
    f.k[1].w[i + 2] = v.w;
  }
#endif
  return f;
}

template <typename Octet>
__device__ inline FlashOperand flash_others(Octet octet) {
#if defined(DFLASH_GPU_HIP)
  return flash_queries(octet);
#else
  FlashOperand f;
  for (int n = 0; n < 2; ++n) {
    const uint4 v = octet((lane() >> 2) + 8 * n, lane() & 3);
    f.k[0].w[n * 2] = v.x;
    f.k[0].w[n * 2 + 1] = v.y;
    f.k[1].w[n * 2] = v.z;
    f.k[1].w[n * 2 + 1] = v.w;
  }
  return f;
#endif
}

// The weights of 16 keys as queries of the second product.
__device__ inline FlashWords flash_weights(const float (&a)[8]) {
  FlashWords f;
  for (int i = 0; i < 4; ++i) {
    const uint32_t own = F16::pack_small(a[2 * i], a[2 * i + 1]);
#if defined(DFLASH_GPU_HIP)
    if (kHalfWords == 2) {
      f.w[i] = own;
    } else {  // even keys lie in the lower lanes, odd ones in the upper
      const uint32_t other = shuffle_xor<16>(own);
      f.w[i] = lane() < 16 ? own : other;
      f.w[kFlashWords / 2 + i] = lane() < 16 ? other : own;
    }
#else
    f.w[i] = own;
#endif
  }
  return f;
}

__device__ inline void flash_mma(float (&c)[8], const FlashWords& q, const FlashWords& o) {
#if defined(DFLASH_GPU_HIP)
  F16::mma(c, __builtin_bit_cast(HalfWeightWords, q), __builtin_bit_cast(HalfActWords, o));
#else
  for (int n = 0; n < 2; ++n) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[n * 4]), "+f"(c[n * 4 + 1]), "+f"(c[n * 4 + 2]), "+f"(c[n * 4 + 3])
        : "r"(q.w[0]), "r"(q.w[1]), "r"(q.w[2]), "r"(q.w[3]), "r"(o.w[n * 2]), "r"(o.w[n * 2 + 1]));
  }
#endif
}

// Row r of the lane's results times `scale` to out, and as f16 in the order half_slot() to half; all lanes of a row
// write or none does.
template <int Sixteens>
__device__ inline void flash_write(const float (&o)[Sixteens][8], int r, float scale, bool write, float* out,
                                   uint16_t* half) {
#if defined(DFLASH_GPU_HIP)
  if (!write) return;
  for (int d = 0; d < Sixteens; ++d) {
    for (int i = 0; i < 8; ++i) {
      const int dim = d * 16 + flash_other(i);
      const float v = o[d][i] * scale;
      if (out != nullptr) out[dim] = v;
      half[(dim & ~31) + half_slot(dim & 31)] = static_cast<uint16_t>(F16::pack(v, v));
    }
  }
  (void)r;
#else
  // Of a group of 32 a lane has two neighbours of each octet. The group's f16 are four pieces of 16 bytes, one for each
  // of the row's four lanes; a lane has two values of each, which the lanes exchange.
  const bool odd = (lane() & 1) != 0, upper = (lane() & 2) != 0;
#pragma unroll
  for (int g = 0; g < Sixteens / 2; ++g) {
    uint32_t piece[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = o[2 * g + h][(i >> 1) * 4 + r * 2 + (i & 1)] * scale;
      piece[2 * h] = F16::pack(v[0], v[2]);
      piece[2 * h + 1] = F16::pack(v[1], v[3]);
      if (write && out != nullptr) {
        float2* to = reinterpret_cast<float2*>(out + g * 32 + h * 16) + (lane() & 3);
        to[0] = make_float2(v[0], v[1]);
        to[4] = make_float2(v[2], v[3]);
      }
    }
    uint32_t low[2], high[2];  // of pieces odd and 2 + odd, from an even lane and the odd one beside it
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t own = odd ? piece[2 * h + 1] : piece[2 * h];
      const uint32_t other = shuffle_xor<1>(odd ? piece[2 * h] : piece[2 * h + 1]);
      low[h] = __byte_perm(odd ? other : own, odd ? own : other, 0x5410);
      high[h] = __byte_perm(odd ? other : own, odd ? own : other, 0x7632);
    }
    const uint32_t other_low = shuffle_xor<2>(upper ? low[0] : low[1]);
    const uint32_t other_high = shuffle_xor<2>(upper ? high[0] : high[1]);
    const uint4 whole =
        upper ? make_uint4(other_low, low[1], other_high, high[1]) : make_uint4(low[0], other_low, high[0], other_high);
    if (write) *reinterpret_cast<uint4*>(half + g * 32 + (lane() & 3) * 8) = whole;
  }
#endif
}

// ---- the two products on wgmma (Hopper): a block's four waves together, their keys and values as [half of 64
// dimensions][key][8 turned pieces of 16 bytes] in shared memory aligned to 1024 bytes, queries and weights in
// registers
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kFlashWide = true;
#else
inline constexpr bool kFlashWide = false;
#endif

#if defined(DFLASH_GPU_CUDA)

inline constexpr int kFlashHalf = kFlashKeys * kHalfTurn;
__device__ inline int flash_wide_at(int octet, int key) {
  return octet / 8 * kFlashHalf + key * kHalfTurn + half_turned(octet % 8, key) * 16;
}

#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A wave's 16 queries: pair(query, dim) packs dimensions dim and dim + 1.
template <typename Pair>
__device__ inline FlashWords flash_wide_queries(int dim, Pair pair) {
  FlashWords f;
  for (int i = 0; i < 4; ++i) f.w[i] = pair((lane() >> 2) + 8 * (i & 1), dim + (lane() & 3) * 2 + 8 * (i >> 1));
  return f;
}

// As products_hold().
__device__ inline void flash_hold(FlashWords& w) {
  asm volatile("" : "+r"(w.w[0]), "+r"(w.w[1]), "+r"(w.w[2]), "+r"(w.w[3]));
}

// s = the queries times a tile's keys.
template <int Dims>
__device__ inline void flash_wide_scores(float (&s)[kFlashKeys / 16][8], FlashOperand (&q)[Dims], const uint8_t* keys) {
  auto& sums = reinterpret_cast<float (&)[kFlashKeys / 8][4]>(s);
  products_begin();
#pragma unroll
  for (int k = 0; k < Dims * 2; ++k) {
    wgmma<true, kFlashKeys / 8>(sums, __builtin_bit_cast(HalfWeightWords, q[k / 2].k[k % 2]),
                                wgmma_turned(keys + k / 4 * kFlashHalf + k % 4 * 32, 16));
  }
  products_end();
  products_wait<0>();
  products_hold(sums);
#pragma unroll
  for (int k = 0; k < Dims * 2; ++k) flash_hold(q[k / 2].k[k % 2]);
}

// o += the weights times a tile's values.
template <int HeadDim>
__device__ inline void flash_wide_values(float (&o)[HeadDim / 16][8], FlashWords (&w)[kFlashKeys / 16],
                                         const uint8_t* values) {
  auto& sums = reinterpret_cast<float (&)[HeadDim / 8][4]>(o);
  products_begin();
#pragma unroll
  for (int k = 0; k < kFlashKeys / 16; ++k) {
    wgmma<true, HeadDim / 8, true>(sums, __builtin_bit_cast(HalfWeightWords, w[k]),
                                   wgmma_turned(values + k * 16 * kHalfTurn, kFlashHalf));
  }
  products_end();
  products_wait<0>();
  products_hold(sums);
#pragma unroll
  for (int k = 0; k < kFlashKeys / 16; ++k) flash_hold(w[k]);
}

#endif

// 2^v by the hardware's instruction; v <= 0 here, tiny results may become 0.
__device__ inline float fast_exp2(float v) {
#if defined(DFLASH_GPU_HIP)
  return __builtin_amdgcn_exp2f(v);
#else
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#endif
}

}  // namespace dflash::gpu
