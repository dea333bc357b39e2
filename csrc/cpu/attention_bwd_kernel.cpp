// Backward in one pass: with P = exp(S - lse), dP = dO V^T, delta = rowsum(dO * O) - dlse and
// dS = P * (dP - delta):  dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K.
//
// A work item is a block of keys of one (batch, key head). It walks over the query heads of its group
// and over their blocks of queries; dK and dV gather in its scratch. dQ gathers in memory, where the
// blocks of keys add in their order: each waits for the one before, which a thread took earlier, so
// nothing waits for ever and the sum is the same whatever the number of threads.
#include <sched.h>

#include "common/parallel.h"
#include "cpu/attention_tile.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t BLOCK_M = 96;

struct Backward {
  const AttentionBwdArgs& a;
  const AttentionShape& s;
  Visible visible;
  int64_t block_n, blocks_q, blocks_k, dq_stride;
  float *delta, *dq;  // (batch, heads, seqlen_q) and the same with dq_stride columns
  int* turn;          // (batch, heads, blocks_q): the block of keys that may add to dQ next

  explicit Backward(const AttentionBwdArgs& args)
      : a(args), s(args.shape), visible(args.shape),
        block_n(max64(args.shape.dim, args.shape.dim_v) > 128 ? 96 : 192),
        blocks_q((s.seqlen_q + BLOCK_M - 1) / BLOCK_M),
        blocks_k((s.seqlen_k + block_n - 1) / block_n), dq_stride(round_up(s.dim, VL)) {}

  int64_t row(int64_t b, int64_t h, int64_t i) const { return (b * s.heads + h) * s.seqlen_q + i; }
  // The blocks of keys that a block of queries sees; last < first if none.
  int64_t first_block(int64_t block_q) const { return visible.lo(block_q * BLOCK_M) / block_n; }
  int64_t last_block(int64_t block_q) const {
    const int64_t hi = visible.hi(min64((block_q + 1) * BLOCK_M, s.seqlen_q) - 1);
    return hi == 0 ? -1 : (hi - 1) / block_n;
  }
};

// One thread's scratch.
struct Work {
  int64_t stride_k, stride_v, score_stride;
  float *keys, *keys_t, *values_t, *dk, *dv, *queries, *dout, *scores, *dscores, *lines;

  Work(const Backward& w, float* memory)
      : stride_k(row_stride(w.s.dim)), stride_v(row_stride(w.s.dim_v)),
        score_stride(w.block_n + ROW_PAD) {
    auto take = [&](int64_t floats) {
      float* p = memory;
      memory += floats;
      return p;
    };
    keys = take(w.block_n * stride_k);
    keys_t = take(w.block_n * stride_k);
    values_t = take(w.block_n * stride_v);
    dk = take(w.block_n * stride_k);
    dv = take(w.block_n * stride_v);
    queries = take(BLOCK_M * stride_k);
    dout = take(BLOCK_M * stride_v);
    scores = take(BLOCK_M * score_stride);
    dscores = take(BLOCK_M * score_stride);
    lines = take(PACK_ROWS * max64(stride_k, stride_v));
  }
  static int64_t size(const Backward& w) {
    const int64_t k = row_stride(w.s.dim), v = row_stride(w.s.dim_v);
    return w.block_n * (3 * k + 2 * v) + BLOCK_M * (k + v + 2 * (w.block_n + ROW_PAD)) +
           PACK_ROWS * max64(k, v);
  }
};

// delta, the turns, and zeros where a block of queries sees nothing.
void prepare(const Backward& w, int64_t item, float* line) {
  const AttentionShape& s = w.s;
  const int64_t block = item % w.blocks_q, h = item / w.blocks_q % s.heads,
                b = item / w.blocks_q / s.heads;
  w.turn[item] = int(w.first_block(block));
  const bool blind = w.last_block(block) < w.first_block(block);
  float* other = line + row_stride(s.dim_v);
  const int64_t end = min64((block + 1) * BLOCK_M, s.seqlen_q);
  for (int64_t i = block * BLOCK_M; i < end; ++i) {
    load_row(line, at(w.a.out, b, i, h, s.dtype), s.dim_v, s.dtype);
    load_row(other, at(w.a.dout, b, i, h, s.dtype), s.dim_v, s.dtype);
    vf sum = v_zero();
    int64_t j = 0;
    for (; j + VL <= s.dim_v; j += VL) sum = v_fma(v_load(line + j), v_load(other + j), sum);
    float delta = v_sum(sum);
    for (; j < s.dim_v; ++j) delta += line[j] * other[j];
    const int64_t row = w.row(b, h, i);
    w.delta[row] = delta - (w.a.dlse ? w.a.dlse[row] : 0.0f);
    if (blind) {
      fill(w.dq + row * w.dq_stride, s.dim, 0.0f);
      store_row(at(w.a.dq, b, i, h, s.dtype), w.dq + row * w.dq_stride, s.dim, s.dtype);
    }
  }
}

