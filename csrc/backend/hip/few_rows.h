#pragma once
// Matrix times 1..16 rows, the heart of decoding and verifying: eight waves make one tile of 32 outputs for all its
// rows, wave s working on segment s of K, so that the weights are read once, in order, and by many waves at a time. Few
// rows use dot4 (a lane is an output row; the activations are the same for all lanes, scalar registers on AMD), more
// rows the matrix instructions. Both follow the order of layout.h, so their results are the same bits.
//
// On NVIDIA a wave's weights pass through a ring of chunks in shared memory, filled far ahead (gpu.h: kStaged).

#include "backend/hip/layout.h"

namespace dflash::hip {

inline constexpr int kFewRows = 16;
// groups of weights copied at a time
template <typename F>
inline constexpr int kChunk = F::kQuantBytes == kTile * 16 ? 6 : 3;

// partial sums of eight waves: [segment][row][32 outputs], in shared memory
template <int Rows>
using Partial = float[kSegments][Rows][kTile];

// Rows of int8 groups as a wave reads them: group g of row r is q + r * q_stride + g * 32, scale + r * s_stride + g.
struct ActRows {
  const int8_t* q;
  const GroupScale* scale;
  int q_stride, s_stride;

  struct Quants {
    int4 lo, hi;
  };
  __device__ inline Quants quants(int row, int g) const {
    const int4* at = reinterpret_cast<const int4*>(q + row * q_stride + g * 32);
    return {at[0], at[1]};
  }
  __device__ inline GroupScale group_scale(int row, int g) const { return scale[row * s_stride + g]; }
};

// The same where the rows lie in device memory one after the other, and a wave's lanes all ask for the same.
struct UniformRows : ActRows {
  __device__ inline UniformRows(const int8_t* q, const GroupScale* scale, int q_stride, int s_stride)
      : ActRows{q, scale, q_stride, s_stride} {}
  __device__ inline uint32_t at(int row, int g) const { return static_cast<uint32_t>(row * s_stride + g); }
  __device__ inline Quants quants(int row, int g) const {
    struct Words {
      int w[8];
    };
    const auto [w] = gpu::load_uniform(reinterpret_cast<const Words*>(q + at(row, g) * 32));
    return {make_int4(w[0], w[1], w[2], w[3]), make_int4(w[4], w[5], w[6], w[7])};
  }
  __device__ inline GroupScale group_scale(int row, int g) const {
    return gpu::load_uniform(behind(scale, at(row, g) * 8));
  }
};

// Rows left in device memory by the kernel before: on NVIDIA most of them are copied to shared memory.
using InputRows = std::conditional_t<gpu::kStaged, ActRows, UniformRows>;

struct Span {
  int g0, g1;  // groups of a wave's segment
};

__device__ inline Span segment_span(int segment, int groups) {
  const int per = segment_groups(groups);
  const int g0 = min(segment * per, groups);
  return {g0, min(g0 + per, groups)};
}

// A chunk in the ring: quants, scales, and with experts the activations of its groups: q [ActMost, kChunk<F>, 32],
// scales.
template <typename F, int ActMost>
struct Slot {
  static constexpr int kScales = kChunk<F> * F::kQuantBytes;
  static constexpr int kActs = kScales + kChunk<F> * kTile * F::kHalves * 2;
  static constexpr int kActScales = kActs + ActMost * kChunk<F> * 32;
  static constexpr int kBytes =
      (kActScales + ActMost * kChunk<F> * static_cast<int>(sizeof(GroupScale)) + 15) / 16 * 16;
};

// Groups of a tile, one after the other, that a wave copies a chunk at a time.
template <typename F>
struct Run {
  const uint8_t* quants = nullptr;  // the lane's part
  const uint8_t* scales = nullptr;
  int left = 0;  // groups

