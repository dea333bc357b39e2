// The softmax of decode attention: a block's scores, (key, lane), a lane for each row of queries.
#pragma once

#include "cpu/decode_attention_plan.h"

namespace gp {
namespace GP_ISA {

// What the query of a lane sees.
struct Lane {
  int64_t query;
  float slope;
};

// Scores of n keys from k0 on, before the softmax: softcap, ALiBi, -inf where the query does not see
// the key and for the keys that pad the block to `padded`.
static inline void apply_rules(const DecodeArgs& a, const Span& span, const Lane* lanes, int64_t count,
                               int64_t ld, int64_t k0, int64_t n, int64_t padded, float* scores) {
  const int64_t offset = span.len_k - a.seqlen_q;
  if (a.softcap != 0.0f) {
    const vf inverse = v_set(1.0f / a.softcap), cap = v_set(a.softcap);
    for (int64_t j = 0; j < n * ld; j += VL)
      v_store(scores + j, v_mul(v_tanh(v_mul(v_load(scores + j), inverse)), cap));
  }
  for (int64_t l = 0; l < count; ++l) {
    const int64_t at = lanes[l].query + offset - k0;
    if (a.alibi_slopes)
      for (int64_t k = 0; k < n; ++k) {
        const float distance = float(at > k ? at - k : k - at);
        scores[k * ld + l] -= lanes[l].slope * distance;
      }
    const int64_t lo = a.window_left < 0 ? 0 : min64(at - a.window_left, n);
    const int64_t hi = a.window_right < 0 ? n : max64(at + a.window_right + 1, 0);
    for (int64_t k = 0; k < lo; ++k) scores[k * ld + l] = -INFINITY;
    for (int64_t k = hi; k < n; ++k) scores[k * ld + l] = -INFINITY;
  }
  for (int64_t j = n * ld; j < padded * ld; ++j) scores[j] = -INFINITY;
}

// Scores become probabilities against the new maximum of each lane; what was gathered before is
// rescaled. `top` receives the largest probability of each lane in this block.
static inline void softmax_step(int64_t padded, int64_t count, int64_t ld, float* scores, float* max,
                                float* sum, float* top, float* sums, int64_t ldv) {
  const vf log2e = v_set(LOG2E), none = v_set(-INFINITY), zero = v_zero();
  for (int64_t l = 0; l < ld; l += VL) {
    vf peak = none;
    for (int64_t k = 0; k < padded; ++k) peak = v_max(v_load(scores + k * ld + l), peak);
    const vf before = v_load(max + l), after = v_max(peak, before);
    alignas(64) float was[VL], is[VL], base[VL], factor[VL];
    v_store(was, before), v_store(is, after);
    for (int i = 0; i < VL; ++i) base[i] = is[i] == -INFINITY ? 0.0f : is[i];
    const vf shift = v_load(base);
    const vf rescale = v_exp2(v_mul(v_sub(before, shift), log2e));
    v_store(top + l, v_exp2(v_mul(v_sub(peak, shift), log2e)));
    v_store(max + l, after);
    v_store(factor, rescale);
    vf total = zero;
    for (int64_t k = 0; k < padded; ++k) {
      float* x = scores + k * ld + l;
      const vf p = v_exp2(v_mul(v_sub(v_load(x), shift), log2e));
      v_store(x, p);
      total = v_add(total, p);
    }
    for (int i = 0; i < VL && l + i < count; ++i) {
      if (was[i] == is[i]) continue;
      sum[l + i] *= factor[i];
      const vf by = v_set(factor[i]);
      float* x = sums + (l + i) * ldv;
      for (int64_t c = 0; c < ldv; c += VL) v_store(x + c, v_mul(v_load(x + c), by));
    }
    v_store(sum + l, v_add(v_load(sum + l), total));
  }
}

}  // namespace GP_ISA
}  // namespace gp
