#include "engine/session.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/error.h"

namespace dflash {

namespace {

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// auto: the whole block where the drafter is small beside a target pass, as it is on the real shapes (6% of the bytes
// for M2.7 and L3H5). On the mini pair (half the bytes) the extra rows cost more than their acceptance brings.
bool use_whole_block(const std::string& draft_rows, const Model& m) {
  if (draft_rows != "auto" && draft_rows != "slots" && draft_rows != "block") {
    fail("draft_rows: 'auto', 'slots' or 'block' expected, found '", draft_rows, "'");
  }
  if (!m.drafter || draft_rows == "slots") return false;
  constexpr double kSmallDrafter = 0.25;
  const double share =
      static_cast<double>(m.drafter->weight_bytes()) / static_cast<double>(m.target->bytes_per_token());
  return draft_rows == "block" || share < kSmallDrafter;
}

SessionOptions checked(const SessionOptions& o) {
  if (o.n_ctx < 2 || o.n_ctx > (1 << 24)) fail("n_ctx: 2 to ", 1 << 24, " tokens expected, found ", o.n_ctx);
  if (o.n_batch < 1 || o.n_batch > 65536) fail("n_batch: 1 to 65536 tokens expected, found ", o.n_batch);
  return o;
}

// What a pass of w rows should cost by bytes: attention and head once, experts as they become distinct. The exponent
// is lucebox #501's measurement on a 256-expert top-8 model; live measurements replace all of it.
CostPrior byte_model(const Model& m) {
  const double all = static_cast<double>(m.target->bytes_per_token());
  const double experts = static_cast<double>(m.target->expert_bytes_per_token());
  const double most = static_cast<double>(m.target->config().n_expert) / m.target->config().n_expert_used;
  CostPrior prior;
  for (int w = 1; w <= m.block_size(); ++w) {
    prior.verify.push_back((all - experts + experts * std::min(std::pow(w, 0.75), most)) / all);
  }
  if (m.drafter) {
    prior.draft = static_cast<double>(m.drafter->weight_bytes() + m.drafter->head().bytes()) / all;
  }
  return prior;
}

}  // namespace

double GenerateParams::simulated_chance(size_t i) const {
  const size_t last = std::min(i, simulate_accept.size() - 1);
  const double before = last == 0 ? 1.0 : simulate_accept[last - 1];
  return before > 0.0 ? simulate_accept[last] / before : 0.0;
}

Session::Session(std::shared_ptr<Model> model, const SessionOptions& options)
    : model_(std::move(model)),
      id_(++model_->n_sessions),
      whole_block_(use_whole_block(options.draft_rows, *model_)),
      options_(checked(options)),
      backend_(*model_->backend),
      kv_(backend_, model_->target->config().n_layer, model_->target->config().n_head_kv,
          model_->target->config().head_dim, options_.n_ctx, kv_dtype(options_.kv_type, model_->precise)),
      scratch_(backend_, model_->target->config(), std::max(options_.n_batch, model_->block_size())),
      policy_(model_->block_size() - 1, byte_model(*model_)),
      stats_(model_->block_size()),
      earlier_(model_->block_size()) {
  const size_t batch = static_cast<size_t>(scratch_.max_rows), block = static_cast<size_t>(model_->block_size());
  token_buffer_ = backend_.alloc(batch * sizeof(int32_t));
  logits_buffer_ = backend_.alloc(block * static_cast<size_t>(model_->target->config().n_vocab) * sizeof(float));
  if (model_->drafter) {
    const DrafterConfig& c = model_->drafter->config();
    drafter_kv_.emplace(backend_, c.n_layer, c.n_head_kv, c.head_dim, options_.n_ctx + c.block_size,
                        drafter_kv_dtype(model_->precise));
    drafter_scratch_.emplace(backend_, c, scratch_.max_rows);
    const size_t row = static_cast<size_t>(n_taps()) * static_cast<size_t>(model_->target->config().n_embd);
    taps_buffer_ = backend_.alloc((batch + kPendingTaps + block) * row * sizeof(float));
    step_taps_ = backend_.alloc(block * row * sizeof(float));
  }
}

int Session::n_taps() const { return static_cast<int>(model_->drafter->config().target_layers.size()); }

size_t Session::kv_bytes() const { return kv_.bytes() + (drafter_kv_ ? drafter_kv_->bytes() : 0); }

Stats Session::session_stats() const {
  Stats all = earlier_;
  all.add(stats_);
  return all;
}

void Session::check_tokens(const std::vector<int32_t>& tokens) const {
  const int n_vocab = model_->target->config().n_vocab;
  if (tokens.empty()) fail("prompt: at least one token expected, found none");
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= n_vocab) {
      fail("prompt: token ids 0 to ", n_vocab - 1, " expected, found ", tokens[i], " at position ", i);
    }
  }
  if (tokens.size() > static_cast<size_t>(options_.n_ctx)) {
    throw CapacityError(cat("prompt: at most n_ctx = ", options_.n_ctx, " tokens expected, found ", tokens.size(),
                            "; shorten it or open the engine with a larger n_ctx"));
  }
}

