// RMSNorm with quantisation to int8 groups, and what follows the q, k, v projections: norm, RoPE, the KV store.

#include "backend/hip/few_rows.h"
#include "backend/hip/gpu_half.h"
#include "backend/hip/kernels.h"
#include "backend/hip/norm_rows.h"
#include "backend/hip/rope.h"

namespace dflash::hip {

namespace {

constexpr int kNormWaves = kNormThreads / gpu::kWave;
constexpr int64_t kVectorMost = kNormThreads * kHeld * 4;

// The sum of v over the block's threads in a fixed order, for every thread.
__device__ inline float block_sum(float v, float* lds) {
  v = gpu::wave_sum(v);
  if (gpu::lane() == 0) lds[gpu::wave()] = v;
  __syncthreads();
  const int waves = static_cast<int>(blockDim.x) / gpu::kWave;
  return gpu::wave_sum(gpu::lane() < waves ? lds[gpu::lane()] : 0.0f);
}

// A thread's float4 number i of a row: all loads of a row are in flight at once.
struct HeldRow {
  float4 v[kHeld];

  __device__ inline HeldRow(const float* x, int n) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (at(i) < n) v[i] = *reinterpret_cast<const float4*>(x + at(i));
    }
  }
  static __device__ inline int at(int i) { return static_cast<int>(threadIdx.x + i * blockDim.x) * 4; }

  __device__ inline float inverse_rms(int n, float eps, float* lds) const {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      squares = fmaf(v[i].x, v[i].x, squares);
      squares = fmaf(v[i].y, v[i].y, squares);
      squares = fmaf(v[i].z, v[i].z, squares);
      squares = fmaf(v[i].w, v[i].w, squares);
    }
    return hip::inverse_rms(block_sum(squares, lds), n, eps);
  }
};

// n a multiple of 4 (32 when quantising), at most kVectorMost. A block per row.
__global__ void __launch_bounds__(kNormThreads)
    norm_quantize_kernel(const float* __restrict__ x, const float* __restrict__ norm, float eps, int n, float* y,
                         MutableQuantRows out) {
  __shared__ float lds[kNormWaves];
  const HeldRow weights(norm, norm != nullptr ? n : 0);
  gpu::wait_for_previous();
  const int64_t row = blockIdx.x;
  const HeldRow held(x + row * n, n);
  GroupScale scales[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = HeldRow::at(i);
    if (at - 4 * gpu::lane() >= n || out.q == nullptr) break;
    const float4 v = norm != nullptr ? times(held.v[i], weights.v[i]) : held.v[i];
    scales[i] = quantize_quad(v, out.q + row * n + (at & ~31), at < n);
  }
  const float inverse = norm != nullptr ? held.inverse_rms(n, eps, lds) : 1.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = HeldRow::at(i);
    if (at >= n) break;
    if (y != nullptr) {
      const float4 v = norm != nullptr ? times(held.v[i], inverse, weights.v[i]) : held.v[i];
      *reinterpret_cast<float4*>(y + row * n + at) = v;
    }
    if (out.q != nullptr && gpu::lane() % 8 == 0) {
      out.scale[(row * n + at) / 32] = {norm != nullptr ? scales[i].d * inverse : scales[i].d, scales[i].sum};
    }
  }
}

// Any n, one element at a time; quantising needs a multiple of 32.
__global__ void __launch_bounds__(kNormThreads)
    norm_quantize_any_kernel(const float* __restrict__ x, const float* __restrict__ norm, float eps, int64_t n,
                             float* y, MutableQuantRows out) {
  __shared__ float lds[kNormWaves];
  gpu::wait_for_previous();
  const int64_t row = blockIdx.x;
  const float* xr = x + row * n;
  float inverse = 1.0f;
  if (norm != nullptr) {
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += kNormThreads) squares = fmaf(xr[i], xr[i], squares);
    inverse = inverse_rms(block_sum(squares, lds), static_cast<int>(n), eps);
  }
  for (int64_t i = threadIdx.x; i < n; i += kNormThreads) {
    const float v = norm != nullptr ? (xr[i] * inverse) * norm[i] : xr[i];
    if (y != nullptr) y[row * n + i] = v;
    if (out.q != nullptr) quantize_group(v, out.q + row * n + (i & ~31), out.scale + (row * n + i) / 32);
  }
}

// ---- q, k, v

