#pragma once
// Eight lanes turn the 32 values they hold, four each, into one int8 group. Scales are f32: SwiGLU products of the last
// layers of MiniMax-M2.7 do not fit f16.

#include "backend/hip/layout.h"

namespace dflash::hip {

__device__ inline int quantize_one(float v, float inverse) {
  return static_cast<int>(rintf(fminf(fmaxf(v * inverse, -127.0f), 127.0f)));
}

__device__ inline uint32_t pack_bytes(int a, int b, int c, int d) {
  return (static_cast<uint32_t>(a) & 255u) | (static_cast<uint32_t>(b) & 255u) << 8 |
         (static_cast<uint32_t>(c) & 255u) << 16 | static_cast<uint32_t>(d) << 24;
}

// v: elements 4 * (lane % 8) .. + 3 of the group at q. All lanes take part; write says which groups exist.
__device__ inline void quantize_quad(const float4& v, int8_t* q, GroupScale* scale, bool write = true) {
  float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  for (int m = 4; m > 0; m >>= 1) largest = fmaxf(largest, gpu::shuffle_xor(largest, m));
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  const int a = quantize_one(v.x, inverse), b = quantize_one(v.y, inverse), c = quantize_one(v.z, inverse),
            d = quantize_one(v.w, inverse);
  int sum = a + b + c + d;
  for (int m = 4; m > 0; m >>= 1) sum += gpu::shuffle_xor(sum, m);
  if (!write) return;
  const int l = gpu::lane() & 7;
  reinterpret_cast<uint32_t*>(q)[l] = pack_bytes(a, b, c, d);
  if (l == 0) *scale = {largest / 127.0f, sum};
}

// The same with one value a lane: a wave makes a group. Its scale, the lane's number in *q.
__device__ inline GroupScale quantize_lane(float v, int* q) {
  const float largest = gpu::wave_max(fabsf(v));
  *q = quantize_one(v, largest > 0.0f ? 127.0f / largest : 0.0f);
  return {largest / 127.0f, gpu::wave_sum(*q)};
}

__device__ inline void quantize_group(float v, int8_t* q, GroupScale* scale) {
  int i;
  const GroupScale s = quantize_lane(v, &i);
  q[gpu::lane()] = static_cast<int8_t>(i);
  if (gpu::lane() == 0) *scale = s;
}

__device__ inline float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

}  // namespace dflash::hip
