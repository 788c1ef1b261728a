// Gate, up, SwiGLU and down of a dense feed-forward of few rows in one launch. A block a multiprocessor; a wave's
// weights pass through one ring from the first tile to the last, so that memory rests little. NVIDIA only.
//
// All blocks make as many whole gate and up tiles. What is left over (24 of 288 tiles on 132 multiprocessors would keep
// the others waiting) is cut into halves and segments of K, and so is down: each is the work of one wave of any block,
// whose sums the others read in words that carry the launch's number (gpu_blocks.h). A segment of down waits for its
// own activations alone.
//
// Blocks wait for each other, so all must be on the device at a time: there is one to a multiprocessor.

#include <algorithm>

#include "backend/hip/gpu_blocks.h"
#include "backend/hip/half_tiles.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

constexpr int kStage = 9;        // groups of down's activations that a wave has in shared memory at a time
constexpr int kGroupWords = 10;  // of a group of activations: int8, four to a word, then d and sum

struct FfnTiles {
  TiledWeight gate, up, down;
};

struct FfnWords {
  uint64_t* act = nullptr;    // [rows, n_ff / 32, kGroupWords]
  uint64_t* piece = nullptr;  // [tiles left over, segments, gate and up, rows, 32] sums of a segment
  uint64_t* part = nullptr;   // [segments of down, rows, n_embd in whole tiles] sums of a segment
  int* launch = nullptr;      // [2] launches so far, blocks of this one that know it
};

// What a wave does: rounds() gate and up tiles with the other waves of its block, then items by itself: pieces (half a
// segment of a gate and an up tile that is left over), then units (half a segment of a down tile, first segments
// first).
class FfnWork {
 public:
  struct Task {
    bool down;
    int tile, segment, half;
  };

  __device__ FfnWork(const FfnTiles& w)
      : down_tiles_(w.down.tiles),
        segments_(segment_count(w.gate.groups)),
        rounds_(w.gate.tiles / static_cast<int>(gridDim.x)),
        pieces_(w.gate.tiles % static_cast<int>(gridDim.x) * segments_ * 2),
        items_(pieces_ + segment_count(w.down.groups) * w.down.tiles * 2) {}

  __device__ int rounds() const { return rounds_; }
  __device__ int left_over() const { return pieces_ / segments_ / 2; }  // tiles
  __device__ int tile_of_piece(int tile) const { return rounds_ * static_cast<int>(gridDim.x) + tile; }
  // The last waves come first, those of all blocks.
  static __device__ int first_item() {
    return (kHalfWaves - 1 - gpu::wave()) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  }
  static __device__ int item_step() { return kHalfWaves * static_cast<int>(gridDim.x); }
  __device__ bool there(int k) const { return k < rounds_ || item(k) < items_; }
  __device__ bool is_piece(int k) const { return item(k) < pieces_; }
  __device__ Task task(int k) const {
    if (k < rounds_) {
      return {false, k * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x), gpu::wave() % kSegments,
              gpu::wave() / kSegments};
    }
    int i = item(k);
    const bool down = i >= pieces_;
    if (down) i -= pieces_;
    const int half = i % 2;
    i /= 2;
    return down ? Task{true, i % down_tiles_, i / down_tiles_, half}
                : Task{false, tile_of_piece(i / segments_), i % segments_, half};
  }

 private:
  __device__ int item(int k) const { return first_item() + (k - rounds_) * item_step(); }

  int down_tiles_, segments_, rounds_, pieces_, items_;
};

template <typename F>
struct FfnCursor {
  const FfnTiles& w;
  const FfnWork& work;
  int k = 0, up = 0;

  __device__ inline bool next(HalfTask* task) {
    if (!work.there(k)) return false;
    const FfnWork::Task t = work.task(k);
    const TiledWeight& from = t.down ? w.down : up != 0 ? w.up : w.gate;
    *task = HalfTask::of<F>(from, t.tile, t.half, segment_span(t.segment, from.groups));
    up ^= t.down ? 0 : 1;
    k += up == 0 ? 1 : 0;
    return true;
  }
};

