#pragma once
// THE contract between models and hardware: one method per op, shapes in the comment.
//
// Every pointer to activations, tokens or weights is in backend memory (host memory for the CPU, device memory for
// HIP). Rows are tokens at consecutive positions of one timeline. All matrices are row major.
//
// Batch invariance, the rule all ops keep: a row's result does not depend on which other rows travel with it, nor on
// how many. Dot products over a group of 32 are exact integer sums (fast mode); the floating-point accumulation over
// groups has one fixed order; attention splits depend on positions only; expert outputs are added in the order of the
// row's own top-k list. Residual stream, router and all sums are f32. The GPU keeps the rule among 1..16 rows (all that
// decoding and verifying use) and among more than 16 (prefill), which have other kernels and other roundings.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend/sampling.h"
#include "quant/dtype.h"

namespace dflash {

// A tensor in host memory (usually a view into a mapped GGUF). ne as in ggml: fastest first.
struct HostTensor {
  std::string name;
  DType type = DType::F32;
  int64_t n_in = 0;      // ne[0]: row length
  int64_t n_out = 1;     // ne[1]: rows
  int64_t n_expert = 1;  // ne[2]: stacked matrices
  const void* data = nullptr;
  size_t bytes = 0;
  bool file_mapping = false;  // data lies in a read-only file mapping: a backend that copies may drop its pages
  std::string path{};         // where the bytes can be read instead, when not empty: this file,
  uint64_t file_offset = 0;   // from here on
};

// A matrix, or a stack of n_expert matrices, in backend memory. Plain value: the owner keeps the memory alive.
struct Weight {
  DType type = DType::F32;
  int64_t n_in = 0;
  int64_t n_out = 0;
  int64_t n_expert = 1;
  int layout = 0;  // backend-private: 0 = GGUF rows as they are; others name a repacked order
  const void* data = nullptr;
  std::shared_ptr<const void> owner;

  size_t bytes() const { return static_cast<size_t>(n_expert) * static_cast<size_t>(n_out) * row_bytes(type, n_in); }
};

// Uninitialised backend memory, freed with the last copy.
struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  std::shared_ptr<void> owner;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

struct MemoryInfo {
  size_t total = 0;  // bytes
  size_t free = 0;   // bytes
  std::string hint;  // how this machine could have more, when there is a way
};

// One layer's K and V, head-major so that a head's keys are one stream: [n_head_kv, n_ctx, head_dim] of type
// F32, F16 or Q8_0. Only the ops read it: a backend may order the elements of 16 positions of a head as it likes.
struct KvLayer {
  void* k = nullptr;
  void* v = nullptr;
  DType type = DType::F16;
  int n_head_kv = 0;
  int head_dim = 0;
  int n_ctx = 0;  // allocated positions, a multiple of 16
};

// Rows at positions pos0 .. pos0 + rows - 1.
struct Step {
  int rows = 0;
  int pos0 = 0;
};

enum class QkNorm { whole, per_head };  // MiniMax-M2: over the whole vector; Qwen3 (DFlash): per head

// RoPE is NEOX (rotate-half) over the first n_rot dims of a head: pair (i, i + n_rot/2).
struct QkvPost {
  int n_head = 0;
  int n_head_kv = 0;
  int head_dim = 0;
  int n_rot = 0;
  QkNorm norm = QkNorm::whole;
  const float* q_norm = nullptr;    // [n_head * head_dim] or [head_dim]
  const float* k_norm = nullptr;    // [n_head_kv * head_dim] or [head_dim]
  const float* inv_freq = nullptr;  // [n_rot / 2], backend memory; position * inv_freq[i] is the angle
  float rope_scale = 1.0f;          // factor on cos and sin (YaRN's attention factor)
  float eps = 1e-6f;
};

struct Attention {
  int n_head = 0;
  int n_head_kv = 0;
  int head_dim = 0;
  float scale = 0.0f;      // head_dim^-0.5
  bool causal = true;      // row i sees keys < pos0 + i + 1; otherwise every row sees keys < pos0 + rows
  int sliding_window = 0;  // > 0: row i sees only keys > pos0 + i - sliding_window
};

struct Moe {
  int n_expert = 0;
  int top_k = 0;
  float eps = 1e-6f;
  const float* norm = nullptr;     // [n_embd] post-attention RMSNorm
  const Weight* router = nullptr;  // F32 [n_expert, n_embd]
  const float* bias = nullptr;     // [n_expert] added to sigmoid(logit) for the choice only
  const Weight* gate = nullptr;    // [n_expert, n_ff, n_embd]
  const Weight* up = nullptr;      // [n_expert, n_ff, n_embd]
  const Weight* down = nullptr;    // [n_expert, n_embd, n_ff]
};

struct Ffn {
  float eps = 1e-6f;
  const float* norm = nullptr;   // [n_embd]
  const Weight* gate = nullptr;  // [n_ff, n_embd]
  const Weight* up = nullptr;    // [n_ff, n_embd]
  const Weight* down = nullptr;  // [n_embd, n_ff]
};

struct MatmulOut {
  const Weight* w = nullptr;
  float* y = nullptr;  // [rows, w->n_out]
};

// Greedy choice of a row of logits. Ties go to the lowest id.
struct Top1 {
  int32_t id = 0;
  float prob = 0.0f;    // softmax probability of id
  float margin = 0.0f;  // top-1 logit minus top-2 logit
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Short name ("cpu", "hip") and one line for people ("cpu avx512vnni, 2 threads, int8 activations").
  virtual const char* name() const = 0;
  virtual std::string describe() const = 0;
  virtual MemoryInfo memory() const = 0;
  virtual bool pages() const { return false; }  // more memory than is free can be had, slowly
  virtual int n_threads() const { return 1; }
  virtual bool asynchronous() const { return false; }  // ops return before their work is done

