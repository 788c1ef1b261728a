#include "engine/depth_policy.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dflash {

// ---- CostTable --------------------------------------------------------------------------------------------------

namespace {

constexpr size_t kRecent = 12;         // measurements kept of each index
constexpr size_t kShift = 4;           // measurements in a row that must all be ...
constexpr double kShifted = 1.15;      // ... this far off, the same way, to say that the whole machine changed
constexpr double kOthersWeight = 1.5;  // of what the neighbours or the line say, against an index' own measurements
constexpr double kFirstClamp = 1.5;    // an index measured less than kTrusted times is at most this far above the line
constexpr size_t kTrusted = 3;
constexpr double kFade = 0.985;               // per measurement elsewhere, of the trust in an index' own ...
constexpr double kLeast = 0.25;               // ... but not below this share
constexpr double kPriorWeightOfSlope = 0.02;  // the prior's slope, against measured ones
constexpr double kHope = 0.15;                // benefit of the doubt of an index never measured

}  // namespace

CostTable::CostTable(std::vector<double> prior, bool has_yardstick)
    : has_yardstick_(has_yardstick),
      prior_(std::move(prior)),
      recent_(prior_.size()),
      own_(prior_.size(), 0.0),
      trust_(prior_.size(), 0.0),
      unconfirmed_(prior_.size(), 1.0) {}

void CostTable::observe(size_t index, double seconds) {
  if (!(seconds > 0.0)) return;
  if (count(index) > 0) follow(index, seconds / at(index));
  if (index == 0 && yardstick_afresh_) {
    confirm_shift(seconds / at(0));
    recent_[0].clear();
    yardstick_afresh_ = false;
  }
  unconfirmed_[index] = 1.0;
  if (any() && count(index) < kTrusted) seconds = std::min(seconds, kFirstClamp * at(index));
  std::deque<double>& recent = recent_[index];
  recent.push_back(seconds);
  if (recent.size() > kRecent) recent.pop_front();
  summarize(index);
  for (double& trust : trust_) trust *= kFade;
  trust_[index] = static_cast<double>(recent.size());
  fit();
}

// A longer context or a busier machine moves every index at once: then those not measured move along. Not the
// yardstick, by which everything is judged: a stretch of noise must not inflate it, so it is asked to be measured
// again.
void CostTable::follow(size_t index, double surprise) {
  surprises_.push_back({index, surprise});
  if (surprises_.size() < kShift) return;
  if (surprises_.size() > kShift) surprises_.pop_front();
  double least = surprise, most = surprise;
  for (const auto& [i, found] : surprises_) least = std::min(least, found), most = std::max(most, found);
  if (least < kShifted && most > 1.0 / kShifted) return;
  const double factor = least >= kShifted ? least : most;  // the most careful of them
  if (has_yardstick_ && index != 0) yardstick_due_ = yardstick_afresh_ = true;
  for (size_t i = 0; i < recent_.size(); ++i) {
    rescale(i, factor);
    unconfirmed_[i] *= factor;
  }
  surprises_.clear();
  fit();
}

// What was measured since the surprises began is of the new time already.
void CostTable::rescale(size_t index, double factor) {
  std::deque<double>& recent = recent_[index];
  if (recent.empty()) return;
  size_t old = recent.size();
  for (const Surprise& s : surprises_) old -= s.first == index && old > 0 ? 1 : 0;
  if (!surprises_.empty() && surprises_.back().first == index) old += 1;  // the last is not among them yet
  for (size_t i = 0; i < std::min(old, recent.size()); ++i) recent[i] *= factor;
  summarize(index);
}

// The yardstick, measured after a shift, against what the shift made of it. If it did not move, the stretch is over:
// what was moved and not measured since goes back, or every slow stretch would leave the rest dearer for good.
void CostTable::confirm_shift(double yardstick) {
  for (size_t i = 1; i < unconfirmed_.size(); ++i) {
    const double factor = unconfirmed_[i];
    if ((factor > 1.0 && yardstick < 1.0 / kShifted) || (factor < 1.0 && yardstick > kShifted)) {
      rescale(i, 1.0 / factor);
    }
    unconfirmed_[i] = 1.0;
  }
}

