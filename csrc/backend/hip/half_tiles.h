#pragma once
// Dense products of 3..8 rows on NVIDIA: sixteen waves to a tile of 32 outputs, a wave for 16 of them in a segment of
// K. Twice the waves of few_rows.h hide twice the latency, which is what bounds a wave that makes a segment's sums one
// after the other; the sums are the same bits. A wave's weights pass through a ring of its own.

#include "backend/hip/dense_few.h"

namespace dflash::hip {

inline constexpr int kHalfWaves = 2 * kSegments, kHalfThreads = kHalfWaves * gpu::kWave;
inline constexpr int kHalfRows = 8;
inline constexpr int kHalfChunk = 3;  // groups copied at a time

// A chunk in the ring: of each group 16 outputs' quants, then their scales.
template <typename F>
struct HalfSlot {
  static constexpr int kGroup = F::kQuantBytes / 2, kScaleGroup = kTile / 2 * F::kHalves * 2;
  static constexpr int kScales = kHalfChunk * kGroup;
  static constexpr int kBytes = kScales + kHalfChunk * kScaleGroup;
  static constexpr int kSlots = F::kQuantBytes == kTile * 16 ? 7 : 4;  // of a wave's ring
  static constexpr int kRing = kSlots * kBytes;
};

// Half of a tile in a segment of K.
struct HalfTask {
  const uint8_t* quants = nullptr;
  const uint8_t* scales = nullptr;
  int groups = 0;

  template <typename F>
  static __device__ inline HalfTask of(const TiledWeight& w, int tile, int half, Span span) {
    const TileView<F> view(w, 0, tile);
    return {view.group_quants(span.g0) + half * 256,
            reinterpret_cast<const uint8_t*>(view.group_scales(span.g0)) + half * HalfSlot<F>::kScaleGroup,
            span.g1 - span.g0};
  }
};

using HalfSums = float[gpu::kMmaAcc];

// A wave's weights, task after task.
//   Cursor: bool next(HalfTask* task), false after the last
template <typename F, typename Cursor>
class HalfStream {
 public:
  using Slot = HalfSlot<F>;

  // lds: Slot::kRing bytes, the wave's own.
  __device__ HalfStream(uint8_t* lds, const Cursor& cursor) : lds_(lds), cursor_(cursor) {}

  // Begins to copy as many weights as there is room for.
  __device__ inline void start() {
#pragma unroll 1
    for (int s = 0; s < Slot::kSlots; ++s) {
      copy(lds_ + s * Slot::kBytes);
      gpu::copy_commit();
    }
  }

  // acc = the next task's products with `rows` rows of x. Groups [g, g + kHalfChunk) lie at group first(g) of x.
  template <typename First>
  __device__ inline void multiply(int groups, const ActRows& x, int rows, First first, HalfSums& acc) {
    const int token = min(gpu::mma_act_token(), rows - 1);
    const uint8_t* const q = reinterpret_cast<const uint8_t*>(x.q) + token * x.q_stride;
    const GroupScale* scale[gpu::kMmaToks];
#pragma unroll
    for (int j = 0; j < gpu::kMmaToks; ++j) scale[j] = x.scale + min(gpu::mma_token(j), rows - 1) * x.s_stride;
#pragma unroll
    for (int i = 0; i < gpu::kMmaAcc; ++i) acc[i] = 0.0f;
#pragma unroll 1
    for (int g = 0; g < groups; g += kHalfChunk) {
      const int at = first(g), n = min(kHalfChunk, groups - g);
      gpu::copy_wait<Slot::kSlots - 1>();
      const uint8_t* const slot = lds_ + slot_;
      auto one = [&](int i) {
        const uint8_t* w = slot + i * Slot::kGroup;
        const uint16_t* s = reinterpret_cast<const uint16_t*>(slot + Slot::kScales + i * Slot::kScaleGroup);
        gpu::MmaWeights weights;
        if constexpr (Slot::kGroup == 256) {
          weights = gpu::mma_unpack(gpu::mma_load_nibbles(w, 0));
        } else {
          weights = gpu::mma_load_bytes(w, 0, 256);
        }
        const gpu::MmaActs acts = gpu::mma_load_acts(q + (at + i) * 32, 16);
        GroupScale sx[gpu::kMmaToks];
#pragma unroll
        for (int j = 0; j < gpu::kMmaToks; ++j) sx[j] = scale[j][at + i];
        int c[gpu::kMmaAcc];
#pragma unroll
        for (int k = 0; k < gpu::kMmaAcc; ++k) c[k] = gpu::kMmaZero + F::start(sx[k % gpu::kMmaToks].sum);
        gpu::mma(c, weights, acts);
#pragma unroll
        for (int k = 0; k < gpu::kMmaAcc; ++k) {
          const GroupScale& t = sx[k % gpu::kMmaToks];
          const uint16_t* d = s + gpu::mma_row(k / gpu::kMmaToks) * F::kHalves;
          acc[k] = fmaf(gpu::mma_value(c[k]), gpu::half_to_float(d[0]) * t.d, acc[k]);
          if (F::kHalves == 2) acc[k] = fmaf(static_cast<float>(t.sum), gpu::half_to_float(d[1]) * t.d, acc[k]);
        }
      };
      if (n == kHalfChunk) {
#pragma unroll
        for (int i = 0; i < kHalfChunk; ++i) one(i);
      } else {
#pragma unroll 1
        for (int i = 0; i < n; ++i) one(i);
      }
      gpu::wave_sync();
      copy(lds_ + slot_);
      gpu::copy_commit();
      slot_ += Slot::kBytes;
      if (slot_ == Slot::kRing) slot_ = 0;
    }
  }

