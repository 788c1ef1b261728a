#pragma once
// P(a slot's draft stands | those before it stood, the drafter gave it probability c).
//
// Logistic regression on the log-odds of c: an intercept for each slot and one slope (Platt scaling). It is brought up
// to date one outcome at a time as an extended Kalman filter (dynamic logistic regression: Penny and Roberts 1999), so
// it also says how sure it is. Slow changes are followed by a little variance added every round. Sudden ones, which the
// confidences do not tell, are found by two CUSUM tests (Page 1954): one sums the evidence that drafts stand less often
// than predicted, the other that they stand more often. Either, once strong, makes the filter unsure again.

#include <cstddef>
#include <vector>

namespace dflash {

class Calibration {
 public:
  explicit Calibration(int max_depth);

  static double log_odds(float confidence);  // what the functions below take
  double acceptance(int slot, double log_odds) const;
  std::vector<double> averages(int slots) const;  // of slots 1 .. slots, whatever the confidence

  void observe(int slot, double log_odds, bool stood);
  void drift();  // a round went by
  // Whether outcomes have contradicted the predictions since this was last asked.
  bool take_surprise() {
    const bool surprise = surprise_;
    surprise_ = false;
    return surprise;
  }

  double evidence_of_rise() const { return risen_; }  // log-likelihood ratio, not believed yet
  // Adds scale * d log-odds(slot) / d parameters to gradient [n_parameters()]; the variance of a quantity with that
  // gradient.
  void add_gradient(int slot, double log_odds, double scale, std::vector<double>& gradient) const;
  double variance(const std::vector<double>& gradient) const;
  size_t n_parameters() const { return mean_.size(); }

 private:
  struct Count {
    double stood = 0.0, total = 0.0;
  };
  void test(double predicted, bool stood);
  void doubt();
  double& covariance(size_t i, size_t j) { return covariance_[i * mean_.size() + j]; }
  double covariance(size_t i, size_t j) const { return covariance_[i * mean_.size() + j]; }

  std::vector<double> mean_;           // [1 + max_depth] slope, then an intercept for each slot
  std::vector<double> covariance_;     // [1 + max_depth, 1 + max_depth]
  std::vector<double> gain_;           // [1 + max_depth] scratch of observe()
  std::vector<Count> slot_;            // [max_depth] fading, whatever the confidence
  double fallen_ = 0.0, risen_ = 0.0;  // CUSUM: log-likelihood ratios, never below 0
  bool surprise_ = false;
};

}  // namespace dflash
