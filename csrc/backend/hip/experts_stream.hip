// The experts of few rows in one launch. A block makes gate and up tiles first, down tiles after, and their weights
// pass through one ring without a pause: where a down tile's activations are not there yet, its weights are. An
// expert's down tiles wait for that expert's activations alone; experts are taken in order, so most need not wait.
//
// Blocks wait for each other, so all must be on the device at a time: launch_experts_stream launches no more than fit.

#include <algorithm>

#include "backend/hip/group_few.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

// What a block does: gate and up tiles blockIdx, blockIdx + gridDim, ... of all experts' (by expert); then down tiles.
// Blocks that have one gate and up tile less than others take as many down tiles as make up for it first, of experts
// whose gate and up tiles are made in the rounds that all blocks have.
class Work {
 public:
  struct Task {
    int item, tile;
  };

  __device__ Work(int items, int ff_tiles, int down_tiles, int ff_groups, int down_groups)
      : ff_tiles_(ff_tiles), down_tiles_(down_tiles) {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int units = items * ff_tiles, downs = items * down_tiles, rounds = units / blocks, more = units % blocks;
    const int made = rounds * blocks / ff_tiles;  // experts
    light_ = blocks - more;
    const int alike = (2 * ff_groups + down_groups / 2) / down_groups;  // down tiles as dear as one of gate and up
    const int early = more == 0 ? 0 : min(alike, made * down_tiles / light_);
    light_block_ = block - more;
    const bool light = light_block_ >= 0;
    gate_up_ = rounds + (light ? 0 : 1);
    early_end_ = gate_up_ + (light ? early : 0);
    late_first_ = early * light_ + (light ? light_block_ : light_ + block);
    count_ = early_end_ + (late_first_ < downs ? (downs - 1 - late_first_) / blocks + 1 : 0);
  }

  __device__ int gate_up() const { return gate_up_; }  // tasks: these, then down tiles
  __device__ int early_end() const { return early_end_; }
  __device__ int count() const { return count_; }
  __device__ Task task(int k) const {
    const int blocks = static_cast<int>(gridDim.x);
    if (k < gate_up_) return split(static_cast<int>(blockIdx.x) + k * blocks, ff_tiles_);
    return split(k < early_end_ ? light_block_ + (k - gate_up_) * light_ : late_first_ + (k - early_end_) * blocks,
                 down_tiles_);
  }

 private:
  static __device__ Task split(int at, int tiles) { return {at / tiles, at % tiles}; }

  int ff_tiles_, down_tiles_;
  int gate_up_, early_end_, count_;
  int light_block_, light_, late_first_;
};

struct ExpertTiles {
  TiledWeight gate, up, down;
};

// A wave's weights, task after task: its segment of the gate and the up tile, or of the down tile.
template <typename F, int Slots, typename Grouped>
class TaskStream {
 public:
  using Layout = Slot<F, 0>;

  __device__ TaskStream(uint8_t* lds, const ExpertTiles& w, const Grouped& g, const Work& work, Span in, Span ff)
      : lds_(lds), w_(w), g_(g), work_(work), in_(in), ff_(ff) {}

  __device__ inline void start() {
#pragma unroll
    for (int s = 0; s < Slots; ++s) {
      copy(lds_ + s * Layout::kBytes);
      gpu::copy_commit();
    }
  }

  // The groups that take() hands out: a tile's.
  __device__ void expect(int groups) { groups_ = groups; }

  // Calls use(quants, scales, first group within the segment, groups, slot) for the pieces of the next tile, in order.
  template <typename Use>
  __device__ inline void take(Use use) {
#pragma unroll 1
    for (int g = 0; g < groups_; g += kChunk<F>) {
      gpu::copy_wait<Slots - 1>();
      uint8_t* slot = lds_ + slot_;
      use(slot, reinterpret_cast<const uint16_t*>(slot + Layout::kScales), g, min(kChunk<F>, groups_ - g), slot);
      gpu::wave_sync();
      copy(slot);
      gpu::copy_commit();
      slot_ += Layout::kBytes;
      if (slot_ == Slots * Layout::kBytes) slot_ = 0;
    }
  }

