#pragma once
// A wave turns the 32 values its lanes hold into one int8 group. Scales are f32: SwiGLU products of the last layers of
// MiniMax-M2.7 do not fit f16.

#include "backend/hip/layout.h"

namespace dflash::hip {

__device__ inline void quantize_group(float v, int8_t* q, GroupScale* scale) {
  const float largest = gpu::wave_max(fabsf(v));
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  const int i = static_cast<int>(rintf(fminf(fmaxf(v * inverse, -127.0f), 127.0f)));
  q[gpu::lane()] = static_cast<int8_t>(i);
  const int sum = gpu::wave_sum(i);
  if (gpu::lane() == 0) *scale = {largest / 127.0f, sum};
}

__device__ inline float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

}  // namespace dflash::hip
