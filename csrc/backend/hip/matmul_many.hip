// Matrix times many rows on matrix instructions: a block makes 4 weight tiles (128 outputs) by 64 tokens. Waves are laid
// 4 x 2 over it, a wave making one weight tile by 32 tokens; weights and activations come through two alternating
// stages of shared memory. Used for prefill, dense and by expert (pairs sorted, an item is up to 64 pairs of one expert).
//
// The order of summation is layout.h's, so a row gets the same bits here as in the kernels for few rows.

#include "backend/hip/kernels.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

constexpr int kBlockTiles = 4;
constexpr int kBlockTokens = kManyTokens;
constexpr int kWaveTokens = 32;
constexpr int kTokenBlocks = kWaveTokens / gpu::kMmaTokens;
constexpr int kActPlane = kBlockTokens * 16 + 16;  // one chunk of all tokens; padded to spread the writes over banks

template <typename F>
struct Stage {
  static constexpr int kGroups = F::kQuantBytes == 512 ? 4 : 2;  // groups of 32 a stage
  alignas(16) uint8_t weights[kBlockTiles][kGroups][F::kQuantBytes];
  alignas(16) uint8_t acts[kGroups][2][kActPlane];
  alignas(16) uint16_t weight_scales[kBlockTiles][kGroups][kTile * F::kHalves];
  GroupScale act_scales[kGroups][kBlockTokens];
};

// What a thread carries from global to shared memory, stage after stage: where it reads and what it holds.
template <typename F>
struct Carrier {
  static constexpr int kGroups = Stage<F>::kGroups;
  static constexpr int kPerGroup = F::kQuantBytes / 16;  // vectors of 16 bytes
  static constexpr int kWeightVectors = kBlockTiles * kGroups * kPerGroup / kThreads;
  static constexpr int kActVectors = kBlockTokens * kGroups * 2 / kThreads;
  static constexpr int kScalesPerGroup = kTile * F::kHalves / 2;  // words of 4 bytes
  static constexpr int kScaleWords = kBlockTiles * kGroups * kScalesPerGroup;
  static constexpr int kScalesPerThread = (kScaleWords + kThreads - 1) / kThreads;
  const uint8_t* weight_at[kWeightVectors];
  const uint8_t* act_at[kActVectors];
  const uint16_t* scale_at[kScalesPerThread];
  const GroupScale* act_scale_at;
  uint4 weights[kWeightVectors];
  uint4 acts[kActVectors];
  uint32_t weight_scales[kScalesPerThread];
  GroupScale act_scale;

  // view_of(0..3): the block's weight tiles; row_of(0..63): its rows of x.
  template <typename ViewOf, typename RowOf>
  __device__ inline Carrier(ViewOf view_of, const QuantRows& x, RowOf row_of) {
    const int t = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i) {
      const int v = t + i * kThreads;
      weight_at[i] = view_of(v / (kPerGroup * kGroups)).quants + v % (kPerGroup * kGroups) * 16;
    }
#pragma unroll
    for (int i = 0; i < kActVectors; ++i) {
      const int v = t + i * kThreads;
      act_at[i] = reinterpret_cast<const uint8_t*>(x.q) + row_of(v / (2 * kGroups)) * x.n + v % (2 * kGroups) * 16;
    }
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int v = min(t + i * kThreads, kScaleWords - 1);
      scale_at[i] = view_of(v / (kScalesPerGroup * kGroups)).scales + v % (kScalesPerGroup * kGroups) * 2;
    }
    act_scale_at = x.scale + row_of(min(t / kGroups, kBlockTokens - 1)) * (x.n / 32) + t % kGroups;
  }

  __device__ inline void load(int g0, int groups) {
    const int t = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i) {
      const int g = (t + i * kThreads) / kPerGroup % kGroups;
      weights[i] = make_uint4(0, 0, 0, 0);
      if (g0 + g < groups) {
        weights[i] = *reinterpret_cast<const uint4*>(weight_at[i] + static_cast<int64_t>(g0) * F::kQuantBytes);
      }
    }
