// Forward: out = softmax(scale q k^T) v by tiles with an online softmax.
//
// A work item is a few tiles of queries that share a key head. It walks over their keys by blocks: each
// is packed to fp32 into the thread's scratch, where it stays in the L2 cache while the tiles take it in
// turn. Packing costs a twentieth of what one tile does with a block.
#include "common/parallel.h"
#include "common/workspace.h"
#include "cpu/attention_score.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t BLOCK_M = 96;
constexpr int64_t ITEM_ROWS = 6 * BLOCK_M;

// How the sequences are cut. The tiles of a key head are those of its group's query heads: from the last
// queries to the first, and for the same queries head by head.
struct Cut {
  const AttentionFwdArgs& a;
  const AttentionShape& s;
  int64_t block_n;       // keys of a block
  int64_t item_rows;     // queries of an item, at most
  int64_t* items_before;  // (batch + 1): items of one key head in the sequences before b
  int64_t query_stride, score_stride, value_stride;  // floats of a row
  bool log2;  // scores are in units of log2(e): half types, whose own rounding hides that of the factor

  Cut(const AttentionFwdArgs& args, int64_t* counts)
      : a(args), s(args.shape),
        block_n(max64(s.dim, s.dim_v) <= 128 ? 256 : s.dim <= 256 ? 128 : 64),
        items_before(counts), query_stride(row_stride(s.dim)), score_stride(block_n + ROW_PAD),
        value_stride(row_stride(s.dim_v)),
        log2(s.dtype != DType::f32 && s.softcap == 0.0f && !s.alibi_slopes && !s.sinks &&
             s.bias.kind != AttentionBias::additive) {
    int64_t tiles = 0;
    for (int64_t b = 0; b < s.batch; ++b) tiles += tiles_of(Sequence(s, b)) * s.heads;
    // Several items for each thread, so that they end together.
    const int64_t share = tiles / (4 * int64_t(s.threads));
    item_rows = min64(max64(share, 1) * BLOCK_M, ITEM_ROWS);
    items_before[0] = 0;
    for (int64_t b = 0; b < s.batch; ++b)
      items_before[b + 1] = items_before[b] + items_of(Sequence(s, b));
  }

  int64_t group() const { return s.heads / s.heads_k; }
  int64_t items() const { return items_before[s.batch] * s.heads_k; }
  static int64_t tiles_of(const Sequence& seq) { return (seq.len_q + BLOCK_M - 1) / BLOCK_M; }
  int64_t items_of(const Sequence& seq) const {
    if (seq.len_q == 0) return 0;
    const int64_t tiles_of_item = item_rows / min64(seq.len_q, BLOCK_M);
    return (tiles_of(seq) * group() + tiles_of_item - 1) / tiles_of_item;
  }
};

struct Tile {  // of queries of one head, its running state at row `at` of the item's
  int64_t h, q0, rows, at;
  bool begun;  // out holds sums of a block before
};

// One thread's scratch.
struct Work {
  float *keys, *values, *scores, *queries, *out, *max, *sum, *line;
  int64_t size = 0;

  Work(const Cut& cut, float* memory) {
    auto take = [&](int64_t floats) {
      float* p = memory ? memory + size : nullptr;
      size += round_up(floats, 16);
      return p;
    };
    keys = take(cut.block_n * cut.s.dim);
    values = take(cut.block_n * cut.value_stride);
    scores = take(BLOCK_M * cut.score_stride);
    queries = take(cut.item_rows * cut.query_stride);
    out = take(cut.item_rows * cut.value_stride);
    max = take(cut.item_rows);
    sum = take(cut.item_rows);
    line = take(cut.block_n);
  }
};

// x = exp(x - max), or 2^(x - max) by a shorter polynomial, for n floats, a multiple of VL; returns
// their sum. Not inlined: alone, its constants stay in registers (1.2 times as fast on a Zen 4 core with
// AVX2).
template <bool LOG2>
__attribute__((noinline)) float exp_row(float* x, int64_t n, float max) {
  const vf log2e = v_set(LOG2E), m = v_set(max);
  vf sum = v_zero(), sum2 = v_zero();
  auto next = [&](float* at) {
    const vf y = v_sub(v_load(at), m), p = LOG2 ? v_exp2<4>(y) : v_exp2(v_mul(y, log2e));
    v_store(at, p);
    return p;
  };
  int64_t j = 0;
#if !defined(__AVX2__) || defined(__AVX512F__)  // two chains fill the pipes, where registers last
  for (; j + 2 * VL <= n; j += 2 * VL) {
    sum = v_add(sum, next(x + j));
    sum2 = v_add(sum2, next(x + j + VL));
  }
#endif
  for (; j < n; j += VL) sum = v_add(sum, next(x + j));
  return v_sum(v_add(sum, sum2));
}