void Session::rewind(int pos) {
  if (pos < 0 || pos > pos_) fail("rewind: a position from 0 to ", pos_, " expected, found ", pos);
  pos_ = pos;
  active_ = false;
  followed_ = {};  // their text may go on otherwise
  if (tokens_.size() > static_cast<size_t>(pos)) {
    tokens_.resize(static_cast<size_t>(pos));
    lookup_.truncated(tokens_.size());
  }
  drafter_.rewind(pos);
}

// Keeps what the caches share with tokens, at most keep_at_most of it, and makes tokens the timeline. Positions whose
// taps the drafter is owed are run again: those of plain decoding by choice, and what it slept through where all is
// asked for.
void Session::sync(const std::vector<int32_t>& tokens, size_t keep_at_most, Drafting drafting) {
  drafting_ = taps_ = model_->drafter && drafting != Drafting::none;
  const size_t cached = static_cast<size_t>(!drafting_                       ? pos_
                                            : drafting == Drafting::adaptive ? drafter_.reach()
                                                                             : drafter_.whole());
  const size_t most = std::min({cached, tokens.size(), keep_at_most});
  size_t common = 0;
  while (common < most && tokens[common] == tokens_[common]) ++common;
  rewind(static_cast<int>(common));
  tokens_ = tokens;
}

int Session::begin(const std::vector<int32_t>& tokens, const GenerateParams& params) {
  check_tokens(tokens);
  check_sampling(params.sampling, model_->target->config().n_vocab);
  if (params.max_tokens < 1) fail("max_tokens: 1 or more expected, found ", params.max_tokens);
  const int deepest = model_->block_size() - 1;
  if (params.depth < -1 || params.depth > deepest) {
    fail("depth: 'auto' or 0 to ", deepest, " (the drafter's block size less one) expected, found ", params.depth);
  }
  if (params.depth > 0 && !model_->drafter) fail("depth: ", params.depth, " drafts need a drafter; none was loaded");
  double before = 1.0;
  for (const double chance : params.simulate_accept) {
    if (!(chance >= 0.0 && chance <= before)) {
      fail("simulate_accept: cumulative chances expected (1 >= first >= second ...), found ", chance, " after ",
           before);
    }
    before = chance;
  }
  if (!(params.simulate_spread >= 0.0 && params.simulate_spread <= 1.0)) {
    fail("simulate_spread: 0 to 1 expected, found ", params.simulate_spread);
  }
  // The last token is run again: its logits are needed. Depth 0 is the target alone and owes the drafter nothing.
  sync(tokens, tokens.size() - 1,
       params.depth == 0  ? Drafting::none
       : params.depth < 0 ? Drafting::adaptive
                          : Drafting::whole);
  params_ = params;
  sampler_ = Sampler(params.sampling);
  prompt_tokens_ = static_cast<int>(tokens.size());
  first_ = true;
  earlier_.add(stats_);
  stats_ = Stats(model_->block_size());
  stats_.prompt_tokens = prompt_tokens_;
  stats_.cached_tokens = pos_;
  active_ = true;
  return pos_;
}

