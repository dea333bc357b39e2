// Rows of a cache of any element type against rows of floats: the two products of decode attention.
//
// STEP elements of a cache row become two vectors, in an order of lanes that suits their type: `lane`
// says where an element goes. Queries are put into that order before, outputs taken out of it after.
#pragma once

#include "common/simd.h"
#include "cpu/decode_attention.h"

namespace gp {
namespace GP_ISA {

constexpr int STEP = 2 * VL;
// Registers for accumulators: a tile of RT rows and 8 / RT keys, or 8 / RT vectors of columns.
constexpr int TILE = 8;

static inline float e4m3_to_float(uint8_t b) {
  const uint32_t magnitude = b & 0x7fu, sign = uint32_t(b & 0x80u) << 24;
  if (magnitude == 0x7f) return __builtin_nanf("");
  // Through the exponent of a float: 2^120 lifts it by 127 - 7, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 20) * 0x1p120f));
}

template <DType T>
struct Element;

template <>
struct Element<DType::f32> {
  static constexpr int bytes = 4;
  static inline void load(const char* p, vf& a, vf& b) {
    const float* f = reinterpret_cast<const float*>(p);
    a = v_load(f), b = v_load(f + VL);
  }
  static int64_t lane(int64_t i) { return i; }
};

template <>
struct Element<DType::bf16> {
  static constexpr int bytes = 2;
  // Even elements, then odd ones: a shift and a mask, and no shuffle.
  static inline void load(const char* p, vf& a, vf& b) {
#if defined(__AVX512F__)
    const __m512i w = _mm512_loadu_si512(p);
    a.v = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    b.v = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000u))));
#elif defined(__AVX2__)
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a.v = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    b.v = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000u))));
#else
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    a = v_load_bf16(h), b = v_load_bf16(h + 1);
#endif
  }
  static int64_t lane(int64_t i) { return i / STEP * STEP + i % 2 * VL + i % STEP / 2; }
};

template <>
struct Element<DType::f16> {
  static constexpr int bytes = 2;
  static inline void load(const char* p, vf& a, vf& b) {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    a = v_load_f16(h), b = v_load_f16(h + VL);
  }
  static int64_t lane(int64_t i) { return i; }
};

template <>
struct Element<DType::i8> {
  static constexpr int bytes = 1;
  static inline void load(const char* p, vf& a, vf& b) {
#if defined(__AVX512F__)
    const __m128i* m = reinterpret_cast<const __m128i*>(p);
    a.v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(m)));
    b.v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(m + 1)));
#elif defined(__AVX2__)
    const __m128i lo = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i hi = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8));
    a.v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(lo));
    b.v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(hi));
#else
    a.v = float(int8_t(p[0])), b.v = float(int8_t(p[1]));
#endif
  }
  static int64_t lane(int64_t i) { return i; }
};

template <>
struct Element<DType::f8e4m3fn> {
  static constexpr int bytes = 1;
  // Through fp16, whose exponent is one bit longer: 2^8 makes up for the bias, subnormals included;
  // 0x7f, which is NaN, gets all exponent bits.
  static inline void load(const char* p, vf& a, vf& b) {
#if defined(__AVX512F__)
    const __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i low = _mm512_and_si512(w, _mm512_set1_epi16(0x7f));
    __m512i h = _mm512_or_si512(_mm512_slli_epi16(low, 7),
                                _mm512_and_si512(w, _mm512_set1_epi16(int16_t(0x8000))));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(low, _mm512_set1_epi16(0x7f));
    h = _mm512_mask_blend_epi16(nan, h, _mm512_set1_epi16(0x7e00));
    const __m512 bias = _mm512_set1_ps(256.0f);
    a.v = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(h)), bias);
    b.v = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1)), bias);
#elif defined(__AVX2__)
    const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i low = _mm256_and_si256(w, _mm256_set1_epi16(0x7f));
    __m256i h = _mm256_or_si256(_mm256_slli_epi16(low, 7),
                                _mm256_and_si256(w, _mm256_set1_epi16(int16_t(0x8000))));
    const __m256i nan = _mm256_cmpeq_epi16(low, _mm256_set1_epi16(0x7f));
    h = _mm256_or_si256(h, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
    const __m256 bias = _mm256_set1_ps(256.0f);
    a.v = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), bias);
    b.v = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)), bias);
#else
    a.v = e4m3_to_float(uint8_t(p[0])), b.v = e4m3_to_float(uint8_t(p[1]));
#endif
  }
  static int64_t lane(int64_t i) { return i; }
};

// Any `n` elements to floats in their natural order, for rows that STEP does not divide.
template <DType T>
static inline void unpack_row(float* out, const char* p, int64_t n) {
  if (T != DType::i8 && T != DType::f8e4m3fn) return load_row(out, p, n, T);
  for (int64_t i = 0; i < n; ++i)
    out[i] = T == DType::i8 ? float(int8_t(p[i])) : e4m3_to_float(uint8_t(p[i]));
}

