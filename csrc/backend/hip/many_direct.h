#pragma once
// many_rows.h without a ring: every wave loads its weights from global memory into registers a group ahead, all waves
// copy the tokens.

#include "backend/hip/many_rows.h"

#if defined(DFLASH_GPU_HIP)

namespace dflash::hip {

// Activations of a stage: [group][chunk][token][16 bytes]; planes are padded so that the chunks of a token, which are
// written together, lie in different banks.
inline constexpr int kChunkPlane = kManyTokens * 16 + 16;
inline constexpr int kActBytes = gpu::kHalfGroups * 4 * kChunkPlane;

// Shared memory of a block.
template <typename F>
struct StageOf {
  static constexpr int kBytes = kActBytes;
  static constexpr int kAll = 2 * kBytes;  // the results leave through the same
  static_assert(kManyWaves * kOutFloats * 4 <= kAll);
};

// The wave's runs of the job's tiles times its tokens, Blocks token blocks of them.
template <typename F, typename N, int Blocks, typename Job>
__device__ inline void multiply_blocks(Job& job, const HalfRows& x, uint8_t* stages) {
  constexpr int kGroups = gpu::kHalfGroups, kHeld = gpu::kHalfHeld, kWaveTiles = kRuns / 2;
  constexpr int kPerToken = kGroups * 4;  // copies of 16 bytes a token's row of a stage takes
  constexpr int kTokensAtOnce = kManyThreads / kPerToken;
  constexpr int kCopies = (Blocks * gpu::kMmaTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  const int t = static_cast<int>(threadIdx.x), groups = job.groups, count = job.tokens;
  const int chunk = t % kPerToken, first_token = t / kPerToken;
  const uint16_t* from[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    from[i] = x.v + job.row(min(first_token + i * kTokensAtOnce, count - 1)) * x.n + chunk * 8;
  }
  uint4 copies[kCopies];
  const int acts_to = chunk * kChunkPlane + first_token * 16;
  // Loads the next step's activations; finish() writes them to its stage. Past the last group: zeros.
  int next_group = 0;
  uint8_t* next_stage = stages;
  auto start = [&] {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copies[i] = make_uint4(0, 0, 0, 0);
      if (next_group + chunk / 4 < groups && first_token + i * kTokensAtOnce < count) {
        copies[i] = *reinterpret_cast<const uint4*>(from[i]);
      }
    }
  };
  auto finish = [&] {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      *reinterpret_cast<uint4*>(next_stage + acts_to + i * kTokensAtOnce * 16) = copies[i];
      from[i] += kGroups * 32;
    }
    next_group += kGroups;
    next_stage = next_stage == stages ? stages + kActBytes : stages;
  };
  ManySums<Blocks> sum;
  sum.clear();
  // A wave has both halves of each of its tiles.
  using Place = typename HalfRaw<F>::Place;
  const TileView<F> first = job.tile(job.half(0) / 2), second = job.tile(job.half(2) / 2);
  Place at[kWaveTiles] = {Place(first.quants, first.scales), Place(second.quants, second.scales)};
  HalfRaw<F> raw[kRuns];
  auto load_raw = [&](int group) {  // past the end: the last one stays, and meets activations of zero
    if (group >= groups) return;
#pragma unroll
    for (int m = 0; m < kRuns; ++m) raw[m].load(at[m / 2], m % 2);
    at[0].next();
    at[1].next();
  };
  load_raw(0);
  start();
  finish();
  gpu::HalfWeights now[kHeld];
  const int steps = (groups + kGroups - 1) / kGroups;
  const uint8_t* stage = stages;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
    start();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int part = 0; part < kRuns / kHeld; ++part) {
#pragma unroll
        for (int m = 0; m < kHeld; ++m) now[m] = raw[part * kHeld + m].template expand<N>();
        if (part == kRuns / kHeld - 1) load_raw(step * kGroups + g + 1);
        gpu::half_products<N, Blocks>(sum.v[part], now, stage + g * 4 * kChunkPlane, kChunkPlane);
      }
    }
    finish();
    stage = stage == stages ? stages + kActBytes : stages;
  }
  __syncthreads();
  job.finish(sum, reinterpret_cast<float*>(stages) + gpu::wave() * kOutFloats);
}

template <typename F, typename N, typename Job>
__device__ inline void multiply_jobs(Job job, const HalfRows& x, uint8_t* stages, int) {
  if (!job.take(static_cast<int>(blockIdx.x))) return;
  static_assert(kTokenBlocks == 2);
  if (job.tokens <= gpu::kMmaTokens) {
    multiply_blocks<F, N, 1>(job, x, stages);
  } else {
    multiply_blocks<F, N, 2>(job, x, stages);
  }
}

// Blocks to launch for jobs, of which there are at most `most`.
inline unsigned blocks_for_jobs(int64_t most) { return static_cast<unsigned>(most); }
template <typename F>
int ring_stages() {
  return 0;
}
template <typename F>
constexpr size_t ring_bytes(int) {
  return StageOf<F>::kAll;
}

}  // namespace dflash::hip

#endif
