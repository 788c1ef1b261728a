#include "model/kv_cache.h"

namespace dflash {

namespace {

int whole_blocks(int n_ctx) { return (n_ctx + 15) / 16 * 16; }  // KvLayer::n_ctx

size_t one_side(int n_head_kv, int head_dim, int n_ctx, DType type) {
  return static_cast<size_t>(n_head_kv) * static_cast<size_t>(whole_blocks(n_ctx)) * row_bytes(type, head_dim);
}

}  // namespace

size_t KvCache::bytes_for(int n_layer, int n_head_kv, int head_dim, int n_ctx, DType type) {
  return 2 * static_cast<size_t>(n_layer) * one_side(n_head_kv, head_dim, n_ctx, type);
}

KvCache::KvCache(Backend& backend, int n_layer, int n_head_kv, int head_dim, int n_ctx, DType type) : n_ctx_(n_ctx) {
  const size_t side = one_side(n_head_kv, head_dim, n_ctx, type);
  for (int i = 0; i < n_layer; ++i) {
    KvLayer layer;
    buffers_.push_back(backend.alloc(side));
    layer.k = buffers_.back().data;
    buffers_.push_back(backend.alloc(side));
    layer.v = buffers_.back().data;
    layer.type = type;
    layer.n_head_kv = n_head_kv;
    layer.head_dim = head_dim;
    layer.n_ctx = whole_blocks(n_ctx);
    layers_.push_back(layer);
    bytes_ += 2 * side;
  }
}

}  // namespace dflash
