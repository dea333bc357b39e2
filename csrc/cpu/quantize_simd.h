// What quantization adds to common/simd.h: integer lanes, bytes in and out, loads of any dtype.
#pragma once

#include "common/simd.h"

namespace gp {
namespace GP_ISA {

#if defined(__AVX512F__)

struct vi { __m512i v; };
static inline vi i_set(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline vi i_add(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline vi i_sub(vi a, vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline vi i_and(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline vi i_or(vi a, vi b) { return {_mm512_or_si512(a.v, b.v)}; }
static inline vi i_max(vi a, vi b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int N> static inline vi i_sll(vi a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> static inline vi i_srl(vi a) { return {_mm512_srli_epi32(a.v, N)}; }
// a > b ? x : y
static inline vi i_select_gt(vi a, vi b, vi x, vi y) {
  return {_mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a.v, b.v), y.v, x.v)};
}
static inline int32_t i_hmax(vi a) { return _mm512_reduce_max_epi32(a.v); }
static inline vi as_int(vf a) { return {_mm512_castps_si512(a.v)}; }
static inline vf as_float(vi a) { return {_mm512_castsi512_ps(a.v)}; }
static inline vi to_int(vf a) { return {_mm512_cvtps_epi32(a.v)}; }  // half to even
static inline vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline vf v_load_s8(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
}
// VL codes of 16-bit halves
static inline vf v_half_bits(__m256i h) { return {_mm512_cvtph_ps(h)}; }
// Low byte of each lane.
static inline void i_store_bytes(uint8_t* p, vi a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

#elif defined(__AVX2__)

struct vi { __m256i v; };
static inline vi i_set(int32_t x) { return {_mm256_set1_epi32(x)}; }
static inline vi i_add(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
static inline vi i_sub(vi a, vi b) { return {_mm256_sub_epi32(a.v, b.v)}; }
static inline vi i_and(vi a, vi b) { return {_mm256_and_si256(a.v, b.v)}; }
static inline vi i_or(vi a, vi b) { return {_mm256_or_si256(a.v, b.v)}; }
static inline vi i_max(vi a, vi b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <int N> static inline vi i_sll(vi a) { return {_mm256_slli_epi32(a.v, N)}; }
template <int N> static inline vi i_srl(vi a) { return {_mm256_srli_epi32(a.v, N)}; }
static inline vi i_select_gt(vi a, vi b, vi x, vi y) {
  return {_mm256_blendv_epi8(y.v, x.v, _mm256_cmpgt_epi32(a.v, b.v))};
}
static inline int32_t i_hmax(vi a) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline vi as_int(vf a) { return {_mm256_castps_si256(a.v)}; }
static inline vf as_float(vi a) { return {_mm256_castsi256_ps(a.v)}; }
static inline vi to_int(vf a) { return {_mm256_cvtps_epi32(a.v)}; }
static inline vf to_float(vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
static inline vf v_load_s8(const uint8_t* p) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))};
}
static inline void i_store_bytes(uint8_t* p, vi a) {
  const __m256i low = _mm256_shuffle_epi8(
      a.v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low),
                                          _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
}

#else

struct vi { int32_t v; };
static inline vi i_set(int32_t x) { return {x}; }
static inline vi i_add(vi a, vi b) { return {int32_t(uint32_t(a.v) + uint32_t(b.v))}; }
static inline vi i_sub(vi a, vi b) { return {int32_t(uint32_t(a.v) - uint32_t(b.v))}; }
static inline vi i_and(vi a, vi b) { return {a.v & b.v}; }
static inline vi i_or(vi a, vi b) { return {a.v | b.v}; }
static inline vi i_max(vi a, vi b) { return {a.v > b.v ? a.v : b.v}; }
template <int N> static inline vi i_sll(vi a) { return {int32_t(uint32_t(a.v) << N)}; }
template <int N> static inline vi i_srl(vi a) { return {int32_t(uint32_t(a.v) >> N)}; }
static inline vi i_select_gt(vi a, vi b, vi x, vi y) { return a.v > b.v ? x : y; }
static inline int32_t i_hmax(vi a) { return a.v; }
static inline vi as_int(vf a) { return {int32_t(float_to_bits(a.v))}; }
static inline vf as_float(vi a) { return {bits_to_float(uint32_t(a.v))}; }
static inline vi to_int(vf a) { return {int32_t(__builtin_nearbyintf(a.v))}; }
static inline vf to_float(vi a) { return {float(a.v)}; }
static inline vf v_load_s8(const uint8_t* p) { return {float(int8_t(*p))}; }
static inline void i_store_bytes(uint8_t* p, vi a) { *p = uint8_t(a.v); }

#endif

// Low bytes of four vectors, one after the other; SIGNED says whether they hold -128..127 or 0..255.
template <bool SIGNED>
static inline void i_store_bytes(uint8_t* p, vi a, vi b, vi c, vi d) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i ab = _mm256_packs_epi32(a.v, b.v), cd = _mm256_packs_epi32(c.v, d.v);
  const __m256i bytes = SIGNED ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
#else
  i_store_bytes(p, a);
  i_store_bytes(p + VL, b);
  i_store_bytes(p + 2 * VL, c);
  i_store_bytes(p + 3 * VL, d);
#endif
}

// VL elements of dtype T from element i on; the first n of them, the rest 0.
template <DType T>
static inline vf load_vec(const void* p, int64_t i) {
  if constexpr (T == DType::f32) return v_load(static_cast<const float*>(p) + i);
  else if constexpr (T == DType::bf16) return v_load_bf16(static_cast<const uint16_t*>(p) + i);
  else return v_load_f16(static_cast<const uint16_t*>(p) + i);
}
template <DType T>
static inline vf load_part(const void* p, int64_t i, int64_t n) {
  float part[VL] = {};
  for (int64_t j = 0; j < n; ++j) part[j] = load_one(p, i + j, T);
  return v_load(part);
}

// Calls fn with the dtype as a compile-time constant.
template <DType T> struct Typed { static constexpr DType value = T; };
template <class F>
static inline void with_dtype(DType t, F&& fn) {
  if (t == DType::f32) fn(Typed<DType::f32>{});
  else if (t == DType::bf16) fn(Typed<DType::bf16>{});
  else fn(Typed<DType::f16>{});
}

constexpr int32_t kInfBits = 0x7f800000;

// Largest magnitude of n elements as bits: at least kInfBits if one of them is not finite. With
// `finite_only` those count as 0.
template <DType T>
static inline int32_t absmax_bits(const void* x, int64_t i, int64_t n, bool finite_only) {
  const vi mask = i_set(0x7fffffff), limit = i_set(kInfBits), zero = i_set(0);
  vi a = zero, b = zero;
  const auto magnitude = [&](vf v) {
    const vi m = i_and(as_int(v), mask);
    return finite_only ? i_select_gt(limit, m, m, zero) : m;
  };
  int64_t j = 0;
  for (; j + 2 * VL <= n; j += 2 * VL) {
    a = i_max(a, magnitude(load_vec<T>(x, i + j)));
    b = i_max(b, magnitude(load_vec<T>(x, i + j + VL)));
  }
  for (; j < n; j += VL)
    a = i_max(a, magnitude(j + VL <= n ? load_vec<T>(x, i + j) : load_part<T>(x, i + j, n - j)));
  return i_hmax(i_max(a, b));
}

}  // namespace GP_ISA
}  // namespace gp
