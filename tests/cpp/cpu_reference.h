#pragma once
// Inputs, the naive double reference and the harness of test_cpu_ops.cpp: a case is an op with its expected rows.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <vector>
#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "core/mapped_file.h"
#include "quant/half.h"

using namespace dflash;

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// Largest |found - expected| / max|expected| per op. Fast mode differs from the reference only by f32 rounding, except
// where a rounding moves an int8 activation (or an f16 key) by one step.
struct Tolerance {
  const char* op;
  double precise, fast;
};
constexpr Tolerance kTolerances[] = {
    {"embed", 0, 0},          {"rms_norm", 3e-7, 3e-7},  {"norm_matmul", 1e-5, 4e-3}, {"matmul_add", 1e-5, 1e-5},
    {"qkv_post", 2e-6, 2e-6}, {"attention", 5e-5, 5e-5}, {"moe", 2e-5, 1e-2},         {"ffn", 2e-5, 1e-2},
    {"copy_rows", 0, 0},      {"top1", 1e-5, 1e-5},
};

// ---- inputs -----------------------------------------------------------------------------------------------------

struct Random {
  std::mt19937 rng{42};
  float normal() { return std::normal_distribution<float>()(rng); }
  uint8_t byte() { return static_cast<uint8_t>(rng() >> 11); }
  Floats floats(size_t n, float scale = 1.0f) {
    Floats x(n);
    for (float& v : x) v = scale * normal();
    return x;
  }
};

double decode16(uint16_t h) { return f16_to_f32(h); }

// A weight as GGUF bytes and as doubles.
struct Matrix {
  DType type;
  int64_t n_in, n_out, n_expert;
  std::vector<uint8_t> bytes;
  Doubles values;

  const double* row(int64_t expert, int64_t r) const { return values.data() + (expert * n_out + r) * n_in; }
};

Matrix make_matrix(Random& random, DType type, int64_t n_in, int64_t n_out, int64_t n_expert = 1) {
  Matrix m{type, n_in, n_out, n_expert, {}, {}};
  const auto put16 = [&](uint16_t h) {
    m.bytes.push_back(static_cast<uint8_t>(h & 255));
    m.bytes.push_back(static_cast<uint8_t>(h >> 8));
  };
  for (int64_t i = 0; i < n_expert * n_out * n_in; i += dtype_info(type).block) {
    const float x = 0.1f * random.normal();
    if (type == DType::F32) {
      uint8_t raw[4];
      std::memcpy(raw, &x, 4);
      m.bytes.insert(m.bytes.end(), raw, raw + 4);
      m.values.push_back(x);
    } else if (type == DType::F16) {
      put16(f32_to_f16(x));
      m.values.push_back(decode16(f32_to_f16(x)));
    } else if (type == DType::BF16) {
      put16(f32_to_bf16(x));
      m.values.push_back(bf16_to_f32(f32_to_bf16(x)));
    } else {
      const uint16_t d = f32_to_f16(0.02f * random.normal()), low = f32_to_f16(0.1f * random.normal());
      put16(d);
      if (type == DType::Q4_1) put16(low);
      uint8_t q[32];
      for (int j = 0; j < (type == DType::Q8_0 ? 32 : 16); ++j) m.bytes.push_back(q[j] = random.byte());
      for (int j = 0; j < 32; ++j) {
        const int nibble = j < 16 ? q[j % 16] & 15 : q[j % 16] >> 4;
        if (type == DType::Q8_0) m.values.push_back(decode16(d) * static_cast<int8_t>(q[j]));
        if (type == DType::Q4_0) m.values.push_back(decode16(d) * (nibble - 8));
        if (type == DType::Q4_1) m.values.push_back(decode16(d) * nibble + decode16(low));
      }
    }
  }
  return m;
}

Weight load(Backend& b, const Matrix& m, const char* name = "w") {
  return b.load({name, m.type, m.n_in, m.n_out, m.n_expert, m.bytes.data(), m.bytes.size()}, nullptr);
}

// ---- naive reference ----------------------------------------------------------------------------------------------

// What the fast mode does to activations before they meet a quantised weight.
Doubles int8_activations(const Doubles& x) {
  Doubles y(x.size());
  for (size_t g = 0; g < x.size(); g += 32) {
    float absmax = 0;
    for (size_t i = g; i < g + 32; ++i) absmax = std::max(absmax, static_cast<float>(std::fabs(x[i])));
    for (size_t i = g; i < g + 32; ++i) {
      const float q = absmax > 0 ? std::nearbyint(static_cast<float>(x[i]) * (127.0f / absmax)) : 0.0f;
      y[i] = static_cast<double>(q) * static_cast<double>(absmax / 127.0f);
    }
  }
  return y;
}

