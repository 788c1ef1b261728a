// Dense matrix times 3..8 rows on NVIDIA, sixteen waves to a tile (half_tiles.h): a block a multiprocessor takes tile
// after tile. Gate and up of a dense feed-forward likewise.

#include <algorithm>

#include "backend/hip/half_tiles.h"
#include "backend/hip/quantize.h"

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
__global__ void __launch_bounds__(kHalfThreads, 1)
    matmul_half_kernel(OutList list, QuantRows x, int rows, Divisor by_groups, bool add) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<kHalfRows> sums[2];  // taken in turn
  const int wave = gpu::wave(), segment = wave % kSegments, half = wave / kSegments;
  const int groups = list.out[0].w.groups;
  const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  const Span span = segment_span(segment, groups);
  HalfStream<F, TileCursor<F>> stream(lds + wave * HalfSlot<F>::kRing, TileCursor<F>{list, first, step});
  stream.start();
  gpu::wait_for_previous();
  ActRows acts = stage_rows(lds + kHalfWaves * HalfSlot<F>::kRing, x, rows, by_groups);
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
    const float v = add_segments<kHalfRows>(sums[turn % 2], list.segments, row, gpu::lane());
    out.y[row * out.w.n_out + n] = add ? before + v : v;
  }
}

template <typename F>
struct GateUpCursor {
  const TiledWeight& gate;
  const TiledWeight& up;
  int at, step, turn = 0;

  __device__ inline bool next(HalfTask* task) {
    if (at >= gate.tiles) return false;
    *task = HalfTask::of<F>(turn == 0 ? gate : up, at, gpu::wave() / kSegments,
                            segment_span(gpu::wave() % kSegments, gate.groups));
    at += turn * step;
    turn ^= 1;
    return true;
  }
};

// The 32 outputs of a tile are one int8 group of the next product's input.
template <typename F>
__global__ void __launch_bounds__(kHalfThreads, 1)
    gate_up_half_kernel(TiledWeight gate, TiledWeight up, QuantRows x, int rows, Divisor by_groups,
                        MutableQuantRows act) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<kHalfRows> sums[2][2];  // taken in turn; gate and up
  const int wave = gpu::wave(), segment = wave % kSegments, half = wave / kSegments;
  const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  const Span span = segment_span(segment, gate.groups);
  HalfStream<F, GateUpCursor<F>> stream(lds + wave * HalfSlot<F>::kRing, GateUpCursor<F>{gate, up, first, step});
  stream.start();
  gpu::wait_for_previous();
  ActRows acts = stage_rows(lds + kHalfWaves * HalfSlot<F>::kRing, x, rows, by_groups);
  acts.q += span.g0 * 32;
  acts.scale += span.g0;
  __syncthreads();
  const int segments = segment_count(gate.groups);
  int turn = 0;
#pragma unroll 1
  for (int tile = first; tile < gate.tiles; tile += step, ++turn) {
    Partial<kHalfRows>(&sum)[2] = sums[turn % 2];
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      HalfSums acc;
      stream.multiply(span.g1 - span.g0, acts, rows, [](int g) { return g; }, acc);
      store_half(acc, half, rows, sum[i][segment]);
    }
    __syncthreads();
    const int row = (wave + turn * kSegments) % kHalfWaves;  // which the wave adds up
    if (row >= rows) continue;
    const float g = add_segments<kHalfRows>(sum[0], segments, row, gpu::lane());
    const float u = add_segments<kHalfRows>(sum[1], segments, row, gpu::lane());
    const int64_t group = static_cast<int64_t>(row) * gate.tiles + tile;
    quantize_group(swiglu(g, u), act.q + group * 32, act.scale + group);
  }
}

template <typename F>
size_t shared_bytes(int rows, int groups) {
  return static_cast<size_t>(kHalfWaves * HalfSlot<F>::kRing + staged_bytes(rows, groups));
}

// Calls launch(format, shared memory) where it fits.
template <typename Launch>
bool where_it_fits(DType type, int rows, int groups, size_t declared, [[maybe_unused]] Launch launch) {
  if (!gpu::kStaged || rows <= 2 || rows > kHalfRows) return false;
  bool fits = false;
  with_format(type, [&](auto format) {
    const size_t shared = shared_bytes<decltype(format)>(rows, groups);
    fits = shared + declared <= gpu::kSharedMost;
    if constexpr (gpu::kStaged) {
      if (fits) launch(format, shared);
    }
  });
  return fits;
}

dim3 grid_of(int tiles) { return dim3(static_cast<unsigned>(std::min(tiles, gpu::compute_units()))); }

}  // namespace

bool launch_matmul_half(gpu::Stream s, DType type, const OutList& list, const QuantRows& x, int rows, bool add) {
  if (list.tiles > 2 * gpu::compute_units()) return false;  // long enough to hide latency with fewer waves
  return where_it_fits(
      type, rows, list.out[0].w.groups, 2 * sizeof(Partial<kHalfRows>), [&](auto format, size_t shared) {
        gpu::launch_shared(s, grid_of(list.tiles), kHalfThreads, shared, matmul_half_kernel<decltype(format)>, list, x,
                           rows, Divisor(list.out[0].w.groups), add);
      });
}

bool launch_gate_up_half(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, const QuantRows& x,
                         int rows, MutableQuantRows act) {
  return where_it_fits(type, rows, gate.groups, 4 * sizeof(Partial<kHalfRows>), [&](auto format, size_t shared) {
    gpu::launch_shared(s, grid_of(gate.tiles), kHalfThreads, shared, gate_up_half_kernel<decltype(format)>, gate, up, x,
                       rows, Divisor(gate.groups), act);
  });
}

}  // namespace dflash::hip
