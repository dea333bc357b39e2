#include "common/codebooks.h"
#include "cpu/quantize_simd.h"
#include "cpu/quantize_work.h"

namespace gp {
namespace GP_ISA {
namespace {

// Results are written through the caches: they go to fresh memory, which the system has just cleared
// there; stores past the caches measured 1.4x slower (2-core EPYC VM).

// --- nibbles -------------------------------------------------------------------------------------

// The 16 values of a group's codes, already scaled, in the output's dtype.
struct Table {
  alignas(64) float f[16];
  alignas(64) uint16_t h[16];

  template <DType T, class F>
  void fill(const F& values) {  // values(i): lanes i..i+VL
    for (int i = 0; i < 16; i += VL) {
      const vf v = values(i);
      if constexpr (T == DType::f32) v_store(f + i, v);
      else if constexpr (T == DType::bf16) v_store_bf16(h + i, v);
      else v_store_f16(h + i, v);
    }
  }
};

#if defined(__AVX2__)
// 16 bytes to their 32 nibbles in element order, one a byte.
template <bool HIGH_FIRST>
inline void split_nibbles(const uint8_t* q, __m128i* a, __m128i* b) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  *a = HIGH_FIRST ? _mm_unpacklo_epi8(high, low) : _mm_unpacklo_epi8(low, high);
  *b = HIGH_FIRST ? _mm_unpackhi_epi8(high, low) : _mm_unpackhi_epi8(low, high);
}
#endif

#if defined(__AVX512F__)
struct Lookup32 {
  __m512 t;
  explicit Lookup32(const Table& table) : t(_mm512_load_ps(table.f)) {}
  void store16(__m128i codes, float* out) const {
    const __m512 v = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), t);
    _mm512_storeu_ps(out, v);
  }
};
struct Lookup16 {
  __m512i t;
  explicit Lookup16(const Table& table)
      : t(_mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.h)))) {}
  void store32(__m128i a, __m128i b, uint16_t* out) const {
    const __m256i codes = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m512i v = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), t);
    _mm512_storeu_si512(out, v);
  }
};
#elif defined(__AVX2__)
struct Lookup32 {
  __m256 lo, hi;
  explicit Lookup32(const Table& table)
      : lo(_mm256_load_ps(table.f)), hi(_mm256_load_ps(table.f + 8)) {}
  void store8(__m128i codes, float* out) const {
    const __m256i k = _mm256_cvtepu8_epi32(codes);
    const __m256 v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(lo, k),
                                      _mm256_permutevar8x32_ps(hi, k),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(k, 28)));
    _mm256_storeu_ps(out, v);
  }
  void store16(__m128i codes, float* out) const {
    store8(codes, out);
    store8(_mm_unpackhi_epi64(codes, codes), out + 8);
  }
};
// The low and the high bytes of 16 halves, each looked up by one shuffle.
struct Lookup16 {
  __m128i lo, hi;
  explicit Lookup16(const Table& table) {
    const __m128i a = _mm_load_si128(reinterpret_cast<const __m128i*>(table.h));
    const __m128i b = _mm_load_si128(reinterpret_cast<const __m128i*>(table.h + 8));
    const __m128i mask = _mm_set1_epi16(255);
    lo = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
    hi = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  }
  void store32(__m128i a, __m128i b, uint16_t* out) const {
    const auto put = [](uint16_t* p, __m128i v) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
    };
    const __m128i al = _mm_shuffle_epi8(lo, a), ah = _mm_shuffle_epi8(hi, a);
    const __m128i bl = _mm_shuffle_epi8(lo, b), bh = _mm_shuffle_epi8(hi, b);
    put(out, _mm_unpacklo_epi8(al, ah));
    put(out + 8, _mm_unpackhi_epi8(al, ah));
    put(out + 16, _mm_unpacklo_epi8(bl, bh));
    put(out + 24, _mm_unpackhi_epi8(bl, bh));
  }
};
#endif

