// int8 weights against many rows of x in int8: panels of W are laid out anew. Included by its kernel
// only.
#pragma once

#include "cpu/quant_matmul_codes.h"
#include "cpu/transpose.h"

namespace gp {
namespace GP_ISA {

#if defined(__AVX2__)
// Columns are taken four at a time, a unit, by instructions that multiply unsigned bytes by signed
// ones. W becomes w + s in even columns and s - w in odd ones, where x changes its sign to fit:
//   (w[i] + s) x[i] + (s - w[i+1]) (-x[i+1]) = w[i] x[i] + w[i+1] x[i+1] + s (x[i] - x[i+1])
// The last term, the excess, needs nothing of W but s, and x alike in neighbours makes it small.
// A register tile is MT rows of x by NV vectors of rows of W.
//
// AVX2 has vpmaddubsw, which adds two products in 16 bits, and saturates. With the units of a group
// added in 16 bits before they widen, 32 products take two instructions and a half, where vpmaddwd on
// 16-bit integers takes four (EPYC 9004, in registers: 40 products a cycle against 26; 33 for activations
// of 7 bits, which widen at once). That is exact where two bounds hold, which are looked at for every
// tile and group, so that any codes give exact sums:
//   no saturation: two x of one sign times 2 s stay within 16 bits (x of two signs always do);
//   no overflow: sums wrap, so the true one has to fit, whose square is at most the sum of squares of
//     w times that of x (Cauchy-Schwarz).
// With normal x and W 4 % of groups fail the first and none the second; with x of like magnitudes and
// either sign all do, and take twice the time.
#if defined(__AVX512F__)
constexpr int MT = 12, NV = 2;
#else
constexpr int MT = 4, NV = 2;
#endif
constexpr int64_t NT = NV * VL;   // rows of W in a panel
constexpr int64_t UNITS = 128;    // of a panel in the first-level cache
constexpr int64_t GROUP = 4;      // units, 16 columns
constexpr int64_t GROUPS = UNITS / GROUP;
constexpr int64_t MOST_PANELS = 4;
constexpr int64_t M_CHUNK = 512;  // rows of x that share a panel

// Of groups of units. x: the largest sum of two neighbours, or 1. W: 2 s. Of both: the largest quarter of a
// sum of squares in a 16-bit lane, rounded up.
struct Bounds {
  int32_t most[GROUPS], energy[GROUPS];
};
// For w and x within these the sums of a group, at most 4 (energy energy)^(1/2), fit 16 bits; -128
// counts as 127 there.
constexpr int32_t MOST_LIMIT = 32767, ENERGY_LIMIT = 8127 * 8127;

// A block of MT rows of x, in odd columns with the other sign; of NT rows of W, with s for even and
// for odd columns in a 32-bit lane.
struct XTile {
  int32_t units[UNITS][MT];
#if defined(__AVX512F__)
  int32_t excess[MT];  // of the block, negative
#else
  int32_t sums[GROUPS][MT];  // of a group, in each 16-bit lane, negative
  Bounds bounds;
#endif
};
struct Panel {
  int32_t units[UNITS][NT];
#if !defined(__AVX512F__)
  int32_t shifts[GROUPS];
  Bounds bounds;
#endif
};

#if !defined(__AVX512F__)
// The largest of eight, as unsigned integers of 16 bits.
static int32_t most_of(__m128i v) {
  const __m128i ones = _mm_set1_epi16(-1);
  return 0xffff ^ _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(v, ones)), 0);
}
static int32_t most_of(__m256i v) {
  return most_of(_mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
#endif

// The units of NT rows from column k0 on, `units` (a multiple of 16) of them. By way of a copy: lines
// of rows that are pages apart drive each other out of the first-level cache.
static void pack_panel(const QuantWeight& w, int64_t n0, int64_t k0, int64_t units, Panel& panel) {
  constexpr int64_t STRIDE = UNITS * 4;
  alignas(64) int8_t rows[NT * STRIDE];
  const int64_t bytes = units * 4, there = w.k - k0 < bytes ? w.k - k0 : bytes;
  for (int64_t r = 0; r < NT; ++r) {
    const int64_t taken = n0 + r < w.n ? there : 0;
    std::memcpy(rows + r * STRIDE, w.qdata + (taken ? (n0 + r) * w.k + k0 : 0), size_t(taken));
    std::memset(rows + r * STRIDE + taken, 0, size_t(bytes - taken));
  }
#if defined(__AVX512F__)
  const __m256i flip = _mm256_set1_epi16(0x7f80);  // s is 128 and 127
#else
  const __m256i signs = _mm256_set1_epi16(int16_t(0xff01)), low = _mm256_set1_epi16(255);
#endif
  const auto at = [](int32_t* p) { return reinterpret_cast<__m256i*>(p); };
  for (int64_t u = 0; u < units; u += 8) {
#if !defined(__AVX512F__)
    __m256i most[2], energy[2];
    for (int g = 0; g < 2; ++g) most[g] = energy[g] = _mm256_setzero_si256();
#endif
    for (int64_t r = 0; r < NT; r += 8) {
      __m256 block[8];
      for (int64_t j = 0; j < 8; ++j)
        block[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows + (r + j) * STRIDE + u * 4));
      transpose8(block);
#if defined(__AVX512F__)
      for (int64_t j = 0; j < 8; ++j)
        _mm256_storeu_si256(at(panel.units[u + j] + r),
                            _mm256_xor_si256(_mm256_castps_si256(block[j]), flip));
#else
      for (int64_t g = 0; g < 2; ++g) {
        __m256i sum = _mm256_set1_epi16(GROUP);  // each quarter is rounded down
        for (int64_t j = g * GROUP; j < (g + 1) * GROUP; ++j) {
          const __m256i v = _mm256_castps_si256(block[j]), size = _mm256_abs_epi8(v);
          const __m256i most127 = _mm256_min_epu8(size, _mm256_set1_epi8(127));
          sum = _mm256_add_epi16(sum, _mm256_srli_epi16(_mm256_maddubs_epi16(most127, most127), 2));
          most[g] = _mm256_max_epu8(most[g], size);
          _mm256_storeu_si256(at(panel.units[u + j] + r), _mm256_sign_epi8(v, signs));
        }
        energy[g] = _mm256_max_epu16(energy[g], sum);
      }
#endif
    }
#if !defined(__AVX512F__)
    for (int64_t g = 0; g < 2; ++g) {
      const int32_t s = most_of(
          _mm256_max_epu16(_mm256_and_si256(most[g], low), _mm256_srli_epi16(most[g], 8)));
      // 128 is too much for odd columns: such a group is never within the bounds.
      const int32_t odd = s < 127 ? s : 127;
      panel.shifts[u / GROUP + g] = s | odd << 16;
      panel.bounds.most[u / GROUP + g] = s < 128 ? 2 * s : MOST_LIMIT + 1;
      panel.bounds.energy[u / GROUP + g] = most_of(energy[g]);
      const __m256i shift = _mm256_set1_epi16(int16_t(s | odd << 8));
      for (int64_t j = u + g * GROUP; j < u + (g + 1) * GROUP; ++j)
        for (int64_t r = 0; r < NT; r += 8) {
          __m256i* p = at(panel.units[j] + r);
          _mm256_storeu_si256(p, _mm256_add_epi8(_mm256_loadu_si256(p), shift));
        }
    }
#endif
  }
}

// A row of x for a tile: `units` of them, from q on.
static void to_units(const int8_t* q, int64_t m, int64_t units, XTile& tile) {
  const __m128i signs = _mm_set1_epi16(int16_t(0xff01));
  for (int64_t u = 0; u < units; u += GROUP) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + u * 4));
    const __m128i x = _mm_sign_epi8(v, signs);
    alignas(16) int32_t four[GROUP];
    _mm_store_si128(reinterpret_cast<__m128i*>(four), x);
    for (int64_t i = 0; i < GROUP; ++i) tile.units[u + i][m] = four[i];
