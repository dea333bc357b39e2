// An int8 cache against queries and weights of 16 bits: products of integers, twice as many at a time
// as of floats, and no conversion of the cache beyond int16.
//
// Queries are rounded to 1 / 32767 of their row's largest element, weights to 1 / 32767 of their
// block's largest: finer by 2^7 than the bfloat16 that queries and outputs have here.
#pragma once

#include "cpu/decode_attention_tile.h"

namespace gp {
namespace GP_ISA {

constexpr float INT16_TOP = 32767.0f;
constexpr int64_t MAX_INT8_DIM = 512;  // a score, at most 128 * 32767 times this, fits into 32 bits

// Pairs of keys whose values are added at once, before their sum becomes a float.
constexpr int PAIRS = VL == 16 ? 8 : 12;

#if defined(__AVX2__)

#if defined(__AVX512F__)
using vi = __m512i;
static inline vi i_zero() { return _mm512_setzero_si512(); }
static inline vi i_load(const void* p) { return _mm512_loadu_si512(p); }
static inline void i_store(void* p, vi a) { _mm512_storeu_si512(p, a); }
static inline vi i_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi i_dot(vi a, vi b) { return _mm512_madd_epi16(a, b); }
static inline vi i_round(vf a) { return _mm512_cvtps_epi32(a.v); }
static inline vf i_float(vi a) { return {_mm512_cvtepi32_ps(a)}; }
// low | high << 16
static inline vi i_pair(vi low, vi high) {
  return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)),
                         _mm512_slli_epi32(high, 16));
}
static inline vi i_widen(const void* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
// STEP columns of two rows, (a0, b0, a1, b1 ...).
static inline void i_columns(const char* a, const char* b, vi& low, vi& high) {
  vi* to[2] = {&low, &high};
  for (int i = 0; i < 2; ++i) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a) + i);
    const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b) + i);
    *to[i] =
        _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y)));
  }
}
#else
using vi = __m256i;
static inline vi i_zero() { return _mm256_setzero_si256(); }
static inline vi i_load(const void* p) { return _mm256_loadu_si256(static_cast<const vi*>(p)); }
static inline void i_store(void* p, vi a) { _mm256_storeu_si256(static_cast<vi*>(p), a); }
static inline vi i_set(int32_t x) { return _mm256_set1_epi32(x); }
static inline vi i_dot(vi a, vi b) { return _mm256_madd_epi16(a, b); }
static inline vi i_round(vf a) { return _mm256_cvtps_epi32(a.v); }
static inline vf i_float(vi a) { return {_mm256_cvtepi32_ps(a)}; }
static inline vi i_pair(vi low, vi high) {
  return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(0xffff)),
                         _mm256_slli_epi32(high, 16));
}
static inline vi i_widen(const void* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
static inline void i_columns(const char* a, const char* b, vi& low, vi& high) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y));
  high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y));
}
#endif

// acc += sums of the products of pairs, in the register of acc: GCC would copy sums about.
static inline void add_dot(vi& acc, vi a, vi b) {
  const vi products = i_dot(a, b);
  asm("vpaddd %1, %0, %0" : "+v"(acc) : "v"(products));
}

