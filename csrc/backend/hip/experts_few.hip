// The experts of 1..16 rows: every distinct expert's weights are read once.

#include "backend/hip/group_few.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

constexpr int kDownThreads = 2 * kThreads;  // two experts at a time
// slots of a wave's ring
template <typename F>
constexpr int kGateUpSlots = 12 / kChunk<F>;
constexpr int kDownSlots = 2;

// Rows of an expert whose activations travel with its weights; seldom more.
constexpr int act_rows(int max_rows) { return max_rows == 1 ? 0 : 4; }

// A unit of work is an item and a tile of n_ff: its 32 gate and up outputs are one int8 group of the next product's
// input. Each block takes every gridDim.x-th.
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads, gpu::few_blocks(MaxRows))
    gate_up_few_kernel(TiledWeight gate, TiledWeight up, QuantRows x, FewChoice choice, WaveMemory memory,
                       MutableQuantRows act) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<MaxRows> sums[2];
  __shared__ Grouping<MaxRows> g;
  const int wave = gpu::wave();
  const float bias0 = first_bias(choice);
  gpu::wait_then_release();  // launch_down_few reads the logits before it waits
  group_few(choice, bias0, reinterpret_cast<uint32_t*>(&sums[0][0][0][0]), g);
  if (blockIdx.x == 0 && threadIdx.x == 0 && choice.distinct != nullptr) atomicAdd(choice.distinct, g.items);
  const Span span = segment_span(wave, gate.groups);
  const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x), tiles = gate.tiles;
  struct Unit {
    int item, tile;
  };
  struct Cursor {
    const TiledWeight& gate;
    const TiledWeight& up;
    const Grouping<MaxRows>& g;
    Unit unit, step;  // step: that of a block from unit to unit
    int half, items;
    __device__ void stop() { items = 0; }
    __device__ bool more() const { return unit.item < items; }
    __device__ TileView<F> tile() const {
      return TileView<F>(half == 0 ? gate : up, gpu::uniform(g.expert[unit.item]), unit.tile);
    }
    __device__ int count() const { return g.count[unit.item]; }
    __device__ int row(int i) const { return g.rows[g.first[unit.item] + i]; }
    __device__ void next_unit() {
      unit.item += step.item;
      unit.tile += step.tile;
      if (unit.tile >= gate.tiles) {
        unit.tile -= gate.tiles;
        ++unit.item;
      }
    }
    __device__ void advance() {
      if (half == 1) next_unit();
      half ^= 1;
    }
  };
  Cursor now = {gate, up, g, {first / tiles, first % tiles}, {step / tiles, step % tiles}, 0, g.items};
  WeightStream<F, kGateUpSlots<F>, act_rows(MaxRows), Cursor> stream(memory.ring(lds, wave), span, now);
  stream.start();
  stream.start_acts(x);
  InputRows all = {x.q + span.g0 * 32, x.scale + span.g0, gate.groups * 32, gate.groups};
  if constexpr (gpu::kStaged && MaxRows == 1) {  // the same row for all experts
    all = stage_acts(memory.act_rows(lds, wave), x, span, [](int) { return 0; }, 1, 1);
  }
  auto row_of = [&](int i) { return now.row(i); };
#pragma unroll 1
  for (; now.more(); now.next_unit()) {
    const int count = now.count();
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if constexpr (!gpu::kStaged) {
        tile_segment<F, MaxRows, false>(stream, all, row_of, count, sums[half][wave]);
      } else if constexpr (MaxRows == 1) {
        tile_segment<F, 1, false>(stream, all, [](int) { return 0; }, 1, sums[half][wave]);
      } else if (count <= act_rows(MaxRows)) {
        tile_segment<F, act_rows(MaxRows), true>(stream, all, row_of, count, sums[half][wave]);
      } else {
        tile_segment<F, MaxRows, false>(stream, all, row_of, count, sums[half][wave]);
      }
    }
    __syncthreads();
    const int segments = segment_count(gate.groups);
    for (int i = wave; i < count; i += kSegments) {
      const float v = add_segments<MaxRows>(sums[0], segments, i, gpu::lane());
      const float w = add_segments<MaxRows>(sums[1], segments, i, gpu::lane());
      const int64_t group = static_cast<int64_t>(g.pairs[g.first[now.unit.item] + i]) * tiles + now.unit.tile;
      quantize_group(swiglu(v, w), act.q + group * 32, act.scale + group);
    }
    __syncthreads();
  }
}

