#pragma once
// Dense matrix times 1..16 rows: what its kernels are given (matmul.hip, matmul_resident.hip).

#include "backend/hip/few_rows.h"
#include "backend/hip/kernels.h"

namespace dflash::hip {

struct OutList {
  TiledOut out[kMaxOuts];
  int first_tile[kMaxOuts + 1];  // tiles of the outputs before
  int tiles;                     // of all outputs
  int segments;                  // of K that have groups
  float* squares;                // [tiles] or null: the sum of a tile's squared outputs (one row with its norm)

  int n_in() const { return out[0].w.groups * 32; }
};

inline OutList out_list(const TiledOut* outs, int n_outs, float* squares = nullptr) {
  OutList list = {};
  list.squares = squares;
  list.segments = segment_count(outs[0].w.groups);
  for (int i = 0; i < n_outs; ++i) {
    list.out[i] = outs[i];
    list.first_tile[i + 1] = list.first_tile[i] + outs[i].w.tiles;
  }
  list.tiles = list.first_tile[n_outs];
  return list;
}

struct FewInput {
  QuantRows x;     // the rows' int8 groups, or
  NormInput norm;  // rows that every block normalises and quantises for itself (norm.x not null)
  int rows;
};

// matmul_resident.hip: products so small that a multiprocessor's share of the weights fits its shared memory. NVIDIA.
bool resident_fits(DType type, const OutList& list, int rows, bool norm);
// False where it does not fit.
bool launch_resident(gpu::Stream s, DType type, const OutList& list, const FewInput& in, bool add);

// matmul_half.hip: 3..8 rows on NVIDIA. False where they do not fit.
bool launch_matmul_half(gpu::Stream s, DType type, const OutList& list, const QuantRows& x, int rows, bool add);
bool launch_gate_up_half(gpu::Stream s, DType type, const TiledWeight& gate, const TiledWeight& up, const QuantRows& x,
                         int rows, MutableQuantRows act);

}  // namespace dflash::hip
