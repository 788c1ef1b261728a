// Does drafting pay on the full MiniMax-M2.7 shape? Synthetic weights, imposed acceptance (by default the one on the
// card of MirecX/MiniMax-M2.7-L3H5-DFlash), the real engine: plain decoding, every fixed depth and the policy in turn,
// round after round. Prints tokens per second, the measured costs, the distinct experts of each width and what a depth
// needs to break even.
//
//   economics [--backend cpu|hip] [--layers 62] [--vocab 200064] [--tokens 128] [--rounds 5] [--accept .638,.373,...]
//   [--gain G]
//
// --gain: branch_gain, which sets how many experts rows share (see SyntheticOptions).

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "core/error.h"
#include "engine/session.h"
#include "m27.h"

using namespace dflash;

namespace {

struct Options {
  std::string backend = "auto";
  int layers = 62, vocab = 200064, tokens = 128, rounds = 5, threads = 0;
  float gain = 1.0f;
  std::vector<double> accept{0.638, 0.373, 0.191, 0.087};
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--backend") {
      o.backend = value;
    } else if (name == "--accept") {
      o.accept.clear();
      std::istringstream in(value);
      for (std::string part; std::getline(in, part, ',');) o.accept.push_back(std::atof(part.c_str()));
    } else if (name == "--layers") {
      o.layers = std::atoi(value.c_str());
    } else if (name == "--gain") {
      o.gain = static_cast<float>(std::atof(value.c_str()));
    } else if (name == "--vocab") {
      o.vocab = std::atoi(value.c_str());
    } else if (name == "--tokens") {
      o.tokens = std::atoi(value.c_str());
    } else if (name == "--rounds") {
      o.rounds = std::atoi(value.c_str());
    } else if (name == "--threads") {
      o.threads = std::atoi(value.c_str());
    } else {
      fail("economics: unknown option '", name, "'");
    }
  }
  return o;
}

// The card's drafter; taps scaled down with the layers.
DrafterConfig l3h5(const TargetConfig& target) {
  DrafterConfig c;
  c.path = "synthetic L3H5";
  c.n_layer = 3;
  c.n_embd = target.n_embd;
  c.n_head = 24;
  c.n_head_kv = 8;
  c.head_dim = 128;
  c.n_ff = 9216;
  c.block_size = 16;
  c.mask_token_id = target.n_vocab - 1;
  for (const int id : {2, 16, 30, 43, 57}) c.target_layers.push_back((id + 1) * target.n_layer / 62);
  c.rope = make_rope(c.head_dim, 5e6);
  c.causal.assign(3, false);
  c.sliding_window.assign(3, 0);
  return c;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? 0.0 : v[v.size() / 2];
}

}  // namespace

int main(int argc, char** argv) try {
  const Options o = parse(argc, argv);
  BackendOptions options;
  options.name = o.backend;
  options.n_threads = o.threads;
  const TargetConfig target = m27_config(o.layers, o.vocab);
  const DrafterConfig drafter = l3h5(target);
  SyntheticOptions synthetic;
  synthetic.branch_gain = o.gain;
  const auto model = Model::synthetic(target, &drafter, synthetic, options, 1);
  std::printf("%s; %d layers, %.2f GB read for one token, drafter %.2f GB\n", model->backend->describe().c_str(),
              o.layers, static_cast<double>(model->target->bytes_per_token()) * 1e-9,
              static_cast<double>(model->drafter->weight_bytes() + model->target->head().bytes()) * 1e-9);
  SessionOptions session_options;
  session_options.n_ctx = 256 + o.tokens + 16;
  Session session(model, session_options);
  std::vector<int32_t> prompt;
  for (int i = 0; i < 256; ++i)
    prompt.push_back(static_cast<int32_t>(uniform_at(5, static_cast<uint64_t>(i)) * o.vocab));

  const std::vector<int> depths{0, 1, 2, 3, 4, -1};
  std::map<int, std::vector<double>> rates;
  for (int round = -1; round < o.rounds; ++round) {  // round -1 warms up and teaches the policy
    for (const int depth : depths) {
      session.rewind(0);
      GenerateParams p;
      p.max_tokens = o.tokens;
      p.depth = depth;
      p.lookup = false;
      p.simulate_accept = o.accept;
      p.sampling.seed = static_cast<uint64_t>(round + 1);
      session.begin(prompt, p);
      while (session.prefill() < static_cast<int>(prompt.size())) {
      }
      session.step();
      const char* stop = nullptr;
      while (stop == nullptr) stop = session.step().stop;
      const Stats& s = session.stats();
      const double seconds = s.draft_seconds + s.verify_seconds + s.sample_seconds + s.ingest_seconds;
      if (round >= 0) rates[depth].push_back(static_cast<double>(s.generated_tokens - 1) / seconds);
    }
  }

  const Stats all = session.session_stats();
  const auto cost = [](const Tally& t) { return t.calls > 0 ? t.seconds / static_cast<double>(t.calls) * 1e3 : 0.0; };
  std::printf("\nwidth  verify ms  / one row  distinct experts a layer\n");
  for (size_t w = 1; w <= 5; ++w) {
    const double experts = static_cast<double>(all.experts_by_width[w]) /
                           static_cast<double>(std::max<int64_t>(all.expert_calls_by_width[w], 1));
    std::printf("%5zu %10.3f %10.3f %25.1f\n", w, cost(all.verify_by_width[w]),
                cost(all.verify_by_width[w]) / cost(all.verify_by_width[1]), experts);
  }
  std::printf("\ndepth   tokens/s (min .. max)      / plain   break-even mean accepted drafts\n");
  const double plain = median(rates[0]);
  for (const int depth : depths) {
    const std::vector<double>& r = rates[depth];
    std::printf("%5s %9.2f (%.2f .. %.2f) %10.3f", depth < 0 ? "auto" : std::to_string(depth).c_str(), median(r),
                *std::min_element(r.begin(), r.end()), *std::max_element(r.begin(), r.end()), median(r) / plain);
    if (depth > 0) {
      const size_t n = static_cast<size_t>(depth);
      const double round_ms = cost(all.verify_by_width[n + 1]) + cost(all.draft_by_count[n]);
      std::printf("   %.2f", round_ms / cost(all.verify_by_width[1]) - 1.0);
    }
    std::printf("\n");
  }
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "economics: %s\n", e.what());
  return 2;
}
