#pragma once
// One row of logits -> one token on the host, from a Sampling record. The reference for every other backend.

#include <cstdint>
#include <vector>

#include "backend/sampling.h"

namespace dflash::cpu {

class RowSampler {
 public:
  // A copy of logits [n_vocab] with the bias and the penalties of row r; writable until the next call.
  float* edit(const Sampling& s, int r, const float* logits, int64_t n_vocab);
  // The token of row r, drawn from the edited row.
  int32_t draw(const Sampling& s, int r);
  // The distribution draw() draws from, as probabilities [n_vocab].
  std::vector<double> distribution(const Sampling& s);

 private:
  struct Candidate {
    int32_t id;
    float logit;
  };
  // Fills candidates_ and weights_ (unnormalised) of the tokens that survive min_p, top_k and top_p; their sum.
  double keep(const Sampling& s);
  int32_t largest() const;

  std::vector<float> row_;
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;
};

}  // namespace dflash::cpu
