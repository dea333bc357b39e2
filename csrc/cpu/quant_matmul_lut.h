// 4-bit codes to floats through tables, 32 at a time. Included by kernels only.
#pragma once

#include "common/codebooks.h"
#include "common/simd.h"

#define GP_INLINE __attribute__((always_inline))
// Unrolled before GCC decides what lives in registers; it keeps some arrays of sums on the stack
// otherwise, stored and loaded at every step.
#define GP_UNROLL _Pragma("GCC unroll 32")

namespace gp {
namespace GP_ISA {

constexpr float UNSIGNED_CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float SIGNED_CODES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

#if defined(__AVX512F__)
using Lut = __m512;
static inline Lut make_lut(const float* t) { return _mm512_loadu_ps(t); }
#elif defined(__AVX2__)
// Byte i of the 16 floats in each lane of plane[i]: four pshufb and eight unpacks make 32 floats,
// bit for bit. Two vpermps and a blend for 8 floats need a third more shuffle slots.
struct Lut {
  __m256i plane[4];
};
static inline Lut make_lut(const float* t) {
  alignas(16) uint8_t bytes[4][16];
  for (int code = 0; code < 16; ++code)
    for (int i = 0; i < 4; ++i) bytes[i][code] = uint8_t(float_to_bits(t[code]) >> (8 * i));
  Lut lut;
  for (int i = 0; i < 4; ++i)
    lut.plane[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[i]));
  return lut;
}
// Codes in the bytes of `index`; f[r] gets bytes 4r..4r+3 of its low half, then of its high half.
static inline void lookup32(const Lut& lut, __m256i index, __m256 f[4]) {
  const __m256i p0 = _mm256_shuffle_epi8(lut.plane[0], index);
  const __m256i p1 = _mm256_shuffle_epi8(lut.plane[1], index);
  const __m256i p2 = _mm256_shuffle_epi8(lut.plane[2], index);
  const __m256i p3 = _mm256_shuffle_epi8(lut.plane[3], index);
  const __m256i lo01 = _mm256_unpacklo_epi8(p0, p1), hi01 = _mm256_unpackhi_epi8(p0, p1);
  const __m256i lo23 = _mm256_unpacklo_epi8(p2, p3), hi23 = _mm256_unpackhi_epi8(p2, p3);
  f[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lo01, lo23));
  f[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lo01, lo23));
  f[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(hi01, hi23));
  f[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(hi01, hi23));
}

#else
using Lut = const float*;
static inline Lut make_lut(const float* t) { return t; }
#endif

