// The experts of few rows in one launch. A block makes gate and up tiles first, down tiles after, and their weights
// pass through one ring without a pause: where a down tile's activations are not there yet, its weights are. An
// expert's down tiles wait for that expert's activations alone; experts are taken in order, so most need not wait.
//
// Blocks wait for each other, so all must be on the device at a time: launch_experts_stream launches no more than fit.

#include <algorithm>

#include "backend/hip/expert_words.h"
#include "backend/hip/select_sorted.h"
#include "backend/hip/task_stream.h"

namespace dflash::hip {

namespace {

// What the host works out for all blocks.
struct StreamShape {
  bool begins_early;  // a block's first tile is known with row 0's choice
  int in_segments, ff_segments;
  Divisor ff_tiles, down_tiles;
};

// What a block does: gate and up tiles blockIdx, blockIdx + gridDim, ... of all experts' (by expert); then down tiles.
// Blocks that have one gate and up tile less than others take as many down tiles as make up for it first, of experts
// whose gate and up tiles are made in the rounds that all blocks have.
class Work {
 public:
  struct Task {
    int item, tile;
  };

  // Nothing is known before set().
  __device__ Work(const StreamShape& shape, int ff_tiles, int down_tiles)
      : shape_(shape), ff_tiles_(ff_tiles), down_tiles_(down_tiles) {}

  __device__ inline void set(int items, int ff_groups, int down_groups) {
    const int ff_tiles = ff_tiles_, down_tiles = down_tiles_;
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int units = items * ff_tiles, downs = items * down_tiles, rounds = units / blocks, more = units % blocks;
    const int made = shape_.ff_tiles.of(rounds * blocks);  // experts
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
    if (k < gate_up_) return gate_up_task(static_cast<int>(blockIdx.x) + k * blocks);
    return split(k < early_end_ ? light_block_ + (k - gate_up_) * light_ : late_first_ + (k - early_end_) * blocks,
                 shape_.down_tiles, down_tiles_);
  }

  __device__ Task gate_up_task(int at) const { return split(at, shape_.ff_tiles, ff_tiles_); }

 private:
  static __device__ Task split(int at, const Divisor& by, int tiles) {
    const int item = by.of(at);
    return {item, at - item * tiles};
  }

  const StreamShape& shape_;
  int ff_tiles_, down_tiles_;
  int gate_up_ = 0, early_end_ = 0, count_ = 0;
  int light_block_, light_, late_first_;
};

// A wave's segment of the tasks' tiles, gate before up.
template <typename F, typename Grouped>
class Segments {
 public:
  __device__ Segments(const ExpertTiles& w, const Grouped& g, const Work& work, Span in, Span ff)
      : w_(w), g_(g), work_(work), in_(in), ff_(ff) {}

  __device__ inline bool next(Run<F>& run) {
    if (task_ == work_.count()) return false;
    const Work::Task t = work_.task(task_);
    const bool down = task_ >= work_.gate_up();
    run.set(TileView<F>(down ? w_.down : half_ == 0 ? w_.gate : w_.up, g_.expert[t.item], t.tile), down ? ff_ : in_);
    half_ ^= down ? 0 : 1;
    task_ += half_ == 0 ? 1 : 0;
    return true;
  }

  // The first tile is under way.
  __device__ inline void skip_first() { half_ = 1; }

 private:
  const ExpertTiles& w_;
  const Grouped& g_;
  const Work& work_;
  Span in_, ff_;
  int task_ = 0, half_ = 0;  // what comes next
};

template <typename F>
constexpr int kStreamSlots = 12 / kChunk<F>;
constexpr int kBatch = 4;                // down tiles at most that are made between two barriers
constexpr int kBatchRows = kStreamRows;  // rows of activations of these

// Rows of partial sums: gate and up of a tile, twice where there is room; a batch's rows are fewer.
constexpr int sum_buffers(int max_rows) { return max_rows <= 4 ? 2 : 1; }
[[maybe_unused]] constexpr int sum_rows(int max_rows) { return 2 * sum_buffers(max_rows) * max_rows; }

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

// out [rows, n_out]
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads, gpu::few_blocks(MaxRows))
    experts_stream_kernel(ExpertTiles w, QuantRows x, FewChoice choice, WaveMemory memory, ExpertWords words,
                          StreamShape shape, float* out) {
  DFLASH_DYNAMIC_SHARED(lds);
  constexpr int kSums = sum_rows(MaxRows), kBuffers = sum_buffers(MaxRows);
  static_assert(kSums >= kBatchRows && MaxRows <= kBatchRows, "what a batch takes");
  __shared__ Partial<kSums> sums;
  __shared__ Grouping<MaxRows> g;
  __shared__ Batch batches[2];  // taken in turn
  __shared__ uint32_t launch;   // its number
  __shared__ int first_expert;  // of the block's first tile
  const int wave = gpu::wave(), thread = static_cast<int>(threadIdx.x), rows = choice.rows;
  const Span in = segment_span(wave, w.gate.groups), ff = segment_span(wave, w.down.groups);
  RowChoice<MaxRows> chooser(choice);
  Work work(shape, w.gate.tiles, w.down.tiles);
  using Tasks = Segments<F, Grouping<MaxRows>>;
  TaskStream<F, kStreamSlots<F>, Tasks> stream(memory.ring(lds, wave), Tasks(w, g, work, in, ff));
  const Work::Task first_task = work.gate_up_task(static_cast<int>(blockIdx.x));
  gpu::wait_only();
  chooser.load();
  // Few before the weights, which would be in their way; many would hold the weights up.
  constexpr bool kEarly = MaxRows <= 4;
  ActRows acts;
  if (kEarly) acts = begin_acts(memory.act_rows(lds, wave), x, in, [](int r) { return r; }, rows, rows);
  const uint32_t launch0 = thread == 0 ? launch_number(words) : 0;
  const bool begins_early = shape.begins_early && first_task.item < choice.top_k;
  if (begins_early) {
    Run<F> run;
    run.set(TileView<F>(w.gate, chooser.first_row(first_task.item, &first_expert), first_task.tile), in);
    stream.start_with(run);
  }
  chooser.group(g);
  work.set(g.items, w.gate.groups, w.down.groups);
  if (!begins_early) stream.start();
  if (thread == 0) {
    launch = launch0;
    note_launch(words, launch0);
    if (blockIdx.x == 0 && choice.distinct != nullptr) atomicAdd(choice.distinct, g.items);
  }
  if (!kEarly) acts = stage_acts(memory.act_rows(lds, wave), x, in, [](int r) { return r; }, rows, rows);
  chooser.weigh(g);  // both are read after a barrier

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
    const int segments = shape.in_segments;
    for (int i = (wave + k) % kSegments; i < count; i += kSegments) {
      const float gate = add_segments<kSums>(sums, segments, buffer * 2 * MaxRows + i, gpu::lane());
      const float up = add_segments<kSums>(sums, segments, buffer * 2 * MaxRows + MaxRows + i, gpu::lane());
      const int64_t group = static_cast<int64_t>(pairs[i]) * w.gate.tiles + t.tile;
      post_group(swiglu(gate, up), words.q + group * 8, words.scale + group * 2, launch);
    }
    if (kBuffers == 1) __syncthreads();
    buffer = kBuffers - 1 - buffer;
  }

