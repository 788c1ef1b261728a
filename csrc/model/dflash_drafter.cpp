#include "model/dflash_drafter.h"

#include "core/error.h"

namespace dflash {

size_t DFlashDrafter::Scratch::bytes_for(const DrafterConfig& c, int n) {
  const int64_t per_row = c.n_embd + 2 * c.n_layer * c.kv_dim(), block = 2 * c.block_size * c.q_dim();
  return static_cast<size_t>(n * per_row + block) * sizeof(float);
}

DFlashDrafter::Scratch::Scratch(Backend& backend, const DrafterConfig& c, int n)
    : max_rows(n > c.block_size ? n : c.block_size) {
  memory = backend.alloc(bytes_for(c, max_rows));
  rows.x = memory.as<float>();
  rows.q = rows.x + max_rows * int64_t{c.n_embd};
  rows.attn = rows.q + c.block_size * c.q_dim();
  rows.k = rows.attn + c.block_size * c.q_dim();
  rows.v = rows.k + max_rows * c.n_layer * c.kv_dim();
  token_memory = backend.alloc(static_cast<size_t>(c.block_size) * sizeof(int32_t));
  tokens = token_memory.as<int32_t>();
}

std::unique_ptr<DFlashDrafter> DFlashDrafter::load(std::shared_ptr<const Gguf> gguf, const DrafterConfig& config,
                                                   const MiniMaxM2& target, Backend& backend,
                                                   const Progress& progress) {
  WeightLoader weights(std::move(gguf), backend, "drafter", progress);
  auto d = make(config, target, weights, backend);
  weights.finish();
  return d;
}

std::unique_ptr<DFlashDrafter> DFlashDrafter::make(const DrafterConfig& config, const MiniMaxM2& target,
                                                   WeightSource& w, Backend& backend) {
  auto d = std::make_unique<DFlashDrafter>();
  const DrafterConfig& c = d->config_ = config;
  d->target_ = &target;
  d->fc_ = w.matrix("fc.weight", static_cast<int64_t>(c.target_layers.size()) * target.config().n_embd, c.n_embd);
  d->hidden_norm_ = w.vector("enc.output_norm.weight", c.n_embd);
  for (int i = 0; i < c.n_layer; ++i) {
    const std::string p = cat("blk.", i, ".");
    Layer layer;
    layer.load(w, p, c, QkNorm::per_head);
    layer.ffn_norm = w.vector(p + "ffn_norm.weight", c.n_embd);
    layer.gate = w.matrix(p + "ffn_gate.weight", c.n_embd, c.n_ff);
    layer.up = w.matrix(p + "ffn_up.weight", c.n_embd, c.n_ff);
    layer.down = w.matrix(p + "ffn_down.weight", c.n_ff, c.n_embd);
    d->layers_.push_back(std::move(layer));
  }
  d->output_norm_ = w.vector("output_norm.weight", c.n_embd);
  d->inv_freq_ = upload_f32(backend, c.rope.inv_freq);
  return d;
}

size_t DFlashDrafter::weight_bytes() const {
  size_t bytes = fc_.bytes() + hidden_norm_.bytes() + output_norm_.bytes();
  for (const Layer& l : layers_) {
    bytes += l.bytes() + l.ffn_norm.bytes() + l.gate.bytes() + l.up.bytes() + l.down.bytes();
  }
  return bytes;
}

void DFlashDrafter::ingest(Backend& backend, Scratch& s, Step step, const float* taps, const KvCache& kv) const {
  const MatmulOut fused{&fc_, s.rows.x};
  backend.norm_matmul(taps, nullptr, 0.0f, step.rows, &fused, 1);
  // The layers' own input norms apply to block rows only; context rows share the one hidden_norm, so every layer's K
  // and V come from one product.
  const int64_t size = step.rows * config_.kv_dim();
  std::vector<MatmulOut> outs;
  for (int i = 0; i < config_.n_layer; ++i) {
    const Layer& l = layers_[static_cast<size_t>(i)];
    outs.push_back({&l.k, s.rows.k + i * size});
    outs.push_back({&l.v, s.rows.v + i * size});
  }
  backend.norm_matmul(s.rows.x, f32(hidden_norm_), config_.eps, step.rows, outs.data(), static_cast<int>(outs.size()));
  for (int i = 0; i < config_.n_layer; ++i) {
    const Layer& l = layers_[static_cast<size_t>(i)];
    backend.qkv_post(qkv_post(l), step, nullptr, s.rows.k + i * size, s.rows.v + i * size, kv.layer(i));
  }
}

void DFlashDrafter::draft(Backend& backend, Scratch& s, int32_t anchor, int pos, int n, int rows, const KvCache& kv,
                          float* logits, uint64_t step_key) const {
  const DrafterConfig& c = config_;
  std::vector<int32_t> block(static_cast<size_t>(rows), c.mask_token_id);
  block[0] = anchor;
  backend.upload(s.tokens, block.data(), block.size() * sizeof(int32_t));
  const Step step{rows, pos};
  if (backend.begin_step(step_key, step)) return;
  backend.embed(target_->embedding(), s.tokens, rows, s.rows.x);
  for (int i = 0; i < c.n_layer; ++i) {
    const Layer& l = layers_[static_cast<size_t>(i)];
    Attention how;
    how.causal = c.causal[static_cast<size_t>(i)];
    how.sliding_window = c.sliding_window[static_cast<size_t>(i)];
    l.forward(backend, c, qkv_post(l), how, step, s.rows, kv.layer(i));
    Ffn ffn;
    ffn.eps = c.eps;
    ffn.norm = f32(l.ffn_norm);
    ffn.gate = &l.gate;
    ffn.up = &l.up;
    ffn.down = &l.down;
    backend.ffn(ffn, rows, s.rows.x);
  }
  const MatmulOut out{&head(), logits};
  backend.norm_matmul(s.rows.x + c.n_embd, f32(output_norm_), c.eps, n, &out, 1);
  backend.end_step();
}

}  // namespace dflash
