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

__device__ inline float sigmoid(float v) { return gpu::reciprocal(1.0f + expf(-v)); }

struct Choice {
  int expert;
  float weight;
};

// What an expert is chosen by.
__device__ inline uint32_t choice_key(float logit, float bias) { return ranking(sigmoid(logit) + bias); }

// A wave: the top_k experts by their keys, ties to the lowest id, in descending order; lane i ends with the i-th. Lane
// l has the keys of experts l, l + 32, ...
__device__ inline int select_experts(uint32_t (&key)[kExpertsPerLane], int top_k) {
  int mine = 0;
  for (int slot = 0; slot < top_k; ++slot) {
    uint32_t best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      if (key[i] > best) {
        best = key[i];
        at = i;
      }
    }
    const uint32_t most = gpu::wave_most(best);
    const int id =
        static_cast<int>(gpu::wave_least(best == most ? static_cast<uint32_t>(at * gpu::kWave + gpu::lane()) : ~0u));
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      if (id == i * gpu::kWave + gpu::lane()) key[i] = 0;
    }
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

// A wave chooses one row's experts: lane i ends with slot i. Lane l has the logits of experts l, l + 32, ...
__device__ inline Choice choose_experts(const float (&logit)[kExpertsPerLane], const float* bias, int n_expert,
                                        int top_k) {
  uint32_t key[kExpertsPerLane];
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    const int e = gpu::lane() + i * gpu::kWave;
    key[i] = e < n_expert ? choice_key(logit[i], bias != nullptr ? bias[e] : 0.0f) : 0;
  }
  const int mine = select_experts(key, top_k);
  return {mine, chosen_weight(logit, mine, top_k)};
}

}  // namespace dflash::hip
