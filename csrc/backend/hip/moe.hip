// The mixture of experts: the router's logits; for many rows the choice and the grouping of (row, slot) pairs by
// expert, which for few rows is part of the experts' own kernels (experts_few.hip).

#include <algorithm>

#include "backend/hip/choose.h"
#include "backend/hip/few_rows.h"
#include "backend/hip/float_dot.h"
#include "backend/hip/kernels.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

// Few rows: grid (n_expert / kRouteExperts, some of the rows). A wave has the same elements of its experts' router
// weights and of the rows, all in registers: products and sums of squares leave it together, and the factor 1 / rms
// comes last. Some blocks more quantise the rows meanwhile. Who reads the logits chooses.
constexpr int kRouteExperts = 2;                        // of a block
constexpr int kRouteQuads = 3;                          // float4 of a row a lane holds
constexpr int kRouteEmbd = kRouteQuads * 4 * kThreads;  // largest n_embd
constexpr int kRouteSums = kRouteExperts + 1;           // of a row: products, squares
constexpr int kRouteRuns = 4;                           // of rows that blocks of their own take
// Blocks to a multiprocessor. Not told, nvcc saves registers for one row by reading it in three goes.
constexpr int kRouteBlocks = gpu::kStaged ? 3 : 1;

// Part `part` of a row as int8 groups: elements (part * kThreads + thread) * 4 on are a thread's.
__device__ inline void route_quantize(const float* x, const float* norm, float eps, int n_embd, int row, int part,
                                      MutableQuantRows hq) {
  alignas(16) __shared__ float squares[kSegments];  // of the waves
  auto at = [&](int i) { return (i * kThreads + static_cast<int>(threadIdx.x)) * 4; };
  const float* from = x + static_cast<int64_t>(row) * n_embd;
  const int mine = at(part);
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float4 weight = mine < n_embd ? *reinterpret_cast<const float4*>(norm + mine) : zero;
  gpu::wait_for_previous();
  float4 v[kRouteQuads];
#pragma unroll
  for (int i = 0; i < kRouteQuads; ++i) {
    v[i] = at(i) < n_embd ? *reinterpret_cast<const float4*>(from + at(i)) : zero;
  }
  float sum = 0.0f;
  float4 own = zero;
#pragma unroll
  for (int i = 0; i < kRouteQuads; ++i) {
    sum += sum_of_squares(v[i]);
    if (i == part) own = v[i];
  }
  sum = gpu::wave_sum(sum);
  if (gpu::lane() == 0) squares[gpu::wave()] = sum;
  const int64_t group = (static_cast<int64_t>(row) * n_embd + mine) / 32;
  const GroupScale s = quantize_quad(times(own, weight), hq.q + group * 32, mine < n_embd);
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kSegments; ++i) total += squares[i];
  const float inverse = inverse_rms(total, n_embd, eps);
  if (gpu::lane() % 8 == 0 && mine < n_embd) hq.scale[group] = {s.d * inverse, s.sum};
}

