#include "model/dflash_drafter.h"

#include <cmath>

#include "core/error.h"

namespace dflash {

size_t DFlashDrafter::Scratch::bytes_for(const DrafterConfig& c, int rows) {
  const size_t per_row = static_cast<size_t>(c.n_embd + 2 * c.n_layer * c.n_head_kv * c.head_dim);
  const size_t block = 2 * static_cast<size_t>(c.block_size) * static_cast<size_t>(c.n_head * c.head_dim);
  return (static_cast<size_t>(rows) * per_row + block) * sizeof(float);
}

DFlashDrafter::Scratch::Scratch(Backend& backend, const DrafterConfig& c, int rows)
    : max_rows(rows > c.block_size ? rows : c.block_size) {
  const size_t n = static_cast<size_t>(max_rows), block = static_cast<size_t>(c.block_size);
  const size_t q_size = block * static_cast<size_t>(c.n_head * c.head_dim);
  const size_t kv_size = n * static_cast<size_t>(c.n_layer * c.n_head_kv * c.head_dim);
  memory = backend.alloc(bytes_for(c, max_rows));
  x = memory.as<float>();
  q = x + n * static_cast<size_t>(c.n_embd);
  attn = q + q_size;
  k = attn + q_size;
  v = k + kv_size;
  token_memory = backend.alloc(block * sizeof(int32_t));
  tokens = token_memory.as<int32_t>();
}

std::unique_ptr<DFlashDrafter> DFlashDrafter::load(std::shared_ptr<const Gguf> gguf, const DrafterConfig& config,
                                                   const MiniMaxM2& target, Backend& backend,
                                                   const Progress& progress) {
  auto d = std::make_unique<DFlashDrafter>();
  const DrafterConfig& c = d->config_ = config;
  d->target_ = &target;
  WeightLoader w(std::move(gguf), backend, "drafter", progress);
  const int64_t q_dim = c.n_head * c.head_dim, kv_dim = c.n_head_kv * c.head_dim;
  const int64_t n_taps = static_cast<int64_t>(c.target_layers.size());
  d->fc_ = w.matrix("fc.weight", n_taps * target.config().n_embd, c.n_embd);
  d->hidden_norm_ = w.vector("enc.output_norm.weight", c.n_embd);
  for (int i = 0; i < c.n_layer; ++i) {
    const std::string p = cat("blk.", i, ".");
    Layer layer;
    layer.attn_norm = w.vector(p + "attn_norm.weight", c.n_embd);
    layer.q = w.matrix(p + "attn_q.weight", c.n_embd, q_dim);
    layer.k = w.matrix(p + "attn_k.weight", c.n_embd, kv_dim);
    layer.v = w.matrix(p + "attn_v.weight", c.n_embd, kv_dim);
    layer.q_norm = w.vector(p + "attn_q_norm.weight", c.head_dim);
    layer.k_norm = w.vector(p + "attn_k_norm.weight", c.head_dim);
    layer.attn_output = w.matrix(p + "attn_output.weight", q_dim, c.n_embd);
    layer.ffn_norm = w.vector(p + "ffn_norm.weight", c.n_embd);
    layer.gate = w.matrix(p + "ffn_gate.weight", c.n_embd, c.n_ff);
    layer.up = w.matrix(p + "ffn_up.weight", c.n_embd, c.n_ff);
    layer.down = w.matrix(p + "ffn_down.weight", c.n_ff, c.n_embd);
    d->layers_.push_back(std::move(layer));
  }
  d->output_norm_ = w.vector("output_norm.weight", c.n_embd);
  w.finish();
  d->inv_freq_ = upload_f32(backend, c.rope.inv_freq);
  return d;
}

std::unique_ptr<DFlashDrafter> DFlashDrafter::random(const DrafterConfig& config, const MiniMaxM2& target,
                                                     DType matrices, Backend& backend, uint64_t seed) {
  auto d = std::make_unique<DFlashDrafter>();
  const DrafterConfig& c = d->config_ = config;
  d->target_ = &target;
  auto matrix = [&](int64_t n_in, int64_t n_out) { return backend.random_weight(matrices, n_in, n_out, 1, ++seed); };
  auto ones = [&](int n) { return upload_f32(backend, std::vector<float>(static_cast<size_t>(n), 1.0f)); };
  const int64_t q_dim = c.n_head * c.head_dim, kv_dim = c.n_head_kv * c.head_dim;
  d->fc_ = matrix(static_cast<int64_t>(c.target_layers.size()) * target.config().n_embd, c.n_embd);
  d->hidden_norm_ = ones(c.n_embd);
  for (int i = 0; i < c.n_layer; ++i) {
    Layer layer;
    layer.attn_norm = ones(c.n_embd);
    layer.q = matrix(c.n_embd, q_dim);
    layer.k = matrix(c.n_embd, kv_dim);
    layer.v = matrix(c.n_embd, kv_dim);
    layer.q_norm = ones(c.head_dim);
    layer.k_norm = ones(c.head_dim);
    layer.attn_output = matrix(q_dim, c.n_embd);
    layer.ffn_norm = ones(c.n_embd);
    layer.gate = matrix(c.n_embd, c.n_ff);
    layer.up = matrix(c.n_embd, c.n_ff);
    layer.down = matrix(c.n_ff, c.n_embd);
    d->layers_.push_back(std::move(layer));
  }
  d->output_norm_ = ones(c.n_embd);
  d->inv_freq_ = upload_f32(backend, c.rope.inv_freq);
  return d;
}

size_t DFlashDrafter::weight_bytes() const {
  size_t bytes = fc_.bytes() + hidden_norm_.bytes() + output_norm_.bytes();
  for (const Layer& l : layers_) {
    for (const Weight* w :
         {&l.attn_norm, &l.q, &l.k, &l.v, &l.q_norm, &l.k_norm, &l.attn_output, &l.ffn_norm, &l.gate, &l.up, &l.down}) {
      bytes += w->bytes();
    }
  }
  return bytes;
}

QkvPost DFlashDrafter::qkv_post(const Layer& l) const {
  QkvPost post;
  post.n_head = config_.n_head;
  post.n_head_kv = config_.n_head_kv;
  post.head_dim = config_.head_dim;
  post.n_rot = config_.rope.n_rot;
  post.norm = QkNorm::per_head;
  post.q_norm = f32(l.q_norm);
  post.k_norm = f32(l.k_norm);
  post.inv_freq = f32(inv_freq_);
  post.rope_scale = config_.rope.scale;
  post.eps = config_.eps;
  return post;
}

void DFlashDrafter::ingest(Backend& backend, Scratch& s, Step step, const float* taps, const KvCache& kv) const {
  const MatmulOut fused{&fc_, s.x};
  backend.norm_matmul(taps, nullptr, 0.0f, step.rows, &fused, 1);
  // The layers' own input norms apply to block rows only; context rows share the one hidden_norm, so every layer's K
  // and V come from one product.
  const int64_t size = int64_t{step.rows} * config_.n_head_kv * config_.head_dim;
  std::vector<MatmulOut> outs;
  for (int i = 0; i < config_.n_layer; ++i) {
    const Layer& l = layers_[static_cast<size_t>(i)];
    outs.push_back({&l.k, s.k + i * size});
    outs.push_back({&l.v, s.v + i * size});
  }
  backend.norm_matmul(s.x, f32(hidden_norm_), config_.eps, step.rows, outs.data(), static_cast<int>(outs.size()));
  for (int i = 0; i < config_.n_layer; ++i) {
    const Layer& l = layers_[static_cast<size_t>(i)];
    backend.qkv_post(qkv_post(l), step, nullptr, s.k + i * size, s.v + i * size, kv.layer(i));
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
  backend.embed(target_->embedding(), s.tokens, rows, s.x);
  for (int i = 0; i < c.n_layer; ++i) {
    const Layer& l = layers_[static_cast<size_t>(i)];
    const MatmulOut qkv[] = {{&l.q, s.q}, {&l.k, s.k}, {&l.v, s.v}};
    backend.norm_matmul(s.x, f32(l.attn_norm), c.eps, rows, qkv, 3);
    backend.qkv_post(qkv_post(l), step, s.q, s.k, s.v, kv.layer(i));
    Attention attention;
    attention.n_head = c.n_head;
    attention.n_head_kv = c.n_head_kv;
    attention.head_dim = c.head_dim;
    attention.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    attention.causal = c.causal[static_cast<size_t>(i)];
    attention.sliding_window = c.sliding_window[static_cast<size_t>(i)];
    backend.attention(attention, step, s.q, kv.layer(i), s.attn);
    backend.matmul_add(l.attn_output, s.attn, rows, s.x);
    Ffn ffn;
    ffn.eps = c.eps;
    ffn.norm = f32(l.ffn_norm);
    ffn.gate = &l.gate;
    ffn.up = &l.up;
    ffn.down = &l.down;
    backend.ffn(ffn, rows, s.x);
  }
  const MatmulOut out{&head(), logits};
  backend.norm_matmul(s.x + c.n_embd, f32(output_norm_), c.eps, n, &out, 1);
  backend.end_step();
}

}  // namespace dflash
