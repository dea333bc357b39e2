// Pieces of rows of a quantized weight as floats, in every format. Included by kernels only.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "common/codebooks.h"
#include "common/simd.h"
#include "cpu/quant_matmul.h"

#define GP_INLINE __attribute__((always_inline))

namespace gp {
namespace GP_ISA {

// e4m3fn bits with sign, exponent and mantissa moved to their places in fp32 are 2^-120 of the value,
// subnormals included, if the processor does not flush them. (e5m2 is the upper half of an fp16.)
constexpr float E4M3_LIFT = 0x1p120f;

// Into the second-level cache, to be used a page ahead: the processor's own prefetch stops where a
// page does. (EPYC 9004, one thread reading 4 KiB rows: 36 GB/s, against 25 without it; 1 KiB ahead
// or into the first level gives no more than 28.)
static inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

// A thread may flush subnormals (torch.set_flush_denormal, and what a thread so set has started);
// while an item of a kernel runs, none does: the result is the same on every thread.
class KeepSubnormals {
 public:
#if defined(__SSE__)
  KeepSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~KeepSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  KeepSubnormals() {}
#endif
};

static inline float e4m3_to_float(uint8_t b) {
  if ((b & 0x7f) == 0x7f) return bits_to_float(0x7fc00000u | uint32_t(b & 0x80) << 24);
  const int exponent = (b >> 3) & 15, mantissa = b & 7;
  const float magnitude = exponent == 0
      ? float(mantissa) * 0x1p-9f
      : bits_to_float(uint32_t(exponent + 120) << 23 | uint32_t(mantissa) << 20);
  return b & 0x80 ? -magnitude : magnitude;
}
static inline float e5m2_to_float(uint8_t b) { return f16_to_float(uint16_t(uint16_t(b) << 8)); }

// VL codes of an 8-bit format as floats, without their scale; NaN and infinity are kept.
template <QuantFormat F>
static inline vf load_codes(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (F == QuantFormat::int8) return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
  if (F == QuantFormat::fp8_e5m2)
    return {_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(b), 8))};
  const __m512i w = _mm512_cvtepi8_epi32(b);
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(w, 20), _mm512_set1_epi32(0x87f00000));
  const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(E4M3_LIFT));
  const __m512i low = _mm512_and_si512(w, _mm512_set1_epi32(0x7f));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(low, _mm512_set1_epi32(0x7f));
  return {_mm512_mask_blend_ps(nan, value, _mm512_set1_ps(__builtin_nanf("")))};
#elif defined(__AVX2__)
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if (F == QuantFormat::int8) return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))};
  if (F == QuantFormat::fp8_e5m2)
    return {_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(b), 8))};
  const __m256i w = _mm256_cvtepi8_epi32(b);
  const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(w, 20), _mm256_set1_epi32(0x87f00000));
  const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(E4M3_LIFT));
  const __m256i low = _mm256_and_si256(w, _mm256_set1_epi32(0x7f));
  const __m256i nan = _mm256_cmpeq_epi32(low, _mm256_set1_epi32(0x7f));
  return {_mm256_or_ps(value, _mm256_castsi256_ps(nan))};
#else
  if (F == QuantFormat::int8) return {float(int8_t(*p))};
  return {F == QuantFormat::fp8 ? e4m3_to_float(*p) : e5m2_to_float(*p)};
#endif
}

template <QuantFormat F>
static inline float load_code(uint8_t b) {
  if (F == QuantFormat::int8) return float(int8_t(b));
  return F == QuantFormat::fp8 ? e4m3_to_float(b) : e5m2_to_float(b);
}

// --- 4-bit codes through a table of 16 floats ----------------------------------------------------

#if defined(__AVX512F__)
struct Lut {
  __m512 table;
};
static inline Lut make_lut(const float* t) { return {_mm512_loadu_ps(t)}; }
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
struct Lut {
  const float* table;
};
static inline Lut make_lut(const float* t) { return {t}; }
#endif

// out[i] = (table[code i] - zero) * scale for the 32 codes of 16 bytes.
template <bool HighFirst>
static inline void decode32(const Lut& lut, const uint8_t* p, float zero, float scale, float* out) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i lo = _mm_and_si128(b, mask), hi = _mm_and_si128(_mm_srli_epi16(b, 4), mask);
  const __m128i first = HighFirst ? hi : lo, second = HighFirst ? lo : hi;
  const __m128i c0 = _mm_unpacklo_epi8(first, second), c1 = _mm_unpackhi_epi8(first, second);
#endif
#if defined(__AVX512F__)
  const __m512 z = _mm512_set1_ps(zero), s = _mm512_set1_ps(scale);
  const __m512 f0 = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(c0), lut.table);
  const __m512 f1 = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(c1), lut.table);
  _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_sub_ps(f0, z), s));
  _mm512_storeu_ps(out + 16, _mm512_mul_ps(_mm512_sub_ps(f1, z), s));
