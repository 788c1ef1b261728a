#pragma once
// Attention for few rows: what a wave does with a run of keys for some queries (attention.hip).

#include "backend/hip/kernels.h"

namespace dflash::hip {

// Lanes that share a key, and keys a lane has a part of, in runs of the first split and of later ones.
inline constexpr int kFirstKeyLanes = 2, kFirstLaneKeys = 1, kLaterKeyLanes = 2, kLaterLaneKeys = 2;
inline constexpr float kLog2E = 1.44269504f;  // exponentials are powers of two
inline constexpr int kLaterRun = gpu::kWave / kLaterKeyLanes * kLaterLaneKeys;

// One query's keys are [first, end).
struct KeyRange {
  int first, end;
};

// One head's keys or values from some position on: a base that is the same in all lanes, so that a lane's part of an
// address is 32 bits.
template <DType T>
struct Plane {
  using Element = std::conditional_t<T == DType::F32, float, std::conditional_t<T == DType::F16, uint16_t, int8_t>>;
  const Element* e;       // [keys, head_dim]
  const uint16_t* scale;  // Q8_0 [keys, head_dim / 32]

  __device__ inline Plane(const KvLayer& kv, const void* base, int head, int key, int head_dim) {
    const int64_t head_at = static_cast<int64_t>(head) * kv.n_ctx * head_dim, at = static_cast<int64_t>(key) * head_dim;
    if constexpr (T == DType::Q8_0) {
      const int8_t* q = static_cast<const int8_t*>(base) + head_at / 32 * 34;
      scale = reinterpret_cast<const uint16_t*>(q + static_cast<int64_t>(kv.n_ctx) * head_dim) + at / 32;
      e = q + at;
    } else {
      e = static_cast<const Element*>(base) + head_at + at;
    }
  }
};

// N consecutive elements of a key or value row as they lie in the cache; N a multiple of 4 within one group of 32 (or
// N = 1, 2).
template <DType T, int N>
struct Elements {
  using Element = typename Plane<T>::Element;
  static constexpr size_t kBytes = N * sizeof(Element);
  // f16 in words, so that what is held until it is used takes no more registers than bytes
  using Word = std::conditional_t<T == DType::F16 && N % 2 == 0, uint32_t, Element>;
  struct alignas(kBytes > 16 ? 16 : kBytes) Vector {
    Word e[kBytes / sizeof(Word)];
  };
  Vector v;
  uint16_t scale;  // Q8_0

  // at: elements from the plane's beginning.
  __device__ inline void load(const Plane<T>& from, uint32_t at) {
    v = gpu::load(reinterpret_cast<const Vector*>(from.e + at));
    if constexpr (T == DType::Q8_0) scale = gpu::load(from.scale + at / 32);
  }
  __device__ inline void get(float (&f)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (T == DType::F32) {
        f[i] = v.e[i];
      } else if constexpr (T == DType::F16) {
        constexpr int kHalves = sizeof(Word) / sizeof(Element);
        f[i] = gpu::half_to_float(static_cast<uint16_t>(v.e[i / kHalves] >> (i % kHalves * 16)));
      } else {
        f[i] = static_cast<float>(v.e[i]) * gpu::half_to_float(scale);
      }
    }
  }
};

// What a wave knows of its queries so far.
template <int Dims, int Queries>
struct WaveState {
  float largest[Queries];
  float sum[Queries];      // of the lane's keys
  float o[Queries][Dims];  // the lane's dimensions
};

// The step's own key and value [head_dim] in shared memory, as the cache holds them from now on (of Q8_0 what they are
// worth); position -1: they are in the cache already.
template <DType T>
using OwnElement = std::conditional_t<T == DType::F16, uint16_t, float>;

template <DType T>
__device__ inline OwnElement<T> own_element(float v) {
  if constexpr (T == DType::F16) {
    return gpu::float_to_half(v);
  } else {
    return v;
  }
}

template <DType T>
struct OwnKey {
  const OwnElement<T>* k;
  const OwnElement<T>* v;
  int position;

  template <int N>
  static __device__ inline void get(const OwnElement<T>* from, float (&f)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (T == DType::F16) {
        f[i] = gpu::half_to_float(from[i]);
      } else {
        f[i] = from[i];
      }
    }
  }
};

// A run of keys: KeyLanes lanes share a key, each with 8 dimensions in turn, and have LaneKeys keys; each lane has some
// dimensions of all values. Held runs are read whole before they are used.
template <DType T, int Dims, int KeyLanes, int LaneKeys, bool Hold>
struct Run {
  static constexpr int kKeyLanes = KeyLanes, kLaneKeys = LaneKeys, kTogether = gpu::kWave / KeyLanes;
  static constexpr int kKeys = kTogether * LaneKeys, kPieces = Dims * 32 / (8 * KeyLanes);
  static constexpr bool kHeld = Hold;
  Elements<T, 8> k[Hold ? kPieces : 1][LaneKeys];
  Elements<T, Dims> v[Hold ? kKeys : 1];
  int head, key0, begin, end;

  __device__ inline int dim(int piece) const { return (piece * KeyLanes + gpu::lane() % KeyLanes) * 8; }
  __device__ inline int key(int n) const { return key0 + n * kTogether + gpu::lane() / KeyLanes; }
  __device__ inline int safe(int key) const { return max(begin, min(key, end - 1)); }
  template <int N>
  __device__ inline void read(Elements<T, N>& to, const KvLayer& kv, const void* base, int key, int dim) const {
    const Plane<T> from(kv, base, head, key0, Dims * 32);
    to.load(from, static_cast<uint32_t>(safe(key) - key0) * (Dims * 32) + dim);
  }
  // [begin, end): keys of the whole block.
  __device__ inline void load(const KvLayer& kv, int kv_head, int first, int block_begin, int block_end) {
    head = kv_head;
    key0 = first;
    begin = block_begin;
    end = block_end;
    if constexpr (Hold) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int n = 0; n < LaneKeys; ++n) read(k[i][n], kv, kv.k, key(n), dim(i));
      }