#if defined(__AVX512F__)
    const __m128i excess = _mm_maddubs_epi16(_mm_set1_epi16(0x7f80), x);
    _mm_store_si128(reinterpret_cast<__m128i*>(four), _mm_madd_epi16(excess, _mm_set1_epi16(1)));
    for (int64_t i = 0; i < GROUP; ++i) tile.excess[m] -= four[i];
#else
    const auto by_lane = [](__m128i a) {  // the sums of even 16-bit lanes and of odd ones
      a = _mm_add_epi16(a, _mm_shuffle_epi32(a, 0x4e));
      return _mm_add_epi16(a, _mm_shuffle_epi32(a, 0xb1));
    };
    const __m128i size = _mm_abs_epi8(x), two = _mm_maddubs_epi16(_mm_set1_epi8(1), x);
    tile.sums[u / GROUP][m] = _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), by_lane(two)));
    const int32_t most = most_of(_mm_or_si128(_mm_abs_epi16(two), _mm_set1_epi16(1)));
    const int32_t energy = most_of(_mm_add_epi16(
        by_lane(_mm_srli_epi16(_mm_maddubs_epi16(size, size), 2)), _mm_set1_epi16(GROUP)));
    int32_t &mosts = tile.bounds.most[u / GROUP], &energies = tile.bounds.energy[u / GROUP];
    mosts = mosts > most ? mosts : most;
    energies = energies > energy ? energies : energy;