// The faster half: delays are one-sided.
void CostTable::summarize(size_t index) {
  const std::deque<double>& recent = recent_[index];
  std::vector<double> sorted(recent.begin(), recent.end());
  std::sort(sorted.begin(), sorted.end());
  const size_t half = (sorted.size() + 1) / 2;
  own_[index] =
      std::accumulate(sorted.begin(), sorted.begin() + static_cast<long>(half), 0.0) / static_cast<double>(half);
}

double CostTable::trust(size_t index) const {
  return std::max(trust_[index], kLeast * static_cast<double>(count(index)));
}

// cost = a + b x by least squares of relative errors, x how much more than index 0 the prior has.
void CostTable::fit() {
  double w = 0.0, wx = 0.0, wxx = 0.0, wy = 0.0, wxy = 0.0;
  for (size_t i = 0; i < prior_.size(); ++i) {
    if (count(i) == 0) continue;
    const double x = prior_[i] / prior_[0] - 1.0, y = own_[i];
    const double weight = trust(i) * (prior_[0] / prior_[i]) * (prior_[0] / prior_[i]);
    w += weight, wx += weight * x, wxx += weight * x * x, wy += weight * y, wxy += weight * x * y;
  }
  // The prior says b = a: minimise further kPriorWeightOfSlope * (b - a)^2.
  const double k = kPriorWeightOfSlope;
  const double m00 = w + k, m01 = wx - k, m11 = wxx + k;
  const double determinant = m00 * m11 - m01 * m01;
  double a = (wy * m11 - wxy * m01) / determinant, b = (m00 * wxy - m01 * wy) / determinant;
  if (b < 0.0) a = wy / w, b = 0.0;                            // more rows are never taken to be cheaper
  if (a <= 0.0) b = (wy + wxy) / (w + 2.0 * wx + wxx), a = b;  // nor one row to be free: the prior's shape
  const auto x = [&](size_t i) { return prior_[i] / prior_[0] - 1.0; };
  cost_.resize(prior_.size());
  for (size_t i = 0; i < prior_.size(); ++i) {
    size_t below = i, above = i + 1;
    while (below > 0 && count(--below) == 0) {
    }
    while (above < prior_.size() && count(above) == 0) ++above;
    double others = a + b * x(i);
    if (below < i && count(below) > 0 && above < prior_.size()) {
      const double t = (x(i) - x(below)) / std::max(x(above) - x(below), 1e-9);
      others = own_[below] * (1.0 - t) + own_[above] * t;
    }
    cost_[i] = (trust(i) * own_[i] + kOthersWeight * others) / (trust(i) + kOthersWeight);
  }
}

double CostTable::hopeful(size_t index) const { return at(index) * (1.0 - kHope / (1.0 + trust(index))); }

// ---- Calibration ------------------------------------------------------------------------------------------------

