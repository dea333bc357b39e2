// int8 weights against x rounded to int8, one scale a row: products and sums are exact in int32, so the
// result does not depend on their order, and every instruction set gives the same bits.
#include "cpu/quant_matmul_codes.h"
#include "cpu/transpose.h"

namespace gp {
namespace GP_ISA {
namespace {

float finish(const QuantMatmulArgs& a, int32_t sum, int64_t n, float x_scale, float bias) {
  return float(sum) * load_one(a.w.scale, n, a.w.scale_dtype) * x_scale + bias;
}

// sum - 128 * ones, as it is modulo 2^32.
[[maybe_unused]] int32_t less128(int32_t sum, int32_t ones) { return int32_t(uint32_t(sum) - 128u * uint32_t(ones)); }

// --- a few rows of x: W is read as it lies -------------------------------------------------------

constexpr int64_t MOST_FEW = 16;  // above, a new layout of W pays
constexpr int MAX_X = 4;  // rows of x and of W that are multiplied together
constexpr int MAX_W = 4;
constexpr int64_t STEP = 64;

// sums[r][m] = the products of R rows of W and M of x over k, which is a multiple of STEP.
#if defined(__AVX512F__)
#define GP_DOT __attribute__((target("avx512vnni")))
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
      sums[r * MAX_X + m] =
          less128(_mm512_reduce_add_epi32(acc[r][m]), _mm512_reduce_add_epi32(all[r]));
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
    for (int m = 0; m < M; ++m) {
      __m128i s = _mm_add_epi32(_mm256_castsi256_si128(acc[r][m]),
                                _mm256_extracti128_si256(acc[r][m], 1));
      s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
      sums[r * MAX_X + m] = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
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

// --- many rows of x: panels of W are laid out anew -----------------------------------------------

#if defined(__AVX2__)
// The columns are taken in units of 32 bits. AVX2: two 16-bit integers, multiplied by vpmaddwd.
// AVX-512 VNNI: four bytes, those of x with 128 added; one more row of x, all ones, tells by how much
// the sums are then too large.
// A register tile is MT rows of x by NV vectors of rows of W. (AVX2, EPYC 9004: 4 by 3 makes 24
// products a cycle, 6 by 2 makes 19.)
#if defined(__AVX512F__)
constexpr int64_t PER_UNIT = 4;
constexpr int MT = 12, NV = 2;
#else
constexpr int64_t PER_UNIT = 2;
constexpr int MT = 4, NV = 3;
#endif
constexpr int64_t NT = NV * VL;   // rows of W in a panel
constexpr int64_t UNITS = 128;    // of a panel in the first-level cache
constexpr int64_t MOST_PANELS = 4;
constexpr int64_t M_CHUNK = 512;  // rows of x that share a panel

// panel[u][r] = unit u of row r, for `units` (a multiple of 8) units from column k0 on. By way of a
// copy: lines of rows that are pages apart drive each other out of the first-level cache.
void pack_panel(const QuantWeight& w, int64_t n0, int64_t k0, int64_t units, int32_t* panel) {
  constexpr int64_t STRIDE = UNITS * PER_UNIT;
  alignas(64) int8_t rows[NT * STRIDE];
  const int64_t bytes = units * PER_UNIT, there = w.k - k0 < bytes ? w.k - k0 : bytes;
  for (int64_t r = 0; r < NT; ++r) {
    const int64_t taken = n0 + r < w.n ? there : 0;
    std::memcpy(rows + r * STRIDE, w.qdata + (taken ? (n0 + r) * w.k + k0 : 0), size_t(taken));
    std::memset(rows + r * STRIDE + taken, 0, size_t(bytes - taken));
  }
  for (int64_t r = 0; r < NT; r += 8)
    for (int64_t u = 0; u < units; u += 8) {
      __m256 block[8];
      for (int64_t j = 0; j < 8; ++j) {
        const int8_t* p = rows + (r + j) * STRIDE + u * PER_UNIT;
#if defined(__AVX512F__)
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
#else
        const __m256i v =
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
        block[j] = _mm256_castsi256_ps(v);
      }
      transpose8(block);
      for (int64_t j = 0; j < 8; ++j)
        _mm256_storeu_ps(reinterpret_cast<float*>(panel + (u + j) * NT + r), block[j]);
    }
}

// c[m][0..NT) (+)= the sum over `units` of x[m][u] * panel[u][0..NT), for M rows of x.
#if defined(__AVX512F__)
template <int M>
GP_DOT void tile(int64_t units, const int32_t* x, const int32_t* panel, int32_t* c, bool add) {
  __m512i acc[M][2];
  GP_UNROLL
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v)
      acc[m][v] = add ? _mm512_loadu_si512(c + m * NT + v * VL) : _mm512_setzero_si512();
  for (int64_t u = 0; u < units; ++u) {
    const __m512i w0 = _mm512_loadu_si512(panel + u * NT), w1 = _mm512_loadu_si512(panel + u * NT + VL);
    GP_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m512i xv = _mm512_set1_epi32(x[u * MT + m]);
      acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], xv, w0);
      acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], xv, w1);
      // GCC would store each sum at every step.
      asm volatile("" : "+v"(acc[m][0]), "+v"(acc[m][1]));
    }
  }
  GP_UNROLL
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) _mm512_storeu_si512(c + m * NT + v * VL, acc[m][v]);
}
#else
template <int M>
__attribute__((noinline)) void tile(int64_t units, const int32_t* x, const int32_t* panel, int32_t* c,
                                    bool add) {
  const auto at = [](int32_t* p) { return reinterpret_cast<__m256i*>(p); };
  __m256i acc[M][NV];
  GP_UNROLL
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v)
      acc[m][v] = add ? _mm256_loadu_si256(at(c + m * NT + v * VL)) : _mm256_setzero_si256();
  for (int64_t u = 0; u < units; ++u) {
    const __m256i* w = reinterpret_cast<const __m256i*>(panel + u * NT);
    GP_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m256i xv = _mm256_set1_epi32(x[u * MT + m]);
      GP_UNROLL
      for (int v = 0; v < NV; ++v) {
        const __m256i two = _mm256_madd_epi16(xv, _mm256_loadu_si256(w + v));
        // GCC would take all products first, which leaves it no registers.
        asm volatile("vpaddd %1, %0, %0" : "+x"(acc[m][v]) : "x"(two));
      }
    }
  }
  GP_UNROLL
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) _mm256_storeu_si256(at(c + m * NT + v * VL), acc[m][v]);
}
#endif