#endif
  }
}

// c[m][0..NT) += the sum over `units` of x[u][m] * w[u][0..NT), for M rows of x.
#if defined(__AVX512F__)
template <int M>
GP_DOT void tile(int64_t units, const XTile& x, const Panel& w, int32_t (*c)[NT]) {
  __m512i acc[M][NV];
  GP_UNROLL
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v)
      acc[m][v] = _mm512_add_epi32(_mm512_loadu_si512(c[m] + v * VL), _mm512_set1_epi32(x.excess[m]));
  for (int64_t u = 0; u < units; ++u) {
    const __m512i w0 = _mm512_loadu_si512(w.units[u]), w1 = _mm512_loadu_si512(w.units[u] + VL);
    GP_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m512i xv = _mm512_set1_epi32(x.units[u][m]);
      acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], w0, xv);
      acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], w1, xv);
      // GCC would store each sum at every step.
      asm volatile("" : "+v"(acc[m][0]), "+v"(acc[m][1]));
    }
  }
  GP_UNROLL
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) _mm512_storeu_si512(c[m] + v * VL, acc[m][v]);
}
#else
static __m256i load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static void add_to(int32_t* p, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_add_epi32(load(p), v));
}
// a += b. GCC would take all products first, which leaves it no registers.
GP_INLINE inline void add_words(__m256i& a, __m256i b) {
  asm volatile("vpaddw %1, %0, %0" : "+x"(a) : "x"(b));
}
GP_INLINE inline void add_ints(__m256i& a, __m256i b) {
  asm volatile("vpaddd %1, %0, %0" : "+x"(a) : "x"(b));
}

enum Kind { NARROW, WIDE, SPLIT };