// The activations of a segment of down, kStage groups of all rows at a time: read as words while the groups before are
// worked on, and left in the wave's own shared memory.
class ActWords {
 public:
  __device__ inline ActWords(uint8_t* lds, const uint64_t* words, int rows, int all_groups, Span span, uint32_t launch)
      : lds_(lds),
        row_words_(static_cast<int64_t>(all_groups) * kGroupWords),
        words_(words + static_cast<int64_t>(span.g0) * kGroupWords),
        rows_(rows),
        groups_(span.g1 - span.g0),
        launch_(launch) {
    // Little is read while there is nothing yet: the last word of each group of the last row.
    const uint64_t* const last = words_ + (rows - 1) * row_words_ + kGroupWords - 1;
    for (int g = gpu::lane(); g < groups_; g += gpu::kWave) {
      while (!gpu::posted(gpu::peek(last + g * kGroupWords), launch)) {
      }
    }
    gpu::wave_sync();
    ask(0);
  }

  __device__ inline ActRows rows() const {
    return {reinterpret_cast<const int8_t*>(lds_), scales(), act_stride(kStage), kStage};
  }

  // Groups [g, g + kStage) of the segment are there when this returns; the next ones are asked for.
  __device__ inline void arrive(int g) {
    while (missing()) ask(g);
    uint32_t* const scale = reinterpret_cast<uint32_t*>(scales());
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = i * gpu::kWave + gpu::lane(), group = at / kGroupWords, word = at % kGroupWords;
      uint32_t* const to =
          word < 8 ? reinterpret_cast<uint32_t*>(lds_) + group * 8 + word : scale + group * 2 + word - 8;
      const int stride = word < 8 ? act_stride(kStage) / 4 : kStage * 2;
#pragma unroll
      for (int r = 0; r < kHalfRows; ++r) {
        if (r < rows_ && at < asked_) to[r * stride] = static_cast<uint32_t>(v_[r][i]);
      }
    }
    gpu::wave_sync();
    ask(g + kStage);
  }

 private:
  static constexpr int kLoads = (kStage * kGroupWords + gpu::kWave - 1) / gpu::kWave;

  __device__ inline GroupScale* scales() const {
    return reinterpret_cast<GroupScale*>(lds_ + rows_ * act_stride(kStage));
  }

  __device__ inline void ask(int g) {
    asked_ = min(groups_ - g, kStage) * kGroupWords;
    const uint64_t* from = words_ + g * kGroupWords + gpu::lane();
#pragma unroll
    for (int r = 0; r < kHalfRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (r < rows_ && i * gpu::kWave + gpu::lane() < asked_) v_[r][i] = gpu::peek(from + i * gpu::kWave);
      }
      from += row_words_;
    }
  }

  __device__ inline bool missing() const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kHalfRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        any = any || (r < rows_ && i * gpu::kWave + gpu::lane() < asked_ && !gpu::posted(v_[r][i], launch_));
      }
    }
    return any;
  }

  uint8_t* lds_;
  int64_t row_words_;
  const uint64_t* words_;
  int rows_, groups_;
  uint32_t launch_;
  int asked_;
  uint64_t v_[kHalfRows][kLoads];
};

// A wave's values as an int8 group.
[[maybe_unused]] __device__ inline void post_group(float v, uint64_t* to, uint32_t launch) {
  int i;
  const GroupScale s = quantize_lane(v, &i);
  const int lane = gpu::lane();
  uint32_t bytes = (static_cast<uint32_t>(i) & 255u) << (8 * (lane & 3));
  bytes |= gpu::shuffle_xor(bytes, 1);
  bytes |= gpu::shuffle_xor(bytes, 2);
  if ((lane & 3) == 0) gpu::post(to + lane / 4, bytes, launch);
  if (lane == 1) gpu::post(to + 8, __float_as_uint(s.d), launch);
  if (lane == 2) gpu::post(to + 9, static_cast<uint32_t>(s.sum), launch);
}

