#include "model/attention_layer.h"

#include <cmath>

namespace dflash {

void AttentionLayer::load(WeightSource& w, const std::string& prefix, const ModelConfig& c, QkNorm norm) {
  const bool whole = norm == QkNorm::whole;
  attn_norm = w.vector(prefix + "attn_norm.weight", c.n_embd);
  q = w.matrix(prefix + "attn_q.weight", c.n_embd, c.q_dim());
  k = w.matrix(prefix + "attn_k.weight", c.n_embd, c.kv_dim());
  v = w.matrix(prefix + "attn_v.weight", c.n_embd, c.kv_dim());
  q_norm = w.vector(prefix + "attn_q_norm.weight", whole ? c.q_dim() : c.head_dim);
  k_norm = w.vector(prefix + "attn_k_norm.weight", whole ? c.kv_dim() : c.head_dim);
  attn_output = w.matrix(prefix + "attn_output.weight", c.q_dim(), c.n_embd);
}

size_t AttentionLayer::bytes() const {
  size_t sum = 0;
  for (const Weight* w : {&attn_norm, &q, &k, &v, &q_norm, &k_norm, &attn_output}) sum += w->bytes();
  return sum;
}

QkvPost AttentionLayer::qkv_post(const ModelConfig& c, QkNorm norm, const float* inv_freq) const {
  QkvPost post;
  post.n_head = c.n_head;
  post.n_head_kv = c.n_head_kv;
  post.head_dim = c.head_dim;
  post.n_rot = c.rope.n_rot;
  post.norm = norm;
  post.q_norm = f32(q_norm);
  post.k_norm = f32(k_norm);
  post.inv_freq = inv_freq;
  post.rope_scale = c.rope.scale;
  post.eps = c.eps;
  return post;
}

void AttentionLayer::forward(Backend& backend, const ModelConfig& c, const QkvPost& post, Attention how, Step step,
                             const Rows& r, const KvLayer& kv) const {
  how.n_head = c.n_head;
  how.n_head_kv = c.n_head_kv;
  how.head_dim = c.head_dim;
  how.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  const MatmulOut qkv[] = {{&q, r.q}, {&k, r.k}, {&v, r.v}};
  backend.norm_matmul(r.x, f32(attn_norm), c.eps, step.rows, qkv, 3);
  backend.qkv_post(post, step, r.q, r.k, r.v, kv);
  backend.attention(how, step, r.q, kv, r.attn);
  backend.matmul_add(attn_output, r.attn, step.rows, r.x);
}

}  // namespace dflash
