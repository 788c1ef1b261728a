#pragma once
// How many tokens to draft and to verify, so that expected committed tokens per second are highest. A pure object:
// observations in, depth out, no clock inside, so that it can be replayed and simulated. (The question is ollama's
// speculate_depth.go and Cascade's, arXiv 2506.20675; the answer here works from the drafter's own confidences.)
//
// Expected acceptance: the drafter's top-1 probability of each slot, calibrated online against what was accepted.
// Cost: measured seconds per verify width and per draft count. With both, the last drafted rounds are replayed under
// today's costs for every draft count n, and the best n (0: plain decoding) is drafted next. Once the confidences of
// this round are known, verify_depth() cuts again.

#include <array>
#include <cstddef>
#include <deque>
#include <utility>
#include <vector>

namespace dflash {

enum class DraftSource { none, dflash, lookup };

struct DraftPlan {
  DraftSource source = DraftSource::none;
  int n = 0;  // slots to ask the drafter for, or lookup tokens to verify
};

struct RoundOutcome {
  DraftSource source = DraftSource::none;
  int drafted = 0;   // slots the drafter computed (0 for lookup)
  int verified = 0;  // drafts that travelled with the anchor: the pass had verified + 1 rows
  int accepted = 0;
  bool cut = false;  // the text ended inside the block: what follows is unknown, not rejected
  int lookup_match = 0;
  std::vector<float> confidence;  // [drafted] the drafter's top-1 probability of each slot
  double draft_seconds = 0.0;     // drafter and its head
  double verify_seconds = 0.0;    // target pass and sampling
};

// Before anything is measured: costs relative to a target pass of one row.
struct CostPrior {
  std::vector<double> verify;  // [max_depth + 1] width 1 .. max_depth + 1
  double draft = 0.2;          // one drafter run
};

// Seconds by index, from noisy measurements: each index keeps its last few and counts the faster half of them. A line
// through all, over the prior's shape, and the neighbours speak for indices hardly measured.
class CostTable {
 public:
  // has_yardstick: index 0 is measured on demand and never moved by the others.
  CostTable(std::vector<double> prior, bool has_yardstick);
  void observe(size_t index, double seconds);
  double at(size_t index) const { return any() ? cost_[index] : prior_[index]; }
  // The same, but an index hardly measured is given the benefit of the doubt, so that it is tried where it may pay.
  double hopeful(size_t index) const;
  size_t count(size_t index) const { return recent_[index].size(); }
  bool any() const { return !cost_.empty(); }
  // Whether the others moved together, so that the yardstick should be measured again; asking clears it.
  bool take_yardstick_due() {
    const bool due = yardstick_due_;
    yardstick_due_ = false;
    return due;
  }

 private:
  void follow(size_t index, double surprise);
  void confirm_shift(double yardstick);
  void rescale(size_t index, double factor);
  void summarize(size_t index);
  double trust(size_t index) const;  // measurements, those of long ago counted less
  void fit();
  const bool has_yardstick_;
  bool yardstick_due_ = false;     // should be measured again
  bool yardstick_afresh_ = false;  // the next measurement of it replaces those before
  std::vector<double> prior_;
  std::vector<std::deque<double>> recent_;
  std::vector<double> own_;  // from recent_ alone
  std::vector<double> trust_;
  std::vector<double> cost_;         // empty before the first measurement
  std::vector<double> unconfirmed_;  // factor by which an index was moved with the others and not measured since
  using Surprise = std::pair<size_t, double>;
  std::deque<Surprise> surprises_;  // index, found over expected: the last few measurements
};

// P(slot's draft stands | those before it stood, the drafter gave it probability c).
class Calibration {
 public:
  static constexpr int kBins = 10;
  explicit Calibration(int max_depth);
  double acceptance(int slot, float confidence) const;
  std::vector<double> averages(int slots) const;  // of slots 1 .. slots, whatever the confidence
  void observe(int slot, float confidence, bool stood);

 private:
  struct Count {
    double stood = 0.0, total = 0.0;
    void add(bool yes, double memory);
  };
  static int bin(float confidence);
  std::array<Count, kBins> all_{};
  std::vector<std::array<Count, kBins>> by_slot_;
  std::vector<Count> slot_;
};

class DepthPolicy {
 public:
  DepthPolicy(int max_depth, const CostPrior& prior);

  // Before drafting. max_depth: the most drafts this round can use; has_drafter: whether DFlash may be asked;
  // lookup_match / lookup_tokens: prompt lookup's candidate (0: none).
  DraftPlan plan(int max_depth, bool has_drafter, int lookup_match, int lookup_tokens);

  // After drafting: how many of the drafted slots to verify. None, where that is not worth its time: then the drafts
  // are only compared with what the target goes on to say.
  int verify_depth(const std::vector<float>& confidence) const;

  void observe(const RoundOutcome& outcome);
  // A drafted slot that was not verified: all before it stood, and the text now says whether it would have too.
  void observe_unverified(int slot, float confidence, bool stood);

  int max_depth() const { return max_depth_; }
  double verify_cost(int width) const { return verify_.at(static_cast<size_t>(width) - 1); }  // seconds
  double draft_cost(int n) const { return draft_.at(static_cast<size_t>(n) - 1); }            // seconds
  double best_rate() const { return rate_; }                                                  // tokens a second
  bool parked() const { return parked_; }
  // Parked, drafting far from paying, and the next probe some way off: until then the drafter need not be told of the
  // text. Before a probe it hears of the last tokens, and of all from a probe on that shows more.
  bool asleep() const;

 private:
  static constexpr size_t kReplay = 48;  // drafted rounds kept for replay
  static constexpr int kFirstDepth = 4;  // slots asked for before anything is known
  static constexpr int kLookupBuckets = 5;
  struct Choice {
    int n = 0;
    double rate = 0.0;
  };

  Choice best_draft(int max_depth, size_t rounds) const;
  Choice best_lookup(int match, int tokens) const;
  static int lookup_bucket(int match);
  double probe_loss() const;  // plain rounds that a probe costs
  int longest_wait() const;
  int first_wait() const;
  bool pays(int accepted) const;

  int max_depth_;
  CostTable verify_;  // index: width - 1
  CostTable draft_;   // index: slots - 1
  Calibration calibration_;
  std::deque<std::vector<float>> replay_;  // confidences of the last drafted rounds, newest first
  std::array<double, kLookupBuckets> lookup_acceptance_;
  double bias_ = 1.0;       // accepted over expected drafts, slowly: keeps a wrong calibration from lasting
  int plain_streak_ = 0;    // plain rounds in a row
  int unmeasured_ = 0;      // rounds since a plain one was measured
  int yardstick_left_ = 0;  // plain rounds still owed to the yardstick
  double rate_ = 0.0;       // tokens a second of the best choice, the price of time in verify_depth()
  int drafted_rounds_ = 0;
  int copies_left_ = 0;    // lookup candidates not taken, in a row
  int since_plain_ = 0;    // rounds since a target pass of one row
  bool parked_ = false;    // plain decoding, with probes
  bool far_ = false;       // by the last probe, drafting is far from paying
  int active_rounds_ = 0;  // drafting rounds since it was last parked
  int wait_ = 0;           // rounds until the next probe
  int interval_ = 0;       // doubles while probes show no gain
  int probe_stood_ = -1;   // of the last probe's slots; -1: no probe is being followed
};

}  // namespace dflash