constexpr int down_buffers(int rows) { return rows == 1 ? 4 : rows <= 8 ? 2 : 1; }

// A block makes a tile of the rows' outputs from all experts, two experts at a time by eight waves each, and adds them
// up in each row's own order.
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kDownThreads, gpu::few_blocks(MaxRows) / 2)
    down_few_kernel(TiledWeight down, QuantRows act, FewChoice choice, WaveMemory memory, float* x) {
  DFLASH_DYNAMIC_SHARED(lds);
  constexpr int kBuffers = down_buffers(MaxRows);  // of sums, taken in turn
  __shared__ Partial<MaxRows> sums[kBuffers][2];
  __shared__ Grouping<MaxRows> g;
  const int wave = gpu::wave(), half = wave / kSegments, segment = wave % kSegments;
  const int tile = static_cast<int>(blockIdx.x);
  const Span span = segment_span(segment, down.groups);
  if constexpr (!gpu::kStaged) gpu::wait_for_previous();
  group_few(choice, first_bias(choice), reinterpret_cast<uint32_t*>(&sums[0][0][0][0][0]), g);
  struct Cursor {
    const TiledWeight& down;
    const Grouping<MaxRows>& g;
    int item, at, items;
    __device__ void stop() { items = 0; }
    __device__ bool more() const { return item < items; }
    __device__ TileView<F> tile() const { return TileView<F>(down, gpu::uniform(g.expert[item]), at); }
    __device__ int count() const { return g.count[item]; }
    __device__ int row(int i) const { return g.pairs[g.first[item] + i]; }
    __device__ void advance() { item += 2; }
  };
  WeightStream<F, kDownSlots, act_rows(MaxRows), Cursor> stream(memory.ring(lds, wave), span,
                                                                Cursor{down, g, half, tile, g.items});
  stream.start();
  // With one row the next kernel's weights may come at once; with more they are in the way of what is left of these.
  if constexpr (gpu::kStaged && MaxRows == 1) {
    gpu::wait_for_previous();
  } else if constexpr (gpu::kStaged) {
    gpu::wait_only();
  }
  stream.start_acts(act);
  const int64_t n = static_cast<int64_t>(tile) * kTile + gpu::lane();
  float before = 0.0f;  // what is added to, read while the products are made
  static_assert(kFewRows <= 2 * kSegments, "a row for each wave at most");
  if (wave < choice.rows && n < down.n_out) before = x[wave * down.n_out + n];
  weigh_few(choice, g);
  float* y = reinterpret_cast<float*>(memory.ring(lds, gpu::kStaged ? 2 * kSegments : 0));  // [pairs, 32]
  const int segments = segment_count(down.groups);
  InputRows all = {act.q + span.g0 * 32, act.scale + span.g0, down.groups * 32, down.groups};
  if constexpr (gpu::kStaged && MaxRows == 1) {  // a row for each expert: all at once
    const int most = (choice.top_k + 1) / 2;
    all = stage_acts(
        memory.act_rows(lds, wave), act, span, [&](int i) { return min(2 * i + half, g.items - 1); }, most, most);
  }
  if constexpr (gpu::kStaged && MaxRows > 1) gpu::release_next();
  int buffer = 0;
#pragma unroll 1
  for (int item0 = 0; item0 < g.items; item0 += 2) {
    const int item = item0 + half;
    if (item < g.items) {
      const int count = g.count[item];
      const int16_t* pairs = g.pairs + g.first[item];
      auto pair_of = [&](int i) { return static_cast<int>(pairs[i]); };
      auto out = sums[buffer][half][segment];
      if constexpr (!gpu::kStaged) {
        tile_segment<F, MaxRows, false>(stream, all, pair_of, count, out);
      } else if constexpr (MaxRows == 1) {
        tile_segment<F, 1, false>(stream, all, [&](int) { return item0 / 2; }, 1, out);
      } else if (count <= act_rows(MaxRows)) {
        tile_segment<F, act_rows(MaxRows), true>(stream, all, pair_of, count, out);
      } else {
        tile_segment<F, MaxRows, false>(stream, all, pair_of, count, out);
      }
    }
    // With one row a buffer for each of the usual eight experts: nobody waits in between.
    if (MaxRows > 1 || buffer == kBuffers - 1 || item0 + 2 >= g.items) {
      __syncthreads();
      if (MaxRows == 1) {
        for (int b = segment; b <= buffer; b += kSegments) {  // a wave an item
          const int done = item - 2 * (buffer - b);
          if (done >= g.items) continue;
          y[g.pairs[g.first[done]] * kTile + gpu::lane()] =
              add_segments<MaxRows>(sums[b][half], segments, 0, gpu::lane());
        }
      } else if (item < g.items) {
        for (int i = segment; i < g.count[item]; i += kSegments) {
          y[g.pairs[g.first[item] + i] * kTile + gpu::lane()] =
              add_segments<MaxRows>(sums[buffer][half], segments, i, gpu::lane());
        }
      }
      if (kBuffers == 1 || MaxRows == 1) __syncthreads();
    }
    buffer = buffer + 1 < kBuffers ? buffer + 1 : 0;
  }
  __syncthreads();
  if (n >= down.n_out || wave >= choice.rows) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int slot = 0; slot < choice.top_k; ++slot) {
    const int pair = wave * choice.top_k + slot;
    sum = fmaf(g.weight[pair], y[pair * kTile + gpu::lane()], sum);
  }
  x[wave * down.n_out + n] = before + sum;
}

