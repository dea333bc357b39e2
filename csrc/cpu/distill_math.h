// Vector functions of the distillation losses. Unlike v_exp they keep NaN: a NaN among the logits must
// show in the loss. (max and min give their second operand where one is NaN.)
#pragma once

#include "common/simd.h"

namespace gp {
namespace GP_ISA {

// a < b ? x : y, lane by lane
static inline vf v_less(vf a, vf b, vf x, vf y) {
#if defined(__AVX512F__)
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
#elif defined(__AVX2__)
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
#else
  return a.v < b.v ? x : y;
#endif
}

// exp(x) for x <= 88, relative error below 2 ulp; 0 below -87.3; NaN stays.
static inline vf v_exp_nan(vf x) {
  const vf lo = v_set(-87.33654f);
#if !defined(__AVX2__)
  if (x.v != x.v) return x;  // the exponent of NaN is no integer
#endif
  return v_less(x, lo, v_zero(), v_exp_within(v_max(lo, x)));
}

// Natural logarithm of a positive normal number: m * 2^e with m in [sqrt(1/2), sqrt(2)), Cephes'
// polynomial in m - 1. Below 2 ulp.
static inline vf v_log(vf x) {
#if defined(__AVX512F__)
  vf e{_mm512_getexp_ps(x.v)};
  vf m{_mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)};
#elif defined(__AVX2__)
  const __m256i u = _mm256_castps_si256(x.v);
  vf e{_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(u, 23), _mm256_set1_epi32(127)))};
  const __m256i one = _mm256_set1_epi32(0x3f800000);
  vf m{_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffff)), one))};
#else
  const uint32_t u = float_to_bits(x.v);
  vf e{float(int(u >> 23) - 127)};
  vf m{bits_to_float((u & 0x7fffffu) | 0x3f800000u)};
#endif
  const vf limit = v_set(1.41421356f);
  e = v_less(m, limit, e, v_add(e, v_set(1.0f)));
  m = v_less(m, limit, m, v_mul(m, v_set(0.5f)));
  const vf f = v_sub(m, v_set(1.0f)), f2 = v_mul(f, f);
  vf y = v_set(7.0376836292e-2f);
  y = v_fma(y, f, v_set(-1.1514610310e-1f));
  y = v_fma(y, f, v_set(1.1676998740e-1f));
  y = v_fma(y, f, v_set(-1.2420140846e-1f));
  y = v_fma(y, f, v_set(1.4249322787e-1f));
  y = v_fma(y, f, v_set(-1.6668057665e-1f));
  y = v_fma(y, f, v_set(2.0000714765e-1f));
  y = v_fma(y, f, v_set(-2.4999993993e-1f));
  y = v_fma(y, f, v_set(3.3333331174e-1f));
  y = v_mul(v_mul(y, f), f2);
  y = v_fma(e, v_set(-2.12194440e-4f), y);
  y = v_fma(f2, v_set(-0.5f), y);
  return v_fma(e, v_set(0.693359375f), v_add(f, y));
}

// tanh: a polynomial below 0.625, else 1 - 2 / (exp(2|x|) + 1) with the sign of x.
static inline vf v_tanh_nan(vf x) {
  const vf a = v_abs(x), small = v_tanh_small(x);
  const vf e = v_exp_nan(v_min(v_set(44.0f), v_add(a, a)));
  const vf large = v_sub(v_set(1.0f), v_div(v_set(2.0f), v_add(e, v_set(1.0f))));
  return v_less(a, v_set(0.625f), small, v_less(x, v_zero(), v_sub(v_zero(), large), large));
}

}  // namespace GP_ISA
}  // namespace gp
