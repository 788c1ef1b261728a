// Times whole forward passes of the target (and drafter) on the CPU backend, without Python in between.
//   bench_model (--gguf FILE [--drafter FILE] | --slab) [--threads N] [--isa NAME] [--rows 1,2,4,8] [--prefill 128,512]
//               [--seconds S] [--ctx N] [--no-repack] [--precise] [--wall] [--ops] [--paired ROUNDS]
// --slab: two layers of full MiniMax-M2.7 shape, Q4_0, vocabulary 8192, random weights. Prints, tab separated:
//   what rows microseconds(median) microseconds(fastest tenth) bytes(read once: attention, distinct experts, router,
//   head)
// With a drafter also, microseconds a token of 32 plain steps, of the same with taps, of the drafter taking those in:
//   parked 32 plain tapped ingest (tapped + ingest) / plain - 1, the median of turns
// --ops: with the time of each op below. --paired: instead, steps of each width between two reads of memory, in turn,
// 60 ms each, since the bandwidth of a shared host swings. Prints, tab separated, medians over the rounds:
//   paired rows GB/s(step) GB/s(reads beside it) share share(lower quartile) share(upper quartile)
//   time / (bytes at the one-row rate of the same round)

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "core/error.h"
#include "m27.h"
#include "model/dflash_drafter.h"
#include "model/minimax_m2.h"
#include "read_bandwidth.h"
#include "timed_backend.h"

using namespace dflash;

