// AVX-512 with VNNI for up to 8 rows, AMX int8 tiles for 9 to 16 (Sapphire Rapids and later). The operating system must
// have granted the tile state to the process (isa.cpp).
//
// A tile multiplication gives the exact integer sums of one group of 32 columns for 16 weight rows and up to 16
// activation rows; the scales are applied by AVX-512 in the same order as everywhere.
#include <immintrin.h>

#include "backend/cpu/kernels.h"

namespace dflash::cpu {
namespace {
#include "backend/cpu/vec_avx512.inc"

#include "backend/cpu/kernels.inc"

constexpr int kTileRows = 16;
constexpr int kAmxFrom = 9;       // rows; below, the tiles are too empty
constexpr int kChunkGroups = 48;  // columns handled before the next panel: activations stay in the first-level cache

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// One chunk of columns of the activations, as the tiles want them.
struct alignas(64) ActChunk {
  int8_t q[kChunkGroups][kTileRows][32];
  float d[kChunkGroups][kTileRows];
  int32_t bias[kChunkGroups][kTileRows];  // takes the offset of the weights off again
  float d_sum[kChunkGroups][kTileRows];
};

// The 32 columns of 16 weight rows as 8 tile rows of 4 columns each.
template <DType T>
inline void expand(const uint8_t* quants, uint8_t (*tile)[64]) {
  if constexpr (T == DType::Q8_0) {
    for (int v = 0; v < 8; ++v) _mm512_store_si512(tile[v], load_bytes(quants + 64 * v));
  } else {
    for (int v = 0; v < 4; ++v) {
      const Bytes b = load_bytes(quants + 64 * v);
      _mm512_store_si512(tile[v], low_nibbles(b));
      _mm512_store_si512(tile[4 + v], high_nibbles(b));
    }
  }
}

// Adds one group's sums to the rows' accumulators, exactly as panels_m does.
template <DType T>
inline void apply_scales(const uint8_t* block, const int32_t (*sums)[16], const ActChunk& a, int g, F* acc) {
  const F d = fload_f16(block);
  DFLASH_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    __m512i s = _mm512_load_si512(sums[r]);
    if constexpr (T != DType::Q4_1) s = _mm512_add_epi32(s, _mm512_set1_epi32(a.bias[g][r]));
    acc[r] = ffma(_mm512_cvtepi32_ps(s), d * fset(a.d[g][r]), acc[r]);
  }
  if constexpr (T == DType::Q4_1) {
    const F low_value = fload_f16(block + 32);
    DFLASH_UNROLL
    for (int r = 0; r < kTileRows; ++r) acc[r] = ffma(low_value, fset(a.d_sum[g][r]), acc[r]);
  }
}

template <DType T>
void amx_panels_t(const uint8_t* w, int n_panels, int64_t n_groups, const ActBlock* const* x, int m, float* const* y) {
  constexpr size_t kGroupBytes = panel_group_bytes(T);
  constexpr int kHeader = T == DType::Q4_1 ? 64 : 32;
  // Two groups in flight: tiles 0, 1 are sums, 2, 3 activations, 4, 5 weights.
  TileConfig config;
  for (int t = 0; t < 6; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 4 ? m : 8);
    config.bytes_per_row[t] = static_cast<uint16_t>(t == 2 || t == 3 ? 32 : 64);
  }
  _tile_loadconfig(&config);
  ActChunk a;
  alignas(64) uint8_t weights[2][8][64];
  alignas(64) int32_t sums[2][kTileRows][16] = {};
  for (int64_t g0 = 0; g0 < n_groups; g0 += kChunkGroups) {
    const int count = static_cast<int>(n_groups - g0 < kChunkGroups ? n_groups - g0 : kChunkGroups);
    for (int r = 0; r < kTileRows; ++r) {
      for (int g = 0; g < count; ++g) {
        if (r >= m) {  // rows that are not there: their sums are thrown away
          a.d[g][r] = a.d_sum[g][r] = 0.0f;
          a.bias[g][r] = 0;
          continue;
        }
        const ActBlock& block = x[r][g0 + g];
        _mm256_store_si256(reinterpret_cast<__m256i*>(a.q[g][r]),
                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.q)));
        a.d[g][r] = block.d;
        a.bias[g][r] = (T == DType::Q8_0 ? 16 : 1) * block.bias8;
        a.d_sum[g][r] = block.d * (-0.125f * static_cast<float>(block.bias8));
      }
    }
    for (int p = 0; p < n_panels; ++p) {
      const uint8_t* block = w + kGroupBytes * static_cast<size_t>(p * n_groups + g0);
      F acc[kTileRows];
      DFLASH_UNROLL
      for (int r = 0; r < kTileRows; ++r) acc[r] = g0 == 0 || r >= m ? fset(0.0f) : fload(y[r] + kPanel * p);
      for (int g = 0; g < count; g += 2, block += 2 * kGroupBytes) {
        const bool pair = g + 1 < count;
        prefetch(block + kPrefetch, 2 * kGroupBytes);
        expand<T>(block + kHeader, weights[0]);
        if (pair) expand<T>(block + kGroupBytes + kHeader, weights[1]);
        _tile_zero(0);
        _tile_loadd(2, a.q[g], 32);
        _tile_loadd(4, weights[0], 64);
        _tile_dpbsud(0, 2, 4);
        if (pair) {
          _tile_zero(1);
          _tile_loadd(3, a.q[g + 1], 32);
          _tile_loadd(5, weights[1], 64);
          _tile_dpbsud(1, 3, 5);
        }
        _tile_stored(0, sums[0], 64);
        if (pair) _tile_stored(1, sums[1], 64);
        apply_scales<T>(block, sums[0], a, g, acc);
        if (pair) apply_scales<T>(block + kGroupBytes, sums[1], a, g + 1, acc);
      }
      DFLASH_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        if (r < m) fstore(y[r] + kPanel * p, acc[r]);
      }
    }
  }
  _tile_release();
}

void amx_panels(DType type, const uint8_t* w, int n_panels, int64_t n_groups, const ActBlock* const* x, int m,
                float* const* y, const uint8_t* next, bool cached) {
  if (m < kAmxFrom) return panels(type, w, n_panels, n_groups, x, m, y, next, cached);
  switch (type) {
    case DType::Q4_0:
      return amx_panels_t<DType::Q4_0>(w, n_panels, n_groups, x, m, y);
    case DType::Q4_1:
      return amx_panels_t<DType::Q4_1>(w, n_panels, n_groups, x, m, y);
    case DType::Q8_0:
      return amx_panels_t<DType::Q8_0>(w, n_panels, n_groups, x, m, y);
    default:
      return;
  }
}

constexpr Kernels amx_table() {
  Kernels k = kTable;
  k.name = "amx";
  k.panel_rows = kTileRows;
  k.panels = amx_panels;
  return k;
}

}  // namespace

extern const Kernels kKernels_amx = amx_table();
}  // namespace dflash::cpu