  __device__ inline void set(const TileView<F>& tile, Span span) {
    quants = tile.group_quants(span.g0) + gpu::lane() * 16;
    scales = reinterpret_cast<const uint8_t*>(tile.group_scales(span.g0)) + gpu::lane() * 16;
    left = span.g1 - span.g0;
  }

  // Up to kTile columns from `column` on (a multiple of 8), which may lie in two tiles, as one tile. Places past `end`
  // repeat the last column, which costs no memory.
  __device__ inline void set_columns(const TiledWeight& w, int expert, int column, int end, Span span) {
    constexpr int kColumns = 8 / F::kHalves, kPieces = kTile / kColumns;  // of 16 bytes of scales
    const int mine = min(column + gpu::lane(), end - 1);
    const int first = min(column + gpu::lane() % kPieces * kColumns, end - kColumns);
    quants = TileView<F>(w, expert, mine / kTile).group_quants(span.g0) + mine % kTile * 16;
    scales = reinterpret_cast<const uint8_t*>(
        TileView<F>(w, expert, first / kTile).group_scales(span.g0 + gpu::lane() / kPieces) +
        first % kTile * F::kHalves);
    left = span.g1 - span.g0;
  }

  // Begins to copy the next chunk: quants to slot, scales to slot + Slot::kScales.
  __device__ inline void copy_chunk(uint8_t* slot) {
    constexpr int kPieces = F::kQuantBytes / (gpu::kWave * 16), kScaleBytes = kTile * F::kHalves * 2;
    const int scale_bytes = min(left, kChunk<F>) * kScaleBytes - gpu::lane() * 16;
    slot += gpu::lane() * 16;
    if (left >= kChunk<F>) {
#pragma unroll
      for (int i = 0; i < kChunk<F> * kPieces; ++i) gpu::copy_begin<16>(slot + i * 512, quants + i * 512);
    } else {
#pragma unroll 1
      for (int i = 0; i < left * kPieces; ++i) gpu::copy_begin<16>(slot + i * 512, quants + i * 512);
    }
#pragma unroll
    for (int i = 0; i < kChunk<F> * kScaleBytes; i += 512) {
      if (scale_bytes > i) gpu::copy_begin<16>(slot + Slot<F, 0>::kScales + i, scales + i);
    }
    quants += kChunk<F> * F::kQuantBytes;
    scales += kChunk<F> * kScaleBytes;
    left -= kChunk<F>;
  }
};

// The weights of a wave's segment of tile after tile, and the activations that go with each.
//   Cursor: bool more(); TileView<F> tile(); int count(), row(i): rows of activations with it; void advance()
template <typename F, int Slots, int ActMost, typename Cursor>
class WeightStream {
 public:
  using Layout = Slot<F, ActMost>;

  // lds: Slots * Layout::kBytes, the wave's own (NVIDIA).
  __device__ WeightStream(uint8_t* lds, Span span, const Cursor& cursor)
      : lds_(lds), span_(span), cursor_(cursor), acts_cursor_(cursor) {
    if (span_.g0 >= span_.g1) cursor_.stop();
  }

  // Begins to copy as many weights as there is room for.
  __device__ inline void start() {
    if constexpr (gpu::kStaged) {
#pragma unroll
      for (int s = 0; s < Slots; ++s) {
        copy_weights(lds_ + s * Layout::kBytes);
        gpu::copy_commit();
      }
    }
  }

  // And the activations that belong to them, which take() then has to wait for.
  __device__ inline void start_acts(const QuantRows& x) {
    if constexpr (gpu::kStaged && ActMost > 0) {
      x_ = x;
      if (span_.g0 >= span_.g1) acts_cursor_.stop();
#pragma unroll
      for (int s = 0; s < Slots; ++s) copy_acts(lds_ + s * Layout::kBytes);
      gpu::copy_commit();
      gpu::copy_wait<0>();
    }
  }

