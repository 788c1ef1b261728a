#include "backend/hip/hip_backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "backend/hip/device_memory.h"
#include "backend/hip/kernels.h"

namespace dflash {

namespace {

using namespace hip;

#if defined(DFLASH_GPU_HIP)
constexpr const char* kName = "hip";
#else
constexpr const char* kName = "cuda";
#endif

// The pages of a mapped file that [p, p + bytes) covers whole.
void advise(const char* p, size_t bytes, int advice) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / page * page;
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, advice);
}

class HipBackend final : public Backend {
 public:
  HipBackend() : info_(gpu::device_info(0)) {
    GPU_CHECK(SetDevice(0));
    GPU_CHECK(StreamCreateWithFlags(&stream_, GPU_API(StreamNonBlocking)));
    ring_ = std::make_unique<PinnedRing>(8, size_t{64} << 10);
    counters_ = device_alloc(kCounters * sizeof(int), "counters");
    GPU_CHECK(MemsetAsync(counters_.get(), 0, kCounters * sizeof(int), stream_));
  }

  ~HipBackend() override {
    (void)GPU_API(StreamSynchronize)(stream_);
    drop_recordings();
    (void)GPU_API(StreamDestroy)(stream_);
  }

  const char* name() const override { return kName; }

  std::string describe() const override {
    return cat(kName, " ", info_.name, ", ", info_.compute_units, info_.integrated ? " CUs, unified memory" : " CUs",
               ", int8 activations");
  }

  MemoryInfo memory() const override {
    MemoryInfo m;
    GPU_CHECK(MemGetInfo(&m.free, &m.total));
    return m;
  }

  // ---- memory ----

  Buffer alloc(size_t bytes) override {
    Buffer b;
    b.owner = device_alloc(bytes, "a buffer");
    b.data = b.owner.get();
    b.bytes = bytes;
    return b;
  }

  void upload(void* dst, const void* src, size_t bytes) override {
    char* to = static_cast<char*>(dst);
    const char* from = static_cast<const char*>(src);
    while (bytes > 0) {
      const size_t n = std::min(bytes, ring_->slot_bytes());
      void* slot = ring_->acquire();
      std::memcpy(slot, from, n);
      gpu::copy_to_device(to, slot, n, stream_);
      ring_->release(stream_);
      to += n;
      from += n;
      bytes -= n;
    }
  }

  void download(void* dst, const void* src, size_t bytes) override {
    char* to = static_cast<char*>(dst);
    const char* from = static_cast<const char*>(src);
    while (bytes > 0) {
      const size_t n = std::min(bytes, ring_->slot_bytes());
      void* slot = ring_->acquire();
      gpu::copy_to_host(slot, from, n, stream_);
      GPU_CHECK(StreamSynchronize(stream_));
      std::memcpy(to, slot, n);
      ring_->release(stream_);
      to += n;
      from += n;
      bytes -= n;
    }
  }

