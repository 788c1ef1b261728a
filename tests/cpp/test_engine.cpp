// The pure parts of the engine, without a model: sampler, acceptance, prompt lookup, depth policy.

#include <cmath>
#include <limits>
#include <random>

#include "backend/backend.h"
#include "backend/cpu/row_sampler.h"
#include "check.h"
#include "engine/accept.h"
#include "engine/depth_policy.h"
#include "engine/drafter_timeline.h"
#include "engine/lookup.h"
#include "engine/sampler.h"

using namespace dflash;

namespace {

using Ids = std::vector<int32_t>;

void test_accept() {
  const auto never = [](int32_t) { return false; };
  const auto run = [&](const Ids& drafts, const Ids& target, auto stop) {
    int calls = 0;
    Accepted a = accept_matching(drafts, [&](int i) { return ++calls, target[static_cast<size_t>(i)]; }, stop);
    CHECK(calls == static_cast<int>(a.tokens.size()));  // rows after a rejection are never asked for
    return a;
  };
  // Every pattern of up to four drafts standing or falling.
  for (int n = 0; n <= 4; ++n) {
    for (int pattern = 0; pattern < 1 << n; ++pattern) {
      Ids drafts, target;
      for (int i = 0; i < n; ++i) {
        drafts.push_back(10 + i);
        target.push_back((pattern >> i & 1) != 0 ? 10 + i : 99);
      }
      target.push_back(77);
      int stand = 0;
      while (stand < n && (pattern >> stand & 1) != 0) ++stand;
      const Accepted a = run(drafts, target, never);
      CHECK(a.count == stand && static_cast<int>(a.tokens.size()) == stand + 1);
      CHECK(a.tokens == Ids(target.begin(), target.begin() + stand + 1));
    }
  }
  // An accepted end-of-text cuts the block: no token follows it.
  const auto eos = [](int32_t t) { return t == 5; };
  const Accepted cut = run({4, 5, 6}, {4, 5, 6, 7}, eos);
  CHECK(cut.count == 2 && cut.tokens == (Ids{4, 5}));
  const Accepted own = run({4, 8}, {4, 5, 6}, eos);
  CHECK(own.count == 1 && own.tokens == (Ids{4, 5}));
}

void test_sampler() {
  const std::vector<float> logits{1.0f, 3.0f, 3.0f, 0.0f, -1.0f};
  SamplingParams p;
  CHECK(p.plain_argmax());
  CHECK(Sampler(p).sample(logits.data(), 5, {}) == 1);  // ties: the lowest id
  p.logit_bias[2] = 0.5f;
  CHECK(!p.plain_argmax() && Sampler(p).sample(logits.data(), 5, {}) == 2);
  p.logit_bias = {{1, -std::numeric_limits<float>::infinity()}};
  CHECK(Sampler(p).sample(logits.data(), 5, {}) == 2);
  p = {};
  p.repetition_penalty = 2.0f;
  CHECK(Sampler(p).sample(logits.data(), 5, {1}) == 2);
  p.penalty_last_n = 0;
  CHECK(Sampler(p).sample(logits.data(), 5, {1}) == 1);

  // Expected distributions by hand.
  p = {};
  p.temperature = 0.5f;
  const auto probabilities = [&](const SamplingParams& params) {
    return Sampler(params).distribution(logits.data(), 5, {});
  };
  double sum = 0.0;
  for (const float l : logits) sum += std::exp(static_cast<double>(l) / 0.5);
  for (size_t i = 0; i < 5; ++i) CHECK(std::abs(probabilities(p)[i] - std::exp(logits[i] / 0.5) / sum) < 1e-6);
  p.top_k = 1;
  CHECK(probabilities(p)[1] == 1.0);
  p.top_k = 2;
  CHECK(std::abs(probabilities(p)[2] - 0.5) < 1e-12 && probabilities(p)[0] == 0.0);
  p.top_k = 0;
  p.top_p = 0.4f;
  CHECK(probabilities(p)[1] == 1.0);
  p.top_p = 0.6f;
  CHECK(std::abs(probabilities(p)[1] - 0.5) < 1e-12);
  p.top_p = 1.0f;
  p.min_p = 0.5f;
  CHECK(std::abs(probabilities(p)[1] - 0.5) < 1e-12 && probabilities(p)[0] == 0.0);

  // top_p over many candidates: the growing partial sort keeps the same set as a full sort.
  std::mt19937 random(3);
  std::vector<float> wide(5000);
  for (float& l : wide) l = std::normal_distribution<float>(0.0f, 1.0f)(random);
  SamplingParams q;
  q.temperature = 1.0f;
  q.top_p = 0.9f;
  const std::vector<double> got = Sampler(q).distribution(wide.data(), 5000, {});
  std::vector<float> sorted = wide;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  double total = 0.0, mass = 0.0;
  for (const float l : wide) total += std::exp(static_cast<double>(l));
  size_t keep = 0;
  while (mass < 0.9f * total) mass += std::exp(static_cast<double>(sorted[keep++]));
  size_t kept = 0;
  for (const double x : got) kept += x > 0.0;
  CHECK(kept == keep);

  // Draws follow the distribution, and depend on (seed, position) alone.
  SamplingParams r;
  r.temperature = 1.0f;
  std::vector<int> count(5, 0);
  constexpr int kDraws = 40000;
  for (int i = 0; i < kDraws; ++i) {
    r.seed = static_cast<uint64_t>(i);
    ++count[static_cast<size_t>(Sampler(r).sample(logits.data(), 5, {}))];
  }
  const std::vector<double> want = Sampler(r).distribution(logits.data(), 5, {});
  double chi2 = 0.0;
  for (size_t i = 0; i < 5; ++i) {
    const double e = want[i] * kDraws;
    chi2 += (count[i] - e) * (count[i] - e) / e;
  }
  CHECK(chi2 < 18.5);  // 4 degrees of freedom, p = 0.001
  CHECK(uniform_at(1, 2) == uniform_at(1, 2) && uniform_at(1, 2) != uniform_at(1, 3) &&
        uniform_at(1, 2) != uniform_at(2, 2));

  r.logits_hook = [](const std::vector<int32_t>&, float* row, int64_t n) {
    for (int64_t i = 0; i < n; ++i) row[i] = -std::numeric_limits<float>::infinity();
  };
  CHECK_THROWS(Sampler(r).sample(logits.data(), 5, {}), "every token is forbidden");
  SamplingParams bad;
  bad.top_p = 0.0f;
  CHECK_THROWS((check_sampling(bad, 5), 0), "top_p: above 0 and at most 1 expected, found 0");
  bad = {};
  bad.logit_bias[5] = 1.0f;
  CHECK_THROWS((check_sampling(bad, 5), 0), "logit_bias");
}

// A long row with ties: what is drawn at u is where the distribution, in the order documented, passes u; and top_p
// keeps the fewest tokens. The reference sorts everything.
void test_long_rows() {
  std::mt19937 random(3);
  constexpr int64_t kVocab = 5000;
  std::vector<float> logits(kVocab);
  cpu::RowSampler sampler;
  for (int round = 0; round < 60; ++round) {
    const float spread = round % 3 == 0 ? 0.0f : round % 3 == 1 ? 0.3f : 3.0f;
    for (float& l : logits) l = std::normal_distribution<float>(0.0f, spread)(random);
    if (round % 4 == 0) std::fill_n(logits.begin() + 100, 2000, logits[7]);
    Sampling s;
    s.temperature = round % 2 == 0 ? 1.0f : 0.6f;
    s.top_p = round % 5 == 0 ? 1.0f : 0.9f;
    s.top_k = round % 7 == 0 ? 300 : 0;
    s.draws = {static_cast<uint64_t>(random()) << 21};

    std::vector<std::pair<double, int32_t>> order;  // minus weight, id
    const float top = *std::max_element(logits.begin(), logits.end());
    for (int32_t id = 0; id < kVocab; ++id) {
      order.push_back({-std::exp((double{logits[static_cast<size_t>(id)]} - top) / s.temperature), id});
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](const auto& o) { return o.first > -0x1p-45; }),
                order.end());  // those are never drawn
    if (s.top_k > 0 || s.top_p < 1.0f) std::sort(order.begin(), order.end());
    if (s.top_k > 0) order.resize(static_cast<size_t>(s.top_k));
    double total = 0.0, mass = 0.0;
    for (const auto& [weight, id] : order) total -= weight;
    size_t kept = 0;
    while (kept < order.size() && (s.top_p >= 1.0f || mass < s.top_p * total)) mass -= order[kept++].first;
    double left = static_cast<double>(s.draws[0]) * 0x1.0p-53 * mass;
    size_t at = 0;
    while (at + 1 < kept && (left += order[at].first) >= 0.0) ++at;