  // Calls use(quants, scales, first group within the segment, groups, slot) for the pieces of the next tile, in order.
  template <typename Use>
  __device__ inline void take(Use use) {
    if constexpr (gpu::kStaged) {
#pragma unroll 1
      for (int g = span_.g0; g < span_.g1; g += kChunk<F>) {
        gpu::copy_wait<Slots - 1>();
        uint8_t* slot = lds_ + slot_;
        use(slot, reinterpret_cast<const uint16_t*>(slot + Layout::kScales), g - span_.g0, min(kChunk<F>, span_.g1 - g),
            slot);
        gpu::wave_sync();
        copy_weights(slot);
        if constexpr (ActMost > 0) copy_acts(slot);
        gpu::copy_commit();
        slot_ += Layout::kBytes;
        if (slot_ == Slots * Layout::kBytes) slot_ = 0;
      }
    } else {
      const TileView<F> tile = cursor_.tile();
      cursor_.advance();
      if (span_.g0 < span_.g1) {
        use(tile.group_quants(span_.g0), tile.group_scales(span_.g0), 0, span_.g1 - span_.g0, nullptr);
      }
    }
  }

 private:
  __device__ inline void copy_weights(uint8_t* slot) {
    if (run_.left <= 0) {
      if (!cursor_.more()) return;
      run_.set(cursor_.tile(), span_);
      cursor_.advance();
    }
    run_.copy_chunk(slot);
  }

  // Eight lanes to a row: two pieces of its int8 and a scale each.
  __device__ inline void copy_acts(uint8_t* slot) {
    static_assert(ActMost == 4 && kChunk<F> <= 8, "eight lanes to a row");
    const int row = gpu::lane() / 8, i = gpu::lane() % 8;
    if (acts_left_ <= 0) {
      if (!acts_cursor_.more()) return;
      acts_left_ = span_.g1 - span_.g0;
      const int count = acts_cursor_.count();
      q_from_ = nullptr;
      if (count <= ActMost && row < count) {
        const int64_t first = static_cast<int64_t>(acts_cursor_.row(row)) * (x_.n / 32) + span_.g0;
        q_from_ = x_.q + first * 32 + i * 16;
        s_from_ = x_.scale + first + i;
      }
      acts_cursor_.advance();
    }
    if (q_from_ != nullptr) {
      uint8_t* to = slot + Layout::kActs + row * (kChunk<F> * 32) + i * 16;
      const int groups = min(acts_left_, kChunk<F>);
      if (i < groups * 2) gpu::copy_begin<16>(to, q_from_);
      if (i + 8 < groups * 2) gpu::copy_begin<16>(to + 128, q_from_ + 128);
      if (i < groups) gpu::copy_begin<8>(slot + Layout::kActScales + (row * kChunk<F> + i) * 8, s_from_);
      q_from_ += kChunk<F> * 32;
      s_from_ += kChunk<F>;
    }
    acts_left_ -= kChunk<F>;
  }

