// Every op of the CPU backend: right (against a naive double implementation), and the same bits whatever the
// instruction set, the number of rows that travel together, the number of threads and the weight layout.

#include "cpu_reference.h"

namespace {

// ---- cases ----------------------------------------------------------------------------------------------------------

constexpr DType kTypes[] = {DType::F32, DType::F16, DType::BF16, DType::Q4_0, DType::Q4_1, DType::Q8_0};

void matmul_cases(std::vector<Case>& cases, Random& random) {
  struct Shape {
    int64_t n_in, n_out;
    int rows;
  };
  std::vector<Shape> shapes = {{64, 33, 5}, {32, 1, 17}, {384, 100, 1}, {96, 48, 33}, {128, 160, 100}};
  for (int rows = 2; rows <= 17; ++rows) shapes.push_back({160, 17, rows});
  for (const DType type : kTypes) {
    for (const Shape& s : shapes) {
      const auto w = std::make_shared<Matrix>(make_matrix(random, type, s.n_in, s.n_out));
      const auto w2 = std::make_shared<Matrix>(make_matrix(random, kTypes[random.byte() % 6], s.n_in, 19));
      const auto x = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.rows * s.n_in)));
      const auto y = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.rows * s.n_out)));
      const auto weight = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.n_in)));
      if (s.rows == 5) std::fill(x->begin() + 32, x->begin() + 64, 0.0f);  // a group of zeros
      const std::string what = cat(dtype_info(type).name, " ", s.n_in, "x", s.n_out, " rows ", s.rows);
      cases.push_back({"norm_matmul", what, s.rows,
                       [=](Backend& b, int first, int count) {
                         const Weight a = load(b, *w), c = load(b, *w2);
                         Output one(static_cast<size_t>(count * s.n_out)), two(static_cast<size_t>(count) * 19);
                         const MatmulOut outs[] = {{&a, one.data()}, {&c, two.data()}};
                         b.norm_matmul(x->data() + first * s.n_in, weight->data(), 1e-6f, count, outs, 2);
                         const Floats p = one.take(), q = two.take();
                         Floats rows;
                         for (int r = 0; r < count; ++r) {
                           rows.insert(rows.end(), p.begin() + r * s.n_out, p.begin() + (r + 1) * s.n_out);
                           rows.insert(rows.end(), q.begin() + r * 19, q.begin() + (r + 1) * 19);
                         }
                         return rows;
                       },
                       [=](bool precise) {
                         Doubles all;
                         for (int r = 0; r < s.rows; ++r) {
                           const Doubles h = norm(row_of(*x, r, s.n_in), weight->data(), 1e-6);
                           const Doubles p = multiply(*w, h, precise), q = multiply(*w2, h, precise);
                           all.insert(all.end(), p.begin(), p.end());
                           all.insert(all.end(), q.begin(), q.end());
                         }
                         return all;
                       }});
      cases.push_back({"matmul_add", what, s.rows,
                       [=](Backend& b, int first, int count) {
                         const Weight a = load(b, *w);
                         Output out(static_cast<size_t>(count * s.n_out));
                         std::copy_n(y->begin() + first * s.n_out, count * s.n_out, out.data());
                         b.matmul_add(a, x->data() + first * s.n_in, count, out.data());
                         return out.take();
                       },
                       [=](bool precise) {
                         Doubles all(y->begin(), y->end());
                         for (int r = 0; r < s.rows; ++r) {
                           const Doubles p = multiply(*w, row_of(*x, r, s.n_in), precise);
                           for (size_t i = 0; i < p.size(); ++i) all[static_cast<size_t>(r) * p.size() + i] += p[i];
                         }
                         return all;
                       }});
    }
    const auto table = std::make_shared<Matrix>(make_matrix(random, type, 64, 37));
    const auto tokens = std::make_shared<std::vector<int32_t>>(std::vector<int32_t>{0, 36, 15, 16, 31, 7});
    cases.push_back({"embed", dtype_info(type).name, 6,
                     [=](Backend& b, int first, int count) {
                       const Weight w = load(b, *table);
                       Output out(static_cast<size_t>(count) * 64);
                       b.embed(w, tokens->data() + first, count, out.data());
                       return out.take();
                     },
                     [=](bool) {
                       Doubles all;
                       for (const int32_t t : *tokens) {
                         for (int i = 0; i < 64; ++i) all.push_back(static_cast<float>(table->row(0, t)[i]));
                       }
                       return all;
                     }});
  }
}

