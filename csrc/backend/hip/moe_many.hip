// Experts for more than 16 rows: the router's product, the grouping, and the experts on matrix instructions.

#include "backend/hip/gpu_flash.h"
#include "backend/hip/many_direct.h"
#include "backend/hip/many_ring.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

unsigned u(int64_t n) { return static_cast<unsigned>(n); }

// ---- router

constexpr int kRouterRows = 64, kRouterOuts = 128;  // of a block; two blocks a multiprocessor overlap better than one
constexpr int kRouterDepth = 32, kRouterQuads = kRouterDepth / 4;  // of a step, and float4 of a row in it
constexpr int kRouterRuns = 2;                                     // of 16 rows and of 16 outputs a wave multiplies
constexpr int kRouterAcross = kRouterOuts / (16 * kRouterRuns);    // waves beside each other
constexpr int kRouterThreads = kRouterRows / (16 * kRouterRuns) * kRouterAcross * gpu::kWave;

// A step of a block's rows or outputs as pairs of f16, whose sum is the f32 value to 2^-22: the high and the low one,
// each [row][octet of the depth, turned]. Values are scaled so that low ones are no denormals where it matters.
template <int Rows>
struct RouterSide {
  static constexpr int kOctets = kRouterDepth / 8;
  uint4 high[Rows * kOctets], low[Rows * kOctets];

  static __device__ inline int at(int row, int octet) { return row * kOctets + gpu::flash_piece(octet, row, kOctets); }

  __device__ inline void put(int row, int quad, const float4& v, float scale) {
    const int place = at(row, quad / 2) * 2 + quad % 2;
    uint2 h, l;
    h.x = split(v.x * scale, v.y * scale, &l.x);
    h.y = split(v.z * scale, v.w * scale, &l.y);
    reinterpret_cast<uint2*>(high)[place] = h;
    reinterpret_cast<uint2*>(low)[place] = l;
  }

 private:
  static __device__ inline uint32_t split(float a, float b, uint32_t* low) {
    const uint32_t h = gpu::F16::pack(a, b);
    *low = gpu::F16::pack(a - gpu::half_to_float(static_cast<uint16_t>(h & 0xffffu)),
                          b - gpu::half_to_float(static_cast<uint16_t>(h >> 16)));
    return h;
  }
};
struct RouterStage {
  RouterSide<kRouterRows> h;
  RouterSide<kRouterOuts> w;
};
constexpr size_t kRouterBytes = 2 * sizeof(RouterStage);
// Rows are held up to 4094 and weights up to 255, far beyond what a norm and a router give.
constexpr float kRouterRowScale = 16.0f, kRouterWeightScale = 256.0f;

