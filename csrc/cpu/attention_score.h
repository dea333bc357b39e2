// What the attention kernels know about scores: where sequences lie, which keys a query sees, and what
// happens to a row of scores before its softmax.
#pragma once

#include "cpu/attention_dropout.h"
#include "cpu/attention_tile.h"

namespace gp {
namespace GP_ISA {

// One sequence of the batch: its first row in the tensors and its length, for queries and keys.
struct Sequence {
  int64_t first_q, len_q, first_k, len_k;
  Sequence(const AttentionShape& s, int64_t b) {
    first_q = first_k = 0, len_q = s.seqlen_q, len_k = s.seqlen_k;
    if (s.cu_seqlens_q) {
      first_q = s.cu_seqlens_q[b], len_q = s.cu_seqlens_q[b + 1] - first_q;
      first_k = s.cu_seqlens_k[b], len_k = s.cu_seqlens_k[b + 1] - first_k;
    }
  }
};

// The sequence of an item, where the sequences before b have before[b] * times items.
static inline int64_t find_sequence(const int64_t* before, int64_t times, int64_t batch,
                                    int64_t item) {
  int64_t b = 0, end = batch;  // before[b] * times <= item < before[end] * times
  while (end - b > 1) {
    const int64_t middle = (b + end) / 2;
    if (before[middle] * times <= item) b = middle;
    else end = middle;
  }
  return b;
}

static inline void* at(const Tensor4& t, int64_t b, int64_t row, int64_t h, DType type) {
  return offset(t.data, b * t.batch + row * t.seq + h * t.head, type);
}

// Keys lo(i) <= j < hi(i) are seen by query i; both grow with i.
struct Visible {
  int64_t offset, left, right, len_k;
  Visible(const AttentionShape& s, const Sequence& seq)
      : offset(seq.len_k - seq.len_q), left(s.window_left), right(s.window_right),
        len_k(seq.len_k) {}
  int64_t clamp(int64_t j) const { return min64(max64(j, 0), len_k); }
  int64_t lo(int64_t i) const { return left < 0 ? 0 : clamp(i + offset - left); }
  int64_t hi(int64_t i) const { return right < 0 ? len_k : clamp(i + offset + right + 1); }
};

// The block-sparse mask of one head.
struct Blocks {
  AttentionBlocks mask;

  Blocks(const AttentionShape& s, int64_t b, int64_t h) : mask(s.blocks) {
    if (any()) mask.data += b * mask.batch + h * mask.head;
  }
  bool any() const { return mask.data != nullptr; }

  // Shrinks keys [lo, hi) to the first and last block that one of queries [first, last] sees.
  void shrink_keys(int64_t first, int64_t last, int64_t& lo, int64_t& hi) const {
    shrink(first / mask.size_q, last / mask.size_q, mask.row, mask.size_k, mask.col, lo, hi);
  }
  // Shrinks queries [lo, hi) to those in blocks that see one of keys [first, last].
  void shrink_queries(int64_t first, int64_t last, int64_t& lo, int64_t& hi) const {
    shrink(first / mask.size_k, last / mask.size_k, mask.col, mask.size_q, mask.row, lo, hi);
  }
  void hide(float* x, int64_t i, int64_t k0, int64_t lo, int64_t hi) const {
    const uint8_t* row = mask.data + i / mask.size_q * mask.row;
    for (int64_t j = lo; j < hi;) {
      const int64_t block = (k0 + j) / mask.size_k, end = min64((block + 1) * mask.size_k - k0, hi);
      for (; j < end; ++j) x[j] = row[block * mask.col] ? x[j] : -INFINITY;
    }
  }

