#include "cpu/quantize.h"

#include "common/codebooks.h"
#include "cpu/dynamic_map.h"
#include "cpu/quantize_simd.h"
#include "cpu/quantize_work.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr float kTiny = 1.17549435e-38f;

// --- nibbles -------------------------------------------------------------------------------------

// Packs the codes (0..15) that code(i) gives for lanes i..i+VL and code.part(i, n) for fewer; the
// even element takes the high nibble where HIGH_FIRST. An odd last element is paired with `pad`.
template <bool HIGH_FIRST, class F>
void pack_nibbles(uint8_t* q, int64_t n, int pad, const F& code) {
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

// The number of midpoints between neighbours of a 16-value book below x, by four steps down a binary
// tree: node k has children 2k and 2k + 1, and the bounds stand in the order of the nodes. `code` is
// that of each place in rising order.
class BookSearch {
 public:
  BookSearch(const float (&book)[16], const uint8_t (&code)[16]) {
    constexpr int order[16] = {0, 7, 3, 11, 1, 5, 9, 13, 0, 2, 4, 6, 8, 10, 12, 14};
    alignas(64) float nodes[16];
    for (int i = 0; i < 16; ++i)
      nodes[i] = (book[code[order[i]]] + book[code[order[i] + 1]]) / 2.0f;
#if defined(__AVX512F__)
    nodes_ = _mm512_load_ps(nodes);
#elif defined(__AVX2__)
    root_ = _mm256_set1_ps(nodes[1]);
    top_ = _mm256_load_ps(nodes);
    leaves_ = _mm256_load_ps(nodes + 8);
#else
    for (int i = 0; i < 16; ++i) nodes_[i] = nodes[i];
#endif
  }
  vi operator()(vf x) const {
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi32(1);
    __m512i k = one;
    for (int step = 0; step < 4; ++step) {
      const __mmask16 above = _mm512_cmp_ps_mask(x.v, _mm512_permutexvar_ps(k, nodes_), _CMP_GT_OQ);
      k = _mm512_add_epi32(k, k);
      k = _mm512_mask_add_epi32(k, above, k, one);
    }
    return {_mm512_and_si512(k, _mm512_set1_epi32(15))};
#elif defined(__AVX2__)
    const auto down = [&](__m256i k, __m256 bound) {
      const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x.v, bound, _CMP_GT_OQ));
      return _mm256_sub_epi32(_mm256_add_epi32(k, k), above);
    };
    __m256i k = down(_mm256_set1_epi32(1), root_);
    k = down(k, _mm256_permutevar8x32_ps(top_, k));
    k = down(k, _mm256_permutevar8x32_ps(top_, k));
    k = down(k, _mm256_permutevar8x32_ps(leaves_, k));
    return {_mm256_and_si256(k, _mm256_set1_epi32(15))};
#else
    int k = 1;
    for (int step = 0; step < 4; ++step) k = 2 * k + (x.v > nodes_[k]);
    return {k & 15};
#endif
  }

 private:
#if defined(__AVX512F__)
  __m512 nodes_;
#elif defined(__AVX2__)
  __m256 root_, top_, leaves_;
#else
  float nodes_[16];
#endif
};

template <DType T, bool DIVIDE, bool FP4_CODES>
struct BookCode {
  const void* x;
  int64_t first;
  vf by;
  BookSearch search;
  vi of(vf v) const {
    const vi place = search(DIVIDE ? v_div(v, by) : v_mul(v, by));
    return FP4_CODES ? fp4_code(place) : place;
  }
  vi operator()(int64_t i) const { return of(load_vec<T>(x, first + i)); }
  vi part(int64_t i, int64_t n) const { return of(load_part<T>(x, first + i, n)); }

 private:
  // FP4_ORDER[place]: magnitudes rise by codes 0, 1, 6, 7, 4, 5, 2, 3, and zero has the sign of the
  // other half.
  static vi fp4_code(vi place) {
    const vi zero = i_set(0), seven = i_set(7), eight = i_set(8);
    const vi upper = i_select_gt(place, seven, i_sub(place, eight), i_sub(seven, place));
    const vi twos = i_and(upper, i_set(2));
    const vi both = i_and(i_add(twos, twos), upper);  // 4 where bits 1 and 2 are set
    const vi code = i_sub(i_add(upper, i_add(twos, twos)), i_add(both, both));  // bit 2 ^= bit 1
    const vi sign = i_select_gt(i_set(9), place, i_select_gt(place, seven, eight, zero), zero);
    return i_or(code, i_select_gt(seven, place, eight, sign));
  }
};

}  // namespace

