// Pieces of rows of a quantized weight as floats, in every format. Included by kernels only.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "cpu/quant_matmul.h"
#include "cpu/quant_matmul_lut.h"

namespace gp {
namespace GP_ISA {

// An fp16 with the sign, exponent and mantissa bits of an e4m3fn is 2^-8 of it, subnormals included.
// (An e5m2 is the upper half of an fp16.)
constexpr float E4M3_LIFT = 256.0f;
constexpr int16_t E4M3_BITS = int16_t(0xbf80);
// The same of an e3m4, one bit further down, and 2^-12.
constexpr float E3M4_LIFT = 4096.0f;
constexpr int16_t E3M4_BITS = int16_t(0x9fc0);

// Into the second-level cache, to be used a page ahead: the processor's own prefetch stops where a
// page does. (EPYC 9004, one thread reading 4 KiB rows: 36 GB/s, against 25 without it; 1 KiB ahead
// or into the first level gives no more than 28.)
// Always inline: GCC takes a function that only prefetches for one without effect, and drops its calls.
GP_INLINE inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

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
static inline float e3m4_to_float(uint8_t b) {
  const int magnitude = b & 0x7f, exponent = magnitude >> 4, mantissa = b & 15;
  if (magnitude > 0x70) return bits_to_float(0x7fc00000u | uint32_t(b & 0x80) << 24);
  float value = exponent == 0 ? float(mantissa) * 0x1p-6f
      : bits_to_float(uint32_t(exponent + 124) << 23 | uint32_t(mantissa) << 19);
  if (magnitude == 0x70) value = __builtin_inff();
  return b & 0x80 ? -value : value;
}
static inline float e5m2_to_float(uint8_t b) { return f16_to_float(uint16_t(uint16_t(b) << 8)); }

template <QuantFormat F>
static inline float load_code(uint8_t b) {
  if (F == QuantFormat::int8) return float(int8_t(b));
  if (F == QuantFormat::fp8_e3m4) return e3m4_to_float(b);
  return F == QuantFormat::fp8 ? e4m3_to_float(b) : e5m2_to_float(b);
}

// VL codes of an 8-bit format as floats, without their scale; NaN and infinity are kept.
template <QuantFormat F>
static inline vf load_codes(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (F == QuantFormat::int8) return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
  if (F == QuantFormat::fp8_e5m2)
    return {_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(b), 8))};
  if (F == QuantFormat::fp8_e3m4) {
    const __m256i h =
        _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 6), _mm256_set1_epi16(E3M4_BITS));
    const __m512 v = _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(E3M4_LIFT));
    const __m128i magnitude = _mm_and_si128(b, _mm_set1_epi8(0x7f));
    const __m512 tail = _mm512_mask_blend_ps(_mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(0x70)),
        _mm512_set1_ps(__builtin_nanf("")),
        _mm512_mul_ps(v, _mm512_set1_ps(__builtin_inff())));
    return {_mm512_mask_blend_ps(_mm_cmpge_epi8_mask(magnitude, _mm_set1_epi8(0x70)), v, tail)};
  }
  const __m256i half =
      _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 7), _mm256_set1_epi16(E4M3_BITS));
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(E4M3_LIFT));
  const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(b, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
  return {_mm512_mask_blend_ps(nan, value, _mm512_set1_ps(__builtin_nanf("")))};
#elif defined(__AVX2__)
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if (F == QuantFormat::int8) return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))};
  if (F == QuantFormat::fp8_e5m2)
    return {_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(b), 8))};
  if (F == QuantFormat::fp8_e3m4) {
    const __m128i h =
        _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(b), 6), _mm_set1_epi16(E3M4_BITS));
    const __m256 v = _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(E3M4_LIFT));
    const __m128i magnitude = _mm_and_si128(b, _mm_set1_epi8(0x7f));
    const __m256i large = _mm256_cvtepi8_epi32(_mm_cmpgt_epi8(magnitude, _mm_set1_epi8(0x6f)));
    const __m256i odd = _mm256_cvtepi8_epi32(_mm_cmpgt_epi8(magnitude, _mm_set1_epi8(0x70)));
    const __m256 infinite = _mm256_mul_ps(v, _mm256_set1_ps(__builtin_inff()));
    const __m256 tail = _mm256_or_ps(infinite, _mm256_castsi256_ps(odd));
    return {_mm256_blendv_ps(v, tail, _mm256_castsi256_ps(large))};
  }
  const __m128i half =
      _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(b), 7), _mm_set1_epi16(E4M3_BITS));
  const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(E4M3_LIFT));
  const __m128i nan = _mm_cmpeq_epi8(_mm_and_si128(b, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
  return {_mm256_or_ps(value, _mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan)))};
#else
  if (F == QuantFormat::int8) return {float(int8_t(*p))};
  return {load_code<F>(*p)};
#endif
}

constexpr int bits_of(QuantFormat f) {
  return f == QuantFormat::int2 ? 2 : f == QuantFormat::int3 ? 3
      : f == QuantFormat::int4 || has_book(f) ? 4 : 8;
}

static inline float block_scale(const QuantWeight& w, int64_t block) {
  if (!w.nested_scale) return load_one(w.scale, block, w.scale_dtype);
  const float value = w.dynamic_map[static_cast<const uint8_t*>(w.scale)[block]];
  return value * w.nested_scale[block / 256] + *w.scale_offset;
}

// Rows of W as floats. Made once a kernel: it holds the table of the format.
class Decoder {
 public:
  explicit Decoder(const QuantWeight& w)
      : w_(w), book_(w.format == QuantFormat::fp4 ? FP4 : NF4) {}

