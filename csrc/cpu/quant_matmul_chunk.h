// 4-bit weights a chunk at a time, as floats in registers. Included by kernels only.
//
// A chunk is 8*VL weights in 4*VL bytes, decoded to eight vectors w[0..7]; element(j, i) says which
// weight of the chunk stands in lane i of w[j]. A lane holds weights of one run of 8 (codecs for
// narrow groups) or of one half of the chunk (by byte planes), so that products can be summed over a
// chunk before they meet their lane's scale.
#pragma once

#include "cpu/quant_matmul_decode.h"

namespace gp {
namespace GP_ISA {

constexpr int CHUNK = 8 * VL;
constexpr int CHUNK_BYTES = 4 * VL;

// Values of groups of g weights (a multiple of 8), as vectors over the lanes of a chunk.
class Lanes {
 public:
  explicit Lanes(int64_t g) : g_(g) {
    while (shift_ < 62 && int64_t(1) << shift_ < g) ++shift_;
    power_ = int64_t(1) << shift_ == g;
    for (int i = 0; i < VL; ++i) lane_[i] = int32_t(8 * i / g);
  }
  // Whether each chunk lies in one group.
  bool one_group() const { return power_ && g_ >= CHUNK; }
  int64_t group(int64_t e) const { return e >> shift_; }
  // For the chunk that begins at weight e; values[0] is that of weights 0..g-1.
  template <bool OneGroup>
  GP_INLINE vf at(const float* values, int64_t e) const {
    if (OneGroup) return v_set(values[group(e)]);
#if defined(__AVX512F__)
    if (power_) return {_mm512_permutexvar_ps(_mm512_load_si512(lane_),
                                              _mm512_loadu_ps(values + group(e)))};
#elif defined(__AVX2__)
    if (power_) return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(values + group(e)),
                                                 _mm256_load_si256((const __m256i*)lane_))};
#endif
    float lanes[VL];
    for (int i = 0; i < VL; ++i) lanes[i] = values[(e + 8 * i) / g_];
    return v_load(lanes);
  }

 private:
  int64_t g_;
  int shift_ = 3;
  bool power_;
  alignas(64) int32_t lane_[16];
};

// Zero points of int4 groups: as they are stored, and (for narrow groups) as floats.
struct Zeros {
  const uint8_t* codes;
  const float* values;
};

// The sums of the even and of the odd vectors of a decoded chunk times x, in its order.
GP_INLINE inline void multiply_chunk(const vf* w, const float* x, vf& even, vf& odd) {
  even = v_mul(w[0], v_load(x));
  odd = v_mul(w[1], v_load(x + VL));
  for (int j = 2; j < 8; j += 2) {
    even = v_fma(w[j], v_load(x + j * VL), even);
    odd = v_fma(w[j + 1], v_load(x + (j + 1) * VL), odd);
  }
}

// Codecs: decode(p, zeros, lanes, e, w) decodes the chunk at p, which begins at weight e of the
// groups that `zeros` describes.

#if defined(__AVX2__) && !defined(__AVX512F__)

template <bool IS_FP4>
struct BookCodec {
  Lut lut = make_lut(IS_FP4 ? FP4 : NF4);
  static int element(int j, int i) {
    const int byte = 4 * (j & 3) + (i & 3) + (i < 4 ? 0 : 16);
    return 2 * byte + (j < 4 ? 0 : 1);
  }
  GP_INLINE void decode(const uint8_t* p, const Zeros&, const Lanes&, int64_t, vf* w) const {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i mask = _mm256_set1_epi8(15);
    __m256 f[8];
    lookup32(lut, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask), f);
    lookup32(lut, _mm256_and_si256(v, mask), f + 4);
    for (int j = 0; j < 8; ++j) w[j] = {f[j]};
  }
};

template <bool HasZero, bool OneGroup>
struct Int4Codec {
  static int element(int j, int i) {
    const int byte = (j & 2 ? 8 : 0) + 2 * (i & 3) + (j & 1) + (i < 4 ? 0 : 16);
    return 2 * byte + (j < 4 ? 0 : 1);
  }
  GP_INLINE void decode(const uint8_t* p, const Zeros& zeros, const Lanes& lanes, int64_t e,
                        vf* w) const {
    const CodeLut lut(HasZero ? zeros.codes[lanes.group(e)] : 8);
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i mask = _mm256_set1_epi8(15);
    __m256 f[8];
    lut.lookup(_mm256_and_si256(v, mask), f);
    lut.lookup(_mm256_and_si256(_mm256_srli_epi16(v, 4), mask), f + 4);
    for (int j = 0; j < 8; ++j) w[j] = {f[j]};
  }
};

