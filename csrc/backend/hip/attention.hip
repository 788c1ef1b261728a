// Attention over a KV cache in fixed splits (flash decoding): a block takes one split of kSplitKeys keys, one KV head and
// a few of the queries that share it; a second kernel adds a query's splits in order. Splits are cut at multiples of
// kSplitKeys from position 0, so neither a row's splits nor their sums depend on the rows beside it. Prefill takes the
// same two kernels, some rows at a time.

#include "backend/hip/kernels.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

constexpr int kAttentionThreads = kSplitKeys;  // a thread per key
constexpr int kAttentionWaves = kAttentionThreads / gpu::kWave;

// One query's keys are [first, end).
struct KeyRange {
  int first, end;
};

struct AttentionArgs {
  Attention a;
  Position pos0;
  int row0 = 0;     // first row of this launch within the step
  int rows = 0;     // rows of this launch
  int step_rows = 0;
  int max_splits = 0;
  const float* q = nullptr;  // of the step's row 0
  KvLayer kv;
  float* o = nullptr;   // [rows, n_head, max_splits, head_dim]
  float2* ml = nullptr; // [rows, n_head, max_splits]: largest score, sum of exponentials

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

// grid (query blocks, n_head_kv, splits); Dims: head_dim / 32; Queries of a block share the KV head.
template <DType T, int Dims, int Queries>
__global__ void __launch_bounds__(kAttentionThreads) attention_split_kernel(AttentionArgs p) {
  constexpr int kHeadDim = Dims * 32;
  __shared__ float q_lds[Queries][kHeadDim];
  __shared__ float p_lds[Queries][kSplitKeys];
  __shared__ float wave_lds[2][Queries][kAttentionWaves];
  __shared__ float o_lds[kAttentionWaves / 2][Queries][kHeadDim];
  gpu::wait_for_previous();
  const int group = p.a.n_head / p.a.n_head_kv;
  const int n_queries = p.rows * group;
  const int first_query = static_cast<int>(blockIdx.x) * Queries;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int split = static_cast<int>(blockIdx.z);
  const int last_query = min(first_query + Queries, n_queries) - 1;
  // Rows ascend with queries, so the block's keys lie between its first row's first and its last row's end.
  const int key0 = split * kSplitKeys;
  const int end = min(p.keys(last_query / group).end - key0, kSplitKeys);
  const int begin = max(p.keys(first_query / group).first - key0, 0);
  if (begin >= end) return;
  const int t = static_cast<int>(threadIdx.x);
  auto head_of = [&](int query) { return kv_head * group + query % group; };
  for (int i = t; i < Queries * kHeadDim; i += kAttentionThreads) {
    const int query = min(first_query + i / kHeadDim, last_query);
    const int64_t row = p.row0 + query / group;
    q_lds[i / kHeadDim][i % kHeadDim] = p.q[(row * p.a.n_head + head_of(query)) * kHeadDim + i % kHeadDim];
  }
  __syncthreads();

  // Scores: a thread per key.
  float score[Queries];
#pragma unroll
  for (int i = 0; i < Queries; ++i) score[i] = 0.0f;
  if (t >= begin && t < end) {
#pragma unroll 4
    for (int d = 0; d < kHeadDim; d += 8) {
      float k[8];
      load_elements<T, 8>(p.kv, p.kv.k, kv_head, key0 + t, d, k);
#pragma unroll
      for (int i = 0; i < Queries; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(&q_lds[i][d]);
        const float4 b = *reinterpret_cast<const float4*>(&q_lds[i][d + 4]);
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
  }
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    const KeyRange keys = p.keys(min(first_query + i, last_query) / group);
    const bool seen = key0 + t >= keys.first && key0 + t < keys.end;
    score[i] = seen ? score[i] * p.a.scale : -INFINITY;
    const float largest = gpu::wave_max(score[i]);
    if (gpu::lane() == 0) wave_lds[0][i][gpu::wave()] = largest;
  }
  __syncthreads();
  float largest[Queries];
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    largest[i] = wave_lds[0][i][0];
    for (int w = 1; w < kAttentionWaves; ++w) largest[i] = fmaxf(largest[i], wave_lds[0][i][w]);
    const float e = score[i] == -INFINITY ? 0.0f : expf(score[i] - largest[i]);
    p_lds[i][t] = e;
    const float sum = gpu::wave_sum(e);
    if (gpu::lane() == 0) wave_lds[1][i][gpu::wave()] = sum;
  }
  __syncthreads();

  // Values: a wave takes its 32 keys, a lane Dims consecutive dimensions.
  float o[Queries][Dims];
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
#pragma unroll
    for (int d = 0; d < Dims; ++d) o[i][d] = 0.0f;
  }
  const int k_begin = max(gpu::wave() * gpu::kWave, begin), k_end = min((gpu::wave() + 1) * gpu::kWave, end);
#pragma unroll 4
  for (int k = k_begin; k < k_end; ++k) {
    float v[Dims];
    load_elements<T, Dims>(p.kv, p.kv.v, kv_head, key0 + k, gpu::lane() * Dims, v);
#pragma unroll
    for (int i = 0; i < Queries; ++i) {
      const float e = p_lds[i][k];
#pragma unroll
      for (int d = 0; d < Dims; ++d) o[i][d] = fmaf(e, v[d], o[i][d]);
    }
  }
  // The waves in a fixed tree: the upper half of those left is added to the lower half.
  for (int left = kAttentionWaves / 2; left > 0; left /= 2) {
    if (gpu::wave() >= left && gpu::wave() < 2 * left) {
#pragma unroll
      for (int i = 0; i < Queries; ++i) {
#pragma unroll
        for (int d = 0; d < Dims; ++d) o_lds[gpu::wave() - left][i][gpu::lane() * Dims + d] = o[i][d];
      }
    }
    __syncthreads();
    if (gpu::wave() < left) {
#pragma unroll
      for (int i = 0; i < Queries; ++i) {
#pragma unroll
        for (int d = 0; d < Dims; ++d) o[i][d] += o_lds[gpu::wave()][i][gpu::lane() * Dims + d];
      }
    }
    __syncthreads();
  }
  if (gpu::wave() != 0) return;
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    const int query = first_query + i;
    if (query > last_query) continue;
    const int64_t at = (static_cast<int64_t>(query / group) * p.a.n_head + head_of(query)) * p.max_splits + split;
#pragma unroll
    for (int d = 0; d < Dims; ++d) p.o[at * kHeadDim + gpu::lane() * Dims + d] = o[i][d];
    float sum = 0.0f;
    for (int w = 0; w < kAttentionWaves; ++w) sum += wave_lds[1][i][w];
    if (gpu::lane() == 0) p.ml[at] = make_float2(largest[i], sum);
  }
}

