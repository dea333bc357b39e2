// int4 weights against many rows of x in int8: panels of W are laid out anew. Included by its kernel
// only.
#pragma once

#include "cpu/quant_matmul_int4_int8_few.h"
#include "cpu/transpose.h"

namespace gp {
namespace GP_ISA {

#if defined(__AVX2__)
constexpr int64_t NT = 32;        // rows of W in a panel
constexpr int64_t UNITS = STEP / 4;  // four codes each, of 8 the even ones, then the odd ones
constexpr int64_t M_CHUNK = 256;  // rows of x that share a panel
#if defined(__AVX512F__)
constexpr int MT = 8;
#else
constexpr int MT = 4;
#endif

// panel[u][r] = unit u of row r, one step of W from byte `at` of the rows on.
static void pack_panel(const QuantWeight& w, const GroupGrid& grid, int64_t n0, int64_t at, int32_t* panel) {
  const int64_t left = grid.row_bytes - at < STEP_BYTES ? grid.row_bytes - at : STEP_BYTES;
  const __m256i mask = _mm256_set1_epi8(15);
  for (int64_t r = 0; r < NT; r += 8)
    for (int64_t b = 0; b < STEP_BYTES; b += 32) {
      __m256 block[8];
      for (int64_t j = 0; j < 8; ++j) {
        alignas(32) uint8_t part[32] = {};
        const uint8_t* p = part;
        if (n0 + r + j < w.n && b < left) {
          p = w.qdata + (n0 + r + j) * grid.row_bytes + at + b;
          if (left - b < 32) {
            std::memcpy(part, p, size_t(left - b));
            p = part;
          }
        }
        block[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(p));
      }
      transpose8(block);
      for (int64_t j = 0; j < 8; ++j) {
        const __m256i v = _mm256_castps_si256(block[j]);
        __m256i* out = reinterpret_cast<__m256i*>(panel + (b / 2 + 2 * j) * NT + r);
        _mm256_storeu_si256(out, _mm256_and_si256(v, mask));
        _mm256_storeu_si256(out + NT / 8, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
      }
    }
}

// What a step of the panel has for each run: [run][NT].
struct Panel {
  const int32_t* codes;
  const float* scales;
  const int32_t* zeros;
};
// A step of rows of x: codes [m][STEP], scales and sums of codes [m][runs of a step].
struct Block {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
};

// c[m][v * VL ..] (+)= the products of one step, of M rows of x and two vectors of rows of W.
#if defined(__AVX512F__)
template <int RUN, int M>
static GP_DOT void tile(const Block& x, const Panel& w, float* c, bool add) {
  constexpr int RUNS = STEP / RUN;
  for (int run = 0; run < RUNS; ++run) {
    __m512i acc[M][2];
    GP_UNROLL
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
    for (int u = run * (RUN / 4); u < (run + 1) * (RUN / 4); ++u) {
      const int32_t* unit = w.codes + u * NT;
      const __m512i w0 = _mm512_loadu_si512(unit), w1 = _mm512_loadu_si512(unit + VL);
      GP_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m512i xv = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(x.codes + m * STEP)[u]);
        acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], w0, xv);
        acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], w1, xv);
        // GCC would store each sum at every step.
        asm volatile("" : "+v"(acc[m][0]), "+v"(acc[m][1]));
      }
    }
    GP_UNROLL
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < 2; ++v) {
        float* at = c + m * NT + v * VL;
        // vpmaddwd multiplies the lower halves: zero points are not negative.
        const __m512i less = _mm512_madd_epi16(_mm512_set1_epi32(x.sums[m * RUNS + run]),
                                               _mm512_loadu_si512(w.zeros + run * NT + v * VL));
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[m][v], less));
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(w.scales + run * NT + v * VL),
                                           _mm512_set1_ps(x.scales[m * RUNS + run]));
        const __m512 before = add || run > 0 ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
        _mm512_storeu_ps(at, _mm512_fmadd_ps(sum, scale, before));
      }
  }
}
#else
// a += b. GCC would take all products first, which leaves it no registers.
GP_INLINE inline void add_words(__m256i& a, __m256i b) {
  asm volatile("vpaddw %1, %0, %0" : "+x"(a) : "x"(b));
}
template <int RUN, int M>
static __attribute__((noinline)) void tile(const Block& x, const Panel& w, float* c, bool add) {
  constexpr int RUNS = STEP / RUN;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int run = 0; run < RUNS; ++run) {
    __m256i acc[M][2];
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
    for (int u0 = run * (RUN / 4); u0 < (run + 1) * (RUN / 4); u0 += 8) {
      // 15 * 127 * 2 for each of eight units: 16 bits hold it.
      __m256i part[M][2];
      GP_UNROLL
      for (int m = 0; m < M; ++m) part[m][0] = part[m][1] = _mm256_setzero_si256();
      GP_UNROLL
      for (int u = 0; u < 8; ++u) {
        const int32_t* unit = w.codes + (u0 + u) * NT;
        const __m256i w0 = load32(unit), w1 = load32(unit + VL);
        GP_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m256i xv =
              _mm256_set1_epi32(reinterpret_cast<const int32_t*>(x.codes + m * STEP)[u0 + u]);
          add_words(part[m][0], _mm256_maddubs_epi16(w0, xv));
          add_words(part[m][1], _mm256_maddubs_epi16(w1, xv));
        }
      }
      GP_UNROLL
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < 2; ++v)
          acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(part[m][v], ones));
    }
    GP_UNROLL
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < 2; ++v) {
        float* at = c + m * NT + v * VL;
        // vpmaddwd multiplies the lower halves: zero points are not negative.
        const __m256i less = _mm256_madd_epi16(_mm256_set1_epi32(x.sums[m * RUNS + run]),
                                               load32(w.zeros + run * NT + v * VL));
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(acc[m][v], less));
        const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(w.scales + run * NT + v * VL),
                                           _mm256_set1_ps(x.scales[m * RUNS + run]));
        const __m256 before = add || run > 0 ? _mm256_loadu_ps(at) : _mm256_setzero_ps();
        _mm256_storeu_ps(at, _mm256_fmadd_ps(sum, scale, before));
      }
  }
}
#endif

