// A dense feed-forward of few rows in one launch: norm, gate and up, SwiGLU, down. A block a multiprocessor; a wave's
// weights pass through one ring from the first tile to the last, so that memory never rests. NVIDIA only.
//
// All blocks make as many whole gate and up tiles, a wave a segment of K. What is left over (24 of 288 tiles on 132
// multiprocessors would keep the others waiting) is cut by segments of K, and so is down: each is the work of one wave
// of any block, whose sums the others read in words that carry the launch's number (gpu_blocks.h). A segment of down
// waits for its own activations alone.
//
// Blocks wait for each other, so all must be on the device at a time: there is one to a multiprocessor.

#include <algorithm>

#include "backend/hip/dense_few.h"
#include "backend/hip/gpu_blocks.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

constexpr int kMost = kFfnStreamRows;
constexpr int kStage = 18;       // groups of down's activations that a wave has in shared memory at a time
constexpr int kGroupWords = 10;  // of a group of activations: int8, four to a word, then d and sum
template <typename F>
constexpr int kRingSlots = F::kHalves == 2 ? 4 : 5;

struct FfnTiles {
  TiledWeight gate, up, down;
};

struct FfnWords {
  uint64_t* act = nullptr;    // [rows, n_ff / 32, kGroupWords]
  uint64_t* piece = nullptr;  // [tiles left over, segments, gate and up, rows, 32] sums of a segment
  uint64_t* part = nullptr;   // [segments of down, rows, n_embd in whole tiles] sums of a segment
  int* launch = nullptr;      // [2] launches so far, blocks of this one that know it
};

// What a wave does: rounds() whole gate and up tiles with the other waves of its block, then items by itself: pieces (a
// segment of a gate and an up tile that is left over), then units (a segment of a down tile, first segments first).
class FfnWork {
 public:
  struct Task {
    bool down;
    int tile, segment;
  };

  __device__ FfnWork(const FfnTiles& w, int blocks)
      : down_tiles_(w.down.tiles),
        segments_(segment_count(w.gate.groups)),
        blocks_(blocks),
        rounds_(w.gate.tiles / blocks),
        pieces_(w.gate.tiles % blocks * segments_),
        items_(pieces_ + segment_count(w.down.groups) * w.down.tiles),
        first_((kSegments - 1 - gpu::wave()) * blocks + static_cast<int>(blockIdx.x)) {}

  __device__ int rounds() const { return rounds_; }
  __device__ int left_over() const { return pieces_ / segments_; }  // tiles
  __device__ int tile_of_piece(int tile) const { return rounds_ * blocks_ + tile; }
  __device__ bool there(int k) const { return k < rounds_ || item(k) < items_; }
  __device__ bool is_piece(int k) const { return item(k) < pieces_; }
  __device__ Task task(int k) const {
    if (k < rounds_) return {false, k * blocks_ + static_cast<int>(blockIdx.x), gpu::wave()};
    const int i = item(k);
    if (i < pieces_) return {false, tile_of_piece(i / segments_), i % segments_};
    return {true, (i - pieces_) % down_tiles_, (i - pieces_) / down_tiles_};
  }

 private:
  __device__ int item(int k) const { return first_ + (k - rounds_) * kSegments * blocks_; }

  int down_tiles_, segments_, blocks_, rounds_, pieces_, items_, first_;
};

// A wave's weights, task after task.
template <typename F, int Slots>
class FfnStream {
 public:
  using Layout = Slot<F, 0>;

  __device__ FfnStream(uint8_t* lds, const FfnTiles& w, const FfnWork& work) : lds_(lds), w_(w), work_(work) {}

  __device__ inline void start() {
#pragma unroll
    for (int s = 0; s < Slots; ++s) {
      copy(lds_ + s * Layout::kBytes);
      gpu::copy_commit();
    }
  }

