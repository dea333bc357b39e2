// int8 weights against x rounded to int8, one scale a row: products and sums are exact in int32, so the
// result does not depend on their order, and every instruction set gives the same bits.
#if defined(__AVX512F__)
#define GP_DOT __attribute__((target("avx512vnni")))
#endif

#include "cpu/quant_matmul_int8_many.h"

namespace gp {
namespace GP_ISA {
namespace {

float finish(const QuantMatmulArgs& a, int32_t sum, int64_t n, float x_scale, float bias) {
  return float(sum) * load_one(a.w.scale, n, a.w.scale_dtype) * x_scale + bias;
}

// sum - 128 * ones, as it is modulo 2^32.
[[maybe_unused]] int32_t less128(int32_t sum, int32_t ones) { return int32_t(uint32_t(sum) - 128u * uint32_t(ones)); }

#if defined(__AVX2__)
// The sum of the lanes modulo 2^32.
int32_t sum_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
#endif
#if defined(__AVX512F__)
int32_t sum_lanes(__m512i v) {
  return sum_lanes(_mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)));
}
#endif

// --- a few rows of x: W is read as it lies -------------------------------------------------------

constexpr int64_t MOST_FEW = 16;  // above, a new layout of W pays
constexpr int MAX_X = 4;  // rows of x and of W that are multiplied together
constexpr int MAX_W = 4;
constexpr int64_t STEP = 64;

// sums[r][m] = the products of R rows of W and M of x over k, which is a multiple of STEP.
#if defined(__AVX512F__)
template <int R, int M>
GP_DOT void dot(const int8_t* w, int64_t w_stride, const int8_t* x, int64_t x_stride, int64_t k,
                int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1), flip = _mm512_set1_epi8(int8_t(0x80));
  __m512i acc[R][M], all[R];  // vpdpbusd takes x + 128: 128 times the sum of W is too much
  for (int r = 0; r < R; ++r) {
    all[r] = _mm512_setzero_si512();
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < k; i += STEP) {
    __m512i xv[M];
    for (int m = 0; m < M; ++m) xv[m] = _mm512_xor_si512(_mm512_loadu_si512(x + m * x_stride + i), flip);
    for (int r = 0; r < R; ++r) {
      const int8_t* p = w + r * w_stride + i;
      __builtin_prefetch(p + R * w_stride, 0, 2);
      const __m512i wv = _mm512_loadu_si512(p);
      all[r] = _mm512_dpbusd_epi32(all[r], ones, wv);
      for (int m = 0; m < M; ++m) acc[r][m] = _mm512_dpbusd_epi32(acc[r][m], xv[m], wv);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m)
      sums[r * MAX_X + m] = less128(sum_lanes(acc[r][m]), sum_lanes(all[r]));
  }
}
#elif defined(__AVX2__)
template <int R, int M>
void dot(const int8_t* w, int64_t w_stride, const int8_t* x, int64_t x_stride, int64_t k,
         int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += STEP)
    for (int r = 0; r < R; ++r) {
      const int8_t* p = w + r * w_stride + i;
      __builtin_prefetch(p + R * w_stride, 0, 2);
      for (int h = 0; h < STEP; h += 32) {
        const __m256i wv = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + h));
        // |w| is at most 128 and |x| 127: two products fit 16 bits, so that nothing saturates.
        const __m256i magnitude = _mm256_abs_epi8(wv);
        for (int m = 0; m < M; ++m) {
          const __m256i xv =
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + m * x_stride + i + h));
          const __m256i two = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(xv, wv));
          acc[r][m] = _mm256_add_epi32(acc[r][m], _mm256_madd_epi16(two, ones));
        }
      }
    }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r * MAX_X + m] = sum_lanes(acc[r][m]);
}
#else
template <int R, int M>
void dot(const int8_t* w, int64_t w_stride, const int8_t* x, int64_t x_stride, int64_t k,
         int32_t* sums) {
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += int32_t(w[r * w_stride + i]) * x[m * x_stride + i];
      sums[r * MAX_X + m] = sum;
    }
}
#endif

template <int R>
void dot_rows(int64_t m, const int8_t* w, int64_t w_stride, const int8_t* x, int64_t x_stride,
              int64_t k, int32_t* sums) {
  auto* f = m == 1 ? &dot<R, 1> : m == 2 ? &dot<R, 2> : m == 3 ? &dot<R, 3> : &dot<R, 4>;
  f(w, w_stride, x, x_stride, k, sums);
}

bool few(const QuantMatmulArgs& a, const Codes& x) {
  const int64_t n = a.w.n, k = a.w.k, whole = k / STEP * STEP;
  const int threads = n * k < (1 << 18) ? 1 : a.threads;
  int64_t rows = MAX_W;  // of W in one item: some 512 KiB
  while (rows < 128 && rows * k < (1 << 19) && rows * 2 * threads < n) rows *= 2;
  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int) {
    const KeepSubnormals keep;
    const int64_t end = (item + 1) * rows < n ? (item + 1) * rows : n;
    for (int64_t r0 = item * rows; r0 < end; r0 += MAX_W) {
      const int64_t count = end - r0 < MAX_W ? end - r0 : MAX_W;
      const int8_t* w = reinterpret_cast<const int8_t*>(a.w.qdata) + r0 * k;
      int8_t last[MAX_W * STEP] = {};  // the columns after the last whole step
      for (int64_t r = 0; r < count; ++r) std::memcpy(last + r * STEP, w + r * k + whole, size_t(k - whole));
      for (int64_t m0 = 0; m0 < a.m; m0 += MAX_X) {
        const int64_t mm = a.m - m0 < MAX_X ? a.m - m0 : MAX_X;
        const int8_t* xq = x.codes.as<int8_t>() + m0 * x.stride;
        int32_t sums[MAX_W * MAX_X] = {}, tail[MAX_W * MAX_X] = {};
        if (count == MAX_W) {
          dot_rows<MAX_W>(mm, w, k, xq, x.stride, whole, sums);
        } else {
          for (int64_t r = 0; r < count; ++r)
            dot_rows<1>(mm, w + r * k, k, xq, x.stride, whole, sums + r * MAX_X);
        }
        if (whole < k) dot_rows<MAX_W>(mm, last, STEP, xq + whole, x.stride, STEP, tail);
        for (int64_t r = 0; r < count; ++r) {
          const float bias = a.bias ? load_one(a.bias, r0 + r, a.bias_dtype) : 0.0f;
          for (int64_t m = 0; m < mm; ++m) {
            const int32_t sum = sums[r * MAX_X + m] + tail[r * MAX_X + m];
            store_one(a.y, (m0 + m) * n + r0 + r,
                      finish(a, sum, r0 + r, x.scales.as<float>()[m0 + m], bias), a.dtype);
          }
        }
      }
    }
  });
  return true;
}

#if !defined(__AVX2__)
bool many(const QuantMatmulArgs& a, const Codes& x) { return few(a, x); }
#endif

}  // namespace

bool quant_matmul_int8(const QuantMatmulArgs& a) {
  if (a.w.format == QuantFormat::int4) return quant_matmul_int4_int8(a);
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512vnni")) return avx2::quant_matmul_int8(a);
#endif
  const Codes x(a, STEP, a.w.k);
  if (!x.ok()) return false;
  return a.m > MOST_FEW ? many(a, x) : few(a, x);
}

}  // namespace GP_ISA
}  // namespace gp
