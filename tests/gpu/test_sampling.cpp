// Draws on the device against the CPU sampler: the same draw is the same token, whatever rows travel together, and the
// tokens follow the distribution.

#include <cmath>
#include <limits>

#include "engine/sampler.h"
#include "engine_tests.h"
#include "reference.h"

namespace dflash::test {

namespace {

using Ids = std::vector<int32_t>;

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

struct Case {
  const char* name;
  SamplingParams p;
};

std::vector<Case> cases() {
  std::vector<Case> out;
  const auto add = [&](const char* name, float temperature, int top_k = 0, float top_p = 1.0f, float min_p = 0.0f) {
    SamplingParams p;
    p.temperature = temperature;
    p.top_k = top_k;
    p.top_p = top_p;
    p.min_p = min_p;
    out.push_back({name, p});
  };
  add("T 1", 1.0f);
  add("T 0.2", 0.2f);
  add("T 3", 3.0f);
  add("top_k 1", 1.0f, 1);
  add("top_k 40", 0.8f, 40);
  add("top_k of all", 1.0f, 1 << 30);
  add("top_p 0.9", 1.0f, 0, 0.9f);
  add("top_p 0.999, T 2", 2.0f, 0, 0.999f);
  add("top_p 1e-6", 1.0f, 0, 1e-6f);
  add("min_p 0.05", 1.3f, 0, 1.0f, 0.05f);
  add("min_p 1", 1.0f, 0, 1.0f, 1.0f);
  add("all cuts", 0.7f, 50, 0.95f, 0.01f);
  add("penalties", 1.0f, 20);
  out.back().p.repetition_penalty = 1.4f;
  out.back().p.presence_penalty = 0.3f;
  out.back().p.frequency_penalty = 0.25f;
  out.back().p.penalty_last_n = 8;
  add("penalties on all, bias, greedy", 0.0f);
  out.back().p.repetition_penalty = 1.2f;
  out.back().p.frequency_penalty = -0.5f;
  add("bias", 1.0f, 0, 0.9f);
  out.back().p.logit_bias = {{0, 5.0f}, {3, kForbidden}, {7, -2.0f}};
  return out;
}

// Rows of logits of different kinds: spread, rounded to few values, all equal, one that dwarfs the rest, forbidden
// ones.
Floats make_logits(std::mt19937& rng, int kind, int rows, int64_t n) {
  Floats x = random_floats(rng, static_cast<size_t>(rows * n), kind == 4 ? 1.0f : 4.0f);
  for (size_t i = 0; i < x.size(); ++i) {
    if (kind == 1) x[i] = std::round(x[i]) * 0.5f;
    if (kind == 2) x[i] = -3.25f;
    if (kind == 3 && i % static_cast<size_t>(n) == static_cast<size_t>(n) / 2) x[i] = 80.0f;
    if (kind == 4 && i % static_cast<size_t>(n) % 3 != 0) x[i] = kForbidden;
  }
  return x;
}
constexpr int kKinds = 5;

// Every `step`-th pair of options and logits.
void compare(Backend& gpu, Backend& cpu, std::mt19937& rng, int64_t n, int rows, int rounds, int step, int* draws) {
  int pair = 0;
  for (const Case& c : cases()) {
    for (int kind = 0; kind < kKinds * rounds; ++kind) {
      if (pair++ % step != 0) continue;
      SamplingParams p = c.p;
      p.seed = rng();
      for (auto it = p.logit_bias.begin(); it != p.logit_bias.end();)
        it = it->first < n ? ++it : p.logit_bias.erase(it);
      const Sampler sampler(p);
      const Floats logits = make_logits(rng, kind % kKinds, rows, n);
      Ids history(static_cast<size_t>(rng() % 30));
      for (int32_t& id : history) id = static_cast<int32_t>(rng() % static_cast<unsigned>(std::min<int64_t>(n, 12)));
      Ids drafts(static_cast<size_t>(rows) - 1);
      for (int32_t& id : drafts) id = static_cast<int32_t>(rng() % static_cast<unsigned>(std::min<int64_t>(n, 12)));
      Sampling s = sampler.rows(history, drafts);
      s.all_rows = true;
      Floats copy = logits;
      Ids want(static_cast<size_t>(rows)), got(want.size());
      cpu.sample(s, copy.data(), n, want.data());
      Guarded device(gpu, logits);
      const int drawn = gpu.sample(s, device.data(), n, got.data());
      const std::string what = cat("sampling ", c.name, ", logits ", kind % kKinds, ", n ", n, ", rows ", rows);
      expect(drawn == rows, what + ": rows drawn");
      expect(got == want, what + ": tokens differ from the CPU's");
      (void)device.get(what);
      *draws += rows;
      // Alone, each row draws the same; and drafts stop at the first that does not stand.
      for (int r : {0, rows - 1}) {
        Ids before = history;
        before.insert(before.end(), drafts.begin(), drafts.begin() + r);
        const Floats row(logits.begin() + r * n, logits.begin() + (r + 1) * n);
        Guarded one(gpu, row);
        int32_t token = -2;
        gpu.sample(sampler.rows(before, {}), one.data(), n, &token);
        expect(token == got[static_cast<size_t>(r)], what + ": a row alone differs");
      }
      if (rows > 2 && p.repetition_penalty == 1.0f && p.frequency_penalty == 0.0f) {
        s.all_rows = false;
        for (size_t i = 0; i + 1 < got.size(); ++i) s.drafts[i] = got[i];
        s.drafts[static_cast<size_t>(rows) / 2] = got[static_cast<size_t>(rows) / 2] == 0 ? 1 : 0;
        Guarded again(gpu, logits);
        expect(gpu.sample(s, again.data(), n, want.data()) == rows / 2 + 1, what + ": drafts that stand");
      }
    }
  }
}

// Chi-square of many seeds against the CPU sampler's distribution, as a normal deviate (Wilson and Hilferty).
void test_distribution(Backend& gpu, std::mt19937& rng) {
  constexpr int64_t kVocab = 300;
  constexpr int kRows = 250, kCalls = 80, kDraws = kRows * kCalls;
  double worst = 0.0;
  uint64_t seed = 0;
  for (const Case& c : cases()) {
    if (c.p.temperature <= 0.0f) continue;
    const Floats logits = random_floats(rng, kVocab, 2.0f);
    const Ids history = {1, 2, 3, 2, 5};
    Sampler sampler(c.p);
    const std::vector<double> p = sampler.distribution(logits.data(), kVocab, history);
    Floats rows;
    for (int r = 0; r < kRows; ++r) rows.insert(rows.end(), logits.begin(), logits.end());
    std::vector<int> count(kVocab, 0);
    for (int call = 0; call < kCalls; ++call) {
      Sampling s = sampler.rows(history, {});
      s.draws.clear();
      for (int r = 0; r < kRows; ++r) s.draws.push_back(random_bits_at(++seed, 5));
      s.all_rows = true;
      s.drafts.resize(kRows - 1);
      s.leaving.clear();  // every row at the same place
      Guarded device(gpu, rows);
      Ids out(kRows);
      gpu.sample(s, device.data(), kVocab, out.data());
      for (const int32_t id : out) ++count[static_cast<size_t>(id)];
    }
    double x2 = 0.0, rest = 0.0, rest_found = 0.0;
    int cells = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      const double e = p[i] * kDraws;
      expect(p[i] > 0.0 || count[i] == 0, cat("sampling ", c.name, ": a token that is cut was drawn"));
      if (e < 5.0) {
        rest += e;
        rest_found += count[i];
      } else {
        x2 += (count[i] - e) * (count[i] - e) / e;
        ++cells;
      }
    }
    if (rest >= 5.0) {
      x2 += (rest_found - rest) * (rest_found - rest) / rest;
      ++cells;
    }
    if (cells < 2) continue;
    const double dof = cells - 1;
    const double z = (std::cbrt(x2 / dof) - (1.0 - 2.0 / (9.0 * dof))) / std::sqrt(2.0 / (9.0 * dof));
    worst = std::max(worst, z);
    expect(z < 4.5, cat("sampling ", c.name, ": chi-square ", x2, " with ", dof, " degrees of freedom"));
  }
  std::printf("distribution: %d draws an option, worst normal deviate %.2f (limit 4.5)\n", kDraws, worst);
}

void test_forbidden(Backend& gpu) {
  SamplingParams p;
  p.temperature = 1.0f;
  const Floats logits(100, kForbidden);
  Guarded device(gpu, logits);
  int32_t token = 0;
  bool thrown = false;
  try {
    gpu.sample(Sampler(p).rows({}, {}), device.data(), 100, &token);
  } catch (const Error& e) {
    thrown = std::string(e.what()).find("every token is forbidden") != std::string::npos;
  }
  expect(thrown, "a row of forbidden tokens does not say so");
}

void time_sampling(Backend& gpu, Backend& cpu, std::mt19937& rng) {
  constexpr int64_t kVocab = 200064;
  Buffer word = gpu.alloc(4);
  int32_t got = 0;
  std::printf("a wait for 4 bytes, nothing queued: %.4f ms\n",
              median_ms(200, [&] { gpu.download(&got, word.data, 4); }));
  for (const int rows : {1, 5, 16}) {
    const Floats logits = random_floats(rng, static_cast<size_t>(rows * kVocab), 3.0f);
    Guarded device(gpu, logits);
    Ids out(static_cast<size_t>(rows));
    std::vector<Top1> top(out.size());
    const auto time = [&](const SamplingParams& p) {
      Sampling s = Sampler(p).rows({1, 2, 3}, Ids(static_cast<size_t>(rows) - 1, 7));
      s.all_rows = true;
      return median_ms(40, [&] { gpu.sample(s, device.data(), kVocab, out.data()); });
    };
    SamplingParams plain, cut;
    plain.temperature = cut.temperature = 1.0f;
    cut.top_k = 40;
    cut.top_p = 0.95f;
    Floats host(logits.size());
    const double download = median_ms(10, [&] { gpu.download(host.data(), device.data(), host.size() * 4); });
    const double on_host = median_ms(3, [&] {
      Sampling s = Sampler(cut).rows({1, 2, 3}, Ids(static_cast<size_t>(rows) - 1, 7));
      s.all_rows = true;
      cpu.sample(s, host.data(), kVocab, out.data());
    });
    std::printf("%2d rows of %d: top-1 %.3f ms, T=1 %.3f, top_k+top_p %.3f; before: download %.3f + host %.3f\n", rows,
                static_cast<int>(kVocab), median_ms(40, [&] { gpu.top1(device.data(), rows, kVocab, top.data()); }),
                time(plain), time(cut), download, on_host);
  }
}

}  // namespace

void test_sampling(Backend& gpu, Backend& cpu, bool quick) {
  std::mt19937 rng(11);
  int draws = 0;
  if (quick) {
    compare(gpu, cpu, rng, 1100, 2, 1, 6, &draws);  // more than a block sorts at once, where all are equal
    test_forbidden(gpu);
    return;
  }
  for (const int64_t n : {int64_t{2}, int64_t{31}, int64_t{1000}, int64_t{5000}}) {
    for (const int rows : {1, 2, 5, 16}) compare(gpu, cpu, rng, n, rows, 2, 1, &draws);
  }
  compare(gpu, cpu, rng, 200064, 3, 1, 1, &draws);
  std::printf("draws compared with the CPU: %d\n", draws);
  test_distribution(gpu, rng);
  test_forbidden(gpu);
  time_sampling(gpu, cpu, rng);
}

}  // namespace dflash::test