    sampler.edit(s, 0, logits.data(), kVocab);
    const std::vector<double> distribution = sampler.distribution(s);
    CHECK(static_cast<size_t>(
              std::count_if(distribution.begin(), distribution.end(), [](double p) { return p > 0; })) == kept);
    for (size_t i = 0; i < kept; ++i) {
      CHECK(std::abs(distribution[static_cast<size_t>(order[i].second)] + order[i].first / mass) < 1e-12);
    }
    CHECK(sampler.draw(s, 0) == order[at].second);
  }
}

// The backend op draws each row as the sampler draws it behind its drafts, and stops where a draft does not stand.
void test_sample_op() {
  std::mt19937 random(5);
  const auto cpu = make_cpu_backend(BackendOptions());
  constexpr int64_t kVocab = 40;
  int stopped = 0, whole = 0;
  for (int round = 0; round < 400; ++round) {
    SamplingParams p;
    p.temperature = round % 4 == 0 ? 0.0f : 0.8f;
    p.top_k = round % 3 == 0 ? 5 : 0;
    p.seed = static_cast<uint64_t>(round);
    p.repetition_penalty = 1.3f;
    p.frequency_penalty = 0.4f;
    p.presence_penalty = -0.2f;
    const int windows[] = {-1, 0, 1, 3, 7, 100};
    p.penalty_last_n = windows[round % 6];
    p.logit_bias = {{static_cast<int32_t>(random() % kVocab), 1.5f}};
    const int rows = 1 + round % 9;
    std::vector<float> logits(static_cast<size_t>(rows) * kVocab);
    for (float& l : logits) l = std::normal_distribution<float>(0.0f, 2.0f)(random);
    Ids history(random() % 12), drafts;
    for (int32_t& id : history) id = static_cast<int32_t>(random() % 6);

    // Plain decoding: one row at a time, each behind the tokens drawn before; half of the drafts are those tokens.
    Sampler sampler(p);
    Ids plain, before = history;
    for (int r = 0; r < rows; ++r) {
      plain.push_back(sampler.sample(logits.data() + r * kVocab, kVocab, before));
      before.push_back(plain.back());
    }
    for (int r = 0; r + 1 < rows; ++r) {
      drafts.push_back(round % 2 == 0 || random() % 4 != 0 ? plain[static_cast<size_t>(r)]
                                                           : static_cast<int32_t>(random() % kVocab));
    }
    Ids drawn(static_cast<size_t>(rows), -1);
    std::vector<float> copy = logits;
    const int n = cpu->sample(sampler.rows(history, drafts), copy.data(), kVocab, drawn.data());
    size_t stand = 0;
    while (stand < drafts.size() && drafts[stand] == plain[stand]) ++stand;
    CHECK(n == static_cast<int>(stand) + 1);
    CHECK(std::equal(drawn.begin(), drawn.begin() + n, plain.begin()));
    (n < rows ? stopped : whole) += 1;

    // All rows, each behind its drafts whether they stand or not.
    Sampling all = sampler.rows(history, drafts);
    all.all_rows = true;
    copy = logits;
    CHECK(cpu->sample(all, copy.data(), kVocab, drawn.data()) == rows);
    before = history;
    for (int r = 0; r < rows; ++r) {
      CHECK(drawn[static_cast<size_t>(r)] == sampler.sample(logits.data() + r * kVocab, kVocab, before));
      if (r + 1 < rows) before.push_back(drafts[static_cast<size_t>(r)]);
    }
  }
  CHECK(stopped > 50 && whole > 50);
}