// scores become P and dscores dS, both 0 where row i of the queries sees nothing of the block.
void gradient_row(float* p, float* ds, int64_t cols, int64_t lo, int64_t hi, float lse,
                  float delta) {
  const int64_t from = lo / VL * VL, to = round_up(hi, VL);
  fill(p + from, lo - from, -INFINITY);
  fill(p + hi, to - hi, -INFINITY);
  // A row without a key has lse -inf; +inf makes each of its probabilities 0. Here the difference is
  // taken first: the error of a rounded lse * log2(e) would be the same in a whole row, and add up.
  const vf shift = v_set(lse == -INFINITY ? INFINITY : lse), d = v_set(delta);
  const vf log2e = v_set(LOG2E);
  for (int64_t j = from; j < to; j += VL) {
    const vf x = v_exp2(v_mul(v_sub(v_load(p + j), shift), log2e));
    v_store(p + j, x);
    v_store(ds + j, v_mul(x, v_sub(v_load(ds + j), d)));
  }
  fill(p, from, 0.0f);
  fill(ds, from, 0.0f);
  fill(p + to, cols - to, 0.0f);
  fill(ds + to, cols - to, 0.0f);
}

// The bounds in query rows of each strip of keys: what the transposed products sum over.
void key_bounds(Bounds& bounds, const Visible& visible, int64_t q0, int64_t rows, int64_t k0,
                int64_t cols) {
  int64_t lo = 0, hi = 0;
  for (int64_t m = 0, s = 0; m < cols; m += MR, ++s) {
    const int64_t last = min64(m + MR, cols) - 1;
    while (lo < rows && visible.hi(q0 + lo) <= k0 + m) ++lo;
    while (hi < rows && visible.lo(q0 + hi) <= k0 + last) ++hi;
    bounds.lo[s] = int(lo);
    bounds.hi[s] = int(hi);
  }
}

void run_pair(const Backward& w, const Work& t, int64_t b, int64_t h, int64_t block_q,
              int64_t block_k, int64_t cols) {
  const AttentionShape& s = w.s;
  const int64_t q0 = block_q * BLOCK_M, rows = min64(BLOCK_M, s.seqlen_q - q0);
  const int64_t k0 = block_k * w.block_n, padded = round_up(cols, VL);
  Bounds by_query, by_key;
  row_bounds(by_query, w.visible, q0, rows, k0, cols);
  key_bounds(by_key, w.visible, q0, rows, k0, cols);
  pack_rows(t.queries, t.stride_k, round_up(s.dim, VL), at(w.a.q, b, q0, h, s.dtype), w.a.q.seq,
            rows, s.dim, s.dtype, s.scale);
  pack_rows(t.dout, t.stride_v, round_up(s.dim_v, VL), at(w.a.dout, b, q0, h, s.dtype),
            w.a.dout.seq, rows, s.dim_v, s.dtype, 1.0f);
  product_scores(rows, padded, s.dim, t.queries, t.stride_k, t.keys_t, t.scores, t.score_stride,
                 by_query);
  product_scores(rows, padded, s.dim_v, t.dout, t.stride_v, t.values_t, t.dscores, t.score_stride,
                 by_query);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = w.row(b, h, q0 + r);
    const int64_t lo = min64(max64(w.visible.lo(q0 + r) - k0, 0), cols);
    const int64_t hi = max64(min64(w.visible.hi(q0 + r) - k0, cols), lo);
    gradient_row(t.scores + r * t.score_stride, t.dscores + r * t.score_stride, padded, lo, hi,
                 w.a.lse[row], w.delta[row]);
  }
  product_sum<true>(cols, round_up(s.dim_v, VL), t.scores, t.score_stride, t.dout, t.stride_v, t.dv,
                    t.stride_v, by_key, true);
  product_sum<true>(cols, round_up(s.dim, VL), t.dscores, t.score_stride, t.queries, t.stride_k,
                    t.dk, t.stride_k, by_key, true);
  int* turn = w.turn + (b * s.heads + h) * w.blocks_q + block_q;
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != block_k) sched_yield();
  float* dq = w.dq + w.row(b, h, q0) * w.dq_stride;
  product_sum<false>(rows, round_up(s.dim, VL), t.dscores, t.score_stride, t.keys, t.stride_k, dq,
                     w.dq_stride, by_query, block_k != w.first_block(block_q));
  __atomic_store_n(turn, int(block_k + 1), __ATOMIC_RELEASE);
  if (block_k == w.last_block(block_q))
    for (int64_t r = 0; r < rows; ++r)
      store_row(at(w.a.dq, b, q0 + r, h, s.dtype), dq + r * w.dq_stride, s.dim, s.dtype);
}