// The scores of a strip of up to MR rows from row r on, between columns lo and hi, become probabilities
// against the new row maxima; what the rows gathered before is rescaled. lo and hi are multiples of VL,
// and what a row does not see in them holds -inf.
void softmax_strip(const Cut& cut, const Work& w, const Tile& t, int64_t r, int64_t n, int64_t lo,
                   int64_t hi) {
  float top[MR];
  for (int64_t i = 0; i < n; ++i) {
    const float* x = w.scores + (r + i) * cut.score_stride;
    vf v = v_set(w.max[t.at + r + i]), v2 = v;
    int64_t j = lo;
    for (; j + 2 * VL <= hi; j += 2 * VL) {
      v = v_max(v, v_load(x + j));
      v2 = v_max(v2, v_load(x + j + VL));
    }
    if (j < hi) v = v_max(v, v_load(x + j));
    top[i] = v_hmax(v_max(v, v2));
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = t.at + r + i;
    const float base = top[i] == -INFINITY ? 0.0f : top[i];
    float* x = w.scores + (r + i) * cut.score_stride + lo;
    const float sum = cut.log2 ? exp_row<true>(x, hi - lo, base) : exp_row<false>(x, hi - lo, base);
    if (top[i] != w.max[row]) {
      const float lower = w.max[row] - base;
      const float rescale = cut.log2 ? __builtin_exp2f(lower) : __builtin_expf(lower);
      w.sum[row] *= rescale;
      if (t.begun) scale_row(w.out + row * cut.value_stride, round_up(cut.s.dim_v, VL), rescale);
      w.max[row] = top[i];
    }
    w.sum[row] += sum;
  }
}

void begin_tile(const Cut& cut, const Work& w, const Sequence& seq, int64_t b, const Tile& t) {
  const AttentionShape& s = cut.s;
  pack_rows(w.queries + t.at * cut.query_stride, cut.query_stride, s.dim,
            at(cut.a.q, b, seq.first_q + t.q0, t.h, s.dtype), cut.a.q.seq, t.rows, s.dim, s.dtype,
            cut.log2 ? s.scale * LOG2E : s.scale);
  const float sink = sink_of(s, t.h);
  fill(w.max + t.at, t.rows, sink);
  fill(w.sum + t.at, t.rows, sink == -INFINITY ? 0.0f : 1.0f);
}

// One packed block of keys; `bounds` are those of the tile in it.
void add_block(const Cut& cut, const Work& w, const Sequence& seq, const Visible& visible, int64_t b,
               Tile& t, int64_t k0, int64_t cols, const Bounds& bounds) {
  const AttentionShape& s = cut.s;
  const ScoreRule rule(s, seq, b, t.h);
  const Dropout dropout(s, b, t.h);
  product_scores(t.rows, round_up(cols, VL), s.dim, w.queries + t.at * cut.query_stride,
                 cut.query_stride, w.keys, w.scores, cut.score_stride, bounds,
                 dim_chunk(s.dtype, s.dim));
  for (int64_t r = 0; r < t.rows; r += MR) {
    const int64_t n = min64(MR, t.rows - r);
    const int64_t from = bounds.lo[r / MR] / VL * VL, to = round_up(bounds.hi[r / MR], VL);
    if (from >= to) continue;
    // The last row has the highest lower end, the first row the lowest upper one.
    const bool all = !rule.any && visible.lo(t.q0 + r + n - 1) - k0 <= from &&
                     visible.hi(t.q0 + r) - k0 >= to;
    for (int64_t i = r; i < r + n && !all; ++i) {
      float* x = w.scores + i * cut.score_stride;
      const int64_t lo = min64(max64(visible.lo(t.q0 + i) - k0, from), to);
      const int64_t hi = max64(min64(visible.hi(t.q0 + i) - k0, to), lo);
      if (rule.any) rule.apply(x, t.q0 + i, k0, lo, hi, nullptr, w.line);
      fill(x + from, lo - from, -INFINITY);
      fill(x + hi, to - hi, -INFINITY);
    }
    softmax_strip(cut, w, t, r, n, from, to);
    if (dropout.any()) {
      for (int64_t i = r; i < r + n; ++i) {
        dropout.factors(w.line, t.q0 + i, k0, from, to);
        multiply_row(w.scores + i * cut.score_stride + from, w.line + from, to - from);
      }
    }
  }
  product_sum<false>(t.rows, round_up(s.dim_v, VL), w.scores, cut.score_stride, w.values,
                     cut.value_stride, w.out + t.at * cut.value_stride, cut.value_stride, bounds, t.begun,
                     sum_chunk(s.dtype));
  t.begun = true;
}

