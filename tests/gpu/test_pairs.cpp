// A real pair on the GPU: close to the CPU's precise mode, and speculative greedy equal to plain greedy bit for bit.
//
//   test_pairs TARGET.gguf DRAFTER.gguf PROMPTS [runs]     PROMPTS: lines of token ids; runs of the repeat test (100)

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "../cpp/check.h"
#include "engine/session.h"

using namespace dflash;

namespace {

using Ids = std::vector<int32_t>;

std::shared_ptr<Model> open(const char* target, const char* drafter, const char* backend, bool precise) {
  BackendOptions options;
  options.name = backend;
  options.precise = precise;
  return Model::load(target, drafter, options, nullptr);
}

SessionOptions small() {
  SessionOptions o;
  o.n_ctx = 1024;
  return o;
}

std::vector<Ids> read_prompts(const char* path) {
  std::ifstream in(path);
  std::vector<Ids> out;
  for (std::string line; std::getline(in, line);) {
    std::istringstream ids(line);
    out.emplace_back();
    for (int32_t id; ids >> id;) out.back().push_back(id);
  }
  if (out.empty()) fail(path, ": no prompts");
  return out;
}

Ids generate(Session& s, const Ids& prompt, int n, int depth) {
  GenerateParams p;
  p.max_tokens = n;
  p.depth = depth;
  s.rewind(0);
  s.begin(prompt, p);
  while (s.prefill() < static_cast<int>(prompt.size())) {
  }
  Ids out;
  for (const char* stop = nullptr; stop == nullptr;) {
    const StepResult r = s.step();
    out.insert(out.end(), r.tokens.begin(), r.tokens.end());
    stop = r.stop;
  }
  return out;
}

double nmse(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return error / norm;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) fail("usage: test_pairs TARGET.gguf DRAFTER.gguf PROMPTS [runs]");
  const int runs = argc > 4 ? std::atoi(argv[4]) : 100;
  const std::vector<Ids> prompts = read_prompts(argv[3]);
  const auto gpu_model = open(argv[1], argv[2], "hip", false), cpu_model = open(argv[1], argv[2], "cpu", true);
  Session gpu(gpu_model, small()), cpu(cpu_model, small());
  std::printf("%s\n", gpu_model->backend->describe().c_str());

  double worst_logits = 0.0, worst_taps = 0.0, worst_draft = 0.0;
  for (const Ids& prompt : prompts) {
    worst_logits = std::max(worst_logits, nmse(gpu.logits(prompt), cpu.logits(prompt)));
    worst_taps = std::max(worst_taps, nmse(gpu.taps(prompt), cpu.taps(prompt)));
    worst_draft = std::max(worst_draft, nmse(gpu.draft_logits(prompt, prompt[0], 15, 16),
                                             cpu.draft_logits(prompt, prompt[0], 15, 16)));
  }
  std::printf("NMSE against the CPU's precise mode: logits %.2e, taps %.2e, draft logits %.2e\n", worst_logits,
              worst_taps, worst_draft);
  CHECK(worst_logits < 2e-3);  // int8 activations; the CPU's own fast mode lies near 7e-4 on the mini pair
  CHECK(worst_taps < 2e-3);
  CHECK(worst_draft < 5e-3);

  for (const Ids& prompt : prompts) {
    const Ids plain = generate(gpu, prompt, 96, 0);
    Ids whole = prompt;
    whole.insert(whole.end(), plain.begin(), plain.end() - 1);
    const std::vector<float> prefill_logits = gpu.logits(whole);
    for (int depth = 1; depth < gpu_model->block_size(); ++depth) CHECK(generate(gpu, prompt, 96, depth) == plain);
    CHECK(generate(gpu, prompt, 96, -1) == plain);
    // Continuing equals starting over: the prefill of the whole text gives the same logits bits as any other split.
    const std::vector<float> again = gpu.logits(whole);
    CHECK(std::memcmp(prefill_logits.data(), again.data(), again.size() * sizeof(float)) == 0);
  }
  const Ids first = generate(gpu, prompts[0], 64, 3);
  for (int i = 0; i < runs; ++i) CHECK(generate(gpu, prompts[0], 64, i % gpu_model->block_size()) == first);
  return test::report("test_pairs");
} catch (const std::exception& e) {
  std::fprintf(stderr, "test_pairs: %s\n", e.what());
  return 2;
}
