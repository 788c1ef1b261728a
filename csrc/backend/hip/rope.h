#pragma once
// Rotation and KV store of four elements a lane, and the shape of the norm before them.

#include "backend/backend.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

inline constexpr int kNormThreads = 1024;  // at most, of a block that normalises a row
inline constexpr int kHeld = 4;            // float4 a thread of it holds

inline constexpr int kTakeInMost = 8192;  // elements of q that attention normalises itself

// Elements dim .. dim + 3; every lane of a group of 32 takes part, `inside` says whose head exists. Returns what the
// cache now holds.
__device__ inline float4 store_kv_quad(const KvLayer& kv, void* base, int head, int64_t pos, int dim, const float4& v,
                                       bool inside) {
  const int64_t at = (static_cast<int64_t>(head) * kv.n_ctx + pos) * kv.head_dim + dim;
  if (kv.type == DType::F32) {
    if (inside) *reinterpret_cast<float4*>(static_cast<float*>(base) + at) = v;
    return v;
  }
  if (kv.type == DType::F16) {
    const uint16_t h[4] = {gpu::float_to_half(v.x), gpu::float_to_half(v.y), gpu::float_to_half(v.z),
                           gpu::float_to_half(v.w)};
    const uint32_t a = h[0] | static_cast<uint32_t>(h[1]) << 16, b = h[2] | static_cast<uint32_t>(h[3]) << 16;
    if (inside) *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + at) = make_uint2(a, b);
    return make_float4(gpu::half_to_float(h[0]), gpu::half_to_float(h[1]), gpu::half_to_float(h[2]),
                       gpu::half_to_float(h[3]));
  }
  const float largest = largest_of_8(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
  const uint16_t half = gpu::float_to_half(largest / 127.0f);
  const float d = gpu::half_to_float(half), inverse = d > 0.0f ? 1.0f / d : 0.0f;
  // The scale is rounded to f16, so values may lie beyond 127 of it.
  auto quantised = [&](float e) { return quantize_one(fminf(fmaxf(e * inverse, -127.0f), 127.0f), 1.0f); };
  const int x = quantised(v.x), y = quantised(v.y), z = quantised(v.z), w = quantised(v.w);
  if (inside) {
    const int64_t head_bytes = static_cast<int64_t>(kv.n_ctx) * (kv.head_dim / 32) * 34;
    int8_t* q = static_cast<int8_t*>(base) + head * head_bytes;
    uint16_t* scale = reinterpret_cast<uint16_t*>(q + static_cast<int64_t>(kv.n_ctx) * kv.head_dim);
    *reinterpret_cast<uint32_t*>(q + pos * kv.head_dim + dim) = pack_bytes(x, y, z, w);
    if (dim % 32 == 0) scale[(pos * kv.head_dim + dim) / 32] = half;
  }
  return make_float4(static_cast<float>(x) * d, static_cast<float>(y) * d, static_cast<float>(z) * d,
                     static_cast<float>(w) * d);
}

// cos and sin of an angle, scaled.
__device__ inline float2 rotation(float angle, float scale) {
  float sine, cosine;
  sincosf(angle, &sine, &cosine);
  return make_float2(cosine * scale, sine * scale);
}

// Four elements at once: i a multiple of 4, n_rot a power of two, v the elements i .. i + 3, other the ones half a
// rotation away; of(j): the rotation of pair j.
template <typename Of>
__device__ inline float4 rotate_quad(const QkvPost& p, int i, const float4& v, const float4& other, Of of) {
  const int half = p.n_rot / 2;
  float r[4] = {v.x, v.y, v.z, v.w};
  const float o[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 turn = of((i + j) & (half - 1));
    r[j] = i < half ? fmaf(r[j], turn.x, -(o[j] * turn.y)) : fmaf(r[j], turn.x, o[j] * turn.y);
  }
  return make_float4(r[0], r[1], r[2], r[3]);
}

__device__ inline float4 shuffle_quad(const float4& v, int mask) {
  return make_float4(gpu::shuffle_xor<float>(v.x, mask), gpu::shuffle_xor<float>(v.y, mask),
                     gpu::shuffle_xor<float>(v.z, mask), gpu::shuffle_xor<float>(v.w, mask));
}

}  // namespace dflash::hip
