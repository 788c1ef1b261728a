#pragma once
// Matrix times more than 16 rows: weights are expanded to 16-bit floats in registers, each wave its own tiles straight
// from global memory; the tokens' activations come through stages of shared memory that all waves read; sums are f32 in
// the matrix instructions, one run over K. A row's result does not depend on the rows beside it.

#include <type_traits>

#include "backend/hip/gpu_half.h"
#include "backend/hip/kernels.h"

namespace dflash::hip {

inline constexpr int kManyWaves = gpu::kHalfWaves;
inline constexpr int kManyThreads = kManyWaves * gpu::kWave;
inline constexpr int kWaveTiles = 2;  // weight tiles of a wave
inline constexpr int kManyTiles = kManyWaves * kWaveTiles;
inline constexpr int kTokenBlocks = kManyTokens / gpu::kMmaTokens;

// Activations of a stage: [group][chunk][token][16 bytes]; planes are padded so that the chunks of a token, which are
// written together, lie in different banks.
inline constexpr int kChunkPlane = kManyTokens * 16 + 16;
inline constexpr int kActBytes = gpu::kHalfGroups * 4 * kChunkPlane;

// Behind them, where weights are staged, those of each tile of each wave: quants, then scales.
template <typename F>
struct StageOf {
  static constexpr int kQuants = gpu::kHalfGroups * F::kQuantBytes;
  static constexpr int kScales = gpu::kHalfGroups * kTile * F::kHalves * 2;
  static constexpr int kTileBytes = kQuants + kScales;
  static constexpr int kBytes = kActBytes + (gpu::kHalfStageWeights ? kManyTiles * kTileBytes : 0);
  static constexpr int kAll = gpu::kHalfStages * kBytes;
};

// How a format's blocks become 16-bit floats N: what a lane loads of 16 rows of a group, at a Place.
template <typename F>
struct HalfRaw {
  static constexpr int kPlanes = F::kQuantBytes / (kTile * 16);  // 4-bit types: one word for low and high elements
  uint32_t q[gpu::kMmaRows][kPlanes][gpu::kHalfWords];
  uint32_t d[gpu::kMmaRows];

  // Where a lane reads of a tile; the groups follow each other.
  struct Place {
    const uint8_t* quants;
    const uint8_t* scales;

    __device__ inline Place(const uint8_t* quants, const void* scales)
        : quants(quants + gpu::half_weight_at()),
          scales(static_cast<const uint8_t*>(scales) + gpu::mma_row(0) * F::kHalves * 2) {}
    __device__ inline void next() {
      quants += F::kQuantBytes;
      scales += kTile * F::kHalves * 2;
    }
  };

  __device__ inline void load(const Place& at, int half) {
    struct alignas(4 * gpu::kHalfWords) Words {
      uint32_t w[gpu::kHalfWords];
    };
#pragma unroll
    for (int i = 0; i < gpu::kMmaRows; ++i) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        const Words words =
            *reinterpret_cast<const Words*>(at.quants + half * 256 + p * kTile * 16 + i * gpu::kHalfRowBytes);
#pragma unroll
        for (int j = 0; j < gpu::kHalfWords; ++j) q[i][p][j] = words.w[j];
      }
      const uint8_t* scale = at.scales + (half * 16 + i * gpu::kHalfRowBytes / 16) * F::kHalves * 2;
      if constexpr (F::kHalves == 2) {
        d[i] = *reinterpret_cast<const uint32_t*>(scale);
      } else {
        d[i] = *reinterpret_cast<const uint16_t*>(scale);
      }
    }
  }

  template <typename N>
  __device__ inline gpu::HalfWeights expand() const {
    gpu::HalfWeights w;
#pragma unroll
    for (int i = 0; i < gpu::kMmaRows; ++i) {
      const uint16_t scale = static_cast<uint16_t>(d[i] & 0xffffu);
#pragma unroll
      for (int j = 0; j < gpu::kHalfWords; ++j) {
        uint32_t pairs[4];
        if constexpr (kPlanes == 2) {
          gpu::half_bytes<N>(q[i][0][j], q[i][1][j], gpu::half_to_float(scale), pairs);
        } else if constexpr (F::kHalves == 2) {
          N::nibbles_min(q[i][0][j], N::scale(scale), N::scale(static_cast<uint16_t>(d[i] >> 16)), pairs);
        } else {
          N::nibbles(q[i][0][j], N::scale(scale), pairs);
        }
        gpu::half_put(w, i, j, pairs);
      }
    }
    return w;
  }
};