 private:
  // Turns to the next tile with something in it for this wave.
  __device__ inline bool next_tile() {
    while (task_ < work_.count()) {
      const Work::Task t = work_.task(task_);
      const bool down = task_ >= work_.gate_up();
      const Span span = down ? ff_ : in_;
      const TileView<F> tile(down ? w_.down : half_ == 0 ? w_.gate : w_.up, g_.expert[t.item], t.tile);
      quants_ = tile.group_quants(span.g0) + gpu::lane() * 16;
      scales_ = reinterpret_cast<const uint8_t*>(tile.group_scales(span.g0)) + gpu::lane() * 16;
      left_ = span.g1 - span.g0;
      half_ ^= down ? 0 : 1;
      task_ += half_ == 0 ? 1 : 0;
      if (left_ > 0) return true;
    }
    return false;
  }

  __device__ inline void copy(uint8_t* slot) {
    if (left_ <= 0 && !next_tile()) return;
    constexpr int kPieces = F::kQuantBytes / (gpu::kWave * 16), kScaleBytes = kTile * F::kHalves * 2;
    const int scale_bytes = min(left_, kChunk<F>) * kScaleBytes - gpu::lane() * 16;
    slot += gpu::lane() * 16;
    if (left_ >= kChunk<F>) {
#pragma unroll
      for (int i = 0; i < kChunk<F> * kPieces; ++i) gpu::copy_begin<16>(slot + i * 512, quants_ + i * 512);
    } else {
#pragma unroll 1
      for (int i = 0; i < left_ * kPieces; ++i) gpu::copy_begin<16>(slot + i * 512, quants_ + i * 512);
    }
#pragma unroll
    for (int i = 0; i < kChunk<F> * kScaleBytes; i += 512) {
      if (scale_bytes > i) gpu::copy_begin<16>(slot + Layout::kScales + i, scales_ + i);
    }
    quants_ += kChunk<F> * F::kQuantBytes;
    scales_ += kChunk<F> * kScaleBytes;
    left_ -= kChunk<F>;
  }

  uint8_t* lds_;
  const ExpertTiles& w_;
  const Grouped& g_;
  const Work& work_;
  Span in_, ff_;
  int task_ = 0, half_ = 0;  // what comes next
  int groups_ = 0;
  int slot_ = 0;  // of the next piece to use, in bytes
  int left_ = 0;  // groups of the tile at hand that are not copied yet
  const uint8_t* quants_ = nullptr;
  const uint8_t* scales_ = nullptr;
};

template <typename F>
constexpr int kStreamSlots = 12 / kChunk<F>;
constexpr int kBatch = 4;                // down tiles at most that are made between two barriers
constexpr int kBatchRows = kStreamRows;  // rows of activations of these

// Rows of partial sums: gate and up of a tile, twice where there is room; a batch's rows are fewer.
constexpr int sum_buffers(int max_rows) { return max_rows <= 4 ? 2 : 1; }
constexpr int sum_rows(int max_rows) { return 2 * sum_buffers(max_rows) * max_rows; }

// Down tiles that are made together.
struct Batch {
  Work::Task task[kBatch];
  int first_row[kBatch + 1];  // of its activations
  int tiles;

  // By a wave: the tiles from task k on whose activations fit.
  template <typename Grouped>
  __device__ inline void fill(const Work& work, int k, const Grouped& g, int most_rows) {
    const int end = k < work.early_end() ? work.early_end() : work.count();  // those wait for others
    const bool there = gpu::lane() < kBatch && k + gpu::lane() < end;
    const Work::Task t = there ? work.task(k + gpu::lane()) : Work::Task{0, 0};
    const int count = there ? g.count[t.item] : most_rows + 1, before = gpu::wave_sum_before(count);
    const bool fits = before + count <= most_rows;
    const int n = gpu::wave_sum(fits ? 1 : 0);
    if (fits) {
      task[gpu::lane()] = t;
      first_row[gpu::lane()] = before;
    }
    if (gpu::lane() == n - 1) {
      first_row[n] = before + count;
      tiles = n;
    }
    gpu::wave_sync();
  }
  __device__ int tile_of(int row) const {
    int t = 0;
    while (row >= first_row[t + 1]) ++t;
    return t;
  }
};

