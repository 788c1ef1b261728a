// Experts for more than 16 rows: the router's product, the grouping, and the experts on matrix instructions.

#include "backend/hip/many_direct.h"
#include "backend/hip/many_ring.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

unsigned u(int64_t n) { return static_cast<unsigned>(n); }

// ---- router
// -------------------------------------------------------------------------------------------------------------

constexpr int kRouterSide = 64, kRouterDepth = 32, kRouterThreads = 512;  // rows and outputs of a block
constexpr int kRouterQuads = kRouterDepth / 4;                            // float4 of a row in a step
constexpr int kRouterParts = 4;  // of a step's depth, each with threads of its own

// A step of a block's rows or outputs, [depth][row], the rows of a float4's four depths turned so that neither writing
// nor reading meets in a bank.
struct RouterSide {
  float v[kRouterDepth * kRouterSide];

  static __device__ inline int at(int depth, int row) { return depth * kRouterSide + (row ^ (depth / 4 * 4)); }
};

// logits [rows, n_out] = h [rows, n_in] * w [n_out, n_in], all f32; n_in a multiple of 4. A block makes 64 rows by 64
// outputs, a thread 8 by 4 of them over a quarter of each step's depth; the quarters are added at the end.
// grid (outputs, rows)
__global__ void __launch_bounds__(kRouterThreads)
    router_kernel(const float* __restrict__ w, const float* __restrict__ h, int rows, int n_in, int n_out,
                  float* logits) {
  alignas(16) __shared__ RouterSide sides[4];
  RouterSide *const hs = sides, *const ws = sides + 2;
  gpu::wait_for_previous();
  const int t = static_cast<int>(threadIdx.x);
  const int row0 = static_cast<int>(blockIdx.y) * kRouterSide, out0 = static_cast<int>(blockIdx.x) * kRouterSide;
  constexpr int kVectors = kRouterSide * kRouterQuads / kRouterThreads;
  float4 hv[kVectors], wv[kVectors];
  auto load = [&](const float* from, int first, int count, int k0, float4(&v)[kVectors]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = t + i * kRouterThreads, row = first + at / kRouterQuads, k = k0 + at % kRouterQuads * 4;
      v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < count && k < n_in) v[i] = *reinterpret_cast<const float4*>(from + static_cast<int64_t>(row) * n_in + k);
    }
  };
  auto store = [&](RouterSide& side, const float4(&v)[kVectors]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = t + i * kRouterThreads, row = at / kRouterQuads, k = at % kRouterQuads * 4;
      side.v[RouterSide::at(k, row)] = v[i].x;
      side.v[RouterSide::at(k + 1, row)] = v[i].y;
      side.v[RouterSide::at(k + 2, row)] = v[i].z;
      side.v[RouterSide::at(k + 3, row)] = v[i].w;
    }
  };
  alignas(16) float acc[8][4] = {};
  constexpr int kPartThreads = kRouterThreads / kRouterParts;
  const int part = t / kPartThreads, rows_at = t % kPartThreads / 16 * 8, outs_at = t % 16 * 4;
  load(h, row0, rows, 0, hv);
  load(w, out0, n_out, 0, wv);
  for (int k0 = 0, now = 0; k0 < n_in; k0 += kRouterDepth, now ^= 1) {
    store(hs[now], hv);
    store(ws[now], wv);
    __syncthreads();
    if (k0 + kRouterDepth < n_in) {
      load(h, row0, rows, k0 + kRouterDepth, hv);
      load(w, out0, n_out, k0 + kRouterDepth, wv);
    }
#pragma unroll
    for (int i = 0; i < kRouterDepth / kRouterParts; ++i) {
      const int k = part * (kRouterDepth / kRouterParts) + i;
      float a[8], b[4];
      *reinterpret_cast<float4*>(a) = *reinterpret_cast<const float4*>(&hs[now].v[RouterSide::at(k, rows_at)]);
      *reinterpret_cast<float4*>(a + 4) = *reinterpret_cast<const float4*>(&hs[now].v[RouterSide::at(k, rows_at + 4)]);
      *reinterpret_cast<float4*>(b) = *reinterpret_cast<const float4*>(&ws[now].v[RouterSide::at(k, outs_at)]);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int o = 0; o < 4; ++o) acc[r][o] = fmaf(a[r], b[o], acc[r][o]);
      }
    }
  }
  // Quarters 2 and 3 to 0 and 1, then 1 to 0.
  for (int from = kRouterParts / 2; from > 0; from /= 2) {
    __syncthreads();
    float* sums = &sides[0].v[0] + (part % from * kRouterSide + rows_at) * kRouterSide + outs_at;
    if (part >= from && part < 2 * from) {
#pragma unroll
      for (int r = 0; r < 8; ++r)
        *reinterpret_cast<float4*>(sums + r * kRouterSide) = *reinterpret_cast<float4*>(acc[r]);
    }
    __syncthreads();
    if (part < from) {
#pragma unroll
      for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int o = 0; o < 4; ++o) acc[r][o] += sums[r * kRouterSide + o];
      }
    }
  }
  if (part != 0) return;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      const int row = row0 + rows_at + r, out = out0 + outs_at + o;
      if (row < rows && out < n_out) logits[static_cast<int64_t>(row) * n_out + out] = acc[r][o];
    }
  }
}