namespace {

template <DType T, bool FP4_CODES>
void quantize_blocks(const void* x, int64_t n, int64_t block, uint8_t* q, float* absmax, int threads,
                     Found& found) {
  const BookSearch search(FP4_CODES ? FP4 : NF4, FP4_CODES ? FP4_ORDER : NF4_ORDER);
  const int pad = FP4_CODES ? 0 : 7;  // a zero
  for_blocks(n, block, threads, [&](int64_t b, int64_t first, int64_t count) {
    const int32_t bits = absmax_bits<T>(x, first, count, false);
    if (bits >= kInfBits) return found.set(QuantizeStatus::nonfinite);
    const float largest = bits_to_float(uint32_t(bits));
    const float floored = largest > kAbsmaxFloor ? largest : kAbsmaxFloor;
    // The last partial block as bitsandbytes' CPU path has it; see formats/code_book.py.
    uint8_t* to = q + first / 2;
    if (count < block) {
      absmax[b] = floored;
      const BookCode<T, true, FP4_CODES> code{x, first, v_set(floored), search};
      pack_nibbles<true>(to, count, pad, code);
    } else {
      absmax[b] = largest;
      const BookCode<T, false, FP4_CODES> code{x, first, v_set(1.0f / floored), search};
      pack_nibbles<true>(to, count, pad, code);
    }
  });
}

}  // namespace

int quantize_book(Book book, const void* x, DType dtype, int64_t n, int64_t block, uint8_t* q,
                  float* absmax, int threads) {
  Found found;
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    if (book == Book::fp4) quantize_blocks<T, true>(x, n, block, q, absmax, threads, found);
    else quantize_blocks<T, false>(x, n, block, q, absmax, threads, found);
  });
  return found.get();
}

// --- int4 ----------------------------------------------------------------------------------------

namespace {

template <DType T>
struct GroupCode {
  const void* x;
  int64_t first;
  vf scale, zero;  // zero: signed, 0 where symmetric
  vi of(vf v) const {
    const vf t = v_add(v_div(v, scale), zero);
    return i_add(to_int(v_min(v_max(t, v_set(-8.0f)), v_set(7.0f))), i_set(8));
  }
  vi operator()(int64_t i) const { return of(load_vec<T>(x, first + i)); }
  vi part(int64_t i, int64_t n) const { return of(load_part<T>(x, first + i, n)); }
};

// The largest and the smallest element, no less and no more than 0; all are finite.
template <DType T>
void range_of(const void* x, int64_t first, int64_t n, float* low, float* high) {
  vf lo = v_zero(), hi = v_zero();
  for (int64_t j = 0; j < n; j += VL) {
    const vf v = j + VL <= n ? load_vec<T>(x, first + j) : load_part<T>(x, first + j, n - j);
    lo = v_min(lo, v);
    hi = v_max(hi, v);
  }
  *low = -v_hmax(v_sub(v_zero(), lo));
  *high = v_hmax(hi);
}

// Rounds a scale to its stored dtype, stores it and returns it; see formats/int4.py round_scale.
float store_scale(void* scales, int64_t i, float scale, DType dtype) {
  const float floor = dtype == DType::f16 ? 5.9604645e-8f : kTiny;
  store_one(scales, i, scale > floor ? scale : floor, dtype);
  return load_one(scales, i, dtype);
}

}  // namespace

