#include "engine/costs.h"

#include <algorithm>
#include <cmath>

namespace dflash {

namespace {

// Standard deviations of the prior's error, in logarithms.
constexpr double kSlope = 0.4;        // of passes by log width
constexpr double kOffset = 0.1;       // of all passes of more than one row
constexpr double kWalk = 0.1;         // from a straight line, by log width
constexpr double kEach = 0.04;        // of each width
constexpr double kDraft = 1.5;        // of all drafts
constexpr double kDraftSlope = 0.05;  // by log of their number
constexpr double kDraftOwn = 0.02;    // of each number
constexpr double kIngest = 5.0;       // of a token taken in: nothing tells beforehand ...
constexpr double kIngestGuess = -4.0;
constexpr double kSettling = 0.3;  // of the plain round after a drafted one
constexpr double kPace = 10.0;     // of a plain round

constexpr double kPaceDrift = 0.3;           // of the pace in a round, in spreads of a timing
constexpr double kCostDrift = 0.003;         // of a cost in a round, in the prior's deviations; for what is no pass ...
constexpr double kOtherVariance = 0.04;      // ... as if that had this variance ...
constexpr double kOwnShare = 0.1;            // ... and this share more of its own
constexpr double kMostVariance = 4.0;        // of a cost, against the prior's
constexpr double kGross = 2.5;               // standard deviations beyond which a timing is not believed at once ...
constexpr double kAgree = 3.0;               // ... but with a second one that is so many spreads from it at most
constexpr size_t kFew = 2;                   // timings of what is no pass, the first of which may have been a delay
constexpr double kJump = 1.0;                // standard deviation of the pace after a jump
constexpr double kTwist = 0.5;               // what a jump leaves uncertain of costs, against its size ...
constexpr double kMostTwist = 0.08;          // ... and at most
constexpr double kSpreadMemory = 0.97;       // of timings' spread
constexpr double kMostDeviation = 0.25;      // that counts for it
constexpr double kLeastSpread = 0.005;       // a timer's own
constexpr double kStandardDeviation = 1.25;  // of a normal distribution, against its mean deviation
constexpr double kHope = 1.2, kMostHope = 0.15;  // benefit of the doubt: standard deviations, and at most

}  // namespace

Costs::Costs(const CostPrior& prior)
    : widths_(prior.verify.size()),
      mean_(2 * widths_ + 1, 0.0),
      covariance_(mean_.size() * mean_.size(), 0.0),
      gain_(mean_.size(), 0.0),
      gross_(mean_.size(), 0.0),
      count_(mean_.size(), 0) {
  const int depth = static_cast<int>(widths_) - 1;
  kernel_.assign(covariance_.size(), 0.0);
  const auto set = [&](size_t i, size_t j, double prior_error, double change) {
    covariance(i, j) = prior_error;
    kernel_[i * mean_.size() + j] = change;
  };
  for (int n = 1; n <= depth; ++n) {
    mean_[pass(n + 1)] = std::log(prior.verify[pass(n + 1)] / prior.verify[0]);
    mean_[draft(n)] = std::log(prior.draft / prior.verify[0] * (1.0 + 0.03 * n));
    for (int m = 1; m <= depth; ++m) {
      const double x = std::log(n + 1.0), y = std::log(m + 1.0), same = n == m ? 1.0 : 0.0;
      const double passes =
          kSlope * kSlope * x * y + kOffset * kOffset + kWalk * kWalk * std::min(x, y) + kEach * kEach * same;
      const double drafts =
          kDraft * kDraft + kDraftSlope * kDraftSlope * std::log(n) * std::log(m) + kDraftOwn * kDraftOwn * same;
      set(pass(n + 1), pass(m + 1), passes, passes);
      set(draft(n), draft(m), drafts, kOtherVariance * (1.0 + kOwnShare * same));
    }
  }
  mean_[ingest()] = kIngestGuess;
  set(ingest(), ingest(), kIngest * kIngest, kOtherVariance);
  set(settling(), settling(), kSettling * kSettling, kOtherVariance);
  covariance(0, 0) = kPace * kPace;
}

double Costs::at(size_t index) const { return std::exp(mean_[0] + (index > 0 ? mean_[index] : 0.0)); }

double Costs::hopeful(size_t index) const {
  const double deviation = std::sqrt(std::max(0.0, covariance(index, index)));
  return at(index) * (1.0 - std::min(kHope * deviation, kMostHope));
}

double Costs::variance(size_t pass, size_t draft, double share) const {
  double sum = share * share * covariance(draft, draft);
  if (pass > 0) {
    const double rest = 1.0 - share;
    sum += rest * rest * covariance(pass, pass) + 2.0 * share * rest * covariance(pass, draft);
  }
  return std::max(sum, 0.0);
}

void Costs::drift() {
  const double pace = kPaceDrift * std::max(spread_, kLeastSpread);
  covariance(0, 0) += pace * pace;
  for (size_t i = 1; i < mean_.size(); ++i) {
    const double* kernel = kernel_.data() + i * mean_.size();
    if (covariance(i, i) > kMostVariance * kernel[i]) continue;
    for (size_t j = 1; j < mean_.size(); ++j) covariance(i, j) += kCostDrift * kCostDrift * kernel[j];
  }
}

// The cost of an index, and of others as far as they change with it, is uncertain by so much more.
void Costs::doubt(size_t index, double by) {
  const size_t n = mean_.size();
  const double* kernel = kernel_.data() + index * n;
  const double scale = by / kernel[index];
  for (size_t i = 1; i < n; ++i) {
    for (size_t j = 1; j < n; ++j) covariance(i, j) += scale * scale * kernel[i] * kernel[j];
  }
}

// Variance of the log of the index' next timing, without its noise; gain_: how it goes with everything else.
double Costs::predict(size_t index) {
  for (size_t j = 0; j < mean_.size(); ++j) {
    gain_[j] = covariance(0, j) + (index > 0 ? covariance(index, j) : 0.0);
  }
  return gain_[0] + (index > 0 ? gain_[index] : 0.0);
}

// One timing that is far off is a delay. Two passes in a row that are off alike, of whatever widths, are another pace
// of the machine; and perhaps, where drafted passes are concerned, other costs: the next plain round tells, and the
// drafted one after it. Two timings of an index that are too fast alike, with others between, are its cost; of a draft
// hardly timed one is enough, since delays only make slower: the first was one.
bool Costs::believe(size_t index, double surprise, double limit) {
  const bool is_pass = index < widths_;
  const auto agrees = [&](double before) { return before * surprise > 0.0 && std::abs(before - surprise) < limit; };
  const bool jump = is_pass && agrees(pass_gross_);
  const bool first_was_late = !is_pass && count_[index] < kFew;
  const bool alone = !jump && index > 0 && surprise < 0.0 && (first_was_late || agrees(gross_[index]));
  if (jump) {
    const size_t drafted = std::max(index, last_pass_);
    covariance(0, 0) += kJump * kJump;
    if (drafted > 0) {
      doubt(drafted, std::min(kTwist * std::abs(surprise), kMostTwist));
      yardstick_due_ = true;
    }
  }
  if (alone) doubt(index, surprise);
  const bool believed = jump || alone;
  gross_[index] = believed ? 0.0 : surprise;
  if (is_pass) pass_gross_ = jump ? 0.0 : surprise;
  if (jump) last_pass_ = index;
  return believed;
}

void Costs::observe(size_t index, double seconds) {
  if (!(seconds > 0.0)) return;
  const size_t n = mean_.size();
  const bool is_pass = index < widths_;
  const double surprise = std::log(seconds) - mean_[0] - (index > 0 ? mean_[index] : 0.0);
  const double deviation = std::max(spread_, kLeastSpread), noise = deviation * deviation;
  // No pass of more rows is cheaper than a plain one: then the machine is faster than it was.
  if (is_pass && index > 0 && std::log(seconds) < mean_[0] - kGross * std::sqrt(covariance(0, 0) + noise)) {
    covariance(0, 0) += kJump * kJump;
  }
  double variance = predict(index) + noise;
  if (count_[0] > 0 && (index == 0 || covariance(index, index) < 2.0 * noise)) {
    const double seen = std::min(std::abs(surprise), kMostDeviation);
    spread_ += (1.0 - kSpreadMemory) * (kStandardDeviation * seen - spread_);
  }
  if (std::abs(surprise) <= kGross * std::sqrt(variance)) {
    gross_[index] = 0.0;
    if (is_pass) pass_gross_ = 0.0, last_pass_ = index;
  } else {
    if (believe(index, surprise, kAgree * deviation)) variance = predict(index) + noise;
    // What is still beyond belief counts as so noisy that it is not: the further off, the less it moves.
    variance = std::max(variance, surprise * surprise / (kGross * kGross));
  }
  for (size_t i = 0; i < n; ++i) mean_[i] += gain_[i] * surprise / variance;
  for (size_t i = 0; i < n; ++i) {
    const double shrink = gain_[i] / variance;
    for (size_t j = 0; j < n; ++j) covariance(i, j) -= shrink * gain_[j];
  }
  ++count_[index];
}

}  // namespace dflash