uint64_t Session::step_key(StepKind kind, int rows) const {
  return id_ << 32 | static_cast<uint64_t>(kind) << 16 | static_cast<uint64_t>(rows);
}

uint64_t Session::draft_key(int n, int rows) const {
  return step_key(StepKind::draft, rows) | static_cast<uint64_t>(n) << 24;  // n < block_size <= 256
}

float* Session::pending_taps(int row) const {
  const size_t width = static_cast<size_t>(n_taps()) * static_cast<size_t>(model_->target->config().n_embd);
  return taps_buffer_.as<float>() + static_cast<size_t>(row) * width;
}

void Session::forward_prompt(const int32_t* tokens, int rows) {
  backend_.upload(token_buffer_.data, tokens, static_cast<size_t>(rows) * sizeof(int32_t));
  TapSink sink;
  if (taps_) sink = {&model_->drafter->config().target_layers, pending_taps(drafter_.pending())};
  model_->target->forward(backend_, scratch_, Step{rows, pos_}, token_buffer_.as<int32_t>(), kv_,
                          taps_ ? &sink : nullptr);
}

void Session::forward_verify(const int32_t* tokens, int rows) {
  backend_.upload(token_buffer_.data, tokens, static_cast<size_t>(rows) * sizeof(int32_t));
  TapSink sink;
  if (taps_) sink = {&model_->drafter->config().target_layers, step_taps_.as<float>()};
  const Step step{rows, pos_};
  if (backend_.begin_step(step_key(taps_ ? StepKind::verify : StepKind::plain, rows), step)) return;
  model_->target->forward(backend_, scratch_, step, token_buffer_.as<int32_t>(), kv_, taps_ ? &sink : nullptr);
  model_->target->logits(backend_, scratch_, 0, rows, logits_buffer_.as<float>());
  backend_.end_step();
}

void Session::keep_taps(int rows) {
  if (!taps_) return;
  const int64_t width = static_cast<int64_t>(n_taps()) * model_->target->config().n_embd;
  backend_.copy_rows(step_taps_.as<float>(), rows, width, pending_taps(drafter_.pending()), width);
}

void Session::commit(int rows) {
  pos_ += rows;
  if (!drafting_) return;
  if (!taps_) {
    drafter_.leave_out(rows);
    stats_.left_out_tokens += rows;
    return;
  }
  drafter_.keep(rows);
  if (drafter_.pending() >= kPendingTaps) ingest_pending();
}

void Session::finish_queued() {
  float any = 0.0f;
  if (backend_.asynchronous()) backend_.download(&any, taps_buffer_.data, sizeof(any));
}

void Session::ingest_pending() {
  const int tokens = drafter_.pending();
  if (tokens == 0) return;
  const bool backlog = tokens > model_->block_size();
  if (backlog) finish_queued();
  const Stopwatch watch;
  for (int done = 0; done < drafter_.pending();) {
    const int rows = std::min(drafter_.pending() - done, drafter_scratch_->max_rows);
    const Step step{rows, drafter_.cached() + done};
    // A round's few rows always lie at the front: the same call every time but for the position.
    const bool recordable = done == 0 && rows <= model_->block_size();
    if (!recordable || !backend_.begin_step(step_key(StepKind::ingest, rows), step)) {
      model_->drafter->ingest(backend_, *drafter_scratch_, step, pending_taps(done), *drafter_kv_);
      if (recordable) backend_.end_step();
    }
    done += rows;
  }
  drafter_.take_in();
  if (backlog) {
    finish_queued();
    ingested_ = {ingested_.tokens + tokens, ingested_.seconds + watch.seconds()};
  }
  stats_.ingest_seconds += watch.seconds();
}

int Session::prefill() {
  const Stopwatch watch;
  const double ingested = stats_.ingest_seconds;
  const int rows = std::min(options_.n_batch, prompt_tokens_ - pos_);
  if (rows > 0) {
    forward_prompt(tokens_.data() + pos_, rows);
    // The logits of the last prompt token wait in the buffer for the first step().
    if (pos_ + rows == prompt_tokens_) {
      model_->target->logits(backend_, scratch_, rows - 1, 1, logits_buffer_.as<float>());
    }
    commit(rows);
    backend_.take_expert_count();
    // A sleeping drafter hears of a prompt only if a look comes soon.
    const bool asleep = params_.depth < 0 && policy_.asleep();
    if (drafting_ && !asleep && pos_ == prompt_tokens_) ingest_pending();
  }
  stats_.prefill_seconds += watch.seconds() - (stats_.ingest_seconds - ingested);
  return pos_;
}