// Several groups in a chunk. A nibble at bit 4j of a float's mantissa, under the exponent of
// 2^(23-4j), is that power plus the code; subtracting power and zero point in one step is exact.
template <bool HasZero>
struct Int4Codec<HasZero, false> {
  static int element(int j, int i) { return 8 * i + (j >> 1) + 4 * (j & 1); }
  GP_INLINE void decode(const uint8_t* p, const Zeros& zeros, const Lanes& lanes, int64_t e,
                        vf* w) const {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i h = _mm256_srli_epi32(v, 16);
    const vf zero = HasZero ? lanes.at<false>(zeros.values, e) : v_set(8.0f);
    two<0>(v, h, zero, w);
    two<1>(v, h, zero, w + 2);
    two<2>(v, h, zero, w + 4);
    two<3>(v, h, zero, w + 6);
  }

 private:
  template <int J>
  GP_INLINE static void two(__m256i v, __m256i h, vf zero, vf* w) {
    const __m256i mask = _mm256_set1_epi32(15 << 4 * J);
    const __m256 power = _mm256_set1_ps(float(1 << (23 - 4 * J)));
    const __m256 base = _mm256_add_ps(power, zero.v);
    const __m256 a = _mm256_or_ps(_mm256_castsi256_ps(_mm256_and_si256(v, mask)), power);
    const __m256 b = _mm256_or_ps(_mm256_castsi256_ps(_mm256_and_si256(h, mask)), power);
    w[0] = {_mm256_sub_ps(a, base)};
    w[1] = {_mm256_sub_ps(b, base)};
  }
};

#else

#if defined(__AVX512F__)
using Chunk = __m512i;
static inline Chunk load_chunk(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <int J>
GP_INLINE inline vf look(Lut table, Chunk v) {
  // vpermps looks at the low four bits of each lane alone.
  return {_mm512_permutexvar_ps(J ? _mm512_srli_epi32(v, 4 * J) : v, table)};
}
#else
using Chunk = uint32_t;
static inline Chunk load_chunk(const uint8_t* p) {
  return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}
template <int J>
GP_INLINE inline vf look(Lut table, Chunk v) { return {table[v >> 4 * J & 15]}; }
#endif

GP_INLINE inline void look_all(Lut table, Chunk v, vf* w) {
  w[0] = look<0>(table, v);
  w[1] = look<1>(table, v);
  w[2] = look<2>(table, v);
  w[3] = look<3>(table, v);
  w[4] = look<4>(table, v);
  w[5] = look<5>(table, v);
  w[6] = look<6>(table, v);
  w[7] = look<7>(table, v);
}

template <bool IS_FP4>
struct BookCodec {
  Lut table = make_lut(IS_FP4 ? FP4 : NF4);
  static int element(int j, int i) { return 8 * i + (j ^ 1); }
  GP_INLINE void decode(const uint8_t* p, const Zeros&, const Lanes&, int64_t, vf* w) const {
    look_all(table, load_chunk(p), w);
  }
};

template <bool HasZero, bool OneGroup>
struct Int4Codec {
  Lut table = make_lut(HasZero ? UNSIGNED_CODES : SIGNED_CODES);
  static int element(int j, int i) { return 8 * i + j; }
  GP_INLINE void decode(const uint8_t* p, const Zeros& zeros, const Lanes& lanes, int64_t e,
                        vf* w) const {
#if defined(__AVX512F__)
    if (HasZero && OneGroup) {
      const vf zero = v_set(float(zeros.codes[lanes.group(e)]));
      return look_all(_mm512_sub_ps(table, zero.v), load_chunk(p), w);
    }
#endif
    look_all(table, load_chunk(p), w);
    if (!HasZero) return;
    const vf zero =
        OneGroup ? v_set(float(zeros.codes[lanes.group(e)])) : lanes.at<false>(zeros.values, e);
    for (int j = 0; j < 8; ++j) w[j] = v_sub(w[j], zero);
  }
};

#endif

}  // namespace GP_ISA
}  // namespace gp
