// Attention for more than 16 rows on matrix instructions: a block takes 16 queries a wave of one KV head (row after
// row, the heads of a row that share it) and walks the keys in tiles at fixed positions, all its waves sharing the tile
// in shared memory; a running maximum and sum per query. A row's result does not depend on the rows beside it: tiles it
// does not see leave its sums as they are.

#include <type_traits>

#include "backend/hip/few_rows.h"
#include "backend/hip/gpu_flash.h"
#include "backend/hip/kernels.h"

namespace dflash::hip {

namespace {

// Waves of a block: few where many would leave multiprocessors idle. On NVIDIA many share a tile, because the rate at
// which tiles come from the L2 cache bounds the kernel.
constexpr int kFewWaves = 4, kManyWaves = gpu::kFlashWaves;
constexpr int kFlashKeys = gpu::kFlashKeys;

// Whether Hopper's instructions of four waves serve heads of 32 * dims.
constexpr bool wide(int dims) { return dims >= 2; }

struct FlashArgs {
  Attention a;
  Position pos0;
  int rows = 0;
  const float* q = nullptr;
  bool half_q = false;  // q's rows are f16, each at the beginning of its f32 place
  KvLayer kv;
  float* out = nullptr;
  uint16_t* half = nullptr;
};

// Eight dimensions from `dim` of keys or values as f16.
template <DType T, int HeadDim>
struct OctetReader {
  const uint8_t* data;
  const uint16_t* scales;

  __device__ inline OctetReader(const KvLayer& kv, const void* base, int head, int dim) {
    if constexpr (T == DType::F16) {
      data = static_cast<const uint8_t*>(base) + (static_cast<int64_t>(head) * kv.n_ctx * HeadDim + dim) * 2;
      scales = nullptr;
    } else {
      const uint8_t* q =
          static_cast<const uint8_t*>(base) + static_cast<int64_t>(head) * kv.n_ctx * (HeadDim / 32) * 34;
      scales = reinterpret_cast<const uint16_t*>(q + static_cast<int64_t>(kv.n_ctx) * HeadDim) + dim / 32;
      data = q + dim;
    }
  }

  __device__ inline const uint8_t* at(int pos) const { return data + static_cast<int64_t>(pos) * (HeadDim * 2); }

  __device__ inline uint4 load(int pos) const {
    if constexpr (T == DType::F16) {
      return *reinterpret_cast<const uint4*>(at(pos));
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(data + static_cast<int64_t>(pos) * HeadDim);
      const float d = gpu::half_to_float(scales[static_cast<int64_t>(pos) * (HeadDim / 32)]);
      auto pair = [&](uint32_t w, int i) {
        return gpu::F16::pack(gpu::signed_byte_float(w, i) * d, gpu::signed_byte_float(w, i + 1) * d);
      };
      return make_uint4(pair(v.x, 0), pair(v.x, 2), pair(v.y, 0), pair(v.y, 2));
    }
  }
};

// Pieces of 16 bytes a key takes, and a dimension's keys of a tile; keys a block loads at once.
template <int HeadDim>
constexpr int kOctets = HeadDim / 8;
constexpr int kKeyPieces = kFlashKeys / 8;
template <int HeadDim, int Waves>
constexpr int kRowsAtOnce = Waves * gpu::kWave / kOctets<HeadDim>;

// Keys and values of a tile in shared memory, and the two products with them.
//
// For instructions of one wave: keys as [key][octet of dims, turned], values transposed, [dim][octet of keys in
// flash_key() order, turned].
template <DType T, int HeadDim, int Waves>
class TurnedTile {
 public:
  static constexpr int kBytes = 2 * kFlashKeys * HeadDim * 2;

