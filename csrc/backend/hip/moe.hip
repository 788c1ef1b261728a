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

// Greater for a greater value, then for a lower id; never 0.
__device__ inline unsigned long long ranking(float value, int id) {
  const uint32_t bits = __float_as_uint(value == value ? fmaxf(value, -3.0e38f) : -3.0e38f);  // NaN ranks last
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | static_cast<uint32_t>(~id);
}

__device__ inline float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// A wave chooses one row's experts: top_k of sigmoid(logit) + bias, ties to the lowest id, in descending order. Lane i
// ends with the expert of slot i.
__device__ inline int choose_experts(const float* logits, const float* bias, int n_expert, int row, const Routing& r) {
  unsigned long long rank[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = gpu::lane() + i * gpu::kWave;
    rank[i] = 0;
    if (e < n_expert) {
      rank[i] = ranking(sigmoid(gpu::load_fresh(logits + e)) + (bias != nullptr ? bias[e] : 0.0f), e);
    }
  }
  int mine = 0;
  for (int slot = 0; slot < r.top_k; ++slot) {
    unsigned long long best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = rank[i] > best ? rank[i] : best;
    for (int m = gpu::kWave / 2; m > 0; m >>= 1) {
      const unsigned long long other = gpu::shuffle_xor(best, m);
      best = other > best ? other : best;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (rank[i] == best) rank[i] = 0;
    }
    if (gpu::lane() == slot) mine = static_cast<int>(~static_cast<uint32_t>(best));
  }
  const bool used = gpu::lane() < r.top_k;
  const float score = used ? sigmoid(gpu::load_fresh(logits + mine)) : 0.0f;
  const float sum = gpu::wave_sum(score);
  if (used) {
    r.experts[row * r.top_k + gpu::lane()] = mine;
    r.weights[row * r.top_k + gpu::lane()] = score / sum;
  }
  return mine;
}

// A block sorts all pairs by expert and cuts each expert's run into items; unused items have count 0.
template <typename ExpertOf>
__device__ inline void group_pairs(const Routing& r, ExpertOf expert_of) {
  __shared__ int count[kMaxExperts], cursor[kMaxExperts], n_items;
  const int n_pairs = r.rows * r.top_k;
  for (int e = threadIdx.x; e < kMaxExperts; e += blockDim.x) count[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < n_pairs; p += blockDim.x) atomicAdd(&count[expert_of(p)], 1);
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
    if (gpu::lane() == gpu::kWave - 1) *r.n_items = n_items = item_at + items;
    distinct = gpu::wave_sum(distinct);
    if (gpu::lane() == 0) atomicAdd(r.distinct, distinct);
    for (int i = 0; i < kPerLane; ++i) {
      const int e = first + i, c = count[e];
      cursor[e] = pair_at;
      for (int done = 0; done < c; done += r.chunk) {
        r.items[item_at++] = {e, pair_at + done, min(r.chunk, c - done), 0};
      }
      pair_at += c;
    }
  }
  __syncthreads();
  for (int p = threadIdx.x; p < n_pairs; p += blockDim.x) r.pairs[atomicAdd(&cursor[expert_of(p)], 1)] = p;
  for (int i = n_items + threadIdx.x; i < r.max_items; i += blockDim.x) r.items[i] = {0, 0, 0, 0};
}

// Few rows: grid n_expert / 8. A block normalises each row for itself (the blocks share the work of quantising it), a
// wave makes an expert's logits from router weights it holds in registers before the row is there; the last block to
// finish chooses and groups. The same sums in the same order as norm_quantize and the float matmul for many rows.
constexpr int kRouteQuads = 24;                       // float4 of router weights a lane holds
constexpr int kRouteEmbd = kRouteQuads * 4 * gpu::kWave;  // largest n_embd