bool Session::is_eos(int32_t token) const {
  return std::find(params_.eos_ids.begin(), params_.eos_ids.end(), token) != params_.eos_ids.end();
}

const char* Session::stop_reason() const {
  if (is_eos(tokens_.back())) return "eos";
  if (static_cast<int>(tokens_.size()) - prompt_tokens_ >= params_.max_tokens) return "length";
  if (static_cast<int>(tokens_.size()) >= options_.n_ctx) return "context";
  return nullptr;
}

Session::Drafts Session::draft_dflash(int n, int room) {
  Drafts out;
  // Taking in the last round's few taps belongs to the draft's cost. A backlog of plain rounds does not: the policy is
  // told of it on its own.
  const bool backlog = drafter_.pending() > model_->block_size();
  const double ingested = stats_.ingest_seconds;
  Stopwatch watch;
  ingest_pending();
  if (backlog) watch = Stopwatch();
  const int32_t anchor = tokens_.back();
  // As z-lab's generate: a block is never longer than what is left to generate, the anchor included.
  const int rows = whole_block_ ? std::min(model_->block_size(), room + 2) : n + 1;
  model_->drafter->draft(backend_, *drafter_scratch_, anchor, drafter_.cached(), n, rows, *drafter_kv_,
                         logits_buffer_.as<float>(), draft_key(n, rows));
  std::vector<Top1> top(static_cast<size_t>(n));
  backend_.top1(logits_buffer_.as<float>(), n, model_->target->config().n_vocab, top.data());
  out.source = DraftSource::dflash;
  out.proposed = n;
  for (size_t i = 0; i < top.size(); ++i) {
    out.confidence.push_back(params_.simulate_accept.empty()
                                 ? top[i].prob
                                 : static_cast<float>(simulated_confidence(tokens_.size() + i, i)));
  }
  const int keep = params_.depth >= 0 ? n : std::min(room, policy_.verify_depth(out.confidence));
  if (!params_.simulate_accept.empty()) {
    // Random weights echo one token for ever; a text of many tokens wakes as many experts as real text does.
    for (size_t i = 0; i < top.size(); ++i) top[i].id = simulated_draft(tokens_.size() + i, i);
  }
  for (int i = 0; i < keep; ++i) out.tokens.push_back(top[static_cast<size_t>(i)].id);
  for (int i = keep; i < n; ++i) out.unverified.push_back(top[static_cast<size_t>(i)].id);
  out.seconds = watch.seconds();
  stats_.draft_seconds += out.seconds - (backlog ? 0.0 : stats_.ingest_seconds - ingested);  // each stage once
  stats_.draft_by_count[static_cast<size_t>(n)].calls += 1;
  stats_.draft_by_count[static_cast<size_t>(n)].seconds += out.seconds;
  return out;
}

Session::Drafts Session::propose(int room) {
  if (room <= 0 || params_.depth == 0) return {};
  if (params_.depth > 0) return draft_dflash(std::min(params_.depth, room), room);
  LookupProposer::Candidate candidate;
  if (params_.lookup) candidate = lookup_.find(tokens_, room);
  const DraftPlan plan =
      policy_.plan(room, model_->drafter != nullptr, candidate.match, static_cast<int>(candidate.tokens.size()));
  if (plan.source == DraftSource::dflash) return draft_dflash(plan.n, room);
  Drafts out;
  if (plan.source == DraftSource::lookup) {
    out.source = plan.source;
    out.lookup_match = candidate.match;
    out.tokens.assign(candidate.tokens.begin(), candidate.tokens.begin() + plan.n);
  }
  return out;
}

// Some token for a position of a simulated text.
int32_t Session::simulated_token(size_t position) const {
  const double u = uniform_at(params_.sampling.seed + 0x7e57u, position);
  return static_cast<int32_t>(u * model_->target->config().n_vocab);
}

