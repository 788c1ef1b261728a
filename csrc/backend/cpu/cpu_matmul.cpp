// Norms and matrix products. A product is cut into tiles of (panels of 16 output rows) x (rows of activations); the
// pool deals the tiles out. Which tile computes an output never changes its bits.

#include <algorithm>
#include <cstring>

#include "backend/cpu/cpu_backend.h"
#include "quant/blocks.h"

namespace dflash::cpu {
namespace {

constexpr int kRowBlock = 64;             // rows of a prefill tile: their int8 form fits the second-level cache
constexpr size_t kTileBytes = 256 << 10;  // weight bytes of a tile, at most about this

}  // namespace

void CpuBackend::rms_norm(const float* x, const float* w, float eps, int rows, int64_t n, float* y) {
  parallel(rows, static_cast<size_t>(rows * n) * 4,
           [&](int64_t r, int) { k_.rms_norm(x + r * n, w, eps, n, y + r * n); });
}

Activations CpuBackend::prepare(const float* x, const float* norm, float eps, int rows, int64_t n, bool need_q) {
  Activations a;
  a.n = n;
  a.rows = rows;
  float* h = norm ? normed_.get<float>(static_cast<size_t>(rows * n)) : nullptr;
  ActBlock* q = need_q ? quantised_.get<ActBlock>(static_cast<size_t>(rows * (n / 32))) : nullptr;
  if (h || q) {
    parallel(rows, static_cast<size_t>(rows * n) * 4, [&](int64_t r, int) {
      const float* row = x + r * n;
      if (h) {
        k_.rms_norm(row, norm, eps, n, h + r * n);
        row = h + r * n;
      }
      if (q) k_.quantize(row, n, q + r * (n / 32));
    });
  }
  a.f32 = h ? h : x;
  a.q = q;
  return a;
}

void CpuBackend::multiply(const Weight& w, int64_t expert, int64_t panel, int n_panels, const Activations& x,
                          RowSet rows, float* y, int64_t stride, int thread, const uint8_t* next) {
  if (int8_path(w)) {
    multiply_panels(w, expert, panel, n_panels, x, rows, y, stride, thread, next);
  } else {
    multiply_floats(w, expert, panel, n_panels, x, rows, y, stride, thread);
  }
}

void CpuBackend::multiply_panels(const Weight& w, int64_t expert, int64_t panel, int n_panels, const Activations& x,
                                 RowSet rows, float* y, int64_t stride, int thread, const uint8_t* next) {
  const int64_t n_groups = w.n_in / 32, first_row = panel * kPanel;
  const size_t bytes = panel_bytes(w);
  const int whole = static_cast<int>(std::min<int64_t>(n_panels, (w.n_out - first_row) / kPanel));
  const uint8_t* data = static_cast<const uint8_t*>(w.data);

  const ActBlock* a[kMaxRows];
  float* out[kMaxRows];
  const auto run = [&](const uint8_t* panels, int first, int count, const uint8_t* after, bool cached) {
    const int64_t valid = std::min<int64_t>(kPanel, w.n_out - first_row - first * kPanel);
    const int passes = (rows.count + k_.panel_rows - 1) / k_.panel_rows;
    for (int r = 0, pass = 0; pass < passes; ++pass) {
      const int m = (rows.count - r) / (passes - pass);  // as even as can be
      float edge[kMaxRows][kPanel];
      for (int i = 0; i < m; ++i) {
        a[i] = x.q + rows[r + i] * n_groups;
        out[i] = valid < kPanel ? edge[i] : y + (r + i) * stride + first * kPanel;
      }
      k_.panels(w.type, panels, count, n_groups, a, m, out, pass + 1 < passes ? panels : after, cached || pass > 0);
      if (valid < kPanel) {
        for (int i = 0; i < m; ++i) {
          std::memcpy(y + (r + i) * stride + first * kPanel, edge[i], static_cast<size_t>(valid) * sizeof(float));
        }
      }
      r += m;
    }
  };

  if (const uint8_t* packed = panel_at(w, expert, panel)) {
    const uint8_t* edge = packed + bytes * static_cast<size_t>(whole);
    if (whole > 0) run(packed, 0, whole, whole < n_panels ? edge : next, false);
    if (whole < n_panels) run(edge, whole, 1, next, false);
    return;
  }
  uint8_t* scratch = thread_[static_cast<size_t>(thread)].panel.get<uint8_t>(bytes);
  const size_t row = row_bytes(w.type, w.n_in);
  for (int p = 0; p < n_panels; ++p) {
    const int64_t first = first_row + p * kPanel;
    const int n_rows = static_cast<int>(std::min<int64_t>(kPanel, w.n_out - first));
    k_.pack_panel(w.type, data + row * static_cast<size_t>(expert * w.n_out + first), n_rows, n_groups, scratch);
    run(scratch, p, 1, scratch, true);
  }
}

void CpuBackend::multiply_floats(const Weight& w, int64_t expert, int64_t panel, int n_panels, const Activations& x,
                                 RowSet rows, float* y, int64_t stride, int thread) {
  const size_t row = row_bytes(w.type, w.n_in);
  const int64_t first_row = panel * kPanel;
  const bool packed = w.layout == kPanelLayout;
  const uint8_t* data = static_cast<const uint8_t*>(w.data);
  data += packed ? panel_bytes(w) * static_cast<size_t>(expert * panels_of(w.n_out))
                 : row * static_cast<size_t>(expert * w.n_out);
  const float* a[kMaxRows];
  float* out[kMaxRows];
  for (int p = 0; p < n_panels; ++p) {
    const int64_t first = first_row + p * kPanel;
    const int n_rows = static_cast<int>(std::min<int64_t>(kPanel, w.n_out - first));
    const uint8_t* source =
        data + (packed ? panel_bytes(w) * static_cast<size_t>(panel + p) : row * static_cast<size_t>(first));
    DType type = w.type;
    if (is_quantized(w.type)) {
      float* decoded = thread_[static_cast<size_t>(thread)].rows.get<float>(static_cast<size_t>(kPanel * w.n_in));
      for (int i = 0; i < n_rows; ++i) {
        decode_row(w.type, source + row * static_cast<size_t>(i), w.n_in, decoded + i * w.n_in);
      }
      source = reinterpret_cast<const uint8_t*>(decoded);
      type = DType::F32;
    }
    for (int r = 0; r < rows.count; r += kMaxRows) {
      const int m = std::min(kMaxRows, rows.count - r);
      for (int i = 0; i < m; ++i) {
        a[i] = x.f32 + rows[r + i] * w.n_in;
        out[i] = y + (r + i) * stride + p * kPanel;
      }
      (packed ? k_.float_panels : k_.float_rows)(type, source, w.n_in, n_rows, a, m, out);
    }
  }
}

void CpuBackend::make_tiles(const MatmulOut* outs, int n_outs, int rows) {
  size_t total = 0;
  for (int i = 0; i < n_outs; ++i) total += outs[i].w->bytes();
  // Enough tiles that the last one to finish does not matter, long enough to stream.
  const size_t share = total / static_cast<size_t>(8 * pool_.size());
  const size_t target = std::min(kTileBytes, std::max<size_t>(16 << 10, share));
  tiles_.clear();
  for (int i = 0; i < n_outs; ++i) {
    const Weight& w = *outs[i].w;
    const int64_t panels = panels_of(w.n_out);
    const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(target / panel_bytes(w)));
    for (int64_t p = 0; p < panels; p += step) {
      for (int r = 0; r < rows; r += kRowBlock) {
        tiles_.push_back({i, p, static_cast<int>(std::min(step, panels - p)), r, std::min(kRowBlock, rows - r)});
      }
    }
  }
}

