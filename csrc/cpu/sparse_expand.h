// Eight columns of a sparse row as floats, zeros in their places. Included by kernels only.
//
// With AVX2 (and AVX-512, where 256-bit vectors already keep up with memory) it is one byte shuffle:
// the byte of the index that describes the 8 columns chooses 32 bytes which move the kept values to
// their lanes, to the upper end of each, and set everything else to zero.
#pragma once

#include "cpu/quant_matmul_decode.h"
#include "cpu/sparse_matmul.h"

namespace gp {
namespace GP_ISA {

constexpr int UNIT = 8;

constexpr int value_width(SparseValue kind) {
  return kind == SparseValue::f32 ? 4 : kind == SparseValue::i8 ? 1 : 2;
}

// Which of a unit's stored values stands in column c, or -1.
template <bool TwoFour>
constexpr int value_of(int byte, int c) {
  if (TwoFour) {
    const int nibble = c < 4 ? byte & 15 : byte >> 4;
    if ((nibble >> 2) == c % 4) return c / 4 * 2 + 1;
    return (nibble & 3) == c % 4 ? c / 4 * 2 : -1;
  }
  if (!(byte >> c & 1)) return -1;
  int rank = 0;
  for (int i = 0; i < c; ++i) rank += byte >> i & 1;
  return rank;
}

// 4-bit codes as int8, two a byte.
inline void unpack_nibbles(const uint8_t* p, int64_t bytes, uint8_t* out) {
  int64_t i = 0;
#if defined(__AVX2__)
  const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  for (; i + 16 <= bytes; i += 16) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
    const __m128i lo = _mm_sub_epi8(_mm_and_si128(b, mask), eight);
    const __m128i hi = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(b, 4), mask), eight);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i), _mm_unpacklo_epi8(lo, hi));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i + 16), _mm_unpackhi_epi8(lo, hi));
  }
#endif
  for (; i < bytes; ++i) {
    out[2 * i] = uint8_t((p[i] & 15) - 8);
    out[2 * i + 1] = uint8_t((p[i] >> 4) - 8);
  }
}

GP_INLINE inline int64_t count_of(bool two_four, uint8_t byte) {
  return two_four ? 4 : __builtin_popcount(byte);
}

#if defined(__AVX2__)

template <bool TwoFour, int Width>
struct Shuffles {
  alignas(32) uint8_t bytes[256][32];
  constexpr Shuffles() : bytes() {
    for (int byte = 0; byte < 256; ++byte)
      for (int c = 0; c < UNIT; ++c) {
        int value = value_of<TwoFour>(byte, c);
        // Values of 4 bytes: each half of the vector is filled from its own half of the unit.
        if (Width == 4 && c >= 4 && value >= 0) {
          int before = 0;
          for (int i = 0; i < 4; ++i) before += value_of<TwoFour>(byte, i) >= 0;
          value -= TwoFour ? 0 : before;
        }
        for (int i = 0; i < 4; ++i) {
          const int at = i - (4 - Width);
          bytes[byte][4 * c + i] = value < 0 || at < 0 ? 0x80 : uint8_t(value * Width + at);
        }
      }
  }
};

template <bool TwoFour>
struct HalfShuffles {
  alignas(16) uint8_t bytes[256][16];
  constexpr HalfShuffles() : bytes() {
    for (int byte = 0; byte < 256; ++byte)
      for (int c = 0; c < UNIT; ++c)
        for (int i = 0; i < 2; ++i) {
          const int value = value_of<TwoFour>(byte, c);
          bytes[byte][2 * c + i] = value < 0 ? 0x80 : uint8_t(2 * value + i);
        }
  }
};

template <bool TwoFour, int Width>
constexpr Shuffles<TwoFour, Width> SHUFFLES{};
template <bool TwoFour>
constexpr HalfShuffles<TwoFour> HALF_SHUFFLES{};