// grid (n_head, rows), a thread per dimension: the splits of a query added in order, and int8 groups of the result.
__global__ void __launch_bounds__(256) attention_add_kernel(AttentionArgs p, float* out, MutableQuantRows quant) {
  gpu::wait_for_previous();
  const int head = static_cast<int>(blockIdx.x), row = static_cast<int>(blockIdx.y);
  const int d = static_cast<int>(threadIdx.x), head_dim = p.a.head_dim;
  const KeyRange keys = p.keys(row);
  const int first = keys.first / kSplitKeys, last = (keys.end - 1) / kSplitKeys;
  const int64_t at = (static_cast<int64_t>(row) * p.a.n_head + head) * p.max_splits;
  float largest = -INFINITY;
  for (int s = first; s <= last; ++s) largest = fmaxf(largest, p.ml[at + s].x);
  float sum = 0.0f, o = 0.0f;
#pragma unroll 4
  for (int s = first; s <= last; ++s) {
    const float2 ml = p.ml[at + s];
    const float w = expf(ml.x - largest);
    sum = fmaf(w, ml.y, sum);
    o = fmaf(w, p.o[(at + s) * head_dim + d], o);
  }
  const float v = o / sum;
  const int64_t index = (static_cast<int64_t>(p.row0 + row) * p.a.n_head + head) * head_dim + d;
  out[index] = v;
  if (quant.q != nullptr) quantize_group(v, quant.q + (index & ~int64_t{31}), quant.scale + index / 32);
}

