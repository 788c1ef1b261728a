#pragma once
// The smallest test harness that says what failed: CHECK records, CHECK_THROWS wants a dflash::Error, report() sums up.

#include <cstdio>
#include <string>

#include "core/error.h"

namespace dflash::test {

struct Tally {
  int passed = 0, failed = 0;
};

inline Tally& tally() {
  static Tally t;
  return t;
}

inline bool record(bool ok, const char* what, const char* file, int line) {
  ok ? ++tally().passed : ++tally().failed;
  if (!ok && tally().failed <= 20) std::printf("%s:%d: failed: %s\n", file, line, what);
  return ok;
}

inline int report(const char* name) {
  std::printf("%s: %d passed, %d failed\n", name, tally().passed, tally().failed);
  return tally().failed == 0 ? 0 : 1;
}

}  // namespace dflash::test

#define CHECK(condition) ::dflash::test::record(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
#define CHECK_THROWS(expression, part)                                                                             \
  do {                                                                                                             \
    std::string said = "nothing was thrown";                                                                       \
    try {                                                                                                          \
      (void)(expression);                                                                                          \
    } catch (const ::dflash::Error& e) {                                                                           \
      said = e.what();                                                                                             \
    }                                                                                                              \
    ::dflash::test::record(said.find(part) != std::string::npos, (#expression " said: " + said).c_str(), __FILE__, \
                           __LINE__);                                                                              \
  } while (0)