  // Asks for the bytes that row(n, k0, len) reads: pieces of rows are too short for the processor to
  // see where they lead.
  GP_INLINE void prefetch_row(int64_t n, int64_t k0, int64_t len) const {
    const int bits = bits_of(w_.format);
    const int64_t first =
        has_book(w_.format) ? (n * w_.k + k0) / 2 : n * ((w_.k * bits + 7) / 8) + k0 * bits / 8;
    const int64_t bytes = len * bits / 8;
    for (int64_t i = 0; i < bytes; i += 64) prefetch(w_.qdata + first + i);
    prefetch(w_.qdata + first + bytes - 1);
  }

  // out[i] = W[n][k0 + i] for i in [0, len), rounded as the reference codec rounds.
  void row(int64_t n, int64_t k0, int64_t len, float* out) const {
    switch (w_.format) {
      case QuantFormat::int8: return bytes<QuantFormat::int8>(n, k0, len, out);
      case QuantFormat::fp8: return bytes<QuantFormat::fp8>(n, k0, len, out);
      case QuantFormat::fp8_e5m2: return bytes<QuantFormat::fp8_e5m2>(n, k0, len, out);
      case QuantFormat::nf4:
      case QuantFormat::fp4: return book(n * w_.k + k0, len, out);
      case QuantFormat::fp8_e3m4: return bytes<QuantFormat::fp8_e3m4>(n, k0, len, out);
      case QuantFormat::int4: return int4(n, k0, len, out);
      case QuantFormat::int3: return stream<3>(n, k0, len, out);
      case QuantFormat::int2: return stream<2>(n, k0, len, out);
    }
  }

 private:
  template <QuantFormat F>
  void bytes(int64_t n, int64_t k0, int64_t len, float* out) const {
    const uint8_t* p = w_.qdata + n * w_.k + k0;
    for (int64_t i = 0; i < len;) {
      int64_t end = len;
      int64_t at = w_.group_size == 0 ? 0 : n;
      if (w_.group_size == 128 || w_.group_size == -128) {
        const int64_t block = (k0 + i) / 128;
        at = (w_.group_size > 0 ? n / 128 : n) * ((w_.k + 127) / 128) + block;
        end = block * 128 + 128 - k0 < len ? block * 128 + 128 - k0 : len;
      }
      const float s = load_one(w_.scale, at, w_.scale_dtype);
      for (; i + VL <= end; i += VL) v_store(out + i, v_mul(load_codes<F>(p + i), v_set(s)));
      for (; i < end; ++i) out[i] = load_code<F>(p[i]) * s;
    }
  }

  void book(int64_t flat, int64_t len, float* out) const {
    const BookRun run = book_;  // in registers: a load from beside the tile would wait for its stores
    for (int64_t i = 0; i < len;) {
      const int64_t block = (flat + i) / w_.group_size;
      const int64_t left = (block + 1) * w_.group_size - flat;
      const int64_t end = left < len ? left : len;
      segment(run, w_.qdata, flat, i, end, block_scale(w_, block), out);
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
      const Int4Run run(w_.zero_point ? w_.zero_point[at] : 8);
      segment(run, row, k0, i, end, load_one(w_.scale, at, w_.scale_dtype), out);
      i = end;
    }
  }

  // Codes of 2 or 3 bits, a row one little-endian stream of them.
  template <int BITS>
  void stream(int64_t n, int64_t k0, int64_t len, float* out) const {
    const int64_t g = w_.group_size > 0 ? w_.group_size : w_.k;
    const int64_t groups = (w_.k + g - 1) / g;
    const uint8_t* row = w_.qdata + n * ((w_.k * BITS + 7) / 8);
    for (int64_t i = 0; i < len;) {
      const int64_t group = (k0 + i) / g, at = n * groups + group;
      const int64_t end = (group + 1) * g - k0 < len ? (group + 1) * g - k0 : len;
      const float scale = load_one(w_.scale, at, w_.scale_dtype);
      const int zero = w_.zero_point ? w_.zero_point[at] : 1 << (BITS - 1);
      while (i < end) {
        const int64_t bit = (k0 + i) * BITS;
        const uint8_t* p = row + bit / 8;
#if defined(__AVX2__)
        if ((k0 + i) % 8 == 0 && i + 8 <= end) {
          const uint32_t word =
              uint32_t(p[0]) | uint32_t(p[1]) << 8 | (BITS == 3 ? uint32_t(p[2]) << 16 : 0);
          const __m256i lanes = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                                   _mm256_set1_epi32(BITS));
          const __m256i codes = _mm256_and_si256(
              _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), lanes), _mm256_set1_epi32((1 << BITS) - 1));
          const __m256i less = _mm256_sub_epi32(codes, _mm256_set1_epi32(zero));
          _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtepi32_ps(less), _mm256_set1_ps(scale)));
          i += 8;
          continue;
        }
#endif
        // The code may end in the next byte, which is then there.
        const int shift = int(bit % 8);
        const int both = shift + BITS > 8 ? p[0] | p[1] << 8 : p[0];
        out[i++] = float((both >> shift & ((1 << BITS) - 1)) - zero) * scale;
      }
    }
  }

  // Elements base+i .. base+end-1 of a packed stream, which share a zero point and a scale.
  template <class Run>
  static void segment(const Run& run, const uint8_t* p, int64_t base, int64_t i, int64_t end,
                      float scale, float* out) {
    while (i < end) {
      const bool even = (base + i) % 2 == 0;
      const uint8_t* at = p + (base + i) / 2;
      if (even && i + 32 <= end) {
        run.decode32(at, scale, out + i);
        i += 32;
      } else {
        out[i] = run.value(even == Run::HIGH_FIRST ? *at >> 4 : *at & 15) * scale;
        ++i;
      }
    }
  }

  const QuantWeight& w_;
  BookRun book_;
};

}  // namespace GP_ISA
}  // namespace gp
