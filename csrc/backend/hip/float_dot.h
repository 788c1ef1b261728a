#pragma once
// Float weights times float activations: a wave per output, the same order of summation for any number of rows.

#include "backend/hip/gpu.h"
#include "quant/dtype.h"

namespace dflash::hip {

template <DType T>
struct FloatFormat;
template <>
struct FloatFormat<DType::F32> {
  using Element = float;
  static constexpr int kVector = 4;
  static __device__ float get(float v) { return v; }
};
template <>
struct FloatFormat<DType::F16> {
  using Element = uint16_t;
  static constexpr int kVector = 8;
  static __device__ float get(uint16_t v) { return gpu::half_to_float(v); }
};
template <>
struct FloatFormat<DType::BF16> {
  using Element = uint16_t;
  static constexpr int kVector = 8;
  static __device__ float get(uint16_t v) { return gpu::bf16_to_float(v); }
};

// acc[r] = w . x[r]: a lane takes every 32nd vector of V elements, a fixed tree adds the lanes.
template <DType T, int V, int R>
__device__ inline void float_dot(const typename FloatFormat<T>::Element* w, const float* x, int64_t stride, int64_t n,
                                 float (&acc)[R]) {
  using Element = typename FloatFormat<T>::Element;
  struct alignas(V * sizeof(Element)) Vector {
    Element e[V];
  };
  struct alignas(V >= 4 ? 16 : 4) Quad {
    float e[V >= 4 ? 4 : 1];
  };
  constexpr int kQuad = V >= 4 ? 4 : 1;
#pragma unroll
  for (int r = 0; r < R; ++r) acc[r] = 0.0f;
  constexpr int kUnroll = R == 1 ? 8 : R == 2 ? 4 : 2;
#pragma unroll kUnroll
  for (int64_t i = gpu::lane() * V; i < n; i += gpu::kWave * V) {
    const Vector v = *reinterpret_cast<const Vector*>(w + i);
#pragma unroll
    for (int j = 0; j < V; j += kQuad) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Quad a = *reinterpret_cast<const Quad*>(x + r * stride + i + j);
#pragma unroll
        for (int l = 0; l < kQuad; ++l) acc[r] = fmaf(FloatFormat<T>::get(v.e[j + l]), a.e[l], acc[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) acc[r] = gpu::wave_sum(acc[r]);
}

}  // namespace dflash::hip
