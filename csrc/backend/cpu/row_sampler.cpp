#include "backend/cpu/row_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace dflash::cpu {

namespace {

constexpr double kRarest = -31.1916;  // -45 log(2): log of the smallest weight that is drawn
constexpr double kBinsPerE = 64.0;    // bins of probability for each factor of e, as on the GPU
constexpr size_t kBins = 2048;        // > -kRarest * kBinsPerE

}  // namespace

bool RowSampler::better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

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

// Tokens that survive min_p and top_k, with their weights exp((logit - top) / T): in order of id, or of probability
// where top_k asks for it. Those rarer than 2^-45 of the most probable one are left out, as on the GPU.
void RowSampler::collect(const Sampling& s) {
  float top = -std::numeric_limits<float>::infinity();
  for (const float logit : row_) top = std::max(top, logit);
  if (!(top > -std::numeric_limits<float>::infinity())) fail_all_forbidden();
  // min_p keeps p_i >= min_p * p_max, that is logit_i >= top + T log(min_p).
  const double least = std::max(kRarest, s.min_p > 0.0f ? std::log(static_cast<double>(s.min_p)) : kRarest);
  float floor = static_cast<float>(top + s.temperature * least);
  candidates_.clear();
  const size_t k = s.top_k > 0 ? static_cast<size_t>(s.top_k) : row_.size();
  const size_t room = k < row_.size() ? std::max<size_t>(4 * k, 256) : row_.size() + 1;
  const auto cut = [&] {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(k - 1), candidates_.end(),
                     better);
    candidates_.resize(k);
  };
  for (size_t i = 0; i < row_.size(); ++i) {
    if (!(row_[i] >= floor)) continue;
    candidates_.push_back({static_cast<int32_t>(i), row_[i]});
    if (candidates_.size() < room) continue;
    cut();
    floor = candidates_.back().logit;  // the k-th best so far: whatever is below is out
  }
  if (candidates_.size() > k) cut();
  if (s.top_k > 0) std::sort(candidates_.begin(), candidates_.end(), better);
  top_ = top;
  weights_.resize(candidates_.size());
  for (size_t i = 0; i < candidates_.size(); ++i) weights_[i] = weight(s, candidates_[i]);
}

double RowSampler::weight(const Sampling& s, const Candidate& c) const {
  return std::exp((static_cast<double>(c.logit) - top_) / s.temperature);
}

size_t RowSampler::bin(const Sampling& s, const Candidate& c) const {
  return static_cast<size_t>((static_cast<double>(top_) - c.logit) / s.temperature * kBinsPerE);
}

// Candidates of one bin, the most probable first.
void RowSampler::sort_bin(const Sampling& s, size_t which) {
  in_bin_.clear();
  for (const Candidate& c : candidates_) {
    if (bin(s, c) == which) in_bin_.push_back(c);
  }
  std::sort(in_bin_.begin(), in_bin_.end(), better);
}

// top_p keeps the shortest list of most probable tokens whose mass reaches top_p. Only the bin where that happens is
// sorted.
RowSampler::Nucleus RowSampler::nucleus(const Sampling& s) {
  bins_.assign(kBins, 0.0);
  double total = 0.0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    bins_[bin(s, candidates_[i])] += weights_[i];
    total += weights_[i];
  }
  const double wanted = static_cast<double>(s.top_p) * total;
  Nucleus found;
  while (found.last_bin + 1 < kBins && found.mass + bins_[found.last_bin] < wanted) {
    found.mass += bins_[found.last_bin++];
  }
  sort_bin(s, found.last_bin);
  while (found.in_last < in_bin_.size() && (found.mass < wanted || found.in_last == 0)) {
    found.mass += weight(s, in_bin_[found.in_last++]);
  }
  return found;
}

// With top_k the list is short and sorted: top_p cuts it where it stands.
void RowSampler::cut_sorted(const Sampling& s) {
  const double wanted = s.top_p * std::accumulate(weights_.begin(), weights_.end(), 0.0);
  size_t kept = 0;
  for (double mass = 0.0; kept < weights_.size() && (mass < wanted || kept == 0); ++kept) mass += weights_[kept];
  candidates_.resize(kept);
  weights_.resize(kept);
}

int32_t RowSampler::draw(const Sampling& s, int r) {
  if (s.greedy()) return largest();
  collect(s);
  const double u = static_cast<double>(s.draws[static_cast<size_t>(r)]) * 0x1.0p-53;
  if (s.top_p < 1.0f && s.top_k <= 0) {
    const Nucleus kept = nucleus(s);
    double left = u * kept.mass;
    size_t b = 0;
    while (b < kept.last_bin && left >= bins_[b]) left -= bins_[b++];
    if (b < kept.last_bin) sort_bin(s, b);  // else it is the last one that is sorted already
    const size_t n = b < kept.last_bin ? in_bin_.size() : kept.in_last;
    for (size_t i = 0; i + 1 < n; ++i) {
      left -= weight(s, in_bin_[i]);
      if (left < 0.0) return in_bin_[i].id;
    }
    return in_bin_[n - 1].id;  // rounding: the sum may fall short of left
  }
  if (s.top_p < 1.0f) cut_sorted(s);
  double left = u * std::accumulate(weights_.begin(), weights_.end(), 0.0);
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
  collect(s);
  if (s.top_p < 1.0f && s.top_k <= 0) {
    const Nucleus kept = nucleus(s);
    for (size_t i = 0; i < candidates_.size(); ++i) {
      if (bin(s, candidates_[i]) < kept.last_bin) out[static_cast<size_t>(candidates_[i].id)] = weights_[i] / kept.mass;
    }
    for (size_t i = 0; i < kept.in_last; ++i) {
      out[static_cast<size_t>(in_bin_[i].id)] = weight(s, in_bin_[i]) / kept.mass;
    }
    return out;
  }
  if (s.top_p < 1.0f) cut_sorted(s);
  const double sum = std::accumulate(weights_.begin(), weights_.end(), 0.0);
  for (size_t i = 0; i < candidates_.size(); ++i) out[static_cast<size_t>(candidates_[i].id)] = weights_[i] / sum;
  return out;
}

}  // namespace dflash::cpu