Doubles multiply(const Matrix& w, const Doubles& x, bool precise, int64_t expert = 0) {
  const Doubles a = is_quantized(w.type) && !precise ? int8_activations(x) : x;
  Doubles y(static_cast<size_t>(w.n_out));
  for (int64_t r = 0; r < w.n_out; ++r) {
    for (int64_t k = 0; k < w.n_in; ++k) y[static_cast<size_t>(r)] += w.row(expert, r)[k] * a[static_cast<size_t>(k)];
  }
  return y;
}

Doubles norm(const Doubles& x, const float* w, double eps) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  Doubles y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] / std::sqrt(sum / static_cast<double>(x.size()) + eps) * w[i];
  return y;
}

Doubles row_of(const Floats& x, int r, int64_t n) { return Doubles(x.begin() + r * n, x.begin() + (r + 1) * n); }

Doubles feed_forward(const Matrix& gate, const Matrix& up, const Matrix& down, const Doubles& h, bool precise,
                     int64_t expert = 0) {
  Doubles g = multiply(gate, h, precise, expert);
  const Doubles u = multiply(up, h, precise, expert);
  for (size_t i = 0; i < g.size(); ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
  return multiply(down, g, precise, expert);
}

// ---- the harness --------------------------------------------------------------------------------------------------

// run: outputs of rows [first, first + count), width floats each. expected: the same by the reference.
struct Case {
  std::string op, what;
  int rows;
  std::function<Floats(Backend&, int first, int count)> run;
  std::function<Doubles(bool precise)> expected;
};

// An output area that starts as NaN between guards.
struct Output {
  static constexpr size_t kGuard = 64;
  Floats memory;
  explicit Output(size_t n) : memory(n + 2 * kGuard, std::numeric_limits<float>::quiet_NaN()) {}
  float* data() { return memory.data() + kGuard; }
  Floats take() {
    bool clean = true;
    for (size_t i = 0; i < kGuard; ++i) {
      clean = clean && std::isnan(memory[i]) && std::isnan(memory[memory.size() - 1 - i]);
    }
    CHECK(clean);  // nothing written outside
    return Floats(memory.begin() + kGuard, memory.end() - kGuard);
  }
};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::unique_ptr<Backend> backend(const std::string& isa, bool precise, int threads, bool repack = true) {
  BackendOptions o;
  o.cpu_isa = isa;
  o.precise = precise;
  o.n_threads = threads;
  o.repack = repack;
  return make_cpu_backend(o);
}

struct Backends {  // for one mode
  std::unique_ptr<Backend> plain, unpacked;
  std::vector<std::unique_ptr<Backend>> others;
};

void check_case(const Case& c, const Backends& b, bool precise) {
  const auto say = [&](bool ok, const std::string& which) {
    test::record(ok, (c.op + " " + c.what + (precise ? " precise" : " fast") + ": " + which).c_str(), __FILE__,
                 __LINE__);
  };
  const Floats base = c.run(*b.plain, 0, c.rows);
  const Doubles expected = c.expected(precise);
  double largest = 0, worst = 0;
  bool finite = base.size() == expected.size();
  for (size_t i = 0; finite && i < base.size(); ++i) {
    finite = std::isfinite(base[i]);
    largest = std::max(largest, std::fabs(expected[i]));
    worst = std::max(worst, std::fabs(static_cast<double>(base[i]) - expected[i]));
  }
  for (const Tolerance& t : kTolerances) {
    if (c.op == t.op) {
      const double limit = precise ? t.precise : t.fast;
      say(finite && worst <= limit * largest, cat("error ", worst / largest, " of ", limit));
    }
  }
  for (const auto& other : b.others)
    say(same_bits(c.run(*other, 0, c.rows), base), "not as plain: " + other->describe());
  say(same_bits(c.run(*b.unpacked, 0, c.rows), base), "not as plain: GGUF layout");
  Backend& best = *b.others.back();
  Floats single;
  for (int r = 0; r < c.rows; ++r) {
    const Floats one = c.run(best, r, 1);
    single.insert(single.end(), one.begin(), one.end());
  }
  say(same_bits(single, base), "rows one at a time");
  if (c.rows > 4) {
    Floats split = c.run(best, 0, 3);
    const Floats rest = c.run(best, 3, c.rows - 3);
    split.insert(split.end(), rest.begin(), rest.end());
    say(same_bits(split, base), "rows split 3 + rest");
  }
}

}  // namespace
