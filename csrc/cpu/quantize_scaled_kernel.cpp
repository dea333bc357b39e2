// int8 and fp8.
#include "cpu/quantize_simd.h"
#include "cpu/quantize_work.h"

namespace gp {
namespace GP_ISA {
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
// +-HALVES / 2, has NAN_CODE for NaN.
template <int MAN, int BIAS, int HALVES, int NAN_CODE, bool KEEP_NAN>
struct Fp8Code {
  static constexpr bool is_signed = false;
  static constexpr float limit = float(HALVES) / 2.0f;
  vf scale_;
  explicit Fp8Code(float absmax) : scale_(v_set(scale(absmax))) {}
  static float scale(float absmax) {
    const float s = absmax / limit;
    return s > kTiny ? s : kTiny;
  }
  vi operator()(vf v) const {
    // The order of the operands lets NaN through min and max.
    const vf t = v_min(v_set(limit), v_max(v_set(-limit), v_div(v, scale_)));
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
template <bool KEEP_NAN> using E4m3fn = Fp8Code<3, 7, 2 * 448, 0x7f, KEEP_NAN>;
template <bool KEEP_NAN> using E4m3To240 = Fp8Code<3, 7, 2 * 240, 0x7f, KEEP_NAN>;
template <bool KEEP_NAN> using E5m2 = Fp8Code<2, 15, 2 * 57344, 0x7f, KEEP_NAN>;
template <bool KEEP_NAN> using E3m4 = Fp8Code<4, 3, 31, 0x78, KEEP_NAN>;

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
      case Code8::e3m4: return quantize_fp8<T, E3m4>(a, x, q, scale, allow_nonfinite, &found);
    }
  });
  return found.get();
}

}  // namespace GP_ISA
}  // namespace gp
