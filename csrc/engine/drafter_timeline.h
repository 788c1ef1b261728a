#pragma once
// Which part of the text the drafter has. Tokens below settled() are in its cache or were left out for good; those of
// the next pending() wait with their taps. While drafting is parked far from paying, the text may go on without the
// drafter: what it missed closes up, so its positions (cache and RoPE) count only what it has. That changes drafts,
// never output.

#include <algorithm>
#include <vector>

namespace dflash {

class DrafterTimeline {
 public:
  int settled() const { return settled_; }
  int pending() const { return pending_; }
  int reach() const { return settled_ + pending_; }
  int cached() const { return settled_ - left_out_; }  // tokens in its cache: the position of the next one there
  int left_out() const { return left_out_; }

  void keep(int tokens) { pending_ += tokens; }  // their taps wait
  void take_in() {                               // all that wait are in the cache now
    settled_ += pending_;
    pending_ = 0;
  }
  // Tokens whose taps were not taken; those that wait would be separated from what follows, so they go as well.
  void leave_out(int tokens) {
    tokens += pending_;
    pending_ = 0;
    if (!gaps_.empty() && gaps_.back().first + gaps_.back().tokens == settled_) {
      gaps_.back().tokens += tokens;
    } else {
      gaps_.push_back({settled_, tokens});
    }
    settled_ += tokens;
    left_out_ += tokens;
  }
  // Forgets everything from that token of the text on.
  void rewind(int pos) {
    if (pos > settled_) {
      pending_ = std::min(pending_, pos - settled_);
      return;
    }
    settled_ = pos;
    pending_ = 0;
    while (!gaps_.empty() && gaps_.back().first + gaps_.back().tokens > pos) {
      Gap& last = gaps_.back();
      const int kept = std::max(0, pos - last.first);
      left_out_ -= last.tokens - kept;
      last.tokens = kept;
      if (kept > 0) break;
      gaps_.pop_back();
    }
  }

 private:
  struct Gap {
    int first = 0, tokens = 0;  // of the text
  };
  std::vector<Gap> gaps_;  // in order, apart from each other
  int settled_ = 0, pending_ = 0, left_out_ = 0;
};

}  // namespace dflash
