// int8 and fp8 weights against a few rows of x: bound by memory. Whatever the number of rows of x and
// of W that are taken together, a product of two rows is one vector sum over 512 weights at a time
// (128 where scales have blocks or groups), these sums added up in order, the scale of a row applied
// last.
#include "common/parallel.h"
#include "cpu/quant_matmul_decode.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int MAX_ROWS = 4;      // rows of x that share one conversion in registers
constexpr int MAX_W_ROWS = 8;    // rows of W that share a load of x: 8 sums in flight, with any x
constexpr int64_t SPAN = 512;    // weights between two additions to the total
constexpr int64_t LINE = 64;

// Formats whose codes are an fp16 further up, but for those from `special` on: NaN, and infinity.
template <QuantFormat F>
constexpr bool is_half() { return F == QuantFormat::fp8 || F == QuantFormat::fp8_e3m4; }
template <QuantFormat F>
constexpr char special() { return F == QuantFormat::fp8 ? 0x7f : 0x70; }

// AVX2 takes bytes apart by shifts where it can, since conversions want the same units as permutations do:
// those at odd places come first, then the others, and x is laid out so. (EPYC 9004, two threads: 27 GB/s of
// fp8, 24 with bytes in order.)
template <QuantFormat F>
constexpr bool turned() {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return is_half<F>();
#else
  return false;
#endif
}
template <QuantFormat F>
constexpr int vectors() { return turned<F>() ? 4 : 2; }
template <QuantFormat F>
constexpr int step() { return vectors<F>() * VL; }
// Where column c of a step lies.
template <QuantFormat F>
constexpr int place(int c) { return turned<F>() ? (c % 2 ? 0 : 16) + c / 2 : c; }

// A step of codes without their scale, times `1 / lift<F>()`. With vectors, a special code comes out as
// a number: `Specials` finds it.
template <QuantFormat F>
GP_INLINE inline void load_step(const uint8_t* p, vf* out) {
#if defined(__AVX2__)
  constexpr int up = F == QuantFormat::fp8 ? 7 : 6;
  constexpr int16_t bits = F == QuantFormat::fp8 ? E4M3_BITS : E3M4_BITS;
#endif
#if defined(__AVX512F__)
  if (is_half<F>()) {
    const __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(w, up), _mm512_set1_epi16(bits));
    out[0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(half))};
    out[1] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1))};
    return;
  }
#elif defined(__AVX2__)
  if (turned<F>()) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    for (int odd = 1; odd >= 0; --odd, out += 2) {
      const __m256i top = _mm256_srai_epi16(odd ? w : _mm256_slli_epi16(w, 8), 8 - up);
      const __m256i half = _mm256_and_si256(top, _mm256_set1_epi16(bits));
      out[0] = {_mm256_cvtph_ps(_mm256_castsi256_si128(half))};
      out[1] = {_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
    }
    return;
  }
  if (F == QuantFormat::fp8_e5m2) {
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), zero = _mm_setzero_si128();
    out[0] = {_mm256_cvtph_ps(_mm_unpacklo_epi8(zero, w))};
    out[1] = {_mm256_cvtph_ps(_mm_unpackhi_epi8(zero, w))};
    return;
  }
#endif
  for (int i = 0; i < vectors<F>(); ++i) out[i] = load_codes<F>(p + i * VL);
}

#if defined(__AVX2__)
template <QuantFormat F>
constexpr float lift() {
  return F == QuantFormat::fp8 ? E4M3_LIFT : F == QuantFormat::fp8_e3m4 ? E3M4_LIFT : 1.0f;
}

// Whether a special code was among those seen: the largest magnitude.
template <QuantFormat F>
struct Specials {
  __m256i most = _mm256_setzero_si256();
  GP_INLINE void see(const uint8_t* p) {  // LINE of them
    const __m256i magnitude = _mm256_set1_epi8(0x7f);
    for (int i = 0; i < LINE; i += 32) {
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
      most = _mm256_max_epu8(most, _mm256_and_si256(b, magnitude));
    }
  }
  bool any() const {
    return _mm256_movemask_epi8(_mm256_cmpgt_epi8(most, _mm256_set1_epi8(special<F>() - 1))) != 0;
  }
};
#else
template <QuantFormat F>
constexpr float lift() { return 1.0f; }
template <QuantFormat F>
struct Specials {
  void see(const uint8_t*) {}
  bool any() const { return false; }
};
#endif