// Rows pair_of(0) .. pair_of(count - 1) of the activations, the wave's segment alone, to its own shared memory at lds,
// as soon as they are posted.
template <typename PairOf>
__device__ inline ActRows await_acts(uint8_t* lds, const ExpertWords& words, int groups_of_all, Span span,
                                     PairOf pair_of, int count, uint32_t launch) {
  constexpr int kTogether = 4, kGroups = 8, kLoads = 3;  // words a lane has under way for each row
  const int groups = span.g1 - span.g0, lane = gpu::lane();
  uint32_t* const q = reinterpret_cast<uint32_t*>(lds);
  const int stride = act_stride(groups) / 4;
  uint32_t* const scale = q + count * stride;
  for (int r0 = 0; r0 < count; r0 += kTogether) {
    for (int g = 0; g < groups; g += kGroups) {
      const int n = min(groups - g, kGroups);
      const int64_t first = span.g0 + g;
      uint64_t v[kTogether][kLoads];
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int64_t group = static_cast<int64_t>(pair_of(min(r0 + j, count - 1))) * groups_of_all + first;
          const uint64_t *from_q = words.q + group * 8, *from_scale = words.scale + group * 2;
          if (lane < n * 8) v[j][0] = gpu::peek(from_q + lane);
          if (lane + 32 < n * 8) v[j][1] = gpu::peek(from_q + lane + 32);
          if (lane < n * 2) v[j][2] = gpu::peek(from_scale + lane);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          missing = missing || (lane < n * 8 && !gpu::posted(v[j][0], launch)) ||
                    (lane + 32 < n * 8 && !gpu::posted(v[j][1], launch)) ||
                    (lane < n * 2 && !gpu::posted(v[j][2], launch));
        }
      } while (missing);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int r = r0 + j;
        if (r >= count) break;
        if (lane < n * 8) q[r * stride + g * 8 + lane] = static_cast<uint32_t>(v[j][0]);
        if (lane + 32 < n * 8) q[r * stride + g * 8 + lane + 32] = static_cast<uint32_t>(v[j][1]);
        if (lane < n * 2) scale[(r * groups + g) * 2 + lane] = static_cast<uint32_t>(v[j][2]);
      }
    }
  }
  gpu::wave_sync();
  return {reinterpret_cast<const int8_t*>(q), reinterpret_cast<const GroupScale*>(scale), act_stride(groups), groups};
}

// A wave's values as an int8 group.
__device__ inline void post_group(float v, uint64_t* q, uint64_t* scale, uint32_t launch) {
  int i;
  const GroupScale s = quantize_lane(v, &i);
  const int lane = gpu::lane();
  uint32_t bytes = (static_cast<uint32_t>(i) & 255u) << (8 * (lane & 3));
  bytes |= gpu::shuffle_xor(bytes, 1);
  bytes |= gpu::shuffle_xor(bytes, 2);
  if ((lane & 3) == 0) gpu::post(q + lane / 4, bytes, launch);
  if (lane == 1) gpu::post(scale, __float_as_uint(s.d), launch);
  if (lane == 2) gpu::post(scale + 1, static_cast<uint32_t>(s.sum), launch);
}