// n elements from nibbles through a table.
template <DType T, bool HIGH_FIRST>
void decode_nibbles(const uint8_t* q, int64_t n, const Table& table, void* out, int64_t at) {
  int64_t i = 0;
#if defined(__AVX2__)
  if constexpr (T == DType::f32) {
    const Lookup32 lookup(table);
    float* o = static_cast<float*>(out) + at;
    for (; i + 32 <= n; i += 32) {
      __m128i a, b;
      split_nibbles<HIGH_FIRST>(q + i / 2, &a, &b);
      lookup.store16(a, o + i);
      lookup.store16(b, o + i + 16);
    }
  } else {
    const Lookup16 lookup(table);
    uint16_t* o = static_cast<uint16_t*>(out) + at;
    for (; i + 32 <= n; i += 32) {
      __m128i a, b;
      split_nibbles<HIGH_FIRST>(q + i / 2, &a, &b);
      lookup.store32(a, b, o + i);
    }
  }
#endif
  for (; i < n; ++i) {
    const int shift = ((i & 1) == 0) == HIGH_FIRST ? 4 : 0;
    const int code = q[i / 2] >> shift & 15;
    if constexpr (T == DType::f32) static_cast<float*>(out)[at + i] = table.f[code];
    else static_cast<uint16_t*>(out)[at + i] = table.h[code];
  }
}

float block_scale(const BlockScales& s, int64_t block) {
  if (!s.nested) return static_cast<const float*>(s.scale)[block];
  const uint8_t code = static_cast<const uint8_t*>(s.scale)[block];
  const float wide = s.map[code] * s.nested[block / 256] + *s.offset;
  return wide < 3.4028235e38f ? wide : 3.4028235e38f;
}

}  // namespace

void dequantize_book(Book book, const uint8_t* q, const BlockScales& s, int64_t n, int64_t block,
                     void* out, DType dtype, int threads) {
  const float* values = book == Book::fp4 ? FP4 : NF4;
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    for_blocks(n, block, threads, [&](int64_t b, int64_t first, int64_t count) {
      const vf absmax = v_set(block_scale(s, b));
      Table table;
      table.fill<T>([&](int i) { return v_mul(v_load(values + i), absmax); });
      decode_nibbles<T, true>(q + first / 2, count, table, out, first);
    });
  });
}

void dequantize_int4(const GroupArgs& a, const uint8_t* q, const void* scale,
                     const uint8_t* zero_point, void* out, DType dtype) {
  alignas(64) static constexpr float kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7,
                                                   8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t groups = ceil_div(a.cols, a.group), bytes = ceil_div(a.cols, 2);
  const int64_t total = a.rows * groups, per_item = most(1, kChunk / a.group);
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    parallel_for(ceil_div(total, per_item), a.threads, [&](int64_t item, int) {
      for (int64_t i = item * per_item; i < least(total, (item + 1) * per_item); ++i) {
        const int64_t row = i / groups, col = (i - row * groups) * a.group;
        const vf step = v_set(load_one(scale, i, a.scale_dtype));
        const vf zero = v_set(zero_point ? float(zero_point[i]) : 8.0f);
        Table table;
        table.fill<T>([&](int k) { return v_mul(v_sub(v_load(kCodes + k), zero), step); });
        decode_nibbles<T, false>(q + row * bytes + col / 2, least(a.group, a.cols - col), table,
                                 out, row * a.cols + col);
      }
    });
  });
}

// --- int8 and fp8 --------------------------------------------------------------------------------

namespace {

// Codes to floats, exactly. fp8 goes through fp16, whose subnormals F16C converts at full speed: an
// e5m2 code is the upper byte of a half, and an e4m3 code is a half divided by 2^8.
template <Code8 C>
inline vf decode_vec(const uint8_t* q) {
  if constexpr (C == Code8::s8) {
    return v_load_s8(q);
  } else {
#if defined(__AVX512F__)
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    if constexpr (C == Code8::e5m2) {
      return {_mm512_cvtph_ps(_mm256_slli_epi16(b, 8))};
    } else {
      const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(b, _mm256_set1_epi16(0x80)), 8);
      const __m256i mag = _mm256_and_si256(b, _mm256_set1_epi16(0x7f));
      const __m256i nan = _mm256_cmpeq_epi16(mag, _mm256_set1_epi16(0x7f));
      const __m256i half = _mm256_blendv_epi8(_mm256_slli_epi16(mag, 7),
                                              _mm256_set1_epi16(0x7e00), nan);
      return v_mul({_mm512_cvtph_ps(_mm256_or_si256(half, sign))}, v_set(256.0f));
    }
#elif defined(__AVX2__)
    const __m128i b = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
    if constexpr (C == Code8::e5m2) {
      return {_mm256_cvtph_ps(_mm_slli_epi16(b, 8))};
    } else {
      const __m128i sign = _mm_slli_epi16(_mm_and_si128(b, _mm_set1_epi16(0x80)), 8);
      const __m128i mag = _mm_and_si128(b, _mm_set1_epi16(0x7f));
      const __m128i nan = _mm_cmpeq_epi16(mag, _mm_set1_epi16(0x7f));
      const __m128i half = _mm_blendv_epi8(_mm_slli_epi16(mag, 7), _mm_set1_epi16(0x7e00), nan);
      return v_mul({_mm256_cvtph_ps(_mm_or_si128(half, sign))}, v_set(256.0f));
    }
#else
    const uint16_t b = *q, sign = uint16_t((b & 0x80) << 8), mag = b & 0x7f;
    if (C == Code8::e5m2) return {f16_to_float(uint16_t(b << 8))};
    return {256.0f * f16_to_float(mag == 0x7f ? 0x7e00 | sign : uint16_t(mag << 7) | sign)};
#endif
  }
}