 private:
  void shrink(int64_t first, int64_t last, int64_t own, int64_t size, int64_t other, int64_t& lo,
              int64_t& hi) const {
    auto seen = [&](int64_t block) {
      for (int64_t i = first; i <= last; ++i)
        if (mask.data[i * own + block * other]) return true;
      return false;
    };
    while (lo < hi && !seen(lo / size)) lo = min64((lo / size + 1) * size, hi);
    while (lo < hi && !seen((hi - 1) / size)) hi = max64((hi - 1) / size * size, lo);
  }
};

// Bounds of the strips of query rows q0.. in the block of keys k0..k0+cols; false if no row sees any.
static bool query_bounds(Bounds& bounds, const Visible& visible, const Blocks& blocks, int64_t q0,
                         int64_t rows, int64_t k0, int64_t cols) {
  bool any = false;
  for (int64_t m = 0, s = 0; m < rows; m += MR, ++s) {
    const int64_t last = min64(m + MR, rows) - 1;
    int64_t lo = min64(max64(visible.lo(q0 + m), k0), k0 + cols);
    int64_t hi = min64(max64(visible.hi(q0 + last), k0), k0 + cols);
    if (blocks.any()) blocks.shrink_keys(q0 + m, q0 + last, lo, hi);
    bounds.lo[s] = int(lo - k0);
    bounds.hi[s] = int(hi - k0);
    any |= lo < hi;
  }
  return any;
}

// The maximum that a softmax starts from: that of its sink, which counts as one key, or -inf.
static inline float sink_of(const AttentionShape& s, int64_t h) {
  return s.sinks ? s.sinks[h] : -INFINITY;
}

// What one head of one sequence does to its scores: softcap, then ALiBi, then bias and masks.
struct ScoreRule {
  float softcap, slope;
  int64_t diagonal;  // len_k - len_q
  AttentionBias bias;
  Blocks blocks;
  bool any;

  ScoreRule(const AttentionShape& s, const Sequence& seq, int64_t b, int64_t h)
      : softcap(s.softcap), slope(s.alibi_slopes ? s.alibi_slopes[b * s.alibi_batch + h] : 0.0f),
        diagonal(seq.len_k - seq.len_q), bias(s.bias), blocks(s, b, h) {
    const int64_t first = b * bias.batch + h * bias.head;
    const int64_t bytes = bias.kind == AttentionBias::keep_mask ? 1 : bias.dtype == DType::f32 ? 4 : 2;
    bias.data = static_cast<const char*>(bias.data) + first * bytes;
    any = softcap != 0.0f || slope != 0.0f || bias.kind != AttentionBias::none || blocks.any();
  }

  // x[lo, hi) are the scores of query i and keys k0 + lo .. k0 + hi - 1. Where `slope_of_cap` is
  // given it receives the derivative of the softcap, at the same places. `line` holds hi floats.
  void apply(float* x, int64_t i, int64_t k0, int64_t lo, int64_t hi, float* slope_of_cap,
             float* line) const {
    if (softcap != 0.0f) cap(x + lo, hi - lo, slope_of_cap ? slope_of_cap + lo : nullptr);
    if (slope != 0.0f) {
      const float distance = float(i + diagonal - k0);  // to key k0; exact below 2^24
      for (int j = int(lo); j < int(hi); ++j) x[j] -= slope * __builtin_fabsf(distance - float(j));
    }
    if (bias.kind == AttentionBias::additive) add_bias(x, i, k0, lo, hi, line);
    if (bias.kind == AttentionBias::keep_mask) {
      const uint8_t* keep =
          static_cast<const uint8_t*>(bias.data) + i * bias.row + (k0 + lo) * bias.col;
      for (int64_t j = lo; j < hi; ++j, keep += bias.col) x[j] = *keep ? x[j] : -INFINITY;
    }
    if (blocks.any()) blocks.hide(x, i, k0, lo, hi);
  }

 private:
  void cap(float* x, int64_t n, float* derivative) const {
    const vf c = v_set(softcap), one = v_set(1.0f);
    for (int64_t j = 0; j < n; j += VL) {
      const int count = int(min64(VL, n - j));
      const vf t = v_tanh(v_div(v_load_n(x + j, count), c));
      v_store_n(x + j, v_mul(t, c), count);
      if (derivative) v_store_n(derivative + j, v_fma(v_mul(t, v_set(-1.0f)), t, one), count);
    }
  }

  void add_bias(float* x, int64_t i, int64_t k0, int64_t lo, int64_t hi, float* line) const {
    const int64_t first = i * bias.row + (k0 + lo) * bias.col;
    if (bias.col == 1) {
      load_row(line + lo, offset(bias.data, first, bias.dtype), hi - lo, bias.dtype);
      for (int64_t j = lo; j < hi; ++j) x[j] += line[j];
    } else {
      for (int64_t j = lo; j < hi; ++j)
        x[j] += load_one(bias.data, first + (j - lo) * bias.col, bias.dtype);
    }
  }
};

}  // namespace GP_ISA
}  // namespace gp
