// fp32 tiles packed from any dtype, and a register-tiled matrix product on them.
#pragma once

#include "cpu/attention.h"
#include "cpu/attention_math.h"
#include "cpu/transpose.h"

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
// Sums over keys or queries: what half types lose to rounding hides that of a block's.
static inline int64_t sum_chunk(DType type) { return type == DType::f32 ? CHUNK : 2 * CHUNK; }
// Rows of a packed tile are this many floats longer than the data: 64 bytes, which keeps a column
// of cache lines from falling into one set of the L1 cache when the row is a power of two long.
constexpr int64_t ROW_PAD = 16;
static inline int64_t row_stride(int64_t dim) { return round_up(dim, 16) + ROW_PAD; }

// --- the matrix product --------------------------------------------------------------------------

// C[M x N*VL] = from + A[M x depth] B[depth x N*VL]; A is read by rows of stride lda, or, transposed,
// as A[k * lda + m]. `from` is null for zeros.
template <int M, int N, bool TRANSPOSED>
static inline void micro(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                         const float* from, int64_t ldf, float* c, int64_t ldc) {
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
      v_store(out, from ? v_add(acc[i][j], v_load(from + i * ldf + j * VL)) : acc[i][j]);
    }
}

template <int N, bool TRANSPOSED>
static inline void micro_rows(int64_t rows, int64_t depth, const float* a, int64_t lda,
                              const float* b, int64_t ldb, const float* from, int64_t ldf, float* c,
                              int64_t ldc) {
  if (rows == MR) return micro<MR, N, TRANSPOSED>(depth, a, lda, b, ldb, from, ldf, c, ldc);
  const int64_t step = TRANSPOSED ? 1 : lda;
  auto next = [&](int64_t done) {
    rows -= done, a += done * step, c += done * ldc;
    if (from) from += done * ldf;
  };
  for (; rows >= 4; next(4)) micro<4, N, TRANSPOSED>(depth, a, lda, b, ldb, from, ldf, c, ldc);
  for (; rows >= 2; next(2)) micro<2, N, TRANSPOSED>(depth, a, lda, b, ldb, from, ldf, c, ldc);
  for (; rows > 0; next(1)) micro<1, N, TRANSPOSED>(depth, a, lda, b, ldb, from, ldf, c, ldc);
}

