#pragma once
// The mixture of experts and the dense feed-forward (its one expert): which kernels serve which rows and types.

#include "backend/backend.h"
#include "backend/hip/workspace.h"

namespace dflash::hip {

class Experts {
 public:
  // On the device: distinct [1], the sum of distinct experts over all calls; launch [5], zero at first.
  Experts(gpu::Stream stream, Workspace& workspace, int* distinct, int* launch)
      : stream_(stream), work_(workspace), distinct_(distinct), launch_(launch) {}

  void moe(const Moe& m, int rows, float* x);  // x [rows, n_embd]
  void ffn(const Ffn& f, int rows, float* x);

 private:
  Routing routing(int rows, int top_k, int n_expert);
  void many(const Weight& gate, const Weight& up, const Weight& down, const Routing& r, HalfRows h, float* x);
  void floats(const Weight& gate, const Weight& up, const Weight& down, const Routing& r, const float* h, float* x);
  MutableQuantRows gate_up_few(const Weight& gate, const Weight& up, const FewChoice& c);

  gpu::Stream stream_;
  Workspace& work_;
  int* distinct_;
  int* launch_;
};

}  // namespace dflash::hip
