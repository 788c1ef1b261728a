#pragma once
// Rounds rows of floats to GGUF blocks as ggml's reference quantisers do (quantize_row_q4_0_ref, quantize_row_q8_0_ref
// in ggml-quants.c; the `gguf` package writes the same bytes). Nothing that decides the answer goes through this: it
// serves copies that may be coarser than what they are copies of.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "quant/blocks.h"

namespace dflash {

inline void encode(const float* x, BlockQ4_0& b) {
  float most = 0.0f;  // of the largest magnitude; its sign decides which end of -8..7 it takes
  for (int j = 0; j < kGroup; ++j) {
    if (std::fabs(x[j]) > std::fabs(most)) most = x[j];
  }
  const float d = most / -8.0f;
  const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
  const auto nibble = [&](float v) {
    return static_cast<uint8_t>(std::clamp(static_cast<int>(v * inverse + 8.5f), 0, 15));
  };
  b.d = f32_to_f16(d);
  for (int j = 0; j < 16; ++j) b.qs[j] = static_cast<uint8_t>(nibble(x[j]) | (nibble(x[j + 16]) << 4));
}

inline void encode(const float* x, BlockQ8_0& b) {
  float most = 0.0f;
  for (int j = 0; j < kGroup; ++j) most = std::max(most, std::fabs(x[j]));
  const float d = most / 127.0f;
  const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
  b.d = f32_to_f16(d);
  for (int j = 0; j < kGroup; ++j) b.qs[j] = static_cast<int8_t>(std::round(x[j] * inverse));
}

// Encodes a row of n elements, a multiple of 32, as Block.
template <typename Block>
void encode_row(const float* x, int64_t n, Block* row) {
  for (int64_t g = 0; g < n / kGroup; ++g) encode(x + g * kGroup, row[g]);
}

}  // namespace dflash
