// Experts for more than 16 rows: the router's product, the grouping, and the experts on matrix instructions.

#include "backend/hip/many_rows.h"
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

// grid (n_ff / (32 * kManyWaves), max_items): a wave makes a gate tile and the up tile beside it, so that a lane holds
// both factors of an output.
template <typename F>
__global__ void __launch_bounds__(kManyThreads, gpu::kHalfBlocks)
    gate_up_many_kernel(TiledWeight gate, TiledWeight up, HalfRows x, Routing r, uint16_t* act) {
  DFLASH_STAGES(stages, StageOf<F>::kAll);
  gpu::wait_for_previous();
  const Item item = r.items[blockIdx.y];
  if (item.count == 0) return;
  const int* pairs = r.pairs + item.first;
  const int tile = static_cast<int>(blockIdx.x) * kManyWaves + gpu::wave();
  const int safe = min(tile, gate.tiles - 1);
  const TileView<F> tiles[kWaveTiles] = {TileView<F>(gate, item.expert, safe), TileView<F>(up, item.expert, safe)};
  ManySums sum;
  multiply_many<F, gpu::F16>(
      tiles, gate.groups, x, [&](int t) { return static_cast<int64_t>(pairs[t] / r.top_k); }, item.count, stages, sum);
  if (tile >= gate.tiles) return;
  const int64_t n_ff = static_cast<int64_t>(gate.tiles) * kTile;
#pragma unroll
  for (int b = 0; b < kTokenBlocks; ++b) {
#pragma unroll
    for (int j = 0; j < gpu::kMmaToks; ++j) {
      const int token = b * gpu::kMmaTokens + gpu::mma_token(j);
      if (token >= item.count) continue;
      uint16_t* out = act + pairs[token] * n_ff + tile * kTile;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < gpu::kMmaRows; ++i) {
          const int at = i * gpu::kMmaToks + j;
          const float v = swiglu(sum.at(h, b, at), sum.at(2 + h, b, at));
          out[gpu::half_slot(h * 16 + gpu::mma_row(i))] = static_cast<uint16_t>(gpu::BF16::pack(v, v));
        }
      }
    }
  }
}

// grid (blocks of kManyTiles tiles of n_embd, max_items): y[pair]
template <typename F>
__global__ void __launch_bounds__(kManyThreads, gpu::kHalfBlocks)
    down_many_kernel(TiledWeight down, HalfRows act, Routing r, float* y) {
  DFLASH_STAGES(stages, StageOf<F>::kAll);
  gpu::wait_for_previous();
  const Item item = r.items[blockIdx.y];
  if (item.count == 0) return;
  const int* pairs = r.pairs + item.first;
  const int first_tile = static_cast<int>(blockIdx.x) * kManyTiles + gpu::wave() * kWaveTiles;
  const TileView<F> tiles[kWaveTiles] = {TileView<F>(down, item.expert, min(first_tile, down.tiles - 1)),
                                         TileView<F>(down, item.expert, min(first_tile + 1, down.tiles - 1))};
  ManySums sum;
  multiply_many<F, gpu::BF16>(
      tiles, down.groups, act, [&](int t) { return static_cast<int64_t>(pairs[t]); }, item.count, stages, sum);
  sum.visit([&](int tile, int column, int token, float v) {
    const int64_t n = static_cast<int64_t>(first_tile + tile) * kTile + column;
    if (token < item.count && n < down.n_out) y[pairs[token] * down.n_out + n] = v;
  });
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
    gpu::launch_stages(s, dim3(u((gate.tiles + kManyWaves - 1) / kManyWaves), u(r.max_items)), kManyThreads,
                       StageOf<F>::kAll, gate_up_many_kernel<F>, gate, up, x, r, act.v);
  });
}

void launch_down_many(gpu::Stream s, DType type, const TiledWeight& down, HalfRows act, const Routing& r, float* y,
                      float* x) {
  with_format(type, [&](auto format) {
    using F = decltype(format);
    gpu::launch_stages(s, dim3(u((down.tiles + kManyTiles - 1) / kManyTiles), u(r.max_items)), kManyThreads,
                       StageOf<F>::kAll, down_many_kernel<F>, down, act, r, y);
  });
  launch_add_experts(s, r, y, down.n_out, x);
}

}  // namespace dflash::hip