void elementwise_cases(std::vector<Case>& cases, Random& random) {
  for (const int64_t n : {7, 100, 384, 3072}) {
    const auto x = std::make_shared<Floats>(random.floats(static_cast<size_t>(3 * n), 30.0f));
    const auto w = std::make_shared<Floats>(random.floats(static_cast<size_t>(n)));
    cases.push_back({"rms_norm", cat(n), 3,
                     [=](Backend& b, int first, int count) {
                       Output out(static_cast<size_t>(count * n));
                       b.rms_norm(x->data() + first * n, w->data(), 1e-6f, count, n, out.data());
                       Floats in_place(x->begin() + first * n, x->begin() + (first + count) * n);
                       b.rms_norm(in_place.data(), w->data(), 1e-6f, count, n, in_place.data());
                       const Floats y = out.take();
                       CHECK(same_bits(in_place, y));
                       return y;
                     },
                     [=](bool) {
                       Doubles all;
                       for (int r = 0; r < 3; ++r) {
                         const Doubles y = norm(row_of(*x, r, n), w->data(), 1e-6);
                         all.insert(all.end(), y.begin(), y.end());
                       }
                       return all;
                     }});
    cases.push_back({"copy_rows", cat(n), 3,
                     [=](Backend& b, int first, int count) {
                       Output out(static_cast<size_t>(count * n));
                       Floats wide(static_cast<size_t>(count * (n + 5)), -1.0f);
                       b.copy_rows(x->data() + first * n, count, n, wide.data(), n + 5);
                       for (int r = 0; r < count; ++r) std::copy_n(wide.begin() + r * (n + 5), n, out.data() + r * n);
                       CHECK(wide.back() == -1.0f);
                       return out.take();
                     },
                     [=](bool) { return Doubles(x->begin(), x->end()); }});
    cases.push_back({"top1", cat(n), 3,
                     [=](Backend& b, int first, int count) {
                       std::vector<Top1> top(static_cast<size_t>(count));
                       b.top1(x->data() + first * n, count, n, top.data());
                       Floats out;
                       for (const Top1& t : top) out.insert(out.end(), {static_cast<float>(t.id), t.prob, t.margin});
                       return out;
                     },
                     [=](bool) {
                       Doubles all;
                       for (int r = 0; r < 3; ++r) {
                         Doubles y = row_of(*x, r, n);
                         const auto best = std::max_element(y.begin(), y.end());
                         const double top = *best;
                         double sum = 0;
                         for (const double v : y) sum += std::exp(v - top);
                         all.push_back(static_cast<double>(best - y.begin()));
                         all.push_back(1 / sum);
                         *best = -1e30;
                         all.push_back(top - *std::max_element(y.begin(), y.end()));
                       }
                       return all;
                     }});
  }
}

struct AttentionShape {
  int n_head, n_head_kv, head_dim, n_rot, pos0, rows;
  bool causal;
  int window;
  QkNorm norm;
  DType kv;
};

