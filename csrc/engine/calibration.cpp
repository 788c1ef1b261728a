#include "engine/calibration.h"

#include <algorithm>
#include <cmath>

namespace dflash {

namespace {

constexpr double kSlope = 0.8, kSlopeVariance = 0.16;
constexpr double kCommonVariance = 0.25, kOwnVariance = 0.1;  // of intercepts at first: all alike, each its own ...
constexpr double kMostVariance = 0.75;                        // ... and at most, since texts change
constexpr double kDrift = 1e-4;                               // variance an intercept gains in a round
constexpr double kSlopeDrift = 5e-6;
constexpr double kShiftFactor = 2.718281828459045;  // CUSUM tests for odds this much lower or higher ...
constexpr double kFallenEvidence = 6.0;             // ... and believes it at this log-likelihood ratio:
constexpr double kRisenEvidence = 5.0;              // a false alarm in some hundred outcomes, a true one within ten
constexpr double kSurpriseVariance = 0.25;          // that intercepts gain in common then
constexpr double kSurpriseMemory = 0.3;             // and the share of the slots' averages that is kept
constexpr double kSlotMemory = 0.98;
constexpr double kPriorWeight = 3.0;
constexpr double kUnknownAcceptance = 0.5;

double logistic(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace

Calibration::Calibration(int max_depth)
    : mean_(static_cast<size_t>(max_depth) + 1, 0.0),
      covariance_(mean_.size() * mean_.size(), 0.0),
      gain_(mean_.size(), 0.0),
      slot_(static_cast<size_t>(max_depth)) {
  mean_[0] = kSlope;
  covariance(0, 0) = kSlopeVariance;
  for (size_t i = 1; i < mean_.size(); ++i) {
    for (size_t j = 1; j < mean_.size(); ++j) covariance(i, j) = kCommonVariance;
    covariance(i, i) += kOwnVariance;
  }
}

double Calibration::log_odds(float confidence) {
  // Written so that a damaged drafter's NaN is no confidence at all, instead of NaN in the filter for good.
  const double c = confidence > 0.005f ? std::min(static_cast<double>(confidence), 0.995) : 0.005;
  return std::log(c / (1.0 - c));
}

double Calibration::acceptance(int slot, double log_odds) const {
  return logistic(mean_[0] * log_odds + mean_[static_cast<size_t>(slot) + 1]);
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

void Calibration::drift() {
  covariance(0, 0) = std::min(covariance(0, 0) + kSlopeDrift, kSlopeVariance);
  for (size_t i = 1; i < mean_.size(); ++i) {
    if (covariance(i, i) < kMostVariance) covariance(i, i) += kDrift;
  }
}

void Calibration::add_gradient(int slot, double log_odds, double scale, std::vector<double>& gradient) const {
  gradient[0] += scale * log_odds;
  gradient[static_cast<size_t>(slot) + 1] += scale;
}

double Calibration::variance(const std::vector<double>& gradient) const {
  double sum = 0.0;
  for (size_t i = 0; i < mean_.size(); ++i) {
    if (gradient[i] == 0.0) continue;
    for (size_t j = 0; j < mean_.size(); ++j) sum += gradient[i] * covariance(i, j) * gradient[j];
  }
  return sum;
}

// The log-likelihood ratio of this outcome, odds shifted against odds as predicted.
void Calibration::test(double predicted, bool stood) {
  const double down = predicted + (1.0 - predicted) * kShiftFactor, up = predicted * kShiftFactor + 1.0 - predicted;
  fallen_ = std::max(0.0, fallen_ + std::log((stood ? 1.0 : kShiftFactor) / down));
  risen_ = std::max(0.0, risen_ + std::log((stood ? kShiftFactor : 1.0) / up));
  if (fallen_ > kFallenEvidence || risen_ > kRisenEvidence) doubt();
}

// What is believed of all slots in common is uncertain again, up to kMostVariance, so that the next outcomes correct it
// within a few rounds.
void Calibration::doubt() {
  surprise_ = true;
  fallen_ = risen_ = 0.0;
  const double more = std::clamp(kMostVariance - covariance(1, 1), 0.0, kSurpriseVariance);
  for (size_t i = 1; i < mean_.size(); ++i) {
    for (size_t j = 1; j < mean_.size(); ++j) covariance(i, j) += more;
  }
  for (Count& count : slot_) count.stood *= kSurpriseMemory, count.total *= kSurpriseMemory;
}

void Calibration::observe(int slot, double log_odds, bool stood) {
  const size_t own = static_cast<size_t>(slot) + 1;
  const double p = acceptance(slot, log_odds);
  test(p, stood);
  const double information = p * (1.0 - p), error = (stood ? 1.0 : 0.0) - p;
  for (size_t i = 0; i < mean_.size(); ++i) gain_[i] = log_odds * covariance(i, 0) + covariance(i, own);
  const double spread = log_odds * gain_[0] + gain_[own];  // variance of the predicted log-odds
  const double scale = 1.0 / (1.0 + information * spread);
  for (size_t i = 0; i < mean_.size(); ++i) {
    mean_[i] += gain_[i] * error * scale;
    const double shrink = gain_[i] * information * scale;
    for (size_t j = 0; j < mean_.size(); ++j) covariance(i, j) -= shrink * gain_[j];
  }
  Count& count = slot_[static_cast<size_t>(slot)];
  count.stood = count.stood * kSlotMemory + (stood ? 1.0 : 0.0);
  count.total = count.total * kSlotMemory + 1.0;
}

}  // namespace dflash