  // A block without a tile of gate and up has not waited for its activations, whose place is needed now.
  if (kEarly) gpu::copy_wait<kStreamSlots<F>>();
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
    const int segments = shape.ff_segments;
    for (int row = wave; row < batch_count; row += kSegments) {
      const int64_t column = static_cast<int64_t>(batch.task[batch.tile_of(row)].tile) * kTile + gpu::lane();
      const float v = add_segments<kSums>(sums, segments, row, gpu::lane());
      post_output(words, pair_at(row), y_stride, column, v, launch);
    }
    k += tiles;
    buffer = 1 - buffer;
  }
  gpu::release_next();
  if (work.count() == 0) __syncthreads();  // the launch's number, the weights of the experts

  // The outputs: the waves of all blocks take a tile of a row each, and add the experts in the row's own order.
  const int blocks = static_cast<int>(gridDim.x);
  for (int i = wave * blocks + static_cast<int>(blockIdx.x); i < rows * w.down.tiles; i += kSegments * blocks) {
    const int row = i / w.down.tiles;
    const int64_t column = static_cast<int64_t>(i % w.down.tiles) * kTile + gpu::lane();
    const bool there = column < w.down.n_out;
    float* const to = out + row * w.down.n_out + column;
    const float before = there ? *to : 0.0f;
    const int pair0 = row * choice.top_k;
    const float sum = await_outputs(
        words, pair0, choice.top_k, y_stride, column, [&](int slot) { return g.weight[pair0 + slot]; }, launch);
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

bool experts_one_launch(int rows, DType gate_up, DType down) {
  return gpu::kStaged && rows <= kStreamRows && gate_up == down && is_quantized(down);
}

bool launch_experts_stream(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up,
                           const TiledWeight& down, QuantRows x, const FewChoice& c, void* memory, int* launch,
                           float* out) {
  const ExpertTiles w = {gate, up, down};
  const int pairs = c.rows * c.top_k, most = std::min(pairs, c.n_expert);  // items
  const ExpertWords words = expert_words(memory, launch, pairs, down);
  bool fits = false;
  with_format(type, [&](auto format) {
    auto run = [&](auto max_rows) {
      if constexpr (gpu::kStaged) {
        using F = decltype(format);
        constexpr int kRows = decltype(max_rows)::value;
        WaveMemory wave;
        const StreamShape shape = {begins_with_a_tile<F>(gate.groups, kStreamSlots<F>), segment_count(gate.groups),
                                   segment_count(down.groups), Divisor(gate.tiles), Divisor(down.tiles)};
        const size_t shared = stream_memory<F>(wave, c.rows, gate.groups, down.groups);
        const auto kernel = experts_stream_kernel<F, kRows>;
        const int fit = gpu::blocks_that_fit(kernel, kThreads, shared);
        fits = fit > 0;
        if (!fits) return;
        const int resident = std::min(fit, gpu::blocks_per_unit(c.rows)) * gpu::compute_units();
        const dim3 grid(static_cast<unsigned>(std::min(most * gate.tiles, resident)));
        gpu::launch_shared(s, grid, kThreads, shared, kernel, w, x, c, wave, words, shape, out);
      }
    };
    if (c.rows <= 4) {
      run(std::integral_constant<int, 4>{});
    } else {
      run(std::integral_constant<int, kStreamRows>{});
    }
  });
  return fits;
}

}  // namespace dflash::hip