// The keys before pos0 are random; qkv_post stores the rows, attention reads everything.
void attention_cases(std::vector<Case>& cases, Random& random) {
  std::vector<AttentionShape> shapes;
  for (const DType kv : {DType::F32, DType::F16, DType::Q8_0}) {
    shapes.push_back({4, 2, 32, 32, 0, 7, true, 0, QkNorm::whole, kv});
    shapes.push_back({6, 1, 128, 64, 250, 12, true, 0, QkNorm::whole, kv});
    shapes.push_back({8, 8, 64, 64, 700, 5, false, 0, QkNorm::per_head, kv});
    shapes.push_back({5, 1, 96, 96, 300, 40, true, 60, QkNorm::per_head, kv});
    shapes.push_back({12, 4, 128, 64, 530, 1, true, 0, QkNorm::whole, kv});
    shapes.push_back({4, 1, 64, 48, 510, 9, false, 256, QkNorm::per_head, kv});
  }
  for (const AttentionShape& s : shapes) {
    const int end = s.pos0 + s.rows, n_ctx = (end + 3 + 15) / 16 * 16, q_width = s.n_head * s.head_dim,
              kv_width = s.n_head_kv * s.head_dim;
    const auto history = std::make_shared<Floats>(random.floats(static_cast<size_t>(2 * s.pos0 * kv_width)));
    const auto q = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.rows * q_width)));
    const auto k = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.rows * kv_width)));
    const auto v = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.rows * kv_width)));
    const auto weights = std::make_shared<Floats>(random.floats(static_cast<size_t>(q_width + kv_width), 2.0f));
    const auto inv_freq = std::make_shared<Floats>();
    for (int i = 0; i < s.n_rot / 2; ++i)
      inv_freq->push_back(std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(s.n_rot)));
    const QkvPost post{
        s.n_head,         s.n_head_kv, s.head_dim, s.n_rot, s.norm, weights->data(), weights->data() + q_width,
        inv_freq->data(), 1.25f,       1e-6f};
    const Attention attention{s.n_head, s.n_head_kv, s.head_dim, 0.3f / std::sqrt(static_cast<float>(s.head_dim)),
                              s.causal, s.window};

    // Everything of a run: the rotated q, the cache as floats, the attention output of rows [first, first + count).
    const auto run = [=](Backend& b, int first, int count, bool want_attention) {
      const size_t row = row_bytes(s.kv, s.head_dim), cache_bytes = row * static_cast<size_t>(s.n_head_kv * n_ctx);
      std::vector<uint8_t> kc(cache_bytes, 0xff), vc(cache_bytes, 0xff);  // NaN where nothing is stored
      KvLayer kv{kc.data(), vc.data(), s.kv, s.n_head_kv, s.head_dim, n_ctx};
      QkvPost store = post;  // the history: norm and angle do not matter, only that it is the same everywhere
      Floats hk(history->begin(), history->begin() + s.pos0 * kv_width);
      if (s.pos0 > 0) b.qkv_post(store, {s.pos0, 0}, nullptr, hk.data(), history->data() + s.pos0 * kv_width, kv);
      Floats qr(*q), kr(*k);
      // A bidirectional row sees the whole block, so all keys are stored first.
      const int stored = s.causal ? first + count : s.rows;
      b.qkv_post(post, {stored, s.pos0}, qr.data(), kr.data(), v->data(), kv);
      Floats all;
      if (!want_attention) {
        all.assign(qr.begin() + first * q_width, qr.begin() + (first + count) * q_width);
        return all;
      }
      Output out(static_cast<size_t>(count * q_width));
      if (s.causal) {
        b.attention(attention, {count, s.pos0 + first}, qr.data() + first * q_width, kv, out.data());
        return out.take();
      }
      Output whole(static_cast<size_t>(s.rows * q_width));
      b.attention(attention, {s.rows, s.pos0}, qr.data(), kv, whole.data());
      const Floats y = whole.take();
      return Floats(y.begin() + first * q_width, y.begin() + (first + count) * q_width);
    };
    const std::string what =
        cat(s.n_head, "/", s.n_head_kv, " heads of ", s.head_dim, " pos ", s.pos0, " rows ", s.rows,
            s.causal ? " causal" : " block", " window ", s.window, " kv ", dtype_info(s.kv).name);
    const auto rotated = [=](const Floats& x, int heads, const float* w, int row, int64_t pos) {
      const Doubles all = row_of(x, row, heads * s.head_dim);
      Doubles y;
      if (s.norm == QkNorm::whole) y = norm(all, w, 1e-6);
      for (int h = 0; h < heads && s.norm == QkNorm::per_head; ++h) {
        const Doubles one = norm(Doubles(all.begin() + h * s.head_dim, all.begin() + (h + 1) * s.head_dim), w, 1e-6);
        y.insert(y.end(), one.begin(), one.end());
      }
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < s.n_rot / 2; ++i) {
          const double angle = static_cast<float>(pos) * (*inv_freq)[static_cast<size_t>(i)];
          double &a = y[static_cast<size_t>(h * s.head_dim + i)],
                 &c = y[static_cast<size_t>(h * s.head_dim + i + s.n_rot / 2)];
          const double x0 = a, x1 = c;
          a = 1.25 * (x0 * std::cos(angle) - x1 * std::sin(angle));
          c = 1.25 * (x1 * std::cos(angle) + x0 * std::sin(angle));
        }
      }
      return y;
    };
    cases.push_back({"qkv_post", what, s.rows,
                     [=](Backend& b, int first, int count) { return run(b, first, count, false); },
                     [=](bool) {
                       Doubles all;
                       for (int r = 0; r < s.rows; ++r) {
                         const Doubles y = rotated(*q, s.n_head, weights->data(), r, s.pos0 + r);
                         all.insert(all.end(), y.begin(), y.end());
                       }
                       return all;
                     }});
    if (s.kv == DType::Q8_0) continue;  // checked through the bits below and against F32 within q8_0's step
    cases.push_back(
        {"attention", what, s.rows, [=](Backend& b, int first, int count) { return run(b, first, count, true); },
         [=](bool) {
           std::vector<Doubles> keys, values;
           const auto stored = [&](Doubles x) {
             if (s.kv == DType::F16) {
               for (double& e : x) e = f16_to_f32(f32_to_f16(static_cast<float>(e)));
             }
             return x;
           };
           for (int j = 0; j < end; ++j) {
             const bool old = j < s.pos0;
             const Floats hist_k(history->begin(), history->begin() + s.pos0 * kv_width);
             const Floats hist_v(history->begin() + s.pos0 * kv_width, history->end());
             keys.push_back(stored(old ? rotated(hist_k, s.n_head_kv, weights->data() + q_width, j, j)
                                       : rotated(*k, s.n_head_kv, weights->data() + q_width, j - s.pos0, j)));
             values.push_back(stored(row_of(old ? hist_v : *v, old ? j : j - s.pos0, kv_width)));
           }
           Doubles all;
           for (int r = 0; r < s.rows; ++r) {
             const Doubles qr = rotated(*q, s.n_head, weights->data(), r, s.pos0 + r);
             const int last = s.causal ? s.pos0 + r + 1 : end,
                       from = s.window > 0 ? std::max(0, s.pos0 + r - s.window + 1) : 0;
             for (int h = 0; h < s.n_head; ++h) {
               const int at = h / (s.n_head / s.n_head_kv) * s.head_dim;
               Doubles p, out(static_cast<size_t>(s.head_dim));
               double sum = 0, top = -1e30;
               for (int j = from; j < last; ++j) {
                 double dot = 0;
                 for (int d = 0; d < s.head_dim; ++d)
                   dot += qr[static_cast<size_t>(h * s.head_dim + d)] *
                          keys[static_cast<size_t>(j)][static_cast<size_t>(at + d)];
                 p.push_back(dot * attention.scale);
                 top = std::max(top, p.back());
               }
               for (double& e : p) sum += e = std::exp(e - top);
               for (int j = from; j < last; ++j) {
                 for (int d = 0; d < s.head_dim; ++d)
                   out[static_cast<size_t>(d)] += p[static_cast<size_t>(j - from)] / sum *
                                                  values[static_cast<size_t>(j)][static_cast<size_t>(at + d)];
               }
               all.insert(all.end(), out.begin(), out.end());
             }
           }
           return all;
         }});
  }
}