  uint8_t* lds_;
  Span span_;
  Cursor cursor_, acts_cursor_;
  QuantRows x_;
  int slot_ = 0;  // of the next piece to use, in bytes
  Run<F> run_;
  int acts_left_ = 0;  // groups of the tile at hand whose activations are not copied yet
  const int8_t* q_from_ = nullptr;
  const GroupScale* s_from_ = nullptr;
};

// AMD: batches 0 .. n - 1 of weights, each asked for before the one before it is used: use(batch, i, ask for the next),
// at last use_last(batch, i). Two in turn, and no branch around what is asked for: a copy or a branch would have the
// compiler wait for what is on its way.
template <typename Batch, typename Load, typename Use, typename UseLast>
__device__ inline void one_ahead(int n, Load load, Use use, UseLast use_last) {
  Batch even, odd;
  load(even, 0);
  int i = 0;
#pragma unroll 1
  while (i + 1 < n) {
    use(even, i, [&] { load(odd, i + 1); });
    if (++i + 1 == n) {
      even = odd;
      break;
    }
    use(odd, i, [&] { load(even, i + 1); });
    ++i;
  }
  use_last(even, i);
}

// acc[r] += the dot products of the lane's output row with rows row_of(0) .. row_of(R - 1) of x over `groups` groups.
template <typename F, int R, typename Rows, typename RowOf>
__device__ inline void dot_groups(const uint8_t* quants, const uint16_t* scales, int groups, const Rows& x, int g0,
                                  RowOf row_of, float (&acc)[R]) {
  int row[R];
#pragma unroll
  for (int r = 0; r < R; ++r) row[r] = gpu::uniform(row_of(r));
  auto accumulate = [&](const typename F::Block& block, int r, int g) {
    const ActRows::Quants q = x.quants(row[r], g);
    const GroupScale s = x.group_scale(row[r], g);
    acc[r] = F::accumulate(block, q.lo, q.hi, s, acc[r]);
  };
  if constexpr (gpu::kStaged) {  // one chunk
    auto group_of = [&](int i) {
      const typename F::Block block =
          F::unpack(F::load(quants + i * F::kQuantBytes, scales + i * (kTile * F::kHalves), 0, gpu::lane()));
#pragma unroll
      for (int r = 0; r < R; ++r) accumulate(block, r, g0 + i);
    };
    if (groups == kChunk<F>) {
#pragma unroll
      for (int i = 0; i < kChunk<F>; ++i) group_of(i);
    } else {
#pragma unroll 1
      for (int i = 0; i < groups; ++i) group_of(i);
    }
    return;
  }
  constexpr int kAhead = gpu::kDotAhead[R == 1 ? 0 : 1];  // groups of weights loaded ahead
  struct Batch {
    typename F::Raw raw[kAhead];
  };
  auto load = [&](Batch& b, int batch) {
    const int g = batch * kAhead;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      b.raw[i] = F::load(quants, scales, min(g + i, groups - 1), gpu::lane());  // past the end: the last one again
    }
  };
  auto use = [&](const Batch& now, int g, int i) {
    const typename F::Block block = F::unpack(now.raw[i]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      accumulate(block, r, g0 + g + i);
      if (R > 1) gpu::keep_order();  // scalar registers for one row at a time
    }
  };
  auto use_all = [&](const Batch& now, int batch, auto ask_for_next) {
    ask_for_next();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      use(now, batch * kAhead, i);
      gpu::keep_order();  // scalar registers for one group's activations
    }
  };
  one_ahead<Batch>((groups + kAhead - 1) / kAhead, load, use_all, [&](const Batch& last, int batch) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (batch * kAhead + i < groups) use(last, batch * kAhead, i);
    }
  });
}

// The same for up to 16 rows by matrix instructions; Blocks * kMmaTokens >= count.
template <int Blocks>
using MmaSums = float[2][Blocks][gpu::kMmaAcc];

// A group's products with 16 weight rows, whose scales are d (and m).
template <typename F, int... J>
__device__ inline void mma_group(const gpu::MmaWeights& w, const uint16_t (&d)[gpu::kMmaRows],
                                 [[maybe_unused]] const uint16_t (&m)[gpu::kMmaRows], const gpu::MmaActs& a,
                                 const GroupScale (&asked)[gpu::kMmaAsked], float (&acc)[gpu::kMmaAcc],
                                 std::integer_sequence<int, J...>) {
  struct Sums {  // of a token
    int start;
    float sum, d;
  } own[gpu::kMmaAsked];
#pragma unroll
  for (int j = 0; j < gpu::kMmaAsked; ++j) {
    own[j] = {gpu::kMmaZero + F::start(asked[j].sum), static_cast<float>(asked[j].sum), asked[j].d};
  }
  const Sums x[] = {gpu::mma_of_token<J>(own)...};  // of the lane's tokens
  int c[gpu::kMmaAcc];
#pragma unroll
  for (int i = 0; i < gpu::kMmaAcc; ++i) c[i] = x[i % gpu::kMmaToks].start;
  gpu::mma(c, w, a);
#pragma unroll
  for (int i = 0; i < gpu::kMmaAcc; ++i) {
    const int row = i / gpu::kMmaToks, token = i % gpu::kMmaToks;
    acc[i] = fmaf(gpu::mma_value(c[i]), gpu::half_to_float(d[row]) * x[token].d, acc[i]);
    if (F::kHalves == 2) acc[i] = fmaf(x[token].sum, gpu::half_to_float(m[row]) * x[token].d, acc[i]);
  }
}