void end_tile(const Cut& cut, const Work& w, const Sequence& seq, int64_t b, const Tile& t) {
  const AttentionShape& s = cut.s;
  const int64_t row0 = seq.first_q + t.q0;
  float* lse = cut.a.lse + b * s.lse_batch + t.h * s.lse_head + row0;
  if (!t.begun)
    fill(w.out + t.at * cut.value_stride, t.rows * cut.value_stride, 0.0f);
  for (int64_t r = 0; r < t.rows; ++r) {
    float* out = w.out + (t.at + r) * cut.value_stride;
    const float sum = w.sum[t.at + r];
    const double max = cut.log2 ? w.max[t.at + r] * LN2 : w.max[t.at + r];
    if (r + AHEAD < t.rows)
      prefetch_row<Prefetch::write>(at(cut.a.out, b, row0 + r + AHEAD, t.h, s.dtype), s.dim_v, s.dtype);
    scale_row(out, s.dim_v, sum == 0.0f ? 0.0f : 1.0f / sum);
    store_row(at(cut.a.out, b, row0 + r, t.h, s.dtype), out, s.dim_v, s.dtype);
    lse[r] = sum == 0.0f ? -INFINITY : float(max + __builtin_log(double(sum)));
  }
}

void run_item(const Cut& cut, const Work& w, int64_t item) {
  const AttentionShape& s = cut.s;
  const int64_t b = find_sequence(cut.items_before, s.heads_k, s.batch, item);
  const Sequence seq(s, b);
  const Visible visible(s, seq);
  // Within a sequence the first items of all heads come first: with a causal mask the heavy ones.
  const int64_t rest = item - cut.items_before[b] * s.heads_k, head_k = rest % s.heads_k;
  const int64_t group = cut.group(), tiles = cut.tiles_of(seq) * group, items = cut.items_of(seq);
  const int64_t begin = rest / s.heads_k * tiles / items, end = (rest / s.heads_k + 1) * tiles / items;
  Tile tile[ITEM_ROWS];
  int64_t count = 0, at = 0, lo = seq.len_k, hi = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t q0 = (tiles / group - 1 - i / group) * BLOCK_M;
    const Tile t{head_k * group + i % group, q0, min64(BLOCK_M, seq.len_q - q0), at, false};
    begin_tile(cut, w, seq, b, t);
    lo = min64(lo, visible.lo(q0));
    hi = max64(hi, visible.hi(q0 + t.rows - 1));
    at += t.rows;
    tile[count++] = t;
  }
  for (int64_t k0 = lo / cut.block_n * cut.block_n; k0 < hi; k0 += cut.block_n) {
    const int64_t cols = min64(cut.block_n, seq.len_k - k0), row = seq.first_k + k0;
    bool packed = false;
    for (int64_t i = 0; i < count; ++i) {
      Bounds bounds;
      const Blocks blocks(s, b, tile[i].h);
      if (!query_bounds(bounds, visible, blocks, tile[i].q0, tile[i].rows, k0, cols)) continue;
      if (!packed) {
        pack_transposed(w.keys, round_up(cols, VL), gp::GP_ISA::at(cut.a.k, b, row, head_k, s.dtype),
                        cut.a.k.seq, cols, s.dim, s.dtype);
        pack_rows(w.values, cut.value_stride, round_up(s.dim_v, VL),
                  gp::GP_ISA::at(cut.a.v, b, row, head_k, s.dtype), cut.a.v.seq, cols, s.dim_v,
                  s.dtype, 1.0f);
        packed = true;
      }
      add_block(cut, w, seq, visible, b, tile[i], k0, cols, bounds);
    }
  }
  for (int64_t i = 0; i < count; ++i) end_tile(cut, w, seq, b, tile[i]);
}

}  // namespace

bool attention_fwd(const AttentionFwdArgs& a) {
  const AttentionShape& s = a.shape;
  Scratch counts((s.batch + 1) * 8);
  if (!counts.ok()) return false;
  const Cut cut(a, counts.as<int64_t>());
  const int64_t thread_size = Work(cut, nullptr).size;
  Workspace memory(s.threads * thread_size * 4);
  if (!memory.ok()) return false;
  parallel_for(cut.items(), s.threads, [&](int64_t item, int thread) {
    run_item(cut, Work(cut, memory.as<float>() + thread * thread_size), item);
  });
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
