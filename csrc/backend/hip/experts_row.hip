// The experts of one row in one launch. Blocks take gate and up tiles of all experts in turn, expert after expert, then
// each makes a few columns of down for all experts and adds these up itself: what blocks wait for is each other's
// activations alone, and those of the first experts are there by then. All weights pass through one ring without a
// pause. NVIDIA only.
//
// Blocks wait for each other, so all must be on the device at a time: no more are launched than multiprocessors.

#include <algorithm>

#include "backend/hip/expert_words.h"
#include "backend/hip/select_sorted.h"
#include "backend/hip/task_stream.h"

namespace dflash::hip {

namespace {

constexpr int kRowWaves = 2 * kSegments, kRowThreads = kRowWaves * gpu::kWave;
constexpr int kUnit = 8;        // columns of down are shared out by so many: their scales are 16 bytes
constexpr int kGroupWords = 3;  // of a group of activations
// Of a wave's ring, half of what experts_stream has: more copies under way keep the first ones from coming, and the
// next kernel's find room.
template <typename F>
constexpr int kRowSlots = 6 / kChunk<F>;

// What the host works out for all blocks.
struct RowShape {
  int per_block;                 // columns of down
  int in_segments, ff_segments;  // of gate and up, of down
  Divisor tiles;                 // of gate
  Divisor slots;                 // top_k
};

// What a block makes: pairs of a gate and an up tile first, first + step, ... of all experts (waves 0..7 gate, 8..15
// up); then down columns column .. end - 1 in jobs, each kTile columns at most of one expert: waves 0..7 the
// even, 8..15 the odd ones.
struct Share {
  int first, step, pairs;
  int column, end;
  int jobs;  // top_k for each kTile columns
};

// A wave's segment of its block's tiles.
template <typename F>
struct RowTasks {
  const ExpertTiles& w;
  const int* chosen;  // [top_k] experts, in shared memory
  const Share& share;
  const RowShape& shape;
  Span in, ff;
  int top_k, half, pair, job;

  __device__ RowTasks(const ExpertTiles& tiles, const int* experts, const Share& s, const RowShape& host, int k, int h,
                      Span input, Span inner)
      : w(tiles),
        chosen(experts),
        share(s),
        shape(host),
        in(input),
        ff(inner),
        top_k(k),
        half(h),
        pair(s.first),
        job(h) {}

  __device__ inline bool next(Run<F>& run) {
    if (pair < share.pairs) {
      const int slot = shape.tiles.of(pair);
      run.set(TileView<F>(half == 0 ? w.gate : w.up, chosen[slot], pair - slot * w.gate.tiles), in);
      pair += share.step;
      return true;
    }
    if (job >= share.jobs) return false;
    const int part = shape.slots.of(job);
    run.set_columns(w.down, chosen[job - part * top_k], share.column + part * kTile, share.end, ff);
    job += 2;
    return true;
  }
};

// A wave's segment of a slot's activations, from the words that blocks leave for each other.
struct PostedActs {
  const uint4* words;  // [groups of all slots, kGroupWords]
  uint32_t launch;
  uint4 asked = {};  // the lane's of the first ones

  // By a wave, ahead of take(): groups first .. first + groups - 1.
  __device__ inline void ask(int64_t first, int groups) {
    if (gpu::lane() < at_a_time(groups)) asked = gpu::peek(words + first * kGroupWords + gpu::lane());
  }

  // To shared memory at lds, as soon as all are posted.
  __device__ inline ActRows take(uint8_t* lds, int64_t first, int groups) {
    const int lane = gpu::lane(), part = lane % kGroupWords;
    uint32_t* const q = reinterpret_cast<uint32_t*>(lds);
    GroupScale* const scale = reinterpret_cast<GroupScale*>(lds + act_stride(groups));
#pragma unroll 1
    for (int g = 0; g < groups; g += kGroups) {
      if (g > 0) ask(first + g, groups - g);
      if (lane < at_a_time(groups - g)) {
        const int group = g + lane / kGroupWords;
        while (!gpu::posted(asked, launch)) asked = gpu::peek(words + (first + g) * kGroupWords + lane);
        uint32_t* to = q + group * 8 + part * 3;
        to[0] = asked.x;
        to[1] = asked.y;
        if (part < 2) to[2] = asked.z;
        if (part == 2) scale[group].d = __uint_as_float(asked.z);
      }
    }
    gpu::wave_sync();
#pragma unroll 1
    for (int g = lane; g < groups; g += gpu::kWave) {
      int sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = gpu::dot4(static_cast<int>(q[g * 8 + i]), 0x01010101, sum);
      scale[g].sum = sum;
    }
    gpu::wave_sync();
    return {reinterpret_cast<const int8_t*>(q), scale, act_stride(groups), groups};
  }