// The wave's sums: those of row r go to to + r * stride.
[[maybe_unused]] __device__ inline void post_half(const HalfSums& acc, int half, int rows, uint64_t* to, int64_t stride,
                                                  uint32_t launch) {
#pragma unroll
  for (int i = 0; i < gpu::kMmaAcc; ++i) {
    const int token = gpu::mma_token(i % gpu::kMmaToks);
    if (token < rows) {
      gpu::post(to + token * stride + half * (kTile / 2) + gpu::mma_row(i / gpu::kMmaToks), __float_as_uint(acc[i]),
                launch);
    }
  }
}

// The sum over segments, in order, of the words at words + segment * stride.
[[maybe_unused]] __device__ inline float await_sum(const uint64_t* words, int segments, int64_t stride,
                                                   uint32_t launch) {
  uint64_t v[kSegments];
  bool missing;
  do {
    missing = false;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) v[s] = gpu::peek(words + min(s, segments - 1) * stride);
#pragma unroll
    for (int s = 0; s < kSegments; ++s) missing = missing || !gpu::posted(v[s], launch);
  } while (missing);
  float sum = kEmptySum;
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    if (s < segments) sum += __uint_as_float(static_cast<uint32_t>(v[s]));
  }
  return sum;
}

// out [rows, n_embd] += the feed-forward of x's rows.
template <typename F>
__global__ void __launch_bounds__(kHalfThreads, 1)
    ffn_stream_kernel(FfnTiles w, QuantRows x, int rows, FfnWords words, float* out) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<kHalfRows> sums[2][2];  // taken in turn; gate and up
  __shared__ int launches;
  const int wave = gpu::wave(), block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int groups = w.gate.groups, segments = segment_count(groups);
  const FfnWork work(w);
  HalfStream<F, FfnCursor<F>> stream(lds + wave * HalfSlot<F>::kRing, FfnCursor<F>{w, work});
  stream.start();
  uint8_t* const staged = lds + kHalfWaves * HalfSlot<F>::kRing;
  uint8_t* const down_acts = staged + staged_bytes(rows, groups) + wave * rows * act_bytes(kStage);
  gpu::wait_only();
  if (threadIdx.x == 0) launches = gpu::load_fresh(words.launch) + 1;
  const ActRows acts = stage_rows(staged, x, rows);
  __syncthreads();
  const uint32_t launch = static_cast<uint32_t>(launches);
  if (threadIdx.x == 0 && atomicAdd(words.launch + 1, 1) == blocks - 1) {  // every block has read the number
    words.launch[0] = launches;
    words.launch[1] = 0;
  }
  auto act_words = [&](int row, int tile) {
    return words.act + (static_cast<int64_t>(row) * w.gate.tiles + tile) * kGroupWords;
  };
  // Whole tiles, then pieces.
  int k = 0;
#pragma unroll 1
  for (; work.there(k) && (k < work.rounds() || work.is_piece(k)); ++k) {
    const FfnWork::Task t = work.task(k);
    const Span span = segment_span(t.segment, groups);
    const ActRows mine = {acts.q + span.g0 * 32, acts.scale + span.g0, acts.q_stride, acts.s_stride};
    const bool whole = k < work.rounds();
    Partial<kHalfRows>(&sum)[2] = sums[k % 2];
#pragma unroll 1
    for (int up = 0; up < 2; ++up) {
      HalfSums acc;
      stream.multiply(span.g1 - span.g0, mine, rows, [](int g) { return g; }, acc);
      if (whole) {
        store_half(acc, t.half, rows, sum[up][t.segment]);
      } else {
        const int left = t.tile - work.tile_of_piece(0);
        post_half(acc, t.half, rows,
                  words.piece + static_cast<int64_t>((left * segments + t.segment) * 2 + up) * rows * kTile, kTile,
                  launch);
      }
    }
    if (!whole) continue;
    __syncthreads();
    const int row = (wave + k * kSegments) % kHalfWaves;
    if (row < rows) {
      const float gate = add_segments<kHalfRows>(sum[0], segments, row, gpu::lane());
      const float up = add_segments<kHalfRows>(sum[1], segments, row, gpu::lane());
      post_group(swiglu(gate, up), act_words(row, t.tile), launch);
    }
  }
  // Tiles made of pieces, a row at a time.
