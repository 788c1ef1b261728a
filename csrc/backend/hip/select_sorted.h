#pragma once
// The router's choice where each lane's experts are sorted once (NVIDIA: on gfx1151 the lists would lie in scratch).

#include "backend/hip/group_few.h"

namespace dflash::hip {

// A lane's experts l, l + 32, ... in descending order of their keys, ties to the lowest id.
struct LaneExperts {
  uint32_t key[kExpertsPerLane];
  int id[kExpertsPerLane];

  LaneExperts() = default;
  __device__ explicit LaneExperts(const uint32_t (&keys)[kExpertsPerLane]) {
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      key[i] = keys[i];
      id[i] = i * gpu::kWave + gpu::lane();
    }
    static_assert(kExpertsPerLane == 8, "Batcher's network for eight");
    order(0, 1), order(2, 3), order(4, 5), order(6, 7);
    order(0, 2), order(1, 3), order(4, 6), order(5, 7);
    order(1, 2), order(5, 6);
    order(0, 4), order(1, 5), order(2, 6), order(3, 7);
    order(2, 4), order(3, 5);
    order(1, 2), order(3, 4), order(5, 6);
  }

  __device__ inline void drop_first(bool really) {
#pragma unroll
    for (int i = 0; i + 1 < kExpertsPerLane; ++i) {
      key[i] = really ? key[i + 1] : key[i];
      id[i] = really ? id[i + 1] : id[i];
    }
    if (really) key[kExpertsPerLane - 1] = 0;
  }

 private:
  __device__ inline void order(int a, int b) {
    const bool swap = key[b] > key[a] || (key[b] == key[a] && id[b] < id[a]);
    const uint32_t k = key[a];
    const int i = id[a];
    key[a] = swap ? key[b] : k;
    id[a] = swap ? id[b] : i;
    key[b] = swap ? k : key[b];
    id[b] = swap ? i : id[b];
  }
};

// A wave: the experts of slots [first, end), in descending order (as select_experts, but the lists are sorted once);
// lane i ends with slot i and keeps `mine` for earlier ones. Those chosen leave the lists.
[[maybe_unused]] __device__ inline int select_sorted(LaneExperts& list, int end, int first = 0, int mine = 0) {
#pragma unroll 1
  for (int slot = first; slot < end; ++slot) {
    const uint32_t most = gpu::wave_most(list.key[0]);
    uint32_t lanes = gpu::ballot(list.key[0] == most);
    if ((lanes & (lanes - 1)) != 0) {  // equal keys: the lowest id
      const uint32_t most_left =
          gpu::wave_most(list.key[0] == most ? static_cast<uint32_t>(kMaxExperts - list.id[0]) : 0u);
      lanes = gpu::ballot(list.key[0] == most && static_cast<uint32_t>(kMaxExperts - list.id[0]) == most_left);
    }
    const int id = gpu::shuffle(list.id[0], __ffs(static_cast<int>(lanes)) - 1);
    list.drop_first((lanes >> gpu::lane() & 1u) != 0);
    if (gpu::lane() == slot) mine = id;
  }
  return mine;
}

// values [n_expert] or null
[[maybe_unused]] __device__ inline void load_experts(const float* values, int n_expert, float (&to)[kExpertsPerLane]) {
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    const int e = gpu::lane() + i * gpu::kWave;
    to[i] = values != nullptr && e < n_expert ? gpu::load_fresh(values + e) : 0.0f;
  }
}

// The choice for the rows of a verify step: waves 0 .. rows - 1 choose for a row each and keep its logits for the
// weights, which are not read again behind the expert weights.
template <int MaxRows>
class RowChoice {
 public:
  // Before the wait for the kernel before.
  __device__ inline explicit RowChoice(const FewChoice& c) : c_(c), chooses_(gpu::wave() < c.rows) {
    if (chooses_) load_experts(c.bias, c.n_expert, bias_);
  }
  __device__ inline void load() {
    if (chooses_) load_experts(c_.logits + gpu::wave() * c_.n_expert, c_.n_expert, logit_);
  }
  // The expert of row 0's slot `slot`, to every thread of the block, sooner than the rest; with a barrier. Items begin
  // with row 0's slots, so it is item `slot`.
  __device__ inline int first_row(int slot, int* shared) {
    sort();
    if (gpu::wave() == 0) {
      had_ = slot + 1;
      mine_ = select_sorted(list_, had_);
      if (gpu::lane() == slot) *shared = mine_;
    }
    __syncthreads();
    return *shared;
  }
  // All but the weights; with barriers.
  __device__ inline void group(Grouping<MaxRows>& g) {
    sort();
    if (chooses_) {
      mine_ = select_sorted(list_, c_.top_k, had_, mine_);
      if (gpu::lane() < c_.top_k) g.chosen[gpu::wave() * c_.top_k + gpu::lane()] = static_cast<int16_t>(mine_);
    }
    __syncthreads();
    group_pairs(c_.rows, c_.top_k, g);
  }
  __device__ inline void weigh(Grouping<MaxRows>& g) {
    if (!chooses_) return;
    const float weight = chosen_weight(logit_, mine_, c_.top_k);
    if (gpu::lane() < c_.top_k) g.weight[gpu::wave() * c_.top_k + gpu::lane()] = weight;
  }

 private:
  __device__ inline void sort() {
    if (!chooses_ || sorted_) return;
    uint32_t key[kExpertsPerLane] = {};
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      if (gpu::lane() + i * gpu::kWave < c_.n_expert) key[i] = choice_key(logit_[i], bias_[i]);
    }
    list_ = LaneExperts(key);
    sorted_ = true;
  }

  const FewChoice& c_;
  bool chooses_, sorted_ = false;
  LaneExperts list_;
  int had_ = 0;  // slots chosen
  float bias_[kExpertsPerLane] = {}, logit_[kExpertsPerLane] = {};
  int mine_ = 0;
};

}  // namespace dflash::hip