  // Calls use(quants, scales, first group, groups, slot) for the pieces of the next `groups`, a segment of a tile.
  template <typename Use>
  __device__ inline void take(int groups, Use use) {
#pragma unroll 1
    for (int g = 0; g < groups; g += kChunk<F>) {
      gpu::copy_wait<Slots - 1>();
      uint8_t* slot = lds_ + slot_;
      use(slot, reinterpret_cast<const uint16_t*>(slot + Layout::kScales), g, min(kChunk<F>, groups - g), slot);
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
    while (work_.there(task_)) {
      const FfnWork::Task t = work_.task(task_);
      const TiledWeight& w = t.down ? w_.down : half_ == 0 ? w_.gate : w_.up;
      const Span span = segment_span(t.segment, w.groups);
      const TileView<F> tile(w, 0, t.tile);
      quants_ = tile.group_quants(span.g0) + gpu::lane() * 16;
      scales_ = reinterpret_cast<const uint8_t*>(tile.group_scales(span.g0)) + gpu::lane() * 16;
      left_ = span.g1 - span.g0;
      half_ ^= t.down ? 0 : 1;
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
  const FfnTiles& w_;
  const FfnWork& work_;
  int task_ = 0, half_ = 0;  // what comes next
  int slot_ = 0;             // of the next piece to use, in bytes
  int left_ = 0;             // groups of the tile at hand that are not copied yet
  const uint8_t* quants_ = nullptr;
  const uint8_t* scales_ = nullptr;
};

// A segment of a tile, as tile_segment takes it.
template <typename Stream>
struct Segment {
  using Layout = typename Stream::Layout;
  Stream& stream;
  int groups;
  template <typename Use>
  __device__ inline void take(Use use) {
    stream.take(groups, use);
  }
};

// The activations of a segment of down, kStage groups of all rows at a time: read as words while the groups before are
// worked on, waited for, and left in the wave's own shared memory.
template <int MaxRows>
class ActWords {
 public:
  __device__ inline ActWords(uint8_t* lds, const uint64_t* words, int rows, int all_groups, Span span, uint32_t launch)
      : lds_(lds), words_(words), rows_(rows), all_groups_(all_groups), span_(span), launch_(launch) {
    ask(0);
  }

  __device__ inline ActRows rows() const {
    return {reinterpret_cast<const int8_t*>(lds_), scales(), act_stride(kStage), kStage};
  }

  // Groups [g, g + kStage) of the segment are there when this returns; the next ones are asked for.
  __device__ inline void arrive(int g) {
    while (missing()) ask(g);
    const int n = min(span_.g1 - span_.g0 - g, kStage) * kGroupWords;
    uint32_t* const scale = reinterpret_cast<uint32_t*>(scales());
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = i * gpu::kWave + gpu::lane(), group = at / kGroupWords, word = at % kGroupWords;
      uint32_t* const to =
          word < 8 ? reinterpret_cast<uint32_t*>(lds_) + group * 8 + word : scale + group * 2 + word - 8;
      const int stride = word < 8 ? act_stride(kStage) / 4 : kStage * 2;
#pragma unroll
      for (int r = 0; r < MaxRows; ++r) {
        if (r < rows_ && at < n) to[r * stride] = static_cast<uint32_t>(v_[r][i]);
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
    asked_ = min(span_.g1 - span_.g0 - g, kStage) * kGroupWords;
    const uint64_t* from = words_ + static_cast<int64_t>(span_.g0 + g) * kGroupWords + gpu::lane();
#pragma unroll
    for (int r = 0; r < MaxRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (r < rows_ && i * gpu::kWave + gpu::lane() < asked_) v_[r][i] = gpu::peek(from + i * gpu::kWave);
      }
      from += static_cast<int64_t>(all_groups_) * kGroupWords;
    }
  }

  __device__ inline bool missing() const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < MaxRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        any = any || (r < rows_ && i * gpu::kWave + gpu::lane() < asked_ && !gpu::posted(v_[r][i], launch_));
      }
    }
    return any;
  }

  uint8_t* lds_;
  const uint64_t* words_;
  int rows_, all_groups_;
  Span span_;
  uint32_t launch_;
  int asked_;
  uint64_t v_[MaxRows][kLoads];
};

// A segment of a down tile: its activations arrive with its weights.
template <typename Stream, typename Acts>
struct DownSegment {
  using Layout = typename Stream::Layout;
  Stream& stream;
  int groups;
  Acts& acts;
  template <typename Use>
  __device__ inline void take(Use use) {
    stream.take(groups, [&](const uint8_t* quants, const uint16_t* scales, int g, int n, const uint8_t* slot) {
      if (g % kStage == 0) acts.arrive(g);
      use(quants, scales, g % kStage, n, slot);
    });
  }
};

