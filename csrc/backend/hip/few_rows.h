#pragma once
// Matrix times 1..16 rows, the heart of decoding and verifying: a block of kSegments waves makes one tile of 32 outputs
// for all its rows, wave s working on segment s of K, so that the weights are read once, in order, and by many waves at
// a time. Few rows use dot4 (a lane is an output row; the activations are the same for all lanes, scalar registers on
// AMD), more rows the matrix instructions. Both follow the order of layout.h, so their results are the same bits.

#include "backend/hip/layout.h"

namespace dflash::hip {

inline constexpr int kFewRows = 16;

// partial sums of a block: [segment][row][32 outputs], in shared memory
template <int Rows>
using Partial = float[kSegments][Rows][kTile];

// acc[m][r] = the segment's dot products of the lane's output row of tile m with rows row_of(0) .. row_of(R - 1) of x.
template <typename F, int Tiles, int R, typename RowOf>
__device__ inline void dot_segment(const TileView<F> (&tiles)[Tiles], int g0, int g1, const QuantRows& x, RowOf row_of,
                                   float (&acc)[Tiles][R]) {
  // Groups of weights loaded ahead; every row needs scalar registers for its activations.
  constexpr int kAhead = gpu::kDotAhead[R == 1 ? 0 : 1] >= Tiles ? gpu::kDotAhead[R == 1 ? 0 : 1] / Tiles : 1;
  struct Batch {
    typename F::Raw raw[Tiles][kAhead];
  };
  const int lane = gpu::lane();
  const int groups = static_cast<int>(x.n / 32);
  uint32_t at[R];  // first group of each row
#pragma unroll
  for (int r = 0; r < R; ++r) {
    at[r] = static_cast<uint32_t>(row_of(r) * groups);
#pragma unroll
    for (int m = 0; m < Tiles; ++m) acc[m][r] = 0.0f;
  }
  auto load = [&](Batch& b, int g) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int group = min(g + i, g1 - 1);  // past the end: the last one again
#pragma unroll
      for (int m = 0; m < Tiles; ++m) {
        b.raw[m][i] = F::load(tiles[m].group_quants(group), tiles[m].group_scales(group), lane);
      }
    }
  };
  if (g0 >= g1) return;
  Batch next;
  load(next, g0);
  for (int g = g0; g < g1; g += kAhead) {
    const Batch now = next;
    if (g + kAhead < g1) load(next, g + kAhead);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (g + i < g1) {
        typename F::Block block[Tiles];
#pragma unroll
        for (int m = 0; m < Tiles; ++m) block[m] = F::unpack(now.raw[m][i]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const uint32_t group = at[r] + static_cast<uint32_t>(g + i);
          const int4* q = reinterpret_cast<const int4*>(x.q) + group * 2;
          const int4 q0 = q[0], q1 = q[1];
          const GroupScale scale = x.scale[group];
#pragma unroll
          for (int m = 0; m < Tiles; ++m) acc[m][r] = F::accumulate(block[m], q0, q1, scale, acc[m][r]);
        }
      }
    }
  }
}

// The same for up to 16 rows by matrix instructions; Blocks * kMmaTokens >= count. Writes out[row][output].
template <typename F, int Blocks, typename RowOf>
__device__ inline void mma_segment(const TileView<F>& tile, int g0, int g1, const QuantRows& x, RowOf row_of, int count,
                                   float (*out)[kTile]) {
  const int groups = static_cast<int>(x.n / 32);
  float acc[2][Blocks][gpu::kMmaAcc];
  int operand_at[Blocks], scale_at[Blocks][gpu::kMmaToks];
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    // Rows past the last repeat it: their results are never stored.
    operand_at[b] = row_of(min(b * gpu::kMmaTokens + gpu::mma_act_token(), count - 1)) * groups;
#pragma unroll
    for (int j = 0; j < gpu::kMmaToks; ++j) {
      scale_at[b][j] = row_of(min(b * gpu::kMmaTokens + gpu::mma_token(j), count - 1)) * groups;
    }
#pragma unroll
    for (int i = 0; i < gpu::kMmaAcc; ++i) acc[0][b][i] = acc[1][b][i] = 0.0f;
  }
#pragma unroll gpu::kMmaUnroll
  for (int g = g0; g < g1; ++g) {
    const uint8_t* quants = tile.group_quants(g);
    const uint16_t* scales = tile.group_scales(g);
    const gpu::MmaWeights w[2] = {F::mma_load(quants, 0), F::mma_load(quants, 1)};
    float d[2][gpu::kMmaRows], m[2][gpu::kMmaRows];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < gpu::kMmaRows; ++i) {
        const uint16_t* s = scales + (h * 16 + gpu::mma_row(i)) * F::kHalves;
        d[h][i] = gpu::half_to_float(s[0]);
        if (F::kHalves == 2) m[h][i] = gpu::half_to_float(s[1]);
      }
    }
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const gpu::MmaActs a =
          gpu::mma_load_acts(reinterpret_cast<const uint8_t*>(x.q) + static_cast<int64_t>(operand_at[b] + g) * 32, 16);
      GroupScale s[gpu::kMmaToks];
