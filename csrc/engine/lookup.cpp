#include "engine/lookup.h"

#include <algorithm>

namespace dflash {

uint64_t LookupProposer::key(const int32_t* gram) {
  uint64_t h = 0;
  for (int i = 0; i < kGram; ++i) {
    h = (h ^ static_cast<uint32_t>(gram[i])) * 0x9e3779b97f4a7c15u;
    h ^= h >> 29;
  }
  return h;
}

void LookupProposer::truncated(size_t n_tokens) {
  if (n_tokens < indexed_) reset();  // later occurrences may have replaced earlier ones: index again
}

LookupProposer::Candidate LookupProposer::find(const std::vector<int32_t>& tokens, int max_tokens) {
  // Index every gram except the last one, which is the query itself.
  for (size_t end = std::max<size_t>(indexed_, kGram); end < tokens.size(); ++end) {
    latest_[key(tokens.data() + end - kGram)] = end;
    indexed_ = end + 1;
  }
  Candidate out;
  if (tokens.size() <= kGram || max_tokens <= 0) return out;
  const auto it = latest_.find(key(tokens.data() + tokens.size() - kGram));
  if (it == latest_.end()) return out;
  const size_t at = it->second, n = tokens.size();
  int match = 0;
  while (match < kMaxMatch && static_cast<size_t>(match) < at &&
         tokens[at - 1 - static_cast<size_t>(match)] == tokens[n - 1 - static_cast<size_t>(match)]) {
    ++match;
  }
  if (match < kGram) return out;  // a hash collision
  out.match = match;
  // A period shorter than max_tokens repeats itself: read on from what was just copied.
  for (int i = 0; i < max_tokens; ++i) {
    const size_t source = at + static_cast<size_t>(i);
    out.tokens.push_back(source < n ? tokens[source] : out.tokens[source - n]);
  }
  return out;
}

}  // namespace dflash
