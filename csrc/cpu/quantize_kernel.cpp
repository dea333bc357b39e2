// nf4 and fp4.
#include "common/codebooks.h"
#include "cpu/dynamic_map.h"
#include "cpu/quantize_pack.h"

namespace gp {
namespace GP_ISA {
namespace {

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

}  // namespace GP_ISA
}  // namespace gp
