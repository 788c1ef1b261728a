#pragma once
// Which drafts stand, as pure functions.
//
// The target's own token y_i is determined row by row (its argmax, or its draw at that position); draft i stands when
// it equals y_i, and the first y that differs is committed in its place. For an argmax proposal this is exactly
// rejection sampling with a one-hot q: accept with probability P(draft), otherwise draw from P without it
// (Leviathan et al., arXiv 2211.17192, with q a point mass). Since y_i comes from (seed, position), the committed
// tokens are those of plain decoding, whatever was drafted.

#include <cstdint>
#include <vector>

namespace dflash {

struct Accepted {
  int count = 0;                // drafts that stand
  std::vector<int32_t> tokens;  // those drafts, then the target's own token (unless cut)
};

// target(i) gives the target's token after anchor and drafts[0..i); it is called in order, and only while the drafts
// before i stand. stop(token) cuts: nothing follows a token for which it holds.
template <typename TargetToken, typename Stop>
Accepted accept_matching(const std::vector<int32_t>& drafts, TargetToken&& target, Stop&& stop) {
  Accepted out;
  for (size_t i = 0;; ++i) {
    const int32_t y = target(static_cast<int>(i));
    out.tokens.push_back(y);
    const bool stands = i < drafts.size() && y == drafts[i];
    if (stands) ++out.count;
    if (!stands || stop(y)) return out;
  }
}

}  // namespace dflash