// STEP codes of x in the order of the units, and the sum of each run.
template <int RUN>
static void to_units(const int8_t* q, int8_t* out, int32_t* sums) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  for (int64_t i = 0; i < STEP; i += 16) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_shuffle_epi8(v, order));
  }
  for (int run = 0; run < STEP / RUN; ++run) {
    int32_t sum = 0;
    for (int i = 0; i < RUN; ++i) sum += q[run * RUN + i];
    sums[run] = sum;
  }
}

template <int RUN>
static bool many(const QuantMatmulArgs& a, const GroupGrid& grid, const Codes& x) {
  constexpr int64_t RUNS = STEP / RUN;
  const int64_t n = a.w.n, chunk = a.m < M_CHUNK ? a.m : M_CHUNK, threads = a.threads;
  const int64_t steps = grid.steps, stride = grid.runs + SPARE;
  Scratch codes(steps * chunk * STEP), x_scales(steps * chunk * RUNS * 4);
  Scratch sums(steps * chunk * RUNS * 4);
  Scratch panels(threads * UNITS * NT * 4), outputs(threads * chunk * NT * 4);
  // Of the rows of a panel, in its order: scales and zero points of all runs.
  Scratch scales(threads * grid.runs * NT * 4), zeros(threads * grid.runs * NT * 4);
  Scratch room(threads * 2 * stride * 4);
  if (!codes.ok() || !x_scales.ok() || !sums.ok() || !panels.ok() || !outputs.ok() || !scales.ok() ||
      !zeros.ok() || !room.ok())
    return false;
  for (int64_t m0 = 0; m0 < a.m; m0 += M_CHUNK) {
    const int64_t mm = a.m - m0 < M_CHUNK ? a.m - m0 : M_CHUNK;
    parallel_for(mm, threads, [&](int64_t m, int) {
      const float* of_groups = x.scales.as<float>() + (m0 + m) * x.groups;
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t at = s * mm + m;
        to_units<RUN>(x.codes.as<int8_t>() + (m0 + m) * x.stride + s * STEP,
                      codes.as<int8_t>() + at * STEP, sums.as<int32_t>() + at * RUNS);
        for (int64_t r = 0; r < RUNS; ++r) {
          const int64_t g = (s * STEP + r * RUN) / grid.group;
          x_scales.as<float>()[at * RUNS + r] = g < grid.groups ? of_groups[g] : 0.0f;
        }
      }
    });
    parallel_for((n + NT - 1) / NT, threads, [&](int64_t item, int thread) {
      const KeepSubnormals keep;
      int32_t* panel = panels.as<int32_t>() + thread * UNITS * NT;
      float* c = outputs.as<float>() + thread * chunk * NT;
      float* scratch = room.as<float>() + thread * 2 * stride;
      float* w_scales = scales.as<float>() + thread * grid.runs * NT;
      int32_t* w_zeros = zeros.as<int32_t>() + thread * grid.runs * NT;
      const int64_t n0 = item * NT, nn = n - n0 < NT ? n - n0 : NT;
      for (int64_t r = 0; r < NT; ++r) {
        const int64_t row = n0 + (r < nn ? r : 0);
        const float* from = grid.scales(a.w, row, scratch, scratch + stride);
        for (int64_t i = 0; i < grid.runs; ++i) w_scales[i * NT + r] = from[i];
        int32_t* zero = reinterpret_cast<int32_t*>(scratch);
        if (a.w.zero_point) grid.zeros(a.w, row, zero, zero + stride);
        for (int64_t i = 0; i < grid.runs; ++i)
          w_zeros[i * NT + r] = a.w.zero_point ? zero[stride + i] : 8;
      }
      for (int64_t s = 0; s < steps; ++s) {
        for (int64_t r = 0; r < nn && s + 1 < steps; ++r)
          prefetch(a.w.qdata + (n0 + r) * grid.row_bytes + (s + 1) * STEP_BYTES);
        pack_panel(a.w, grid, n0, s * STEP_BYTES, panel);
        for (int64_t v = 0; v < NT; v += 2 * VL) {
          const Panel w = {panel + v, w_scales + s * RUNS * NT + v, w_zeros + s * RUNS * NT + v};
          const auto at = [&](int64_t m) {
            const int64_t i = s * mm + m;
            return Block{codes.as<int8_t>() + i * STEP, x_scales.as<float>() + i * RUNS,
                         sums.as<int32_t>() + i * RUNS};
          };
          int64_t m = 0;
          for (; m + MT <= mm; m += MT) tile<RUN, MT>(at(m), w, c + m * NT + v, s > 0);
          for (; m + 2 <= mm; m += 2) tile<RUN, 2>(at(m), w, c + m * NT + v, s > 0);
          for (; m < mm; ++m) tile<RUN, 1>(at(m), w, c + m * NT + v, s > 0);
        }
      }
      float bias[NT] = {};
      for (int64_t r = 0; r < nn && a.bias; ++r) bias[r] = load_one(a.bias, n0 + r, a.bias_dtype);
      for (int64_t m = 0; m < mm; ++m) {
        for (int64_t r = 0; r < NT; ++r) c[m * NT + r] += bias[r];
        store_row(offset(a.y, (m0 + m) * n + n0, a.dtype), c + m * NT, nn, a.dtype);
      }
    });
  }
  return true;
}
#else
template <int RUN>
static bool many(const QuantMatmulArgs& a, const GroupGrid& grid, const Codes& x) {
  return few<RUN>(a, grid, x);
}
#endif

}  // namespace GP_ISA
}  // namespace gp