  __device__ inline TurnedTile(const KvLayer& kv, int kv_head, uint8_t* memory)
      : octet_(static_cast<int>(threadIdx.x) % kOctets<HeadDim>),
        row_(static_cast<int>(threadIdx.x) / kOctets<HeadDim>),
        key_reader_(kv, kv.k, kv_head, octet_ * 8),
        value_reader_(kv, kv.v, kv_head, octet_ * 8),
        keys_(memory),
        values_(memory + kBytes / 2) {}

  // Depth 32 d .. 32 d + 31 of the wave's queries; pair(query, dim): dimensions dim and dim + 1 as f16.
  template <typename Pair>
  static __device__ inline gpu::FlashOperand queries(int d, Pair pair) {
    return gpu::flash_queries([&](int query, int part) {
      const int dim = d * 32 + part * 8;
      return make_uint4(pair(query, dim), pair(query, dim + 2), pair(query, dim + 4), pair(query, dim + 6));
    });
  }

  __device__ inline void begin(int, int) {}

  // s = the queries times the keys of the tile from key0 on.
  template <int Dims>
  __device__ inline void scores(gpu::FlashOperand (&q)[Dims], float (&s)[kFlashKeys / 16][8], int key0, int end) {
    load(key0, end);
    // In both products a result is not touched twice in a row: its sum takes a while.
#pragma unroll
    for (int j0 = 0; j0 < kFlashKeys / 16; j0 += gpu::kFlashPair) {
#pragma unroll
      for (int j = j0; j < j0 + gpu::kFlashPair; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) s[j][i] = 0.0f;
      }
#pragma unroll
      for (int d = 0; d < Dims; ++d) {
        gpu::FlashOperand k[gpu::kFlashPair];
#pragma unroll
        for (int j = 0; j < gpu::kFlashPair; ++j) {
          k[j] = gpu::flash_others([&](int row, int part) {
            return *reinterpret_cast<const uint4*>(
                keys_ + (row * kOctets<HeadDim> + gpu::flash_piece(d * 4 + part, row, kOctets<HeadDim>)) * 16 +
                (j0 + j) * 16 * HeadDim * 2);
          });
        }
#pragma unroll
        for (int depth = 0; depth < 2; ++depth) {
#pragma unroll
          for (int j = 0; j < gpu::kFlashPair; ++j) gpu::flash_mma(s[j0 + j], q[d].k[depth], k[j].k[depth]);
        }
        gpu::keep_order();
      }
    }
  }

  // o += the weights times the values.
  __device__ inline void add_values(const float (&s)[kFlashKeys / 16][8], float (&o)[HeadDim / 16][8]) {
#pragma unroll
    for (int j = 0; j < kFlashKeys / 32; ++j) {
      const gpu::FlashWords w[2] = {gpu::flash_weights(s[2 * j]), gpu::flash_weights(s[2 * j + 1])};
#pragma unroll
      for (int d0 = 0; d0 < HeadDim / 16; d0 += gpu::kFlashPair) {
        gpu::FlashOperand v[gpu::kFlashPair];
#pragma unroll
        for (int d = 0; d < gpu::kFlashPair; ++d) {
          v[d] = gpu::flash_others([&](int row, int part) {
            const int turned = (j * 4 + part) ^ ((d0 + d) * 2 + row / 8) % kKeyPieces;
            return *reinterpret_cast<const uint4*>(values_ +
                                                   (row * kKeyPieces + gpu::flash_piece(turned, row, kKeyPieces)) * 16 +
                                                   (d0 + d) * 16 * kFlashKeys * 2);
          });
        }
#pragma unroll
        for (int depth = 0; depth < 2; ++depth) {
#pragma unroll
          for (int d = 0; d < gpu::kFlashPair; ++d) gpu::flash_mma(o[d0 + d], w[depth], v[d].k[depth]);
        }
        gpu::keep_order();
      }
    }
  }

