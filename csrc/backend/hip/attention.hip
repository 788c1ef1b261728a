// Attention over a KV cache in fixed splits (flash decoding): a block takes one split of the keys, one KV head and a
// few of the queries that share it; where there is more than one split, the block that finishes last adds the splits of
// its queries in order. Where splits begin depends on positions alone, so neither a row's splits nor their sums depend
// on the rows beside it. The first split is long: short contexts need no second one, and adding splits takes longer
// than the keys do.
//
// In a split wave w takes the runs of 16 keys w, w + 16, ... on its own, two lanes to a key, with a running maximum;
// the waves are added in order at the end.

#include "backend/hip/kernels.h"
#include "backend/hip/norm_rows.h"
#include "backend/hip/rope.h"

namespace dflash::hip {

namespace {

constexpr int kAttentionThreads = 512;
constexpr int kAttentionWaves = kAttentionThreads / gpu::kWave;
constexpr int kRun = 16, kKeyLanes = gpu::kWave / kRun;

// A split of 512 keys, then of 256 up to 8192, of 1024 beyond.
constexpr int kFirstEnd = 512, kMiddleEnd = 8192;
constexpr int kMiddleSplits = (kMiddleEnd - kFirstEnd) / 256;

__host__ __device__ inline int split_of(int key) {
  return key < kFirstEnd    ? 0
         : key < kMiddleEnd ? 1 + (key - kFirstEnd) / 256
                            : 1 + kMiddleSplits + (key - kMiddleEnd) / 1024;
}

__host__ __device__ inline int split_begin(int split) {
  return split == 0                  ? 0
         : split < 1 + kMiddleSplits ? kFirstEnd + (split - 1) * 256
                                     : kMiddleEnd + (split - 1 - kMiddleSplits) * 1024;
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

// N consecutive elements of a key or value row as they lie in the cache; N a multiple of 4 within one group of 32 (or
// N = 1, 2).
template <DType T, int N>
struct Elements {
  using Element = std::conditional_t<T == DType::F32, float, std::conditional_t<T == DType::F16, uint16_t, int8_t>>;
  static constexpr size_t kBytes = N * sizeof(Element);
  struct alignas(kBytes > 16 ? 16 : kBytes) Vector {
    Element e[N];
  };
  Vector v;
  uint16_t scale;  // Q8_0

  __device__ inline void load(const KvLayer& kv, const void* base, int head, int64_t pos, int dim) {
    const int64_t at = pos * kv.head_dim + dim;
    if constexpr (T == DType::Q8_0) {
      const int64_t head_bytes = static_cast<int64_t>(kv.n_ctx) * (kv.head_dim / 32) * 34;
      const int8_t* q = static_cast<const int8_t*>(base) + head * head_bytes;
      v = *reinterpret_cast<const Vector*>(q + at);
      scale = reinterpret_cast<const uint16_t*>(q + static_cast<int64_t>(kv.n_ctx) * kv.head_dim)[at / 32];
    } else {
      const int64_t head_at = static_cast<int64_t>(head) * kv.n_ctx * kv.head_dim;
      v = *reinterpret_cast<const Vector*>(static_cast<const Element*>(base) + head_at + at);
    }
  }
  __device__ inline void get(float (&f)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (T == DType::F32) {
        f[i] = v.e[i];
      } else if constexpr (T == DType::F16) {
        f[i] = gpu::half_to_float(v.e[i]);
      } else {
        f[i] = static_cast<float>(v.e[i]) * gpu::half_to_float(scale);
      }
    }
  }
};

// What a wave knows of its queries so far.
template <int Dims, int Queries>
struct WaveState {
  KeyRange keys[Queries];
  float largest[Queries];
  float sum[Queries];      // of the lane's keys
  float o[Queries][Dims];  // the lane's dimensions
};

// The step's own key and value, as the cache holds them from now on; position -1: they are in the cache already.
template <int HeadDim>
struct OwnKey {
  const float* k;
  const float* v;
  int position;
};

// A run of keys: each pair of lanes has a key, 8 dimensions in turn; each lane has some dimensions of all values.
template <DType T, int Dims, bool Hold>
struct Run {
  static constexpr int kPieces = Dims * 32 / (8 * kKeyLanes);
  static constexpr bool kHeld = Hold;
  Elements<T, 8> k[Hold ? kPieces : 1];
  Elements<T, Dims> v[Hold ? kRun : 1];
  const KvLayer* kv;
  int head, key0, begin, end;