#pragma unroll
    for (int i = 0; i < kActVectors; ++i) {
      const int g = (t + i * kThreads) % (2 * kGroups) / 2;
      acts[i] = make_uint4(0, 0, 0, 0);
      if (g0 + g < groups) acts[i] = *reinterpret_cast<const uint4*>(act_at[i] + g0 * 32);
    }
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int g = min(t + i * kThreads, kScaleWords - 1) / kScalesPerGroup % kGroups;
      weight_scales[i] = 0;
      if (g0 + g < groups) {
        weight_scales[i] = *reinterpret_cast<const uint32_t*>(scale_at[i] + g0 * (kTile * F::kHalves));
      }
    }
    act_scale = {0.0f, 0};
    if (g0 + t % kGroups < groups) act_scale = act_scale_at[g0];
  }

  __device__ inline void store(Stage<F>& s) const {
    const int t = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i) {
      reinterpret_cast<uint4*>(&s.weights[0][0][0])[t + i * kThreads] = weights[i];
    }
#pragma unroll
    for (int i = 0; i < kActVectors; ++i) {
      const int v = t + i * kThreads;
      const int token = v / (2 * kGroups), chunk = v % (2 * kGroups);
      *reinterpret_cast<uint4*>(&s.acts[chunk / 2][chunk % 2][token * 16]) = acts[i];
    }
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int v = t + i * kThreads;
      if (v < kScaleWords) reinterpret_cast<uint32_t*>(&s.weight_scales[0][0][0])[v] = weight_scales[i];
    }
    const int token = t / kGroups, g = t % kGroups;
    if (token < kBlockTokens) s.act_scales[g][token] = act_scale;
  }
};

// A wave's results: [half of the tile][token block][lane's part].
struct WaveSums {
  float v[2][kTokenBlocks][gpu::kMmaAcc];
};

template <typename F>
__device__ inline void multiply_group(const Stage<F>& s, int g, int tile, int token0, int count, WaveSums& run) {
  gpu::MmaWeights w[2];
  float d[2][gpu::kMmaRows], m[2][gpu::kMmaRows];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    w[h] = F::mma_load(s.weights[tile][g], h);
#pragma unroll
    for (int i = 0; i < gpu::kMmaRows; ++i) {
      const uint16_t* scale = s.weight_scales[tile][g] + (h * 16 + gpu::mma_row(i)) * F::kHalves;
      d[h][i] = gpu::half_to_float(scale[0]);
      if (F::kHalves == 2) m[h][i] = gpu::half_to_float(scale[1]);
    }
  }
#pragma unroll
  for (int b = 0; b < kTokenBlocks; ++b) {
    const int first = token0 + b * gpu::kMmaTokens;
    if (first >= count) break;
    const gpu::MmaActs a =
        gpu::mma_load_acts(&s.acts[g][0][(first + gpu::mma_act_token()) * 16], kActPlane);
    GroupScale x[gpu::kMmaToks];
#pragma unroll
    for (int j = 0; j < gpu::kMmaToks; ++j) x[j] = s.act_scales[g][first + gpu::mma_token(j)];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int c[gpu::kMmaAcc];
#pragma unroll
      for (int i = 0; i < gpu::kMmaAcc; ++i) c[i] = gpu::kMmaZero + F::start(x[i % gpu::kMmaToks].sum);
      gpu::mma(c, w[h], a);
#pragma unroll
      for (int i = 0; i < gpu::kMmaAcc; ++i) {
        const int row = i / gpu::kMmaToks, token = i % gpu::kMmaToks;
        float v = fmaf(gpu::mma_value(c[i]), d[h][row] * x[token].d, run.v[h][b][i]);
        if (F::kHalves == 2) v = fmaf(static_cast<float>(x[token].sum), m[h][row] * x[token].d, v);
        run.v[h][b][i] = v;
      }
    }
  }
}

