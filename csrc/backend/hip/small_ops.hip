// Embedding, row copies, the greedy choice, and what fills device weights: repacking and random numbers.

#include <cstring>

#include "backend/hip/kernels.h"

namespace dflash::hip {

namespace {

constexpr int kSmallThreads = 256;

unsigned blocks_for(int64_t n) { return static_cast<unsigned>((n + kSmallThreads - 1) / kSmallThreads); }

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kSmallThreads + threadIdx.x; }

// ---- embedding

__global__ void __launch_bounds__(kSmallThreads)
    embed_float_kernel(DType type, const void* table, const int32_t* __restrict__ tokens, int64_t n, float* x) {
  gpu::wait_for_previous();
  const int64_t i = thread_index(), row = blockIdx.y;
  if (i >= n) return;
  const int64_t at = tokens[row] * n + i;
  x[row * n + i] = type == DType::F32   ? static_cast<const float*>(table)[at]
                   : type == DType::F16 ? gpu::half_to_float(static_cast<const uint16_t*>(table)[at])
                                        : gpu::bf16_to_float(static_cast<const uint16_t*>(table)[at]);
}

__global__ void __launch_bounds__(kSmallThreads)
    embed_tiled_kernel(DType type, TiledWeight table, const int32_t* __restrict__ tokens, int64_t n, float* x) {
  gpu::wait_for_previous();
  const int64_t i = thread_index(), row = blockIdx.y;
  if (i >= n) return;
  const int token = tokens[row], r = token % kTile, e = static_cast<int>(i % 32);
  const int64_t group = static_cast<int64_t>(token / kTile) * table.groups + i / 32;
  if (type == DType::Q8_0) {
    const int8_t* q = reinterpret_cast<const int8_t*>(table.quants) + group * FormatQ8_0::kQuantBytes;
    const float d = gpu::half_to_float(table.scales[group * kTile + r]);
    x[row * n + i] = static_cast<float>(q[e / 16 * kTile * 16 + r * 16 + e % 16]) * d;
    return;
  }
  const uint8_t byte = table.quants[group * FormatQ4_0::kQuantBytes + r * 16 + e % 16];
  const int nibble = e < 16 ? byte & 15 : byte >> 4;
  if (type == DType::Q4_0) {
    x[row * n + i] = static_cast<float>(nibble - 8) * gpu::half_to_float(table.scales[group * kTile + r]);
  } else {
    const uint16_t* dm = table.scales + (group * kTile + r) * 2;
    x[row * n + i] = fmaf(static_cast<float>(nibble), gpu::half_to_float(dm[0]), gpu::half_to_float(dm[1]));
  }
}

struct SmallBytes {
  uint8_t b[kSmallUpload];
};

__global__ void __launch_bounds__(kSmallUpload) store_kernel(uint8_t* dst, SmallBytes src, int bytes) {
  gpu::wait_for_previous();
  const int i = static_cast<int>(threadIdx.x);
  if (i < bytes) dst[i] = src.b[i];
}

__global__ void __launch_bounds__(kSmallThreads)
    copy_rows_kernel(const float* src, int64_t n, float* dst, int64_t stride) {
  gpu::wait_for_previous();
  const int64_t i = thread_index(), row = blockIdx.y;
  if (i < n) dst[row * stride + i] = src[row * n + i];
}

// ---- greedy choice

constexpr int kTop1Parts = 64;     // blocks of a row
constexpr int kTop1Together = 13;  // logits a thread reads at a time: all of a vocabulary of 200,064

struct Best {
  float first, second;  // largest logits
  int id;
  float sum;  // of exp(logit - first)
};

// Ties go to the lowest id. Associative up to rounding of the sum: combined in a fixed order.
__device__ inline Best merge(const Best& a, const Best& b) {
  const bool b_wins = b.first > a.first || (b.first == a.first && b.id < a.id);
  const Best& w = b_wins ? b : a;
  const Best& l = b_wins ? a : b;
  Best r = w;
  r.second = fmaxf(w.second, l.first);
  if (l.sum > 0.0f) r.sum = fmaf(expf(l.first - w.first), l.sum, w.sum);
  return r;
}

template <int Mask = gpu::kWave / 2>
__device__ inline Best wave_merge(Best v) {
  const Best other = {gpu::shuffle_xor<Mask>(v.first), gpu::shuffle_xor<Mask>(v.second), gpu::shuffle_xor<Mask>(v.id),
                      gpu::shuffle_xor<Mask>(v.sum)};
  v = (gpu::lane() & Mask) == 0 ? merge(v, other) : merge(other, v);
  if constexpr (Mask > 1) v = wave_merge<Mask / 2>(v);
  return v;
}

__global__ void __launch_bounds__(kSmallThreads)
    top1_part_kernel(const float* __restrict__ logits, int64_t n, Best* parts) {
  __shared__ Best lds[kSmallThreads / gpu::kWave];
  gpu::wait_for_previous();
  const float* row = logits + blockIdx.y * n;
  Best best = {-INFINITY, -INFINITY, 0x7fffffff, 0.0f};
  constexpr int64_t kStep = kTop1Parts * kSmallThreads;
  for (int64_t first = thread_index(); first < n; first += kTop1Together * kStep) {
    float v[kTop1Together];
#pragma unroll
    for (int j = 0; j < kTop1Together; ++j) {
      const int64_t i = first + j * kStep;
      v[j] = i < n ? row[i] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kTop1Together; ++j) {
      const int64_t i = first + j * kStep;
      if (i >= n) break;
      if (v[j] > best.first) {
        best.sum = best.sum > 0.0f ? fmaf(best.sum, expf(best.first - v[j]), 1.0f) : 1.0f;
        best.second = best.first;
        best.first = v[j];
        best.id = static_cast<int>(i);
      } else {
        best.second = fmaxf(best.second, v[j]);
        best.sum += expf(v[j] - best.first);
      }
    }
  }
  best = wave_merge(best);
  if (gpu::lane() == 0) lds[gpu::wave()] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kSmallThreads / gpu::kWave; ++w) best = merge(best, lds[w]);
  parts[blockIdx.y * kTop1Parts + blockIdx.x] = best;
}

