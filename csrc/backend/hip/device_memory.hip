#include "backend/hip/device_memory.h"

#include "core/units.h"

namespace dflash::hip {

std::shared_ptr<void> device_alloc(size_t bytes, const char* what) {
  void* p = nullptr;
  const gpu::Status status = GPU_API(Malloc)(&p, bytes > 0 ? bytes : 64);
  if (status == gpu::kOutOfMemory) {
    (void)GPU_API(GetLastError)();
    size_t free = 0, total = 0;
    (void)GPU_API(MemGetInfo)(&free, &total);
    throw CapacityError(
        cat("GPU memory: ", human_bytes(bytes), " asked for ", what, ", ", human_bytes(free), " free of ",
            human_bytes(total),
            bytes > free ? cat(" (short by ", human_bytes(bytes - free), ")") : std::string(" (fragmented)"),
            ". What makes it fit: a smaller n_ctx, a q8_0 KV cache, a smaller head, other programs off the GPU; ",
            kMoreMemory, "."));
  }
  gpu::check(status, "Malloc");
  return std::shared_ptr<void>(p, [](void* q) { (void)GPU_API(Free)(q); });
}

PinnedRing::PinnedRing(int slots, size_t slot_bytes) : slots_(static_cast<size_t>(slots)), slot_bytes_(slot_bytes) {
  for (Slot& s : slots_) {
    s.data = gpu::host_alloc(slot_bytes);
    GPU_CHECK(EventCreateWithFlags(&s.copied, GPU_API(EventDisableTiming)));
  }
}

PinnedRing::~PinnedRing() {
  for (Slot& s : slots_) {
    if (s.copied != nullptr) {
      (void)GPU_API(EventSynchronize)(s.copied);
      (void)GPU_API(EventDestroy)(s.copied);
    }
    if (s.data != nullptr) gpu::host_free(s.data);
  }
}

void* PinnedRing::acquire() {
  GPU_CHECK(EventSynchronize(slots_[next_].copied));  // an event never recorded counts as done
  return slots_[next_].data;
}

void PinnedRing::release(gpu::Stream s) {
  GPU_CHECK(EventRecord(slots_[next_].copied, s));
  next_ = (next_ + 1) % slots_.size();
}

}  // namespace dflash::hip