// sum = the block's product for its first count tokens; a wave holds weight tile wave % 4, tokens (wave / 4) * 32 ...
template <typename F, typename ViewOf, typename RowOf>
__device__ inline void multiply_block(ViewOf view_of, int groups, const QuantRows& x, RowOf row_of, int count,
                                      Stage<F> (&stages)[2], WaveSums& sum) {
  constexpr int kGroups = Stage<F>::kGroups;
  const int tile = gpu::wave() % kBlockTiles, token0 = gpu::wave() / kBlockTiles * kWaveTokens;
  const int per = segment_groups(groups);
  WaveSums run;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int b = 0; b < kTokenBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < gpu::kMmaAcc; ++i) {
        run.v[h][b][i] = 0.0f;
        sum.v[h][b][i] = kEmptySum;
      }
    }
  }
  Carrier<F> carrier(view_of, x, row_of);
  carrier.load(0, groups);
  int until_end = per;  // groups left in the running segment
  for (int g0 = 0, now = 0; g0 < groups; g0 += kGroups, now ^= 1) {
    carrier.store(stages[now]);
    __syncthreads();
    if (g0 + kGroups < groups) carrier.load(g0 + kGroups, groups);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g0 + g >= groups) break;
      multiply_group<F>(stages[now], g, tile, token0, count, run);
      if (--until_end == 0 || g0 + g == groups - 1) {
        until_end = per;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int b = 0; b < kTokenBlocks; ++b) {
#pragma unroll
            for (int i = 0; i < gpu::kMmaAcc; ++i) {
              sum.v[h][b][i] += run.v[h][b][i];
              run.v[h][b][i] = 0.0f;
            }
          }
        }
      }
    }
  }
}

// f(token in the block, output in the wave's tile, value) for every result the lane holds.
template <typename Visit>
__device__ inline void visit(const WaveSums& sum, Visit f) {
  const int token0 = gpu::wave() / kBlockTiles * kWaveTokens;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int b = 0; b < kTokenBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < gpu::kMmaAcc; ++i) {
        f(token0 + b * gpu::kMmaTokens + gpu::mma_token(i % gpu::kMmaToks),
          h * 16 + gpu::mma_row(i / gpu::kMmaToks), sum.v[h][b][i]);
      }
    }
  }
}

// grid (tiles / 4, rows / 64)
template <typename F>
__global__ void __launch_bounds__(kThreads, gpu::kTileBlocks) matmul_many_kernel(TiledWeight w, QuantRows x, int rows, float* y,
                                                               bool add) {
  __shared__ Stage<F> stages[2];
  gpu::wait_for_previous();
  const int first_tile = static_cast<int>(blockIdx.x) * kBlockTiles;
  const int first_row = static_cast<int>(blockIdx.y) * kBlockTokens;
  const int count = min(kBlockTokens, rows - first_row);
  WaveSums sum;
  multiply_block<F>([&](int i) { return TileView<F>(w, 0, min(first_tile + i, w.tiles - 1)); }, w.groups, x,
                    [&](int t) { return static_cast<int64_t>(first_row + min(t, count - 1)); }, count, stages, sum);
  const int64_t n0 = static_cast<int64_t>(first_tile + gpu::wave() % kBlockTiles) * kTile;
  visit(sum, [&](int token, int column, float v) {
    if (token >= count || n0 + column >= w.n_out) return;
    float* p = y + (first_row + token) * w.n_out + n0 + column;
    *p = add ? *p + v : v;
  });
}

