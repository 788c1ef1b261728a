#pragma once
// What a round costs, from noisy timings of a machine whose speed changes.
//
// log seconds = log pace(t) + log cost(index) + noise: the pace, seconds of a plain round, is one factor of the whole
// machine (its clock, other load, the length of the context) that all indices share; a cost is relative to a plain
// round, whose own is 1 by definition. Decisions use costs alone, so a slow stretch of the machine moves the pace and
// nothing else. A Kalman filter over all of them takes one timing at a time: the pace may wander quickly, costs slowly,
// and a timing tells of a cost as much as is known of the pace at that moment, so a cost is learnt where plain and
// drafted rounds stand side by side. Neighbouring widths are correlated and speak for each other.

#include <cstddef>
#include <vector>

namespace dflash {

// Before anything is measured: costs relative to a target pass of one row.
struct CostPrior {
  std::vector<double> verify;  // [max_depth + 1] width 1 .. max_depth + 1
  double draft = 0.2;          // one drafter run
};

class Costs {
 public:
  explicit Costs(const CostPrior& prior);

  // Indices of what is timed.
  size_t pass(int width) const { return static_cast<size_t>(width) - 1; }
  size_t draft(int n) const { return widths_ + static_cast<size_t>(n) - 1; }
  size_t ingest() const { return 2 * widths_ - 1; }  // a token that the drafter takes in
  size_t settling() const { return 2 * widths_; }    // the plain round after a drafted one

  void observe(size_t index, double seconds);
  void drift();                   // a round went by
  double at(size_t index) const;  // seconds
  // The same, but an index hardly measured is given the benefit of the doubt, so that it is tried where it may pay.
  double hopeful(size_t index) const;
  size_t count(size_t index) const { return count_[index]; }
  // Variance of the log of (seconds of a pass + a draft), the draft being that share, over those of a plain round.
  double variance(size_t pass, size_t draft, double share) const;
  // Whether the machine seems to have changed while drafting, so that a plain round should be measured; asking clears.
  bool take_yardstick_due() {
    const bool due = yardstick_due_;
    yardstick_due_ = false;
    return due;
  }

 private:
  double& covariance(size_t i, size_t j) { return covariance_[i * mean_.size() + j]; }
  double covariance(size_t i, size_t j) const { return covariance_[i * mean_.size() + j]; }
  double predict(size_t index);
  void doubt(size_t index, double by);
  bool believe(size_t index, double surprise, double limit);

  const size_t widths_;
  std::vector<double> mean_;        // [2 widths + 1] log of the pace, then of the costs of indices 1 ..
  std::vector<double> covariance_;  // [2 widths + 1, 2 widths + 1]
  std::vector<double> kernel_;      // likewise: how costs change together
  std::vector<double> gain_;        // [2 widths + 1] scratch of observe()
  std::vector<double> gross_;       // [2 widths + 1] by index, the last surprise, if it was not believed
  std::vector<size_t> count_;       // [2 widths + 1] timings
  double spread_ = 0.05;            // of single timings, relative
  double pass_gross_ = 0.0;         // of the last pass, whatever its width
  size_t last_pass_ = 0;            // its index
  bool yardstick_due_ = false;      // a plain round should be measured
};

}  // namespace dflash
