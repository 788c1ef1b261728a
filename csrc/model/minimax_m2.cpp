#include "model/minimax_m2.h"

#include "core/error.h"

namespace dflash {

size_t MiniMaxM2::Scratch::bytes_for(const TargetConfig& c, int rows) {
  return static_cast<size_t>(rows * (c.n_embd + 2 * (c.q_dim() + c.kv_dim()))) * sizeof(float);
}

MiniMaxM2::Scratch::Scratch(Backend& backend, const TargetConfig& c, int n) : max_rows(n) {
  memory = backend.alloc(bytes_for(c, n));
  rows.x = memory.as<float>();
  rows.q = rows.x + n * int64_t{c.n_embd};
  rows.attn = rows.q + n * c.q_dim();
  rows.k = rows.attn + n * c.q_dim();
  rows.v = rows.k + n * c.kv_dim();
}

std::unique_ptr<MiniMaxM2> MiniMaxM2::load(std::shared_ptr<const Gguf> gguf, Backend& backend,
                                           const Progress& progress) {
  WeightLoader weights(gguf, backend, "target", progress);
  auto m = make(read_target_config(*gguf), weights, backend);
  weights.finish();
  return m;
}

std::unique_ptr<MiniMaxM2> MiniMaxM2::make(const TargetConfig& config, WeightSource& w, Backend& backend) {
  auto m = std::make_unique<MiniMaxM2>();
  const TargetConfig& c = m->config_ = config;
  m->embedding_ = w.matrix("token_embd.weight", c.n_embd, c.n_vocab);
  for (int i = 0; i < c.n_layer; ++i) {
    const std::string p = cat("blk.", i, ".");
    Layer layer;
    layer.load(w, p, c, QkNorm::whole);
    layer.ffn_norm = w.vector(p + "ffn_norm.weight", c.n_embd);
    layer.router = w.f32_matrix(p + "ffn_gate_inp.weight", c.n_embd, c.n_expert);
    layer.router_bias = w.vector(p + "exp_probs_b.bias", c.n_expert);
    layer.gate = w.stack(p + "ffn_gate_exps.weight", c.n_embd, c.n_ff, c.n_expert);
    layer.up = w.stack(p + "ffn_up_exps.weight", c.n_embd, c.n_ff, c.n_expert);
    layer.down = w.stack(p + "ffn_down_exps.weight", c.n_ff, c.n_embd, c.n_expert);
    m->layers_.push_back(std::move(layer));
  }
  m->output_norm_ = w.vector("output_norm.weight", c.n_embd);
  m->head_ = w.has("output.weight") ? w.matrix("output.weight", c.n_embd, c.n_vocab) : m->embedding_;
  m->inv_freq_ = upload_f32(backend, c.rope.inv_freq);
  return m;
}

size_t MiniMaxM2::weight_bytes() const {
  size_t bytes = embedding_.bytes() + head_.bytes() + output_norm_.bytes();
  for (const Layer& l : layers_) {
    bytes += l.dense_bytes() + l.gate.bytes() + l.up.bytes() + l.down.bytes();
  }
  return bytes;
}

size_t MiniMaxM2::bytes_per_token() const {
  size_t bytes = head_.bytes() + output_norm_.bytes();
  for (const Layer& l : layers_) bytes += l.dense_bytes();
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

  auto tap = [&](int layer_input) {
    if (taps == nullptr) return;
    const size_t n_taps = taps->layers->size();
    for (size_t t = 0; t < n_taps; ++t) {
      if ((*taps->layers)[t] == layer_input) {
        backend.copy_rows(s.rows.x, step.rows, n_embd, taps->dst + t * static_cast<size_t>(n_embd),
                          static_cast<int64_t>(n_taps) * n_embd);
      }
    }
  };

  backend.embed(embedding_, tokens, step.rows, s.rows.x);
  for (int i = 0; i < c.n_layer; ++i) {
    const Layer& l = layers_[static_cast<size_t>(i)];
    tap(i);
    l.forward(backend, c, l.qkv_post(c, QkNorm::whole, f32(inv_freq_)), Attention{}, step, s.rows, kv.layer(i));
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
    backend.moe(moe, step.rows, s.rows.x);
  }
  tap(c.n_layer);
}

void MiniMaxM2::logits(Backend& backend, const Scratch& s, int first, int rows, float* logits) const {
  const MatmulOut out{&head_, logits};
  backend.norm_matmul(s.rows.x + static_cast<int64_t>(first) * config_.n_embd, f32(output_norm_), config_.eps, rows,
                      &out, 1);
}

}  // namespace dflash
