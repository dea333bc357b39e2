// Backward in one pass: with P = exp(S - lse), dP = dO V^T, delta = rowsum(dO * O) - dlse and
// dS = P * (dP - delta):  dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K.
//
// A work item is a block of keys of one (sequence, key head). It walks over the query heads of its
// group and over their blocks of queries; dK and dV gather in its scratch. dQ gathers in memory, where
// the blocks of keys add in their order: each waits for the one before, which a thread took earlier,
// so nothing waits for ever and the sum is the same whatever the number of threads.
#include <sched.h>

#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/attention_score.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t BLOCK_M = 96;

struct Backward {
  const AttentionBwdArgs& a;
  const AttentionShape& s;
  int64_t block_n, dq_stride, max_blocks_k;
  int64_t* tiles_before;  // (batch + 1): blocks of queries of the sequences before b
  bool dq_in_place;       // dQ gathers in the output, else in `dq`
  float *delta, *dq;      // rows as in lse; dq has dq_stride columns
  double* dsinks;         // by block of queries
  int* turn;              // by block of queries: the block of keys that may add to dQ next

  Backward(const AttentionBwdArgs& args, int64_t* counts)
      : a(args), s(args.shape),
        block_n(max64(s.dim, s.dim_v) <= 128 ? 192 : max64(s.dim, s.dim_v) <= 256 ? 96 : 48),
        dq_stride(round_up(s.dim, VL)), max_blocks_k(0), tiles_before(counts),
        dq_in_place(s.dtype == DType::f32 && s.dim % VL == 0) {
    if (dq_in_place) dq_stride = a.dq.seq;
    tiles_before[0] = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
      const Sequence seq(s, b);
      tiles_before[b + 1] = tiles_before[b] + (seq.len_q + BLOCK_M - 1) / BLOCK_M;
      max_blocks_k = max64(max_blocks_k, (seq.len_k + block_n - 1) / block_n);
    }
  }

  int64_t tiles(int64_t b) const { return tiles_before[b + 1] - tiles_before[b]; }
  int64_t tile(int64_t b, int64_t h, int64_t block_q) const {
    return tiles_before[b] * s.heads + h * tiles(b) + block_q;
  }
  int64_t row(int64_t b, int64_t h, int64_t i) const { return b * s.lse_batch + h * s.lse_head + i; }
  float* dq_row(int64_t b, int64_t h, int64_t i) const {
    if (dq_in_place) return static_cast<float*>(at(a.dq, b, i, h, s.dtype));
    return dq + row(b, h, i) * dq_stride;
  }
  // `first`: of the blocks of keys that add to this row; x may be overwritten.
  void add_dq(int64_t b, int64_t h, int64_t i, float* x, bool first, bool last) const {
    float* sum = dq_row(b, h, i);
    const bool store = last && !dq_in_place;
    if (!first) add_row(store ? x : sum, store ? sum : x, s.dim);
    else if (!store) copy_row(sum, x, s.dim);
    if (store) store_row(at(a.dq, b, i, h, s.dtype), x, s.dim, s.dtype);
  }
  // The blocks of keys that a block of queries sees; last < first if none.
  int64_t first_block(const Visible& visible, int64_t block_q) const {
    return visible.lo(block_q * BLOCK_M) / block_n;
  }
  int64_t last_block(const Visible& visible, int64_t block_q, int64_t len_q) const {
    const int64_t hi = visible.hi(min64((block_q + 1) * BLOCK_M, len_q) - 1);
    return hi == 0 ? -1 : (hi - 1) / block_n;
  }
};

// One thread's scratch.
struct Work {
  int64_t stride_k, stride_v, score_stride;
  float *keys, *keys_t, *values_t, *dk, *dv, *queries, *dout, *scores, *dscores, *cap, *line, *sum, *factor;

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
    cap = take(score_stride);
    line = take(score_stride);
    sum = take(score_stride);
    factor = take(score_stride);
  }
  static int64_t size(const Backward& w) {
    const int64_t k = row_stride(w.s.dim), v = row_stride(w.s.dim_v), n = w.block_n + ROW_PAD;
    return w.block_n * (3 * k + 2 * v) + BLOCK_M * (k + v + 2 * n) + 4 * n;
  }
};

