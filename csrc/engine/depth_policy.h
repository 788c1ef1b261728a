#pragma once
// How many tokens to draft and to verify, so that expected committed tokens per second are highest. A pure object:
// observations in, depth out, no clock inside, so that it can be replayed and simulated. (The question is ollama's
// speculate_depth.go and Cascade's, arXiv 2506.20675; the answer here works from the drafter's own confidences.)
//
// Expected acceptance: the drafter's top-1 probability of each slot, calibrated online (calibration.h). Cost: measured
// per verify width and per draft count (costs.h). With both, the last drafted rounds are replayed under today's costs
// for every draft count n: what a drafted round brings (tokens a second) and how sure that is. Drafting goes on while
// it promises more than plain decoding by a small margin. Otherwise the policy is parked: it decodes plainly and looks
// at a draft now and then. What looks may cost is a share of what drafting could still gain, the mean of the positive
// part of the gain's normal distribution (the expected improvement of Bayesian optimisation), so that hopeless drafters
// are seldom looked at and doubtful ones often. Once the confidences of a round are known, verify_depth() cuts it
// again.

#include <algorithm>
#include <array>
#include <cstddef>
#include <deque>
#include <vector>

#include "engine/calibration.h"
#include "engine/costs.h"

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
  // Since the last outcome, tokens that the drafter took in at one go because it had not been asked for so long, and
  // how long that took. (What it takes in of the round just before belongs to draft_seconds.)
  int ingested = 0;
  double ingest_seconds = 0.0;
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
  double verify_cost(int width) const { return costs_.at(costs_.pass(width)); }  // seconds
  double draft_cost(int n) const { return costs_.at(costs_.draft(n)); }          // seconds
  // Seconds a token, of a backlog.
  double ingest_cost() const { return measured(costs_.ingest()) ? costs_.at(costs_.ingest()) : 0.0; }
  double best_rate() const { return rate_; }  // tokens a second
  bool parked() const { return parked_; }
  // Parked, the next look some way off, and taking in all of the text dearer than looks may be: until then the drafter
  // need not be told of the text. Before a look it hears of the last tokens, and of all from a look on that shows more.
  bool asleep() const;

 private:
  static constexpr size_t kReplay = 48;  // drafted rounds kept for replay
  static constexpr int kLookupBuckets = 5;
  struct Choice {
    int n = 0;
    double rate = 0.0;     // tokens a second
    double tokens = 0.0;   // of a round
    double seconds = 0.0;  // of a round
    double sigma = 0.0;    // standard error of the tokens
    int depth = 0;         // verified in most rounds
  };
  struct Drafted {
    long round;                    // when
    std::vector<double> log_odds;  // [drafted] of the confidences
  };

  Choice best_draft(int max_depth);
  void measure(Choice& drafted, int max_depth) const;
  Choice best_lookup(int match, int tokens) const;
  static int lookup_bucket(int match);
  double relative_error(const Choice& draft) const;
  void estimate(int max_depth);
  void remember(const std::vector<float>& confidence);
  void charge(const RoundOutcome& o);
  void heed_news();
  // What the plain round after a look takes longer, its caches cold.
  double settling_cost() const {
    return measured(costs_.settling()) ? std::max(0.0, costs_.at(costs_.settling()) - verify_cost(1)) : 0.0;
  }
  bool measured(size_t index) const { return costs_.count(index) > 0; }

  int max_depth_;
  Costs costs_;
  double draft_prior_;  // of a drafter run, in plain rounds
  Calibration calibration_;
  std::deque<Drafted> replay_;  // the last drafted rounds, newest first
  std::vector<double> weight_;  // [replay_] scratch of best_draft() and measure(), as is
  std::vector<double> reach_;   // [replay_, max_depth] the chance that a slot and all before it stand
  std::array<double, kLookupBuckets> lookup_acceptance_;
  Choice estimate_;          // of drafting
  double gain_ = -1.0;       // its speed over plain decoding, less one
  double error_ = 0.0;       // standard error of that
  int estimate_age_ = 0;     // plans since
  int estimated_depth_ = 0;  // for at most so many drafts
  double look_share_ = 0.0;  // of the time, that looks may cost by that estimate
  double debt_ = 0.0;        // plain rounds that looks have cost beyond that
  double trusted_;           // rounds on which drafting is believed without a look at plain decoding
  long round_ = 0;
  int plain_streak_ = 0;    // plain rounds in a row
  int unmeasured_ = 0;      // rounds since a plain one was measured
  int yardstick_left_ = 0;  // plain rounds still owed to the yardstick
  double rate_ = 0.0;       // tokens a second of the best choice, the price of time in verify_depth()
  int drafted_rounds_ = 0;
  int copies_left_ = 0;  // lookup candidates not taken, in a row
  int since_plain_ = 0;  // rounds since a target pass of one row
  bool parked_ = true;   // plain decoding, with looks
};

}  // namespace dflash
