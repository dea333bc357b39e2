// One row of logits on its way to a loss and a gradient: scores in scratch, sums over the vocabulary.
//
// Scratch rows are padded to whole vectors with -inf, whose probability is 0. Sums run over blocks in
// fp32 and over the blocks in double, so their error does not grow with the vocabulary.
#pragma once

#include "cpu/distill_loss.h"
#include "cpu/distill_math.h"

namespace gp {
namespace GP_ISA {

constexpr int64_t SUM_BLOCK = 64 * VL;

static inline int64_t whole_vectors(int64_t n) { return (n + VL - 1) / VL * VL; }

template <DType T>
static inline vf v_load_as(const void* p, int64_t i) {
  if (T == DType::f32) return v_load(static_cast<const float*>(p) + i);
  if (T == DType::bf16) return v_load_bf16(static_cast<const uint16_t*>(p) + i);
  return v_load_f16(static_cast<const uint16_t*>(p) + i);
}

// z of one raw logit vector, and the derivative of the cap.
static inline vf capped(vf raw, const Logits& l, vf* slope) {
  vf z = v_mul(raw, v_set(l.scale));
  if (l.softcap > 0.0f) {
    const vf t = v_tanh_nan(v_mul(z, v_set(1.0f / l.softcap)));
    z = v_mul(t, v_set(l.softcap));
    if (slope) *slope = v_sub(v_set(1.0f), v_mul(t, t));
  }
  return z;
}

// Scores u = z / temperature of a row into `u` (padded); returns their maximum, NaN left out.
template <DType T>
static float load_scores(float* u, const Logits& l, int64_t row, int64_t n, float over_temperature) {
  const void* raw = offset(l.data, row * l.stride, T);
  const bool plain = l.softcap <= 0.0f;
  const vf factor = v_set(plain ? l.scale * over_temperature : over_temperature);
  vf top = v_set(-INFINITY);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    vf x = v_load_as<T>(raw, i);
    if (!plain) x = capped(x, l, nullptr);
    x = v_mul(x, factor);
    v_store(u + i, x);
    top = v_max(x, top);
  }
  if (i < n) {
    float rest[VL];
    for (int j = 0; j < VL; ++j)
      rest[j] = i + j < n ? load_one(raw, i + j, T) : 0.0f;
    vf x = v_load(rest);
    if (!plain) x = capped(x, l, nullptr);
    v_store(rest, v_mul(x, factor));
    for (int j = 0; j < VL; ++j) {
      u[i + j] = i + j < n ? rest[j] : -INFINITY;
      top = v_max(v_set(u[i + j]), top);
    }
  }
  return v_hmax(top);
}

static float load_scores(float* u, const Logits& l, int64_t row, int64_t n, float over_temperature) {
  switch (l.dtype) {
    case DType::f32: return load_scores<DType::f32>(u, l, row, n, over_temperature);
    case DType::bf16: return load_scores<DType::bf16>(u, l, row, n, over_temperature);
    default: return load_scores<DType::f16>(u, l, row, n, over_temperature);
  }
}

// body(i, a, b) for every vector, where a and b are sums over all of them.
template <class F>
static inline void sum_over(int64_t n, double* a, double* b, double* c, F&& body) {
  *a = *b = *c = 0.0;
  for (int64_t first = 0; first < n; first += SUM_BLOCK) {
    const int64_t last = first + SUM_BLOCK < n ? first + SUM_BLOCK : n;
    vf x = v_zero(), y = v_zero(), z = v_zero();
    for (int64_t i = first; i < last; i += VL) body(i, x, y, z);
    *a += double(v_sum(x));
    *b += double(v_sum(y));
    *c += double(v_sum(z));
  }
}

// A difference of scores that 0 * difference is 0 of, where both are -inf too.
static inline vf bounded(vf x, float limit) {
  return v_min(v_max(x, v_set(-limit)), v_set(limit));
}

// The mixture divergences: m = wt q + ws p, D = a KL(q || m) + b KL(p || m).
struct Mixture {
  float wt, ws, a, b;
  Mixture(Divergence kind, float beta) {
    if (kind == Divergence::jsd) wt = beta, ws = 1.0f - beta, a = beta, b = 1.0f - beta;
    else if (kind == Divergence::skew_kl) wt = beta, ws = 1.0f - beta, a = 1.0f, b = 0.0f;
    else wt = 1.0f - beta, ws = beta, a = 0.0f, b = 1.0f;
  }
};

}  // namespace GP_ISA
}  // namespace gp
