// int4 weights against x in int8: how rows divide into steps and runs. Included by kernels only.
#pragma once

#include "cpu/quant_matmul_codes.h"

namespace gp {
namespace GP_ISA {

constexpr int64_t STEP = 128;  // weights that are taken together, 64 bytes of a row
constexpr int64_t STEP_BYTES = STEP / 2;
constexpr int64_t SPARE = 16;    // floats that a load of a few scales may read beyond them

// How groups and runs divide a row, which is taken as a whole number of steps.
struct GroupGrid {
  explicit GroupGrid(const QuantWeight& w)
      : k(w.k),
        steps((w.k + STEP - 1) / STEP),
        group(w.group_size > 0 ? w.group_size : steps * STEP),
        groups((w.k + group - 1) / group),
        run(group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32),
        runs(steps * (STEP / run)),
        row_bytes((w.k + 1) / 2) {}
  // What groups have, for each of their runs; 0 behind the last group.
  template <class T>
  void spread(const T* of_groups, T* of_runs) const {
    int64_t r = 0;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t end = (g + 1) * (group / run); r < end && r < runs; ++r) of_runs[r] = of_groups[g];
    for (; r < runs; ++r) of_runs[r] = T(0);
  }
  // The scales of the runs of row n of W; `scratch` and `out` have room for those.
  const float* scales(const QuantWeight& w, int64_t n, float* scratch, float* out) const {
    const bool plain = w.scale_dtype == DType::f32;
    if (plain && groups == runs) return static_cast<const float*>(w.scale) + n * groups;
    float* loaded = groups == runs ? out : scratch;
    load_row(loaded, offset(w.scale, n * groups, w.scale_dtype), groups, w.scale_dtype);
    if (loaded == scratch) spread(scratch, out);
    return out;
  }
  // The zero points of the same, where W has any.
  void zeros(const QuantWeight& w, int64_t n, int32_t* scratch, int32_t* out) const {
    int32_t* wide = groups == runs ? out : scratch;
    for (int64_t g = 0; g < groups; ++g) wide[g] = w.zero_point[n * groups + g];
    if (wide == scratch) spread(scratch, out);
  }

  int64_t k, steps, group, groups, run, runs, row_bytes;
};

#if defined(__AVX512F__)
#define GP_DOT __attribute__((target("avx512vnni")))
#else
#define GP_DOT
#endif

}  // namespace GP_ISA
}  // namespace gp
