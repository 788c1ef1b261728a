#pragma once
// Prompt lookup: drafts copied from the session's own tokens after the latest earlier occurrence of the current
// suffix (Saxena, "prompt lookup decoding", 2023). Costs one probe of a hash table a token: a step leaves none of it in
// the near caches, so what counts is how many lines of memory a round touches.

#include <cstddef>
#include <cstdint>
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
  void reset();
  void truncated(size_t n_tokens);  // the timeline was cut to n_tokens

 private:
  struct Slot {
    uint32_t tag = 0;  // of the gram's hash
    uint32_t end = 0;  // index just after its latest occurrence; 0: the slot is free
  };
  static uint32_t tag(const int32_t* gram);
  Slot& slot(uint32_t tag);  // the gram's, or the free one that it would take
  void grow();

  std::vector<Slot> slots_;  // open addressing; a power of two of them, at most half of them taken
  size_t taken_ = 0;
  size_t indexed_ = 0;  // grams ending at or before this index are in the table
  size_t before_ = 0;   // where the gram ending there ended before; 0: nowhere
};

}  // namespace dflash
