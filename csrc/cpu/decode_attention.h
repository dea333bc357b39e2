// Attention of few queries over a cache of keys and values; see genai_perf/ops/decode_attention.
#pragma once

#include "cpu/attention.h"

namespace gp {

// The cache, contiguous or in pages: key j of sequence b lies in row j % page_size of page
// block_table[b * table_stride + j / page_size]. Without a table the sequence is its own page, b or
// batch_idx[b], and page_size the capacity. Tensor4 strides: page, row in the page, head; in elements.
struct DecodeCache {
  Tensor4 k, v;
  DType dtype;             // f32, bf16, f16; i8 and f8e4m3fn with scales
  const float* k_scale;    // by batch and head, or null: an element stands for element * scale
  const float* v_scale;
  int64_t scale_batch;     // their stride
  const int32_t* seqlens;  // (batch): one past the last key, padding on the left included
  const int32_t* leftpad;  // (batch): the first key, or null: 0
  const int32_t* batch_idx;
  const int32_t* block_table;
  int64_t table_stride, page_size;
};

// Query i sees keys i + seqlen_k - seqlen_q - left .. + right, where seqlen_k counts from leftpad.
struct DecodeArgs {
  int64_t batch, seqlen_q, heads, heads_k, dim, dim_v;
  int64_t window_left, window_right;
  int64_t num_splits;  // keys are cut into so many parts; 0: into parts of one size
  float scale, softcap;
  const float* alibi_slopes;
  int64_t alibi_batch;
  const float* sinks;
  DecodeCache cache;
  DType dtype;  // of q and out
  int threads;
  Tensor4 q, out;
  float* lse;  // (batch, heads, seqlen_q)
};

// New keys and values, written to rows seqlens[b] .. + seqlen_new - 1 of the cache.
struct DecodeAppendArgs {
  int64_t batch, seqlen_q, seqlen_new, heads, heads_k, dim, dim_v;
  DecodeCache cache;
  DType dtype;  // of k and v, and of q and q_out
  Tensor4 k, v;
  // Rotary embedding of k, and of q into q_out; cos is null without it. The tables are
  // (positions, rotary_half), contiguous; the first new key is at positions[b].
  const void *cos, *sin;
  DType rotary_dtype;  // f32, bf16 or f16
  int64_t rotary_half;
  bool interleaved;     // pairs (0, 1), (2, 3) ..; else (0, half), (1, half + 1) ..
  bool q_in_sequence;   // query i is at positions[b] + i, else all are at positions[b]
  const int32_t* positions;
  Tensor4 q, q_out;
};

// Returns false if scratch memory could not be had. The bits of a sequence's result depend on its own
// rows, seqlen_q and num_splits, not on the batch nor on `threads`.
GP_DECLARE_KERNEL(bool, decode_attention, const DecodeArgs&)
GP_DECLARE_KERNEL(bool, decode_append, const DecodeAppendArgs&)

}  // namespace gp