const uint8_t* CpuBackend::weights_after(size_t tile, const MatmulOut* outs) const {
  if (tile + 1 == tiles_.size()) return nullptr;
  const Tile& t = tiles_[tile + 1];
  return panel_at(*outs[t.out].w, 0, t.panel);
}

void CpuBackend::norm_matmul(const float* x, const float* norm, float eps, int rows, const MatmulOut* outs,
                             int n_outs) {
  bool need_q = false;
  size_t bytes = 0;
  for (int i = 0; i < n_outs; ++i) {
    need_q = need_q || int8_path(*outs[i].w);
    bytes += outs[i].w->bytes();
  }
  const Activations a = prepare(x, norm, eps, rows, outs[0].w->n_in, need_q);
  make_tiles(outs, n_outs, rows);
  parallel(static_cast<int64_t>(tiles_.size()), bytes * static_cast<size_t>(rows), [&](int64_t i, int thread) {
    const Tile& t = tiles_[static_cast<size_t>(i)];
    const MatmulOut& out = outs[t.out];
    multiply(*out.w, 0, t.panel, t.n_panels, a, {nullptr, t.row, t.n_rows},
             out.y + t.row * out.w->n_out + t.panel * kPanel, out.w->n_out, thread,
             weights_after(static_cast<size_t>(i), outs));
  });
}

void CpuBackend::matmul_add(const Weight& w, const float* x, int rows, float* y) {
  const Activations a = prepare(x, nullptr, 0.0f, rows, w.n_in, int8_path(w));
  const MatmulOut product{&w, y};
  make_tiles(&product, 1, rows);
  parallel(static_cast<int64_t>(tiles_.size()), w.bytes() * static_cast<size_t>(rows), [&](int64_t i, int thread) {
    const Tile& t = tiles_[static_cast<size_t>(i)];
    const int64_t width = t.n_panels * kPanel, valid = std::min(width, w.n_out - t.panel * kPanel);
    float* out = thread_[static_cast<size_t>(thread)].out.get<float>(static_cast<size_t>(t.n_rows * width));
    multiply(w, 0, t.panel, t.n_panels, a, {nullptr, t.row, t.n_rows}, out, width, thread,
             weights_after(static_cast<size_t>(i), &product));
    for (int r = 0; r < t.n_rows; ++r) k_.add(out + r * width, valid, y + (t.row + r) * w.n_out + t.panel * kPanel);
  });
}

}  // namespace dflash::cpu
