#include "engine/depth_policy.h"

#include <algorithm>
#include <cmath>

namespace dflash {

// ---- CostTable --------------------------------------------------------------------------------------------------

CostTable::CostTable(std::vector<double> prior)
    : prior_(std::move(prior)), recent_(prior_.size()), median_(prior_.size(), 0.0) {}

void CostTable::observe(size_t index, double seconds) {
  constexpr size_t kRecent = 5;
  constexpr double kClamp = 1.25, kFollow = 0.1;
  if (!(seconds > 0.0)) return;
  if (!any_) {
    scale_ = seconds / prior_[index];
    any_ = true;
  } else if (seen(index)) {
    const double surprise = std::clamp(seconds / at(index), 1.0 / kClamp, kClamp);
    scale_ *= std::pow(surprise, kFollow);
  }
  std::deque<double>& recent = recent_[index];
  recent.push_back(seconds / scale_);
  if (recent.size() > kRecent) recent.pop_front();
  std::vector<double> sorted(recent.begin(), recent.end());
  std::sort(sorted.begin(), sorted.end());
  median_[index] = sorted[(sorted.size() - 1) / 2];  // the lower one: delays are one-sided
}

double CostTable::ratio(size_t index) const { return median_[index] / prior_[index]; }

double CostTable::at(size_t index) const {
  if (!any_) return prior_[index];
  if (seen(index)) return scale_ * median_[index];
  // Unseen: the prior's shape, scaled like the seen neighbours (linearly between two, flat beyond the ends).
  size_t below = index, above = index;
  while (below > 0 && !seen(below)) --below;
  while (above + 1 < prior_.size() && !seen(above)) ++above;
  double r = 1.0;
  if (seen(below) && seen(above)) {
    const double t = static_cast<double>(index - below) / static_cast<double>(above - below);
    r = ratio(below) * (1.0 - t) + ratio(above) * t;
  } else if (seen(below)) {
    r = ratio(below);
  } else if (seen(above)) {
    r = ratio(above);
  }
  return scale_ * prior_[index] * r;
}

// ---- Calibration ------------------------------------------------------------------------------------------------

namespace {

constexpr float kBinEdges[Calibration::kBins - 1] = {0.08f, 0.16f, 0.28f, 0.42f, 0.56f, 0.70f, 0.82f, 0.91f, 0.97f};
constexpr double kAllMemory = 0.985, kSlotMemory = 0.97;  // about 70 and 35 observations
constexpr double kPriorWeight = 3.0, kSlotWeight = 6.0;
constexpr double kUnknownAcceptance = 0.5;

}  // namespace

Calibration::Calibration(int max_depth)
    : by_slot_(static_cast<size_t>(max_depth)), slot_(static_cast<size_t>(max_depth)) {}

void Calibration::Count::add(bool yes, double memory) {
  stood = stood * memory + (yes ? 1.0 : 0.0);
  total = total * memory + 1.0;
}

int Calibration::bin(float confidence) {
  return static_cast<int>(std::upper_bound(std::begin(kBinEdges), std::end(kBinEdges), confidence) -
                          std::begin(kBinEdges));
}

double Calibration::acceptance(int slot, float confidence) const {
  const size_t b = static_cast<size_t>(bin(confidence));
  const Count& all = all_[b];
  const double general = (all.stood + kPriorWeight * static_cast<double>(confidence)) / (all.total + kPriorWeight);
  const Count& own = by_slot_[static_cast<size_t>(slot)][b];
  return (own.stood + kSlotWeight * general) / (own.total + kSlotWeight);
}

double Calibration::average(int slot) const {
  double prior = kUnknownAcceptance;  // a slot never reached takes after the one before it
  for (int i = 0; i <= slot; ++i) {
    const Count& c = slot_[static_cast<size_t>(i)];
    prior = (c.stood + kPriorWeight * prior) / (c.total + kPriorWeight);
  }
  return prior;
}

void Calibration::observe(int slot, float confidence, bool stood) {
  const size_t b = static_cast<size_t>(bin(confidence));
  all_[b].add(stood, kAllMemory);
  by_slot_[static_cast<size_t>(slot)][b].add(stood, kSlotMemory);
  slot_[static_cast<size_t>(slot)].add(stood, kSlotMemory);
}

// ---- DepthPolicy ------------------------------------------------------------------------------------------------

namespace {

std::vector<double> draft_prior(int max_depth, double draft) {
  std::vector<double> prior;
  for (int n = 1; n <= max_depth; ++n) prior.push_back(draft * (1.0 + 0.03 * n));
  return prior;
}

constexpr double kReplayFade = 0.85;   // weight of a drafted round against the next newer one
constexpr double kMargin = 1.005;      // drafting must promise this much over plain decoding
constexpr int kShortWait = 8;          // rounds to the first probe after parking

}  // namespace

DepthPolicy::DepthPolicy(int max_depth, const CostPrior& prior)
    : max_depth_(max_depth),
      verify_(prior.verify),
      draft_(draft_prior(max_depth, prior.draft)),
      calibration_(max_depth) {
  lookup_acceptance_ = {0.35, 0.5, 0.65, 0.75, 0.85};
}

int DepthPolicy::lookup_bucket(int match) {
  return match < 4 ? 0 : match < 6 ? 1 : match < 10 ? 2 : match < 20 ? 3 : 4;
}

// A probe costs about one drafter run: spread it so thin that it stays below half a per cent of the time.
int DepthPolicy::longest_wait() const {
  const double share = draft_cost(1) / verify_cost(1) / 0.005;
  return static_cast<int>(std::clamp(share, 24.0, 96.0));
}

// Replays the last drafted rounds for every n at once: with m slots known, those beyond m get the slot's average.
DepthPolicy::Choice DepthPolicy::best_draft(int max_depth) const {
  Choice best{0, 1.0 / verify_cost(1)};
  const double price = std::max(rate_, best.rate);
  std::vector<double> tokens(static_cast<size_t>(max_depth) + 1, 0.0), seconds(tokens.size(), 0.0);
  std::vector<double> average;
  for (int i = 0; i < max_depth; ++i) average.push_back(calibration_.average(i));
  double weight = 1.0, weights = 0.0;
  for (const std::vector<float>& confidence : replay_) {
    double reach = 1.0, expected = 1.0, best_tokens = 1.0, best_seconds = verify_cost(1);
    for (int n = 1; n <= max_depth; ++n) {
      const size_t i = static_cast<size_t>(n) - 1;
      reach *= i < confidence.size() ? calibration_.acceptance(n - 1, confidence[i]) : average[i];
      expected += reach * bias_;
      const double cost = verify_cost(n + 1);
      if (expected - price * cost > best_tokens - price * best_seconds) {
        best_tokens = expected;
        best_seconds = cost;
      }
      tokens[static_cast<size_t>(n)] += weight * best_tokens;
      seconds[static_cast<size_t>(n)] += weight * best_seconds;
    }
    weights += weight;
    weight *= kReplayFade;
  }
  Choice drafted;
  for (int n = 1; n <= max_depth; ++n) {
    const size_t i = static_cast<size_t>(n);
    const double rate = tokens[i] / (seconds[i] + weights * draft_cost(n));
    if (rate > drafted.rate) drafted = {n, rate};
  }
  return drafted;
}

DepthPolicy::Choice DepthPolicy::best_lookup(int match, int tokens) const {
  Choice best;
  const double a = lookup_acceptance_[static_cast<size_t>(lookup_bucket(match))];
  double reach = 1.0, expected = 1.0;
  for (int n = 1; n <= tokens; ++n) {
    reach *= a;
    expected += reach;
    const double rate = expected / verify_cost(n + 1);
    if (rate > best.rate) best = {n, rate};
  }
  return best;
}

DraftPlan DepthPolicy::plan(int max_depth, bool has_drafter, int lookup_match, int lookup_tokens) {
  max_depth = std::min(max_depth, max_depth_);
  if (max_depth < 1 || !verify_.seen(0)) return {};  // the first round measures plain decoding
  const double plain = 1.0 / verify_cost(1);
  Choice draft;
  if (has_drafter && !replay_.empty()) draft = best_draft(max_depth);
  Choice lookup;
  if (lookup_match > 0) lookup = best_lookup(lookup_match, std::min(max_depth, lookup_tokens));
  rate_ = std::max({plain, draft.rate, lookup.rate});

  if (lookup.n > 0 && lookup.rate > kMargin * plain && lookup.rate >= draft.rate) {
    return {DraftSource::lookup, lookup.n};
  }
  if (!has_drafter) return {};
  if (replay_.empty()) return {DraftSource::dflash, std::min(kFirstDepth, max_depth)};
  if (draft.rate > kMargin * plain) {
    parked_ = false;
    return {DraftSource::dflash, draft.n};
  }
  if (!parked_) {
    parked_ = true;
    interval_ = kShortWait;
    wait_ = interval_;
  }
  if (--wait_ > 0) return {};
  return {DraftSource::dflash, std::max(draft.n, 1)};  // a probe; observe() sets the next wait
}

int DepthPolicy::verify_depth(const std::vector<float>& confidence) const {
  const double price = std::max(rate_, 1.0 / verify_cost(1));
  int depth = 0;
  double reach = 1.0, expected = 1.0, best = 1.0 - price * verify_cost(1);
  for (int n = 1; n <= static_cast<int>(confidence.size()) && n <= max_depth_; ++n) {
    reach *= calibration_.acceptance(n - 1, confidence[static_cast<size_t>(n) - 1]);
    expected += reach * bias_;
    const double value = expected - price * verify_cost(n + 1);
    if (value > best) {
      best = value;
      depth = n;
    }
  }
  return depth;
}

void DepthPolicy::observe(const RoundOutcome& o) {
  verify_.observe(static_cast<size_t>(o.verified), o.verify_seconds);
  if (o.source == DraftSource::lookup) {
    double& a = lookup_acceptance_[static_cast<size_t>(lookup_bucket(o.lookup_match))];
    for (int i = 0; i < o.verified && i <= o.accepted; ++i) {
      if (i == o.accepted && o.cut) break;
      a += 0.08 * ((i < o.accepted ? 1.0 : 0.0) - a);
    }
    return;
  }
  if (o.drafted == 0) return;
  draft_.observe(static_cast<size_t>(o.drafted) - 1, o.draft_seconds);
  double expected = 0.0, reach = 1.0;
  for (int i = 0; i < o.verified; ++i) {
    reach *= calibration_.acceptance(i, o.confidence[static_cast<size_t>(i)]);
    expected += reach;
  }
  if (o.verified > 0 && !o.cut) {
    // Both sides carry a constant so that one round cannot move the ratio far.
    constexpr double kSteady = 30.0;
    bias_ = std::clamp((kSteady * bias_ + o.accepted) / (kSteady + expected), 0.5, 1.5);
  }
  for (int i = 0; i < o.verified && i <= o.accepted; ++i) {
    if (i == o.accepted && o.cut) break;
    calibration_.observe(i, o.confidence[static_cast<size_t>(i)], i < o.accepted);
  }
  if (o.accepted == o.verified && o.verified < o.drafted && o.next_stood >= 0) {
    // The target's own token tells about one slot more than was paid for.
    calibration_.observe(o.verified, o.confidence[static_cast<size_t>(o.verified)], o.next_stood == 1);
  }
  replay_.push_front(o.confidence);
  if (replay_.size() > kReplay) replay_.pop_back();
  if (parked_) {
    // Did this one round earn its drafter run? Then look again at once; otherwise wait twice as long.
    const double earned = o.accepted * verify_cost(1);
    const double paid = draft_cost(o.drafted) + verify_cost(o.verified + 1) - verify_cost(1);
    interval_ = earned > paid ? 1 : std::min(std::max(2 * interval_, kShortWait), longest_wait());
    wait_ = interval_;
  }
}

}  // namespace dflash
