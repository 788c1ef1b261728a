#pragma once
// What the kernels offer to the host: one function per launch, shapes in the comments, all on one stream.

#include "backend/backend.h"
#include "backend/hip/layout.h"
#include "backend/hip/norm_rows.h"

namespace dflash::hip {

// The position of a step's first row: a value, or (in a recorded step) a place in device memory.
struct Position {
  const int* device = nullptr;
  int value = 0;
  __device__ int get() const { return device != nullptr ? *device : value; }
};

// ---- norm_rope.hip

struct MutableQuantRows {
  int8_t* q = nullptr;
  GroupScale* scale = nullptr;
};
// h = rms_norm(x, norm), or x when norm is null. Writes h (when y is not null) and its int8 groups (when q.q is not).
void launch_norm_quantize(gpu::Stream s, const float* x, const float* norm, float eps, int rows, int64_t n, float* y,
                          MutableQuantRows q);
unsigned norm_threads(int64_t n);  // of a block of norm_quantize and qkv_post
// Whether a rotation's other half is in the same wave when a lane has four elements.
bool rotates_by_quads(const QkvPost& p);
// Whether a block takes q, k and v of a row: only then half_q may be given, for attention_many: q becomes f16, each row
// at the beginning of its f32 place.
bool qkv_post_by_rows(const QkvPost& p, int rows);
void launch_qkv_post(gpu::Stream s, const QkvPost& p, int rows, Position pos0, float* q, float* k, const float* v,
                     const KvLayer& kv, bool half_q = false);

// ---- matmul.hip

inline constexpr int kMaxOuts = 8;
struct TiledOut {
  TiledWeight w;
  float* y = nullptr;  // [rows, n_out]
};
// outs[i].y (+)= outs[i].w * x for up to kMaxOuts weights of one type and n_in.
void launch_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, QuantRows x, int rows, bool add);

// The same of rms_norm(x.x, x.norm) for a few rows, which saves a launch.
bool matmul_can_norm(DType type, const TiledOut* outs, int n_outs, int rows);
// squares: of one row, [tiles of all outputs] tile_squares() of each, or null.
void launch_norm_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, NormInput x, int rows, bool add,
                        float* squares = nullptr);

// act[row] = int8 groups of silu(gate x[row]) * up x[row] for 1..kFewRows rows.  x [rows, n_embd], act [rows, n_ff]
void launch_gate_up_dense(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, QuantRows x,
                          int rows, MutableQuantRows act);

// y (+)= w * x for F32, F16 and BF16 weights in their GGUF rows, f32 activations.
void launch_float_matmul(gpu::Stream s, const Weight& w, const float* x, int rows, float* y, bool add);

// ---- moe.hip, experts_few.hip

// Which expert computes what. A pair is (row, slot), numbered row * top_k + slot; an item is a run of at most `chunk`
// pairs of one expert.
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
  int* distinct = nullptr;   // [1] sum of distinct experts, for take_expert_count
};
inline int max_items(int rows, int top_k, int n_expert, int chunk) {
  const int pairs = rows * top_k;
  return rows <= chunk ? (pairs < n_expert ? pairs : n_expert) : pairs / chunk + n_expert;
}

// Few rows of quantised experts: their kernels take the logits and choose for themselves.
bool experts_choose(int rows, DType type);

// h = rms_norm(x), its int8 groups (where hq is not null), logits [rows, n_expert] = router * h; then, unless
// experts_choose(), the choice and the grouping. h [rows, n_embd] is written where it is given; it must be when
// route_needs_hidden().
bool route_needs_hidden(const Moe& m, int rows);
// The choice and the grouping alone. logits [parts, rows, n_expert], to be added up
void launch_choose(gpu::Stream s, const Moe& m, const float* logits, int parts, Routing r);
void launch_route(gpu::Stream s, const Moe& m, const float* x, float* h, MutableQuantRows hq, float* logits, Routing r);
// The one expert of a dense feed-forward: every row, weight 1.
void launch_route_dense(gpu::Stream s, Routing r);

// experts_few.hip. Whose choice: logits null stands for the one expert of a dense feed-forward.
struct FewChoice {
  const float* logits = nullptr;  // [rows, n_expert]
  const float* bias = nullptr;    // [n_expert] or null
  int n_expert = 1, rows = 0, top_k = 1;
  int* distinct = nullptr;  // [1] sum of distinct experts, for take_expert_count
};
// act[pair] = int8 groups of silu(gate x[row]) * up x[row].  x [rows, n_embd], act [pairs, n_ff]
void launch_gate_up_few(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, QuantRows x,
                        const FewChoice& c, MutableQuantRows act);
// x[row] += sum over slots, in order, of weight * down act[pair].  x [rows, n_embd]
void launch_down_few(gpu::Stream s, DType type, const TiledWeight& down, QuantRows act, const FewChoice& c, float* x);

// experts_stream.hip. Both in one launch, on NVIDIA and for 3 to kStreamRows rows.
inline constexpr int kStreamRows = 8;
struct ExpertWords {          // what blocks leave for each other, see gpu::post
  uint64_t* q = nullptr;      // [pairs, n_ff / 4] int8 of the activations
  uint64_t* scale = nullptr;  // [pairs, n_ff / 32, 2] d and sum of their groups
  uint64_t* y = nullptr;      // [pairs, n_embd in whole tiles] f32 outputs of each expert
  int* launch = nullptr;      // [5] launches so far, blocks of this one that know it; experts_queue's turn and counters
};
size_t expert_words_bytes(int pairs, int64_t n_ff, int64_t n_embd);
bool experts_one_launch(int rows, DType gate_up, DType down);
// memory: expert_words_bytes, zero at first. False: does not fit shared memory, nothing is launched.
bool launch_experts_stream(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up,
                           const TiledWeight& down, QuantRows x, const FewChoice& c, void* memory, int* launch,
                           float* out);
