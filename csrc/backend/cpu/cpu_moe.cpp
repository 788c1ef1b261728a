// Mixture of experts and the dense feed-forward block (one expert that takes every row with weight 1).

#include <algorithm>
#include <cstring>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"

namespace dflash::cpu {

void CpuBackend::route(const Moe& m, const Activations& h) {
  const int rows = h.rows, n_expert = m.n_expert, top_k = m.top_k;
  float* logits = logits_.get<float>(static_cast<size_t>(rows * n_expert));
  const MatmulOut product{m.router, logits};
  make_tiles(&product, 1, rows);
  parallel(static_cast<int64_t>(tiles_.size()), m.router->bytes() * static_cast<size_t>(rows),
           [&](int64_t i, int thread) {
             const Tile& t = tiles_[static_cast<size_t>(i)];
             multiply(*m.router, 0, t.panel, t.n_panels, h, {nullptr, t.row, t.n_rows},
                      logits + t.row * n_expert + t.panel * kPanel, n_expert, thread,
                      weights_after(static_cast<size_t>(i), &product));
           });

  // Per row: sigmoid, choice by s + bias (ties: lowest id), weights s / sum of the chosen s.
  Routing& routing = routing_;
  routing.top_k = top_k;
  routing.weights.resize(static_cast<size_t>(rows * top_k));
  std::vector<int>& chosen = expert_rows_;  // by pair
  chosen.resize(static_cast<size_t>(rows * top_k));
  float* scores = scores_.get<float>(static_cast<size_t>(rows * n_expert));
  parallel(rows, static_cast<size_t>(rows * n_expert) * 16, [&](int64_t r, int) {
    const float* s = scores + r * n_expert;
    float* choice = logits + r * n_expert;  // the logits are not needed again
    k_.sigmoid(choice, n_expert, scores + r * n_expert);
    for (int e = 0; e < n_expert; ++e) choice[e] = m.bias ? s[e] + m.bias[e] : s[e];
    float sum = 0.0f;
    for (int k = 0; k < top_k; ++k) {
      int best = -1;
      for (int e = 0; e < n_expert; ++e) {
        if (choice[e] > -2e30f && (best < 0 || choice[e] > choice[best])) best = e;
      }
      if (best < 0) best = k;  // only NaN is left: any expert will do
      choice[best] = -3e30f;   // taken
      const size_t pair = static_cast<size_t>(r * top_k + k);
      chosen[pair] = best;
      routing.weights[pair] = s[best];
      sum += s[best];
    }
    for (int k = 0; k < top_k; ++k) routing.weights[static_cast<size_t>(r * top_k + k)] /= sum;
  });

  // Counting sort of the pairs by expert.
  routing.experts.clear();
  routing.pairs.resize(chosen.size());
  routing.rows.resize(chosen.size());
  std::vector<int>& start = expert_start_;
  start.assign(static_cast<size_t>(n_expert) + 1, 0);
  for (const int e : chosen) ++start[static_cast<size_t>(e) + 1];
  for (int e = 0; e < n_expert; ++e) {
    const int first = start[static_cast<size_t>(e)], count = start[static_cast<size_t>(e) + 1];
    if (count > 0) routing.experts.push_back({e, first, count});
    start[static_cast<size_t>(e) + 1] = first + count;
  }
  for (size_t pair = 0; pair < chosen.size(); ++pair) {
    const size_t at = static_cast<size_t>(start[static_cast<size_t>(chosen[pair])]++);
    routing.pairs[at] = static_cast<int>(pair);
    routing.rows[at] = static_cast<int>(pair) / top_k;
  }
  count_.distinct += static_cast<int64_t>(routing.experts.size());
  count_.calls += 1;
}

void CpuBackend::one_expert(int rows) {
  routing_.top_k = 1;
  routing_.experts.assign(1, {0, 0, rows});
  routing_.weights.assign(static_cast<size_t>(rows), 1.0f);
  routing_.pairs.resize(static_cast<size_t>(rows));
  for (int r = 0; r < rows; ++r) routing_.pairs[static_cast<size_t>(r)] = r;
  routing_.rows = routing_.pairs;
}

void CpuBackend::run_experts(const Weight& gate, const Weight& up, const Weight& down, const Activations& h, int rows,
                             float* x) {
  const int64_t n_ff = gate.n_out, n_embd = down.n_out, n_pairs = static_cast<int64_t>(rows) * routing_.top_k;
  const bool quantise = int8_path(down);
  float* hidden = quantise ? nullptr : hidden_f32_.get<float>(static_cast<size_t>(n_pairs * n_ff));
  ActBlock* hidden_q = quantise ? hidden_q_.get<ActBlock>(static_cast<size_t>(n_pairs * (n_ff / 32))) : nullptr;

  // gate, up, SwiGLU and requantisation in one pass over blocks of 32 hidden units, a few blocks a time.
  const size_t block_bytes = 2 * (panel_bytes(gate) + panel_bytes(up));
  const size_t total = routing_.experts.size() * (gate.bytes() + up.bytes()) / static_cast<size_t>(gate.n_expert);
  const size_t share = std::min<size_t>(256 << 10, total / static_cast<size_t>(8 * pool_.size()));
  const int64_t blocks = (n_ff + 31) / 32, step = std::min<int64_t>(4, std::max<int64_t>(1, share / block_bytes));
  const int64_t steps = (blocks + step - 1) / step;
  const int64_t n_experts = static_cast<int64_t>(routing_.experts.size());
  const auto gate_at = [&](int64_t item) {
    return panel_at(gate, routing_.experts[static_cast<size_t>(item / steps)].id, item % steps * step * 32 / kPanel);
  };
  parallel(n_experts * steps, total * static_cast<size_t>(std::max<int64_t>(1, n_pairs / n_experts)),
           [&](int64_t item, int thread) {
             const Routing::Expert& e = routing_.experts[static_cast<size_t>(item / steps)];
             const int64_t first = item % steps * step * 32, width = std::min(step * 32, n_ff - first);
             const int n_panels = static_cast<int>(panels_of(width));
             const int64_t stride = step * 32;
             float* g =
                 thread_[static_cast<size_t>(thread)].gate_up.get<float>(static_cast<size_t>(2 * kMaxRows * stride));
             float* u = g + kMaxRows * stride;
             const int64_t panel = first / kPanel;
             const uint8_t* next = item + 1 < n_experts * steps ? gate_at(item + 1) : nullptr;
             for (int r = 0; r < e.count; r += kMaxRows) {
               const int m = std::min(kMaxRows, e.count - r);
               const RowSet set{routing_.rows.data() + e.first + r, 0, m};
               multiply(gate, e.id, panel, n_panels, h, set, g, stride, thread, panel_at(up, e.id, panel));
               multiply(up, e.id, panel, n_panels, h, set, u, stride, thread, next);
               for (int i = 0; i < m; ++i) {
                 const int64_t pair = routing_.pairs[static_cast<size_t>(e.first + r + i)];
                 float* out = quantise ? g + i * stride : hidden + pair * n_ff + first;
                 k_.swiglu(g + i * stride, u + i * stride, width, out);
                 if (quantise) k_.quantize(out, width, hidden_q + pair * (n_ff / 32) + first / 32);
               }
             }
           });

  // Each pair's own output row, then each row's pairs in the order of its list.
  float* pair_out = pair_out_.get<float>(static_cast<size_t>(n_pairs * n_embd));
  const Activations a{hidden, hidden_q, n_ff, static_cast<int>(n_pairs)};
  const size_t down_bytes = routing_.experts.size() * (down.bytes() / static_cast<size_t>(down.n_expert));
  const size_t target =
      std::min<size_t>(256 << 10, std::max<size_t>(16 << 10, down_bytes / static_cast<size_t>(8 * pool_.size())));
  const int64_t panels = panels_of(n_embd),
                down_step = std::max<int64_t>(1, static_cast<int64_t>(target / panel_bytes(down)));
  const int64_t down_steps = (panels + down_step - 1) / down_step;
  parallel(n_experts * down_steps, down_bytes * static_cast<size_t>(std::max<int64_t>(1, n_pairs / n_experts)),
           [&](int64_t item, int thread) {
             const Routing::Expert& e = routing_.experts[static_cast<size_t>(item / down_steps)];
             const int64_t first = item % down_steps * down_step;
             const int n_panels = static_cast<int>(std::min(down_step, panels - first));
             const int64_t stride = n_panels * kPanel, valid = std::min(stride, n_embd - first * kPanel);
             float* out = thread_[static_cast<size_t>(thread)].out.get<float>(static_cast<size_t>(e.count * stride));
             const int64_t after = item + 1;
             const uint8_t* next = after == n_experts * down_steps
                                       ? nullptr
                                       : panel_at(down, routing_.experts[static_cast<size_t>(after / down_steps)].id,
                                                  after % down_steps * down_step);
             multiply(down, e.id, first, n_panels, a, {routing_.pairs.data() + e.first, 0, e.count}, out, stride,
                      thread, next);
             for (int i = 0; i < e.count; ++i) {
               const int64_t pair = routing_.pairs[static_cast<size_t>(e.first + i)];
               std::memcpy(pair_out + pair * n_embd + first * kPanel, out + i * stride,
                           static_cast<size_t>(valid) * sizeof(float));
             }
           });
  parallel(rows, static_cast<size_t>(n_pairs * n_embd) * 2, [&](int64_t r, int) {
    const float* outs[kMaxTopK];
    const int k = routing_.top_k;
    for (int i = 0; i < k; ++i) outs[i] = pair_out + (r * k + i) * n_embd;
    k_.weighted_sum(routing_.weights.data() + r * k, outs, k, n_embd, x + r * n_embd);
  });
}

void CpuBackend::moe(const Moe& m, int rows, float* x) {
  if (m.top_k < 1 || m.top_k > kMaxTopK || m.top_k > m.n_expert) {
    fail("moe: ", m.top_k, " of ", m.n_expert, " experts per token is not supported (at most ", kMaxTopK, ")");
  }
  const bool need_q = int8_path(*m.gate) || int8_path(*m.up) || int8_path(*m.router);
  const Activations h = prepare(x, m.norm, m.eps, rows, m.gate->n_in, need_q);
  route(m, h);
  run_experts(*m.gate, *m.up, *m.down, h, rows, x);
}

void CpuBackend::ffn(const Ffn& f, int rows, float* x) {
  const Activations h = prepare(x, f.norm, f.eps, rows, f.gate->n_in, int8_path(*f.gate) || int8_path(*f.up));
  one_expert(rows);
  run_experts(*f.gate, *f.up, *f.down, h, rows, x);
}

}  // namespace dflash::cpu
