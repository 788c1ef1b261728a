// The shape of MiniMax-M2.7 with random Q4_0 weights, every layer its own memory, on one GPU: time, bytes and bandwidth
// of decode, verify, draft and prefill. Bytes are those that must be read: attention, router and head weights, each
// distinct expert once, the KV cache. The ceiling is a device-to-device copy measured in the same run.
//
// gpu_step [layers] [eager] [decode | prefill]   (62 layers need 122 GiB; eager: no recorded steps, for profilers;
// decode, prefill: that alone)

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "backend/hip/gpu.h"
#include "backend/hip/hip_backend.h"

namespace dflash {
namespace {

struct Shape {
  int n_layer = 62;
  int n_embd = 3072, n_head = 48, n_head_kv = 8, head_dim = 128, n_rot = 64;
  int n_expert = 256, top_k = 8, n_ff = 1536, n_vocab = 200064;
};

// DFlash drafter of 0.38 B: 3 layers over 5 taps
struct DrafterShape {
  int n_layer = 3, n_head = 24, n_head_kv = 8, head_dim = 128, n_ff = 9216, taps = 5, slots = 4;
};

struct Layer {
  Weight q, k, v, o, router, gate, up, down;
  Buffer kc, vc;
};

struct DraftLayer {
  Weight q, k, v, o, gate, up, down;
  Buffer kc, vc;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class Bench {
 public:
  enum class Mode { all, decode, prefill };

  Bench(int layers, bool eager) : b_(make_hip_backend(BackendOptions())), eager_(eager) {
    s_.n_layer = layers;
    std::printf("%s\n", b_->describe().c_str());
    copy_gbps_ = measure_copy();
    std::printf("copy, read + written: %.0f GB/s\n", copy_gbps_);
    build();
  }

  void run(Mode mode) {
    std::printf("%-26s %9s %9s %8s %7s %s\n", "what", "ms", "GB", "GB/s", "share", "notes");
    if (mode == Mode::prefill) {
      prefills();
      return;
    }
    for (int kv : {128, 2048}) decode(1, kv);
    for (int w : {2, 3, 4, 5, 8, 16}) decode(w, 128);
    draft();
    if (mode != Mode::decode) prefills();
    parts();
  }

 private:
  static constexpr int kCtx = 4096;
  static constexpr int kMaxRows = 2048;
  struct Part {
    const char* name;
    int mask;
  };
  static constexpr Part kParts[] = {{"norm+qkv", 1}, {"attention, its norm", 6}, {"output proj", 8}, {"moe", 16}};

  void sync() {
    int32_t dummy;
    b_->download(&dummy, tokens_.data, 4);
  }

  double measure_copy() {
    const size_t n = size_t{4} << 30;
    Buffer a = b_->alloc(n), c = b_->alloc(n);
    tokens_ = b_->alloc(kMaxRows * 4);
    gpu::Stream stream = nullptr;
    double best = 1e9;
    for (int i = 0; i < 8; ++i) {
      GPU_CHECK(DeviceSynchronize());
      const double t = now();
      for (int j = 0; j < 4; ++j) GPU_CHECK(MemcpyAsync(c.data, a.data, n, GPU_API(MemcpyDeviceToDevice), stream));
      GPU_CHECK(DeviceSynchronize());
      best = std::min(best, (now() - t) / 4);
    }
    return 2.0 * static_cast<double>(n) / best * 1e-9;
  }

  Buffer constants(size_t n, float value) {
    const std::vector<float> v(n, value);
    Buffer buffer = b_->alloc(n * 4);
    b_->upload(buffer.data, v.data(), n * 4);
    return buffer;
  }

  void build() {
    const double t = now();
    const int q = s_.n_head * s_.head_dim, kv = s_.n_head_kv * s_.head_dim;
    uint64_t seed = 1;
    auto w = [&](DType type, int64_t n_in, int64_t n_out, int64_t e = 1) {
      return b_->random_weight(type, n_in, n_out, e, ++seed);
    };
    const size_t side = static_cast<size_t>(kv) * kCtx * 2;
    auto cache = [&] {
      Buffer c = b_->alloc(side);
      GPU_CHECK(MemsetAsync(c.data, 0, side, nullptr));
      return c;
    };
    for (int i = 0; i < s_.n_layer; ++i) {
      Layer l;
      l.q = w(DType::Q4_0, s_.n_embd, q);
      l.k = w(DType::Q4_0, s_.n_embd, kv);
      l.v = w(DType::Q4_0, s_.n_embd, kv);
      l.o = w(DType::Q4_0, q, s_.n_embd);
      l.router = w(DType::F32, s_.n_embd, s_.n_expert);
      l.gate = w(DType::Q4_0, s_.n_embd, s_.n_ff, s_.n_expert);
      l.up = w(DType::Q4_0, s_.n_embd, s_.n_ff, s_.n_expert);
      l.down = w(DType::Q4_0, s_.n_ff, s_.n_embd, s_.n_expert);
      l.kc = cache();
      l.vc = cache();
      layers_.push_back(std::move(l));
    }
    embedding_ = w(DType::Q8_0, s_.n_embd, s_.n_vocab);
    head_ = w(DType::Q8_0, s_.n_embd, s_.n_vocab);
    draft_head_ = w(DType::Q4_0, s_.n_embd, s_.n_vocab);
    const int dq = d_.n_head * d_.head_dim, dkv = d_.n_head_kv * d_.head_dim;
    for (int i = 0; i < d_.n_layer; ++i) {
      DraftLayer l;
      l.q = w(DType::Q8_0, s_.n_embd, dq);
      l.k = w(DType::Q8_0, s_.n_embd, dkv);
      l.v = w(DType::Q8_0, s_.n_embd, dkv);
      l.o = w(DType::Q8_0, dq, s_.n_embd);
      l.gate = w(DType::Q8_0, s_.n_embd, d_.n_ff);
      l.up = w(DType::Q8_0, s_.n_embd, d_.n_ff);
      l.down = w(DType::Q8_0, d_.n_ff, s_.n_embd);
      l.kc = cache();
      l.vc = cache();
      draft_layers_.push_back(std::move(l));
    }
    fc_ = w(DType::Q8_0, static_cast<int64_t>(d_.taps) * s_.n_embd, s_.n_embd);
    ones_ = constants(static_cast<size_t>(std::max(q, s_.n_embd)), 1.0f);
    tens_ = constants(static_cast<size_t>(s_.n_embd), 10.0f);
    zeros_ = constants(256, 0.0f);
    inv_freq_ = constants(64, 0.01f);
    x_ = b_->alloc(static_cast<size_t>(kMaxRows) * s_.n_embd * 4);
    q_ = b_->alloc(static_cast<size_t>(kMaxRows) * q * 4);
    k_ = b_->alloc(static_cast<size_t>(kMaxRows) * kv * 4);
    v_ = b_->alloc(static_cast<size_t>(kMaxRows) * kv * 4);
    attn_ = b_->alloc(static_cast<size_t>(kMaxRows) * q * 4);
    logits_ = b_->alloc(static_cast<size_t>(16) * s_.n_vocab * 4);
    taps_ = constants(static_cast<size_t>(16) * d_.taps * s_.n_embd, 0.1f);
    sync();
    std::printf("built %d layers in %.1f s, %.1f GiB in use\n", s_.n_layer, now() - t,
                static_cast<double>(b_->memory().total - b_->memory().free) / 1073741824.0);
  }

  template <typename L>
  KvLayer cache_of(const L& l) const {
    return {l.kc.data, l.vc.data, DType::F16, s_.n_head_kv, s_.head_dim, kCtx};
  }

  void attention_ops(const Layer& l, Step step, int part = 15) {
    if (part & 1) {
      const MatmulOut qkv[] = {{&l.q, q_.as<float>()}, {&l.k, k_.as<float>()}, {&l.v, v_.as<float>()}};
      b_->norm_matmul(x_.as<float>(), ones_.as<float>(), 1e-6f, step.rows, qkv, 3);
    }
    if (part & 2) {
      QkvPost p;
      p.n_head = s_.n_head;
      p.n_head_kv = s_.n_head_kv;
      p.head_dim = s_.head_dim;
      p.n_rot = s_.n_rot;
      p.q_norm = p.k_norm = ones_.as<float>();
      p.inv_freq = inv_freq_.as<float>();
      b_->qkv_post(p, step, q_.as<float>(), k_.as<float>(), v_.as<float>(), cache_of(l));
    }
    if (part & 4) {
      Attention a;
      a.n_head = s_.n_head;
      a.n_head_kv = s_.n_head_kv;
      a.head_dim = s_.head_dim;
      a.scale = 0.088388f;
      b_->attention(a, step, q_.as<float>(), cache_of(l), attn_.as<float>());
    }
    if (part & 8) b_->matmul_add(l.o, attn_.as<float>(), step.rows, x_.as<float>());
  }

  void moe_ops(const Layer& l, int rows) {
    Moe m;
    m.n_expert = s_.n_expert;
    m.top_k = s_.top_k;
    m.norm = ones_.as<float>();
    m.router = &l.router;
    m.bias = zeros_.as<float>();
    m.gate = &l.gate;
    m.up = &l.up;
    m.down = &l.down;
    b_->moe(m, rows, x_.as<float>());
  }

  void forward(Step step) {
    embed(step.rows);
    for (const Layer& l : layers_) {
      attention_ops(l, step);
      moe_ops(l, step.rows);
    }
  }

  // Random embeddings are small; scaled up, they keep the rows' routes apart as real ones do.
  void embed(int rows) {
    b_->embed(embedding_, tokens_.as<int32_t>(), rows, x_.as<float>());
    b_->rms_norm(x_.as<float>(), tens_.as<float>(), 1e-6f, rows, s_.n_embd, x_.as<float>());
  }

  void head(const Weight& w, int first, int rows) {
    const MatmulOut out{&w, logits_.as<float>()};
    b_->norm_matmul(x_.as<float>() + static_cast<int64_t>(first) * s_.n_embd, ones_.as<float>(), 1e-6f, rows, &out, 1);
  }

  template <typename Ops>
  void step(uint64_t key, Step st, Ops ops) {
    if (eager_ || !b_->begin_step(key, st)) {
      ops();
      if (!eager_) b_->end_step();
    }
  }

  void random_tokens(int rows) {
    std::vector<int32_t> t(static_cast<size_t>(rows));
    for (int32_t& v : t) v = static_cast<int32_t>(rand_() % static_cast<uint64_t>(s_.n_vocab));
    b_->upload(tokens_.data, t.data(), t.size() * 4);
  }

  uint64_t rand_() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return state_ >> 33;
  }

