// Rows of a cache of any element type against rows of floats: the two products of decode attention.
//
// STEP elements of a cache row become two vectors, in an order of lanes that suits their type: `lane`
// says where each of them goes. Queries are put into that order before, outputs taken out of it after.
#pragma once

#include "common/simd.h"
#include "cpu/decode_attention.h"

// Keeps a vector that several multiply-adds need in a register: GCC reads it again for each.
#if defined(__AVX2__)
#define GP_IN_REGISTER(x) asm("" : "+v"((x).v))
#else
#define GP_IN_REGISTER(x) (void)0
#endif
// By name: GCC drops calls of a function that does nothing but __builtin_prefetch.
#if defined(__AVX2__)
#define GP_PREFETCH(p) asm volatile("prefetcht1 %0" : : "m"(*(p)))
#else
#define GP_PREFETCH(p) __builtin_prefetch((p), 0, 2)
#endif
// What `pointer` leads to is read where it is used: as many values as registers do not hold.
#define GP_IN_MEMORY(pointer) asm("" : "+r"(pointer))

namespace gp {
namespace GP_ISA {

// acc += a * b, in the register of acc: left to itself GCC copies sums about, and spills some.
static inline void add_product(vf& acc, vf a, vf b) {
#if defined(__AVX2__)
  asm("vfmadd231ps %1, %2, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
#else
  acc = v_fma(a, b, acc);
#endif
}

constexpr int STEP = 2 * VL;
// A function of its own: within another, GCC runs out of registers and doubles its time.
#define GP_TILE __attribute__((noinline)) static

// Vectors that a tile keeps in registers: sums of rows times keys, or weights of rows times keys.
constexpr int TILE = VL == 16 ? 16 : 8;
// Keys of a tile of RT rows. Where an element takes one instruction, there are registers for a third.
template <DType T, int RT>
constexpr int KEYS = (T == DType::f32 || T == DType::bf16 || T == DType::f16) && VL == 8 && RT == 4 ? 3 : TILE / RT;

static inline float e4m3_to_float(uint8_t b) {
  const uint32_t magnitude = b & 0x7fu, sign = uint32_t(b & 0x80u) << 24;
  if (magnitude == 0x7f) return __builtin_nanf("");
  // Through the exponent of a float: 2^120 lifts it by 127 - 7, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 20) * 0x1p120f));
}

// half<H>(p): the first (H = 0) or second vector of the STEP elements at p; both(p) gives the two.
template <DType T>
struct Element;

template <DType T>
struct NaturalOrder {
  static constexpr int lane(int i) { return i; }
  static inline void both(const char* p, vf& x0, vf& x1) {
    x0 = Element<T>::template half<0>(p), x1 = Element<T>::template half<1>(p);
  }
};

template <>
struct Element<DType::f32> : NaturalOrder<DType::f32> {
  static constexpr int bytes = 4;
  template <int H>
  static inline vf half(const char* p) { return v_load(reinterpret_cast<const float*>(p) + H * VL); }
};

#if defined(__AVX2__)
alignas(32) constexpr uint32_t ODD_BF16[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                              0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
#endif

template <>
struct Element<DType::bf16> {
  static constexpr int bytes = 2;
  // Even elements, then odd ones: a shift and a mask, and no shuffle.
  template <int H>
  static inline vf half(const char* p) {
#if defined(__AVX512F__)
    const __m512i w = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(H ? _mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000u)))
                                  : _mm512_slli_epi32(w, 16))};
#elif defined(__AVX2__)
    __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (H == 0) return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16))};
    // The mask from memory: GCC would keep it in the register that a tile needs, and spill a sum.
    asm("vpand %1, %0, %0" : "+x"(w) : "m"(ODD_BF16));
    return {_mm256_castsi256_ps(w)};
#else
    return v_load_bf16(reinterpret_cast<const uint16_t*>(p) + H);
#endif
  }
  static inline void both(const char* p, vf& x0, vf& x1) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    vf w = v_load(reinterpret_cast<const float*>(p));
    GP_IN_REGISTER(w);
    const __m256i bits = _mm256_castps_si256(w.v);
    x0 = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
    x1 = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000u))))};
#else
    x0 = half<0>(p), x1 = half<1>(p);