// The factors of the sums of 128 columns in blocked and grouped formats, `stride` apart from one row
// to the next (0 in a block of 128 x 128); null where a row has one scale.
struct BlockScales {
  const float* of;
  int64_t stride;
};

// sums[r][m] (a vector each) += columns k0..k1-1 of R rows of W times M rows of x. k0 is a multiple
// of SPAN; x has zeros from column k on. Returns whether a special code was read as a number.
template <QuantFormat F, int R, int M>
bool dot_rows(const uint8_t* w, int64_t k, int64_t k0, int64_t k1, const float* x, int64_t x_stride,
              BlockScales block_scales, float* sums, int64_t sums_stride) {
  const int64_t span = block_scales.of ? 128 : SPAN;
  Specials<F> specials;
  for (; k0 < k1; k0 += span) {
    const int64_t end = k0 + span < k1 ? k0 + span : k1;
    vf acc[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) acc[r][m] = v_zero();
    vf x_step[M][vectors<F>()];
    const auto load_x = [&](int64_t i) GP_INLINE {
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < vectors<F>(); ++v) x_step[m][v] = v_load(x + m * x_stride + i + v * VL);
    };
    const auto add = [&](int r, const uint8_t* p) GP_INLINE {
      vf w_step[vectors<F>()];
      load_step<F>(p, w_step);
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < vectors<F>(); ++v)
          acc[r][m] = v_fma(w_step[v], x_step[m][v], acc[r][m]);
    };
    int64_t i = k0;
    for (; i + LINE <= end; i += LINE) {
      for (int r = 0; r < R; ++r) {
        prefetch(w + (R + r) * k + i);
        if (is_half<F>()) specials.see(w + r * k + i);
      }
      GP_UNROLL
      for (int u = 0; u < LINE; u += step<F>()) {
        load_x(i + u);
        for (int r = 0; r < R; ++r) add(r, w + r * k + i + u);
      }
    }
    for (; i < end; i += step<F>()) {
      load_x(i);
      for (int r = 0; r < R; ++r) {
        uint8_t tail[LINE] = {};
        std::memcpy(tail, w + r * k + i, size_t(end - i < step<F>() ? end - i : step<F>()));
        if (is_half<F>()) specials.see(tail);
        add(r, tail);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) {
        float* sum = sums + r * sums_stride + m * VL;
        const vf total = v_load(sum);
        if (block_scales.of) {
          const float scale = block_scales.of[r * block_scales.stride + k0 / 128];
          v_store(sum, v_fma(acc[r][m], v_set(scale), total));
        } else {
          v_store(sum, v_add(total, acc[r][m]));
        }
      }
  }
  return specials.any();
}

// `count` (at most MAX_W_ROWS) rows of W against at most MAX_ROWS of x.
template <QuantFormat F>
bool dot(int64_t count, int64_t m, const uint8_t* w, int64_t k, int64_t k0, int64_t k1,
         const float* x, int64_t x_stride, BlockScales block_scales, float* sums,
         int64_t sums_stride) {
  bool special = false;
  int64_t r = 0;
  const auto rows = [&](auto* f, int64_t step) {
    for (; r + step <= count; r += step, block_scales.of += step * block_scales.stride)
      special |= f(w + r * k, k, k0, k1, x, x_stride, block_scales, sums + r * sums_stride, sums_stride);
  };
  if (m == 1 && !turned<F>()) rows(&dot_rows<F, 8, 1>, 8);
  if (m == 1) rows(&dot_rows<F, 4, 1>, 4);
  if (m == 2) rows(&dot_rows<F, 4, 2>, 4);
  if (m == 3) rows(&dot_rows<F, 2, 3>, 2);
  if (m >= 4) rows(&dot_rows<F, 2, 4>, 2);
  rows(m == 1 ? &dot_rows<F, 1, 1> : m == 2 ? &dot_rows<F, 1, 2>
     : m == 3 ? &dot_rows<F, 1, 3> : &dot_rows<F, 1, 4>, 1);
  return special;
}

bool all_finite(const float* row, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= row[i] - row[i] == 0.0f;
  return finite;
}