#pragma unroll
      for (int j = 0; j < kKeys; ++j) read(v[j], kv, kv.v, key0 + j, gpu::lane() * Dims);
    }
  }
  // Held: the step's own key in place of what was read. What is read past it stands for keys that do not count, so it
  // must be a number.
  __device__ inline void take_own([[maybe_unused]] const OwnKey<T>& own, [[maybe_unused]] int first) {
    if constexpr (Hold) {
      static_assert(LaneKeys == 1 && std::is_same_v<typename Elements<T, 8>::Element, OwnElement<T>>,
                    "as in the cache");
      if (own.position >= first + kKeys) return;
      if (key(0) == own.position) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) k[i][0].v = *reinterpret_cast<const decltype(k[i][0].v)*>(own.k + dim(i));
      }
      const auto own_v = *reinterpret_cast<const decltype(v[0].v)*>(own.v + gpu::lane() * Dims);
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (first + j >= own.position) v[j].v = own_v;
      }
    }
  }
  __device__ inline void key_piece(const KvLayer& kv, int i, int n, float (&f)[8]) const {
    if constexpr (Hold) {
      k[i][n].get(f);
    } else {
      Elements<T, 8> e;
      read(e, kv, kv.k, key(n), dim(i));
      e.get(f);
    }
  }
  __device__ inline void value(const KvLayer& kv, int j, float (&f)[Dims]) const {
    if constexpr (Hold) {
      v[j].get(f);
    } else {
      Elements<T, Dims> e;
      read(e, kv, kv.v, key0 + j, gpu::lane() * Dims);
      e.get(f);
    }
  }
};

template <DType T, int Dims, int Queries, bool TakeIn, typename R>
__device__ inline void take_run(const R& run, const KvLayer& kv, float scale, const float (&q)[Queries][Dims * 32],
                                const KeyRange (&keys)[Queries], float (&e_lds)[Queries][kLaterRun],
                                const OwnKey<T>& own, WaveState<Dims, Queries>& w) {
  constexpr bool kReplace = TakeIn && !R::kHeld;  // what was read where the own key is not yet
  constexpr int kUnroll = R::kHeld ? R::kPieces : gpu::kAttentionUnroll;
  constexpr int kLaneKeys = R::kLaneKeys, kSums = 4 / kLaneKeys;  // a score is added up as so many sums
  float score[Queries][kLaneKeys][kSums] = {};
#pragma unroll kUnroll
  for (int piece = 0; piece < R::kPieces; ++piece) {
    const int dim = run.dim(piece);
    float k[kLaneKeys][8];
#pragma unroll
    for (int n = 0; n < kLaneKeys; ++n) {
      run.key_piece(kv, piece, n, k[n]);
      if (kReplace && run.key(n) == own.position) own.get(own.k + dim, k[n]);
    }
#pragma unroll
    for (int i = 0; i < Queries; ++i) {
      const float4 a = *reinterpret_cast<const float4*>(&q[i][dim]);
      const float4 b = *reinterpret_cast<const float4*>(&q[i][dim + 4]);
      const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int d = 0; d < 8; ++d) {
#pragma unroll
        for (int n = 0; n < kLaneKeys; ++n) {
          score[i][n][d % kSums] = fmaf(x[d], k[n][d], score[i][n][d % kSums]);
        }
      }
    }
  }
  gpu::wave_sync();  // the weights of the run before have been read
#pragma unroll
  for (int i = 0; i < Queries; ++i) {
    float s[kLaneKeys], top = w.largest[i];
#pragma unroll
    for (int n = 0; n < kLaneKeys; ++n) {
#pragma unroll
      for (int m = 1; m < kSums; m <<= 1) {
#pragma unroll
        for (int j = 0; j + m < kSums; j += 2 * m) score[i][n][j] += score[i][n][j + m];
      }
      s[n] = score[i][n][0];
      static_assert(R::kKeyLanes == 2, "a key shared by two lanes");
      s[n] += gpu::shuffle_xor<1>(s[n]);
      s[n] = run.key(n) >= keys[i].first && run.key(n) < keys[i].end ? s[n] * scale : -INFINITY;
      top = fmaxf(top, s[n]);
    }
    top = gpu::wave_max(top);
    const float keep = w.largest[i] == -INFINITY ? 0.0f : exp2f(w.largest[i] - top);
    const bool first = gpu::lane() % R::kKeyLanes == 0;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kLaneKeys; ++n) {
      const float e = s[n] == -INFINITY ? 0.0f : exp2f(s[n] - top);
      sum += e;
      if (first) e_lds[i][n * R::kTogether + gpu::lane() / R::kKeyLanes] = e;
    }
    w.sum[i] = fmaf(w.sum[i], keep, first ? sum : 0.0f);
#pragma unroll
    for (int d = 0; d < Dims; ++d) w.o[i][d] *= keep;
    w.largest[i] = top;
  }
  gpu::wave_sync();
  constexpr int kBatch = 8, kBatches = R::kHeld ? R::kKeys / kBatch : 1;
#pragma unroll kBatches
  for (int j0 = 0; j0 < R::kKeys; j0 += kBatch) {
    float v[kBatch][Dims];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      run.value(kv, j0 + j, v[j]);
      if (kReplace && run.safe(run.key0 + j0 + j) == own.position) own.get(own.v + gpu::lane() * Dims, v[j]);
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

}  // namespace dflash::hip
