#pragma once
// A wave's weights where gate, up and down tiles pass through one ring without a pause (NVIDIA).

#include "backend/hip/few_rows.h"

namespace dflash::hip {

struct ExpertTiles {
  TiledWeight gate, up, down;
};

// Whether every segment of K has so many chunks that a ring of slots begins with chunks of one tile.
template <typename F>
inline bool begins_with_a_tile(int groups, int slots) {
  const int last = groups - (kSegments - 1) * segment_groups(groups);
  return last > (slots - 1) * kChunk<F>;
}

//   Tasks: bool next(Run<F>& run): what the wave copies next, in the order in which take() uses it
template <typename F, int Slots, typename Tasks>
class TaskStream {
 public:
  using Layout = Slot<F, 0>;

  // lds: Slots * Layout::kBytes, the wave's own.
  __device__ TaskStream(uint8_t* lds, const Tasks& tasks) : lds_(lds), tasks_(tasks) {}

  __device__ inline void start() {
#pragma unroll
    for (int s = 0; s < Slots; ++s) {
      copy(lds_ + s * Layout::kBytes);
      gpu::copy_commit();
    }
  }

  // The same where what comes first is known sooner than the tasks (begins_with_a_tile).
  __device__ inline void start_with(const Run<F>& first) {
    run_ = first;
#pragma unroll
    for (int s = 0; s < Slots; ++s) {
      run_.copy_chunk(lds_ + s * Layout::kBytes);
      gpu::copy_commit();
    }
    tasks_.skip_first();
  }

  // The groups that take() hands out: a tile's.
  __device__ void expect(int groups) { groups_ = groups; }

  // Calls use(quants, scales, first group within the segment, groups, slot) for the pieces of the next tile, in order.
  template <typename Use>
  __device__ inline void take(Use use) {
#pragma unroll 1
    for (int g = 0; g < groups_; g += kChunk<F>) {
      gpu::copy_wait<Slots - 1>();
      uint8_t* slot = lds_ + slot_;
      use(slot, reinterpret_cast<const uint16_t*>(slot + Layout::kScales), g, min(kChunk<F>, groups_ - g), slot);
      gpu::wave_sync();
      copy(slot);
      gpu::copy_commit();
      slot_ += Layout::kBytes;
      if (slot_ == Slots * Layout::kBytes) slot_ = 0;
    }
  }

 private:
  __device__ inline void copy(uint8_t* slot) {
    while (run_.left <= 0) {
      if (!tasks_.next(run_)) return;
    }
    run_.copy_chunk(slot);
  }

  uint8_t* lds_;
  Tasks tasks_;
  Run<F> run_;
  int groups_ = 0;
  int slot_ = 0;  // of the next piece to use, in bytes
};

}  // namespace dflash::hip