template <QuantFormat F>
bool run(const QuantMatmulArgs& a) {
  const QuantWeight& w = a.w;
  const int64_t n = w.n, k = w.k, m = a.m;
  constexpr int STEP = step<F>();
  const int64_t padded = (k + STEP - 1) / STEP * STEP, blocks = (k + 127) / 128;
  const bool by_group = w.group_size == -128, by_block = w.group_size == 128 || by_group;
  // One thread converts so many in 15 us; waking another takes as long.
  const int threads = n * k < (1 << 18) ? 1 : a.threads;
  // Rows of one item: some 512 KiB, and never across a row of 128x128 blocks. The rows asked for ahead
  // of an item go to the wrong thread (int8, AVX2, two threads: 25 GB/s with items of 64 KiB, 32 now).
  int64_t rows = MAX_W_ROWS;
  while (rows < 128 && rows * k < (1 << 19) && rows * 2 * threads < n) rows *= 2;
  // Pieces of columns, so that the x of all rows takes half of a first-level cache.
  const int64_t piece = 4096 / m / SPAN * SPAN;
  const int64_t sums_stride = m * VL;

  const int64_t item_scales = by_group ? rows * blocks : blocks;
  Scratch packed(m * padded * 4), scales(threads * item_scales * 4), whole(threads * padded * 4);
  Scratch totals(threads * rows * sums_stride * 4);
  if (!packed.ok() || !scales.ok() || !whole.ok() || !totals.ok()) return false;
  float* x = packed.as<float>();
  for (int64_t r = 0; r < m; ++r) {
    load_row(x + r * padded, offset(a.x, r * k, a.dtype), k, a.dtype);
    for (int64_t i = k; i < padded; ++i) x[r * padded + i] = 0.0f;
    for (float* p = x + r * padded; turned<F>() && p < x + (r + 1) * padded; p += STEP) {
      float in_order[STEP];
      std::memcpy(in_order, p, sizeof in_order);
      for (int c = 0; c < STEP; ++c) p[place<F>(c)] = in_order[c];
    }
  }

  const Decoder decoder(w);
  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    float* sums = totals.as<float>() + thread * rows * sums_stride;
    const int64_t r0 = item * rows, count = r0 + rows < n ? rows : n - r0;
    BlockScales block_scales{nullptr, by_group ? blocks : 0};
    if (by_block) {
      float* own = scales.as<float>() + thread * item_scales;
      const int64_t first = (by_group ? r0 : r0 / 128) * blocks;
      load_row(own, offset(w.scale, first, w.scale_dtype), by_group ? count * blocks : blocks,
               w.scale_dtype);
      block_scales.of = own;
    }
    std::memset(sums, 0, size_t(count * sums_stride) * 4);
    bool special = false;
    for (int64_t k0 = 0; k0 < k; k0 += piece)
      for (int64_t r = 0; r < count; r += MAX_W_ROWS) {
        const BlockScales here{by_group ? block_scales.of + r * blocks : block_scales.of,
                               block_scales.stride};
        for (int64_t m0 = 0; m0 < m; m0 += MAX_ROWS)
          special |= dot<F>(count - r < MAX_W_ROWS ? count - r : MAX_W_ROWS, m - m0,
                            w.qdata + (r0 + r) * k, k, k0, k0 + piece < k ? k0 + piece : k,
                            x + m0 * padded, padded, here, sums + r * sums_stride + m0 * VL,
                            sums_stride);
      }
    for (int64_t r = r0; r < r0 + count; ++r) {
      const float scale = lift<F>() * (by_block ? 1.0f
          : load_one(w.scale, w.group_size == 0 ? 0 : r, w.scale_dtype));
      const float bias = a.bias ? load_one(a.bias, r, a.bias_dtype) : 0.0f;
      float* row = whole.as<float>() + thread * padded;
      if (special) decoder.row(r, 0, k, row);  // rare: the rows of such an item are summed one by one
      for (int64_t i = 0; i < m; ++i) {
        float y = v_sum(v_load(sums + (r - r0) * sums_stride + i * VL)) * scale;
        if (special && !all_finite(row, k)) {
          y = 0.0f;
          for (int64_t e = 0; e < k; ++e)
            y += row[e] * x[i * padded + e / STEP * STEP + place<F>(int(e % STEP))];
        }
        store_one(a.y, i * n + r, y + bias, a.dtype);
      }
    }
  });
  return true;
}

}  // namespace

bool quant_matmul_few_8bit(const QuantMatmulArgs& a) {
  switch (a.w.format) {
    case QuantFormat::int8: return run<QuantFormat::int8>(a);
    case QuantFormat::fp8: return run<QuantFormat::fp8>(a);
    case QuantFormat::fp8_e3m4: return run<QuantFormat::fp8_e3m4>(a);
    default: return run<QuantFormat::fp8_e5m2>(a);
  }
}

}  // namespace GP_ISA
}  // namespace gp
