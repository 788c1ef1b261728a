// Dense matrix times 2..8 rows on NVIDIA, sixteen waves to a tile (half_tiles.h): a block a multiprocessor takes tile
// after tile.

#include <algorithm>

#include "backend/hip/half_tiles.h"

namespace dflash::hip {

namespace {

template <typename F>
struct TileCursor {
  const OutList& list;
  int at, step;

  __device__ inline bool next(HalfTask* task) {
    if (at >= list.tiles) return false;
    int o = 0;
    while (at >= list.first_tile[o + 1]) ++o;
    const TiledWeight& w = list.out[o].w;
    *task = HalfTask::of<F>(w, at - list.first_tile[o], gpu::wave() / kSegments,
                            segment_span(gpu::wave() % kSegments, w.groups));
    at += step;
    return true;
  }
};

template <typename F>
__global__ void __launch_bounds__(kHalfThreads, 1) matmul_half_kernel(OutList list, QuantRows x, int rows, bool add) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<kHalfRows> sums[2];  // taken in turn
  const int wave = gpu::wave(), segment = wave % kSegments, half = wave / kSegments;
  const int groups = list.out[0].w.groups;
  const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  const Span span = segment_span(segment, groups);
  HalfStream<F, TileCursor<F>> stream(lds + wave * HalfSlot<F>::kRing, TileCursor<F>{list, first, step});
  stream.start();
  gpu::wait_for_previous();
  ActRows acts = stage_rows(lds + kHalfWaves * HalfSlot<F>::kRing, x, rows);
  acts.q += span.g0 * 32;
  acts.scale += span.g0;
  __syncthreads();
  int turn = 0;
#pragma unroll 1
  for (int tile = first; tile < list.tiles; tile += step, ++turn) {
    int o = 0;
    while (tile >= list.first_tile[o + 1]) ++o;
    const TiledOut& out = list.out[o];
    const int64_t n = static_cast<int64_t>(tile - list.first_tile[o]) * kTile + gpu::lane();
    const int row = (wave + turn * kSegments) % kHalfWaves;  // which the wave adds up
    const bool stores = row < rows && n < out.w.n_out;
    float before = 0.0f;  // what is added to, read while the products are made
    if (add && stores) before = out.y[row * out.w.n_out + n];
    HalfSums acc;
    stream.multiply(span.g1 - span.g0, acts, rows, [](int g) { return g; }, acc);
    store_half(acc, half, rows, sums[turn % 2][segment]);
    __syncthreads();
    if (!stores) continue;
    const float v = add_segments<kHalfRows>(sums[turn % 2], segment_count(groups), row, gpu::lane());
    out.y[row * out.w.n_out + n] = add ? before + v : v;
  }
}

template <typename F>
size_t shared_bytes(int rows, int groups) {
  return static_cast<size_t>(kHalfWaves * HalfSlot<F>::kRing + staged_bytes(rows, groups));
}

constexpr size_t kDeclared = 2 * sizeof(Partial<kHalfRows>) + 256;

}  // namespace

bool launch_matmul_half([[maybe_unused]] gpu::Stream s, DType type, const OutList& list,
                        [[maybe_unused]] const QuantRows& x, int rows, [[maybe_unused]] bool add) {
  if (!gpu::kStaged || rows < 2 || rows > kHalfRows) return false;
  bool fits = false;
  with_format(type, [&](auto format) {
    using F = decltype(format);
    const size_t shared = shared_bytes<F>(rows, list.out[0].w.groups);
    fits = shared + kDeclared <= gpu::kSharedMost;
    if constexpr (gpu::kStaged) {
      if (!fits) return;
      const dim3 grid(static_cast<unsigned>(std::min(list.tiles, gpu::compute_units())));
      gpu::launch_shared(s, grid, kHalfThreads, shared, matmul_half_kernel<F>, list, x, rows, add);
    }
  });
  return fits;
}

}  // namespace dflash::hip
