// Dense matrix times 1..16 rows, and float weights times any rows.

#include "backend/hip/few_rows.h"
#include "backend/hip/float_dot.h"
#include "backend/hip/kernels.h"
#include "backend/hip/quantize.h"

namespace dflash::hip {

namespace {

struct OutList {
  TiledOut out[kMaxOuts];
  int first_tile[kMaxOuts + 1];  // tiles of the outputs before
};

// grid: a block per tile of any output.
template <typename F, int MaxRows>
__global__ void __launch_bounds__(kThreads) matmul_few_kernel(OutList list, QuantRows x, int rows, bool add) {
  __shared__ Partial<MaxRows> partial[1];
  int tile = static_cast<int>(blockIdx.x);
  int o = 0;
  while (tile >= list.first_tile[o + 1]) ++o;
  const TiledOut& out = list.out[o];
  tile -= list.first_tile[o];
  const TileView<F> views[1] = {TileView<F>(out.w, 0, tile)};
  const int groups = out.w.groups;
  // The weights do not depend on the kernel before: start them on their way while it ends.
  prefetch_segment(views[0], groups);
  gpu::wait_for_previous();
  tile_segments<F, 1, MaxRows>(views, groups, x, [](int r) { return r; }, rows, partial);
  __syncthreads();
  const int64_t n = static_cast<int64_t>(tile) * kTile + gpu::lane();
  for (int r = gpu::wave(); r < rows; r += kSegments) {
    const float v = add_segments<MaxRows>(partial[0], segment_count(groups), r, gpu::lane());
    if (n < out.w.n_out) {
      float* y = out.y + r * out.w.n_out + n;
      *y = add ? *y + v : v;
    }
  }
}

template <typename F>
void matmul_few(gpu::Stream s, const OutList& list, int n_outs, QuantRows x, int rows, bool add) {
  const dim3 grid(static_cast<unsigned>(list.first_tile[n_outs]));
  if (rows == 1) {
    gpu::launch(s, grid, kThreads, matmul_few_kernel<F, 1>, list, x, rows, add);
  } else if (rows <= 4) {
    gpu::launch(s, grid, kThreads, matmul_few_kernel<F, 4>, list, x, rows, add);
  } else {
    gpu::launch(s, grid, kThreads, matmul_few_kernel<F, kFewRows>, list, x, rows, add);
  }
}

// ---- float weights ----------------------------------------------------------------------------------------------------

constexpr int kFloatRows = 8;  // rows of x that share one reading of the weights

// grid (outputs / 8, rows / R): a wave per output.
template <DType T, int V, int R>
__global__ void __launch_bounds__(kThreads) float_matmul_kernel(const typename FloatFormat<T>::Element* __restrict__ w,
                                                                int64_t n_in, int64_t n_out,
                                                                const float* __restrict__ x, int rows, float* y,
                                                                bool add) {
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
    const dim3 grid(static_cast<unsigned>((w.n_out + kSegments - 1) / kSegments), static_cast<unsigned>((rows + R - 1) / R));
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

// ---- float experts: any rows, one pair at a time (files that keep experts in floats are small) --------------------------

template <DType T>
__global__ void __launch_bounds__(kThreads) float_gate_up_kernel(const typename FloatFormat<T>::Element* gate,
                                                                 const typename FloatFormat<T>::Element* up,
                                                                 int64_t n_in, int64_t n_out, const float* h, Routing r,
                                                                 float* act) {
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
__global__ void __launch_bounds__(kThreads) float_down_kernel(const typename FloatFormat<T>::Element* down, int64_t n_in,
                                                              int64_t n_out, const float* act, Routing r, float* y) {
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
    case DType::F32: f(std::integral_constant<DType, DType::F32>{}); return;
    case DType::F16: f(std::integral_constant<DType, DType::F16>{}); return;
    case DType::BF16: f(std::integral_constant<DType, DType::BF16>{}); return;
    default: fail("GPU: no float kernel for ", dtype_info(type).name);
  }
}

}  // namespace

void launch_matmul(gpu::Stream s, DType type, const TiledOut* outs, int n_outs, QuantRows x, int rows, bool add) {
  if (rows > kFewRows) return launch_matmul_many(s, type, outs, n_outs, x, rows, add);
  OutList list = {};
  for (int i = 0; i < n_outs; ++i) {
    list.out[i] = outs[i];
    list.first_tile[i + 1] = list.first_tile[i] + outs[i].w.tiles;
  }
  with_format(type, [&](auto format) { matmul_few<decltype(format)>(s, list, n_outs, x, rows, add); });
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
