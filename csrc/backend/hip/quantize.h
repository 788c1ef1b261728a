#pragma once
// Eight lanes turn the 32 values they hold, four each, into one int8 group. Scales are f32: SwiGLU products of the last
// layers of MiniMax-M2.7 do not fit f16.

#include "backend/hip/layout.h"

namespace dflash::hip {

// 127 over a group's largest value; 0 where that would overflow.
__device__ inline float steps_per_unit(float largest) {
  return largest > 1e-30f ? 127.0f * gpu::reciprocal(largest) : 0.0f;
}

// v * inverse, at most 127, rounded to the nearest even integer: the sum is so large that its last bit is a one.
__device__ inline int quantize_one(float v, float inverse) {
  return static_cast<int>(__float_as_uint(v * inverse + 12582912.0f) - 0x4b400000u);
}

__device__ inline uint32_t pack_bytes(int a, int b, int c, int d) {
  return (static_cast<uint32_t>(a) & 255u) | (static_cast<uint32_t>(b) & 255u) << 8 |
         (static_cast<uint32_t>(c) & 255u) << 16 | static_cast<uint32_t>(d) << 24;
}

// The largest of eight lanes' values, none of them negative: their order is that of their bits.
__device__ inline float largest_of_8(float v) {
  return __uint_as_float(gpu::reduce<4>(__float_as_uint(v), [](uint32_t a, uint32_t b) { return max(a, b); }));
}

// Four of a group's values, and its scale.
struct QuantQuad {
  uint32_t bytes;
  float d;
};

// v: elements 4 * (lane % 8) .. + 3 of a group. All lanes take part.
__device__ inline QuantQuad quantize_quad(const float4& v) {
  const float largest = largest_of_8(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
  const float inverse = steps_per_unit(largest);
  return {pack_bytes(quantize_one(v.x, inverse), quantize_one(v.y, inverse), quantize_one(v.z, inverse),
                     quantize_one(v.w, inverse)),
          largest * (1.0f / 127.0f)};
}

__device__ inline int sum_of_bytes(uint32_t bytes, int sum = 0) {
  return gpu::dot4(static_cast<int>(bytes), 0x01010101, sum);
}

// The group at q; write says which groups exist. Returns the group's scale to each of its lanes.
__device__ inline GroupScale quantize_quad(const float4& v, int8_t* q, bool write = true) {
  const QuantQuad quad = quantize_quad(v);
  const int sum = gpu::reduce<4>(sum_of_bytes(quad.bytes), [](int a, int b) { return a + b; });
  if (write) reinterpret_cast<uint32_t*>(q)[gpu::lane() & 7] = quad.bytes;
  return {quad.d, sum};
}

// The same with one value a lane: a wave makes a group. Its scale, the lane's number in *q.
__device__ inline GroupScale quantize_lane(float v, int* q) {
  const float largest = __uint_as_float(gpu::wave_most(__float_as_uint(fabsf(v))));
  *q = quantize_one(v, steps_per_unit(largest));
  return {largest * (1.0f / 127.0f), gpu::wave_sum(*q)};
}

__device__ inline void quantize_group(float v, int8_t* q, GroupScale* scale) {
  int i;
  const GroupScale s = quantize_lane(v, &i);
  q[gpu::lane()] = static_cast<int8_t>(i);
  if (gpu::lane() == 0) *scale = s;
}

// Of n values whose squares have this sum.
__device__ inline float inverse_rms(float squares, int n, float eps) {
  return gpu::inverse_sqrt(fmaf(squares, gpu::reciprocal(static_cast<float>(n)), eps));
}

__device__ inline float swiglu(float gate, float up) { return gate * gpu::reciprocal(1.0f + expf(-gate)) * up; }

}  // namespace dflash::hip