// One group. Sums that do not fit 16 bits widen at once (WIDE); where two products may saturate they
// are taken apart (SPLIT).
template <int M, Kind KIND>
GP_INLINE inline void group(const XTile& x, const Panel& w, int64_t g, int32_t (*c)[NT]) {
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi16(255);
  __builtin_prefetch((&x)[1].units[g * GROUP], 0, 3);  // a line, of the next tile
  const __m256i shift = _mm256_set1_epi32(w.shifts[g]);  // of even and odd columns
  const __m256i even = _mm256_set1_epi16(int16_t(w.shifts[g] & 0xffff));
  const __m256i odd = _mm256_set1_epi16(int16_t(w.shifts[g] >> 16));
  __m256i acc[M][NV];
  GP_UNROLL
  for (int m = 0; m < M; ++m) {
    const __m256i sums = _mm256_set1_epi32(x.sums[g][m]);
    acc[m][0] = KIND == NARROW ? _mm256_mullo_epi16(sums, shift)
        : KIND == WIDE ? _mm256_madd_epi16(sums, shift) : _mm256_setzero_si256();
    for (int v = 1; v < NV; ++v) acc[m][v] = acc[m][0];
  }
  GP_UNROLL
  for (int u = 0; u < GROUP; ++u) {
    __m256i wv[NV], wo[NV];
    for (int v = 0; v < NV; ++v) {
      wv[v] = load(w.units[g * GROUP + u] + v * VL);
      if (KIND != SPLIT) continue;
      wo[v] = _mm256_sub_epi16(_mm256_srli_epi16(wv[v], 8), odd);
      wv[v] = _mm256_sub_epi16(_mm256_and_si256(wv[v], low), even);
    }
    GP_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m256i xv = _mm256_set1_epi32(x.units[g * GROUP + u][m]);
      const __m256i xe = _mm256_srai_epi16(_mm256_slli_epi16(xv, 8), 8), xo = _mm256_srai_epi16(xv, 8);
      for (int v = 0; v < NV; ++v) {
        if (KIND == NARROW) add_words(acc[m][v], _mm256_maddubs_epi16(wv[v], xv));
        if (KIND == WIDE)
          add_ints(acc[m][v], _mm256_madd_epi16(_mm256_maddubs_epi16(wv[v], xv), ones));
        if (KIND == SPLIT) {
          add_ints(acc[m][v], _mm256_madd_epi16(wv[v], xe));
          add_ints(acc[m][v], _mm256_madd_epi16(wo[v], xo));
        }
      }
    }
  }
  GP_UNROLL
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v)
      add_to(c[m] + v * VL, KIND == NARROW ? _mm256_madd_epi16(acc[m][v], ones) : acc[m][v]);
}

// Bit g: whether the product of a[g] and b[g] is more than the limit.
static uint32_t above(const int32_t* a, const int32_t* b, int32_t limit) {
  uint32_t bits = 0;
  for (int g = 0; g < GROUPS; g += VL) {
    const __m256i product = _mm256_mullo_epi32(load(a + g), load(b + g));
    const __m256 more = _mm256_castsi256_ps(_mm256_cmpgt_epi32(product, _mm256_set1_epi32(limit)));
    bits |= uint32_t(_mm256_movemask_ps(more)) << g;
  }
  return bits;
}

template <int M, Kind KIND>
GP_INLINE inline void groups(uint32_t bits, const XTile& x, const Panel& w, int32_t (*c)[NT]) {
  for (; bits; bits &= bits - 1) group<M, KIND>(x, w, __builtin_ctz(bits), c);
}

template <int M>
static __attribute__((noinline)) void tile(int64_t units, const XTile& x, const Panel& w, int32_t (*c)[NT]) {
  static_assert(GROUPS == 32, "a bit for each");
  const uint32_t all = uint32_t((uint64_t(1) << units / GROUP) - 1);
  const uint32_t split = above(x.bounds.most, w.bounds.most, MOST_LIMIT) & all;
  const uint32_t wide = above(x.bounds.energy, w.bounds.energy, ENERGY_LIMIT) & all & ~split;
  groups<M, NARROW>(all & ~split & ~wide, x, w, c);
  groups<M, WIDE>(wide, x, w, c);
  groups<M, SPLIT>(split, x, w, c);
}
#endif