  // ---- memory -------------------------------------------------------------------------------------------------
  virtual Buffer alloc(size_t bytes) = 0;  // 64-byte aligned; throws CapacityError
  virtual void upload(void* dst, const void* src, size_t bytes) = 0;
  virtual void download(void* dst, const void* src, size_t bytes) = 0;  // waits for everything queued before
  // Takes a GGUF tensor over: maps, copies or repacks it. keep_alive owns t.data (a mapped file).
  virtual Weight load(const HostTensor& t, std::shared_ptr<const void> keep_alive) = 0;
  virtual void loaded() {}  // no load() follows for now: staging memory may go
  // Memory that t will take while the model runs: of its own, or page cache where the file's mapping is used as it is
  // (0 when only a little of the tensor is read).
  virtual size_t weight_bytes(const HostTensor& t) const = 0;
  // Random weights of a given shape, generated in backend memory, deterministic in seed (benchmarks and tests).
  virtual Weight random_weight(DType type, int64_t n_in, int64_t n_out, int64_t n_expert, uint64_t seed) = 0;

  // ---- ops ----------------------------------------------------------------------------------------------------
  // x[r] = table[tokens[r]].  tokens [rows], table [n_vocab, n_embd], x [rows, n_embd]
  virtual void embed(const Weight& table, const int32_t* tokens, int rows, float* x) = 0;

  // y[r] = x[r] / rms(x[r]) * w.  x, y [rows, n], w [n]; y may be x
  virtual void rms_norm(const float* x, const float* w, float eps, int rows, int64_t n, float* y) = 0;

  // outs[i].y = outs[i].w * h, h = rms_norm(x, norm) when norm is not null, else x. All weights share n_in.
  // x [rows, n_in]
  virtual void norm_matmul(const float* x, const float* norm, float eps, int rows, const MatmulOut* outs,
                           int n_outs) = 0;

  // y[r] += w * x[r].  x [rows, n_in], y [rows, n_out]
  virtual void matmul_add(const Weight& w, const float* x, int rows, float* y) = 0;

  // Normalises and rotates q in place (skipped when q is null) and k, and stores k, v at positions
  // pos0 .. pos0 + rows - 1 of the cache.  q [rows, n_head * head_dim], k, v [rows, n_head_kv * head_dim]
  virtual void qkv_post(const QkvPost& p, Step step, float* q, float* k, const float* v, const KvLayer& kv) = 0;

  // out[r, h] = softmax(q[r, h] . K[h / (n_head / n_head_kv)] * scale) V.  q, out [rows, n_head * head_dim]. A backend
  // may do qkv_post's work here, when it was called just before on the same rows: afterwards q is undefined. Where
  // matmul_add of all of out follows at once, out may stay unwritten.
  virtual void attention(const Attention& a, Step step, const float* q, const KvLayer& kv, float* out) = 0;

  // x += sum over the row's top_k experts e of weight_e * down_e(silu(gate_e h) * up_e h), h = rms_norm(x, norm).
  // logits = router h; s = sigmoid(logits); experts = top_k of s + bias (ties: lowest id), in descending order;
  // weight_e = s_e / sum of the chosen s.  x [rows, n_embd]
  virtual void moe(const Moe& m, int rows, float* x) = 0;

  // x += down(silu(gate h) * up h), h = rms_norm(x, norm).  x [rows, n_embd]
  virtual void ffn(const Ffn& f, int rows, float* x) = 0;

  // dst[r * stride + i] = src[r * n + i] for i < n: a tap's column block of the concatenated features.
  virtual void copy_rows(const float* src, int rows, int64_t n, float* dst, int64_t stride) = 0;

  // out[r] for each row of logits [rows, n]; out is host memory (this call waits for the result).
  virtual void top1(const float* logits, int rows, int64_t n, Top1* out) = 0;

  // out[r] = the token of row r of logits [s.rows(), n], for r = 0, 1, ... while drafts stand: up to and with the first
  // row whose token is not s.drafts[r] (s.all_rows: every row). Returns how many. logits may be overwritten; out
  // [s.rows()] is host memory (this call waits for the result). Throws Error for a row in which every token is
  // forbidden.
  virtual int sample(const Sampling& s, float* logits, int64_t n, int32_t* out) = 0;

  // ---- steps that repeat --------------------------------------------------------------------------------------
  // For one key, the ops between begin_step and end_step are the same calls with the same pointers and rows every time;
  // only step.pos0 and the contents of memory differ, and no call among them waits (upload, download, top1, alloc). A
  // backend may record them once and replay: begin_step then returns true, everything is queued already, and the caller
  // skips the ops and end_step.
  virtual bool begin_step(uint64_t /*key*/, Step /*step*/) { return false; }
  virtual void end_step() {}

  // ---- observation --------------------------------------------------------------------------------------------
  // Distinct experts read by the last moe() call of each layer since the last reset, summed, and the calls.
  struct ExpertCount {
    int64_t distinct = 0;
    int64_t calls = 0;
  };
  virtual ExpertCount take_expert_count() { return {}; }
};

struct BackendOptions {
  std::string name = "auto";     // auto | cpu | hip
  int n_threads = 0;             // 0: one for each core this process may use
  bool precise = false;          // f32 activations (CPU)
  std::string cpu_isa = "auto";  // auto | plain | avx2 | avxvnni | avx512vnni | amx | neon | neon_dotprod | neon_i8mm
  bool repack = true;            // CPU: repack weights at load where that pays
  // CPU, memory of machines with several NUMA nodes: interleave | off (where it is first touched) | auto (interleave
  // when the threads may run on more than one node)
  std::string numa = "auto";
};

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);

}  // namespace dflash
