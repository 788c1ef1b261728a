#pragma once
// How quantised weights and activations lie in device memory, and the one arithmetic all matrix kernels share.
//
// A weight matrix is cut into tiles of 32 output rows; within a tile the groups of 32 inputs follow each other, and
// within a group the rows: a wave whose lanes are the rows reads 512 contiguous bytes a step, and sixteen rows of a
// group are the contiguous operand of a matrix instruction. Scales are a second plane in the same order.
//   quants [expert, tile, group, chunk, row 32, 16 bytes]   chunk: 1 for 4-bit types, 2 for Q8_0
//   scales [expert, tile, group, row 32, 1 or 2 halves]     Q4_1: d and m
// The bytes are as many as GGUF's (rows padded to a multiple of 32).
//
// The order of summation is part of the layout. K is cut into at most kSegments runs of groups; inside a run
//   acc = fma(float(integer dot), d_weight * d_activation, acc)
// group after group, and the runs are then added in order. Every kernel for 1..16 rows does exactly this; more rows are
// multiplied in 16-bit floats (many_rows.h).

#include "backend/hip/gpu_few.h"
#include "quant/dtype.h"

namespace dflash::hip {

inline constexpr int kTile = 32;
inline constexpr int kSegments = 8;
inline constexpr int kThreads = kSegments * gpu::kWave;  // a block of the few-row kernels: one wave per segment
inline constexpr int kTiledLayout = 1;

// A group of activations: x[i] = q[i] * d; sum = sum of q.
struct alignas(8) GroupScale {
  float d;
  int sum;
};

// Rows of quantised activations: q [rows, n], scale [rows, n / 32].
struct QuantRows {
  const int8_t* q = nullptr;
  const GroupScale* scale = nullptr;
  int64_t n = 0;
};

struct TiledWeight {
  const uint8_t* quants = nullptr;
  const uint16_t* scales = nullptr;
  int groups = 0;  // n_in / 32
  int tiles = 0;   // of one expert
  int64_t n_out = 0;
};

__host__ __device__ inline int segment_groups(int groups) { return (groups + kSegments - 1) / kSegments; }
__host__ __device__ inline int segment_count(int groups) {  // counted: a division takes longer
  int count = 0;
  for (int s = 0; s < kSegments; ++s) count += s * segment_groups(groups) < groups;
  return count;
}

// Divides by a number that the host knows: by multiplying, where an integer division takes 25 instructions. Right for
// n * divisor < 2^32.
struct Divisor {
  uint32_t factor;  // 0: divides by one
  explicit Divisor(int d)
      : factor(d == 1 ? 0 : static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<uint64_t>(d) + 1)) {}
  __device__ inline int of(int n) const {
    return factor == 0 ? n : static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * factor >> 32);
  }
};

// The sum over segments starts here: -0 + x is x for every x, signed zeros included.
inline constexpr float kEmptySum = -0.0f;

// What lies so many bytes behind p, which all lanes share: a lane's part of an address is 32 bits.
template <typename T>
__device__ inline const T* behind(const T* p, uint32_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(p) + bytes);
}

__device__ inline int dot_bytes(const int4& w, const int4& x, int c) {
  return gpu::dot4(w.w, x.w, gpu::dot4(w.z, x.z, gpu::dot4(w.y, x.y, gpu::dot4(w.x, x.x, c))));
}

__device__ inline int dot_words(const uint4& w, const int4& x, int c) {
  c = gpu::dot4(static_cast<int>(w.x), x.x, c);
  c = gpu::dot4(static_cast<int>(w.y), x.y, c);
  c = gpu::dot4(static_cast<int>(w.z), x.z, c);
  return gpu::dot4(static_cast<int>(w.w), x.w, c);
}

// Bytes of v under the mask, as unsigned numbers.
__device__ inline int dot_masked(const uint4& v, uint32_t mask, const int4& x, int c) {
  c = gpu::dot4<false>(static_cast<int>(v.x & mask), x.x, c);
  c = gpu::dot4<false>(static_cast<int>(v.y & mask), x.y, c);
  c = gpu::dot4<false>(static_cast<int>(v.z & mask), x.z, c);
  return gpu::dot4<false>(static_cast<int>(v.w & mask), x.w, c);
}

// A group's 4-bit values, low nibbles first, times its activations, plus c. High nibbles stay where they are: their sum
// is sixteen times too large, exactly.
__device__ inline int dot_nibbles(const uint4& v, const int4& x0, const int4& x1, int c) {
  return (dot_masked(v, 0xf0f0f0f0u, x1, 0) >> 4) + dot_masked(v, 0x0f0f0f0fu, x0, c);
}

// The formats. Raw: one row's group as loaded, from a base all lanes share; Block: the same, unpacked. accumulate():
// acc plus its dot with a group of activations, which is add(term(), acc). mma_load(): 16 rows of a group as they lie.
// start(sum): the value a matrix instruction's sums start from so that they end as that dot.

// What a group adds: the integer dot product and its scale.
struct DotTerm {
  float dot, d;
};
__device__ inline float add(const DotTerm& t, float acc) { return fmaf(t.dot, t.d, acc); }

struct DotMinTerm {  // Q4_1: and the sum of the activations with its scale
  float dot, d, sum, m;
};
__device__ inline float add(const DotMinTerm& t, float acc) { return fmaf(t.sum, t.m, fmaf(t.dot, t.d, acc)); }

