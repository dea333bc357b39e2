// int4 weights against a few rows of x in int8: W is read as it lies. Included by its kernel only.
#pragma once

#include "cpu/quant_matmul_int4_int8.h"

namespace gp {
namespace GP_ISA {

constexpr int MAX_X = 4;  // rows of x that share one reading of W
constexpr int MAX_W = 4;  // rows of W that share a load of x

// One row of x as `dot` takes it: of each 2 * HALF codes the even ones, then the odd ones; and of
// each step, 64 bytes of sums of codes that stand in one lane.
#if defined(__AVX512F__)
constexpr int64_t HALF = 64;
static GP_DOT void lay_out(const int8_t* q, const GroupGrid& grid, int8_t* x, uint8_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1), none = _mm512_setzero_si512();
  for (int64_t s = 0; s < grid.steps; ++s, x += STEP) {
    for (int64_t j = 0; j < HALF; ++j) {
      x[j] = q[s * STEP + 2 * j];
      x[HALF + j] = q[s * STEP + 2 * j + 1];
    }
    const __m512i even = _mm512_dpbusd_epi32(none, ones, _mm512_loadu_si512(x));
    _mm512_storeu_si512(sums + s * 64, _mm512_dpbusd_epi32(even, ones, _mm512_loadu_si512(x + HALF)));
  }
}
#elif defined(__AVX2__)
constexpr int64_t HALF = 32;
static __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static void lay_out(const int8_t* q, const GroupGrid& grid, int8_t* x, uint8_t* sums) {
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t s = 0; s < grid.steps; ++s, x += STEP, sums += 64) {
    __m256i sum[2];
    for (int h = 0; h < 2; ++h) {
      int8_t* out = x + 2 * HALF * h;
      for (int64_t j = 0; j < HALF; ++j) {
        out[j] = q[s * STEP + 2 * HALF * h + 2 * j];
        out[HALF + j] = q[s * STEP + 2 * HALF * h + 2 * j + 1];
      }
      sum[h] = _mm256_add_epi16(_mm256_maddubs_epi16(ones, load32(out)),
                                _mm256_maddubs_epi16(ones, load32(out + HALF)));
    }
    if (grid.run == STEP) sum[0] = _mm256_add_epi16(sum[0], sum[1]);
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 32 * h),
                          _mm256_madd_epi16(sum[h], _mm256_set1_epi16(1)));
  }
}
#else
static void lay_out(const int8_t* q, const GroupGrid& grid, int8_t* x, uint8_t*) {
  std::memcpy(x, q, size_t(grid.steps * STEP));
}
#endif

// R rows of W and M of x from one step on, for `steps` of them.
struct Piece {
  int64_t steps;
  const uint8_t* w;
  int64_t w_stride;
  const int8_t* x;
  const uint8_t* sums;    // of x
  int64_t x_steps;        // from one row of x to the next
  const float* scales;    // of W times those of x: [R][M][scale_stride]
  const int32_t* zeros;   // [R][scale_stride]
  int64_t scale_stride;
};

