#pragma once
// many_rows.h with a ring of stages in shared memory: producer waves copy weights and tokens (cp.async), the others
// expand and multiply; barriers say which stage is full and which is free. A block takes job after job, and the
// producers are in the next one while the others still write the results of the last.

#include "backend/hip/many_rows.h"

#if defined(DFLASH_GPU_CUDA)

namespace dflash::hip {

inline constexpr int kMostStages = 8, kBarrierBytes = 2 * kMostStages * 8;

// Activations of a stage: [token][8 pieces of 16 bytes, turned as gpu::half_step reads them]. (A copy of 32 bytes whose
// halves went to different places would be read twice from the L2 cache, whose rate is what bounds these kernels.)
inline constexpr int kTokenBytes = gpu::kHalfGroups * 64, kActBytes = kManyTokens * kTokenBytes;
static_assert(kTokenBytes == gpu::kHalfTurn);
inline constexpr int kOutBytes = kManyWaves * kOutFloats * 4;

// A stage: the activations, then the weights of each tile: quants, then scales.
template <typename F>
struct StageOf {
  static constexpr int kQuants = gpu::kHalfGroups * F::kQuantBytes;
  static constexpr int kScales = gpu::kHalfGroups * kTile * F::kHalves * 2;
  static constexpr int kTileBytes = kQuants + kScales;
  static constexpr int kBytes = kActBytes + kManyTiles * kTileBytes;
  static_assert(kBytes % 1024 == 0);  // as turned activations want it
};

struct Ring {
  uint8_t* stages;
  uint64_t *full, *empty;  // [n_stages]
  int n_stages;
  int at = 0;
  uint32_t parity = 0;

