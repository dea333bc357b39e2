// What the tests of the attention kernels share: noise, and a comparison that counts failures.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/isa.h"

namespace {

int failures = 0;

float noise(uint32_t& state) {  // uniform in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / float(1 << 23) - 1.0f;
}

// `bound`: a difference that fails.
void compare(const char* what, const std::vector<float>& got, const std::vector<double>& ref,
             double bound = 2e-5) {
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = got[i] == ref[i] ? 0 : std::fabs(got[i] - ref[i]);
    if (!(error <= worst)) worst = error;  // NaN stays
  }
  if (!(worst < bound)) {
    ++failures;
    std::printf("FAILED %s %s: error %g\n", gp::isa_name(gp::active_isa()), what, worst);
  }
}

}  // namespace