// out [rows, n_out]
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads, gpu::few_blocks(MaxRows))
    experts_stream_kernel(ExpertTiles w, QuantRows x, FewChoice choice, WaveMemory memory, ExpertWords words,
                          float* out) {
  DFLASH_DYNAMIC_SHARED(lds);
  constexpr int kSums = sum_rows(MaxRows), kBuffers = sum_buffers(MaxRows);
  static_assert(kSums >= kBatchRows && MaxRows <= kBatchRows, "what a batch takes");
  __shared__ Partial<kSums> sums;
  __shared__ Grouping<MaxRows> g;
  __shared__ Batch batches[2];  // taken in turn
  __shared__ int launches;
  const int wave = gpu::wave(), thread = static_cast<int>(threadIdx.x), rows = choice.rows;
  const float bias0 = first_bias(choice);
  gpu::wait_only();
  if (thread == 0) launches = gpu::load_fresh(words.launch) + 1;
  group_few(choice, bias0, reinterpret_cast<uint32_t*>(&sums[0][0][0]), g);
  const uint32_t launch = static_cast<uint32_t>(launches);
  if (thread == 0) {
    if (blockIdx.x == 0 && choice.distinct != nullptr) atomicAdd(choice.distinct, g.items);
    if (atomicAdd(words.launch + 1, 1) == static_cast<int>(gridDim.x) - 1) {  // every block has read the number
      words.launch[0] = launches;
      words.launch[1] = 0;
    }
  }
  const Span in = segment_span(wave, w.gate.groups), ff = segment_span(wave, w.down.groups);
  const Work work(g.items, w.gate.tiles, w.down.tiles, w.gate.groups, w.down.groups);
  TaskStream<F, kStreamSlots<F>, Grouping<MaxRows>> stream(memory.ring(lds, wave), w, g, work, in, ff);
  stream.start();
  ActRows acts = stage_acts(memory.act_rows(lds, wave), x, in, [](int r) { return r; }, rows, rows);
  weigh_few(choice, g);  // read after a barrier

  stream.expect(in.g1 - in.g0);
  int k = 0, buffer = 0;
#pragma unroll 1
  for (; k < work.gate_up(); ++k) {
    const Work::Task t = work.task(k);
    const int count = g.count[t.item];
    const int16_t* pairs = g.pairs + g.first[t.item];
    const int16_t* rows_at = g.rows + g.first[t.item];
    float (*mine)[kTile] = sums[wave] + buffer * 2 * MaxRows;
    auto row_of = [&](int i) { return static_cast<int>(rows_at[i]); };
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      tile_segment<F, MaxRows, false>(stream, acts, row_of, count, mine + half * MaxRows);
    }
    __syncthreads();
    const int segments = segment_count(w.gate.groups);
    for (int i = (wave + k) % kSegments; i < count; i += kSegments) {
      const float gate = add_segments<kSums>(sums, segments, buffer * 2 * MaxRows + i, gpu::lane());
      const float up = add_segments<kSums>(sums, segments, buffer * 2 * MaxRows + MaxRows + i, gpu::lane());
      const int64_t group = static_cast<int64_t>(pairs[i]) * w.gate.tiles + t.tile;
      post_group(swiglu(gate, up), words.q + group * 8, words.scale + group * 2, launch);
    }
    if (kBuffers == 1) __syncthreads();
    buffer = kBuffers - 1 - buffer;
  }

  stream.expect(ff.g1 - ff.g0);
  buffer = 0;
  const int64_t y_stride = static_cast<int64_t>(w.down.tiles) * kTile;
#pragma unroll 1
  while (k < work.count()) {
    Batch& batch = batches[buffer];
    if (wave == 0) batch.fill(work, k, g, kBatchRows);
    __syncthreads();
    const int tiles = batch.tiles, batch_count = batch.first_row[tiles];
    if (k + tiles >= work.count()) gpu::release_next();
    auto pair_at = [&](int row) {
      const int t = batch.tile_of(row);
      return static_cast<int>(g.pairs[g.first[batch.task[t].item] + row - batch.first_row[t]]);
    };
    acts = await_acts(memory.act_rows(lds, wave), words, w.down.groups, ff, pair_at, batch_count, launch);
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      const int first = batch.first_row[t];
      auto row_of = [&](int i) { return first + i; };
      tile_segment<F, MaxRows, false>(stream, acts, row_of, batch.first_row[t + 1] - first, sums[wave] + first);
    }
    __syncthreads();
    const int segments = segment_count(w.down.groups);
    for (int row = wave; row < batch_count; row += kSegments) {
      const int64_t column = static_cast<int64_t>(batch.task[batch.tile_of(row)].tile) * kTile + gpu::lane();
      const float v = add_segments<kSums>(sums, segments, row, gpu::lane());
      gpu::post(words.y + pair_at(row) * y_stride + column, __float_as_uint(v), launch);
    }
    k += tiles;
    buffer = 1 - buffer;
  }
  gpu::release_next();

  // The outputs: the waves of all blocks take a tile of a row each, and add the experts in the row's own order.
  const int blocks = static_cast<int>(gridDim.x);
  for (int i = wave * blocks + static_cast<int>(blockIdx.x); i < rows * w.down.tiles; i += kSegments * blocks) {
    const int row = i / w.down.tiles;
    const int64_t column = static_cast<int64_t>(i % w.down.tiles) * kTile + gpu::lane();
    const bool there = column < w.down.n_out;
    float* const to = out + row * w.down.n_out + column;
    const float before = there ? *to : 0.0f;
    float sum = 0.0f;
    constexpr int kTogether = 8;
    for (int first = 0; first < choice.top_k; first += kTogether) {
      uint64_t v[kTogether];
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int pair = row * choice.top_k + min(first + j, choice.top_k - 1);
          v[j] = gpu::peek(words.y + pair * y_stride + column);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) missing = missing || !gpu::posted(v[j], launch);
      } while (missing);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (first + j >= choice.top_k) break;
        sum = fmaf(g.weight[row * choice.top_k + first + j], __uint_as_float(static_cast<uint32_t>(v[j])), sum);
      }
    }
    if (there) *to = before + sum;
  }
}