// Rows at a time. Blocks beyond those of the experts quantise a part of a row each.
template <int Rows>
__global__ void __launch_bounds__(kThreads, kRouteBlocks)
    route_few_kernel(const float* __restrict__ router, const float* __restrict__ x, const float* __restrict__ norm,
                     float eps, int n_embd, int n_expert, int rows, MutableQuantRows hq, float* logits) {
  const int quantises = static_cast<int>(blockIdx.x) - (n_expert + kRouteExperts - 1) / kRouteExperts;
  if (quantises >= 0) {
    const int row = quantises / kRouteQuads * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y);
    if (row < rows) route_quantize(x, norm, eps, n_embd, row, quantises % kRouteQuads, hq);
    return;
  }
  alignas(16) __shared__ float parts[2][Rows][kRouteSums][kSegments];  // of the waves, for rows in turn
  const int expert0 = static_cast<int>(blockIdx.x) * kRouteExperts, wave = gpu::wave();
  auto at = [&](int i) { return (i * kThreads + static_cast<int>(threadIdx.x)) * 4; };
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float4 w[kRouteExperts][kRouteQuads], weight[kRouteQuads];
#pragma unroll
  for (int i = 0; i < kRouteQuads; ++i) {
    weight[i] = zero;
    if (at(i) < n_embd) weight[i] = *reinterpret_cast<const float4*>(norm + at(i));
#pragma unroll
    for (int e = 0; e < kRouteExperts; ++e) {
      w[e][i] = zero;
      if (expert0 + e < n_expert && at(i) < n_embd) {
        w[e][i] = *reinterpret_cast<const float4*>(router + static_cast<int64_t>(expert0 + e) * n_embd + at(i));
      }
    }
  }
  gpu::wait_for_previous();
  const int first = static_cast<int>(blockIdx.y) * Rows, step = static_cast<int>(gridDim.y) * Rows;
  for (int row0 = first, buffer = 0; row0 < rows; row0 += step, buffer ^= 1) {
    float4 v[Rows][kRouteQuads];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const float* from = x + static_cast<int64_t>(min(row0 + r, rows - 1)) * n_embd;
#pragma unroll
      for (int i = 0; i < kRouteQuads; ++i) {
        v[r][i] = zero;
        if (at(i) < n_embd) v[r][i] = *reinterpret_cast<const float4*>(from + at(i));
      }
    }
    constexpr int kSums = gpu::power_of_two_from(Rows * kRouteSums), kLanes = gpu::kWave / kSums;
    float sum[kSums] = {};  // [row][product or squares]
#pragma unroll
    for (int i = 0; i < kRouteQuads; ++i) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        sum[r * kRouteSums + kRouteExperts] += sum_of_squares(v[r][i]);
        v[r][i] = times(v[r][i], weight[i]);
#pragma unroll
        for (int e = 0; e < kRouteExperts; ++e) {
          float& s = sum[r * kRouteSums + e];
          s = fmaf(w[e][i].x, v[r][i].x, s);
          s = fmaf(w[e][i].y, v[r][i].y, s);
          s = fmaf(w[e][i].z, v[r][i].z, s);
          s = fmaf(w[e][i].w, v[r][i].w, s);
        }
      }
    }
    const float all = gpu::wave_sums(sum);
    const int of = gpu::lane() / kLanes;
    if (gpu::lane() % kLanes == 0 && of < Rows * kRouteSums) {
      parts[buffer][of / kRouteSums][of % kRouteSums][wave] = all;
    }
    __syncthreads();
    auto total = [&](int r, int j) {
      float t = 0.0f;
#pragma unroll
      for (int s = 0; s < kSegments; ++s) t += parts[buffer][r][j][s];
      return t;
    };
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int row = row0 + r;
      if (row >= rows) break;
      const float inverse = inverse_rms(total(r, kRouteExperts), n_embd, eps);
      const int expert = expert0 + gpu::lane();
      if (wave == r && gpu::lane() < kRouteExperts && expert < n_expert) {
        logits[row * n_expert + expert] = total(r, gpu::lane()) * inverse;
      }
    }
  }
}

// Many rows: a wave per row. logits [parts, rows, n_expert]: a logit is the sum of its parts.
__global__ void __launch_bounds__(kThreads)
    choose_kernel(const float* logits, int parts, const float* bias, int n_expert, Routing r) {
  gpu::wait_for_previous();
  const int row = static_cast<int>(blockIdx.x) * kSegments + gpu::wave();
  if (row >= r.rows) return;
  float logit[kExpertsPerLane] = {};
  for (int part = 0; part < parts; ++part) {
    const float* from = logits + (static_cast<int64_t>(part) * r.rows + row) * n_expert;
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      const int e = gpu::lane() + i * gpu::kWave;
      if (e < n_expert) logit[i] += from[e];
    }
  }
  const Choice c = choose_experts(logit, bias, n_expert, r.top_k);
  if (gpu::lane() < r.top_k) {
    r.experts[row * r.top_k + gpu::lane()] = c.expert;
    r.weights[row * r.top_k + gpu::lane()] = c.weight;
  }
}

// Sorts the pairs by expert; the first block cuts each expert's run into items, unused items have count 0. Every block
// counts all pairs, and those before its own, which it then puts in place: the blocks need nothing of each other.
constexpr int kGroupThreads = 1024;

