#pragma once
// What plain streaming reads of a large buffer reach: the yardstick for every share of the bandwidth.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "backend/backend.h"
#include "core/thread_pool.h"

namespace dflash {

class ReadBandwidth {
 public:
  ReadBandwidth(Backend& b, int threads, size_t bytes = size_t{1} << 30)
      : pool_(threads), memory_(b.alloc(bytes)), sums_(static_cast<size_t>(pool_.size()) * 8) {
    std::memset(memory_.data, 1, bytes);
  }

  // Reads the next bytes (a part of the buffer that caches have forgotten).
  void read(size_t bytes) {
    constexpr size_t kPiece = size_t{1} << 20;
    bytes = std::min(bytes, memory_.bytes);
    if (at_ + bytes > memory_.bytes) at_ = 0;
    const uint8_t* data = memory_.as<uint8_t>() + at_;
    at_ += bytes;
    pool_.parallel_for(static_cast<int64_t>(bytes / kPiece), [&](int64_t i, int thread) {
      typedef uint64_t V __attribute__((vector_size(64)));
      const V* p = reinterpret_cast<const V*>(data + static_cast<size_t>(i) * kPiece);
      V s0{}, s1{}, s2{}, s3{};
      for (size_t k = 0; k < kPiece / sizeof(V); k += 4) {
        for (size_t line = 0; line < 4; ++line) __builtin_prefetch(p + k + line + 192);
        s0 += p[k];
        s1 += p[k + 1];
        s2 += p[k + 2];
        s3 += p[k + 3];
      }
      const V s = s0 + s1 + s2 + s3;
      sums_[static_cast<size_t>(thread) * 8] += s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
    });
  }

  size_t bytes() const { return memory_.bytes; }
  uint64_t sum() const { return sums_[0]; }  // so that the reads are not optimised away

 private:
  ThreadPool pool_;
  Buffer memory_;
  std::vector<uint64_t> sums_;
  size_t at_ = 0;
};

}  // namespace dflash