  // Median seconds of one call of f, which ends with the host waiting.
  template <typename F>
  double median(int repeats, F f) {
    std::vector<double> times;
    for (int i = 0; i < 3; ++i) f();
    for (int i = 0; i < repeats; ++i) {
      const double t = now();
      f();
      times.push_back(now() - t);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  void line(const char* what, double seconds, double bytes, const char* notes = "") {
    const double rate = bytes / seconds * 1e-9;
    std::printf("%-26s %9.4f %9.4f %8.0f %6.1f%% %s\n", what, seconds * 1e3, bytes * 1e-9, rate,
                100.0 * rate / copy_gbps_, notes);
    std::fflush(stdout);
  }

  double layer_bytes() const {
    const Layer& l = layers_[0];
    return static_cast<double>(l.q.bytes() + l.k.bytes() + l.v.bytes() + l.o.bytes() + l.router.bytes());
  }
  double expert_bytes() const {
    const Layer& l = layers_[0];
    return static_cast<double>(l.gate.bytes() + l.up.bytes() + l.down.bytes()) / s_.n_expert;
  }

  void decode(int rows, int pos0) {
    const int repeats = 40;
    Top1 best[16];
    auto one = [&] {
      random_tokens(rows);
      const Step st{rows, pos0};
      step(static_cast<uint64_t>(rows), st, [&] {
        forward(st);
        head(head_, 0, rows);
      });
      b_->top1(logits_.as<float>(), rows, s_.n_vocab, best);
    };
    for (int i = 0; i < 3; ++i) one();
    (void)b_->take_expert_count();
    const double t = median(repeats, one);
    const Backend::ExpertCount c = b_->take_expert_count();
    const double distinct = static_cast<double>(c.distinct) / static_cast<double>(c.calls);
    const double kv = 2.0 * s_.n_head_kv * s_.head_dim * 2.0 * (pos0 + rows);
    const double bytes =
        s_.n_layer * (layer_bytes() + distinct * expert_bytes() + kv) + static_cast<double>(head_.bytes());
    if (rows == 1 && pos0 == 128) {
      t1_ = t;
      bytes1_ = bytes;
    }
    char what[64], notes[128];
    std::snprintf(what, sizeof(what), "step w=%d at %d", rows, pos0);
    std::snprintf(notes, sizeof(notes), "%.1f distinct experts a layer; time/byte model of w=1: %.3f; id %d", distinct,
                  t / t1_ / (bytes / bytes1_), best[0].id);
    line(what, t, bytes, notes);
  }

  QkvPost draft_post() const {
    QkvPost p;
    p.n_head = d_.n_head;
    p.n_head_kv = d_.n_head_kv;
    p.head_dim = d_.head_dim;
    p.n_rot = d_.head_dim;
    p.norm = QkNorm::per_head;
    p.q_norm = p.k_norm = ones_.as<float>();
    p.inv_freq = inv_freq_.as<float>();
    return p;
  }

  // Taps of committed tokens to keys and values of all layers, as DFlashDrafter::ingest does.
  void ingest(Step st) {
    float* x = x_.as<float>();
    const MatmulOut fused{&fc_, x};
    b_->norm_matmul(taps_.as<float>(), nullptr, 0.0f, st.rows, &fused, 1);
    const int64_t size = static_cast<int64_t>(st.rows) * d_.n_head_kv * d_.head_dim;
    std::vector<MatmulOut> outs;
    for (size_t i = 0; i < draft_layers_.size(); ++i) {
      outs.push_back({&draft_layers_[i].k, k_.as<float>() + static_cast<int64_t>(i) * size});
      outs.push_back({&draft_layers_[i].v, v_.as<float>() + static_cast<int64_t>(i) * size});
    }
    b_->norm_matmul(x, ones_.as<float>(), 1e-6f, st.rows, outs.data(), static_cast<int>(outs.size()));
    for (size_t i = 0; i < draft_layers_.size(); ++i) {
      b_->qkv_post(draft_post(), st, nullptr, outs[2 * i].y, outs[2 * i + 1].y, cache_of(draft_layers_[i]));
    }
  }

  void draft_ops(const DraftLayer& l, Step st, int part = 31) {
    float* x = x_.as<float>();
    if (part & 1) {
      const MatmulOut qkv[] = {{&l.q, q_.as<float>()}, {&l.k, k_.as<float>()}, {&l.v, v_.as<float>()}};
      b_->norm_matmul(x, ones_.as<float>(), 1e-6f, st.rows, qkv, 3);
    }
    if (part & 2) {
      b_->qkv_post(draft_post(), st, q_.as<float>(), k_.as<float>(), v_.as<float>(), cache_of(l));
    }
    if (part & 4) {
      Attention a;
      a.n_head = d_.n_head;
      a.n_head_kv = d_.n_head_kv;
      a.head_dim = d_.head_dim;
      a.scale = 0.088388f;
      a.causal = false;
      b_->attention(a, st, q_.as<float>(), cache_of(l), attn_.as<float>());
    }
    if (part & 8) b_->matmul_add(l.o, attn_.as<float>(), st.rows, x);
    if (part & 16) {
      Ffn f;
      f.norm = ones_.as<float>();
      f.gate = &l.gate;
      f.up = &l.up;
      f.down = &l.down;
      b_->ffn(f, st.rows, x);
    }
  }

  void draft() {
    draft_round("draft 4 slots, ingest 2", head_, 1000);
    draft_round("draft 4 slots, its own Q4_0 head", draft_head_, 1005);
    draft_parts();
  }

  // One round with a head; key names its recorded steps.
  void draft_round(const char* name, const Weight& head_used, uint64_t key) {
    const int rows = d_.slots + 1, pos0 = 128;
    const Step st{rows, pos0}, taken{2, pos0 - 2};  // two committed tokens are taken in
    Top1 best[16];
    auto one = [&] {
      step(key, taken, [&] { ingest(taken); });
      random_tokens(rows);
      step(key + 1, st, [&] {
        b_->embed(embedding_, tokens_.as<int32_t>(), rows, x_.as<float>());
        for (const DraftLayer& l : draft_layers_) draft_ops(l, st);
        head(head_used, 1, d_.slots);
      });
      b_->top1(logits_.as<float>(), d_.slots, s_.n_vocab, best);
    };
    const double t = median(40, one);
    double kv = 0.0, layer = 0.0;
    for (const DraftLayer& l : draft_layers_) {
      kv += static_cast<double>(l.k.bytes() + l.v.bytes());
      layer += static_cast<double>(l.q.bytes() + l.k.bytes() + l.v.bytes() + l.o.bytes() + l.gate.bytes() +
                                   l.up.bytes() + l.down.bytes());
    }
    char notes[96];
    std::snprintf(notes, sizeof(notes), "%.1f%% of a one-row step of this many layers", 100.0 * t / t1_);
    line(name, t, static_cast<double>(fc_.bytes() + head_used.bytes()) + kv + layer, notes);
  }

  // What a round is made of, ten times each in a recorded step.
  void draft_parts() {
    const Step st{d_.slots + 1, 128}, taken{2, 126};
    double kv = 0.0;
    for (const DraftLayer& l : draft_layers_) kv += static_cast<double>(l.k.bytes() + l.v.bytes());
    auto part = [&](const char* name, uint64_t key, double bytes, auto ops) {
      auto ten = [&] {
        step(key, st, [&] {
          for (int i = 0; i < 10; ++i) ops(i);
        });
        sync();
      };
      line(name, median(20, ten) / 10.0, bytes);
    };
    part("draft: ingest 2", 1010, static_cast<double>(fc_.bytes()) + kv, [&](int) { ingest(taken); });
    const DraftLayer& l = draft_layers_[0];
    const double qkv = static_cast<double>(l.q.bytes() + l.k.bytes() + l.v.bytes());
    const double ffn = static_cast<double>(l.gate.bytes() + l.up.bytes() + l.down.bytes());
    const struct {
      const char* name;
      int mask;
      double bytes;
    } kinds[] = {{"draft layer: norm+qkv", 1, qkv},
                 {"draft layer: qkv_post", 2, 0.0},
                 {"draft layer: attention", 4, 0.0},
                 {"draft layer: output proj", 8, static_cast<double>(l.o.bytes())},
                 {"draft layer: ffn", 16, ffn}};
    for (const auto& kind : kinds) {
      part(kind.name, static_cast<uint64_t>(1020 + kind.mask), kind.bytes,
           [&](int i) { draft_ops(draft_layers_[static_cast<size_t>(i) % draft_layers_.size()], st, kind.mask); });
    }
  }

  void prefills() {
    for (int rows : {512, 2048}) prefill(rows);
    for (int rows : {512, 2048}) prefill_parts(rows);
  }

  // One kind of op over all layers: time per layer and rate of matrix work (of a score and a value product for
  // attention).
  void prefill_parts(int rows) {
    const Step st{rows, 0};
    const double per_weight = 2.0 * rows * 32.0 / 18.0;  // Q4_0: 18 bytes for 32 weights
    const double pairs = 0.5 * rows * (rows + 1.0);
    for (const Part& p : kParts) {
      random_tokens(rows);
      embed(rows);
      (void)b_->take_expert_count();
      auto one = [&] {
        for (const Layer& l : layers_) {
          if (p.mask == 16) {
            moe_ops(l, rows);
          } else {
            attention_ops(l, st, p.mask);
          }
        }
        sync();
      };
      const double t = median(9, one) / s_.n_layer;
      const Layer& l = layers_[0];
      const double flop = p.mask == 1    ? per_weight * static_cast<double>(l.q.bytes() + l.k.bytes() + l.v.bytes())
                          : p.mask == 4  ? 4.0 * pairs * s_.n_head * s_.head_dim
                          : p.mask == 8  ? per_weight * static_cast<double>(l.o.bytes())
                          : p.mask == 16 ? per_weight * s_.top_k * expert_bytes()
                                         : 0.0;
      const Backend::ExpertCount c = b_->take_expert_count();
      std::printf("prefill %4d %-20s %8.4f ms %7.1f TFLOP/s %6.1f distinct experts\n", rows, p.name, t * 1e3,
                  flop / t * 1e-12, c.calls > 0 ? static_cast<double>(c.distinct) / static_cast<double>(c.calls) : 0.0);
    }
  }

  void prefill(int rows) {
    const Step st{rows, 0};
    auto one = [&] {
      random_tokens(rows);
      forward(st);
      head(head_, rows - 1, 1);
      sync();
    };
    const double t = median(5, one);
    const double attn = layer_bytes() - static_cast<double>(layers_[0].router.bytes());
    const double params = s_.n_layer * (attn + s_.top_k * expert_bytes()) / 18.0 * 32.0;
    char what[64], notes[128];
    std::snprintf(what, sizeof(what), "prefill %d", rows);
    std::snprintf(notes, sizeof(notes), "%.0f tokens/s, %.1f TFLOP/s of matrix work", rows / t,
                  2e-12 * params * rows / t);
    line(what, t, s_.n_layer * (layer_bytes() + s_.n_expert * expert_bytes()), notes);
  }

  // One kind of op over all layers, as a recorded step: time per layer, launch gaps included.
  void parts() {
    for (int rows : {1, 2, 5, 8}) {
      const Step st{rows, 128};
      for (const Part& p : kParts) {
        (void)b_->take_expert_count();
        random_tokens(rows);
        embed(rows);
        auto one = [&] {
          step(static_cast<uint64_t>(2000 + rows * 32 + p.mask), st, [&] {
            for (const Layer& l : layers_) {
              if (p.mask == 16) {
                moe_ops(l, rows);
              } else {
                attention_ops(l, st, p.mask);
              }
            }
          });
          sync();
        };
        const double t = median(20, one) / s_.n_layer;
        const Backend::ExpertCount c = b_->take_expert_count();
        const Layer& l = layers_[0];
        const double distinct = c.calls > 0 ? static_cast<double>(c.distinct) / static_cast<double>(c.calls) : 0.0;
        const double bytes = p.mask == 1    ? static_cast<double>(l.q.bytes() + l.k.bytes() + l.v.bytes())
                             : p.mask == 8  ? static_cast<double>(l.o.bytes())
                             : p.mask == 6  ? 4.0 * 1024 * (128 + rows)
                             : p.mask == 16 ? static_cast<double>(l.router.bytes()) + distinct * expert_bytes()
                                            : 0.0;
        char what[64];
        std::snprintf(what, sizeof(what), "w=%d %s", rows, p.name);
        line(what, t, bytes, "per layer");
      }
    }
    for (int rows : {1, 4}) {
      auto one = [&] {
        step(static_cast<uint64_t>(3000 + rows), {rows, 0}, [&] { head(head_, 0, rows); });
        sync();
      };
      char what[64];
      std::snprintf(what, sizeof(what), "head, %d rows", rows);
      line(what, median(20, one), static_cast<double>(head_.bytes()));
    }
  }

  Shape s_;
  DrafterShape d_;
  std::unique_ptr<Backend> b_;
  bool eager_;
  double copy_gbps_ = 0.0, t1_ = 1.0, bytes1_ = 1.0;
  uint64_t state_ = 1;
  std::vector<Layer> layers_;
  std::vector<DraftLayer> draft_layers_;
  Weight embedding_, head_, draft_head_, fc_;
  Buffer tokens_, ones_, tens_, zeros_, inv_freq_, x_, q_, k_, v_, attn_, logits_, taps_;
};

}  // namespace
}  // namespace dflash

int main(int argc, char** argv) {
  try {
    const int layers = argc > 1 ? std::atoi(argv[1]) : 62;
    bool eager = false;
    auto mode = dflash::Bench::Mode::all;
    for (int i = 2; i < argc; ++i) {
      eager = eager || std::strcmp(argv[i], "eager") == 0;
      if (std::strcmp(argv[i], "decode") == 0) mode = dflash::Bench::Mode::decode;
      if (std::strcmp(argv[i], "prefill") == 0) mode = dflash::Bench::Mode::prefill;
    }
    dflash::Bench(layers, eager).run(mode);
  } catch (const std::exception& e) {
    std::printf("FAIL %s\n", e.what());
    return 1;
  }
}
