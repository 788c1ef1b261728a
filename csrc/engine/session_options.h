#pragma once
// What a timeline is opened with.

#include <string>

#include "core/error.h"
#include "quant/dtype.h"

namespace dflash {

struct SessionOptions {
  int n_ctx = 8192;              // tokens, prompt and answer together
  std::string kv_type = "auto";  // auto (f16; f32 in precise mode) | f16 | q8_0 | f32
  int n_batch = 512;             // prompt tokens in one prefill pass
  // Mask rows the drafter runs: "slots" (just those asked for), "block" (all of them, of which the first are used:
  // better drafts, since the block is bidirectional, for more work) or "auto" (measured in docs/speculation.md).
  std::string draft_rows = "auto";
};

// Committed tokens whose taps may wait, so that parked rounds cost no drafter pass.
inline constexpr int kPendingTaps = 128;

inline DType kv_dtype(const std::string& name, bool precise) {
  if (name == "auto") return precise ? DType::F32 : DType::F16;
  if (name == "f16") return DType::F16;
  if (name == "f32") return DType::F32;
  if (name == "q8_0") return DType::Q8_0;
  fail("kv_type: 'auto', 'f16', 'q8_0' or 'f32' expected, found '", name, "'");
}

// Quantising the drafter's K/V ruins acceptance (llama.cpp #25725): f16, or f32 in precise mode.
inline DType drafter_kv_dtype(bool precise) { return precise ? DType::F32 : DType::F16; }

}  // namespace dflash