__global__ void __launch_bounds__(kThreads) route_few_kernel(const float* __restrict__ router,
                                                             const float* __restrict__ bias, const float* __restrict__ x,
                                                             const float* __restrict__ norm, float eps, int n_embd,
                                                             int n_expert, MutableQuantRows hq, float* logits,
                                                             Routing r) {
  constexpr int kParts = kRouteEmbd / (4 * kThreads);  // float4 of a row a thread holds
  alignas(16) __shared__ float h[kRouteEmbd];
  __shared__ float lds[gpu::kWave];
  __shared__ int chosen[kFewRows * gpu::kWave];
  const int expert = static_cast<int>(blockIdx.x) * kSegments + gpu::wave();
  auto at_lane = [&](int i) { return (i * gpu::kWave + gpu::lane()) * 4; };
  auto at_thread = [&](int i) { return (i * kThreads + static_cast<int>(threadIdx.x)) * 4; };
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float4 w[kRouteQuads], weight[kParts];
#pragma unroll
  for (int i = 0; i < kRouteQuads; ++i) {
    w[i] = zero;
    if (expert < n_expert && at_lane(i) < n_embd) {
      w[i] = *reinterpret_cast<const float4*>(router + static_cast<int64_t>(expert) * n_embd + at_lane(i));
    }
  }
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    weight[i] = zero;
    if (at_thread(i) < n_embd) weight[i] = *reinterpret_cast<const float4*>(norm + at_thread(i));
  }
  if (threadIdx.x < gpu::kWave) lds[threadIdx.x] = 0.0f;
  gpu::wait_for_previous();
  for (int row = 0; row < r.rows; ++row) {
    float4 v[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      v[i] = zero;
      if (at_thread(i) < n_embd) v[i] = *reinterpret_cast<const float4*>(x + static_cast<int64_t>(row) * n_embd + at_thread(i));
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kParts; ++i) {  // as if each float4 had a thread of its own
      const float squares = fmaf(v[i].w, v[i].w, fmaf(v[i].z, v[i].z, fmaf(v[i].y, v[i].y, v[i].x * v[i].x)));
      const float sum = gpu::wave_sum(squares);
      if (gpu::lane() == 0) lds[i * kSegments + gpu::wave()] = sum;
    }
    __syncthreads();
    const float mean = gpu::wave_sum(lds[gpu::lane()]) / static_cast<float>(n_embd);
    const float inverse = 1.0f / sqrtf(mean + eps);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int at = at_thread(i);
      const float4 n = make_float4((v[i].x * inverse) * weight[i].x, (v[i].y * inverse) * weight[i].y,
                                   (v[i].z * inverse) * weight[i].z, (v[i].w * inverse) * weight[i].w);
      *reinterpret_cast<float4*>(&h[at]) = n;
      if (static_cast<int>(blockIdx.x) == row % static_cast<int>(gridDim.x) && hq.q != nullptr) {
        const int64_t group = (static_cast<int64_t>(row) * n_embd + at) / 32;
        quantize_quad(n, hq.q + group * 32, hq.scale + group, at < n_embd);
      }
    }
    __syncthreads();
    float acc = 0.0f;
#pragma unroll
    for (int i = 0; i < kRouteQuads; ++i) {
      const float4 a = *reinterpret_cast<const float4*>(&h[at_lane(i)]);
      acc = fmaf(w[i].x, a.x, acc);
      acc = fmaf(w[i].y, a.y, acc);
      acc = fmaf(w[i].z, a.z, acc);
      acc = fmaf(w[i].w, a.w, acc);
    }
    acc = gpu::wave_sum(acc);
    if (gpu::lane() == 0 && expert < n_expert) logits[row * n_expert + expert] = acc;
  }
  if (!gpu::last_to_arrive(r.arrived, static_cast<int>(gridDim.x))) return;
  for (int row = gpu::wave(); row < r.rows; row += kSegments) {
    const int mine = choose_experts(logits + row * n_expert, bias, n_expert, row, r);
    if (gpu::lane() < r.top_k) chosen[row * r.top_k + gpu::lane()] = mine;
  }
  __syncthreads();
  group_pairs(r, [&](int pair) { return chosen[pair]; });
}

// Many rows: a wave per row, then one block.
__global__ void __launch_bounds__(kThreads) choose_kernel(const float* logits, const float* bias, int n_expert,
                                                          Routing r) {
  gpu::wait_for_previous();
  const int row = static_cast<int>(blockIdx.x) * kSegments + gpu::wave();
  if (row < r.rows) choose_experts(logits + static_cast<int64_t>(row) * n_expert, bias, n_expert, row, r);
}

__global__ void __launch_bounds__(1024) group_kernel(Routing r) {
  gpu::wait_for_previous();
  group_pairs(r, [&](int pair) { return r.experts[pair]; });
}

__global__ void __launch_bounds__(kThreads) dense_routing_kernel(Routing r) {
  gpu::wait_for_previous();
  for (int i = threadIdx.x; i < r.rows; i += kThreads) {
    r.pairs[i] = i;
    r.experts[i] = 0;
    r.weights[i] = 1.0f;
  }
  const int n = (r.rows + r.chunk - 1) / r.chunk;
  for (int i = threadIdx.x; i < n; i += kThreads) r.items[i] = {0, i * r.chunk, min(r.chunk, r.rows - i * r.chunk), 0};
  if (threadIdx.x == 0) *r.n_items = n;
}

