// int4, int3 and int2.
#include "cpu/dequantize_table.h"
#include "cpu/quantize_pack.h"

namespace gp {
namespace GP_ISA {
namespace {

// n elements from codes of 2 or 3 bits through a table.
template <DType T, int BITS>
void decode_codes(const uint8_t* q, int64_t n, const Table& table, void* out, int64_t at) {
  int64_t i = 0;
#if defined(__AVX2__)
  const auto sixteen = [](const uint8_t* p) {
    uint64_t low = unpack_eight<BITS>(load_eight<BITS>(p, 8));
    uint64_t high = unpack_eight<BITS>(load_eight<BITS>(p + BITS, 8));
    return _mm_set_epi64x(int64_t(high), int64_t(low));
  };
  if constexpr (T == DType::f32) {
    const Lookup32 lookup(table);
    float* o = static_cast<float*>(out) + at;
    for (; i + 16 <= n; i += 16) lookup.store16(sixteen(q + i * BITS / 8), o + i);
  } else {
    const Lookup16 lookup(table);
    uint16_t* o = static_cast<uint16_t*>(out) + at;
    for (; i + 32 <= n; i += 32) {
      const uint8_t* p = q + i * BITS / 8;
      lookup.store32(sixteen(p), sixteen(p + 2 * BITS), o + i);
    }
  }
#endif
  for (; i < n; i += 8) {
    const int64_t count = least(8, n - i);
    const uint64_t eight = unpack_eight<BITS>(load_eight<BITS>(q + i * BITS / 8, count));
    for (int64_t j = 0; j < count; ++j) {
      const int code = int(eight >> 8 * j & 255);
      if constexpr (T == DType::f32) static_cast<float*>(out)[at + i + j] = table.f[code];
      else static_cast<uint16_t*>(out)[at + i + j] = table.h[code];
    }
  }
}

template <DType T, int BITS>
void dequantize_rows(const GroupArgs& a, const uint8_t* q, const void* scale,
                     const uint8_t* zero_point, void* out) {
  alignas(64) static constexpr float kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7,
                                                   8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t groups = ceil_div(a.cols, a.group), bytes = ceil_div(a.cols * BITS, 8);
  const int64_t total = a.rows * groups, per_item = most(1, kChunk / a.group);
  parallel_for(ceil_div(total, per_item), a.threads, [&](int64_t item, int) {
    for (int64_t i = item * per_item; i < least(total, (item + 1) * per_item); ++i) {
      const int64_t row = i / groups, col = (i - row * groups) * a.group;
      const vf step = v_set(load_one(scale, i, a.scale_dtype));
      const vf zero = v_set(zero_point ? float(zero_point[i]) : float(1 << (BITS - 1)));
      Table table;
      table.fill<T>([&](int k) { return v_mul(v_sub(v_load(kCodes + k), zero), step); });
      const uint8_t* from = q + row * bytes + col * BITS / 8;
      const int64_t count = least(a.group, a.cols - col), at = row * a.cols + col;
      if constexpr (BITS == 4) decode_nibbles<T, false>(from, count, table, out, at);
      else decode_codes<T, BITS>(from, count, table, out, at);
    }
  });
}

}  // namespace

void dequantize_groups(const GroupArgs& a, const uint8_t* q, const void* scale,
                       const uint8_t* zero_point, void* out, DType dtype) {
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    if (a.bits == 2) dequantize_rows<T, 2>(a, q, scale, zero_point, out);
    else if (a.bits == 3) dequantize_rows<T, 3>(a, q, scale, zero_point, out);
    else dequantize_rows<T, 4>(a, q, scale, zero_point, out);
  });
}

}  // namespace GP_ISA
}  // namespace gp
