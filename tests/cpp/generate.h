#pragma once
// One generation, start to end.

#include <cstdint>
#include <vector>

#include "engine/session.h"

namespace dflash::test {

inline std::vector<int32_t> generate(Session& s, const std::vector<int32_t>& prompt, const GenerateParams& params) {
  s.rewind(0);
  s.begin(prompt, params);
  while (s.prefill() < static_cast<int>(prompt.size())) {
  }
  std::vector<int32_t> out;
  for (const char* stop = nullptr; stop == nullptr;) {
    const StepResult r = s.step();
    out.insert(out.end(), r.tokens.begin(), r.tokens.end());
    stop = r.stop;
  }
  return out;
}

}  // namespace dflash::test
