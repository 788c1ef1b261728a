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
  struct Nucleus {  // what top_p keeps: bins below last_bin, and the first of it
    size_t last_bin = 0, in_last = 0;
    double mass = 0.0;
  };
  static bool better(const Candidate& a, const Candidate& b);  // more probable; ties: the lower id
  int32_t largest() const;
  void collect(const Sampling& s);
  double weight(const Sampling& s, const Candidate& c) const;
  size_t bin(const Sampling& s, const Candidate& c) const;
  void sort_bin(const Sampling& s, size_t which);
  Nucleus nucleus(const Sampling& s);
  void cut_sorted(const Sampling& s);

  std::vector<float> row_;
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;    // of candidates_, unnormalised
  std::vector<double> bins_;       // mass by bin of probability
  std::vector<Candidate> in_bin_;  // of the bin looked at last
  float top_ = 0.0f;               // the row's largest logit
};

}  // namespace dflash::cpu