void moe_cases(std::vector<Case>& cases, Random& random) {
  struct Shape {
    DType type;
    int64_t n_embd, n_ff;
    int n_expert, top_k, rows;
  };
  std::vector<Shape> shapes;
  for (const DType type : kTypes) {
    shapes.push_back({type, 128, 64, 16, 4, 5});
    shapes.push_back({type, 96, 128, 5, 2, 33});
  }
  shapes.push_back({DType::Q4_0, 384, 128, 48, 4, 17});
  for (const Shape& s : shapes) {
    const auto gate = std::make_shared<Matrix>(make_matrix(random, s.type, s.n_embd, s.n_ff, s.n_expert));
    const auto up = std::make_shared<Matrix>(make_matrix(random, s.type, s.n_embd, s.n_ff, s.n_expert));
    const auto down = std::make_shared<Matrix>(make_matrix(random, s.type, s.n_ff, s.n_embd, s.n_expert));
    const auto router = std::make_shared<Matrix>(make_matrix(random, DType::F32, s.n_embd, s.n_expert));
    const auto bias = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.n_expert), 0.3f));
    const auto norm_w = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.n_embd)));
    const auto x = std::make_shared<Floats>(random.floats(static_cast<size_t>(s.rows * s.n_embd)));
    const std::string what =
        cat(dtype_info(s.type).name, " ", s.n_embd, "x", s.n_ff, " ", s.top_k, " of ", s.n_expert, " rows ", s.rows);
    const auto chosen = [=](int r) {  // (expert, weight), in order
      const Doubles h = norm(row_of(*x, r, s.n_embd), norm_w->data(), 1e-6);
      Doubles score = multiply(*router, h, true);
      for (double& e : score) e = 1 / (1 + std::exp(-e));
      Doubles choice = score;
      for (size_t e = 0; e < choice.size(); ++e) choice[e] += (*bias)[e];
      std::vector<std::pair<int, double>> list;
      double sum = 0;
      for (int i = 0; i < s.top_k; ++i) {
        const size_t best = static_cast<size_t>(std::max_element(choice.begin(), choice.end()) - choice.begin());
        choice[best] = -1e30;
        list.push_back({static_cast<int>(best), score[best]});
        sum += score[best];
      }
      for (auto& e : list) e.second /= sum;
      return list;
    };
    cases.push_back({"moe", what, s.rows,
                     [=](Backend& b, int first, int count) {
                       const Weight g = load(b, *gate), u = load(b, *up), d = load(b, *down), r = load(b, *router);
                       Output out(static_cast<size_t>(count * s.n_embd));
                       std::copy_n(x->begin() + first * s.n_embd, count * s.n_embd, out.data());
                       (void)b.take_expert_count();
                       b.moe({s.n_expert, s.top_k, 1e-6f, norm_w->data(), &r, bias->data(), &g, &u, &d}, count,
                             out.data());
                       std::vector<bool> used(static_cast<size_t>(s.n_expert));
                       int distinct = 0;
                       for (int i = first; i < first + count; ++i) {
                         for (const auto& e : chosen(i)) {
                           distinct += used[static_cast<size_t>(e.first)] ? 0 : 1;
                           used[static_cast<size_t>(e.first)] = true;
                         }
                       }
                       const Backend::ExpertCount n = b.take_expert_count();
                       CHECK(n.distinct == distinct && n.calls == 1 && b.take_expert_count().calls == 0);
                       return out.take();
                     },
                     [=](bool precise) {
                       Doubles all(x->begin(), x->end());
                       for (int r = 0; r < s.rows; ++r) {
                         const Doubles h = norm(row_of(*x, r, s.n_embd), norm_w->data(), 1e-6);
                         for (const auto& e : chosen(r)) {
                           const Doubles y = feed_forward(*gate, *up, *down, h, precise, e.first);
                           for (size_t i = 0; i < y.size(); ++i)
                             all[static_cast<size_t>(r) * y.size() + i] += e.second * y[i];
                         }
                       }
                       return all;
                     }});
    cases.push_back({"ffn", what, s.rows,
                     [=](Backend& b, int first, int count) {
                       Matrix g1 = *gate, u1 = *up, d1 = *down;  // the first expert alone
                       for (Matrix* m : {&g1, &u1, &d1}) {
                         m->bytes.resize(m->bytes.size() / static_cast<size_t>(m->n_expert));
                         m->n_expert = 1;
                       }
                       const Weight g = load(b, g1), u = load(b, u1), d = load(b, d1);
                       Output out(static_cast<size_t>(count * s.n_embd));
                       std::copy_n(x->begin() + first * s.n_embd, count * s.n_embd, out.data());
                       b.ffn({1e-6f, norm_w->data(), &g, &u, &d}, count, out.data());
                       return out.take();
                     },
                     [=](bool precise) {
                       Doubles all(x->begin(), x->end());
                       for (int r = 0; r < s.rows; ++r) {
                         const Doubles h = norm(row_of(*x, r, s.n_embd), norm_w->data(), 1e-6);
                         const Doubles y = feed_forward(*gate, *up, *down, h, precise);
                         for (size_t i = 0; i < y.size(); ++i) all[static_cast<size_t>(r) * y.size() + i] += y[i];
                       }
                       return all;
                     }});
  }
}