// The imposed chance of a slot (from 0) at that position: the slot's own on average.
double Session::simulated_confidence(size_t position, size_t slot) const {
  const double chance = params_.simulated_chance(slot);
  const double room = params_.simulate_spread * std::min(chance, 1.0 - chance);
  return uniform_at(params_.sampling.seed + 0xd1ff1cu, position) < 0.5 ? chance + room : chance - room;
}

// The draft of a slot for that position: the text's token or another one.
int32_t Session::simulated_draft(size_t position, size_t slot) const {
  const int32_t right = simulated_token(position);
  const double u = uniform_at(params_.sampling.seed + 0x51f15eu, position);
  return u < simulated_confidence(position, slot) ? right : (right + 1) % model_->target->config().n_vocab;
}

// What follows the drafts before row: the target's own token, unless a text is imposed.
int32_t Session::target_token(int32_t own, int row) const {
  return params_.simulate_accept.empty() ? own : simulated_token(tokens_.size() + static_cast<size_t>(row));
}

// The target's token behind each prefix of drafts, from the rows in logits_buffer_: while the drafts stand, or of all
// rows. Logits come to the host only for a hook.
std::vector<int32_t> Session::own_tokens(const std::vector<int32_t>& drafts, bool all_rows) {
  const int rows = static_cast<int>(drafts.size()) + 1;
  const int64_t n_vocab = model_->target->config().n_vocab;
  float* logits = logits_buffer_.as<float>();
  std::vector<int32_t> out(static_cast<size_t>(rows));
  if (sampler_.params().plain_argmax()) {
    std::vector<Top1> top(out.size());
    backend_.top1(logits, rows, n_vocab, top.data());
    for (size_t i = 0; i < out.size(); ++i) {
      if (!(top[i].prob > 0.0f)) fail_all_forbidden();  // NaN, or no finite logit
      out[i] = top[i].id;
      if (i < drafts.size() && !all_rows && out[i] != drafts[i]) break;  // the rows behind are not used
    }
    return out;
  }
  if (!sampler_.params().logits_hook) {
    Sampling sampling = sampler_.rows(tokens_, drafts);
    sampling.all_rows = all_rows;
    backend_.sample(sampling, logits, n_vocab, out.data());
    return out;
  }
  host_logits_.resize(out.size() * static_cast<size_t>(n_vocab));
  backend_.download(host_logits_.data(), logits, host_logits_.size() * sizeof(float));
  std::vector<int32_t> history = tokens_;
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = sampler_.sample(host_logits_.data() + static_cast<int64_t>(i) * n_vocab, n_vocab, history);
    if (i == drafts.size() || (!all_rows && (out[i] != drafts[i] || is_eos(out[i])))) break;
    history.push_back(drafts[i]);
  }
  return out;
}

Accepted Session::verify(const Drafts& drafts) {
  const int rows = static_cast<int>(drafts.tokens.size()) + 1;
  std::vector<int32_t> batch{tokens_.back()};
  batch.insert(batch.end(), drafts.tokens.begin(), drafts.tokens.end());

  const Stopwatch watch;
  forward_verify(batch.data(), rows);
  // Where ops only queue work, the pass ends when its tokens are there, and drawing them counts as part of it.
  double verify_seconds = watch.seconds();
  const std::vector<int32_t> own = own_tokens(drafts.tokens, !params_.simulate_accept.empty());
  if (sampler_.params().plain_argmax() || backend_.asynchronous()) verify_seconds = watch.seconds();
  const Accepted accepted = accept_matching(
      drafts.tokens, [&](int i) { return target_token(own[static_cast<size_t>(i)], i); },
      [&](int32_t token) { return is_eos(token); });
  stats_.verify_seconds += verify_seconds;
  stats_.sample_seconds += watch.seconds() - verify_seconds;
  const Backend::ExpertCount experts = backend_.take_expert_count();
  stats_.experts_by_width[static_cast<size_t>(rows)] += experts.distinct;
  stats_.expert_calls_by_width[static_cast<size_t>(rows)] += experts.calls;
  account(drafts, accepted, watch.seconds());
  return accepted;
}

