// Dense matrix times 1..16 rows, and float weights times any rows.

#include "backend/hip/dense_few.h"
#include "backend/hip/float_dot.h"
#include "backend/hip/kernels.h"

namespace dflash::hip {

namespace {

constexpr int kActsMost = 64 << 10;  // bytes of activations of a block that are copied
template <typename F>
inline constexpr int kDenseSlots = 12 / kChunk<F>;  // of a wave's ring

// The fewest rows that a kernel made for `most` is given (with_dense_rows).
constexpr int dense_least(int most) { return most == 4 && !gpu::kStaged ? 2 : most / 2 + 1; }

// Tiles of any output, each block takes every gridDim.x-th.
template <typename F, int MaxRows, bool Norm, int Slots>
__global__ void __launch_bounds__(kThreads, gpu::few_blocks(MaxRows))
    matmul_few_kernel(OutList list, FewInput in, WaveMemory memory, bool add) {
  DFLASH_DYNAMIC_SHARED(lds);
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
  std::conditional_t<Norm, ActRows, InputRows> x = {in.x.q + span.g0 * 32, in.x.scale + span.g0, groups * 32, groups};
  if constexpr (Norm) {
    uint8_t* acts = gpu::kStaged ? memory.ring(lds, kSegments) : lds;
    norm.run(acts, sums);
    x = {reinterpret_cast<const int8_t*>(acts) + span.g0 * 32,
         reinterpret_cast<const GroupScale*>(acts + groups * 32) + span.g0, 0, 0};
  } else if constexpr (gpu::kStaged) {
    // One tile, all its weights are on their way: nothing is lost by waiting for them with the rows.
    constexpr bool kWhole = Slots > kDenseSlots<F>;
    if (MaxRows <= 2 || memory.acts > 0) {
      x = stage_acts<kWhole>(memory.act_rows(lds, wave), in.x, span, [](int r) { return r; }, in.rows, memory.acts);
    }
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
    tile_segment<F, MaxRows, false, dense_least(MaxRows)>(
        stream, x, [](int r) { return r; }, in.rows, partial[buffer][wave]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i * kSegments < MaxRows; ++i) {
      const int r = wave + i * kSegments;
      if (r >= in.rows) break;
      const float v = add_segments<MaxRows>(partial[buffer], list.segments, r, gpu::lane());
      if (n < out.w.n_out) out.y[r * out.w.n_out + n] = add ? before[i] + v : v;
      if (Norm && list.squares != nullptr) {
        const float squares = tile_squares(n < out.w.n_out ? v : 0.0f);
        if (gpu::lane() == 0) list.squares[tile] = squares;
      }
    }
    if (kBuffers == 1) __syncthreads();
    buffer = kBuffers - 1 - buffer;
  }
}

// The two products of a gated feed-forward, whose 32 outputs of a tile are one int8 group of the next product's input.
template <typename F, int MaxRows, int Slots>
__global__ void __launch_bounds__(kThreads, gpu::few_blocks(MaxRows))
    gate_up_dense_kernel(TiledWeight gate, TiledWeight up, QuantRows in, int rows, WaveMemory memory,
                         MutableQuantRows act) {
  DFLASH_DYNAMIC_SHARED(lds);
  __shared__ Partial<MaxRows> sums[2];
  const int wave = gpu::wave(), tiles = gate.tiles;
  const Span span = segment_span(wave, gate.groups);
  const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  struct Cursor {
    const TiledWeight& gate;
    const TiledWeight& up;
    int at, step, half;
    bool stopped;
    __device__ void stop() { stopped = true; }
    __device__ bool more() const { return !stopped && at < gate.tiles; }
    __device__ TileView<F> tile() const { return TileView<F>(half == 0 ? gate : up, 0, at); }
    __device__ void advance() {
      if (half == 1) at += step;
      half ^= 1;
    }
  };
  WeightStream<F, Slots, 0, Cursor> stream(memory.ring(lds, wave), span, Cursor{gate, up, first, step, 0, false});
  stream.start();
  gpu::wait_for_previous();
  auto row_of = [](int r) { return r; };
  InputRows x = {in.q + span.g0 * 32, in.scale + span.g0, gate.groups * 32, gate.groups};
  if constexpr (gpu::kStaged) {
    if (memory.acts > 0) x = stage_acts(memory.act_rows(lds, wave), in, span, row_of, rows, memory.acts);
  }
  const int segments = segment_count(gate.groups);
  for (int tile = first; tile < tiles; tile += step) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      tile_segment<F, MaxRows, false, dense_least(MaxRows)>(stream, x, row_of, rows, sums[half][wave]);
    }
    __syncthreads();
    for (int r = wave; r < rows; r += kSegments) {
      const float g = add_segments<MaxRows>(sums[0], segments, r, gpu::lane());
      const float u = add_segments<MaxRows>(sums[1], segments, r, gpu::lane());
      const int64_t group = static_cast<int64_t>(r) * tiles + tile;
      quantize_group(swiglu(g, u), act.q + group * 32, act.scale + group);
    }
    __syncthreads();
  }
}

