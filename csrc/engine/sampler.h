#pragma once
// One row of target logits -> one token. Pure: the draw at a position depends on (seed, position, history, logits)
// and on nothing else, so speculative and plain decoding draw the same token from the same row.
//
// Order: logit bias, repetition / presence / frequency penalties, hook, temperature, min_p, top_k, top_p, draw.

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "backend/cpu/row_sampler.h"

namespace dflash {

struct SamplingParams {
  float temperature = 0.0f;  // <= 0: greedy
  int top_k = 0;             // 0: off
  float top_p = 1.0f;        // 1: off
  float min_p = 0.0f;        // 0: off; relative to the most probable token
  uint64_t seed = 0;
  float repetition_penalty = 1.0f;  // divides positive logits of seen tokens, multiplies negative ones (CTRL)
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int penalty_last_n = -1;  // tokens looked back at, prompt included; -1: all
  std::map<int32_t, float> logit_bias;
  // Called with (all tokens so far, logits [n_vocab], writable); the one place for grammars.
  std::function<void(const std::vector<int32_t>&, float*, int64_t)> logits_hook;

  bool greedy() const { return temperature <= 0.0f; }
  // True when the untouched argmax is the answer.
  bool plain_argmax() const;
};

// Throws Error naming the parameter, what was expected and what was found.
void check_sampling(const SamplingParams& p, int n_vocab);

// 53 random bits, a hash of (seed, position): SplitMix64's finaliser applied twice. And as a number in [0, 1).
uint64_t random_bits_at(uint64_t seed, uint64_t position);
double uniform_at(uint64_t seed, uint64_t position);

class Sampler {
 public:
  explicit Sampler(SamplingParams params) : params_(std::move(params)) {}
  const SamplingParams& params() const { return params_; }

  // What a backend needs to draw the tokens behind history, history + drafts[0], ... (Backend::sample).
  Sampling rows(const std::vector<int32_t>& history, const std::vector<int32_t>& drafts) const;

  // One row on the host, hook included. logits [n_vocab] is left unchanged; history holds every token before the one
  // drawn.
  int32_t sample(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history);

  // The distribution sample() draws from, as probabilities [n_vocab].
  std::vector<double> distribution(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history);

 private:
  Sampling process(const float* logits, int64_t n_vocab, const std::vector<int32_t>& history);

  SamplingParams params_;
  cpu::RowSampler row_;
};

}  // namespace dflash