int quantize_int4(const GroupArgs& a, const void* x, DType dtype, uint8_t* q, void* scale,
                  uint8_t* zero_point) {
  Found found;
  const int64_t groups = ceil_div(a.cols, a.group), bytes = ceil_div(a.cols, 2);
  const int64_t total = a.rows * groups, per_item = most(1, kChunk / a.group);
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    parallel_for(ceil_div(total, per_item), a.threads, [&](int64_t item, int) {
      for (int64_t i = item * per_item; i < least(total, (item + 1) * per_item); ++i) {
        const int64_t row = i / groups, col = (i - row * groups) * a.group;
        const int64_t first = row * a.cols + col, count = least(a.group, a.cols - col);
        const int32_t bits = absmax_bits<T>(x, first, count, false);
        if (bits >= kInfBits) return found.set(QuantizeStatus::nonfinite);
        float step = bits_to_float(uint32_t(bits)) / 7.5f, low = 0.0f, high = 0.0f;
        if (zero_point) {
          range_of<T>(x, first, count, &low, &high);
          step = (high - low) / 15.0f;
          if (step > 3.4028235e38f) step = high / 15.0f - low / 15.0f;
        }
        step = store_scale(scale, i, step, a.scale_dtype);
        if (step > 3.4028235e38f) return found.set(QuantizeStatus::scale_overflow);
        float zero = 0.0f;
        if (zero_point) {
          const float z = -8.0f - low / step;
          zero = __builtin_nearbyintf(z < -8.0f ? -8.0f : z > 7.0f ? 7.0f : z);
          zero_point[i] = uint8_t(zero + 8.0f);
        }
        pack_nibbles<false>(q + row * bytes + col / 2, count, 0,
                            GroupCode<T>{x, first, v_set(step), v_set(zero)});
      }
    });
  });
  return found.get();
}

// --- int8 and fp8 --------------------------------------------------------------------------------

