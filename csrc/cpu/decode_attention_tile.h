// Rows of a cache of any element type against rows of floats: the two products of decode attention.
//
// STEP elements of a cache row become two vectors, in an order of lanes that suits their type: `lane`
// says where an element goes. Queries are put into that order before, outputs taken out of it after.
#pragma once

#include "common/simd.h"
#include "cpu/decode_attention.h"

// Keeps a vector that several multiply-adds need in a register: GCC reads it again for each.
#if defined(__AVX2__)
#define GP_IN_REGISTER(x) asm("" : "+v"((x).v))
#else
#define GP_IN_REGISTER(x) (void)0
#endif

namespace gp {
namespace GP_ISA {

constexpr int STEP = 2 * VL;
// Vectors that a tile keeps in registers: sums of rows times keys, or weights of rows times keys.
constexpr int TILE = VL == 16 ? 16 : 8;
// Keys of a tile of RT rows. Floats need no conversion, which leaves registers for a third key.
template <DType T, int RT>
constexpr int KEYS = T == DType::f32 && VL == 8 && RT == 4 ? 3 : TILE / RT;

static inline float e4m3_to_float(uint8_t b) {
  const uint32_t magnitude = b & 0x7fu, sign = uint32_t(b & 0x80u) << 24;
  if (magnitude == 0x7f) return __builtin_nanf("");
  // Through the exponent of a float: 2^120 lifts it by 127 - 7, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 20) * 0x1p120f));
}

// half<H>(p): the first (H = 0) or second vector of the STEP elements at p, divided by `unit`.
template <DType T>
struct Element;

struct NaturalOrder {
  static constexpr float unit = 1.0f;
  static int64_t lane(int64_t i) { return i; }
};

template <>
struct Element<DType::f32> : NaturalOrder {
  static constexpr int bytes = 4;
  template <int H>
  static inline vf half(const char* p) { return v_load(reinterpret_cast<const float*>(p) + H * VL); }
};

template <>
struct Element<DType::bf16> {
  static constexpr int bytes = 2;
  static constexpr float unit = 1.0f;
  // Even elements, then odd ones: a shift and a mask, and no shuffle.
  template <int H>
  static inline vf half(const char* p) {
#if defined(__AVX512F__)
    const __m512i w = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(H ? _mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000u)))
                                  : _mm512_slli_epi32(w, 16))};
#elif defined(__AVX2__)
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(H ? _mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000u)))
                                  : _mm256_slli_epi32(w, 16))};
#else
    return v_load_bf16(reinterpret_cast<const uint16_t*>(p) + H);
#endif
  }
  static int64_t lane(int64_t i) { return i / STEP * STEP + i % 2 * VL + i % STEP / 2; }
};

template <>
struct Element<DType::f16> : NaturalOrder {
  static constexpr int bytes = 2;
  template <int H>
  static inline vf half(const char* p) {
    return v_load_f16(reinterpret_cast<const uint16_t*>(p) + H * VL);
  }
};

template <>
struct Element<DType::i8> : NaturalOrder {
  static constexpr int bytes = 1;
  template <int H>
  static inline vf half(const char* p) {
#if defined(__AVX512F__)
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + H);
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
#elif defined(__AVX2__)
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + H * VL));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))};
#else
    return {float(int8_t(p[H]))};
#endif
  }
};

template <>
struct Element<DType::f8e4m3fn> {
  static constexpr int bytes = 1;
  // Read as fp16, whose exponent is one bit longer and whose bias is 15, not 7; subnormals too.
  static constexpr float unit = VL > 1 ? 256.0f : 1.0f;
  static int64_t lane(int64_t i) { return i; }
  // 0x7f, which is NaN, gets all exponent bits.
  template <int H>
  static inline vf half(const char* p) {
#if defined(__AVX512F__)
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + H);
    const __m256i h = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 7),
                                       _mm256_set1_epi16(int16_t(0xbf80)));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(
        _mm256_and_si256(h, _mm256_set1_epi16(0x3f80)), _mm256_set1_epi16(0x3f80));
    return {_mm512_cvtph_ps(_mm256_mask_blend_epi16(nan, h, _mm256_set1_epi16(0x7e00)))};
#elif defined(__AVX2__)
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + H * VL));
    const __m128i h = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(b), 7),
                                    _mm_set1_epi16(int16_t(0xbf80)));
    const __m128i all = _mm_set1_epi16(0x3f80);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(h, all), all);
    return {_mm256_cvtph_ps(_mm_or_si128(h, _mm_and_si128(nan, _mm_set1_epi16(0x7e00))))};
#else
    return {e4m3_to_float(uint8_t(p[H]))};
#endif
  }
};

// Any `n` elements to floats in their natural order, for rows that STEP does not divide.
template <DType T>
static inline void unpack_row(float* out, const char* p, int64_t n) {
  if (T != DType::i8 && T != DType::f8e4m3fn) return load_row(out, p, n, T);
  for (int64_t i = 0; i < n; ++i)
    out[i] = T == DType::i8 ? float(int8_t(p[i])) : e4m3_to_float(uint8_t(p[i]));
}