 private:
  static constexpr int kGroups = gpu::kWave / kGroupWords;
  static __device__ inline int at_a_time(int groups) { return min(groups, kGroups) * kGroupWords; }
};

// A wave's values as an int8 group in kGroupWords words: of 36 bytes the last four are the scale. Readers add up the
// values themselves.
__device__ inline void post_group_words(float v, uint4* to, uint32_t launch) {
  int i;
  const GroupScale s = quantize_lane(v, &i);
  const int lane = gpu::lane(), from = lane * 12;  // of three fours of values
  uint32_t bytes = (static_cast<uint32_t>(i) & 255u) << (8 * (lane & 3));
  bytes |= gpu::shuffle_xor<1>(bytes);
  bytes |= gpu::shuffle_xor<2>(bytes);
  const uint32_t a = gpu::shuffle(bytes, from % gpu::kWave), b = gpu::shuffle(bytes, (from + 4) % gpu::kWave);
  const uint32_t c = gpu::shuffle(bytes, (from + 8) % gpu::kWave);
  if (lane < kGroupWords) gpu::post(to + lane, a, b, lane == kGroupWords - 1 ? __float_as_uint(s.d) : c, launch);
}

// out [n_out]. 96 registers: a block of the next kernel (256 threads of 64) finds room
// beside it, but no second block of this one.
template <typename F>
__global__ void DFLASH_REGISTERS(96)
    experts_row_kernel(ExpertTiles w, QuantRows x, FewChoice choice, WaveMemory memory, ExpertWords words,
                       uint4* acts_words, RowShape shape, float* out) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<1> sums[2][2];      // of half a block's tiles; the first in turn
  __shared__ float weights[gpu::kWave];  // of the slots
  __shared__ uint32_t launch;            // its number
  __shared__ int chosen[gpu::kWave];     // experts
  __shared__ uint32_t keys[kMaxExperts];
  __shared__ float logits[kMaxExperts];
  constexpr int kSlots = kRowSlots<F>;
  const int wave = gpu::wave(), lane = gpu::lane(), half = wave / kSegments, segment = wave % kSegments;
  const int top_k = choice.top_k, block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int column = block * shape.per_block, end = min(column + shape.per_block, w.down.tiles * kTile);
  const int parts = (end - column + kTile - 1) / kTile;
  const Share share = {block, blocks, top_k * w.gate.tiles, column, end, parts * top_k};
  const Span in = segment_span(segment, w.gate.groups), ff = segment_span(segment, w.down.groups);
  Partial<1>* const down_sums = reinterpret_cast<Partial<1>*>(memory.ring(lds, kRowWaves));  // [jobs]
  const bool chooses = wave == 0, numbers = threadIdx.x == kRowThreads - 1;
  const int expert = static_cast<int>(threadIdx.x);
  const bool scores = expert < choice.n_expert;
  const float bias = scores && choice.bias != nullptr ? choice.bias[expert] : 0.0f;
  gpu::wait_only();
  const float logit = scores ? gpu::load_fresh(choice.logits + expert) : 0.0f;
  const uint32_t launch0 = numbers ? launch_number(words) : 0;
  auto row0 = [](int) { return 0; };
  // Before the weights, which would be in their way.
  ActRows acts = begin_acts(memory.act_rows(lds, wave), x, in, row0, 1, 1);
  if (expert < kMaxExperts) {
    keys[expert] = scores ? choice_key(logit, bias) : 0;
    logits[expert] = logit;
  }
  if (numbers) launch = launch0;
  __syncthreads();
  // The experts of the tiles that the ring begins with.
  const int last = block + (kSlots - 1) * blocks;
  const int soon = shape.in_segments == kSegments && last < share.pairs ? shape.tiles.of(last) + 1 : top_k;
  LaneExperts list;
  if (chooses) {
    uint32_t key[kExpertsPerLane];
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) key[i] = keys[lane + i * gpu::kWave];
    list = LaneExperts(key);
  }
  // Twice through one copy of the code: for the tiles the ring begins with, and for all.
  TaskStream<F, kSlots, RowTasks<F>> stream(memory.ring(lds, wave), {w, chosen, share, shape, top_k, half, in, ff});
  int mine = 0;
#pragma unroll 1
  for (int from = 0, upto = soon;; from = soon, upto = top_k) {
    if (chooses) {
      mine = select_sorted(list, upto, from, mine);
      if (lane >= from && lane < upto) chosen[lane] = mine;  // other waves read those before
    }
    __syncthreads();
    if (from > 0) break;
    stream.start();
  }
  if (chooses) weights[lane] = slot_weight(lane < top_k ? logits[mine] : 0.0f, top_k);
  if (numbers) {
    note_launch(words, launch0);
    if (block == 0 && choice.distinct != nullptr) atomicAdd(choice.distinct, top_k);
  }