// A wave's results: [run of 16 weight rows][token block][lane's part].
struct ManySums {
  static constexpr int kHeld = gpu::kHalfHeld;
  float v[kWaveTiles * 2 / kHeld][kHeld][kTokenBlocks][gpu::kMmaAcc];

  __device__ inline float at(int run, int block, int i) const { return v[run / kHeld][run % kHeld][block][i]; }

  // f(tile, output in the tile, token, value) for every result the lane holds.
  template <typename Visit>
  __device__ inline void visit(Visit f) const {
#pragma unroll
    for (int m = 0; m < kWaveTiles * 2; ++m) {
#pragma unroll
      for (int b = 0; b < kTokenBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < gpu::kMmaAcc; ++i) {
          f(m / 2, m % 2 * 16 + gpu::mma_row(i / gpu::kMmaToks),
            b * gpu::kMmaTokens + gpu::mma_token(i % gpu::kMmaToks), at(m, b, i));
        }
      }
    }
  }
};

// sum = the wave's tiles times the block's tokens, `count` of them in Blocks token blocks; row_of(token): its row of x.
template <typename F, typename N, int Blocks, typename RowOf>
__device__ inline void multiply_blocks(const TileView<F> (&tiles)[kWaveTiles], int groups, const HalfRows& x,
                                       RowOf row_of, int count, uint8_t* stages, ManySums& sum) {
  constexpr int kGroups = gpu::kHalfGroups, kStages = gpu::kHalfStages, kAhead = gpu::kHalfAhead;
  constexpr int kHeld = gpu::kHalfHeld, kRuns = kWaveTiles * 2;
  constexpr int kSets = HalfRaw<F>::kPlanes == 1 ? gpu::kHalfSets : 1;  // bytes need the registers themselves
  constexpr int kPerToken = kGroups * 4;  // copies of 16 bytes a token's row of a stage takes
  constexpr int kTokensAtOnce = kManyThreads / kPerToken;
  constexpr int kCopies = (Blocks * gpu::kMmaTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  static_assert(kGroups % kSets == 0 && (kSets == 1 || kHeld == kRuns));
  const int t = static_cast<int>(threadIdx.x);
  const int chunk = t % kPerToken, first_token = t / kPerToken;
  const uint16_t* from[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    from[i] = x.v + row_of(min(first_token + i * kTokensAtOnce, count - 1)) * x.n + chunk * 8;
  }
  gpu::Copy16 copies[kCopies];
  constexpr int kStageBytes = StageOf<F>::kBytes, kTileBytes = StageOf<F>::kTileBytes, kQuants = StageOf<F>::kQuants;
  constexpr int kGroupScales = kTile * F::kHalves * 2 / 16, kStepScales = kGroups * kGroupScales;  // copies of 16 bytes
  static_assert(kStepScales * kWaveTiles <= gpu::kWave);
  const int wave_weights = kActBytes + gpu::wave() * kWaveTiles * kTileBytes;
  const int acts_to = chunk * kChunkPlane + first_token * 16;
  const int lane_scale = gpu::lane() % kStepScales, scale_tile = gpu::lane() / kStepScales;
  const uint8_t* quants_from[kWaveTiles] = {tiles[0].quants + gpu::lane() * 16, tiles[1].quants + gpu::lane() * 16};
  const uint16_t* scales_from = (scale_tile == 0 ? tiles[0] : tiles[1]).scales + lane_scale * 8;
  // Starts the copies of the next step into its stage. Past the last group zeros are written and nothing is read. The
  // addresses move on in advance(), later: a copy takes a while to read them.
  int next_group = 0;
  uint8_t* next_stage = stages;
  auto start = [&] {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool valid = next_group + chunk / 4 < groups && first_token + i * kTokensAtOnce < count;
      gpu::copy_start(copies[i], next_stage + acts_to + i * kTokensAtOnce * 16, from[i], valid);
    }
    if constexpr (gpu::kHalfStageWeights) {
      uint8_t* weights = next_stage + wave_weights;
      gpu::Copy16 c;
#pragma unroll
      for (int m = 0; m < kWaveTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kQuants; i += gpu::kWave * 16) {
          gpu::copy_start(c, weights + m * kTileBytes + i + gpu::lane() * 16, quants_from[m] + i,
                          next_group + i / F::kQuantBytes < groups);
        }
      }
      if (scale_tile < kWaveTiles) {
        gpu::copy_start(c, weights + scale_tile * kTileBytes + kQuants + lane_scale * 16, scales_from,
                        next_group + lane_scale / kGroupScales < groups);
      }
    }
    gpu::copy_commit();
  };
  auto advance = [&] {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      gpu::copy_finish(copies[i], next_stage + acts_to + i * kTokensAtOnce * 16);
      from[i] += kGroups * 32;
    }
