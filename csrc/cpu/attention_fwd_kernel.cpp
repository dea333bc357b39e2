// Forward: out = softmax(scale q k^T) v by tiles with an online softmax.
//
// Keys and values are packed to fp32 once per (batch, key head), then each work item takes a tile of
// queries of one head over the blocks of keys that it sees.
#include "common/parallel.h"
#include "cpu/attention_tile.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t BLOCK_M = 96, BLOCK_N = 256;

struct Packed {
  const AttentionFwdArgs& a;
  int64_t blocks, value_stride, key_size, value_size;  // floats in a packed block of keys, of values
  float *keys, *values;

  explicit Packed(const AttentionFwdArgs& args)
      : a(args),
        blocks((args.shape.seqlen_k + BLOCK_N - 1) / BLOCK_N),
        value_stride(row_stride(args.shape.dim_v)),
        key_size(min64(BLOCK_N, round_up(args.shape.seqlen_k, 16)) * args.shape.dim),
        value_size(min64(BLOCK_N, round_up(args.shape.seqlen_k, 16)) * value_stride) {}

  int64_t count() const { return a.shape.batch * a.shape.heads_k * blocks; }
  float* key_block(int64_t item) const { return keys + item * key_size; }
  float* value_block(int64_t item) const { return values + item * value_size; }

  void pack(int64_t item, float* line) const {
    const AttentionShape& s = a.shape;
    const int64_t k0 = item % blocks * BLOCK_N, h = item / blocks % s.heads_k,
                  b = item / blocks / s.heads_k;
    const int64_t rows = min64(BLOCK_N, s.seqlen_k - k0);
    pack_transposed(key_block(item), round_up(rows, VL), at(a.k, b, k0, h, s.dtype), a.k.seq, rows,
                    s.dim, s.dtype, line);
    pack_rows(value_block(item), value_stride, round_up(s.dim_v, VL), at(a.v, b, k0, h, s.dtype),
              a.v.seq, rows, s.dim_v, s.dtype, 1.0f);
  }
};

// The running state of a tile of queries, in one thread's scratch.
struct Tile {
  int64_t query_stride, score_stride, out_stride;
  float *queries, *scores, *out, *max, *sum;

  explicit Tile(const AttentionShape& s, float* memory = nullptr)
      : query_stride(row_stride(s.dim)), score_stride(BLOCK_N + ROW_PAD),
        out_stride(row_stride(s.dim_v)) {
    queries = memory;
    scores = queries + BLOCK_M * query_stride;
    out = scores + BLOCK_M * score_stride;
    max = out + BLOCK_M * out_stride;
    sum = max + BLOCK_M;
  }
  static int64_t size(const AttentionShape& s) {
    return BLOCK_M * (row_stride(s.dim) + BLOCK_N + ROW_PAD + row_stride(s.dim_v) + 2);
  }
};