#pragma unroll 1
  for (int i = work.first_item(); i < work.left_over() * rows; i += work.item_step()) {
    const int left = i / rows, row = i % rows, stride = 2 * rows * kTile;
    const uint64_t* from = words.piece + (static_cast<int64_t>(left) * segments * 2 * rows + row) * kTile + gpu::lane();
    const float gate = await_sum(from, segments, stride, launch);
    const float up = await_sum(from + rows * kTile, segments, stride, launch);
    post_group(swiglu(gate, up), act_words(row, work.tile_of_piece(left)), launch);
  }

  const int64_t columns = static_cast<int64_t>(w.down.tiles) * kTile;
#pragma unroll 1
  for (; work.there(k); ++k) {
    const FfnWork::Task t = work.task(k);
    const Span span = segment_span(t.segment, w.down.groups);
    ActWords arriving(down_acts, words.act, rows, w.down.groups, span, launch);
    HalfSums acc;
    stream.multiply(
        span.g1 - span.g0, arriving.rows(), rows,
        [&](int g) {
          if (g % kStage == 0) arriving.arrive(g);
          return g % kStage;
        },
        acc);
    post_half(acc, t.half, rows, words.part + t.segment * rows * columns + t.tile * kTile, columns, launch);
  }
  gpu::release_next();

  // The outputs: the waves of all blocks take a tile of a row each.
  const int down_segments = segment_count(w.down.groups);
#pragma unroll 1
  for (int i = wave * blocks + block; i < rows * w.down.tiles; i += kHalfWaves * blocks) {
    const int row = i / w.down.tiles;
    const int64_t column = static_cast<int64_t>(i % w.down.tiles) * kTile + gpu::lane();
    const bool there = column < w.down.n_out;
    float* const to = out + row * w.down.n_out + column;
    const float before = there ? *to : 0.0f;
    const float sum = await_sum(words.part + row * columns + column, down_segments, rows * columns, launch);
    if (there) *to = before + sum;
  }
}

template <typename F>
size_t shared_bytes(int rows, int groups) {
  return static_cast<size_t>(kHalfWaves * (HalfSlot<F>::kRing + rows * act_bytes(kStage)) + staged_bytes(rows, groups));
}

constexpr size_t kDeclared = 4 * sizeof(Partial<kHalfRows>) + 256;

}  // namespace

bool ffn_stream(int rows, const Ffn& f) {
  const DType type = f.gate->type;
  if (!gpu::kStaged || rows > kHalfRows || f.up->type != type || f.down->type != type) return false;
  bool fits = false;
  with_format(type, [&](auto format) {
    fits = shared_bytes<decltype(format)>(rows, static_cast<int>(f.gate->n_in / 32)) + kDeclared <= gpu::kSharedMost;
  });
  return fits;
}

size_t ffn_words_bytes(int rows, const Ffn& f) {
  const int64_t groups = f.down->n_in / 32, columns = (f.down->n_out + kTile - 1) / kTile * kTile;
  return static_cast<size_t>(rows * (groups * (kGroupWords + kSegments * 2 * kTile) + kSegments * columns)) *
         sizeof(uint64_t);
}

void launch_ffn_stream(gpu::Stream s, const Ffn& f, QuantRows x, int rows, void* memory, int* launch, float* out) {
  const FfnTiles w = {tiled(*f.gate), tiled(*f.up), tiled(*f.down)};
  FfnWords words;
  words.act = static_cast<uint64_t*>(memory);
  words.part = words.act + static_cast<int64_t>(rows) * w.down.groups * kGroupWords;
  words.piece = words.part + static_cast<int64_t>(rows) * kSegments * w.down.tiles * kTile;
  words.launch = launch;
  with_format(f.gate->type, [&](auto format) {
    if constexpr (gpu::kStaged) {
      using F = decltype(format);
      const dim3 grid(static_cast<unsigned>(std::min(w.gate.tiles, gpu::compute_units())));
      gpu::launch_shared(s, grid, kHalfThreads, shared_bytes<F>(rows, w.gate.groups), ffn_stream_kernel<F>, w, x, rows,
                         words, out);
    }
  });
}

}  // namespace dflash::hip
