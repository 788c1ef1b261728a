#pragma once
// Prompt lookup: drafts copied from the session's own tokens after the latest earlier occurrence of the current
// suffix (Saxena, "prompt lookup decoding", 2023). Costs a hash probe.

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace dflash {

class LookupProposer {
 public:
  static constexpr int kGram = 3;       // tokens that must match to be a candidate
  static constexpr int kMaxMatch = 32;  // how far a match is followed backwards

  struct Candidate {
    int match = 0;                // tokens of the suffix that agree (>= kGram), 0 = none
    std::vector<int32_t> tokens;  // what followed then
  };

  // tokens is the whole timeline; it may have grown or been cut since the last call.
  Candidate find(const std::vector<int32_t>& tokens, int max_tokens);
  void reset() { latest_.clear(), indexed_ = 0; }
  void truncated(size_t n_tokens);  // the timeline was cut to n_tokens

 private:
  static uint64_t key(const int32_t* gram);
  std::unordered_map<uint64_t, size_t> latest_;  // hash of a gram -> index just after its latest occurrence
  size_t indexed_ = 0;                           // grams ending before this index are in the map
};

}  // namespace dflash
