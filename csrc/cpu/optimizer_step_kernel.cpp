#include "cpu/optimizer_step.h"

#include "cpu/dynamic_map.h"
#include "cpu/quantize_work.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int32_t kSquareOverflows = 0x5f800000;  // 2^64

template <DType T>
bool all_below(const void* grad, int64_t n, int threads, int32_t limit) {
  Found found;
  for_blocks(n, kChunk, threads, [&](int64_t, int64_t first, int64_t count) {
    if (absmax_bits<T>(grad, first, count, false) >= limit) found.set(QuantizeStatus::nonfinite);
  });
  return !found.get();
}

template <DType T>
vf load_some(const void* x, int64_t i, int64_t n) {
  return n >= VL ? load_vec<T>(x, i) : load_part<T>(x, i, n);
}

vf read(const Moment& s, int64_t i, int64_t n, vf absmax) {
  if (!s.absmax) return load_some<DType::f32>(s.data, i, n);
  const uint8_t* codes = static_cast<const uint8_t*>(s.data) + i;
  uint8_t part[VL] = {};
  if (n < VL)
    for (int64_t j = 0; j < n; ++j) part[j] = codes[j];
  return v_mul(v_gather(s.map.value, i_load_bytes(n < VL ? part : codes)), absmax);
}

// The new moment of a block, `values`, back to where it is kept.
template <bool SIGNED>
void write(const Moment& s, int64_t b, int64_t first, int64_t count, const float* values) {
  if (!s.absmax) {
    std::memcpy(static_cast<float*>(s.data) + first, values, size_t(count) * 4);
    return;
  }
  const float largest = bits_to_float(uint32_t(absmax_bits<DType::f32>(values, 0, count, false)));
  s.absmax[b] = largest;
  const vf inverse = v_set(inverse_of(largest)), low = v_set(SIGNED ? -1.0f : 0.0f);
  for (int64_t i = 0; i < count; i += VL) {
    const vf t = v_max(low, v_min(v_set(1.0f), v_mul(v_load(values + i), inverse)));
    vi code = nearest_code<SIGNED>(s.map, t);
    // A positive second moment that became 0 would leave eps alone to divide by.
    if (!SIGNED) code = i_max(code, i_above(v_load(values + i), v_zero()));
    store_codes(static_cast<uint8_t*>(s.data) + first + i, code, count - i);
  }
}

template <DType T>
void store_some(void* p, int64_t i, vf v, int64_t n) {
  if (n >= VL) {
    if constexpr (T == DType::f32) return v_store(static_cast<float*>(p) + i, v);
    else if constexpr (T == DType::bf16) return v_store_bf16(static_cast<uint16_t*>(p) + i, v);
    else return v_store_f16(static_cast<uint16_t*>(p) + i, v);
  }
  float part[VL];
  v_store(part, v);
  store_row(offset(p, i, T), part, n, T);
}

vf sign(vf v) { return to_float(i_sub(i_above(v, v_zero()), i_above(v_zero(), v))); }

vf mix(vf old, float keep, vf fresh, float take) {
  return v_add(v_mul(old, v_set(keep)), v_mul(fresh, v_set(take)));
}

vf scale_of(const Moment& s, int64_t b) { return v_set(s.absmax ? s.absmax[b] : 0.0f); }

template <class F>
int with_dtypes(const StepArgs& a, int32_t limit, const F& fn) {
  QuantizeStatus status = QuantizeStatus::ok;
  with_dtype(a.p_dtype, [&](auto p_typed) {
    with_dtype(a.grad_dtype, [&](auto grad_typed) {
      if (!all_below<decltype(grad_typed)::value>(a.grad, a.n, a.threads, limit))
        status = QuantizeStatus::nonfinite;
      else fn(p_typed, grad_typed);
    });
  });
  return int(status);
}

}  // namespace

int adamw_step(const StepArgs& a, const Moment& m, const Moment& v, const Coefficients& c) {
  return with_dtypes(a, kSquareOverflows, [&](auto p_typed, auto grad_typed) {
    constexpr DType P = decltype(p_typed)::value, G = decltype(grad_typed)::value;
    for_blocks(a.n, a.block, a.threads, [&](int64_t b, int64_t first, int64_t count) {
      alignas(64) float new_m[kDynamicBlock], new_v[kDynamicBlock];
      const vf m_scale = scale_of(m, b), v_scale = scale_of(v, b);
      for (int64_t i = 0; i < count; i += VL) {
        const int64_t at = first + i, left = count - i;
        const vf g = load_some<G>(a.grad, at, left);
        const vf fresh_m = mix(read(m, at, left, m_scale), c.keep1, g, c.take1);
        const vf fresh_v = mix(read(v, at, left, v_scale), c.keep2, v_mul(g, g), c.take2);
        v_store(new_m + i, fresh_m);
        v_store(new_v + i, fresh_v);
        const vf below = v_add(v_mul(v_sqrt(fresh_v), v_set(c.unbias)), v_set(c.eps));
        const vf step = v_div(v_mul(fresh_m, v_set(c.rate)), below);
        const vf p = v_mul(load_some<P>(a.p, at, left), v_set(c.decay));
        store_some<P>(a.p, at, v_sub(p, step), left);
      }
      write<true>(m, b, first, count, new_m);
      write<false>(v, b, first, count, new_v);
    });
  });
}

int lion_step(const StepArgs& a, const Moment& m, const Coefficients& c) {
  return with_dtypes(a, kInfBits, [&](auto p_typed, auto grad_typed) {
    constexpr DType P = decltype(p_typed)::value, G = decltype(grad_typed)::value;
    for_blocks(a.n, a.block, a.threads, [&](int64_t b, int64_t first, int64_t count) {
      alignas(64) float new_m[kDynamicBlock];
      const vf m_scale = scale_of(m, b);
      for (int64_t i = 0; i < count; i += VL) {
        const int64_t at = first + i, left = count - i;
        const vf g = load_some<G>(a.grad, at, left), old = read(m, at, left, m_scale);
        v_store(new_m + i, mix(old, c.keep2, g, c.take2));
        const vf step = v_mul(sign(mix(old, c.keep1, g, c.take1)), v_set(c.rate));
        const vf p = v_mul(load_some<P>(a.p, at, left), v_set(c.decay));
        store_some<P>(a.p, at, v_sub(p, step), left);
      }
      write<true>(m, b, first, count, new_m);
    });
  });
}

}  // namespace GP_ISA
}  // namespace gp
