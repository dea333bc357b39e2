// Dropout: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).
//
// Keys 4n .. 4n + 3 of query i take the four words of the counter (n, i, sequence * heads + head, low
// word of offset) under the key (low word of seed, high word of seed xor high word of offset).
#pragma once

#include "cpu/attention.h"
#include "cpu/attention_math.h"

namespace gp {
namespace GP_ISA {

class Dropout {
 public:
  Dropout(const AttentionShape& s, int64_t b, int64_t h)
      : rule_(s.dropout), stream_(uint32_t(b * s.heads + h)) {}
  bool any() const { return rule_.below != 0; }

  // factor[j] for keys k0 + j, lo <= j < hi: 0 where dropped, else what the probability is scaled by.
  void factors(float* factor, int64_t i, int64_t k0, int64_t lo, int64_t hi) const {
    uint32_t word[4 * LANES];
    const int64_t first = (k0 + lo) / 4 * 4;
    for (int64_t key = first; key < k0 + hi; key += 4 * LANES) {
      words(word, uint32_t(key / 4), uint32_t(i));
      const int64_t from = max64(key, k0 + lo), to = min64(key + 4 * LANES, k0 + hi);
      for (int64_t j = from; j < to; ++j)
        factor[j - k0] = word[j - key] < rule_.below ? 0.0f : rule_.keep_scale;
    }
  }

 private:
  static constexpr int LANES = 16;
  static constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;

  // The words of LANES counters from n on.
  void words(uint32_t* out, uint32_t n, uint32_t i) const {
    const uint32_t low = uint32_t(rule_.offset), key0 = uint32_t(rule_.seed);
    const uint32_t key1 = uint32_t(rule_.seed >> 32) ^ uint32_t(rule_.offset >> 32);
#if defined(__AVX2__)
    // 64-bit lanes whose upper halves hold anything: the multiplication does not read them.
    const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
    for (int l = 0; l < LANES; l += 4, n += 4, out += 16) {
      __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
      __m256i c1 = _mm256_set1_epi64x(i), c2 = _mm256_set1_epi64x(stream_);
      __m256i c3 = _mm256_set1_epi64x(low);
      uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round, k0 += W0, k1 += W1) {
        const __m256i a = _mm256_mul_epu32(c0, m0), b = _mm256_mul_epu32(c2, m1);
        c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), c1),
                              _mm256_set1_epi64x(k0));
        c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), c3),
                              _mm256_set1_epi64x(k1));
        c1 = b, c3 = a;
      }
      const __m256i w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
      const __m256i w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
      const __m256i even = _mm256_unpacklo_epi64(w01, w23), odd = _mm256_unpackhi_epi64(w01, w23);
      __m256i* to = reinterpret_cast<__m256i*>(out);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
#else
    for (int l = 0; l < LANES; ++l) {
      uint32_t c0 = n + uint32_t(l), c1 = i, c2 = stream_, c3 = low, k0 = key0, k1 = key1;
      for (int round = 0; round < 10; ++round, k0 += W0, k1 += W1) {
        const uint64_t a = uint64_t{M0} * c0, b = uint64_t{M1} * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
      }
      out[4 * l] = c0, out[4 * l + 1] = c1, out[4 * l + 2] = c2, out[4 * l + 3] = c3;
    }
#endif
  }

  AttentionDropout rule_;
  uint32_t stream_;
};

}  // namespace GP_ISA
}  // namespace gp
