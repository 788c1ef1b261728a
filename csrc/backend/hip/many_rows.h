#pragma once
// Matrix times more than 16 rows: weights are expanded to 16-bit floats in registers, each wave its own rows of them;
// the tokens' activations come through stages of shared memory that all waves read; sums are f32 in the matrix
// instructions, one run over K. A row's result does not depend on the rows beside it.
//
// A block works on jobs: 8 weight tiles times at most kManyTokens tokens. How a job is multiplied differs: many_ring.h
// (NVIDIA: some waves copy, the others multiply), many_direct.h (AMD: every wave loads its own weights).
//
//   struct Job {
//     int count();               // jobs there are
//     bool take(int index);      // from now on this one; false: there is nothing to do
//     int groups, tokens;        // of the job: n_in / 32 of its weights, its tokens
//     TileView<F> tile(int slot);          // its weight tiles, slot < kManyTiles
//     int64_t row(int token);              // a token's row of x
//     int half(int run);                   // 2 * slot + half of a run of 16 weight rows, run < kRuns of this wave
//     void finish(const ManySums<n>& sums, float* out);  // of a wave; out: kOutFloats of shared memory of its own
//   };

#include <type_traits>

#include "backend/hip/gpu_half.h"
#include "backend/hip/kernels.h"

namespace dflash::hip {

inline constexpr int kManyWaves = gpu::kHalfWaves;  // that multiply
inline constexpr int kManyThreads = (kManyWaves + gpu::kHalfProducers) * gpu::kWave;
inline constexpr int kRuns = gpu::kHalfRuns;  // of 16 weight rows a wave
inline constexpr int kManyTiles = kManyWaves * kRuns / 2;
inline constexpr int kTokenBlocks = kManyTokens / gpu::kMmaTokens;

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

// A wave's results of Blocks token blocks: [run of 16 weight rows][token block][lane's part].
template <int Blocks>
struct ManySums {
  static constexpr int kBlocks = Blocks, kHeld = gpu::kHalfHeld;
  float v[kRuns / kHeld][kHeld][Blocks][gpu::kMmaAcc];

  __device__ inline float at(int run, int block, int i) const { return v[run / kHeld][run % kHeld][block][i]; }

  __device__ inline void clear() {
#pragma unroll
    for (int m = 0; m < kRuns; ++m) {
#pragma unroll
      for (int b = 0; b < Blocks; ++b) {
#pragma unroll
        for (int i = 0; i < gpu::kMmaAcc; ++i) v[m / kHeld][m % kHeld][b][i] = 0.0f;
      }
    }
  }
};

// Results leave through shared memory of each wave, kPassTokens tokens at a time, so that a token's outputs are written
// side by side: rows of kOutRow floats, 32 of them used.
inline constexpr int kPassTokens = gpu::kHalfPass, kPassBlocks = kPassTokens / gpu::kMmaTokens;
inline constexpr int kOutRow = kTile + gpu::kHalfPad;
inline constexpr int kOutFloats = kPassTokens * kOutRow;

// put(first token, i, token in the pass, block, part) for what the lane holds of each pass, then take(first token) when
// all of it is there.
template <int Blocks, typename Put, typename Take>
__device__ inline void each_pass(int tokens, Put put, Take take) {
#pragma unroll
  for (int b0 = 0; b0 < Blocks; b0 += kPassBlocks) {
    if (b0 * gpu::kMmaTokens >= tokens) break;
    gpu::wave_sync();
#pragma unroll
    for (int b = 0; b < kPassBlocks && b0 + b < Blocks; ++b) {
#pragma unroll
      for (int i = 0; i < gpu::kMmaAcc; ++i) {
        put(b * gpu::kMmaTokens + gpu::mma_token(i % gpu::kMmaToks), gpu::mma_row(i / gpu::kMmaToks), b0 + b, i);
      }
    }
    gpu::wave_sync();
    take(b0 * gpu::kMmaTokens);
  }
}

// Runs m and m + 1, whose rows lie side by side, of the tokens of a pass: take(first token) finds them in out.
template <typename Sums, typename Take>
__device__ inline void each_pass_of_tile(const Sums& sums, int m, int tokens, float* out, Take take) {
  each_pass<Sums::kBlocks>(
      tokens,
      [&](int token, int row, int block, int i) {
        out[token * kOutRow + row] = sums.at(m, block, i);
        out[token * kOutRow + 16 + row] = sums.at(m + 1, block, i);
      },
      take);
}

// y[row_of(token)][tile * 32 ...] (+)= the sums of a job whose runs are in order, the first of them of weight tile
// `first_tile`.
template <typename Sums, typename RowOf>
__device__ inline void write_rows(const Sums& sums, int first_tile, int tokens, RowOf row_of, int64_t n_out, float* y,
                                  bool add, float* out) {
  constexpr int kAtOnce = 4;  // tokens whose old values are loaded together
#pragma unroll
  for (int m = 0; m < kRuns; m += 2) {
    const int64_t n = static_cast<int64_t>(first_tile + (gpu::wave() * kRuns + m) / 2) * kTile + gpu::lane();
    each_pass_of_tile(sums, m, tokens, out, [&](int first) {
      const int count = n < n_out ? min(kPassTokens, tokens - first) : 0;
#pragma unroll 1
      for (int t0 = 0; t0 < count; t0 += kAtOnce) {
        float* to[kAtOnce];
        float old[kAtOnce];
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          to[t] = y + row_of(min(first + t0 + t, tokens - 1)) * n_out + n;
          old[t] = add ? *to[t] : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          if (t0 + t < count) *to[t] = old[t] + out[(t0 + t) * kOutRow + gpu::lane()];
        }
      }
    });
  }
}