void run_keys(const Backward& w, const Work& t, int64_t b, int64_t head_k, int64_t block_k) {
  const AttentionShape& s = w.s;
  const int64_t k0 = block_k * w.block_n, cols = min64(w.block_n, s.seqlen_k - k0);
  const int64_t padded = round_up(cols, VL), group = s.heads / s.heads_k;
  const void *k = at(w.a.k, b, k0, head_k, s.dtype), *v = at(w.a.v, b, k0, head_k, s.dtype);
  // The scale of dQ goes into these keys; that of dK comes with the packed queries.
  pack_rows(t.keys, t.stride_k, round_up(s.dim, VL), k, w.a.k.seq, cols, s.dim, s.dtype, s.scale);
  pack_transposed(t.keys_t, padded, k, w.a.k.seq, cols, s.dim, s.dtype, t.lines);
  pack_transposed(t.values_t, padded, v, w.a.v.seq, cols, s.dim_v, s.dtype, t.lines);
  fill(t.dk, cols * t.stride_k, 0.0f);
  fill(t.dv, cols * t.stride_v, 0.0f);
  for (int64_t h = head_k * group; h < (head_k + 1) * group; ++h)
    for (int64_t block_q = 0; block_q < w.blocks_q; ++block_q)
      if (w.first_block(block_q) <= block_k && block_k <= w.last_block(block_q))
        run_pair(w, t, b, h, block_q, block_k, cols);
  for (int64_t r = 0; r < cols; ++r) {
    store_row(at(w.a.dk, b, k0 + r, head_k, s.dtype), t.dk + r * t.stride_k, s.dim, s.dtype);
    store_row(at(w.a.dv, b, k0 + r, head_k, s.dtype), t.dv + r * t.stride_v, s.dim_v, s.dtype);
  }
}

}  // namespace

bool attention_bwd(const AttentionBwdArgs& a) {
  const AttentionShape& s = a.shape;
  Backward w(a);
  const int64_t rows = s.batch * s.heads * s.seqlen_q, heads_k = s.batch * s.heads_k;
  const int64_t thread_size = Work::size(w);
  Scratch thread_memory(s.threads * thread_size * 4), delta(rows * 4);
  Scratch dq(rows * w.dq_stride * 4), turn(s.batch * s.heads * w.blocks_q * 4);
  if (!thread_memory.ok() || !delta.ok() || !dq.ok() || !turn.ok()) return false;
  w.delta = delta.as<float>();
  w.dq = dq.as<float>();
  w.turn = turn.as<int>();
  parallel_for(s.batch * s.heads * w.blocks_q, s.threads, [&](int64_t item, int thread) {
    prepare(w, item, thread_memory.as<float>() + thread * thread_size);
  });
  // All heads' first blocks of keys, then their second ones: threads rarely meet in one dQ, and with
  // a causal mask the heavy items come first.
  parallel_for(heads_k * w.blocks_k, s.threads, [&](int64_t item, int thread) {
    const Work work(w, thread_memory.as<float>() + thread * thread_size);
    const int64_t head = item % heads_k;
    run_keys(w, work, head / s.heads_k, head % s.heads_k, item / heads_k);
  });
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
