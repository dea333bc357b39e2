// Rows of x as 15-bit integers, which meet 4-bit codes as 16-bit integers and are summed in 32 bits.
// Included by kernels only; AVX2 and AVX-512 (scalar kernels keep to floats).
//
// Each chunk of a row of x has a unit, a power of two, under which its largest magnitude has 14 bits:
// a bf16 keeps all its bits within 2^-6 of that, an fp16 within 2^-3. A second term takes what the
// first leaves, under a unit 2^14 smaller. Whether a row goes this way, and in how many terms, depends
// on the row alone.
//
// The bound of the sums: a lane adds 8 products, two in each of 4 vectors. A code is at most
// 16320 in magnitude, and a term of at most 11 significant bits (bf16, fp16) at most 2^14 - 2^3;
// 8 * 16320 * (2^14 - 2^3) < 2^31.
#pragma once

#include "cpu/quant_matmul_chunk.h"
#include "cpu/quantize_simd.h"

#if defined(__AVX2__)

namespace gp {
namespace GP_ISA {

constexpr int TERM_BITS = 14;
constexpr int MAX_TERMS = 2;
// Units stay normal floats, and far enough from either end for scales to meet them.
constexpr int MIN_EXPONENT = -60, MAX_EXPONENT = 100;

// The integer that stands for 1.0. The codes of nf4 are then integers within 0.25 (2^-15.9 of the
// largest), nearer than with any other from 2^13 to 2^14; those of fp4 are integers.
constexpr int NF4_UNIT = 15684, FP4_UNIT = 16320;
static_assert(8 * int64_t(FP4_UNIT) * ((1 << TERM_BITS) - 8) < int64_t(1) << 31 &&
              NF4_UNIT <= FP4_UNIT, "sums of a chunk must fit 32 bits");

// One term of a chunk of x.
struct alignas(32) FixedChunk {
  int16_t x[CHUNK];  // in the codec's order
  float unit[VL];    // the same in every lane
  float sum[VL];     // of x, by lane
};

// What rounding x loses, and what it may lose: the sums of squares.
struct Loss {
  double lost = 0, allowed = 0;
  bool bearable() const { return lost <= allowed; }
};

// The part of each number that may be lost: a quarter and a half of what rounding to the dtype takes.
static inline float tolerance(DType t) { return t == DType::bf16 ? 0x1p-11f : 0x1p-12f; }

// CHUNK numbers as `terms` chunks, `stride` apart; order[i] is the place of out->x[i] among them. An
// error counts against `tolerance` of every number, but no number allows more than half a unit: so
// a few large ones do not excuse the loss of all others. Returns false where there is no unit (an
// infinity, a NaN, or too large).
static inline bool fix_chunk(const float* x, const int* order, int terms, float tolerance,
                             FixedChunk* out, int64_t stride, Loss& loss) {
  vi most = i_set(0);
  for (int i = 0; i < CHUNK; i += VL) most = i_max(most, as_int(v_abs(v_load(x + i))));
  const int top = (i_hmax(most) >> 23) - 127;
  if (top > MAX_EXPONENT) return false;
  const int shift = TERM_BITS - 1 - (top < MIN_EXPONENT ? MIN_EXPONENT : top);
  float unit = bits_to_float(uint32_t(127 - shift) << 23);
  float into = bits_to_float(uint32_t(127 + shift) << 23);
  alignas(64) float left[CHUNK];
  alignas(64) int32_t whole[CHUNK];
  for (int i = 0; i < CHUNK; i += VL) v_store(left + i, v_load(x + i));
  for (int t = 0; t < terms; ++t, out += stride) {
    for (int i = 0; i < CHUNK; i += VL) {
      const vf v = v_mul(v_load(left + i), v_set(into));
      const vi rounded = to_int(v);
      v_store(left + i, v_sub(v, to_float(rounded)));  // exact
      std::memcpy(whole + i, &rounded, sizeof(rounded));
    }
    for (int i = 0; i < CHUNK; ++i) out->x[i] = int16_t(whole[order[i]]);
    for (int i = 0; i < VL; ++i) {
      int32_t sum = 0;
      for (int j = 0; j < CHUNK; j += 2 * VL) sum += out->x[j + 2 * i] + out->x[j + 2 * i + 1];
      out->sum[i] = float(sum);
      out->unit[i] = unit;
    }
    if (t + 1 == terms) break;
    unit *= 1.0f / (1 << TERM_BITS);
    into = float(1 << TERM_BITS);
  }
  vf lost = v_zero(), allowed = v_zero();
  const float part = tolerance / unit;
  for (int i = 0; i < CHUNK; i += VL) {
    const vf e = v_load(left + i);
    const vf may = v_min(v_mul(v_abs(v_load(x + i)), v_set(part)), v_set(0.5f));
    lost = v_fma(e, e, lost);
    allowed = v_fma(may, may, allowed);
  }
  loss.lost += double(v_sum(lost)) * unit * unit;
  loss.allowed += double(v_sum(allowed)) * unit * unit;
  return true;
}

// --- vectors of 16-bit integers ------------------------------------------------------------------

#if defined(__AVX512F__)
using Words = __m512i;
GP_INLINE inline Words load_words(const void* p) { return _mm512_loadu_si512(p); }
GP_INLINE inline Words low_nibbles(Words v) { return _mm512_and_si512(v, _mm512_set1_epi16(15)); }
template <int N>
GP_INLINE inline Words shift_words(Words v) { return N ? _mm512_srli_epi16(v, N) : v; }
GP_INLINE inline vi multiply_add(Words a, Words b) { return {_mm512_madd_epi16(a, b)}; }
// A table of 16 integers, twice: vpermw looks at the low five bits of each word alone.
template <class F>
static inline Words make_words(F&& value) {
  alignas(64) int16_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = int16_t(value(i & 15));
  return _mm512_load_si512(values);
}
GP_INLINE inline void look_words(Words table, Words v, Words* w) {
  w[0] = _mm512_permutexvar_epi16(v, table);
  w[1] = _mm512_permutexvar_epi16(shift_words<4>(v), table);
  w[2] = _mm512_permutexvar_epi16(shift_words<8>(v), table);
  w[3] = _mm512_permutexvar_epi16(shift_words<12>(v), table);
}
#else
using Words = __m256i;
GP_INLINE inline Words load_words(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
GP_INLINE inline Words low_nibbles(Words v) { return _mm256_and_si256(v, _mm256_set1_epi16(15)); }
template <int N>
GP_INLINE inline Words shift_words(Words v) { return N ? _mm256_srli_epi16(v, N) : v; }
GP_INLINE inline vi multiply_add(Words a, Words b) { return {_mm256_madd_epi16(a, b)}; }
#endif

// The sum of a chunk's products by lane.
GP_INLINE inline vf multiply_words(const Words* w, const FixedChunk& x) {
  vi sum[4];
  for (int j = 0; j < 4; ++j) sum[j] = multiply_add(w[j], load_words(x.x + 2 * j * VL));
  return to_float(i_add(i_add(sum[0], sum[1]), i_add(sum[2], sum[3])));
}

// --- codecs --------------------------------------------------------------------------------------

// As the codecs of floats (quant_matmul_chunk.h), for integers: decode(p, zeros, lanes, e, w) makes
// words of the chunk at p, element(i) is the weight of its word i, multiply adds a product, `scale` by
// lane, and `unit` is what a sum is multiplied by at last.

template <bool IS_FP4>
class FixedBook {
 public:
  static constexpr int UNIT = IS_FP4 ? FP4_UNIT : NF4_UNIT;
  static constexpr float unit = 1.0f / UNIT;
  using X = FixedChunk;
  static constexpr int SUMS = 1;
  struct Weights {
    Words w[4];
  };
#if defined(__AVX512F__)
  static int element(int i) { return 4 * (i % 32) + (i / 32 ^ 1); }
  GP_INLINE void decode(const uint8_t* p, const Zeros&, const Lanes&, int64_t, Weights& w) const {
    look_words(table_, load_words(p), w.w);
  }
#else
  FixedBook() {
    alignas(16) uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      low[i] = uint8_t(code(i));
      high[i] = uint8_t(uint16_t(code(i)) >> 8);
    }
    low_ = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low)));
    high_ = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)));
  }
  static int element(int i) {
    const int word = i % 16, byte = word / 8 * 16 + (i / 16 & 1) * 8 + word % 8;
    return 2 * byte + i / 32;
  }
  GP_INLINE void decode(const uint8_t* p, const Zeros&, const Lanes&, int64_t, Weights& w) const {
    const Words v = load_words(p), mask = _mm256_set1_epi8(15);
    look(_mm256_and_si256(_mm256_srli_epi16(v, 4), mask), w.w);
    look(_mm256_and_si256(v, mask), w.w + 2);
  }
