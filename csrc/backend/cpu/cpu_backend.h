#pragma once
// The CPU backend: ops of backend.h on a thread pool, inner loops from the kernel table of one instruction set.
//
// Two modes. Fast: activations meet quantised weights as int8 per group of 32 (ActBlock), unquantised weights as f32.
// Precise: f32 activations everywhere, quantised weights decoded exactly. One op at a time per backend.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/row_sampler.h"
#include "core/thread_pool.h"

namespace dflash {

// The instruction sets BackendOptions::cpu_isa may name on this machine, best first.
std::vector<std::string> cpu_isas();

namespace cpu {

// Weight::layout
inline constexpr int kRowsLayout = 0;   // GGUF rows
inline constexpr int kPanelLayout = 1;  // panels of 16 interleaved rows (kernels.h), per expert padded to whole panels

inline constexpr int kMaxTopK = 64;  // experts per token

inline size_t panel_bytes(const Weight& w) { return panel_bytes(w.type, w.n_in); }  // of 16 output rows
inline int64_t panels_of(int64_t n_out) { return (n_out + kPanel - 1) / kPanel; }
// Where a panel lies; null when the rows are as in the GGUF.
inline const uint8_t* panel_at(const Weight& w, int64_t expert, int64_t panel) {
  if (w.layout != kPanelLayout) return nullptr;
  return static_cast<const uint8_t*>(w.data) +
         panel_bytes(w) * static_cast<size_t>(expert * panels_of(w.n_out) + panel);
}

// Memory that grows and keeps its size; contents are lost when it grows.
class Scratch {
 public:
  template <typename T>
  T* get(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > bytes_) {
      data_.reset(new Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]);
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::unique_ptr<Line[]> data_;
  size_t bytes_ = 0;
};

// Rows of activations in the forms that the weights they will meet need.
struct Activations {
  const float* f32 = nullptr;   // [rows, n]
  const ActBlock* q = nullptr;  // [rows, n / 32]
  int64_t n = 0;
  int rows = 0;
};

// Which rows of Activations a product uses: index[i], or first + i when index is null.
struct RowSet {
  const int* index = nullptr;
  int first = 0;
  int count = 0;

  int operator[](int i) const { return index ? index[i] : first + i; }
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options);

  const char* name() const override { return "cpu"; }
  std::string describe() const override;
  MemoryInfo memory() const override;
  bool pages() const override { return true; }

  Buffer alloc(size_t bytes) override;
  void upload(void* dst, const void* src, size_t bytes) override;
  void download(void* dst, const void* src, size_t bytes) override;
  Weight load(const HostTensor& t, std::shared_ptr<const void> keep_alive) override;
  size_t weight_bytes(const HostTensor& t) const override;
  Weight random_weight(DType type, int64_t n_in, int64_t n_out, int64_t n_expert, uint64_t seed) override;

  void embed(const Weight& table, const int32_t* tokens, int rows, float* x) override;
  void rms_norm(const float* x, const float* w, float eps, int rows, int64_t n, float* y) override;
  void norm_matmul(const float* x, const float* norm, float eps, int rows, const MatmulOut* outs, int n_outs) override;
  void matmul_add(const Weight& w, const float* x, int rows, float* y) override;
  void qkv_post(const QkvPost& p, Step step, float* q, float* k, const float* v, const KvLayer& kv) override;
  void attention(const Attention& a, Step step, const float* q, const KvLayer& kv, float* out) override;
  void moe(const Moe& m, int rows, float* x) override;
  void ffn(const Ffn& f, int rows, float* x) override;
  void copy_rows(const float* src, int rows, int64_t n, float* dst, int64_t stride) override;
  void top1(const float* logits, int rows, int64_t n, Top1* out) override;
  int sample(const Sampling& s, float* logits, int64_t n, int32_t* out) override;
  ExpertCount take_expert_count() override;

 private:
  // Vectors are small, and from the embedding table only rows are read.
  static bool read_whole(const HostTensor& t) { return t.n_out > 1 && t.name != "token_embd.weight"; }
  bool repacks(const HostTensor& t) const { return repack_ && read_whole(t); }