// out[r * MAX_X + m] += the product of row r of W and row m of x. RUN: weights of one scale.
#if defined(__AVX512F__)
template <int RUN, int R, int M>
static GP_DOT void dot(const Piece& p, float* out) {
  const __m512i mask = _mm512_set1_epi8(15);
  alignas(64) int32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = 8 * i / RUN;
  const __m512i of_lane = _mm512_load_si512(lanes);
  __m512 acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  for (int64_t s = 0; s < p.steps; ++s) {
    const int64_t first = s * (STEP / RUN);
    for (int r = 0; r < R; ++r) {
      const uint8_t* at = p.w + r * p.w_stride + s * STEP_BYTES;
      prefetch(at + R * p.w_stride);
      const __m512i v = _mm512_loadu_si512(at);
      const __m512i lo = _mm512_and_si512(v, mask);
      const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
      const __m512i zero = _mm512_permutexvar_epi32(
          of_lane, _mm512_loadu_si512(p.zeros + r * p.scale_stride + first));
      for (int m = 0; m < M; ++m) {
        const int8_t* x = p.x + (m * p.x_steps + s) * STEP;
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), lo, _mm512_loadu_si512(x));
        sum = _mm512_dpbusd_epi32(sum, hi, _mm512_loadu_si512(x + HALF));
        // vpmaddwd multiplies the lower halves: zero points are not negative.
        sum = _mm512_sub_epi32(
            sum, _mm512_madd_epi16(_mm512_loadu_si512(p.sums + (m * p.x_steps + s) * 64), zero));
        const __m512 scale = _mm512_permutexvar_ps(
            of_lane, _mm512_loadu_ps(p.scales + (r * M + m) * p.scale_stride + first));
        acc[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[r][m]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * MAX_X + m] += v_sum({acc[r][m]});
}
#elif defined(__AVX2__)
// The value of the run of each lane, of those from p on that half a step has.
template <int RUN>
GP_INLINE inline __m256 of_lanes(const float* p) {
  if (RUN != 32) return _mm256_broadcast_ss(p);
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                  _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}
template <int RUN, int R, int M>
static GP_DOT void dot(const Piece& p, float* out) {
  // Parts of a step that meet their scales at once, and vectors of bytes in each.
  constexpr int PARTS = RUN == 128 ? 1 : 2, BYTES = 2 / PARTS;
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = _mm256_setzero_ps();
  for (int64_t s = 0; s < p.steps; ++s)
    for (int part = 0; part < PARTS; ++part) {
      const int64_t first = s * (STEP / RUN) + part * (64 / RUN);
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = p.w + r * p.w_stride + s * STEP_BYTES + 32 * part;
        if (part == 0) prefetch(at + R * p.w_stride);
        __m256i lo[BYTES], hi[BYTES];
        for (int b = 0; b < BYTES; ++b) {
          const __m256i v = load32(at + 32 * b);
          lo[b] = _mm256_and_si256(v, mask);
          hi[b] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
        }
        const __m256i zero = _mm256_castps_si256(of_lanes<RUN>(
            reinterpret_cast<const float*>(p.zeros + r * p.scale_stride + first)));
        for (int m = 0; m < M; ++m) {
          const int8_t* x = p.x + (m * p.x_steps + s) * STEP + 64 * part;
          // 15 * 127 * 2 for each of at most four: 16 bits hold it.
          __m256i two[BYTES];
          for (int b = 0; b < BYTES; ++b)
            two[b] = _mm256_add_epi16(_mm256_maddubs_epi16(lo[b], load32(x + 64 * b)),
                                      _mm256_maddubs_epi16(hi[b], load32(x + 64 * b + HALF)));
          const __m256i products = BYTES == 1 ? two[0] : _mm256_add_epi16(two[0], two[BYTES - 1]);
          const __m256i sums = load32(p.sums + (m * p.x_steps + s) * 64 + 32 * part);
          // vpmaddwd multiplies the lower halves: zero points are not negative.
          const __m256i sum = _mm256_sub_epi32(_mm256_madd_epi16(products, ones),
                                               _mm256_madd_epi16(sums, zero));
          acc[r][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum),
                                      of_lanes<RUN>(p.scales + (r * M + m) * p.scale_stride + first),
                                      acc[r][m]);
        }
      }
    }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * MAX_X + m] += v_sum({acc[r][m]});
}
#else
template <int RUN, int R, int M>
static void dot(const Piece& p, float* out) {
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m)
      for (int64_t i = 0; i < p.steps * (STEP / RUN); ++i) {
        const uint8_t* w = p.w + r * p.w_stride + i * RUN / 2;
        const int8_t* x = p.x + m * p.x_steps * STEP + i * RUN;
        const int32_t zero = p.zeros[r * p.scale_stride + i];
        int32_t sum = 0;
        for (int j = 0; j < RUN; ++j) sum += ((j % 2 ? w[j / 2] >> 4 : w[j / 2] & 15) - zero) * x[j];
        out[r * MAX_X + m] += float(sum) * p.scales[(r * M + m) * p.scale_stride + i];
      }
}
#endif

template <int RUN, int M>
static void dot_rows(int64_t rows, const Piece& p, float* out) {
  constexpr int R = MAX_W / M;
  Piece at = p;
  for (; rows > 0;) {
    const int64_t done = rows >= R ? R : 1;
    if (done == R) dot<RUN, R, M>(at, out);
    else dot<RUN, 1, M>(at, out);
    rows -= done;
    out += done * MAX_X;
    at.w += done * p.w_stride;
    at.scales += done * M * p.scale_stride;
    at.zeros += done * p.scale_stride;
  }
}

