// The experts of one row in one launch. A team of blocks works on each expert: a block makes its share of gate and up
// tiles, then its share of down tiles, all blocks as much as the others, and their weights pass through one ring
// without a pause. NVIDIA only.
//
// Blocks wait for each other, so all must be on the device at a time: no more are launched than fit.

#include <algorithm>

#include "backend/hip/expert_words.h"
#include "backend/hip/select_sorted.h"
#include "backend/hip/task_stream.h"

namespace dflash::hip {

namespace {

constexpr int kTeamWaves = 2 * kSegments, kTeamThreads = kTeamWaves * gpu::kWave;
constexpr int kBatch = 4;  // down tiles of half a block between two barriers
// Of a wave's ring, half of what experts_stream has: more copies under way keep the first ones from coming, and the
// next kernel's find room.
template <typename F>
constexpr int kTeamSlots = 6 / kChunk<F>;

// A block of a team. Its tiles are rank, rank + size, ...; waves 0..7 make gate, 8..15 up; of down tiles every other.
struct Team {
  int slot, rank, size;
};

// A wave's segment of its tiles.
template <typename F>
struct TeamTasks {
  const ExpertTiles& w;
  Team team;
  int expert, half;
  Span in, ff;
  int tile;
  bool down = false;

  __device__ TeamTasks(const ExpertTiles& tiles, const Team& t, int e, int h, Span input, Span inner)
      : w(tiles), team(t), expert(e), half(h), in(input), ff(inner), tile(t.rank) {}

  __device__ inline bool next(Run<F>& run) {
    if (!down && tile >= w.gate.tiles) {
      down = true;
      tile = team.rank + half * team.size;
    }
    if (down && tile >= w.down.tiles) return false;
    run.set(TileView<F>(down ? w.down : half == 0 ? w.gate : w.up, expert, tile), down ? ff : in);
    tile += down ? 2 * team.size : team.size;
    return true;
  }
};

// out [n_out]. 96 registers: a block of the next kernel (256 threads of 64) finds room beside it, but no second block
// of a team.
template <typename F>
__global__ void DFLASH_REGISTERS(96) experts_team_kernel(ExpertTiles w, QuantRows x, FewChoice choice,
                                                         WaveMemory memory, ExpertWords words, int size, float* out) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<1> sums[2][2], down_sums[kBatch][2];  // of half a block's tiles; the first in turn
  __shared__ float weights[gpu::kWave];                    // of the slots
  __shared__ uint32_t launch;                              // its number
  __shared__ int chosen;                                   // the team's expert
  const int wave = gpu::wave(), lane = gpu::lane(), half = wave / kSegments, segment = wave % kSegments;
  const Team team = {static_cast<int>(blockIdx.x) / size, static_cast<int>(blockIdx.x) % size, size};
  const Span in = segment_span(segment, w.gate.groups), ff = segment_span(segment, w.down.groups);
  const bool chooses = wave == 0, numbers = threadIdx.x == kTeamThreads - 1;
  float bias[kExpertsPerLane] = {}, logit[kExpertsPerLane] = {};
  if (chooses) load_experts(choice.bias, choice.n_expert, bias);
  gpu::wait_only();
  // One wave alone asks for them: all blocks want the same few lines of the L2.
  if (chooses) load_experts(choice.logits, choice.n_expert, logit);
  const uint32_t launch0 = numbers ? launch_number(words) : 0;
  auto row0 = [](int) { return 0; };
  // Before the weights, which would be in their way.
  ActRows acts = begin_acts(memory.act_rows(lds, wave), x, in, row0, 1, 1);
  uint32_t key[kExpertsPerLane] = {};
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    if (chooses && lane + i * gpu::kWave < choice.n_expert) key[i] = choice_key(logit[i], bias[i]);
  }
  LaneExperts list(key);
  int mine = 0;
  if (chooses) {
    mine = select_sorted(list, team.slot + 1);
    if (lane == team.slot) chosen = mine;
  }
  __syncthreads();
  TaskStream<F, kTeamSlots<F>, TeamTasks<F>> stream(memory.ring(lds, wave), {w, team, chosen, half, in, ff});
  stream.start();
  if (chooses) {
    mine = select_sorted(list, choice.top_k, team.slot + 1, mine);
    weights[lane] = chosen_weight(logit, mine, choice.top_k);  // read after a barrier
  }
  if (numbers) {
    launch = launch0;  // the same
    note_launch(words, launch0);
    if (blockIdx.x == 0 && choice.distinct != nullptr) atomicAdd(choice.distinct, choice.top_k);
  }