void test_lookup() {
  LookupProposer lookup;
  Ids tokens{1, 2, 3, 4, 5, 6, 9, 2, 3, 4};
  LookupProposer::Candidate c = lookup.find(tokens, 3);
  CHECK(c.match == 3 && c.tokens == (Ids{5, 6, 9}));
  tokens.insert(tokens.end(), {5, 6});
  c = lookup.find(tokens, 2);
  CHECK(c.match == 5 && c.tokens == (Ids{9, 2}));
  tokens.resize(8);  // cut, then another continuation: the old one is forgotten
  lookup.truncated(8);
  tokens.insert(tokens.end(), {7, 7, 7, 7});
  c = lookup.find(tokens, 4);
  CHECK(c.match == 3 && c.tokens == (Ids{7, 7, 7, 7}));  // a period of one reads on from its own copy
  lookup.reset();
  CHECK(lookup.find({1, 2, 3}, 4).match == 0);
  CHECK(lookup.find({1, 2, 3, 4}, 0).tokens.empty());

  // Against a naive search for the latest earlier occurrence of the last three tokens, over random text that is cut now
  // and then: few grams that come often, and more than the table begins with.
  std::mt19937 random(5);
  for (const unsigned n_vocab : {4u, 13u}) {
    LookupProposer proposer;
    Ids text;
    int found = 0;
    for (int i = 0; i < 6000; ++i) {
      if (i % 500 == 499) {
        text.resize(text.size() - random() % 3);
        proposer.truncated(text.size());
      }
      text.push_back(static_cast<int32_t>(random() % n_vocab));
      if (i % 3 == 0) continue;  // several tokens since the last call
      const LookupProposer::Candidate got = proposer.find(text, 2);
      int naive = -1;
      for (int at = static_cast<int>(text.size()) - 1; at >= 3 && naive < 0; --at) {
        if (std::equal(text.end() - 3, text.end(), text.begin() + at - 3)) naive = at;
      }
      CHECK((naive >= 0) == (got.match > 0));
      if (naive >= 0) CHECK(got.tokens[0] == text[static_cast<size_t>(naive)]);
      found += naive >= 0 ? 1 : 0;
    }
    CHECK(found > 1500);
  }
}