template <int RUN>
static bool few(const QuantMatmulArgs& a, const GroupGrid& grid, const Codes& x) {
  const int64_t n = a.w.n, m = a.m, stride = grid.runs + SPARE;
  const int threads = n * grid.k < (1 << 18) ? 1 : a.threads;
  int64_t rows = MAX_W;  // of W in one item: some 256 KiB
  while (rows < 128 && rows * grid.k < (1 << 19) && rows * 2 * threads < n) rows *= 2;
  const int64_t floats = (MAX_W * MAX_X + MAX_W + 1) * stride, ints = MAX_W * stride;
  Scratch codes(m * grid.steps * STEP), sums(m * grid.steps * 64), x_scales(m * grid.runs * 4);
  Scratch room(threads * (floats + ints) * 4);
  if (!codes.ok() || !sums.ok() || !x_scales.ok() || !room.ok()) return false;
  for (int64_t i = 0; i < m; ++i) {
    lay_out(x.codes.as<int8_t>() + i * x.stride, grid, codes.as<int8_t>() + i * grid.steps * STEP,
            sums.as<uint8_t>() + i * grid.steps * 64);
    grid.spread(x.scales.as<float>() + i * x.groups, x_scales.as<float>() + i * grid.runs);
  }
  const int64_t whole = grid.k / STEP;
  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    float* scratch = room.as<float>() + thread * (floats + ints);
    float *w_scales = scratch + stride, *scales = w_scales + MAX_W * stride;
    int32_t* zeros = reinterpret_cast<int32_t*>(scratch + floats);
    if (!a.w.zero_point)
      for (int64_t i = 0; i < ints; ++i) zeros[i] = 8;
    const float* of_w[MAX_W];
    const int64_t end = (item + 1) * rows < n ? (item + 1) * rows : n;
    for (int64_t r0 = item * rows; r0 < end; r0 += MAX_W) {
      const int64_t count = end - r0 < MAX_W ? end - r0 : MAX_W;
      const uint8_t* w = a.w.qdata + r0 * grid.row_bytes;
      uint8_t last[MAX_W * STEP_BYTES] = {};  // what follows the last whole step
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(last + r * STEP_BYTES, w + r * grid.row_bytes + whole * STEP_BYTES,
                    size_t(grid.row_bytes - whole * STEP_BYTES));
        of_w[r] = grid.scales(a.w, r0 + r, scratch, w_scales + r * stride);
        if (a.w.zero_point)
          grid.zeros(a.w, r0 + r, reinterpret_cast<int32_t*>(scratch), zeros + r * stride);
      }
      for (int64_t m0 = 0; m0 < m; m0 += MAX_X) {
        const int64_t mm = m - m0 < MAX_X ? m - m0 : MAX_X;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t i = 0; i < mm; ++i) {
            const float* of_x = x_scales.as<float>() + (m0 + i) * grid.runs;
            float* both = scales + (r * mm + i) * stride;
            for (int64_t g = 0; g < grid.runs; ++g) both[g] = of_w[r][g] * of_x[g];
          }
        Piece p = {whole, w, grid.row_bytes, codes.as<int8_t>() + m0 * grid.steps * STEP,
                   sums.as<uint8_t>() + m0 * grid.steps * 64, grid.steps, scales, zeros, stride};
        float out[MAX_W * MAX_X] = {};
        auto* product = mm == 1 ? &dot_rows<RUN, 1> : mm == 2 ? &dot_rows<RUN, 2>
            : mm == 3 ? &dot_rows<RUN, 3> : &dot_rows<RUN, 4>;
        product(count, p, out);
        if (whole < grid.steps) {
          p.steps = 1;
          p.w = last;
          p.w_stride = STEP_BYTES;
          p.x += whole * STEP;
          p.sums += whole * 64;
          p.scales += whole * (STEP / RUN);
          p.zeros += whole * (STEP / RUN);
          product(count, p, out);
        }
        for (int64_t r = 0; r < count; ++r) {
          const float bias = a.bias ? load_one(a.bias, r0 + r, a.bias_dtype) : 0.0f;
          for (int64_t i = 0; i < mm; ++i)
            store_one(a.y, (m0 + i) * n + r0 + r, out[r * MAX_X + i] + bias, a.dtype);
        }
      }
    }
  });
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