__device__ inline void store_kv(const KvLayer& kv, void* base, int head, int64_t pos, int dim, float v) {
  const int64_t at = (static_cast<int64_t>(head) * kv.n_ctx + pos) * kv.head_dim + dim;
  if (kv.type == DType::F32) {
    static_cast<float*>(base)[at] = v;
  } else if (kv.type == DType::F16) {
    static_cast<uint16_t*>(base)[at] = gpu::float_to_half(v);
  } else {
    // Q8_0: a head's int8 plane [n_ctx, head_dim], then its scales [n_ctx, head_dim / 32] as f16. A wave holds a group.
    const int64_t head_bytes = static_cast<int64_t>(kv.n_ctx) * (kv.head_dim / 32) * 34;
    int8_t* q = static_cast<int8_t*>(base) + head * head_bytes;
    uint16_t* scale = reinterpret_cast<uint16_t*>(q + static_cast<int64_t>(kv.n_ctx) * kv.head_dim);
    const float largest = gpu::wave_max(fabsf(v));
    const uint16_t d = gpu::float_to_half(largest / 127.0f);
    const float inverse = gpu::half_to_float(d) > 0.0f ? 1.0f / gpu::half_to_float(d) : 0.0f;
    q[pos * kv.head_dim + dim] = static_cast<int8_t>(fminf(fmaxf(rintf(v * inverse), -127.0f), 127.0f));
    if (gpu::lane() == 0) scale[(pos * kv.head_dim + dim) / 32] = d;
  }
}

// Which part of a row a block works on.
enum Part { kPartQ = 0, kPartK = 1, kPartV = 2 };

constexpr int kMostPairs = 64;

// Norm over the whole vector: grid (rows, 3), a block takes all heads of q, k or v of one row. n_rot / 2 and head_dim
// are powers of two of at least 4, so a rotation's other half is n_rot / 8 lanes away.
__global__ void __launch_bounds__(kNormThreads)
    qkv_whole_kernel(QkvPost p, Position pos0, float* q, float* k, const float* v, KvLayer kv) {
  __shared__ float fours[kVectorMost / (4 * kTile)];
  __shared__ float2 turns[kMostPairs];
  const int row = static_cast<int>(blockIdx.x);
  const int part = static_cast<int>(blockIdx.y);
  const int n = (part == kPartQ ? p.n_head : p.n_head_kv) * p.head_dim;
  const HeldRow weights(part == kPartQ ? p.q_norm : p.k_norm, part != kPartV ? n : 0);
  const int64_t position = pos0.get() + row;
  for (int i = static_cast<int>(threadIdx.x); i < p.n_rot / 2 && part != kPartV; i += static_cast<int>(blockDim.x)) {
    turns[i] = rotation(static_cast<float>(position) * p.inv_freq[i], p.rope_scale);
  }
  gpu::wait_for_previous();
  if (part == kPartQ && q == nullptr) return;
  const float* x = (part == kPartQ ? q : part == kPartK ? k : v) + static_cast<int64_t>(row) * n;
  const HeldRow held(x, n);
  if (part != kPartV) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float squares = four_tiles_squares(held.v[i]);
      if (gpu::lane() == 0 && HeldRow::at(i) < n) fours[HeldRow::at(i) / (4 * kTile)] = squares;
    }
  }
  __syncthreads();  // for the turns too
  const int count = (n + 4 * kTile - 1) / (4 * kTile);
  const float inverse = part != kPartV ? inverse_rms(sum_of_fours(fours, count), n, p.eps) : 1.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = HeldRow::at(i), dim = at & (p.head_dim - 1);
    if (HeldRow::at(i) - 4 * gpu::lane() >= n) break;  // the whole wave is past the end
    float4 r = held.v[i];
    if (part != kPartV) {
      r = times(r, inverse, weights.v[i]);
      const float4 other = shuffle_quad(r, p.n_rot / 8);
      if (dim < p.n_rot) r = rotate_quad(p, dim, r, other, [&](int j) { return turns[j]; });
    }
    if (part == kPartQ) {
      if (at < n) *reinterpret_cast<float4*>(q + static_cast<int64_t>(row) * n + at) = r;
    } else {
      store_kv_quad(kv, part == kPartK ? kv.k : kv.v, at >> (31 - __clz(p.head_dim)), position, dim, r, at < n);
    }
  }
}

// The same for many rows: a block takes q, k and v of a row, one after the other in its threads' float4, so that no
// thread is idle; a wave's float4 are all of one of them. half_q: q's row becomes f16, at the row's beginning.
constexpr int kRowThreads = 512;
constexpr int64_t kRowMost = kRowThreads * kHeld * 4;  // elements of q, k and v

