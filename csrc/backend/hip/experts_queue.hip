// The experts of two rows in one launch. Blocks take tasks from one queue as they get done: first gate and up tiles of
// all experts, by expert, then their down tiles. The weights of all tasks pass through one ring without a pause, and
// with those of a down tile come the activations that other blocks left for it. NVIDIA only.
//
// Blocks wait for each other, so all must be on the device at a time: no more are launched than multiprocessors.

#include "backend/hip/expert_words.h"
#include "backend/hip/select_sorted.h"
#include "backend/hip/task_stream.h"

namespace dflash::hip {

namespace {

constexpr int kQueueWaves = 2 * kSegments, kQueueThreads = kQueueWaves * gpu::kWave;
constexpr int kQueue = 8;     // tasks that a block may know of
constexpr int kFetchers = 3;  // waves that ask for more in turn: where memory is busy, an answer takes 2 or 3 us

// One of the queue: waves 0..7 make gate and waves 8..15 up of a tile, or each half a down tile.
struct alignas(8) Task {
  int16_t item;  // -1: none is left
  int16_t tile;  // of half 0
  int down;
};

// What the host works out for all blocks.
struct QueueShape {
  int ff_tiles, pairs;  // of gate; of down, in pairs
  bool begins_early;    // a block's first task is known with row 0's choice
  Divisor by_ff_tiles, by_pairs;
};

// The queue's tasks by number.
struct Tasks {
  const QueueShape& shape;
  int units, count;

  __device__ Tasks(int items, const QueueShape& s)
      : shape(s), units(items * s.ff_tiles), count(units + items * s.pairs) {}

  __device__ Task at(int n) const {
    if (n >= count) return {-1, 0, 0};
    const bool down = n >= units;
    const int m = down ? n - units : n, tiles = down ? shape.pairs : shape.ff_tiles;
    const int item = down ? shape.by_pairs.of(m) : shape.by_ff_tiles.of(m);
    return {static_cast<int16_t>(item), static_cast<int16_t>((m - item * tiles) * (down ? 2 : 1)), down};
  }
};

constexpr int kQueueSlots = 1;  // chunks of weights a wave has under way or at hand
constexpr int kRows = 2;

// The words of a row's activations, a wave's segment of them: int8 and, behind, the scales.
__host__ __device__ inline int word_bytes(int groups) { return groups * (8 + 2) * static_cast<int>(sizeof(uint64_t)); }

// What a wave's shared memory holds: slots of a chunk of weights and the words of a down tile's activations, and
// activations as they are multiplied.
struct QueueMemory {
  int slot_bytes = 0;
  int act_bytes = 0;
  __host__ __device__ int wave_bytes(int slots) const { return slots * slot_bytes + act_bytes; }
};

// A wave's segment of its block's tasks, copied to shared memory ahead. A task takes one slot at least, even where the
// segment is empty, so that no wave runs further ahead than the block knows the queue.
template <typename F, int Slots>
class QueueStream {
 public:
  using Layout = Slot<F, 0>;

  // lds: the wave's slots; queue [kQueue], in shared memory
  __device__ QueueStream(uint8_t* lds, int slot_bytes, const Task* queue, const ExpertTiles& w,
                         const Grouping<kRows>& g, const ExpertWords& words, Span in, Span ff)
      : lds_(lds), slot_bytes_(slot_bytes), queue_(queue), w_(w), g_(g), words_(words), in_(in), ff_(ff) {}

  __device__ inline void start() {
#pragma unroll 1
    for (int s = 0; s < Slots; ++s) copy(lds_ + s * slot_bytes_);
  }

  // The same where the first task's expert is known sooner than the queue: a tile of gate and up.
  __device__ inline void start_with(int expert, int tile) {
    static_assert(Slots == 1, "one chunk");
    run_.set(TileView<F>(gpu::wave() < kSegments ? w_.gate : w_.up, expert, tile), in_);
    run_.copy_chunk(lds_);
    gpu::copy_commit();
    task_ = 1;
  }

  // The groups that take() hands out: a task's.
  __device__ void expect(int groups) { groups_ = groups; }

  // The words that came with a down task, once they are there.
  __device__ inline const uint64_t* words() {
    gpu::copy_wait<Slots - 1>();
    return reinterpret_cast<const uint64_t*>(lds_ + slot_ + Layout::kBytes);
  }

