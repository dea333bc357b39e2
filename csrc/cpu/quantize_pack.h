// Codes of 2 to 4 bits put together. Included by kernels only.
#pragma once

#include <cstring>

#include "cpu/quantize_simd.h"
#include "cpu/quantize_work.h"

namespace gp {
namespace GP_ISA {

// Packs the codes (0..15) that code(i) gives for lanes i..i+VL and code.part(i, n) for fewer; the
// even element takes the high nibble where HIGH_FIRST. An odd last element is paired with `pad`.
template <bool HIGH_FIRST, class F>
static inline void pack_nibbles(uint8_t* q, int64_t n, int pad, const F& code) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m128i weights = _mm_set1_epi16(HIGH_FIRST ? 0x0110 : 0x1001);
  for (; i + 16 <= n; i += 16) {
    const __m128i bytes = _mm512_cvtepi32_epi8(code(i).v);
    const __m128i pairs = _mm_maddubs_epi16(bytes, weights);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i / 2), _mm_packus_epi16(pairs, pairs));
  }
#elif defined(__AVX2__)
  const __m256i weights = _mm256_set1_epi16(HIGH_FIRST ? 0x0110 : 0x1001);
  for (; i + 32 <= n; i += 32) {
    const __m256i ab = _mm256_packs_epi32(code(i).v, code(i + 8).v);
    const __m256i cd = _mm256_packs_epi32(code(i + 16).v, code(i + 24).v);
    // Pairs as words a01 a23 b01 b23 c01 c23 d01 d23 | a45 a67 b45 ...
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_packus_epi16(ab, cd), weights);
    const __m128i both = _mm_packus_epi16(_mm256_castsi256_si128(pairs),
                                          _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i / 2),
                     _mm_unpacklo_epi16(both, _mm_unpackhi_epi64(both, both)));
  }
#endif
  uint8_t codes[VL + 2];
  while (i < n) {
    const int64_t step = least(n - i, VL == 1 ? 2 : VL);
    if (VL == 1) {
      i_store_bytes(codes, code(i));
      if (step == 2) i_store_bytes(codes + 1, code(i + 1));
    } else {
      i_store_bytes(codes, step == VL ? code(i) : code.part(i, step));
    }
    codes[step] = uint8_t(pad);
    for (int64_t j = 0; j < step; j += 2) {
      const int even = codes[j], odd = codes[j + 1];
      q[(i + j) / 2] = uint8_t(HIGH_FIRST ? even << 4 | odd : odd << 4 | even);
    }
    i += step;
  }
}

// The eight codes of BITS bits that stand in the bytes of v, as one number, the first one lowest.
template <int BITS>
static inline uint32_t pack_eight(uint64_t v) {
  constexpr uint64_t two = (1u << 2 * BITS) - 1, four = (1ull << 4 * BITS) - 1;
  v = (v | v >> (8 - BITS)) & two * 0x0001000100010001;
  v = (v | v >> (16 - 2 * BITS)) & four * 0x0000000100000001;
  return uint32_t(v | v >> (32 - 4 * BITS));
}

// The inverse.
template <int BITS>
static inline uint64_t unpack_eight(uint32_t packed) {
  constexpr uint64_t one = (1u << BITS) - 1, two = (1u << 2 * BITS) - 1, four = (1ull << 4 * BITS) - 1;
  uint64_t v = packed;
  v = (v | v << (32 - 4 * BITS)) & four * 0x0000000100000001;
  v = (v | v << (16 - 2 * BITS)) & two * 0x0001000100010001;
  return (v | v << (8 - BITS)) & one * 0x0101010101010101;
}

// `count` codes, at most eight, from a byte each to where they are packed; those behind are 0.
template <int BITS>
static inline void store_eight(uint8_t* q, const uint8_t* codes, int64_t count) {
  uint64_t eight;
  std::memcpy(&eight, codes, 8);
  const uint32_t packed = pack_eight<BITS>(eight);
  if (count == 8) std::memcpy(q, &packed, BITS);
  else std::memcpy(q, &packed, size_t(ceil_div(count * BITS, 8)));
}

// `count` packed codes, at most eight.
template <int BITS>
static inline uint32_t load_eight(const uint8_t* q, int64_t count) {
  uint32_t packed = 0;
  if (count == 8) std::memcpy(&packed, q, BITS);
  else std::memcpy(&packed, q, size_t(ceil_div(count * BITS, 8)));
  return packed;
}

}  // namespace GP_ISA
}  // namespace gp
