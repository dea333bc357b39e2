// exp2 and tanh on vectors, and the small integer helpers of the attention kernels.
#pragma once

#include "common/simd.h"

namespace gp {
namespace GP_ISA {

constexpr float LOG2E = 1.44269504088896341f;
constexpr double LN2 = 0.69314718055994531;

static inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// 2^x, relative error below 2 ulp (3e-6 of degree 4) for x in [-126, 126]; 0 below -126.5; NaN stays
// NaN.
template <int DEGREE = 5>
static inline vf v_exp2(vf x) {
#if defined(__AVX2__)
  const vf magic = v_set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = v_max(v_set(-127.0f), x);         // in this order NaN passes
  const vf t = v_add(x, magic);
  const vf n = v_sub(t, magic);
#else
  if (x.v < -126.5f) return {0.0f};
  if (x.v != x.v) return x;
  const vf n = v_round(x);
#endif
  const vf f = v_sub(x, n);
  vf p;  // minimax on [-0.5, 0.5] with 2^0 exact
  if constexpr (DEGREE == 4) {
    p = v_set(9.582852944731712e-3f);
    p = v_fma(p, f, v_set(5.5906426161527634e-2f));
    p = v_fma(p, f, v_set(2.4024099111557007e-1f));
    p = v_fma(p, f, v_set(6.931241750717163e-1f));
  } else {
    p = v_set(1.326465280726552e-3f);
    p = v_fma(p, f, v_set(9.671511128544807e-3f));
    p = v_fma(p, f, v_set(5.550733953714371e-2f));
    p = v_fma(p, f, v_set(2.4022242426872253e-1f));
    p = v_fma(p, f, v_set(6.931470036506653e-1f));
  }
  p = v_fma(p, f, v_set(1.0f));
  // The bits of 2^n; for n = -127 they are those of 0.
#if defined(__AVX512F__)
  const __m512i e = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23),
                                     _mm512_set1_epi32(0x3f800000));
  return {_mm512_mul_ps(p.v, _mm512_castsi512_ps(e))};
#elif defined(__AVX2__)
  const __m256i e = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23),
                                     _mm256_set1_epi32(0x3f800000));
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(e))};
#else
  return v_ldexp(p, n);
#endif
}

static inline vf v_tanh(vf x) {  // below 2 ulp
  const vf a = v_abs(x), small = v_tanh_small(x);
  const vf e = v_exp2(v_min(v_set(60.0f), v_mul(a, v_set(2 * LOG2E))));  // NaN passes
  const vf big = v_sub(v_set(1.0f), v_div(v_set(2.0f), v_add(e, v_set(1.0f))));
#if defined(__AVX512F__)
  const __mmask16 is_small = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
  const __m512 sign = _mm512_and_ps(x.v, _mm512_set1_ps(-0.0f));
  return {_mm512_mask_blend_ps(is_small, _mm512_or_ps(big.v, sign), small.v)};
#elif defined(__AVX2__)
  const __m256 is_small = _mm256_cmp_ps(a.v, _mm256_set1_ps(0.625f), _CMP_LT_OQ);
  const __m256 sign = _mm256_and_ps(x.v, _mm256_set1_ps(-0.0f));
  return {_mm256_blendv_ps(_mm256_or_ps(big.v, sign), small.v, is_small)};
#else
  return a.v < 0.625f ? small : vf{__builtin_copysignf(big.v, x.v)};
#endif
}

}  // namespace GP_ISA
}  // namespace gp