  __device__ inline int dim(int piece) const { return (piece * kKeyLanes + gpu::lane() % kKeyLanes) * 8; }
  __device__ inline int safe(int key) const { return max(begin, min(key, end - 1)); }
  // [begin, end): keys of the whole block.
  __device__ inline void load(const KvLayer& from, int kv_head, int first, int block_begin, int block_end) {
    kv = &from;
    head = kv_head;
    key0 = first;
    begin = block_begin;
    end = block_end;
    if constexpr (Hold) {
      const int key = safe(key0 + gpu::lane() / kKeyLanes);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) k[i].load(*kv, kv->k, head, key, dim(i));
#pragma unroll
      for (int j = 0; j < kRun; ++j) v[j].load(*kv, kv->v, head, safe(key0 + j), gpu::lane() * Dims);
    }
  }
  __device__ inline void key_piece(int i, float (&f)[8]) const {
    if constexpr (Hold) {
      k[i].get(f);
    } else {
      Elements<T, 8> e;
      e.load(*kv, kv->k, head, safe(key0 + gpu::lane() / kKeyLanes), dim(i));
      e.get(f);
    }
  }
  __device__ inline void value(int j, float (&f)[Dims]) const {
    if constexpr (Hold) {
      v[j].get(f);
    } else {
      Elements<T, Dims> e;
      e.load(*kv, kv->v, head, safe(key0 + j), gpu::lane() * Dims);
      e.get(f);
    }
  }
};

template <int Dims, int Queries, bool TakeIn, typename R>
__device__ inline void take_run(const R& run, float scale, const float (&q)[Queries][Dims * 32],
                                float (&e_lds)[Queries][kRun], const OwnKey<Dims * 32>& own,
                                WaveState<Dims, Queries>& w) {
  const int key = run.key0 + gpu::lane() / kKeyLanes;
  constexpr int kUnroll = R::kHeld ? R::kPieces : gpu::kAttentionUnroll;
  float score[Queries][4] = {};
#pragma unroll kUnroll
  for (int piece = 0; piece < R::kPieces; ++piece) {
    const int dim = run.dim(piece);
    float k[8];
    run.key_piece(piece, k);
    if (TakeIn && key == own.position) {
#pragma unroll
      for (int i = 0; i < 8; ++i) k[i] = own.k[dim + i];
    }
#pragma unroll
    for (int i = 0; i < Queries; ++i) {
      const float4 a = *reinterpret_cast<const float4*>(&q[i][dim]);
      const float4 b = *reinterpret_cast<const float4*>(&q[i][dim + 4]);
      score[i][0] = fmaf(b.x, k[4], fmaf(a.x, k[0], score[i][0]));
      score[i][1] = fmaf(b.y, k[5], fmaf(a.y, k[1], score[i][1]));
      score[i][2] = fmaf(b.z, k[6], fmaf(a.z, k[2], score[i][2]));
      score[i][3] = fmaf(b.w, k[7], fmaf(a.w, k[3], score[i][3]));
    }
  }
  gpu::wave_sync();  // the weights of the run before have been read
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    float s = (score[i][0] + score[i][1]) + (score[i][2] + score[i][3]);
#pragma unroll
    for (int m = 1; m < kKeyLanes; m <<= 1) s += gpu::shuffle_xor(s, m);
    s = key >= w.keys[i].first && key < w.keys[i].end ? s * scale : -INFINITY;
    float top = fmaxf(w.largest[i], s);
#pragma unroll
    for (int m = kKeyLanes; m < gpu::kWave; m <<= 1) top = fmaxf(top, gpu::shuffle_xor(top, m));
    const float e = s == -INFINITY ? 0.0f : expf(s - top);
    const float keep = w.largest[i] == -INFINITY ? 0.0f : expf(w.largest[i] - top);
    const bool first = gpu::lane() % kKeyLanes == 0;
    w.sum[i] = fmaf(w.sum[i], keep, first ? e : 0.0f);
#pragma unroll
    for (int d = 0; d < Dims; ++d) w.o[i][d] *= keep;
    w.largest[i] = top;
    if (first) e_lds[i][gpu::lane() / kKeyLanes] = e;
  }
  gpu::wave_sync();
  constexpr int kBatch = 8;
#pragma unroll
  for (int j0 = 0; j0 < kRun; j0 += kBatch) {
    float v[kBatch][Dims];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      run.value(j0 + j, v[j]);
      if (TakeIn && run.safe(run.key0 + j0 + j) == own.position) {
#pragma unroll
        for (int d = 0; d < Dims; ++d) v[j][d] = own.v[gpu::lane() * Dims + d];
      }
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

// ---- q, k and v of one row as the projections left them
// ------------------------------------------------------------

constexpr int kRotations = 64;  // of a head at most

// Normalises and rotates a block's queries, and the KV head's new key, which goes to the cache with its value. The sums
// of squares are those of qkv_whole_kernel, in its order: a wave plays some waves of that kernel one after the other.
// Vectors of 128 (four elements a lane): the queries, the key, the value, a wave each.
template <int Queries>
class Intake {
 public:
  static constexpr int kHeadDim = 128, kItems = (Queries + 2 + kAttentionWaves - 1) / kAttentionWaves;
  static constexpr int kParts = kNormThreads / kAttentionThreads, kHeldQ = kTakeInMost / (4 * kNormThreads);

  struct Shared {
    alignas(16) float k[kHeadDim], v[kHeadDim];
    float sums[2][gpu::kWave];
    float2 rotations[kRotations];
  };

  // Before the wait.
  __device__ inline Intake(const AttentionArgs& p, Shared& lds, int kv_head, int first_query, int queries, bool own_key)
      : p_(p), lds_(lds), kv_head_(kv_head), first_head_(kv_head * (p.a.n_head / p.a.n_head_kv) + first_query) {
    const QkvPost& post = p.in.post;
    position_ = p.pos0.get();
    if (static_cast<int>(threadIdx.x) < post.n_rot / 2) {
      lds_.rotations[threadIdx.x] = rotation(post, static_cast<int>(threadIdx.x), static_cast<float>(position_));
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int item = gpu::wave() + i * kAttentionWaves;
      kind_[i] = item < queries ? kQ : own_key && item == Queries ? kK : own_key && item == Queries + 1 ? kV : kNone;
      head_[i] = first_head_ + item;
      const float* norm = kind_[i] == kQ   ? post.q_norm + head_[i] * kHeadDim
                          : kind_[i] == kK ? post.k_norm + kv_head_ * kHeadDim
                                           : nullptr;
      if (norm != nullptr) weight_[i] = reinterpret_cast<const float4*>(norm)[gpu::lane()];
    }
  }

  // After it: everything that has to be read is on its way.
  __device__ inline void load() {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int h = 0; h < kHeldQ; ++h) q_[i][h] = quad(p_.q, part_at(i) + h * p_.norm_threads * 4, n_q(), i);
    }
    k_ = quad(p_.in.k, part_at(0), n_k(), 0);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float* x = kind_[i] == kQ   ? p_.q + head_[i] * kHeadDim
                       : kind_[i] == kK ? p_.in.k + kv_head_ * kHeadDim
                                        : p_.in.v + kv_head_ * kHeadDim;
      if (kind_[i] != kNone) item_[i] = reinterpret_cast<const float4*>(x)[gpu::lane()];
    }
  }

  __device__ inline void run(float (&q_lds)[Queries][kHeadDim]) {
    float sum[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      sum[i] = 0.0f;
#pragma unroll
      for (int h = 0; h < kHeldQ; ++h) sum[i] = add_squares(q_[i][h], sum[i]);
    }
    float sum_k = add_squares(k_, 0.0f);
#pragma unroll
    for (int m = gpu::kWave / 2; m > 0; m >>= 1) {  // as wave_sum
#pragma unroll
      for (int i = 0; i < kParts; ++i) sum[i] += gpu::shuffle_xor(sum[i], m);
      sum_k += gpu::shuffle_xor(sum_k, m);
    }
    if (gpu::lane() == 0) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        lds_.sums[0][i * kAttentionWaves + gpu::wave()] = sum[i];
        lds_.sums[1][i * kAttentionWaves + gpu::wave()] = i == 0 ? sum_k : 0.0f;
      }
    }
    __syncthreads();
    const QkvPost& post = p_.in.post;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (kind_[i] == kNone) continue;
      const int dim = gpu::lane() * 4;
      float4 r = item_[i];
      if (kind_[i] != kV) {
        const float squares = gpu::wave_sum(lds_.sums[kind_[i] == kQ ? 0 : 1][gpu::lane()]);
        const int n = kind_[i] == kQ ? n_q() : n_k();
        r = times(r, 1.0f / sqrtf(squares / static_cast<float>(n) + post.eps), weight_[i]);
        const float4 other = shuffle_quad(r, post.n_rot / 8);
        if (dim < post.n_rot) r = rotate_quad(post, dim, r, other, [&](int j) { return lds_.rotations[j]; });
      }
      float* to = &q_lds[min(head_[i] - first_head_, Queries - 1)][0];
      if (kind_[i] != kQ) {
        const bool key = kind_[i] == kK;
        r = store_kv_quad(p_.kv, key ? p_.kv.k : p_.kv.v, kv_head_, position_, dim, r, true);
        to = key ? lds_.k : lds_.v;
      }
      *reinterpret_cast<float4*>(to + dim) = r;
    }
  }

 private:
  enum Kind { kNone, kQ, kK, kV };
  __device__ inline int n_q() const { return p_.a.n_head * kHeadDim; }
  __device__ inline int n_k() const { return p_.a.n_head_kv * kHeadDim; }
  __device__ inline int part_at(int i) const {
    return ((i * kAttentionWaves + gpu::wave()) * gpu::kWave + gpu::lane()) * 4;
  }
  // Four elements, or zeros where the norm's kernel has no thread or no element.
  __device__ inline float4 quad(const float* x, int at, int n, int part) const {
    const bool there = part_at(part) < p_.norm_threads * 4 && at < n;
    return there ? *reinterpret_cast<const float4*>(x + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  static __device__ inline float add_squares(const float4& v, float s) {
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, s))));
  }

  const AttentionArgs& p_;
  Shared& lds_;
  int kv_head_, first_head_, position_;
  Kind kind_[kItems];
  int head_[kItems];
  float4 weight_[kItems], item_[kItems];
  float4 q_[kParts][kHeldQ], k_;
};

