#pragma once
// The full MiniMax-M2.7 shape, with as many layers and tokens as fit the machine at hand.

#include "model/config.h"

namespace dflash {

inline TargetConfig m27_config(int n_layer, int n_vocab) {
  TargetConfig c;
  c.path = "synthetic MiniMax-M2.7";
  c.n_layer = n_layer;
  c.n_embd = 3072;
  c.n_head = 48;
  c.n_head_kv = 8;
  c.head_dim = 128;
  c.n_expert = 256;
  c.n_expert_used = 8;
  c.n_ff = 1536;
  c.n_vocab = n_vocab;
  c.rope = make_rope(64, 5e6);
  return c;
}

}  // namespace dflash
