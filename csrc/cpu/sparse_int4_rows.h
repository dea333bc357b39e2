// 2:4 rows of 4-bit codes, eight at a time: a lane is a row of W, so that one vector of 4 inputs
// serves all of them and every choice among the 4 fills a lane. Included by kernels only.
#pragma once

#include "cpu/sparse_int4.h"
#include "cpu/transpose.h"

namespace gp {
namespace GP_ISA {

constexpr int64_t TILE = 128;  // columns: 32 bytes of codes and 16 of places in each row

#if defined(__AVX2__)

// 16 bytes of row r in the lower half, of row r + 4 in the upper.
GP_INLINE inline __m256i load_rows(const uint8_t* p, int64_t stride, int r) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(p + r * stride)),
                                 load128(p + (r + 4) * stride), 1);
}

// The places of a tile of 8 rows as `permutevar` reads them, a row in its lane: place f of byte b in
// word w is in the low bits of the vector that begins b bytes into at[w][f]. That takes 3 shifts for
// 16 vectors; half of each line is left empty, so that no such vector stands across two lines.
struct Places {
  alignas(64) uint8_t at[4][4][64];

  GP_INLINE void read(const uint8_t* p, int64_t stride) {
    __m256i a[4], words[4];
    for (int r = 0; r < 4; ++r) a[r] = load_rows(p, stride, r);
    const __m256i b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
    const __m256i b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
    words[0] = _mm256_unpacklo_epi64(b0, b2);
    words[1] = _mm256_unpackhi_epi64(b0, b2);
    words[2] = _mm256_unpacklo_epi64(b1, b3);
    words[3] = _mm256_unpackhi_epi64(b1, b3);
    for (int w = 0; w < 4; ++w)
      for (int f = 0; f < 4; ++f)
        _mm256_store_si256(reinterpret_cast<__m256i*>(at[w][f]), _mm256_srli_epi32(words[w], 2 * f));
  }
};

// Bytes 4i to 4i + 3 of 8 rows, for i in [0, 4), where `CodeLut::lookup` wants them: in each half,
// two bytes of its four rows, then the other two.
GP_INLINE inline void transpose_codes(const uint8_t* p, int64_t stride, __m256i* out) {
  __m256i a[4];
  for (int r = 0; r < 4; ++r) a[r] = load_rows(p, stride, r);
  const __m256i b0 = _mm256_unpacklo_epi16(a[0], a[1]), b1 = _mm256_unpackhi_epi16(a[0], a[1]);
  const __m256i b2 = _mm256_unpacklo_epi16(a[2], a[3]), b3 = _mm256_unpackhi_epi16(a[2], a[3]);
  out[0] = _mm256_unpacklo_epi32(b0, b2);
  out[1] = _mm256_unpackhi_epi32(b0, b2);
  out[2] = _mm256_unpacklo_epi32(b1, b3);
  out[3] = _mm256_unpackhi_epi32(b1, b3);
}

// Adds the products of value I of group G of a word.
template <int G, int I, int M>
GP_INLINE inline void one_value(__m256 w, const uint8_t (*places)[64], const float* x,
                                int64_t x_stride, __m256* acc) {
  const __m256i at = _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(places[G % 2 * 2 + I] + G / 2));
  for (int m = 0; m < M; ++m) {
    const __m256 four = _mm256_broadcast_ps(
        reinterpret_cast<const __m128*>(x + m * x_stride + 4 * (G % 4)));
    acc[m] = _mm256_fmadd_ps(w, _mm256_permutevar_ps(four, at), acc[m]);
  }
}