// A hint while the kernel before ends: keys and values [begin, end) of the cache.
__device__ inline void prefetch_keys(const AttentionArgs& p, int kv_head, int begin, int end) {
  if (p.kv.type == DType::Q8_0 || gpu::wave() > 1 || begin >= end) return;
  const int row = p.kv.head_dim * (p.kv.type == DType::F32 ? 4 : 2);
  const char* base = static_cast<const char*>(gpu::wave() == 0 ? p.kv.k : p.kv.v);
  gpu::prefetch(base + (static_cast<int64_t>(kv_head) * p.kv.n_ctx + begin) * row, (end - begin) * row);
}

// grid (query blocks, n_head_kv, splits); Dims: head_dim / 32; Queries of a block share the KV head. TakeIn: q, k and v
// of one row are as the projections left them.
template <DType T, int Dims, int Queries, bool TakeIn>
__global__ void __launch_bounds__(kAttentionThreads) attention_split_kernel(AttentionArgs p) {
  constexpr int kHeadDim = Dims * 32;
  constexpr bool kHold = T == DType::F16 && Dims <= 4 && Queries <= 2;
  alignas(16) __shared__ float q_lds[Queries][kHeadDim];
  __shared__ float o_lds[kAttentionWaves][Queries][kHeadDim];
  __shared__ float2 ml_lds[kAttentionWaves][Queries];                  // largest score, sum
  alignas(16) __shared__ float e_lds[kAttentionWaves][Queries][kRun];  // weights of the wave's keys
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
  const int t = static_cast<int>(threadIdx.x), wave = gpu::wave();
  prefetch_keys(p, kv_head, begin, min(end, p.pos0.get()));
  auto head_of = [&](int query) { return kv_head * group + query % group; };
  int key0 = split_begin(split) + wave * kRun;
  if (begin > key0) key0 += (begin - key0) / (kAttentionWaves * kRun) * (kAttentionWaves * kRun);
  Run<T, Dims, kHold> run;
  OwnKey<kHeadDim> own = {nullptr, nullptr, -1};
  if constexpr (TakeIn) {
    __shared__ typename Intake<Queries>::Shared lds;
    const int position = p.pos0.get();
    own = {lds.k, lds.v, position};
    Intake<Queries> intake(p, lds, kv_head, first_query, last_query - first_query + 1, end > position);
    gpu::wait_only();
    intake.load();
    run.load(p.kv, kv_head, key0, begin, end);
    intake.run(q_lds);
    gpu::release_next();
  } else {
    gpu::wait_for_previous();
    for (int i = t; i < Queries * kHeadDim / 4; i += kAttentionThreads) {
      const int query = min(first_query + i / (kHeadDim / 4), last_query);
      const int64_t row = p.row0 + query / group;
      reinterpret_cast<float4*>(&q_lds[0][0])[i] =
          reinterpret_cast<const float4*>(p.q + (row * p.a.n_head + head_of(query)) * kHeadDim)[i % (kHeadDim / 4)];
    }
    run.load(p.kv, kv_head, key0, begin, end);
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
#pragma unroll 1
  while (key0 < end) {
    if (key0 + kRun > begin) take_run<Dims, Queries, TakeIn>(run, p.a.scale, q_lds, e_lds[wave], own, w);
    key0 += kAttentionWaves * kRun;
    if (key0 < end) run.load(p.kv, kv_head, key0, begin, end);
  }
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    const float sum = gpu::wave_sum(w.sum[i]);
    if (gpu::lane() == 0) ml_lds[wave][i] = make_float2(w.largest[i], sum);
#pragma unroll
    for (int d = 0; d < Dims; ++d) o_lds[wave][i][gpu::lane() * Dims + d] = w.o[i][d];
  }
  __syncthreads();

  // The waves in order, a thread for a dimension of a query: a wave has a group of 32 of the result.
  const int first_split = split_of(all_first), last_split = split_of(all_end - 1);
  auto partial_of = [&](int query) {
    return (static_cast<int64_t>(query / group) * p.a.n_head + head_of(query)) * p.max_splits;
  };
  auto finish = [&](int query, int dim, float v) {
    const int64_t at = ((p.row0 + query / group) * static_cast<int64_t>(p.a.n_head) + head_of(query)) * kHeadDim + dim;
    p.out[at] = v;
    quantize_group(v, p.quant.q + (at & ~int64_t{31}), p.quant.scale + at / 32);
  };
  const int n_results = (last_query - first_query + 1) * kHeadDim;
  for (int i = t; i < n_results; i += kAttentionThreads) {
    const int local = i / kHeadDim, dim = i % kHeadDim;
    float2 ml = make_float2(-INFINITY, 0.0f);  // a lane has a wave's
    if (gpu::lane() < kAttentionWaves) ml = ml_lds[gpu::lane()][local];
    const float top = gpu::wave_max(ml.x), scale = ml.x == -INFINITY ? 0.0f : expf(ml.x - top);
    const float total = gpu::wave_sum(scale * ml.y);
    float r = 0.0f;
#pragma unroll
    for (int v = 0; v < kAttentionWaves; ++v) r = fmaf(gpu::shuffle(scale, v), o_lds[v][local][dim], r);
    if (first_split == last_split) {
      finish(first_query + local, dim, r / total);
    } else {
      const int64_t at = partial_of(first_query + local) + split;
      p.o[at * kHeadDim + dim] = r;
      if (dim == 0) p.ml[at] = make_float2(top, total);
    }
  }
  if (first_split == last_split) return;
  int* counter = p.arrived + kv_head * gridDim.x + blockIdx.x;
  if (!gpu::last_to_arrive(counter, last_split - first_split + 1)) return;
  for (int i = t; i < n_results; i += kAttentionThreads) {
    const int query = first_query + i / kHeadDim, dim = i % kHeadDim;
    const KeyRange keys = p.keys(query / group);
    const int64_t at = partial_of(query);
    const int first = split_of(keys.first), last = split_of(keys.end - 1);
    float top = -INFINITY, total = 0.0f, r = 0.0f;
    for (int s = first + gpu::lane(); s <= last; s += gpu::kWave) top = fmaxf(top, gpu::load_fresh(&p.ml[at + s].x));
    top = gpu::wave_max(top);
#pragma unroll 4
    for (int s = first; s <= last; ++s) {
      const float largest = gpu::load_fresh(&p.ml[at + s].x), sum = gpu::load_fresh(&p.ml[at + s].y);
      const float scale = largest == -INFINITY ? 0.0f : expf(largest - top);
      total = fmaf(scale, sum, total);
      r = fmaf(scale, gpu::load_fresh(&p.o[(at + s) * kHeadDim + dim]), r);
    }
    finish(query, dim, r / total);
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
  auto blocks_of = [&](int queries) {
    return (n_queries + queries - 1) / queries * args.a.n_head_kv * args.max_splits;
  };
  auto launch = [&](int queries, auto kernel) {
    const dim3 grid(static_cast<unsigned>((n_queries + queries - 1) / queries), static_cast<unsigned>(args.a.n_head_kv),
                    static_cast<unsigned>(args.max_splits));
    gpu::launch(s, grid, kAttentionThreads, kernel, args);
  };
  auto run = [&](auto queries) {
    constexpr int kQueries = decltype(queries)::value;
    if constexpr (gpu::kTakeIn && Dims == 4) {
      if (args.in.k != nullptr) return launch(kQueries, attention_split_kernel<T, Dims, kQueries, true>);
    }
    launch(kQueries, attention_split_kernel<T, Dims, kQueries, false>);
  };
  // Blocks with fewer queries finish sooner, as long as all are at work at the same time. A query's result does not
  // depend on how many share its block.
  const int most_blocks = 3 * gpu::compute_units();
  constexpr int kMost = Dims <= 4 ? 4 : 2;
  if (n_queries == 1 || blocks_of(1) <= most_blocks) {
    run(std::integral_constant<int, 1>{});
  } else if (n_queries == 2 || blocks_of(2) <= most_blocks) {
    run(std::integral_constant<int, 2>{});
  } else {
    run(std::integral_constant<int, kMost>{});
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
