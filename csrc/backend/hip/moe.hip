// The mixture of experts: the router's choice, the grouping of (row, slot) pairs by expert, and the experts themselves
// for 1..16 rows, where every distinct expert's weights are read once.

#include "backend/hip/few_rows.h"
#include "backend/hip/float_dot.h"
#include "backend/hip/kernels.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

constexpr int kMaxExperts = 256;
constexpr int kPerLane = kMaxExperts / gpu::kWave;

// A wave chooses one row's experts: top_k of sigmoid(logit) + bias, ties to the lowest id, in descending order.
__device__ inline void choose_experts(const float* logits, const float* bias, int n_expert, int row, const Routing& r) {
  float score[kPerLane], choice[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = gpu::lane() + i * gpu::kWave;
    score[i] = 0.0f;
    choice[i] = -INFINITY;
    if (e >= n_expert) continue;
    score[i] = 1.0f / (1.0f + expf(-gpu::load_fresh(logits + e)));
    const float c = score[i] + (bias != nullptr ? bias[e] : 0.0f);
    choice[i] = c == c ? fmaxf(c, -3.0e38f) : -3.0e38f;  // a NaN still leaves valid experts
  }
  float sum = 0.0f;
  for (int slot = 0; slot < r.top_k; ++slot) {
    float best = -INFINITY, best_score = 0.0f;
    int best_expert = kMaxExperts;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {  // ascending ids: strictly greater keeps the lowest
      if (choice[i] > best) {
        best = choice[i];
        best_score = score[i];
        best_expert = gpu::lane() + i * gpu::kWave;
      }
    }
    for (int m = gpu::kWave / 2; m > 0; m >>= 1) {
      const float other = gpu::shuffle_xor(best, m);
      const float other_score = gpu::shuffle_xor(best_score, m);
      const int other_expert = gpu::shuffle_xor(best_expert, m);
      if (other > best || (other == best && other_expert < best_expert)) {
        best = other;
        best_score = other_score;
        best_expert = other_expert;
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (best_expert == gpu::lane() + i * gpu::kWave) choice[i] = -INFINITY;
    }
    sum += best_score;
    if (gpu::lane() == 0) {
      r.experts[row * r.top_k + slot] = best_expert;
      r.weights[row * r.top_k + slot] = best_score;
    }
  }
  if (gpu::lane() == 0) {
    for (int slot = 0; slot < r.top_k; ++slot) r.weights[row * r.top_k + slot] /= sum;
  }
}

// A block sorts all pairs by expert and cuts each expert's run into items.
__device__ inline void group_pairs(int n_expert, const Routing& r) {
  __shared__ int count[kMaxExperts], cursor[kMaxExperts];
  const int n_pairs = r.rows * r.top_k;
  for (int e = threadIdx.x; e < kMaxExperts; e += blockDim.x) count[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < n_pairs; p += blockDim.x) atomicAdd(&count[r.experts[p]], 1);
  __syncthreads();
  if (gpu::wave() == 0) {
    const int first = gpu::lane() * kPerLane;
    int pairs = 0, items = 0, distinct = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int c = count[first + i];
      pairs += c;
      items += (c + r.chunk - 1) / r.chunk;
      distinct += c > 0;
    }
    int pair_at = gpu::wave_sum_before(pairs), item_at = gpu::wave_sum_before(items);
    if (gpu::lane() == gpu::kWave - 1) *r.n_items = item_at + items;
    distinct = gpu::wave_sum(distinct);
    if (gpu::lane() == 0) *r.distinct += distinct;
    for (int i = 0; i < kPerLane; ++i) {
      const int e = first + i, c = count[e];
      cursor[e] = pair_at;
      for (int done = 0; done < c; done += r.chunk) {
        r.items[item_at++] = {e, pair_at + done, min(r.chunk, c - done)};
      }
      pair_at += c;
    }
  }
  __syncthreads();
  for (int p = threadIdx.x; p < n_pairs; p += blockDim.x) r.pairs[atomicAdd(&cursor[r.experts[p]], 1)] = p;
}