// delta, the turns, the sink's gradient, and zeros where a block of queries sees nothing.
void prepare(const Backward& w, int64_t item, float* line) {
  const AttentionShape& s = w.s;
  const int64_t b = find_sequence(w.tiles_before, s.heads, s.batch, item);
  const Sequence seq(s, b);
  const Visible visible(s, seq);
  const int64_t rest = item - w.tiles_before[b] * s.heads;
  const int64_t h = rest / w.tiles(b), block = rest % w.tiles(b);
  const int64_t first = w.first_block(visible, block);
  const bool blind = w.last_block(visible, block, seq.len_q) < first;
  const float sink = sink_of(s, h);
  double dsink = 0;
  w.turn[item] = int(first);
  float* other = line + row_stride(s.dim_v);
  const int64_t end = min64((block + 1) * BLOCK_M, seq.len_q);
  for (int64_t i = block * BLOCK_M; i < end; ++i) {
    const int64_t row = seq.first_q + i, at_row = w.row(b, h, row);
    load_row(line, at(w.a.out, b, row, h, s.dtype), s.dim_v, s.dtype);
    load_row(other, at(w.a.dout, b, row, h, s.dtype), s.dim_v, s.dtype);
    vf sum = v_zero();
    int64_t j = 0;
    for (; j + VL <= s.dim_v; j += VL) sum = v_fma(v_load(line + j), v_load(other + j), sum);
    float delta = v_sum(sum);
    for (; j < s.dim_v; ++j) delta += line[j] * other[j];
    if (w.a.dlse) delta -= w.a.dlse[at_row];
    w.delta[at_row] = delta;
    // The sink is a key whose value is 0: its dP is 0. Without a sink it is -inf.
    if (sink != -INFINITY) dsink -= double(__builtin_expf(sink - w.a.lse[at_row])) * delta;
    if (blind) {
      fill(line, s.dim, 0.0f);
      w.add_dq(b, h, row, line, true, true);
    }
  }
  w.dsinks[item] = dsink;
}

// Bounds in query rows of the strips of keys: what the transposed products sum over.
void key_bounds(Bounds& bounds, const Visible& visible, const Blocks& blocks, int64_t q0,
                int64_t rows, int64_t k0, int64_t cols) {
  int64_t lo = 0, hi = 0;
  for (int64_t m = 0, s = 0; m < cols; m += MR, ++s) {
    const int64_t last = min64(m + MR, cols) - 1;
    while (lo < rows && visible.hi(q0 + lo) <= k0 + m) ++lo;
    while (hi < rows && visible.lo(q0 + hi) <= k0 + last) ++hi;
    int64_t from = q0 + lo, to = q0 + max64(hi, lo);
    if (blocks.any()) blocks.shrink_queries(k0 + m, k0 + last, from, to);
    bounds.lo[s] = int(from - q0);
    bounds.hi[s] = int(to - q0);
  }
}