#pragma unroll
      for (int j = 0; j < gpu::kMmaToks; ++j) s[j] = x.scale[scale_at[b][j] + g];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int c[gpu::kMmaAcc];
#pragma unroll
        for (int i = 0; i < gpu::kMmaAcc; ++i) c[i] = gpu::kMmaZero + F::start(s[i % gpu::kMmaToks].sum);
        gpu::mma(c, w[h], a);
#pragma unroll
        for (int i = 0; i < gpu::kMmaAcc; ++i) {
          const int row = i / gpu::kMmaToks, token = i % gpu::kMmaToks;
          float v = fmaf(gpu::mma_value(c[i]), d[h][row] * s[token].d, acc[h][b][i]);
          if (F::kHalves == 2) v = fmaf(static_cast<float>(s[token].sum), m[h][row] * s[token].d, v);
          acc[h][b][i] = v;
        }
      }
    }
  }
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < gpu::kMmaAcc; ++i) {
        const int token = b * gpu::kMmaTokens + gpu::mma_token(i % gpu::kMmaToks);
        if (token < count) out[token][h * 16 + gpu::mma_row(i / gpu::kMmaToks)] = acc[h][b][i];
      }
    }
  }
}

// The wave's segment of the tiles times the rows row_of(0) .. row_of(count - 1) into partial[tile]. The choice of code
// depends on count alone, which is the same for the whole block; MaxRows bounds it at compile time.
template <typename F, int Tiles, int MaxRows, typename RowOf>
__device__ inline void tile_segments(const TileView<F> (&tiles)[Tiles], int groups, const QuantRows& x, RowOf row_of,
                                     int count, Partial<MaxRows> (&partial)[Tiles]) {
  const int segment = gpu::wave();
  const int per = segment_groups(groups);
  const int g0 = min(segment * per, groups), g1 = min(g0 + per, groups);
  auto dot = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    float acc[Tiles][R];
    dot_segment<F, Tiles, R>(tiles, g0, g1, x, row_of, acc);
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
#pragma unroll
      for (int r = 0; r < R; ++r) partial[m][segment][r][gpu::lane()] = acc[m][r];
    }
  };
  if constexpr (MaxRows == 1) {
    dot(std::integral_constant<int, 1>{});
  } else {
    switch (count) {
      case 1:
        dot(std::integral_constant<int, 1>{});
        return;
      case 2:
        dot(std::integral_constant<int, 2>{});
        return;
      default:
        break;
    }
    if constexpr (gpu::kMmaFromRows > 3) {
      switch (count) {
        case 3:
          dot(std::integral_constant<int, 3>{});
          return;
        case 4:
          dot(std::integral_constant<int, 4>{});
          return;
        case 5:
          dot(std::integral_constant < int, MaxRows<5 ? MaxRows : 5>{});
          return;
        default:
          break;
      }
    }
    if constexpr (MaxRows >= gpu::kMmaFromRows) {
#pragma unroll
      for (int m = 0; m < Tiles; ++m) {
        if (count <= gpu::kMmaTokens) {
          mma_segment<F, 1>(tiles[m], g0, g1, x, row_of, count, partial[m][segment]);
        } else {
          mma_segment<F, (kFewRows + gpu::kMmaTokens - 1) / gpu::kMmaTokens>(tiles[m], g0, g1, x, row_of, count,
                                                                             partial[m][segment]);
        }
      }
    }
  }
}

// Asks for the wave's segment of a tile in one go, so that reading it in pieces finds it near.
template <typename F>
__device__ inline void prefetch_segment(const TileView<F>& tile, int groups) {
  const int per = segment_groups(groups);
  const int g0 = min(gpu::wave() * per, groups), g1 = min(g0 + per, groups);
  gpu::prefetch(tile.group_quants(g0), (g1 - g0) * F::kQuantBytes);
  gpu::prefetch(tile.group_scales(g0), (g1 - g0) * kTile * F::kHalves * 2);
}

// The runs added in order: output `column` of the tile for row r.
template <int Rows>
__device__ inline float add_segments(const Partial<Rows>& partial, int segments, int r, int column) {
  float sum = kEmptySum;
  for (int s = 0; s < segments; ++s) sum += partial[s][r][column];
  return sum;
}

}  // namespace dflash::hip