// The same as PairRows: four lanes a token, eight outputs each. What is no number makes the whole group no number.
template <typename Sums, typename RowOf>
__device__ inline void write_pair_rows(const Sums& sums, int first_tile, int tokens, RowOf row_of, const PairRows& y,
                                       float* out) {
  constexpr int kLanes = 4, kEach = kTile / kLanes;
  const int part = gpu::lane() % kLanes;
#pragma unroll
  for (int m = 0; m < kRuns; m += 2) {
    const int64_t tile = first_tile + (gpu::wave() * kRuns + m) / 2;
    each_pass_of_tile(sums, m, tokens, out, [&](int first) {
#pragma unroll 1
      for (int t0 = 0; t0 < min(kPassTokens, tokens - first); t0 += gpu::kWave / kLanes) {
        const int token = t0 + gpu::lane() / kLanes;
        float v[kEach];
        uint32_t largest = 0;  // the order of magnitudes is that of their bits
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          v[i] = out[min(token, kPassTokens - 1) * kOutRow + part * kEach + i];
          largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
        }
        largest = max(largest, gpu::shuffle_xor<1>(largest));
        largest = max(largest, gpu::shuffle_xor<2>(largest));
        const float top = __uint_as_float(largest), inverse = top > 1e-30f ? 32767.0f / top : 0.0f;
        uint32_t words[kEach / 2];
#pragma unroll
        for (int i = 0; i < kEach; i += 2) {  // rounded in the mantissa of 2^23
          words[i / 2] = __byte_perm(__float_as_uint(fmaf(v[i], inverse, 8421376.0f)),
                                     __float_as_uint(fmaf(v[i + 1], inverse, 8421376.0f)), 0x5410);
        }
        if (first + token >= tokens || tile * kTile >= y.n) continue;
        const int64_t row = row_of(first + token);
        *reinterpret_cast<uint4*>(y.v + row * y.n + tile * kTile + part * kEach) =
            make_uint4(words[0], words[1], words[2], words[3]);
        if (part == 0) y.scale[row * (y.n / kTile) + tile] = top * (1.0f / 32767.0f);
      }
    });
  }
}

// The runs of a job whose tiles stand side by side: a wave has the halves of tiles in order.
__device__ inline int half_in_order(int run) { return gpu::wave() * kRuns + run; }
// Of one whose first half of the tiles are gate and whose others are up: the first runs of a wave are of gate, the
// others the same rows of up.
__device__ inline int half_gate_up(int run) {
  constexpr int kGate = kRuns / 2;
  return run < kGate ? gpu::wave() * kGate + run : kManyTiles + gpu::wave() * kGate + run - kGate;
}

}  // namespace dflash::hip
