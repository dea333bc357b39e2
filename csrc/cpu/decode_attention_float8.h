// Rows of a float8_e4m3fn cache as fp16: what the tiles of an fp16 cache then read.
#pragma once

#include "cpu/decode_attention_tile.h"

namespace gp {
namespace GP_ISA {

// fp16 has one bit more of exponent, whose bias is 15, not 7: a code's bits, moved there, stand for its
// value divided by this, subnormals included.
constexpr float FLOAT8_UNIT = 256.0f;

// n codes, a multiple of STEP.
static inline void float8_to_half(const char* from, uint16_t* to, int64_t n) {
#if defined(__AVX2__)
  // The largest of the codes doubled, which drops the sign, says whether there is a NaN.
  __m256i top = _mm256_setzero_si256();
  const auto move = [&](int64_t i) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_and_si256(words, _mm256_set1_epi16(int16_t(0xbf80))));
    return codes;
  };
  int64_t at = 0;
#pragma GCC unroll 4
  for (; at + 32 <= n; at += 32) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
    top = _mm256_max_epu8(top, _mm256_add_epi8(codes, codes));
    move(at), move(at + 16);
  }
  if (at < n) {
    const __m256i codes = _mm256_zextsi128_si256(move(at));
    top = _mm256_max_epu8(top, _mm256_add_epi8(codes, codes));
  }
  const __m256i nan = _mm256_cmpeq_epi8(top, _mm256_set1_epi8(int8_t(0xfe)));
  if (_mm256_testz_si256(nan, nan)) return;
#endif
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t code = uint8_t(from[i]), magnitude = code & 0x7f;
    to[i] = uint16_t((code & 0x80) << 8 | (magnitude == 0x7f ? 0x7e00 : magnitude << 7));
  }
}

}  // namespace GP_ISA
}  // namespace gp
