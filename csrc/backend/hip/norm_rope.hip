// RMSNorm with quantisation to int8 groups, and what follows the q, k, v projections: norm, RoPE, the KV store.

#include "backend/hip/kernels.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

constexpr int kNormThreads = 512;
constexpr int kNormWaves = kNormThreads / gpu::kWave;

// The sum of v over the block's threads in a fixed order, for every thread.
__device__ inline float block_sum(float v, float* lds) {
  v = gpu::wave_sum(v);
  if (gpu::lane() == 0) lds[gpu::wave()] = v;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kNormWaves; ++i) sum += lds[i];
  __syncthreads();
  return sum;
}

__device__ inline float inverse_rms(const float* x, int64_t n, float eps, float* lds) {
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += kNormThreads) squares = fmaf(x[i], x[i], squares);
  return 1.0f / sqrtf(block_sum(squares, lds) / static_cast<float>(n) + eps);
}

__global__ void __launch_bounds__(kNormThreads) norm_quantize_kernel(const float* __restrict__ x,
                                                                     const float* __restrict__ norm, float eps,
                                                                     int64_t n, float* y, MutableQuantRows out) {
  __shared__ float lds[kNormWaves];
  gpu::wait_for_previous();
  const int64_t row = blockIdx.x;
  const float* xr = x + row * n;
  const float inverse = norm != nullptr ? inverse_rms(xr, n, eps, lds) : 1.0f;
  for (int64_t i = threadIdx.x; i < n; i += kNormThreads) {
    const float v = norm != nullptr ? (xr[i] * inverse) * norm[i] : xr[i];
    if (y != nullptr) y[row * n + i] = v;
    // n is a multiple of 32 here, so the lanes of a wave hold one whole group
    if (out.q != nullptr) quantize_group(v, out.q + row * n + (i & ~31), out.scale + (row * n + i) / 32);
  }
}

// ---- q, k, v ------------------------------------------------------------------------------------------------------------

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

// NEOX rotation of element i of a head whose normalised values are at(i).
template <typename At>
__device__ inline float rotate(const QkvPost& p, int i, float position, At at) {
  const int half = p.n_rot / 2;
  if (i >= p.n_rot) return at(i);
  const int pair = i < half ? i : i - half;
  const float angle = position * p.inv_freq[pair];
  float sine, cosine;
  sincosf(angle, &sine, &cosine);
  sine *= p.rope_scale;
  cosine *= p.rope_scale;
  const float a = at(pair), b = at(pair + half);
  return i < half ? fmaf(a, cosine, -(b * sine)) : fmaf(b, cosine, a * sine);
}

// Norm over the whole vector: grid (rows, 3), a block takes all heads of q, k or v of one row.
__global__ void __launch_bounds__(kNormThreads) qkv_whole_kernel(QkvPost p, Position pos0, float* q, float* k,
                                                                 const float* v, KvLayer kv) {
  __shared__ float lds[kNormWaves];
  __shared__ float head[kNormThreads];  // the heads in hand: kNormThreads / head_dim of them
  gpu::wait_for_previous();
  const int row = static_cast<int>(blockIdx.x);
  const int part = static_cast<int>(blockIdx.y);
  if (part == kPartQ && q == nullptr) return;
  const int64_t position = pos0.get() + row;
  const int n = (part == kPartQ ? p.n_head : p.n_head_kv) * p.head_dim;
  const int dim = static_cast<int>(threadIdx.x) % p.head_dim;
  if (part == kPartV) {
    for (int i = threadIdx.x; i < n; i += kNormThreads) {
      store_kv(kv, kv.v, i / p.head_dim, position, dim, v[static_cast<int64_t>(row) * n + i]);
    }
    return;
  }
  float* x = (part == kPartQ ? q : k) + static_cast<int64_t>(row) * n;
  const float* norm = part == kPartQ ? p.q_norm : p.k_norm;
  const float inverse = inverse_rms(x, n, p.eps, lds);
  for (int first = 0; first < n; first += kNormThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    if (i < n) head[threadIdx.x] = (x[i] * inverse) * norm[i];
    __syncthreads();
    if (i < n) {
      const float* mine = head + (threadIdx.x - dim);
      const float r = rotate(p, dim, static_cast<float>(position), [&](int j) { return mine[j]; });
      if (part == kPartQ) {
        x[i] = r;
      } else {
        store_kv(kv, kv.k, i / p.head_dim, position, dim, r);
      }
    }
    __syncthreads();
  }
}

// Norm per head: grid (rows, n_head + 2 n_head_kv), a wave per head.
__global__ void __launch_bounds__(gpu::kWave) qkv_per_head_kernel(QkvPost p, Position pos0, float* q, float* k,
                                                                  const float* v, KvLayer kv) {
  gpu::wait_for_previous();
  const int row = static_cast<int>(blockIdx.x);
  int h = static_cast<int>(blockIdx.y);
  const int64_t position = pos0.get() + row;
  const int part = h < p.n_head ? kPartQ : h < p.n_head + p.n_head_kv ? kPartK : kPartV;
  if (part == kPartQ && q == nullptr) return;
  if (part != kPartQ) h -= part == kPartK ? p.n_head : p.n_head + p.n_head_kv;
  const int heads = part == kPartQ ? p.n_head : p.n_head_kv;
  const int64_t at = (static_cast<int64_t>(row) * heads + h) * p.head_dim;
  if (part == kPartV) {
    for (int i = gpu::lane(); i < p.head_dim; i += gpu::kWave) store_kv(kv, kv.v, h, position, i, v[at + i]);
    return;
  }
  float* x = (part == kPartQ ? q : k) + at;
  const float* norm = part == kPartQ ? p.q_norm : p.k_norm;
  float squares = 0.0f;
  for (int i = gpu::lane(); i < p.head_dim; i += gpu::kWave) squares = fmaf(x[i], x[i], squares);
  const float inverse = 1.0f / sqrtf(gpu::wave_sum(squares) / static_cast<float>(p.head_dim) + p.eps);
  __shared__ float head[256];
  for (int i = gpu::lane(); i < p.head_dim; i += gpu::kWave) head[i] = (x[i] * inverse) * norm[i];
  __syncthreads();
  for (int i = gpu::lane(); i < p.head_dim; i += gpu::kWave) {
    const float r = rotate(p, i, static_cast<float>(position), [&](int j) { return head[j]; });
    if (part == kPartQ) {
      x[i] = r;
    } else {
      store_kv(kv, kv.k, h, position, i, r);
    }
  }
}

}  // namespace

void launch_norm_quantize(gpu::Stream s, const float* x, const float* norm, float eps, int rows, int64_t n, float* y,
                          MutableQuantRows q) {
  gpu::launch(s, dim3(static_cast<unsigned>(rows)), kNormThreads, norm_quantize_kernel, x, norm, eps, n, y, q);
}

void launch_qkv_post(gpu::Stream s, const QkvPost& p, int rows, Position pos0, float* q, float* k, const float* v,
                     const KvLayer& kv) {
  const unsigned n = static_cast<unsigned>(rows);
  if (p.norm == QkNorm::whole) {
    gpu::launch(s, dim3(n, 3), kNormThreads, qkv_whole_kernel, p, pos0, q, k, v, kv);
  } else {
    gpu::launch(s, dim3(n, static_cast<unsigned>(p.n_head + 2 * p.n_head_kv)), gpu::kWave, qkv_per_head_kernel, p, pos0,
                q, k, v, kv);
  }
}

}  // namespace dflash::hip
