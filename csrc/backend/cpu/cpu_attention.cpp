// QK norm, RoPE, KV store, and attention split over chunks of kKvChunk key positions counted from position 0.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"

namespace dflash::cpu {

// cos and sin of position * inv_freq (the product in f32, as the reference implementations have it) for the rows of a
// step. Target and drafter may rotate differently and verify meets positions again: a table for each, of the positions
// seen last.
const CpuBackend::RopeTable& CpuBackend::rope_table(const QkvPost& p, Step step) {
  const size_t half = static_cast<size_t>(p.n_rot / 2);
  const auto same = [&](const RopeTable& t) {
    return t.scale == p.rope_scale && t.inv_freq.size() == half &&
           std::memcmp(t.inv_freq.data(), p.inv_freq, half * sizeof(float)) == 0;
  };
  auto found = std::find_if(rope_.begin(), rope_.end(), same);
  if (found == rope_.end()) {
    RopeTable fresh;
    fresh.inv_freq.assign(p.inv_freq, p.inv_freq + half);
    fresh.scale = p.rope_scale;
    found = rope_.insert(rope_.end(), std::move(fresh));
  }
  RopeTable& t = *found;
  size_t positions = std::max<size_t>(t.position.size(), 1024);
  while (positions < static_cast<size_t>(step.rows)) positions *= 2;
  if (positions != t.position.size()) {
    t.position.assign(positions, -1);
    t.cos.resize(positions * half);
    t.sin.resize(positions * half);
  }
  for (int pos = step.pos0; pos < step.pos0 + step.rows; ++pos) {
    const size_t slot = t.slot(pos);
    if (t.position[slot] == pos) continue;
    t.position[slot] = pos;
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(static_cast<float>(pos) * p.inv_freq[i]);
      t.cos[slot * half + i] = static_cast<float>(std::cos(angle)) * p.rope_scale;
      t.sin[slot * half + i] = static_cast<float>(std::sin(angle)) * p.rope_scale;
    }
  }
  return t;
}

void CpuBackend::qkv_post(const QkvPost& p, Step step, float* q, float* k, const float* v, const KvLayer& kv) {
  if (step.pos0 < 0 || step.pos0 + step.rows > kv.n_ctx) {
    fail("positions ", step.pos0, "..", step.pos0 + step.rows - 1, " do not fit a cache of ", kv.n_ctx);
  }
  if (kv.n_ctx % kKeyBlock != 0) fail("a KV cache of ", kv.n_ctx, " positions: a multiple of ", kKeyBlock, " expected");
  const RopeTable& rope = rope_table(p, step);
  const int half = p.n_rot / 2;
  const size_t row = row_bytes(kv.type, p.head_dim);
  const auto finish = [&](float* x, const float* norm, int heads, int64_t r) {
    const int64_t n = p.norm == QkNorm::whole ? static_cast<int64_t>(heads) * p.head_dim : p.head_dim;
    for (int64_t i = 0; i < heads * p.head_dim; i += n) k_.rms_norm(x + i, norm, p.eps, n, x + i);
    const size_t at = rope.slot(step.pos0 + static_cast<int>(r)) * static_cast<size_t>(half);
    for (int h = 0; h < heads; ++h) k_.rotate(x + h * p.head_dim, rope.cos.data() + at, rope.sin.data() + at, half);
  };
  const int64_t q_width = static_cast<int64_t>(p.n_head) * p.head_dim,
                kv_width = static_cast<int64_t>(p.n_head_kv) * p.head_dim;
  // Key blocks first, each one item: rows of one block share cache lines. Then the rows' queries.
  const int first_block = step.pos0 / kKeyBlock, blocks = (step.pos0 + step.rows - 1) / kKeyBlock - first_block + 1;
  const int query_rows = q ? step.rows : 0;
  parallel(blocks + query_rows, static_cast<size_t>(step.rows * (q_width + 2 * kv_width)) * 4, [&](int64_t item, int) {
    if (item >= blocks) return finish(q + (item - blocks) * q_width, p.q_norm, p.n_head, item - blocks);
    const int block = first_block + static_cast<int>(item);
    const int begin = std::max(step.pos0, block * kKeyBlock);
    const int end = std::min(step.pos0 + step.rows, (block + 1) * kKeyBlock);
    for (int pos = begin; pos < end; ++pos) {
      const int64_t r = pos - step.pos0;
      finish(k + r * kv_width, p.k_norm, p.n_head_kv, r);
      for (int h = 0; h < p.n_head_kv; ++h) {
        const size_t head = row * static_cast<size_t>(h) * static_cast<size_t>(kv.n_ctx);
        const int64_t from = r * kv_width + static_cast<int64_t>(h) * p.head_dim;
        k_.store_key(kv.type, k + from, p.head_dim, pos % kKeyBlock,
                     static_cast<uint8_t*>(kv.k) + head + row * static_cast<size_t>(block * kKeyBlock));
        k_.store_value(kv.type, v + from, p.head_dim,
                       static_cast<uint8_t*>(kv.v) + head + row * static_cast<size_t>(pos));
      }
    }
  });
}