// Units of `rows` (at most MT) rows of codes, in the order in which a tile takes them: out[u][MT].
void to_units(const int8_t* q, int64_t stride, int64_t rows, int64_t units, int32_t* out) {
  for (int64_t u = 0; u < units; u += 8, out += 8 * MT)
    for (int64_t m = 0; m < rows; ++m) {
      const int8_t* p = q + m * stride + u * PER_UNIT;
#if defined(__AVX512F__)
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      const __m256i unit = _mm256_xor_si256(v, _mm256_set1_epi8(int8_t(0x80)));
#else
      const __m256i unit = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
      alignas(32) int32_t eight[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(eight), unit);
      for (int64_t i = 0; i < 8; ++i) out[i * MT + m] = eight[i];
    }
}

bool many(const QuantMatmulArgs& a, const Codes& x) {
  const int64_t n = a.w.n, units = x.stride / PER_UNIT;  // the stride is a multiple of 8 units
  const int64_t chunk = a.m < M_CHUNK ? a.m : M_CHUNK, extra = PER_UNIT == 4 ? 1 : 0;
  const int64_t threads = a.threads, blocks = (units + UNITS - 1) / UNITS;
  // Panels that go through a block of x one after the other: fewer where threads would want for work.
  int64_t most = MOST_PANELS;
  while (most > 1 && n < 4 * threads * most * NT) most /= 2;
  const int64_t all = round_up(chunk + extra, MT), room = all * NT;
  Scratch xu(blocks * all * UNITS * 4), panels(threads * UNITS * NT * 4);
  Scratch sums(threads * most * room * 4);
  if (!xu.ok() || !panels.ok() || !sums.ok()) return false;
  for (int64_t m0 = 0; m0 < a.m; m0 += M_CHUNK) {
    const int64_t mm = a.m - m0 < M_CHUNK ? a.m - m0 : M_CHUNK, rows = mm + extra;
    const int64_t padded = round_up(rows, MT);
    // [block][tile][unit of the block][row of the tile]
    parallel_for(blocks, threads, [&](int64_t b, int) {
      const int64_t uu = units - b * UNITS < UNITS ? units - b * UNITS : UNITS;
      for (int64_t m = 0; m < rows; m += MT) {
        int32_t* out = xu.as<int32_t>() + (b * padded + m) * UNITS;
        to_units(x.codes.as<int8_t>() + (m0 + m) * x.stride + b * UNITS * PER_UNIT, x.stride,
                 mm - m < MT ? mm - m : MT, uu, out);
        for (int64_t u = 0; u < uu && extra && m + MT > mm; ++u) out[u * MT + mm - m] = 0x01010101;
      }
    });
    parallel_for((n + most * NT - 1) / (most * NT), threads, [&](int64_t item, int thread) {
      const KeepSubnormals keep;
      int32_t* panel = panels.as<int32_t>() + thread * UNITS * NT;
      int32_t* c = sums.as<int32_t>() + thread * most * room;
      const int64_t first = item * most * NT, end = first + most * NT < n ? first + most * NT : n;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t uu = units - b * UNITS < UNITS ? units - b * UNITS : UNITS;
        const int64_t next = (b + 1) * UNITS * PER_UNIT;  // W, one block ahead
        for (int64_t n0 = first; n0 < end; n0 += NT) {
          for (int64_t r = n0; r < n0 + NT && r < end && next < a.w.k; ++r)
            for (int64_t i = 0; i < UNITS * PER_UNIT; i += 64) prefetch(a.w.qdata + r * a.w.k + next + i);
          pack_panel(a.w, n0, b * UNITS * PER_UNIT, uu, panel);
          int32_t* sum = c + (n0 - first) / NT * room;
          const int32_t* xb = xu.as<int32_t>() + b * padded * UNITS;
          int64_t m = 0;
          for (; m + MT <= rows; m += MT) tile<MT>(uu, xb + m * UNITS, panel, sum + m * NT, b > 0);
          const int64_t rest = rows - m;
          if (rest > MT / 2) tile<MT>(uu, xb + m * UNITS, panel, sum + m * NT, b > 0);
          else if (rest > 1) tile<MT / 2>(uu, xb + m * UNITS, panel, sum + m * NT, b > 0);
          else if (rest > 0) tile<1>(uu, xb + m * UNITS, panel, sum + m * NT, b > 0);
        }
      }
      for (int64_t n0 = first; n0 < end; n0 += NT) {
        const int64_t nn = end - n0 < NT ? end - n0 : NT;
        float bias[NT] = {}, w_scale[NT] = {}, y[NT];
        for (int64_t r = 0; r < nn; ++r) w_scale[r] = load_one(a.w.scale, n0 + r, a.w.scale_dtype);
        for (int64_t r = 0; r < nn && a.bias; ++r) bias[r] = load_one(a.bias, n0 + r, a.bias_dtype);
        const int32_t *sum = c + (n0 - first) / NT * room, *ones = sum + mm * NT;
        for (int64_t m = 0; m < mm; ++m, sum += NT) {
          const float x_scale = x.scales.as<float>()[m0 + m];
          for (int64_t r = 0; r < NT; ++r)
            y[r] = float(extra ? less128(sum[r], ones[r]) : sum[r]) * w_scale[r] * x_scale + bias[r];
          store_row(offset(a.y, (m0 + m) * n + n0, a.dtype), y, nn, a.dtype);
        }
      }
    });
  }
  return true;
}
#else
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
