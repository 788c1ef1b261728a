#pragma once
// Times each op of another backend by name, with the time between ops under "(between)". The clock calls add about
// 50 ns an op, so the sum is a little above an untimed step.

#include <chrono>
#include <map>
#include <string>
#include <utility>

#include "backend/backend.h"

namespace dflash {

class TimedBackend final : public Backend {
 public:
  explicit TimedBackend(Backend& inner) : b_(inner) {}

  struct Entry {
    double seconds = 0.0;
    int64_t calls = 0;
  };
  std::map<std::string, Entry> take() { return std::exchange(entries_, {}); }

  const char* name() const override { return b_.name(); }
  std::string describe() const override { return b_.describe(); }
  MemoryInfo memory() const override { return b_.memory(); }
  int n_threads() const override { return b_.n_threads(); }
  Buffer alloc(size_t bytes) override { return b_.alloc(bytes); }
  void upload(void* dst, const void* src, size_t bytes) override { b_.upload(dst, src, bytes); }
  void download(void* dst, const void* src, size_t bytes) override { b_.download(dst, src, bytes); }
  Weight load(const HostTensor& t, std::shared_ptr<const void> owner) override { return b_.load(t, std::move(owner)); }
  Weight random_weight(DType type, int64_t n_in, int64_t n_out, int64_t n_expert, uint64_t seed) override {
    return b_.random_weight(type, n_in, n_out, n_expert, seed);
  }
  void embed(const Weight& table, const int32_t* tokens, int rows, float* x) override {
    time("embed", [&] { b_.embed(table, tokens, rows, x); });
  }
  void rms_norm(const float* x, const float* w, float eps, int rows, int64_t n, float* y) override {
    time("rms_norm", [&] { b_.rms_norm(x, w, eps, rows, n, y); });
  }
  void norm_matmul(const float* x, const float* norm, float eps, int rows, const MatmulOut* outs, int n) override {
    const char* names[] = {"norm_matmul 1", "norm_matmul 2", "norm_matmul 3", "norm_matmul more"};
    time(names[n > 3 ? 3 : n - 1], [&] { b_.norm_matmul(x, norm, eps, rows, outs, n); });
  }
  void matmul_add(const Weight& w, const float* x, int rows, float* y) override {
    time("matmul_add", [&] { b_.matmul_add(w, x, rows, y); });
  }
  void qkv_post(const QkvPost& p, Step step, float* q, float* k, const float* v, const KvLayer& kv) override {
    time("qkv_post", [&] { b_.qkv_post(p, step, q, k, v, kv); });
  }
  void attention(const Attention& a, Step step, const float* q, const KvLayer& kv, float* out) override {
    time("attention", [&] { b_.attention(a, step, q, kv, out); });
  }
  void moe(const Moe& m, int rows, float* x) override {
    time("moe", [&] { b_.moe(m, rows, x); });
  }
  void ffn(const Ffn& f, int rows, float* x) override {
    time("ffn", [&] { b_.ffn(f, rows, x); });
  }
  void copy_rows(const float* src, int rows, int64_t n, float* dst, int64_t stride) override {
    time("copy_rows", [&] { b_.copy_rows(src, rows, n, dst, stride); });
  }
  void top1(const float* logits, int rows, int64_t n, Top1* out) override {
    time("top1", [&] { b_.top1(logits, rows, n, out); });
  }
  int sample(const Sampling& sampling, float* logits, int64_t n, int32_t* out) override {
    int rows = 0;
    time("sample", [&] { rows = b_.sample(sampling, logits, n, out); });
    return rows;
  }
  size_t weight_bytes(const HostTensor& t) const override { return b_.weight_bytes(t); }
  bool asynchronous() const override { return b_.asynchronous(); }
  void loaded() override { b_.loaded(); }
  ExpertCount take_expert_count() override { return b_.take_expert_count(); }

 private:
  using Clock = std::chrono::steady_clock;
  template <typename F>
  void time(const char* name, const F& f) {
    const Clock::time_point start = Clock::now();
    f();
    Entry& e = entries_[name];
    e.seconds += std::chrono::duration<double>(Clock::now() - start).count();
    e.calls += 1;
  }

  Backend& b_;
  std::map<std::string, Entry> entries_;
};

}  // namespace dflash
