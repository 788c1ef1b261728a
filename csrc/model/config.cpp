#include "model/config.h"

#include <cmath>

#include "core/error.h"

namespace dflash {

namespace {

constexpr int64_t kMaxDim = 1 << 24;

// Reads "<arch>.<key>".
class ArchKeys {
 public:
  ArchKeys(const Gguf& gguf, std::string arch) : gguf_(gguf), prefix_(std::move(arch) + ".") {}

  std::string name(const char* key) const { return prefix_ + key; }
  int get(const char* key, int64_t min = 1, int64_t max = kMaxDim) const {
    return static_cast<int>(gguf_.get_int(name(key), min, max));
  }
  int get_or(const char* key, int fallback, int64_t min = 1, int64_t max = kMaxDim) const {
    return static_cast<int>(gguf_.get_int_or(name(key), fallback, min, max));
  }
  float positive(const char* key, double fallback) const {
    const double value = gguf_.get_float_or(name(key), fallback);
    if (!(value > 0.0) || !std::isfinite(value)) {
      fail(gguf_.path(), ": key '", name(key), "': a positive number expected, found ", value);
    }
    return static_cast<float>(value);
  }
  bool has(const char* key) const { return gguf_.has(name(key)); }

 private:
  const Gguf& gguf_;
  std::string prefix_;
};

void expect_arch(const Gguf& gguf, const std::string& arch, const char* role, const char* other) {
  const std::string found = gguf.get_string("general.architecture");
  if (found != arch) {
    fail(gguf.path(), ": general.architecture: '", arch, "' expected for the ", role, ", found '", found, "'",
         found == other ? "; target and drafter may be exchanged" : "");
  }
}

// YaRN (arXiv 2309.00071) as Hugging Face computes it: a blend of interpolated and original frequencies.
void apply_yarn(RopeConfig& rope, double factor, double n_ctx_orig, double beta_fast, double beta_slow,
                double attn_factor) {
  const double n_rot = rope.n_rot, two_pi = 6.283185307179586;
  auto dim_of = [&](double rotations) {
    return n_rot * std::log(n_ctx_orig / (rotations * two_pi)) / (2.0 * std::log(rope.theta));
  };
  const double low = std::max(std::floor(dim_of(beta_fast)), 0.0);
  const double high = std::min(std::ceil(dim_of(beta_slow)), n_rot - 1.0);
  for (size_t i = 0; i < rope.inv_freq.size(); ++i) {
    const double ramp = (static_cast<double>(i) - low) / std::max(high - low, 0.001);
    const double interpolate = std::min(1.0, std::max(0.0, ramp));
    const double f = rope.inv_freq[i];
    rope.inv_freq[i] = static_cast<float>(f / factor * interpolate + f * (1.0 - interpolate));
  }
  rope.scale =
      static_cast<float>(attn_factor > 0.0 ? attn_factor : (factor > 1.0 ? 0.1 * std::log(factor) + 1.0 : 1.0));
}

RopeConfig read_rope(const Gguf& gguf, const ArchKeys& keys, int head_dim) {
  const int n_rot = keys.get_or("rope.dimension_count", head_dim, 2, head_dim);
  if (n_rot % 2 != 0) {
    fail(gguf.path(), ": key '", keys.name("rope.dimension_count"), "': an even number expected, found ", n_rot);
  }
  RopeConfig rope = make_rope(n_rot, keys.positive("rope.freq_base", 10000.0));
  if (!keys.has("rope.scaling.type")) return rope;
  const std::string type = gguf.get_string(keys.name("rope.scaling.type"));
  if (type == "none") return rope;
  const double factor = keys.positive("rope.scaling.factor", 1.0);
  if (type == "linear") {
    for (float& f : rope.inv_freq) f = static_cast<float>(f / factor);
  } else if (type == "yarn") {
    const double orig = keys.positive("rope.scaling.original_context_length", 0.0);
    const double attn = gguf.get_float_or(keys.name("rope.scaling.attn_factor"), 0.0);
    const double fast = keys.positive("rope.scaling.yarn_beta_fast", 32.0);
    const double slow = keys.positive("rope.scaling.yarn_beta_slow", 1.0);
    apply_yarn(rope, factor, orig, fast, slow, attn);
  } else {
    fail(gguf.path(), ": key '", keys.name("rope.scaling.type"), "': 'none', 'linear' or 'yarn' expected, found '",
         type, "'");
  }
  return rope;
}

// c but n_ff, which the architectures name differently.
void read_model_config(const Gguf& gguf, const ArchKeys& keys, ModelConfig& c) {
  c.path = gguf.path();
  c.name = gguf.has("general.name") ? gguf.get_string("general.name") : "";
  c.n_layer = keys.get("block_count", 1, 4096);
  c.n_embd = keys.get("embedding_length");
  c.n_head = keys.get("attention.head_count", 1, 65536);
  c.n_head_kv = keys.get("attention.head_count_kv", 1, 65536);
  c.head_dim = keys.get_or("attention.key_length", c.n_embd / c.n_head, 1, 65536);
  check_heads(c);
  const int v_dim = keys.get_or("attention.value_length", c.head_dim);
  if (v_dim != c.head_dim) fail(c.path, ": attention.value_length ", v_dim, " differs from key_length ", c.head_dim);
  c.eps = keys.positive("attention.layer_norm_rms_epsilon", 1e-6);
  c.rope = read_rope(gguf, keys, c.head_dim);
}

}  // namespace

void check_heads(const ModelConfig& c) {
  if (c.n_head % c.n_head_kv != 0) {
    fail(c.path, ": attention.head_count ", c.n_head, " is not a multiple of attention.head_count_kv ", c.n_head_kv);
  }
  if (c.head_dim % 32 != 0 || c.head_dim > 512) {
    fail(c.path, ": attention.key_length: a multiple of 32 up to 512 expected, found ", c.head_dim);
  }
}

RopeConfig make_rope(int n_rot, double theta) {
  RopeConfig rope;
  rope.n_rot = n_rot;
  rope.theta = theta;
  for (int i = 0; i < n_rot / 2; ++i) {
    rope.inv_freq.push_back(static_cast<float>(std::pow(theta, -2.0 * i / n_rot)));
  }
  return rope;
}

TargetConfig read_target_config(const Gguf& gguf) {
  expect_arch(gguf, "minimax-m2", "target", "dflash");
  const ArchKeys keys(gguf, "minimax-m2");
  TargetConfig c;
  read_model_config(gguf, keys, c);
  c.n_expert = keys.get("expert_count", 1, 65536);
  c.n_expert_used = keys.get("expert_used_count", 1, c.n_expert);
  c.n_ff =
      keys.has("expert_feed_forward_length") ? keys.get("expert_feed_forward_length") : keys.get("feed_forward_length");
  c.n_ctx_train = keys.get_or("context_length", 0, 0, int64_t{1} << 30);
  const int gating = keys.get_or("expert_gating_func", 2, 0, 100);
  if (gating != 2) fail(c.path, ": key 'minimax-m2.expert_gating_func': 2 (sigmoid) expected, found ", gating);
  const Gguf::Tensor* embd = gguf.find_tensor("token_embd.weight");
  if (embd == nullptr || embd->ne.size() != 2) {
    fail(c.path, ": tensor 'token_embd.weight' is missing or is not a matrix");
  }
  if (embd->ne[1] > kMaxDim) fail(c.path, ": tensor 'token_embd.weight': impossible vocabulary of ", embd->ne[1]);
  c.n_vocab = static_cast<int>(embd->ne[1]);
  return c;
}

DrafterConfig read_drafter_config(const Gguf& gguf) {
  expect_arch(gguf, "dflash", "drafter", "minimax-m2");
  const ArchKeys keys(gguf, "dflash");
  DrafterConfig c;
  read_model_config(gguf, keys, c);
  for (const char* key :
       {"conv_kernel_size", "selector_rank", "sample_from_anchor", "logit_scale", "final_logit_softcapping"}) {
    if (keys.has(key)) {
      fail(c.path, ": key '", keys.name(key), "' belongs to a DFlash2 or DSpark drafter; this engine runs DFlash v1");
    }
  }
  for (const char* name : {"d2t", "t2d", "token_embd.weight", "output.weight"}) {
    if (gguf.find_tensor(name) != nullptr) {
      fail(c.path, ": tensor '", name,
           "': drafters with their own vocabulary or head are not supported; "
           "DFlash v1 borrows both from the target");
    }
  }
  c.n_ff = keys.get("feed_forward_length");
  c.block_size = keys.get("block_size", 2, 256);
  c.mask_token_id = static_cast<int32_t>(gguf.get_int("tokenizer.ggml.mask_token_id", 0, kMaxDim));
  c.target_n_layer = keys.get_or("target.block_count", 0);
  c.target_n_vocab = keys.get_or("vocab_size", 0);
  for (const int64_t layer : gguf.get_ints("dflash.target_layers")) {
    if (layer < 0 || layer > 4096) fail(c.path, ": key 'dflash.target_layers': impossible layer ", layer);
    c.target_layers.push_back(static_cast<int>(layer));
  }
  if (c.target_layers.empty() || c.target_layers.size() > 64) {
    fail(c.path, ": key 'dflash.target_layers': 1 to 64 layers expected, found ", c.target_layers.size());
  }

  // A sliding-window layer is causal inside the block, a full one bidirectional, unless the file says otherwise.
  const int window = keys.get_or("attention.sliding_window", 0, 0, int64_t{1} << 30);
  std::vector<int64_t> pattern(static_cast<size_t>(c.n_layer), window > 0 ? 1 : 0);
  if (window > 0 && keys.has("attention.sliding_window_pattern")) {
    pattern = gguf.get_ints("dflash.attention.sliding_window_pattern");
    if (pattern.size() != static_cast<size_t>(c.n_layer)) {
      fail(c.path, ": key 'dflash.attention.sliding_window_pattern': ", c.n_layer, " values expected, found ",
           pattern.size());
    }
  }
  for (const int64_t sliding : pattern) {
    c.sliding_window.push_back(sliding != 0 ? window : 0);
    c.causal.push_back(gguf.get_bool_or("dflash.attention.causal", sliding != 0));
  }
  return c;
}

void check_pair(const TargetConfig& target, const DrafterConfig& drafter) {
  const std::string other = cat("; was this drafter trained for another target? (target: ", target.path, ")");
  if (drafter.n_embd != target.n_embd) {
    fail(drafter.path, ": embedding_length: the target's ", target.n_embd, " expected, found ", drafter.n_embd, other);
  }
  if (drafter.target_n_layer != 0 && drafter.target_n_layer != target.n_layer) {
    fail(drafter.path, ": target.block_count: the target's ", target.n_layer, " expected, found ",
         drafter.target_n_layer, other);
  }
  // Some files count the tokenizer's ids only, without the padding of the target's table.
  if (drafter.target_n_vocab > target.n_vocab) {
    fail(drafter.path, ": vocab_size: at most the target's ", target.n_vocab, " expected, found ",
         drafter.target_n_vocab, other);
  }
  if (drafter.mask_token_id >= target.n_vocab) {
    fail(drafter.path, ": mask_token_id: below the target's vocabulary of ", target.n_vocab, " expected, found ",
         drafter.mask_token_id, other);
  }
  for (const int layer : drafter.target_layers) {
    if (layer < 0 || layer > target.n_layer) {  // shifted ones too: no pass would write their taps
      fail(drafter.path, ": target_layers: 0 to ", target.n_layer, " (the target's last layer) expected, found ", layer,
           other);
    }
  }
}

}  // namespace dflash