namespace {

// 127 / absmax leaves fp32 below this, so the row is first multiplied by 2^64, which is exact.
constexpr float kTinyRow = 1.504632769e-36f, kLift = 18446744073709551616.0f;

struct Int8Code {
  static constexpr bool is_signed = true;
  vf lift, factor;
  explicit Int8Code(float absmax)
      : lift(v_set(absmax < kTinyRow ? kLift : 1.0f)),
        factor(v_set(absmax > 0.0f
                         ? 127.0f * (1.0f / (absmax < kTinyRow ? absmax * kLift : absmax))
                         : 0.0f)) {}
  static float scale(float absmax) { return absmax / 127.0f; }
  vi operator()(vf v) const { return to_int(v_mul(v_mul(v, lift), factor)); }
};

// A float of exponent bias BIAS and MAN mantissa bits in a byte: rounds half to even, saturates at
// +-LIMIT, has NAN_CODE for NaN.
template <int MAN, int BIAS, int LIMIT, int NAN_CODE, bool KEEP_NAN>
struct Fp8Code {
  static constexpr bool is_signed = false;
  vf scale_;
  explicit Fp8Code(float absmax) : scale_(v_set(scale(absmax))) {}
  static float scale(float absmax) {
    const float s = absmax / float(LIMIT);
    return s > kTiny ? s : kTiny;
  }
  vi operator()(vf v) const {
    // The order of the operands lets NaN through min and max.
    const vf t = v_min(v_set(float(LIMIT)), v_max(v_set(-float(LIMIT)), v_div(v, scale_)));
    const vi u = as_int(t), mag = i_and(u, i_set(0x7fffffff));
    // Adding a float whose last bit is worth one code rounds, and leaves the code's last MAN + 1 bits,
    // the implicit one among them; subnormals have the exponent of the smallest normal number.
    const vi least_normal = i_set((128 - BIAS) << 23);
    const vi exponent = i_max(i_and(u, i_set(kInfBits)), least_normal);
    const vi magic = i_add(exponent, i_set((23 - MAN) << 23));
    const vi steps = i_sub(as_int(v_add(as_float(mag), as_float(magic))), magic);
    vi code = i_add(steps, i_srl<23 - MAN>(i_sub(exponent, least_normal)));
    if (KEEP_NAN) code = i_select_gt(mag, i_set(kInfBits), i_set(NAN_CODE), code);
    return i_or(code, i_and(i_srl<24>(u), i_set(0x80)));
  }
};
template <bool KEEP_NAN> using E4m3fn = Fp8Code<3, 7, 448, 0x7f, KEEP_NAN>;
template <bool KEEP_NAN> using E4m3To240 = Fp8Code<3, 7, 240, 0x7f, KEEP_NAN>;
template <bool KEEP_NAN> using E5m2 = Fp8Code<2, 15, 57344, 0x7f, KEEP_NAN>;

template <DType T, class Code>
void encode_row(const void* x, int64_t first, int64_t n, const Code& code, uint8_t* q) {
  int64_t j = 0;
  for (; j + 4 * VL <= n; j += 4 * VL) {
    const auto at = [&](int64_t i) { return code(load_vec<T>(x, first + j + i * VL)); };
    i_store_bytes<Code::is_signed>(q + first + j, at(0), at(1), at(2), at(3));
  }
  for (; j + VL <= n; j += VL) i_store_bytes(q + first + j, code(load_vec<T>(x, first + j)));
  if (j < n) {
    uint8_t part[VL];
    i_store_bytes(part, code(load_part<T>(x, first + j, n - j)));
    for (int64_t k = j; k < n; ++k) q[first + k] = part[k - j];
  }
}

// One scale for all n elements.
template <DType T, class Code>
void quantize_whole(const void* x, int64_t n, uint8_t* q, float* scale, bool allow, int threads,
                    Found* found) {
  const int64_t items = ceil_div(n, kChunk);
  int32_t largest = 0;
  parallel_for(items, threads, [&](int64_t item, int) {
    const int64_t first = item * kChunk;
    const int32_t bits = absmax_bits<T>(x, first, least(kChunk, n - first), allow);
    int32_t seen = __atomic_load_n(&largest, __ATOMIC_RELAXED);
    while (bits > seen && !__atomic_compare_exchange_n(&largest, &seen, bits, true,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  });
  if (largest >= kInfBits) return found->set(QuantizeStatus::nonfinite);
  const float absmax = bits_to_float(uint32_t(largest));
  *scale = Code::scale(absmax);
  const Code code(absmax);
  parallel_for(items, threads, [&](int64_t item, int) {
    encode_row<T>(x, item * kChunk, least(kChunk, n - item * kChunk), code, q);
  });
}

template <DType T, class Code>
void quantize_tiles(const ScaledArgs& a, const void* x, uint8_t* q, float* scale, bool allow,
                    Found* found) {
  if (a.row_block == 0)
    return quantize_whole<T, Code>(x, a.batch * a.rows * a.cols, q, scale, allow, a.threads, found);
  const int64_t across = ceil_div(a.cols, a.col_block), down = ceil_div(a.rows, a.row_block);
  const int64_t strips = a.batch * down;
  const int64_t per_item = most(1, kChunk / most(1, a.row_block * a.cols));
  parallel_for(ceil_div(strips, per_item), a.threads, [&](int64_t item, int) {
    for (int64_t s = item * per_item; s < least(strips, (item + 1) * per_item); ++s) {
      const int64_t matrix = s / down, top = (s - matrix * down) * a.row_block;
      const int64_t height = least(a.row_block, a.rows - top);
      const int64_t origin = (matrix * a.rows + top) * a.cols;
      for (int64_t c = 0; c < across; ++c) {
        const int64_t first = origin + c * a.col_block;
        const int64_t width = least(a.col_block, a.cols - c * a.col_block);
        int32_t bits = 0;
        for (int64_t r = 0; r < height; ++r) {
          const int32_t row = absmax_bits<T>(x, first + r * a.cols, width, allow);
          bits = row > bits ? row : bits;
        }
        if (bits >= kInfBits) return found->set(QuantizeStatus::nonfinite);
        const float absmax = bits_to_float(uint32_t(bits));
        scale[s * across + c] = Code::scale(absmax);
        const Code code(absmax);
        for (int64_t r = 0; r < height; ++r)
          encode_row<T>(x, first + r * a.cols, width, code, q);
      }
    }
  });
}

template <DType T, template <bool> class Code>
void quantize_fp8(const ScaledArgs& a, const void* x, uint8_t* q, float* scale, bool allow,
                  Found* found) {
  if (allow) quantize_tiles<T, Code<true>>(a, x, q, scale, true, found);
  else quantize_tiles<T, Code<false>>(a, x, q, scale, false, found);
}

}  // namespace

int quantize_scaled(const ScaledArgs& a, const void* x, DType dtype, uint8_t* q, float* scale,
                    bool allow_nonfinite) {
  Found found;
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    switch (a.code) {
      case Code8::s8: return quantize_tiles<T, Int8Code>(a, x, q, scale, false, &found);
      case Code8::e4m3fn: return quantize_fp8<T, E4m3fn>(a, x, q, scale, allow_nonfinite, &found);
      case Code8::e5m2: return quantize_fp8<T, E5m2>(a, x, q, scale, allow_nonfinite, &found);
      case Code8::e4m3_240:
        return quantize_fp8<T, E4m3To240>(a, x, q, scale, allow_nonfinite, &found);
    }
  });
  return found.get();
}

}  // namespace GP_ISA
}  // namespace gp
