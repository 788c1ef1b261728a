#include "backend/hip/experts.h"

#include "backend/hip/few_rows.h"

namespace dflash::hip {

namespace {

void check_alike(const Weight& gate, const Weight& up, const Weight& down) {
  if (gate.type != up.type || is_quantized(gate.type) != is_quantized(down.type)) {
    fail("GPU: gate, up and down must be quantised alike, not ", dtype_info(gate.type).name, ", ",
         dtype_info(up.type).name, " and ", dtype_info(down.type).name);
  }
}

}  // namespace

void Experts::moe(const Moe& m, int rows, float* x) {
  check_alike(*m.gate, *m.up, *m.down);
  const int64_t n_embd = m.router->n_in;
  const bool tiled_experts = is_quantized(m.gate->type), more = tiled_experts && rows > kFewRows;
  float* h = nullptr;
  if (route_needs_hidden(m, rows)) h = work_.floats(Scratch::kHidden, rows, n_embd);
  float* logits = work_.floats(Scratch::kLogits, (more ? kRouterParts : 1) * static_cast<int64_t>(rows), m.n_expert);
  const Routing r = routing(rows, m.top_k, m.n_expert);
  if (more) {
    const HalfRows hh = work_.half_rows(Scratch::kQuant, rows, n_embd, true);
    launch_route_many(stream_, m, x, h, hh, logits, r);
    many(*m.gate, *m.up, *m.down, r, hh, x);
    return;
  }
  const MutableQuantRows hq = tiled_experts ? work_.mutable_quant(Scratch::kQuant, rows, n_embd) : MutableQuantRows{};
  launch_route(stream_, m, x, h, hq, logits, r);
  if (!experts_choose(rows, m.gate->type)) return floats(*m.gate, *m.up, *m.down, r, h, x);
  FewChoice c;
  c.logits = logits;
  c.bias = m.bias;
  c.n_expert = m.n_expert;
  c.rows = rows;
  c.top_k = m.top_k;
  c.distinct = distinct_;
  if (experts_one_launch(rows, m.gate->type, m.down->type)) {
    void* words = rows == 1
                      ? work_.zeroed(Scratch::kRowWords, row_words_bytes(m.top_k, m.gate->n_out))
                      : work_.zeroed(Scratch::kExpertWords, expert_words_bytes(rows * m.top_k, m.gate->n_out, n_embd));
    const auto launch = rows == 1 ? launch_experts_row : rows == 2 ? launch_experts_queue : launch_experts_stream;
    if (launch(stream_, m.gate->type, tiled(*m.gate), tiled(*m.up), tiled(*m.down), work_.quant_rows(rows, n_embd), c,
               words, launch_, x)) {
      return;
    }
  }
  const MutableQuantRows act = gate_up_few(*m.gate, *m.up, c);
  launch_down_few(stream_, m.down->type, tiled(*m.down), rows_of(act, m.down->n_in), c, x);
}

void Experts::ffn(const Ffn& f, int rows, float* x) {
  check_alike(*f.gate, *f.up, *f.down);
  const int64_t n_embd = f.gate->n_in;
  const bool tiled_experts = is_quantized(f.gate->type);
  if (tiled_experts && rows > kFewRows) {
    const HalfRows hh = work_.half_rows(Scratch::kQuant, rows, n_embd, true);
    launch_norm_half(stream_, x, f.norm, f.eps, rows, nullptr, hh);
    const Routing r = routing(rows, 1, 1);
    launch_route_dense(stream_, r);
    many(*f.gate, *f.up, *f.down, r, hh, x);
    return;
  }
  float* h = nullptr;
  MutableQuantRows hq;
  if (tiled_experts) {
    hq = work_.mutable_quant(Scratch::kQuant, rows, n_embd);
  } else {
    h = work_.floats(Scratch::kHidden, rows, n_embd);
  }
  launch_norm_quantize(stream_, x, f.norm, f.eps, rows, n_embd, h, hq);
  if (experts_choose(rows, f.gate->type)) {
    const MutableQuantRows act = work_.mutable_quant(Scratch::kActQuant, rows, f.gate->n_out);
    launch_gate_up_dense(stream_, f.gate->type, tiled(*f.gate), tiled(*f.up), rows_of(hq, n_embd), rows, act);
    const TiledOut out = {tiled(*f.down), x};
    return launch_matmul(stream_, f.down->type, &out, 1, rows_of(act, f.down->n_in), rows, true);
  }
  const Routing r = routing(rows, 1, 1);
  launch_route_dense(stream_, r);
  floats(*f.gate, *f.up, *f.down, r, h, x);
}

Routing Experts::routing(int rows, int top_k, int n_expert) {
  Routing r;
  r.rows = rows;
  r.top_k = top_k;
  r.chunk = rows <= kFewRows ? kFewRows : kManyTokens;
  r.max_items = max_items(rows, top_k, n_expert, r.chunk);
  const size_t pairs = static_cast<size_t>(rows) * static_cast<size_t>(top_k);
  const size_t item_bytes = static_cast<size_t>(r.max_items) * sizeof(Item);
  char* p = work_.get<char>(Scratch::kRouting, 64 + item_bytes + 3 * pairs * sizeof(int));
  r.n_items = reinterpret_cast<int*>(p);
  r.items = reinterpret_cast<Item*>(p + 64);
  r.pairs = reinterpret_cast<int*>(p + 64 + item_bytes);
  r.weights = reinterpret_cast<float*>(r.pairs + pairs);
  r.experts = reinterpret_cast<int*>(r.weights + pairs);
  r.distinct = distinct_;
  return r;
}

// x += the quantised experts' weighted sum for more than kFewRows rows. h [rows, n_embd]
void Experts::many(const Weight& gate, const Weight& up, const Weight& down, const Routing& r, HalfRows h, float* x) {
  const int64_t pairs = static_cast<int64_t>(r.rows) * r.top_k;
  const HalfRows act = work_.half_rows(Scratch::kActQuant, pairs, gate.n_out, false);
  const PairRows y = work_.pair_rows(Scratch::kPairOut, pairs, down.n_out);
  launch_gate_up_many(stream_, gate.type, tiled(gate), tiled(up), h, r, act);
  launch_down_many(stream_, down.type, tiled(down), act, r, y, x);
}

// x += the float experts' weighted sum. h [rows, n_embd]
void Experts::floats(const Weight& gate, const Weight& up, const Weight& down, const Routing& r, const float* h,
                     float* x) {
  const int64_t pairs = static_cast<int64_t>(r.rows) * r.top_k;
  float* y = work_.floats(Scratch::kPairOut, pairs, down.n_out);
  float* act = work_.floats(Scratch::kActFloat, pairs, gate.n_out);
  launch_float_gate_up(stream_, gate, up, h, r, act);
  launch_float_down(stream_, down, act, r, y, x);
}

// The int8 groups of silu(gate x) * up x for every pair, from the rows in kQuant.
MutableQuantRows Experts::gate_up_few(const Weight& gate, const Weight& up, const FewChoice& c) {
  const MutableQuantRows act =
      work_.mutable_quant(Scratch::kActQuant, static_cast<int64_t>(c.rows) * c.top_k, gate.n_out);
  launch_gate_up_few(stream_, gate.type, tiled(gate), tiled(up), work_.quant_rows(c.rows, gate.n_in), c, act);
  return act;
}

}  // namespace dflash::hip