int splits_for(int n_keys) { return (n_keys + kSplitKeys - 1) / kSplitKeys; }

size_t bytes_per_row(const Attention& a, int n_keys) {
  return static_cast<size_t>(a.n_head) * static_cast<size_t>(splits_for(n_keys)) *
         (static_cast<size_t>(a.head_dim) * sizeof(float) + sizeof(float2));
}

// Rows of one launch: as many as 64 MiB of partial results allow, but always those of a decode or verify step.
int rows_per_launch(const Attention& a, int rows, int n_keys) {
  const size_t fit = (size_t{64} << 20) / bytes_per_row(a, n_keys);
  const int floor = 16;
  const int limit = fit > 1024 ? 1024 : static_cast<int>(fit) > floor ? static_cast<int>(fit) : floor;
  return rows < limit ? rows : limit;
}

template <DType T, int Dims>
void split(gpu::Stream s, const AttentionArgs& args) {
  const int n_queries = args.rows * (args.a.n_head / args.a.n_head_kv);
  auto run = [&](int queries, auto kernel) {
    const dim3 grid(static_cast<unsigned>((n_queries + queries - 1) / queries),
                    static_cast<unsigned>(args.a.n_head_kv), static_cast<unsigned>(args.max_splits));
    gpu::launch(s, grid, kAttentionThreads, kernel, args);
  };
  // A query's result does not depend on how many share its block.
  constexpr int kMost = Dims <= 4 ? 8 : 4;
  if (n_queries == 1) {
    run(1, attention_split_kernel<T, Dims, 1>);
  } else if (n_queries <= 4) {
    run(4, attention_split_kernel<T, Dims, 4>);
  } else {
    run(kMost, attention_split_kernel<T, Dims, kMost>);
  }
}

template <DType T>
void split_of_type(gpu::Stream s, const AttentionArgs& args) {
  switch (args.a.head_dim) {
    case 32: return split<T, 1>(s, args);
    case 64: return split<T, 2>(s, args);
    case 128: return split<T, 4>(s, args);
    case 256: return split<T, 8>(s, args);
    default: fail("GPU: attention has head_dim 32, 64, 128 and 256, not ", args.a.head_dim);
  }
}

}  // namespace

size_t attention_scratch_bytes(const Attention& a, int rows, int n_keys) {
  return bytes_per_row(a, n_keys) * static_cast<size_t>(rows_per_launch(a, rows, n_keys));
}

void launch_attention(gpu::Stream s, const Attention& a, int rows, Position pos0, int n_keys, const float* q,
                      const KvLayer& kv, float* scratch, float* out, MutableQuantRows quant) {
  const int chunk = rows_per_launch(a, rows, n_keys);
  AttentionArgs args;
  args.a = a;
  args.pos0 = pos0;
  args.step_rows = rows;
  args.max_splits = splits_for(n_keys);
  args.q = q;
  args.kv = kv;
  args.ml = reinterpret_cast<float2*>(scratch);
  args.o = scratch + 2 * static_cast<int64_t>(chunk) * a.n_head * args.max_splits;
  for (int row = 0; row < rows; row += chunk) {
    args.row0 = row;
    args.rows = rows - row < chunk ? rows - row : chunk;
    switch (kv.type) {
      case DType::F32: split_of_type<DType::F32>(s, args); break;
      case DType::F16: split_of_type<DType::F16>(s, args); break;
      case DType::Q8_0: split_of_type<DType::Q8_0>(s, args); break;
      default: fail("GPU: a KV cache is F32, F16 or Q8_0, not ", dtype_info(kv.type).name);
    }
    gpu::launch(s, dim3(static_cast<unsigned>(a.n_head), static_cast<unsigned>(args.rows)),
                static_cast<unsigned>(a.head_dim), attention_add_kernel, args, out, quant);
  }
}

}  // namespace dflash::hip
