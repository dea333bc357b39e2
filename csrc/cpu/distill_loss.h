// Distillation losses and their gradients on rows of logits; genai_perf/ops/distill_loss states the
// formulas.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace gp {

// genai_perf/ops/distill_loss/options.py holds the same order.
enum class Divergence : int {
  forward_kl = 0,
  reverse_kl = 1,
  jsd = 2,
  skew_kl = 3,
  skew_reverse_kl = 4,
  tv = 5,
};

// A matrix of logits, rows x vocab: z = cap(scale * raw), cap(x) = softcap * tanh(x / softcap).
struct Logits {
  const void* data;  // null: there is none
  int64_t stride;    // elements between rows
  DType dtype;
  float scale, softcap;  // softcap 0: none
};

struct DistillLossArgs {
  int64_t rows, vocab;
  Logits student, teacher;  // teacher.data null: top-k, or labels alone
  // Top-k teacher: `k` ids and log-probabilities a row, k 0: none. With `tail` the mass that they
  // leave is a bin of its own; without, teacher and student are both conditioned on the k ids.
  const int64_t* ids;
  const float* logprobs;
  int64_t k;
  bool tail;
  float logprob_scale;    // what log-probabilities are multiplied by when they are renormalised
  const int64_t* labels;  // (rows) or null
  const float* weights;   // (rows): a row of weight 0 is not read, its loss and gradient are 0
  // weight * (soft_weight * divergence + hard_weight * cross entropy) is what is differentiated.
  float soft_weight, hard_weight;
  Divergence kind;
  float beta, temperature;
  void* grad;  // (rows, vocab) of the student's dtype, may be the student's logits; null: none
  int64_t grad_stride;
  float* loss;  // (rows, 2): divergence and cross entropy, without weights
  int threads;
};

// A row that cannot be computed: what is wrong with the first one.
enum class RowError : int { none = 0, label = 1, id = 2, repeated = 3, mass = 4, memory = 5 };
struct RowStatus {
  RowError error;
  int64_t row;
};

GP_DECLARE_KERNEL(RowStatus, distill_loss, const DistillLossArgs&)

}  // namespace gp