// A made-up machine and drafter: does the policy find the best it could do? (The grid is in
// tests/test_depth_policy.py.)
double policy_rate(double acceptance, double row_cost, double draft_cost, int rounds) {
  CostPrior prior;
  for (int w = 1; w <= 16; ++w) prior.verify.push_back(1.0 + 0.3 * (w - 1));
  prior.draft = 0.3;
  DepthPolicy policy(15, prior);
  std::mt19937 random(11);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  double tokens = 0.0, seconds = 0.0;
  for (int i = 0; i < rounds; ++i) {
    const DraftPlan plan = policy.plan(15, true, 0, 0);
    RoundOutcome o;
    o.source = plan.source;
    if (plan.source == DraftSource::dflash) {
      o.drafted = plan.n;
      o.confidence.assign(static_cast<size_t>(plan.n), static_cast<float>(acceptance));
      o.verified = policy.verify_depth(o.confidence);
      while (o.accepted < o.verified && uniform(random) < acceptance) ++o.accepted;
      o.draft_seconds = draft_cost;
    }
    o.verify_seconds = 1.0 + row_cost * o.verified;
    policy.observe(o);
    tokens += 1 + o.accepted;
    seconds += o.verify_seconds + o.draft_seconds;
  }
  return tokens / seconds;
}

void test_policy() {
  CHECK(policy_rate(0.1, 0.4, 0.3, 2000) > 0.985);            // a useless drafter is parked
  const double free_ride = policy_rate(0.9, 0.02, 0.1, 500);  // cheap rows, a good drafter: deep drafts
  CHECK(free_ride > 4.5);
  DepthPolicy fresh(15, CostPrior{std::vector<double>(16, 1.0), 0.2});
  CHECK(fresh.plan(15, true, 0, 0).source == DraftSource::none);  // nothing measured yet
  CHECK(fresh.plan(0, true, 8, 4).n == 0);

  Costs table(CostPrior{{1.0, 1.5, 2.0, 2.5}, 0.2});
  table.observe(0, 10.0);
  CHECK(std::abs(table.at(2) - 20.0) < 1e-2);  // the prior's shape, scaled
  table.observe(2, 40.0);
  CHECK(table.at(1) >= 15.0 && table.at(1) < 31.0 &&
        table.at(3) > 30.0);  // between and beyond, a first look half believed
  for (int i = 0; i < 4; ++i) table.observe(0, i == 2 ? 1000.0 : 10.0);
  CHECK(table.at(0) < 12.0);  // one outlier hardly counts
}

// Against a list that says of every token whether the drafter has it (1), is owed it (2) or missed it (0).
void test_drafter_timeline() {
  std::mt19937 random(7);
  DrafterTimeline timeline;
  Ids naive;
  for (int i = 0; i < 5000; ++i) {
    const int n = static_cast<int>(random() % 7);
    const unsigned what = random() % 8;
    if (what < 3) {
      timeline.keep(n);
      naive.insert(naive.end(), static_cast<size_t>(n), 2);
    } else if (what < 5) {
      timeline.take_in();
      std::replace(naive.begin(), naive.end(), 2, 1);
    } else if (what < 7) {
      timeline.leave_out(n);
      naive.insert(naive.end(), static_cast<size_t>(n), 0);
      std::replace(naive.begin(), naive.end(), 2, 0);  // what waited would be torn from what follows
    } else {
      const size_t pos = naive.size() - std::min(naive.size(), static_cast<size_t>(random() % 40));
      timeline.rewind(static_cast<int>(pos));
      naive.resize(pos);
    }
    const auto count = [&](int state) { return static_cast<int>(std::count(naive.begin(), naive.end(), state)); };
    CHECK(timeline.reach() == static_cast<int>(naive.size()));
    CHECK(timeline.cached() == count(1));
    CHECK(timeline.pending() == count(2));
    CHECK(timeline.left_out() == count(0));
    CHECK(timeline.whole() == static_cast<int>(std::find(naive.begin(), naive.end(), 0) - naive.begin()));
  }
  timeline.rewind(0);
  CHECK(timeline.reach() == 0 && timeline.left_out() == 0);
}

}  // namespace

int main() {
  test_drafter_timeline();
  test_accept();
  test_sampler();
  test_sample_op();
  test_long_rows();
  test_lookup();
  test_policy();
  return test::report("test_engine");
}