#pragma unroll
    for (int m = 0; m < kWaveTiles; ++m) quants_from[m] += kQuants;
    scales_from += kStepScales * 8;
    next_group += kGroups;
    next_stage = next_stage == stages + (kStages - 1) * kStageBytes ? stages : next_stage + kStageBytes;
  };
#pragma unroll
  for (int m = 0; m < kRuns; ++m) {
#pragma unroll
    for (int b = 0; b < kTokenBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < gpu::kMmaAcc; ++i) sum.v[m / kHeld][m % kHeld][b][i] = 0.0f;
    }
  }
  using Place = typename HalfRaw<F>::Place;
  Place at[kWaveTiles] = {Place(tiles[0].quants, tiles[0].scales), Place(tiles[1].quants, tiles[1].scales)};
  HalfRaw<F> raw[kRuns];
  auto load_raw = [&](int group) {  // past the end: the last one stays, and meets activations of zero
    if (group >= groups) return;
#pragma unroll
    for (int m = 0; m < kRuns; ++m) raw[m].load(at[m / 2], m % 2);
    at[0].next();
    at[1].next();
  };
  if (!gpu::kHalfStageWeights) load_raw(0);
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    start();
    advance();
  }
  gpu::HalfWeights w[kSets][kHeld];
  const int steps = (groups + kGroups - 1) / kGroups;
  const uint8_t* stage = stages;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    gpu::copy_wait<kAhead - 1>();
    gpu::products_see_copies();
    __syncthreads();
    start();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      gpu::HalfWeights(&now)[kHeld] = w[g % kSets];
      if constexpr (gpu::kHalfStageWeights) {
#pragma unroll
        for (int m = 0; m < kRuns; ++m) {
          const uint8_t* tile = stage + wave_weights + m / 2 * kTileBytes;
          raw[m].load(Place(tile + g * F::kQuantBytes, tile + kQuants + g * kTile * F::kHalves * 2), m % 2);
        }
      }
#pragma unroll
      for (int part = 0; part < kRuns / kHeld; ++part) {
#pragma unroll
        for (int m = 0; m < kHeld; ++m) now[m] = raw[part * kHeld + m].template expand<N>();
        if (!gpu::kHalfStageWeights && part == kRuns / kHeld - 1) load_raw(step * kGroups + g + 1);
        gpu::products_begin();
        gpu::half_products<N, Blocks>(sum.v[part], now, stage + g * 4 * kChunkPlane, kChunkPlane);
        gpu::products_end();
      }
      gpu::products_wait<kSets - 1>();
      gpu::products_hold(w[(g + 1) % kSets]);
    }
    advance();
    stage = stage == stages + (kStages - 1) * kStageBytes ? stages : stage + kStageBytes;
  }
  gpu::products_wait<0>();
  gpu::products_hold(w[kSets - 1]);
}

// The same for any count up to kManyTokens. All waves take part. stages: StageOf<F>::kAll bytes of shared memory.
template <typename F, typename N, typename RowOf>
__device__ inline void multiply_many(const TileView<F> (&tiles)[kWaveTiles], int groups, const HalfRows& x,
                                     RowOf row_of, int count, uint8_t* stages, ManySums& sum) {
  constexpr int kParts = kTokenBlocks < 4 ? kTokenBlocks : 4, kPart = kTokenBlocks / kParts * gpu::kMmaTokens;
  auto multiply = [&](auto parts) {
    constexpr int kUse = decltype(parts)::value < kParts ? decltype(parts)::value : kParts;
    multiply_blocks<F, N, kUse*(kTokenBlocks / kParts)>(tiles, groups, x, row_of, count, stages, sum);
  };
  if (count <= kPart) {
    multiply(std::integral_constant<int, 1>{});
  } else if (kParts == 2 || count <= 2 * kPart) {
    multiply(std::integral_constant<int, 2>{});
  } else if (count <= 3 * kPart) {
    multiply(std::integral_constant<int, 3>{});
  } else {
    multiply(std::integral_constant<int, 4>{});
  }
}

}  // namespace dflash::hip
