// A whole pair on every instruction set of this CPU, weights repacked and as they lie in the file: the logits of plain
// C++ bit for bit, and greedy speculative decoding equal to greedy plain decoding.
//
//   test_instruction_sets [--isas A,B,..] [TARGET.gguf DRAFTER.gguf]
//
// Without files: random weights. --isas: what must be found here, best first.

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "engine/session.h"

using namespace dflash;

namespace {

using Ids = std::vector<int32_t>;

constexpr const char* kKnown[] = {"avx512vnni", "amx", "avxvnni", "avx2", "neon_i8mm", "neon_dotprod", "neon", "plain"};

BackendOptions on_cpu(const std::string& isa, bool repack) {
  BackendOptions o;
  o.name = "cpu";
  o.n_threads = 2;
  o.cpu_isa = isa;
  o.repack = repack;
  return o;
}

std::shared_ptr<Model> open(const std::vector<std::string>& files, const BackendOptions& options) {
  if (!files.empty()) return Model::load(files[0], files[1], options, nullptr);
  TargetConfig t;
  t.path = "synthetic";
  t.n_layer = 3;
  t.n_embd = 160;
  t.n_head = 4;
  t.n_head_kv = 2;
  t.head_dim = 48;
  t.n_expert = 6;
  t.n_expert_used = 2;
  t.n_ff = 96;
  t.n_vocab = 333;
  t.n_ctx_train = 512;
  t.rope = make_rope(32, 1e4);
  DrafterConfig d;
  d.path = "synthetic";
  d.n_layer = 1;
  d.n_embd = t.n_embd;
  d.n_head = 4;
  d.n_head_kv = 2;
  d.head_dim = 32;
  d.n_ff = 192;
  d.block_size = 8;
  d.mask_token_id = t.n_vocab - 1;
  d.target_layers = {1, 3};
  d.causal = {false};
  d.sliding_window = {0};
  d.rope = make_rope(d.head_dim, 1e4);
  return Model::synthetic(t, &d, SyntheticOptions(), options, 5);
}

Ids generate(Session& s, const Ids& prompt, int depth) {
  GenerateParams p;
  p.max_tokens = 40;
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

// Two passes: one of at most 16 rows, one of more.
std::vector<float> logits(Session& s, const Ids& prompt) {
  std::vector<float> all = s.logits(Ids(prompt.begin(), prompt.begin() + 11)), rest = s.logits(prompt);
  all.insert(all.end(), rest.begin(), rest.end());
  return all;
}

}  // namespace

int main(int argc, char** argv) try {
  std::vector<std::string> files(argv + 1, argv + argc);
  std::string found;
  for (const std::string& isa : cpu_isas()) found += (found.empty() ? "" : ",") + isa;
  std::printf("instruction sets: %s\n", found.c_str());
  if (files.size() >= 2 && files[0] == "--isas") {
    CHECK(files[1] == found);
    files.erase(files.begin(), files.begin() + 2);
  }
  if (!files.empty() && files.size() != 2) fail("usage: test_instruction_sets [--isas A,B] [TARGET.gguf DRAFTER.gguf]");
  const std::vector<std::string> isas = cpu_isas();
  for (const char* name : kKnown) {
    if (std::find(isas.begin(), isas.end(), name) != isas.end()) continue;
    CHECK_THROWS(make_backend(on_cpu(name, true)),
                 cat("cpu_isa '", name, "' is not available on this CPU. Available: "));
  }

  SessionOptions small;
  small.n_ctx = 128;
  Ids prompt;
  for (int i = 0; i < 37; ++i) prompt.push_back(static_cast<int32_t>(i * i * 7 % 320));
  Session plain(open(files, on_cpu("plain", true)), small);
  const std::vector<float> expected = logits(plain, prompt);
  const Ids tokens = generate(plain, prompt, 0);
  for (const std::string& isa : isas) {
    for (const bool repack : {true, false}) {
      const auto model = open(files, on_cpu(isa, repack));
      Session s(model, small);
      const std::vector<float> got = logits(s, prompt);
      const bool same =
          got.size() == expected.size() && std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0;
      test::record(same, cat(isa, repack ? ": logits" : ", not repacked: logits").c_str(), __FILE__, __LINE__);
      for (const int depth : {0, 1, 2, 4, 7, -1}) {
        test::record(generate(s, prompt, depth) == tokens,
                     cat(isa, repack ? ": depth " : ", not repacked: depth ", depth).c_str(), __FILE__, __LINE__);
      }
    }
  }
  return test::report("test_instruction_sets");
} catch (const std::exception& e) {
  std::fprintf(stderr, "test_instruction_sets: %s\n", e.what());
  return 2;
}