__global__ void __launch_bounds__(kGroupThreads) group_kernel(Routing r) {
  __shared__ int count[kMaxExperts], cursor[kMaxExperts], n_items;
  const int t = static_cast<int>(threadIdx.x);
  for (int e = t; e < kMaxExperts; e += kGroupThreads) count[e] = cursor[e] = 0;
  gpu::wait_for_previous();
  __syncthreads();
  const int n_pairs = r.rows * r.top_k;
  const int before = static_cast<int>(blockIdx.x) * kGroupThreads;  // the block's first pair
  constexpr int kAhead = 8;
  for (int p0 = 0; p0 < n_pairs; p0 += kAhead * kGroupThreads) {
    int expert[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int pair = p0 + i * kGroupThreads + t;
      expert[i] = pair < n_pairs ? r.experts[pair] : -1;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (expert[i] < 0) break;
      atomicAdd(&count[expert[i]], 1);
      if (p0 + i * kGroupThreads < before) atomicAdd(&cursor[expert[i]], 1);
    }
  }
  __syncthreads();
  if (gpu::wave() == 0) {
    const int first = gpu::lane() * kExpertsPerLane;
    int pairs = 0, items = 0, distinct = 0;
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      const int c = count[first + i];
      pairs += c;
      items += (c + r.chunk - 1) / r.chunk;
      distinct += c > 0;
    }
    int pair_at = gpu::wave_sum_before(pairs), item_at = gpu::wave_sum_before(items);
    distinct = gpu::wave_sum(distinct);
    if (gpu::lane() == gpu::kWave - 1) n_items = item_at + items;
    if (blockIdx.x == 0) {
      if (gpu::lane() == gpu::kWave - 1) *r.n_items = item_at + items;
      if (gpu::lane() == 0) atomicAdd(r.distinct, distinct);
    }
    for (int i = 0; i < kExpertsPerLane; ++i) {
      const int e = first + i, c = count[e];
      cursor[e] += pair_at;
      for (int done = 0; blockIdx.x == 0 && done < c; done += r.chunk) {
        r.items[item_at++] = {e, pair_at + done, min(r.chunk, c - done), 0};
      }
      pair_at += c;
    }
  }
  __syncthreads();
  if (before + t < n_pairs) r.pairs[atomicAdd(&cursor[r.experts[before + t]], 1)] = before + t;
  if (blockIdx.x != 0) return;
  for (int i = n_items + t; i < r.max_items; i += kGroupThreads) r.items[i] = {0, 0, 0, 0};
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

template <int V>
struct alignas(V * sizeof(float)) Vector {
  float e[V];
};

// V outputs of a pair from column n on.
template <int V>
struct FloatReader {
  static constexpr int kColumns = V;
  const float* y;
  int64_t n_embd;

  __device__ inline Vector<V> load(int64_t pair, int64_t n) const {
    return *reinterpret_cast<const Vector<V>*>(y + pair * n_embd + n);
  }
};
struct PairReader {
  static constexpr int kColumns = 4;
  PairRows y;

  __device__ inline Vector<4> load(int64_t pair, int64_t n) const {
    const uint2 v = *reinterpret_cast<const uint2*>(y.v + pair * y.n + n);
    const float scale = y.scale[pair * (y.n / kTile) + n / kTile];
    auto value = [&](uint32_t word, uint32_t bytes) {  // in the mantissa of 2^23
      return (__uint_as_float(__byte_perm(word, 0x4b000000u, bytes)) - 8421376.0f) * scale;
    };
    return {{value(v.x, 0x7410), value(v.x, 0x7432), value(v.y, 0x7410), value(v.y, 0x7432)}};
  }
};

