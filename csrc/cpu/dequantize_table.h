// Codes of up to 4 bits looked up in a table of scaled values. Included by kernels only.
#pragma once

#include "cpu/quantize_simd.h"
#include "cpu/quantize_work.h"

namespace gp {
namespace GP_ISA {

// The 16 values of a group's codes, already scaled, in the output's dtype.
struct Table {
  alignas(64) float f[16];
  alignas(64) uint16_t h[16];

  template <DType T, class F>
  void fill(const F& values) {  // values(i): lanes i..i+VL
    for (int i = 0; i < 16; i += VL) {
      const vf v = values(i);
      if constexpr (T == DType::f32) v_store(f + i, v);
      else if constexpr (T == DType::bf16) v_store_bf16(h + i, v);
      else v_store_f16(h + i, v);
    }
  }
};

#if defined(__AVX2__)
// 16 bytes to their 32 nibbles in element order, one a byte.
template <bool HIGH_FIRST>
inline void split_nibbles(const uint8_t* q, __m128i* a, __m128i* b) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  *a = HIGH_FIRST ? _mm_unpacklo_epi8(high, low) : _mm_unpacklo_epi8(low, high);
  *b = HIGH_FIRST ? _mm_unpackhi_epi8(high, low) : _mm_unpackhi_epi8(low, high);
}
#endif

#if defined(__AVX512F__)
struct Lookup32 {
  __m512 t;
  explicit Lookup32(const Table& table) : t(_mm512_load_ps(table.f)) {}
  void store16(__m128i codes, float* out) const {
    const __m512 v = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), t);
    _mm512_storeu_ps(out, v);
  }
};
struct Lookup16 {
  __m512i t;
  explicit Lookup16(const Table& table)
      : t(_mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.h)))) {}
  void store32(__m128i a, __m128i b, uint16_t* out) const {
    const __m256i codes = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m512i v = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), t);
    _mm512_storeu_si512(out, v);
  }
};
#elif defined(__AVX2__)
struct Lookup32 {
  __m256 lo, hi;
  explicit Lookup32(const Table& table)
      : lo(_mm256_load_ps(table.f)), hi(_mm256_load_ps(table.f + 8)) {}
  void store8(__m128i codes, float* out) const {
    const __m256i k = _mm256_cvtepu8_epi32(codes);
    const __m256 v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(lo, k),
                                      _mm256_permutevar8x32_ps(hi, k),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(k, 28)));
    _mm256_storeu_ps(out, v);
  }
  void store16(__m128i codes, float* out) const {
    store8(codes, out);
    store8(_mm_unpackhi_epi64(codes, codes), out + 8);
  }
};
// The low and the high bytes of 16 halves, each looked up by one shuffle.
struct Lookup16 {
  __m128i lo, hi;
  explicit Lookup16(const Table& table) {
    const __m128i a = _mm_load_si128(reinterpret_cast<const __m128i*>(table.h));
    const __m128i b = _mm_load_si128(reinterpret_cast<const __m128i*>(table.h + 8));
    const __m128i mask = _mm_set1_epi16(255);
    lo = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
    hi = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  }
  void store32(__m128i a, __m128i b, uint16_t* out) const {
    const auto put = [](uint16_t* p, __m128i v) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
    };
    const __m128i al = _mm_shuffle_epi8(lo, a), ah = _mm_shuffle_epi8(hi, a);
    const __m128i bl = _mm_shuffle_epi8(lo, b), bh = _mm_shuffle_epi8(hi, b);
    put(out, _mm_unpacklo_epi8(al, ah));
    put(out + 8, _mm_unpackhi_epi8(al, ah));
    put(out + 16, _mm_unpacklo_epi8(bl, bh));
    put(out + 24, _mm_unpackhi_epi8(bl, bh));
  }
};
#endif

// n elements from nibbles through a table.
template <DType T, bool HIGH_FIRST>
void decode_nibbles(const uint8_t* q, int64_t n, const Table& table, void* out, int64_t at) {
  int64_t i = 0;
#if defined(__AVX2__)
  if constexpr (T == DType::f32) {
    const Lookup32 lookup(table);
    float* o = static_cast<float*>(out) + at;
    for (; i + 32 <= n; i += 32) {
      __m128i a, b;
      split_nibbles<HIGH_FIRST>(q + i / 2, &a, &b);
      lookup.store16(a, o + i);
      lookup.store16(b, o + i + 16);
    }
  } else {
    const Lookup16 lookup(table);
    uint16_t* o = static_cast<uint16_t*>(out) + at;
    for (; i + 32 <= n; i += 32) {
      __m128i a, b;
      split_nibbles<HIGH_FIRST>(q + i / 2, &a, &b);
      lookup.store32(a, b, o + i);
    }
  }
#endif
  for (; i < n; ++i) {
    const int shift = ((i & 1) == 0) == HIGH_FIRST ? 4 : 0;
    const int code = q[i / 2] >> shift & 15;
    if constexpr (T == DType::f32) static_cast<float*>(out)[at + i] = table.f[code];
    else static_cast<uint16_t*>(out)[at + i] = table.h[code];
  }
}

}  // namespace GP_ISA
}  // namespace gp