  PostedActs posted{acts_words, launch};
  const int groups = ff.g1 - ff.g0;
  auto first_group = [&](int job) {
    return static_cast<int64_t>(job - shape.slots.of(job) * top_k) * w.down.groups + ff.g0;
  };
  stream.expect(in.g1 - in.g0);
  int made = 0, job = half;
  // One loop for both, and so one copy of its code: instructions come from memory that is busy with weights.
#pragma unroll 1
  for (int pair = share.first;;) {
    const bool down = pair >= share.pairs;
    if (down) {
      if (job >= share.jobs) break;
      if (made == 0 && job == half) gpu::copy_wait<kSlots>();  // without a pair: the row, whose place is needed now
      stream.expect(groups);
      acts = posted.take(memory.act_rows(lds, wave), first_group(job), groups);
      if (job + 2 < share.jobs) posted.ask(first_group(job + 2), groups);
    }
    tile_segment<F, 1, false>(stream, acts, row0, 1, down ? down_sums[job][segment] : sums[made % 2][half][segment]);
    if (down) {
      if (job + 6 >= share.jobs) gpu::release_next();
      job += 2;
      continue;
    }
    __syncthreads();
    if (wave == made % kRowWaves) {
      const int segments = shape.in_segments;
      const float gate = add_segments<1>(sums[made % 2][0], segments, 0, lane);
      const float up = add_segments<1>(sums[made % 2][1], segments, 0, lane);
      post_group_words(swiglu(gate, up), acts_words + static_cast<int64_t>(pair) * kGroupWords, launch);
    }
    pair += share.step;
    ++made;
    if (pair >= share.pairs && half < share.jobs) posted.ask(first_group(half), groups);
  }
  const int mine_column = column + static_cast<int>(threadIdx.x);
  const bool writes = mine_column < end && mine_column < w.down.n_out;
  const float before = writes ? out[mine_column] : 0.0f;
  __syncthreads();
  // A job's sum in place of its first segment's.
  const int segments = shape.ff_segments;
#pragma unroll 1
  for (int i = wave; i < share.jobs; i += kRowWaves) {
    const float sum = add_segments<1>(down_sums[i], segments, 0, lane);
    down_sums[i][0][0][lane] = sum;
  }
  __syncthreads();
  if (writes) {
    float sum = 0.0f;
    for (int slot = 0; slot < top_k; ++slot) {
      sum = fmaf(weights[slot], down_sums[wave * top_k + slot][0][0][lane], sum);
    }
    out[mine_column] = before + sum;
  }
}

}  // namespace

size_t row_words_bytes(int top_k, int64_t n_ff) {
  return static_cast<size_t>(top_k * ((n_ff + kTile - 1) / kTile) * kGroupWords) * sizeof(uint4);
}

bool launch_experts_row(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up,
                        const TiledWeight& down, QuantRows x, const FewChoice& c, void* memory, int* launch,
                        float* out) {
  bool fits = false;
  with_format(type, [&](auto format) {
    if constexpr (gpu::kStaged) {
      using F = decltype(format);
      WaveMemory wave;
      wave.ring_bytes = kRowSlots<F> * Slot<F, 0>::kBytes;
      wave.segment = std::max(segment_groups(gate.groups), segment_groups(down.groups));
      wave.acts = 1;
      const int columns = down.tiles * kTile, units = columns / kUnit;
      const int per_block = (units + gpu::compute_units() - 1) / gpu::compute_units() * kUnit;
      const int jobs = (per_block + kTile - 1) / kTile * c.top_k;
      const size_t shared =
          kRowWaves * static_cast<size_t>(wave.wave_bytes()) + static_cast<size_t>(jobs) * sizeof(Partial<1>);
      const auto kernel = experts_row_kernel<F>;
      fits = c.rows == 1 && c.top_k <= gpu::kWave && per_block <= kRowThreads &&
             gpu::blocks_that_fit(kernel, kRowThreads, shared) > 0;
      if (!fits) return;
      const ExpertTiles w = {gate, up, down};
      const RowShape shape = {per_block, segment_count(gate.groups), segment_count(down.groups), Divisor(gate.tiles),
                              Divisor(c.top_k)};
      ExpertWords words;
      words.launch = launch;
      gpu::launch_shared(s, dim3(static_cast<unsigned>((columns + per_block - 1) / per_block)), kRowThreads, shared,
                         kernel, w, x, c, wave, words, static_cast<uint4*>(memory), shape, out);
    }
  });
  return fits;
}

}  // namespace dflash::hip
