#pragma once
// The choice of experts for 1..16 rows, and the (row, slot) pairs grouped by expert. Each block that needs it does it
// for itself, from the router's logits: that is sooner done than waiting for one block to do it for all.

#include "backend/hip/choose.h"
#include "backend/hip/few_rows.h"
#include "backend/hip/kernels.h"

namespace dflash::hip {

// The (row, slot) pairs, pair = row * top_k + slot, grouped by expert, experts in the order of their first pairs. In
// shared memory.
template <int MaxRows>
struct Grouping {
  static constexpr int kPairs = MaxRows * gpu::kWave;
  int16_t chosen[kPairs], leader[kPairs];  // a pair's expert, and the first pair with that expert
  float weight[kPairs];
  int16_t expert[kPairs], first[kPairs], count[kPairs];  // of an item; first: its pairs' place in pairs
  int16_t pairs[kPairs], rows[kPairs];                   // sorted by item; a pair's row
  int items;
};

// The bias of the expert that a thread looks at first: read before the wait.
__device__ inline float first_bias(const FewChoice& c) {
  const int e = static_cast<int>(threadIdx.x) % c.n_expert;
  return c.bias != nullptr ? c.bias[e] : 0.0f;
}

// The pairs grouped by the experts chosen, by all threads of a block.
template <int MaxRows>
__device__ inline void group_pairs(int rows, int top_k, Grouping<MaxRows>& g) {
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x), n = rows * top_k;
  for (int p = t; p < n; p += threads) {
    const int expert = g.chosen[p];
    int leader = p;
#pragma unroll 8
    for (int q = n - 1; q >= 0; --q) leader = g.chosen[q] == expert ? q : leader;
    g.leader[p] = static_cast<int16_t>(leader);
  }
  __syncthreads();
  for (int p = t; p < n; p += threads) {
    const int leader = g.leader[p];
    int at = 0, item = 0, count = 0;
    for (int q = 0; q < n; ++q) {
      const int l = g.leader[q];
      at += l < leader || (l == leader && q < p);
      item += q < leader && l == q;
      count += l == leader;
    }
    g.pairs[at] = static_cast<int16_t>(p);
    g.rows[at] = static_cast<int16_t>(p / top_k);
    if (leader == p) {
      g.expert[item] = g.chosen[p];
      g.first[item] = static_cast<int16_t>(at);
      g.count[item] = static_cast<int16_t>(count);
    }
    if (at + 1 == n) g.items = item + 1;  // the last place belongs to the last item
  }
  __syncthreads();
}

// keys: MaxRows * 256 words of shared memory.
template <int MaxRows>
__device__ inline void group_few(const FewChoice& c, float bias0, uint32_t* keys, Grouping<MaxRows>& g) {
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  if (c.logits == nullptr) {  // a dense feed-forward
    if (t < c.rows) {
      g.pairs[t] = g.rows[t] = static_cast<int16_t>(t);
      g.weight[t] = 1.0f;
    }
    if (t == 0) {
      g.items = 1;
      g.expert[0] = g.first[0] = 0;
      g.count[0] = static_cast<int16_t>(c.rows);
    }
    __syncthreads();
    return;
  }
  for (int i = t; i < c.rows * c.n_expert; i += threads) {
    const int e = i % c.n_expert;
    const float bias = e == t % c.n_expert ? bias0 : c.bias != nullptr ? c.bias[e] : 0.0f;
    keys[i] = choice_key(gpu::load_fresh(c.logits + i), bias);
  }
  __syncthreads();
  for (int row = gpu::wave(); row < c.rows; row += threads / gpu::kWave) {
    uint32_t key[kExpertsPerLane];
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      const int e = gpu::lane() + i * gpu::kWave;
      key[i] = e < c.n_expert ? keys[row * c.n_expert + e] : 0;
    }
    const int mine = select_experts(key, c.top_k), p = row * c.top_k + gpu::lane();
    if (gpu::lane() < c.top_k) {
      g.chosen[p] = static_cast<int16_t>(mine);
      if (c.rows == 1) {
        g.expert[p] = static_cast<int16_t>(mine);
        g.pairs[p] = g.first[p] = static_cast<int16_t>(p);
        g.rows[p] = 0;
        g.count[p] = 1;
        g.items = c.top_k;
      }
    }
  }
  __syncthreads();
  if (MaxRows == 1 || c.rows == 1) return;
  group_pairs(c.rows, c.top_k, g);
}

// The weights of the experts chosen, a wave a row.
template <int MaxRows>
__device__ inline void weigh_few(const FewChoice& c, Grouping<MaxRows>& g) {
  if (c.logits == nullptr) return;
  for (int row = gpu::wave(); row < c.rows; row += static_cast<int>(blockDim.x) / gpu::kWave) {
    const int p = row * c.top_k + min(gpu::lane(), c.top_k - 1);
    const float weight = expert_weight(c.logits + row * c.n_expert, g.chosen[p], c.top_k);
    if (gpu::lane() < c.top_k) g.weight[p] = weight;
  }
}

}  // namespace dflash::hip
