// Attention forward and backward on the CPU, in FlashAttention's words; see genai_perf/ops/attention.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace gp {

// A (batch, seqlen, heads, dim) tensor whose last dimension is contiguous; strides in elements. Packed
// sequences, (total, heads, dim), have batch stride 0.
struct Tensor4 {
  void* data = nullptr;
  int64_t batch = 0, seq = 0, head = 0;
};

// Added to the scores, (batch, heads, seqlen_q, seqlen_k) by strides in elements, 0 where broadcast.
struct AttentionBias {
  enum Kind : int { none, additive, keep_mask };  // keep_mask: bytes, 0 hides the key
  Kind kind = none;
  DType dtype = DType::f32;
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;
};

// Query i sees key j only where byte (i / size_q, j / size_k) is not 0; strides 0 where broadcast.
struct AttentionBlocks {
  const uint8_t* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;
  int64_t size_q = 1, size_k = 1;
};

// Probabilities are dropped where a word of Philox is below `below`, else multiplied by `keep_scale`;
// the word depends on seed, offset, sequence, head, query and key alone (csrc/cpu/attention_dropout.h).
struct AttentionDropout {
  uint32_t below = 0;  // probability * 2^32
  float keep_scale = 1;
  uint64_t seed = 0, offset = 0;
};

struct AttentionShape {
  int64_t batch, seqlen_q, seqlen_k;  // seqlen_* are unused where cu_seqlens_* are set
  int64_t heads, heads_k, dim, dim_v;
  int64_t lse_batch, lse_head;  // strides of lse, dlse, whose rows are contiguous
  // Query i sees keys i + seqlen_k - seqlen_q - left .. + right; -1 is unbounded, causal is right 0.
  int64_t window_left, window_right;
  float scale, softcap;        // softcap 0: none, else scores become softcap * tanh(score / softcap)
  const int32_t* cu_seqlens_q;  // (batch + 1): packed sequences; both or neither
  const int32_t* cu_seqlens_k;
  const float* alibi_slopes;  // score -= slope * |i + seqlen_k - seqlen_q - j|; by batch and head
  int64_t alibi_batch;        // stride; heads are contiguous
  const float* sinks;         // (heads): a score without a value, in every softmax of its head
  AttentionBias bias;
  AttentionBlocks blocks;
  AttentionDropout dropout;
  DType dtype;
  int threads;
};

struct AttentionFwdArgs {
  AttentionShape shape;
  Tensor4 q, k, v, out;
  float* lse;  // natural logarithm, sink included
};

struct AttentionBwdArgs {
  AttentionShape shape;
  Tensor4 q, k, v, out, dout, dq, dk, dv;
  const float* lse;
  const float* dlse;  // or null
  float* dbias;       // zeros on entry, or null; of the layout below
  int64_t dbias_batch, dbias_head, dbias_row;  // strides, 0 where broadcast; columns contiguous
  float* dsinks;      // (heads) or null
};

// Both return false if scratch memory could not be had. Results do not depend on `threads`.
GP_DECLARE_KERNEL(bool, attention_fwd, const AttentionFwdArgs&)
GP_DECLARE_KERNEL(bool, attention_bwd, const AttentionBwdArgs&)

}  // namespace gp