  // f(i, thread) for i in [0, n); on the calling thread alone when the loop touches too few bytes to share.
  template <typename F>
  void parallel(int64_t n, size_t bytes, const F& f) {
    if (bytes < kSerialBytes) {
      for (int64_t i = 0; i < n; ++i) f(i, 0);
    } else {
      pool_.parallel_for(n, f);
    }
  }
  static constexpr size_t kSerialBytes = 48 << 10;  // about 2 us of work

  Buffer alloc_huge(size_t bytes);  // at least kMapFrom
  Buffer alloc_weight(size_t bytes);
  bool int8_path(const Weight& w) const { return is_quantized(w.type) && !precise_; }

  // ---- cpu_matmul.cpp
  // Normalises (norm may be null) and quantises as the weights need. Valid until the next call.
  Activations prepare(const float* x, const float* norm, float eps, int rows, int64_t n, bool need_q);
  // y[i * stride + o - 16 * panel] = w[expert, o] . x[rows[i]] for the output rows o of n_panels panels. next: weights
  // this thread will read afterwards (panel_at), or null.
  void multiply(const Weight& w, int64_t expert, int64_t panel, int n_panels, const Activations& x, RowSet rows,
                float* y, int64_t stride, int thread, const uint8_t* next);
  void multiply_panels(const Weight& w, int64_t expert, int64_t panel, int n_panels, const Activations& x, RowSet rows,
                       float* y, int64_t stride, int thread, const uint8_t* next);
  void multiply_floats(const Weight& w, int64_t expert, int64_t panel, int n_panels, const Activations& x, RowSet rows,
                       float* y, int64_t stride, int thread);
  // A rectangle of one product.
  struct Tile {
    int out;
    int64_t panel;
    int n_panels;
    int row, n_rows;
  };
  void make_tiles(const MatmulOut* outs, int n_outs, int rows);
  const uint8_t* weights_after(size_t tile, const MatmulOut* outs) const;

  // ---- cpu_moe.cpp
  // Rows sent to experts, sorted by expert. A pair is (row, place in the row's own list): pair = row * top_k + place.
  struct Routing {
    struct Expert {
      int id;
      int first, count;  // range in pairs and rows
    };
    std::vector<Expert> experts;
    std::vector<int> pairs, rows;
    std::vector<float> weights;  // by pair
    int top_k = 0;
  };
  void route(const Moe& m, const Activations& h);
  void one_expert(int rows);
  // x += sum over each row's pairs, in the order of its list, of weight * down(silu(gate h) * up h).
  void run_experts(const Weight& gate, const Weight& up, const Weight& down, const Activations& h, int rows, float* x);

  // ---- cpu_attention.cpp
  struct RopeTable {
    std::vector<float> inv_freq, cos, sin;  // cos, sin [positions, n_rot / 2]
    std::vector<int> position;              // of each slot; a power of two of them
    float scale = 0.0f;

    size_t slot(int pos) const { return static_cast<size_t>(pos) & (position.size() - 1); }
  };
  const RopeTable& rope_table(const QkvPost& p, Step step);

  ThreadPool pool_;
  const Kernels& k_;
  const bool precise_;
  const bool repack_;
  const std::vector<int> nodes_;  // NUMA nodes that large allocations are interleaved over; empty: none
  ExpertCount count_;
  Buffer arena_;
  size_t arena_used_ = 0;
  RowSampler sampler_;

  struct PerThread {
    Scratch panel, rows, out, gate_up, attention;
  };
  std::vector<PerThread> thread_;
  Scratch normed_, quantised_, logits_, scores_, hidden_f32_, hidden_q_, pair_out_, partial_;
  std::vector<Tile> tiles_;
  Routing routing_;
  std::vector<int> expert_rows_, expert_start_;
  std::vector<RopeTable> rope_;
};

}  // namespace cpu
}  // namespace dflash
