#include "backend/hip/weight_upload.h"

#include <algorithm>
#include <cstring>

#include "backend/hip/kernels.h"

namespace dflash::hip {

size_t device_weight_bytes(DType type, int64_t n_in, int64_t n_out, int64_t n_expert) {
  const int64_t rows = is_quantized(type) ? (n_out + kTile - 1) / kTile * kTile : n_out;
  return static_cast<size_t>(n_expert) * static_cast<size_t>(rows) * row_bytes(type, n_in);
}

const char* WeightUpload::fetch(const HostTensor& t, size_t offset, size_t bytes) {
  void* slot = ring_.acquire();  // no copy reads it any more
  if (t.path.empty()) {
    std::memcpy(slot, static_cast<const char*>(t.data) + offset, bytes);
    return static_cast<const char*>(slot);
  }
  if (file_ == nullptr || file_->path() != t.path) file_ = std::make_unique<FileReader>(t.path);
  return file_->read(t.file_offset + offset, bytes, slot);
}

void WeightUpload::load(const HostTensor& t, const Weight& w) {
  const size_t row = row_bytes(t.type, t.n_in);
  const int64_t rows = t.n_out * t.n_expert;
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(kChunk / row));
  if (row > kChunk) fail("GPU: a row of ", t.name, " has ", row, " bytes; at most ", kChunk);
  const bool repacks = is_quantized(t.type);
  if (repacks && raw_ == nullptr) raw_ = device_alloc(kChunk, "loading");
  const TiledWeight tiles = tiled(w);
  // Kernels copy whole tiles: the rows that pad the last one are read, though nothing that is kept comes of them.
  if (repacks && t.n_out % kTile != 0) {
    GPU_CHECK(
        MemsetAsync(const_cast<void*>(w.data), 0, device_weight_bytes(t.type, t.n_in, t.n_out, t.n_expert), stream_));
  }
  char* plain = static_cast<char*>(const_cast<void*>(w.data));
  for (int64_t r = 0; r < rows; r += step) {
    const int64_t n = std::min(step, rows - r);
    const size_t offset = static_cast<size_t>(r) * row, bytes = static_cast<size_t>(n) * row;
    const char* piece = fetch(t, offset, bytes);
    void* to = repacks ? raw_.get() : plain + offset;
    gpu::copy_to_device(to, piece, bytes, stream_);
    ring_.release(stream_);
    if (repacks) {
      launch_repack(stream_, t.type, to, r, n, t.n_out, t.n_in, const_cast<uint8_t*>(tiles.quants),
                    const_cast<uint16_t*>(tiles.scales));
    }
  }
}

}  // namespace dflash::hip
