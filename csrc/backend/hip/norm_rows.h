#pragma once
// RMSNorm and quantisation of one row at the start of a kernel, by every block for itself: cheaper than a kernel of its
// own (for four rows it is not: 17 us against 3 on an H200). The sums are those of norm_quantize_kernel, in its order:
// there each float4 of a row of at most kFusedNorm elements has a thread of its own, here a wave plays that kernel's
// waves ("parts") one after the other.

#include "backend/hip/quantize.h"

namespace dflash::hip {

inline constexpr int kFusedNorm = 4096;  // elements at most

// x [n], or rms_norm(x, norm) where norm is not null.
struct NormInput {
  const float* x = nullptr;
  const float* norm = nullptr;
  float eps = 0.0f;
};

__host__ __device__ inline bool norm_fits(int rows, int64_t n) { return rows == 1 && n <= kFusedNorm && n % 32 == 0; }

// int8, then the scales
__host__ __device__ inline size_t norm_bytes(int n) {
  return static_cast<size_t>(n) + static_cast<size_t>(n / 32) * sizeof(GroupScale);
}

__device__ inline float4 times(const float4& v, float s, const float4& w) {
  return make_float4((v.x * s) * w.x, (v.y * s) * w.y, (v.z * s) * w.z, (v.w * s) * w.w);
}

__device__ inline float sum_of_squares(const float4& v) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
}

// A block of eight waves. Construct before the wait for the kernel before, run() after it.
class NormRow {
 public:
  static constexpr int kWaves = 8, kParts = kFusedNorm / (4 * gpu::kWave * kWaves);  // float4 a thread has

  __device__ inline NormRow(const NormInput& in, int n) : in_(in), n_(n) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) weight_[i] = load(in.norm, i, in.norm != nullptr);
  }

  // Into shared memory at out (norm_bytes); sums: 32 floats of shared memory.
  __device__ inline void run(uint8_t* out, float* sums) const {
    float4 v[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) v[i] = load(in_.x, i, true);
    if (in_.norm != nullptr) {
      float part[kParts];
#pragma unroll
      for (int i = 0; i < kParts; ++i) part[i] = sum_of_squares(v[i]);
#pragma unroll
      for (int m = gpu::kWave / 2; m > 0; m >>= 1) {  // as wave_sum, side by side
#pragma unroll
        for (int i = 0; i < kParts; ++i) part[i] += gpu::shuffle_xor(part[i], m);
      }
      if (gpu::lane() == 0) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) sums[i * kWaves + gpu::wave()] = part[i];
      }
      __syncthreads();
      const float inverse = 1.0f / sqrtf(gpu::wave_sum(sums[gpu::lane()]) / static_cast<float>(n_) + in_.eps);
#pragma unroll
      for (int i = 0; i < kParts; ++i) v[i] = times(v[i], inverse, weight_[i]);
    }
    GroupScale* scales = reinterpret_cast<GroupScale*>(out + n_);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (at(i) - 4 * gpu::lane() >= n_) break;  // the whole wave is past the end
      quantize_quad(v[i], reinterpret_cast<int8_t*>(out) + (at(i) & ~31), scales + at(i) / 32, at(i) < n_);
    }
    __syncthreads();
  }

 private:
  static __device__ inline int at(int i) { return ((i * kWaves + gpu::wave()) * gpu::kWave + gpu::lane()) * 4; }
  __device__ inline float4 load(const float* p, int i, bool there) const {
    return there && at(i) < n_ ? *reinterpret_cast<const float4*>(p + at(i)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  NormInput in_;
  int n_;
  float4 weight_[kParts];
};

}  // namespace dflash::hip