  stream.expect(in.g1 - in.g0);
  int segments = segment_count(w.gate.groups), made = 0;
#pragma unroll 1
  for (int tile = team.rank; tile < w.gate.tiles; tile += size, ++made) {
    auto& buffer = sums[made % 2];
    tile_segment<F, 1, false>(stream, acts, row0, 1, buffer[half][segment]);
    __syncthreads();
    if (wave == made % kTeamWaves) {
      const float gate = add_segments<1>(buffer[0], segments, 0, lane);
      const float up = add_segments<1>(buffer[1], segments, 0, lane);
      const int64_t group = static_cast<int64_t>(team.slot) * w.gate.tiles + tile;
      post_group(swiglu(gate, up), words.q + group * 8, words.scale + group * 2, launch);
    }
  }
  stream.expect(ff.g1 - ff.g0);
  segments = segment_count(w.down.groups);
  const int64_t y_stride = static_cast<int64_t>(w.down.tiles) * kTile;
  acts = await_acts(memory.act_rows(lds, wave), words, w.down.groups, ff, [&](int) { return team.slot; }, 1, launch);
#pragma unroll 1
  for (int first = 0; team.rank + first * size < w.down.tiles; first += 2 * kBatch) {
#pragma unroll 1
    for (int b = 0; b < kBatch; ++b) {
      const int tile = team.rank + (first + 2 * b + half) * size;
      if (tile >= w.down.tiles) break;
      tile_segment<F, 1, false>(stream, acts, row0, 1, down_sums[b][half][segment]);
      if (tile + 4 * size >= w.down.tiles) gpu::release_next();  // the last weights are on their way
    }
    __syncthreads();
    const int nth = first + wave, tile = team.rank + nth * size;  // a wave a tile
    if (wave < 2 * kBatch && tile < w.down.tiles) {
      const float v = add_segments<1>(down_sums[wave / 2][wave % 2], segments, 0, lane);
      const int64_t column = static_cast<int64_t>(tile) * kTile + lane;
      post_output(words, team.slot, y_stride, column, v, launch);
      if (nth % choice.top_k == team.slot) {  // this block adds up the experts
        const bool there = column < w.down.n_out;
        const float before = there ? out[column] : 0.0f;
        const float sum =
            await_outputs(words, 0, choice.top_k, y_stride, column, [&](int slot) { return weights[slot]; }, launch);
        if (there) out[column] = before + sum;
      }
    }
    __syncthreads();
  }
}

}  // namespace

bool launch_experts_team(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up,
                         const TiledWeight& down, QuantRows x, const FewChoice& c, void* memory, int* launch,
                         float* out) {
  bool fits = false;
  with_format(type, [&](auto format) {
    if constexpr (gpu::kStaged) {
      using F = decltype(format);
      WaveMemory shape;
      shape.ring_bytes = kTeamSlots<F> * Slot<F, 0>::kBytes;
      shape.segment = std::max(segment_groups(gate.groups), segment_groups(down.groups));
      shape.acts = 1;
      const size_t shared = kTeamWaves * static_cast<size_t>(shape.wave_bytes());
      const auto kernel = experts_team_kernel<F>;
      const int team = std::min(gpu::compute_units() / c.top_k, gate.tiles);
      fits = c.rows == 1 && team > 0 && gpu::blocks_that_fit(kernel, kTeamThreads, shared) > 0;
      if (!fits) return;
      const ExpertTiles w = {gate, up, down};
      gpu::launch_shared(s, dim3(static_cast<unsigned>(team * c.top_k)), kTeamThreads, shared, kernel, w, x, c, shape,
                         expert_words(memory, launch, c.top_k, down), team, out);
    }
  });
  return fits;
}

}  // namespace dflash::hip
