#pragma once
// RMSNorm and quantisation of a few rows at the start of a kernel, by every block for itself: for up to four rows that
// is cheaper than a kernel of its own. x * weight is what becomes int8; the factor 1 / rms is part of the groups'
// scales, so that nothing waits for the sum of squares but these. norm_quantize_kernel does the same and adds up in the
// same order: each float4 of a row of at most kFusedNorm elements has a thread of its own there, here a wave plays that
// kernel's waves ("parts") one after the other.

#include "backend/hip/quantize.h"

namespace dflash::hip {

inline constexpr int kFusedNorm = 4096;  // elements at most
inline constexpr int kFusedRows = 4;

// x [rows, n], or rms_norm(x, norm) where norm is not null.
struct NormInput {
  const float* x = nullptr;
  const float* norm = nullptr;
  float eps = 0.0f;
};

__host__ __device__ inline bool norm_fits(int64_t n) { return n <= kFusedNorm && n % 32 == 0; }

// int8 rows, then their scales
__host__ __device__ inline int norm_bytes(int rows, int n) {
  return rows * (n + n / 32 * static_cast<int>(sizeof(GroupScale)));
}

__device__ inline float4 times(const float4& v, float s, const float4& w) {
  return make_float4((v.x * s) * w.x, (v.y * s) * w.y, (v.z * s) * w.z, (v.w * s) * w.w);
}
__device__ inline float4 times(const float4& v, const float4& w) {
  return make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w);
}

__device__ inline float sum_of_squares(const float4& v) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
}

// The sums of squares of q's and k's norms. The product that makes a tile of 32 elements leaves the tile's sum, so
// these come first; then four tiles are added, then every 32nd of the fours, then these 32. A lane has an element, or
// four.
template <int Lanes>
__device__ inline float sum_upwards(float s) {  // of lanes whose numbers differ below Lanes, the nearest first
  if constexpr (Lanes > 2) s = sum_upwards<Lanes / 2>(s);
  return s + gpu::shuffle_xor<Lanes / 2>(s);
}
__device__ inline float tile_squares(float v) { return sum_upwards<kTile>(v * v); }
__device__ inline float sum_of_four(const float4& v) { return (v.x + v.y) + (v.z + v.w); }
__device__ inline float four_tiles_squares(const float4& v) {
  return sum_upwards<gpu::kWave>(sum_of_four(make_float4(v.x * v.x, v.y * v.y, v.z * v.z, v.w * v.w)));
}
// For every lane of a wave; fours [count] in shared memory.
__device__ inline float sum_of_fours(const float* fours, int count) {
  float sum = 0.0f;
  for (int i = gpu::lane(); i < count; i += gpu::kWave) sum += fours[i];
  return gpu::wave_sum(sum);
}

// A block of Waves waves. Construct before the wait for the kernel before, run() after it.
template <int Rows, int Waves>
class NormRows {
 public:
  static constexpr int kParts = kFusedNorm / (4 * gpu::kWave * Waves);  // float4 of a row a thread has
  using Sums = float[Rows][gpu::kWave];

  __device__ inline NormRows(const NormInput& in, int n) : in_(in), n_(n) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) weight_[i] = load(in.norm, i, in.norm != nullptr);
  }

  // Into shared memory at out (norm_bytes).
  __device__ inline void run(uint8_t* out, Sums& sums) const {
    float4 v[Rows][kParts];
    constexpr int kSums = gpu::power_of_two_from(Rows * kParts), kLanes = gpu::kWave / kSums;
    float part[kSums] = {};
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) v[r][i] = load(in_.x + r * n_, i, true);
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) part[r * kParts + i] = sum_of_squares(v[r][i]);
    }
    const float sum = gpu::wave_sums(part);
    const int of = gpu::lane() / kLanes;
    if (gpu::lane() % kLanes == 0 && of < Rows * kParts) sums[of / kParts][of % kParts * Waves + gpu::wave()] = sum;
    GroupScale* const scales = reinterpret_cast<GroupScale*>(out + Rows * n_);
    const int groups = n_ / 32;
    // No branch: what is past the end goes along, and the parts wait for their shuffles together.
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const QuantQuad quad = quantize_quad(in_.norm != nullptr ? times(v[r][i], weight_[i]) : v[r][i]);
        if (at(i) < n_) *reinterpret_cast<uint32_t*>(out + r * n_ + at(i)) = quad.bytes;
        if (at(i) < n_ && gpu::lane() % 8 == 0) scales[r * groups + at(i) / 32].d = quad.d;
      }
    }
    __syncthreads();
    constexpr int kRowWaves = Waves / Rows;  // waves to a row
    const int row = gpu::wave() / kRowWaves;
    if (row < Rows) {
      const float squares = gpu::wave_sum(sums[row][gpu::lane()]);
      const float inverse = in_.norm != nullptr ? inverse_rms(squares, n_, in_.eps) : 1.0f;
#pragma unroll 1
      for (int g = gpu::wave() % kRowWaves * gpu::kWave + gpu::lane(); g < groups; g += kRowWaves * gpu::kWave) {
        const int4* q = reinterpret_cast<const int4*>(out + row * n_ + g * 32);
        const int4 ones = make_int4(0x01010101, 0x01010101, 0x01010101, 0x01010101);
        GroupScale& s = scales[row * groups + g];
        s = {s.d * inverse, dot_bytes(q[1], ones, dot_bytes(q[0], ones, 0))};
      }
    }
    __syncthreads();
  }

 private:
  static __device__ inline int at(int i) { return ((i * Waves + gpu::wave()) * gpu::kWave + gpu::lane()) * 4; }
  __device__ inline float4 load(const float* p, int i, bool there) const {
    return there && at(i) < n_ ? *reinterpret_cast<const float4*>(p + at(i)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  NormInput in_;
  int n_;
  float4 weight_[kParts];
};

}  // namespace dflash::hip