struct FormatQ4_0 {
  static constexpr DType kType = DType::Q4_0;
  static constexpr int kQuantBytes = kTile * 16, kHalves = 1;
  struct Raw {
    uint4 q;
    uint16_t d;
  };
  struct Block {
    uint4 q;
    float d;
  };
  static __device__ inline Raw load(const uint8_t* q, const uint16_t* s, uint32_t group, uint32_t row) {
    return {gpu::load_once(q + (group * kQuantBytes + row * 16)), gpu::load(behind(s, (group * kTile + row) * 2))};
  }
  static __device__ inline Block unpack(const Raw& r) { return {r.q, gpu::half_to_float(r.d)}; }
  using Term = DotTerm;
  static __device__ inline Term term(const Block& b, const int4& x0, const int4& x1, GroupScale x) {
    return {gpu::mma_value(dot_nibbles(b.q, x0, x1, gpu::kMmaZero - 8 * x.sum)), b.d * x.d};
  }
  static __device__ inline float accumulate(const Block& b, const int4& x0, const int4& x1, GroupScale x, float acc) {
    return add(term(b, x0, x1, x), acc);
  }
  static __device__ inline gpu::MmaNibbles mma_load(const uint8_t* q, uint32_t group, int half) {
    return gpu::mma_load_nibbles(q, group * kQuantBytes + half * 256);
  }
  static __device__ inline int start(int sum) { return -8 * sum; }
};

struct FormatQ4_1 {
  static constexpr DType kType = DType::Q4_1;
  static constexpr int kQuantBytes = kTile * 16, kHalves = 2;
  struct Block {
    uint4 q;
    float d, m;
  };
  struct Raw {
    uint4 q;
    uint32_t dm;
  };
  static __device__ inline Raw load(const uint8_t* q, const uint16_t* s, uint32_t group, uint32_t row) {
    return {gpu::load_once(q + (group * kQuantBytes + row * 16)),
            gpu::load(behind(reinterpret_cast<const uint32_t*>(s), (group * kTile + row) * 4))};
  }
  static __device__ inline Block unpack(const Raw& r) {
    return {r.q, gpu::half_to_float(static_cast<uint16_t>(r.dm & 0xffffu)),
            gpu::half_to_float(static_cast<uint16_t>(r.dm >> 16))};
  }
  using Term = DotMinTerm;
  static __device__ inline Term term(const Block& b, const int4& x0, const int4& x1, GroupScale x) {
    return {gpu::mma_value(dot_nibbles(b.q, x0, x1, gpu::kMmaZero)), b.d * x.d, static_cast<float>(x.sum), b.m * x.d};
  }
  static __device__ inline float accumulate(const Block& b, const int4& x0, const int4& x1, GroupScale x, float acc) {
    return add(term(b, x0, x1, x), acc);
  }
  static __device__ inline gpu::MmaNibbles mma_load(const uint8_t* q, uint32_t group, int half) {
    return gpu::mma_load_nibbles(q, group * kQuantBytes + half * 256);
  }
  static __device__ inline int start(int) { return 0; }
};

struct FormatQ8_0 {
  static constexpr DType kType = DType::Q8_0;
  static constexpr int kQuantBytes = kTile * 32, kHalves = 1;
  struct Block {
    uint4 lo, hi;
    float d;
  };
  struct Raw {
    uint4 lo, hi;
    uint16_t d;
  };
  static __device__ inline Raw load(const uint8_t* q, const uint16_t* s, uint32_t group, uint32_t row) {
    const uint8_t* at = q + (group * kQuantBytes + row * 16);
    return {gpu::load_once(at), gpu::load_once(at + kTile * 16), gpu::load(behind(s, (group * kTile + row) * 2))};
  }
  static __device__ inline Block unpack(const Raw& r) { return {r.lo, r.hi, gpu::half_to_float(r.d)}; }
  using Term = DotTerm;
  static __device__ inline Term term(const Block& b, const int4& x0, const int4& x1, GroupScale x) {
    return {gpu::mma_value(dot_words(b.hi, x1, 0) + dot_words(b.lo, x0, gpu::kMmaZero)), b.d * x.d};
  }
  static __device__ inline float accumulate(const Block& b, const int4& x0, const int4& x1, GroupScale x, float acc) {
    return add(term(b, x0, x1, x), acc);
  }
  static __device__ inline gpu::MmaWeights mma_load(const uint8_t* q, uint32_t group, int half) {
    return gpu::mma_load_bytes(q, group * kQuantBytes + half * 256, kTile * 16);
  }
  static __device__ inline int start(int) { return 0; }
};

// Calls f(FormatX{}) for a quantised type; false for the others.
template <typename F>
bool with_format(DType type, F&& f) {
  switch (type) {
    case DType::Q4_0:
      f(FormatQ4_0{});
      return true;
    case DType::Q4_1:
      f(FormatQ4_1{});
      return true;
    case DType::Q8_0:
      f(FormatQ8_0{});
      return true;
    default:
      return false;
  }
}

// One tile of one expert.
template <typename F>
struct TileView {
  const uint8_t* quants;
  const uint16_t* scales;

  __device__ TileView(const TiledWeight& w, int expert, int tile) {
    const int64_t first = (static_cast<int64_t>(expert) * w.tiles + tile) * w.groups;
    quants = w.quants + first * F::kQuantBytes;
    scales = w.scales + first * (kTile * F::kHalves);
  }
  __device__ const uint8_t* group_quants(int g) const { return quants + static_cast<int64_t>(g) * F::kQuantBytes; }
  __device__ const uint16_t* group_scales(int g) const {
    return scales + static_cast<int64_t>(g) * (kTile * F::kHalves);
  }
};

}  // namespace dflash::hip