template <typename F, int Blocks, typename RowOf>
__device__ inline void mma_groups(const uint8_t* quants, const uint16_t* scales, int groups, const ActRows& x, int g0,
                                  RowOf row_of, int count, MmaSums<Blocks>& acc) {
  constexpr int kAsked = gpu::kMmaAsked;
  uint32_t operand_at[Blocks], scale_at[Blocks][kAsked];
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    // Rows past the last repeat it: their results are never stored.
    operand_at[b] = row_of(min(b * gpu::kMmaTokens + gpu::mma_act_token(), count - 1)) * x.q_stride + g0 * 32;
#pragma unroll
    for (int j = 0; j < kAsked; ++j) {
      scale_at[b][j] = row_of(min(b * gpu::kMmaTokens + gpu::mma_own_token(j), count - 1)) * x.s_stride + g0;
      scale_at[b][j] *= sizeof(GroupScale);
    }
  }
  struct Weights {  // of a group, as they lie
    decltype(F::mma_load(nullptr, 0, 0)) w[2];
    uint16_t d[2][gpu::kMmaRows], m[2][gpu::kMmaRows];
  };
  // Group g behind q and s, and behind xq and xs.
  auto load = [&](Weights& to, const uint8_t* q, const uint16_t* s, uint32_t g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      to.w[h] = F::mma_load(q, g, h);
#pragma unroll
      for (int i = 0; i < gpu::kMmaRows; ++i) {
        const uint16_t* at = behind(s, (g * kTile + h * 16 + gpu::mma_row(i)) * F::kHalves * 2);
        to.d[h][i] = gpu::load(at);
        if (F::kHalves == 2) to.m[h][i] = gpu::load(at + 1);
      }
    }
  };
  auto multiply = [&](const Weights& now, const int8_t* xq, const GroupScale* xs, uint32_t g, auto ask_for_next) {
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const gpu::MmaActs a =
          gpu::mma_load_acts(behind(reinterpret_cast<const uint8_t*>(xq), operand_at[b] + g * 32), 16);
      GroupScale sx[kAsked];
#pragma unroll
      for (int j = 0; j < kAsked; ++j) sx[j] = *behind(xs, scale_at[b][j] + g * sizeof(GroupScale));
      if (b == Blocks - 1) ask_for_next();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mma_group<F>(gpu::mma_unpack(now.w[h]), now.d[h], now.m[h], a, sx, acc[h][b],
                     std::make_integer_sequence<int, gpu::kMmaToks>());
      }
    }
  };
  if constexpr (gpu::kStaged) {
#pragma unroll gpu::kMmaUnroll
    for (int g = 0; g < groups; ++g) {
      Weights now;
      load(now, quants + g * F::kQuantBytes, scales + g * (kTile * F::kHalves), 0);
      multiply(now, x.q + g * 32, x.scale + g, 0, [] {});
    }
  } else {
    // Loads return in the order they are asked for: a group's activations are asked for before the next one's weights,
    // which may then stay on their way.
    auto use = [&](const Weights& now, int g, auto ask_for_next) {
      multiply(now, x.q, x.scale, g, [&] {
        gpu::keep_order();
        ask_for_next();
        gpu::keep_order();
      });
    };
    one_ahead<Weights>(
        groups, [&](Weights& to, int g) { load(to, quants, scales, g); }, use,
        [&](const Weights& last, int g) { multiply(last, x.q, x.scale, g, [] {}); });
  }
}

