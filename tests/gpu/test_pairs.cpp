// A real pair on the GPU: close to the CPU's precise mode, and speculative greedy equal to plain greedy bit for bit.
//
//   test_pairs TARGET.gguf DRAFTER.gguf PROMPTS [runs] [quick]     PROMPTS: lines of token ids; runs of the repeat test
//   (100); quick: short answers, some depths only

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "../cpp/check.h"
#include "../cpp/generate.h"
#include "core/units.h"
#include "engine/memory_need.h"
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

Ids generate(Session& s, const Ids& prompt, int n, int depth, const SamplingParams& sampling = {}) {
  GenerateParams p;
  p.sampling = sampling;
  p.max_tokens = n;
  p.depth = depth;
  return test::generate(s, prompt, p);
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
  if (argc < 4) fail("usage: test_pairs TARGET.gguf DRAFTER.gguf PROMPTS [runs] [quick]");
  const int runs = argc > 4 ? std::atoi(argv[4]) : 100;
  const bool quick = argc > 5 && std::strcmp(argv[5], "quick") == 0;
  const int tokens = quick ? 12 : 96, sampled_tokens = quick ? 12 : 64;
  const std::vector<Ids> prompts = read_prompts(argv[3]);
  BackendOptions hip;
  hip.name = "hip";
  const auto observer = make_backend(hip);
  {  // a device that is nearly full: refused by name and figures before anything is loaded
    const Buffer most = observer->alloc(observer->memory().free - (size_t{40} << 20));
    std::string text;
    try {
      SessionOptions planned = small();
      (void)Model::load(argv[1], argv[2], hip, nullptr, {}, &planned);
    } catch (const CapacityError& e) {
      text = e.what();
    }
    std::printf("nearly full: %s\n", text.c_str());
    for (const char* part :
         {"short. Needed: target weights", "drafter weights", "cache of 1024 tokens (F16)", "working memory"}) {
      CHECK(text.find(part) != std::string::npos);
    }
  }
  const size_t free_before = observer->memory().free;
  const auto gpu_model = open(argv[1], argv[2], "hip", false), cpu_model = open(argv[1], argv[2], "cpu", true);
  Session gpu(gpu_model, small()), cpu(cpu_model, small());
  std::printf("%s\n", gpu_model->backend->describe().c_str());

  double worst_logits = 0.0, worst_taps = 0.0, worst_draft = 0.0;
  for (const Ids& prompt : prompts) {
    worst_logits = std::max(worst_logits, nmse(gpu.logits(prompt), cpu.logits(prompt)));
    worst_taps = std::max(worst_taps, nmse(gpu.taps(prompt), cpu.taps(prompt)));
    worst_draft = std::max(
        worst_draft, nmse(gpu.draft_logits(prompt, prompt[0], 15, 16), cpu.draft_logits(prompt, prompt[0], 15, 16)));
  }
  std::printf("NMSE against the CPU's precise mode: logits %.2e, taps %.2e, draft logits %.2e\n", worst_logits,
              worst_taps, worst_draft);
  CHECK(worst_logits < 2e-3);  // int8 activations; the CPU's own fast mode lies near 7e-4 on the mini pair
  CHECK(worst_taps < 2e-3);
  CHECK(worst_draft < 5e-3);

  for (const Ids& prompt : prompts) {
    const Ids plain = generate(gpu, prompt, tokens, 0);
    Ids whole = prompt;
    whole.insert(whole.end(), plain.begin(), plain.end() - 1);
    const std::vector<float> prefill_logits = gpu.logits(whole);
    for (int depth = 1; depth < gpu_model->block_size(); depth += quick ? 7 : 1) {
      CHECK(generate(gpu, prompt, tokens, depth) == plain);
    }
    CHECK(generate(gpu, prompt, tokens, -1) == plain);
    // What was generated in between leaves no trace: the prefill of the whole text gives the same logits bits again.
    const std::vector<float> again = gpu.logits(whole);
    CHECK(std::memcmp(prefill_logits.data(), again.data(), again.size() * sizeof(float)) == 0);
  }
  // Sampled on the device, penalties that see accepted drafts included: the same tokens at every depth.
  SamplingParams sampling;
  sampling.temperature = 0.9f;
  sampling.top_k = 50;
  sampling.top_p = 0.95f;
  sampling.repetition_penalty = 1.1f;
  sampling.frequency_penalty = 0.05f;
  sampling.penalty_last_n = 24;
  for (const Ids& prompt : prompts) {
    sampling.seed += 1;
    const Ids plain = generate(gpu, prompt, sampled_tokens, 0, sampling);
    for (int depth : quick ? std::vector<int>{2, -1} : std::vector<int>{1, 2, 5, -1})
      CHECK(generate(gpu, prompt, sampled_tokens, depth, sampling) == plain);
    SamplingParams on_host = sampling;
    on_host.logits_hook = [](const std::vector<int32_t>&, float*, int64_t) {};
    CHECK(generate(gpu, prompt, sampled_tokens, 3, on_host) == plain);
  }
  // What was said to be needed is enough, and not twice what is taken (beside the fixed part for the runtime).
  const auto target_file = Gguf::open(argv[1]), drafter_file = Gguf::open(argv[2]);
  const SessionOptions session = small();
  const MemoryNeed need = memory_need(
      *target_file, gpu_model->target->config(), drafter_file.get(), &gpu_model->drafter->config(),
      [&](const HostTensor& t) { return observer->weight_bytes(t); }, &session, false);
  const size_t used = free_before - observer->memory().free;
  std::printf("memory: %s said, %s taken\n", human_bytes(need.total()).c_str(), human_bytes(used).c_str());
  CHECK(used <= need.total());
  CHECK(need.total() <= 2 * used + (size_t{128} << 20));
  const Ids first = generate(gpu, prompts[0], sampled_tokens, 3);
  for (int i = 0; i < runs; ++i) CHECK(generate(gpu, prompts[0], sampled_tokens, i % gpu_model->block_size()) == first);
  return test::report("test_pairs");
} catch (const std::exception& e) {
  std::fprintf(stderr, "test_pairs: %s\n", e.what());
  return 2;
}
