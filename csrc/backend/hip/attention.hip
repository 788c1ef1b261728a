// Attention over a KV cache in fixed splits (flash decoding): a block takes one split of the keys, one KV head and a
// few of the queries that share it; the block that finishes last adds the splits of its queries in order. Where splits
// begin depends on positions alone (short ones first, so that short contexts still spread over the machine), so neither
// a row's splits nor their sums depend on the rows beside it. Prefill takes the same kernel, some rows at a time.
//
// In a split every wave runs on its own, with a running maximum over the keys it takes; the waves are added in order at
// the end. In short splits four lanes share a key (less time to the first result), in long ones a lane has a key.

#include "backend/hip/kernels.h"
#include "backend/hip/norm_rows.h"
#include "backend/hip/rope.h"

namespace dflash::hip {

namespace {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWaves = kAttentionThreads / gpu::kWave;

// Splits of 64 keys up to 512, of 256 up to 8192, of 1024 beyond.
constexpr int kShortEnd = 512, kMiddleEnd = 8192;
constexpr int kFewSplits = 24;  // contexts that leave room for more blocks
// Blocks of a launch of a few rows with fewer queries each (NVIDIA), so that each finishes sooner.
constexpr int kFewRowBlocks = 720;
constexpr int kShortSplits = kShortEnd / 64, kMiddleSplits = (kMiddleEnd - kShortEnd) / 256;

__host__ __device__ inline int split_of(int key) {
  return key < kShortEnd    ? key / 64
         : key < kMiddleEnd ? kShortSplits + (key - kShortEnd) / 256
                            : kShortSplits + kMiddleSplits + (key - kMiddleEnd) / 1024;
}

__host__ __device__ inline int split_begin(int split) {
  return split < kShortSplits                   ? split * 64
         : split < kShortSplits + kMiddleSplits ? kShortEnd + (split - kShortSplits) * 256
                                                : kMiddleEnd + (split - kShortSplits - kMiddleSplits) * 1024;
}

// One query's keys are [first, end).
struct KeyRange {
  int first, end;
};

struct AttentionArgs {
  Attention a;
  Position pos0;
  int row0 = 0;  // first row of this launch within the step
  int rows = 0;  // rows of this launch
  int step_rows = 0;
  int max_splits = 0;
  const float* q = nullptr;  // of the step's row 0
  KvLayer kv;
  float* o = nullptr;      // [rows, n_head, max_splits, head_dim]
  float2* ml = nullptr;    // [rows, n_head, max_splits]: largest score, sum of exponentials
  int* arrived = nullptr;  // [n_head_kv, query blocks], zero between launches
  float* out = nullptr;    // of the step's row 0
  MutableQuantRows quant;
  TakeIn in;
  int norm_threads = 0;  // of the norm's own kernel