// grid (n_ff / 64, max_items): two gate tiles and the two up tiles beside them.
template <typename F>
__global__ void __launch_bounds__(kThreads, gpu::kTileBlocks) gate_up_many_kernel(TiledWeight gate, TiledWeight up, QuantRows x,
                                                                Routing r, MutableQuantRows act) {
  using Results = float[2][2][kBlockTokens][kTile];  // gate | up, tile, token, output
  __shared__ union Shared {
    Stage<F> stages[2];
    Results results;
    __device__ Shared() {}
  } shared;
  gpu::wait_for_previous();
  const Item item = r.items[blockIdx.y];
  if (item.count == 0) return;
  const int* pairs = r.pairs + item.first;
  const int tile = static_cast<int>(blockIdx.x) * 2;
  auto view_of = [&](int i) {
    return TileView<F>(i < 2 ? gate : up, item.expert, min(tile + i % 2, gate.tiles - 1));
  };
  WaveSums sum;
  multiply_block<F>(view_of, gate.groups, x,
                    [&](int t) { return static_cast<int64_t>(pairs[min(t, item.count - 1)] / r.top_k); },
                    item.count, shared.stages, sum);
  __syncthreads();
  const int mine = gpu::wave() % kBlockTiles;
  visit(sum, [&](int token, int column, float v) { shared.results[mine / 2][mine % 2][token][column] = v; });
  __syncthreads();
  for (int i = gpu::wave(); i < 2 * item.count; i += kSegments) {
    const int token = i / 2, t = i % 2;
    if (tile + t >= gate.tiles) continue;
    const float g = shared.results[0][t][token][gpu::lane()];
    const float u = shared.results[1][t][token][gpu::lane()];
    const int64_t group = static_cast<int64_t>(pairs[token]) * gate.tiles + tile + t;
    quantize_group(swiglu(g, u), act.q + group * 32, act.scale + group);
  }
}

// grid (tiles / 4, max_items): y[pair]
template <typename F>
__global__ void __launch_bounds__(kThreads, gpu::kTileBlocks) down_many_kernel(TiledWeight down, QuantRows act, Routing r, float* y) {
  __shared__ Stage<F> stages[2];
  gpu::wait_for_previous();
  const Item item = r.items[blockIdx.y];
  if (item.count == 0) return;
  const int* pairs = r.pairs + item.first;
  const int first_tile = static_cast<int>(blockIdx.x) * kBlockTiles;
  WaveSums sum;
  multiply_block<F>([&](int i) { return TileView<F>(down, item.expert, min(first_tile + i, down.tiles - 1)); },
                    down.groups, act,
                    [&](int t) { return static_cast<int64_t>(pairs[min(t, item.count - 1)]); }, item.count, stages, sum);
  const int64_t n0 = static_cast<int64_t>(first_tile + gpu::wave() % kBlockTiles) * kTile;
  visit(sum, [&](int token, int column, float v) {
    if (token < item.count && n0 + column < down.n_out) y[pairs[token] * down.n_out + n0 + column] = v;
  });
}

unsigned u(int64_t n) { return static_cast<unsigned>(n); }

}  // namespace

void launch_matmul_many(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, QuantRows x, int rows, bool add) {
  with_format(type, [&](auto format) {
    using F = decltype(format);
    for (int i = 0; i < n_outs; ++i) {
      const dim3 grid(u((outs[i].w.tiles + kBlockTiles - 1) / kBlockTiles), u((rows + kBlockTokens - 1) / kBlockTokens));
      gpu::launch(s, grid, kThreads, matmul_many_kernel<F>, outs[i].w, x, rows, outs[i].y, add);
    }
  });
}

void launch_gate_up_many(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, QuantRows x,
                         const Routing& r, MutableQuantRows act) {
  with_format(type, [&](auto format) {
    gpu::launch(s, dim3(u((gate.tiles + 1) / 2), u(r.max_items)), kThreads, gate_up_many_kernel<decltype(format)>, gate,
                up, x, r, act);
  });
}

void launch_down_many(gpu::Stream s, DType type, const TiledWeight& down, QuantRows act, const Routing& r, float* y) {
  with_format(type, [&](auto format) {
    gpu::launch(s, dim3(u((down.tiles + kBlockTiles - 1) / kBlockTiles), u(r.max_items)), kThreads,
                down_many_kernel<decltype(format)>, down, act, r, y);
  });
}

}  // namespace dflash::hip