__global__ void __launch_bounds__(kRowThreads, 2)
    qkv_row_kernel(QkvPost p, Position pos0, float* q, bool half_q, const float* k, const float* v, KvLayer kv) {
  __shared__ float fours[kRowMost / (4 * kTile)];
  __shared__ float2 turns[kMostPairs];
  const int64_t row = blockIdx.x;
  const int n_q = q != nullptr ? p.n_head * p.head_dim : 0, n_kv = p.n_head_kv * p.head_dim, n = n_q + 2 * n_kv;
  auto at = [](int i) { return (i * kRowThreads + static_cast<int>(threadIdx.x)) * 4; };
  auto part = [&](int i) {
    const int first = (i * kRowThreads + gpu::wave() * gpu::kWave) * 4;
    return first < n_q ? kPartQ : first < n_q + n_kv ? kPartK : kPartV;
  };
  float4 weights[kHeld], held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    weights[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (part(i) == kPartQ) {
      weights[i] = *reinterpret_cast<const float4*>(p.q_norm + at(i));
    } else if (part(i) == kPartK) {
      weights[i] = *reinterpret_cast<const float4*>(p.k_norm + at(i) - n_q);
    }
  }
  gpu::wait_for_previous();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float* from = part(i) == kPartQ   ? q + row * n_q + at(i)
                        : part(i) == kPartK ? k + row * n_kv + at(i) - n_q
                                            : v + row * n_kv + at(i) - n_q - n_kv;
    if (at(i) < n) held[i] = *reinterpret_cast<const float4*>(from);
  }
  const int64_t position = pos0.get() + row;
  if (static_cast<int>(threadIdx.x) < p.n_rot / 2) {
    turns[threadIdx.x] = rotation(static_cast<float>(position) * p.inv_freq[threadIdx.x], p.rope_scale);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float squares = four_tiles_squares(held[i]);
    if (gpu::lane() == 0) fours[at(i) / (4 * kTile)] = squares;
  }
  __syncthreads();
  const int q_fours = n_q / (4 * kTile), k_fours = n_kv / (4 * kTile);
  const float q_inverse = inverse_rms(sum_of_fours(fours, q_fours), n_q, p.eps);
  const float k_inverse = inverse_rms(sum_of_fours(fours + q_fours, k_fours), n_kv, p.eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (at(i) >= n) break;
    const int dim = at(i) & (p.head_dim - 1);
    float4 r = held[i];
    if (part(i) != kPartV) {
      r = times(r, part(i) == kPartQ ? q_inverse : k_inverse, weights[i]);
      const float4 other = shuffle_quad(r, p.n_rot / 8);
      if (dim < p.n_rot) r = rotate_quad(p, dim, r, other, [&](int j) { return turns[j]; });
    }
    if (part(i) == kPartQ && half_q) {  // the block has read the whole row
      uint16_t* const half = reinterpret_cast<uint16_t*>(q + row * n_q);
      *reinterpret_cast<uint2*>(half + at(i)) = make_uint2(gpu::F16::pack(r.x, r.y), gpu::F16::pack(r.z, r.w));
    } else if (part(i) == kPartQ) {
      *reinterpret_cast<float4*>(q + row * n_q + at(i)) = r;
    } else {
      const bool is_key = part(i) == kPartK;
      const int in_part = at(i) - n_q - (is_key ? 0 : n_kv);
      store_kv_quad(kv, is_key ? kv.k : kv.v, in_part >> (31 - __clz(p.head_dim)), position, dim, r, true);
    }
  }
}

// Norm per head: grid (rows, n_head + 2 n_head_kv), a wave per head of at most kMostHead elements.
constexpr int kMostHead = 256;

__global__ void __launch_bounds__(gpu::kWave)
    qkv_per_head_kernel(QkvPost p, Position pos0, float* q, float* k, const float* v, KvLayer kv) {
  constexpr int kEach = kMostHead / gpu::kWave;
  __shared__ float head[kMostHead];
  const int row = static_cast<int>(blockIdx.x);
  int h = static_cast<int>(blockIdx.y);
  const int part = h < p.n_head ? kPartQ : h < p.n_head + p.n_head_kv ? kPartK : kPartV;
  if (part != kPartQ) h -= part == kPartK ? p.n_head : p.n_head + p.n_head_kv;
  const int heads = part == kPartQ ? p.n_head : p.n_head_kv, half = p.n_rot / 2;
  const int64_t position = pos0.get() + row;
  float weight[kEach], x[kEach];  // of elements lane, lane + 32, ...
  float2 turn[kEach];             // NEOX: pair (i, i + half)
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = j * gpu::kWave + gpu::lane();
    if (part == kPartV || i >= p.head_dim) break;
    weight[j] = (part == kPartQ ? p.q_norm : p.k_norm)[i];
    if (i < p.n_rot)
      turn[j] = rotation(static_cast<float>(position) * p.inv_freq[i < half ? i : i - half], p.rope_scale);
  }
  gpu::wait_for_previous();
  if (part == kPartQ && q == nullptr) return;
  const int64_t at = (static_cast<int64_t>(row) * heads + h) * p.head_dim;
  const float* from = (part == kPartQ ? q : part == kPartK ? k : v) + at;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = j * gpu::kWave + gpu::lane();
    x[j] = i < p.head_dim ? from[i] : 0.0f;
  }
  if (part == kPartV) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (j * gpu::kWave < p.head_dim) store_kv(kv, kv.v, h, position, j * gpu::kWave + gpu::lane(), x[j]);
    }
    return;
  }
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kEach; ++j) squares = fmaf(x[j], x[j], squares);
  const float inverse = inverse_rms(gpu::wave_sum(squares), p.head_dim, p.eps);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = j * gpu::kWave + gpu::lane();
    if (i >= p.head_dim) break;
    x[j] = (x[j] * inverse) * weight[j];
    head[i] = x[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = j * gpu::kWave + gpu::lane();
    if (j * gpu::kWave >= p.head_dim) break;
    float r = x[j];
    if (i < half) {
      r = fmaf(r, turn[j].x, -(head[i + half] * turn[j].y));
    } else if (i < p.n_rot) {
      r = fmaf(r, turn[j].x, head[i - half] * turn[j].y);
    }
    if (part == kPartQ) {
      q[at + i] = r;
    } else {
      store_kv(kv, kv.k, h, position, i, r);
    }
  }
}

}  // namespace

