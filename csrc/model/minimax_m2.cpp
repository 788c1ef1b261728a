#include "model/minimax_m2.h"

#include <cmath>

#include "core/error.h"

namespace dflash {

size_t MiniMaxM2::Scratch::bytes_for(const TargetConfig& c, int rows) {
  const int width = c.n_embd + 2 * (c.n_head + c.n_head_kv) * c.head_dim;
  return static_cast<size_t>(rows) * static_cast<size_t>(width) * sizeof(float);
}

MiniMaxM2::Scratch::Scratch(Backend& backend, const TargetConfig& c, int rows) : max_rows(rows) {
  const size_t n = static_cast<size_t>(rows);
  const size_t embd = n * static_cast<size_t>(c.n_embd);
  const size_t q_size = n * static_cast<size_t>(c.n_head * c.head_dim);
  const size_t kv_size = n * static_cast<size_t>(c.n_head_kv * c.head_dim);
  memory = backend.alloc(bytes_for(c, rows));
  x = memory.as<float>();
  q = x + embd;
  attn = q + q_size;
  k = attn + q_size;
  v = k + kv_size;
}

std::unique_ptr<MiniMaxM2> MiniMaxM2::load(std::shared_ptr<const Gguf> gguf, Backend& backend,
                                           const Progress& progress) {
  auto m = std::make_unique<MiniMaxM2>();
  const TargetConfig& c = m->config_ = read_target_config(*gguf);
  WeightLoader w(std::move(gguf), backend, "target", progress);
  const int64_t q_dim = c.n_head * c.head_dim, kv_dim = c.n_head_kv * c.head_dim;
  m->embedding_ = w.matrix("token_embd.weight", c.n_embd, c.n_vocab);
  for (int i = 0; i < c.n_layer; ++i) {
    const std::string p = cat("blk.", i, ".");
    Layer layer;
    layer.attn_norm = w.vector(p + "attn_norm.weight", c.n_embd);
    layer.q = w.matrix(p + "attn_q.weight", c.n_embd, q_dim);
    layer.k = w.matrix(p + "attn_k.weight", c.n_embd, kv_dim);
    layer.v = w.matrix(p + "attn_v.weight", c.n_embd, kv_dim);
    layer.q_norm = w.vector(p + "attn_q_norm.weight", q_dim);
    layer.k_norm = w.vector(p + "attn_k_norm.weight", kv_dim);
    layer.attn_output = w.matrix(p + "attn_output.weight", q_dim, c.n_embd);
    layer.ffn_norm = w.vector(p + "ffn_norm.weight", c.n_embd);
    layer.router = w.f32_matrix(p + "ffn_gate_inp.weight", c.n_embd, c.n_expert);
    layer.router_bias = w.vector(p + "exp_probs_b.bias", c.n_expert);
    layer.gate = w.matrix(p + "ffn_gate_exps.weight", c.n_embd, c.n_ff, c.n_expert);
    layer.up = w.matrix(p + "ffn_up_exps.weight", c.n_embd, c.n_ff, c.n_expert);
    layer.down = w.matrix(p + "ffn_down_exps.weight", c.n_ff, c.n_embd, c.n_expert);
    m->layers_.push_back(std::move(layer));
  }
  m->output_norm_ = w.vector("output_norm.weight", c.n_embd);
  m->head_ = w.has("output.weight") ? w.matrix("output.weight", c.n_embd, c.n_vocab) : m->embedding_;
  w.finish();
  m->inv_freq_ = upload_f32(backend, c.rope.inv_freq);
  return m;
}

std::unique_ptr<MiniMaxM2> MiniMaxM2::random(const TargetConfig& config, DType matrices, DType head, float branch_gain,
                                             Backend& backend, uint64_t seed) {
  auto m = std::make_unique<MiniMaxM2>();
  const TargetConfig& c = m->config_ = config;
  auto matrix = [&](DType type, int64_t n_in, int64_t n_out, int64_t n_expert = 1) {
    return backend.random_weight(type, n_in, n_out, n_expert, ++seed);
  };
  auto constant = [&](int64_t n, float value) {
    return upload_f32(backend, std::vector<float>(static_cast<size_t>(n), value));
  };
  const int64_t q_dim = c.n_head * c.head_dim, kv_dim = c.n_head_kv * c.head_dim;
  m->embedding_ = matrix(head, c.n_embd, c.n_vocab);
  for (int i = 0; i < c.n_layer; ++i) {
    Layer layer;
    layer.attn_norm = constant(c.n_embd, branch_gain);
    layer.q = matrix(matrices, c.n_embd, q_dim);
    layer.k = matrix(matrices, c.n_embd, kv_dim);
    layer.v = matrix(matrices, c.n_embd, kv_dim);
    layer.q_norm = constant(q_dim, 1.0f);
    layer.k_norm = constant(kv_dim, 1.0f);
    layer.attn_output = matrix(matrices, q_dim, c.n_embd);
    layer.ffn_norm = constant(c.n_embd, branch_gain);
    layer.router = matrix(DType::F32, c.n_embd, c.n_expert);
    layer.router_bias = constant(c.n_expert, 0.0f);
    layer.gate = matrix(matrices, c.n_embd, c.n_ff, c.n_expert);
    layer.up = matrix(matrices, c.n_embd, c.n_ff, c.n_expert);
    layer.down = matrix(matrices, c.n_ff, c.n_embd, c.n_expert);
    m->layers_.push_back(std::move(layer));
  }
  m->output_norm_ = constant(c.n_embd, 1.0f);
  m->head_ = matrix(head, c.n_embd, c.n_vocab);
  m->inv_freq_ = upload_f32(backend, c.rope.inv_freq);
  return m;
}

size_t MiniMaxM2::weight_bytes() const {
  size_t bytes = embedding_.bytes() + head_.bytes() + output_norm_.bytes();
  for (const Layer& l : layers_) {
    for (const Weight* w : {&l.attn_norm, &l.q, &l.k, &l.v, &l.q_norm, &l.k_norm, &l.attn_output, &l.ffn_norm,
                            &l.router, &l.router_bias, &l.gate, &l.up, &l.down}) {
      bytes += w->bytes();
    }
  }
  return bytes;
}

size_t MiniMaxM2::bytes_per_token() const {
  size_t bytes = head_.bytes() + output_norm_.bytes();
  for (const Layer& l : layers_) {
    for (const Weight* w : {&l.attn_norm, &l.q, &l.k, &l.v, &l.q_norm, &l.k_norm, &l.attn_output, &l.ffn_norm,
                            &l.router, &l.router_bias}) {
      bytes += w->bytes();
    }
  }
  return bytes + expert_bytes_per_token();
}

size_t MiniMaxM2::expert_bytes_per_token() const {
  size_t stacks = 0;
  for (const Layer& l : layers_) stacks += l.gate.bytes() + l.up.bytes() + l.down.bytes();
  return stacks / static_cast<size_t>(config_.n_expert) * static_cast<size_t>(config_.n_expert_used);
}

void MiniMaxM2::forward(Backend& backend, Scratch& s, Step step, const int32_t* tokens, const KvCache& kv,
                        const TapSink* taps) const {
  const TargetConfig& c = config_;
  const int64_t n_embd = c.n_embd;

  QkvPost post;
  post.n_head = c.n_head;
  post.n_head_kv = c.n_head_kv;
  post.head_dim = c.head_dim;
  post.n_rot = c.rope.n_rot;
  post.norm = QkNorm::whole;
  post.inv_freq = f32(inv_freq_);
  post.rope_scale = c.rope.scale;
  post.eps = c.eps;

  Attention attention;
  attention.n_head = c.n_head;
  attention.n_head_kv = c.n_head_kv;
  attention.head_dim = c.head_dim;
  attention.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));

  auto tap = [&](int layer_input) {
    if (taps == nullptr) return;
    const size_t n_taps = taps->layers->size();
    for (size_t t = 0; t < n_taps; ++t) {
      if ((*taps->layers)[t] == layer_input) {
        backend.copy_rows(s.x, step.rows, n_embd, taps->dst + t * static_cast<size_t>(n_embd),
                          static_cast<int64_t>(n_taps) * n_embd);
      }
    }
  };

  backend.embed(embedding_, tokens, step.rows, s.x);
  for (int i = 0; i < c.n_layer; ++i) {
    const Layer& l = layers_[static_cast<size_t>(i)];
    tap(i);
    const MatmulOut qkv[] = {{&l.q, s.q}, {&l.k, s.k}, {&l.v, s.v}};
    backend.norm_matmul(s.x, f32(l.attn_norm), c.eps, step.rows, qkv, 3);
    post.q_norm = f32(l.q_norm);
    post.k_norm = f32(l.k_norm);
    backend.qkv_post(post, step, s.q, s.k, s.v, kv.layer(i));
    backend.attention(attention, step, s.q, kv.layer(i), s.attn);
    backend.matmul_add(l.attn_output, s.attn, step.rows, s.x);

    Moe moe;
    moe.n_expert = c.n_expert;
    moe.top_k = c.n_expert_used;
    moe.eps = c.eps;
    moe.norm = f32(l.ffn_norm);
    moe.router = &l.router;
    moe.bias = f32(l.router_bias);
    moe.gate = &l.gate;
    moe.up = &l.up;
    moe.down = &l.down;
    backend.moe(moe, step.rows, s.x);
  }
  tap(c.n_layer);
}

void MiniMaxM2::logits(Backend& backend, const Scratch& s, int first, int rows, float* logits) const {
  const MatmulOut out{&head_, logits};
  backend.norm_matmul(s.x + static_cast<int64_t>(first) * config_.n_embd, f32(output_norm_), config_.eps, rows, &out,
                      1);
}

}  // namespace dflash
