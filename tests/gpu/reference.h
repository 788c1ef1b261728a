#pragma once
// Host side of the GPU op tests: random tensors in GGUF bytes, double-precision references, comparison, guarded
// buffers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/error.h"
#include "quant/blocks.h"

namespace dflash::test {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline int g_failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  if (++g_failures <= 40) std::printf("FAIL %s\n", what.c_str());
}

inline Floats random_floats(std::mt19937& rng, size_t n, float scale = 1.0f) {
  std::normal_distribution<float> d(0.0f, scale);
  Floats v(n);
  for (float& x : v) x = d(rng);
  return v;
}

// A random tensor as GGUF holds it, and the same decoded.
struct TestTensor {
  HostTensor host;
  std::vector<uint8_t> bytes;
  Floats values;  // [n_expert * n_out, n_in]
};

inline std::shared_ptr<TestTensor> random_tensor(std::mt19937& rng, DType type, int64_t n_in, int64_t n_out,
                                                 int64_t n_expert = 1) {
  auto t = std::make_shared<TestTensor>();
  const size_t row = row_bytes(type, n_in), rows = static_cast<size_t>(n_out * n_expert);
  t->bytes.resize(row * rows);
  t->values.resize(rows * static_cast<size_t>(n_in));
  const float scale = 1.0f / std::sqrt(static_cast<float>(n_in));
  if (is_quantized(type)) {
    for (uint8_t& b : t->bytes) b = static_cast<uint8_t>(rng());
    const DTypeInfo& info = dtype_info(type);
    std::uniform_real_distribution<float> d(0.5f, 1.5f);
    for (size_t at = 0; at < t->bytes.size(); at += static_cast<size_t>(info.bytes)) {
      const float s = scale / (type == DType::Q8_0 ? 74.0f : 4.6f) * d(rng);
      const uint16_t h = f32_to_f16(s), m = f32_to_f16(-7.3f * s);
      std::memcpy(&t->bytes[at], &h, 2);
      if (type == DType::Q4_1) std::memcpy(&t->bytes[at + 2], &m, 2);
    }
  } else {
    const Floats v = random_floats(rng, t->values.size(), scale);
    for (size_t i = 0; i < v.size(); ++i) {
      if (type == DType::F32) std::memcpy(&t->bytes[4 * i], &v[i], 4);
      const uint16_t h = type == DType::F16 ? f32_to_f16(v[i]) : f32_to_bf16(v[i]);
      if (type != DType::F32) std::memcpy(&t->bytes[2 * i], &h, 2);
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    decode_row(type, &t->bytes[r * row], n_in, &t->values[r * static_cast<size_t>(n_in)]);
  }
  t->host.name = "test";
  t->host.type = type;
  t->host.n_in = n_in;
  t->host.n_out = n_out;
  t->host.n_expert = n_expert;
  t->host.data = t->bytes.data();
  t->host.bytes = t->bytes.size();
  return t;
}

// Backend memory with a guard after it.
class Guarded {
 public:
  Guarded(Backend& b, size_t floats) : backend_(b), n_(floats), buffer_(b.alloc((floats + kGuard) * sizeof(float))) {
    const Floats poison(floats + kGuard, kPoison);
    b.upload(buffer_.data, poison.data(), poison.size() * sizeof(float));
  }
  Guarded(Backend& b, const Floats& v) : Guarded(b, v.size()) { set(v); }

  float* data() { return buffer_.as<float>(); }
  void set(const Floats& v) { backend_.upload(buffer_.data, v.data(), v.size() * sizeof(float)); }
  Floats get(const std::string& what) {
    Floats v(n_ + kGuard);
    backend_.download(v.data(), buffer_.data, v.size() * sizeof(float));
    for (size_t i = n_; i < v.size(); ++i) expect(v[i] == kPoison, what + ": guard overwritten");
    v.resize(n_);
    return v;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr float kPoison = -12345.5f;
  Backend& backend_;
  size_t n_;
  Buffer buffer_;
};

inline double nmse(const Doubles& want, const Floats& got) {
  double error = 0.0, power = 0.0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = static_cast<double>(got[i]) - want[i];
    error += d * d;
    power += want[i] * want[i];
  }
  return power > 0.0 ? error / power : error;
}

// The first `n` floats of two results are the same bits.
inline bool same_bits(const Floats& a, const Floats& b, size_t n) {
  return std::memcmp(a.data(), b.data(), n * sizeof(float)) == 0;
}

// What a group of 32 becomes as int8 activations.
inline void quantize_like_gpu(double* x, int64_t n) {
  for (int64_t g = 0; g < n; g += 32) {
    float largest = 0.0f;
    for (int j = 0; j < 32; ++j) largest = std::max(largest, std::fabs(static_cast<float>(x[g + j])));
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f, d = largest / 127.0f;
    for (int j = 0; j < 32; ++j) {
      x[g + j] = static_cast<double>(std::rint(static_cast<float>(x[g + j]) * inverse)) * static_cast<double>(d);
    }
  }
}

inline Doubles ref_norm(const Floats& x, const Floats& w, double eps, int rows, int64_t n) {
  Doubles y(static_cast<size_t>(rows * n));
  for (int r = 0; r < rows; ++r) {
    double squares = 0.0;
    for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[r * n + i]) * x[r * n + i];
    const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(n) + eps);
    for (int64_t i = 0; i < n; ++i) y[r * n + i] = x[r * n + i] * inverse * w[i];
  }
  return y;
}

inline double ref_dot(const float* w, const double* x, int64_t n) {
  double s = 0.0;
  for (int64_t i = 0; i < n; ++i) s += static_cast<double>(w[i]) * x[i];
  return s;
}

// The GPU quantises activations of quantised weights for up to this many rows.
inline constexpr int kInt8Rows = 16;

// y = W x for rows of x, activations quantised where the GPU's are.
inline Doubles ref_matmul(const TestTensor& t, Doubles x, int rows) {
  const int64_t n_in = t.host.n_in, n_out = t.host.n_out;
  if (is_quantized(t.host.type) && rows <= kInt8Rows) quantize_like_gpu(x.data(), rows * n_in);
  Doubles y(static_cast<size_t>(rows * n_out));
  for (int r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < n_out; ++o) y[r * n_out + o] = ref_dot(&t.values[o * n_in], &x[r * n_in], n_in);
  }
  return y;
}

inline Doubles to_doubles(const Floats& v) { return Doubles(v.begin(), v.end()); }

}  // namespace dflash::test
