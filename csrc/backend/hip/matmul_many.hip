// Dense matrix times more than 16 rows, and the norm that makes its 16-bit rows.

#include <cstdint>

#include "backend/hip/many_rows.h"

namespace dflash::hip {

namespace {

unsigned u(int64_t n) { return static_cast<unsigned>(n); }

struct OutList {
  TiledOut out[kMaxOuts];
  int first_block[kMaxOuts + 1];  // blocks of the outputs before
};

// grid (blocks of kManyTiles weight tiles of any output, rows / tokens)
template <typename F, typename N>
__global__ void __launch_bounds__(kManyThreads, gpu::kHalfBlocks)
    matmul_many_kernel(OutList list, HalfRows x, int rows, int tokens, bool add) {
  DFLASH_STAGES(stages, StageOf<F>::kAll);
  gpu::wait_for_previous();
  int o = 0;
  while (static_cast<int>(blockIdx.x) >= list.first_block[o + 1]) ++o;
  const TiledOut& out = list.out[o];
  const int first_tile = (static_cast<int>(blockIdx.x) - list.first_block[o]) * kManyTiles + gpu::wave() * kWaveTiles;
  const int first_row = static_cast<int>(blockIdx.y) * tokens;
  const int count = min(tokens, rows - first_row);
  const TileView<F> tiles[kWaveTiles] = {TileView<F>(out.w, 0, min(first_tile, out.w.tiles - 1)),
                                         TileView<F>(out.w, 0, min(first_tile + 1, out.w.tiles - 1))};
  ManySums sum;
  multiply_many<F, N>(
      tiles, out.w.groups, x, [&](int t) { return static_cast<int64_t>(first_row + t); }, count, stages, sum);
  sum.visit([&](int tile, int column, int token, float v) {
    const int64_t n = static_cast<int64_t>(first_tile + tile) * kTile + column;
    if (token >= count || n >= out.w.n_out) return;
    float* p = out.y + (first_row + token) * out.w.n_out + n;
    *p = add ? *p + v : v;
  });
}

// ---- norm
// ---------------------------------------------------------------------------------------------------------------

constexpr int kNormThreads = 256;

// A block per row; n a multiple of 32. norm null: the row as it is.
template <typename N>
__global__ void __launch_bounds__(kNormThreads)
    norm_half_kernel(const float* __restrict__ x, const float* __restrict__ norm, float eps, int n, float* y,
                     uint16_t* out) {
  __shared__ float lds[kNormThreads / gpu::kWave];
  gpu::wait_for_previous();
  const int64_t row = blockIdx.x;
  const float* xr = x + row * n;
  float inverse = 1.0f;
  if (norm != nullptr) {
    float squares = 0.0f;
    for (int i = static_cast<int>(threadIdx.x) * 4; i < n; i += kNormThreads * 4) {
      const float4 v = *reinterpret_cast<const float4*>(xr + i);
      squares = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, squares))));
    }
    squares = gpu::wave_sum(squares);
    if (gpu::lane() == 0) lds[gpu::wave()] = squares;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < kNormThreads / gpu::kWave; ++i) sum += lds[i];
    inverse = 1.0f / sqrtf(sum / static_cast<float>(n) + eps);
  }
  for (int i = static_cast<int>(threadIdx.x) * 4; i < n; i += kNormThreads * 4) {
    float4 v = *reinterpret_cast<const float4*>(xr + i);
    if (norm != nullptr) {
      const float4 w = *reinterpret_cast<const float4*>(norm + i);
      v = make_float4((v.x * inverse) * w.x, (v.y * inverse) * w.y, (v.z * inverse) * w.z, (v.w * inverse) * w.w);
    }
    if (y != nullptr) *reinterpret_cast<float4*>(y + row * n + i) = v;
    // Elements 0 and 2 of a word's four are neighbours, and 1 and 3.
    uint16_t* group = out + row * n + (i & ~31);
    *reinterpret_cast<uint32_t*>(group + gpu::half_slot(i & 31)) = N::pack(v.x, v.z);
    *reinterpret_cast<uint32_t*>(group + gpu::half_slot((i & 31) + 1)) = N::pack(v.y, v.w);
  }
}

// Rows of a block: those that leave the machine least idle in the last round of blocks. A block costs its rows and, for
// expanding the weights, about as much as 16 more.
int tokens_of_block(int blocks_across, int rows) {
  int units = 0;
  GPU_CHECK(DeviceGetAttribute(&units, gpu::kComputeUnits, 0));  // the backend's device
  int best = kManyTokens;
  int64_t least = INT64_MAX;
  for (int tokens = kManyTokens; tokens >= kManyTokens / 2; tokens -= kManyTokens / 4) {
    const int64_t blocks = static_cast<int64_t>(blocks_across) * ((rows + tokens - 1) / tokens);
    const int64_t slots = static_cast<int64_t>(units) * gpu::kHalfBlocks;
    const int64_t cost = (blocks + slots - 1) / slots * (tokens + 16);
    if (cost < least) {
      least = cost;
      best = tokens;
    }
  }
  return best;
}

}  // namespace

void launch_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, HalfRows x, int rows, bool add) {
  OutList list = {};
  for (int i = 0; i < n_outs; ++i) {
    list.out[i] = outs[i];
    list.first_block[i + 1] = list.first_block[i] + (outs[i].w.tiles + kManyTiles - 1) / kManyTiles;
  }
  const int tokens = tokens_of_block(list.first_block[n_outs], rows);
  const dim3 grid(u(list.first_block[n_outs]), u((rows + tokens - 1) / tokens));
  with_format(type, [&](auto format) {
    using F = decltype(format);
    const auto kernel = x.f16 ? matmul_many_kernel<F, gpu::F16> : matmul_many_kernel<F, gpu::BF16>;
    gpu::launch_stages(s, grid, kManyThreads, StageOf<F>::kAll, kernel, list, x, rows, tokens, add);
  });
}

void launch_norm_half(gpu::Stream s, const float* x, const float* norm, float eps, int rows, float* y, HalfRows out) {
  const auto kernel = out.f16 ? norm_half_kernel<gpu::F16> : norm_half_kernel<gpu::BF16>;
  gpu::launch(s, dim3(u(rows)), kNormThreads, kernel, x, norm, eps, static_cast<int>(out.n), y, out.v);
}

}  // namespace dflash::hip
