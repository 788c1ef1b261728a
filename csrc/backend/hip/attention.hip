// Attention over a KV cache in fixed splits (flash decoding): a block takes one split of the keys, one KV head and a
// few of the queries that share it; where there is more than one split, the block that finishes last adds the splits of
// its queries in order. Where splits begin depends on positions alone, so neither a row's splits nor their sums depend
// on the rows beside it. Splits are long: short contexts need no second one, and adding splits takes longer than the
// keys do.
//
// In a split wave w takes the runs w, w + 16, ... of keys on its own, with a running maximum; the waves are added in
// order at the end. Runs of the first split have 16 keys, so that all waves soon have one; later runs have 32, two of
// them a lane's: a query read from shared memory then serves two keys.

#include "backend/hip/attention_run.h"
#include "backend/hip/gpu_blocks.h"
#include "backend/hip/kernels.h"
#include "backend/hip/norm_rows.h"
#include "backend/hip/rope.h"

namespace dflash::hip {

namespace {

constexpr int kAttentionThreads = 512;
constexpr int kAttentionWaves = kAttentionThreads / gpu::kWave;

// Splits of 512 keys up to 8192, of 1024 beyond.
constexpr int kShort = 512, kLong = 1024, kShortEnd = 8192, kShortSplits = kShortEnd / kShort;

__host__ __device__ inline int split_of(int key) {
  return key < kShortEnd ? key / kShort : kShortSplits + (key - kShortEnd) / kLong;
}

__host__ __device__ inline int split_begin(int split) {
  return split < kShortSplits ? split * kShort : kShortEnd + (split - kShortSplits) * kLong;
}

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

  // position: the step's.
  __device__ KeyRange keys(int row, int position) const {
    const int pos = position + row0 + row;
    const int end = a.causal ? pos + 1 : position + step_rows;
    const int first = a.sliding_window > 0 ? max(0, pos + 1 - a.sliding_window) : 0;
    return {first, end};
  }
};

// ---- q, k and v of one row as the projections left them

constexpr int kRotations = 64;  // of a head at most

// Normalises and rotates a block's queries, and the KV head's new key, which goes to the cache with its value. The sums
// of squares are those of qkv_whole_kernel; those of tiles come from the product before. Vectors of 128 (four elements
// a lane): the queries, the key, the value, a wave each. The last waves: with few keys they have nothing else to do.
template <DType T, int Queries>
class Intake {
 public:
  static constexpr int kHeadDim = 128, kItems = (Queries + 2 + kAttentionWaves - 1) / kAttentionWaves;
  static constexpr int kFours = kTakeInMost / (4 * kTile * gpu::kWave);  // sums of four tiles a lane has

  struct Shared {
    alignas(16) OwnElement<T> k[kHeadDim];
    alignas(16) OwnElement<T> v[kHeadDim];
    float2 rotations[kRotations];
  };

  // Before the wait, with a barrier.
  __device__ inline Intake(const AttentionArgs& p, Shared& lds, int position, int kv_head, int first_query, int queries,
                           bool own_key)
      : p_(p),
        lds_(lds),
        kv_head_(kv_head),
        first_head_(kv_head * (p.a.n_head / p.a.n_head_kv) + first_query),
        position_(position) {
    const QkvPost& post = p.in.post;
    const int rotation_at = kAttentionThreads - 1 - static_cast<int>(threadIdx.x);
    if (rotation_at < post.n_rot / 2) {
      lds.rotations[rotation_at] = rotation(static_cast<float>(position) * post.inv_freq[rotation_at], post.rope_scale);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int item = kAttentionWaves - 1 - gpu::wave() + i * kAttentionWaves;
      kind_[i] = item < queries ? kQ : own_key && item == Queries ? kK : own_key && item == Queries + 1 ? kV : kNone;
      head_[i] = first_head_ + item;
      const float* norm = kind_[i] == kQ   ? post.q_norm + head_[i] * kHeadDim
                          : kind_[i] == kK ? post.k_norm + kv_head_ * kHeadDim
                                           : nullptr;
      if (norm != nullptr) weight_[i] = reinterpret_cast<const float4*>(norm)[gpu::lane()];
    }
    __syncthreads();
  }