// A wave's values as an int8 group.
__device__ inline void post_group(float v, uint64_t* to, uint32_t launch) {
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

// The sum over segments, in order, of what lies at words + segment * stride, Outs of them side by side.
template <int Outs>
__device__ inline void await_sums(const uint64_t* words, int segments, int64_t stride, int64_t apart, uint32_t launch,
                                  float (&sum)[Outs]) {
  uint64_t v[Outs][kSegments];
  bool missing;
  do {
    missing = false;
#pragma unroll
    for (int o = 0; o < Outs; ++o) {
#pragma unroll
      for (int s = 0; s < kSegments; ++s) v[o][s] = gpu::peek(words + o * apart + min(s, segments - 1) * stride);
    }
#pragma unroll
    for (int o = 0; o < Outs; ++o) {
#pragma unroll
      for (int s = 0; s < kSegments; ++s) missing = missing || !gpu::posted(v[o][s], launch);
    }
  } while (missing);
#pragma unroll
  for (int o = 0; o < Outs; ++o) {
    sum[o] = kEmptySum;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      if (s < segments) sum[o] += __uint_as_float(static_cast<uint32_t>(v[o][s]));
    }
  }
}

// x [rows, n_embd] += the feed-forward of its norm. in.x is x.
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads, 1)
    ffn_stream_kernel(FfnTiles w, NormInput in, int rows, FfnWords words, float* x) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<MaxRows> sums[2];
  using Norms = NormRows<MaxRows, kSegments>;
  __shared__ typename Norms::Sums squares;
  __shared__ int launches;
  const int wave = gpu::wave(), block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int groups = w.gate.groups, n = groups * 32;
  const FfnWork work(w, blocks);
  constexpr int kRingBytes = kRingSlots<F> * Slot<F, 0>::kBytes;
  FfnStream<F, kRingSlots<F>> stream(lds + wave * kRingBytes, w, work);
  stream.start();
  uint8_t* const normed = lds + kSegments * kRingBytes;
  uint8_t* const down_acts = normed + norm_bytes(rows, n) + wave * rows * act_bytes(kStage);
  const Norms norm(in, n, rows);
  gpu::wait_for_previous();
  if (threadIdx.x == 0) launches = gpu::load_fresh(words.launch) + 1;
  norm.run(normed, squares);
  const uint32_t launch = static_cast<uint32_t>(launches);
  if (threadIdx.x == 0 && atomicAdd(words.launch + 1, 1) == blocks - 1) {  // every block has read the number
    words.launch[0] = launches;
    words.launch[1] = 0;
  }
  auto row_of = [](int r) { return r; };
  const int segments = segment_count(groups);
  auto act_words = [&](int row, int tile) {
    return words.act + (static_cast<int64_t>(row) * w.gate.tiles + tile) * kGroupWords;
  };
  auto gate_and_up = [&](Span span) {
    Segment<decltype(stream)> segment = {stream, span.g1 - span.g0};
    const ActRows acts = normed_rows(normed, rows, n, span.g0);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) tile_segment<F, MaxRows, false>(segment, acts, row_of, rows, sums[half][wave]);
  };
  int k = 0;
#pragma unroll 1
  for (; k < work.rounds(); ++k) {
    gate_and_up(segment_span(wave, groups));
    __syncthreads();
    if (wave < rows) {
      const float gate = add_segments<MaxRows>(sums[0], segments, wave, gpu::lane());
      const float up = add_segments<MaxRows>(sums[1], segments, wave, gpu::lane());
      post_group(swiglu(gate, up), act_words(wave, work.task(k).tile), launch);
    }
    __syncthreads();
  }

#pragma unroll 1
  for (; work.there(k) && work.is_piece(k); ++k) {
    const FfnWork::Task t = work.task(k);
    gate_and_up(segment_span(t.segment, groups));
    gpu::wave_sync();
    const int left = t.tile - work.tile_of_piece(0);
#pragma unroll 1
    for (int i = 0; i < 2 * rows; ++i) {
      const int half = i >= rows ? 1 : 0;
      const float v = sums[half][wave][i - half * rows][gpu::lane()];
      gpu::post(words.piece + (static_cast<int64_t>(left * segments + t.segment) * 2 * rows + i) * kTile + gpu::lane(),
                __float_as_uint(v), launch);
    }
    gpu::wave_sync();
  }
