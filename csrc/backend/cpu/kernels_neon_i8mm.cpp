// NEON with the int8 matrix products of ARMv8.6 (Neoverse V1 and N2, Apple M2, Snapdragon X): USDOT for one row, USMMLA
// from two rows on. Compiled with these instructions on; called only when the CPU has them (isa.cpp).
//
// USMMLA multiplies 2 weight rows of 8 columns by 2 activation rows of 8 columns: four exact sums, twice the products
// of a USDOT. The scales are applied in the same order as everywhere.
#include <arm_neon.h>

#include "backend/cpu/kernels.h"

#define DFLASH_I8MM
namespace dflash::cpu {
namespace {
#include "backend/cpu/vec_neon.inc"

#include "backend/cpu/kernels.inc"

// Two vectors of a panel hold columns 8 c .. 8 c + 3 and 8 c + 4 .. 8 c + 7 of four rows: [rows 0, 1], [rows 2, 3].
struct RowPairs {
  uint8x16_t rows[2];
};
inline RowPairs zip_columns(uint8x16_t first, uint8x16_t second) {
  const uint32x4_t a = vreinterpretq_u32_u8(first), b = vreinterpretq_u32_u8(second);
  return {{vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))}};
}

// 8 weight rows (first .. first + 7 of the panel) by 2 * P activation rows; x and y may name a row twice.
template <DType T, int P>
inline void mmla_tile(const uint8_t* w, int first, int64_t n_groups, const ActBlock* const* x, float* const* y,
                      int64_t at, Ahead& ahead) {
  constexpr size_t kGroupBytes = panel_group_bytes(T);
  constexpr int kHeader = T == DType::Q4_1 ? 64 : 32;
  const ActBlock* a[2 * P];
  F acc[2 * P];
  DFLASH_UNROLL
  for (int m = 0; m < 2 * P; ++m) {
    a[m] = x[m];
    acc[m] = fset(0.0f);
  }
  const uint8_t* block = w;
  for (int64_t g = 0; g < n_groups; ++g, block += kGroupBytes) {
    if (first == 0) {
      if (ahead.wanted()) prefetch(ahead.at, kGroupBytes);
      ahead.advance(kGroupBytes);
    }
    int32x4_t s[P][4];  // of weight rows 2 i, 2 i + 1: [row, activation row]
    DFLASH_UNROLL
    for (int p = 0; p < P; ++p) {
      constexpr int32_t kOffset = T == DType::Q8_0 ? 16 : T == DType::Q4_0 ? 1 : 0;
      const int32x2_t bias = {kOffset * a[2 * p][g].bias8, kOffset * a[2 * p + 1][g].bias8};
      DFLASH_UNROLL
      for (int i = 0; i < 4; ++i) s[p][i] = vcombine_s32(bias, bias);
    }
    const auto multiply = [&](const RowPairs& low, const RowPairs& high, int column) {  // rows 0..3, rows 4..7
      DFLASH_UNROLL
      for (int p = 0; p < P; ++p) {
        const int8x16_t q = vcombine_s8(vld1_s8(a[2 * p][g].q + column), vld1_s8(a[2 * p + 1][g].q + column));
        s[p][0] = vusmmlaq_s32(s[p][0], low.rows[0], q);
        s[p][1] = vusmmlaq_s32(s[p][1], low.rows[1], q);
        s[p][2] = vusmmlaq_s32(s[p][2], high.rows[0], q);
        s[p][3] = vusmmlaq_s32(s[p][3], high.rows[1], q);
      }
    };
    const auto nibbles = [](const RowPairs& r, bool high) -> RowPairs {
      if (high) return {{vshrq_n_u8(r.rows[0], 4), vshrq_n_u8(r.rows[1], 4)}};
      return {{vandq_u8(r.rows[0], vdupq_n_u8(15)), vandq_u8(r.rows[1], vdupq_n_u8(15))}};
    };
    DFLASH_UNROLL
    for (int v = 0; v < (T == DType::Q8_0 ? 8 : 4); v += 2) {
      const Bytes b0 = load_bytes(block + kHeader + 4 * first + 64 * v);
      const Bytes b1 = load_bytes(block + kHeader + 4 * first + 64 * v + 64);
      const RowPairs low = zip_columns(b0.q[0], b1.q[0]), high = zip_columns(b0.q[1], b1.q[1]);
      if constexpr (T == DType::Q8_0) {
        multiply(low, high, 4 * v);
      } else {
        multiply(nibbles(low, false), nibbles(high, false), 4 * v);
        multiply(nibbles(low, true), nibbles(high, true), 16 + 4 * v);
      }
    }
    const uint8_t* scales = block + 2 * first;
    const F d = fload_f16(scales);
    DFLASH_UNROLL
    for (int p = 0; p < P; ++p) {
      const F even = {{vcvtq_f32_s32(vuzp1q_s32(s[p][0], s[p][1])), vcvtq_f32_s32(vuzp1q_s32(s[p][2], s[p][3]))}};
      const F odd = {{vcvtq_f32_s32(vuzp2q_s32(s[p][0], s[p][1])), vcvtq_f32_s32(vuzp2q_s32(s[p][2], s[p][3]))}};
      acc[2 * p] = ffma(even, d * fset(a[2 * p][g].d), acc[2 * p]);
      acc[2 * p + 1] = ffma(odd, d * fset(a[2 * p + 1][g].d), acc[2 * p + 1]);
    }
    if constexpr (T == DType::Q4_1) {
      const F low_value = fload_f16(scales + 32);
      DFLASH_UNROLL
      for (int m = 0; m < 2 * P; ++m) {
        acc[m] = ffma(low_value, fset(a[m][g].d * (-0.125f * static_cast<float>(a[m][g].bias8))), acc[m]);
      }
    }
  }
  DFLASH_UNROLL
  for (int m = 0; m < 2 * P; ++m) fstore(y[m] + at + first, acc[m]);
}

