// Codes of a rising map of 256 values in [-1, 1] or [0, 1], exactly the nearest, VL at a time.
// Included by csrc/cpu/*_kernel.cpp only (common/simd.h says why).
#pragma once

#include "cpu/quantize.h"
#include "cpu/quantize_simd.h"

namespace gp {
namespace GP_ISA {

#if defined(__AVX512F__)
static inline vf v_gather(const float* p, vi at) { return {_mm512_i32gather_ps(at.v, p, 4)}; }
static inline vi i_gather_bytes(const uint8_t* p, vi at) {
  return i_and({_mm512_i32gather_epi32(at.v, p, 1)}, i_set(255));
}
static inline vi i_load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// 1 where a > b, else 0
static inline vi i_above(vf a, vf b) {
  return {_mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), 1)};
}
#elif defined(__AVX2__)
static inline vf v_gather(const float* p, vi at) { return {_mm256_i32gather_ps(p, at.v, 4)}; }
static inline vi i_gather_bytes(const uint8_t* p, vi at) {
  return i_and({_mm256_i32gather_epi32(reinterpret_cast<const int*>(p), at.v, 1)}, i_set(255));
}
static inline vi i_load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
static inline vi i_above(vf a, vf b) {
  return i_srl<31>({_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))});
}
#else
static inline vf v_gather(const float* p, vi at) { return {p[at.v]}; }
static inline vi i_gather_bytes(const uint8_t* p, vi at) { return {p[at.v]}; }
static inline vi i_load_bytes(const uint8_t* p) { return {*p}; }
static inline vi i_above(vf a, vf b) { return {a.v > b.v}; }
#endif

// What the absmax of a block is never taken to be below, so that zeros give no NaN; bitsandbytes'.
constexpr float kAbsmaxFloor = 1e-38f;
static inline float inverse_of(float absmax) {
  return 1.0f / (absmax > kAbsmaxFloor ? absmax : kAbsmaxFloor);
}

// The code of each lane of t, in [-1, 1] (SIGNED) or [0, 1].
template <bool SIGNED>
static inline vi nearest_code(const DynamicMap& map, vf t) {
  constexpr int kShift = SIGNED ? 17 : 16, kLeast = 104 << (23 - kShift);
  const vi u = as_int(t);
  const vi magnitude = i_srl<kShift>(i_and(u, i_set(0x7fffffff)));
  vi bin = i_max(i_sub(magnitude, i_set(kLeast)), i_set(0));
  if (SIGNED) bin = i_add(bin, i_and(i_sub(i_set(0), i_srl<31>(u)), i_set(kDynamicBins / 2)));
  const vi code = i_gather_bytes(map.start, bin);
  return i_add(code, i_above(t, v_gather(map.bound, code)));
}

// The first n of VL codes, or all of them where n is more.
static inline void store_codes(uint8_t* q, vi code, int64_t n) {
  if (n >= VL) return i_store_bytes(q, code);
  uint8_t part[VL];
  i_store_bytes(part, code);
  for (int64_t i = 0; i < n; ++i) q[i] = part[i];
}

}  // namespace GP_ISA
}  // namespace gp