#pragma unroll 1
  for (int i = (kSegments - 1 - wave) * blocks + block; i < work.left_over() * rows; i += kSegments * blocks) {
    const int left = i / rows, row = i % rows;
    float sum[2];
    await_sums(words.piece + (static_cast<int64_t>(left) * segments * 2 * rows + row) * kTile + gpu::lane(), segments,
               2 * rows * kTile, rows * kTile, launch, sum);
    post_group(swiglu(sum[0], sum[1]), act_words(row, work.tile_of_piece(left)), launch);
  }

  const int64_t columns = static_cast<int64_t>(w.down.tiles) * kTile;
#pragma unroll 1
  for (; work.there(k); ++k) {
    const FfnWork::Task t = work.task(k);
    const Span span = segment_span(t.segment, w.down.groups);
    ActWords<MaxRows> acts(down_acts, words.act, rows, w.down.groups, span, launch);
    DownSegment<decltype(stream), ActWords<MaxRows>> segment = {stream, span.g1 - span.g0, acts};
    tile_segment<F, MaxRows, false>(segment, acts.rows(), row_of, rows, sums[0][wave]);
    gpu::wave_sync();
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      gpu::post(words.part + (static_cast<int64_t>(t.segment) * rows + r) * columns + t.tile * kTile + gpu::lane(),
                __float_as_uint(sums[0][wave][r][gpu::lane()]), launch);
    }
    gpu::wave_sync();
  }

  // The outputs: the waves of all blocks take a tile of a row each.
  const int down_segments = segment_count(w.down.groups);
#pragma unroll 1
  for (int i = wave * blocks + block; i < rows * w.down.tiles; i += kSegments * blocks) {
    const int row = i / w.down.tiles;
    const int64_t column = static_cast<int64_t>(i % w.down.tiles) * kTile + gpu::lane();
    const bool there = column < w.down.n_out;
    float* const to = x + row * w.down.n_out + column;
    const float before = there ? *to : 0.0f;
    float sum[1];
    await_sums(words.part + row * columns + column, down_segments, rows * columns, 0, launch, sum);
    if (there) *to = before + sum[0];
  }
}

template <typename F>
size_t shared_bytes(int rows, int64_t n_embd) {
  return static_cast<size_t>(kSegments * (kRingSlots<F> * Slot<F, 0>::kBytes + rows * act_bytes(kStage)) +
                             norm_bytes(rows, static_cast<int>(n_embd)));
}

constexpr size_t kDeclared = (2 * sizeof(Partial<kMost>) + kMost * gpu::kWave * sizeof(float) + 1024);

}  // namespace

bool ffn_stream(int rows, const Ffn& f) {
  const DType type = f.gate->type;
  if (!gpu::kStaged || rows > kFfnStreamRows || f.up->type != type || f.down->type != type) return false;
  bool fits = false;
  with_format(type, [&](auto format) {
    fits = shared_bytes<decltype(format)>(rows, f.gate->n_in) + kDeclared <= gpu::kSharedMost;
  });
  return fits && norm_fits(f.gate->n_in);
}

size_t ffn_words_bytes(int rows, const Ffn& f) {
  const int64_t groups = f.down->n_in / 32, columns = (f.down->n_out + kTile - 1) / kTile * kTile;
  return static_cast<size_t>(rows * (groups * (kGroupWords + kSegments * 2 * kTile) + kSegments * columns)) *
         sizeof(uint64_t);
}

void launch_ffn_stream(gpu::Stream s, const Ffn& f, int rows, void* memory, int* launch, float* x) {
  const FfnTiles w = {tiled(*f.gate), tiled(*f.up), tiled(*f.down)};
  FfnWords words;
  words.act = static_cast<uint64_t*>(memory);
  words.part = words.act + static_cast<int64_t>(rows) * w.down.groups * kGroupWords;
  words.piece = words.part + static_cast<int64_t>(rows) * kSegments * w.down.tiles * kTile;
  words.launch = launch;
  with_format(f.gate->type, [&](auto format) {
    if constexpr (gpu::kStaged) {
      using F = decltype(format);
      auto run = [&](auto kernel) {
        const dim3 grid(static_cast<unsigned>(std::min(w.gate.tiles, gpu::compute_units())));
        gpu::launch_shared(s, grid, kThreads, shared_bytes<F>(rows, f.gate->n_in), kernel, w,
                           NormInput{x, f.norm, f.eps}, rows, words, x);
      };
      rows <= 4 ? run(ffn_stream_kernel<F, 4>) : run(ffn_stream_kernel<F, kMost>);
    }
  });
}

}  // namespace dflash::hip
