// 2:4 rows of 4-bit codes without unpacking them: the inputs go to the codes, not the codes to the
// inputs, and 16 columns are one vector. Included by csrc/cpu/sparse_matmul_kernel.cpp only.
#pragma once

#include "cpu/sparse_expand.h"

namespace gp {
namespace GP_ISA {

// Where a row's values, index and scales are read, and what to prefetch.
struct Cursor {
  const uint8_t* v;
  const uint8_t* index;
  const float* scale;  // of the first group of the piece, null where there is one or none
  int64_t v_ahead, index_ahead;
};

// sums[r][m] += acc[r][m], times the row's scale of the group where rows have scales.
template <int R, int M>
GP_INLINE inline void add_sums(const Cursor* rows, const Unit (&acc)[R][M], int64_t group,
                               float* sums, int64_t sums_stride) {
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float* sum = sums + r * sums_stride + m * UNIT;
      const Unit total = unit_load(sum);
      unit_store(sum, rows[r].scale ? unit_fma(acc[r][m], unit_set(rows[r].scale[group]), total)
                                    : unit_add(total, acc[r][m]));
    }
}

#if defined(__AVX2__)

constexpr bool HAS_INT4_PAIRS = true;

// sums[r][m] += units 0..count-1 of R rows of W times M rows of x; span is even; where count is odd,
// x has a unit of zeros behind the last one.
template <int R, int M>
void dot_int4(const Cursor* rows, int64_t count, int64_t span, const float* x, int64_t x_stride,
              float* sums, int64_t sums_stride) {
  // Lanes 0, 1, 4, 5 hold the values of the first unit, the others those of the second: each half of
  // the vector then chooses among the 4 columns of its own half.
  const __m256i place = _mm256_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14);
  const __m256i code = _mm256_setr_epi32(0, 4, 16, 20, 8, 12, 24, 28);
  const __m256i mask = _mm256_set1_epi32(15), magic = _mm256_set1_epi32(0x4b000000);
  const __m256 base = _mm256_set1_ps(8388608.0f + 8.0f);
  for (int64_t u0 = 0, group = 0; u0 < count; u0 += span, ++group) {
    const int64_t end = u0 + span < count ? u0 + span : count;
    Unit acc[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) acc[r][m] = unit_zero();
    const auto step = [&](int64_t u, bool pair) GP_INLINE {
      __m256 low[M], high[M];
      for (int m = 0; m < M; ++m) {
        low[m] = unit_load(x + m * x_stride + u * UNIT);
        high[m] = unit_load(x + m * x_stride + u * UNIT + UNIT);
      }
      for (int r = 0; r < R; ++r) {
        const int places = pair ? load_as<uint16_t>(rows[r].index + u) : rows[r].index[u];
        const int codes = pair ? load_as<int32_t>(rows[r].v + 2 * u)
                               : int(load_as<uint16_t>(rows[r].v + 2 * u));
        const __m256i at = _mm256_srlv_epi32(_mm256_set1_epi32(places), place);
        __m256i w = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(codes), code), mask);
        const __m256 value = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(w, magic)), base);
        for (int m = 0; m < M; ++m) {
          const __m256 chosen = _mm256_blend_ps(_mm256_permutevar_ps(low[m], at),
                                                _mm256_permutevar_ps(high[m], at), 0xcc);
          acc[r][m] = _mm256_fmadd_ps(value, chosen, acc[r][m]);
        }
      }
    };
    int64_t u = u0;
    for (; u + 16 <= end; u += 16) {
      for (int r = 0; r < R; ++r) {
        prefetch(rows[r].v + 2 * u + rows[r].v_ahead);
        prefetch(rows[r].index + u + rows[r].index_ahead);
      }
      for (int64_t i = 0; i < 16; i += 2) step(u + i, true);
    }
    for (; u + 2 <= end; u += 2) step(u, true);
    if (u < end) step(u, false);
    add_sums<R, M>(rows, acc, group, sums, sums_stride);
  }
}

#else

constexpr bool HAS_INT4_PAIRS = false;
template <int R, int M>
void dot_int4(const Cursor*, int64_t, int64_t, const float*, int64_t, float*, int64_t) {}

#endif

using DotInt4 = void (*)(const Cursor*, int64_t, int64_t, const float*, int64_t, float*, int64_t);

inline DotInt4 choose_int4(int64_t rows, int64_t m) {
  if (m == 1) return rows == 4 ? &dot_int4<4, 1> : rows == 2 ? &dot_int4<2, 1> : &dot_int4<1, 1>;
  if (m == 2) return rows == 2 ? &dot_int4<2, 2> : &dot_int4<1, 2>;
  if (m == 3) return rows == 2 ? &dot_int4<2, 3> : &dot_int4<1, 3>;
  return rows == 2 ? &dot_int4<2, 4> : &dot_int4<1, 4>;
}

}  // namespace GP_ISA
}  // namespace gp