  __device__ inline void next() {
    if (++at == n_stages) {
      at = 0;
      parity ^= 1;
    }
  }
};

// Copies the stages of a job into the ring, Copies * kTokensAtOnce tokens of it (past the job's last: that one again).
inline constexpr int kProducerThreads = gpu::kHalfProducers * gpu::kWave;
inline constexpr int kTokenPieces = gpu::kHalfGroups * 4;  // copies of 16 bytes a token's row of a stage takes
inline constexpr int kTokensAtOnce = kProducerThreads / kTokenPieces;

template <typename F, int Copies, typename Job>
__device__ inline void produce(Job& job, const HalfRows& x, Ring& ring) {
  constexpr int kGroups = gpu::kHalfGroups;
  constexpr int kQuantPieces = StageOf<F>::kQuants / 16, kScalePieces = StageOf<F>::kScales / 16;
  constexpr int kTilesAtOnce = kProducerThreads / kQuantPieces, kQuantCopies = kManyTiles / kTilesAtOnce;
  static_assert(kProducerThreads % kQuantPieces == 0 && kManyTiles % kTilesAtOnce == 0);
  static_assert(kManyTiles * kScalePieces <= kProducerThreads);
  const int t = static_cast<int>(threadIdx.x) - kManyWaves * gpu::kWave;
  const int token_piece = t % kTokenPieces, token = t / kTokenPieces, groups = job.groups;
  const uint16_t* from[Copies];
#pragma unroll
  for (int i = 0; i < Copies; ++i) {
    from[i] = x.v + job.row(min(token + i * kTokensAtOnce, job.tokens - 1)) * x.n + token_piece * 8;
  }
  const int quant_piece = t % kQuantPieces, quant_tile = t / kQuantPieces;
  const uint8_t* quants[kQuantCopies];
#pragma unroll
  for (int i = 0; i < kQuantCopies; ++i) {
    quants[i] = job.tile(quant_tile + i * kTilesAtOnce).quants + quant_piece * 16;
  }
  const int scale_piece = t % kScalePieces, scale_tile = t / kScalePieces;
  const uint16_t* scales = job.tile(min(scale_tile, kManyTiles - 1)).scales + scale_piece * 8;
  const int acts_to = token * kTokenBytes + gpu::half_turned(token_piece, token) * 16;
  static_assert(kTokensAtOnce % 8 == 0);
  const int quants_to = kActBytes + quant_tile * StageOf<F>::kTileBytes + quant_piece * 16;
  const int scales_to = kActBytes + scale_tile * StageOf<F>::kTileBytes + StageOf<F>::kQuants + scale_piece * 16;
  auto copy_stage = [&](auto count) {
    constexpr int kLeft = decltype(count)::value;  // groups that are left: past the last nothing is read
    gpu::barrier_wait(ring.empty + ring.at, ring.parity ^ 1);
    uint8_t* stage = ring.stages + ring.at * StageOf<F>::kBytes;
    if (kLeft == kGroups || quant_piece * 16 < kLeft * F::kQuantBytes) {
#pragma unroll
      for (int i = 0; i < kQuantCopies; ++i) {
        gpu::copy_begin<16>(stage + quants_to + i * kTilesAtOnce * StageOf<F>::kTileBytes, quants[i]);
      }
    }
    if (scale_tile < kManyTiles && scale_piece < kScalePieces * kLeft / kGroups) {
      gpu::copy_begin<16>(stage + scales_to, scales);
    }
    if (kLeft == kGroups || token_piece < 4 * kLeft) {
#pragma unroll
      for (int i = 0; i < Copies; ++i) gpu::copy_begin<16>(stage + acts_to + i * kTokensAtOnce * kTokenBytes, from[i]);
    }
    gpu::barrier_arrive_copied(ring.full + ring.at);
    ring.next();
#pragma unroll
    for (int i = 0; i < kQuantCopies; ++i) quants[i] += StageOf<F>::kQuants;
    scales += kScalePieces * 8;
#pragma unroll
    for (int i = 0; i < Copies; ++i) from[i] += kGroups * 32;
  };
#pragma unroll 1
  for (int step = groups / kGroups; step > 0; --step) copy_stage(std::integral_constant<int, kGroups>{});
  if (groups % kGroups != 0) copy_stage(std::integral_constant<int, 1>{});
}

template <typename F, typename Job>
__device__ inline void produce(Job& job, const HalfRows& x, Ring& ring) {
  static_assert(kManyTokens == 6 * kTokensAtOnce);
  const int copies = (job.tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  if (copies <= 2) {
    produce<F, 2>(job, x, ring);
  } else if (copies == 3) {
    produce<F, 3>(job, x, ring);
  } else if (copies == 4) {
    produce<F, 4>(job, x, ring);
  } else if (copies == 5) {
    produce<F, 5>(job, x, ring);
  } else {
    produce<F, 6>(job, x, ring);
  }
}

// The wave's runs of the job's tiles times its tokens, Blocks token blocks of them. Weights are loaded a group ahead of
// their product, and expanded while the product of depth 16 before still runs.
template <typename F, typename N, int Blocks, typename Job>
__device__ inline void multiply_blocks(Job& job, Ring& ring, float* out) {
  static_assert(gpu::kHalfHeld == kRuns && gpu::kHalfGroups == 2);
  using Raw = HalfRaw<F>;
  ManySums<Blocks> sum;
  sum.clear();
  int weights[kRuns], scales[kRuns];
#pragma unroll
  for (int m = 0; m < kRuns; ++m) {
    weights[m] = kActBytes + job.half(m) / 2 * StageOf<F>::kTileBytes + job.half(m) % 2 * 256;
    scales[m] = kActBytes + job.half(m) / 2 * StageOf<F>::kTileBytes + StageOf<F>::kQuants +
                job.half(m) % 2 * 16 * F::kHalves * 2;
  }
  gpu::HalfWeightWords w[2][kRuns];  // of this step of depth 16, and of the one before, which may still run
  int read = -1;                     // the stage before
  auto wait = [&] {
    gpu::barrier_wait(ring.full + ring.at, ring.parity);
    gpu::products_see_copies();
    return ring.stages + ring.at * StageOf<F>::kBytes;
  };
  auto load = [&](Raw(&raw)[kRuns], const uint8_t* stage, int g) {
#pragma unroll
    for (int m = 0; m < kRuns; ++m) {
      raw[m].load({stage + weights[m] + g * F::kQuantBytes, stage + scales[m] + g * kTile * F::kHalves * 2}, 0);
    }
  };
  auto multiply = [&](const Raw(&raw)[kRuns], const uint8_t* acts, int g, bool first) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int m = 0; m < kRuns; ++m) w[k][m] = raw[m].template expand<N>().k[k];
      gpu::products_begin();
      gpu::half_step<N, Blocks>(sum.v[0], w[k], acts, g * 4 + k * 2);
      gpu::products_end();
      gpu::products_wait<1>();
      gpu::products_hold(w[1 - k]);
      if (k == 0 && first && read >= 0) gpu::barrier_arrive(ring.empty + read);
    }
  };
  auto settle = [&] {
    gpu::products_wait<0>();
    gpu::products_hold(w[0]);
    gpu::products_hold(w[1]);
#pragma unroll
    for (int m = 0; m < kRuns; ++m) gpu::products_hold(sum.v[0][m]);
  };
  Raw even[kRuns], odd[kRuns];
  const uint8_t* stage = wait();
  load(even, stage, 0);