void Session::account(const Drafts& drafts, const Accepted& accepted, double verify_seconds) {
  const int n = static_cast<int>(drafts.tokens.size());
  stats_.steps += 1;
  stats_.drafted += n;
  stats_.accepted += accepted.count;
  stats_.proposed += drafts.proposed;
  stats_.depth_histogram[static_cast<size_t>(n)] += 1;
  stats_.verify_by_width[static_cast<size_t>(n) + 1].calls += 1;
  stats_.verify_by_width[static_cast<size_t>(n) + 1].seconds += verify_seconds;
  if (drafts.source == DraftSource::lookup) {
    stats_.lookup_drafted += n;
    stats_.lookup_accepted += accepted.count;
  } else {
    for (int i = 0; i < n; ++i) {
      stats_.drafted_per_slot[static_cast<size_t>(i)] += 1;
      stats_.accepted_per_slot[static_cast<size_t>(i)] += i < accepted.count ? 1 : 0;
    }
  }
  RoundOutcome outcome;
  outcome.source = drafts.source;
  outcome.drafted = drafts.proposed;
  outcome.verified = n;
  outcome.accepted = accepted.count;
  outcome.cut = accepted.count < n && is_eos(accepted.tokens.back());
  outcome.lookup_match = drafts.lookup_match;
  outcome.confidence = drafts.confidence;
  outcome.draft_seconds = drafts.seconds;
  outcome.verify_seconds = verify_seconds;
  outcome.ingested = ingested_.tokens;
  outcome.ingest_seconds = ingested_.seconds;
  ingested_ = {};
  policy_.observe(outcome);
  if (drafts.source != DraftSource::dflash) return;
  followed_ = {};
  if (accepted.count < n) return;  // a rejected draft: those behind it were drafted for another text
  const size_t first = static_cast<size_t>(n);
  followed_ = {drafts.unverified, {}, first, tokens_.size() + first, 0};
  followed_.confidence.assign(drafts.confidence.begin() + n, drafts.confidence.end());
}

// Tells the policy how drafts that were not verified compare with the tokens committed since.
void Session::follow_drafts() {
  Followed& f = followed_;
  while (f.next < f.tokens.size() && f.position + f.next < tokens_.size()) {
    const size_t i = f.next++;
    const bool stood = tokens_[f.position + i] == f.tokens[i];
    policy_.observe_unverified(static_cast<int>(f.first_slot + i), f.confidence[i], stood);
    if (!stood) f.next = f.tokens.size();
  }
}

StepResult Session::step() {
  if (!active_) fail("step: no generation is under way; call begin()");
  if (pos_ < prompt_tokens_) {
    fail("step: ", pos_, " of ", prompt_tokens_, " prompt tokens are in the cache; call prefill() until all are");
  }
  StepResult result;
  if (first_) {
    const Stopwatch watch;
    const int32_t token = own_tokens({}, false)[0];
    first_ = false;
    tokens_.push_back(token);
    result.tokens = {token};
    result.source = "prefill";
    stats_.sample_seconds += watch.seconds();
    stats_.generated_tokens += 1;
    result.stop = stop_reason();
    active_ = result.stop == nullptr;
    return result;
  }

  // A round commits at most 1 + drafts tokens: never past max_tokens, nor past the context.
  const int n_tokens = static_cast<int>(tokens_.size());
  const int left = std::min(params_.max_tokens - (n_tokens - prompt_tokens_), options_.n_ctx - n_tokens);
  const Drafts drafts = propose(std::min(model_->block_size() - 1, left - 1));
  taps_ = drafting_ && !(params_.depth < 0 && policy_.asleep());
  const Accepted accepted = verify(drafts);
  tokens_.insert(tokens_.end(), accepted.tokens.begin(), accepted.tokens.end());
  follow_drafts();
  // In the caches now: the anchor and all but the last committed token.
  keep_taps(static_cast<int>(accepted.tokens.size()));
  commit(static_cast<int>(accepted.tokens.size()));

  result.tokens = accepted.tokens;
  result.drafted = static_cast<int>(drafts.tokens.size());
  result.accepted = accepted.count;
  result.source = drafts.source == DraftSource::dflash   ? "dflash"
                  : drafts.source == DraftSource::lookup ? "lookup"
                                                         : "none";
  result.stop = stop_reason();
  active_ = result.stop == nullptr;
  stats_.generated_tokens += static_cast<int64_t>(accepted.tokens.size());
  return result;
}

