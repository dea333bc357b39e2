// nf4 and fp4, int8 and fp8.
#include "common/codebooks.h"
#include "cpu/dequantize_table.h"

namespace gp {
namespace GP_ISA {
namespace {

// Results are written through the caches: they go to fresh memory, which the system has just cleared
// there; stores past the caches measured 1.4x slower (2-core EPYC VM).

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

// --- int8 and fp8 --------------------------------------------------------------------------------

namespace {

// Codes to floats, exactly. fp8 goes through fp16, whose subnormals F16C converts at full speed: an
// e5m2 code is the upper byte of a half, an e4m3 code is a half divided by 2^8, and an e3m4 code,
// which has infinities, one divided by 2^12.
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
      if constexpr (C == Code8::e3m4) {
        const __m256i large = _mm256_cmpgt_epi16(mag, _mm256_set1_epi16(0x6f));
        const __m256i nan = _mm256_cmpgt_epi16(mag, _mm256_set1_epi16(0x70));
        const __m256i tail = _mm256_or_si256(_mm256_set1_epi16(0x7c00),
                                             _mm256_and_si256(nan, _mm256_set1_epi16(0x0200)));
        const __m256i half = _mm256_blendv_epi8(_mm256_slli_epi16(mag, 6), tail, large);
        return v_mul({_mm512_cvtph_ps(_mm256_or_si256(half, sign))}, v_set(4096.0f));
      }
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
      if constexpr (C == Code8::e3m4) {
        const __m128i large = _mm_cmpgt_epi16(mag, _mm_set1_epi16(0x6f));
        const __m128i nan = _mm_cmpgt_epi16(mag, _mm_set1_epi16(0x70));
        const __m128i tail = _mm_or_si128(_mm_set1_epi16(0x7c00),
                                          _mm_and_si128(nan, _mm_set1_epi16(0x0200)));
        const __m128i half = _mm_blendv_epi8(_mm_slli_epi16(mag, 6), tail, large);
        return v_mul({_mm256_cvtph_ps(_mm_or_si128(half, sign))}, v_set(4096.0f));
      }
      const __m128i nan = _mm_cmpeq_epi16(mag, _mm_set1_epi16(0x7f));
      const __m128i half = _mm_blendv_epi8(_mm_slli_epi16(mag, 7), _mm_set1_epi16(0x7e00), nan);
      return v_mul({_mm256_cvtph_ps(_mm_or_si128(half, sign))}, v_set(256.0f));
    }
#else
    const uint16_t b = *q, sign = uint16_t((b & 0x80) << 8), mag = b & 0x7f;
    if (C == Code8::e5m2) return {f16_to_float(uint16_t(b << 8))};
    if (C == Code8::e3m4) {
      const uint16_t half = mag < 0x70 ? uint16_t(mag << 6) : mag == 0x70 ? 0x7c00 : 0x7e00;
      return {4096.0f * f16_to_float(half | sign)};
    }
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
      case Code8::e3m4: return decode_tiles<Code8::e3m4, T>(a, q, scale, out);
    }
  });
}

}  // namespace GP_ISA
}  // namespace gp
