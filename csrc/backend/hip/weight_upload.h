#pragma once
// Tensor bytes from a file or from host memory into device memory, repacked on the way where the type is quantised.

#include <memory>

#include "backend/backend.h"
#include "backend/hip/device_memory.h"
#include "core/file_reader.h"

namespace dflash::hip {

// Device bytes that a weight of this shape takes: rows of quantised types are padded to whole tiles.
size_t device_weight_bytes(DType type, int64_t n_in, int64_t n_out, int64_t n_expert);

// Keeps its buffers and the file open between tensors; drop it when loading is over.
class WeightUpload {
 public:
  explicit WeightUpload(gpu::Stream stream) : stream_(stream), ring_(2, FileReader::buffer_bytes(kChunk)) {}

  // Queues the copies into w, which is allocated in its final layout.
  void load(const HostTensor& t, const Weight& w);

 private:
  static constexpr size_t kChunk = size_t{32} << 20;
  // Bytes [offset, offset + bytes) of the tensor, in host memory the device can copy from.
  const char* fetch(const HostTensor& t, size_t offset, size_t bytes);

  gpu::Stream stream_;
  PinnedRing ring_;
  std::shared_ptr<void> raw_;  // a chunk in GGUF order, to be repacked
  std::unique_ptr<FileReader> file_;
};

}  // namespace dflash::hip