// ---- experts
// ------------------------------------------------------------------------------------------------------------

// What the two products have in common: a job is `across` blocks of an item.
struct ExpertJob {
  Routing r;
  int across;
  // of the job
  int groups, tokens;
  Item item;
  const int* pairs;
  int block;

  __device__ inline int count() const { return across * *r.n_items; }
  __device__ inline bool take(int index) {
    item = r.items[index / across];
    block = index % across;
    pairs = r.pairs + item.first;
    tokens = item.count;
    return tokens > 0;
  }
};

// act[pair] = silu(gate x) * up x. The first tiles of a job are gate's, the others up's of the same outputs, so that a
// lane holds both factors.
template <typename F>
struct GateUpJob : ExpertJob {
  static constexpr int kTiles = kManyTiles / 2;
  TiledWeight gate, up;
  uint16_t* act;

  __device__ inline TileView<F> tile(int slot) const {
    return {slot < kTiles ? gate : up, item.expert, min(block * kTiles + slot % kTiles, gate.tiles - 1)};
  }
  __device__ inline int64_t row(int token) const { return pairs[token] / r.top_k; }
  __device__ inline int half(int run) const { return half_gate_up(run); }
  template <int Blocks>
  __device__ inline void finish(const ManySums<Blocks>& sums, float* out) const {
    constexpr int kGate = kRuns / 2, kPieces = kGate * 2;  // 16 bytes each, of a token
    constexpr int kStride = kGate * 16 + 8;
    uint16_t* staged = reinterpret_cast<uint16_t*>(out);
    const int64_t n_ff = static_cast<int64_t>(gate.tiles) * kTile;
    const int first_half = block * kManyTiles + half(0);
    each_pass<Blocks>(
        tokens,
        [&](int token, int row, int b, int i) {
#pragma unroll
          for (int m = 0; m < kGate; ++m) {
            const float v = swiglu(sums.at(m, b, i), sums.at(kGate + m, b, i));
            // the slots of 16 rows follow each other wherever the first of them is
            staged[token * kStride + gpu::half_slot((first_half + m) % 2 * 16 + row) - first_half % 2 * 16] =
                static_cast<uint16_t>(gpu::BF16::pack(v, v));
          }
        },
        [&](int first) {
          const int piece = gpu::lane() % kPieces;
          if (first_half * 16 + piece * 8 >= n_ff) return;
#pragma unroll 1
          for (int t = gpu::lane() / kPieces; t < min(kPassTokens, tokens - first); t += gpu::kWave / kPieces) {
            *reinterpret_cast<uint4*>(act + pairs[first + t] * n_ff + first_half * 16 + piece * 8) =
                *reinterpret_cast<const uint4*>(staged + t * kStride + piece * 8);
          }
        });
  }
};

