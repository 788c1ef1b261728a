#pragma once
// What the blocks of one launch of the experts leave for each other: words that carry the launch's number (gpu::post).

#include "backend/hip/few_rows.h"
#include "backend/hip/gpu_blocks.h"
#include "backend/hip/kernels.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

// words in memory: expert_words_bytes
inline ExpertWords expert_words(void* memory, int* launch, int pairs, const TiledWeight& down) {
  ExpertWords words;
  words.q = static_cast<uint64_t*>(memory);
  words.scale = words.q + static_cast<int64_t>(pairs) * down.groups * 8;
  words.y = words.scale + static_cast<int64_t>(pairs) * down.groups * 2;
  words.launch = launch;
  return words;
}

// The launch's number, one more than the last one's; by one thread of each block, early. Never 0, which words have at
// first.
__device__ inline uint32_t launch_number(const ExpertWords& words) {
  const uint32_t launch = static_cast<uint32_t>(gpu::load_fresh(words.launch)) + 1;
  return launch != 0 ? launch : 1;
}

// By the same thread once it has the number: the last one of all writes it down for the next launch.
__device__ inline void note_launch(const ExpertWords& words, uint32_t launch) {
  if (atomicAdd(words.launch + 1, 1) == static_cast<int>(gridDim.x) - 1) {
    words.launch[0] = static_cast<int>(launch);
    words.launch[1] = 0;
  }
}

// Rows pair_of(0) .. pair_of(count - 1) of the activations, the wave's segment alone, to its own shared memory at lds,
// as soon as they are posted.
template <typename PairOf>
__device__ inline ActRows await_acts(uint8_t* lds, const ExpertWords& words, int groups_of_all, Span span,
                                     PairOf pair_of, int count, uint32_t launch) {
  constexpr int kTogether = 4, kGroups = 8, kLoads = 3;  // words a lane has under way for each row
  const int groups = span.g1 - span.g0, lane = gpu::lane();
  uint32_t* const q = reinterpret_cast<uint32_t*>(lds);
  const int stride = act_stride(groups) / 4;
  uint32_t* const scale = q + count * stride;
  for (int r0 = 0; r0 < count; r0 += kTogether) {
    for (int g = 0; g < groups; g += kGroups) {
      const int n = min(groups - g, kGroups);
      const int64_t first = span.g0 + g;
      uint64_t v[kTogether][kLoads];
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int64_t group = static_cast<int64_t>(pair_of(min(r0 + j, count - 1))) * groups_of_all + first;
          const uint64_t *from_q = words.q + group * 8, *from_scale = words.scale + group * 2;
          if (lane < n * 8) v[j][0] = gpu::peek(from_q + lane);
          if (lane + 32 < n * 8) v[j][1] = gpu::peek(from_q + lane + 32);
          if (lane < n * 2) v[j][2] = gpu::peek(from_scale + lane);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          missing = missing || (lane < n * 8 && !gpu::posted(v[j][0], launch)) ||
                    (lane + 32 < n * 8 && !gpu::posted(v[j][1], launch)) ||
                    (lane < n * 2 && !gpu::posted(v[j][2], launch));
        }
      } while (missing);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int r = r0 + j;
        if (r >= count) break;
        if (lane < n * 8) q[r * stride + g * 8 + lane] = static_cast<uint32_t>(v[j][0]);
        if (lane + 32 < n * 8) q[r * stride + g * 8 + lane + 32] = static_cast<uint32_t>(v[j][1]);
        if (lane < n * 2) scale[(r * groups + g) * 2 + lane] = static_cast<uint32_t>(v[j][2]);
      }
    }
  }
  gpu::wave_sync();
  return {reinterpret_cast<const int8_t*>(q), reinterpret_cast<const GroupScale*>(scale), act_stride(groups), groups};
}

// A wave's values as an int8 group.
__device__ inline void post_group(float v, uint64_t* q, uint64_t* scale, uint32_t launch) {
  int i;
  const GroupScale s = quantize_lane(v, &i);
  const int lane = gpu::lane();
  uint32_t bytes = (static_cast<uint32_t>(i) & 255u) << (8 * (lane & 3));
  bytes |= gpu::shuffle_xor<1>(bytes);
  bytes |= gpu::shuffle_xor<2>(bytes);
  if ((lane & 3) == 0) gpu::post(q + lane / 4, bytes, launch);
  if (lane == 1) gpu::post(scale, __float_as_uint(s.d), launch);
  if (lane == 2) gpu::post(scale + 1, static_cast<uint32_t>(s.sum), launch);
}

// The lane's value of one output of a pair, and by a wave the sum over a row's pairs pair0 .. pair0 + top_k - 1 in
// order, as soon as all are posted.  weight_of(slot)
__device__ inline void post_output(const ExpertWords& words, int64_t pair, int64_t y_stride, int64_t column, float v,
                                   uint32_t launch) {
  gpu::post(words.y + pair * y_stride + column, __float_as_uint(v), launch);
}

template <typename WeightOf>
__device__ inline float await_outputs(const ExpertWords& words, int64_t pair0, int top_k, int64_t y_stride,
                                      int64_t column, WeightOf weight_of, uint32_t launch) {
  constexpr int kTogether = 8;
  float sum = 0.0f;
  for (int first = 0; first < top_k; first += kTogether) {
    uint64_t v[kTogether];
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        v[j] = gpu::peek(words.y + (pair0 + min(first + j, top_k - 1)) * y_stride + column);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) missing = missing || !gpu::posted(v[j], launch);
    } while (missing);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (first + j >= top_k) break;
      sum = fmaf(weight_of(first + j), __uint_as_float(static_cast<uint32_t>(v[j])), sum);
    }
  }
  return sum;
}

}  // namespace dflash::hip