static bool many(const QuantMatmulArgs& a, const Codes& x) {
  const int64_t n = a.w.n, units = x.stride / 4;  // a multiple of 16
  const int64_t chunk = a.m < M_CHUNK ? a.m : M_CHUNK;
  const int64_t threads = a.threads, blocks = (units + UNITS - 1) / UNITS;
  // Panels that go through a block of x one after the other: fewer where threads would want for work.
  int64_t most = MOST_PANELS;
  while (most > 1 && n < 4 * threads * most * NT) most /= 2;
  const int64_t all = round_up(chunk, MT);
  Scratch xu(blocks * (all / MT) * int64_t(sizeof(XTile))), panels(threads * int64_t(sizeof(Panel)));
  Scratch sums(threads * most * all * NT * 4);
  if (!xu.ok() || !panels.ok() || !sums.ok()) return false;
  for (int64_t m0 = 0; m0 < a.m; m0 += M_CHUNK) {
    const int64_t mm = a.m - m0 < M_CHUNK ? a.m - m0 : M_CHUNK, tiles = round_up(mm, MT) / MT;
    // [block][tile]
    parallel_for(blocks, threads, [&](int64_t b, int) {
      const int64_t uu = units - b * UNITS < UNITS ? units - b * UNITS : UNITS;
      XTile* out = xu.as<XTile>() + b * tiles;
      std::memset(out, 0, size_t(tiles) * sizeof(XTile));
      for (int64_t m = 0; m < mm; ++m)
        to_units(x.codes.as<int8_t>() + (m0 + m) * x.stride + b * UNITS * 4, m % MT, uu, out[m / MT]);
    });
    parallel_for((n + most * NT - 1) / (most * NT), threads, [&](int64_t item, int thread) {
      const KeepSubnormals keep;
      Panel& panel = panels.as<Panel>()[thread];
      auto* c = sums.as<int32_t[NT]>() + thread * most * all;
      const int64_t first = item * most * NT, end = first + most * NT < n ? first + most * NT : n;
      std::memset(c, 0, size_t(most * all * NT) * 4);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t uu = units - b * UNITS < UNITS ? units - b * UNITS : UNITS;
        const int64_t next = (b + 1) * UNITS * 4;  // W, one block ahead
        for (int64_t n0 = first; n0 < end; n0 += NT) {
          for (int64_t r = n0; r < n0 + NT && r < end && next < a.w.k; ++r)
            for (int64_t i = 0; i < UNITS * 4; i += 64) prefetch(a.w.qdata + r * a.w.k + next + i);
          pack_panel(a.w, n0, b * UNITS * 4, uu, panel);
          auto* sum = c + (n0 - first) / NT * all;
          const XTile* xt = xu.as<XTile>() + b * tiles;
          for (int64_t m = 0; m < mm; m += MT, sum += MT, ++xt) {
            if (mm - m > MT / 2) tile<MT>(uu, *xt, panel, sum);
            else if (mm - m > 1) tile<MT / 2>(uu, *xt, panel, sum);
            else tile<1>(uu, *xt, panel, sum);
          }
        }
      }
      for (int64_t n0 = first; n0 < end; n0 += NT) {
        const int64_t nn = end - n0 < NT ? end - n0 : NT;
        float bias[NT] = {}, w_scale[NT] = {}, y[NT];
        for (int64_t r = 0; r < nn; ++r) w_scale[r] = load_one(a.w.scale, n0 + r, a.w.scale_dtype);
        for (int64_t r = 0; r < nn && a.bias; ++r) bias[r] = load_one(a.bias, n0 + r, a.bias_dtype);
        const auto* sum = c + (n0 - first) / NT * all;
        for (int64_t m = 0; m < mm; ++m, ++sum) {
          const float x_scale = x.scales.as<float>()[m0 + m];
          for (int64_t r = 0; r < NT; ++r) y[r] = float((*sum)[r]) * w_scale[r] * x_scale + bias[r];
          store_row(offset(a.y, (m0 + m) * n + n0, a.dtype), y, nn, a.dtype);
        }
      }
    });
  }
  return true;
}
#endif

}  // namespace GP_ISA
}  // namespace gp