#endif
  }
  static constexpr int lane(int i) { return i % 2 * VL + i / 2; }
};

template <>
struct Element<DType::f16> : NaturalOrder<DType::f16> {
  static constexpr int bytes = 2;
  template <int H>
  static inline vf half(const char* p) {
    return v_load_f16(reinterpret_cast<const uint16_t*>(p) + H * VL);
  }
};

template <>
struct Element<DType::i8> : NaturalOrder<DType::i8> {
  static constexpr int bytes = 1;
  template <int H>
  static inline vf half(const char* p) {
#if defined(__AVX512F__)
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + H);
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
#elif defined(__AVX2__)
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + H * VL));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))};
#else
    return {float(int8_t(p[H]))};
#endif
  }
};

// The lines that begin in the STEP elements at `at`, of n keys that lie `ahead` after these.
template <int BYTES>
static inline void fetch_ahead(const char* const* keys, int n, int64_t ahead, int64_t at, int64_t d) {
  constexpr int64_t LINE = 64 / BYTES;
  if (d % LINE != 0) return;
  const char* const* next = keys + ahead;
  GP_IN_MEMORY(next);
  for (int k = 0; k < n; ++k)
    for (int64_t e = 0; e < STEP; e += LINE) GP_PREFETCH(next[k] + at + (d + e) * BYTES);
}

// n floats, a multiple of STEP, into the order of the lanes of T, and back.
template <DType T>
static inline void to_lanes(float* out, const float* x, int64_t n) {
  for (int64_t d = 0; d < n; d += STEP)
#pragma GCC unroll 32
    for (int i = 0; i < STEP; ++i) out[d + Element<T>::lane(i)] = x[d + i];
}
template <DType T>
static inline void from_lanes(float* out, const float* x, int64_t n) {
  for (int64_t d = 0; d < n; d += STEP)
#pragma GCC unroll 32
    for (int i = 0; i < STEP; ++i) out[d + i] = x[d + Element<T>::lane(i)];
}

// Any `n` elements to floats in their natural order, for rows that STEP does not divide.
template <DType T>
static inline void unpack_row(float* out, const char* p, int64_t n) {
  if (T != DType::i8 && T != DType::f8e4m3fn) return load_row(out, p, n, T);
  for (int64_t i = 0; i < n; ++i)
    out[i] = T == DType::i8 ? float(int8_t(p[i])) : e4m3_to_float(uint8_t(p[i]));
}

// The sums of the lanes of four vectors, to out[i * step].
static inline void sum_lanes(const vf* acc, float* out, int64_t step) {
#if defined(__AVX2__)
  __m256 x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    x[i] = _mm256_add_ps(_mm512_castps512_ps256(acc[i].v), _mm512_extractf32x8_ps(acc[i].v, 1));
#else
    x[i] = acc[i].v;
#endif
  }
  const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
  const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
  const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
  if (step == 1) return _mm_storeu_ps(out, sums);
  alignas(16) float four[4];
  _mm_store_ps(four, sums);
  for (int i = 0; i < 4; ++i) out[i * step] = four[i];
#else
  for (int i = 0; i < 4; ++i) out[i * step] = acc[i].v;
#endif
}

// acc holds KT vectors for each of RT rows, row by row: their sums to out[k * ld + r].
template <int RT, int KT>
static inline void store_scores(const vf* acc, float* out, int64_t ld) {
  if constexpr (RT == 4) {
#pragma GCC unroll 4
    for (int k = 0; k < KT; ++k) {
      const vf rows[4] = {acc[k], acc[KT + k], acc[2 * KT + k], acc[3 * KT + k]};
      sum_lanes(rows, out + k * ld, 1);
    }
  } else {
#pragma GCC unroll 4
    for (int r = 0; r < RT; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < KT; k += 4) sum_lanes(acc + r * KT + k, out + k * ld + r, ld);
  }
}

// acc += products of the STEP elements at `at` of KT keys and of RT rows of q.
template <DType T, int RT, int KT>
static inline void score_step(const char* const* keys, int64_t at, const float* q, int64_t ldq,
                              vf* acc) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    vf x[KT];