template <DType T, int P>
void mmla_panels_p(const uint8_t* w, int n_panels, int64_t n_groups, const ActBlock* const* x, float* const* y,
                   const uint8_t* next, bool cached) {
  const size_t panel = panel_group_bytes(T) * static_cast<size_t>(n_groups);
  Ahead ahead(w, n_panels, n_groups, panel_group_bytes(T), 1, next ? next : w + panel * static_cast<size_t>(n_panels),
              cached);
  for (int p = 0; p < n_panels; ++p, w += panel) {
    for (int first = 0; first < kPanel; first += kLanes) mmla_tile<T, P>(w, first, n_groups, x, y, kPanel * p, ahead);
  }
}

template <DType T>
void mmla_panels_t(const uint8_t* w, int n_panels, int64_t n_groups, const ActBlock* const* x, int m, float* const* y,
                   const uint8_t* next, bool cached) {
  const ActBlock* rows[8];
  float* out[8];
  for (int i = 0; i < 8; ++i) {  // an odd last row is its own neighbour
    rows[i] = x[i < m ? i : m - 1];
    out[i] = y[i < m ? i : m - 1];
  }
  switch ((m + 1) / 2) {
    case 1:
      return mmla_panels_p<T, 1>(w, n_panels, n_groups, rows, out, next, cached);
    case 2:
      return mmla_panels_p<T, 2>(w, n_panels, n_groups, rows, out, next, cached);
    case 3:
      return mmla_panels_p<T, 3>(w, n_panels, n_groups, rows, out, next, cached);
    default:
      return mmla_panels_p<T, 4>(w, n_panels, n_groups, rows, out, next, cached);
  }
}

void mmla_panels(DType type, const uint8_t* w, int n_panels, int64_t n_groups, const ActBlock* const* x, int m,
                 float* const* y, const uint8_t* next, bool cached) {
  if (m < 2) return panels(type, w, n_panels, n_groups, x, m, y, next, cached);
  switch (type) {
    case DType::Q4_0:
      return mmla_panels_t<DType::Q4_0>(w, n_panels, n_groups, x, m, y, next, cached);
    case DType::Q4_1:
      return mmla_panels_t<DType::Q4_1>(w, n_panels, n_groups, x, m, y, next, cached);
    case DType::Q8_0:
      return mmla_panels_t<DType::Q8_0>(w, n_panels, n_groups, x, m, y, next, cached);
    default:
      return;
  }
}

constexpr Kernels mmla_table() {
  Kernels k = kTable;
  k.panels = mmla_panels;
  return k;
}

}  // namespace

extern const Kernels kKernels_neon_i8mm = mmla_table();
}  // namespace dflash::cpu