// out[i] = the sum of the lanes of acc[i].
static inline void sum_tile_lanes(const vf* acc, float* out) {
#if defined(__AVX2__)
  __m256 x[TILE];
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i) {
#if defined(__AVX512F__)
    x[i] = _mm256_add_ps(_mm512_castps512_ps256(acc[i].v), _mm512_extractf32x8_ps(acc[i].v, 1));
#else
    x[i] = acc[i].v;
#endif
  }
  const __m256 lo = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 hi = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(lo, hi, 0x20),
                                      _mm256_permute2f128_ps(lo, hi, 0x31)));
#else
  for (int i = 0; i < TILE; ++i) out[i] = acc[i].v;
#endif
}

template <DType T, int RT>
static inline void score_run(const char* const* keys, int64_t at, const float* q, int64_t ldq,
                              int64_t dim, float* out) {
  constexpr int KT = TILE / RT;
  vf acc[TILE];
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i) acc[i] = v_zero();
  for (int64_t d = 0; d < dim; d += STEP) {
    if (RT > KT) {
      vf a[KT], b[KT];
#pragma GCC unroll 8
      for (int k = 0; k < KT; ++k) Element<T>::load(keys[k] + at + d * Element<T>::bytes, a[k], b[k]);
#pragma GCC unroll 8
      for (int r = 0; r < RT; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < KT; ++k)
          acc[k * RT + r] = v_fma(a[k], v_load(q + r * ldq + d), acc[k * RT + r]);
#pragma GCC unroll 8
      for (int r = 0; r < RT; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < KT; ++k)
          acc[k * RT + r] = v_fma(b[k], v_load(q + r * ldq + d + VL), acc[k * RT + r]);
    } else {
      vf x[RT], y[RT];
#pragma GCC unroll 8
      for (int r = 0; r < RT; ++r) x[r] = v_load(q + r * ldq + d), y[r] = v_load(q + r * ldq + d + VL);
#pragma GCC unroll 8
      for (int k = 0; k < KT; ++k) {
        vf a, b;
        Element<T>::load(keys[k] + at + d * Element<T>::bytes, a, b);
#pragma GCC unroll 8
        for (int r = 0; r < RT; ++r)
          acc[k * RT + r] = v_fma(b, y[r], v_fma(a, x[r], acc[k * RT + r]));
      }
    }
  }
  sum_tile_lanes(acc, out);
}

// out[k * RT + r] = q row r . key k, for RT rows and 8 / RT keys; dim is a multiple of STEP.
template <DType T, int RT>
static inline void score_tile(const char* const* keys, int64_t at, const float* q, int64_t ldq,
                              int64_t dim, float* out) {
  if (VL > 1) return score_run<T, RT>(keys, at, q, ldq, dim, out);
  // Lanes break up long sums; scalar code needs sums of sums to lose as little to rounding.
  constexpr int64_t RUN = 32;
  for (int i = 0; i < TILE; ++i) out[i] = 0.0f;
  for (int64_t d = 0; d < dim; d += RUN) {
    float more[TILE];
    score_run<T, RT>(keys, at + d * Element<T>::bytes, q + d, ldq, dim - d < RUN ? dim - d : RUN,
                     more);
    for (int i = 0; i < TILE; ++i) out[i] += more[i];
  }
}

// C steps of columns: sums[r * ld + c] += sum over n keys of p[k * RT + r] * value k [c].
template <DType T, int RT, int C>
static inline void value_strip(const char* const* values, int64_t at, int64_t n, const float* p,
                               float* sums, int64_t ld) {
  vf acc[RT][C][2];
#pragma GCC unroll 8
  for (int r = 0; r < RT; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      acc[r][c][0] = v_load(sums + r * ld + c * STEP);
      acc[r][c][1] = v_load(sums + r * ld + c * STEP + VL);
    }
  for (int64_t k = 0; k < n; ++k) {
    const char* row = values[k] + at;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      vf a, b;
      Element<T>::load(row + c * STEP * Element<T>::bytes, a, b);
#pragma GCC unroll 8
      for (int r = 0; r < RT; ++r) {
        const vf x = v_set(p[k * RT + r]);
        acc[r][c][0] = v_fma(x, a, acc[r][c][0]);
        acc[r][c][1] = v_fma(x, b, acc[r][c][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < RT; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      v_store(sums + r * ld + c * STEP, acc[r][c][0]);
      v_store(sums + r * ld + c * STEP + VL, acc[r][c][1]);
    }
}

// All columns, for RT rows; dim is a multiple of STEP.
template <DType T, int RT>
static inline void value_tile(const char* const* values, int64_t at, int64_t n, const float* p,
                              float* sums, int64_t ld, int64_t dim) {
  constexpr int C = TILE / RT / 2;
  int64_t c = 0;
  for (; c + C * STEP <= dim; c += C * STEP)
    value_strip<T, RT, C>(values, at + c * Element<T>::bytes, n, p, sums + c, ld);
  for (; c < dim; c += STEP)
    value_strip<T, RT, 1>(values, at + c * Element<T>::bytes, n, p, sums + c, ld);
}

}  // namespace GP_ISA
}  // namespace gp
