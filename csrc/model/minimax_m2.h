#pragma once
// MiniMax-M2, the target: GQA with RMSNorm over the whole q and k, partial NEOX RoPE, and in every layer a
// mixture of experts with a sigmoid router (transformers modeling_minimax_m2). Picks ops; holds no kernels.

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "model/attention_layer.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/weights.h"

namespace dflash {

// Where the residual stream entering the tapped layers goes: dst[row, tap, n_embd].
struct TapSink {
  const std::vector<int>* layers = nullptr;  // layer input indices; n_layer = before the final norm
  float* dst = nullptr;                      // [rows, n_taps * n_embd], backend memory
};

class MiniMaxM2 {
 public:
  struct Layer : AttentionLayer {
    Weight ffn_norm;        // [n_embd]
    Weight router;          // [n_expert, n_embd]
    Weight router_bias;     // [n_expert]
    Weight gate, up, down;  // [n_expert, n_ff, n_embd], the same, [n_expert, n_embd, n_ff]

    // Read for every row: all but the experts.
    size_t dense_bytes() const { return bytes() + ffn_norm.bytes() + router.bytes() + router_bias.bytes(); }
  };

  // Activations of up to max_rows rows, allocated once.
  struct Scratch {
    Scratch(Backend& backend, const TargetConfig& c, int max_rows);
    static size_t bytes_for(const TargetConfig& c, int max_rows);
    int max_rows;
    Buffer memory;
    AttentionLayer::Rows rows;  // of max_rows; rows.x after forward: the output of the last layer
  };

  static std::unique_ptr<MiniMaxM2> load(std::shared_ptr<const Gguf> gguf, Backend& backend, const Progress& progress);
  static std::unique_ptr<MiniMaxM2> make(const TargetConfig& config, WeightSource& weights, Backend& backend);

  const TargetConfig& config() const { return config_; }
  const Weight& embedding() const { return embedding_; }
  const Weight& head() const { return head_; }
  size_t weight_bytes() const;
  size_t bytes_per_token() const;         // read for one row: attention, top-k experts, router, head
  size_t expert_bytes_per_token() const;  // the experts' share of it

  // Runs all layers on tokens [rows] at step.pos0; fills kv and taps (when not null). The result stays in s.rows.x.
  void forward(Backend& backend, Scratch& s, Step step, const int32_t* tokens, const KvCache& kv,
               const TapSink* taps) const;
  // logits[r] = head * rms_norm(s.rows.x[first + r]).  logits [rows, n_vocab]
  void logits(Backend& backend, const Scratch& s, int first, int rows, float* logits) const;

 private:
  TargetConfig config_;
  Weight embedding_, head_, output_norm_, inv_freq_;
  std::vector<Layer> layers_;
};

}  // namespace dflash