// y[pair] = down act[pair]
template <typename F>
struct DownJob : ExpertJob {
  TiledWeight down;
  float* y;

  __device__ inline TileView<F> tile(int slot) const {
    return {down, item.expert, min(block * kManyTiles + slot, down.tiles - 1)};
  }
  __device__ inline int64_t row(int token) const { return pairs[token]; }
  __device__ inline int half(int run) const { return half_in_order(run); }
  template <int Blocks>
  __device__ inline void finish(const ManySums<Blocks>& sums, float* out) const {
    write_rows(sums, block * kManyTiles, tokens, [&](int token) { return row(token); }, down.n_out, y, false, out);
  }
};

template <typename F>
__global__ void __launch_bounds__(kManyThreads, 1) gate_up_many_kernel(GateUpJob<F> job, HalfRows x, int n_stages) {
  DFLASH_STAGES(stages, ring_bytes<F>(0));
  gpu::wait_for_previous();
  multiply_jobs<F, gpu::F16>(job, x, stages, n_stages);
}

template <typename F>
__global__ void __launch_bounds__(kManyThreads, 1) down_many_kernel(DownJob<F> job, HalfRows act, int n_stages) {
  DFLASH_STAGES(stages, ring_bytes<F>(0));
  gpu::wait_for_previous();
  multiply_jobs<F, gpu::BF16>(job, act, stages, n_stages);
}

// Queues `kernel` for the jobs of all items.
template <typename F, typename Job>
void launch_experts(gpu::Stream s, void (*kernel)(Job, HalfRows, int), Job job, const Routing& r, int across, int groups,
                    HalfRows x) {
  job.r = r;
  job.across = across;
  job.groups = groups;
  const int n_stages = ring_stages<F>();
  gpu::launch_stages(s, dim3(blocks_for_jobs(static_cast<int64_t>(across) * r.max_items)), kManyThreads,
                     ring_bytes<F>(n_stages), kernel, job, x, n_stages);
}

}  // namespace

void launch_route_many(gpu::Stream s, const Moe& m, const float* x, float* h, HalfRows hh, float* logits, Routing r) {
  const Weight& router = *m.router;
  launch_norm_half(s, x, m.norm, m.eps, r.rows, h, hh);
  if (router.n_in % 4 == 0) {
    const dim3 grid(u((router.n_out + kRouterSide - 1) / kRouterSide), u((r.rows + kRouterSide - 1) / kRouterSide));
    gpu::launch(s, grid, kRouterThreads, router_kernel, static_cast<const float*>(router.data), h, r.rows,
                static_cast<int>(router.n_in), static_cast<int>(router.n_out), logits);
  } else {
    launch_float_matmul(s, router, h, r.rows, logits, false);
  }
  launch_choose(s, m, logits, r);
}

void launch_gate_up_many(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, HalfRows x,
                         const Routing& r, HalfRows act) {
  with_format(type, [&](auto format) {
    using F = decltype(format);
    GateUpJob<F> job = {};
    job.gate = gate;
    job.up = up;
    job.act = act.v;
    const int across = (gate.tiles + kManyTiles / 2 - 1) / (kManyTiles / 2);
    launch_experts<F>(s, gate_up_many_kernel<F>, job, r, across, gate.groups, x);
  });
}

void launch_down_many(gpu::Stream s, DType type, const TiledWeight& down, HalfRows act, const Routing& r, float* y,
                      float* x) {
  with_format(type, [&](auto format) {
    using F = decltype(format);
    DownJob<F> job = {};
    job.down = down;
    job.y = y;
    launch_experts<F>(s, down_many_kernel<F>, job, r, (down.tiles + kManyTiles - 1) / kManyTiles, down.groups, act);
  });
  launch_add_experts(s, r, y, down.n_out, x);
}

}  // namespace dflash::hip