  // After it: everything that has to be read is on its way.
  __device__ inline void load() {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float* x = kind_[i] == kQ   ? p_.q + head_[i] * kHeadDim
                       : kind_[i] == kK ? p_.in.k + kv_head_ * kHeadDim
                                        : p_.in.v + kv_head_ * kHeadDim;
      if (kind_[i] != kNone) item_[i] = reinterpret_cast<const float4*>(x)[gpu::lane()];
      const float* squares = kind_[i] == kQ ? p_.in.q_squares : p_.in.k_squares;
      const int fours = (kind_[i] == kQ ? n_q() : kind_[i] == kK ? n_k() : 0) / (4 * kTile);
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        const int at = gpu::lane() + j * gpu::kWave;
        squares_[i][j] =
            at < fours ? reinterpret_cast<const float4*>(squares)[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  }

  __device__ inline void run(float (&q_lds)[Queries][kHeadDim]) {
    const QkvPost& post = p_.in.post;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (kind_[i] == kNone) continue;
      const int dim = gpu::lane() * 4;
      float4 r = item_[i];
      if (kind_[i] != kV) {
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kFours; ++j) squares += sum_of_four(squares_[i][j]);
        squares = gpu::wave_sum(squares);
        const int n = kind_[i] == kQ ? n_q() : n_k();
        r = times(r, inverse_rms(squares, n, post.eps), weight_[i]);
        const float4 other = shuffle_quad(r, post.n_rot / 8);
        if (dim < post.n_rot) r = rotate_quad(post, dim, r, other, [&](int j) { return lds_.rotations[j]; });
      }
      if (kind_[i] == kQ) {
        *reinterpret_cast<float4*>(&q_lds[min(head_[i] - first_head_, Queries - 1)][dim]) = r;
        continue;
      }
      const bool key = kind_[i] == kK;
      KvLayer kv = p_.kv;
      kv.type = T;  // known to the compiler
      r = store_kv_quad(kv, key ? kv.k : kv.v, kv_head_, position_, dim, r, true);
      OwnElement<T>* const to = (key ? lds_.k : lds_.v) + dim;
      to[0] = own_element<T>(r.x), to[1] = own_element<T>(r.y), to[2] = own_element<T>(r.z),
      to[3] = own_element<T>(r.w);
    }
  }

 private:
  enum Kind { kNone, kQ, kK, kV };
  __device__ inline int n_q() const { return p_.a.n_head * kHeadDim; }
  __device__ inline int n_k() const { return p_.a.n_head_kv * kHeadDim; }

  const AttentionArgs& p_;
  Shared& lds_;
  int kv_head_, first_head_, position_;
  Kind kind_[kItems];
  int head_[kItems];
  float4 weight_[kItems], item_[kItems];
  float4 squares_[kItems][kFours];
};

// A hint while the kernel before ends: keys and values [begin, end) of the cache.
__device__ inline void prefetch_keys(const AttentionArgs& p, int kv_head, int begin, int end) {
  if (p.kv.type == DType::Q8_0 || gpu::wave() > 1 || begin >= end) return;
  const int row = p.kv.head_dim * (p.kv.type == DType::F32 ? 4 : 2);
  const char* base = static_cast<const char*>(gpu::wave() == 0 ? p.kv.k : p.kv.v);
  gpu::prefetch(base + (static_cast<int64_t>(kv_head) * p.kv.n_ctx + begin) * row, (end - begin) * row);
}