// Few rows: grid n_expert / 8, a wave per expert's logits; the last block to finish chooses and groups.
template <int R>
__global__ void __launch_bounds__(kThreads) route_few_kernel(const float* __restrict__ router,
                                                             const float* __restrict__ bias,
                                                             const float* __restrict__ h, int64_t n_embd, int n_expert,
                                                             float* logits, Routing r) {
  gpu::wait_for_previous();
  const int e = static_cast<int>(blockIdx.x) * kSegments + gpu::wave();
  if (e < n_expert) {
    int row = 0;
    for (; row + R <= r.rows; row += R) {
      float acc[R];
      float_dot<DType::F32, 4, R>(router + e * n_embd, h + row * n_embd, n_embd, n_embd, acc);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        if (gpu::lane() == 0) logits[(row + i) * n_expert + e] = acc[i];
      }
    }
    for (; row < r.rows; ++row) {
      float acc[1];
      float_dot<DType::F32, 4, 1>(router + e * n_embd, h + row * n_embd, n_embd, n_embd, acc);
      if (gpu::lane() == 0) logits[row * n_expert + e] = acc[0];
    }
  }
  if (!gpu::last_to_arrive(r.arrived, static_cast<int>(gridDim.x))) return;
  for (int row = gpu::wave(); row < r.rows; row += kSegments) {
    choose_experts(logits + row * n_expert, bias, n_expert, row, r);
  }
  __syncthreads();
  group_pairs(n_expert, r);
}

// Many rows: a wave per row, then one block.
__global__ void __launch_bounds__(kThreads) choose_kernel(const float* logits, const float* bias, int n_expert,
                                                          Routing r) {
  gpu::wait_for_previous();
  const int row = static_cast<int>(blockIdx.x) * kSegments + gpu::wave();
  if (row < r.rows) choose_experts(logits + static_cast<int64_t>(row) * n_expert, bias, n_expert, row, r);
}

__global__ void __launch_bounds__(1024) group_kernel(int n_expert, Routing r) {
  gpu::wait_for_previous();
  group_pairs(n_expert, r);
}

__global__ void __launch_bounds__(kThreads) dense_routing_kernel(Routing r) {
  gpu::wait_for_previous();
  for (int i = threadIdx.x; i < r.rows; i += kThreads) {
    r.pairs[i] = i;
    r.experts[i] = 0;
    r.weights[i] = 1.0f;
  }
  const int n = (r.rows + r.chunk - 1) / r.chunk;
  for (int i = threadIdx.x; i < n; i += kThreads) r.items[i] = {0, i * r.chunk, min(r.chunk, r.rows - i * r.chunk)};
  if (threadIdx.x == 0) *r.n_items = n;
}

// grid (tiles of n_ff, max_items): a tile of 32 gate and up outputs is one int8 group of the next product's input.
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads) gate_up_few_kernel(TiledWeight gate, TiledWeight up, QuantRows x, Routing r,
                                                               MutableQuantRows act) {
  __shared__ Partial<MaxRows> gate_sums, up_sums;
  gpu::wait_for_previous();
  if (static_cast<int>(blockIdx.y) >= *r.n_items) return;
  const Item item = r.items[blockIdx.y];
  const int tile = static_cast<int>(blockIdx.x);
  const int* pairs = r.pairs + item.first;
  auto row_of = [&](int i) { return pairs[i] / r.top_k; };
  tile_segment<F, MaxRows>(TileView<F>(gate, item.expert, tile), gate.groups, x, row_of, item.count, gate_sums);
  tile_segment<F, MaxRows>(TileView<F>(up, item.expert, tile), gate.groups, x, row_of, item.count, up_sums);
  __syncthreads();
  const int segments = segment_count(gate.groups);
  for (int i = gpu::wave(); i < item.count; i += kSegments) {
    const float g = add_segments<MaxRows>(gate_sums, segments, i, gpu::lane());
    const float u = add_segments<MaxRows>(up_sums, segments, i, gpu::lane());
    const int64_t group = static_cast<int64_t>(pairs[i]) * gate.tiles + tile;
    quantize_group(swiglu(g, u), act.q + group * 32, act.scale + group);
  }
}

// grid (tiles of n_embd, max_items): y[pair]; the last block of a tile adds the experts to its 32 columns of x.
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads) down_few_kernel(TiledWeight down, QuantRows act, Routing r, float* y,
                                                            float* x) {
  __shared__ Partial<MaxRows> sums;
  gpu::wait_for_previous();
  const int n_items = *r.n_items;
  if (static_cast<int>(blockIdx.y) >= n_items) return;
  const Item item = r.items[blockIdx.y];
  const int tile = static_cast<int>(blockIdx.x);
  const int* pairs = r.pairs + item.first;
  tile_segment<F, MaxRows>(TileView<F>(down, item.expert, tile), down.groups, act, [&](int i) { return pairs[i]; },
                           item.count, sums);
  __syncthreads();
  const int segments = segment_count(down.groups);
  const int64_t n = static_cast<int64_t>(tile) * kTile + gpu::lane();
  for (int i = gpu::wave(); i < item.count; i += kSegments) {
    const float v = add_segments<MaxRows>(sums, segments, i, gpu::lane());
    if (n < down.n_out) y[pairs[i] * down.n_out + n] = v;
  }
  if (!gpu::last_to_arrive(r.arrived + tile, n_items)) return;
  for (int row = gpu::wave(); row < r.rows; row += kSegments) {
    if (n >= down.n_out) continue;
    float sum = 0.0f;
    for (int slot = 0; slot < r.top_k; ++slot) {
      const int pair = row * r.top_k + slot;
      sum = fmaf(r.weights[pair], gpu::load_fresh(y + pair * down.n_out + n), sum);
    }
    x[row * down.n_out + n] += sum;
  }
}

