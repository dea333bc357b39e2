// Forward: out = softmax(scale q k^T) v by tiles with an online softmax.
//
// Keys and values are packed to fp32 once per (sequence, key head), then each work item takes a tile
// of queries of one head over the blocks of keys that it sees.
#include "common/parallel.h"
#include "cpu/attention_score.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t BLOCK_M = 96;

// How the sequences are cut; `*_before[b]` counts what the sequences before b have.
struct Cut {
  const AttentionFwdArgs& a;
  int64_t block_n;  // keys and values of a block stay in the L2 cache
  int64_t *tiles_before, *blocks_before;
  int64_t value_stride, key_size, value_size;  // floats of a row of values, of packed blocks
  float *keys, *values;

  Cut(const AttentionFwdArgs& args, int64_t* counts)
      : a(args), block_n(max64(s().dim, s().dim_v) <= 128 ? 256 : s().dim <= 256 ? 128 : 64),
        tiles_before(counts), blocks_before(counts + s().batch + 1),
        value_stride(row_stride(s().dim_v)) {
    int64_t longest = 0;
    tiles_before[0] = blocks_before[0] = 0;
    for (int64_t b = 0; b < s().batch; ++b) {
      const Sequence seq(s(), b);
      tiles_before[b + 1] = tiles_before[b] + (seq.len_q + BLOCK_M - 1) / BLOCK_M;
      blocks_before[b + 1] = blocks_before[b] + (seq.len_k + block_n - 1) / block_n;
      longest = max64(longest, seq.len_k);
    }
    const int64_t rows = min64(block_n, round_up(longest, 16));
    key_size = rows * s().dim;
    value_size = rows * value_stride;
  }

  const AttentionShape& s() const { return a.shape; }
  int64_t blocks() const { return blocks_before[s().batch] * s().heads_k; }
  int64_t tiles() const { return tiles_before[s().batch] * s().heads; }
  // The packed blocks of a sequence and key head follow each other.
  int64_t first_block(int64_t b, int64_t head_k) const {
    return blocks_before[b] * s().heads_k + head_k * (blocks_before[b + 1] - blocks_before[b]);
  }

  void pack(int64_t item, float* lines) const {
    const int64_t b = find_sequence(blocks_before, s().heads_k, s().batch, item);
    const Sequence seq(s(), b);
    const int64_t in_sequence = blocks_before[b + 1] - blocks_before[b];
    const int64_t rest = item - blocks_before[b] * s().heads_k;
    const int64_t h = rest / in_sequence, k0 = rest % in_sequence * block_n;
    const int64_t rows = min64(block_n, seq.len_k - k0), row = seq.first_k + k0;
    pack_transposed(keys + item * key_size, round_up(rows, VL), at(a.k, b, row, h, s().dtype),
                    a.k.seq, rows, s().dim, s().dtype, lines);
    pack_rows(values + item * value_size, value_stride, round_up(s().dim_v, VL),
              at(a.v, b, row, h, s().dtype), a.v.seq, rows, s().dim_v, s().dtype, 1.0f);
  }
};

// The running state of a tile of queries, in one thread's scratch.
struct Tile {
  int64_t query_stride, score_stride, out_stride;
  float *queries, *scores, *out, *max, *sum, *line;

  Tile(const Cut& cut, float* memory)
      : query_stride(row_stride(cut.s().dim)), score_stride(cut.block_n + ROW_PAD),
        out_stride(row_stride(cut.s().dim_v)) {
    queries = memory;
    scores = queries + BLOCK_M * query_stride;
    out = scores + BLOCK_M * score_stride;
    max = out + BLOCK_M * out_stride;
    sum = max + BLOCK_M;
    line = sum + BLOCK_M;
  }
  static int64_t size(const Cut& cut) {
    const int64_t rows = row_stride(cut.s().dim) + cut.block_n + ROW_PAD + row_stride(cut.s().dim_v);
    return BLOCK_M * (rows + 2) + cut.block_n;
  }
};

// x = exp(x - max) for n floats, a multiple of VL; returns their sum. Not inlined: alone, its
// constants stay in registers (1.2 times as fast on a Zen 4 core with AVX2).
__attribute__((noinline)) float exp_row(float* x, int64_t n, float max) {
  const vf log2e = v_set(LOG2E), m = v_set(max);
  vf sum = v_zero(), sum2 = v_zero();
  int64_t j = 0;
#if !defined(__AVX2__) || defined(__AVX512F__)  // two chains fill the pipes, where registers last
  for (; j + 2 * VL <= n; j += 2 * VL) {
    const vf p = v_exp2(v_mul(v_sub(v_load(x + j), m), log2e));
    const vf p2 = v_exp2(v_mul(v_sub(v_load(x + j + VL), m), log2e));
    v_store(x + j, p);
    v_store(x + j + VL, p2);
    sum = v_add(sum, p);
    sum2 = v_add(sum2, p2);
  }
#endif
  for (; j < n; j += VL) {
    const vf p = v_exp2(v_mul(v_sub(v_load(x + j), m), log2e));
    v_store(x + j, p);
    sum = v_add(sum, p);
  }
  return v_sum(v_add(sum, sum2));
}

