#pragma once
// One timeline: tokens, the target's KV, the drafter's KV, statistics. Plain decoding is the speculative loop with
// no drafts; there is one loop.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/accept.h"
#include "engine/depth_policy.h"
#include "engine/drafter_timeline.h"
#include "engine/engine.h"
#include "engine/lookup.h"
#include "engine/sampler.h"
#include "engine/session_options.h"
#include "engine/stats.h"

namespace dflash {

struct GenerateParams {
  SamplingParams sampling;
  int max_tokens = 256;
  int depth = -1;  // -1: the policy decides; 0..block_size-1: fixed, drafter only
  std::vector<int32_t> eos_ids;
  bool lookup = true;  // let prompt lookup propose (depth -1 only)
  // Benchmarks of synthetic models: the chance that drafts 1..i+1 all stand. Drafts then stand by (seeded) chance,
  // whatever the target says, and the drafter's confidences are replaced by these chances. Empty: off.
  std::vector<double> simulate_accept;
  // How much rounds differ, 0..1: each draft is an easy or a hard one, with that share of the room its slot's average
  // leaves to 0 or 1, and the drafter's confidence says which. 0: confidences tell nothing.
  double simulate_spread = 0.0;

  // Chance that draft i (from 0) stands given those before it; past the list, the last one holds on.
  double simulated_chance(size_t i) const;
};

struct StepResult {
  std::vector<int32_t> tokens;  // committed: drafts that stood, then the target's own
  int drafted = 0, accepted = 0;
  const char* source = "none";  // prefill | none | dflash | lookup
  const char* stop = nullptr;   // null | eos | length | context
};

class Session {
 public:
  Session(std::shared_ptr<Model> model, const SessionOptions& options);

  // Keeps the common prefix of what the caches hold and returns its length. Nothing is computed yet.
  int begin(const std::vector<int32_t>& tokens, const GenerateParams& params);
  // One chunk of the prompt; returns the prompt tokens now in the cache.
  int prefill();
  // One round. The first after prefill commits the first token.
  StepResult step();
  // Forgets everything from position pos on.
  void rewind(int pos);

  int pos() const { return pos_; }
  int n_ctx() const { return options_.n_ctx; }
  size_t kv_bytes() const;
  const std::vector<int32_t>& tokens() const { return tokens_; }
  const Stats& stats() const { return stats_; }
  Stats session_stats() const;  // all generations of this session
  const Model& model() const { return *model_; }
  const DepthPolicy& policy() const { return policy_; }

  // For study. Each replaces the timeline by tokens. rows_out [n, n_vocab] / [n, n_taps * n_embd] are host memory.
  std::vector<float> logits(const std::vector<int32_t>& tokens);
  std::vector<float> taps(const std::vector<int32_t>& tokens);
  std::vector<float> draft_logits(const std::vector<int32_t>& tokens, int32_t anchor, int n, int block_rows);

 private:
  struct Drafts {
    DraftSource source = DraftSource::none;
    std::vector<int32_t> tokens;
    int proposed = 0;                 // slots the drafter computed; tokens are the first of them
    std::vector<int32_t> unverified;  // those behind tokens, told to the policy as the text goes on
    int lookup_match = 0;
    std::vector<float> confidence;
    double seconds = 0.0;
  };

  void check_tokens(const std::vector<int32_t>& tokens) const;
  // What a generation asks of the drafter: nothing, drafts where they pay, or drafts from all of the text.
  enum class Drafting { none, adaptive, whole };
  void sync(const std::vector<int32_t>& tokens, size_t keep_at_most, Drafting drafting);
  // Runs prompt tokens at pos_ .. through the target; their taps go straight to the pending rows.
  void forward_prompt(const int32_t* tokens, int rows);
  // Runs [anchor, drafts] through the target and its head, as a step the backend may record and replay.
  void forward_verify(const int32_t* tokens, int rows);
  enum class StepKind : uint64_t { verify = 1, draft = 2, ingest = 3, plain = 4 };  // plain: verify without taps
  uint64_t step_key(StepKind kind, int rows) const;
  uint64_t draft_key(int n, int rows) const;
  float* pending_taps(int row) const;
  void commit(int rows);     // rows of the last pass stay in the caches
  void keep_taps(int rows);  // of a verify pass: to the pending rows
  void ingest_pending();     // taps of committed tokens -> drafter K/V
  void finish_queued();      // so that a stopwatch sees what it should
  void run_all(const std::vector<int32_t>& tokens);
  Drafts propose(int room);
  Drafts draft_dflash(int n, int room);
  std::vector<int32_t> own_tokens(const std::vector<int32_t>& drafts, bool all_rows);
  Accepted verify(const Drafts& drafts);
  void account(const Drafts& drafts, const Accepted& accepted, double verify_seconds);
  void follow_drafts();
  int32_t simulated_token(size_t position) const;
  double simulated_confidence(size_t position, size_t slot) const;
  int32_t simulated_draft(size_t position, size_t slot) const;
  int32_t target_token(int32_t own, int row) const;
  bool is_eos(int32_t token) const;
  const char* stop_reason() const;
  int n_taps() const;

  std::shared_ptr<Model> model_;
  const uint64_t id_;  // of this session on its model
  const bool whole_block_;
  SessionOptions options_;
  Backend& backend_;
  KvCache kv_;
  MiniMaxM2::Scratch scratch_;
  std::optional<KvCache> drafter_kv_;
  std::optional<DFlashDrafter::Scratch> drafter_scratch_;
  Buffer token_buffer_;   // int32 [n_batch]
  Buffer logits_buffer_;  // f32 [block_size, n_vocab]
  Buffer taps_buffer_;    // f32 [n_batch + kPendingTaps + block_size, n_taps * n_embd]: pending rows, then a chunk's
  Buffer step_taps_;      // f32 [block_size, n_taps * n_embd]: taps of a verify pass, at an address that never moves
  std::vector<float> host_logits_;  // rows that a hook looks at

  std::vector<int32_t> tokens_;  // the timeline; all but the anchor (the last, while generating) are in the cache
  int pos_ = 0;                  // tokens whose K/V the target's cache holds
  DrafterTimeline drafter_;      // what of it the drafter's cache holds; its pending() are rows of taps_buffer_
  int prompt_tokens_ = 0;
  bool drafting_ = false;  // this generation may ask the drafter
  bool taps_ = false;      // the pass under way hands taps to it
  bool active_ = false;    // between begin() and the end of the generation
  bool first_ = true;      // the next step commits the first token

  GenerateParams params_;
  Sampler sampler_{SamplingParams{}};
  LookupProposer lookup_;
  DepthPolicy policy_;
  // Drafts that were not verified: what the target says where they stood costs nothing to compare.
  struct Followed {
    std::vector<int32_t> tokens;  // of slots first_slot + 1 ...
    std::vector<float> confidence;
    size_t first_slot = 0, position = 0, next = 0;  // position of tokens[0]; the next of them to be told
  };
  Followed followed_;
  struct Backlog {
    int tokens = 0;
    double seconds = 0.0;
  };
  Backlog ingested_;       // what the drafter took in at one go since the policy was last told of a round
  Stats stats_, earlier_;  // of this generation; of those before it
};

}  // namespace dflash
