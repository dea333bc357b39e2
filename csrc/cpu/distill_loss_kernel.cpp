// Distillation losses on rows of logits: one pass over memory for the sums, one for the gradient, which
// may be written over the logits. In between a row stays in scratch, in the L2 cache.
#include "cpu/distill_loss.h"

#include "common/parallel.h"
#include "cpu/distill_topk.h"

namespace gp {
namespace GP_ISA {
namespace {

// The gradient of a score is cs * S[i] + ct * X[i]; of a logit that times slope and scale, and with
// `hard` + hard * exp(z - hard_lse), z read again from the logits.
struct Combination {
  float cs = 0.0f, ct = 0.0f, hard = 0.0f, hard_lse = 0.0f;
};

struct Row {
  double divergence = 0.0, cross_entropy = 0.0;
  Combination c;
};

struct Thread {
  float *s, *x, *taken;
  double* soft;
};

// Cross entropy where the temperature leaves the labels' softmax a sum of its own.
double hard_sum(const float* u, int64_t padded, float top, float temperature) {
  double sum, unused[2];
  const vf shift = v_set(top), t = v_set(temperature);
  sum_over(padded, &sum, &unused[0], &unused[1], [&](int64_t i, vf& a, vf&, vf&) {
    a = v_add(a, v_exp_nan(v_mul(v_sub(v_load(u + i), shift), t)));
  });
  return sum;
}

float finite_or_zero(float x) { return x > -INFINITY ? x : 0.0f; }

// Student alone: S = exp(u - top), its sum is returned.
double student_sum(float* s, int64_t padded, float top) {
  double sum, unused[2];
  const vf shift = v_set(top);
  sum_over(padded, &sum, &unused[0], &unused[1], [&](int64_t i, vf& a, vf&, vf&) {
    const vf e = v_exp_nan(v_sub(v_load(s + i), shift));
    v_store(s + i, e);
    a = v_add(a, e);
  });
  return sum;
}

// Divergence from a dense teacher: scores in t.s and t.x become what Combination multiplies.
void dense(const DistillLossArgs& a, const Thread& t, int64_t n, float top_s, float top_t, float soft,
           Row* row, double* lse, float* p_factor) {
  double sum_s, sum_t, sum_x, unused;
  const vf shift_s = v_set(top_s), shift_t = v_set(top_t);
  const bool forward = a.kind == Divergence::forward_kl;
  if (forward || a.kind == Divergence::reverse_kl) {
    sum_over(n, &sum_s, &sum_t, &sum_x, [&](int64_t i, vf& s, vf& q, vf& x) {
      const vf us = v_load(t.s + i), ut = v_load(t.x + i);
      const vf es = v_exp_nan(v_sub(us, shift_s)), et = v_exp_nan(v_sub(ut, shift_t));
      const vf d = bounded(v_sub(ut, us), 1e30f);
      const vf term = v_mul(forward ? et : es, d);
      s = v_add(s, es), q = v_add(q, et), x = v_add(x, term);
      v_store(t.s + i, es);
      v_store(t.x + i, forward ? et : term);
    });
    const double lse_s = top_s + ::log(sum_s), lse_t = top_t + ::log(sum_t);
    *lse = lse_s;
    *p_factor = float(1.0 / sum_s);
    if (forward) {  // p - q
      row->divergence = sum_x / sum_t - lse_t + lse_s;
      row->c.cs = soft * float(1.0 / sum_s), row->c.ct = soft * float(-1.0 / sum_t);
    } else {  // p (log p - log q - D); x holds e (u_t - u_s)
      const double mean = sum_x / sum_s;
      row->divergence = -mean - lse_s + lse_t;
      row->c.cs = soft * float(mean / sum_s), row->c.ct = soft * float(-1.0 / sum_s);
    }
    return;
  }
  sum_over(n, &sum_s, &sum_t, &unused, [&](int64_t i, vf& s, vf& q, vf&) {
    s = v_add(s, v_exp_nan(v_sub(v_load(t.s + i), shift_s)));
    q = v_add(q, v_exp_nan(v_sub(v_load(t.x + i), shift_t)));
  });
  const double log_s = ::log(sum_s), log_t = ::log(sum_t);
  *lse = top_s + log_s;
  *p_factor = 1.0f;
  const vf ls = v_set(float(log_s)), lt = v_set(float(log_t));
  const Mixture m(a.kind, a.beta);
  const vf wt = v_set(m.wt), ws = v_set(m.ws), ma = v_set(m.a), mb = v_set(m.b);
  const vf half = v_set(0.5f), one = v_set(1.0f);
  double total, mean;
  // S becomes p, X becomes p dD/dp up to c p.
  sum_over(n, &total, &mean, &unused, [&](int64_t i, vf& sum, vf& g, vf&) {
    const vf s = v_sub(v_sub(v_load(t.s + i), shift_s), ls);
    const vf q_log = v_sub(v_sub(v_load(t.x + i), shift_t), lt);
    const vf p = v_exp_nan(s), q = v_exp_nan(q_log);
    vf slope;
    if (a.kind == Divergence::tv) {
      const vf d = v_sub(p, q);
      sum = v_fma(half, v_abs(d), sum);
      slope = v_mul(p, v_max(v_min(v_mul(d, v_set(1e38f)), half), v_set(-0.5f)));
    } else {
      const vf d = bounded(v_sub(q_log, s), 80.0f);
      const vf y = v_fma(wt, v_exp_nan(d), ws), log_y = v_log(y);
      const vf aq = v_mul(ma, q), bp = v_mul(mb, p);
      slope = v_sub(v_zero(), v_mul(bp, log_y));
      sum = v_add(sum, v_fma(aq, v_sub(d, log_y), slope));
      if (a.kind != Divergence::jsd)
        slope = v_add(slope, v_sub(bp, v_mul(v_mul(v_div(one, y), ws), v_add(aq, bp))));
    }
    v_store(t.s + i, p);
    v_store(t.x + i, slope);
    g = v_add(g, slope);
  });
  row->divergence = total;
  row->c.cs = soft * float(-mean), row->c.ct = soft;
}

template <DType T>
inline void v_store_as(void* p, int64_t i, vf x) {
  if (T == DType::f32) v_store(static_cast<float*>(p) + i, x);
  else if (T == DType::bf16) v_store_bf16(static_cast<uint16_t*>(p) + i, x);
  else v_store_f16(static_cast<uint16_t*>(p) + i, x);
}

// One vector of the gradient; raw is read only where the cap or another temperature needs it.
inline vf combine(const DistillLossArgs& a, const Combination& c, vf s, vf x, vf raw, bool read) {
  vf g = v_fma(v_set(c.cs), s, v_mul(v_set(c.ct), x));
  if (!read) return g;
  vf slope = v_set(1.0f);
  const vf z = capped(raw, a.student, &slope);
  if (c.hard != 0.0f)
    g = v_fma(v_set(c.hard), v_exp_nan(v_sub(z, v_set(c.hard_lse))), g);
  return v_mul(g, slope);
}

template <DType T>
void write_gradient(const DistillLossArgs& a, int64_t row, const Thread& t, const Combination& c,
                    bool has_x) {
  const void* raw = offset(a.student.data, row * a.student.stride, T);
  void* out = offset(a.grad, row * a.grad_stride, T);
  const bool read = a.student.softcap > 0.0f || c.hard != 0.0f;
  int64_t i = 0;
  for (; i + VL <= a.vocab; i += VL) {
    const vf x = has_x ? v_load(t.x + i) : v_zero();
    const vf r = read ? v_load_as<T>(raw, i) : v_zero();
    v_store_as<T>(out, i, combine(a, c, v_load(t.s + i), x, r, read));
  }
  for (; i < a.vocab; ++i) {
    const vf r = v_set(read ? load_one(raw, i, T) : 0.0f);
    float lanes[VL];
    v_store(lanes, combine(a, c, v_set(t.s[i]), v_set(has_x ? t.x[i] : 0.0f), r, read));
    store_one(out, i, lanes[0], T);
  }
}

void write_gradient(const DistillLossArgs& a, int64_t row, const Thread& t, const Combination& c,
                    bool has_x) {
  switch (a.student.dtype) {
    case DType::f32: return write_gradient<DType::f32>(a, row, t, c, has_x);
    case DType::bf16: return write_gradient<DType::bf16>(a, row, t, c, has_x);
    default: return write_gradient<DType::f16>(a, row, t, c, has_x);
  }
}

RowError run_row(const DistillLossArgs& a, int64_t row, const Thread& t) {
  const DType type = a.student.dtype;
  const int64_t padded = whole_vectors(a.vocab);
  void* out = a.grad ? offset(a.grad, row * a.grad_stride, type) : nullptr;
  const float weight = a.weights[row];
  a.loss[2 * row] = a.loss[2 * row + 1] = 0.0f;
  if (weight == 0.0f) {
    if (out) std::memset(out, 0, size_t(a.vocab) * (type == DType::f32 ? 4 : 2));
    return RowError::none;
  }
  const int64_t label = a.labels ? a.labels[row] : 0;
  if (label < 0 || label >= a.vocab) return RowError::label;
  const float over_t = 1.0f / a.temperature;
  const bool dense_teacher = a.teacher.data != nullptr;
  const bool hard = a.labels && a.hard_weight != 0.0f;
  const float soft = weight * a.soft_weight * over_t, hard_weight = hard ? weight * a.hard_weight : 0;
  const float top_s = finite_or_zero(load_scores(t.s, a.student, row, a.vocab, over_t));
  const double label_u = t.s[label];
  const bool own_sum = hard && a.temperature != 1.0f;
  const double sum_hard = own_sum ? hard_sum(t.s, padded, top_s, a.temperature) : 1.0;

  Row r;
  double lse = 0.0;
  float p_factor = 0.0f;  // p = p_factor * S[i]
  TopK topk{};
  if (dense_teacher) {
    const float top_t = finite_or_zero(load_scores(t.x, a.teacher, row, a.vocab, over_t));
    dense(a, t, padded, top_s, top_t, soft, &r, &lse, &p_factor);
  } else if (a.k > 0) {
    topk = topk_row(a, row, t.s, padded, t.taken, t.soft);
    if (topk.error != RowError::none) return topk.error;
    lse = topk.lse, r.divergence = topk.divergence;
    p_factor = float(::exp(topk.rest_max - lse));
    r.c.cs = topk.rest_sum > 0.0 ? float(soft * topk.rest / topk.rest_sum) : 0.0f;
    if (topk.lse != topk.lse) r.c.cs = NAN;
  } else {
    const double sum = student_sum(t.s, padded, top_s);
    lse = top_s + ::log(sum), p_factor = float(1.0 / sum);
  }
  if (hard) {
    const double hard_lse = own_sum ? top_s * double(a.temperature) + ::log(sum_hard) : lse;
    r.cross_entropy = hard_lse - label_u * double(a.temperature);
    if (own_sum) r.c.hard = hard_weight, r.c.hard_lse = float(hard_lse);
    else r.c.cs += hard_weight * p_factor;
  }
  a.loss[2 * row] = float(r.divergence);
  a.loss[2 * row + 1] = float(r.cross_entropy);
  if (!out) return RowError::none;

  const float scale = a.student.scale;
  r.c.cs *= scale, r.c.ct *= scale, r.c.hard *= scale;
  const void* raw = offset(a.student.data, row * a.student.stride, type);
  // The ids and the label differ from the rest: their raw logits are kept, they are written last.
  const bool read = a.student.softcap > 0.0f || r.c.hard != 0.0f;
  const float label_raw = load_one(raw, label, type);
  float* raws = t.taken + a.k;
  if (read) for (int64_t j = 0; j < a.k; ++j) raws[j] = load_one(raw, a.ids[row * a.k + j], type);
  write_gradient(a, row, t, r.c, dense_teacher);

  const auto single = [&](float g, float raw_value) {  // a gradient as combine() would finish it
    if (!read) return g;
    Combination c = r.c;
    c.cs = 1.0f, c.ct = 0.0f;
    float lanes[VL];
    v_store(lanes, combine(a, c, v_set(g), v_zero(), v_set(raw_value), true));
    return lanes[0];
  };
  float at_label = r.c.cs * t.s[label] + (dense_teacher ? r.c.ct * t.x[label] : 0.0f);
  for (int64_t j = 0; j < a.k; ++j) {
    const int64_t id = a.ids[row * a.k + j];
    double g = soft * t.soft[j];
    if (hard && !own_sum) g += hard_weight * ::exp(t.taken[j] - lse);
    g *= scale;
    if (id == label) at_label = float(g);
    store_one(out, id, single(float(g), read ? raws[j] : 0.0f), type);
  }
  if (hard) {
    // The one-hot part goes through the cap as the rest does.
    store_one(out, label, single(at_label - hard_weight * scale, label_raw), type);
  }
  return RowError::none;
}

}  // namespace

RowStatus distill_loss(const DistillLossArgs& a) {
  const int64_t padded = whole_vectors(a.vocab);
  const int threads = a.threads > 1 ? a.threads : 1;
  const int64_t line = (padded * 4 + 63) / 64 * 64, small = (a.k * 16 + 127) / 64 * 64;
  const bool dense_teacher = a.teacher.data != nullptr;
  const int64_t each = line * (dense_teacher ? 2 : 1) + small;
  const Scratch scratch(each * threads);
  const Scratch found(int64_t(sizeof(RowStatus)) * threads);
  if (!scratch.ok() || !found.ok()) return {RowError::memory, 0};
  RowStatus* status = found.as<RowStatus>();
  for (int i = 0; i < threads; ++i) status[i] = {RowError::none, a.rows};
  // Rows of a small vocabulary are handed out several at a time.
  const int64_t together = a.vocab < 8192 ? 1 + 8192 / (a.vocab + 1) : 1;
  const int64_t items = (a.rows + together - 1) / together;
  parallel_for(items, threads, [&](int64_t item, int thread) {
    char* base = scratch.as<char>() + each * thread;
    Thread t;
    t.s = reinterpret_cast<float*>(base);
    t.x = dense_teacher ? reinterpret_cast<float*>(base + line) : nullptr;
    t.soft = reinterpret_cast<double*>(base + each - small);
    t.taken = reinterpret_cast<float*>(t.soft + a.k);
    const int64_t end = (item + 1) * together;
    for (int64_t row = item * together; row < (end < a.rows ? end : a.rows); ++row) {
      const RowError error = run_row(a, row, t);
      if (error != RowError::none && row < status[thread].row) status[thread] = {error, row};
    }
  });
  RowStatus first = status[0];
  for (int i = 1; i < threads; ++i)
    if (status[i].row < first.row) first = status[i];
  return first;
}

}  // namespace GP_ISA
}  // namespace gp