// grid (query blocks, n_head_kv, splits); Dims: head_dim / 32; Queries of a block share the KV head. TakeIn: q, k and v
// of one row are as the projections left them. OneSplit: no query of the launch has a second split.
template <DType T, int Dims, int Queries, bool TakeIn, bool OneSplit>
__global__ void __launch_bounds__(kAttentionThreads) attention_split_kernel(AttentionArgs p) {
  constexpr int kHeadDim = Dims * 32;
  constexpr bool kHold = T == DType::F16 && Dims <= 4 && Queries <= 2;
  alignas(16) __shared__ float q_lds[Queries][kHeadDim];
  constexpr int kFit = 4096 / (Queries * kHeadDim),
                kTogether = kFit < kAttentionWaves ? kFit : kAttentionWaves;  // waves added up at a time
  __shared__ float o_lds[kTogether][Queries][kHeadDim];
  __shared__ KeyRange keys_lds[Queries];
  __shared__ float2 ml_lds[kAttentionWaves][Queries];                       // largest score, sum
  alignas(16) __shared__ float e_lds[kAttentionWaves][Queries][kLaterRun];  // weights of the wave's keys
  const int group = p.a.n_head / p.a.n_head_kv;
  const int n_queries = p.rows * group;
  const int first_query = static_cast<int>(blockIdx.x) * Queries;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int split = OneSplit ? 0 : static_cast<int>(blockIdx.z);
  const int last_query = min(first_query + Queries, n_queries) - 1;
  const int position = p.pos0.get();
  // One row's queries are taken in, so their row needs no division.
  auto row_of = [&](int query) { return TakeIn ? 0 : query / group; };
  // Rows ascend with queries, so the block's keys lie between its first row's first and its last row's end.
  const int all_first = p.keys(row_of(first_query), position).first, all_end = p.keys(row_of(last_query), position).end;
  const int begin = max(split_begin(split), all_first), end = min(split_begin(split + 1), all_end);
  if (!OneSplit && begin >= end) return;  // others wait; one split is never empty
  const int t = static_cast<int>(threadIdx.x), wave = gpu::wave();
  prefetch_keys(p, kv_head, begin, min(end, position));
  auto head_of = [&](int query) { return kv_head * group + query - row_of(query) * group; };
  using FirstRun = Run<T, Dims, kFirstKeyLanes, kFirstLaneKeys, kHold>;
  using LaterRun = Run<T, Dims, kLaterKeyLanes, kLaterLaneKeys, false>;
  const int wave_key0 = wave * FirstRun::kKeys;
  FirstRun run;  // split 0
  OwnKey<T> own = {nullptr, nullptr, -1};
  if (t < Queries) keys_lds[t] = p.keys(row_of(min(first_query + t, last_query)), position);
  if constexpr (TakeIn) {
    __shared__ typename Intake<T, Queries>::Shared lds;
    own = {lds.k, lds.v, position};
    // With one split the key is here, and no wave has to know the position before it asks for q.
    Intake<T, Queries> intake(p, lds, position, kv_head, first_query, last_query - first_query + 1,
                              OneSplit || end > position);
    gpu::wait_only();
    intake.load();
    if ((OneSplit || split == 0) && wave_key0 < end) run.load(p.kv, kv_head, wave_key0, begin, end);
    intake.run(q_lds);
    gpu::release_next();
  } else {
    gpu::wait_for_previous();
    for (int i = t; i < Queries * kHeadDim / 4; i += kAttentionThreads) {
      const int query = min(first_query + i / (kHeadDim / 4), last_query);
      const int64_t row = p.row0 + row_of(query);
      reinterpret_cast<float4*>(&q_lds[0][0])[i] =
          reinterpret_cast<const float4*>(p.q + (row * p.a.n_head + head_of(query)) * kHeadDim)[i % (kHeadDim / 4)];
    }
    if ((OneSplit || split == 0) && wave_key0 < end) run.load(p.kv, kv_head, wave_key0, begin, end);
  }
  WaveState<Dims, Queries> w;
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    w.largest[i] = -INFINITY;
    w.sum[i] = 0.0f;
#pragma unroll
    for (int d = 0; d < Dims; ++d) w.o[i][d] = 0.0f;
  }
  __syncthreads();
  if (OneSplit || split == 0) {
#pragma unroll 1
    for (int key0 = wave_key0; key0 < end;) {
      if constexpr (TakeIn) run.take_own(own, key0);
      if (key0 + FirstRun::kKeys > begin)
        take_run<T, Dims, Queries, TakeIn>(run, p.kv, p.a.scale * kLog2E, q_lds, keys_lds, e_lds[wave], own, w);
      key0 += kAttentionWaves * FirstRun::kKeys;
      if (key0 < end) run.load(p.kv, kv_head, key0, begin, end);
    }
  } else {
    LaterRun later;
#pragma unroll 1
    for (int key0 = split_begin(split) + wave * kLaterRun; key0 < end; key0 += kAttentionWaves * kLaterRun) {
      later.load(p.kv, kv_head, key0, begin, end);
      if (key0 + kLaterRun > begin)
        take_run<T, Dims, Queries, TakeIn>(later, p.kv, p.a.scale * kLog2E, q_lds, keys_lds, e_lds[wave], own, w);
    }
  }
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    const float sum = gpu::wave_sum(w.sum[i]);
    if (gpu::lane() == 0) ml_lds[wave][i] = make_float2(w.largest[i], sum);
  }

  // The waves in order, a thread for a dimension of a query: a wave has a group of 32 of the result.
  const int first_split = split_of(all_first), last_split = split_of(all_end - 1);
  const bool only = OneSplit || first_split == last_split;
  auto partial_of = [&](int query) {
    return (static_cast<int64_t>(row_of(query)) * p.a.n_head + head_of(query)) * p.max_splits;
  };
  auto finish = [&](int query, int dim, float v) {
    const int64_t at = ((p.row0 + row_of(query)) * static_cast<int64_t>(p.a.n_head) + head_of(query)) * kHeadDim + dim;
    p.out[at] = v;
    quantize_group(v, p.quant.q + (at & ~int64_t{31}), p.quant.scale + at / 32);
  };
  const int n_results = (last_query - first_query + 1) * kHeadDim;
  constexpr int kResults = (Queries * kHeadDim + kAttentionThreads - 1) / kAttentionThreads;
  float r[kResults] = {}, total[kResults] = {}, top[kResults], scale[kResults];  // scale: a lane has a wave's