// The same sum for many rows: grid (columns / threads, rows).
__global__ void __launch_bounds__(kThreads) add_experts_kernel(Routing r, const float* __restrict__ y, int64_t n_embd,
                                                               float* x) {
  gpu::wait_for_previous();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = blockIdx.y;
  if (n >= n_embd) return;
  float sum = 0.0f;
  for (int slot = 0; slot < r.top_k; ++slot) {
    const int64_t pair = row * r.top_k + slot;
    sum = fmaf(r.weights[pair], y[pair * n_embd + n], sum);
  }
  x[row * n_embd + n] += sum;
}

unsigned u(int64_t n) { return static_cast<unsigned>(n); }

}  // namespace

void launch_route(gpu::Stream s, const Weight& router, const float* bias, const float* h, float* logits, Routing r) {
  if (router.n_out > kMaxExperts) fail("GPU: ", router.n_out, " experts; at most ", kMaxExperts, " are supported");
  const int n_expert = static_cast<int>(router.n_out);
  if (r.rows > kFewRows || router.n_in % 4 != 0) {
    launch_float_matmul(s, router, h, r.rows, logits, false);
    gpu::launch(s, dim3(u((r.rows + kSegments - 1) / kSegments)), kThreads, choose_kernel, logits, bias, n_expert, r);
    gpu::launch(s, dim3(1), 1024, group_kernel, n_expert, r);
    return;
  }
  const dim3 grid(u((n_expert + kSegments - 1) / kSegments));
  const float* w = static_cast<const float*>(router.data);
  const auto kernel = r.rows == 1 ? route_few_kernel<1> : r.rows == 2 ? route_few_kernel<2> : route_few_kernel<4>;
  gpu::launch(s, grid, kThreads, kernel, w, bias, h, router.n_in, n_expert, logits, r);
}

void launch_route_dense(gpu::Stream s, Routing r) { gpu::launch(s, dim3(1), kThreads, dense_routing_kernel, r); }

void launch_gate_up(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, QuantRows x,
                    const Routing& r, MutableQuantRows act) {
  if (r.rows > kFewRows) return launch_gate_up_many(s, type, gate, up, x, r, act);
  const dim3 grid(u(gate.tiles), u(r.max_items));
  with_format(type, [&](auto format) {
    using F = decltype(format);
    const auto kernel = r.rows == 1   ? gate_up_few_kernel<F, 1>
                        : r.rows <= 4 ? gate_up_few_kernel<F, 4>
                                      : gate_up_few_kernel<F, kFewRows>;
    gpu::launch(s, grid, kThreads, kernel, gate, up, x, r, act);
  });
}

void launch_down(gpu::Stream s, DType type, const TiledWeight& down, QuantRows act, const Routing& r, float* y,
                 float* x) {
  if (r.rows > kFewRows) {
    launch_down_many(s, type, down, act, r, y);
    launch_add_experts(s, r, y, down.n_out, x);
    return;
  }
  const dim3 grid(u(down.tiles), u(r.max_items));
  with_format(type, [&](auto format) {
    using F = decltype(format);
    const auto kernel = r.rows == 1   ? down_few_kernel<F, 1>
                        : r.rows <= 4 ? down_few_kernel<F, 4>
                                      : down_few_kernel<F, kFewRows>;
    gpu::launch(s, grid, kThreads, kernel, down, act, r, y, x);
  });
}

void launch_add_experts(gpu::Stream s, const Routing& r, const float* y, int64_t n, float* x) {
  const dim3 grid(u((n + kThreads - 1) / kThreads), u(r.rows));
  gpu::launch(s, grid, kThreads, add_experts_kernel, r, y, n, x);
}

}  // namespace dflash::hip
