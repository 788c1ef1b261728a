#pragma once
// The attention half of a layer. Target and drafter have the same one, but for the extent of the QK norm and which
// positions a row sees.

#include <string>

#include "backend/backend.h"
#include "model/config.h"
#include "model/weights.h"

namespace dflash {

struct AttentionLayer {
  Weight attn_norm;       // [n_embd]
  Weight q, k, v;         // [n_head(_kv) * head_dim, n_embd]
  Weight q_norm, k_norm;  // QkNorm::whole: [n_head(_kv) * head_dim]; per_head: [head_dim]
  Weight attn_output;     // [n_embd, n_head * head_dim]

  // Activations of a step's rows.
  struct Rows {
    float* x;     // [rows, n_embd] residual stream
    float* q;     // [rows, n_head * head_dim]
    float* k;     // [rows, n_head_kv * head_dim]
    float* v;     // [rows, n_head_kv * head_dim]
    float* attn;  // [rows, n_head * head_dim]
  };

  // Takes the tensors "<prefix>attn_...".
  void load(WeightSource& w, const std::string& prefix, const ModelConfig& c, QkNorm norm);
  size_t bytes() const;
  // Norm and rotation of this layer's queries and keys. inv_freq [n_rot / 2], backend memory.
  QkvPost qkv_post(const ModelConfig& c, QkNorm norm, const float* inv_freq) const;
  // x += attention over kv, which takes in the rows' own keys and values. how: causal and sliding_window.
  void forward(Backend& backend, const ModelConfig& c, const QkvPost& post, Attention how, Step step, const Rows& r,
               const KvLayer& kv) const;
};

}  // namespace dflash
