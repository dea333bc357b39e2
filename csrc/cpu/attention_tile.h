// fp32 tiles packed from any dtype, and a register-tiled matrix product on them.
#pragma once

#include "cpu/attention.h"
#include "cpu/attention_math.h"

namespace gp {
namespace GP_ISA {

// The register tile: MR rows times NV vectors of accumulators, with two vectors and a broadcast to
// spare in 16 registers (AVX2, 6x16) or 32 (AVX-512, 12x32).
#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;
#else
constexpr int MR = 4, NV = 4;
#endif
constexpr int NR = NV * VL;
// Sums of sums of so many products lose less to rounding than one long chain. The products over the
// head dimension, of float32, take fewer: lse and the gradients of a few queries have their error, and
// a matrix product of few rows, whose lanes each sum a part, has a small one.
constexpr int64_t CHUNK = 128;
static inline int64_t dim_chunk(DType type, int64_t dim) {
  return type != DType::f32 ? CHUNK : dim > 64 ? 32 : 16;
}
// Rows of a packed tile are this many floats longer than the data: 64 bytes, which keeps a column
// of cache lines from falling into one set of the L1 cache when the row is a power of two long.
constexpr int64_t ROW_PAD = 16;
static inline int64_t row_stride(int64_t dim) { return round_up(dim, 16) + ROW_PAD; }

// --- the matrix product --------------------------------------------------------------------------

// C[M x N*VL] (+)= A[M x depth] B[depth x N*VL]; A is read by rows of stride lda, or, transposed,
// as A[k * lda + m].
template <int M, int N, bool TRANSPOSED>
static inline void micro(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                         float* c, int64_t ldc, bool add) {
  vf acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = v_zero();
  for (int64_t k = 0; k < depth; ++k) {
    vf row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = v_load(b + k * ldb + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vf x = v_set(TRANSPOSED ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = v_fma(x, row[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* out = c + i * ldc + j * VL;
      v_store(out, add ? v_add(acc[i][j], v_load(out)) : acc[i][j]);
    }
}

// At most MR rows and exactly N vectors of columns.
template <int N, bool TRANSPOSED>
static inline void strip(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b,
                         int64_t ldb, float* c, int64_t ldc, bool add, int64_t chunk) {
  for (; depth > chunk; depth -= chunk, b += chunk * ldb, add = true) {
    strip<N, TRANSPOSED>(rows, chunk, a, lda, b, ldb, c, ldc, add, chunk);
    a += chunk * (TRANSPOSED ? lda : 1);
  }
  if (rows == MR) return micro<MR, N, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc, add);
  const int64_t step = TRANSPOSED ? 1 : lda;
  for (; rows >= 4; rows -= 4, a += 4 * step, c += 4 * ldc)
    micro<4, N, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc, add);
  for (; rows >= 2; rows -= 2, a += 2 * step, c += 2 * ldc)
    micro<2, N, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc, add);
  for (; rows > 0; --rows, a += step, c += ldc)
    micro<1, N, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc, add);
}

// A tile's rows, MR at a time: strip s uses columns [lo[s], hi[s]) only.
constexpr int MAX_STRIPS = 128;
struct Bounds {
  int lo[MAX_STRIPS], hi[MAX_STRIPS];
};

// C[rows x cols] = A[rows x depth] B, with B in panels of NR columns (then of VL); where a panel lies
// outside a strip's bounds it is left out.
static void product_scores(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t lda,
                           const float* b, float* c, int64_t ldc, const Bounds& bounds,
                           int64_t chunk) {
  for (int64_t n = 0; n < cols;) {
    const bool wide = cols - n >= NR;
    const int64_t width = wide ? NR : VL;
    const float* panel = b + n * depth;
    for (int64_t m = 0, s = 0; m < rows; m += MR, ++s) {
      if (n >= bounds.hi[s] || n + width <= bounds.lo[s]) continue;
      const int64_t r = min64(MR, rows - m);
      const float* x = a + m * lda;
      float* to = c + m * ldc + n;
      if (wide) strip<NV, false>(r, depth, x, lda, panel, NR, to, ldc, false, chunk);
      else strip<1, false>(r, depth, x, lda, panel, VL, to, ldc, false, chunk);
    }
    n += width;
  }
}

// C[rows x cols] (+)= A[rows x depth] B with B by rows of stride ldb; strip s takes the depth range
// of its bounds. Columns are a multiple of VL.
template <bool TRANSPOSED>
static void product_sum(int64_t rows, int64_t cols, const float* a, int64_t lda, const float* b,
                        int64_t ldb, float* c, int64_t ldc, const Bounds& bounds, bool add) {
  for (int64_t n = 0; n < cols;) {
    const bool wide = cols - n >= NR;
    for (int64_t m = 0, s = 0; m < rows; m += MR, ++s) {
      const int64_t k = bounds.lo[s], depth = max64(bounds.hi[s] - k, 0);
      if (depth == 0 && add) continue;
      const int64_t r = min64(MR, rows - m);
      const float* x = TRANSPOSED ? a + k * lda + m : a + m * lda + k;
      const float* y = b + k * ldb + n;
      if (wide) strip<NV, TRANSPOSED>(r, depth, x, lda, y, ldb, c + m * ldc + n, ldc, add, CHUNK);
      else strip<1, TRANSPOSED>(r, depth, x, lda, y, ldb, c + m * ldc + n, ldc, add, CHUNK);
    }
    n += wide ? NR : VL;
  }
}

// --- packing -------------------------------------------------------------------------------------

static inline void scale_row(float* x, int64_t n, float factor) {
  const vf f = v_set(factor);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) v_store(x + i, v_mul(v_load(x + i), f));
  for (; i < n; ++i) x[i] *= factor;
}

static inline void add_row(float* x, const float* y, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) v_store(x + i, v_add(v_load(x + i), v_load(y + i)));
  for (; i < n; ++i) x[i] += y[i];
}

