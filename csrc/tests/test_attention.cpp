// Attention kernels in every instruction set against double precision, without Python.
#include "cpu/attention.h"

#include "tests/compare.h"

namespace {

struct Problem {
  gp::AttentionShape s;
  std::vector<float> q, k, v, out, dout, dq, dk, dv, lse;
  std::vector<double> ref_out, ref_lse, ref_dq, ref_dk, ref_dv;
};

gp::Tensor4 tensor(std::vector<float>& x, int64_t seqlen, int64_t heads, int64_t dim) {
  return {x.data(), seqlen * heads * dim, heads * dim, dim};
}

// The textbook formulas, one row of scores at a time.
void reference(Problem& p) {
  const gp::AttentionShape& s = p.s;
  p.ref_out.assign(p.out.size(), 0);
  p.ref_lse.assign(p.lse.size(), -INFINITY);
  p.ref_dq.assign(p.q.size(), 0);
  p.ref_dk.assign(p.k.size(), 0);
  p.ref_dv.assign(p.v.size(), 0);
  std::vector<double> prob(s.seqlen_k);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.seqlen_q; ++i) {
        const int64_t hk = h / (s.heads / s.heads_k), at = i + s.seqlen_k - s.seqlen_q;
        const int64_t q = ((b * s.seqlen_q + i) * s.heads + h) * s.dim;
        const int64_t o = ((b * s.seqlen_q + i) * s.heads + h) * s.dim_v;
        auto key = [&](int64_t j) { return (b * s.seqlen_k + j) * s.heads_k + hk; };
        auto seen = [&](int64_t j) {
          return (s.window_left < 0 || j >= at - s.window_left) &&
                 (s.window_right < 0 || j <= at + s.window_right);
        };
        double sum = 0, delta = 0;
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          double x = 0;
          for (int64_t d = 0; d < s.dim; ++d) x += double(p.q[q + d]) * p.k[key(j) * s.dim + d];
          prob[j] = seen(j) ? std::exp(x * s.scale) : 0;
          sum += prob[j];
        }
        if (sum == 0) continue;
        p.ref_lse[(b * s.heads + h) * s.seqlen_q + i] = std::log(sum);
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          prob[j] /= sum;
          for (int64_t d = 0; d < s.dim_v; ++d) {
            p.ref_out[o + d] += prob[j] * p.v[key(j) * s.dim_v + d];
            p.ref_dv[key(j) * s.dim_v + d] += prob[j] * p.dout[o + d];
          }
        }
        for (int64_t d = 0; d < s.dim_v; ++d) delta += p.ref_out[o + d] * p.dout[o + d];
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          double dp = 0;
          for (int64_t d = 0; d < s.dim_v; ++d)
            dp += double(p.dout[o + d]) * p.v[key(j) * s.dim_v + d];
          const double ds = prob[j] * (dp - delta) * s.scale;
          for (int64_t d = 0; d < s.dim; ++d) {
            p.ref_dq[q + d] += ds * p.k[key(j) * s.dim + d];
            p.ref_dk[key(j) * s.dim + d] += ds * p.q[q + d];
          }
        }
      }
}

void check(gp::AttentionShape s) {
  Problem p;
  p.s = s;
  uint32_t state = 1;
  auto fill = [&](std::vector<float>& x, int64_t n) {
    x.resize(n);
    for (float& value : x) value = noise(state);
  };
  fill(p.q, s.batch * s.seqlen_q * s.heads * s.dim);
  fill(p.k, s.batch * s.seqlen_k * s.heads_k * s.dim);
  fill(p.v, s.batch * s.seqlen_k * s.heads_k * s.dim_v);
  fill(p.dout, s.batch * s.seqlen_q * s.heads * s.dim_v);
  p.out.assign(p.dout.size(), NAN);
  p.lse.assign(s.batch * s.heads * s.seqlen_q, NAN);
  p.dq.assign(p.q.size(), NAN);
  p.dk.assign(p.k.size(), NAN);
  p.dv.assign(p.v.size(), NAN);
  reference(p);
  const gp::Tensor4 q = tensor(p.q, s.seqlen_q, s.heads, s.dim),
                    k = tensor(p.k, s.seqlen_k, s.heads_k, s.dim),
                    v = tensor(p.v, s.seqlen_k, s.heads_k, s.dim_v),
                    out = tensor(p.out, s.seqlen_q, s.heads, s.dim_v);
  gp::AttentionFwdArgs forward{s, q, k, v, out, p.lse.data()};
  if (!GP_KERNEL(attention_fwd)(forward)) ++failures;
  compare("out", p.out, p.ref_out);
  compare("lse", p.lse, p.ref_lse);
  gp::AttentionBwdArgs backward{};
  backward.shape = s;
  backward.q = q, backward.k = k, backward.v = v, backward.out = out;
  backward.dout = tensor(p.dout, s.seqlen_q, s.heads, s.dim_v);
  backward.dq = tensor(p.dq, s.seqlen_q, s.heads, s.dim);
  backward.dk = tensor(p.dk, s.seqlen_k, s.heads_k, s.dim);
  backward.dv = tensor(p.dv, s.seqlen_k, s.heads_k, s.dim_v);
  backward.lse = p.lse.data();
  if (!GP_KERNEL(attention_bwd)(backward)) ++failures;
  compare("dq", p.dq, p.ref_dq);
  compare("dk", p.dk, p.ref_dk);
  compare("dv", p.dv, p.ref_dv);
}

gp::AttentionShape shape(int64_t batch, int64_t seqlen_q, int64_t seqlen_k, int64_t heads,
                         int64_t heads_k, int64_t dim, int64_t dim_v, int64_t left, int64_t right,
                         int threads) {
  gp::AttentionShape s{};
  s.batch = batch, s.seqlen_q = seqlen_q, s.seqlen_k = seqlen_k;
  s.heads = heads, s.heads_k = heads_k, s.dim = dim, s.dim_v = dim_v;
  s.lse_batch = heads * seqlen_q, s.lse_head = seqlen_q;
  s.window_left = left, s.window_right = right;
  s.scale = 0.2f;
  s.dtype = gp::DType::f32;
  s.threads = threads;
  return s;
}

}  // namespace

int main() {
  for (gp::Isa isa : {gp::Isa::scalar, gp::Isa::avx2, gp::Isa::avx512}) {
    if (!gp::force_isa(isa)) continue;
    check(shape(1, 1, 1, 1, 1, 1, 1, -1, -1, 1));
    check(shape(2, 130, 210, 4, 2, 40, 24, -1, 0, 2));
    check(shape(1, 210, 130, 2, 1, 64, 64, -1, 0, 3));
    check(shape(1, 300, 300, 2, 2, 17, 17, 31, 12, 2));
    check(shape(1, 7, 0, 2, 2, 8, 8, -1, -1, 2));
    check(shape(1, 0, 7, 2, 2, 8, 8, -1, -1, 2));
  }
  if (failures == 0) std::printf("attention: passed\n");
  return failures != 0;
}