 private:
  // Half i of a beside half i of b.
  static __device__ inline uint32_t pair_of(const uint4& a, const uint4& b, int i) {
    const uint32_t x = i < 2 ? a.x : i < 4 ? a.y : i < 6 ? a.z : a.w, y = i < 2 ? b.x : i < 4 ? b.y : i < 6 ? b.z : b.w;
    return __byte_perm(x, y, i % 2 == 0 ? 0x5410 : 0x7632);
  }

  __device__ inline void load(int key0, int end) {
    auto safe = [&](int key) { return min(key0 + key, end - 1); };
    __syncthreads();  // the tile before has been read
    constexpr int kKeyRows = kRowsAtOnce<HeadDim, Waves>;
    constexpr int kKeyLoads = (kFlashKeys + kKeyRows - 1) / kKeyRows, kKeyBatch = kKeyLoads < 4 ? kKeyLoads : 4;
#pragma unroll
    for (int i0 = 0; i0 < kKeyLoads; i0 += kKeyBatch) {
      uint4 v[kKeyBatch];
#pragma unroll
      for (int i = 0; i < kKeyBatch; ++i) v[i] = key_reader_.load(safe((i0 + i) * kKeyRows + row_));
#pragma unroll
      for (int i = 0; i < kKeyBatch; ++i) {
        const int key = (i0 + i) * kKeyRows + row_;
        if (kFlashKeys % kKeyRows != 0 && key >= kFlashKeys) break;
        *reinterpret_cast<uint4*>(keys_ + (key * kOctets<HeadDim> + gpu::flash_piece(octet_, key, kOctets<HeadDim>)) *
                                              16) = v[i];
      }
    }
#pragma unroll
    for (int i0 = 0; i0 < kFlashKeys / 2; i0 += kKeyRows) {  // a thread transposes 8 dimensions of two keys
      const int place = (i0 + row_) * 2;
      if (kFlashKeys / 2 % kKeyRows != 0 && place >= kFlashKeys) break;
      const int key = place / 32 * 32;
      const uint4 a = value_reader_.load(safe(key + gpu::flash_key(place % 32)));
      const uint4 b = value_reader_.load(safe(key + gpu::flash_key(place % 32 + 1)));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int dim = octet_ * 8 + i;
        *reinterpret_cast<uint32_t*>(
            values_ + (dim * kKeyPieces + gpu::flash_piece(place / 8 ^ octet_ % kKeyPieces, dim, kKeyPieces)) * 16 +
            place % 8 * 2) = pair_of(a, b, i);
      }
    }
    __syncthreads();
  }

  int octet_, row_;
  OctetReader<T, HeadDim> key_reader_, value_reader_;
  uint8_t *keys_, *values_;
};

// For instructions of four waves (Hopper, head_dim 64 and 128): a ring of tiles in shared memory, so that the waves
// that multiply together need not be at the same tile as the others of the block: some multiply while others take
// exponents.
template <DType T, int HeadDim, int Waves>
class WideTile {
 public:
  static constexpr int kSide = kFlashKeys * HeadDim * 2, kTiles = Waves == kFewWaves ? 3 : 4;
  static constexpr int kBytes = kTiles * 2 * kSide + 2 * kTiles * 8;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __device__ inline WideTile(const KvLayer& kv, int kv_head, uint8_t* memory)
      : octet_(static_cast<int>(threadIdx.x) % kOctets<HeadDim>),
        row_(static_cast<int>(threadIdx.x) / kOctets<HeadDim>),
        key_reader_(kv, kv.k, kv_head, octet_ * 8),
        value_reader_(kv, kv.v, kv_head, octet_ * 8),
        memory_(memory),
        full_(reinterpret_cast<uint64_t*>(memory + kTiles * 2 * kSide)),
        empty_(full_ + kTiles) {}

  template <typename Pair>
  static __device__ inline gpu::FlashOperand queries(int d, Pair pair) {
    return {{gpu::flash_wide_queries(d * 32, pair), gpu::flash_wide_queries(d * 32 + 16, pair)}};
  }

