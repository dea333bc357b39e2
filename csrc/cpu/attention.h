// Attention forward and backward on the CPU, in FlashAttention's words; see genai_perf/ops/attention.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace gp {

// A (batch, seqlen, heads, dim) tensor whose last dimension is contiguous; strides in elements.
struct Tensor4 {
  void* data = nullptr;
  int64_t batch = 0, seq = 0, head = 0;
};

struct AttentionShape {
  int64_t batch, seqlen_q, seqlen_k, heads, heads_k, dim, dim_v;
  float scale;
  // Query i sees keys i + seqlen_k - seqlen_q - left .. + right; -1 is unbounded, causal is right 0.
  int64_t window_left, window_right;
  DType dtype;
  int threads;
};

struct AttentionFwdArgs {
  AttentionShape shape;
  Tensor4 q, k, v, out;
  float* lse;  // (batch, heads, seqlen_q), natural logarithm
};

struct AttentionBwdArgs {
  AttentionShape shape;
  Tensor4 q, k, v, out, dout, dq, dk, dv;
  const float* lse;
  const float* dlse;  // (batch, heads, seqlen_q) or null
};

// Both return false if scratch memory could not be had. Results do not depend on `threads`.
GP_DECLARE_KERNEL(bool, attention_fwd, const AttentionFwdArgs&)
GP_DECLARE_KERNEL(bool, attention_bwd, const AttentionBwdArgs&)

}  // namespace gp
