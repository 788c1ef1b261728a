#pragma once
// The router's choice: a row's experts and their weights, from its logits.

#include "backend/hip/gpu_blocks.h"

namespace dflash::hip {

inline constexpr int kMaxExperts = 256;
inline constexpr int kExpertsPerLane = kMaxExperts / gpu::kWave;

// Greater for a greater value; never 0.
__device__ inline uint32_t ranking(float value) {
  const uint32_t bits = __float_as_uint(value == value ? fmaxf(value, -3.0e38f) : -3.0e38f);  // NaN ranks last
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ inline float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

struct Choice {
  int expert;
  float weight;
};

// What an expert is chosen by.
__device__ inline uint32_t choice_key(float logit, float bias) { return ranking(sigmoid(logit) + bias); }

// A lane's experts l, l + 32, ... in descending order of their keys, ties to the lowest id.
struct LaneExperts {
  uint32_t key[kExpertsPerLane];
  int id[kExpertsPerLane];

  __device__ explicit LaneExperts(const uint32_t (&keys)[kExpertsPerLane]) {
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      key[i] = keys[i];
      id[i] = i * gpu::kWave + gpu::lane();
    }
    static_assert(kExpertsPerLane == 8, "Batcher's network for eight");
    constexpr int kPairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                   {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
    for (const auto& pair : kPairs) order(pair[0], pair[1]);
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

// A wave: the experts of slots [first, end), in descending order; lane i ends with slot i and keeps `mine` for earlier
// ones. Those chosen leave the lists.
__device__ inline int select_experts(LaneExperts& list, int end, int first = 0, int mine = 0) {
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

// A wave: the weight of slot `lane` of a row whose expert there has this logit.
__device__ inline float slot_weight(float logit, int top_k) {
  const float score = gpu::lane() < top_k ? sigmoid(logit) : 0.0f;
  return score / gpu::wave_sum(score);
}
// The same where the slot's expert is `expert`.
__device__ inline float expert_weight(const float* logits, int expert, int top_k) {
  return slot_weight(gpu::lane() < top_k ? gpu::load_fresh(logits + expert) : 0.0f, top_k);
}

// A wave: the weight of slot `lane`, whose expert is `mine`. Lane l has the logits of experts l, l + 32, ...
__device__ inline float chosen_weight(const float (&logit)[kExpertsPerLane], int mine, int top_k) {
  float chosen = 0.0f;
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    const float v = gpu::shuffle(logit[i], mine % gpu::kWave);
    if (mine / gpu::kWave == i) chosen = v;
  }
  return slot_weight(chosen, top_k);
}

// A wave chooses one row's experts: lane i ends with slot i.
__device__ inline Choice choose_experts(const float (&logit)[kExpertsPerLane], const float* bias, int n_expert,
                                        int top_k) {
  uint32_t key[kExpertsPerLane];
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    const int e = gpu::lane() + i * gpu::kWave;
    key[i] = e < n_expert ? choice_key(logit[i], bias != nullptr ? bias[e] : 0.0f) : 0;
  }
  LaneExperts list(key);
  const int mine = select_experts(list, top_k);
  return {mine, chosen_weight(logit, mine, top_k)};
}

}  // namespace dflash::hip