  __device__ inline void begin(int key0, int end) {
    if (threadIdx.x < kTiles) {
      gpu::barrier_init(full_ + threadIdx.x, Waves * gpu::kWave);
      gpu::barrier_init(empty_ + threadIdx.x, Waves * gpu::kWave);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTiles - 2; ++i) copy(key0 + i * kFlashKeys, end);
  }

  template <int Dims>
  __device__ inline void scores(gpu::FlashOperand (&q)[Dims], float (&s)[kFlashKeys / 16][8], int key0, int end) {
    gpu::barrier_wait(full_ + now_.tile, now_.parity);
    // The fence waits for a thread's copies: those of the tile before had all of that tile's time.
    gpu::products_see_copies();
    copy(key0 + (kTiles - 2) * kFlashKeys, end);  // over the tile two before
#pragma unroll
    for (int j = 0; j < kFlashKeys / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) s[j][i] = 0.0f;
    }
    gpu::flash_wide_scores(s, q, memory_ + now_.tile * 2 * kSide);
  }

  __device__ inline void add_values(const float (&s)[kFlashKeys / 16][8], float (&o)[HeadDim / 16][8]) {
    gpu::FlashWords w[kFlashKeys / 16];
#pragma unroll
    for (int j = 0; j < kFlashKeys / 16; ++j) w[j] = gpu::flash_weights(s[j]);
    gpu::flash_wide_values<HeadDim>(o, w, memory_ + now_.tile * 2 * kSide + kSide);
    gpu::barrier_arrive(empty_ + now_.tile);
    now_.next();
  }

 private:
  struct Place {
    int tile = 0;
    uint32_t parity = 0;
    __device__ inline void next() {
      if (++tile == kTiles) {
        tile = 0;
        parity ^= 1;
      }
    }
  };

  // Keys and values of the tile from key0 on; past the last key that one again.
  __device__ inline void copy(int key0, int end) {
    if (key0 >= end) return;
    gpu::barrier_wait(empty_ + next_.tile, next_.parity ^ 1);
    uint8_t* to = memory_ + next_.tile * 2 * kSide;
    copy_side(key_reader_, to, key0, end);
    copy_side(value_reader_, to + kSide, key0, end);
    if constexpr (T == DType::F16) {
      gpu::barrier_arrive_copied(full_ + next_.tile);
    } else {
      gpu::products_see_copies();
      gpu::barrier_arrive(full_ + next_.tile);
    }
    next_.next();
  }

  __device__ inline void copy_side(const OctetReader<T, HeadDim>& reader, uint8_t* to, int key0, int end) {
    constexpr int kKeyRows = kRowsAtOnce<HeadDim, Waves>, kLoads = (kFlashKeys + kKeyRows - 1) / kKeyRows;
    static_assert(kKeyRows % 8 == 0);
    uint8_t* at = to + gpu::flash_wide_at(octet_, row_);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int key = row_ + i * kKeyRows;
      if (kFlashKeys % kKeyRows != 0 && key >= kFlashKeys) break;
      uint8_t* piece = at + i * kKeyRows * gpu::kHalfTurn;
      if constexpr (T == DType::F16) {
        gpu::copy_begin<16>(piece, reader.at(min(key0 + key, end - 1)));
      } else {
        *reinterpret_cast<uint4*>(piece) = reader.load(min(key0 + key, end - 1));
      }
    }
  }

  int octet_, row_;
  OctetReader<T, HeadDim> key_reader_, value_reader_;
  uint8_t* memory_;
  uint64_t *full_, *empty_;
  Place now_, next_;  // worked on; copied next
#endif
};