namespace {

bool cpu_clock = false;  // one thread: its own CPU clock, which other processes disturb less
double now() {
  if (!cpu_clock) return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::vector<double> times(const std::function<void()>& f, double budget) {
  f();
  std::vector<double> t;
  for (const double end = now() + budget; now() < end || t.size() < 3;) {
    const double start = now();
    f();
    t.push_back(now() - start);
  }
  std::sort(t.begin(), t.end());
  return t;
}

std::vector<int> numbers(const std::string& list) {
  std::vector<int> v;
  std::istringstream in(list);
  for (std::string n; std::getline(in, n, ',');) v.push_back(std::atoi(n.c_str()));
  return v;
}

}  // namespace

int main(int argc, char** argv) try {
  BackendOptions options;
  std::string gguf, drafter_gguf;
  std::vector<int> rows_list = {1, 2, 4, 8}, prefill_list = {128, 512};
  double seconds = 1.0;
  int ctx = 0;
  bool slab = false, wall = false, ops = false;
  int paired = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--slab") {
      slab = true;
      continue;
    }
    if (a == "--wall") {
      wall = true;
      continue;
    }
    if (a == "--ops") {
      ops = true;
      continue;
    }
    if (a == "--no-repack") {
      options.repack = false;
      continue;
    }
    if (a == "--precise") {
      options.precise = true;
      continue;
    }
    const std::string v = ++i < argc ? argv[i] : "";
    if (a == "--threads") options.n_threads = std::atoi(v.c_str());
    if (a == "--isa") options.cpu_isa = v;
    if (a == "--gguf") gguf = v;
    if (a == "--drafter") drafter_gguf = v;
    if (a == "--rows") rows_list = numbers(v);
    if (a == "--prefill") prefill_list = numbers(v);
    if (a == "--seconds") seconds = std::atof(v.c_str());
    if (a == "--paired") paired = std::atoi(v.c_str());
    if (a == "--ctx") ctx = std::atoi(v.c_str());
  }
  cpu_clock = options.n_threads == 1 && !wall;
  const auto backend = make_cpu_backend(options);
  TimedBackend timed(*backend);
  Backend& b = ops ? static_cast<Backend&>(timed) : *backend;
  std::printf("backend\t%s\n", b.describe().c_str());
  const double open_start = now();
  std::unique_ptr<MiniMaxM2> model;  // "load" includes a first token, as opening a file for use does
  if (slab) {
    RandomWeights weights(b, DType::Q4_0, DType::Q4_0, 1.0f, 1);
    model = MiniMaxM2::make(m27_config(2, 8192), weights, b);
  } else {
    model = MiniMaxM2::load(Gguf::open(gguf), b, nullptr);
  }
  const TargetConfig& c = model->config();
  const int max_rows = std::max(*std::max_element(rows_list.begin(), rows_list.end()),
                                prefill_list.empty() ? 1 : *std::max_element(prefill_list.begin(), prefill_list.end()));
  MiniMaxM2::Scratch scratch(b, c, max_rows);
  const KvCache kv(b, c.n_layer, c.n_head_kv, c.head_dim, ctx + max_rows + 64, DType::F16);
  std::vector<float> logits(static_cast<size_t>(std::max(16, *std::max_element(rows_list.begin(), rows_list.end()))) *
                            static_cast<size_t>(c.n_vocab));
  std::mt19937 rng(7);
  std::vector<int32_t> tokens(1 << 16);
  for (int32_t& t : tokens) t = static_cast<int32_t>(rng() % static_cast<unsigned>(c.n_vocab));
  size_t at = 0;

  const auto report = [&](const char* what, int rows, const std::function<void()>& f, bool target) {
    (void)b.take_expert_count();
    (void)timed.take();
    int calls = 0;
    const std::vector<double> t = times([&] { ++calls, f(); }, seconds);
    const double distinct = static_cast<double>(b.take_expert_count().distinct) / calls;
    const double fixed = static_cast<double>(model->bytes_per_token() - model->expert_bytes_per_token());
    const double expert = static_cast<double>(model->expert_bytes_per_token()) / (c.n_layer * c.n_expert_used);
    std::printf("%s\t%d\t%.1f\t%.1f\t%.0f\n", what, rows, t[t.size() / 2] * 1e6, t[t.size() / 10] * 1e6,
                target ? fixed + distinct * expert : 0.0);
    for (const auto& [name, e] : timed.take()) {
      std::printf("  %s\t%d\t%.1f\tof %lld calls\n", name.c_str(), rows, e.seconds / calls * 1e6,
                  static_cast<long long>(e.calls / calls));
    }
    std::fflush(stdout);
  };
  const auto forward = [&](int rows, int pos, bool all_logits) {
    at = (at + static_cast<size_t>(rows)) % (tokens.size() - static_cast<size_t>(max_rows));
    model->forward(b, scratch, {rows, pos}, tokens.data() + at, kv, nullptr);
    model->logits(b, scratch, all_logits ? 0 : rows - 1, all_logits ? rows : 1, logits.data());
  };
  forward(1, 0, true);
  std::printf("load\t1\t%.0f\n", (now() - open_start) * 1e6);
  for (int p = 0; p < ctx; p += max_rows) forward(std::min(max_rows, ctx - p), p, false);
  if (paired > 0) {
    ReadBandwidth reader(b, options.n_threads);
    constexpr double kSlice = 0.06;
    const double fixed = static_cast<double>(model->bytes_per_token() - model->expert_bytes_per_token());
    const double expert = static_cast<double>(model->expert_bytes_per_token()) / (c.n_layer * c.n_expert_used);
    const auto read_rate = [&] {  // bytes per second
      double bytes = 0.0;
      const double start = now();
      while (now() < start + kSlice) {
        reader.read(size_t{256} << 20);
        bytes += 256.0 * (1 << 20);
      }
      return bytes / (now() - start);
    };
    const auto step_rate = [&](int rows) {
      (void)b.take_expert_count();
      int calls = 0;
      const double start = now();
      for (; now() < start + kSlice; ++calls) forward(rows, ctx, true);
      const double seconds = now() - start;
      return (fixed * calls + expert * static_cast<double>(b.take_expert_count().distinct)) / seconds;
    };
    const auto quantile = [](std::vector<double> v, double q) {
      std::sort(v.begin(), v.end());
      return v[std::min(v.size() - 1, static_cast<size_t>(q * static_cast<double>(v.size())))];
    };
    std::vector<std::vector<double>> steps(rows_list.size()), reads(rows_list.size()), shares(rows_list.size()),
        against_one(rows_list.size());
    for (int round = -1; round < paired; ++round) {  // round -1 warms up
      double before = read_rate();
      for (size_t i = 0; i < rows_list.size(); ++i) {
        const double rate = step_rate(rows_list[i]), after = read_rate(), beside = (before + after) / 2;
        before = after;
        if (round < 0) continue;
        steps[i].push_back(rate);
        reads[i].push_back(beside);
        shares[i].push_back(rate / beside);
        against_one[i].push_back(steps[0].back() / rate);
      }
    }
    for (size_t i = 0; i < rows_list.size(); ++i) {
      std::printf("paired\t%d\t%.1f\t%.1f\t%.3f\t%.3f\t%.3f\t%.3f\n", rows_list[i], quantile(steps[i], 0.5) * 1e-9,
                  quantile(reads[i], 0.5) * 1e-9, quantile(shares[i], 0.5), quantile(shares[i], 0.25),
                  quantile(shares[i], 0.75), quantile(against_one[i], 0.5));
    }
    return reader.sum() == 42 ? 2 : 0;
  }
  for (const int rows : rows_list) {
    int pos = ctx;
    report(
        "step", rows,
        [&] {
          forward(rows, pos, true);
          pos = pos + rows + rows <= kv.n_ctx() ? pos + rows : ctx;
        },
        true);
  }
  for (const int rows : prefill_list) report("prefill", rows, [&] { forward(rows, ctx, false); }, true);

  if (!drafter_gguf.empty()) {
    const auto file = Gguf::open(drafter_gguf);
    const DrafterConfig dc = read_drafter_config(*file);
    const auto drafter = DFlashDrafter::load(file, dc, *model, b, nullptr);
    DFlashDrafter::Scratch ds(b, dc, std::max(64, dc.block_size));
    const KvCache dkv(b, dc.n_layer, dc.n_head_kv, dc.head_dim, 1024, DType::F16);
    std::vector<float> taps(64 * dc.target_layers.size() * static_cast<size_t>(c.n_embd), 0.1f);
    for (int p = 0; p < 256; p += 64) drafter->ingest(b, ds, {64, p}, taps.data(), dkv);
    for (const int n : {1, 3, 4, 7, 15}) {
      if (n >= dc.block_size) break;
      report("draft slots", n, [&] { drafter->draft(b, ds, 5, 256, n, n + 1, dkv, logits.data(), 0); }, false);
    }
    for (const int n : {1, 4, 32})
      report("ingest rows", n, [&] { drafter->ingest(b, ds, {n, 256}, taps.data(), dkv); }, false);

    // What a session that does not draft pays for its drafter: 32 plain steps without and with taps, kept and taken in
    // by the drafter at the end, in turn.
    constexpr int kSteps = 32;
    const int64_t width = static_cast<int64_t>(dc.target_layers.size()) * c.n_embd;
    std::vector<float> step_taps(static_cast<size_t>(width));
    const TapSink sink{&dc.target_layers, step_taps.data()};
    const auto plain_steps = [&](bool tapped) {
      for (int i = 0; i < kSteps; ++i) {
        at = (at + 1) % (tokens.size() - 1);
        model->forward(b, scratch, {1, ctx + i}, tokens.data() + at, kv, tapped ? &sink : nullptr);
        model->logits(b, scratch, 0, 1, logits.data());
        if (tapped) b.copy_rows(step_taps.data(), 1, width, taps.data() + i * width, width);
      }
    };
    std::vector<double> without, tapping, ingesting, cost;
    for (const double end = now() + 4 * seconds; now() < end || cost.size() < 3;) {
      const double start = now();
      plain_steps(false);
      const double middle = now();
      plain_steps(true);
      const double ingest = now();
      drafter->ingest(b, ds, {kSteps, 256}, taps.data(), dkv);
      const double stop = now();
      without.push_back(middle - start);
      tapping.push_back(ingest - middle);
      ingesting.push_back(stop - ingest);
      cost.push_back((stop - middle) / (middle - start) - 1.0);
    }
    const auto median = [](std::vector<double> v) {
      std::sort(v.begin(), v.end());
      return v[v.size() / 2];
    };
    std::printf("parked\t%d\t%.2f\t%.2f\t%.2f\t%.4f\n", kSteps, median(without) / kSteps * 1e6,
                median(tapping) / kSteps * 1e6, median(ingesting) / kSteps * 1e6, median(cost));
  }
  return 0;
} catch (const Error& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
