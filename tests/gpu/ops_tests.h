#pragma once
// The parts of gpu_test_ops that have a file of their own; each counts its failures with expect() (reference.h).

#include <random>

#include "backend/backend.h"

namespace dflash::test {

extern bool g_quick;  // fewer shapes, for compute-sanitizer
inline constexpr float kEps = 1e-6f;

// test_layers.cpp
void test_layers(Backend& b, std::mt19937& rng);
void test_steps(Backend& b, std::mt19937& rng);

}  // namespace dflash::test
