// Every op of the GPU backend against double-precision references, over awkward shapes; a row's bits against the same
// row in other company (1..16 rows, and more than 16: quantised weights have other kernels there); guards after
// outputs. Run on a machine with a device (tests/gpu/run_device.sh). Exit status 0: all passed.
//
// gpu_test_ops [quick] [small | matmul | attention | experts | layers | steps | errors ...]   quick: fewer shapes;
// names: these alone

#include "backend/hip/hip_backend.h"
#include "ops_tests.h"
#include "reference.h"

namespace dflash::test {

bool g_quick = false;

namespace {

// NMSE limits. Activation quantisation is part of the reference, so what is left is rounding; experts quantise twice,
// and a rounding difference before the second may move a value by one step.
constexpr double kLimitFloat = 1e-11;   // float weights, norms
constexpr double kLimitQuant = 1e-9;    // int8 activations
constexpr double kLimitExperts = 1e-5;  // SwiGLU products quantised again
// More than 16 rows: weights and activations are rounded to f16 (11 bits) or bf16 (8 bits, the scale too; Q4_1's min is
// several times its values), against exact activations. The int8 activations of few rows lie near 3e-5 of those.
constexpr double kLimitF16 = 2e-7, kLimitBf16 = 3e-5;
// KV F32, F16, Q8_0. Rounding the cache to Q8_0 alone errs by up to 2.2e-4 here, with exact sums.
constexpr double kLimitAttention[] = {1e-10, 1e-6, 2.5e-4};

const std::vector<int> kRowCounts = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 64, 65, 129};

void check(const std::string& what, const Doubles& want, const Floats& got, double limit, double* worst) {
  const double e = nmse(want, got);
  *worst = std::max(*worst, e);
  expect(e <= limit, cat(what, ": NMSE ", e, " over ", limit));
}

void report(const char* op, double worst, double limit) {
  std::printf("%-34s worst NMSE %.2e  limit %.0e\n", op, worst, limit);
}

void test_matmul(Backend& b, std::mt19937& rng) {
  struct Shape {
    int64_t n_in, n_out;
    int rows;
  };
  const std::vector<Shape> shapes = {{3072, 544, 140}, {32, 32, 40},   {224, 200, 600},
                                     {6144, 96, 140},  {416, 31, 140}, {416, 5000, 20}};
  for (DType type : {DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::F32, DType::F16, DType::BF16}) {
    double worst = 0.0, worst_f16 = 0.0, worst_bf16 = 0.0;
    const double limit = is_quantized(type) ? kLimitQuant : kLimitFloat;
    for (const Shape& s : shapes) {
      if (g_quick && s.n_in * s.n_out > 100000) continue;
      const auto w0 = random_tensor(rng, type, s.n_in, s.n_out), w1 = random_tensor(rng, type, s.n_in, 64);
      const Weight a = b.load(w0->host, w0), c = b.load(w1->host, w1);
      const Floats x = random_floats(rng, static_cast<size_t>(s.rows * s.n_in), 3.0f);
      const Floats norm = random_floats(rng, static_cast<size_t>(s.n_in));
      Guarded gx(b, x), gn(b, norm);
      const std::string what = cat("norm_matmul ", dtype_info(type).name, " ", s.n_in, "x", s.n_out);
      auto run = [&](int first, int rows, bool with_norm) {
        Guarded y0(b, static_cast<size_t>(rows * s.n_out)), y1(b, static_cast<size_t>(rows * 64));
        const MatmulOut outs[] = {{&a, y0.data()}, {&c, y1.data()}};
        b.norm_matmul(gx.data() + first * s.n_in, with_norm ? gn.data() : nullptr, kEps, rows, outs, 2);
        return std::make_pair(y0.get(what), y1.get(what));
      };
      // the norm's own rounding can move a quantised activation by one step
      const double norm_limit = is_quantized(type) ? 1e-6 : limit;
      double norm_worst = 0.0;
      // Where the type is quantised, up to 16 rows have their own kernels and bits.
      for (const bool few : {true, false}) {
        const int most = few ? kInt8Rows : s.rows, begin = s.rows - most;
        const bool half = is_quantized(type) && !few;
        const Floats xs(x.begin() + begin * s.n_in, x.end());
        const auto normed = run(begin, most, true), plain = run(begin, most, false);
        const Doubles h = ref_norm(xs, norm, kEps, most, s.n_in);
        check(what, ref_matmul(*w0, h, most), normed.first, half ? kLimitF16 : norm_limit,
              half ? &worst_f16 : &norm_worst);
        check(what, ref_matmul(*w1, h, most), normed.second, half ? kLimitF16 : norm_limit,
              half ? &worst_f16 : &norm_worst);
        check(what, ref_matmul(*w0, to_doubles(xs), most), plain.first, half ? kLimitBf16 : limit,
              half ? &worst_bf16 : &worst);
        for (int rows : kRowCounts) {
          if (rows > most || (half && rows <= kInt8Rows)) continue;
          const int first = most - rows;
          for (const bool with_norm : {true, false}) {
            const auto& [all0, all1] = with_norm ? normed : plain;
            const auto [z0, z1] = run(begin + first, rows, with_norm);
            const Floats tail0(all0.begin() + first * s.n_out, all0.end()),
                tail1(all1.begin() + first * 64, all1.end());
            expect(same_bits(z0, tail0, z0.size()), cat(what, ": ", rows, " rows differ from ", most));
            expect(same_bits(z1, tail1, z1.size()), cat(what, ": ", rows, " rows differ from ", most, " (second)"));
          }
        }
      }
      // matmul_add
      const Floats bases = random_floats(rng, static_cast<size_t>(s.rows * s.n_out));
      for (int rows : {kInt8Rows, s.rows}) {
        const Floats base(bases.begin(), bases.begin() + rows * s.n_out);
        Guarded y(b, base);
        b.matmul_add(a, gx.data(), rows, y.data());
        Doubles want = ref_matmul(*w0, to_doubles(Floats(x.begin(), x.begin() + rows * s.n_in)), rows);
        for (size_t i = 0; i < want.size(); ++i) want[i] += base[i];
        const bool half = is_quantized(type) && rows > kInt8Rows;
        const Floats all = y.get("matmul_add");
        check("matmul_add", want, all, half ? kLimitBf16 : limit, half ? &worst_bf16 : &worst);
        for (int few : kRowCounts) {  // the first rows of these alone
          if (few > rows || (half && few <= kInt8Rows)) continue;
          Guarded z(b, Floats(base.begin(), base.begin() + few * s.n_out));
          b.matmul_add(a, gx.data(), few, z.data());
          const Floats some = z.get("matmul_add");
          expect(same_bits(some, all, some.size()), cat("matmul_add: ", few, " rows differ from ", rows));
        }
      }
    }
    report(cat("matmul ", dtype_info(type).name).c_str(), worst, limit);
    if (!is_quantized(type)) continue;
    report(cat("matmul ", dtype_info(type).name, ", many rows, f16").c_str(), worst_f16, kLimitF16);
    report(cat("matmul ", dtype_info(type).name, ", many rows, bf16").c_str(), worst_bf16, kLimitBf16);
  }
}

void test_small(Backend& b, std::mt19937& rng) {
  double worst = 0.0;
  for (int64_t n : {1, 31, 128, 3072, 5000}) {
    for (int rows : {1, 3, 17}) {
      const Floats x = random_floats(rng, static_cast<size_t>(rows * n), 5.0f), w = random_floats(rng, n);
      Guarded gx(b, x), gw(b, w), gy(b, x.size());
      b.rms_norm(gx.data(), gw.data(), kEps, rows, n, gy.data());
      check("rms_norm", ref_norm(x, w, kEps, rows, n), gy.get("rms_norm"), kLimitFloat, &worst);
      b.rms_norm(gx.data(), gw.data(), kEps, rows, n, gx.data());
      expect(same_bits(gx.get("rms_norm"), gy.get("rms_norm"), x.size()), "rms_norm in place differs");
      const int64_t stride = n + 7;
      Guarded dst(b, static_cast<size_t>(rows * stride));
      b.copy_rows(gy.data(), rows, n, dst.data(), stride);
      const Floats d = dst.get("copy_rows"), y = gy.get("copy_rows");
      for (int r = 0; r < rows; ++r) {
        expect(std::memcmp(&d[r * stride], &y[r * n], n * sizeof(float)) == 0, "copy_rows");
      }
    }
  }
  report("rms_norm, copy_rows", worst, kLimitFloat);
  for (DType type : {DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::F32, DType::F16, DType::BF16}) {
    const auto t = random_tensor(rng, type, 224, 77);
    const Weight w = b.load(t->host, t);
    const std::vector<int32_t> tokens = {0, 76, 31, 32, 5, 5, 64};
    Buffer ids = b.alloc(tokens.size() * 4);
    b.upload(ids.data, tokens.data(), tokens.size() * 4);
    Guarded x(b, tokens.size() * 224);
    b.embed(w, ids.as<int32_t>(), static_cast<int>(tokens.size()), x.data());
    const Floats got = x.get("embed");
    double error = 0.0;
    for (size_t r = 0; r < tokens.size(); ++r) {
      for (int i = 0; i < 224; ++i) {
        error = std::max(error, std::fabs(static_cast<double>(got[r * 224 + i]) - t->values[tokens[r] * 224 + i]));
      }
    }
    expect(error < 1e-7, cat("embed ", dtype_info(type).name, " error ", error));
  }
  for (int64_t n : {int64_t{2}, int64_t{70}, int64_t{1024}, int64_t{200064}}) {
    const int rows = 5;
    Floats x = random_floats(rng, static_cast<size_t>(rows * n), 4.0f);
    if (n > 60) {  // ties: the lowest id wins
      x[0 * n + 50] = x[0 * n + 17] = 99.0f;
      x[1 * n + n - 1] = x[1 * n + 1] = 99.0f;
    }
    Guarded gx(b, x);
    std::vector<Top1> got(rows);
    b.top1(gx.data(), rows, n, got.data());
    for (int r = 0; r < rows; ++r) {
      int64_t best = 0;
      for (int64_t i = 1; i < n; ++i) best = x[r * n + i] > x[r * n + best] ? i : best;
      double sum = 0.0, second = -1e30;
      for (int64_t i = 0; i < n; ++i) {
        sum += std::exp(static_cast<double>(x[r * n + i]) - x[r * n + best]);
        if (i != best) second = std::max(second, static_cast<double>(x[r * n + i]));
      }
      expect(got[r].id == best, cat("top1 id ", got[r].id, " not ", best));
      expect(std::fabs(got[r].prob * sum - 1.0) < 1e-4, cat("top1 prob ", got[r].prob));
      expect(std::fabs(got[r].margin - (x[r * n + best] - second)) < 1e-5, "top1 margin");
    }
  }
}

// ---- attention

struct AttentionCase {
  int n_head, n_head_kv, head_dim, n_rot;
  QkNorm norm;
  bool causal;
  int window;
};

// norm and rotation of one head-vector list, in double
void ref_norm_rope(const AttentionCase& c, int heads, const Floats& norm, const Floats& inv_freq, double scale,
                   int64_t position, double* x) {
  const int d = c.head_dim;
  auto normalise = [&](double* v, int n, auto weight) {
    double squares = 0.0;
    for (int i = 0; i < n; ++i) squares += v[i] * v[i];
    const double inverse = 1.0 / std::sqrt(squares / n + kEps);
    for (int i = 0; i < n; ++i) v[i] *= inverse * weight(i);
  };
  if (c.norm == QkNorm::whole) {
    normalise(x, heads * d, [&](int i) { return norm[i]; });
  } else {
    for (int h = 0; h < heads; ++h) normalise(x + h * d, d, [&](int i) { return norm[i]; });
  }
  for (int h = 0; h < heads; ++h) {
    for (int i = 0; i < c.n_rot / 2; ++i) {
      const float angle = static_cast<float>(position) * inv_freq[i];  // f32 as on the device
      const double co = std::cos(static_cast<double>(angle)) * scale, si = std::sin(static_cast<double>(angle)) * scale;
      double& a = x[h * d + i];
      double& e = x[h * d + i + c.n_rot / 2];
      const double a0 = a, e0 = e;
      a = a0 * co - e0 * si;
      e = e0 * co + a0 * si;
    }
  }
}

void test_attention(Backend& b, std::mt19937& rng) {
  const std::vector<AttentionCase> cases = {
      {12, 2, 128, 64, QkNorm::whole, true, 0},     {4, 2, 128, 64, QkNorm::whole, true, 0},
      {4, 4, 128, 128, QkNorm::per_head, false, 0}, {2, 1, 128, 128, QkNorm::per_head, false, 100},
      {6, 1, 64, 64, QkNorm::per_head, true, 300},  {3, 3, 32, 16, QkNorm::whole, true, 0},
      {5, 1, 256, 64, QkNorm::per_head, true, 0},   {16, 8, 128, 64, QkNorm::whole, true, 0}};
  const int n_ctx = 1024, total = 800;
  const DType types[] = {DType::F32, DType::F16, DType::Q8_0};
  double worst[3] = {0.0, 0.0, 0.0};
  for (const AttentionCase& c : cases) {
    if (g_quick && c.n_head > 4) continue;
    const int qn = c.n_head * c.head_dim, kn = c.n_head_kv * c.head_dim;
    const Floats q = random_floats(rng, static_cast<size_t>(total) * qn),
                 k = random_floats(rng, static_cast<size_t>(total) * kn),
                 v = random_floats(rng, static_cast<size_t>(total) * kn);
    const bool whole = c.norm == QkNorm::whole;
    const Floats q_norm = random_floats(rng, whole ? qn : c.head_dim),
                 k_norm = random_floats(rng, whole ? kn : c.head_dim);
    Floats inv_freq(c.n_rot / 2);
    for (int i = 0; i < c.n_rot / 2; ++i) inv_freq[i] = static_cast<float>(std::pow(5e6, -2.0 * i / c.n_rot));
    Doubles kr = to_doubles(k), qr = to_doubles(q);
    for (int p = 0; p < total; ++p) {
      ref_norm_rope(c, c.n_head_kv, k_norm, inv_freq, 1.1f, p, &kr[static_cast<size_t>(p) * kn]);
      ref_norm_rope(c, c.n_head, q_norm, inv_freq, 1.1f, p, &qr[static_cast<size_t>(p) * qn]);
    }
    Guarded gq_norm(b, q_norm), gk_norm(b, k_norm), gfreq(b, inv_freq);
    QkvPost post;
    post.n_head = c.n_head;
    post.n_head_kv = c.n_head_kv;
    post.head_dim = c.head_dim;
    post.n_rot = c.n_rot;
    post.norm = c.norm;
    post.q_norm = gq_norm.data();
    post.k_norm = gk_norm.data();
    post.inv_freq = gfreq.data();
    post.rope_scale = 1.1f;
    post.eps = kEps;
    Attention a;
    a.n_head = c.n_head;
    a.n_head_kv = c.n_head_kv;
    a.head_dim = c.head_dim;
    a.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    a.causal = c.causal;
    a.sliding_window = c.window;
    for (int ti = 0; ti < 3; ++ti) {
      const size_t side = static_cast<size_t>(c.n_head_kv) * n_ctx * row_bytes(types[ti], c.head_dim);
      Guarded ck(b, side / 4), cv(b, side / 4);
      const KvLayer kv = {ck.data(), cv.data(), types[ti], c.n_head_kv, c.head_dim, n_ctx};
      auto step = [&](int pos0, int rows) {
        Guarded gq(
            b, Floats(q.begin() + static_cast<int64_t>(pos0) * qn, q.begin() + static_cast<int64_t>(pos0 + rows) * qn));
        Guarded gk(
            b, Floats(k.begin() + static_cast<int64_t>(pos0) * kn, k.begin() + static_cast<int64_t>(pos0 + rows) * kn));
        Guarded gv(
            b, Floats(v.begin() + static_cast<int64_t>(pos0) * kn, v.begin() + static_cast<int64_t>(pos0 + rows) * kn));
        Guarded out(b, static_cast<size_t>(rows) * qn);
        b.qkv_post(post, {rows, pos0}, gq.data(), gk.data(), gv.data(), kv);
        b.attention(a, {rows, pos0}, gq.data(), kv, out.data());
        return out.get("attention");
      };
      std::vector<std::pair<int, int>> steps = {{0, 1},   {1, 16},    {17, 200}, {217, 33},  {250, 5},
                                                {255, 2}, {257, 243}, {500, 13}, {513, 280}, {793, 7}};
      const std::string what =
          cat("attention ", c.n_head, "/", c.n_head_kv, "x", c.head_dim, " ", dtype_info(types[ti]).name);
      for (const auto& [pos0, rows] : steps) {
        const Floats out = step(pos0, rows);
        Doubles want(out.size());
        for (int r = 0; r < rows; ++r) {
          const int end = c.causal ? pos0 + r + 1 : pos0 + rows;
          const int first = c.window > 0 ? std::max(0, pos0 + r + 1 - c.window) : 0;
          for (int h = 0; h < c.n_head; ++h) {
            const int g = h / (c.n_head / c.n_head_kv);
            Doubles s(end - first);
            double largest = -1e300, sum = 0.0;
            for (int p = first; p < end; ++p) {
              double dot = 0.0;
              for (int i = 0; i < c.head_dim; ++i) {
                dot += qr[static_cast<size_t>(pos0 + r) * qn + h * c.head_dim + i] *
                       kr[static_cast<size_t>(p) * kn + g * c.head_dim + i];
              }
              s[p - first] = dot * a.scale;
              largest = std::max(largest, s[p - first]);
            }
            for (double& e : s) sum += e = std::exp(e - largest);
            for (int i = 0; i < c.head_dim; ++i) {
              double o = 0.0;
              for (int p = first; p < end; ++p) o += s[p - first] * v[static_cast<size_t>(p) * kn + g * c.head_dim + i];
              want[static_cast<size_t>(r) * qn + h * c.head_dim + i] = o / sum;
            }
          }
        }
        check(cat(what, " at ", pos0), want, out, kLimitAttention[ti], &worst[ti]);
      }
      if (!c.causal) continue;
      // The same positions in other batches give the same bits (the cache is rewritten with the same values): 1..16
      // rows among themselves, more rows among themselves, and all where the cache is f32.
      const Floats many = step(0, total);
      Floats few;
      for (int pos0 = 0; pos0 < total; pos0 += kInt8Rows) {
        const Floats out = step(pos0, std::min(kInt8Rows, total - pos0));
        few.insert(few.end(), out.begin(), out.end());
      }
      if (types[ti] == DType::F32) expect(same_bits(few, many, few.size()), cat(what, ": few and many rows differ"));
      for (const auto& [pos0, rows] : {std::pair<int, int>{0, 5},
                                       {3, 16},
                                       {245, 16},
                                       {250, 100},
                                       {301, 17},
                                       {640, 130},
                                       {790, 4},
                                       {7, 1},
                                       {128, 1},
                                       {256, 1},
                                       {511, 1},
                                       {512, 1},
                                       {700, 1},
                                       {511, 2}}) {
        const Floats out = step(pos0, rows), &whole = rows > kInt8Rows ? many : few;
        const Floats part(whole.begin() + static_cast<int64_t>(pos0) * qn,
                          whole.begin() + static_cast<int64_t>(pos0 + rows) * qn);
        expect(same_bits(out, part, out.size()), cat(what, ": batch at ", pos0, " x ", rows, " differs"));
      }
      (void)ck.get("kv cache");
      (void)cv.get("kv cache");
    }
  }
  for (int ti = 0; ti < 3; ++ti)
    report(cat("attention KV ", dtype_info(types[ti]).name).c_str(), worst[ti], kLimitAttention[ti]);
}

// ---- experts

// Returns the largest SwiGLU product.
double ref_expert(const TestTensor& gate, const TestTensor& up, const TestTensor& down, int64_t e, const double* hq,
                  bool int8, Doubles* y) {
  const int64_t n_embd = gate.host.n_in, n_ff = gate.host.n_out;
  Doubles act(n_ff);
  for (int64_t i = 0; i < n_ff; ++i) {
    const double g = ref_dot(&gate.values[(e * n_ff + i) * n_embd], hq, n_embd);
    const double u = ref_dot(&up.values[(e * n_ff + i) * n_embd], hq, n_embd);
    act[i] = g / (1.0 + std::exp(-g)) * u;
  }
  if (is_quantized(down.host.type) && int8) quantize_like_gpu(act.data(), n_ff);
  y->resize(n_embd);
  for (int64_t i = 0; i < n_embd; ++i) (*y)[i] = ref_dot(&down.values[(e * n_embd + i) * n_ff], act.data(), n_ff);
  double largest = 0.0;
  for (double a : act) largest = std::max(largest, std::fabs(a));
  return largest;
}

// The experts that a row h chooses, with their shares.
std::vector<std::pair<int, double>> ref_choice(const TestTensor& router, const Floats& bias, const double* h,
                                               int top_k) {
  const int64_t n_embd = router.host.n_in;
  std::vector<std::pair<double, int>> order(bias.size());
  Doubles score(bias.size());
  for (size_t e = 0; e < bias.size(); ++e) {
    score[e] = 1.0 / (1.0 + std::exp(-ref_dot(&router.values[e * n_embd], h, n_embd)));
    order[e] = {-(score[e] + bias[e]), static_cast<int>(e)};
  }
  std::sort(order.begin(), order.end());
  double sum = 0.0;
  for (int s = 0; s < top_k; ++s) sum += score[order[s].second];
  std::vector<std::pair<int, double>> chosen;
  for (int s = 0; s < top_k; ++s) chosen.emplace_back(order[s].second, score[order[s].second] / sum);
  return chosen;
}

void test_experts(Backend& b, std::mt19937& rng) {
  struct Case {
    DType type, down;
    int n_expert, top_k;
    int64_t n_embd, n_ff;
    int rows;
    int force;          // 0: as drawn; 1: the bias sends all rows to the same experts
    float norm = 1.0f;  // scale of the norm's weights
  };
  const std::vector<Case> cases = {
      {DType::Q4_0, DType::Q4_0, 16, 4, 128, 64, 200, 0},
      {DType::Q4_0, DType::Q4_0, 32, 8, 1024, 512, 140, 0},
      {DType::Q4_0, DType::Q4_0, 32, 2, 416, 96, 140, 1},
      {DType::Q4_0, DType::Q4_0, 32, 8, 544, 2048, 20, 0},  // more tiles than all blocks begin with
      {DType::Q4_0, DType::Q4_0, 4, 3, 4352, 96, 20, 0},    // more columns to a block than a tile has
      {DType::Q4_0, DType::Q4_0, 4, 3, 64, 2720, 20, 0},    // segments of eleven groups
      {DType::Q4_1, DType::Q4_1, 24, 3, 256, 160, 140, 0},
      {DType::Q8_0, DType::Q8_0, 24, 8, 256, 160, 140, 0},
      {DType::Q4_0, DType::Q8_0, 256, 8, 128, 64, 140, 0},
      {DType::Q4_0, DType::Q4_0, 200, 1, 96, 32, 140, 1},
      {DType::BF16, DType::BF16, 16, 4, 128, 64, 40, 0},
      {DType::F32, DType::F32, 16, 4, 100, 50, 40, 0},
      {DType::Q4_0, DType::Q4_0, 16, 4, 128, 64, 40, 0, 200.0f}};  // SwiGLU products beyond f16
  double worst = 0.0, worst_many = 0.0;
  for (const Case& c : cases) {
    if (g_quick && c.n_embd > 512) continue;
    const auto gate = random_tensor(rng, c.type, c.n_embd, c.n_ff, c.n_expert);
    const auto up = random_tensor(rng, c.type, c.n_embd, c.n_ff, c.n_expert);
    const auto down = random_tensor(rng, c.down, c.n_ff, c.n_embd, c.n_expert);
    const auto router = random_tensor(rng, DType::F32, c.n_embd, c.n_expert);
    const Weight wg = b.load(gate->host, gate), wu = b.load(up->host, up), wd = b.load(down->host, down),
                 wr = b.load(router->host, router);
    Floats bias = random_floats(rng, c.n_expert, 0.1f);
    if (c.force == 1) {
      for (int i = 0; i < c.top_k; ++i) bias[(i * 7 + 3) % c.n_expert] = 10.0f + static_cast<float>(i);
    }
    const Floats norm = random_floats(rng, c.n_embd, c.norm),
                 x = random_floats(rng, static_cast<size_t>(c.rows * c.n_embd), 2.0f);
    Guarded gbias(b, bias), gnorm(b, norm);
    Moe m;
    m.n_expert = c.n_expert;
    m.top_k = c.top_k;
    m.eps = kEps;
    m.norm = gnorm.data();
    m.router = &wr;
    m.bias = gbias.data();
    m.gate = &wg;
    m.up = &wu;
    m.down = &wd;
    const std::string what =
        cat("moe ", dtype_info(c.type).name, " ", c.n_expert, "/", c.top_k, " ", c.n_embd, "x", c.n_ff);
    auto run = [&](int first, int rows) {
      Guarded gx(b, Floats(x.begin() + first * c.n_embd, x.begin() + (first + rows) * c.n_embd));
      b.moe(m, rows, gx.data());
      return gx.get(what);
    };
    for (const bool few : {true, false}) {
      const int most = few ? kInt8Rows : c.rows, begin = c.rows - most;
      const bool quantized = is_quantized(c.type), int8 = quantized && few;
      const Floats xs(x.begin() + begin * c.n_embd, x.end());
      const Floats all = run(begin, most);
      const Doubles h = ref_norm(xs, norm, kEps, most, c.n_embd);
      Doubles hq = h;
      if (int8) quantize_like_gpu(hq.data(), most * c.n_embd);
      Doubles want = to_doubles(xs);
      double largest = 0.0;
      for (int r = 0; r < most; ++r) {
        for (const auto& [expert, share] : ref_choice(*router, bias, &h[r * c.n_embd], c.top_k)) {
          Doubles y;
          largest = std::max(largest, ref_expert(*gate, *up, *down, expert, &hq[r * c.n_embd], int8, &y));
          for (int64_t i = 0; i < c.n_embd; ++i) want[r * c.n_embd + i] += share * y[i];
        }
      }
      if (c.norm > 1.0f) expect(largest > 65504.0, cat(what, ": products up to ", largest, " test nothing"));
      check(what, want, all, kLimitExperts, quantized && !few ? &worst_many : &worst);
      for (int rows : kRowCounts) {
        if (rows > most || (quantized && !few && rows <= kInt8Rows)) continue;
        const int first = most - rows;
        const Floats part = run(begin + first, rows), tail(all.begin() + first * c.n_embd, all.end());
        expect(same_bits(part, tail, part.size()), cat(what, ": ", rows, " rows differ from ", most));
      }
    }
  }
  // distinct experts: the forced case reads top_k of them
  report("moe", worst, kLimitExperts);
  report("moe, many rows", worst_many, kLimitExperts);
}

void test_ffn(Backend& b, std::mt19937& rng) {
  double worst = 0.0;
  struct Shape {
    int64_t n_embd, n_ff;  // the second: more tiles than a GPU has multiprocessors, and not a multiple of them
  };
  for (const Shape& shape : {Shape{256, 352}, Shape{96, 5408}}) {
    if (g_quick && shape.n_ff > 512) continue;
    for (DType type : {DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::F16}) {
      const int64_t n_embd = shape.n_embd, n_ff = shape.n_ff;
      const int max_rows = 140;
      const auto gate = random_tensor(rng, type, n_embd, n_ff), up = random_tensor(rng, type, n_embd, n_ff),
                 down = random_tensor(rng, type, n_ff, n_embd);
      const Weight wg = b.load(gate->host, gate), wu = b.load(up->host, up), wd = b.load(down->host, down);
      const Floats norm = random_floats(rng, n_embd), x = random_floats(rng, max_rows * n_embd, 2.0f);
      Guarded gnorm(b, norm);
      Ffn f;
      f.eps = kEps;
      f.norm = gnorm.data();
      f.gate = &wg;
      f.up = &wu;
      f.down = &wd;
      auto run = [&](int first, int rows) {
        Guarded gx(b, Floats(x.begin() + first * n_embd, x.begin() + (first + rows) * n_embd));
        b.ffn(f, rows, gx.data());
        return gx.get("ffn");
      };
      for (const bool few : {true, false}) {
        const int most = few ? kInt8Rows : max_rows, begin = max_rows - most;
        const bool quantized = is_quantized(type), int8 = quantized && few;
        const Floats xs(x.begin() + begin * n_embd, x.end());
        const Floats all = run(begin, most);
        Doubles hq = ref_norm(xs, norm, kEps, most, n_embd), want = to_doubles(xs);
        if (int8) quantize_like_gpu(hq.data(), most * n_embd);
        for (int r = 0; r < most; ++r) {
          Doubles y;
          (void)ref_expert(*gate, *up, *down, 0, &hq[r * n_embd], int8, &y);
          for (int64_t i = 0; i < n_embd; ++i) want[r * n_embd + i] += y[i];
        }
        check(cat("ffn ", dtype_info(type).name), want, all, kLimitExperts, &worst);
        for (int rows : kRowCounts) {
          if (rows > most || (quantized && !few && rows <= kInt8Rows)) continue;
          const int first = most - rows;
          const Floats part = run(begin + first, rows), tail(all.begin() + first * n_embd, all.end());
          expect(same_bits(part, tail, part.size()), cat("ffn ", dtype_info(type).name, ": ", rows, " rows differ"));
        }
      }
    }
  }
  report("ffn", worst, kLimitExperts);
}

// ---- errors

void test_errors(Backend& b, std::mt19937& rng) {
  bool thrown = false;
  try {
    (void)b.alloc(size_t{1} << 46);
  } catch (const CapacityError& e) {
    thrown = true;
    std::printf("capacity message: %s\n", e.what());
  }
  expect(thrown, "a huge allocation does not throw CapacityError");
  Guarded g(b, random_floats(rng, 100));
  (void)g.get("after capacity error");
  BackendOptions options;
  options.precise = true;
  thrown = false;
  try {
    (void)make_hip_backend(options);
  } catch (const Error&) {
    thrown = true;
  }
  expect(thrown, "precise is not refused");
}

int run(const std::vector<std::string>& names) {
  const std::string why = hip_backend_status();
  if (!why.empty()) {
    std::printf("no device: %s\n", why.c_str());
    return 77;  // skipped
  }
  const auto b = make_hip_backend(BackendOptions());
  std::printf("%s\n", b->describe().c_str());
  const std::vector<std::pair<std::string, void (*)(Backend&, std::mt19937&)>> tests = {
      {"small", test_small}, {"matmul", test_matmul}, {"attention", test_attention}, {"experts", test_experts},
      {"ffn", test_ffn},     {"layers", test_layers}, {"steps", test_steps},         {"errors", test_errors}};
  for (const std::string& name : names) {
    const bool known = std::any_of(tests.begin(), tests.end(), [&](const auto& t) { return t.first == name; });
    expect(known, cat("no test is called ", name));
  }
  for (const auto& [name, test] : tests) {
    if (!names.empty() && std::find(names.begin(), names.end(), name) == names.end()) continue;
    std::mt19937 rng(1);  // a test alone has the values it has among the others
    test(*b, rng);
  }
  std::printf(g_failures == 0 ? "all passed\n" : "%d FAILURES\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace dflash::test

int main(int argc, char** argv) {
  try {
    std::vector<std::string> names(argv + 1, argv + argc);
    dflash::test::g_quick = !names.empty() && names[0] == "quick";
    if (dflash::test::g_quick) names.erase(names.begin());
    return dflash::test::run(names);
  } catch (const std::exception& e) {
    std::printf("FAIL exception: %s\n", e.what());
    return 1;
  }
}
