#pragma once
// What the kernels offer to the host: one function per launch, shapes in the comments, all on one stream.

#include "backend/backend.h"
#include "backend/hip/layout.h"

namespace dflash::hip {

// The position of a step's first row: a value, or (in a recorded step) a place in device memory.
struct Position {
  const int* device = nullptr;
  int value = 0;
  __device__ int get() const { return device != nullptr ? *device : value; }
};

// ---- norm_rope.hip
// ---------------------------------------------------------------------------------------------------- h = rms_norm(x,
// norm), or x when norm is null. Writes h (when y is not null) and its int8 groups (when q.q is not).
struct MutableQuantRows {
  int8_t* q = nullptr;
  GroupScale* scale = nullptr;
};
void launch_norm_quantize(gpu::Stream s, const float* x, const float* norm, float eps, int rows, int64_t n, float* y,
                          MutableQuantRows q);
void launch_qkv_post(gpu::Stream s, const QkvPost& p, int rows, Position pos0, float* q, float* k, const float* v,
                     const KvLayer& kv);

// ---- matmul.hip
// ------------------------------------------------------------------------------------------------------- outs[i].y
// (+)= outs[i].w * x for up to kMaxOuts weights of one type and n_in.
inline constexpr int kMaxOuts = 4;
struct TiledOut {
  TiledWeight w;
  float* y = nullptr;  // [rows, n_out]
};
void launch_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, QuantRows x, int rows, bool add);

// y (+)= w * x for F32, F16 and BF16 weights in their GGUF rows, f32 activations.
void launch_float_matmul(gpu::Stream s, const Weight& w, const float* x, int rows, float* y, bool add);

// ---- moe.hip, experts_few.hip, experts_many.hip
// ----------------------------------------------------------------------- Which expert computes what. A pair is (row,
// slot), numbered row * top_k + slot; an item is a run of at most `chunk` pairs of one expert.
struct alignas(16) Item {
  int expert, first, count, unused;
};
struct Routing {
  int rows = 0, top_k = 0, chunk = 0, max_items = 0;
  int* n_items = nullptr;    // [1]
  Item* items = nullptr;     // [max_items], by expert; past n_items: count 0
  int* pairs = nullptr;      // [rows * top_k] pair numbers, sorted by expert
  float* weights = nullptr;  // [rows * top_k] by pair number
  int* experts = nullptr;    // [rows * top_k] by pair number
  int* arrived = nullptr;    // counters, zero between launches
  int* distinct = nullptr;   // [1] sum of distinct experts, for take_expert_count
};
inline int max_items(int rows, int top_k, int n_expert, int chunk) {
  const int pairs = rows * top_k;
  return rows <= chunk ? (pairs < n_expert ? pairs : n_expert) : pairs / chunk + n_expert;
}

// h = rms_norm(x), its int8 groups (where hq is not null), logits [rows, n_expert] = router * h, then the choice and
// the grouping. h [rows, n_embd] is written where it is given; it must be when route_needs_hidden().
bool route_needs_hidden(const Moe& m, int rows);
void launch_route(gpu::Stream s, const Moe& m, const float* x, float* h, MutableQuantRows hq, float* logits, Routing r);
// The one expert of a dense feed-forward: every row, weight 1.
void launch_route_dense(gpu::Stream s, Routing r);

// act[pair] = int8 groups of silu(gate x[row]) * up x[row].  x [rows, n_embd], act [pairs, n_ff]
void launch_gate_up(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, QuantRows x,
                    const Routing& r, MutableQuantRows act);
// y[pair] = down act[pair]; x[row] += sum over slots, in order, of weight * y.  y [pairs, n_embd]
void launch_down(gpu::Stream s, DType type, const TiledWeight& down, QuantRows act, const Routing& r, float* y,
                 float* x);
// The same two for float weights and activations: act, y f32; any number of rows.
void launch_float_gate_up(gpu::Stream s, const Weight& gate, const Weight& up, const float* h, const Routing& r,
                          float* act);
void launch_float_down(gpu::Stream s, const Weight& down, const float* act, const Routing& r, float* y, float* x);
void launch_add_experts(gpu::Stream s, const Routing& r, const float* y, int64_t n, float* x);

// matmul_many.hip: more than kFewRows rows
void launch_matmul_many(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, QuantRows x, int rows, bool add);
void launch_gate_up_many(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, QuantRows x,
                         const Routing& r, MutableQuantRows act);
void launch_down_many(gpu::Stream s, DType type, const TiledWeight& down, QuantRows act, const Routing& r, float* y);
inline constexpr int kManyTokens = 64;  // tokens of a tile there

// ---- attention.hip
// ----------------------------------------------------------------------------------------------------
inline constexpr int kAttentionCounters = 32768;  // at least 16 rows of n_head queries
size_t attention_scratch_bytes(const Attention& a, int rows, int n_keys);
// n_keys bounds pos0 + rows (in a recorded step: the whole cache). arrived [kAttentionCounters], zero between launches.
// quant: the int8 groups of out.
void launch_attention(gpu::Stream s, const Attention& a, int rows, Position pos0, int n_keys, const float* q,
                      const KvLayer& kv, float* scratch, int* arrived, float* out, MutableQuantRows quant);

// ---- small_ops.hip
// ----------------------------------------------------------------------------------------------------
void launch_embed(gpu::Stream s, const Weight& table, const int32_t* tokens, int rows, float* x);
void launch_copy_rows(gpu::Stream s, const float* src, int rows, int64_t n, float* dst, int64_t stride);
size_t top1_scratch_bytes(int rows);
void launch_top1(gpu::Stream s, const float* logits, int rows, int64_t n, float* scratch, Top1* out);
// GGUF rows [first_row, first_row + rows) of an expert stack (rows counted through the whole stack) into their tiles.
void launch_repack(gpu::Stream s, DType type, const void* raw, int64_t first_row, int64_t rows, int64_t n_out,
                   int64_t n_in, uint8_t* quants, uint16_t* scales);
void launch_random(gpu::Stream s, DType type, int64_t n_in, int64_t count_quants, int64_t count_scales, void* quants,
                   uint16_t* scales, uint64_t seed);
bool device_runs_kernels(std::string* why);

// Where the planes of a tiled weight lie.
TiledWeight tiled(const Weight& w);

}  // namespace dflash::hip