// grid (n_head_kv, query blocks, the last first: they have the most keys); Dims: head_dim / 32
template <DType T, int Dims, int Waves>
__global__ void __launch_bounds__(Waves* gpu::kWave, Waves == kFewWaves ? gpu::kFlashBlocks : 1)
    attention_many_kernel(FlashArgs p) {
  constexpr int kHeadDim = Dims * 32, kQueries = Waves * 16;
  using Tile =
      std::conditional_t<gpu::kFlashWide && wide(Dims), WideTile<T, kHeadDim, Waves>, TurnedTile<T, kHeadDim, Waves>>;
  DFLASH_STAGES(memory, Tile::kBytes);
  gpu::wait_for_previous();
  const int group = p.a.n_head / p.a.n_head_kv, n_queries = p.rows * group;
  const int kv_head = static_cast<int>(blockIdx.x);
  const int first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kQueries;
  const int last = min(first + kQueries, n_queries) - 1;
  const int pos0 = p.pos0.get();
  const float to_log2 = p.a.scale * 1.44269504f;
  auto first_key = [&](int query) {
    return p.a.sliding_window > 0 ? max(0, pos0 + query / group + 1 - p.a.sliding_window) : 0;
  };
  auto end_key = [&](int query) { return pos0 + (p.a.causal ? query / group + 1 : p.rows); };
  auto head_of = [&](int query) {
    return static_cast<int64_t>(query / group) * p.a.n_head + kv_head * group + query % group;
  };
  const int begin = first_key(first) / kFlashKeys * kFlashKeys, end = end_key(last);
  const int mine = first + gpu::wave() * 16;  // the wave's first query

  gpu::FlashOperand q[Dims];
  auto query_pair = [&](int query, int dim) {
    const int at = min(mine + query, last);
    if (p.half_q) {  // as many f16 again lie between the rows
      const int64_t row = static_cast<int64_t>(at / group) * p.a.n_head;
      return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint16_t*>(p.q) +
                                                (row + head_of(at)) * kHeadDim + dim);
    }
    const float2 v = *reinterpret_cast<const float2*>(p.q + head_of(at) * kHeadDim + dim);
    return gpu::F16::pack(v.x, v.y);
  };
#pragma unroll
  for (int d = 0; d < Dims; ++d) q[d] = Tile::queries(d, query_pair);
  int from[gpu::kFlashRows], to[gpu::kFlashRows];
  float largest[gpu::kFlashRows], sum[gpu::kFlashRows];
#pragma unroll
  for (int r = 0; r < gpu::kFlashRows; ++r) {
    const int query = min(mine + gpu::flash_query(r), last);
    from[r] = first_key(query);
    to[r] = end_key(query);
    largest[r] = -INFINITY;
    sum[r] = 0.0f;
  }
  // Keys every query of the wave sees need no mask.
  const int all_from = first_key(min(mine + 15, last)), all_to = end_key(min(mine, last));
  float o[kHeadDim / 16][8];
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) o[d][i] = 0.0f;
  }

  Tile tile(p.kv, kv_head, memory);
  tile.begin(begin, end);
  for (int key0 = begin; key0 < end; key0 += kFlashKeys) {
    float s[kFlashKeys / 16][8];
    tile.scores(q, s, key0, end);
    if (key0 < all_from || key0 + kFlashKeys > all_to) {
#pragma unroll
      for (int j = 0; j < kFlashKeys / 16; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int key = key0 + j * 16 + gpu::flash_other(i), r = gpu::flash_row(i);
          if (key < from[r] || key >= to[r]) s[j][i] = -INFINITY;
        }
      }
    }
    float base[gpu::kFlashRows], keep[gpu::kFlashRows];
#pragma unroll
    for (int r = 0; r < gpu::kFlashRows; ++r) {
      float top = largest[r];
#pragma unroll
      for (int j = 0; j < kFlashKeys / 16; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (gpu::flash_row(i) == r) top = fmaxf(top, s[j][i]);
        }
      }
      top = gpu::flash_reduce(top, [](float a, float b) { return fmaxf(a, b); });
      base[r] = top == -INFINITY ? 0.0f : top * to_log2;
      // A tile that does not raise the maximum must leave the sums as they are, to the bit.
      keep[r] = top == largest[r] ? 1.0f : gpu::fast_exp2(fmaf(largest[r], to_log2, -base[r]));
      largest[r] = top;
      sum[r] *= keep[r];
    }
