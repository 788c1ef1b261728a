#pragma once
// DFlash v1 block drafter (z-lab dflash; arXiv 2602.06036). Two functions: ingest() turns the target's taps of
// committed tokens into cached K/V, draft() runs [anchor, mask x n] against that context and predicts every slot at
// its own position. Embedding and head are the target's, or a smaller copy of that head (draft_head.h).

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/minimax_m2.h"

namespace dflash {

class DFlashDrafter {
 public:
  struct Layer : AttentionLayer {
    Weight ffn_norm;        // [n_embd]
    Weight gate, up, down;  // [n_ff, n_embd], the same, [n_embd, n_ff]
  };

  // Activations of up to max_rows context rows or one block.
  struct Scratch {
    Scratch(Backend& backend, const DrafterConfig& c, int max_rows);
    static size_t bytes_for(const DrafterConfig& c, int max_rows);  // max_rows of block_size or more
    int max_rows;
    Buffer memory, token_memory;
    AttentionLayer::Rows rows;  // x of max_rows, q and attn of block_size; k and v [n_layer, max_rows, n_head_kv *
                                // head_dim], of which a block uses the first
    int32_t* tokens;            // [block_size]
  };

  // config fits the target (check_pair). target must outlive the drafter.
  static std::unique_ptr<DFlashDrafter> load(std::shared_ptr<const Gguf> gguf, const DrafterConfig& config,
                                             const MiniMaxM2& target, Backend& backend, const Progress& progress);
  static std::unique_ptr<DFlashDrafter> make(const DrafterConfig& config, const MiniMaxM2& target,
                                             WeightSource& weights, Backend& backend);

  const DrafterConfig& config() const { return config_; }
  size_t weight_bytes() const;                                                                    // without the head
  const Weight& head() const { return own_head_.data != nullptr ? own_head_ : target_->head(); }  // [n_vocab, n_embd]
  void set_head(Weight head) { own_head_ = std::move(head); }

  // Projects taps [step.rows, n_taps * n_embd] of committed tokens to K/V at their own positions.
  void ingest(Backend& backend, Scratch& s, Step step, const float* taps, const KvCache& kv) const;

  // Slots 1..n for the anchor at position pos, given context at positions < pos. rows (n + 1 .. block_size) is how
  // much of the block is run. The block's own K/V lie beyond the context and are overwritten later.
  // logits [n, n_vocab]. step_key names (session, n, rows) for backends that record steps.
  void draft(Backend& backend, Scratch& s, int32_t anchor, int pos, int n, int rows, const KvCache& kv, float* logits,
             uint64_t step_key) const;

 private:
  QkvPost qkv_post(const Layer& l) const { return l.qkv_post(config_, QkNorm::per_head, f32(inv_freq_)); }

  DrafterConfig config_;
  const MiniMaxM2* target_ = nullptr;
  Weight fc_;           // [n_embd, n_taps * n_embd]
  Weight hidden_norm_;  // [n_embd]
  Weight output_norm_;  // [n_embd]
  Weight own_head_;     // empty: the target's
  Weight inv_freq_;
  std::vector<Layer> layers_;
};

}  // namespace dflash