// x = exp2(x * log2(e) - shift) for n floats, a multiple of VL; returns their sum. Not inlined: alone,
// its constants stay in registers (1.2 times as fast on a Zen 4 core with AVX2).
__attribute__((noinline)) float exp_row(float* x, int64_t n, float shift) {
  const vf log2e = v_set(LOG2E), s = v_set(-shift);
  vf sum = v_zero(), sum2 = v_zero();
  int64_t j = 0;
#if defined(__AVX512F__)  // two chains fill the pipes; AVX2 has no registers for them
  for (; j + 2 * VL <= n; j += 2 * VL) {
    const vf p = v_exp2(v_fma(v_load(x + j), log2e, s));
    const vf p2 = v_exp2(v_fma(v_load(x + j + VL), log2e, s));
    v_store(x + j, p);
    v_store(x + j + VL, p2);
    sum = v_add(sum, p);
    sum2 = v_add(sum2, p2);
  }
#endif
  for (; j < n; j += VL) {
    const vf p = v_exp2(v_fma(v_load(x + j), log2e, s));
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
  const float max = v_hmax(top), shift = max == -INFINITY ? 0.0f : max * LOG2E;
  const float sum = exp_row(x + lo, hi - lo, shift);
  if (max != t.max[r]) {
    const float rescale = t.max[r] == -INFINITY ? 0.0f : __builtin_exp2f(t.max[r] * LOG2E - shift);
    t.sum[r] *= rescale;
    scale_row(t.out + r * t.out_stride, cols_v, rescale);
    t.max[r] = max;
  }
  t.sum[r] += sum;
}

void run_tile(const AttentionFwdArgs& a, const Packed& packed, const Tile& t, int64_t b, int64_t h,
              int64_t q0) {
  const AttentionShape& s = a.shape;
  const Visible visible(s);
  const int64_t rows = min64(BLOCK_M, s.seqlen_q - q0);
  const int64_t cols_v = round_up(s.dim_v, VL);
  const int64_t first = (b * s.heads_k + h / (s.heads / s.heads_k)) * packed.blocks;
  pack_rows(t.queries, t.query_stride, s.dim, at(a.q, b, q0, h, s.dtype), a.q.seq, rows, s.dim,
            s.dtype, s.scale);
  fill(t.max, rows, -INFINITY);
  fill(t.sum, rows, 0.0f);
  fill(t.out, rows * t.out_stride, 0.0f);
  const int64_t begin = visible.lo(q0), end = visible.hi(q0 + rows - 1);
  for (int64_t block = begin / BLOCK_N; block * BLOCK_N < end; ++block) {
    const int64_t k0 = block * BLOCK_N, cols = min64(BLOCK_N, s.seqlen_k - k0);
    Bounds bounds;
    if (!row_bounds(bounds, visible, q0, rows, k0, cols).any) continue;
    product_scores(rows, round_up(cols, VL), s.dim, t.queries, t.query_stride,
                   packed.key_block(first + block), t.scores, t.score_stride, bounds);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = bounds.lo[r / MR] / VL * VL, to = round_up(bounds.hi[r / MR], VL);
      if (from >= to) continue;
      float* x = t.scores + r * t.score_stride;
      const int64_t lo = min64(max64(visible.lo(q0 + r) - k0, from), to);
      const int64_t hi = max64(min64(visible.hi(q0 + r) - k0, to), lo);
      fill(x + from, lo - from, -INFINITY);
      fill(x + hi, to - hi, -INFINITY);
      softmax_row(t, r, from, to, cols_v);
    }
    product_sum<false>(rows, cols_v, t.scores, t.score_stride, packed.value_block(first + block),
                       packed.value_stride, t.out, t.out_stride, bounds, true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* out = t.out + r * t.out_stride;
    const float sum = t.sum[r];
    scale_row(out, s.dim_v, sum == 0.0f ? 0.0f : 1.0f / sum);
    store_row(at(a.out, b, q0 + r, h, s.dtype), out, s.dim_v, s.dtype);
    a.lse[(b * s.heads + h) * s.seqlen_q + q0 + r] =
        sum == 0.0f ? -INFINITY : float(double(t.max[r] * LOG2E) * LN2 + __builtin_log(sum));
  }
}

}  // namespace

bool attention_fwd(const AttentionFwdArgs& a) {
  const AttentionShape& s = a.shape;
  const int64_t tiles = (s.seqlen_q + BLOCK_M - 1) / BLOCK_M;
  const int64_t items = s.batch * s.heads * tiles;
  if (items == 0) return true;
  Packed packed(a);
  const int64_t thread_size = max64(Tile::size(s), PACK_ROWS * s.dim);
  Scratch key_memory(packed.count() * packed.key_size * 4);
  Scratch value_memory(packed.count() * packed.value_size * 4);
  Scratch thread_memory(s.threads * thread_size * 4);
  if (!key_memory.ok() || !value_memory.ok() || !thread_memory.ok()) return false;
  packed.keys = key_memory.as<float>();
  packed.values = value_memory.as<float>();
  parallel_for(packed.count(), s.threads, [&](int64_t item, int thread) {
    packed.pack(item, thread_memory.as<float>() + thread * thread_size);
  });
  // Within a head the last tiles come first: with a causal mask they are the heavy ones.
  parallel_for(items, s.threads, [&](int64_t item, int thread) {
    const Tile tile(s, thread_memory.as<float>() + thread * thread_size);
    run_tile(a, packed, tile, item / tiles / s.heads, item / tiles % s.heads,
             (tiles - 1 - item % tiles) * BLOCK_M);
  });
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