// ---- what is not a case -------------------------------------------------------------------------------------------

void test_ties_and_extremes(Backend& b, bool precise) {
  Floats logits(100, 1.0f);
  logits[60] = logits[7] = logits[99] = 5.0f;
  Top1 top;
  b.top1(logits.data(), 1, 100, &top);
  CHECK(top.id == 7 && top.margin == 0.0f);

  // Equal experts: the lowest ids win.
  Random random;
  Matrix router = make_matrix(random, DType::F32, 32, 8);
  std::memset(router.bytes.data(), 0, router.bytes.size());
  const Matrix one = make_matrix(random, DType::Q4_0, 32, 32, 8);
  Floats x = random.floats(32), y = x, norm_w(32, 1.0f), bias(8, 0.0f);
  const Weight r = load(b, router), w = load(b, one);
  b.moe({8, 3, 1e-6f, norm_w.data(), &r, bias.data(), &w, &w, &w}, 1, x.data());
  bias = {0, 0, 0, -9, -9, -9, -9, -9};
  b.moe({8, 3, 1e-6f, norm_w.data(), &r, bias.data(), &w, &w, &w}, 1, y.data());
  CHECK(same_bits(x, y));

  // Huge activations (layer 61 of M2.7) stay finite.
  const Matrix m = make_matrix(random, DType::Q4_0, 64, 16);
  Floats big = random.floats(64, 1e9f), out(16, 0.0f);
  const Weight big_w = load(b, m);
  b.matmul_add(big_w, big.data(), 1, out.data());
  const Doubles expected = multiply(m, Doubles(big.begin(), big.end()), precise);
  for (size_t i = 0; i < 16; ++i) CHECK(std::fabs(out[i] - expected[i]) <= 1e4);
}

