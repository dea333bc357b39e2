// 2:4 rows of 4-bit codes, eight at a time: a lane is a row of W, so that one vector of 4 inputs
// serves all of them and every choice among the 4 fills a lane. Included by kernels only.
#pragma once

#include "cpu/sparse_int4.h"

namespace gp {
namespace GP_ISA {

constexpr int64_t TILE = 128;  // columns: 32 bytes of codes and 16 of places in each row

#if defined(__AVX2__)

// Words i of 8 rows, for i in [0, 8), from 32 bytes of each.
GP_INLINE inline void transpose8(const uint8_t* p, int64_t stride, __m256i* out) {
  __m256i a[8], b[8];
  for (int r = 0; r < 8; ++r)
    a[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + r * stride));
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
  }
  for (int h = 0; h < 8; h += 4) {
    a[h] = _mm256_unpacklo_epi64(b[h], b[h + 2]);
    a[h + 1] = _mm256_unpackhi_epi64(b[h], b[h + 2]);
    a[h + 2] = _mm256_unpacklo_epi64(b[h + 1], b[h + 3]);
    a[h + 3] = _mm256_unpackhi_epi64(b[h + 1], b[h + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    out[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
}

// Words i of 8 rows, for i in [0, 4), from 16 bytes of each.
GP_INLINE inline void transpose4(const uint8_t* p, int64_t stride, __m256i* out) {
  __m256i a[4];
  for (int r = 0; r < 4; ++r)
    a[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(p + r * stride)),
                                   load128(p + (r + 4) * stride), 1);
  const __m256i b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
  const __m256i b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
  out[0] = _mm256_unpacklo_epi64(b0, b2);
  out[1] = _mm256_unpackhi_epi64(b0, b2);
  out[2] = _mm256_unpacklo_epi64(b1, b3);
  out[3] = _mm256_unpackhi_epi64(b1, b3);
}

// The code at bits 4 * I of each lane as a float, exact: under the exponent of 2^(23 - 4 * I) the
// nibble counts ones.
template <int I>
GP_INLINE inline __m256 code_at(__m256i words) {
  const __m256 power = _mm256_set1_ps(float(1 << (23 - 4 * I)));
  const __m256i nibble = _mm256_and_si256(words, _mm256_set1_epi32(15 << 4 * I));
  return _mm256_sub_ps(_mm256_or_ps(_mm256_castsi256_ps(nibble), power),
                       _mm256_add_ps(power, _mm256_set1_ps(8.0f)));
}

// Codes of 8 columns (two groups of 4) of 8 rows, at bits 0 to 15 of `codes`, their places at bits 0
// to 7 of `places`.
template <int M>
GP_INLINE inline void eight_columns(__m256i codes, __m256i places, const float* x, int64_t x_stride,
                                    __m256 (*acc)[M]) {
  const __m256 w0 = code_at<0>(codes), w1 = code_at<1>(codes);
  const __m256 w2 = code_at<2>(codes), w3 = code_at<3>(codes);
  const __m256i p1 = _mm256_srli_epi32(places, 2), p2 = _mm256_srli_epi32(places, 4);
  const __m256i p3 = _mm256_srli_epi32(places, 6);
  for (int m = 0; m < M; ++m) {
    const __m256 a = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + m * x_stride));
    const __m256 b = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + m * x_stride + 4));
    acc[0][m] = _mm256_fmadd_ps(w0, _mm256_permutevar_ps(a, places), acc[0][m]);
    acc[1][m] = _mm256_fmadd_ps(w1, _mm256_permutevar_ps(a, p1), acc[1][m]);
    acc[2][m] = _mm256_fmadd_ps(w2, _mm256_permutevar_ps(b, p2), acc[2][m]);
    acc[3][m] = _mm256_fmadd_ps(w3, _mm256_permutevar_ps(b, p3), acc[3][m]);
  }
}