__global__ void __launch_bounds__(gpu::kWave) top1_final_kernel(const Best* parts, Top1* out) {
  gpu::wait_for_previous();
  const Best* p = parts + blockIdx.x * kTop1Parts;
  const Best best = wave_merge(merge(p[gpu::lane()], p[gpu::lane() + gpu::kWave]));
  if (gpu::lane() != 0) return;
  Top1 t;
  t.id = best.id == 0x7fffffff ? 0 : best.id;
  t.prob = 1.0f / best.sum;
  t.margin = best.first - best.second;
  out[blockIdx.x] = t;
}

// ---- filling weights

// A thread per GGUF block. Rows are counted through the whole expert stack, n_out of them an expert.
__global__ void __launch_bounds__(kSmallThreads)
    repack_kernel(DType type, const uint8_t* raw, int64_t first_row, int64_t rows, int64_t n_out, int groups,
                  uint8_t* quants, uint16_t* scales) {
  gpu::wait_for_previous();
  const int64_t i = thread_index();
  if (i >= rows * groups) return;
  const int64_t stack_row = first_row + i / groups;
  const int g = static_cast<int>(i % groups);
  const int64_t tiles = (n_out + kTile - 1) / kTile;
  const int64_t expert = stack_row / n_out, row = stack_row % n_out;
  const int64_t group = (expert * tiles + row / kTile) * groups + g;
  const int r = static_cast<int>(row % kTile);
  const int halves = type == DType::Q4_1 ? 2 : 1, chunks = type == DType::Q8_0 ? 2 : 1;
  // GGUF blocks are aligned to 2 bytes: the scales, then 16-byte chunks in element order.
  const uint16_t* block = reinterpret_cast<const uint16_t*>(raw) + i * (halves + 8 * chunks);
  for (int h = 0; h < halves; ++h) scales[(group * kTile + r) * halves + h] = block[h];
  for (int c = 0; c < chunks; ++c) {
    uint16_t* to = reinterpret_cast<uint16_t*>(quants + ((group * chunks + c) * kTile + r) * 16);
    for (int w = 0; w < 8; ++w) to[w] = block[halves + c * 8 + w];
  }
}

__device__ inline uint64_t mix(uint64_t v) {  // splitmix64
  v += 0x9e3779b97f4a7c15ull;
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
  return v ^ (v >> 31);
}

__device__ inline float uniform(uint64_t bits) { return static_cast<float>(bits >> 40) * 0x1p-24f; }  // [0, 1)

__global__ void __launch_bounds__(kSmallThreads) random_bits_kernel(uint64_t* out, int64_t n, uint64_t seed) {
  gpu::wait_for_previous();
  for (int64_t i = thread_index(); i < n; i += static_cast<int64_t>(gridDim.x) * kSmallThreads) out[i] = mix(seed + i);
}

// d in scale * [0.5, 1.5), either sign: quants are not centred (-8..7), and a common mean would drown all differences
// within a few layers. Q4_1: m = -7.5 d.
__global__ void __launch_bounds__(kSmallThreads)
    random_scales_kernel(uint16_t* out, int64_t n, int halves, float scale, uint64_t seed) {
  gpu::wait_for_previous();
  for (int64_t i = thread_index(); i < n; i += static_cast<int64_t>(gridDim.x) * kSmallThreads) {
    const uint64_t bits = mix(seed + i / halves);
    const float d = scale * ((bits & 1) != 0 ? -1.0f : 1.0f) * (0.5f + uniform(bits));
    out[i] = gpu::float_to_half(i % halves == 0 ? d : -7.5f * d);
  }
}

