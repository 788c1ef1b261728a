#pragma once
// K and V of every layer for one timeline. Truncation is forgetting a length: later writes overwrite.

#include <vector>

#include "backend/backend.h"

namespace dflash {

class KvCache {
 public:
  // n_ctx positions a layer. Throws CapacityError when memory is short.
  KvCache(Backend& backend, int n_layer, int n_head_kv, int head_dim, int n_ctx, DType type);

  const KvLayer& layer(int i) const { return layers_[static_cast<size_t>(i)]; }
  int n_ctx() const { return n_ctx_; }
  size_t bytes() const { return bytes_; }
  static size_t bytes_for(int n_layer, int n_head_kv, int head_dim, int n_ctx, DType type);

 private:
  int n_ctx_ = 0;
  size_t bytes_ = 0;
  std::vector<Buffer> buffers_;
  std::vector<KvLayer> layers_;
};

}  // namespace dflash
