// Dense matrix times 1..16 rows, and float weights times any rows.

#include "backend/hip/few_rows.h"
#include "backend/hip/float_dot.h"
#include "backend/hip/kernels.h"

namespace dflash::hip {

namespace {

constexpr int kActsMost = 64 << 10;  // bytes of activations of a block that are copied

struct OutList {
  TiledOut out[kMaxOuts];
  int first_tile[kMaxOuts + 1];  // tiles of the outputs before
  int tiles;                     // of all outputs
};

struct FewInput {
  QuantRows x;     // the rows' int8 groups, or
  NormInput norm;  // the one row, which every block normalises and quantises for itself
  int rows;
};

// Tiles of any output, each block takes every gridDim.x-th.
template <typename F, int MaxRows, bool Norm, int Slots>
__global__ void __launch_bounds__(kThreads, gpu::few_blocks(MaxRows))
    matmul_few_kernel(OutList list, FewInput in, WaveMemory memory, bool add) {
  extern __shared__ __align__(16) uint8_t lds[];
  constexpr int kBuffers = MaxRows <= 8 ? 2 : 1;
  __shared__ Partial<MaxRows> partial[kBuffers];
  [[maybe_unused]] __shared__ NormRows<1, kSegments>::Sums sums;
  const int wave = gpu::wave(), groups = list.out[0].w.groups;
  const Span span = segment_span(wave, groups);
  const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  struct Cursor {
    const OutList& list;
    int at, step, end;
    __device__ void stop() { end = 0; }
    __device__ bool more() const { return at < end; }
    __device__ TileView<F> tile() const {
      int o = 0;
      while (at >= list.first_tile[o + 1]) ++o;
      return TileView<F>(list.out[o].w, 0, at - list.first_tile[o]);
    }
    __device__ void advance() { at += step; }
  };
  WeightStream<F, Slots, 0, Cursor> stream(memory.ring(lds, wave), span, Cursor{list, first, step, list.tiles});
  // The weights do not depend on the kernel before: start them on their way while it ends.
  stream.start();
  [[maybe_unused]] const NormRows<1, kSegments> norm(in.norm, Norm ? groups * 32 : 0);
  gpu::wait_for_previous();
  ActRows x;
  if constexpr (Norm) {
    uint8_t* acts = gpu::kStaged ? memory.ring(lds, kSegments) : lds;
    norm.run(acts, sums);
    x = {reinterpret_cast<const int8_t*>(acts) + span.g0 * 32,
         reinterpret_cast<const GroupScale*>(acts + groups * 32) + span.g0, 0, 0};
  } else if (gpu::kStaged && (MaxRows <= 2 || memory.acts > 0)) {
    // One tile, all its weights are on their way: nothing is lost by waiting for them with the rows.
    constexpr bool kWhole = Slots > 12 / kChunk<F>;
    x = stage_acts<kWhole>(memory.act_rows(lds, wave), in.x, span, [](int r) { return r; }, in.rows, memory.acts);
  } else {
    x = {in.x.q + span.g0 * 32, in.x.scale + span.g0, groups * 32, groups};
  }
  int buffer = 0;
  for (int tile = first; tile < list.tiles; tile += step) {
    int o = 0;
    while (tile >= list.first_tile[o + 1]) ++o;
    const TiledOut& out = list.out[o];
    const int64_t n = static_cast<int64_t>(tile - list.first_tile[o]) * kTile + gpu::lane();
    float before[(MaxRows + kSegments - 1) / kSegments] = {};  // what is added to, read while the products are made
#pragma unroll
    for (int i = 0; add && i * kSegments < MaxRows; ++i) {
      const int r = wave + i * kSegments;
      if (r < in.rows && n < out.w.n_out) before[i] = out.y[r * out.w.n_out + n];
    }
    tile_segment<F, MaxRows, false>(stream, x, [](int r) { return r; }, in.rows, partial[buffer][wave]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i * kSegments < MaxRows; ++i) {
      const int r = wave + i * kSegments;
      if (r >= in.rows) break;
      const float v = add_segments<MaxRows>(partial[buffer], segment_count(groups), r, gpu::lane());
      if (n < out.w.n_out) out.y[r * out.w.n_out + n] = add ? before[i] + v : v;
    }
    if (kBuffers == 1) __syncthreads();
    buffer = kBuffers - 1 - buffer;
  }
}

template <typename F, int MaxRows, bool Norm>
void matmul_few(gpu::Stream s, const OutList& list, const FewInput& in, bool add) {
  const int groups = list.out[0].w.groups, units = gpu::compute_units();
  size_t shared = Norm ? static_cast<size_t>(norm_bytes(1, groups * 32)) : 0;
  WaveMemory memory;
  auto run = [&](int slots, int blocks, auto kernel) {
    if (gpu::kStaged) {
      memory.segment = segment_groups(groups);
      memory.ring_bytes = slots * Slot<F, 0>::kBytes;
      if (!Norm && (MaxRows <= 2 || kSegments * in.rows * act_bytes(memory.segment) <= kActsMost))
        memory.acts = in.rows;
      shared += kSegments * static_cast<size_t>(memory.wave_bytes());
      // No more than two to a multiprocessor: those that are free first would take four, and the others wait for them.
      if (shared < gpu::kSharedMost / 3) shared = gpu::kSharedMost / 3;
    }
    gpu::launch_shared(s, dim3(static_cast<unsigned>(blocks)), kThreads, shared, kernel, list, in, memory, add);
  };
  if constexpr (gpu::kStaged) {
    constexpr int kSlots = 12 / kChunk<F>;
    // A block that has a multiprocessor for itself takes a longer run of weights ahead.
    if constexpr (!Norm && F::kQuantBytes == kTile * 16) {
      if (list.tiles <= units && segment_groups(groups) > 12) {
        return run(2 * kSlots, list.tiles, matmul_few_kernel<F, MaxRows, Norm, 2 * kSlots>);
      }
    }
    run(kSlots, list.tiles < 2 * units ? list.tiles : 2 * units, matmul_few_kernel<F, MaxRows, Norm, kSlots>);
  } else {
    run(0, list.tiles, matmul_few_kernel<F, MaxRows, Norm, 2>);
  }
}

template <typename F>
void matmul_few_rows(gpu::Stream s, const OutList& list, const FewInput& in, bool add) {
  if (in.rows == 1) {
    matmul_few<F, 1, false>(s, list, in, add);
  } else if (gpu::kStaged && in.rows == 2) {
    matmul_few<F, gpu::kStaged ? 2 : 4, false>(s, list, in, add);
  } else if (in.rows <= 4) {
    matmul_few<F, 4, false>(s, list, in, add);
  } else if (in.rows <= 8) {
    matmul_few<F, 8, false>(s, list, in, add);
  } else {
    matmul_few<F, kFewRows, false>(s, list, in, add);
  }
}

OutList out_list(const TiledOut* outs, int n_outs) {
  OutList list = {};
  for (int i = 0; i < n_outs; ++i) {
    list.out[i] = outs[i];
    list.first_tile[i + 1] = list.first_tile[i] + outs[i].w.tiles;
  }
  list.tiles = list.first_tile[n_outs];
  return list;
}

// ---- float weights
// ----------------------------------------------------------------------------------------------------

constexpr int kFloatRows = 8;  // rows of x that share one reading of the weights

// grid (outputs / 8, rows / R): a wave per output.
template <DType T, int V, int R>
__global__ void __launch_bounds__(kThreads)
    float_matmul_kernel(const typename FloatFormat<T>::Element* __restrict__ w, int64_t n_in, int64_t n_out,
                        const float* __restrict__ x, int rows, float* y, bool add) {
  gpu::wait_for_previous();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kSegments + gpu::wave();
  if (n >= n_out) return;
  const int first = static_cast<int>(blockIdx.y) * R;
  auto store = [&](int r, float v) {
    float* p = y + static_cast<int64_t>(first + r) * n_out + n;
    *p = add ? *p + v : v;
  };
  if (first + R <= rows) {
    float acc[R];
    float_dot<T, V, R>(w + n * n_in, x + first * n_in, n_in, n_in, acc);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (gpu::lane() == 0) store(r, acc[r]);
    }
  } else {
    for (int r = 0; first + r < rows; ++r) {
      float acc[1];
      float_dot<T, V, 1>(w + n * n_in, x + (first + r) * n_in, n_in, n_in, acc);
      if (gpu::lane() == 0) store(r, acc[0]);
    }
  }
}

template <DType T, int V>
void float_matmul(gpu::Stream s, const Weight& w, const float* x, int rows, float* y, bool add) {
  const auto* data = static_cast<const typename FloatFormat<T>::Element*>(w.data);
  auto run = [&](auto r, auto kernel) {
    constexpr int R = decltype(r)::value;
    const dim3 grid(static_cast<unsigned>((w.n_out + kSegments - 1) / kSegments),
                    static_cast<unsigned>((rows + R - 1) / R));
    gpu::launch(s, grid, kThreads, kernel, data, w.n_in, w.n_out, x, rows, y, add);
  };
  if (rows == 1) {
    run(std::integral_constant<int, 1>{}, float_matmul_kernel<T, V, 1>);
  } else if (rows == 2 || rows == 3) {
    run(std::integral_constant<int, 2>{}, float_matmul_kernel<T, V, 2>);
  } else if (rows < kFloatRows) {
    run(std::integral_constant<int, 4>{}, float_matmul_kernel<T, V, 4>);
  } else {
    run(std::integral_constant<int, kFloatRows>{}, float_matmul_kernel<T, V, kFloatRows>);
  }
}

// ---- float experts: any rows, one pair at a time (files that keep experts in floats are small)
// --------------------------

template <DType T>
__global__ void __launch_bounds__(kThreads)
    float_gate_up_kernel(const typename FloatFormat<T>::Element* gate, const typename FloatFormat<T>::Element* up,
                         int64_t n_in, int64_t n_out, const float* h, Routing r, float* act) {
  gpu::wait_for_previous();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kSegments + gpu::wave();
  const int pair = static_cast<int>(blockIdx.y);
  if (n >= n_out) return;
  const int64_t at = (static_cast<int64_t>(r.experts[pair]) * n_out + n) * n_in;
  const float* x = h + static_cast<int64_t>(pair / r.top_k) * n_in;
  float g[1], u[1];
  float_dot<T, 1, 1>(gate + at, x, 0, n_in, g);
  float_dot<T, 1, 1>(up + at, x, 0, n_in, u);
  if (gpu::lane() == 0) act[pair * n_out + n] = swiglu(g[0], u[0]);
}

template <DType T>
__global__ void __launch_bounds__(kThreads)
    float_down_kernel(const typename FloatFormat<T>::Element* down, int64_t n_in, int64_t n_out, const float* act,
                      Routing r, float* y) {
  gpu::wait_for_previous();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kSegments + gpu::wave();
  const int pair = static_cast<int>(blockIdx.y);
  if (n >= n_out) return;
  float v[1];
  float_dot<T, 1, 1>(down + (static_cast<int64_t>(r.experts[pair]) * n_out + n) * n_in, act + pair * n_in, 0, n_in, v);
  if (gpu::lane() == 0) y[pair * n_out + n] = v[0];
}

template <typename F>
void with_float(DType type, F&& f) {
  switch (type) {
    case DType::F32:
      f(std::integral_constant<DType, DType::F32>{});
      return;
    case DType::F16:
      f(std::integral_constant<DType, DType::F16>{});
      return;
    case DType::BF16:
      f(std::integral_constant<DType, DType::BF16>{});
      return;
    default:
      fail("GPU: no float kernel for ", dtype_info(type).name);
  }
}

}  // namespace