// x[row] += its experts, some columns a thread. Grid (columns / (columns a thread * threads), rows).
template <typename Reader>
__global__ void __launch_bounds__(kThreads) add_experts_kernel(Routing r, Reader y, int64_t n_embd, float* x) {
  constexpr int V = Reader::kColumns;
  gpu::wait_for_previous();
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  const int64_t row = blockIdx.y;
  if (n >= n_embd) return;
  Vector<V> sum = {};
#pragma unroll 8
  for (int slot = 0; slot < r.top_k; ++slot) {
    const int64_t pair = row * r.top_k + slot;
    const float weight = r.weights[pair];
    const Vector<V> v = y.load(pair, n);
#pragma unroll
    for (int i = 0; i < V; ++i) sum.e[i] = fmaf(weight, v.e[i], sum.e[i]);
  }
  Vector<V>& to = *reinterpret_cast<Vector<V>*>(x + row * n_embd + n);
  Vector<V> all = to;
#pragma unroll
  for (int i = 0; i < V; ++i) all.e[i] += sum.e[i];
  to = all;
}

unsigned u(int64_t n) { return static_cast<unsigned>(n); }

}  // namespace

static void check_experts(const Moe& m, const Routing& r) {
  if (m.router->n_out > kMaxExperts || r.top_k > gpu::kWave) {
    fail("GPU: at most ", kMaxExperts, " experts, ", gpu::kWave, " a row, not ", m.router->n_out, " and ", r.top_k);
  }
}

void launch_route(gpu::Stream s, const Moe& m, const float* x, float* h, MutableQuantRows hq, float* logits,
                  Routing r) {
  const Weight& router = *m.router;
  check_experts(m, r);
  const int n_expert = static_cast<int>(router.n_out);
  if (!route_needs_hidden(m, r.rows)) {
    auto run = [&](auto kernel, int at_a_time) {
      const int runs = std::min((r.rows + at_a_time - 1) / at_a_time, kRouteRuns);
      const int quantise = hq.q != nullptr ? kRouteQuads * ((r.rows + runs - 1) / runs) : 0;
      const dim3 grid(u((n_expert + kRouteExperts - 1) / kRouteExperts + quantise), u(runs));
      gpu::launch(s, grid, kThreads, kernel, static_cast<const float*>(router.data), x, m.norm, m.eps,
                  static_cast<int>(router.n_in), n_expert, r.rows, hq, logits);
    };
    r.rows == 1 ? run(route_few_kernel<1>, 1) : run(route_few_kernel<2>, 2);
    return;
  }
  launch_norm_quantize(s, x, m.norm, m.eps, r.rows, router.n_in, h, hq);
  launch_float_matmul(s, router, h, r.rows, logits, false);
  if (experts_choose(r.rows, m.gate->type)) return;
  launch_choose(s, m, logits, 1, r);
}

void launch_choose(gpu::Stream s, const Moe& m, const float* logits, int parts, Routing r) {
  check_experts(m, r);
  const int n_expert = static_cast<int>(m.router->n_out);
  gpu::launch(s, dim3(u((r.rows + kSegments - 1) / kSegments)), kThreads, choose_kernel, logits, parts, m.bias,
              n_expert, r);
  const int n_pairs = r.rows * r.top_k;
  gpu::launch(s, dim3(u((n_pairs + kGroupThreads - 1) / kGroupThreads)), kGroupThreads, group_kernel, r);
}

bool route_needs_hidden(const Moe& m, int rows) {
  return rows > kFewRows || !is_quantized(m.gate->type) || m.router->n_in % 32 != 0 || m.router->n_in > kRouteEmbd;
}

void launch_route_dense(gpu::Stream s, Routing r) { gpu::launch(s, dim3(1), kThreads, dense_routing_kernel, r); }

template <typename Reader>
static void add_experts(gpu::Stream s, const Routing& r, const Reader& y, int64_t n, float* x) {
  const int64_t columns = Reader::kColumns * kThreads;
  gpu::launch(s, dim3(u((n + columns - 1) / columns), u(r.rows)), kThreads, add_experts_kernel<Reader>, r, y, n, x);
}

void launch_add_experts(gpu::Stream s, const Routing& r, const float* y, int64_t n, float* x) {
  if (n % 4 == 0) {
    add_experts(s, r, FloatReader<4>{y, n}, n, x);
  } else {
    add_experts(s, r, FloatReader<1>{y, n}, n, x);
  }
}

void launch_add_experts(gpu::Stream s, const Routing& r, const PairRows& y, int64_t n, float* x) {
  add_experts(s, r, PairReader{y}, n, x);
}

}  // namespace dflash::hip
