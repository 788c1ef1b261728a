#pragma once
// What a GGUF says about its model, read once and checked, then immutable.

#include <cstdint>
#include <string>
#include <vector>

#include "core/gguf.h"

namespace dflash {

struct RopeConfig {
  int n_rot = 0;
  double theta = 10000.0;
  std::vector<float> inv_freq;  // [n_rot / 2]
  float scale = 1.0f;           // factor on cos and sin (YaRN's attention factor)
};

// What both models have, under the same keys of their architecture.
struct ModelConfig {
  std::string path;
  std::string name;
  int n_layer = 0;
  int n_embd = 0;
  int n_head = 0;
  int n_head_kv = 0;
  int head_dim = 0;
  int n_ff = 0;  // of one expert in the target
  float eps = 1e-6f;
  RopeConfig rope;

  int64_t q_dim() const { return int64_t{n_head} * head_dim; }
  int64_t kv_dim() const { return int64_t{n_head_kv} * head_dim; }
};

// MiniMax-M2 (GGUF architecture "minimax-m2").
struct TargetConfig : ModelConfig {
  int n_expert = 0;
  int n_expert_used = 0;
  int n_vocab = 0;
  int n_ctx_train = 0;
};

// DFlash v1 block drafter (GGUF architecture "dflash").
struct DrafterConfig : ModelConfig {
  int block_size = 0;  // anchor + block_size - 1 mask slots
  int32_t mask_token_id = 0;
  int target_n_layer = 0, target_n_vocab = 0;  // of the target it was trained for; 0: the file does not say
  std::vector<int> target_layers;   // layer input indices (z-lab id + 1); n_layer of the target = before its final norm
  std::vector<bool> causal;         // per layer: rows of the block see only earlier rows
  std::vector<int> sliding_window;  // per layer; 0 = none
};

// Plain RoPE: inv_freq[i] = theta^(-2 i / n_rot).
RopeConfig make_rope(int n_rot, double theta);

// Throw Error naming the file, the key, what was expected and what was found.
TargetConfig read_target_config(const Gguf& gguf);
DrafterConfig read_drafter_config(const Gguf& gguf);

// Throws for numbers of heads, or sizes of a head, that the attention of the backends does not take.
void check_heads(const ModelConfig& config);

// Throws when the drafter was made for another target.
void check_pair(const TargetConfig& target, const DrafterConfig& drafter);

}  // namespace dflash