// The wave's segment of its stream's next tile times `count` rows into out[row][output]: rows row_of(0) .. of x (which
// begins with the segment's first group), or rows 0 .. as they came with the weights (FromRing). The choice of code
// depends on count alone, which is the same for all waves of a tile; MinRows and MaxRows bound it at compile time.
template <typename F, int MaxRows, bool FromRing, int MinRows = 1, typename Stream, typename Rows, typename RowOf>
__device__ inline void tile_segment(Stream& stream, const Rows& x, RowOf row_of, int count, float (*out)[kTile]) {
  using Layout = typename Stream::Layout;
  auto rows_at = [&](const uint8_t* slot) {
    if constexpr (FromRing) {
      return ActRows{reinterpret_cast<const int8_t*>(slot + Layout::kActs),
                     reinterpret_cast<const GroupScale*>(slot + Layout::kActScales), kChunk<F> * 32, kChunk<F>};
    } else {
      return x;
    }
  };
  auto row_at = [&](int i) {
    if constexpr (FromRing)
      return i;
    else
      return row_of(i);
  };
  auto dot = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    float acc[R] = {};
    stream.take([&](const uint8_t* quants, const uint16_t* scales, int g0, int groups, const uint8_t* slot) {
      dot_groups<F, R>(quants, scales, groups, rows_at(slot), FromRing ? 0 : g0, row_at, acc);
    });
#pragma unroll
    for (int r = 0; r < R; ++r) out[r][gpu::lane()] = acc[r];
  };
  [[maybe_unused]] auto mma = [&](auto blocks) {
    constexpr int kBlocks = decltype(blocks)::value;
    MmaSums<kBlocks> acc = {};
    stream.take([&](const uint8_t* quants, const uint16_t* scales, int g0, int groups, const uint8_t* slot) {
      mma_groups<F, kBlocks>(quants, scales, groups, rows_at(slot), FromRing ? 0 : g0, row_at, count, acc);
    });
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < gpu::kMmaAcc; ++i) {
          const int token = b * gpu::kMmaTokens + gpu::mma_token(i % gpu::kMmaToks);
          if (token < count) out[token][h * 16 + gpu::mma_row(i / gpu::kMmaToks)] = acc[h][b][i];
        }
      }
    }
  };
  if constexpr (MaxRows <= 2) {  // made for exactly so many
    dot(std::integral_constant<int, MaxRows>{});
  } else {
    if constexpr (MinRows <= 1) {
      if (count == 1) return dot(std::integral_constant<int, 1>{});
    }
    if constexpr (MinRows <= 2) {
      if (count == 2) return dot(std::integral_constant<int, 2>{});
    }
    if constexpr (gpu::kMmaFromRows > 3 && MaxRows <= 4) {  // beside matrix instructions scalar registers are short
      static_assert(gpu::kMmaFromRows <= 5, "dot products of at most four rows");
      switch (count) {
        case 3:
          dot(std::integral_constant<int, 3>{});
          return;
        case 4:
          dot(std::integral_constant<int, 4>{});
          return;
        default:
          break;
      }
    }
    if constexpr (MaxRows >= gpu::kMmaFromRows || MaxRows > 4) {
      if constexpr (MaxRows <= gpu::kMmaTokens) {
        mma(std::integral_constant<int, 1>{});
      } else {
        if (count <= gpu::kMmaTokens) {
          mma(std::integral_constant<int, 1>{});
        } else {
          mma(std::integral_constant<int, (kFewRows + gpu::kMmaTokens - 1) / gpu::kMmaTokens>{});
        }
      }
    }
  }
}