void test_random_weights() {
  for (const DType type : kTypes) {
    const auto a = backend("auto", false, 1), c = backend("plain", false, 3, false);
    const Weight wa = a->random_weight(type, 64, 50, 2, 9), wc = c->random_weight(type, 64, 50, 2, 9);
    Random random;
    const Floats x = random.floats(64);
    Floats ya(50), yc(50);
    const MatmulOut oa{&wa, ya.data()}, oc{&wc, yc.data()};
    a->norm_matmul(x.data(), nullptr, 0, 1, &oa, 1);
    c->norm_matmul(x.data(), nullptr, 0, 1, &oc, 1);
    double power = 0;
    for (const float v : ya) power += v * v / 50;
    CHECK(same_bits(ya, yc) && power > 0.3 && power < 3);
  }
}

// Repacking from a file lets the mapping's pages go behind it; the file must still read the same afterwards.
void test_file_mapping() {
  Random random;
  const Matrix m = make_matrix(random, DType::Q8_0, 256, 1000, 3);
  const std::string path = cat("/tmp/dflash_test_cpu_ops.", std::random_device{}(), ".bin");
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(m.bytes.data()), static_cast<std::streamsize>(m.bytes.size()));
  const auto file = std::make_shared<MappedFile>(path);
  std::remove(path.c_str());
  const auto b = backend("auto", false, 2);
  HostTensor t{"w", m.type, m.n_in, m.n_out, m.n_expert, file->data(), file->size()};
  t.file_mapping = true;
  const Weight mapped = b->load(t, file), copied = load(*b, m);
  const size_t padded = static_cast<size_t>(3 * cpu::panels_of(1000)) * cpu::panel_bytes(mapped);
  CHECK(std::memcmp(mapped.data, copied.data, padded) == 0);
  CHECK(std::memcmp(file->data(), m.bytes.data(), m.bytes.size()) == 0);
  CHECK(b->weight_bytes(t) == padded && b->memory().hint.find("repack=False") != std::string::npos);

  // Not repacked, the mapping itself is the weight, and takes its bytes of page cache; of an embedding some rows do.
  const auto as_is = backend("auto", false, 2, false);
  CHECK(as_is->load(t, file).data == file->data());
  CHECK(as_is->weight_bytes(t) == m.bytes.size() && as_is->memory().hint.empty());
  t.name = "token_embd.weight";
  CHECK(as_is->weight_bytes(t) == 0 && b->weight_bytes(t) == 0);
}

