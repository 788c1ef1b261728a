// Times the CPU backend's ops on random weights. bench_ops.py builds and runs it; by hand:
//   bench_ops [--threads N] [--isa NAME] [--model full|mini] [--rows 1,4,16,512] [--only NAME] [--no-repack] [--once]
// Prints one line per op: name rows microseconds(median) bytes multiply-adds, tab separated, after a line "read GB/s".

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "read_bandwidth.h"

using namespace dflash;

namespace {

double wall() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// One thread is timed by its own CPU clock, which other processes on the machine do not disturb as much.
bool cpu_clock = false;
double now() {
  if (!cpu_clock) return wall();
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Median seconds of f, repeated for about 0.3 s; with --once, f runs a single time (to count instructions).
bool once_only = false;
double median_seconds(const std::function<void()>& f, double budget = 0.3) {
  f();
  if (once_only) return 0.0;
  std::vector<double> t;
  for (const double end = now() + budget; now() < end || t.size() < 3;) {
    const double start = now();
    f();
    t.push_back(now() - start);
  }
  std::nth_element(t.begin(), t.begin() + static_cast<std::ptrdiff_t>(t.size() / 2), t.end());
  return t[t.size() / 2];
}

double read_bandwidth(Backend& b, int threads) {
  ReadBandwidth reader(b, threads);
  std::vector<double> t;
  for (int round = 0; round < 7; ++round) {
    const double start = now();
    reader.read(reader.bytes());
    t.push_back(now() - start);
  }
  if (reader.sum() == 42) std::puts("");
  return static_cast<double>(reader.bytes()) / *std::min_element(t.begin(), t.end());
}

struct Shape {
  const char* name;
  int64_t n_embd, n_ff;
  int n_head, n_head_kv, n_expert, top_k;
  int64_t n_vocab;
};
constexpr Shape kShapes[] = {{"full", 3072, 1536, 48, 8, 256, 8, 8192}, {"mini", 384, 128, 12, 4, 48, 4, 4096}};

}  // namespace

int main(int argc, char** argv) try {
  BackendOptions options;
  std::string model = "full", only;
  std::vector<int> rows_list = {1, 2, 4, 8, 16};
  bool bandwidth = true;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i], v = i + 1 < argc ? argv[i + 1] : "";
    if (a == "--no-repack") {
      options.repack = false;
      continue;
    }
    if (a == "--once") {
      once_only = true;
      continue;
    }
    if (a == "--no-bandwidth") {
      bandwidth = false;
      continue;
    }
    ++i;
    if (a == "--threads") options.n_threads = std::atoi(v.c_str());
    if (a == "--isa") options.cpu_isa = v;
    if (a == "--model") model = v;
    if (a == "--only") only = v;
    if (a == "--rows") {
      rows_list.clear();
      std::istringstream in(v);
      for (std::string r; std::getline(in, r, ',');) rows_list.push_back(std::atoi(r.c_str()));
    }
  }
  cpu_clock = options.n_threads == 1;
  const Shape* shape = nullptr;
  for (const Shape& s : kShapes) {
    if (model == s.name) shape = &s;
  }
  if (!shape) fail("unknown --model ", model);
  const Shape s = *shape;
  const auto b = make_cpu_backend(options);
  std::printf("backend\t%s\n", b->describe().c_str());
  if (bandwidth) std::printf("read\t%.3f\n", read_bandwidth(*b, options.n_threads) / 1e9);

  // Several copies of each weight, used in turn, so that nothing is served from a cache that decoding would not hit.
  const int copies = once_only ? 1 : s.n_embd > 1000 ? 16 : 8;
  const int head_dim = 128;
  const int64_t q_dim = s.n_head * head_dim, kv_dim = s.n_head_kv * head_dim;
  const int max_rows = *std::max_element(rows_list.begin(), rows_list.end());
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  const auto floats = [&](int64_t n) {
    Buffer f = b->alloc(static_cast<size_t>(n) * 4);
    for (int64_t i = 0; i < n; ++i) f.as<float>()[i] = normal(rng);
    return f;
  };
  const auto want = [&](const char* name) { return only.empty() || only == name; };
  const auto report = [&](const char* name, int rows, double bytes, double mads, const std::function<void()>& f) {
    const double t = median_seconds(f);
    std::printf("%s\t%d\t%.2f\t%.0f\t%.0f\n", name, rows, t * 1e6, bytes, mads);
    std::fflush(stdout);
  };
  const Buffer x = floats(max_rows * std::max(s.n_embd, q_dim)), norm = floats(q_dim);
  const Buffer y = floats(max_rows * std::max<int64_t>(s.n_vocab, q_dim + 2 * kv_dim));
  uint64_t seed = 1;
  const auto weights = [&](DType type, int64_t in, int64_t out, int64_t experts, int n) {
    std::vector<Weight> w;
    for (int i = 0; i < n; ++i) w.push_back(b->random_weight(type, in, out, experts, ++seed));
    return w;
  };

  const struct {
    const char* name;
    DType type;
    int64_t in, out;
  } products[] = {{"q_proj Q4_0", DType::Q4_0, s.n_embd, q_dim},   {"q_proj Q4_1", DType::Q4_1, s.n_embd, q_dim},
                  {"q_proj Q8_0", DType::Q8_0, s.n_embd, q_dim},   {"q_proj BF16", DType::BF16, s.n_embd, q_dim},
                  {"q_proj F16", DType::F16, s.n_embd, q_dim},     {"head Q4_0", DType::Q4_0, s.n_embd, s.n_vocab},
                  {"head Q8_0", DType::Q8_0, s.n_embd, s.n_vocab}, {"router F32", DType::F32, s.n_embd, s.n_expert}};
  for (const auto& p : products) {
    if (!want(p.name)) continue;
    const std::vector<Weight> w = weights(p.type, p.in, p.out, 1, copies);
    for (const int rows : rows_list) {
      size_t i = 0;
      report(p.name, rows, static_cast<double>(w[0].bytes()), static_cast<double>(rows * p.in * p.out), [&] {
        const MatmulOut out{&w[i++ % w.size()], y.as<float>()};
        b->norm_matmul(x.as<float>(), norm.as<float>(), 1e-6f, rows, &out, 1);
      });
    }
  }
  if (want("moe Q4_0")) {
    const std::vector<Weight> gate = weights(DType::Q4_0, s.n_embd, s.n_ff, s.n_expert, 1);
    const std::vector<Weight> up = weights(DType::Q4_0, s.n_embd, s.n_ff, s.n_expert, 1);
    const std::vector<Weight> down = weights(DType::Q4_0, s.n_ff, s.n_embd, s.n_expert, 1);
    const Weight router = b->random_weight(DType::F32, s.n_embd, s.n_expert, 1, ++seed);
    const Buffer bias = floats(s.n_expert);
    std::memset(bias.data, 0, bias.bytes);
    const double expert = static_cast<double>(gate[0].bytes() + up[0].bytes() + down[0].bytes()) / s.n_expert;
    const Moe m{s.n_expert, s.top_k, 1e-6f, norm.as<float>(), &router, bias.as<float>(), &gate[0], &up[0], &down[0]};
    const int64_t n_x = 64 * max_rows * s.n_embd;
    const Buffer pool = floats(n_x);  // different rows every time, so different experts
    const Buffer hidden = floats(max_rows * s.n_embd);
    for (const int rows : rows_list) {
      int64_t at = 0;
      const auto once = [&] {
        std::memcpy(hidden.data, pool.as<float>() + at, static_cast<size_t>(rows * s.n_embd) * 4);
        at = (at + rows * s.n_embd) % (n_x - rows * s.n_embd);
        b->moe(m, rows, hidden.as<float>());
      };
      for (int i = 0; i < 20; ++i) once();
      (void)b->take_expert_count();
      for (int i = 0; i < 20; ++i) once();
      const double distinct = static_cast<double>(b->take_expert_count().distinct) / 20;
      report("moe Q4_0", rows, distinct * expert + static_cast<double>(router.bytes()),
             static_cast<double>(rows * s.top_k * 3 * s.n_embd * s.n_ff), once);
    }
  }
  for (const DType type : {DType::F16, DType::Q8_0}) {
    const char* name = type == DType::F16 ? "attention F16" : "attention Q8_0";
    if (!want(name)) continue;
    for (const int n_ctx : {512, 8192}) {
      const size_t bytes = row_bytes(type, head_dim) * static_cast<size_t>(s.n_head_kv * n_ctx);
      const Buffer k = b->alloc(bytes), v = b->alloc(bytes);
      std::memset(k.data, 1, bytes);
      std::memset(v.data, 1, bytes);
      const KvLayer kv{k.data, v.data, type, s.n_head_kv, head_dim, n_ctx};
      for (const int rows : rows_list) {
        const Attention a{s.n_head, s.n_head_kv, head_dim, 0.1f, true, 0};
        report((std::string(name) + " ctx " + std::to_string(n_ctx)).c_str(), rows, 2.0 * static_cast<double>(bytes),
               2.0 * rows * s.n_head * head_dim * n_ctx,
               [&] { b->attention(a, {rows, n_ctx - rows}, x.as<float>(), kv, y.as<float>()); });
      }
    }
  }
  if (want("join")) {
    ThreadPool pool(options.n_threads);
    report("join x 1000", 1, 0, 0, [&] {
      for (int i = 0; i < 1000; ++i) pool.parallel_for(2 * pool.size(), [](int64_t, int) {});
    });
  }
  return 0;
} catch (const Error& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
