// One step of AdamW or Lion over one parameter, its state in 8-bit codes or in fp32.
// genai_perf/ops/optimizer_step/reference.py states the arithmetic; the kernels give its bits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/quantize.h"

namespace gp {

// A moment of n elements: fp32, or (absmax != nullptr) codes of `map` and one absmax a block.
struct Moment {
  void* data;
  float* absmax;
  DynamicMap map;
};

// All contiguous. `block` is a multiple of 32 up to kDynamicBlock.
struct StepArgs {
  void* p;
  const void* grad;
  DType p_dtype, grad_dtype;
  int64_t n, block;
  int threads;
};

// keep1 = beta1, take1 = 1 - beta1, and so on; decay = 1 - lr * weight_decay; rate = lr, of AdamW over
// the bias correction of the first moment; unbias = 1 / sqrt(that of the second).
struct Coefficients {
  float keep1, take1, keep2, take2, decay, rate, unbias, eps;
};

// Nothing is written and QuantizeStatus::nonfinite returned where the gradient holds NaN, infinity or,
// for AdamW, a number whose square is infinite.
GP_DECLARE_KERNEL(int, adamw_step, const StepArgs&, const Moment& first, const Moment& second,
                  const Coefficients&)
GP_DECLARE_KERNEL(int, lion_step, const StepArgs&, const Moment& first, const Coefficients&)

}  // namespace gp