  __device__ KeyRange keys(int row) const {
    const int pos = pos0.get() + row0 + row;
    const int end = a.causal ? pos + 1 : pos0.get() + step_rows;
    const int first = a.sliding_window > 0 ? max(0, pos + 1 - a.sliding_window) : 0;
    return {first, end};
  }
};

// N consecutive elements of a key or value row, N a multiple of 4 within one group of 32 (or N = 1, 2).
template <DType T, int N>
__device__ inline void load_elements(const KvLayer& kv, const void* base, int head, int64_t pos, int dim,
                                     float (&v)[N]) {
  if constexpr (T == DType::Q8_0) {
    const int64_t head_bytes = static_cast<int64_t>(kv.n_ctx) * (kv.head_dim / 32) * 34;
    const int8_t* q = static_cast<const int8_t*>(base) + head * head_bytes;
    const uint16_t* scale = reinterpret_cast<const uint16_t*>(q + static_cast<int64_t>(kv.n_ctx) * kv.head_dim);
    const int64_t at = pos * kv.head_dim + dim;
    struct alignas(N) Vector {
      int8_t e[N];
    };
    const Vector r = *reinterpret_cast<const Vector*>(q + at);
    const float d = gpu::half_to_float(scale[at / 32]);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = static_cast<float>(r.e[i]) * d;
  } else {
    using Element = std::conditional_t<T == DType::F32, float, uint16_t>;
    constexpr size_t kBytes = N * sizeof(Element);
    struct alignas(kBytes > 16 ? 16 : kBytes) Vector {
      Element e[N];
    };
    const int64_t at = (static_cast<int64_t>(head) * kv.n_ctx + pos) * kv.head_dim + dim;
    const Vector r = *reinterpret_cast<const Vector*>(static_cast<const Element*>(base) + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (T == DType::F32) {
        v[i] = r.e[i];
      } else {
        v[i] = gpu::half_to_float(r.e[i]);
      }
    }
  }
}

// A wave adds one query's splits in order; a lane holds Dims dimensions.
template <int Dims>
__device__ inline void add_splits(const AttentionArgs& p, int64_t at, const KeyRange& keys, float* out) {
  const int first = split_of(keys.first), last = split_of(keys.end - 1);
  float largest = -INFINITY;
  for (int s = first + gpu::lane(); s <= last; s += gpu::kWave) largest = fmaxf(largest, p.ml[at + s].x);
  largest = gpu::wave_max(largest);
  float sum = 0.0f, o[Dims] = {};
#pragma unroll 4
  for (int s = first; s <= last; ++s) {
    const float2 ml = p.ml[at + s];
    const float w = ml.x == -INFINITY ? 0.0f : expf(ml.x - largest);
    sum = fmaf(w, ml.y, sum);
#pragma unroll
    for (int d = 0; d < Dims; ++d) o[d] = fmaf(w, p.o[(at + s) * (Dims * 32) + gpu::lane() * Dims + d], o[d]);
  }
#pragma unroll
  for (int d = 0; d < Dims; ++d) out[gpu::lane() * Dims + d] = o[d] / sum;
}

// What a wave knows of its queries so far.
template <int Dims, int Queries>
struct WaveState {
  KeyRange keys[Queries];
  float largest[Queries];
  float sum[Queries];      // of the lane's keys
  float o[Queries][Dims];  // the lane's dimensions
};

// Takes in the wave's next gpu::kWave / KeyLanes keys, KeyLanes lanes to a key. [begin, end): keys of the whole block.
template <DType T, int Dims, int Queries, int KeyLanes>
__device__ inline void take_keys(const AttentionArgs& p, int kv_head, int key0, int begin, int end,
                                 const float (&q)[Queries][Dims * 32], float (&e_lds)[Queries][gpu::kWave],
                                 WaveState<Dims, Queries>& w) {
  constexpr int kKeys = gpu::kWave / KeyLanes, kBatch = 8, kHeadDim = Dims * 32;
  if (key0 + kKeys <= begin || key0 >= end) return;
  const int part = gpu::lane() % KeyLanes;
  const int key = key0 + gpu::lane() / KeyLanes;
  const int safe_key = max(begin, min(key, end - 1));
  float score[Queries];
#pragma unroll
  for (int i = 0; i < Queries; ++i) score[i] = 0.0f;
  constexpr int kUnroll = Queries <= 2 ? 4 : gpu::kAttentionUnroll;
#pragma unroll kUnroll
  for (int dim = part * 8; dim < kHeadDim; dim += 8 * KeyLanes) {
    float k[8];
    load_elements<T, 8>(p.kv, p.kv.k, kv_head, safe_key, dim, k);
#pragma unroll
    for (int i = 0; i < Queries; ++i) {
      const float4 a = *reinterpret_cast<const float4*>(&q[i][dim]);
      const float4 b = *reinterpret_cast<const float4*>(&q[i][dim + 4]);
      score[i] = fmaf(a.x, k[0], score[i]);
      score[i] = fmaf(a.y, k[1], score[i]);
      score[i] = fmaf(a.z, k[2], score[i]);
      score[i] = fmaf(a.w, k[3], score[i]);
      score[i] = fmaf(b.x, k[4], score[i]);
      score[i] = fmaf(b.y, k[5], score[i]);
      score[i] = fmaf(b.z, k[6], score[i]);
      score[i] = fmaf(b.w, k[7], score[i]);
    }
  }
  gpu::wave_sync();  // the weights of the step before have been read
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    float s = score[i];
    for (int m = 1; m < KeyLanes; m <<= 1) s += gpu::shuffle_xor(s, m);
    s = key >= w.keys[i].first && key < w.keys[i].end ? s * p.a.scale : -INFINITY;
    float top = fmaxf(w.largest[i], s);
    for (int m = KeyLanes; m < gpu::kWave; m <<= 1) top = fmaxf(top, gpu::shuffle_xor(top, m));
    const float e = s == -INFINITY ? 0.0f : expf(s - top);
    const float keep = w.largest[i] == -INFINITY ? 0.0f : expf(w.largest[i] - top);
    w.sum[i] = fmaf(w.sum[i], keep, part == 0 ? e : 0.0f);
#pragma unroll
    for (int d = 0; d < Dims; ++d) w.o[i][d] *= keep;
    w.largest[i] = top;
    if (part == 0) e_lds[i][gpu::lane() / KeyLanes] = e;
  }
  gpu::wave_sync();
#pragma unroll 1
  for (int j0 = 0; j0 < kKeys; j0 += kBatch) {
    float v[kBatch][Dims];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      load_elements<T, Dims>(p.kv, p.kv.v, kv_head, max(begin, min(key0 + j0 + j, end - 1)), gpu::lane() * Dims, v[j]);
    }
#pragma unroll
    for (int i = 0; i < Queries; ++i) {
#pragma unroll
      for (int j = 0; j < kBatch; j += 4) {
        const float4 e = *reinterpret_cast<const float4*>(&e_lds[i][j0 + j]);
#pragma unroll
        for (int d = 0; d < Dims; ++d) {
          w.o[i][d] = fmaf(e.x, v[j][d], w.o[i][d]);
          w.o[i][d] = fmaf(e.y, v[j + 1][d], w.o[i][d]);
          w.o[i][d] = fmaf(e.z, v[j + 2][d], w.o[i][d]);
          w.o[i][d] = fmaf(e.w, v[j + 3][d], w.o[i][d]);
        }
      }
    }
  }
}

