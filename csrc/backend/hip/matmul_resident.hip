// Dense matrix times 1..4 rows where all weights of a multiprocessor fit its shared memory: the output projection, and
// q, k, v of two rows and more. A block of sixteen waves either makes two tiles of outputs, a wave for a segment of K,
// or one tile whose segments are shared by two waves each; every weight is on its way before the kernel waits for the
// one before. Rows are normalised and quantised here if need be: once for each multiprocessor. NVIDIA only.

#include "backend/hip/dense_few.h"

namespace dflash::hip {

namespace {

constexpr int kWaves = 2 * kSegments;
constexpr int kGroups = 12;     // of a wave, at most
constexpr int kMostShared = 3;  // rows with which two waves share a segment: the second one's terms stay in registers

template <typename F>
inline constexpr int kWeightBytes = kGroups * (F::kQuantBytes + kTile * F::kHalves * 2);  // of a wave

// Groups [span.g0, span.g1) of a tile: quants, then scales, at lds.
template <typename F>
__device__ inline void copy_groups(uint8_t* lds, const TileView<F>& tile, Span span) {
  constexpr int kPieces = F::kQuantBytes / (gpu::kWave * 16), kScaleBytes = kTile * F::kHalves * 2;
  const int groups = span.g1 - span.g0, at = gpu::lane() * 16;
  const uint8_t* quants = tile.group_quants(span.g0) + at;
  const uint8_t* scales = reinterpret_cast<const uint8_t*>(tile.group_scales(span.g0)) + at;
#pragma unroll
  for (int i = 0; i < kGroups * kPieces; ++i) {
    if (i < groups * kPieces) gpu::copy_begin<16>(lds + at + i * 512, quants + i * 512);
  }
#pragma unroll
  for (int i = 0; i < kGroups * kScaleBytes; i += 512) {
    if (i + at < groups * kScaleBytes) {
      gpu::copy_begin<16>(lds + kGroups * F::kQuantBytes + at + i, scales + i);
    }
  }
}

// What the wave's groups add to the lane's output for each row; x begins with the first of them. A branch a group: one
// row loses 1% of a step where full segments have code of their own.
template <typename F, int Rows>
__device__ inline void make_terms(const uint8_t* lds, int groups, const ActRows& x,
                                  typename F::Term (&terms)[Rows][kGroups]) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(lds + kGroups * F::kQuantBytes);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (g >= groups) break;
    const typename F::Block block =
        F::unpack(F::load(lds + g * F::kQuantBytes, scales + g * (kTile * F::kHalves), 0, gpu::lane()));
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int4* q = reinterpret_cast<const int4*>(x.q + r * x.q_stride + g * 32);
      terms[r][g] = F::term(block, q[0], q[1], x.scale[r * x.s_stride + g]);
    }
  }
}

template <typename F, int Rows>
__device__ inline void add_terms(const typename F::Term (&terms)[Rows][kGroups], int groups, float (&acc)[Rows]) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (g >= groups) break;
#pragma unroll
    for (int r = 0; r < Rows; ++r) acc[r] = hip::add(terms[r][g], acc[r]);
  }
}

// Shared: two waves to a segment, one tile a block; else two tiles.
template <typename F, int Rows, bool Norm, bool Shared>
__global__ void __launch_bounds__(kWaves* gpu::kWave, Rows == 1 ? 2 : 1)
    matmul_resident_kernel(OutList list, FewInput in, bool add) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<Rows> partial[Shared ? 1 : 2];
  using Norms = NormRows<Rows, kWaves>;
  [[maybe_unused]] __shared__ typename Norms::Sums sums;
  const int wave = gpu::wave(), half = wave / kSegments, segment = wave % kSegments;
  const int groups = list.out[0].w.groups;
  const int tile = Shared ? static_cast<int>(blockIdx.x) : static_cast<int>(blockIdx.x) * 2 + half;
  const bool there = tile < list.tiles;
  Span span = segment_span(segment, groups);
  if (Shared) {
    const int middle = (span.g0 + span.g1 + 1) / 2;
    (half == 0 ? span.g1 : span.g0) = middle;
  }
  int o = 0;
  while (there && tile >= list.first_tile[o + 1]) ++o;
  const TiledOut& out = list.out[o];
  uint8_t* const weights = lds + wave * kWeightBytes<F>;
  if (there) copy_groups<F>(weights, TileView<F>(out.w, 0, tile - list.first_tile[o]), span);
  gpu::copy_commit();
  [[maybe_unused]] const Norms norm(in.norm, Norm ? groups * 32 : 0);
  gpu::wait_for_previous();
  uint8_t* const acts = lds + kWaves * kWeightBytes<F>;
  ActRows x;
  if constexpr (!Norm) {
    x = begin_acts(acts + wave * (Rows * act_bytes(kGroups)), in.x, span, [](int r) { return r; }, Rows, Rows);
  }
  const int64_t n = static_cast<int64_t>(tile - list.first_tile[o]) * kTile + gpu::lane();
  const bool stores = there && wave - (Shared ? 0 : half * kSegments) < Rows && n < out.w.n_out;  // row `segment`
  float before = 0.0f;                                                                            // what is added to
  if (stores && add) before = out.y[segment * out.w.n_out + n];
  if constexpr (Norm) {
    norm.run(acts, sums);
    x = {reinterpret_cast<const int8_t*>(acts) + span.g0 * 32,
         reinterpret_cast<const GroupScale*>(acts + Rows * groups * 32) + span.g0, groups * 32, groups};
  }
  gpu::copy_wait<0>();
  Partial<Rows>& sum = partial[Shared ? 0 : half];
  float acc[Rows] = {};
  const int mine = span.g1 - span.g0;
  typename F::Term terms[Rows][kGroups];
  make_terms<F, Rows>(weights, mine, x, terms);
