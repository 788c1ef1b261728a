#pragma once
// The block types a tensor may have. One row here, one header beside it, and (optionally) fast kernels in a backend.
// Ids, sizes and layouts are ggml's, so that GGUF bytes are used as they are.

#include <cstddef>
#include <cstdint>

namespace dflash {

enum class DType : uint32_t { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, BF16 = 30 };

struct DTypeInfo {
  DType type;
  const char* name;
  int block;  // elements per block
  int bytes;  // bytes per block
};

inline constexpr DTypeInfo kDTypes[] = {
    {DType::F32, "F32", 1, 4},     {DType::F16, "F16", 1, 2},     {DType::Q4_0, "Q4_0", 32, 18},
    {DType::Q4_1, "Q4_1", 32, 20}, {DType::Q8_0, "Q8_0", 32, 34}, {DType::BF16, "BF16", 1, 2},
};

// nullptr when the id is not in the table.
constexpr const DTypeInfo* find_dtype(uint32_t id) {
  for (const DTypeInfo& info : kDTypes) {
    if (static_cast<uint32_t>(info.type) == id) return &info;
  }
  return nullptr;
}

constexpr const DTypeInfo& dtype_info(DType type) { return *find_dtype(static_cast<uint32_t>(type)); }

constexpr bool is_quantized(DType type) { return dtype_info(type).block > 1; }

// Bytes of one row of n elements; n is a multiple of the block.
constexpr size_t row_bytes(DType type, int64_t n) {
  const DTypeInfo& info = dtype_info(type);
  return static_cast<size_t>(n / info.block) * static_cast<size_t>(info.bytes);
}

}  // namespace dflash
