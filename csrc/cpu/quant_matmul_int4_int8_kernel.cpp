// int4 weights against x rounded to int8, a scale for each group of both. The products of a run (a
// group, or the largest part of one that the kernels know) are added up exactly in int32; runs meet
// their scales in fp32. Codes of W are unsigned, 0..15: a zero point takes zero times the sum of x.
#include "cpu/quant_matmul_int4_int8_few.h"
#include "cpu/quant_matmul_int4_int8_many.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t MOST_FEW = 8;  // rows of x: above, a new layout of W pays

template <int RUN>
bool run(const QuantMatmulArgs& a, const GroupGrid& grid, const Codes& x) {
  return a.m > MOST_FEW ? many<RUN>(a, grid, x) : few<RUN>(a, grid, x);
}

}  // namespace

bool quant_matmul_int4_int8(const QuantMatmulArgs& a) {
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512vnni")) return avx2::quant_matmul_int4_int8(a);
#endif
  const GroupGrid grid(a.w);
  const Codes x(a, STEP, grid.group);
  if (!x.ok()) return false;
  return grid.run == 128 ? run<128>(a, grid, x)
       : grid.run == 64  ? run<64>(a, grid, x)
                         : run<32>(a, grid, x);
}

}  // namespace GP_ISA
}  // namespace gp
