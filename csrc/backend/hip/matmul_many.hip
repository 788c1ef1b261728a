// Dense matrix times more than 16 rows, and the norm that makes its 16-bit rows.

#include <cstdint>

#include "backend/hip/many_direct.h"
#include "backend/hip/many_ring.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

unsigned u(int64_t n) { return static_cast<unsigned>(n); }

struct OutList {
  TiledOut out[kMaxOuts];
  int first_block[kMaxOuts + 1];  // blocks of the outputs before
};

// y (+)= w x: a job is kManyTiles weight tiles of one output by `most` rows.
template <typename F>
struct DenseJob {
  OutList list;
  int rows, most;
  bool add;
  // of the job
  int groups, tokens;
  TiledWeight w;
  float* y;
  int first_tile, first_row;

  __device__ inline int count() const { return list.first_block[kMaxOuts] * ((rows + most - 1) / most); }
  __device__ inline bool take(int index) {
    const int across = list.first_block[kMaxOuts], block = index % across;
    w = list.out[0].w;
    y = list.out[0].y;
    first_tile = block * kManyTiles;
#pragma unroll
    for (int o = 1; o < kMaxOuts; ++o) {
      if (block >= list.first_block[o]) {
        w = list.out[o].w;
        y = list.out[o].y;
        first_tile = (block - list.first_block[o]) * kManyTiles;
      }
    }
    first_row = index / across * most;
    tokens = min(most, rows - first_row);
    groups = w.groups;
    return true;
  }
  __device__ inline TileView<F> tile(int slot) const { return {w, 0, min(first_tile + slot, w.tiles - 1)}; }
  __device__ inline int64_t row(int token) const { return first_row + token; }
  __device__ inline int half(int run) const { return half_in_order(run); }
  template <int Blocks>
  __device__ inline void finish(const ManySums<Blocks>& sums, float* out) const {
    write_rows(sums, first_tile, tokens, [&](int token) { return row(token); }, w.n_out, y, add, out);
  }
};

template <typename F, typename N>
__global__ void __launch_bounds__(kManyThreads, 1) matmul_many_kernel(DenseJob<F> job, HalfRows x, int n_stages) {
  DFLASH_STAGES(stages, ring_bytes<F>(0));
  gpu::wait_for_previous();
  multiply_jobs<F, N>(job, x, stages, n_stages);
}

// ---- norm

constexpr int kNormThreads = 256;
constexpr int kNormHeld = 4;  // float4 of a row a thread holds
constexpr int kNormSpan = kNormThreads * kNormHeld * 4;

// A block per row, which is read once if it has at most kNormSpan elements; n a multiple of 32. norm null: the row as
// it is.
template <typename N>
__global__ void __launch_bounds__(kNormThreads)
    norm_half_kernel(const float* __restrict__ x, const float* __restrict__ norm, float eps, int n, float* y,
                     uint16_t* out) {
  __shared__ float lds[kNormThreads / gpu::kWave];
  const int64_t row = blockIdx.x;
  float4 weight[kNormHeld], held[kNormHeld];
  auto at = [](int start, int i) { return start + (i * kNormThreads + static_cast<int>(threadIdx.x)) * 4; };
  auto load = [&](const float* from, int start, float4(&v)[kNormHeld]) {
#pragma unroll
    for (int i = 0; i < kNormHeld; ++i) {
      v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (at(start, i) < n) v[i] = *reinterpret_cast<const float4*>(from + at(start, i));
    }
  };
  if (norm != nullptr) load(norm, 0, weight);
  gpu::wait_for_previous();
  load(x + row * n, 0, held);
  float inverse = 1.0f;
  if (norm != nullptr) {
    float squares = 0.0f;
    for (int start = 0;;) {
#pragma unroll
      for (int i = 0; i < kNormHeld; ++i) {
        const float4& v = held[i];
        squares = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, squares))));
      }
      start += kNormSpan;
      if (start >= n) break;
      load(x + row * n, start, held);
    }
    squares = gpu::wave_sum(squares);
    if (gpu::lane() == 0) lds[gpu::wave()] = squares;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < kNormThreads / gpu::kWave; ++i) sum += lds[i];
    inverse = inverse_rms(sum, n, eps);
  }
  for (int start = 0; start < n; start += kNormSpan) {
    if (n > kNormSpan) {
      load(x + row * n, start, held);
      if (norm != nullptr) load(norm, start, weight);
    }
#pragma unroll
    for (int k = 0; k < kNormHeld; ++k) {
      const int i = at(start, k);
      if (i >= n) break;
      const float4 v = norm != nullptr ? times(held[k], inverse, weight[k]) : held[k];
      if (y != nullptr) *reinterpret_cast<float4*>(y + row * n + i) = v;
      // Elements 0 and 2 of a word's four are neighbours, and 1 and 3.
      uint16_t* group = out + row * n + (i & ~31);
      *reinterpret_cast<uint32_t*>(group + gpu::half_slot(i & 31)) = N::pack(v.x, v.z);
      *reinterpret_cast<uint32_t*>(group + gpu::half_slot((i & 31) + 1)) = N::pack(v.y, v.w);
    }
  }
}

// Rows of a job: those that leave the machine least idle in the last round of jobs. A job costs its rows and, for its
// start and end and the expanding of weights, about as much as some more.
int rows_of_job(int across, int rows) {
  const int64_t units = gpu::compute_units();
  constexpr int kStep = kManyTokens / 8;
  int best = kManyTokens;
  int64_t least = INT64_MAX;
  for (int most = kManyTokens; most >= kManyTokens / 2; most -= kStep) {
    const int64_t jobs = static_cast<int64_t>(across) * ((rows + most - 1) / most);
    const int64_t cost = (jobs + units - 1) / units * (most + kStep);
    if (cost < least) {
      least = cost;
      best = most;
    }
  }
  return best;
}

}  // namespace

void launch_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, HalfRows x, int rows, bool add) {
  OutList list = {};
  for (int i = 0; i < kMaxOuts; ++i) {
    const int blocks = i < n_outs ? (outs[i].w.tiles + kManyTiles - 1) / kManyTiles : 0;
    if (i < n_outs) list.out[i] = outs[i];
    list.first_block[i + 1] = list.first_block[i] + blocks;
  }
  const int across = list.first_block[kMaxOuts], most = rows_of_job(across, rows);
  with_format(type, [&](auto format) {
    using F = decltype(format);
    DenseJob<F> job = {};
    job.list = list;
    job.rows = rows;
    job.most = most;
    job.add = add;
    const int n_stages = ring_stages<F>();
    gpu::launch_stages(s, dim3(blocks_for_jobs(static_cast<int64_t>(across) * ((rows + most - 1) / most))),
                       kManyThreads, ring_bytes<F>(n_stages),
                       x.f16 ? matmul_many_kernel<F, gpu::F16> : matmul_many_kernel<F, gpu::BF16>, job, x, n_stages);
  });
}

void launch_norm_half(gpu::Stream s, const float* x, const float* norm, float eps, int rows, float* y, HalfRows out) {
  const auto kernel = out.f16 ? norm_half_kernel<gpu::F16> : norm_half_kernel<gpu::BF16>;
  gpu::launch(s, dim3(u(rows)), kNormThreads, kernel, x, norm, eps, static_cast<int>(out.n), y, out.v);
}

}  // namespace dflash::hip
