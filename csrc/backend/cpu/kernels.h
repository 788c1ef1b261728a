#pragma once
// The inner loops of the CPU backend, one table of functions per instruction set. All tables give the same bits:
//  * quantised dot products: exact integer sums per group of 32, then acc = fma(float(sum), dw * da, acc) over the
//    groups in order (Q4_1 adds acc = fma(m, da * float(sum of activations), acc));
//  * float dot products: 16 lanes, lane j takes elements j, j + 16, ... by fma, then the tree
//    (j, j + 8), (j, j + 4), (j, j + 2), (j, j + 1);
//  * attention scores: one fma per dim in order; values: one fma per position in order;
//  * everything else: the same f32 operations in the same order (kernels.inc, compiled once per instruction set).

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "quant/dtype.h"

#define DFLASH_UNROLL _Pragma("GCC unroll 32")  // arrays of registers stay in registers

namespace dflash::cpu {

inline constexpr int kPanel = 16;     // output rows a quantised kernel handles together
inline constexpr int kMaxRows = 16;   // activation rows per kernel call, at most
inline constexpr int kKvChunk = 256;  // key positions per attention split, counted from position 0

// 32 activations: x[i] = q[i] * d. d stays f32 (layer 61 of M2.7 overflows f16). bias8 = -8 times the sum of q, what
// the nibbles' offset of 8 adds to a dot product (bytes, offset by 128: 16 times that).
struct ActBlock {
  float d;
  int32_t bias8;
  int8_t q[32];
};
static_assert(sizeof(ActBlock) == 40);

// A panel is 16 weight rows interleaved so that one vector lane is one output row. Per group of 32 columns:
//   Q4_0: f16 d[16]            then 4 x 64 bytes: byte 4 r + i of vector v holds columns 4 v + i (low nibble) and
//   Q4_1: f16 d[16], f16 m[16]                    16 + 4 v + i (high nibble) of row r, as in the GGUF block
//   Q8_0: f16 d[16]            then 8 x 64 bytes: byte 4 r + i of vector v holds column 4 v + i of row r, plus 128
// Rows past the end of the matrix are zero blocks.
constexpr size_t panel_group_bytes(DType type) { return static_cast<size_t>(kPanel) * row_bytes(type, 32); }

// Panels of unquantised types: 16 rows interleaved 16 columns at a time, the last columns padded with zeros.
constexpr size_t panel_bytes(DType type, int64_t n_in) {
  return static_cast<size_t>(kPanel) * row_bytes(type, is_quantized(type) ? n_in : (n_in + 15) / 16 * 16);
}

// Keys are cached in blocks of 16 positions, so that one vector lane is one key and scores need no horizontal sums.
//   F32, F16: dim i of position j at element 16 i + j of the block
//   Q8_0: per 32 dims: f16 d[16], then byte 16 i + j
// Values are cached as rows.
inline constexpr int kKeyBlock = 16;

// The query heads of one KV head, for some rows. Row r sees the keys [begin, end[r]) of one chunk; end does not fall.
struct AttentionChunk {
  DType type = DType::F16;
  const uint8_t* k = nullptr;  // position 0 of this KV head, key blocks
  const uint8_t* v = nullptr;
  const float* q = nullptr;  // row r, head h: q + r * q_stride + h * head_dim
  int64_t q_stride = 0;
  int n_rows = 0;
  int n_head = 0;    // query heads sharing this KV head
  int head_dim = 0;  // multiple of 16
  float scale = 0.0f;
  int begin = 0;
  const int* end = nullptr;  // [n_rows]
  // Results per row and head: max score, sum of exp(score - max), sum of exp(score - max) * v.
  float* max = nullptr;  // max + r * state_stride + h
  float* sum = nullptr;  // sum + r * state_stride + h
  int64_t state_stride = 0;
  float* acc = nullptr;  // acc + r * acc_stride + h * head_dim
  int64_t acc_stride = 0;
};

struct Kernels {
  const char* name;
  int panel_rows;  // activation rows that panels() takes at a time; float_rows() and float_panels() take kMaxRows

  // y[i] of n elements in blocks of 32; n is a multiple of 32.
  void (*quantize)(const float* x, int64_t n, ActBlock* y);
  // y[r][16 p ...] for n_panels consecutive panels and m <= panel_rows rows of activations. next: the weights that will
  // be read after these (null: what follows them), fetched towards the end. cached: these were read just now.
  void (*panels)(DType type, const uint8_t* w, int n_panels, int64_t n_groups, const ActBlock* const* x, int m,
                 float* const* y, const uint8_t* next, bool cached);
  // Interleaves n_rows <= 16 GGUF rows into one panel.
  void (*pack_panel)(DType type, const uint8_t* rows, int n_rows, int64_t n_groups, uint8_t* panel);
  // y[r][i] for n_rows consecutive weight rows of an unquantised type, m <= kMaxRows: GGUF rows, or the rows of panels.
  void (*float_rows)(DType type, const uint8_t* w, int64_t n, int n_rows, const float* const* x, int m,
                     float* const* y);
  void (*float_panels)(DType type, const uint8_t* w, int64_t n, int n_rows, const float* const* x, int m,
                       float* const* y);

  void (*rms_norm)(const float* x, const float* w, float eps, int64_t n, float* y);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
  void (*sigmoid)(const float* x, int64_t n, float* y);
  void (*add)(const float* x, int64_t n, float* y);                                         // y += x
  void (*weighted_sum)(const float* w, const float* const* x, int k, int64_t n, float* y);  // y += sum w[i] x[i]
  void (*rotate)(float* x, const float* cos, const float* sin, int half);                   // NEOX pairs (i, i + half)
  void (*store_key)(DType type, const float* x, int64_t n, int lane, uint8_t* block);  // position lane of a key block
  void (*store_value)(DType type, const float* x, int64_t n, uint8_t* y);
  void (*attention_chunk)(const AttentionChunk& a);
  // Adds a chunk's result (max, sum, acc) to a running one.
  void (*attention_merge)(float* max, float* sum, float* acc, float chunk_max, float chunk_sum, const float* chunk_acc,
                          int head_dim);
  void (*scale)(float s, int64_t n, float* x);  // x *= s
  // Greedy choice, softmax probability of it, distance to the second logit.
  void (*top1)(const float* logits, int64_t n, int32_t* id, float* prob, float* margin);
};

}  // namespace dflash::cpu