// 16 columns (four groups of 4, from group G of a word on) of 8 rows: a byte of `codes` holds both
// values of a group.
template <int G, int M>
GP_INLINE inline void four_groups(const CodeLut& lut, __m256i codes, const uint8_t (*places)[64],
                                  const float* x, int64_t x_stride, __m256 (*acc)[M]) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256 w[4];
  lut.lookup(_mm256_and_si256(codes, mask), w);
  one_value<G, 0, M>(w[0], places, x, x_stride, acc[0]);
  one_value<G + 1, 0, M>(w[1], places, x, x_stride, acc[1]);
  one_value<G + 2, 0, M>(w[2], places, x, x_stride, acc[2]);
  one_value<G + 3, 0, M>(w[3], places, x, x_stride, acc[3]);
  lut.lookup(_mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), w);
  one_value<G, 1, M>(w[0], places, x, x_stride, acc[0]);
  one_value<G + 1, 1, M>(w[1], places, x, x_stride, acc[1]);
  one_value<G + 2, 1, M>(w[2], places, x, x_stride, acc[2]);
  one_value<G + 3, 1, M>(w[3], places, x, x_stride, acc[3]);
}

// y[m * 8 + r] = 8 rows of W (from `codes` and `index` on) times M rows of x. scale[g * 8 + r] is that
// of row r for tiles g * per_scale and on.
template <int M>
void eight_rows(const uint8_t* codes, int64_t code_stride, const uint8_t* index,
                int64_t index_stride, int64_t tiles, int64_t per_scale, const float* scale,
                const float* x, int64_t x_stride, float* y) {
  const CodeLut lut(8);
  Places places[2];  // of this tile and, written early enough to be read piecemeal, of the next
  places[0].read(index, index_stride);
  __m256 total[M];
  for (int m = 0; m < M; ++m) total[m] = _mm256_setzero_ps();
  for (int64_t t0 = 0; t0 < tiles; t0 += per_scale, scale += 8) {
    __m256 acc[4][M];
    for (int i = 0; i < 4; ++i)
      for (int m = 0; m < M; ++m) acc[i][m] = _mm256_setzero_ps();
    const int64_t end = t0 + per_scale < tiles ? t0 + per_scale : tiles;
    for (int64_t t = t0; t < end; ++t) {
      if (t + 1 < tiles) places[(t + 1) % 2].read(index + (t + 1) * 16, index_stride);
      // Of the next eight rows, in the order of memory.
      for (int i = 0; i < 4; ++i) prefetch(codes + 8 * code_stride + (4 * t + i) * 64);
      for (int i = 0; i < 2; ++i) prefetch(index + 8 * index_stride + (2 * t + i) * 64);
      const float* xt = x + t * TILE;
      for (int half = 0; half < 2; ++half, xt += TILE / 2) {
        __m256i c[4];
        transpose_codes(codes + t * 32 + half * 16, code_stride, c);
        for (int i = 0; i < 2; ++i) {
          const float* xi = xt + i * 32;
          const auto* at = places[t % 2].at[2 * half + i];
          four_groups<0, M>(lut, c[2 * i], at, xi, x_stride, acc);
          four_groups<4, M>(lut, c[2 * i + 1], at, xi + 16, x_stride, acc);
        }
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
  const int64_t eights = n / 8, most = eights / (2 * threads);
  // Some 256 KiB of W in one item: what is asked for ahead of an item goes to the wrong thread.
  const int64_t wanted = (int64_t(1) << 18) / (8 * (k / 4 + k / 8)) + 1;
  const int64_t batch = most < 1 ? 1 : wanted < most ? wanted : most;
  Scratch packed(m * k * 4), scales(threads * groups * 8 * 4);
  if (!packed.ok() || !scales.ok()) return false;
  float* x = packed.as<float>();
  load_row(x, a.x, m * k, a.dtype);
  parallel_for((eights + batch - 1) / batch, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    float* scale = scales.as<float>() + thread * groups * 8;
    const int64_t last = (item + 1) * batch < eights ? (item + 1) * batch : eights;
    for (int64_t e = item * batch; e < last; ++e) {
      transpose_rows(w.scale, groups, w.scale_dtype, e * 8, n, 8, scale, 8);
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
