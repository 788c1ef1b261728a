#pragma once
// Device allocations, the pinned ring that carries host data in, and scratch that only grows.

#include <cstddef>
#include <memory>
#include <vector>

#include "backend/hip/gpu.h"

namespace dflash::hip {

inline constexpr const char* kMoreMemory = "on Strix Halo a larger amdgpu.gttsize and ttm.pages_limit";

// Throws CapacityError that says how much was asked and how much is free. The memory goes with the last copy.
std::shared_ptr<void> device_alloc(size_t bytes, const char* what);

// Host memory that the device copies from. A slot is handed out again only when the copy that read it has finished:
// rewriting a buffer under an asynchronous copy gives wrong tokens now and then (llama.cpp #28211, on Strix Halo).
class PinnedRing {
 public:
  PinnedRing(int slots, size_t slot_bytes);
  ~PinnedRing();
  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;

  size_t slot_bytes() const { return slot_bytes_; }
  void* acquire();              // waits until the next slot is free
  void release(gpu::Stream s);  // after queueing the copy out of the acquired slot

 private:
  struct Slot {
    void* data = nullptr;
    gpu::Event copied = nullptr;
  };
  std::vector<Slot> slots_;
  size_t slot_bytes_;
  size_t next_ = 0;
};

// Named pieces of device memory, each as large as the largest request so far. on_move is called before a piece that
// was in use moves (recorded steps hold its address).
class Scratch {
 public:
  enum Name {
    kHidden,
    kQuant,
    kActQuant,
    kActFloat,
    kLogits,
    kRouting,
    kPairOut,
    kExpertWords,
    kRowWords,
    kPartials,
    kSquares,
    kTop1,
    kSamplingInputs,
    kSampling,
    kNames
  };

  template <typename OnMove>
  void* get(Name name, size_t bytes, OnMove on_move) {
    Piece& piece = pieces_[name];
    if (piece.bytes < bytes) {
      if (piece.memory != nullptr) on_move();
      piece.memory.reset();
      piece.bytes = 0;
      piece.memory = device_alloc(bytes, "scratch");
      piece.bytes = bytes;
    }
    return piece.memory.get();
  }

  size_t bytes(Name name) const { return pieces_[name].bytes; }

 private:
  struct Piece {
    std::shared_ptr<void> memory;
    size_t bytes = 0;
  };
  Piece pieces_[kNames];
};

}  // namespace dflash::hip