#pragma GCC unroll 16
    for (int k = 0; k < KT; ++k)
      x[k] = h ? Element<T>::template half<1>(keys[k] + at)
               : Element<T>::template half<0>(keys[k] + at);
#pragma GCC unroll 4
    for (int r = 0; r < RT; ++r) {
      const vf y = v_load(q + r * ldq + h * VL);
#pragma GCC unroll 16
      for (int k = 0; k < KT; ++k) add_product(acc[r * KT + k], x[k], y);
    }
  }
}

template <DType T, int RT, int KT>
static inline void score_run(const char* const* keys, int64_t ahead, int64_t at, const float* q,
                             int64_t ldq, int64_t dim, float* out, int64_t ld) {
  vf acc[RT * KT];
#pragma GCC unroll 16
  for (int i = 0; i < RT * KT; ++i) acc[i] = v_zero();
  for (int64_t d = 0; d < dim; d += STEP) {
    fetch_ahead<Element<T>::bytes>(keys, KT, ahead, at, d);
    score_step<T, RT, KT>(keys, at + d * Element<T>::bytes, q + d, ldq, acc);
  }
  store_scores<RT, KT>(acc, out, ld);
}

// out[k * ld + r] = q row r . key k, for RT rows and KEYS keys; dim is a multiple of STEP. The rows of
// the keys that lie `ahead` after them are fetched meanwhile.
template <DType T, int RT>
GP_TILE void score_tile(const char* const* keys, int64_t ahead, int64_t at, const float* q, int64_t ldq,
                        int64_t dim, float* out, int64_t ld) {
  constexpr int KT = KEYS<T, RT>;
  if (VL > 1) return score_run<T, RT, KT>(keys, ahead, at, q, ldq, dim, out, ld);
  // Lanes break up long sums; scalar code needs sums of sums to lose as little to rounding.
  constexpr int64_t RUN = 32;
  float more[RT * KT];
  for (int64_t d = 0; d < dim; d += RUN) {
    score_run<T, RT, KT>(keys, ahead, at + d * Element<T>::bytes, q + d, ldq,
                         dim - d < RUN ? dim - d : RUN, more, RT);
    for (int i = 0; i < RT * KT; ++i) {
      float& to = out[i / RT * ld + i % RT];
      to = d == 0 ? more[i] : to + more[i];
    }
  }
}

// Keys whose values are added at once: their rows, a power of two apart, stay in the L1 cache.
constexpr int VALUE_KEYS = 8;

// sums[r * ld + c] += p[k * ldp + r] * value k [c] for VALUE_KEYS keys and RT rows; dim is a multiple
// of STEP. Sums stay in registers over the keys, weights are broadcast from memory: a load each, where
// a sum read and written back for every two keys cost as many cycles as the multiply-adds.
template <DType T, int RT>
GP_TILE void value_tile(const char* const* values, int64_t ahead, int64_t at, const float* p,
                        int64_t ldp, float* sums, int64_t ld, int64_t dim) {
  alignas(64) float weight[VALUE_KEYS * RT];
  const char* row[VALUE_KEYS];
#pragma GCC unroll 16
  for (int k = 0; k < VALUE_KEYS; ++k) {
    row[k] = values[k] + at;
#pragma GCC unroll 4
    for (int r = 0; r < RT; ++r) weight[k * RT + r] = p[k * ldp + r];
  }
  for (int64_t c = 0; c < dim; c += STEP) {
    fetch_ahead<Element<T>::bytes>(values, VALUE_KEYS, ahead, at, c);
    const float* w = weight;
    GP_IN_MEMORY(w);
    vf acc[2 * RT];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * RT; ++i) acc[i] = v_load(sums + i / 2 * ld + c + i % 2 * VL);
#pragma GCC unroll 16
    for (int k = 0; k < VALUE_KEYS; ++k) {
      const char* step = row[k] + c * Element<T>::bytes;
      vf x0, x1;
      Element<T>::both(step, x0, x1);
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) {
        const vf y = v_set(w[k * RT + r]);
        add_product(acc[2 * r], y, x0);
        add_product(acc[2 * r + 1], y, x1);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * RT; ++i) v_store(sums + i / 2 * ld + c + i % 2 * VL, acc[i]);
  }
}

}  // namespace GP_ISA
}  // namespace gp