#endif
  GP_INLINE static void multiply(const Weights& w, const FixedChunk& x, vf scale, vf* acc) {
    *acc = v_fma(multiply_words(w.w, x), v_mul(scale, v_load(x.unit)), *acc);
  }

 private:
  static int16_t code(int i) {
    return int16_t(__builtin_lrintf((IS_FP4 ? FP4 : NF4)[i] * float(UNIT)));
  }
#if defined(__AVX512F__)
  Words table_ = make_words(code);
#else
  GP_INLINE void look(Words index, Words* w) const {
    const Words low = _mm256_shuffle_epi8(low_, index), high = _mm256_shuffle_epi8(high_, index);
    w[0] = _mm256_unpacklo_epi8(low, high);
    w[1] = _mm256_unpackhi_epi8(low, high);
  }
  Words low_, high_;
#endif
};

// Codes stay unsigned; a zero point takes its multiple of the sum of x. Both are exact in floats. With
// AVX-512 a table takes it from the codes, where a chunk has but one.
template <bool HasZero, bool OneGroup>
struct FixedInt4 {
  static constexpr bool IN_TABLE = VL == 16 && (OneGroup || !HasZero);
  static constexpr float unit = 1.0f;
  using X = FixedChunk;
  static constexpr int SUMS = 1;
  struct Weights {
    Words w[4];
    vf minus_zero;
  };
  static int element(int i) { return 4 * (i % (2 * VL)) + i / (2 * VL); }
  GP_INLINE void decode(const uint8_t* p, const Zeros& zeros, const Lanes& lanes, int64_t e,
                        Weights& w) const {
    const Words v = load_words(p);
#if defined(__AVX512F__)
    if (IN_TABLE) {
      const int zero = HasZero ? zeros.codes[lanes.group(e)] : 8;
      return look_words(_mm512_sub_epi16(table, _mm512_set1_epi16(int16_t(zero))), v, w.w);
    }
#endif
    w.w[0] = low_nibbles(v);
    w.w[1] = low_nibbles(shift_words<4>(v));
    w.w[2] = low_nibbles(shift_words<8>(v));
    w.w[3] = shift_words<12>(v);
    w.minus_zero = !HasZero ? v_set(-8.0f)
        : OneGroup ? v_set(-float(zeros.codes[lanes.group(e)]))
                   : v_sub(v_zero(), lanes.at<false>(zeros.values, e));
  }
  GP_INLINE static void multiply(const Weights& w, const FixedChunk& x, vf scale, vf* acc) {
    vf sum = multiply_words(w.w, x);
    if (!IN_TABLE) sum = v_fma(v_load(x.sum), w.minus_zero, sum);
    *acc = v_fma(sum, v_mul(scale, v_load(x.unit)), *acc);
  }
#if defined(__AVX512F__)
  Words table = make_words([](int i) { return i; });
#endif
};

}  // namespace GP_ISA
}  // namespace gp

#else

namespace gp {
namespace GP_ISA {
template <bool IS_FP4>
class FixedBook;
template <bool HasZero, bool OneGroup>
struct FixedInt4;
}  // namespace GP_ISA
}  // namespace gp

#endif
