// int8 and fp8 weights against a few rows of x: bound by memory. Each row of W is summed in blocks
// of at most 512 weights, in two vectors each, whatever the number of rows of x or of W that are
// taken together; the scale is applied to a block's sum (128x128 blocks) or at the end.
#include "common/parallel.h"
#include "cpu/quant_matmul_decode.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int MAX_ROWS = 4;
constexpr int SPAN = 512;       // weights between two additions to the total
constexpr int STEP = 2 * VL;    // weights of a row in one step of the inner loop

// VL codes without their scale. fp8_e4m3fn leaves NaN to `special`, which is cheaper.
template <QuantFormat F>
static inline vf load_finite(const uint8_t* p) {
#if defined(__AVX512F__)
  if (F != QuantFormat::int8) {
    const int shift = F == QuantFormat::fp8 ? 20 : 21;
    const __m512i b = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i bits = _mm512_and_si512(
        _mm512_slli_epi32(b, shift), _mm512_set1_epi32(int(0x80000000u | 0x7fu << shift)));
    return {_mm512_mul_ps(_mm512_castsi512_ps(bits),
                          _mm512_set1_ps(F == QuantFormat::fp8 ? E4M3_LIFT : E5M2_LIFT))};
  }
#elif defined(__AVX2__)
  if (F != QuantFormat::int8) {
    const int shift = F == QuantFormat::fp8 ? 20 : 21;
    const __m256i b = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i bits = _mm256_and_si256(
        _mm256_slli_epi32(b, shift), _mm256_set1_epi32(int(0x80000000u | 0x7fu << shift)));
    return {_mm256_mul_ps(_mm256_castsi256_ps(bits),
                          _mm256_set1_ps(F == QuantFormat::fp8 ? E4M3_LIFT : E5M2_LIFT))};
  }
#endif
  return load_codes<F>(p);
}

// Whether any of n codes is an infinity or NaN.
template <QuantFormat F>
static bool special(const uint8_t* p, int64_t n) {
  const uint8_t least = F == QuantFormat::fp8 ? 0x7f : 0x7c;
  uint8_t any = 0;
  for (int64_t i = 0; i < n; ++i) any |= uint8_t((p[i] & 0x7f) >= least);
  return any != 0;
}

// out[r * MAX_ROWS + m] = sum of W[r][i] * x[m][i], for R rows of W and M of x. x has zeros up to a
// multiple of STEP.
template <QuantFormat F, int R, int M>
void dot_rows(const uint8_t* w, int64_t k, const float* x, int64_t x_stride, const float* block_scale,
              float* out) {
  vf total[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = v_zero();
  const int64_t span = block_scale ? 128 : SPAN;
  for (int64_t k0 = 0; k0 < k; k0 += span) {
    const int64_t end = k0 + span < k ? k0 + span : k;
    vf a[R][M], b[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) a[r][m] = b[r][m] = v_zero();
    int64_t i = k0;
    for (; i + STEP <= end; i += STEP)
      for (int r = 0; r < R; ++r) {
        const vf u = load_finite<F>(w + r * k + i), v = load_finite<F>(w + r * k + i + VL);
        for (int m = 0; m < M; ++m) {
          a[r][m] = v_fma(u, v_load(x + m * x_stride + i), a[r][m]);
          b[r][m] = v_fma(v, v_load(x + m * x_stride + i + VL), b[r][m]);
        }
      }
    if (i < end)
      for (int r = 0; r < R; ++r) {
        uint8_t tail[STEP] = {};
        std::memcpy(tail, w + r * k + i, size_t(end - i));
        const vf u = load_finite<F>(tail), v = load_finite<F>(tail + VL);
        for (int m = 0; m < M; ++m) {
          a[r][m] = v_fma(u, v_load(x + m * x_stride + i), a[r][m]);
          b[r][m] = v_fma(v, v_load(x + m * x_stride + i + VL), b[r][m]);
        }
      }
    const vf s = v_set(block_scale ? block_scale[k0 / 128] : 1.0f);
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) total[r][m] = v_fma(v_add(a[r][m], b[r][m]), s, total[r][m]);
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * MAX_ROWS + m] = v_sum(total[r][m]);
}