__global__ void __launch_bounds__(kSmallThreads)
    random_float_kernel(DType type, void* out, int64_t n, float scale, uint64_t seed) {
  gpu::wait_for_previous();
  for (int64_t i = thread_index(); i < n; i += static_cast<int64_t>(gridDim.x) * kSmallThreads) {
    const float v = scale * (2.0f * uniform(mix(seed + i)) - 1.0f);
    if (type == DType::F32) {
      static_cast<float*>(out)[i] = v;
    } else if (type == DType::F16) {
      static_cast<uint16_t*>(out)[i] = gpu::float_to_half(v);
    } else {
      static_cast<uint16_t*>(out)[i] = static_cast<uint16_t>(__float_as_uint(v) >> 16);
    }
  }
}

__global__ void probe_kernel() {}

}  // namespace

TiledWeight tiled(const Weight& w) {
  TiledWeight t;
  t.groups = static_cast<int>(w.n_in / 32);
  t.tiles = static_cast<int>((w.n_out + kTile - 1) / kTile);
  t.n_out = w.n_out;
  const int64_t quant_bytes = w.type == DType::Q8_0 ? FormatQ8_0::kQuantBytes : FormatQ4_0::kQuantBytes;
  t.quants = static_cast<const uint8_t*>(w.data);
  t.scales = reinterpret_cast<const uint16_t*>(t.quants + w.n_expert * t.tiles * t.groups * quant_bytes);
  return t;
}

void launch_embed(gpu::Stream s, const Weight& table, const int32_t* tokens, int rows, float* x) {
  const dim3 grid(blocks_for(table.n_in), static_cast<unsigned>(rows));
  if (is_quantized(table.type)) {
    gpu::launch(s, grid, kSmallThreads, embed_tiled_kernel, table.type, tiled(table), tokens, table.n_in, x);
  } else {
    gpu::launch(s, grid, kSmallThreads, embed_float_kernel, table.type, table.data, tokens, table.n_in, x);
  }
}

void launch_store(gpu::Stream s, void* dst, const void* src, size_t bytes) {
  SmallBytes small = {};
  std::memcpy(small.b, src, bytes);
  gpu::launch(s, dim3(1), kSmallUpload, store_kernel, static_cast<uint8_t*>(dst), small, static_cast<int>(bytes));
}

void launch_copy_rows(gpu::Stream s, const float* src, int rows, int64_t n, float* dst, int64_t stride) {
  gpu::launch(s, dim3(blocks_for(n), static_cast<unsigned>(rows)), kSmallThreads, copy_rows_kernel, src, n, dst,
              stride);
}

size_t top1_scratch_bytes(int rows) { return static_cast<size_t>(rows) * (kTop1Parts * sizeof(Best) + sizeof(Top1)); }

// scratch: the parts, then [rows] Top1, which `out` points to.
void launch_top1(gpu::Stream s, const float* logits, int rows, int64_t n, float* scratch, Top1* out) {
  Best* parts = reinterpret_cast<Best*>(scratch);
  const unsigned r = static_cast<unsigned>(rows);
  gpu::launch(s, dim3(kTop1Parts, r), kSmallThreads, top1_part_kernel, logits, n, parts);
  gpu::launch(s, dim3(r), gpu::kWave, top1_final_kernel, parts, out);
}

void launch_repack(gpu::Stream s, DType type, const void* raw, int64_t first_row, int64_t rows, int64_t n_out,
                   int64_t n_in, uint8_t* quants, uint16_t* scales) {
  const int groups = static_cast<int>(n_in / 32);
  gpu::launch(s, dim3(blocks_for(rows * groups)), kSmallThreads, repack_kernel, type, static_cast<const uint8_t*>(raw),
              first_row, rows, n_out, groups, quants, scales);
}

void launch_random(gpu::Stream s, DType type, int64_t n_in, int64_t count_quants, int64_t count_scales, void* quants,
                   uint16_t* scales, uint64_t seed) {
  const dim3 grid(2048);
  const float root = sqrtf(static_cast<float>(n_in));
  if (!is_quantized(type)) {
    const float scale = sqrtf(3.0f) / root;  // a product of unit-variance inputs has unit variance
    gpu::launch(s, grid, kSmallThreads, random_float_kernel, type, quants, count_quants, scale, seed);
    return;
  }
  const float spread = type == DType::Q8_0 ? 74.0f : 4.6f;  // standard deviation of a random quant
  gpu::launch(s, grid, kSmallThreads, random_bits_kernel, static_cast<uint64_t*>(quants), count_quants / 8, seed);
  gpu::launch(s, grid, kSmallThreads, random_scales_kernel, scales, count_scales, type == DType::Q4_1 ? 2 : 1,
              1.0f / (spread * root), seed + 1);
}

bool device_runs_kernels(std::string* why) {
  GPU_API(FuncAttributes) attributes;
  const gpu::Status status = GPU_API(FuncGetAttributes)(&attributes, reinterpret_cast<const void*>(probe_kernel));
  if (status == gpu::kOk) return true;
  (void)GPU_API(GetLastError)();
  *why = gpu::describe(status);
  return false;
}

}  // namespace dflash::hip