// p becomes P and ds dS over [lo, hi), both 0 elsewhere up to cols. Not inlined, as exp_row is not.
__attribute__((noinline)) void gradient_row(float* p, float* ds, int64_t cols, int64_t lo, int64_t hi, float lse,
                  float delta) {
  const int64_t from = lo / VL * VL, to = hi > lo ? round_up(hi, VL) : from;
  fill(p + from, lo - from, -INFINITY);
  fill(p + hi, to - hi, -INFINITY);
  // A row without a key has lse -inf; +inf makes each of its probabilities 0. The difference is taken
  // first: the error of a rounded lse * log2(e) would be the same in a whole row, and add up.
  const vf shift = v_set(lse == -INFINITY ? INFINITY : lse), d = v_set(delta), log2e = v_set(LOG2E);
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

struct Pair {  // a block of queries of one head and a block of keys
  int64_t b, h, q0, rows, k0, cols;
};

// From the products S and dP to P and dS, with what the score rule adds on either side.
void gradients(const Backward& w, const Work& t, const Sequence& seq, const Visible& visible,
               const Pair& pair, const Bounds& bounds) {
  const ScoreRule rule(w.s, seq, pair.b, pair.h);
  const Dropout dropout(w.s, pair.b, pair.h);
  const int64_t padded = round_up(pair.cols, VL);
  // Where all queries share one row of the bias, sums of sums of a block lose less than one long sum.
  const bool one_row = w.a.dbias && w.a.dbias_row == 0;
  float* dbias = nullptr;
  if (w.a.dbias)
    dbias = w.a.dbias + pair.b * w.a.dbias_batch + pair.h * w.a.dbias_head + pair.k0;
  if (one_row) fill(t.sum, pair.cols, 0.0f);
  for (int64_t r = 0; r < pair.rows; ++r) {
    const int64_t i = pair.q0 + r, row = w.row(pair.b, pair.h, seq.first_q + i);
    const int64_t lo = min64(max64(visible.lo(i) - pair.k0, bounds.lo[r / MR]), pair.cols);
    const int64_t hi = max64(min64(visible.hi(i) - pair.k0, bounds.hi[r / MR]), lo);
    float *p = t.scores + r * t.score_stride, *ds = t.dscores + r * t.score_stride;
    if (rule.any) rule.apply(p, i, pair.k0, lo, hi, t.cap, t.line);
    if (dropout.any()) {
      dropout.factors(t.factor, i, pair.k0, lo, hi);
      multiply_row(ds + lo, t.factor + lo, hi - lo);
    }
    gradient_row(p, ds, padded, lo, hi, w.a.lse[row], w.delta[row]);
    if (dropout.any()) multiply_row(p + lo, t.factor + lo, hi - lo);
    if (dbias) {
      float* sum = one_row ? t.sum : dbias + i * w.a.dbias_row;
      for (int64_t j = lo; j < hi; ++j) sum[j] += ds[j];
    }
    if (rule.softcap != 0.0f)
      for (int64_t j = lo; j < hi; ++j) ds[j] *= t.cap[j];
  }
  if (one_row)
    for (int64_t j = 0; j < pair.cols; ++j) dbias[j] += t.sum[j];
}

void run_pair(const Backward& w, const Work& t, const Sequence& seq, const Visible& visible,
              const Pair& pair, int64_t block_q, int64_t block_k) {
  const AttentionShape& s = w.s;
  const int64_t row = seq.first_q + pair.q0, padded = round_up(pair.cols, VL);
  const Blocks blocks(s, pair.b, pair.h);
  Bounds by_query, by_key;
  if (query_bounds(by_query, visible, blocks, pair.q0, pair.rows, pair.k0, pair.cols)) {
    key_bounds(by_key, visible, blocks, pair.q0, pair.rows, pair.k0, pair.cols);
    pack_rows(t.queries, t.stride_k, round_up(s.dim, VL), at(w.a.q, pair.b, row, pair.h, s.dtype),
              w.a.q.seq, pair.rows, s.dim, s.dtype, s.scale);
    pack_rows(t.dout, t.stride_v, round_up(s.dim_v, VL), at(w.a.dout, pair.b, row, pair.h, s.dtype),
              w.a.dout.seq, pair.rows, s.dim_v, s.dtype, 1.0f);
    product_scores(pair.rows, padded, s.dim, t.queries, t.stride_k, t.keys_t, t.scores,
                   t.score_stride, by_query, dim_chunk(s.dtype, s.dim));
    product_scores(pair.rows, padded, s.dim_v, t.dout, t.stride_v, t.values_t, t.dscores,
                   t.score_stride, by_query, dim_chunk(s.dtype, s.dim_v));
    gradients(w, t, seq, visible, pair, by_query);
    product_sum<true>(pair.cols, round_up(s.dim_v, VL), t.scores, t.score_stride, t.dout, t.stride_v,
                      t.dv, t.stride_v, by_key, true, sum_chunk(s.dtype));
    product_sum<true>(pair.cols, round_up(s.dim, VL), t.dscores, t.score_stride, t.queries,
                      t.stride_k, t.dk, t.stride_k, by_key, true, sum_chunk(s.dtype));
    // dQ takes the place of the queries, and is added to memory row by row, while it is near.
    product_sum<false>(pair.rows, round_up(s.dim, VL), t.dscores, t.score_stride, t.keys, t.stride_k,
                       t.queries, t.stride_k, by_query, false, sum_chunk(s.dtype));
  } else {
    fill(t.queries, pair.rows * t.stride_k, 0.0f);
  }
  const bool first = block_k == w.first_block(visible, block_q);
  const bool last = block_k == w.last_block(visible, block_q, seq.len_q);
  int* turn = w.turn + w.tile(pair.b, pair.h, block_q);
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != block_k) sched_yield();
  for (int64_t r = 0; r < pair.rows; ++r)
    w.add_dq(pair.b, pair.h, row + r, t.queries + r * t.stride_k, first, last);
  __atomic_store_n(turn, int(block_k + 1), __ATOMIC_RELEASE);
}