// R rows of W at once keep enough sums in flight: R * M * 2 of them.
template <QuantFormat F, int R>
void dot(const uint8_t* w, int64_t k, const float* x, int64_t x_stride, int64_t m,
         const float* block_scale, float* out) {
  if (m == 1) return dot_rows<F, R, 1>(w, k, x, x_stride, block_scale, out);
  constexpr int R2 = R > 2 ? 2 : R;
  for (int r = 0; r < R; r += R2) {
    const uint8_t* p = w + r * k;
    float* o = out + r * MAX_ROWS;
    if (m == 2) dot_rows<F, R2, 2>(p, k, x, x_stride, block_scale, o);
    else
      for (int i = 0; i < R2; ++i, p += k, o += MAX_ROWS)
        m == 3 ? dot_rows<F, 1, 3>(p, k, x, x_stride, block_scale, o)
               : dot_rows<F, 1, 4>(p, k, x, x_stride, block_scale, o);
  }
}

template <QuantFormat F>
bool run(const QuantMatmulArgs& a) {
  const QuantWeight& w = a.w;
  const int64_t n = w.n, k = w.k, m = a.m;
  const int64_t padded = (k + STEP - 1) / STEP * STEP, blocks = (k + 127) / 128;
  const bool by_block = w.group_size == 128;
  const int threads = n * k < 65536 ? 1 : a.threads;
  Scratch packed(m * padded * 4), scales(threads * blocks * 4), rows_out(threads * padded * 4);
  if (!packed.ok() || !scales.ok() || !rows_out.ok()) return false;
  float* x = packed.as<float>();
  for (int64_t r = 0; r < m; ++r) {
    load_row(x + r * padded, offset(a.x, r * k, a.dtype), k, a.dtype);
    for (int64_t i = k; i < padded; ++i) x[r * padded + i] = 0.0f;
  }

  const Decoder decoder(w);
  constexpr int R = 4;
  // Rows of one item: a multiple of R, some 64 KiB, and never across a row of 128x128 blocks.
  int64_t rows = R;
  while (rows < 128 && rows * k < 65536 && rows * 2 * threads < n) rows *= 2;
  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    const float* block_scale = nullptr;
    if (by_block) {
      float* s = scales.as<float>() + thread * blocks;
      const int64_t first = item * rows / 128 * blocks;
      load_row(s, offset(w.scale, first, w.scale_dtype), blocks, w.scale_dtype);
      block_scale = s;
    }
    const int64_t end = (item + 1) * rows < n ? (item + 1) * rows : n;
    for (int64_t r = item * rows; r < end;) {
      const int64_t count = r + R <= end ? R : 1;
      const uint8_t* p = w.qdata + r * k;
      for (int64_t m0 = 0; m0 < m; m0 += MAX_ROWS) {
        const int64_t mm = m - m0 < MAX_ROWS ? m - m0 : MAX_ROWS;
        float out[R * MAX_ROWS];
        if (count == R) dot<F, R>(p, k, x + m0 * padded, padded, mm, block_scale, out);
        else dot<F, 1>(p, k, x + m0 * padded, padded, mm, block_scale, out);
        for (int64_t j = 0; j < count; ++j) {
          const float s = by_block ? 1.0f
              : load_one(w.scale, w.group_size == 0 ? 0 : r + j, w.scale_dtype);
          const float bias = a.bias ? load_one(a.bias, r + j, a.bias_dtype) : 0.0f;
          for (int64_t i = 0; i < mm; ++i)
            store_one(a.y, (m0 + i) * n + r + j, out[j * MAX_ROWS + i] * s + bias, a.dtype);
        }
      }
      if (F != QuantFormat::int8)
        for (int64_t j = 0; j < count; ++j)
          if (special<F>(p + j * k, k)) {  // rare: such a row is decoded and summed one by one
            float* row = rows_out.as<float>() + thread * padded;
            decoder.row(r + j, 0, k, row);
            const float bias = a.bias ? load_one(a.bias, r + j, a.bias_dtype) : 0.0f;
            for (int64_t i = 0; i < m; ++i) {
              float sum = 0.0f;
              for (int64_t e = 0; e < k; ++e) sum += row[e] * x[i * padded + e];
              store_one(a.y, i * n + r + j, sum + bias, a.dtype);
            }
          }
      r += count;
    }
  });
  return true;
}

}  // namespace

bool quant_matmul_few_8bit(const QuantMatmulArgs& a) {
  switch (a.w.format) {
    case QuantFormat::int8: return run<QuantFormat::int8>(a);
    case QuantFormat::fp8: return run<QuantFormat::fp8>(a);
    default: return run<QuantFormat::fp8_e5m2>(a);
  }
}

}  // namespace GP_ISA
}  // namespace gp