#pragma unroll
  for (int wave0 = 0; wave0 < kAttentionWaves; wave0 += kTogether) {
    if (wave0 > 0) __syncthreads();
    if (wave >= wave0 && wave < wave0 + kTogether) {
#pragma unroll
      for (int i = 0; i < Queries; ++i) {
#pragma unroll
        for (int d = 0; d < Dims; ++d) o_lds[wave - wave0][i][gpu::lane() * Dims + d] = w.o[i][d];
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kResults; ++n) {
      const int i = t + n * kAttentionThreads, local = i / kHeadDim, dim = i % kHeadDim;
      if (i >= n_results) continue;
      if (wave0 == 0) {
        float2 ml = make_float2(-INFINITY, 0.0f);
        if (gpu::lane() < kAttentionWaves) ml = ml_lds[gpu::lane()][local];
        top[n] = gpu::wave_max(ml.x);
        scale[n] = ml.x == -INFINITY ? 0.0f : exp2f(ml.x - top[n]);
      }
#pragma unroll
      for (int v = 0; v < kTogether; ++v) {
        const float s = gpu::broadcast(scale[n], wave0 + v);
        r[n] = fmaf(s, o_lds[v][local][dim], r[n]);
        total[n] = fmaf(s, ml_lds[wave0 + v][local].y, total[n]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kResults; ++n) {
    const int i = t + n * kAttentionThreads, local = i / kHeadDim, dim = i % kHeadDim;
    if (i >= n_results) continue;
    if (only) {
      finish(first_query + local, dim, r[n] * gpu::reciprocal(total[n]));
    } else {
      const int64_t at = partial_of(first_query + local) + split;
      p.o[at * kHeadDim + dim] = r[n];
      if (dim == 0) p.ml[at] = make_float2(top[n], total[n]);
    }
  }
  if (only) return;
  int* counter = p.arrived + kv_head * gridDim.x + blockIdx.x;
  if (!gpu::last_to_arrive(counter, last_split - first_split + 1)) return;
  for (int i = t; i < n_results; i += kAttentionThreads) {
    const int query = first_query + i / kHeadDim, dim = i % kHeadDim;
    const KeyRange keys = p.keys(row_of(query), position);
    const int64_t at = partial_of(query);
    const int first = split_of(keys.first), last = split_of(keys.end - 1);
    float top = -INFINITY, total = 0.0f, r = 0.0f;
    for (int s = first + gpu::lane(); s <= last; s += gpu::kWave) top = fmaxf(top, gpu::load_fresh(&p.ml[at + s].x));
    top = gpu::wave_max(top);
#pragma unroll 4
    for (int s = first; s <= last; ++s) {
      const float largest = gpu::load_fresh(&p.ml[at + s].x), sum = gpu::load_fresh(&p.ml[at + s].y);
      const float scale = largest == -INFINITY ? 0.0f : exp2f(largest - top);
      total = fmaf(scale, sum, total);
      r = fmaf(scale, gpu::load_fresh(&p.o[(at + s) * kHeadDim + dim]), r);
    }
    finish(query, dim, r * gpu::reciprocal(total));
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
    auto of_splits = [&](auto one) {
      constexpr bool kOne = decltype(one)::value;
      if constexpr (gpu::kTakeIn && Dims == 4) {
        if (args.in.k != nullptr) return launch(kQueries, attention_split_kernel<T, Dims, kQueries, true, kOne>);
      }
      launch(kQueries, attention_split_kernel<T, Dims, kQueries, false, kOne>);
    };
    args.max_splits == 1 ? of_splits(std::true_type{}) : of_splits(std::false_type{});
  };
  // A multiprocessor has room for one block with several queries. Blocks with fewer queries finish sooner, as long as
  // all are at work at the same time. A query's result does not depend on how many share its block.
  const int units = gpu::compute_units();
  if (n_queries == 1 || blocks_of(1) <= units) {
    run(std::integral_constant<int, 1>{});
  } else if (n_queries == 2 || blocks_of(2) <= units || Dims > 4) {
    run(std::integral_constant<int, 2>{});
  } else if constexpr (Dims <= 4) {
    if (n_queries <= 4 || blocks_of(4) <= units) {
      run(std::integral_constant<int, 4>{});
    } else if (blocks_of(6) == blocks_of(8)) {
      run(std::integral_constant<int, 6>{});
    } else {
      run(std::integral_constant<int, 8>{});
    }
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
