// One float vector type for every instruction set: vf with VL lanes (16, 8 or 1).
//
// Included by csrc/cpu/*_kernel.cpp only, inside whose namespace gp::GP_ISA everything stands, so
// that the copies for different sets never meet in the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#ifndef GP_ISA
#define GP_ISA scalar
#endif

namespace gp {
namespace GP_ISA {

// --- scalar conversions, exact and round-to-nearest-even -----------------------------------------

static inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

static inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }
static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);  // NaN stays NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t mag = h & 0x7fffu;
  if (mag >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((mag & 0x3ffu) << 13));
  // Exponent re-biased by a multiplication, which also makes subnormals exact.
  return bits_to_float(sign | float_to_bits(bits_to_float(mag << 13) * bits_to_float(0x77800000u)));
#endif
}
static inline uint16_t float_to_f16(float f) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const uint32_t u = float_to_bits(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (mag >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (mag < 0x38800000u)  // subnormal: adding 0.5 places the rounding at bit 0 of the result
    return uint16_t(sign | (float_to_bits(bits_to_float(mag) + 0.5f) & 0xffffu));
  return uint16_t(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13));
#endif
}

// --- vectors -------------------------------------------------------------------------------------

#if defined(__AVX512F__)

constexpr int VL = 16;
struct vf { __m512 v; };
static inline vf v_set(float x) { return {_mm512_set1_ps(x)}; }
static inline vf v_zero() { return {_mm512_setzero_ps()}; }
static inline vf v_load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void v_store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
static inline vf v_add(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline vf v_sub(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline vf v_mul(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline vf v_div(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline vf v_max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline vf v_min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline vf v_fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline vf v_abs(vf a) { return {_mm512_abs_ps(a.v)}; }
static inline vf v_sqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
static inline vf v_round(vf a) {  // half to even
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline float v_sum(vf a) { return _mm512_reduce_add_ps(a.v); }
static inline float v_hmax(vf a) { return _mm512_reduce_max_ps(a.v); }
// a * 2^n for integral n held as float, |n| <= 126
static inline vf v_ldexp(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }
static inline vf v_load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
static inline void v_store_bf16(uint16_t* p, vf a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(
      _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
static inline vf v_load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline void v_store_f16(uint16_t* p, vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The first n lanes; the others read as 0 and are not written.
static inline vf v_load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)};
}
static inline void v_store_n(float* p, vf a, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v);
}

#elif defined(__AVX2__)

constexpr int VL = 8;
struct vf { __m256 v; };
static inline vf v_set(float x) { return {_mm256_set1_ps(x)}; }
static inline vf v_zero() { return {_mm256_setzero_ps()}; }
static inline vf v_load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline void v_store(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
static inline vf v_add(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline vf v_sub(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline vf v_mul(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline vf v_div(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline vf v_max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline vf v_min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline vf v_fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline vf v_abs(vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
static inline vf v_sqrt(vf a) { return {_mm256_sqrt_ps(a.v)}; }
static inline vf v_round(vf a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline float v_sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float v_hmax(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline vf v_ldexp(vf a, vf n) {
  const __m256i e = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
}
static inline vf v_load_bf16(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
static inline void v_store_bf16(uint16_t* p, vf a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(
      _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i h = _mm256_blendv_epi8(r, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
static inline vf v_load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline void v_store_f16(uint16_t* p, vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline __m256i v_mask_n(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf v_load_n(const float* p, int n) { return {_mm256_maskload_ps(p, v_mask_n(n))}; }
static inline void v_store_n(float* p, vf a, int n) { _mm256_maskstore_ps(p, v_mask_n(n), a.v); }

#else

constexpr int VL = 1;
struct vf { float v; };
static inline vf v_set(float x) { return {x}; }
static inline vf v_zero() { return {0.0f}; }
static inline vf v_load(const float* p) { return {*p}; }
static inline void v_store(float* p, vf a) { *p = a.v; }
static inline vf v_add(vf a, vf b) { return {a.v + b.v}; }
static inline vf v_sub(vf a, vf b) { return {a.v - b.v}; }
static inline vf v_mul(vf a, vf b) { return {a.v * b.v}; }
static inline vf v_div(vf a, vf b) { return {a.v / b.v}; }
static inline vf v_max(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }
static inline vf v_min(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
static inline vf v_fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
static inline vf v_abs(vf a) { return {__builtin_fabsf(a.v)}; }
static inline vf v_sqrt(vf a) { return {__builtin_sqrtf(a.v)}; }
static inline vf v_round(vf a) { return {__builtin_nearbyintf(a.v)}; }
static inline float v_sum(vf a) { return a.v; }
static inline float v_hmax(vf a) { return a.v; }
static inline vf v_ldexp(vf a, vf n) {
  return {a.v * bits_to_float(uint32_t(int32_t(n.v) + 127) << 23)};
}
static inline vf v_load_bf16(const uint16_t* p) { return {bf16_to_float(*p)}; }
static inline void v_store_bf16(uint16_t* p, vf a) { *p = float_to_bf16(a.v); }
static inline vf v_load_f16(const uint16_t* p) { return {f16_to_float(*p)}; }
static inline void v_store_f16(uint16_t* p, vf a) { *p = float_to_f16(a.v); }
static inline vf v_load_n(const float* p, int n) { return {n > 0 ? *p : 0.0f}; }
static inline void v_store_n(float* p, vf a, int n) { if (n > 0) *p = a.v; }

#endif

// exp(x) for x in [-87.33, 88.37], relative error below 2 ulp: Cephes' reduction x = n ln2 + r and a
// degree-6 polynomial in r.
static inline vf v_exp_within(vf x) {
  const vf n = v_round(v_mul(x, v_set(1.44269504088896341f)));
  vf r = v_fma(n, v_set(-0.693359375f), x);
  r = v_fma(n, v_set(2.12194440e-4f), r);
  vf p = v_set(1.9875691500e-4f);
  p = v_fma(p, r, v_set(1.3981999507e-3f));
  p = v_fma(p, r, v_set(8.3334519073e-3f));
  p = v_fma(p, r, v_set(4.1665795894e-2f));
  p = v_fma(p, r, v_set(1.6666665459e-1f));
  p = v_fma(p, r, v_set(5.0000001201e-1f));
  p = v_add(v_fma(v_mul(r, r), p, r), v_set(1.0f));
  return v_ldexp(p, n);
}

// exp(x): 0 below -87.3, exp(-inf) = 0, inf above 88.4.
static inline vf v_exp(vf x) {
  const vf lo = v_set(-87.33654f), hi = v_set(88.37626f);
  const vf e = v_exp_within(v_min(v_max(x, lo), hi));
#if defined(__AVX512F__)
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, lo.v, _CMP_LT_OQ), e.v,
                               _mm512_setzero_ps())};
#elif defined(__AVX2__)
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, lo.v, _CMP_LT_OQ), e.v)};
#else
  return {x.v < lo.v ? 0.0f : e.v};
#endif
}

// tanh(x) for |x| < 0.625, below 2 ulp: Cephes' polynomial.
static inline vf v_tanh_small(vf x) {
  const vf z = v_mul(x, x);
  vf p = v_set(-5.70498872745e-3f);
  p = v_fma(p, z, v_set(2.06390887954e-2f));
  p = v_fma(p, z, v_set(-5.37397155531e-2f));
  p = v_fma(p, z, v_set(1.33314422036e-1f));
  p = v_fma(p, z, v_set(-3.33332819422e-1f));
  return v_fma(v_mul(p, z), x, x);
}

// --- rows of any dtype ---------------------------------------------------------------------------

static inline float load_one(const void* p, int64_t i, DType t) {
  if (t == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}
static inline void store_one(void* p, int64_t i, float x, DType t) {
  if (t == DType::f32) static_cast<float*>(p)[i] = x;
  else static_cast<uint16_t*>(p)[i] = t == DType::bf16 ? float_to_bf16(x) : float_to_f16(x);
}
static inline const void* offset(const void* p, int64_t elements, DType t) {
  return static_cast<const char*>(p) + elements * (t == DType::f32 ? 4 : 2);
}
static inline void* offset(void* p, int64_t elements, DType t) {
  return static_cast<char*>(p) + elements * (t == DType::f32 ? 4 : 2);
}

// n contiguous elements of dtype t to floats, and back.
static inline void load_row(float* dst, const void* src, int64_t n, DType t) {
  int64_t i = 0;
  if (t == DType::f32) { std::memcpy(dst, src, size_t(n) * 4); return; }
  const uint16_t* s = static_cast<const uint16_t*>(src);
  if (t == DType::bf16) for (; i + VL <= n; i += VL) v_store(dst + i, v_load_bf16(s + i));
  else for (; i + VL <= n; i += VL) v_store(dst + i, v_load_f16(s + i));
  for (; i < n; ++i) dst[i] = load_one(src, i, t);
}
static inline void store_row(void* dst, const float* src, int64_t n, DType t) {
  int64_t i = 0;
  if (t == DType::f32) { std::memcpy(dst, src, size_t(n) * 4); return; }
  uint16_t* d = static_cast<uint16_t*>(dst);
  if (t == DType::bf16) for (; i + VL <= n; i += VL) v_store_bf16(d + i, v_load(src + i));
  else for (; i + VL <= n; i += VL) v_store_f16(d + i, v_load(src + i));
  for (; i < n; ++i) store_one(dst, i, src[i], t);
}

}  // namespace GP_ISA
}  // namespace gp