template <typename F>
size_t stream_memory(WaveMemory& m, int rows, int in_groups, int ff_groups) {
  m.ring_bytes = kStreamSlots<F> * Slot<F, 0>::kBytes;
  const int in = segment_groups(in_groups), ff = segment_groups(ff_groups);
  const int acts = std::max(rows * act_bytes(in), kBatchRows * act_bytes(ff));
  m.acts = (acts + act_bytes(in) - 1) / act_bytes(in);  // counted in rows of the input's segment
  m.segment = in;
  return kSegments * static_cast<size_t>(m.wave_bytes());
}

}  // namespace

size_t expert_words_bytes(int pairs, int64_t n_ff, int64_t n_embd) {
  const int64_t columns = (n_embd + kTile - 1) / kTile * kTile;
  return static_cast<size_t>(pairs * (n_ff / 4 + n_ff / 16 + columns)) * sizeof(uint64_t);
}

bool experts_stream(int rows, DType gate_up, DType down) {
  return gpu::kStaged && rows > 1 && rows <= kStreamRows && gate_up == down && is_quantized(down);
}

void launch_experts_stream(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up,
                           const TiledWeight& down, QuantRows x, const FewChoice& c, void* memory, int* launch,
                           float* out) {
  const ExpertTiles w = {gate, up, down};
  const int pairs = c.rows * c.top_k, most = std::min(pairs, c.n_expert);  // items
  ExpertWords words;
  words.q = static_cast<uint64_t*>(memory);
  words.scale = words.q + static_cast<int64_t>(pairs) * down.groups * 8;
  words.y = words.scale + static_cast<int64_t>(pairs) * down.groups * 2;
  words.launch = launch;
  with_format(type, [&](auto format) {
    auto run = [&](auto max_rows) {
      if constexpr (gpu::kStaged) {
        using F = decltype(format);
        constexpr int kRows = decltype(max_rows)::value;
        WaveMemory shape;
        const size_t shared = stream_memory<F>(shape, c.rows, gate.groups, down.groups);
        const auto kernel = experts_stream_kernel<F, kRows>;
        const int fit = gpu::blocks_that_fit(kernel, kThreads, shared);
        if (fit == 0) fail("GPU: ", c.rows, " rows of ", c.top_k, " experts need too much shared memory");
        const int resident = std::min(fit, gpu::blocks_per_unit(c.rows)) * gpu::compute_units();
        const dim3 grid(static_cast<unsigned>(std::min(most * gate.tiles, resident)));
        gpu::launch_shared(s, grid, kThreads, shared, kernel, w, x, c, shape, words, out);
      }
    };
    if (c.rows <= 4) {
      run(std::integral_constant<int, 4>{});
    } else {
      run(std::integral_constant<int, kStreamRows>{});
    }
  });
}

}  // namespace dflash::hip