// The sums of the lanes of four vectors, to out[0 .. 3], each times its scale.
static inline void sum_rows(const vi* acc, int64_t step, const float* scale, float* out) {
  __m256i x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    x[i] = _mm256_add_epi32(_mm512_castsi512_si256(acc[i * step]),
                            _mm512_extracti64x4_epi64(acc[i * step], 1));
#else
    x[i] = acc[i * step];
#endif
  }
  const auto fold = [](__m256i low, __m256i high) { return _mm256_add_epi32(low, high); };
  const __m256i a = fold(_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
  const __m256i b = fold(_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
  const __m256i c = fold(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
  _mm_storeu_ps(out, _mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_loadu_ps(scale)));
}

// A row of `dim` floats, a multiple of STEP, to int16; returns what a 1 stands for.
static inline float quantize_query(const float* x, int64_t dim, int16_t* out) {
  vf most = v_zero(), sum = v_zero();
  for (int64_t d = 0; d < dim; d += VL) {
    const vf a = v_abs(v_load(x + d));
    most = v_max(a, most), sum = v_add(sum, a);
  }
  const float top = v_hmax(most), total = v_sum(sum);
  const vf inverse = v_set(top > 0.0f ? INT16_TOP / top : 0.0f);
  for (int64_t d = 0; d < dim; d += VL) {
    alignas(64) int32_t n[VL];
    i_store(n, i_round(v_mul(v_load(x + d), inverse)));
    for (int i = 0; i < VL; ++i) out[d + i] = int16_t(n[i]);
  }
  // NaN and infinity reach the scores by way of the scale.
  return total - total == 0.0f ? top / INT16_TOP : total - total;
}

// score_tile for int8 keys and int16 queries, whose scales are given by row.
template <int RT>
GP_TILE void score_tile_int8(const char* const* keys, int64_t ahead, int64_t at, const int16_t* q,
                             int64_t ldq, int64_t dim, const float* scale, float* out, int64_t ld) {
  constexpr int KT = TILE / RT;
  vi acc[TILE];
  const char* row[KT];
#pragma GCC unroll 16
  for (int k = 0; k < KT; ++k) row[k] = keys[k] + at;
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i) acc[i] = i_zero();
  for (int64_t d = 0; d < dim; d += STEP) {
    fetch_ahead<1>(keys, KT, ahead, at, d);
    vi x[KT];
#pragma GCC unroll 16
    for (int k = 0; k < KT; ++k) x[k] = i_widen(row[k] + d);
#pragma GCC unroll 4
    for (int r = 0; r < RT; ++r) {
      const vi y = i_load(q + r * ldq + d);
#pragma GCC unroll 16
      for (int k = 0; k < KT; ++k) add_dot(acc[r * KT + k], x[k], y);
    }
  }
  if constexpr (RT == 4) {
#pragma GCC unroll 4
    for (int k = 0; k < KT; ++k) sum_rows(acc + k, KT, scale, out + k * ld);
  } else {
    vf sums[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; ++i) sums[i] = v_mul(i_float(acc[i]), v_set(scale[i / KT]));
    store_scores<RT, KT>(sums, out, ld);
  }
}

// Weights (key, lane) to int16, two keys in each 32 bits, in place of the first of the two; `unit`
// receives what a 1 stands for. `top`: the largest of each lane.
static inline void quantize_weights(float* p, int64_t padded, int64_t ld, const float* top,
                                    float* unit) {
  for (int64_t l = 0; l < ld; l += VL) {
    alignas(64) float inverse[VL];
    for (int i = 0; i < VL; ++i) {
      const float most = top[l + i];
      unit[l + i] = most / INT16_TOP;
      inverse[i] = most > 0.0f ? INT16_TOP / most : 0.0f;
    }
    const vf by = v_load(inverse);
    for (int64_t k = 0; k < padded; k += 2) {
      float* x = p + k * ld + l;
      i_store(x, i_pair(i_round(v_mul(v_load(x), by)), i_round(v_mul(v_load(x + ld), by))));
    }
  }
}

// value_tile for int8 values and the weights of quantize_weights: PAIRS pairs of keys. Their sum, below
// 2 PAIRS 127 INT16_TOP, fits into 32 bits.
template <int RT>
GP_TILE void value_tile_int8(const char* const* values, int64_t ahead, int64_t at, const float* p,
                             int64_t ldp, const float* unit, float* sums, int64_t ld, int64_t dim) {
  alignas(64) int32_t weight[PAIRS * RT];
#pragma GCC unroll 16
  for (int k = 0; k < PAIRS; ++k) std::memcpy(weight + k * RT, p + 2 * k * ldp, RT * 4);
  const char* row[2 * PAIRS];
  for (int k = 0; k < 2 * PAIRS; ++k) row[k] = values[k] + at;
  // As many rows are fetched as there are keys here, some of them in each step: more at once get lost.
  const int64_t per_step = (2 * PAIRS * STEP + dim - 1) / dim;
  int64_t next = 0;
  for (int64_t c = 0; c < dim; c += STEP) {
    for (int64_t i = 0; i < per_step && next < 2 * PAIRS; ++i, ++next)
      for (int64_t d = 0; d < dim; d += 64) GP_PREFETCH(values[ahead + next] + at + d);
    const int32_t* w = weight;
    const char* const* from = row;
    GP_IN_MEMORY(w);
    GP_IN_MEMORY(from);
    vi acc[2 * RT];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * RT; ++i) acc[i] = i_zero();
#pragma GCC unroll 16
    for (int k = 0; k < PAIRS; ++k) {
      vi x0, x1;
      i_columns(from[2 * k] + c, from[2 * k + 1] + c, x0, x1);
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) {
        const vi y = i_set(w[k * RT + r]);
        add_dot(acc[2 * r], y, x0);
        add_dot(acc[2 * r + 1], y, x1);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * RT; ++i) {
      float* to = sums + i / 2 * ld + c + i % 2 * VL;
      v_store(to, v_fma(i_float(acc[i]), v_set(unit[i / 2]), v_load(to)));
    }
  }
}

#endif

}  // namespace GP_ISA
}  // namespace gp
