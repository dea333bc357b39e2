// Rows of x rounded to int8 by their largest magnitude, whole or a group at a time. Included by
// kernels only.
#pragma once

#include "common/parallel.h"
#include "cpu/quant_matmul_decode.h"
#include "cpu/quantize_simd.h"

namespace gp {
namespace GP_ISA {

// Below it 127 / absmax leaves fp32, so the row is first multiplied by 2^64, which is exact.
constexpr float TINY_ROW = 1.504632769e-36f, LIFT = 18446744073709551616.0f;

// n codes of x from element `first` on, as formats/int8.py has them, and their scale. With an infinity
// or NaN among them the codes are 0 and the scale is NaN.
template <DType T>
static inline float encode(const void* x, int64_t first, int64_t n, int8_t* q) {
  if (n <= 0) return 0.0f;
  const int32_t bits = absmax_bits<T>(x, first, n, false);
  const float absmax = bits_to_float(uint32_t(bits));
  if (bits >= kInfBits || bits == 0) {
    std::memset(q, 0, size_t(n));
    return bits == 0 ? 0.0f : __builtin_nanf("");
  }
  const float by = absmax < TINY_ROW ? LIFT : 1.0f;
  const vf lift = v_set(by), factor = v_set(127.0f * (1.0f / (absmax * by)));
  const auto code = [&](int64_t i) GP_INLINE {
    return to_int(v_mul(v_mul(load_vec<T>(x, first + i), lift), factor));
  };
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    i_store_bytes<true>(reinterpret_cast<uint8_t*>(q + i), code(i), code(i + VL), code(i + 2 * VL),
                        code(i + 3 * VL));
  for (; i < n; i += VL) {
    const vf v = i + VL <= n ? load_vec<T>(x, first + i) : load_part<T>(x, first + i, n - i);
    uint8_t part[VL];
    i_store_bytes(part, to_int(v_mul(v_mul(v, lift), factor)));
    std::memcpy(q + i, part, size_t(n - i < VL ? n - i : VL));
  }
  return absmax / 127.0f;
}

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The codes of x, each row padded to `stride` bytes by zeros, and the scale of each group of a row.
struct Codes {
  Codes(const QuantMatmulArgs& a, int64_t pad, int64_t group)
      : stride(round_up(a.w.k, pad)),
        groups((a.w.k + group - 1) / group),
        codes(a.m * stride),
        scales(a.m * groups * 4) {
    if (!ok()) return;
    parallel_for(a.m, a.m * a.w.k < (1 << 16) ? 1 : a.threads, [&](int64_t m, int) {
      const KeepSubnormals keep;
      const int64_t k = a.w.k;
      int8_t* q = codes.as<int8_t>() + m * stride;
      with_dtype(a.dtype, [&](auto typed) {
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t from = g * group, size = k - from < group ? k - from : group;
          scales.as<float>()[m * groups + g] =
              encode<decltype(typed)::value>(a.x, m * k + from, size, q + from);
        }
      });
      std::memset(q + k, 0, size_t(stride - k));
    });
  }
  bool ok() const { return codes.ok() && scales.ok(); }
  int64_t stride, groups;
  Scratch codes, scales;
};

}  // namespace GP_ISA
}  // namespace gp