void run_keys(const Backward& w, const Work& t, int64_t b, int64_t head_k, int64_t block_k) {
  const AttentionShape& s = w.s;
  const Sequence seq(s, b);
  const Visible visible(s, seq);
  const int64_t k0 = block_k * w.block_n, cols = min64(w.block_n, seq.len_k - k0);
  if (cols <= 0) return;
  const int64_t row = seq.first_k + k0, padded = round_up(cols, VL), group = s.heads / s.heads_k;
  const void *k = at(w.a.k, b, row, head_k, s.dtype), *v = at(w.a.v, b, row, head_k, s.dtype);
  // The scale of dQ goes into these keys; that of dK comes with the packed queries.
  pack_rows(t.keys, t.stride_k, round_up(s.dim, VL), k, w.a.k.seq, cols, s.dim, s.dtype, s.scale);
  pack_transposed(t.keys_t, padded, k, w.a.k.seq, cols, s.dim, s.dtype);
  pack_transposed(t.values_t, padded, v, w.a.v.seq, cols, s.dim_v, s.dtype);
  fill(t.dk, cols * t.stride_k, 0.0f);
  fill(t.dv, cols * t.stride_v, 0.0f);
  for (int64_t h = head_k * group; h < (head_k + 1) * group; ++h)
    for (int64_t block_q = 0; block_q < w.tiles(b); ++block_q) {
      if (block_k < w.first_block(visible, block_q)) break;
      if (block_k > w.last_block(visible, block_q, seq.len_q)) continue;
      const int64_t q0 = block_q * BLOCK_M;
      const Pair pair{b, h, q0, min64(BLOCK_M, seq.len_q - q0), k0, cols};
      run_pair(w, t, seq, visible, pair, block_q, block_k);
    }
  for (int64_t r = 0; r < cols; ++r) {
    store_row(at(w.a.dk, b, row + r, head_k, s.dtype), t.dk + r * t.stride_k, s.dim, s.dtype);
    store_row(at(w.a.dv, b, row + r, head_k, s.dtype), t.dv + r * t.stride_v, s.dim_v, s.dtype);
  }
}

}  // namespace

bool attention_bwd(const AttentionBwdArgs& a) {
  const AttentionShape& s = a.shape;
  Scratch counts((s.batch + 1) * 8);
  if (!counts.ok()) return false;
  Backward w(a, counts.as<int64_t>());
  const int64_t tiles = w.tiles_before[s.batch] * s.heads;
  const int64_t rows = s.cu_seqlens_q ? s.heads * s.lse_head : s.batch * s.lse_batch;
  const int64_t thread_size = Work::size(w);
  const int64_t thread_sizes = s.threads * round_up(thread_size, 16), deltas = round_up(rows, 16);
  Workspace floats((thread_sizes + deltas + (w.dq_in_place ? 0 : rows * w.dq_stride)) * 4);
  Scratch turn(tiles * 4), dsinks(tiles * 8);
  if (!floats.ok() || !turn.ok() || !dsinks.ok()) return false;
  float* const thread_memory = floats.as<float>();
  w.delta = thread_memory + thread_sizes;
  w.dq = w.delta + deltas;
  w.turn = turn.as<int>();
  w.dsinks = dsinks.as<double>();
  parallel_for(tiles, s.threads, [&](int64_t item, int thread) {
    prepare(w, item, thread_memory + thread * round_up(thread_size, 16));
  });
  // All first blocks of keys, then the second ones: threads rarely meet in one dQ, and with a causal
  // mask the heavy items come first. An item has the sequences and heads that share one gradient of
  // the bias, so that they add to it in order.
  const bool all_batches = a.dbias && a.dbias_batch == 0, all_heads = a.dbias && a.dbias_head == 0;
  const int64_t batches = all_batches ? 1 : s.batch, heads = all_heads ? 1 : s.heads_k;
  parallel_for(w.max_blocks_k * batches * heads, s.threads, [&](int64_t item, int thread) {
    const Work work(w, thread_memory + thread * round_up(thread_size, 16));
    const int64_t block = item / (batches * heads), b = item / heads % batches, h = item % heads;
    for (int64_t i = 0; i < (all_batches ? s.batch : 1); ++i)
      for (int64_t j = 0; j < (all_heads ? s.heads_k : 1); ++j)
        run_keys(w, work, b + i, h + j, block);
  });
  if (a.dsinks)
    for (int64_t h = 0; h < s.heads; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t block = 0; block < w.tiles(b); ++block) sum += w.dsinks[w.tile(b, h, block)];
      a.dsinks[h] = float(sum);
    }
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