// Calls f(MaxRows) with the smallest bound for which kernels are made.
template <typename F>
void with_rows(int rows, F&& f) {
  if (rows == 1) return f(std::integral_constant<int, 1>{});
  if (rows <= 4) return f(std::integral_constant<int, 4>{});
  if constexpr (gpu::kStaged) {
    if (rows <= 8) return f(std::integral_constant<int, 8>{});
  }
  f(std::integral_constant<int, kFewRows>{});
}

template <typename F, int MaxRows>
WaveMemory wave_memory(int slots, int acts, int groups) {
  WaveMemory m;
  if (!gpu::kStaged) return m;
  m.ring_bytes = slots * Slot<F, act_rows(MaxRows)>::kBytes;
  m.acts = MaxRows == 1 ? acts : 0;
  m.segment = segment_groups(groups);
  return m;
}

}  // namespace

bool experts_choose(int rows, DType type) { return rows <= kFewRows && is_quantized(type); }

void launch_gate_up_few(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, QuantRows x,
                        const FewChoice& c, MutableQuantRows act) {
  const int most = c.rows * c.top_k < c.n_expert ? c.rows * c.top_k : c.n_expert;  // items
  const int units = most * gate.tiles, resident = gpu::blocks_per_unit(c.rows) * gpu::compute_units();
  const dim3 grid(static_cast<unsigned>(units < resident ? units : resident));
  with_format(type, [&](auto format) {
    using F = decltype(format);
    with_rows(c.rows, [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      const WaveMemory memory = wave_memory<F, kRows>(kGateUpSlots<F>, 1, gate.groups);
      gpu::launch_shared(s, grid, kThreads, kSegments * static_cast<size_t>(memory.wave_bytes()),
                         gate_up_few_kernel<F, kRows>, gate, up, x, c, memory, act);
    });
  });
}

void launch_down_few(gpu::Stream s, DType type, const TiledWeight& down, QuantRows act, const FewChoice& c, float* x) {
  const dim3 grid(static_cast<unsigned>(down.tiles));
  with_format(type, [&](auto format) {
    using F = decltype(format);
    with_rows(c.rows, [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      const size_t y = static_cast<size_t>(c.rows) * static_cast<size_t>(c.top_k) * kTile * sizeof(float);
      const WaveMemory memory = wave_memory<F, kRows>(kDownSlots, (c.top_k + 1) / 2, down.groups);
      const size_t shared = 2 * kSegments * static_cast<size_t>(memory.wave_bytes()) + y;
      if (shared + 2 * down_buffers(kRows) * sizeof(Partial<kRows>) + sizeof(Grouping<kRows>) > gpu::kSharedMost) {
        fail("GPU: ", c.rows, " rows of ", c.top_k, " experts need too much shared memory");
      }
      gpu::launch_shared(s, grid, kDownThreads, shared, down_few_kernel<F, kRows>, down, act, c, memory, x);
    });
  });
}

}  // namespace dflash::hip
