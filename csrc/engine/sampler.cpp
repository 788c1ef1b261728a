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

uint64_t random_bits_at(uint64_t seed, uint64_t position) {
  auto mix = [](uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  };
  return mix(mix(seed) ^ position) >> 11;
}

double uniform_at(uint64_t seed, uint64_t position) {
  return static_cast<double>(random_bits_at(seed, position)) * 0x1.0p-53;
}

Sampling Sampler::rows(const std::vector<int32_t>& history, const std::vector<int32_t>& drafts) const {
  const SamplingParams& p = params_;
  Sampling s;
  s.temperature = p.temperature;
  s.top_k = p.top_k;
  s.top_p = p.top_p;
  s.min_p = p.min_p;
  s.drafts = drafts;
  const size_t n = history.size();
  for (size_t r = 0; r <= drafts.size(); ++r) s.draws.push_back(random_bits_at(p.seed, n + r));

  std::unordered_map<int32_t, TokenEdit> edits;
  for (const auto& [id, bias] : p.logit_bias) edits[id].bias = bias;
  if (p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f) {
    s.repetition_penalty = p.repetition_penalty;
    s.presence_penalty = p.presence_penalty;
    s.frequency_penalty = p.frequency_penalty;
    const size_t window = p.penalty_last_n < 0 ? n + drafts.size() : static_cast<size_t>(p.penalty_last_n);
    for (size_t i = n - std::min(window, n); i < n; ++i) ++edits[history[i]].count;
    for (size_t r = 0; r < drafts.size(); ++r) {  // from row r to row r + 1
      const size_t end = n + r;                   // tokens before row r
      const size_t oldest = end - std::min(window, end);
      s.leaving.push_back(end < window ? -1 : oldest < n ? history[oldest] : drafts[oldest - n]);
      edits.try_emplace(drafts[r]);
    }
  }
  for (auto& [id, edit] : edits) {
    edit.id = id;
    s.edits.push_back(edit);
  }
  std::sort(s.edits.begin(), s.edits.end(), [](const TokenEdit& a, const TokenEdit& b) { return a.id < b.id; });
  return s;
}

Sampling Sampler::process(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history) {
  Sampling s = rows(history, {});
  float* row = row_.edit(s, 0, logits, n_vocab);
  if (!params_.logits_hook) return s;
  params_.logits_hook(history, row, n_vocab);
  for (int64_t i = 0; i < n_vocab; ++i) {
    if (!(row[i] < std::numeric_limits<float>::infinity())) {
      fail("logits_hook: numbers (or -inf to forbid) expected, found ", row[i], " for token ", i);
    }
  }
  return s;
}

int32_t Sampler::sample(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history) {
  return row_.draw(process(logits, n_vocab, history), 0);
}

std::vector<double> Sampler::distribution(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history) {
  return row_.distribution(process(logits, n_vocab, history));
}

}  // namespace dflash
