// Attention over 8k to 32k keys, each cache type: against double precision, a row alone against rows together, and
// time.

#include <cmath>

#include "engine_tests.h"
#include "reference.h"

namespace dflash::test {

namespace {

constexpr int kHeadDim = 128;
constexpr DType kTypes[] = {DType::F32, DType::F16, DType::Q8_0};
constexpr double kLimits[] = {1e-10, 1e-6, 2e-4};  // as in test_ops.cpp

// A cache whose keys have length sqrt(head_dim) and no rotation; k and v as they were given to it.
struct Cache {
  Floats k, v;  // [n_keys, n_head_kv * head_dim]
  Buffer memory_k, memory_v;
  KvLayer layer;
};

Cache fill_cache(Backend& b, std::mt19937& rng, DType type, int n_head_kv, int n_keys) {
  Cache c;
  const size_t width = static_cast<size_t>(n_head_kv) * kHeadDim;
  c.k = random_floats(rng, width * static_cast<size_t>(n_keys));
  c.v = random_floats(rng, width * static_cast<size_t>(n_keys));
  for (size_t at = 0; at < c.k.size(); at += kHeadDim) {
    double squares = 0.0;
    for (int i = 0; i < kHeadDim; ++i) squares += static_cast<double>(c.k[at + i]) * c.k[at + i];
    for (int i = 0; i < kHeadDim; ++i) c.k[at + i] /= static_cast<float>(std::sqrt(squares / kHeadDim));
  }
  const size_t side = static_cast<size_t>(n_head_kv) * n_keys * row_bytes(type, kHeadDim);
  c.memory_k = b.alloc(side);
  c.memory_v = b.alloc(side);
  c.layer = {c.memory_k.data, c.memory_v.data, type, n_head_kv, kHeadDim, n_keys};
  Guarded ones(b, Floats(kHeadDim, 1.0f)), still(b, Floats(1, 0.0f));
  QkvPost post;
  post.n_head = post.n_head_kv = n_head_kv;
  post.head_dim = kHeadDim;
  post.n_rot = 2;
  post.norm = QkNorm::per_head;
  post.q_norm = post.k_norm = ones.data();
  post.inv_freq = still.data();
  post.eps = 0.0f;
  constexpr int kChunk = 512;
  for (int pos = 0; pos < n_keys; pos += kChunk) {
    const int rows = std::min(kChunk, n_keys - pos);
    const auto part = [&](const Floats& x) {
      return Floats(x.begin() + static_cast<int64_t>(pos * width),
                    x.begin() + static_cast<int64_t>((pos + rows) * width));
    };
    Guarded gk(b, part(c.k)), gv(b, part(c.v));
    b.qkv_post(post, {rows, pos}, nullptr, gk.data(), gv.data(), c.layer);
    (void)gk.get("long context");  // waits: the buffers go
  }
  return c;
}

Attention attention_of(int n_head, int n_head_kv) {
  Attention a;
  a.n_head = n_head;
  a.n_head_kv = n_head_kv;
  a.head_dim = kHeadDim;
  a.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  return a;
}

Doubles ref_attention(const Attention& a, const Cache& c, const Floats& q, int rows, int pos0) {
  const int group = a.n_head / a.n_head_kv;
  Doubles out(q.size(), 0.0);
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < a.n_head; ++h) {
      const float* query = &q[(static_cast<size_t>(r) * a.n_head + h) * kHeadDim];
      Doubles s(static_cast<size_t>(pos0 + r + 1));
      double largest = -1e300, sum = 0.0;
      const auto row_of = [&](const Floats& x, size_t p) { return &x[(p * a.n_head_kv + h / group) * kHeadDim]; };
      for (size_t p = 0; p < s.size(); ++p) {
        const float* key = row_of(c.k, p);
        double dot = 0.0;
        for (int i = 0; i < kHeadDim; ++i) dot += static_cast<double>(query[i]) * key[i];
        s[p] = dot * a.scale;
        largest = std::max(largest, s[p]);
      }
      for (double& e : s) sum += e = std::exp(e - largest);
      double* o = &out[(static_cast<size_t>(r) * a.n_head + h) * kHeadDim];
      for (size_t p = 0; p < s.size(); ++p) {
        const float* value = row_of(c.v, p);
        for (int i = 0; i < kHeadDim; ++i) o[i] += s[p] / sum * value[i];
      }
    }
  }
  return out;
}

}  // namespace

void test_long_context(Backend& gpu) {
  std::mt19937 rng(31);
  for (size_t t = 0; t < 3; ++t) {
    double worst = 0.0;
    const Attention a = attention_of(12, 2);
    const Cache c = fill_cache(gpu, rng, kTypes[t], a.n_head_kv, 32768);
    for (const int n_keys : {8192, 8193, 20011, 32768}) {
      const int rows = 5, pos0 = n_keys - rows;  // 8 queries a block; a row alone: fewer
      const size_t width = static_cast<size_t>(a.n_head) * kHeadDim;
      const Floats q = random_floats(rng, width * rows, 2.0f);
      Guarded gq(gpu, q), out(gpu, q.size());
      gpu.attention(a, {rows, pos0}, gq.data(), c.layer, out.data());
      const Floats got = out.get("long attention");
      const double e = nmse(ref_attention(a, c, q, rows, pos0), got);
      worst = std::max(worst, e);
      expect(e <= kLimits[t], cat("attention over ", n_keys, " keys, ", dtype_info(kTypes[t]).name, ": NMSE ", e));
      Guarded alone(gpu, width);
      gpu.attention(a, {1, pos0 + 1}, gq.data() + width, c.layer, alone.data());
      const Floats one = alone.get("long attention"), same(got.begin() + static_cast<int64_t>(width), got.end());
      expect(same_bits(one, same, width), cat("attention over ", n_keys, " keys: a row alone differs"));
    }
    std::printf("attention, 8k to 32k keys, %s: worst NMSE %.2e  limit %.0e\n", dtype_info(kTypes[t]).name, worst,
                kLimits[t]);
  }
  // The target's shape, timed over 40 calls in a row.
  for (size_t t = 1; t < 3; ++t) {
    const Attention a = attention_of(48, 8);
    const Cache c = fill_cache(gpu, rng, kTypes[t], a.n_head_kv, 32768);
    for (const int n_keys : {8192, 32768}) {
      for (const int rows : {1, 5, 16}) {
        const size_t n = static_cast<size_t>(rows) * 48 * kHeadDim;
        Guarded q(gpu, random_floats(rng, n)), out(gpu, n);
        float word = 0.0f;
        const double ms = median_ms(5,
                                    [&] {
                                      for (int i = 0; i < 40; ++i)
                                        gpu.attention(a, {rows, n_keys - rows}, q.data(), c.layer, out.data());
                                      gpu.download(&word, out.data(), 4);
                                    }) /
                          40.0;
        const double gb = 2e-9 * 8 * n_keys * static_cast<double>(row_bytes(kTypes[t], kHeadDim));
        std::printf("attention 48/8 x 128, %5d keys, %s, %2d rows: %7.1f us, %5.0f GB/s\n", n_keys,
                    dtype_info(kTypes[t]).name, rows, ms * 1e3, gb / ms * 1e3);
      }
    }
  }
}

}  // namespace dflash::test