  Weight load(const HostTensor& t, std::shared_ptr<const void> keep_alive) override {
    Weight w = make_weight(t.type, t.n_in, t.n_out, t.n_expert);
    if (load_ring_ == nullptr) load_ring_ = std::make_unique<PinnedRing>(2, kLoadChunk);
    (void)keep_alive;  // the bytes are copied
    const char* from = static_cast<const char*>(t.data);
    const size_t row = row_bytes(t.type, t.n_in);
    const int64_t rows = t.n_out * t.n_expert;
    const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(kLoadChunk / row));
    if (row > kLoadChunk) fail("GPU: a row of ", t.name, " has ", row, " bytes; at most ", kLoadChunk);
    const TiledWeight tiles = tiled(w);
    if (is_quantized(t.type) && load_raw_ == nullptr) load_raw_ = device_alloc(kLoadChunk, "loading");
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t n = std::min(step, rows - r);
      const size_t bytes = static_cast<size_t>(n) * row;
      void* slot = load_ring_->acquire();
      // Read ahead in large pieces, and give the pages back at once: on unified memory a model must not be resident
      // twice. Both are hints that are safe for any memory.
      const char* piece = from + static_cast<size_t>(r) * row;
      advise(piece + bytes, static_cast<size_t>(std::min(step, rows - r - n)) * row, MADV_WILLNEED);
      std::memcpy(slot, piece, bytes);
      advise(piece, bytes, MADV_PAGEOUT);
      void* to = is_quantized(t.type) ? load_raw_.get() : static_cast<char*>(data_of(w)) + static_cast<size_t>(r) * row;
      gpu::copy_to_device(to, slot, bytes, stream_);
      load_ring_->release(stream_);
      if (is_quantized(t.type)) {
        launch_repack(stream_, t.type, to, r, n, t.n_out, t.n_in, const_cast<uint8_t*>(tiles.quants),
                      const_cast<uint16_t*>(tiles.scales));
      }
    }
    return w;
  }

  Weight random_weight(DType type, int64_t n_in, int64_t n_out, int64_t n_expert, uint64_t seed) override {
    Weight w = make_weight(type, n_in, n_out, n_expert);
    if (is_quantized(type)) {
      const TiledWeight t = tiled(w);
      const int64_t quants = reinterpret_cast<const uint8_t*>(t.scales) - t.quants;
      const int64_t scales = n_expert * t.tiles * t.groups * kTile * (type == DType::Q4_1 ? 2 : 1);
      launch_random(stream_, type, n_in, quants, scales, data_of(w), const_cast<uint16_t*>(t.scales), seed << 40);
    } else {
      launch_random(stream_, type, n_in, n_in * n_out * n_expert, 0, data_of(w), nullptr, seed << 40);
    }
    return w;
  }

  // ---- ops ----

  void embed(const Weight& table, const int32_t* tokens, int rows, float* x) override {
    begin_op();
    launch_embed(stream_, table, tokens, rows, x);
  }

  void rms_norm(const float* x, const float* w, float eps, int rows, int64_t n, float* y) override {
    begin_op();
    launch_norm_quantize(stream_, x, w, eps, rows, n, y, {});
  }

  void norm_matmul(const float* x, const float* norm, float eps, int rows, const MatmulOut* outs, int n_outs) override {
    begin_op();
    multiply(x, norm, eps, rows, outs, n_outs, false);
  }

  void matmul_add(const Weight& w, const float* x, int rows, float* y) override {
    const bool quantized = quantized_x_ == x && quantized_rows_ == rows && quantized_n_ == w.n_in;
    begin_op();
    const MatmulOut out{&w, y};
    if (quantized && is_quantized(w.type)) {
      run_tiled(&out, 1, quant_rows(rows, w.n_in), rows, true);
    } else {
      multiply(x, nullptr, 0.0f, rows, &out, 1, true);
    }
  }

  void qkv_post(const QkvPost& p, Step step, float* q, float* k, const float* v, const KvLayer& kv) override {
    begin_op();
    launch_qkv_post(stream_, p, step.rows, position(step), q, k, v, kv);
  }

  void attention(const Attention& a, Step step, const float* q, const KvLayer& kv, float* out) override {
    begin_op();
    const int n_keys = in_step_ ? std::min(step_keys_, kv.n_ctx) : step.pos0 + step.rows;
    float* partials = scratch<float>(Scratch::kPartials, attention_scratch_bytes(a, step.rows, n_keys));
    const int64_t n = static_cast<int64_t>(a.n_head) * a.head_dim;
    const MutableQuantRows quant = mutable_quant(Scratch::kQuant, step.rows, n);
    launch_attention(stream_, a, step.rows, position(step), n_keys, q, kv, partials, attention_arrived(), out, quant);
    quantized_x_ = out;
    quantized_rows_ = step.rows;
    quantized_n_ = n;
  }

  void moe(const Moe& m, int rows, float* x) override {
    begin_op();
    const int64_t n_embd = m.router->n_in;
    const bool tiled_experts = is_quantized(m.gate->type);
    float* h = nullptr;
    if (route_needs_hidden(m, rows)) h = scratch<float>(Scratch::kHidden, static_cast<size_t>(rows * n_embd) * sizeof(float));
    const MutableQuantRows hq = tiled_experts ? mutable_quant(Scratch::kQuant, rows, n_embd) : MutableQuantRows{};
    float* logits = scratch<float>(Scratch::kLogits, static_cast<size_t>(rows) * m.n_expert * sizeof(float));
    const Routing r = routing(rows, m.top_k, m.n_expert);
    launch_route(stream_, m, x, h, hq, logits, r);
    ++calls_;
    experts(*m.gate, *m.up, *m.down, rows, r, h, x);
  }

  void ffn(const Ffn& f, int rows, float* x) override {
    begin_op();
    const int64_t n_embd = f.gate->n_in;
    const bool tiled_experts = is_quantized(f.gate->type);
    float* h = nullptr;
    MutableQuantRows hq;
    if (tiled_experts) {
      hq = mutable_quant(Scratch::kQuant, rows, n_embd);
    } else {
      h = scratch<float>(Scratch::kHidden, static_cast<size_t>(rows * n_embd) * sizeof(float));
    }
    launch_norm_quantize(stream_, x, f.norm, f.eps, rows, n_embd, h, hq);
    const Routing r = routing(rows, 1, 1);
    launch_route_dense(stream_, r);
    experts(*f.gate, *f.up, *f.down, rows, r, h, x);
  }

  void copy_rows(const float* src, int rows, int64_t n, float* dst, int64_t stride) override {
    begin_op();
    launch_copy_rows(stream_, src, rows, n, dst, stride);
  }

  void top1(const float* logits, int rows, int64_t n, Top1* out) override {
    begin_op();
    float* s = scratch<float>(Scratch::kTop1, top1_scratch_bytes(rows));
    Top1* device_out = reinterpret_cast<Top1*>(reinterpret_cast<char*>(s) + top1_scratch_bytes(rows)) - rows;
    launch_top1(stream_, logits, rows, n, s, device_out);
    download(out, device_out, static_cast<size_t>(rows) * sizeof(Top1));
  }

  // ---- steps that repeat ----

  bool begin_step(uint64_t key, Step step) override {
    if (capturing_) {  // an op of the recorded step threw
      capturing_ = false;
      try {
        (void)GPU_API(GraphExecDestroy)(gpu::end_capture(stream_));
      } catch (const Error&) {
      }
    }
    begin_op();
    // A recorded step serves every position up to a bound; longer contexts take the next recording.
    step_keys_ = 1024;
    while (step_keys_ < step.pos0 + step.rows) step_keys_ *= 2;
    current_ = {key, step_keys_};
    upload(position_slot(), &step.pos0, sizeof(int));
    Recording& r = recordings_[current_];
    if (r.exec != nullptr) {
      GPU_CHECK(GraphLaunch(r.exec, stream_));
      calls_ += r.moe_calls;
      return true;
    }
    in_step_ = true;
    calls_at_begin_ = calls_;
    if (r.warm) {  // the first pass ran everything once: scratch is allocated, kernels are loaded
      GPU_CHECK(StreamBeginCapture(stream_, GPU_API(StreamCaptureModeRelaxed)));
      capturing_ = true;
    }
    r.warm = true;
    return false;
  }

  void end_step() override {
    begin_op();
    in_step_ = false;
    if (!capturing_) return;
    capturing_ = false;
    Recording& r = recordings_[current_];
    r.exec = gpu::end_capture(stream_);
    r.moe_calls = calls_ - calls_at_begin_;
    GPU_CHECK(GraphLaunch(r.exec, stream_));
  }

  ExpertCount take_expert_count() override {
    ExpertCount c;
    int distinct = 0;
    download(&distinct, distinct_slot(), sizeof(int));
    GPU_CHECK(MemsetAsync(distinct_slot(), 0, sizeof(int), stream_));
    c.distinct = distinct;
    c.calls = calls_;
    calls_ = 0;
    return c;
  }

 private:
  static constexpr size_t kLoadChunk = size_t{32} << 20;
  // position, distinct, then one for each tile of n_embd, then attention's
  static constexpr int kTileCounters = 4094, kCounters = 2 + kTileCounters + kAttentionCounters;

  struct Recording {
    bool warm = false;
    gpu::GraphExec exec = nullptr;
    int64_t moe_calls = 0;
  };

  // Every op starts here: what the op before left in scratch no longer counts.
  void begin_op() { quantized_x_ = nullptr; }

  int* position_slot() const { return static_cast<int*>(counters_.get()); }
  int* distinct_slot() const { return static_cast<int*>(counters_.get()) + 1; }
  int* arrived_slots() const { return static_cast<int*>(counters_.get()) + 2; }

  int* attention_arrived() const { return arrived_slots() + kTileCounters; }

  Position position(Step step) const {
    Position p;
    p.value = step.pos0;
    if (in_step_) p.device = position_slot();
    return p;
  }

  void drop_recordings() {
    for (auto& [key, r] : recordings_) {
      if (r.exec != nullptr) (void)GPU_API(GraphExecDestroy)(r.exec);
    }
    recordings_.clear();
  }

  template <typename T>
  T* scratch(Scratch::Name name, size_t bytes) {
    return static_cast<T*>(scratch_.get(name, bytes, [&] {
      GPU_CHECK(StreamSynchronize(stream_));
      drop_recordings();
    }));
  }

  static void* data_of(const Weight& w) { return const_cast<void*>(w.data); }

  Weight make_weight(DType type, int64_t n_in, int64_t n_out, int64_t n_expert) {
    Weight w;
    w.type = type;
    w.n_in = n_in;
    w.n_out = n_out;
    w.n_expert = n_expert;
    size_t bytes = w.bytes();
    if (is_quantized(type)) {
      w.layout = kTiledLayout;
      bytes = static_cast<size_t>(n_expert) * static_cast<size_t>((n_out + kTile - 1) / kTile * kTile) *
              row_bytes(type, n_in);
    }
    std::shared_ptr<void> memory = device_alloc(bytes, "weights");
    w.data = memory.get();
    w.owner = std::move(memory);
    return w;
  }

  // Quantised rows of n in scratch: int8, then scales.
  MutableQuantRows mutable_quant(Scratch::Name name, int64_t rows, int64_t n) {
    const size_t q_bytes = (static_cast<size_t>(rows * n) + 255) / 256 * 256;
    int8_t* q = scratch<int8_t>(name, q_bytes + static_cast<size_t>(rows * n / 32) * sizeof(GroupScale));
    return {q, reinterpret_cast<GroupScale*>(q + q_bytes)};
  }

  static QuantRows rows_of(const MutableQuantRows& m, int64_t n) { return {m.q, m.scale, n}; }

  QuantRows quant_rows(int64_t rows, int64_t n) { return rows_of(mutable_quant(Scratch::kQuant, rows, n), n); }

  void run_tiled(const MatmulOut* outs, int n_outs, QuantRows x, int rows, bool add) {
    for (int i = 0; i < n_outs;) {  // runs of one type share a launch
      const DType type = outs[i].w->type;
      TiledOut list[kMaxOuts];
      int n = 0;
      while (i < n_outs && n < kMaxOuts && outs[i].w->type == type) {
        list[n++] = {tiled(*outs[i].w), outs[i].y};
        ++i;
      }
      launch_matmul(stream_, type, list, n, x, rows, add);
    }
  }

  void multiply(const float* x, const float* norm, float eps, int rows, const MatmulOut* outs, int n_outs, bool add) {
    const int64_t n = outs[0].w->n_in;
    bool any_tiled = false, any_float = false;
    for (int i = 0; i < n_outs; ++i) (is_quantized(outs[i].w->type) ? any_tiled : any_float) = true;
    MutableQuantRows q;
    const float* h = x;
    float* h_out = nullptr;
    if (any_tiled) q = mutable_quant(Scratch::kQuant, rows, n);
    if (any_float && norm != nullptr) {
      h = h_out = scratch<float>(Scratch::kHidden, static_cast<size_t>(rows * n) * sizeof(float));
    }
    if (any_tiled || norm != nullptr) launch_norm_quantize(stream_, x, norm, eps, rows, n, h_out, q);
    for (int i = 0; i < n_outs;) {
      int end = i;
      while (end < n_outs && is_quantized(outs[end].w->type) == is_quantized(outs[i].w->type)) ++end;
      if (is_quantized(outs[i].w->type)) {
        run_tiled(outs + i, end - i, rows_of(q, n), rows, add);
      } else {
        for (int j = i; j < end; ++j) launch_float_matmul(stream_, *outs[j].w, h, rows, outs[j].y, add);
      }
      i = end;
    }
  }

  Routing routing(int rows, int top_k, int n_expert) {
    Routing r;
    r.rows = rows;
    r.top_k = top_k;
    r.chunk = rows <= 16 ? 16 : kManyTokens;
    r.max_items = max_items(rows, top_k, n_expert, r.chunk);
    const size_t pairs = static_cast<size_t>(rows) * static_cast<size_t>(top_k);
    const size_t item_bytes = static_cast<size_t>(r.max_items) * sizeof(Item);
    char* p = scratch<char>(Scratch::kRouting, 64 + item_bytes + 3 * pairs * sizeof(int));
    r.n_items = reinterpret_cast<int*>(p);
    r.items = reinterpret_cast<Item*>(p + 64);
    r.pairs = reinterpret_cast<int*>(p + 64 + item_bytes);
    r.weights = reinterpret_cast<float*>(r.pairs + pairs);
    r.experts = reinterpret_cast<int*>(r.weights + pairs);
    r.arrived = arrived_slots();
    r.distinct = distinct_slot();
    return r;
  }

  // x += the experts' weighted sum. h [rows, n_embd] f32 (float experts) or its int8 groups in scratch.
  void experts(const Weight& gate, const Weight& up, const Weight& down, int rows, const Routing& r, const float* h,
               float* x) {
    const int64_t n_embd = down.n_out, n_ff = gate.n_out, pairs = static_cast<int64_t>(rows) * r.top_k;
    if (gate.type != up.type || is_quantized(gate.type) != is_quantized(down.type)) {
      fail("GPU: gate, up and down must be quantised alike, not ", dtype_info(gate.type).name, ", ",
           dtype_info(up.type).name, " and ", dtype_info(down.type).name);
    }
    if ((n_embd + kTile - 1) / kTile > kTileCounters) fail("GPU: n_embd ", n_embd, " is too large");
    float* y = scratch<float>(Scratch::kPairOut, static_cast<size_t>(pairs * n_embd) * sizeof(float));
    if (!is_quantized(gate.type)) {
      float* act = scratch<float>(Scratch::kActFloat, static_cast<size_t>(pairs * n_ff) * sizeof(float));
      launch_float_gate_up(stream_, gate, up, h, r, act);
      launch_float_down(stream_, down, act, r, y, x);
      return;
    }
    const MutableQuantRows act = mutable_quant(Scratch::kActQuant, pairs, n_ff);
    launch_gate_up(stream_, gate.type, tiled(gate), tiled(up), quant_rows(rows, gate.n_in), r, act);
    launch_down(stream_, down.type, tiled(down), rows_of(act, n_ff), r, y, x);
  }

  gpu::DeviceInfo info_;
  gpu::Stream stream_ = nullptr;
  std::unique_ptr<PinnedRing> ring_, load_ring_;
  std::shared_ptr<void> load_raw_, counters_;
  Scratch scratch_;

  // Whose int8 groups lie in kQuant: attention leaves those of its output for the matmul_add that follows.
  const float* quantized_x_ = nullptr;
  int quantized_rows_ = 0;
  int64_t quantized_n_ = 0;

  std::map<std::pair<uint64_t, int>, Recording> recordings_;
  std::pair<uint64_t, int> current_;
  bool in_step_ = false, capturing_ = false;
  int step_keys_ = 0;
  int64_t calls_ = 0, calls_at_begin_ = 0;
};

}  // namespace

std::string hip_backend_status() {
  gpu::Status why = gpu::kOk;
  const int n = gpu::device_count(&why);
  if (why != gpu::kOk) return cat("no usable GPU driver: ", gpu::describe(why));
  if (n == 0) return "no GPU found";
  std::string reason;
  if (!device_runs_kernels(&reason)) {
    return cat("this build has no kernels for the GPU here: ", reason, ". Build with its architecture (-DDFLASH_GPU_ARCH=...)");
  }
  return "";
}

std::unique_ptr<Backend> make_hip_backend(const BackendOptions& options) {
  if (options.precise) fail("backend '", kName, "' has no precise mode; use backend='cpu'");
  const std::string why = hip_backend_status();
  if (!why.empty()) fail("backend '", kName, "': ", why);
  return std::make_unique<HipBackend>();
}

}  // namespace dflash
