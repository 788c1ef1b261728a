#pragma once
// Scratch memory in the shapes the ops work with.

#include <functional>
#include <utility>

#include "backend/hip/device_memory.h"
#include "backend/hip/kernels.h"

namespace dflash::hip {

inline QuantRows rows_of(const MutableQuantRows& m, int64_t n) { return {m.q, m.scale, n}; }

class Workspace {
 public:
  // drop_recordings is called before memory moves whose address recorded steps hold.
  Workspace(gpu::Stream stream, std::function<void()> drop_recordings)
      : stream_(stream), drop_recordings_(std::move(drop_recordings)) {}

  template <typename T>
  T* get(Scratch::Name name, size_t bytes) {
    return static_cast<T*>(scratch_.get(name, bytes, [&] {
      GPU_CHECK(StreamSynchronize(stream_));
      drop_recordings_();
    }));
  }

  // For ops that are never part of a recorded step.
  template <typename T>
  T* unrecorded(Scratch::Name name, size_t bytes) {
    return static_cast<T*>(scratch_.get(name, bytes, [&] { GPU_CHECK(StreamSynchronize(stream_)); }));
  }

  // Memory that is zero at first.
  void* zeroed(Scratch::Name name, size_t bytes) {
    const bool grows = scratch_.bytes(name) < bytes;
    void* p = get<void>(name, bytes);
    if (grows) GPU_CHECK(MemsetAsync(p, 0, bytes, stream_));
    return p;
  }

  float* floats(Scratch::Name name, int64_t rows, int64_t n) {
    return get<float>(name, static_cast<size_t>(rows * n) * sizeof(float));
  }

  // Quantised rows of n: int8, then scales.
  MutableQuantRows mutable_quant(Scratch::Name name, int64_t rows, int64_t n) {
    const size_t q_bytes = (static_cast<size_t>(rows * n) + 255) / 256 * 256;
    int8_t* q = get<int8_t>(name, q_bytes + static_cast<size_t>(rows * n / 32) * sizeof(GroupScale));
    return {q, reinterpret_cast<GroupScale*>(q + q_bytes)};
  }
  QuantRows quant_rows(int64_t rows, int64_t n) { return rows_of(mutable_quant(Scratch::kQuant, rows, n), n); }

  // 16-bit rows of n, for more than kFewRows rows.
  HalfRows half_rows(Scratch::Name name, int64_t rows, int64_t n, bool f16) {
    return {get<uint16_t>(name, static_cast<size_t>(rows * n) * sizeof(uint16_t)), n, f16};
  }

  // Outputs of pairs, n of each rounded up to whole tiles.
  PairRows pair_rows(Scratch::Name name, int64_t pairs, int64_t n) {
    n = (n + kTile - 1) / kTile * kTile;
    const size_t v_bytes = static_cast<size_t>(pairs * n) * sizeof(uint16_t);
    char* p = get<char>(name, v_bytes + static_cast<size_t>(pairs * (n / kTile)) * sizeof(float));
    return {reinterpret_cast<uint16_t*>(p), reinterpret_cast<float*>(p + v_bytes), n};
  }

 private:
  gpu::Stream stream_;
  std::function<void()> drop_recordings_;
  Scratch scratch_;
};

}  // namespace dflash::hip