// ---- q, k and v of a few rows as the projections left them
// ------------------------------------------------------------

constexpr int kRotations = 64;  // of a head at most

// What a block has to take in: rows of q, new keys with their values. It follows from positions, so it is known before
// the kernel waits.
struct Intake {
  bool whole;
  int pos0, first_row;
  int new0, n_new;  // rows whose keys belong to this block
  int n_q;          // vectors of q to normalise: rows, or heads
  float4 weight;    // norm weights of the thread's first four elements
};

// Four elements of a head each: q, then k, then v, each list padded to whole waves.
template <int Dims, int Queries>
struct IntakeList {
  static constexpr int kPerHead = Dims * 8, kQ = Queries * kPerHead;
  static constexpr int padded(int n) { return (n + gpu::kWave - 1) / gpu::kWave * gpu::kWave; }
};

template <int Dims, int Queries>
__device__ inline Intake plan_intake(const AttentionArgs& p, int kv_head, int first_query, int last_query, int begin,
                                     int end, float2* rotations) {
  using List = IntakeList<Dims, Queries>;
  const QkvPost& post = p.in.post;
  const int group = p.a.n_head / p.a.n_head_kv, t = static_cast<int>(threadIdx.x);
  Intake n;
  n.whole = post.norm == QkNorm::whole;
  n.pos0 = p.pos0.get();
  n.first_row = first_query / group;
  n.new0 = max(begin - n.pos0, 0);
  n.n_new = max(min(end - n.pos0, p.step_rows) - n.new0, 0);
  n.n_q = n.whole ? last_query / group - n.first_row + 1 : last_query - first_query + 1;
  const int head = kv_head * group + min(first_query + min(t, List::kQ - 1) / List::kPerHead, last_query) % group;
  const int k0 = List::padded(List::kQ), dim = (t < k0 ? t : t - k0) % List::kPerHead * 4;
  const float* norm =
      t < k0 ? post.q_norm + (n.whole ? head * Dims * 32 : 0) : post.k_norm + (n.whole ? kv_head * Dims * 32 : 0);
  n.weight = *reinterpret_cast<const float4*>(norm + dim);
  if (t < post.n_rot / 2) rotations[t] = rotation(post, t, static_cast<float>(n.pos0));
  return n;
}