#pragma unroll 1
  for (int left = job.groups; left > 2; left -= 2) {
    load(odd, stage, 1);
    multiply(even, stage, 0, true);
    const uint8_t* acts = stage;
    read = ring.at;
    ring.next();
    stage = wait();
    load(even, stage, 0);
    multiply(odd, acts, 1, false);
  }
  settle();
  multiply(even, stage, 0, true);
  settle();
  if (job.groups % 2 == 0) {
    load(odd, stage, 1);
    multiply(odd, stage, 1, false);
    settle();
  }
  gpu::barrier_arrive(ring.empty + ring.at);
  ring.next();
  job.finish(sum, out);
}

template <typename F, typename N, typename Job>
__device__ inline void consume(Job& job, Ring& ring, float* out) {
  const int tokens = job.tokens;
  if (tokens <= 32) {
    if (tokens <= 16) {
      multiply_blocks<F, N, 2>(job, ring, out);
    } else {
      multiply_blocks<F, N, 4>(job, ring, out);
    }
  } else if (tokens <= 64) {
    if (tokens <= 48) {
      multiply_blocks<F, N, 6>(job, ring, out);
    } else {
      multiply_blocks<F, N, 8>(job, ring, out);
    }
  } else if (tokens <= 80) {
    multiply_blocks<F, N, 10>(job, ring, out);
  } else {
    multiply_blocks<F, N, 12>(job, ring, out);
  }
}

template <typename F, typename N, typename Job>
__device__ inline void multiply_jobs(Job job, const HalfRows& x, uint8_t* stages, int n_stages) {
  uint64_t* full = reinterpret_cast<uint64_t*>(stages + n_stages * StageOf<F>::kBytes + kOutBytes);
  uint64_t* empty = full + kMostStages;
  if (threadIdx.x < static_cast<unsigned>(n_stages)) {
    gpu::barrier_init(full + threadIdx.x, kProducerThreads);
    gpu::barrier_init(empty + threadIdx.x, kManyWaves * gpu::kWave);
  }
  __syncthreads();
  Ring ring = {stages, full, empty, n_stages};
  const int jobs = job.count();
  if (gpu::wave() >= kManyWaves) {
    gpu::fewer_registers<56>();
    for (int j = static_cast<int>(blockIdx.x); j < jobs; j += static_cast<int>(gridDim.x)) {
      if (job.take(j)) produce<F>(job, x, ring);
    }
    gpu::copy_commit();
    gpu::copy_wait<0>();
  } else {
    gpu::more_registers<224>();
    float* out = reinterpret_cast<float*>(stages + n_stages * StageOf<F>::kBytes) + gpu::wave() * kOutFloats;
    for (int j = static_cast<int>(blockIdx.x); j < jobs; j += static_cast<int>(gridDim.x)) {
      if (job.take(j)) consume<F, N>(job, ring, out);
    }
  }
}

// Blocks to launch for jobs, of which there are at most `most`: one a multiprocessor.
inline unsigned blocks_for_jobs(int64_t most) {
  const int64_t units = gpu::compute_units();
  return static_cast<unsigned>(most < units ? most : units);
}
template <typename F>
int ring_stages() {
  const int fit = (gpu::shared_most() - kOutBytes - kBarrierBytes) / StageOf<F>::kBytes;
  return fit < kMostStages ? fit : kMostStages;
}
template <typename F>
constexpr size_t ring_bytes(int n_stages) {
  return static_cast<size_t>(n_stages) * StageOf<F>::kBytes + kOutBytes + kBarrierBytes;
}

}  // namespace dflash::hip

#endif
