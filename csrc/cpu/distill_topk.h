// A teacher that is known at k ids: a divergence over k + 1 bins, the last one the rest.
//
// The student's probability of the rest is summed over the rest itself, not taken as 1 - sum, which
// loses its digits where the rest is small.
#pragma once

#include "cpu/distill_row.h"

namespace gp {
namespace GP_ISA {

struct Bin {
  double divergence;  // its term of D
  double slope;       // P dD/dP, up to c * P with the same c for all bins
};

// One bin of log-probability `lp` for the student and `lq` for the teacher.
static Bin bin_term(Divergence kind, float beta, double lp, double lq) {
  const double p = ::exp(lp), q = ::exp(lq);
  if (kind == Divergence::tv) {
    const double sign = p > q ? 1.0 : p < q ? -1.0 : 0.0;
    return {0.5 * ::fabs(p - q), 0.5 * p * sign};
  }
  if (kind == Divergence::forward_kl) return {q > 0.0 ? q * (lq - lp) : 0.0, -q};
  double d = lq - lp;
  d = d > -80.0 ? (d < 80.0 ? d : 80.0) : -80.0;  // both -inf: -80, times probabilities of 0
  if (kind == Divergence::reverse_kl) return {-p * d, -p * d};
  const Mixture m(kind, beta);
  const double y = double(m.ws) + double(m.wt) * ::exp(d), log_y = ::log(y);
  const double rest = kind == Divergence::jsd ? 0.0 : m.b * p - m.ws / y * (m.a * q + m.b * p);
  return {m.a * q * (d - log_y) - m.b * p * log_y, rest - m.b * p * log_y};
}

// What a row of the top-k teacher comes to. The gradient of the divergence for a score outside the ids
// is `rest * e[i] / rest_sum`; `soft[j]` is that of the j-th id.
struct TopK {
  double divergence, rest, rest_sum, rest_max, lse;
  RowError error;
};

// u: scores, changed: -inf at the ids, then e = exp(u - rest_max). taken: (k) scores at the ids.
static TopK topk_row(const DistillLossArgs& a, int64_t row, float* u, int64_t padded, float* taken,
                     double* soft) {
  TopK out{0.0, 0.0, 0.0, 0.0, 0.0, RowError::none};
  const int64_t* ids = a.ids + row * a.k;
  const float* logprobs = a.logprobs + row * a.k;
  constexpr uint32_t MARK = 0x7fc0dead;  // a NaN that no arithmetic makes
  for (int64_t j = 0; j < a.k; ++j) {
    if (ids[j] < 0 || ids[j] >= a.vocab) { out.error = RowError::id; return out; }
    taken[j] = u[ids[j]];
    if (float_to_bits(taken[j]) == MARK) { out.error = RowError::repeated; return out; }
    u[ids[j]] = bits_to_float(MARK);
  }
  for (int64_t j = 0; j < a.k; ++j) u[ids[j]] = -INFINITY;

  vf top = v_set(-INFINITY);
  for (int64_t i = 0; i < padded; i += VL) top = v_max(v_load(u + i), top);
  const float rest_max = v_hmax(top);
  out.rest_max = rest_max > -INFINITY ? rest_max : 0.0;
  double unused[2];
  const vf shift = v_set(float(out.rest_max));
  sum_over(padded, &out.rest_sum, &unused[0], &unused[1], [&](int64_t i, vf& sum, vf&, vf&) {
    const vf e = v_exp_nan(v_sub(v_load(u + i), shift));
    v_store(u + i, e);
    sum = v_add(sum, e);
  });
  double known_max = -INFINITY, known = 0.0, mass = 0.0, lp_max = -INFINITY;
  for (int64_t j = 0; j < a.k; ++j) {
    if (!(taken[j] <= known_max)) known_max = taken[j];
    if (!(logprobs[j] <= lp_max)) lp_max = logprobs[j];
  }
  for (int64_t j = 0; j < a.k; ++j) {
    known += ::exp(taken[j] - known_max);
    mass += ::exp(double(logprobs[j]));
  }
  if (!(mass <= 1.01)) { out.error = RowError::mass; return out; }
  const double known_lse = known_max + ::log(known);
  const double rest_lse = out.rest_sum > 0.0 ? out.rest_max + ::log(out.rest_sum) : -INFINITY;
  const double high = known_lse > rest_lse ? known_lse : rest_lse;
  out.lse = high + ::log(::exp(known_lse - high) + ::exp(rest_lse - high));
  // A NaN among the rest shows in rest_sum, which no comparison above let through.
  if (out.rest_sum != out.rest_sum) out.lse = out.rest_sum;

  double scale = 1.0, shift_q = 0.0, base = out.lse, mean = 0.0;
  if (!a.tail) {
    double z = 0.0;
    for (int64_t j = 0; j < a.k; ++j) z += ::exp((logprobs[j] - lp_max) * a.logprob_scale);
    scale = a.logprob_scale, shift_q = lp_max * a.logprob_scale + ::log(z), base = known_lse;
    if (out.rest_sum != out.rest_sum) base = out.rest_sum;
  }
  for (int64_t j = 0; j < a.k; ++j) {
    const Bin bin = bin_term(a.kind, a.beta, taken[j] - base, logprobs[j] * scale - shift_q);
    out.divergence += bin.divergence;
    mean += bin.slope;
    soft[j] = bin.slope;
  }
  double rest_slope = 0.0, rest_p = 0.0;
  if (a.tail && a.k < a.vocab) {
    const double left = 1.0 - mass;
    const double lq = left > 0.0 ? ::log(left) : -INFINITY;
    const Bin bin = bin_term(a.kind, a.beta, rest_lse - out.lse, lq);
    out.divergence += bin.divergence;
    mean += bin.slope, rest_slope = bin.slope, rest_p = ::exp(rest_lse - out.lse);
  }
  for (int64_t j = 0; j < a.k; ++j) soft[j] -= ::exp(taken[j] - base) * mean;
  out.rest = rest_slope - rest_p * mean;
  return out;
}

}  // namespace GP_ISA
}  // namespace gp
