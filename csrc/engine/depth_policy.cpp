#include "engine/depth_policy.h"

#include <algorithm>
#include <cmath>

namespace dflash {

namespace {

double mean_of_positive_part(double mean, double deviation) {  // of a normal distribution
  constexpr double kSqrt2 = 1.4142135623730951, kSqrtTwoPi = 2.5066282746310002;
  const double z = mean / deviation;
  return mean * 0.5 * std::erfc(-z / kSqrt2) + deviation * std::exp(-0.5 * z * z) / kSqrtTwoPi;
}

constexpr double kMostCostError = 0.1;  // standard error of costs, at most
constexpr double kReplayFade = 0.98;    // weight of a drafted round against the next newer one ...
constexpr double kReplayRounds = 300;   // ... and e times less by so many rounds between them
constexpr double kNegligible = 0.01;    // chance of reaching a slot, below which the rest is left out
constexpr double kScatter = 0.3;        // tokens by which rounds differ, as if that had been ...
constexpr double kScatterWeight = 2;    // ... seen so often
constexpr int kExplore = 8;             // every so many drafted rounds a width hardly measured may be tried ...
constexpr int kLook = 8;                // every so many looks measure a pass of two rows
constexpr size_t kTrusted = 3;          // ... or each, until it has been measured so often
constexpr size_t kMeasured = 2;         // ... until it has been measured this often
constexpr double kSure = 0.3;           // drafting pays for sure: by so many standard errors, but by ...
constexpr double kLeastMargin = 0.005;  // ... this much at least, since the best of several estimates promises too much
constexpr double kMostMargin = 0.08;    // ... and no more: what is wrong is soon corrected while drafting goes on
constexpr double kUpsideShare = 0.7;    // looks may cost so much of what drafting could still gain ...
constexpr double kMostShare = 0.025;    // ... but no more of the time than this ...
constexpr double kLeastShare = 0.004;   // ... and this, however hopeless: texts change
constexpr double kFirstLooks = 0.55;    // plain rounds for looks at that share whatever they say, by the prior ...
constexpr int kMostFirstLooks = 4;      // ... and so many of them at most
constexpr double kDoubt = 0.4;          // standard errors that a look is taken to lose beyond what is expected ...
constexpr double kMostDoubt = 0.1;      // ... of no more than this
constexpr int kAskParked = 32;          // plain rounds between two estimates without news of drafts ...
constexpr int kAskDrafting = 4;         // ... and drafted ones, unless they contradict the estimate
constexpr double kCopyMargin = 1.03;    // lookup must promise this much
constexpr double kGoodCopy = 0.75;      // acceptance of lookup's tokens that is worth a look ...
constexpr int kCopyLook = 48;           // ... every so many candidates left aside ...
constexpr int kCopyTry = 7;             // ... at this many tokens
constexpr size_t kWarmUp = 3;           // plain rounds first: every comparison is with them
constexpr double kYardstickShare = 0.005;  // of the gain, that plain rounds while drafting may cost
constexpr int kLookSlots = 2;              // that a look asks for at least
constexpr int kAwake = 32;                 // tokens before a look that the drafter hears of
constexpr double kHint = 2.5;              // evidence that drafts stand more often, at which the next look is due
constexpr double kFirstYardstick = 8;      // rounds on which drafting is believed without a look at plain decoding ...
constexpr double kLongestYardstick = 64;   // ... doubled as long as it is borne out
constexpr double kDueSooner = 3;           // where the machine seems to have changed, so many times more of them
constexpr int kSettle = 1;                 // plain rounds after a drafted one that find the caches still cold
constexpr int kYardstickRounds = 3;        // so a yardstick is this many plain rounds, of which the last two count
constexpr int kLongUnmeasured = 64;        // unless no settled plain round came for so long

}  // namespace

DepthPolicy::DepthPolicy(int max_depth, const CostPrior& prior)
    : max_depth_(max_depth),
      costs_(prior),
      draft_prior_(prior.draft / prior.verify.front()),
      calibration_(max_depth),
      trusted_(kFirstYardstick) {
  lookup_acceptance_ = {0.35, 0.5, 0.65, 0.75, 0.85};
}

int DepthPolicy::lookup_bucket(int match) {
  return match < 4 ? 0 : match < 6 ? 1 : match < 10 ? 2 : match < 20 ? 3 : 4;
}

// Standard error of a drafted round's speed against plain decoding.
double DepthPolicy::relative_error(const Choice& draft) const {
  const double tokens = draft.sigma / draft.tokens;
  const double share = draft_cost(draft.n) / draft.seconds;
  const double cost = costs_.variance(costs_.pass(draft.depth + 1), costs_.draft(draft.n), share);
  return std::sqrt(tokens * tokens + std::min(cost, kMostCostError * kMostCostError));
}

// Replays the last drafted rounds for every n at once: with m slots known, those beyond m get the slot's average.
// Newer rounds count more: a wait between looks makes those before it old.
DepthPolicy::Choice DepthPolicy::best_draft(int max_depth) {
  const double plain = verify_cost(1), price = std::max(rate_, 1.0 / plain);
  const size_t depths = static_cast<size_t>(max_depth);
  const std::vector<double> average = calibration_.averages(max_depth);
  std::vector<double> tokens(depths + 1, 0.0), seconds(depths + 1, 0.0), cost(depths);
  for (size_t i = 0; i < depths; ++i) cost[i] = costs_.hopeful(costs_.pass(static_cast<int>(i) + 2));
  weight_.clear();
  reach_.assign(replay_.size() * depths, 0.0);
  double* reaches = reach_.data();  // [depths] of the round at hand
  double weight = 1.0, weights = 0.0;
  long newer = replay_.front().round;
  for (const auto& [round, log_odds] : replay_) {
    if (newer - round > 1) weight *= std::exp(-static_cast<double>(newer - round - 1) / kReplayRounds);
    newer = round;
    double reach = 1.0, expected = 1.0, best_tokens = 1.0, best_seconds = plain;
    for (size_t i = 0; i < depths; ++i) {
      if (reach > kNegligible) {
        reach *= i < log_odds.size() ? calibration_.acceptance(static_cast<int>(i), log_odds[i]) : average[i];
        reaches[i] = reach;
        expected += reach;
        if (expected - price * cost[i] > best_tokens - price * best_seconds) {
          best_tokens = expected;
          best_seconds = cost[i];
        }
      }
      tokens[i + 1] += weight * best_tokens;
      seconds[i + 1] += weight * best_seconds;
    }
    reaches += depths;
    weight_.push_back(weight);
    weights += weight;
    weight *= kReplayFade;
  }
  Choice drafted;
  for (int n = 1; n <= max_depth; ++n) {
    const size_t i = static_cast<size_t>(n);
    const double rate = tokens[i] / (seconds[i] + weights * draft_cost(n));
    if (rate > drafted.rate) drafted = {n, rate};
  }
  measure(drafted, max_depth);
  return drafted;
}

// What rounds of drafted.n drafts bring, without the benefit of the doubt that widths hardly measured get, and how sure
// that is: what calibration does not know, and that the replayed rounds are a sample.
void DepthPolicy::measure(Choice& drafted, int max_depth) const {
  const double price = std::max(rate_, 1.0 / verify_cost(1)), draft = draft_cost(drafted.n);
  std::vector<double> gradient(calibration_.n_parameters(), 0.0), cost(static_cast<size_t>(drafted.n));
  for (size_t i = 0; i < cost.size(); ++i) cost[i] = costs_.hopeful(costs_.pass(static_cast<int>(i) + 2));
  std::vector<double> times(cost.size() + 1, 0.0);  // weight with which each depth is verified
  double weights = 0.0, squares = 0.0, tokens = 0.0, seconds = 0.0, tt = 0.0, ts = 0.0, ss = 0.0;
  const double* reaches = reach_.data();
  for (size_t r = 0; r < replay_.size(); ++r) {
    const std::vector<double>& log_odds = replay_[r].log_odds;
    const double weight = weight_[r];
    double expected = 1.0, best = 1.0 - price * verify_cost(1), t = 1.0;
    size_t depth = 0;
    for (size_t i = 0; i < cost.size() && reaches[i] > 0.0; ++i) {
      expected += reaches[i];
      const double value = expected - price * cost[i];
      if (value > best) best = value, depth = i + 1, t = expected;
    }
    // d(sum of reaches) / d log-odds of slot i = (1 - p_i) times the reaches from i on.
    double beyond = 0.0;
    for (size_t i = depth; i-- > 0;) {
      beyond += reaches[i];
      if (i >= log_odds.size()) continue;
      const double p = i > 0 ? reaches[i] / reaches[i - 1] : reaches[i];
      calibration_.add_gradient(static_cast<int>(i), log_odds[i], weight * beyond * (1.0 - p), gradient);
    }
    const double s = verify_cost(static_cast<int>(depth) + 1) + draft;
    times[depth] += weight;
    weights += weight, squares += weight * weight, tokens += weight * t, seconds += weight * s;
    tt += weight * t * t, ts += weight * t * s, ss += weight * s * s;
    reaches += max_depth;
  }
  drafted.tokens = tokens / weights;
  drafted.seconds = seconds / weights;
  drafted.rate = tokens / seconds;
  const double q = drafted.rate, scatter = std::max(0.0, tt - 2.0 * q * ts + q * q * ss);  // sum of (t - q s)^2
  const double variance = (scatter + kScatterWeight * kScatter * kScatter) / (weights + kScatterWeight);
  const double calibrating = std::max(0.0, calibration_.variance(gradient)), sampling = variance * squares;
  drafted.sigma = std::sqrt(calibrating + sampling) / weights;
  drafted.depth = static_cast<int>(std::max_element(times.begin(), times.end()) - times.begin());
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
  if (max_depth < 1 || costs_.count(costs_.pass(1)) < kWarmUp) return {};
  const double plain = 1.0 / verify_cost(1);
  const bool known = has_drafter && !replay_.empty();
  Choice draft;
  if (known) {
    estimate(max_depth);
    draft = estimate_;
    draft.rate = plain * (1.0 + gain_);  // where plain decoding has become slower since, so has drafting
  }
  Choice lookup;
  if (lookup_match > 0) lookup = best_lookup(lookup_match, std::min(max_depth, lookup_tokens));
  rate_ = std::max({plain, draft.rate, lookup.rate});
  const bool copy = lookup.n > 0 && lookup.rate > kCopyMargin * plain && lookup.rate >= draft.rate;
  // A copy that has stood well so far is tried now and then against what the costs say, which may be old.
  if (lookup_match > 0 && !copy && lookup_acceptance_[static_cast<size_t>(lookup_bucket(lookup_match))] > kGoodCopy &&
      ++copies_left_ >= kCopyLook) {
    copies_left_ = 0;
    return {DraftSource::lookup, std::min({max_depth, lookup_tokens, kCopyTry})};
  }
  const bool look_due = has_drafter && (!known || (parked_ && debt_ <= 0.0));
  if (copy && !look_due) {  // runs of lookup must not keep a look away
    copies_left_ = 0;
    return {DraftSource::lookup, lookup.n};
  }
  if (!has_drafter) return {};
  if (!known) return {DraftSource::dflash, std::min(kLookSlots, max_depth)};
  if (gain_ > std::clamp(kSure * error_, kLeastMargin, kMostMargin)) {
    if (parked_) trusted_ = kFirstYardstick;
    parked_ = false;
    // Plain rounds keep the yardstick true, spread so thin that they cost kYardstickShare of the gain at most.
    const double rounds = (1.0 - plain / draft.rate) / kYardstickShare;
    if (since_plain_ > rounds / kDueSooner && costs_.take_yardstick_due()) yardstick_left_ = kYardstickRounds;
    if (yardstick_left_ > 0) return {};
    if (since_plain_ > std::clamp(rounds, kFirstYardstick, trusted_)) {
      yardstick_left_ = kYardstickRounds;
      trusted_ = std::min(2.0 * trusted_, kLongestYardstick);
      return {};
    }
    const int further = drafted_rounds_ % kExplore == 0 ? 1 : 0;  // a slot more than pays: verify_depth() may try it
    return {DraftSource::dflash, std::min(draft.n + further, max_depth)};
  }
  parked_ = true;
  if (debt_ > 0.0) return {};
  return {DraftSource::dflash, std::min(std::max(draft.n, kLookSlots), max_depth)};
}

// What drafting promises; the share of time that looks at it may cost follows what it could still gain.
void DepthPolicy::estimate(int max_depth) {
  ++estimate_age_;
  const bool surprise = calibration_.take_surprise(), recent = estimate_age_ < (parked_ ? kAskParked : kAskDrafting);
  if (recent && !surprise && max_depth == estimated_depth_) return;
  estimate_age_ = 0;
  estimated_depth_ = max_depth;
  estimate_ = best_draft(max_depth);
  error_ = relative_error(estimate_);
  gain_ = estimate_.rate * verify_cost(1) - 1.0;
  const double upside = mean_of_positive_part(gain_, error_);
  const bool early = drafted_rounds_ < kMostFirstLooks && drafted_rounds_ * draft_prior_ < kFirstLooks;
  look_share_ = early ? kMostShare : std::clamp(kUpsideShare * upside, kLeastShare, kMostShare);
}

int DepthPolicy::verify_depth(const std::vector<float>& confidence) const {
  const double price = std::max(rate_, 1.0 / verify_cost(1));
  // A look verifies where that pays, and now and then to know what it costs: an early outlier must not park for good.
  int depth = parked_ && (costs_.count(costs_.pass(2)) < kTrusted || drafted_rounds_ % kLook == 0) ? 1 : 0;
  double reach = 1.0, expected = 1.0, best = 1.0 - price * verify_cost(1);
  for (int n = 1; n <= static_cast<int>(confidence.size()) && n <= max_depth_; ++n) {
    reach *= calibration_.acceptance(n - 1, Calibration::log_odds(confidence[static_cast<size_t>(n) - 1]));
    expected += reach;
    const double value = expected - price * costs_.hopeful(costs_.pass(n + 1));
    if (value > best) {
      best = value;
      depth = n;
    }
  }
  if (drafted_rounds_ % kExplore == 0) {
    // The line through the costs cannot know of a kernel that is fast up to some width: measure all up to it.
    const int widest = std::min(parked_ ? depth : depth + 1, static_cast<int>(confidence.size()));
    for (int n = 1; n <= widest; ++n) {
      if (costs_.count(costs_.pass(n + 1)) < kMeasured) return n;
    }
  }
  return depth;
}

// What a look like this one is expected to cost beyond its tokens: the draft, the kAwake tokens that a drafter hears
// before its next look (the first look's came with the prompt), the pass, and the caches left cold. Luck does not
// count, or a lucky stretch would pay for looks that lose; nor do good estimates: a part of the doubt is paid for as
// well.
void DepthPolicy::charge(const RoundOutcome& o) {
  double tokens = 1.0, reach = 1.0;
  for (int i = 0; i < o.verified; ++i) {
    reach *= calibration_.acceptance(i, replay_.front().log_odds[static_cast<size_t>(i)]);
    tokens += reach;
  }
  const double heard = kAwake * ingest_cost();
  const double seconds = draft_cost(o.drafted) + heard + verify_cost(o.verified + 1) + settling_cost();
  const double rounds = seconds / verify_cost(1);
  const double doubt = kDoubt * std::min(error_, kMostDoubt) * rounds;
  debt_ += std::max(rounds - tokens, 0.0) + doubt;
}

void DepthPolicy::observe(const RoundOutcome& o) {
  const bool plain = o.verified == 0 && o.drafted == 0;
  ++round_;
  ++unmeasured_;
  if (!plain || plain_streak_ >= kSettle || unmeasured_ > kLongUnmeasured || costs_.count(costs_.pass(1)) < kWarmUp) {
    costs_.observe(costs_.pass(o.verified + 1), o.verify_seconds);
    if (plain) unmeasured_ = 0;
  }
  if (plain && !replay_.empty() && replay_.front().round + 1 == round_) {
    costs_.observe(costs_.settling(), o.verify_seconds);
  }
  if (o.ingested > 0) costs_.observe(costs_.ingest(), o.ingest_seconds / o.ingested);
  if (parked_) debt_ -= look_share_;
  calibration_.drift();
  costs_.drift();
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
  costs_.observe(costs_.draft(o.drafted), o.draft_seconds);
  remember(o.confidence);
  for (int i = 0; i < o.verified && i <= o.accepted; ++i) {
    if (i == o.accepted && o.cut) break;
    calibration_.observe(i, replay_.front().log_odds[static_cast<size_t>(i)], i < o.accepted);
  }
  if (parked_) {
    charge(o);
    heed_news();
  } else {
    debt_ = 0.0;
  }
}

void DepthPolicy::remember(const std::vector<float>& confidence) {
  Drafted drafted{round_, {}};
  for (const float c : confidence) drafted.log_odds.push_back(Calibration::log_odds(c));
  replay_.push_front(std::move(drafted));
  if (replay_.size() > kReplay) replay_.pop_back();
}

// Parked, and a draft was compared with the text.
void DepthPolicy::heed_news() {
  estimate_age_ = kAskParked;
  if (calibration_.evidence_of_rise() > kHint) debt_ = 0.0;
}

bool DepthPolicy::asleep() const {
  return parked_ && debt_ > kAwake * look_share_ && ingest_cost() > look_share_ * verify_cost(1);
}

void DepthPolicy::observe_unverified(int slot, float confidence, bool stood) {
  calibration_.observe(slot, Calibration::log_odds(confidence), stood);
  if (parked_) heed_news();
}

}  // namespace dflash
