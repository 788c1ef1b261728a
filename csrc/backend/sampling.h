#pragma once
// What a backend needs to know to draw tokens from rows of logits. What the options mean is said in engine/sampler.h,
// which makes this record; the draw itself is Backend::sample().

#include <cstdint>
#include <vector>

#include "core/error.h"

namespace dflash {

// A token whose logit is changed before the draw.
struct TokenEdit {
  int32_t id = 0;
  int32_t count = 0;  // occurrences in the penalty window of row 0
  float bias = 0.0f;  // added first
};

// Row r stands behind drafts[0..r): its draw, and its penalty window, are those of decoding one token at a time.
struct Sampling {
  float temperature = 0.0f;  // <= 0: the largest logit, lowest id on ties
  int top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  std::vector<uint64_t> draws;   // [rows] 53 random bits: the draw is draws[r] * 2^-53
  std::vector<TokenEdit> edits;  // ids ascending, each once; every id of drafts and leaving among them when penalised
  std::vector<int32_t> drafts;   // [rows - 1] row r's window holds drafts[0..r) besides
  std::vector<int32_t> leaving;  // [rows - 1] and leaving[0..r) no longer (-1: nothing leaves); empty: no penalties
  bool all_rows = false;         // go on behind a draft that does not stand

  int rows() const { return static_cast<int>(draws.size()); }
  bool greedy() const { return temperature <= 0.0f; }
};

// For a row without a finite logit.
[[noreturn]] inline void fail_all_forbidden() {
  fail(
      "sampling: every token is forbidden (logits all -inf or NaN); check logit_bias and logits_hook. Without them the "
      "weights are damaged: copy or convert the target again");
}

}  // namespace dflash