unsigned norm_threads(int64_t n) {
  const int64_t quads = (n / 4 + gpu::kWave - 1) / gpu::kWave * gpu::kWave;
  return static_cast<unsigned>(quads < gpu::kWave ? gpu::kWave : quads < kNormThreads ? quads : kNormThreads);
}

bool rotates_by_quads(const QkvPost& p) {
  const int half = p.n_rot / 2;
  return half >= 4 && half <= kMostPairs && (half & (half - 1)) == 0 && p.head_dim % p.n_rot == 0 &&
         (p.head_dim & (p.head_dim - 1)) == 0;
}

bool attention_can_take_in(const QkvPost& p, int rows) {
  return gpu::kTakeIn && rows == 1 && p.norm == QkNorm::whole && p.head_dim == 128 && rotates_by_quads(p) &&
         p.n_head * p.head_dim <= kTakeInMost && p.n_head_kv * p.head_dim <= 1024;
}

void launch_norm_quantize(gpu::Stream s, const float* x, const float* norm, float eps, int rows, int64_t n, float* y,
                          MutableQuantRows q) {
  const dim3 grid(static_cast<unsigned>(rows));
  if (n % 4 == 0 && n <= kVectorMost) {
    gpu::launch(s, grid, norm_threads(n), norm_quantize_kernel, x, norm, eps, static_cast<int>(n), y, q);
  } else {
    gpu::launch(s, grid, kNormThreads, norm_quantize_any_kernel, x, norm, eps, n, y, q);
  }
}

bool qkv_post_by_rows(const QkvPost& p, int rows) {
  const int64_t n_q = static_cast<int64_t>(p.n_head) * p.head_dim,
                n_kv = static_cast<int64_t>(p.n_head_kv) * p.head_dim;
  constexpr int64_t kWaveElements = gpu::kWave * 4;
  return rows > kFewRows && p.norm == QkNorm::whole && rotates_by_quads(p) && n_q % kWaveElements == 0 &&
         n_kv % kWaveElements == 0 && n_q + 2 * n_kv <= kRowMost;
}

void launch_qkv_post(gpu::Stream s, const QkvPost& p, int rows, Position pos0, float* q, float* k, const float* v,
                     const KvLayer& kv, bool half_q) {
  const unsigned n = static_cast<unsigned>(rows);
  if (qkv_post_by_rows(p, rows)) {
    gpu::launch(s, dim3(n), kRowThreads, qkv_row_kernel, p, pos0, q, half_q, k, v, kv);
    return;
  }
  if (p.norm == QkNorm::per_head) {
    gpu::launch(s, dim3(n, static_cast<unsigned>(p.n_head + 2 * p.n_head_kv)), gpu::kWave, qkv_per_head_kernel, p, pos0,
                q, k, v, kv);
    return;
  }
  const int64_t widest = static_cast<int64_t>(p.n_head) * p.head_dim;
  if (!rotates_by_quads(p) || widest > kVectorMost) {
    fail("GPU: a norm over the whole q and k needs at most ", kVectorMost,
         " elements, and head_dim and n_rot that are powers of two (8..128 rotated), not ", widest, ", ", p.head_dim,
         " and ", p.n_rot);
  }
  gpu::launch(s, dim3(n, 3), norm_threads(widest), qkv_whole_kernel, p, pos0, q, k, v, kv);
}

}  // namespace dflash::hip
