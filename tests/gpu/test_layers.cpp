// Ops one after the other, as a layer has them: what the backend does of several in one launch, and recorded steps.

#include "ops_tests.h"
#include "reference.h"

namespace dflash::test {

namespace {

// Attention as MiniMax-M2 has it over an f16 cache of zeros, a key head to each query head.
struct HeadsOf128 {
  static constexpr int kHeads = 4, kDim = 128, kWidth = kHeads * kDim;

  HeadsOf128(Backend& b, int n_ctx)
      : norm(b, Floats(kWidth, 1.0f)), inv_freq(b, Floats(32, 0.01f)), k(cache(b, n_ctx)), v(cache(b, n_ctx)) {
    kv = {k.data, v.data, DType::F16, kHeads, kDim, n_ctx};
    post.n_head = post.n_head_kv = attention.n_head = attention.n_head_kv = kHeads;
    post.head_dim = attention.head_dim = kDim;
    post.n_rot = 64;
    post.norm = QkNorm::whole;
    post.q_norm = post.k_norm = norm.data();
    post.inv_freq = inv_freq.data();
    attention.scale = 0.1f;
  }

  Guarded norm, inv_freq;
  Buffer k, v;
  KvLayer kv;
  QkvPost post;
  Attention attention;

 private:
  static Buffer cache(Backend& b, int n_ctx) {
    const Floats zeros(static_cast<size_t>(kWidth) * n_ctx / 2, 0.0f);
    Buffer buffer = b.alloc(zeros.size() * sizeof(float));
    b.upload(buffer.data, zeros.data(), buffer.bytes);
    return buffer;
  }
};

}  // namespace

// Attention, output projection and experts one after the other: a row's bits are those it has among others, and those
// it has when the experts do not follow at once.
void test_layers(Backend& b, std::mt19937& rng) {
  struct Case {
    DType type;
    int n_expert, top_k;
    int64_t n_embd, n_ff;
    float scale;  // of the residual stream
  };
  const std::vector<Case> cases = {{DType::Q4_0, 32, 8, 256, 256, 2.0f},    {DType::Q8_0, 24, 8, 256, 160, 2.0f},
                                   {DType::Q4_1, 200, 4, 96, 256, 2.0f},    {DType::Q4_0, 16, 2, 416, 64, 2.0f},
                                   {DType::Q4_0, 32, 8, 256, 256, 3000.0f}, {DType::Q4_0, 32, 8, 256, 256, 1e-5f},
                                   {DType::Q4_0, 256, 8, 3072, 512, 2.0f}};
  const int n = HeadsOf128::kWidth, pos0 = 5, most = kInt8Rows, many = 40;
  HeadsOf128 heads(b, 64);
  for (const Case& c : cases) {
    if (g_quick && (c.n_embd > 256 || c.scale != 2.0f)) continue;
    const auto out = random_tensor(rng, c.type, n, c.n_embd),
               router = random_tensor(rng, DType::F32, c.n_embd, c.n_expert);
    const auto gate = random_tensor(rng, c.type, c.n_embd, c.n_ff, c.n_expert);
    const auto up = random_tensor(rng, c.type, c.n_embd, c.n_ff, c.n_expert);
    const auto down = random_tensor(rng, c.type, c.n_ff, c.n_embd, c.n_expert);
    const Weight wo = b.load(out->host, out), wr = b.load(router->host, router), wg = b.load(gate->host, gate),
                 wu = b.load(up->host, up), wd = b.load(down->host, down);
    Guarded bias(b, random_floats(rng, c.n_expert, 0.1f)), moe_norm(b, random_floats(rng, c.n_embd));
    Moe m;
    m.n_expert = c.n_expert;
    m.top_k = c.top_k;
    m.eps = kEps;
    m.norm = moe_norm.data();
    m.router = &wr;
    m.bias = bias.data();
    m.gate = &wg;
    m.up = &wu;
    m.down = &wd;
    const std::string what = cat("layer ", dtype_info(c.type).name, " ", c.n_expert, "/", c.top_k, " ", c.n_embd, "x",
                                 c.n_ff, " of ", c.scale);
    const Floats qkv = random_floats(rng, many * n), x = random_floats(rng, many * c.n_embd, c.scale);
    auto run = [&](int first, int rows, bool one_by_one) {
      auto some = [&](const Floats& v, int64_t width) {
        return Floats(v.begin() + first * width, v.begin() + (first + rows) * width);
      };
      Guarded q(b, some(qkv, n)), k(b, some(qkv, n)), v(b, some(qkv, n)), y(b, static_cast<size_t>(rows * n)),
          gx(b, some(x, c.n_embd));
      const Step step = {rows, pos0 + first};
      b.qkv_post(heads.post, step, q.data(), k.data(), v.data(), heads.kv);
      b.attention(heads.attention, step, q.data(), heads.kv, y.data());
      b.matmul_add(wo, y.data(), rows, gx.data());
      if (one_by_one) (void)gx.get(what);
      b.moe(m, rows, gx.data());
      return gx.get(what);
    };
    const Floats all = run(0, most, true);
    for (int first = 0; first < most; first += g_quick ? 7 : 3) {
      for (int rows : {1, 2, 3}) {
        if (first + rows > most) continue;
        for (const bool one_by_one : {false, true}) {
          const Floats part = run(first, rows, one_by_one);
          const Floats want(all.begin() + first * c.n_embd, all.begin() + (first + rows) * c.n_embd);
          expect(same_bits(part, want, part.size()), cat(what, ": ", rows, " rows from ", first, " differ"));
        }
      }
    }
    const Floats forty = run(0, many, true), part = run(0, most + 1, false);  // more than 16 have bits of their own
    expect(same_bits(part, forty, part.size()), cat(what, ": ", most + 1, " rows differ from ", many));
  }
  std::printf("layers: the same bits in one launch and in several\n");
}

void test_steps(Backend& b, std::mt19937& rng) {
  const int n_ctx = 2048, n = HeadsOf128::kWidth, rows = 3;
  const auto t = random_tensor(rng, DType::Q4_0, n, n);
  const Weight w = b.load(t->host, t);
  HeadsOf128 heads(b, n_ctx);
  Guarded q(b, rows * n), k(b, rows * n), v(b, rows * n), out(b, rows * n), y(b, rows * n);
  auto ops = [&](Step s) {
    b.qkv_post(heads.post, s, q.data(), k.data(), v.data(), heads.kv);
    b.attention(heads.attention, s, q.data(), heads.kv, out.data());
    b.matmul_add(w, out.data(), rows, y.data());
  };
  ops({rows, n_ctx - rows});  // scratch grows to its size now: later it would drop what is recorded
  std::mt19937 draw(7);
  int replayed = 0;
  for (int pos0 : {0, 1, 5, 300, 301, 1022, 1030, 1040, 1050, 20}) {
    const Floats x = random_floats(draw, rows * n), z(rows * n, 0.0f);
    auto set = [&] {
      for (Guarded* g : {&q, &k, &v}) g->set(x);
      y.set(z);
    };
    set();
    const bool done = b.begin_step(42, {rows, pos0});
    if (!done) {
      ops({rows, pos0});
      b.end_step();
    }
    replayed += done;
    const Floats got = y.get("step");
    set();
    ops({rows, pos0});
    expect(same_bits(got, y.get("step"), got.size()), cat("recorded step at ", pos0, " differs"));
  }
  expect(replayed == 6, cat("steps replayed: ", replayed));
}

}  // namespace dflash::test