 private:
  __device__ inline void copy(uint8_t* slot) {
    while (task_.groups <= 0) {
      if (!cursor_.next(&task_)) return;
    }
    constexpr int kPieces = kHalfChunk * Slot::kGroup / 16, kScalePieces = Slot::kScaleGroup / 16;
    const int lane = gpu::lane(), n = min(task_.groups, kHalfChunk);
#pragma unroll
    for (int i = 0; i < kPieces; i += gpu::kWave) {  // 256 bytes of every 512
      const int piece = i + lane;
      if (piece < n * (Slot::kGroup / 16)) {
        gpu::copy_begin<16>(slot + piece * 16, task_.quants + piece / 16 * 512 + piece % 16 * 16);
      }
    }
    if (lane < n * kScalePieces) {
      gpu::copy_begin<16>(slot + Slot::kScales + lane * 16,
                          task_.scales + lane / kScalePieces * 2 * Slot::kScaleGroup + lane % kScalePieces * 16);
    }
    task_.quants += kHalfChunk * F::kQuantBytes;
    task_.scales += kHalfChunk * 2 * Slot::kScaleGroup;
    task_.groups -= kHalfChunk;
  }

  uint8_t* lds_;
  Cursor cursor_;
  HalfTask task_;  // what of it is not copied yet
  int slot_ = 0;   // of the next piece to use, in bytes
};

// The wave's sums into sums[row][output of the tile].
__device__ inline void store_half(const HalfSums& acc, int half, int rows, float (*sums)[kTile]) {
#pragma unroll
  for (int i = 0; i < gpu::kMmaAcc; ++i) {
    const int token = gpu::mma_token(i % gpu::kMmaToks);
    if (token < rows) sums[token][half * (kTile / 2) + gpu::mma_row(i / gpu::kMmaToks)] = acc[i];
  }
}

// All rows of x into shared memory at lds (staged_bytes), by the whole block, which must meet before they are read.
__host__ __device__ inline int staged_bytes(int rows, int groups) {
  return (rows * (act_bytes(groups) + 8) + 15) / 16 * 16;
}
// by_groups: divides by the groups of a row.
__device__ inline ActRows stage_rows(uint8_t* lds, const QuantRows& x, int rows, const Divisor& by_groups) {
  constexpr int kScales = 2, kPieces = 2 * kScales;  // a thread reads at a time; a group is two pieces and a scale
  const int groups = static_cast<int>(x.n / 32), s_stride = groups + 1, all = rows * groups;
  GroupScale* const scales = reinterpret_cast<GroupScale*>(lds + rows * act_stride(groups));
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int base = 0; base < all; base += kScales * threads) {
    GroupScale s[kScales];
    int4 v[kPieces];
    auto group = [&](int j) { return base + j * threads + thread; };
    auto piece = [&](int j) { return 2 * base + j * threads + thread; };
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      if (group(j) < all) s[j] = x.scale[group(j)];
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (piece(j) < 2 * all) v[j] = reinterpret_cast<const int4*>(x.q)[piece(j)];
    }
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      const int i = group(j), row = by_groups.of(i);
      if (i < all) scales[row * s_stride + i - row * groups] = s[j];
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int i = piece(j), row = by_groups.of(i / 2);
      if (i < 2 * all) reinterpret_cast<int4*>(lds + row * act_stride(groups))[i - row * 2 * groups] = v[j];
    }
  }
  return {reinterpret_cast<const int8_t*>(lds), scales, act_stride(groups), s_stride};
}

}  // namespace dflash::hip
