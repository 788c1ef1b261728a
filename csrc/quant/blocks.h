#pragma once
// GGUF block structs and their plain decoders. Layouts: ggml-common.h; element order is the row's.

#include <cstdint>

#include "quant/dtype.h"
#include "quant/half.h"

namespace dflash {

inline constexpr int kGroup = 32;  // elements per quantisation group, in weights and in int8 activations

struct BlockQ4_0 {  // x[j] = (low nibble of qs[j] - 8) * d, x[j + 16] = (high nibble - 8) * d
  uint16_t d;       // f16
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

struct BlockQ4_1 {  // x[j] = nibble * d + m
  uint16_t d, m;    // f16
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

struct BlockQ8_0 {  // x[j] = qs[j] * d
  uint16_t d;       // f16
  int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

inline void decode(const BlockQ4_0& b, float* x) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 16; ++j) {
    x[j] = static_cast<float>((b.qs[j] & 15) - 8) * d;
    x[j + 16] = static_cast<float>((b.qs[j] >> 4) - 8) * d;
  }
}

inline void decode(const BlockQ4_1& b, float* x) {
  const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
  for (int j = 0; j < 16; ++j) {
    x[j] = static_cast<float>(b.qs[j] & 15) * d + m;
    x[j + 16] = static_cast<float>(b.qs[j] >> 4) * d + m;
  }
}

inline void decode(const BlockQ8_0& b, float* x) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < kGroup; ++j) x[j] = static_cast<float>(b.qs[j]) * d;
}

// Decodes a row of n elements of any type.
inline void decode_row(DType type, const void* row, int64_t n, float* x) {
  switch (type) {
    case DType::F32: {
      const float* p = static_cast<const float*>(row);
      for (int64_t i = 0; i < n; ++i) x[i] = p[i];
      return;
    }
    case DType::F16: {
      const uint16_t* p = static_cast<const uint16_t*>(row);
      for (int64_t i = 0; i < n; ++i) x[i] = f16_to_f32(p[i]);
      return;
    }
    case DType::BF16: {
      const uint16_t* p = static_cast<const uint16_t*>(row);
      for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_f32(p[i]);
      return;
    }
    case DType::Q4_0: {
      const BlockQ4_0* p = static_cast<const BlockQ4_0*>(row);
      for (int64_t g = 0; g < n / kGroup; ++g) decode(p[g], x + g * kGroup);
      return;
    }
    case DType::Q4_1: {
      const BlockQ4_1* p = static_cast<const BlockQ4_1*>(row);
      for (int64_t g = 0; g < n / kGroup; ++g) decode(p[g], x + g * kGroup);
      return;
    }
    case DType::Q8_0: {
      const BlockQ8_0* p = static_cast<const BlockQ8_0*>(row);
      for (int64_t g = 0; g < n / kGroup; ++g) decode(p[g], x + g * kGroup);
      return;
    }
  }
}

}  // namespace dflash