  // Calls use(quants, scales, first group within the segment, groups, slot) for the pieces of the next task, in order.
  template <typename Use>
  __device__ inline void take(Use use) {
    int g = 0;
#pragma unroll 1
    do {
      gpu::copy_wait<Slots - 1>();
      uint8_t* slot = lds_ + slot_;
      if (g < groups_) {
        use(slot, reinterpret_cast<const uint16_t*>(slot + Layout::kScales), g, min(kChunk<F>, groups_ - g), slot);
      }
      gpu::wave_sync();
      copy(slot);
      slot_ += slot_bytes_;
      if (slot_ == Slots * slot_bytes_) slot_ = 0;
      g += kChunk<F>;
    } while (g < groups_);
  }

 private:
  __device__ inline void copy(uint8_t* slot) {
    if (run_.left <= 0) {
      const Task t = queue_[task_ % kQueue];
      if (t.item >= 0) {
        begin(t, slot);
        ++task_;
      }
    }
    if (run_.left > 0) run_.copy_chunk(slot);
    gpu::copy_commit();
  }

  __device__ inline void begin(const Task& t, uint8_t* slot) {
    const int half = gpu::wave() / kSegments, expert = g_.expert[t.item];
    const Span span = t.down ? ff_ : in_;
    const int tile = t.tile + (t.down ? half : 0);
    run_.set(TileView<F>(t.down ? w_.down : half == 0 ? w_.gate : w_.up, expert, tile), span);
    if (t.down && tile >= w_.down.tiles) run_.left = 0;
    if (!t.down) return;
    const int count = g_.count[t.item], groups = span.g1 - span.g0;
    uint8_t* to = slot + Layout::kBytes;
    for (int r = 0; r < count; ++r, to += word_bytes(groups)) {
      const int64_t group = static_cast<int64_t>(g_.pairs[g_.first[t.item] + r]) * w_.down.groups + span.g0;
      for (int i = gpu::lane(); i < groups * 5; i += gpu::kWave) {  // two words a copy, each written at once
        gpu::copy_begin<16>(to + i * 16, i < groups * 4 ? words_.q + group * 8 + i * 2
                                                        : words_.scale + group * 2 + (i - groups * 4) * 2);
      }
    }
  }