void test_errors() {
  CHECK_THROWS(backend("sse9", false, 1), "Available: auto, ");
  const auto b = backend("auto", false, 1);
  const Floats data(64);
  CHECK_THROWS(b->load({"blk.0.x", DType::Q4_0, 33, 1, 1, data.data(), 18}, nullptr), "blk.0.x");
  CHECK_THROWS(b->load({"blk.0.x", DType::F32, 8, 8, 1, data.data(), 255}, nullptr), "expected 256 bytes");
  Floats f(64);
  KvLayer kv{f.data(), f.data(), DType::F32, 1, 16, 2};
  QkvPost p;
  p.n_head = p.n_head_kv = 1;
  p.head_dim = 16;
  CHECK_THROWS(b->qkv_post(p, {2, 1}, f.data(), f.data(), f.data(), kv), "do not fit");
  CHECK_THROWS(b->qkv_post(p, {2, 0}, f.data(), f.data(), f.data(), kv), "multiple of 16");
}

void test_pool() {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (const int64_t n : {0, 1, 2, 7, 1000, 200000}) {
      std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
      pool.parallel_for(n, [&](int64_t i, int thread) {
        if (thread >= 0 && thread < threads) ++seen[static_cast<size_t>(i)];
      });
      bool once = true;
      for (const auto& s : seen) once = once && s == 1;
      CHECK(once);
    }
    std::atomic<int64_t> sum{0};
    for (int round = 0; round < 3000; ++round) {
      pool.parallel_for(5, [&](int64_t i, int) { sum += i; });
      if (round % 1000 == 999) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // let the workers sleep
    }
    CHECK(sum == 30000);
    bool caught = false;
    try {
      pool.parallel_for(100, [&](int64_t i, int) {
        if (i == 37) fail("thirty-seven");
      });
    } catch (const Error& e) {
      caught = std::string(e.what()) == "thirty-seven";
    }
    CHECK(caught);
    sum = 0;
    pool.parallel_for(100, [&](int64_t, int) { ++sum; });
    CHECK(sum == 100);
  }
  CHECK(ThreadPool::default_threads() >= 1);
}

}  // namespace

int main() {
  Random random;
  std::vector<Case> cases;
  elementwise_cases(cases, random);
  matmul_cases(cases, random);
  attention_cases(cases, random);
  moe_cases(cases, random);
  for (const bool precise : {true, false}) {
    Backends b;
    b.plain = backend("plain", precise, 1);
    b.unpacked = backend("auto", precise, 2, false);
    for (const int threads : {2, 3, 4}) b.others.push_back(backend("auto", precise, threads));
    for (const std::string& isa : cpu_isas()) {
      b.others.push_back(backend(isa, precise, 1));
      if (!precise) b.others.push_back(backend(isa, precise, 1, false));
    }
    b.others.push_back(backend("auto", precise, 2));
    for (const Case& c : cases) check_case(c, b, precise);
    test_ties_and_extremes(*b.others.back(), precise);
  }
  test_random_weights();
  test_file_mapping();
  test_errors();
  test_pool();
  return test::report("test_cpu_ops");
}