// y[m * 8 + r] = 8 rows of W (from `codes` and `index` on) times M rows of x. scale[g * 8 + r] is that
// of row r for tiles g * per_scale and on.
template <int M>
void eight_rows(const uint8_t* codes, int64_t code_stride, const uint8_t* index,
                int64_t index_stride, int64_t tiles, int64_t per_scale, const float* scale,
                const float* x, int64_t x_stride, float* y) {
  __m256 total[M];
  for (int m = 0; m < M; ++m) total[m] = _mm256_setzero_ps();
  for (int64_t t0 = 0; t0 < tiles; t0 += per_scale, scale += 8) {
    __m256 acc[4][M];
    for (int i = 0; i < 4; ++i)
      for (int m = 0; m < M; ++m) acc[i][m] = _mm256_setzero_ps();
    const int64_t end = t0 + per_scale < tiles ? t0 + per_scale : tiles;
    for (int64_t t = t0; t < end; ++t) {
      __m256i c[8], p[4];
      transpose8(codes + t * 32, code_stride, c);
      transpose4(index + t * 16, index_stride, p);
      for (int r = 0; r < 8; ++r) {
        if (t % 2 == 0) prefetch(codes + (8 + r) * code_stride + t * 32);
        if (t % 4 == 0) prefetch(index + (8 + r) * index_stride + t * 16);
      }
      const float* xt = x + t * TILE;
      for (int w = 0; w < 8; ++w, xt += 16) {
        const __m256i places = w % 2 ? _mm256_srli_epi32(p[w / 2], 16) : p[w / 2];
        eight_columns<M>(c[w], places, xt, x_stride, acc);
        eight_columns<M>(_mm256_srli_epi32(c[w], 16), _mm256_srli_epi32(places, 8), xt + 8, x_stride,
                         acc);
      }
    }
    for (int m = 0; m < M; ++m)
      total[m] = _mm256_fmadd_ps(
          _mm256_add_ps(_mm256_add_ps(acc[0][m], acc[1][m]), _mm256_add_ps(acc[2][m], acc[3][m])),
          _mm256_loadu_ps(scale), total[m]);
  }
  for (int m = 0; m < M; ++m) _mm256_storeu_ps(y + m * 8, total[m]);
}

#else

template <int M>
void eight_rows(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, int64_t, const float*,
                const float*, int64_t, float*) {}

#endif

using EightRows = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, int64_t,
                           const float*, const float*, int64_t, float*);
inline EightRows choose_eight(int64_t m) {
  return m == 1 ? &eight_rows<1> : m == 2 ? &eight_rows<2> : m == 3 ? &eight_rows<3> : &eight_rows<4>;
}

// All of y for a weight whose rows and columns come in eights and tiles.
inline bool run_eights(const SparseMatmulArgs& a) {
  const SparseWeight& w = a.w;
  const int64_t n = w.n, k = w.k, m = a.m, tiles = k / TILE;
  const bool grouped = w.group_size > 0 && w.group_size < k;
  const int64_t groups = grouped ? (k + w.group_size - 1) / w.group_size : 1;
  const int64_t per_scale = grouped ? w.group_size / TILE : tiles;
  const int threads = n * k < 65536 ? 1 : a.threads;
  const int64_t eights = n / 8, batch = eights / threads > 16 ? 4 : 1;
  Scratch packed(m * k * 4), scales(threads * (groups * 8 + groups + 16) * 4);
  if (!packed.ok() || !scales.ok()) return false;
  float* x = packed.as<float>();
  load_row(x, a.x, m * k, a.dtype);
  parallel_for((eights + batch - 1) / batch, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    float* scale = scales.as<float>() + thread * (groups * 8 + groups + 16);
    float* row = scale + groups * 8;
    const int64_t last = (item + 1) * batch < eights ? (item + 1) * batch : eights;
    for (int64_t e = item * batch; e < last; ++e) {
      for (int64_t r = 0; r < 8; ++r) {
        load_row(row, offset(w.scale, (e * 8 + r) * groups, w.scale_dtype), groups, w.scale_dtype);
        for (int64_t g = 0; g < groups; ++g) scale[g * 8 + r] = row[g];
      }
      for (int64_t m0 = 0; m0 < m; m0 += 4) {
        float y[4 * 8];
        choose_eight(m - m0)(w.values + e * 8 * (k / 4), k / 4, w.index + e * 8 * (k / 8), k / 8,
                             tiles, per_scale, scale, x + m0 * k, k, y);
        for (int64_t i = 0; i < m - m0 && i < 4; ++i)
          for (int64_t r = 0; r < 8; ++r) {
            const int64_t at = e * 8 + r;
            const float bias = a.bias ? load_one(a.bias, at, a.bias_dtype) : 0.0f;
            store_one(a.y, (m0 + i) * n + at, y[i * 8 + r] + bias, a.dtype);
          }
      }
    }
  });
  return true;
}

inline bool comes_in_eights(const SparseWeight& w) {
  const bool tiled = w.group_size <= 0 || w.group_size % TILE == 0 || w.group_size >= w.k;
  return HAS_INT4_PAIRS && w.kind == SparseValue::i4 && !w.row_start && w.k > 0 &&
         w.k % TILE == 0 && w.n % 8 == 0 && tiled;
}

}  // namespace GP_ISA
}  // namespace gp
