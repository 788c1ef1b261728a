#include "engine/stats.h"

namespace dflash {

namespace {

template <typename T>
void add_to(std::vector<T>& into, const std::vector<T>& from) {
  for (size_t i = 0; i < into.size() && i < from.size(); ++i) into[i] += from[i];
}

void add_to(std::vector<Tally>& into, const std::vector<Tally>& from) {
  for (size_t i = 0; i < into.size() && i < from.size(); ++i) {
    into[i].calls += from[i].calls;
    into[i].seconds += from[i].seconds;
  }
}

}  // namespace

void Stats::resize(int block_size) {
  const size_t block = static_cast<size_t>(block_size);
  drafted_per_slot.assign(block - 1, 0);
  accepted_per_slot.assign(block - 1, 0);
  depth_histogram.assign(block, 0);
  verify_by_width.assign(block + 1, {});
  draft_by_count.assign(block, {});
  experts_by_width.assign(block + 1, 0);
  expert_calls_by_width.assign(block + 1, 0);
}

void Stats::add(const Stats& o) {
  prompt_tokens += o.prompt_tokens;
  cached_tokens += o.cached_tokens;
  generated_tokens += o.generated_tokens;
  steps += o.steps;
  drafted += o.drafted;
  accepted += o.accepted;
  proposed += o.proposed;
  left_out_tokens += o.left_out_tokens;
  lookup_drafted += o.lookup_drafted;
  lookup_accepted += o.lookup_accepted;
  add_to(drafted_per_slot, o.drafted_per_slot);
  add_to(accepted_per_slot, o.accepted_per_slot);
  add_to(depth_histogram, o.depth_histogram);
  prefill_seconds += o.prefill_seconds;
  draft_seconds += o.draft_seconds;
  verify_seconds += o.verify_seconds;
  sample_seconds += o.sample_seconds;
  ingest_seconds += o.ingest_seconds;
  add_to(verify_by_width, o.verify_by_width);
  add_to(draft_by_count, o.draft_by_count);
  add_to(experts_by_width, o.experts_by_width);
  add_to(expert_calls_by_width, o.expert_calls_by_width);
}

}  // namespace dflash