#pragma unroll
    for (int j = 0; j < kFlashKeys / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = gpu::flash_row(i);
        s[j][i] = gpu::fast_exp2(fmaf(s[j][i], to_log2, -base[r]));
        sum[r] += s[j][i];
      }
    }
    bool raised = false;
#pragma unroll
    for (int r = 0; r < gpu::kFlashRows; ++r) raised |= keep[r] != 1.0f;
    if (gpu::any(raised)) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 8; ++i) o[d][i] *= keep[gpu::flash_row(i)];
      }
    }
    tile.add_values(s, o);
  }

  float inverse[gpu::kFlashRows];
#pragma unroll
  for (int r = 0; r < gpu::kFlashRows; ++r) {
    inverse[r] = 1.0f / gpu::flash_reduce(sum[r], [](float a, float b) { return a + b; });
  }
#pragma unroll
  for (int r = 0; r < gpu::kFlashRows; ++r) {
    const int query = mine + gpu::flash_query(r);
    const int64_t at = head_of(min(query, last)) * kHeadDim;
    gpu::flash_write(o, r, inverse[r], query <= last, p.out != nullptr ? p.out + at : nullptr, p.half + at);
  }
}

template <DType T>
void attention_many(gpu::Stream s, const FlashArgs& args) {
  const int n_queries = args.rows * (args.a.n_head / args.a.n_head_kv);
  auto launch_waves = [&](auto dims, auto waves) {
    constexpr int kDims = decltype(dims)::value, kWaves = decltype(waves)::value, kQueries = kWaves * 16;
    constexpr int kBytes =
        wide(kDims) ? WideTile<T, kDims * 32, kWaves>::kBytes : TurnedTile<T, kDims * 32, kWaves>::kBytes;
    const dim3 grid(static_cast<unsigned>(args.a.n_head_kv),
                    static_cast<unsigned>((n_queries + kQueries - 1) / kQueries));
    gpu::launch_stages(s, grid, kWaves * gpu::kWave, kBytes, attention_many_kernel<T, kDims, kWaves>, args);
  };
  auto launch = [&](auto dims) {
    const int blocks = args.a.n_head_kv * ((n_queries + kManyWaves * 16 - 1) / (kManyWaves * 16));
    if (kManyWaves == kFewWaves || 2 * blocks < gpu::compute_units()) {
      launch_waves(dims, std::integral_constant<int, kFewWaves>{});
    } else {
      launch_waves(dims, std::integral_constant<int, kManyWaves>{});
    }
  };
  if (args.a.head_dim == 128) {
    launch(std::integral_constant<int, 4>{});
  } else if (args.a.head_dim == 64) {
    launch(std::integral_constant<int, 2>{});
  } else {
    launch(std::integral_constant<int, 1>{});
  }
}

}  // namespace

bool attention_many_takes(const Attention& a, int rows, const KvLayer& kv) {
  return rows > kFewRows && (kv.type == DType::F16 || kv.type == DType::Q8_0) &&
         (a.head_dim == 32 || a.head_dim == 64 || a.head_dim == 128);
}

void launch_attention_many(gpu::Stream s, const Attention& a, int rows, Position pos0, const float* q, bool half_q,
                           const KvLayer& kv, float* out, HalfRows half) {
  FlashArgs args;
  args.a = a;
  args.pos0 = pos0;
  args.rows = rows;
  args.q = q;
  args.half_q = half_q;
  args.kv = kv;
  args.out = out;
  args.half = half.v;
  if (kv.type == DType::F16) {
    attention_many<DType::F16>(s, args);
  } else {
    attention_many<DType::Q8_0>(s, args);
  }
}

}  // namespace dflash::hip