// Shared memory of a wave whose ring has so many slots; rows: of activations, copied there if all of them fit.
template <typename F>
WaveMemory dense_memory(int slots, int groups, int rows) {
  WaveMemory memory;
  if (!gpu::kStaged) return memory;
  memory.segment = segment_groups(groups);
  memory.ring_bytes = slots * Slot<F, 0>::kBytes;
  if (rows <= 2 || kSegments * rows * act_bytes(memory.segment) <= kActsMost) memory.acts = rows;
  return memory;
}

// Calls f(MaxRows) with the smallest bound for which dense kernels are made.
template <typename F>
void with_dense_rows(int rows, F&& f) {
  if (rows == 1) return f(std::integral_constant<int, 1>{});
  if constexpr (gpu::kStaged) {
    if (rows == 2) return f(std::integral_constant<int, 2>{});
  }
  if (rows <= 4) return f(std::integral_constant<int, 4>{});
  if (rows <= 8) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, kFewRows>{});
}

template <typename F, int MaxRows, bool Norm>
void matmul_few(gpu::Stream s, const OutList& list, const FewInput& in, bool add) {
  const int groups = list.out[0].w.groups, units = gpu::compute_units();
  size_t shared = Norm ? static_cast<size_t>(norm_bytes(1, groups * 32)) : 0;
  auto run = [&](int slots, int blocks, auto kernel) {
    const WaveMemory memory = dense_memory<F>(slots, groups, Norm ? 0 : in.rows);
    if (gpu::kStaged) {
      shared += kSegments * static_cast<size_t>(memory.wave_bytes());
      // No more than two to a multiprocessor: those that are free first would take four, and the others wait for them.
      if (shared < gpu::kSharedMost / 3) shared = gpu::kSharedMost / 3;
    }
    gpu::launch_shared(s, dim3(static_cast<unsigned>(blocks)), kThreads, shared, kernel, list, in, memory, add);
  };
  if constexpr (gpu::kStaged) {
    constexpr int kSlots = kDenseSlots<F>;
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

// ---- float weights

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
  if (launch_resident(s, type, list, in, add) || launch_matmul_half(s, type, list, x, rows, add)) return;
  with_format(type, [&](auto format) {
    with_dense_rows(rows,
                    [&](auto most) { matmul_few<decltype(format), decltype(most)::value, false>(s, list, in, add); });
  });
}

bool matmul_can_norm(DType type, const TiledOut* outs, int n_outs, int rows) {
  const OutList list = out_list(outs, n_outs);
  return norm_fits(list.n_in()) && (rows == 1 || resident_fits(type, list, rows, true));
}

void launch_norm_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, NormInput x, int rows, bool add,
                        float* squares) {
  const OutList list = out_list(outs, n_outs, squares);
  const FewInput in = {{}, x, rows};
  if (launch_resident(s, type, list, in, add)) return;
  with_format(type, [&](auto format) { matmul_few<decltype(format), 1, true>(s, list, in, add); });
}

void launch_gate_up_dense(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, QuantRows x,
                          int rows, MutableQuantRows act) {
  if (launch_gate_up_half(s, type, gate, up, x, rows, act)) return;
  with_format(type, [&](auto format) {
    with_dense_rows(rows, [&](auto most) {
      using F = decltype(format);
      const WaveMemory memory = dense_memory<F>(kDenseSlots<F>, gate.groups, rows);
      const int resident = 2 * gpu::compute_units(),
                blocks = !gpu::kStaged || gate.tiles < resident ? gate.tiles : resident;
      gpu::launch_shared(s, dim3(static_cast<unsigned>(blocks)), kThreads,
                         gpu::kStaged ? kSegments * static_cast<size_t>(memory.wave_bytes()) : 0,
                         gate_up_dense_kernel<F, decltype(most)::value, kDenseSlots<F>>, gate, up, x, rows, memory,
                         act);
    });
  });
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