#if defined(__AVX2__)
// Codes less their zero point are at most 9 bits: the upper two bytes of their floats are all of
// them. high[z + u] and low[z + u] are those of code u less zero point 255 - z.
struct CodePlanes {
  uint8_t high[16 + 255], low[16 + 255];
  constexpr CodePlanes() : high(), low() {
    for (int i = 0; i < 16 + 255; ++i) {
      const int value = i - 255, magnitude = value < 0 ? -value : value;
      int exponent = 0;
      while (magnitude >> (exponent + 1)) ++exponent;
      const int bits = magnitude == 0 ? 0
          : (value < 0 ? 0x8000 : 0) | (exponent + 127) << 7 | ((magnitude << 7 >> exponent) & 0x7f);
      high[i] = uint8_t(bits >> 8);
      low[i] = uint8_t(bits);
    }
  }
};
constexpr CodePlanes CODE_PLANES;
// Codes of one zero point as floats: two tables of bytes instead of four.
struct CodeLut {
  explicit CodeLut(int zero)
      : low(plane(CODE_PLANES.low + 255 - zero)), high(plane(CODE_PLANES.high + 255 - zero)) {}
  // Codes in the bytes of `index`; in each half, w[0] gets bytes 0, 2, 4 and 6, w[1] the odd ones
  // between them, w[2] and w[3] the same of the other eight.
  GP_INLINE void lookup(__m256i index, __m256* w) const {
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    const __m256i b2 = _mm256_shuffle_epi8(low, index), b3 = _mm256_shuffle_epi8(high, index);
    const __m256i lo = _mm256_unpacklo_epi8(b2, b3), hi = _mm256_unpackhi_epi8(b2, b3);
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(lo, 16));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(lo, upper));
    w[2] = _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16));
    w[3] = _mm256_castsi256_ps(_mm256_and_si256(hi, upper));
  }

  __m256i low, high;

 private:
  GP_INLINE static __m256i plane(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

// The 32 codes of 16 bytes: codes[0] has the first 16 in order, codes[1] the others.
template <bool HighFirst>
GP_INLINE inline void unpack32(const uint8_t* p, __m128i codes[2]) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i lo = _mm_and_si128(b, mask), hi = _mm_and_si128(_mm_srli_epi16(b, 4), mask);
  const __m128i first = HighFirst ? hi : lo, second = HighFirst ? lo : hi;
  codes[0] = _mm_unpacklo_epi8(first, second);
  codes[1] = _mm_unpackhi_epi8(first, second);
}
#endif
#if defined(__AVX512F__)
template <bool HighFirst>
GP_INLINE inline void decode32_by(Lut table, const uint8_t* p, float scale, float* out) {
  __m128i codes[2];
  unpack32<HighFirst>(p, codes);
  for (int i = 0; i < 2; ++i) {
    const __m512 f = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes[i]), table);
    _mm512_storeu_ps(out + 16 * i, _mm512_mul_ps(f, _mm512_set1_ps(scale)));
  }
}
#elif defined(__AVX2__)
// The 32 codes of 16 bytes, placed so that tables taken apart by bytes give them in order.
template <bool HighFirst>
GP_INLINE inline __m256i unpack_for_planes(const uint8_t* p) {
  __m128i codes[2];
  unpack32<HighFirst>(p, codes);
  return _mm256_permutevar8x32_epi32(_mm256_set_m128i(codes[1], codes[0]),
                                     _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}
#endif

// A run of codes that decode by one table: decode32 writes value(code) * scale for 32 of them.

struct BookRun {
  static constexpr bool HIGH_FIRST = true;
  const float* book;
  Lut lut;
  explicit BookRun(const float* values) : book(values), lut(make_lut(values)) {}
  float value(int code) const { return book[code]; }
  GP_INLINE void decode32(const uint8_t* p, float scale, float* out) const {
#if defined(__AVX512F__)
    decode32_by<true>(lut, p, scale, out);
#elif defined(__AVX2__)
    __m256 f[4];
    lookup32(lut, unpack_for_planes<true>(p), f);
    for (int r = 0; r < 4; ++r) _mm256_storeu_ps(out + 8 * r, _mm256_mul_ps(f[r], _mm256_set1_ps(scale)));
#else
    for (int i = 0; i < 32; ++i) out[i] = book[i % 2 ? p[i / 2] & 15 : p[i / 2] >> 4] * scale;
#endif
  }
};

struct Int4Run {
  static constexpr bool HIGH_FIRST = false;
  int zero;
  float value(int code) const { return float(code - zero); }
#if defined(__AVX512F__)
  Lut lut;
  explicit Int4Run(int z) : zero(z), lut(_mm512_sub_ps(make_lut(UNSIGNED_CODES), _mm512_set1_ps(float(z)))) {}
  GP_INLINE void decode32(const uint8_t* p, float scale, float* out) const {
    decode32_by<false>(lut, p, scale, out);
  }
#elif defined(__AVX2__)
  CodeLut lut;
  GP_INLINE explicit Int4Run(int z) : zero(z), lut(z) {}
  GP_INLINE void decode32(const uint8_t* p, float scale, float* out) const {
    const __m256i codes = unpack_for_planes<false>(p), none = _mm256_setzero_si256();
    const __m256i b2 = _mm256_shuffle_epi8(lut.low, codes), b3 = _mm256_shuffle_epi8(lut.high, codes);
    const __m256i lo = _mm256_unpacklo_epi8(b2, b3), hi = _mm256_unpackhi_epi8(b2, b3);
    const __m256i f[4] = {_mm256_unpacklo_epi16(none, lo), _mm256_unpackhi_epi16(none, lo),
                          _mm256_unpacklo_epi16(none, hi), _mm256_unpackhi_epi16(none, hi)};
    const __m256 s = _mm256_set1_ps(scale);
    for (int r = 0; r < 4; ++r) _mm256_storeu_ps(out + 8 * r, _mm256_mul_ps(_mm256_castsi256_ps(f[r]), s));
  }
#else
  explicit Int4Run(int z) : zero(z) {}
  GP_INLINE void decode32(const uint8_t* p, float scale, float* out) const {
    for (int i = 0; i < 32; ++i) out[i] = value(i % 2 ? p[i / 2] >> 4 : p[i / 2] & 15) * scale;
  }
#endif
};

}  // namespace GP_ISA
}  // namespace gp