// experts_queue.hip. The same for two rows.
bool launch_experts_queue(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up,
                          const TiledWeight& down, QuantRows x, const FewChoice& c, void* memory, int* launch,
                          float* out);
// experts_row.hip. The same for one row. memory: row_words_bytes, zero at first and used by no other kernel (its words
// lie otherwise)
size_t row_words_bytes(int top_k, int64_t n_ff);
bool launch_experts_row(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up,
                        const TiledWeight& down, QuantRows x, const FewChoice& c, void* memory, int* launch,
                        float* out);

// The same two for float weights and activations: act, y [pairs, n_embd] f32; any number of rows.
void launch_float_gate_up(gpu::Stream s, const Weight& gate, const Weight& up, const float* h, const Routing& r,
                          float* act);
void launch_float_down(gpu::Stream s, const Weight& down, const float* act, const Routing& r, float* y, float* x);
void launch_add_experts(gpu::Stream s, const Routing& r, const float* y, int64_t n, float* x);
// Outputs of pairs [pairs, n] in half the bytes of f32: 16-bit integers (+ 32768) times a scale for each 32 of them,
// which err by NMSE 1e-9 and hold any size, unlike f16. n a multiple of 32
struct PairRows {
  uint16_t* v = nullptr;
  float* scale = nullptr;  // [pairs, n / 32]
  int64_t n = 0;
};
void launch_add_experts(gpu::Stream s, const Routing& r, const PairRows& y, int64_t n, float* x);

// ---- matmul_many.hip, moe_many.hip, attention_many.hip: more than kFewRows rows

// Rows of 16-bit floats [rows, n], the groups of 32 in the order gpu::half_slot(): f16 where a norm or attention bounds
// them, else bf16 (always for the SwiGLU product, which f16 does not hold).
struct HalfRows {
  uint16_t* v = nullptr;
  int64_t n = 0;
  bool f16 = false;
};
inline constexpr int kManyTokens = gpu::kHalfTokens;  // tokens of a block there, at most
// out = rms_norm(x, norm), or x where norm is null; y the same in f32 where it is given. n a multiple of 32
void launch_norm_half(gpu::Stream s, const float* x, const float* norm, float eps, int rows, float* y, HalfRows out);
void launch_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, HalfRows x, int rows, bool add);
// As launch_route, launch_gate_up and launch_down; h is always written. logits [kRouterParts, rows, n_expert]
inline constexpr int kRouterParts = 4;
void launch_route_many(gpu::Stream s, const Moe& m, const float* x, float* h, HalfRows hh, float* logits, Routing r);
void launch_gate_up_many(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, HalfRows x,
                         const Routing& r, HalfRows act);
void launch_down_many(gpu::Stream s, DType type, const TiledWeight& down, HalfRows act, const Routing& r,
                      const PairRows& y, float* x);
// Whether attention_many.hip serves these rows: more than kFewRows over an f16 or q8_0 cache, head_dim 32, 64 or 128.
bool attention_many_takes(const Attention& a, int rows, const KvLayer& kv);
// out [rows, n_head * head_dim] (null: not needed) and the same as 16-bit rows. half_q: q as launch_qkv_post leaves it
// so.
void launch_attention_many(gpu::Stream s, const Attention& a, int rows, Position pos0, const float* q, bool half_q,
                           const KvLayer& kv, float* out, HalfRows half);

// ---- attention.hip

inline constexpr int kAttentionCounters = 32768;  // at least 16 rows of n_head queries
size_t attention_scratch_bytes(const Attention& a, int rows, int n_keys);
// Whether attention itself normalises, rotates and stores q, k, v, with no launch of qkv_post: NVIDIA, one row, norm
// over the whole vector, head_dim 128. (With more rows every block would take in the keys of all of them: 14 us for two
// rows, in a launch of its own 12.) q stays as it was.
bool attention_can_take_in(const QkvPost& p, int rows);
struct TakeIn {
  QkvPost post;
  float* k = nullptr;  // [rows, n_head_kv * head_dim]; null: q, k and v are in order already
  const float* v = nullptr;
  const float* q_squares = nullptr;  // of the tiles of q and k, as launch_norm_matmul leaves them
  const float* k_squares = nullptr;
};
// n_keys bounds pos0 + rows (in a recorded step: the whole cache). arrived [kAttentionCounters], zero between launches.
// quant: the int8 groups of out.
void launch_attention(gpu::Stream s, const Attention& a, int rows, Position pos0, int n_keys, const float* q,
                      const KvLayer& kv, const TakeIn& in, float* scratch, int* arrived, float* out,
                      MutableQuantRows quant);

// ---- small_ops.hip

void launch_embed(gpu::Stream s, const Weight& table, const int32_t* tokens, int rows, float* x);
// At most kSmallUpload bytes, which travel as an argument: sooner than a copy.
inline constexpr size_t kSmallUpload = 64;
void launch_store(gpu::Stream s, void* dst, const void* src, size_t bytes);
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