// Normalises and rotates the block's queries into q_lds, and its KV head's new keys with positions in [begin, end),
// which go to the cache with their values. Blocks with the same new keys store the same bytes. The sums of squares are
// those of norm_rope.hip, in its order: a wave plays the waves of that kernel one after the other.
template <int Dims, int Queries>
__device__ inline void take_in(const AttentionArgs& p, const Intake& n, int kv_head, int first_query, int last_query,
                               float (&q_lds)[Queries][Dims * 32], float (*sums)[gpu::kWave], float* inverse,
                               const float2* rotations) {
  using List = IntakeList<Dims, Queries>;
  constexpr int kHeadDim = Dims * 32, kPerHead = List::kPerHead, kTogether = 5;
  const QkvPost& post = p.in.post;
  const int group = p.a.n_head / p.a.n_head_kv, wave = gpu::wave(), t = static_cast<int>(threadIdx.x);
  auto head_of = [&](int query) { return kv_head * group + query % group; };
  auto q_at = [&](int query) {
    return p.q + (static_cast<int64_t>(query / group) * p.a.n_head + head_of(query)) * kHeadDim;
  };
  auto k_at = [&](int row) { return p.in.k + (static_cast<int64_t>(row) * p.a.n_head_kv + kv_head) * kHeadDim; };
  const int nq = n.whole ? p.a.n_head * kHeadDim : kHeadDim, nk = n.whole ? p.a.n_head_kv * kHeadDim : kHeadDim;
  // waves of the norm's kernel that have elements of q and of k
  const int waves = p.norm_threads / gpu::kWave, wq = min(waves, (nq + 127) / 128), wk = min(waves, (nk + 127) / 128);
  if (n.whole) {
    const int all_q = n.n_q * wq, all = all_q + n.n_new * wk;
    for (int i0 = wave; i0 < all; i0 += kTogether * kAttentionWaves) {
      float squares[kTogether] = {};
      const float* x[kTogether];
      int at[kTogether], size[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = min(i0 + j * kAttentionWaves, all - 1), k = i - all_q;
        x[j] = k < 0 ? p.q + static_cast<int64_t>(n.first_row + i / wq) * nq
                     : p.in.k + static_cast<int64_t>(n.new0 + k / wk) * nk;
        at[j] = ((k < 0 ? i % wq : k % wk) * gpu::kWave + gpu::lane()) * 4;
        size[j] = k < 0 ? nq : nk;
      }
      for (int h = 0; h * p.norm_threads * 4 < nq; ++h) {
        float4 v[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int a = at[j] + h * p.norm_threads * 4;
          v[j] = a < size[j] ? *reinterpret_cast<const float4*>(x[j] + a) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          squares[j] =
              fmaf(v[j].w, v[j].w, fmaf(v[j].z, v[j].z, fmaf(v[j].y, v[j].y, fmaf(v[j].x, v[j].x, squares[j]))));
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = i0 + j * kAttentionWaves, k = i - all_q;
        const float sum = gpu::wave_sum(squares[j]);
        if (gpu::lane() == 0 && i < all) sums[k < 0 ? i / wq : n.n_q + k / wk][k < 0 ? i % wq : k % wk] = sum;
      }
    }
    __syncthreads();
  }
  for (int i = wave; i < n.n_q + n.n_new; i += kAttentionWaves) {
    float sum = 0.0f;
    if (n.whole) {
      sum = gpu::lane() < (i < n.n_q ? wq : wk) ? sums[i][gpu::lane()] : 0.0f;
    } else {
      const float* x = i < n.n_q ? q_at(first_query + i) : k_at(n.new0 + i - n.n_q);
      for (int d = gpu::lane(); d < kHeadDim; d += gpu::kWave) sum = fmaf(x[d], x[d], sum);
    }
    sum = gpu::wave_sum(sum);
    if (gpu::lane() == 0) inverse[i] = 1.0f / sqrtf(sum / static_cast<float>(i < n.n_q ? nq : nk) + post.eps);
  }
  __syncthreads();
  auto turned = [&](const float* x, const float4& weight, float inverse_rms, int dim) {
    const float4 v = times(*reinterpret_cast<const float4*>(x + dim), inverse_rms, weight);
    const float4 other = shuffle_quad(v, post.n_rot / 8);
    if (dim >= post.n_rot) return v;
    return rotate_quad(post, dim, v, other, [&](int j) { return rotations[j]; });
  };
  const int new_quads = n.n_new * kPerHead, k0 = List::padded(List::kQ), v0 = k0 + List::padded(new_quads);
  for (int i0 = t; i0 < v0 + List::padded(new_quads); i0 += kAttentionThreads) {
    if (i0 < k0) {
      const int i = min(i0, List::kQ - 1), query = min(first_query + i / kPerHead, last_query);
      const int dim = i % kPerHead * 4;
      const float4 weight =
          i0 == t ? n.weight
                  : *reinterpret_cast<const float4*>(post.q_norm + (n.whole ? head_of(query) * kHeadDim : 0) + dim);
      const float4 v =
          turned(q_at(query), weight, inverse[n.whole ? query / group - n.first_row : query - first_query], dim);
      if (i0 < List::kQ) reinterpret_cast<float4*>(&q_lds[0][0])[i] = v;
      continue;
    }
    const bool key = i0 < v0;
    const int i = min(i0 - (key ? k0 : v0), new_quads - 1), row = n.new0 + i / kPerHead, dim = i % kPerHead * 4;
    const bool inside = i0 - (key ? k0 : v0) < new_quads;
    if (key) {
      const float4 weight =
          i0 == t ? n.weight : *reinterpret_cast<const float4*>(post.k_norm + (n.whole ? kv_head * kHeadDim : 0) + dim);
      const float4 v = turned(k_at(row), weight, inverse[n.n_q + i / kPerHead], dim);
      store_kv_quad(p.kv, p.kv.k, kv_head, n.pos0 + row, dim, v, inside);
    } else {
      const float4 v = *reinterpret_cast<const float4*>(p.in.v + (k_at(row) - p.in.k) + dim);
      store_kv_quad(p.kv, p.kv.v, kv_head, n.pos0 + row, dim, v, inside);
    }
  }
}

// A hint while the kernel before ends: keys and values [begin, end) of the cache.
__device__ inline void prefetch_keys(const AttentionArgs& p, int kv_head, int begin, int end) {
  if (p.kv.type == DType::Q8_0 || gpu::wave() > 1 || begin >= end) return;
  const int row = p.kv.head_dim * (p.kv.type == DType::F32 ? 4 : 2);
  const char* base = static_cast<const char*>(gpu::wave() == 0 ? p.kv.k : p.kv.v);
  gpu::prefetch(base + (static_cast<int64_t>(kv_head) * p.kv.n_ctx + begin) * row, (end - begin) * row);
}

// grid (query blocks, n_head_kv, splits); Dims: head_dim / 32; Queries of a block share the KV head.
template <DType T, int Dims, int Queries>
__global__ void __launch_bounds__(kAttentionThreads, gpu::kTileBlocks) attention_split_kernel(AttentionArgs p) {
  constexpr int kHeadDim = Dims * 32;
  alignas(16) __shared__ float q_lds[Queries][kHeadDim];  // later: the results
  // sums, 1 / rms and rotations while q, k and v are taken in; later the waves' results
  constexpr int kVectors = Queries + 1, kIntake = kVectors * (gpu::kWave + 1) + 2 * kRotations + 2;
  constexpr int kResults = kAttentionWaves * Queries * kHeadDim;
  alignas(16) __shared__ float pool[gpu::kTakeIn && kIntake > kResults ? kIntake : kResults];
  auto o_lds = reinterpret_cast<float (*)[Queries][kHeadDim]>(pool);
  auto sums = reinterpret_cast<float (*)[gpu::kWave]>(pool);
  float* inverse = pool + kVectors * gpu::kWave;
  float2* rotations = reinterpret_cast<float2*>(pool + (kVectors * (gpu::kWave + 1) + 1) / 2 * 2);
  __shared__ float2 ml_lds[kAttentionWaves][Queries];                        // largest score, sum
  alignas(16) __shared__ float e_lds[kAttentionWaves][Queries][gpu::kWave];  // weights of the wave's keys
  const int group = p.a.n_head / p.a.n_head_kv;
  const int n_queries = p.rows * group;
  const int first_query = static_cast<int>(blockIdx.x) * Queries;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int split = static_cast<int>(blockIdx.z);
  const int last_query = min(first_query + Queries, n_queries) - 1;
  // Rows ascend with queries, so the block's keys lie between its first row's first and its last row's end.
  const int all_first = p.keys(first_query / group).first, all_end = p.keys(last_query / group).end;
  const int begin = max(split_begin(split), all_first), end = min(split_begin(split + 1), all_end);
  if (begin >= end) return;  // others wait
  const int t = static_cast<int>(threadIdx.x);
  prefetch_keys(p, kv_head, begin, min(end, p.pos0.get()));
  Intake intake = {};
  if (gpu::kTakeIn && p.in.k != nullptr) {
    intake = plan_intake<Dims, Queries>(p, kv_head, first_query, last_query, begin, end, rotations);
  }
  gpu::wait_for_previous();
  auto head_of = [&](int query) { return kv_head * group + query % group; };
  constexpr int kQuads = Queries * kHeadDim / 4;
  if (gpu::kTakeIn && p.in.k != nullptr) {
    take_in<Dims, Queries>(p, intake, kv_head, first_query, last_query, q_lds, sums, inverse, rotations);
  }
  for (int i = t; !(gpu::kTakeIn && p.in.k != nullptr) && i < kQuads; i += kAttentionThreads) {
    const int query = min(first_query + i / (kHeadDim / 4), last_query);
    const int64_t row = p.row0 + query / group;
    reinterpret_cast<float4*>(&q_lds[0][0])[i] =
        reinterpret_cast<const float4*>(p.q + (row * p.a.n_head + head_of(query)) * kHeadDim)[i % (kHeadDim / 4)];
  }
  WaveState<Dims, Queries> w;
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    w.keys[i] = p.keys(min(first_query + i, last_query) / group);
    w.largest[i] = -INFINITY;
    w.sum[i] = 0.0f;
#pragma unroll
    for (int d = 0; d < Dims; ++d) w.o[i][d] = 0.0f;
  }
  __syncthreads();
  const int start = split_begin(split), wave = gpu::wave();
  if (split < kShortSplits) {
    take_keys<T, Dims, Queries, 4>(p, kv_head, start + wave * 8, begin, end, q_lds, e_lds[wave], w);
  } else {
    for (int key0 = start + wave * gpu::kWave; key0 < end; key0 += kAttentionThreads) {
      take_keys<T, Dims, Queries, 1>(p, kv_head, key0, begin, end, q_lds, e_lds[wave], w);
    }
  }
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    const float sum = gpu::wave_sum(w.sum[i]);
    if (gpu::lane() == 0) ml_lds[wave][i] = make_float2(w.largest[i], sum);
#pragma unroll
    for (int d = 0; d < Dims; ++d) o_lds[wave][i][gpu::lane() * Dims + d] = w.o[i][d];
  }
  __syncthreads();

  // The waves in order, a wave per query. Where the split is the only one, that is the result; else the last block to
  // finish adds all splits.
  const int first_split = split_of(all_first), last_split = split_of(all_end - 1);
  auto partial_of = [&](int query) {
    return (static_cast<int64_t>(query / group) * p.a.n_head + head_of(query)) * p.max_splits;
  };
  for (int i = gpu::wave(); i < Queries && first_query + i <= last_query; i += kAttentionWaves) {
    float top = -INFINITY, total = 0.0f, r[Dims] = {};
    for (int w = 0; w < kAttentionWaves; ++w) top = fmaxf(top, ml_lds[w][i].x);
    for (int w = 0; w < kAttentionWaves; ++w) {
      const float2 ml = ml_lds[w][i];
      const float scale = ml.x == -INFINITY ? 0.0f : expf(ml.x - top);
      total = fmaf(scale, ml.y, total);
#pragma unroll
      for (int d = 0; d < Dims; ++d) r[d] = fmaf(scale, o_lds[w][i][gpu::lane() * Dims + d], r[d]);
    }
    const int64_t at = partial_of(first_query + i) + split;
#pragma unroll
    for (int d = 0; d < Dims; ++d) {
      if (first_split == last_split) {
        q_lds[i][gpu::lane() * Dims + d] = r[d] / total;
      } else {
        p.o[at * kHeadDim + gpu::lane() * Dims + d] = r[d];
      }
    }
    if (first_split != last_split && gpu::lane() == 0) p.ml[at] = make_float2(top, total);
  }
  if (first_split != last_split) {
    int* counter = p.arrived + kv_head * gridDim.x + blockIdx.x;
    if (!gpu::last_to_arrive(counter, last_split - first_split + 1)) return;
    for (int i = gpu::wave(); i < Queries && first_query + i <= last_query; i += kAttentionWaves) {
      add_splits<Dims>(p, partial_of(first_query + i), p.keys((first_query + i) / group), q_lds[i]);
    }
  }
  __syncthreads();
  for (int i = t; i < (kQuads + 31) / 32 * 32; i += kAttentionThreads) {
    const int local = min(i, kQuads - 1) / (kHeadDim / 4), query = min(first_query + local, last_query);
    const bool write = i < kQuads && first_query + local <= last_query;
    const int64_t at = ((p.row0 + query / group) * static_cast<int64_t>(p.a.n_head) + head_of(query)) * kHeadDim +
                       i % (kHeadDim / 4) * 4;
    const float4 v = reinterpret_cast<const float4*>(&q_lds[0][0])[min(i, kQuads - 1)];
    if (write) *reinterpret_cast<float4*>(p.out + at) = v;
    quantize_quad(v, p.quant.q + (at & ~int64_t{31}), p.quant.scale + at / 32, write);
  }
}