// At most MR rows and exactly N vectors of columns. Between chunks the sums wait in the L1 cache, where
// C need not be.
template <int N, bool TRANSPOSED>
static inline void strip(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b,
                         int64_t ldb, float* c, int64_t ldc, bool add, int64_t chunk) {
  alignas(64) float sums[MR * N * VL];
  const float* from = add ? c : nullptr;
  int64_t ldf = ldc;
  for (; depth > chunk; depth -= chunk, b += chunk * ldb, a += chunk * (TRANSPOSED ? lda : 1)) {
    micro_rows<N, TRANSPOSED>(rows, chunk, a, lda, b, ldb, from, ldf, sums, N * VL);
    from = sums, ldf = N * VL;
  }
  micro_rows<N, TRANSPOSED>(rows, depth, a, lda, b, ldb, from, ldf, c, ldc);
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
                        int64_t ldb, float* c, int64_t ldc, const Bounds& bounds, bool add,
                        int64_t chunk) {
  for (int64_t n = 0; n < cols;) {
    const bool wide = cols - n >= NR;
    for (int64_t m = 0, s = 0; m < rows; m += MR, ++s) {
      const int64_t k = bounds.lo[s], depth = max64(bounds.hi[s] - k, 0);
      if (depth == 0 && add) continue;
      const int64_t r = min64(MR, rows - m);
      const float* x = TRANSPOSED ? a + k * lda + m : a + m * lda + k;
      const float* y = b + k * ldb + n;
      if (wide) strip<NV, TRANSPOSED>(r, depth, x, lda, y, ldb, c + m * ldc + n, ldc, add, chunk);
      else strip<1, TRANSPOSED>(r, depth, x, lda, y, ldb, c + m * ldc + n, ldc, add, chunk);
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

// A row that will soon be read, or written. Rows of one head lie pages apart, where no hardware
// prefetcher follows.
enum class Prefetch { read, write };
template <Prefetch HOW = Prefetch::read>
static inline void prefetch_row(const void* row, int64_t dim, DType type) {
  const char* p = static_cast<const char*>(row);
  const int64_t bytes = dim * (type == DType::f32 ? 4 : 2);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, HOW == Prefetch::write);
}
constexpr int64_t AHEAD = 8;  // rows

template <DType TYPE>
static inline vf v_load_as(const void* row, int64_t i) {
  if (TYPE == DType::f32) return v_load(static_cast<const float*>(row) + i);
  const uint16_t* half = static_cast<const uint16_t*>(row) + i;
  return TYPE == DType::bf16 ? v_load_bf16(half) : v_load_f16(half);
}

// Rows of a tensor as fp32 times `factor`, zero up to `padded` columns.
template <DType TYPE>
static void pack_rows_of(float* dst, int64_t ld, int64_t padded, const void* src, int64_t stride,
                         int64_t rows, int64_t dim, float factor) {
  const vf f = v_set(factor);
  for (int64_t r = 0; r < rows; ++r, dst += ld) {
    if (r + AHEAD < rows) prefetch_row(offset(src, (r + AHEAD) * stride, TYPE), dim, TYPE);
    const void* row = offset(src, r * stride, TYPE);
    int64_t i = 0;
    for (; i + VL <= dim; i += VL) v_store(dst + i, v_mul(v_load_as<TYPE>(row, i), f));
    for (; i < dim; ++i) dst[i] = load_one(row, i, TYPE) * factor;
    fill(dst + dim, padded - dim, 0.0f);
  }
}

static void pack_rows(float* dst, int64_t ld, int64_t padded, const void* src, int64_t stride,
                      int64_t rows, int64_t dim, DType type, float factor) {
  if (type == DType::f32)
    return pack_rows_of<DType::f32>(dst, ld, padded, src, stride, rows, dim, factor);
  if (type == DType::bf16)
    return pack_rows_of<DType::bf16>(dst, ld, padded, src, stride, rows, dim, factor);
  pack_rows_of<DType::f16>(dst, ld, padded, src, stride, rows, dim, factor);
}

#if defined(__AVX2__)
constexpr int PACK_ROWS = 8;
#else
constexpr int PACK_ROWS = 1;
#endif

// The transpose of `rows` rows, in the panels that product_scores reads; columns past `rows`, up to
// `padded` (a multiple of VL), are 0.
template <DType TYPE>
static void pack_transposed_of(float* dst, int64_t padded, const void* src, int64_t stride,
                               int64_t rows, int64_t dim) {
  for (int64_t n = 0; n < padded; n += PACK_ROWS) {
    const int64_t first = n / NR * NR;  // the panel of column n: NR wide while NR columns are left
    const bool wide = padded - first >= NR;
    const int64_t width = wide ? NR : VL, panel = wide ? first : n / VL * VL;
    float* out = dst + panel * dim + (n - panel);
    for (int64_t j = n + AHEAD; j < min64(n + AHEAD + PACK_ROWS, rows); ++j)
      prefetch_row(offset(src, j * stride, TYPE), dim, TYPE);
    int64_t k = 0;
#if defined(__AVX2__)
    for (; k + 8 <= dim; k += 8) {
      __m256 block[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
        block[j] = n + j < rows ? load8(src, (n + j) * stride + k, TYPE) : _mm256_setzero_ps();
      transpose8(block);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) _mm256_storeu_ps(out + (k + j) * width, block[j]);
    }
#endif
    for (; k < dim; ++k)
      for (int64_t j = 0; j < PACK_ROWS; ++j)
        out[k * width + j] = n + j < rows ? load_one(src, (n + j) * stride + k, TYPE) : 0.0f;
  }
}

static void pack_transposed(float* dst, int64_t padded, const void* src, int64_t stride,
                            int64_t rows, int64_t dim, DType type) {
  if (type == DType::f32)
    return pack_transposed_of<DType::f32>(dst, padded, src, stride, rows, dim);
  if (type == DType::bf16)
    return pack_transposed_of<DType::bf16>(dst, padded, src, stride, rows, dim);
  pack_transposed_of<DType::f16>(dst, padded, src, stride, rows, dim);
}

}  // namespace GP_ISA
}  // namespace gp
