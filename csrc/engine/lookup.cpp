#include "engine/lookup.h"

#include <algorithm>
#include <utility>

namespace dflash {

uint32_t LookupProposer::tag(const int32_t* gram) {
  uint64_t h = 0;
  for (int i = 0; i < kGram; ++i) {
    h = (h ^ static_cast<uint32_t>(gram[i])) * 0x9e3779b97f4a7c15u;
    h ^= h >> 29;
  }
  return static_cast<uint32_t>(h >> 32 ^ h);
}

LookupProposer::Slot& LookupProposer::slot(uint32_t tag) {
  const size_t mask = slots_.size() - 1;
  for (size_t i = tag & mask;; i = (i + 1) & mask) {
    if (slots_[i].end == 0 || slots_[i].tag == tag) return slots_[i];
  }
}

void LookupProposer::grow() {
  constexpr size_t kFirst = 1024;
  const std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(std::max(kFirst, 2 * slots_.size())));
  for (const Slot& s : old) {
    if (s.end != 0) slot(s.tag) = s;
  }
}

void LookupProposer::reset() {
  std::fill(slots_.begin(), slots_.end(), Slot{});
  taken_ = indexed_ = before_ = 0;
}

void LookupProposer::truncated(size_t n_tokens) {
  if (n_tokens < indexed_) reset();  // later occurrences have replaced earlier ones: index again
}

LookupProposer::Candidate LookupProposer::find(const std::vector<int32_t>& tokens, int max_tokens) {
  // The last gram is the query: where it goes into the table, its occurrence before this one is found.
  const size_t n = tokens.size();
  for (size_t end = std::max<size_t>(indexed_ + 1, kGram); end <= n; ++end) {
    if (2 * taken_ >= slots_.size()) grow();
    const uint32_t found = tag(tokens.data() + end - kGram);
    Slot& s = slot(found);
    taken_ += s.end == 0 ? 1 : 0;
    before_ = s.end;
    s = {found, static_cast<uint32_t>(end)};
    indexed_ = end;
  }
  Candidate out;
  if (n < kGram || before_ == 0 || max_tokens <= 0) return out;
  const size_t at = before_;
  int match = 0;
  while (match < kMaxMatch && static_cast<size_t>(match) < at &&
         tokens[at - 1 - static_cast<size_t>(match)] == tokens[n - 1 - static_cast<size_t>(match)]) {
    ++match;
  }
  if (match < kGram) return out;  // two grams with one tag
  out.match = match;
  out.tokens.reserve(static_cast<size_t>(max_tokens));
  // A period shorter than max_tokens repeats itself: read on from what was just copied.
  for (int i = 0; i < max_tokens; ++i) {
    const size_t source = at + static_cast<size_t>(i);
    out.tokens.push_back(source < n ? tokens[source] : out.tokens[source - n]);
  }
  return out;
}

}  // namespace dflash
