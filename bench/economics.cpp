// Does drafting pay on the full MiniMax-M2.7 shape? Synthetic weights, imposed acceptance (by default the one on the
// card of MirecX/MiniMax-M2.7-L3H5-DFlash), the real engine: plain decoding, every fixed depth and the policy (with
// confidences that tell nothing, something, much) in turn, round after round. Prints tokens per second, the measured
// costs, the distinct experts of each width and what a depth needs to break even.
//
//   economics [--backend cpu|hip] [--layers 62] [--vocab 200064] [--tokens 128] [--rounds 5] [--accept .638,.373,...]
//   [--gain G] [--draft-head target|q8_0|q4_0]
//
// --gain: branch_gain, which sets how many experts rows share (see SyntheticOptions).

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "core/error.h"
#include "engine/session.h"
#include "m27.h"

using namespace dflash;

namespace {

struct Options {
  std::string backend = "auto", draft_head = "target";
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
    } else if (name == "--draft-head") {
      o.draft_head = value;
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

constexpr int kDeepest = 4;  // fixed depths tried

struct Arm {
  std::string name;
  int depth = 0;
  double spread = 0.0;
  std::unique_ptr<Session> session{};
  Stats total{16};       // the drafter's block size
  double rate() const {  // tokens a second of the rounds
    const double seconds = total.draft_seconds + total.verify_seconds + total.sample_seconds + total.ingest_seconds;
    return static_cast<double>(total.steps + total.accepted) / seconds;
  }
};

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
  if (o.draft_head == "q4_0") {
    synthetic.draft_head = DType::Q4_0;
  } else if (o.draft_head == "q8_0") {
    synthetic.draft_head = DType::Q8_0;
  } else if (o.draft_head != "target") {
    fail("economics: --draft-head: 'target', 'q8_0' or 'q4_0' expected, found '", o.draft_head, "'");
  }
  const auto model = Model::synthetic(target, &drafter, synthetic, options, 1);
  std::printf("%s; %d layers, %.2f GB read for one token, drafter %.2f GB\n", model->backend->describe().c_str(),
              o.layers, static_cast<double>(model->target->bytes_per_token()) * 1e-9,
              static_cast<double>(model->drafter->weight_bytes() + model->drafter->head().bytes()) * 1e-9);
  std::vector<int32_t> prompt;
  for (int i = 0; i < 256; ++i)
    prompt.push_back(static_cast<int32_t>(uniform_at(5, static_cast<uint64_t>(i)) * o.vocab));

  // Every arm a session of its own, as a user's would be: the policy learns from its own rounds alone.
  SessionOptions session_options;
  session_options.n_ctx = 256 + o.tokens + 16;
  std::vector<Arm> arms;
  for (int depth = 0; depth <= kDeepest; ++depth) arms.push_back({std::to_string(depth), depth, 0.0});
  for (const double spread : {0.0, 0.3, 0.6}) arms.push_back({cat("auto, spread ", spread), -1, spread});
  for (Arm& arm : arms) arm.session = std::make_unique<Session>(model, session_options);
  for (int round = -1; round < o.rounds; ++round) {  // round -1 warms up and teaches the policy
    for (Arm& arm : arms) {
      Session& session = *arm.session;
      session.rewind(0);
      GenerateParams p;
      p.max_tokens = o.tokens;
      p.depth = arm.depth;
      p.lookup = false;
      p.simulate_accept = std::vector<double>(o.accept);  // GCC 12 warns of a copy into the empty one
      p.simulate_spread = arm.spread;
      p.sampling.seed = static_cast<uint64_t>(round + 1);
      session.begin(prompt, p);
      while (session.prefill() < static_cast<int>(prompt.size())) {
      }
      session.step();
      const char* stop = nullptr;
      while (stop == nullptr) stop = session.step().stop;
      if (round >= 0) arm.total.add(session.stats());
    }
  }

  Stats all(model->block_size());
  for (const Arm& arm : arms) all.add(arm.total);
  const auto cost = [](const Tally& t) { return t.calls > 0 ? t.seconds / static_cast<double>(t.calls) * 1e3 : 0.0; };
  std::printf("\nwidth  verify ms  / one row  distinct experts a layer\n");
  for (size_t w = 1; w <= kDeepest + 1; ++w) {
    const double experts = static_cast<double>(all.experts_by_width[w]) /
                           static_cast<double>(std::max<int64_t>(all.expert_calls_by_width[w], 1));
    std::printf("%5zu %10.3f %10.3f %25.1f\n", w, cost(all.verify_by_width[w]),
                cost(all.verify_by_width[w]) / cost(all.verify_by_width[1]), experts);
  }
  // The imposed chances come true only on average: "expected" is the same speed with the chances themselves and the
  // measured costs, free of that luck.
  std::printf("\ndepth               tokens/s   / plain   expected   accepted a round   break-even\n");
  const double plain = cost(all.verify_by_width[1]);
  for (const Arm& arm : arms) {
    const Stats& s = arm.total;
    std::printf("%-18s %9.2f %9.3f", arm.name.c_str(), arm.rate(), arm.rate() / arms[0].rate());
    if (arm.depth > 0) {
      const size_t n = static_cast<size_t>(arm.depth);
      const double round_ms = cost(all.verify_by_width[n + 1]) + cost(all.draft_by_count[n]);
      double expected = 1.0, reach = 1.0;
      GenerateParams p;
      p.simulate_accept = std::vector<double>(o.accept);
      for (size_t i = 0; i < n; ++i) expected += reach *= p.simulated_chance(i);
      std::printf(" %10.3f %18.2f %12.2f", expected * plain / round_ms,
                  static_cast<double>(s.accepted) / static_cast<double>(s.steps), round_ms / plain - 1.0);
    } else {
      std::printf(" %10s %18.2f", "", static_cast<double>(s.accepted) / static_cast<double>(s.steps));
    }
    std::printf("\n");
  }
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "economics: %s\n", e.what());
  return 2;
}