void CpuBackend::attention(const Attention& a, Step step, const float* q, const KvLayer& kv, float* out) {
  if (a.head_dim % 16 != 0 || a.head_dim != kv.head_dim || a.n_head % a.n_head_kv != 0) {
    fail("attention: ", a.n_head, " heads of ", a.head_dim, " over ", a.n_head_kv, " KV heads of ", kv.head_dim,
         " is not supported");
  }
  const int group = a.n_head / a.n_head_kv, end = step.pos0 + step.rows;
  const size_t head_bytes = row_bytes(kv.type, a.head_dim) * static_cast<size_t>(kv.n_ctx);
  const int64_t q_width = static_cast<int64_t>(a.n_head) * a.head_dim;
  struct Range {
    int begin, end;
  };
  const auto visible = [&](int r) {
    const int pos = step.pos0 + r;
    return Range{a.sliding_window > 0 ? std::max(0, pos - a.sliding_window + 1) : 0, a.causal ? pos + 1 : end};
  };

  // An item is (KV head, span of chunks, block of rows). With one span the item finishes its rows itself; with more,
  // which few items or long contexts need to fill all threads, the chunk results are kept and merged afterwards in the
  // same order.
  const int first_chunk = visible(0).begin / kKvChunk, last_chunk = (end - 1) / kKvChunk;
  const int n_chunks = last_chunk - first_chunk + 1;
  const int row_block = std::min(step.rows, kMaxRows), row_blocks = (step.rows + row_block - 1) / row_block;
  const int64_t items = static_cast<int64_t>(a.n_head_kv) * row_blocks;
  const bool even = items % pool_.size() == 0 && n_chunks <= 8;
  const int spans = items >= 4 * pool_.size() || even ? 1 : n_chunks;
  const int64_t result = 2 + a.head_dim;  // max, sum, acc of one head
  float* partial =
      spans > 1 ? partial_.get<float>(static_cast<size_t>(n_chunks * step.rows * a.n_head * result)) : nullptr;

  // The part of chunk c that row r sees.
  const auto part = [&](int r, int c) {
    const Range range = visible(r);
    return Range{std::max(range.begin, c * kKvChunk), std::min(range.end, (c + 1) * kKvChunk)};
  };
  // Rows from r on, up to r1, that see chunk c from the same key on and began to see keys in the same chunk.
  const auto alike = [&](int r, int r1, int c) {
    int n = 1;
    if (part(r, c).begin >= part(r, c).end) return n;
    while (r + n < r1 && part(r + n, c).begin == part(r, c).begin &&
           visible(r + n).begin / kKvChunk == visible(r).begin / kKvChunk) {
      ++n;
    }
    return n;
  };
  // Results of n rows: max and sum at state + row * state_stride, acc at acc + row * acc_stride.
  const auto chunk = [&](int kv_head, int r, int n, int c, float* state, int64_t state_stride, float* acc,
                         int64_t acc_stride) {
    AttentionChunk t;
    int ends[kMaxRows];
    for (int i = 0; i < n; ++i) ends[i] = part(r + i, c).end;
    t.begin = part(r, c).begin;
    t.end = ends;
    t.type = kv.type;
    t.k = static_cast<const uint8_t*>(kv.k) + head_bytes * static_cast<size_t>(kv_head);
    t.v = static_cast<const uint8_t*>(kv.v) + head_bytes * static_cast<size_t>(kv_head);
    t.q = q + r * q_width + static_cast<int64_t>(kv_head) * group * a.head_dim;
    t.q_stride = q_width;
    t.n_rows = n;
    t.n_head = group;
    t.head_dim = a.head_dim;
    t.scale = a.scale;
    t.max = state;
    t.sum = state + group;
    t.state_stride = state_stride;
    t.acc = acc;
    t.acc_stride = acc_stride;
    k_.attention_chunk(t);
  };
  const size_t bytes = 2 * head_bytes / static_cast<size_t>(kv.n_ctx) * static_cast<size_t>(end) *
                       static_cast<size_t>(a.n_head) * static_cast<size_t>(step.rows);
  const int64_t group_width = static_cast<int64_t>(group) * a.head_dim;

  if (spans == 1) {
    parallel(items, bytes, [&](int64_t item, int thread) {
      const int kv_head = static_cast<int>(item % a.n_head_kv), r0 = static_cast<int>(item / a.n_head_kv) * row_block;
      const int r1 = std::min(step.rows, r0 + row_block);
      // Per row of the block: the running max and sum of its heads, then the same and acc of the chunk at hand.
      float* running = thread_[static_cast<size_t>(thread)].attention.get<float>(
          static_cast<size_t>(row_block) * static_cast<size_t>(4 * group + group_width));
      float* state = running + static_cast<int64_t>(row_block) * 2 * group;
      float* acc = state + static_cast<int64_t>(row_block) * 2 * group;
      float* to = out + r0 * q_width + kv_head * group_width;
      for (int c = first_chunk; c <= last_chunk; ++c) {
        for (int r = r0, n = 0; r < r1; r += n) {
          n = alike(r, r1, c);
          if (part(r, c).begin >= part(r, c).end) continue;
          float* row_running = running + (r - r0) * 2 * group;
          float* row_to = to + (r - r0) * q_width;
          if (c == visible(r).begin / kKvChunk) {
            chunk(kv_head, r, n, c, row_running, 2 * group, row_to, q_width);
            continue;
          }
          chunk(kv_head, r, n, c, state, 2 * group, acc, group_width);
          for (int i = 0; i < n; ++i) {
            for (int h = 0; h < group; ++h) {
              float *old = row_running + i * 2 * group + h, *fresh = state + i * 2 * group + h;
              k_.attention_merge(old, old + group, row_to + i * q_width + h * a.head_dim, fresh[0], fresh[group],
                                 acc + i * group_width + h * a.head_dim, a.head_dim);
            }
          }
        }
      }
      for (int r = r0; r < r1; ++r) {
        const float* sum = running + (r - r0) * 2 * group + group;
        for (int h = 0; h < group; ++h) k_.scale(1.0f / sum[h], a.head_dim, to + (r - r0) * q_width + h * a.head_dim);
      }
    });
    return;
  }

  // partial[chunk][row][kv head]: max[group], sum[group], acc[group, head_dim]
  const auto slot = [&](int c, int r, int kv_head) {
    return partial + (static_cast<int64_t>(c - first_chunk) * step.rows + r) * a.n_head * result +
           static_cast<int64_t>(kv_head) * group * result;
  };
  parallel(items * n_chunks, bytes, [&](int64_t item, int) {
    const int c = first_chunk + static_cast<int>(item % n_chunks);
    const int kv_head = static_cast<int>(item / n_chunks % a.n_head_kv);
    const int r0 = static_cast<int>(item / n_chunks / a.n_head_kv) * row_block;
    const int r1 = std::min(step.rows, r0 + row_block);
    for (int r = r0, n = 0; r < r1; r += n) {
      n = alike(r, r1, c);
      float* s = slot(c, r, kv_head);
      const int64_t stride = a.n_head * result;
      if (part(r, c).begin < part(r, c).end) chunk(kv_head, r, n, c, s, stride, s + 2 * group, stride);
    }
  });
  parallel(static_cast<int64_t>(step.rows) * a.n_head_kv,
           static_cast<size_t>(n_chunks) * step.rows * a.n_head * result * 4, [&](int64_t item, int) {
             const int r = static_cast<int>(item / a.n_head_kv), kv_head = static_cast<int>(item % a.n_head_kv);
             const Range range = visible(r);
             const int first = range.begin / kKvChunk;
             float* s = slot(first, r, kv_head);
             for (int c = first + 1; c <= (range.end - 1) / kKvChunk; ++c) {
               const float* t = slot(c, r, kv_head);
               for (int h = 0; h < group; ++h) {
                 k_.attention_merge(s + h, s + group + h, s + 2 * group + h * a.head_dim, t[h], t[group + h],
                                    t + 2 * group + h * a.head_dim, a.head_dim);
               }
             }
             float* to = out + r * q_width + static_cast<int64_t>(kv_head) * group * a.head_dim;
             std::memcpy(to, s + 2 * group, static_cast<size_t>(group * a.head_dim) * sizeof(float));
             for (int h = 0; h < group; ++h) k_.scale(1.0f / s[group + h], a.head_dim, to + h * a.head_dim);
           });
}

}  // namespace dflash::cpu