// grid (tiles of n_ff, max_items): a tile of 32 gate and up outputs is one int8 group of the next product's input.
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads) gate_up_few_kernel(TiledWeight gate, TiledWeight up, QuantRows x, Routing r,
                                                               MutableQuantRows act) {
  __shared__ Partial<MaxRows> sums[2];
  gpu::wait_for_previous();
  const Item item = r.items[blockIdx.y];
  if (item.count == 0) return;
  const int tile = static_cast<int>(blockIdx.x);
  const int* pairs = r.pairs + item.first;
  const TileView<F> views[2] = {TileView<F>(gate, item.expert, tile), TileView<F>(up, item.expert, tile)};
  prefetch_segment(views[0], gate.groups);
  prefetch_segment(views[1], gate.groups);
  tile_segments<F, 2, MaxRows>(views, gate.groups, x, [&](int i) { return pairs[i] / r.top_k; }, item.count, sums);
  __syncthreads();
  const int segments = segment_count(gate.groups);
  for (int i = gpu::wave(); i < item.count; i += kSegments) {
    const float g = add_segments<MaxRows>(sums[0], segments, i, gpu::lane());
    const float u = add_segments<MaxRows>(sums[1], segments, i, gpu::lane());
    const int64_t group = static_cast<int64_t>(pairs[i]) * gate.tiles + tile;
    quantize_group(swiglu(g, u), act.q + group * 32, act.scale + group);
  }
}

// grid (tiles of n_embd / 2, max_items): two tiles of y[pair]; the last block of the two adds the experts to its 64
// columns of x.
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads) down_few_kernel(TiledWeight down, QuantRows act, Routing r, float* y,
                                                            float* x) {
  __shared__ Partial<MaxRows> sums[2];
  gpu::wait_for_previous();
  const Item item = r.items[blockIdx.y];
  if (item.count == 0) return;
  const int n_items = *r.n_items;
  const int tile = static_cast<int>(blockIdx.x) * 2;
  const int* pairs = r.pairs + item.first;
  const TileView<F> views[2] = {TileView<F>(down, item.expert, tile),
                                TileView<F>(down, item.expert, min(tile + 1, down.tiles - 1))};
  prefetch_segment(views[0], down.groups);
  prefetch_segment(views[1], down.groups);
  tile_segments<F, 2, MaxRows>(views, down.groups, act, [&](int i) { return pairs[i]; }, item.count, sums);
  __syncthreads();
  const int segments = segment_count(down.groups);
  for (int i = gpu::wave(); i < 2 * item.count; i += kSegments) {
    const int half = i % 2, pair = pairs[i / 2];
    const int64_t n = static_cast<int64_t>(tile + half) * kTile + gpu::lane();
    const float v = add_segments<MaxRows>(sums[half], segments, i / 2, gpu::lane());
    if (n < down.n_out) y[pair * down.n_out + n] = v;
  }
  if (!gpu::last_to_arrive(r.arrived + blockIdx.x, n_items)) return;
  for (int i = gpu::wave(); i < 2 * r.rows; i += kSegments) {
    const int row = i / 2;
    const int64_t n = static_cast<int64_t>(tile + i % 2) * kTile + gpu::lane();
    if (n >= down.n_out) continue;
    float sum = 0.0f;
#pragma unroll 8
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

void launch_route(gpu::Stream s, const Moe& m, const float* x, float* h, MutableQuantRows hq, float* logits, Routing r) {
  const Weight& router = *m.router;
  if (router.n_out > kMaxExperts || r.top_k > gpu::kWave) {
    fail("GPU: at most ", kMaxExperts, " experts, ", gpu::kWave, " a row, not ", router.n_out, " and ", r.top_k);
  }
  const int n_expert = static_cast<int>(router.n_out);
  if (r.rows <= kFewRows && h == nullptr && router.n_in % 32 == 0 && router.n_in <= kRouteEmbd) {
    gpu::launch(s, dim3(u((n_expert + kSegments - 1) / kSegments)), kThreads, route_few_kernel,
                static_cast<const float*>(router.data), m.bias, x, m.norm, m.eps, static_cast<int>(router.n_in), n_expert,
                hq, logits, r);
    return;
  }
  launch_norm_quantize(s, x, m.norm, m.eps, r.rows, router.n_in, h, hq);
  launch_float_matmul(s, router, h, r.rows, logits, false);
  gpu::launch(s, dim3(u((r.rows + kSegments - 1) / kSegments)), kThreads, choose_kernel, logits, m.bias, n_expert, r);
  gpu::launch(s, dim3(1), 1024, group_kernel, r);
}

bool route_needs_hidden(const Moe& m, int rows) {
  return rows > kFewRows || !is_quantized(m.gate->type) || m.router->n_in % 32 != 0 || m.router->n_in > kRouteEmbd;
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
  const dim3 grid(u((down.tiles + 1) / 2), u(r.max_items));
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
