#pragma once
// The parts of gpu_test_engine; each returns after counting its failures with expect() (reference.h).

#include "backend/backend.h"

namespace dflash::test {

void test_sampling(Backend& gpu, Backend& cpu, bool quick);  // quick: for compute-sanitizer
void test_loading(Backend& gpu, bool quick);                 // quick: a file of 130 MB instead of 1 GB
void test_long_context(Backend& gpu);
void test_lost_device(Backend& gpu, Backend& cpu);

// Median milliseconds of f(), which waits for the device; the first call does not count.
template <typename F>
double median_ms(int times, F f);

}  // namespace dflash::test

#include <algorithm>
#include <chrono>
#include <vector>

template <typename F>
double dflash::test::median_ms(int times, F f) {
  std::vector<double> ms;
  f();
  for (int i = 0; i < times; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    ms.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2];
}