template <class T>
GP_INLINE inline T load_as(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}
GP_INLINE inline __m128i load128(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Reads 16 bytes at v (f32 bitmask: 32), of which those of the unit's values count.
template <SparseValue Kind, bool TwoFour>
GP_INLINE inline __m256 expand(const uint8_t* v, uint8_t byte) {
  if (Kind == SparseValue::f16) {
    const __m128i table = load128(HALF_SHUFFLES<TwoFour>.bytes[byte]);
    const __m128i q = TwoFour ? _mm_set1_epi64x(load_as<int64_t>(v)) : load128(v);
    return _mm256_cvtph_ps(_mm_shuffle_epi8(q, table));
  }
  constexpr int W = value_width(Kind);
  const __m256i table = _mm256_load_si256(
      reinterpret_cast<const __m256i*>(SHUFFLES<TwoFour, W>.bytes[byte]));
  __m256i q;
  if (Kind == SparseValue::f32) {
    q = TwoFour ? _mm256_broadcastsi128_si256(load128(v))
                : _mm256_set_m128i(load128(v + 4 * __builtin_popcount(byte & 15)), load128(v));
  } else if (Kind == SparseValue::bf16) {
    q = TwoFour ? _mm256_set1_epi64x(load_as<int64_t>(v))
                : _mm256_broadcastsi128_si256(load128(v));
  } else {
    q = TwoFour ? _mm256_set1_epi32(load_as<int32_t>(v))
                : _mm256_set1_epi64x(load_as<int64_t>(v));
  }
  q = _mm256_shuffle_epi8(q, table);
  return Kind == SparseValue::i8 ? _mm256_cvtepi32_ps(_mm256_srai_epi32(q, 24))
                                 : _mm256_castsi256_ps(q);
}

using Unit = __m256;
GP_INLINE inline Unit unit_zero() { return _mm256_setzero_ps(); }
GP_INLINE inline Unit unit_load(const float* p) { return _mm256_loadu_ps(p); }
GP_INLINE inline void unit_store(float* p, Unit a) { _mm256_storeu_ps(p, a); }
GP_INLINE inline Unit unit_fma(Unit a, Unit b, Unit c) { return _mm256_fmadd_ps(a, b, c); }
GP_INLINE inline Unit unit_add(Unit a, Unit b) { return _mm256_add_ps(a, b); }
GP_INLINE inline Unit unit_set(float a) { return _mm256_set1_ps(a); }
GP_INLINE inline Unit unit_mul(Unit a, Unit b) { return _mm256_mul_ps(a, b); }

#else

struct Unit { float f[UNIT]; };
inline Unit unit_zero() { return {}; }
inline Unit unit_load(const float* p) { Unit u; std::memcpy(u.f, p, sizeof(u.f)); return u; }
inline void unit_store(float* p, const Unit& a) { std::memcpy(p, a.f, sizeof(a.f)); }
inline Unit unit_fma(const Unit& a, const Unit& b, Unit c) {
  for (int i = 0; i < UNIT; ++i) c.f[i] += a.f[i] * b.f[i];
  return c;
}
inline Unit unit_add(Unit a, const Unit& b) {
  for (int i = 0; i < UNIT; ++i) a.f[i] += b.f[i];
  return a;
}
inline Unit unit_set(float a) {
  Unit u;
  for (int i = 0; i < UNIT; ++i) u.f[i] = a;
  return u;
}
inline Unit unit_mul(Unit a, const Unit& b) {
  for (int i = 0; i < UNIT; ++i) a.f[i] *= b.f[i];
  return a;
}

template <SparseValue Kind, bool TwoFour>
inline Unit expand(const uint8_t* v, uint8_t byte) {
  Unit out;
  for (int c = 0; c < UNIT; ++c) {
    const int value = value_of<TwoFour>(byte, c);
    out.f[c] = value < 0 ? 0.0f
        : Kind == SparseValue::i8 ? float(int8_t(v[value]))
        : load_one(v, value, Kind == SparseValue::f32 ? DType::f32
                           : Kind == SparseValue::bf16 ? DType::bf16 : DType::f16);
  }
  return out;
}

#endif

}  // namespace GP_ISA
}  // namespace gp
