#include "backend/cpu/row_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dflash::cpu {

float* RowSampler::edit(const Sampling& s, int r, const float* logits, int64_t n_vocab) {
  row_.assign(logits, logits + n_vocab);
  const size_t behind = s.leaving.empty() ? 0 : static_cast<size_t>(r);
  for (const TokenEdit& e : s.edits) {
    float& logit = row_[static_cast<size_t>(e.id)];
    logit += e.bias;
    int count = e.count;
    for (size_t i = 0; i < behind; ++i) count += (s.drafts[i] == e.id ? 1 : 0) - (s.leaving[i] == e.id ? 1 : 0);
    if (count == 0) continue;
    logit = logit > 0.0f ? logit / s.repetition_penalty : logit * s.repetition_penalty;
    logit -= s.presence_penalty + s.frequency_penalty * static_cast<float>(count);
  }
  return row_.data();
}

int32_t RowSampler::largest() const {
  const auto best = std::max_element(row_.begin(), row_.end());  // the first of equals: the lowest id
  if (!(*best > -std::numeric_limits<float>::infinity())) fail_all_forbidden();
  return static_cast<int32_t>(best - row_.begin());
}

double RowSampler::keep(const Sampling& s) {
  float top = -std::numeric_limits<float>::infinity();
  for (const float logit : row_) top = std::max(top, logit);
  if (!(top > -std::numeric_limits<float>::infinity())) fail_all_forbidden();
  // min_p keeps p_i >= min_p * p_max, that is logit_i >= top + T log(min_p).
  const float floor =
      s.min_p > 0.0f ? top + s.temperature * std::log(s.min_p) : -std::numeric_limits<float>::infinity();
  candidates_.clear();
  for (size_t i = 0; i < row_.size(); ++i) {
    const float logit = row_[i];
    if (logit >= floor && logit > -std::numeric_limits<float>::infinity()) {
      candidates_.push_back({static_cast<int32_t>(i), logit});
    }
  }
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  if (s.top_k > 0 && static_cast<size_t>(s.top_k) < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + s.top_k, candidates_.end(), better);
    candidates_.resize(static_cast<size_t>(s.top_k));
  }
  auto weight = [&](const Candidate& c) { return std::exp((static_cast<double>(c.logit) - top) / s.temperature); };
  auto weigh = [&] {
    weights_.clear();
    double sum = 0.0;
    for (const Candidate& c : candidates_) sum += weights_.emplace_back(weight(c));
    return sum;
  };
  if (s.top_p >= 1.0f) {
    // nth_element's order is unspecified: sort a cut list so that the draw is reproducible.
    if (s.top_k > 0) std::sort(candidates_.begin(), candidates_.end(), better);
    return weigh();
  }
  // top_p keeps the shortest list of most probable tokens whose mass reaches top_p. Sort only as far as needed.
  const double total = weigh();
  size_t sorted = 0, kept = 0;
  double mass = 0.0;
  while (kept < candidates_.size() && mass < static_cast<double>(s.top_p) * total) {
    if (kept == sorted) {
      sorted = std::min(candidates_.size(), std::max<size_t>(64, sorted * 4));
      std::partial_sort(candidates_.begin() + static_cast<std::ptrdiff_t>(kept),
                        candidates_.begin() + static_cast<std::ptrdiff_t>(sorted), candidates_.end(), better);
    }
    mass += weight(candidates_[kept++]);
  }
  candidates_.resize(kept);
  return weigh();
}

int32_t RowSampler::draw(const Sampling& s, int r) {
  if (s.greedy()) return largest();
  const double sum = keep(s);
  double left = static_cast<double>(s.draws[static_cast<size_t>(r)]) * 0x1.0p-53 * sum;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    left -= weights_[i];
    if (left < 0.0) return candidates_[i].id;
  }
  return candidates_.back().id;  // rounding: u * sum can reach the last cumulative weight
}

std::vector<double> RowSampler::distribution(const Sampling& s) {
  std::vector<double> out(row_.size(), 0.0);
  if (s.greedy()) {
    out[static_cast<size_t>(largest())] = 1.0;
    return out;
  }
  const double sum = keep(s);
  for (size_t i = 0; i < candidates_.size(); ++i) out[static_cast<size_t>(candidates_[i].id)] = weights_[i] / sum;
  return out;
}

}  // namespace dflash::cpu