#elif defined(__AVX2__)
  const __m256 z = _mm256_set1_ps(zero), s = _mm256_set1_ps(scale);
  __m256 f[4];
  lookup32(lut, _mm256_set_m128i(c1, c0), f);
  for (int r = 0; r < 4; ++r) {
    const __m256 v = _mm256_mul_ps(_mm256_sub_ps(f[r], z), s);
    _mm_storeu_ps(out + 4 * r, _mm256_castps256_ps128(v));
    _mm_storeu_ps(out + 16 + 4 * r, _mm256_extractf128_ps(v, 1));
  }
#else
  for (int i = 0; i < 16; ++i) {
    const int lo = p[i] & 15, hi = p[i] >> 4;
    out[2 * i] = (lut.table[HighFirst ? hi : lo] - zero) * scale;
    out[2 * i + 1] = (lut.table[HighFirst ? lo : hi] - zero) * scale;
  }
#endif
}

constexpr float UNSIGNED_CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline float block_scale(const QuantWeight& w, int64_t block) {
  if (!w.nested_scale) return load_one(w.scale, block, w.scale_dtype);
  const float value = w.dynamic_map[static_cast<const uint8_t*>(w.scale)[block]];
  return value * w.nested_scale[block / 256] + *w.scale_offset;
}

// Rows of W as floats. Made once a kernel: it holds the table of the format.
class Decoder {
 public:
  explicit Decoder(const QuantWeight& w)
      : w_(w), lut_(make_lut(w.format == QuantFormat::nf4 ? NF4 : UNSIGNED_CODES)) {}

  // out[i] = W[n][k0 + i] for i in [0, len), rounded as the reference codec rounds.
  void row(int64_t n, int64_t k0, int64_t len, float* out) const {
    switch (w_.format) {
      case QuantFormat::int8: return bytes<QuantFormat::int8>(n, k0, len, out);
      case QuantFormat::fp8: return bytes<QuantFormat::fp8>(n, k0, len, out);
      case QuantFormat::fp8_e5m2: return bytes<QuantFormat::fp8_e5m2>(n, k0, len, out);
      case QuantFormat::nf4: return nf4(n * w_.k + k0, len, out);
      case QuantFormat::int4: return int4(n, k0, len, out);
    }
  }

 private:
  template <QuantFormat F>
  void bytes(int64_t n, int64_t k0, int64_t len, float* out) const {
    const uint8_t* p = w_.qdata + n * w_.k + k0;
    for (int64_t i = 0; i < len;) {
      int64_t end = len;
      int64_t at = w_.group_size == 0 ? 0 : n;
      if (w_.group_size == 128) {
        const int64_t block = (k0 + i) / 128;
        at = n / 128 * ((w_.k + 127) / 128) + block;
        end = block * 128 + 128 - k0 < len ? block * 128 + 128 - k0 : len;
      }
      const float s = load_one(w_.scale, at, w_.scale_dtype);
      for (; i + VL <= end; i += VL) v_store(out + i, v_mul(load_codes<F>(p + i), v_set(s)));
      for (; i < end; ++i) out[i] = load_code<F>(p[i]) * s;
    }
  }

  void nf4(int64_t flat, int64_t len, float* out) const {
    for (int64_t i = 0; i < len;) {
      const int64_t block = (flat + i) / w_.group_size;
      const int64_t left = (block + 1) * w_.group_size - flat;
      const int64_t end = left < len ? left : len;
      segment<true>(w_.qdata, flat, i, end, 0.0f, block_scale(w_, block), out);
      i = end;
    }
  }

  void int4(int64_t n, int64_t k0, int64_t len, float* out) const {
    const int64_t g = w_.group_size > 0 ? w_.group_size : w_.k;
    const int64_t groups = (w_.k + g - 1) / g;
    const uint8_t* row = w_.qdata + n * ((w_.k + 1) / 2);
    for (int64_t i = 0; i < len;) {
      const int64_t group = (k0 + i) / g, at = n * groups + group;
      const int64_t end = (group + 1) * g - k0 < len ? (group + 1) * g - k0 : len;
      const float zero = w_.zero_point ? float(w_.zero_point[at]) : 8.0f;
      segment<false>(row, k0, i, end, zero, load_one(w_.scale, at, w_.scale_dtype), out);
      i = end;
    }
  }

  // Elements base+i .. base+end-1 of a packed stream, which share a zero point and a scale.
  template <bool HighFirst>
  void segment(const uint8_t* p, int64_t base, int64_t i, int64_t end, float zero, float scale,
               float* out) const {
    const float* table = HighFirst ? NF4 : UNSIGNED_CODES;
    while (i < end) {
      if ((base + i) % 2 == 0 && i + 32 <= end) {
        decode32<HighFirst>(lut_, p + (base + i) / 2, zero, scale, out + i);
        i += 32;
        continue;
      }
      const bool high = ((base + i) % 2 == 0) == HighFirst;
      const uint8_t b = p[(base + i) / 2];
      out[i] = (table[high ? b >> 4 : b & 15] - zero) * scale;
      ++i;
    }
  }

  const QuantWeight& w_;
  Lut lut_;
};

}  // namespace GP_ISA
}  // namespace gp