static inline void multiply_row(float* x, const float* y, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) v_store(x + i, v_mul(v_load(x + i), v_load(y + i)));
  for (; i < n; ++i) x[i] *= y[i];
}

static inline void copy_row(float* x, const float* y, int64_t n) {
  load_row(x, y, n, DType::f32);
}

static inline void fill(float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

// A row that will be read soon. Rows of one head lie pages apart, where no hardware prefetcher follows.
static inline void prefetch_row(const void* row, int64_t dim, DType type) {
  const char* p = static_cast<const char*>(row);
  const int64_t bytes = dim * (type == DType::f32 ? 4 : 2);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}
constexpr int64_t AHEAD = 8;  // rows

// Rows of a tensor as fp32 times `factor`, zero up to `padded` columns.
static void pack_rows(float* dst, int64_t ld, int64_t padded, const void* src, int64_t stride,
                      int64_t rows, int64_t dim, DType type, float factor) {
  for (int64_t r = 0; r < rows; ++r, dst += ld) {
    if (r + AHEAD < rows) prefetch_row(offset(src, (r + AHEAD) * stride, type), dim, type);
    load_row(dst, offset(src, r * stride, type), dim, type);
    if (factor != 1.0f) scale_row(dst, dim, factor);
    fill(dst + dim, padded - dim, 0.0f);
  }
}

#if defined(__AVX2__)
constexpr int PACK_ROWS = 8;
// dst[i * ld + j] = src[j * ld_src + i] for i, j < 8.
static inline void transpose8(float* dst, int64_t ld, const float* src, int64_t ld_src) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * ld_src);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#else
constexpr int PACK_ROWS = 1;
#endif

// The transpose of `rows` rows, in the panels that product_scores reads; columns past `rows`, up to
// `padded` (a multiple of VL), are 0. `lines` holds PACK_ROWS * dim floats.
static void pack_transposed(float* dst, int64_t padded, const void* src, int64_t stride,
                            int64_t rows, int64_t dim, DType type, float* lines) {
  for (int64_t n = 0; n < padded; n += PACK_ROWS) {
    const int64_t first = n / NR * NR;  // the panel of column n: NR wide while NR columns are left
    const bool wide = padded - first >= NR;
    const int64_t width = wide ? NR : VL, panel = wide ? first : n / VL * VL;
    float* out = dst + panel * dim + (n - panel);
    for (int64_t j = n + AHEAD; j < min64(n + AHEAD + PACK_ROWS, rows); ++j)
      prefetch_row(offset(src, j * stride, type), dim, type);
    const float* from = lines;
    int64_t ld = dim;
    if (type == DType::f32 && n + PACK_ROWS <= rows) {
      from = static_cast<const float*>(src) + n * stride, ld = stride;
    } else {
      for (int64_t j = 0; j < PACK_ROWS; ++j) {
        if (n + j < rows) load_row(lines + j * dim, offset(src, (n + j) * stride, type), dim, type);
        else fill(lines + j * dim, dim, 0.0f);
      }
    }
    int64_t k = 0;
#if defined(__AVX2__)
    for (; k + 8 <= dim; k += 8) transpose8(out + k * width, width, from + k, ld);
#endif
    for (; k < dim; ++k)
      for (int64_t j = 0; j < PACK_ROWS; ++j) out[k * width + j] = from[j * ld + k];
  }
}

}  // namespace GP_ISA
}  // namespace gp