// scores[lo, hi) become probabilities against the new row maximum; what the row gathered before is
// rescaled. lo and hi are multiples of VL, and what the row does not see in them holds -inf.
void softmax_row(const Tile& t, int64_t r, int64_t lo, int64_t hi, int64_t cols_v) {
  float* x = t.scores + r * t.score_stride;
  vf top = v_set(t.max[r]);
  for (int64_t j = lo; j < hi; j += VL) top = v_max(top, v_load(x + j));
  const float max = v_hmax(top), base = max == -INFINITY ? 0.0f : max;
  const float sum = exp_row(x + lo, hi - lo, base);
  if (max != t.max[r]) {
    const float rescale = __builtin_expf(t.max[r] - base);
    t.sum[r] *= rescale;
    scale_row(t.out + r * t.out_stride, cols_v, rescale);
    t.max[r] = max;
  }
  t.sum[r] += sum;
}

void run_tile(const Cut& cut, const Tile& t, int64_t b, int64_t h, int64_t q0) {
  const AttentionFwdArgs& a = cut.a;
  const AttentionShape& s = a.shape;
  const Sequence seq(s, b);
  const Visible visible(s, seq);
  const ScoreRule rule(s, seq, b, h);
  const int64_t rows = min64(BLOCK_M, seq.len_q - q0), row0 = seq.first_q + q0;
  const int64_t cols_v = round_up(s.dim_v, VL);
  const int64_t first = cut.first_block(b, h / (s.heads / s.heads_k));
  pack_rows(t.queries, t.query_stride, s.dim, at(a.q, b, row0, h, s.dtype), a.q.seq, rows, s.dim,
            s.dtype, s.scale);
  const float sink = sink_of(s, h);
  fill(t.max, rows, sink);
  fill(t.sum, rows, sink == -INFINITY ? 0.0f : 1.0f);
  fill(t.out, rows * t.out_stride, 0.0f);
  const int64_t end = visible.hi(q0 + rows - 1);
  for (int64_t block = visible.lo(q0) / cut.block_n; block * cut.block_n < end; ++block) {
    const int64_t k0 = block * cut.block_n, cols = min64(cut.block_n, seq.len_k - k0);
    Bounds bounds;
    if (!query_bounds(bounds, visible, q0, rows, k0, cols)) continue;
    product_scores(rows, round_up(cols, VL), s.dim, t.queries, t.query_stride,
                   cut.keys + (first + block) * cut.key_size, t.scores, t.score_stride, bounds);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = bounds.lo[r / MR] / VL * VL, to = round_up(bounds.hi[r / MR], VL);
      if (from >= to) continue;
      float* x = t.scores + r * t.score_stride;
      const int64_t lo = min64(max64(visible.lo(q0 + r) - k0, from), to);
      const int64_t hi = max64(min64(visible.hi(q0 + r) - k0, to), lo);
      if (rule.any) rule.apply(x, q0 + r, k0, lo, hi, nullptr, t.line);
      fill(x + from, lo - from, -INFINITY);
      fill(x + hi, to - hi, -INFINITY);
      softmax_row(t, r, from, to, cols_v);
    }
    product_sum<false>(rows, cols_v, t.scores, t.score_stride,
                       cut.values + (first + block) * cut.value_size, cut.value_stride, t.out,
                       t.out_stride, bounds, true);
  }
  float* lse = a.lse + b * s.lse_batch + h * s.lse_head + row0;
  for (int64_t r = 0; r < rows; ++r) {
    float* out = t.out + r * t.out_stride;
    const float sum = t.sum[r];
    scale_row(out, s.dim_v, sum == 0.0f ? 0.0f : 1.0f / sum);
    store_row(at(a.out, b, row0 + r, h, s.dtype), out, s.dim_v, s.dtype);
    lse[r] = sum == 0.0f ? -INFINITY : float(double(t.max[r]) + __builtin_log(double(sum)));
  }
}

}  // namespace

bool attention_fwd(const AttentionFwdArgs& a) {
  const AttentionShape& s = a.shape;
  Scratch counts(2 * (s.batch + 1) * 8);
  if (!counts.ok()) return false;
  Cut cut(a, counts.as<int64_t>());
  const int64_t thread_size = max64(Tile::size(cut), PACK_ROWS * s.dim);
  Scratch key_memory(cut.blocks() * cut.key_size * 4);
  Scratch value_memory(cut.blocks() * cut.value_size * 4);
  Scratch thread_memory(s.threads * thread_size * 4);
  if (!key_memory.ok() || !value_memory.ok() || !thread_memory.ok()) return false;
  cut.keys = key_memory.as<float>();
  cut.values = value_memory.as<float>();
  if (cut.tiles() == 0) return true;
  parallel_for(cut.blocks(), s.threads, [&](int64_t item, int thread) {
    cut.pack(item, thread_memory.as<float>() + thread * thread_size);
  });
  // Within a head the last tiles come first: with a causal mask they are the heavy ones.
  parallel_for(cut.tiles(), s.threads, [&](int64_t item, int thread) {
    const int64_t b = find_sequence(cut.tiles_before, s.heads, s.batch, item);
    const int64_t tiles = cut.tiles_before[b + 1] - cut.tiles_before[b];
    const int64_t rest = item - cut.tiles_before[b] * s.heads;
    run_tile(cut, Tile(cut, thread_memory.as<float>() + thread * thread_size), b, rest / tiles,
             (tiles - 1 - rest % tiles) * BLOCK_M);
  });
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