namespace {

constexpr float kBinEdges[Calibration::kBins - 1] = {0.08f, 0.16f, 0.28f, 0.42f, 0.56f, 0.70f, 0.82f, 0.91f, 0.97f};
constexpr double kAllMemory = 0.995, kSlotMemory = 0.97;  // about 70 and 35 observations
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

std::vector<double> Calibration::averages(int slots) const {
  std::vector<double> out;
  double prior = kUnknownAcceptance;  // a slot never reached takes after the one before it
  for (int i = 0; i < slots; ++i) {
    const Count& c = slot_[static_cast<size_t>(i)];
    prior = (c.stood + kPriorWeight * prior) / (c.total + kPriorWeight);
    out.push_back(prior);
  }
  return out;
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

constexpr size_t kStale = 3;           // drafted rounds remembered through a wait
constexpr double kReplayFade = 0.955;  // weight of a drafted round against the next newer one
constexpr int kExplore = 8;            // every so many drafted rounds a width hardly measured may be tried ...
constexpr int kLook = 8;               // every so many probes measure a pass of two rows
constexpr size_t kMeasured = 2;        // ... until it has been measured this often
constexpr double kMargin = 1.03;       // drafting must promise this much: the best of noisy estimates promises too much
constexpr double kGoodCopy = 0.75;     // acceptance of lookup's tokens that is worth a look ...
constexpr int kCopyLook = 48;          // ... every so many candidates left aside ...
constexpr int kCopyTry = 7;            // ... at this many tokens
constexpr size_t kWarmUp = 3;          // plain rounds first: every comparison is with them
constexpr int kShortWait = 8;          // rounds to the first probe after parking, at least
constexpr double kLongestWait = 200;   // and between probes that show nothing
constexpr double kYardstickShare = 0.005;  // of the gain, that plain rounds while drafting may cost
constexpr double kProbeShare = 0.0035;     // of the time, that probes may cost in the long run ...
constexpr double kFirstShare = 0.05;       // ... just after parking ...
constexpr double kProbeMost = 0.02;        // ... and in the long run where kLongestWait is not long enough
constexpr double kFar = 0.85;              // promise of a probe, against plain decoding, at which the drafter may sleep
constexpr int kFarSlots = 2;               // slots that a probe asks for then
constexpr int kAwake = 48;                 // rounds before the next probe that it hears of
constexpr double kLongestYardstick = 64;   // rounds on which drafting is believed without a look at plain decoding
constexpr int kSettle = 1;                 // plain rounds after a drafted one that find the caches still cold
constexpr int kYardstickRounds = 3;        // so a yardstick is this many plain rounds, of which the last two count
constexpr int kLongUnmeasured = 64;        // unless no settled plain round came for so long

}  // namespace

DepthPolicy::DepthPolicy(int max_depth, const CostPrior& prior)
    : max_depth_(max_depth),
      verify_(prior.verify, true),
      draft_(draft_prior(max_depth, prior.draft), false),
      calibration_(max_depth) {
  lookup_acceptance_ = {0.35, 0.5, 0.65, 0.75, 0.85};
}

int DepthPolicy::lookup_bucket(int match) {
  return match < 4 ? 0 : match < 6 ? 1 : match < 10 ? 2 : match < 20 ? 3 : 4;
}

// A probe costs a drafter run, less what a second row brings where it is worth its time.
double DepthPolicy::probe_loss() const {
  const double plain = verify_cost(1);
  const double gain = std::max(0.0, calibration_.averages(1)[0] - (verify_cost(2) / plain - 1.0));
  return draft_cost(std::min(kFirstDepth, max_depth_)) / plain - gain;
}

// Probes are spread so thin that they stay a small part of the whole.
int DepthPolicy::longest_wait() const {
  const double loss = probe_loss(), most = std::max(kLongestWait, loss / kProbeMost);
  return static_cast<int>(std::clamp(loss / kProbeShare, static_cast<double>(kShortWait), most));
}

int DepthPolicy::first_wait() const {
  return std::clamp(static_cast<int>(probe_loss() / kFirstShare), kShortWait, longest_wait());
}

// Replays the last drafted rounds for every n at once: with m slots known, those beyond m get the slot's average.
DepthPolicy::Choice DepthPolicy::best_draft(int max_depth, size_t rounds) const {
  Choice best{0, 1.0 / verify_cost(1)};
  const double price = std::max(rate_, best.rate);
  std::vector<double> tokens(static_cast<size_t>(max_depth) + 1, 0.0), seconds(tokens.size(), 0.0);
  const std::vector<double> average = calibration_.averages(max_depth);
  double weight = 1.0, weights = 0.0;
  for (size_t r = 0; r < std::min(rounds, replay_.size()); ++r) {
    const std::vector<float>& confidence = replay_[r];
    double reach = 1.0, expected = 1.0, best_tokens = 1.0, best_seconds = verify_cost(1);
    for (int n = 1; n <= max_depth; ++n) {
      const size_t i = static_cast<size_t>(n) - 1;
      reach *= i < confidence.size() ? calibration_.acceptance(n - 1, confidence[i]) : average[i];
      expected += reach * bias_;
      const double cost = verify_.hopeful(i + 1);
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
  if (max_depth < 1 || verify_.count(0) < kWarmUp) return {};
  const double plain = 1.0 / verify_cost(1);
  Choice draft;
  if (has_drafter && !replay_.empty()) draft = best_draft(max_depth, replay_.size());
  Choice lookup;
  if (lookup_match > 0) lookup = best_lookup(lookup_match, std::min(max_depth, lookup_tokens));
  rate_ = std::max({plain, draft.rate, lookup.rate});

  const bool copy = lookup.n > 0 && lookup.rate > kMargin * plain && lookup.rate >= draft.rate;
  // A copy that has stood well so far is tried now and then against what the costs say, which may be old.
  if (lookup_match > 0 && !copy && lookup_acceptance_[static_cast<size_t>(lookup_bucket(lookup_match))] > kGoodCopy &&
      ++copies_left_ >= kCopyLook) {
    copies_left_ = 0;
    return {DraftSource::lookup, std::min({max_depth, lookup_tokens, kCopyTry})};
  }
  const bool unknown = has_drafter && replay_.empty();
  const bool probe_due = has_drafter && parked_ && wait_ <= 1;  // runs of lookup must not keep a probe away
  if (copy && !unknown && !probe_due) {
    if (parked_) --wait_;
    copies_left_ = 0;
    return {DraftSource::lookup, lookup.n};
  }
  if (!has_drafter) return {};
  if (replay_.empty()) return {DraftSource::dflash, std::min(kFirstDepth, max_depth)};
  if (draft.rate > kMargin * plain) {
    parked_ = false;
    ++active_rounds_;
    // Plain rounds keep the yardstick true, spread so thin that they cost kYardstickShare of the gain at most.
    const double rounds = (1.0 - plain / draft.rate) / kYardstickShare;
    if (verify_.take_yardstick_due()) yardstick_left_ = kYardstickRounds;
    if (yardstick_left_ > 0) return {};
    if (since_plain_ > std::clamp(rounds, static_cast<double>(kShortWait), kLongestYardstick)) {
      yardstick_left_ = kYardstickRounds;
      return {};
    }
    const int further = drafted_rounds_ % kExplore == 0 ? 1 : 0;  // a slot more than pays: verify_depth() may try it
    return {DraftSource::dflash, std::min(draft.n + further, max_depth)};
  }
  if (!parked_) {
    parked_ = true;
    const bool excursion = active_rounds_ < kShortWait;  // a short one: the waits go on growing
    interval_ = excursion ? std::max(interval_, first_wait()) : first_wait();
    active_rounds_ = 0;
    wait_ = interval_;
  }
  if (--wait_ > 0) return {};
  // A probe; observe() sets the next wait. Slots are cheap beside the drafter run itself: look at a few, while there is
  // something to learn.
  const int slots = far_ && interval_ == longest_wait() ? kFarSlots : kFirstDepth;
  return {DraftSource::dflash, std::min(std::max(draft.n, slots), max_depth)};
}

int DepthPolicy::verify_depth(const std::vector<float>& confidence) const {
  const double price = std::max(rate_, 1.0 / verify_cost(1));
  // A probe verifies where that pays, and now and then to know what it costs: an early outlier must not park for good.
  int depth = parked_ && (verify_.count(1) < kTrusted || drafted_rounds_ % kLook == 0) ? 1 : 0;
  double reach = 1.0, expected = 1.0, best = 1.0 - price * verify_cost(1);
  for (int n = 1; n <= static_cast<int>(confidence.size()) && n <= max_depth_; ++n) {
    reach *= calibration_.acceptance(n - 1, confidence[static_cast<size_t>(n) - 1]);
    expected += reach * bias_;
    const double value = expected - price * verify_.hopeful(static_cast<size_t>(n));
    if (value > best) {
      best = value;
      depth = n;
    }
  }
  if (drafted_rounds_ % kExplore == 0) {
    // The line through the costs cannot know of a kernel that is fast up to some width: measure all up to it.
    for (int n = 1; n <= std::min(depth + 1, static_cast<int>(confidence.size())); ++n) {
      if (verify_.count(static_cast<size_t>(n)) < kMeasured) return n;
    }
  }
  return depth;
}

void DepthPolicy::observe(const RoundOutcome& o) {
  const bool plain = o.verified == 0 && o.drafted == 0;
  ++unmeasured_;
  if (!plain || plain_streak_ >= kSettle || unmeasured_ > kLongUnmeasured || verify_.count(0) < kWarmUp) {
    verify_.observe(static_cast<size_t>(o.verified), o.verify_seconds);
    if (plain) unmeasured_ = 0;
  }
  plain_streak_ = plain ? plain_streak_ + 1 : 0;
  if (plain && yardstick_left_ > 0) --yardstick_left_;
  since_plain_ = plain ? 0 : since_plain_ + 1;
  if (o.source == DraftSource::lookup) {
    double& a = lookup_acceptance_[static_cast<size_t>(lookup_bucket(o.lookup_match))];
    for (int i = 0; i < o.verified && i <= o.accepted; ++i) {
      if (i == o.accepted && o.cut) break;
      a += 0.08 * ((i < o.accepted ? 1.0 : 0.0) - a);
    }
    return;
  }
  if (o.drafted == 0) return;
  ++drafted_rounds_;
  draft_.observe(static_cast<size_t>(o.drafted) - 1, o.draft_seconds);
  double expected = 0.0, reach = 1.0;
  for (int i = 0; i < o.verified; ++i) {
    reach *= calibration_.acceptance(i, o.confidence[static_cast<size_t>(i)]);
    expected += reach;
  }
  if (o.verified > 0 && !o.cut) {
    // Both sides carry a constant so that one round cannot move the ratio far.
    constexpr double kSteady = 150.0;
    bias_ = std::clamp((kSteady * bias_ + o.accepted) / (kSteady + expected), 0.5, 1.5);
  }
  for (int i = 0; i < o.verified && i <= o.accepted; ++i) {
    if (i == o.accepted && o.cut) break;
    calibration_.observe(i, o.confidence[static_cast<size_t>(i)], i < o.accepted);
  }
  replay_.push_front(o.confidence);
  if (replay_.size() > kReplay) replay_.pop_back();
  probe_stood_ = -1;
  if (parked_) {
    probe_stood_ = o.accepted == o.verified ? o.accepted : -1;
    // A probe that looks as if drafting would pay, or did, is followed by another one at once.
    const double promise = best_draft(o.drafted, 1).rate * verify_cost(1);  // against plain decoding
    far_ = best_draft(o.drafted, replay_.size()).rate * verify_cost(1) < kFar && promise < kFar;
    if (promise > 1.0 || pays(o.accepted)) {
      wait_ = 1;
    } else {
      interval_ = std::min(std::max(2 * interval_, first_wait()), longest_wait());
      wait_ = interval_;
    }
    if (wait_ > 1 && replay_.size() > kStale) replay_.resize(kStale);  // the others will be old by then
  }
}

bool DepthPolicy::asleep() const { return parked_ && far_ && wait_ > kAwake; }

// Whether a round with that many accepted drafts would have been worth its time.
bool DepthPolicy::pays(int accepted) const {
  if (accepted < 1) return false;
  return (accepted + 1) * verify_cost(1) > draft_cost(accepted) + verify_cost(accepted + 1);
}

void DepthPolicy::observe_unverified(int slot, float confidence, bool stood) {
  calibration_.observe(slot, confidence, stood);
  if (probe_stood_ < 0) return;
  probe_stood_ = stood ? probe_stood_ + 1 : -1;
  if (parked_ && pays(probe_stood_)) wait_ = 1;
}

}  // namespace dflash
