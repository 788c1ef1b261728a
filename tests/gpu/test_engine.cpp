// What the engine asks of a GPU beside its ops: sampling, loading, long contexts, a lost device.
//
//   gpu_test_engine sampling [quick] | loading [quick] | long | lost     lost leaves the device unusable: a process of
//   its own

#include <cstdio>
#include <cstring>

#include "backend/hip/hip_backend.h"
#include "engine_tests.h"
#include "reference.h"

int main(int argc, char** argv) {
  using namespace dflash;
  try {
    const std::string what = argc > 1 ? argv[1] : "";
    const bool quick = argc > 2 && std::strcmp(argv[2], "quick") == 0;
    const std::string why = hip_backend_status();
    if (!why.empty()) {
      std::printf("no device: %s\n", why.c_str());
      return 77;  // skipped
    }
    const auto gpu = make_hip_backend(BackendOptions());
    const auto cpu = make_cpu_backend(BackendOptions());
    std::printf("%s: %s\n", what.c_str(), gpu->describe().c_str());
    if (what == "sampling") {
      test::test_sampling(*gpu, *cpu, quick);
    } else if (what == "loading") {
      test::test_loading(*gpu, quick);
    } else if (what == "long") {
      test::test_long_context(*gpu);
    } else if (what == "lost") {
      test::test_lost_device(*gpu, *cpu);
    } else {
      fail("sampling, loading, long or lost expected, found '", what, "'");
    }
    std::printf(test::g_failures == 0 ? "%s: all passed\n" : "%s: %d FAILURES\n", what.c_str(), test::g_failures);
    return test::g_failures == 0 ? 0 : 1;
  } catch (const std::exception& e) {
    std::printf("FAIL exception: %s\n", e.what());
    return 1;
  }
}