// logits [kRouterParts, rows, n_out], to be added: h [rows, n_in] * w [n_out, n_in], all f32; n_in a multiple of 4. A
// block makes 64 rows by 128 outputs of one part of the depth, a wave 32 by 32: three products of f16 with sums in f32,
// low times low is left out.  grid (outputs, rows, parts)
__global__ void __launch_bounds__(kRouterThreads, 2)
    router_kernel(const float* __restrict__ w, const float* __restrict__ h, int rows, int n_in, int n_out,
                  float* logits) {
  DFLASH_STAGES(memory, kRouterBytes);
  RouterStage* const stages = reinterpret_cast<RouterStage*>(memory);
  gpu::wait_for_previous();
  const int t = static_cast<int>(threadIdx.x);
  const int row0 = static_cast<int>(blockIdx.y) * kRouterRows, out0 = static_cast<int>(blockIdx.x) * kRouterOuts;
  const int steps = (n_in + kRouterDepth - 1) / kRouterDepth;
  const int depth = (steps + kRouterParts - 1) / kRouterParts * kRouterDepth;
  const int begin = static_cast<int>(blockIdx.z) * depth, end = min(n_in, begin + depth);
  float4 hv[kRouterRows * kRouterQuads / kRouterThreads], wv[kRouterOuts * kRouterQuads / kRouterThreads];
  auto load = [&](const float* from, int first, int count, int k0, auto& v) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(v) / sizeof(float4)); ++i) {
      const int at = t + i * kRouterThreads, row = first + at / kRouterQuads, k = k0 + at % kRouterQuads * 4;
      v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < count && k < end) v[i] = *reinterpret_cast<const float4*>(from + static_cast<int64_t>(row) * n_in + k);
    }
  };
  auto store = [&](auto& side, const auto& v, float scale) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(v) / sizeof(float4)); ++i) {
      const int at = t + i * kRouterThreads;
      side.put(at / kRouterQuads, at % kRouterQuads, v[i], scale);
    }
  };
  const int rows_at = gpu::wave() / kRouterAcross * kRouterRuns * 16;
  const int outs_at = gpu::wave() % kRouterAcross * kRouterRuns * 16;
  float acc[kRouterRuns][kRouterRuns][8] = {};
  load(h, row0, rows, begin, hv);
  load(w, out0, n_out, begin, wv);
  for (int k0 = begin, now = 0; k0 < end; k0 += kRouterDepth, now ^= 1) {
    RouterStage& stage = stages[now];
    store(stage.h, hv, kRouterRowScale);
    store(stage.w, wv, kRouterWeightScale);
    __syncthreads();
    if (k0 + kRouterDepth < end) {
      load(h, row0, rows, k0 + kRouterDepth, hv);
      load(w, out0, n_out, k0 + kRouterDepth, wv);
    }
    gpu::FlashOperand high[kRouterRuns], low[kRouterRuns];
#pragma unroll
    for (int r = 0; r < kRouterRuns; ++r) {
      auto at = [&](int row, int octet) { return stage.h.at(rows_at + r * 16 + row, octet); };
      high[r] = gpu::flash_queries([&](int row, int octet) { return stage.h.high[at(row, octet)]; });
      low[r] = gpu::flash_queries([&](int row, int octet) { return stage.h.low[at(row, octet)]; });
    }
#pragma unroll
    for (int o = 0; o < kRouterRuns; ++o) {
      auto at = [&](int row, int octet) { return stage.w.at(outs_at + o * 16 + row, octet); };
      const gpu::FlashOperand whigh =
          gpu::flash_others([&](int row, int octet) { return stage.w.high[at(row, octet)]; });
      const gpu::FlashOperand wlow = gpu::flash_others([&](int row, int octet) { return stage.w.low[at(row, octet)]; });
#pragma unroll
      for (int d = 0; d < 2; ++d) {
#pragma unroll
        for (int r = 0; r < kRouterRuns; ++r) gpu::flash_mma(acc[r][o], low[r].k[d], whigh.k[d]);
#pragma unroll
        for (int r = 0; r < kRouterRuns; ++r) gpu::flash_mma(acc[r][o], high[r].k[d], wlow.k[d]);
#pragma unroll
        for (int r = 0; r < kRouterRuns; ++r) gpu::flash_mma(acc[r][o], high[r].k[d], whigh.k[d]);
      }
    }
  }
  float* part = logits + static_cast<int64_t>(blockIdx.z) * rows * n_out;
#pragma unroll
  for (int r = 0; r < kRouterRuns; ++r) {
#pragma unroll
    for (int o = 0; o < kRouterRuns; ++o) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = row0 + rows_at + r * 16 + gpu::flash_query(gpu::flash_row(i));
        const int out = out0 + outs_at + o * 16 + gpu::flash_other(i);
        if (row < rows && out < n_out) {
          part[static_cast<int64_t>(row) * n_out + out] =
              acc[r][o][i] * (1.0f / (kRouterRowScale * kRouterWeightScale));
        }
      }
    }
  }
}

// ---- experts

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
  PairRows y;

  __device__ inline TileView<F> tile(int slot) const {
    return {down, item.expert, min(block * kManyTiles + slot, down.tiles - 1)};
  }
  __device__ inline int64_t row(int token) const { return pairs[token]; }
  __device__ inline int half(int run) const { return half_in_order(run); }
  template <int Blocks>
  __device__ inline void finish(const ManySums<Blocks>& sums, float* out) const {
    write_pair_rows(sums, block * kManyTiles, tokens, [&](int token) { return row(token); }, y, out);
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
void launch_experts(gpu::Stream s, void (*kernel)(Job, HalfRows, int), Job job, const Routing& r, int across,
                    int groups, HalfRows x) {
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
  int parts = 1;
  if (router.n_in % 4 == 0) {
    parts = kRouterParts;
    const dim3 grid(u((router.n_out + kRouterOuts - 1) / kRouterOuts), u((r.rows + kRouterRows - 1) / kRouterRows),
                    kRouterParts);
    gpu::launch_stages(s, grid, kRouterThreads, kRouterBytes, router_kernel, static_cast<const float*>(router.data), h,
                       r.rows, static_cast<int>(router.n_in), static_cast<int>(router.n_out), logits);
  } else {
    launch_float_matmul(s, router, h, r.rows, logits, false);
  }
  launch_choose(s, m, logits, parts, r);
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

void launch_down_many(gpu::Stream s, DType type, const TiledWeight& down, HalfRows act, const Routing& r,
                      const PairRows& y, float* x) {
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