// Rows row_of(0) .. row_of(count - 1) of x (at most `most`), the wave's segment alone: copied to the wave's own shared
// memory at lds (NVIDIA, room given), there rows 0 .. count - 1, or left where they are.
__host__ __device__ inline int act_stride(int groups) { return groups * 32 + 16; }  // rows in different banks
__host__ __device__ inline int act_bytes(int groups) {
  return act_stride(groups) + groups * static_cast<int>(sizeof(GroupScale));
}

// By copies that are a batch of the wave's (gpu::copy_wait).
template <typename RowOf>
__device__ inline ActRows begin_acts(uint8_t* lds, const QuantRows& x, Span span, RowOf row_of, int count, int most) {
  const int groups = span.g1 - span.g0, all = static_cast<int>(x.n / 32);
  GroupScale* scale = reinterpret_cast<GroupScale*>(lds + most * act_stride(groups));
#pragma unroll 1
  for (int r = 0; r < count; ++r) {
    const int64_t row = static_cast<int64_t>(row_of(r)) * all + span.g0;
#pragma unroll 1
    for (int i = gpu::lane(); i < groups * 2; i += gpu::kWave) {
      gpu::copy_begin<16>(lds + r * act_stride(groups) + i * 16, x.q + row * 32 + i * 16);
      if (i < groups) gpu::copy_begin<8>(reinterpret_cast<uint8_t*>(scale + r * groups + i), x.scale + row + i);
    }
  }
  gpu::copy_commit();
  return {reinterpret_cast<const int8_t*>(lds), scale, act_stride(groups), groups};
}

// Whole: by copies that are all under way at once, and a wait for these and for all weights begun before.
template <bool Whole = false, typename RowOf>
__device__ inline ActRows stage_acts(uint8_t* lds, const QuantRows& x, Span span, RowOf row_of, int count, int most) {
  const int groups = span.g1 - span.g0, all = static_cast<int>(x.n / 32);
  int8_t* q = reinterpret_cast<int8_t*>(lds);
  GroupScale* scale = reinterpret_cast<GroupScale*>(lds + most * act_stride(groups));
  if constexpr (Whole) {
    const ActRows rows = begin_acts(lds, x, span, row_of, count, most);
    gpu::copy_wait<0>();
    return rows;
  } else {
    constexpr int kTogether = 4;
    for (int r0 = 0; r0 < count; r0 += kTogether) {
      for (int i = gpu::lane(); i < groups * 2; i += gpu::kWave) {
        int4 v[kTogether];
        GroupScale s[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int row = row_of(min(r0 + j, count - 1)) * all + span.g0;
          v[j] = reinterpret_cast<const int4*>(x.q)[static_cast<int64_t>(row) * 2 + i];
          if (i < groups) s[j] = x.scale[row + i];
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (r0 + j >= count) break;
          *reinterpret_cast<int4*>(q + (r0 + j) * act_stride(groups) + i * 16) = v[j];
          if (i < groups) scale[(r0 + j) * groups + i] = s[j];
        }
      }
    }
  }
  gpu::wave_sync();
  return {q, scale, act_stride(groups), groups};
}

// The runs added in order: output `column` of the tile for row r.
template <int Rows>
__device__ inline float add_segments(const Partial<Rows>& partial, int segments, int r, int column) {
  float sum = kEmptySum;
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    if (s < segments) sum += partial[s][r][column];
  }
  return sum;
}

// What a wave of the few-row kernels needs of shared memory beside what they declare: ring, activations of its segment.
// NVIDIA only.
struct WaveMemory {
  int ring_bytes = 0;
  int acts = 0;     // rows of activations beside the ring; 0: they are in it or stay where they are
  int segment = 0;  // groups of a segment

  __host__ __device__ int wave_bytes() const { return ring_bytes + (acts * act_bytes(segment) + 15) / 16 * 16; }
  __device__ uint8_t* ring(uint8_t* block, int wave) const { return block + wave * wave_bytes(); }
  __device__ uint8_t* act_rows(uint8_t* block, int wave) const { return ring(block, wave) + ring_bytes; }
};

}  // namespace dflash::hip
