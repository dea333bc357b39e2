#include "cpu/dynamic_map.h"
#include "cpu/quantize_work.h"

namespace gp {
namespace GP_ISA {

int quantize_dynamic(const void* x, DType dtype, const float* offset, int64_t n, int64_t block,
                     const DynamicMap& map, uint8_t* q, float* absmax, int threads) {
  Found found;
  const float taken = offset ? *offset : 0.0f;
  with_dtype(dtype, [&](auto typed) {
    constexpr DType T = decltype(typed)::value;
    for_blocks(n, block, threads, [&](int64_t b, int64_t first, int64_t count) {
      alignas(64) float values[kDynamicBlock];
      for (int64_t i = 0; i < count; i += VL) {
        const bool whole = i + VL <= count;
        const vf v = whole ? load_vec<T>(x, first + i) : load_part<T>(x, first + i, count - i);
        v_store(values + i, v_sub(v, v_set(taken)));  // lanes past the count are not read again
      }
      const int32_t bits = absmax_bits<DType::f32>(values, 0, count, false);
      if (bits >= kInfBits) return found.set(QuantizeStatus::nonfinite);
      absmax[b] = bits_to_float(uint32_t(bits));
      const vf inverse = v_set(inverse_of(absmax[b]));
      for (int64_t i = 0; i < count; i += VL) {
        const vf t = v_mul(v_load(values + i), inverse);
        const vi code = nearest_code<true>(map, v_max(v_set(-1.0f), v_min(v_set(1.0f), t)));
        store_codes(q + first + i, code, count - i);
      }
    });
  });
  return found.get();
}

void dequantize_dynamic(const uint8_t* q, const float* absmax, int64_t n, int64_t block,
                        const float* value, void* out, DType dtype, int threads) {
  for_blocks(n, block, threads, [&](int64_t b, int64_t first, int64_t count) {
    alignas(64) float values[kDynamicBlock];
    const vf scale = v_set(absmax[b]);
    int64_t i = 0;
    for (; i + VL <= count; i += VL)
      v_store(values + i, v_mul(v_gather(value, i_load_bytes(q + first + i)), scale));
    for (; i < count; ++i) values[i] = value[q[first + i]] * absmax[b];
    store_row(offset(out, first, dtype), values, count, dtype);
  });
}

}  // namespace GP_ISA
}  // namespace gp