void Session::run_all(const std::vector<int32_t>& tokens) {
  check_tokens(tokens);
  sync(tokens, tokens.size(), Drafting::whole);
  prompt_tokens_ = static_cast<int>(tokens.size());
  while (pos_ < prompt_tokens_) {
    const int rows = std::min(options_.n_batch, prompt_tokens_ - pos_);
    forward_prompt(tokens_.data() + pos_, rows);
    commit(rows);
  }
}

std::vector<float> Session::logits(const std::vector<int32_t>& tokens) {
  check_tokens(tokens);
  sync(tokens, 0, Drafting::whole);
  prompt_tokens_ = static_cast<int>(tokens.size());
  const int64_t n_vocab = model_->target->config().n_vocab;
  std::vector<float> out(tokens.size() * static_cast<size_t>(n_vocab));
  while (pos_ < prompt_tokens_) {
    const int rows = std::min(options_.n_batch, prompt_tokens_ - pos_);
    forward_prompt(tokens_.data() + pos_, rows);
    for (int done = 0; done < rows;) {  // the head in slices of what the buffer holds
      const int slice = std::min(rows - done, model_->block_size());
      model_->target->logits(backend_, scratch_, done, slice, logits_buffer_.as<float>());
      backend_.download(out.data() + static_cast<int64_t>(pos_ + done) * n_vocab, logits_buffer_.data,
                        static_cast<size_t>(slice) * static_cast<size_t>(n_vocab) * sizeof(float));
      done += slice;
    }
    commit(rows);
  }
  return out;
}

std::vector<float> Session::taps(const std::vector<int32_t>& tokens) {
  if (!model_->drafter) fail("taps: a drafter names the tapped layers; none was loaded");
  check_tokens(tokens);
  sync(tokens, 0, Drafting::whole);
  prompt_tokens_ = static_cast<int>(tokens.size());
  const size_t row = static_cast<size_t>(n_taps()) * static_cast<size_t>(model_->target->config().n_embd);
  std::vector<float> out(tokens.size() * row);
  while (pos_ < prompt_tokens_) {
    ingest_pending();
    const int rows = std::min(options_.n_batch, prompt_tokens_ - pos_);
    forward_prompt(tokens_.data() + pos_, rows);
    backend_.download(out.data() + static_cast<size_t>(pos_) * row, taps_buffer_.data,
                      static_cast<size_t>(rows) * row * sizeof(float));
    commit(rows);
  }
  return out;
}

std::vector<float> Session::draft_logits(const std::vector<int32_t>& tokens, int32_t anchor, int n, int block_rows) {
  if (!model_->drafter) fail("draft_logits: no drafter was loaded");
  const int block = model_->block_size(), n_vocab = model_->target->config().n_vocab;
  if (n < 1 || n > block - 1) fail("draft_logits: n from 1 to ", block - 1, " expected, found ", n);
  const int rows = block_rows == 0 ? n + 1 : block_rows;
  if (rows < n + 1 || rows > block)
    fail("draft_logits: block_rows from ", n + 1, " to ", block, " expected, found ", rows);
  if (anchor < 0 || anchor >= n_vocab)
    fail("draft_logits: anchor from 0 to ", n_vocab - 1, " expected, found ", anchor);
  run_all(tokens);
  ingest_pending();
  model_->drafter->draft(backend_, *drafter_scratch_, anchor, drafter_.cached(), n, rows, *drafter_kv_,
                         logits_buffer_.as<float>(), draft_key(n, rows));
  std::vector<float> out(static_cast<size_t>(n) * static_cast<size_t>(n_vocab));
  backend_.download(out.data(), logits_buffer_.data, out.size() * sizeof(float));
  return out;
}

}  // namespace dflash