int splits_for(int n_keys) { return split_of(n_keys - 1) + 1; }

size_t bytes_per_row(const Attention& a, int n_keys) {
  return static_cast<size_t>(a.n_head) * static_cast<size_t>(splits_for(n_keys)) *
         (static_cast<size_t>(a.head_dim) * sizeof(float) + sizeof(float2));
}

// Rows of one launch: as many as 64 MiB of partial results and the counters allow, but always those of a verify step.
int rows_per_launch(const Attention& a, int rows, int n_keys) {
  const size_t fit = (size_t{64} << 20) / bytes_per_row(a, n_keys);
  const int floor = 16;
  const int most = kAttentionCounters / a.n_head > floor ? kAttentionCounters / a.n_head : floor;
  const int limit = fit > static_cast<size_t>(most) ? most
                    : static_cast<int>(fit) > floor ? static_cast<int>(fit)
                                                    : floor;
  return rows < limit ? rows : limit;
}

template <DType T, int Dims>
void split(gpu::Stream s, const AttentionArgs& args) {
  const int n_queries = args.rows * (args.a.n_head / args.a.n_head_kv);
  auto run = [&](int queries, auto kernel) {
    const dim3 grid(static_cast<unsigned>((n_queries + queries - 1) / queries), static_cast<unsigned>(args.a.n_head_kv),
                    static_cast<unsigned>(args.max_splits));
    gpu::launch(s, grid, kAttentionThreads, kernel, args);
  };
  const int most_blocks = gpu::kTakeIn && args.rows <= 16 ? kFewRowBlocks : 0;
  auto blocks_of = [&](int queries) {
    return (n_queries + queries - 1) / queries * args.a.n_head_kv * args.max_splits;
  };
  // A query's result does not depend on how many share its block.
  constexpr int kMost = Dims <= 4 ? 8 : 4;
  if (n_queries == 1) {
    run(1, attention_split_kernel<T, Dims, 1>);
  } else if (args.rows == 1 && args.max_splits <= kFewSplits) {
    run(2, attention_split_kernel<T, Dims, 2>);  // more blocks that each finish sooner
  } else if (blocks_of(2) <= most_blocks) {
    run(2, attention_split_kernel<T, Dims, 2>);
  } else if (n_queries <= 4 || blocks_of(4) <= most_blocks) {
    run(4, attention_split_kernel<T, Dims, 4>);
  } else {
    run(kMost, attention_split_kernel<T, Dims, kMost>);
  }
}