// The sums of the lanes of four vectors, to out[i * step].
static inline void sum_lanes(const vf* acc, float* out, int64_t step) {
#if defined(__AVX2__)
  __m256 x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    x[i] = _mm256_add_ps(_mm512_castps512_ps256(acc[i].v), _mm512_extractf32x8_ps(acc[i].v, 1));
#else
    x[i] = acc[i].v;
#endif
  }
  const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
  const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
  const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
  if (step == 1) return _mm_storeu_ps(out, sums);
  alignas(16) float four[4];
  _mm_store_ps(four, sums);
  for (int i = 0; i < 4; ++i) out[i * step] = four[i];
#else
  for (int i = 0; i < 4; ++i) out[i * step] = acc[i].v;
#endif
}

// acc holds KT vectors for each of RT rows, row by row: their sums to out[k * ld + r].
template <int RT, int KT>
static inline void store_scores(const vf* acc, float* out, int64_t ld) {
  if constexpr (RT == 4) {
#pragma GCC unroll 4
    for (int k = 0; k < KT; ++k) {
      const vf rows[4] = {acc[k], acc[KT + k], acc[2 * KT + k], acc[3 * KT + k]};
      sum_lanes(rows, out + k * ld, 1);
    }
  } else {
#pragma GCC unroll 4
    for (int r = 0; r < RT; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < KT; k += 4) sum_lanes(acc + r * KT + k, out + k * ld + r, ld);
  }
}

template <DType T, int RT, int KT, int H>
static inline void score_half(const char* const* keys, int64_t at, const float* q, int64_t ldq,
                              vf* acc) {
  vf x[KT];
#pragma GCC unroll 16
  for (int k = 0; k < KT; ++k) x[k] = Element<T>::template half<H>(keys[k] + at);
#pragma GCC unroll 4
  for (int r = 0; r < RT; ++r) {
    vf y = v_load(q + r * ldq + H * VL);
    GP_IN_REGISTER(y);
#pragma GCC unroll 16
    for (int k = 0; k < KT; ++k) acc[r * KT + k] = v_fma(x[k], y, acc[r * KT + k]);
  }
}

template <DType T, int RT, int KT>
static inline void score_run(const char* const* keys, int64_t at, const float* q, int64_t ldq,
                             int64_t dim, float* out, int64_t ld) {
  vf acc[RT * KT];
#pragma GCC unroll 16
  for (int i = 0; i < RT * KT; ++i) acc[i] = v_zero();
  for (int64_t d = 0; d < dim; d += STEP) {
    score_half<T, RT, KT, 0>(keys, at + d * Element<T>::bytes, q + d, ldq, acc);
    score_half<T, RT, KT, 1>(keys, at + d * Element<T>::bytes, q + d, ldq, acc);
  }
  store_scores<RT, KT>(acc, out, ld);
}

// out[k * ld + r] = q row r . key k, for RT rows and KEYS keys; dim is a multiple of STEP.
template <DType T, int RT>
static inline void score_tile(const char* const* keys, int64_t at, const float* q, int64_t ldq,
                              int64_t dim, float* out, int64_t ld) {
  constexpr int KT = KEYS<T, RT>;
  if (VL > 1) return score_run<T, RT, KT>(keys, at, q, ldq, dim, out, ld);
  // Lanes break up long sums; scalar code needs sums of sums to lose as little to rounding.
  constexpr int64_t RUN = 32;
  float more[RT * KT];
  for (int64_t d = 0; d < dim; d += RUN) {
    score_run<T, RT, KT>(keys, at + d * Element<T>::bytes, q + d, ldq, dim - d < RUN ? dim - d : RUN,
                         more, RT);
    for (int i = 0; i < RT * KT; ++i) {
      float& to = out[i / RT * ld + i % RT];
      to = d == 0 ? more[i] : to + more[i];
    }
  }
}

// sums[r * ld + c] += p[k * ldp + r] * value k [c] for TILE / RT keys and RT rows; dim is a multiple
// of STEP.
template <DType T, int RT>
static inline void value_tile(const char* const* values, int64_t at, const float* p, int64_t ldp,
                              float* sums, int64_t ld, int64_t dim) {
  constexpr int KT = TILE / RT;
  vf weight[TILE];
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i) {
    weight[i] = v_set(p[i / RT * ldp + i % RT]);
    GP_IN_REGISTER(weight[i]);
  }
  const char* row[KT];
#pragma GCC unroll 16
  for (int k = 0; k < KT; ++k) row[k] = values[k] + at;
  for (int64_t c = 0; c < dim; c += STEP)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      vf acc[RT];
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) acc[r] = v_load(sums + r * ld + c + h * VL);
#pragma GCC unroll 16
      for (int k = 0; k < KT; ++k) {
        const char* step = row[k] + c * Element<T>::bytes;
        const vf x = h ? Element<T>::template half<1>(step) : Element<T>::template half<0>(step);
#pragma GCC unroll 4
        for (int r = 0; r < RT; ++r) acc[r] = v_fma(weight[k * RT + r], x, acc[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) v_store(sums + r * ld + c + h * VL, acc[r]);
    }
}

}  // namespace GP_ISA
}  // namespace gp
