#include "backend/hip/hip_backend.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "backend/hip/architecture.h"
#include "backend/hip/device_memory.h"
#include "backend/hip/experts.h"
#include "backend/hip/few_rows.h"
#include "backend/hip/kernels.h"
#include "backend/hip/sampling.h"
#include "backend/hip/weight_upload.h"

namespace dflash {

namespace {

using namespace hip;

#if defined(DFLASH_GPU_HIP)
constexpr const char* kName = "hip";
#else
constexpr const char* kName = "cuda";
#endif

class HipBackend final : public Backend {
 public:
  HipBackend() : info_(gpu::device_info(0)) {
    GPU_CHECK(SetDevice(0));
    GPU_CHECK(StreamCreateWithFlags(&stream_, GPU_API(StreamNonBlocking)));
    ring_ = std::make_unique<PinnedRing>(8, size_t{64} << 10);
    counters_ = device_alloc(kCounters * sizeof(int), "counters");
    GPU_CHECK(MemsetAsync(counters_.get(), 0, kCounters * sizeof(int), stream_));
    work_ = std::make_unique<Workspace>(stream_, [this] { drop_recordings(); });
    experts_ = std::make_unique<Experts>(stream_, *work_, distinct_slot(), expert_launch());
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

  bool asynchronous() const override { return true; }

  MemoryInfo memory() const override {
    MemoryInfo m;
    GPU_CHECK(MemGetInfo(&m.free, &m.total));
    if (info_.integrated) m.hint = kMoreMemory;
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
    begin_op();
    if (bytes <= kSmallUpload) return launch_store(stream_, dst, src, bytes);
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
    if (waits()) begin_op();
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
    (void)keep_alive;  // the bytes are copied
    const Weight w = make_weight(t.type, t.n_in, t.n_out, t.n_expert);
    if (upload_ == nullptr) upload_ = std::make_unique<WeightUpload>(stream_);
    upload_->load(t, w);
    return w;
  }

  size_t weight_bytes(const HostTensor& t) const override {
    return device_weight_bytes(t.type, t.n_in, t.n_out, t.n_expert);
  }

  void loaded() override {
    GPU_CHECK(StreamSynchronize(stream_));
    upload_.reset();
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
    if (late_.out == x && x != nullptr && late_.step.rows == rows && late_.n == w.n_in && is_quantized(w.type)) {
      attend(nullptr);  // nobody reads more than its 16-bit rows
      left_quantized(x, rows, w.n_in);
    }
    const bool quantized = quantized_x_ == x && quantized_rows_ == rows && quantized_n_ == w.n_in;
    begin_op();
    const MatmulOut out{&w, y};
    if (quantized && is_quantized(w.type)) {
      if (rows > kFewRows) {
        run_tiled(&out, 1, work_->half_rows(Scratch::kQuant, rows, w.n_in, true), rows, true);
      } else {
        run_tiled(&out, 1, work_->quant_rows(rows, w.n_in), rows, true);
      }
    } else {
      multiply(x, nullptr, 0.0f, rows, &out, 1, true);
    }
  }

  void qkv_post(const QkvPost& p, Step step, float* q, float* k, const float* v, const KvLayer& kv) override {
    const float* const q_squares = squares_.of(q);
    const float* const k_squares = squares_.of(k);
    begin_op();
    const bool takes_in = attention_can_take_in(p, step.rows) && q_squares != nullptr && k_squares != nullptr;
    if (takes_in || (q != nullptr && qkv_post_by_rows(p, step.rows))) {
      pending_ = {true, step, q, kv, {p, k, v, q_squares, k_squares}, takes_in};
    } else {
      launch_qkv_post(stream_, p, step.rows, position(step), q, k, v, kv);
    }
  }

  void attention(const Attention& a, Step step, const float* q, const KvLayer& kv, float* out) override {
    TakeIn in;
    const bool many = attention_many_takes(a, step.rows, kv);
    bool half_q = false;
    if (pending_.waiting && pending_.q == q && pending_.kv.k == kv.k && pending_.step.pos0 == step.pos0 &&
        pending_.step.rows == step.rows && pending_.in.post.n_head == a.n_head) {
      half_q = many;
      if (!many && pending_.takes_in) in = pending_.in;
      pending_.waiting = !many && in.k == nullptr;
    }
    begin_op();
    if (half_q) {
      send_pending(true);
    }
    if (many) {
      const int64_t n = static_cast<int64_t>(a.n_head) * a.head_dim;
      late_ = {a, step, q, half_q, kv, out, n};
      return;
    }
    const int n_keys = in_step_ ? std::min(step_keys_, kv.n_ctx) : step.pos0 + step.rows;
    float* partials = work_->get<float>(Scratch::kPartials, attention_scratch_bytes(a, step.rows, n_keys));
    const int64_t n = static_cast<int64_t>(a.n_head) * a.head_dim;
    const MutableQuantRows quant = work_->mutable_quant(Scratch::kQuant, step.rows, n);
    launch_attention(stream_, a, step.rows, position(step), n_keys, q, kv, in, partials, attention_arrived(), out,
                     quant);
    if (step.rows <= kFewRows) left_quantized(out, step.rows, n);
  }

  void moe(const Moe& m, int rows, float* x) override {
    begin_op();
    ++calls_;
    experts_->moe(m, rows, x);
  }

  void ffn(const Ffn& f, int rows, float* x) override {
    begin_op();
    experts_->ffn(f, rows, x);
  }

  void copy_rows(const float* src, int rows, int64_t n, float* dst, int64_t stride) override {
    begin_op();
    launch_copy_rows(stream_, src, rows, n, dst, stride);
  }

  void top1(const float* logits, int rows, int64_t n, Top1* out) override {
    begin_op();
    float* s = work_->unrecorded<float>(Scratch::kTop1, top1_scratch_bytes(std::min(rows, kResultRows)));
    for (int r = 0; r < rows; r += kResultRows) {
      const int count = std::min(rows - r, kResultRows);
      launch_top1(stream_, logits + r * n, count, n, s, static_cast<Top1*>(results_slot()));
      read_results(out + r, static_cast<size_t>(count) * sizeof(Top1));
    }
  }

  int sample(const Sampling& s, float* logits, int64_t n, int32_t* out) override {
    begin_op();
    const int rows = s.rows();
    if (rows > kResultRows) fail("GPU: at most ", kResultRows, " rows are sampled at once, found ", rows);
    const std::vector<char> inputs = pack_sampling(s);
    char* device_inputs = work_->unrecorded<char>(Scratch::kSamplingInputs, inputs.size());
    void* work = work_->unrecorded<char>(Scratch::kSampling, sampling_scratch_bytes(s));
    upload(device_inputs, inputs.data(), inputs.size());
    launch_sampling(stream_, s, logits, n, device_inputs, work, static_cast<int32_t*>(results_slot()));
    read_results(out, static_cast<size_t>(rows) * sizeof(int32_t));
    int drawn = 0;
    do {
      if (out[drawn] < 0) fail_all_forbidden();
      ++drawn;
    } while (drawn < rows && (s.all_rows || out[drawn - 1] == s.drafts[static_cast<size_t>(drawn) - 1]));
    return drawn;
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
    step_keys_ = recording_bound(step.pos0 + step.rows);
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
    int distinct = distinct_read_;
    if (calls_at_read_ != calls_) download(&distinct, distinct_slot(), sizeof(int));
    GPU_CHECK(MemsetAsync(distinct_slot(), 0, sizeof(int), stream_));
    distinct_read_ = calls_at_read_ = 0;
    c.distinct = distinct;
    c.calls = calls_;
    calls_ = 0;
    return c;
  }

 private:
  // position; distinct, then results, which are read back with it; attention's
  static constexpr int kResultRows = 256, kResults = kResultRows * static_cast<int>(sizeof(Top1) / sizeof(int));
  static constexpr int kCounters = 2 + kResults + kAttentionCounters + 5;

  struct Recording {
    bool warm = false;
    gpu::GraphExec exec = nullptr;
    int64_t moe_calls = 0;
  };

  // A recorded step serves every position up to a bound; longer contexts take the next recording. Attention's blocks
  // are made for the bound: a fifth of them have nothing to do at most.
  static int recording_bound(int keys) {
    int power = 512;
    while (power * 2 <= keys) power *= 2;
    const int step = std::max(512, power / 4);
    return (keys + step - 1) / step * step;
  }

  // Every op starts here: what the op before left in scratch no longer counts.
  void begin_op() {
    quantized_x_ = nullptr;
    squares_.n = 0;
    if (pending_.waiting) {
      pending_.waiting = false;
      send_pending(false);
    }
    if (late_.out != nullptr) attend(late_.out);
    if (weights_on_their_way_) {  // kernels read weights before they wait for the kernels before them
      GPU_CHECK(StreamSynchronize(stream_));
      weights_on_their_way_ = false;
    }
  }
  void send_pending(bool half_q) {
    const TakeIn& in = pending_.in;
    launch_qkv_post(stream_, in.post, pending_.step.rows, position(pending_.step), pending_.q, in.k, in.v, pending_.kv,
                    half_q);
  }
  bool waits() const { return pending_.waiting || late_.out != nullptr; }

  // The attention that waits, its f32 rows to out (null: left out).
  void attend(float* out) {
    const LateAttention l = std::exchange(late_, {});
    launch_attention_many(stream_, l.a, l.step.rows, position(l.step), l.q, l.half_q, l.kv, out,
                          work_->half_rows(Scratch::kQuant, l.step.rows, l.n, true));
  }
  void left_quantized(const float* x, int rows, int64_t n) {
    quantized_x_ = x;
    quantized_rows_ = rows;
    quantized_n_ = n;
  }

  int* position_slot() const { return static_cast<int*>(counters_.get()); }
  int* distinct_slot() const { return static_cast<int*>(counters_.get()) + 1; }
  void* results_slot() const { return static_cast<int*>(counters_.get()) + 2; }
  int* attention_arrived() const { return static_cast<int*>(counters_.get()) + 2 + kResults; }

  int* expert_launch() const { return attention_arrived() + kAttentionCounters; }

  // One wait brings what lies in results_slot() and the distinct experts counted so far.
  void read_results(void* out, size_t bytes) {
    int read[1 + kResults];
    download(read, distinct_slot(), sizeof(int) + bytes);
    std::memcpy(out, read + 1, bytes);
    distinct_read_ = read[0];
    calls_at_read_ = calls_;
  }

  Position position(Step step) const {
    Position p;
    p.value = step.pos0;
    if (capturing_) p.device = position_slot();  // a kernel may look before those before it are done
    return p;
  }

  void drop_recordings() {
    for (auto& [key, r] : recordings_) {
      if (r.exec != nullptr) (void)GPU_API(GraphExecDestroy)(r.exec);
    }
    recordings_.clear();
  }

  static void* data_of(const Weight& w) { return const_cast<void*>(w.data); }

  Weight make_weight(DType type, int64_t n_in, int64_t n_out, int64_t n_expert) {
    Weight w;
    w.type = type;
    w.n_in = n_in;
    w.n_out = n_out;
    w.n_expert = n_expert;
    if (is_quantized(type)) w.layout = kTiledLayout;
    std::shared_ptr<void> memory = device_alloc(device_weight_bytes(type, n_in, n_out, n_expert), "weights");
    weights_on_their_way_ = true;
    w.data = memory.get();
    w.owner = std::move(memory);
    return w;
  }

  template <typename Rows>
  void run_tiled(const MatmulOut* outs, int n_outs, Rows x, int rows, bool add) {
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

  // Where one row's products leave the squares of their tiles.
  float* leave_squares(const TiledOut* outs, int n_outs) {
    int64_t tiles = 0;
    for (int i = 0; i < n_outs; ++i) tiles += outs[i].w.tiles;
    float* const squares = work_->floats(Scratch::kSquares, 1, tiles);
    int64_t first = 0;
    for (int i = 0; i < n_outs; ++i) {
      squares_.y[i] = outs[i].y;
      squares_.squares[i] = first % 4 == 0 ? squares + first : nullptr;  // they are read by fours
      first += outs[i].w.tiles;
    }
    squares_.n = n_outs;
    return squares;
  }

  void multiply(const float* x, const float* norm, float eps, int rows, const MatmulOut* outs, int n_outs, bool add) {
    const int64_t n = outs[0].w->n_in;
    bool any_tiled = false, any_float = false, one_type = n_outs <= kMaxOuts;
    for (int i = 0; i < n_outs; ++i) {
      (is_quantized(outs[i].w->type) ? any_tiled : any_float) = true;
      one_type = one_type && outs[i].w->type == outs[0].w->type;
    }
    if (!any_float && one_type) {
      TiledOut list[kMaxOuts];
      for (int i = 0; i < n_outs; ++i) list[i] = {tiled(*outs[i].w), outs[i].y};
      if (matmul_can_norm(outs[0].w->type, list, n_outs, rows)) {
        float* const squares = rows == 1 && norm != nullptr ? leave_squares(list, n_outs) : nullptr;
        return launch_norm_matmul(stream_, outs[0].w->type, list, n_outs, {x, norm, eps}, rows, add, squares);
      }
    }
    MutableQuantRows q;
    HalfRows half;
    const bool many = any_tiled && rows > kFewRows;
    const float* h = x;
    float* h_out = nullptr;
    if (many) {
      half = work_->half_rows(Scratch::kQuant, rows, n, norm != nullptr);
    } else if (any_tiled) {
      q = work_->mutable_quant(Scratch::kQuant, rows, n);
    }
    if (any_float && norm != nullptr) {
      h = h_out = work_->floats(Scratch::kHidden, rows, n);
    }
    if (many) {
      launch_norm_half(stream_, x, norm, eps, rows, h_out, half);
    } else if (any_tiled || norm != nullptr) {
      launch_norm_quantize(stream_, x, norm, eps, rows, n, h_out, q);
    }
    for (int i = 0; i < n_outs;) {
      int end = i;
      while (end < n_outs && is_quantized(outs[end].w->type) == is_quantized(outs[i].w->type)) ++end;
      if (is_quantized(outs[i].w->type) && many) {
        run_tiled(outs + i, end - i, half, rows, add);
      } else if (is_quantized(outs[i].w->type)) {
        run_tiled(outs + i, end - i, rows_of(q, n), rows, add);
      } else {
        for (int j = i; j < end; ++j) launch_float_matmul(stream_, *outs[j].w, h, rows, outs[j].y, add);
      }
      i = end;
    }
  }

  gpu::DeviceInfo info_;
  gpu::Stream stream_ = nullptr;
  std::unique_ptr<PinnedRing> ring_;
  std::unique_ptr<WeightUpload> upload_;  // while weights are loaded
  std::shared_ptr<void> counters_;
  std::unique_ptr<Workspace> work_;
  std::unique_ptr<Experts> experts_;

  // Whose int8 groups lie in kQuant: attention leaves those of its output for the matmul_add that follows.
  const float* quantized_x_ = nullptr;
  int quantized_rows_ = 0;
  int64_t quantized_n_ = 0;

  // Squares that a norm_matmul of one row left for the qkv_post that follows, if that is of its outputs.
  struct LeftSquares {
    int n = 0;
    const float* y[kMaxOuts];
    const float* squares[kMaxOuts];
    const float* of(const float* output) const {
      for (int i = 0; i < n; ++i) {
        if (y[i] == output) return squares[i];
      }
      return nullptr;
    }
  };
  LeftSquares squares_;

  // A qkv_post that the attention after it takes over, or has leave q in f16; any other call sends it off by itself.
  struct PendingQkv {
    bool waiting = false;
    Step step;
    float* q = nullptr;
    KvLayer kv;
    TakeIn in;
    bool takes_in = false;
  };
  PendingQkv pending_;
  // Attention of many rows: whether its f32 rows are needed the next op says.
  struct LateAttention {
    Attention a;
    Step step;
    const float* q = nullptr;
    bool half_q = false;
    KvLayer kv;
    float* out = nullptr;  // null: nothing waits
    int64_t n = 0;         // n_head * head_dim
  };
  LateAttention late_;

  std::map<std::pair<uint64_t, int>, Recording> recordings_;
  std::pair<uint64_t, int> current_;
  bool in_step_ = false, capturing_ = false, weights_on_their_way_ = false;
  int step_keys_ = 0;
  int64_t calls_ = 0, calls_at_begin_ = 0;
  int64_t calls_at_read_ = 0;  // calls_ when distinct_read_ was read
  int distinct_read_ = 0;
};

}  // namespace

namespace {

std::string unsupported(gpu::Architecture a) { return architecture_problem(DFLASH_GPU_ARCHS, a.major, a.minor); }

}  // namespace

std::string hip_backend_status() {
  const std::string lost = gpu::lost_message();
  if (!lost.empty()) return lost;
  gpu::Status why = gpu::kOk;
  const int n = gpu::device_count(&why);
  if (why != gpu::kOk) return cat("no usable GPU driver: ", gpu::describe(why));
  if (n == 0) return "no GPU found";
  try {
    std::string reason = unsupported(gpu::architecture(0));
    if (reason.empty() && device_runs_kernels(&reason)) return "";
    return cat("this build has no kernels for the GPU here: ", reason,
               "; build with its architecture (-DDFLASH_GPU_ARCH=...)");
  } catch (const Error& e) {
    return e.what();
  }
}

std::unique_ptr<Backend> make_hip_backend(const BackendOptions& options) {
  if (options.precise) fail("backend '", kName, "' has no precise mode; use backend='cpu'");
  const std::string why = hip_backend_status();
  if (!why.empty()) fail("backend '", kName, "': ", why);
  return std::make_unique<HipBackend>();
}

}  // namespace dflash
