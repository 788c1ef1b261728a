#pragma once
// What happened and what it cost. Plain numbers; Python turns them into tables.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/depth_policy.h"

namespace dflash {

struct Tally {  // of one width or one draft count
  int64_t calls = 0;
  double seconds = 0.0;
};

struct Stats {
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;  // of the prompt, found in the caches
  int64_t generated_tokens = 0;
  int64_t steps = 0;    // target passes that committed tokens after the first
  int64_t drafted = 0;  // drafts verified
  int64_t accepted = 0;
  int64_t proposed = 0;                                      // slots the drafter computed, verified or not
  int64_t lookup_drafted = 0, lookup_accepted = 0;           // the share of prompt lookup
  int64_t left_out_tokens = 0;                               // committed without the drafter, which slept
  std::vector<int64_t> drafted_per_slot, accepted_per_slot;  // [block_size - 1], slot 1 first, drafter only
  std::vector<int64_t> depth_histogram;                      // [block_size] steps that verified n drafts
  double prefill_seconds = 0, draft_seconds = 0, verify_seconds = 0, sample_seconds = 0, ingest_seconds = 0;
  std::vector<Tally> verify_by_width;                            // [block_size + 1] target pass of w rows
  std::vector<Tally> draft_by_count;                             // [block_size] drafter run for n slots
  std::vector<int64_t> experts_by_width, expert_calls_by_width;  // distinct experts, summed over layers and calls

  explicit Stats(int block_size = 1) { resize(block_size); }
  void resize(int block_size);
  void add(const Stats& other);
};

}  // namespace dflash
