// Blocks of 8 x 8 elements of any dtype, transposed in registers. Included by kernels only.
#pragma once

#include "common/simd.h"

namespace gp {
namespace GP_ISA {

#if defined(__AVX2__)
static inline __m256 load8(const void* p, int64_t at, DType t) {
  if (t == DType::f32) return _mm256_loadu_ps(static_cast<const float*>(p) + at);
  const __m128i h =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + at));
  if (t == DType::f16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

static inline void store8(void* p, int64_t at, __m256 a, DType t) {
  if (t == DType::f32) return _mm256_storeu_ps(static_cast<float*>(p) + at, a);
  uint16_t* out = static_cast<uint16_t*>(p) + at;
#if defined(__AVX512F__)
  alignas(32) float row[8];
  _mm256_store_ps(row, a);
  for (int i = 0; i < 8; ++i) out[i] = t == DType::bf16 ? float_to_bf16(row[i]) : float_to_f16(row[i]);
#else
  if (t == DType::bf16) v_store_bf16(out, {a});
  else v_store_f16(out, {a});
#endif
}

static inline void transpose8(__m256 r[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

// out[i * out_stride + r] = row first + r of x, element i, for r in [0, rows) and i in [0, k); x has
// rows of k elements. Rows from `end` on read as zeros. `rows` is a multiple of 8 with vectors.
static inline void transpose_rows(const void* x, int64_t k, DType t, int64_t first, int64_t end,
                                  int64_t rows, float* out, int64_t out_stride) {
  int64_t done = 0;
#if defined(__AVX2__)
  done = k / 8 * 8;
  for (int64_t r = 0; r < rows; r += 8)
    for (int64_t i = 0; i < done; i += 8) {
      __m256 block[8];
      for (int64_t j = 0; j < 8; ++j)
        block[j] = first + r + j < end ? load8(x, (first + r + j) * k + i, t) : _mm256_setzero_ps();
      transpose8(block);
      for (int64_t j = 0; j < 8; ++j) _mm256_storeu_ps(out + (i + j) * out_stride + r, block[j]);
    }
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = done; i < k; ++i)
      out[i * out_stride + r] = first + r < end ? load_one(x, (first + r) * k + i, t) : 0.0f;
}

// y[i * y_stride + r] = c[r * c_stride + i] + bias[r] for r in [0, rows), i in [0, count);
// c and bias may be read up to the next multiple of 8.
static inline void store_transposed(const float* c, int64_t c_stride, const float* bias, int64_t rows,
                                    int64_t count, void* y, int64_t y_stride, DType t) {
  int64_t done = 0;
#if defined(__AVX2__)
  done = rows / 8 * 8;
  for (int64_t r = 0; r < done; r += 8) {
    const __m256 b = _mm256_loadu_ps(bias + r);
    for (int64_t i = 0; i < count; i += 8) {
      __m256 block[8];
      for (int64_t j = 0; j < 8; ++j) block[j] = _mm256_loadu_ps(c + (r + j) * c_stride + i);
      transpose8(block);
      for (int64_t j = 0; j < 8 && i + j < count; ++j)
        store8(y, (i + j) * y_stride + r, _mm256_add_ps(block[j], b), t);
    }
  }
#endif
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = done; r < rows; ++r) store_one(y, i * y_stride + r, c[r * c_stride + i] + bias[r], t);
}

}  // namespace GP_ISA
}  // namespace gp