template <DType T>
void split_of_type(gpu::Stream s, const AttentionArgs& args) {
  switch (args.a.head_dim) {
    case 32:
      return split<T, 1>(s, args);
    case 64:
      return split<T, 2>(s, args);
    case 128:
      return split<T, 4>(s, args);
    case 256:
      return split<T, 8>(s, args);
    default:
      fail("GPU: attention has head_dim 32, 64, 128 and 256, not ", args.a.head_dim);
  }
}

}  // namespace

size_t attention_scratch_bytes(const Attention& a, int rows, int n_keys) {
  return bytes_per_row(a, n_keys) * static_cast<size_t>(rows_per_launch(a, rows, n_keys));
}

void launch_attention(gpu::Stream s, const Attention& a, int rows, Position pos0, int n_keys, const float* q,
                      const KvLayer& kv, const TakeIn& in, float* scratch, int* arrived, float* out,
                      MutableQuantRows quant) {
  const int chunk = rows_per_launch(a, rows, n_keys);
  AttentionArgs args;
  args.a = a;
  args.pos0 = pos0;
  args.step_rows = rows;
  args.max_splits = splits_for(n_keys);
  args.q = q;
  args.kv = kv;
  args.arrived = arrived;
  args.out = out;
  args.quant = quant;
  args.in = in;
  args.norm_threads = static_cast<int>(norm_threads(static_cast<int64_t>(a.n_head) * a.head_dim));
  args.ml = reinterpret_cast<float2*>(scratch);
  args.o = scratch + 2 * static_cast<int64_t>(chunk) * a.n_head * args.max_splits;
  for (int row = 0; row < rows; row += chunk) {
    args.row0 = row;
    args.rows = rows - row < chunk ? rows - row : chunk;
    switch (kv.type) {
      case DType::F32:
        split_of_type<DType::F32>(s, args);
        break;
      case DType::F16:
        split_of_type<DType::F16>(s, args);
        break;
      case DType::Q8_0:
        split_of_type<DType::Q8_0>(s, args);
        break;
      default:
        fail("GPU: a KV cache is F32, F16 or Q8_0, not ", dtype_info(kv.type).name);
    }
  }
}

}  // namespace dflash::hip