#pragma unroll 1
  for (int turn = 0; turn < (Shared ? 2 : 1); ++turn) {  // the second wave goes on where the first one ended
    if (!Shared || half == turn) {
#pragma unroll
      for (int r = 0; turn > 0 && r < Rows; ++r) acc[r] = sum[segment][r][gpu::lane()];
      add_terms<F, Rows>(terms, mine, acc);
#pragma unroll
      for (int r = 0; r < Rows; ++r) sum[segment][r][gpu::lane()] = acc[r];
    }
    if (Shared && turn == 0) __syncthreads();
  }
  __syncthreads();
  if (!there || wave - (Shared ? 0 : half * kSegments) >= Rows) return;
  const float v = add_segments<Rows>(sum, list.segments, segment, gpu::lane());
  if (stores) out.y[segment * out.w.n_out + n] = add ? before + v : v;
  if (Norm && Rows == 1 && list.squares != nullptr) {
    const float squares = tile_squares(stores ? v : 0.0f);
    if (gpu::lane() == 0) list.squares[tile] = squares;
  }
}

// Two waves to a segment?
bool shares(const OutList& list) { return list.tiles <= gpu::compute_units(); }

template <typename F>
size_t shared_bytes(const OutList& list, int rows, bool norm) {
  const int acts = norm ? norm_bytes(rows, list.n_in()) : kWaves * rows * act_bytes(kGroups);
  return static_cast<size_t>(kWaves * kWeightBytes<F> + acts);
}

template <typename F>
bool fits(const OutList& list, int rows, bool norm) {
  const bool shared = shares(list);
  if (rows == 1 && !shared) return false;  // two small blocks find room sooner
  const int groups = segment_groups(list.out[0].w.groups);
  const size_t fixed = static_cast<size_t>((shared ? 1 : 2) * rows * kSegments * kTile + rows * gpu::kWave) * 4;
  return rows <= (shared ? kMostShared : kFusedRows) && list.tiles <= 2 * gpu::compute_units() &&
         groups <= (shared ? 2 : 1) * kGroups && (!norm || norm_fits(list.n_in())) &&
         shared_bytes<F>(list, rows, norm) + fixed <= gpu::kSharedMost;
}

}  // namespace

bool resident_fits(DType type, const OutList& list, int rows, bool norm) {
  if (!gpu::kStaged) return false;
  bool yes = false;
  with_format(type, [&](auto format) { yes = fits<decltype(format)>(list, rows, norm); });
  return yes;
}

bool launch_resident([[maybe_unused]] gpu::Stream s, DType type, const OutList& list, const FewInput& in,
                     [[maybe_unused]] bool add) {
  if (!resident_fits(type, list, in.rows, in.norm.x != nullptr)) return false;
  if constexpr (gpu::kStaged) {
    const bool shared = shares(list), norm = in.norm.x != nullptr;
    with_format(type, [&](auto format) {
      using F = decltype(format);
      auto run = [&](auto kernel) {
        const int blocks = shared ? list.tiles : (list.tiles + 1) / 2;
        gpu::launch_shared(s, dim3(static_cast<unsigned>(blocks)), kWaves * gpu::kWave,
                           shared_bytes<F>(list, in.rows, norm), kernel, list, in, add);
      };
      auto of_rows = [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        auto of_shared = [&](auto is_shared) {
          constexpr bool kShared = decltype(is_shared)::value;
          norm ? run(matmul_resident_kernel<F, kRows, true, kShared>)
               : run(matmul_resident_kernel<F, kRows, false, kShared>);
        };
        if constexpr (kRows <= kMostShared) {
          if (shared) return of_shared(std::true_type{});
        }
        if constexpr (kRows > 1) of_shared(std::false_type{});
      };
      switch (in.rows) {
        case 1:
          return of_rows(std::integral_constant<int, 1>{});
        case 2:
          return of_rows(std::integral_constant<int, 2>{});
        case 3:
          return of_rows(std::integral_constant<int, 3>{});
        default:
          return of_rows(std::integral_constant<int, 4>{});
      }
    });
  }
  return true;
}

}  // namespace dflash::hip
