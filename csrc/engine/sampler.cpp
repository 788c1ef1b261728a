#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "core/error.h"

namespace dflash {

bool SamplingParams::plain_argmax() const {
  return greedy() && repetition_penalty == 1.0f && presence_penalty == 0.0f && frequency_penalty == 0.0f &&
         logit_bias.empty() && !logits_hook;
}

void check_sampling(const SamplingParams& p, int n_vocab) {
  auto require = [](bool ok, const char* name, const char* expected, double found) {
    if (!ok) fail(name, ": ", expected, " expected, found ", found);
  };
  require(std::isfinite(p.temperature), "temperature", "a finite number", p.temperature);
  require(p.top_k >= 0, "top_k", "0 (off) or more", p.top_k);
  require(p.top_p > 0.0f && p.top_p <= 1.0f, "top_p", "above 0 and at most 1", p.top_p);
  require(p.min_p >= 0.0f && p.min_p <= 1.0f, "min_p", "0 to 1", p.min_p);
  require(p.repetition_penalty > 0.0f && std::isfinite(p.repetition_penalty), "repetition_penalty", "above 0",
          p.repetition_penalty);
  require(std::isfinite(p.presence_penalty), "presence_penalty", "a finite number", p.presence_penalty);
  require(std::isfinite(p.frequency_penalty), "frequency_penalty", "a finite number", p.frequency_penalty);
  require(p.penalty_last_n >= -1, "penalty_last_n", "-1 (all) or more", p.penalty_last_n);
  for (const auto& [id, bias] : p.logit_bias) {
    require(id >= 0 && id < n_vocab, "logit_bias", "token ids below the vocabulary's size", id);
    require(!std::isnan(bias) && bias < std::numeric_limits<float>::infinity(), "logit_bias",
            "numbers (or -inf to forbid)", bias);
  }
}

double uniform_at(uint64_t seed, uint64_t position) {
  auto mix = [](uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  };
  return static_cast<double>(mix(mix(seed) ^ position) >> 11) * 0x1.0p-53;
}

void Sampler::penalise(const std::vector<int32_t>& history) {
  const SamplingParams& p = params_;
  if (p.repetition_penalty == 1.0f && p.presence_penalty == 0.0f && p.frequency_penalty == 0.0f) return;
  const size_t window = p.penalty_last_n < 0 ? history.size() : static_cast<size_t>(p.penalty_last_n);
  std::unordered_map<int32_t, int> counts;
  for (size_t i = history.size() - std::min(window, history.size()); i < history.size(); ++i) ++counts[history[i]];
  for (const auto& [id, count] : counts) {
    float& logit = row_[static_cast<size_t>(id)];
    logit = logit > 0.0f ? logit / p.repetition_penalty : logit * p.repetition_penalty;
    logit -= p.presence_penalty + p.frequency_penalty * static_cast<float>(count);
  }
}

void Sampler::process(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history) {
  row_.assign(logits, logits + n_vocab);
  for (const auto& [id, bias] : params_.logit_bias) row_[static_cast<size_t>(id)] += bias;
  penalise(history);
  if (params_.logits_hook) params_.logits_hook(history, row_.data(), n_vocab);
}

double Sampler::keep(int64_t n_vocab) {
  const SamplingParams& p = params_;
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n_vocab; ++i) top = std::max(top, row_[static_cast<size_t>(i)]);
  if (!(top > -std::numeric_limits<float>::infinity())) {
    fail("sampling: every token is forbidden (logits all -inf or NaN); check logit_bias and logits_hook");
  }
  // min_p keeps p_i >= min_p * p_max, that is logit_i >= top + T log(min_p).
  const float floor =
      p.min_p > 0.0f ? top + p.temperature * std::log(p.min_p) : -std::numeric_limits<float>::infinity();
  candidates_.clear();
  for (int64_t i = 0; i < n_vocab; ++i) {
    const float logit = row_[static_cast<size_t>(i)];
    if (logit >= floor && logit > -std::numeric_limits<float>::infinity()) {
      candidates_.push_back({static_cast<int32_t>(i), logit});
    }
  }
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  if (p.top_k > 0 && static_cast<size_t>(p.top_k) < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + p.top_k, candidates_.end(), better);
    candidates_.resize(static_cast<size_t>(p.top_k));
  }
  auto weight = [&](const Candidate& c) { return std::exp((static_cast<double>(c.logit) - top) / p.temperature); };
  auto weigh = [&] {
    weights_.clear();
    double sum = 0.0;
    for (const Candidate& c : candidates_) sum += weights_.emplace_back(weight(c));
    return sum;
  };
  if (p.top_p >= 1.0f) {
    // nth_element's order is unspecified: sort a cut list so that the draw is reproducible.
    if (p.top_k > 0) std::sort(candidates_.begin(), candidates_.end(), better);
    return weigh();
  }
  // top_p keeps the shortest list of most probable tokens whose mass reaches top_p. Sort only as far as needed.
  const double total = weigh();
  size_t sorted = 0, kept = 0;
  double mass = 0.0;
  while (kept < candidates_.size() && mass < static_cast<double>(p.top_p) * total) {
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

int32_t Sampler::sample(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history) {
  process(logits, n_vocab, history);
  if (params_.greedy()) {
    const auto best = std::max_element(row_.begin(), row_.end());  // the first of equals: the lowest id
    if (!(*best > -std::numeric_limits<float>::infinity())) {
      fail("sampling: every token is forbidden (logits all -inf or NaN); check logit_bias and logits_hook");
    }
    return static_cast<int32_t>(best - row_.begin());
  }
  const double sum = keep(n_vocab);
  double left = uniform_at(params_.seed, history.size()) * sum;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    left -= weights_[i];
    if (left < 0.0) return candidates_[i].id;
  }
  return candidates_.back().id;  // rounding: u * sum can reach the last cumulative weight
}

std::vector<double> Sampler::distribution(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history) {
  std::vector<double> out(static_cast<size_t>(n_vocab), 0.0);
  if (params_.greedy()) {
    out[static_cast<size_t>(sample(logits, n_vocab, history))] = 1.0;
    return out;
  }
  process(logits, n_vocab, history);
  const double sum = keep(n_vocab);
  for (size_t i = 0; i < candidates_.size(); ++i) out[static_cast<size_t>(candidates_[i].id)] = weights_[i] / sum;
  return out;
}

}  // namespace dflash