// 2 VL floats to bf16. A NaN must be one of those of decode_vec, whose low bits are 0: rounding up
// carries none of them into the sign.
inline void store_pair_bf16(uint16_t* p, vf a, vf b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const auto rounded = [](vf v) {
    const __m256i u = _mm256_castps_si256(v.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(_mm256_add_epi32(u, up), 16);
  };
  const __m256i packed = _mm256_packus_epi32(rounded(a), rounded(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
#else
  v_store_bf16(p, a);
  v_store_bf16(p + VL, b);
#endif
}

template <Code8 C, DType T>
void decode_row(const uint8_t* q, int64_t n, vf scale, void* out, int64_t at) {
  int64_t j = 0;
  if constexpr (T == DType::f32) {
    float* o = static_cast<float*>(out) + at;
    for (; j + VL <= n; j += VL) v_store(o + j, v_mul(decode_vec<C>(q + j), scale));
  } else {
    uint16_t* o = static_cast<uint16_t*>(out) + at;
    for (; j + 2 * VL <= n; j += 2 * VL) {
      const vf v = v_mul(decode_vec<C>(q + j), scale);
      const vf w = v_mul(decode_vec<C>(q + j + VL), scale);
      if constexpr (T == DType::bf16) {
        store_pair_bf16(o + j, v, w);
      } else {
        v_store_f16(o + j, v);
        v_store_f16(o + j + VL, w);
      }
    }
  }
  for (; j < n; j += VL) {
    const int64_t count = least(VL, n - j);
    uint8_t codes[VL] = {};
    for (int64_t k = 0; k < count; ++k) codes[k] = q[j + k];
    float part[VL];
    v_store(part, v_mul(decode_vec<C>(codes), scale));
    for (int64_t k = 0; k < count; ++k) store_one(out, at + j + k, part[k], T);
  }
}

template <Code8 C, DType T>
void decode_tiles(const ScaledArgs& a, const uint8_t* q, const float* scale, void* out) {
  const int64_t width = a.row_block ? a.col_block : a.cols, height = a.row_block;
  const int64_t across = ceil_div(a.cols, most(1, width));
  const int64_t down = height ? ceil_div(a.rows, height) : 0;
  const int64_t rows = a.batch * a.rows, per_item = most(1, kChunk / most(1, a.cols));
  parallel_for(ceil_div(rows, per_item), a.threads, [&](int64_t item, int) {
    for (int64_t r = item * per_item; r < least(rows, (item + 1) * per_item); ++r) {
      const int64_t matrix = r / a.rows, row = r - matrix * a.rows;
      const float* of_row = height ? scale + (matrix * down + row / height) * across : scale;
      for (int64_t c = 0; c < across; ++c) {
        const int64_t at = r * a.cols + c * width;
        decode_row<C, T>(q + at, least(width, a.cols - c * width), v_set(of_row[height ? c : 0]),
                         out, at);
      }
    }
  });
}

}  // namespace

void dequantize_scaled(const ScaledArgs& a, const uint8_t* q, const float* scale, void* out,
                       DType dtype) {
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    switch (a.code) {
      case Code8::s8: return decode_tiles<Code8::s8, T>(a, q, scale, out);
      case Code8::e4m3_240:  // fewer codes of the same meaning
      case Code8::e4m3fn: return decode_tiles<Code8::e4m3fn, T>(a, q, scale, out);
      case Code8::e5m2: return decode_tiles<Code8::e5m2, T>(a, q, scale, out);
    }
  });
}

}  // namespace GP_ISA
}  // namespace gp
