// int4, int3 and int2.
#include "cpu/quantize_pack.h"

namespace gp {
namespace GP_ISA {
namespace {

template <DType T, int BITS>
struct GroupCode {
  const void* x;
  int64_t first;
  vf scale, zero;  // zero: signed, 0 where symmetric
  static constexpr int half = 1 << (BITS - 1);
  vi of(vf v) const {
    const vf t = v_add(v_div(v, scale), zero);
    const vf low = v_set(float(-half)), high = v_set(float(half - 1));
    return i_add(to_int(v_min(v_max(t, low), high)), i_set(half));
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

template <int BITS, class F>
void pack_codes(uint8_t* q, int64_t n, const F& code) {
  if constexpr (BITS == 4) {
    pack_nibbles<false>(q, n, 0, code);
  } else {
    constexpr int64_t span = VL < 8 ? 8 : VL;
    for (int64_t i = 0; i < n; i += span) {
      const int64_t count = least(span, n - i);
      uint8_t codes[span];
      for (int64_t j = 0; j < count; j += VL)
        i_store_bytes(codes + j, j + VL <= count ? code(i + j) : code.part(i + j, count - j));
      for (int64_t j = count; j < span; ++j) codes[j] = 0;
      for (int64_t j = 0; j < count; j += 8)
        store_eight<BITS>(q + (i + j) * BITS / 8, codes + j, least(8, count - j));
    }
  }
}

template <DType T, int BITS>
void quantize_rows(const GroupArgs& a, const void* x, uint8_t* q, void* scale, uint8_t* zero_point,
                   Found& found) {
  constexpr float half = float(1 << (BITS - 1)), steps = 2.0f * half - 1.0f;
  const int64_t groups = ceil_div(a.cols, a.group), bytes = ceil_div(a.cols * BITS, 8);
  const int64_t total = a.rows * groups, per_item = most(1, kChunk / a.group);
  parallel_for(ceil_div(total, per_item), a.threads, [&](int64_t item, int) {
    for (int64_t i = item * per_item; i < least(total, (item + 1) * per_item); ++i) {
      const int64_t row = i / groups, col = (i - row * groups) * a.group;
      const int64_t first = row * a.cols + col, count = least(a.group, a.cols - col);
      const int32_t bits = absmax_bits<T>(x, first, count, false);
      if (bits >= kInfBits) return found.set(QuantizeStatus::nonfinite);
      float step = bits_to_float(uint32_t(bits)) / (half - 0.5f), low = 0.0f, high = 0.0f;
      if (zero_point) {
        range_of<T>(x, first, count, &low, &high);
        step = (high - low) / steps;
        if (step > 3.4028235e38f) step = high / steps - low / steps;
      }
      step = store_scale(scale, i, step, a.scale_dtype);
      if (step > 3.4028235e38f) return found.set(QuantizeStatus::scale_overflow);
      float zero = 0.0f;
      if (zero_point) {
        const float z = -half - low / step;
        zero = __builtin_nearbyintf(z < -half ? -half : z > half - 1.0f ? half - 1.0f : z);
        zero_point[i] = uint8_t(zero + half);
      }
      pack_codes<BITS>(q + row * bytes + col * BITS / 8, count,
                       GroupCode<T, BITS>{x, first, v_set(step), v_set(zero)});
    }
  });
}

}  // namespace

int quantize_groups(const GroupArgs& a, const void* x, DType dtype, uint8_t* q, void* scale,
                    uint8_t* zero_point) {
  Found found;
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    if (a.bits == 2) quantize_rows<T, 2>(a, x, q, scale, zero_point, found);
    else if (a.bits == 3) quantize_rows<T, 3>(a, x, q, scale, zero_point, found);
    else quantize_rows<T, 4>(a, x, q, scale, zero_point, found);
  });
  return found.get();
}

}  // namespace GP_ISA
}  // namespace gp