  uint8_t* lds_;
  int slot_bytes_;
  const Task* queue_;
  const ExpertTiles& w_;
  const Grouping<kRows>& g_;
  const ExpertWords& words_;
  Span in_, ff_;
  Run<F> run_;
  int task_ = 0;  // the next to copy
  int groups_ = 0;
  int slot_ = 0;  // of the next piece to use, in bytes
};

// By a wave: rows of activations at lds from their words as copied; false if some had not been posted.
__device__ inline bool unpack_acts(uint8_t* lds, const uint64_t* words, int groups, int count, uint32_t launch) {
  uint32_t* q = reinterpret_cast<uint32_t*>(lds);
  const int stride = act_stride(groups) / 4;
  uint32_t* scale = q + count * stride;
  bool there = true;
  for (int r = 0; r < count; ++r, words += groups * 10, q += stride, scale += groups * 2) {
    for (int i = gpu::lane(); i < groups * 10; i += gpu::kWave) {
      const uint64_t word = words[i];
      there = there && gpu::posted(word, launch);
      (i < groups * 8 ? q[i] : scale[i - groups * 8]) = static_cast<uint32_t>(word);
    }
  }
  const bool all = gpu::ballot(!there) == 0;
  gpu::wave_sync();
  return all;
}

// As tile_segment, but with one loop for both counts: at first every instruction comes from memory that is busy with
// weights. rows [count]; null: 0, 1
template <typename F, typename Stream>
__device__ inline void multiply(Stream& stream, const ActRows& x, const int16_t* rows, int count, float (*out)[kTile]) {
  const int row0 = rows != nullptr ? rows[0] : 0, row1 = count < 2 ? 0 : rows != nullptr ? rows[1] : 1;
  float one[1] = {}, two[2] = {};
  stream.take([&](const uint8_t* quants, const uint16_t* scales, int g0, int groups, const uint8_t*) {
    if (count == 1) {
      dot_groups<F, 1>(quants, scales, groups, x, g0, [&](int) { return row0; }, one);
    } else {
      dot_groups<F, 2>(quants, scales, groups, x, g0, [&](int r) { return r == 0 ? row0 : row1; }, two);
    }
  });
  out[0][gpu::lane()] = count == 1 ? one[0] : two[0];
  if (count == 2) out[1][gpu::lane()] = two[1];
}

// out [rows, n_out]
template <typename F>
__global__ void __launch_bounds__(kQueueThreads, 1)
    experts_queue_kernel(ExpertTiles w, QuantRows x, FewChoice choice, QueueMemory memory, ExpertWords words,
                         QueueShape shape, float* out) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<kRows> sums[2][2];  // of half a block's tile; taken in turn
  __shared__ Grouping<kRows> g;
  __shared__ Task queue[kQueue];
  __shared__ uint32_t launch;   // its number
  __shared__ int first_expert;  // of the block's first task
  __shared__ int turn;          // launches of this kernel take turns with two counters
  constexpr int kSlots = kQueueSlots;
  const int wave = gpu::wave(), lane = gpu::lane(), half = wave / kSegments, segment = wave % kSegments;
  const int rows = choice.rows, block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const bool numbers = threadIdx.x == kQueueThreads - 1;
  const Span in = segment_span(segment, w.gate.groups), ff = segment_span(segment, w.down.groups);
  uint8_t* const mine = lds + wave * memory.wave_bytes(kSlots);
  uint8_t* const act_area = mine + kSlots * memory.slot_bytes;
  RowChoice<kRows> chooser(choice);
  const int first_item = shape.by_ff_tiles.of(block);
  const bool early = shape.begins_early && first_item < choice.top_k;
  QueueStream<F, kSlots> stream(mine, memory.slot_bytes, queue, w, g, words, in, ff);
  gpu::wait_only();
  chooser.load();
  const uint32_t launch0 = numbers ? launch_number(words) : 0;
  const int turn0 = numbers ? gpu::load_fresh(words.launch + 2) : 0;
  // Before the weights, which would be in their way.
  ActRows acts = begin_acts(act_area, x, in, [](int r) { return r; }, rows, rows);
  if (numbers) {
    launch = launch0;
    turn = turn0;
  }
  if (early) stream.start_with(chooser.first_row(first_item, &first_expert), block - first_item * shape.ff_tiles);
  chooser.group(g);
  const Tasks tasks(g.items, shape);
  if (threadIdx.x < kQueue) queue[threadIdx.x] = tasks.at(block + static_cast<int>(threadIdx.x) * blocks);
  __syncthreads();
  if (!early) stream.start();
  int noted = 0;  // blocks that have read the launch's number before
  if (numbers) {
    words.launch[4 - turn0] = 0;  // the next launch's counter
    noted = atomicAdd(words.launch + 1, 1);
    if (block == 0 && choice.distinct != nullptr) atomicAdd(choice.distinct, g.items);
  }
  chooser.weigh(g);