void launch_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, QuantRows x, int rows, bool add) {
  const OutList list = out_list(outs, n_outs);
  const FewInput in = {x, {}, rows};
  with_format(type, [&](auto format) { matmul_few_rows<decltype(format)>(s, list, in, add); });
}

bool matmul_can_norm(int rows, int64_t n_in) { return rows == 1 && norm_fits(n_in); }

void launch_norm_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, NormInput x, bool add) {
  const OutList list = out_list(outs, n_outs);
  const FewInput in = {{}, x, 1};
  with_format(type, [&](auto format) { matmul_few<decltype(format), 1, true>(s, list, in, add); });
}

void launch_float_matmul(gpu::Stream s, const Weight& w, const float* x, int rows, float* y, bool add) {
  with_float(w.type, [&](auto t) {
    constexpr DType T = decltype(t)::value;
    if (w.n_in % FloatFormat<T>::kVector == 0) {
      float_matmul<T, FloatFormat<T>::kVector>(s, w, x, rows, y, add);
    } else {
      float_matmul<T, 1>(s, w, x, rows, y, add);
    }
  });
}

void launch_float_gate_up(gpu::Stream s, const Weight& gate, const Weight& up, const float* h, const Routing& r,
                          float* act) {
  const dim3 grid(static_cast<unsigned>((gate.n_out + kSegments - 1) / kSegments),
                  static_cast<unsigned>(r.rows * r.top_k));
  with_float(gate.type, [&](auto t) {
    constexpr DType T = decltype(t)::value;
    using Element = typename FloatFormat<T>::Element;
    gpu::launch(s, grid, kThreads, float_gate_up_kernel<T>, static_cast<const Element*>(gate.data),
                static_cast<const Element*>(up.data), gate.n_in, gate.n_out, h, r, act);
  });
}

void launch_float_down(gpu::Stream s, const Weight& down, const float* act, const Routing& r, float* y, float* x) {
  const dim3 grid(static_cast<unsigned>((down.n_out + kSegments - 1) / kSegments),
                  static_cast<unsigned>(r.rows * r.top_k));
  with_float(down.type, [&](auto t) {
    constexpr DType T = decltype(t)::value;
    using Element = typename FloatFormat<T>::Element;
    gpu::launch(s, grid, kThreads, float_down_kernel<T>, static_cast<const Element*>(down.data), down.n_in, down.n_out,
                act, r, y);
  });
  launch_add_experts(s, r, y, down.n_out, x);
}

}  // namespace dflash::hip