  int* const taken = words.launch + 3 + turn;  // tasks beyond each block's first ones
  const int64_t y_stride = static_cast<int64_t>(w.down.tiles) * kTile;
  bool released = false;
  // Of a fetcher, lane 0 of one of the last waves: what it asked for kFetchers tasks ago.
  int fetched = block + (wave - kQueueWaves) * blocks;
  int fetcher = kQueueWaves - kFetchers;
  int k = 0;
#pragma unroll 1
  for (;; ++k) {
    const Task t = queue[k % kQueue];
    if (t.item < 0) break;
    if (wave == fetcher && lane == 0) {
      queue[(k + kSlots + 1) % kQueue] = tasks.at((kSlots + 1 + kFetchers) * blocks + fetched);
      fetched = atomicAdd(taken, 1);
    }
    fetcher = fetcher + 1 == kQueueWaves ? kQueueWaves - kFetchers : fetcher + 1;
    const int count = g.count[t.item], first = g.first[t.item];
    const bool to_make = t.tile + half < w.down.tiles || !t.down;
    auto pair_at = [&](int i) { return static_cast<int>(g.pairs[first + i]); };
    if (t.down) {
      if (!released && queue[(k + 1) % kQueue].item < 0) {
        gpu::release_next();
        released = true;
      }
      const int groups = ff.g1 - ff.g0;
      const uint64_t* came = stream.words();
      if (unpack_acts(act_area, came, groups, count, launch)) {
        acts = {reinterpret_cast<const int8_t*>(act_area),
                reinterpret_cast<const GroupScale*>(act_area + count * act_stride(groups)), act_stride(groups), groups};
      } else {
        acts = await_acts(act_area, words, w.down.groups, ff, pair_at, count, launch);
      }
    }
    stream.expect(t.down ? (to_make ? ff.g1 - ff.g0 : 0) : in.g1 - in.g0);
    auto& buffer = sums[k % 2];
    multiply<F>(stream, acts, t.down ? nullptr : g.rows + first, count, buffer[half][segment]);
    __syncthreads();
    if (!t.down) {
      const int segments = segment_count(w.gate.groups);
      for (int i = (wave + k) % kQueueWaves; i < count; i += kQueueWaves) {
        const float gate = add_segments<kRows>(buffer[0], segments, i, lane);
        const float up = add_segments<kRows>(buffer[1], segments, i, lane);
        const int64_t group = static_cast<int64_t>(pair_at(i)) * w.gate.tiles + t.tile;
        post_group(swiglu(gate, up), words.q + group * 8, words.scale + group * 2, launch);
      }
    } else {
      const int segments = segment_count(w.down.groups), both = min(2, w.down.tiles - t.tile) * count;
      for (int i = (wave + 2 * k) % kQueueWaves; i < both; i += kQueueWaves) {
        const int tile = i / count, row = i % count;
        const float v = add_segments<kRows>(buffer[tile], segments, row, lane);
        post_output(words, pair_at(row), y_stride, static_cast<int64_t>(t.tile + tile) * kTile + lane, v, launch);
      }
    }
  }
  gpu::release_next();
  if (k == 0) __syncthreads();           // the weights of the experts
  if (numbers && noted == blocks - 1) {  // all have read it
    words.launch[0] = static_cast<int>(launch);
    words.launch[1] = 0;
    words.launch[2] = 1 - turn;
  }

  // The outputs: the waves of all blocks take a tile of a row each, and add the experts in the row's own order.
  for (int i = wave * blocks + block; i < rows * w.down.tiles; i += kQueueWaves * blocks) {
    const int row = i / w.down.tiles;
    const int64_t column = static_cast<int64_t>(i % w.down.tiles) * kTile + lane;
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
size_t queue_memory(QueueMemory& m, int rows, int in_groups, int ff_groups) {
  const int in = segment_groups(in_groups), ff = segment_groups(ff_groups);
  m.slot_bytes = Slot<F, 0>::kBytes + rows * word_bytes(ff);
  m.act_bytes = (rows * (in > ff ? act_bytes(in) : act_bytes(ff)) + 15) / 16 * 16;
  return kQueueWaves * static_cast<size_t>(m.wave_bytes(kQueueSlots));
}

}  // namespace

bool launch_experts_queue(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up,
                          const TiledWeight& down, QuantRows x, const FewChoice& c, void* memory, int* launch,
                          float* out) {
  const ExpertTiles w = {gate, up, down};
  const ExpertWords words = expert_words(memory, launch, c.rows * c.top_k, down);
  bool fits = false;
  with_format(type, [&](auto format) {
    if constexpr (gpu::kStaged) {
      using F = decltype(format);
      QueueMemory shape;
      const size_t shared = queue_memory<F>(shape, c.rows, gate.groups, down.groups);
      const auto kernel = experts_queue_kernel<F>;
      const int pairs = (down.tiles + 1) / 2;
      const QueueShape tasks = {gate.tiles, pairs, begins_with_a_tile<F>(gate.groups, kQueueSlots), Divisor(gate.tiles),
                                Divisor(pairs)};
      fits = c.rows <= kRows && gpu::blocks_that_fit(kernel, kQueueThreads, shared) > 0;
      if (!fits) return;
      const dim3 grid(static_cast<unsigned>(gpu::compute_units()));
      gpu::launch_shared(s, grid, kQueueThreads, shared, kernel, w, x, c, shape, words, tasks, out);
    }
  });
  return fits;
}

}  // namespace dflash::hip
